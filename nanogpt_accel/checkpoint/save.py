"""Write checkpoints: to a temporary name, flush, rename, verify, and only then prune older ones."""

import copy
import errno
import json
import os
import re
import shutil
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from ..utils.files import delete, flush_folder, flush_tree, remove_checkpoint, rename_folder, sha256
from .layout import INDEX, checkpoint_name
from .run_folder import prune, publish
from .verify import find_corruption

LARGE = 5e8  # bytes of a checkpoint that takes some seconds to write
SHARD_TIMEOUT_S = 1800  # seconds for a process to write its piece of the optimizer's state
_LEFTOVER = re.compile(r"\.checkpoint-[0-9]{1,12}\.(tmp|old)$")


class Saver:
    """Saves the checkpoints of a run, one at a time: written beside their place, flushed to disk, renamed, read back,
    and only then are older ones pruned.

    Every process of the run has one and calls `save` after the same steps. The main process writes the folder; where
    the optimizer's state lies in pieces, each process writes its own. What cannot be written is said and done with:
    the checkpoints before it are untouched, and the next one tries again.

    Args:
        run: the run folder. accelerator: Accelerate's.
        tokenizer: has save(folder, max_length).
        keep_last: how many of the newest checkpoints stay; the best one stays besides.
        in_background: write in a thread, while the training goes on with the next step.
        say: takes a line for the user. on_saved: called with the path of each checkpoint, on the main process.
    """

    def __init__(self, run, accelerator, tokenizer, keep_last, in_background=False, say=print, on_saved=None):
        self.run, self.accelerator, self.tokenizer, self.keep_last = Path(run), accelerator, tokenizer, keep_last
        self.in_background, self.say, self.on_saved = in_background, say, on_saved
        self.trouble = None  # why the last checkpoint is not there, as text
        self._thread = self._defect = None

    def save(self, trainer, model, optimizer, card):
        """Save a checkpoint; returns when it is written, or in_background when everything is copied.

        Args:
            trainer: what trainer.json holds; `step` (steps done) and `best_step` are used here.
            model: the unwrapped GPT. optimizer: the prepared one of its parameters. card: text of README.md.
        """
        from ..distributed import sharding

        self.wait()
        sharding.reshard(model)
        number, pieces = sharding.shard_index(self.accelerator, model)
        weights = sharding.full_state_dict(self.accelerator, model, copy=self.in_background)
        tensors, first_rows = sharding.optimizer_shard(self.accelerator, model, optimizer, copy=self.in_background)
        final = self.run / checkpoint_name(trainer["step"])
        is_main, temporary = self.accelerator.is_main_process, self.run / f".{final.name}.tmp"
        self.trouble = None
        # (an evaluation that comes after a resumed step makes it the best one: then it is there already)
        is_there = is_main and final.exists() and find_corruption(final) is None
        if is_main and not is_there:
            n_bytes = sum(tensor.nbytes for tensor in weights.values())
            n_bytes += pieces * sum(tensor.nbytes for tensor in tensors.values())
            self._try(_prepare_temp_dir, temporary, n_bytes)
            if n_bytes > LARGE and not self.in_background:
                self.say(f"saving {final}, {n_bytes / 1e6:,.0f} MB")
        self.accelerator.wait_for_everyone()  # nobody writes into what a killed process left

        def write():
            if number is not None and temporary.is_dir():
                self._try(_write_shard, temporary, number, pieces, tensors, first_rows)
            if is_main and not is_there:
                self._try(_write_model, temporary, model, weights, self.tokenizer, card, trainer)
                self._try(_commit, temporary, final, pieces)
            if is_main:
                self._close(temporary, final, trainer["best_step"])

        def write_and_tell():
            _lower_thread_priority()
            try:
                write()
            except Exception as error:  # a defect, which must not end with its thread
                self._defect = error

        if self.in_background:
            self._thread = threading.Thread(target=write_and_tell)
            self._thread.start()
        else:
            write()
            self.accelerator.wait_for_everyone()

    def wait(self):
        """Return when nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._defect is not None:
            raise self._defect

    def _try(self, step, *arguments):
        """One step of a save, if those before it went well."""
        from safetensors import SafetensorError

        if self.trouble is None:
            try:
                step(*arguments)
            except (OSError, SafetensorError) as error:
                self.trouble = str(error)

    def _close(self, temporary, final, best_step):
        """Make the new checkpoint known and prune, or say what was in the way."""
        if self.trouble is not None:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk is not kept full by half a checkpoint
            self.say(
                f"warning: {final} is NOT SAVED: {self.trouble}; the checkpoints before it are untouched, and the "
                "next one tries again: make room"
            )
            return
        self.say(f"saved {final}")
        try:
            publish(self.run, best_step, final)
            prune(self.run, best_step, final, self.keep_last)
        except OSError as error:  # the checkpoint itself is there
            self.say(f"warning: {self.run}: cleaning up after {final.name} failed: {error}")
        if self.on_saved is not None:
            self.on_saved(final)


def _lower_thread_priority():
    """Leave the processors to this process's other threads. Beside a writer of equal rank, a step on 2 cores came as
    late as if it had waited for the file. (Linux alone ranks single threads.)"""
    if sys.platform == "linux":
        with suppress(OSError):  # where that is forbidden
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _prepare_temp_dir(temporary, n_bytes):
    """An empty folder to write into, where the disk has room for n_bytes."""
    for leftover in temporary.parent.glob(".checkpoint-*"):  # of a process that was killed while it saved or pruned
        if leftover == temporary:
            delete(leftover)
        elif _LEFTOVER.match(leftover.name):
            with suppress(OSError):  # Windows deletes nothing that somebody reads; the next save tries again
                delete(leftover)
    (temporary / "state").mkdir(parents=True)
    free = shutil.disk_usage(temporary).free
    if free < n_bytes:
        raise OSError(errno.ENOSPC, f"it takes {n_bytes / 1e6:,.0f} MB, and {free / 1e6:,.0f} are free")


def _write_model(temporary, model, weights, tokenizer, card, trainer):
    """Everything of a checkpoint but the optimizer's state. model: for its two configs."""
    import torch

    from ..model import GPT

    with torch.device("meta"):
        shape = GPT(copy.deepcopy(model.config))  # (a wrapped model would be saved as its wrapper's class)
    shape.generation_config = model.generation_config
    shape.save_pretrained(temporary, state_dict=dict(weights))
    tokenizer.save(temporary, max_length=model.config.block_size)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    (temporary / "state" / "trainer.json").write_text(json.dumps(trainer, indent=2), encoding="utf-8")


