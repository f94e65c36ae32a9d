"""Write checkpoints: write to a temporary folder, flush, rename, verify, and only then prune older checkpoints."""

import copy
import errno
import json
import os
import platform
import re
import shutil
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..utils.files import (
    copy_mode,
    delete,
    flush_folder,
    flush_tree,
    remove_checkpoint,
    rename_folder,
    sha256,
    write_atomically,
)
from .layout import INDEX, TRAINER, checkpoint_path, is_checkpoint, shard_path
from .run_folder import prune, publish
from .verify import find_corruption, is_corrupted

LARGE = 5e8  # bytes; saving a larger checkpoint is announced, because it takes some seconds
SHARD_SHARE = 0.8  # the main process waits for the shards for this share of collective_timeout, before others time out
_LEFTOVER = re.compile(r"\.checkpoint-[0-9]{1,12}\.(tmp|old)$")


@dataclass
class _Snapshot:
    """Everything that one process writes to a checkpoint. For background saves, the tensors are copies."""

    final: Path  # the checkpoint folder
    temporary: Path  # the folder's name until it is complete
    is_saved: bool  # whether a valid checkpoint of this step exists already
    trainer: dict
    card: str
    config: object
    generation_config: object
    weights: dict  # {name: tensor}; empty except on the main process
    shard: int | None  # index of this process's shard of the optimizer state; None: another process saves it
    num_shards: int
    tensors: dict  # the shard: {"PARAMETER/FIELD": tensor}
    layout: dict  # how the tensors belong to the parameters, see sharding.optimizer_shard