def _write_shard(temporary, number, pieces, tensors, first_rows):
    """One process's piece of the optimizer's state, and then a receipt for it, which the main process waits for."""
    from safetensors.torch import save_file

    file = temporary / "state" / _shard_name(number, pieces)
    try:
        save_file(tensors, file, {"first_rows": json.dumps(first_rows)})
        receipt = _size_and_hash(file)
    except Exception as error:
        receipt = {"error": f"{file.name}: {error}"}
        raise
    finally:
        temporary_receipt = file.with_suffix(".receipt.tmp")
        temporary_receipt.write_text(json.dumps(receipt), encoding="utf-8")
        os.replace(temporary_receipt, file.with_suffix(".receipt"))


def _commit(temporary, final, pieces):
    """Wait for all the pieces, write the index of the files, flush them to disk, and give the folder its name."""
    facts = _wait_for_shards(temporary / "state", pieces)
    for file in sorted(temporary.rglob("*")):
        name = file.relative_to(temporary).as_posix()
        if file.is_file() and name != "README.md":  # the card is for people, who may write into it
            facts.setdefault(name, _size_and_hash(file))
    (temporary / INDEX).write_text(json.dumps({"files": facts}, indent=1), encoding="utf-8")
    flush_tree(temporary)
    if final.exists():  # a damaged one, which the run went back behind
        remove_checkpoint(final)
    rename_folder(temporary, final)
    flush_folder(final.parent)
    trouble = find_corruption(final, thorough=False)
    if trouble:
        raise OSError(f"the checkpoint did not reach the disk whole: {trouble}")


def _wait_for_shards(state, pieces):
    """{file: facts} of the pieces of the optimizer's state, as soon as all processes have written theirs."""
    facts = {}
    give_up = time.monotonic() + SHARD_TIMEOUT_S
    for number in range(pieces):
        name = _shard_name(number, pieces)
        receipt = state / Path(name).with_suffix(".receipt")
        while not receipt.is_file():
            if time.monotonic() > give_up:
                raise OSError(f"state/{name} did not come within {SHARD_TIMEOUT_S} s from its process")
            time.sleep(0.05)
        found = json.loads(receipt.read_text(encoding="utf-8"))
        receipt.unlink()
        if "error" in found:
            raise OSError(found["error"])
        facts[f"state/{name}"] = found
    return facts


def _shard_name(number, pieces):
    return "optimizer.safetensors" if pieces == 1 else f"optimizer-{number + 1:05d}-of-{pieces:05d}.safetensors"


def _size_and_hash(file):
    """Size and hash of a file, for the index."""
    return {"size": os.path.getsize(file), "sha256": sha256(file)}