class Saver:
    """Saves the checkpoints of a run, one at a time.

    Every process of the run has a Saver, and all processes must call `save` at the same steps. The main process writes
    the folder; if the optimizer state is sharded, each process writes its own shard. If a checkpoint cannot be saved,
    the Saver prints a warning, stores the reason in `error` and keeps the older checkpoints.

    Args:
        run: the run folder. accelerator: the Accelerator. tokenizer: an object with save(folder, max_length, has_pad).
        keep_last: number of the latest checkpoints to keep, in addition to the best one.
        in_background: write in a thread while training continues.
        say: called with a line for the user. on_saved: called on the main process with the path of each checkpoint.
        timeout: collective_timeout, seconds that the processes wait for each other.
    """

    def __init__(
        self, run, accelerator, tokenizer, keep_last, in_background=False, say=print, on_saved=None, timeout=600
    ):
        self.run, self.accelerator, self.tokenizer, self.keep_last = Path(run), accelerator, tokenizer, keep_last
        self.in_background, self.say, self.on_saved, self.timeout = in_background, say, on_saved, timeout
        self.error = None  # the reason why the last save failed
        self._thread = self._thread_error = None

    def save(self, trainer, model, optimizer, card):
        """Save a checkpoint. With in_background, return as soon as all tensors are copied, before files are written.

        Args:
            trainer: content of trainer.json; must contain `step` (the number of finished steps) and `best_step`.
            model: the unwrapped GPT. optimizer: as accelerator.prepare returns it. card: text of README.md.
        """
        from accelerate.utils import broadcast_object_list

        self.wait()
        snapshot = self._take_snapshot(trainer, model, optimizer, card)
        self.error = None
        if self.accelerator.is_main_process and not snapshot.is_saved:
            n_bytes = sum(tensor.nbytes for tensor in snapshot.weights.values())
            n_bytes += snapshot.num_shards * sum(tensor.nbytes for tensor in snapshot.tensors.values())
            try:
                _prepare_temp_dir(snapshot.temporary, n_bytes)
            except OSError as error:
                self.error = str(error)
            if n_bytes > LARGE and not self.in_background:
                self.say(f"saving {snapshot.final}, {n_bytes / 1e6:,.0f} MB")
        if self.accelerator.distributed_type != "NO":  # wait until the temporary folder is prepared
            self.error, snapshot.is_saved = broadcast_object_list([self.error, snapshot.is_saved])
        if self.in_background:
            self._thread = threading.Thread(target=self._write_in_background, args=(snapshot,))
            self._thread.start()
        else:
            self._write(snapshot)
            self.accelerator.wait_for_everyone()

    def wait(self):
        """Wait until a save in the background is done. If its thread failed with an exception, raise the exception."""
        if self._thread is not None:
            # Ctrl-C inside Thread.start() leaves a thread that starts a moment later, or never
            deadline = time.monotonic() + 1
            while self._thread.ident is None and time.monotonic() < deadline:
                time.sleep(0.01)
            if self._thread.ident is not None:
                self._thread.join()
            self._thread = None
        if self._thread_error is not None:
            raise self._thread_error

    def _take_snapshot(self, trainer, model, optimizer, card):
        """Gather the weights and this process's optimizer shard on the CPU. All processes must call this."""
        from ..distributed import sharding

        sharding.reshard(model)
        weights = sharding.full_state_dict(self.accelerator, model, copy=self.in_background)
        shard = sharding.shard_index(self.accelerator, model)
        state = sharding.optimizer_shard(self.accelerator, model, optimizer, copy=self.in_background)
        config, generation_config = copy.deepcopy((model.config, model.generation_config))
        final = checkpoint_path(self.run, trainer["step"])
        temporary = final.with_name(f".{final.name}.tmp")
        # a resumed run may start with an evaluation, and then save the same step again
        is_saved = self.accelerator.is_main_process and final.exists() and not is_corrupted(final)
        return _Snapshot(
            final, temporary, is_saved, dict(trainer), card, config, generation_config, weights, *shard, *state
        )

    def _write(self, snapshot):
        from safetensors import SafetensorError

        temporary, is_main = snapshot.temporary, self.accelerator.is_main_process
        deadline = time.monotonic() + SHARD_SHARE * self.timeout
        try:
            if self.error is None and not snapshot.is_saved:
                if snapshot.shard is not None:
                    _write_shard(temporary, snapshot)
                if is_main:
                    _write_model(temporary, snapshot, self.tokenizer)
                    _commit(temporary, snapshot.final, snapshot.num_shards, deadline)
        except (OSError, SafetensorError) as error:
            self.error = str(error)
            if not is_main:  # the main process also reports this error if it can read the receipt (see _write_shard)
                where = f"process {self.accelerator.process_index} on {platform.node()}"
                print(f"warning: {where} cannot write to {temporary}: {error}", file=sys.stderr, flush=True)
        if is_main:
            self._finish(snapshot)

    def _write_in_background(self, snapshot):
        if sys.platform == "linux":  # only Linux supports priorities per thread
            with suppress(OSError):  # not permitted
                # with equal priorities on 2 cores, a background save delayed the next step as much as a normal save
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            self._write(snapshot)
        except Exception as error:  # a bug; `wait` raises it in the main thread
            self._thread_error = error

    def _finish(self, snapshot):
        """Publish the new checkpoint and prune older ones, or report why it was not saved."""
        final, best_step = snapshot.final, snapshot.trainer["best_step"]
        if self.error is not None:
            shutil.rmtree(snapshot.temporary, ignore_errors=True)  # frees space on a full disk
            self.say(
                f"warning: {final} is NOT SAVED: {self.error}; check the disk space and permissions. Older checkpoints "
                "are intact, and the next save will try again"
            )
            return
        self.say(f"saved {final}")
        try:
            publish(self.run, best_step, final)
            prune(self.run, best_step, final, self.keep_last)
        except OSError as error:  # the checkpoint itself is saved
            self.say(f"warning: {final} is saved, but updating links or deleting older checkpoints failed: {error}")
        if self.on_saved is not None:
            self.on_saved(final)


def _prepare_temp_dir(temporary, n_bytes):
    """Delete leftovers of killed processes, create the temporary folder, and check that the disk has n_bytes free."""
    for leftover in temporary.parent.glob(".checkpoint-*"):
        if leftover == temporary:
            delete(leftover)
        elif _LEFTOVER.match(leftover.name):
            with suppress(OSError):  # Windows cannot delete open files; the next save tries again
                delete(leftover)
    (temporary / "state").mkdir(parents=True)
    needed, free = n_bytes / 1e6, shutil.disk_usage(temporary).free / 1e6
    if free < needed:
        raise OSError(errno.ENOSPC, f"the checkpoint needs {needed:,.0f} MB, but only {free:,.0f} MB are free")


def _write_model(temporary, snapshot, tokenizer):
    """Write all files of a checkpoint except the optimizer state and state/index.json."""
    import torch

    from ..model import GPT

    with torch.device("meta"):
        model = GPT(snapshot.config)  # a wrapped model would be saved under the class name of the wrapper
    model.generation_config = snapshot.generation_config
    model.save_pretrained(temporary, state_dict=dict(snapshot.weights))
    config = snapshot.config
    tokenizer.save(temporary, max_length=config.block_size, has_pad=config.pad_token_id is not None)
    (temporary / "README.md").write_text(snapshot.card, encoding="utf-8")
    (temporary / TRAINER).write_text(json.dumps(snapshot.trainer, indent=2), encoding="utf-8")


def _write_shard(temporary, snapshot):
    """Write this process's shard of the optimizer state. Then write a receipt file: it contains the index entry of the
    shard, or the error if the shard could not be written. The main process waits for the receipts of all processes."""
    from safetensors.torch import save_file

    file = temporary / shard_path(snapshot.shard, snapshot.num_shards)
    try:
        # a single metadata key, because safetensors writes several keys in a random order
        save_file(snapshot.tensors, file, {"layout": json.dumps(snapshot.layout)})
        entry = _index_entry(file)
    except Exception as error:
        entry = {"error": f"{file.name}: {error}"}
        raise
    finally:
        write_atomically(file.with_suffix(".receipt"), json.dumps(entry))


def _commit(temporary, final, num_shards, deadline):
    """Wait for all shards, write the index, flush everything to disk, rename the folder, and verify it."""
    index = _wait_for_shards(temporary, num_shards, deadline)
    for file in sorted(temporary.rglob("*")):
        name = file.relative_to(temporary).as_posix()
        if file.is_file() and name != "README.md":  # users may edit the model card
            index.setdefault(name, _index_entry(file))
    (temporary / INDEX).write_text(json.dumps({"files": index}, indent=1), encoding="utf-8")
    copy_mode(temporary / INDEX, temporary)
    flush_tree(temporary)
    if os.path.lexists(final):
        if not is_checkpoint(final):
            raise OSError(f"{final} exists and is not a checkpoint; move it to another folder")
        remove_checkpoint(final)  # it is corrupted, and the run resumed from an earlier checkpoint
    rename_folder(temporary, final)
    flush_folder(final.parent)
    problem = find_corruption(final, thorough=False)
    if problem:
        raise OSError(f"verification failed: {problem}")


def _wait_for_shards(temporary, num_shards, deadline):
    """Wait for the receipts of all shards of the optimizer state. Return {file: its entry in the index}.

    deadline: value of time.monotonic() after which a missing receipt is an error.
    """
    entries = {}
    for name in (shard_path(shard, num_shards) for shard in range(num_shards)):
        receipt = (temporary / name).with_suffix(".receipt")
        while not receipt.is_file():
            if time.monotonic() > deadline:
                raise OSError(f"{name} was not written in time: the limit is {SHARD_SHARE:.0%} of collective_timeout")
            time.sleep(0.05)
        entry = json.loads(receipt.read_text(encoding="utf-8"))
        receipt.unlink()
        if "error" in entry:
            raise OSError(entry["error"])
        entries[name] = entry
    return entries


def _index_entry(file):
    return {"size": os.path.getsize(file), "sha256": sha256(file)}
