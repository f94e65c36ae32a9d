"""Checkpoint folders: written whole or not at all, found again, verified, and pruned.

    runs/NAME/
      checkpoint-000500/     a Hub repository: config.json, model.safetensors, tokenizer, model card, model.py
        state/               what only resuming needs: trainer.json, optimizer.safetensors, index.json
      model.safetensors ...  links to the files of the best checkpoint, so that runs/NAME loads as a model

state/index.json knows the size and hash of every file. Everything read back is JSON or safetensors; nothing is
unpickled.
"""

import copy
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from . import hub

TRAINER = "state/trainer.json"
INDEX = "state/index.json"  # size and hash of each file of a checkpoint
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")  # without these there is no model
LOCK, HOLDER = ".lock", ".lock.json"  # of a run folder that is being trained in
LARGE = 5e8  # bytes of a checkpoint that takes some seconds to write
PATIENCE = 1800  # seconds for a process to write its piece of the optimizer's state
_NAME = re.compile(r"checkpoint-([0-9]{1,12})$")
# what a run, and `report` after it, writes beside the checkpoints
_OUTPUT = re.compile(r"(metrics|samples)\.jsonl|expect\.json|loss\.png|nonfinite-\d+\.json|report\.html|"
                     r"report-(loss|learning_rate|grad_norm|tokens_per_second|peak_memory|mfu)\.png")
_LEFTOVER = re.compile(r"\.checkpoint-[0-9]{1,12}\.(tmp|old)$")


def checkpoint_path(run, step):
    return Path(run) / _name(step)


def checkpoints(run):
    """The checkpoint folders of a run, oldest first; whole or not."""
    found = [path for path in Path(run).glob("checkpoint-*") if _NAME.match(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(_NAME.match(path.name)[1]))


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
        from . import sharding

        self.wait()
        sharding.reshard(model)
        number, pieces = sharding.piece_number(self.accelerator, model)
        weights = sharding.whole_weights(self.accelerator, model, copy=self.in_background)
        tensors, first_rows = sharding.optimizer_piece(self.accelerator, model, optimizer, copy=self.in_background)
        final = self.run / _name(trainer["step"])
        is_main, temporary = self.accelerator.is_main_process, self.run / f".{final.name}.tmp"
        self.trouble = None
        # (an evaluation that comes after a resumed step makes it the best one: then it is there already)
        is_there = is_main and final.exists() and damage(final) is None
        if is_main and not is_there:
            n_bytes = sum(tensor.nbytes for tensor in weights.values())
            n_bytes += pieces * sum(tensor.nbytes for tensor in tensors.values())
            self._try(_make_place, temporary, n_bytes)
            if n_bytes > LARGE and not self.in_background:
                self.say(f"saving {final}, {n_bytes / 1e6:,.0f} MB")
        self.accelerator.wait_for_everyone()  # nobody writes into what a killed process left

        def write():
            if number is not None and temporary.is_dir():
                self._try(_write_piece, temporary, number, pieces, tensors, first_rows)
            if is_main and not is_there:
                self._try(_write_folder, temporary, model, weights, self.tokenizer, card, trainer)
                self._try(_complete, temporary, final, pieces)
            if is_main:
                self._close(temporary, final, trainer["best_step"])

        def write_and_tell():
            _give_way()
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
            self.say(f"warning: {final} is NOT SAVED: {self.trouble}; the checkpoints before it are untouched, and the "
                     "next one tries again: make room")
            return
        self.say(f"saved {final}")
        try:
            _publish(self.run, best_step, final)
            _prune(self.run, best_step, final, self.keep_last)
        except OSError as error:  # the checkpoint itself is there
            self.say(f"warning: {self.run}: cleaning up after {final.name} failed: {error}")
        if self.on_saved is not None:
            self.on_saved(final)


def _give_way():
    """Leave the processors to this process's other threads. Beside a writer of equal rank, a step on 2 cores came as
    late as if it had waited for the file. (Linux alone ranks single threads.)"""
    if sys.platform == "linux":
        with suppress(OSError):  # where that is forbidden
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _name(step):
    return f"checkpoint-{step:06d}"


def _make_place(temporary, n_bytes):
    """An empty folder to write into, where the disk has room for n_bytes."""
    for leftover in temporary.parent.glob(".checkpoint-*"):  # of a process that was killed while it saved or pruned
        if leftover == temporary:
            _delete(leftover)
        elif _LEFTOVER.match(leftover.name):
            with suppress(OSError):  # Windows deletes nothing that somebody reads; the next save tries again
                _delete(leftover)
    (temporary / "state").mkdir(parents=True)
    free = shutil.disk_usage(temporary).free
    if free < n_bytes:
        raise OSError(errno.ENOSPC, f"it takes {n_bytes / 1e6:,.0f} MB, and {free / 1e6:,.0f} are free")


def _write_folder(temporary, model, weights, tokenizer, card, trainer):
    """Everything of a checkpoint but the optimizer's state. model: for its two configs."""
    import torch

    from .model import GPT

    with torch.device("meta"):
        shape = GPT(copy.deepcopy(model.config))  # (a wrapped model would be saved as its wrapper's class)
    shape.generation_config = model.generation_config
    shape.save_pretrained(temporary, state_dict=dict(weights))
    tokenizer.save(temporary, max_length=model.config.block_size)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    (temporary / "state" / "trainer.json").write_text(json.dumps(trainer, indent=2), encoding="utf-8")


def _write_piece(temporary, number, pieces, tensors, first_rows):
    """One process's piece of the optimizer's state, and then a receipt for it, which the main process waits for."""
    from safetensors.torch import save_file

    file = temporary / "state" / _piece(number, pieces)
    try:
        save_file(tensors, file, {"first_rows": json.dumps(first_rows)})
        receipt = _facts(file)
    except Exception as error:
        receipt = {"error": f"{file.name}: {error}"}
        raise
    finally:
        temporary_receipt = file.with_suffix(".receipt.tmp")
        temporary_receipt.write_text(json.dumps(receipt), encoding="utf-8")
        os.replace(temporary_receipt, file.with_suffix(".receipt"))


def _complete(temporary, final, pieces):
    """Wait for all the pieces, write the index of the files, flush them to disk, and give the folder its name."""
    facts = _receipts(temporary / "state", pieces)
    for file in sorted(temporary.rglob("*")):
        name = file.relative_to(temporary).as_posix()
        if file.is_file() and name != "README.md":  # the card is for people, who may write into it
            facts.setdefault(name, _facts(file))
    (temporary / INDEX).write_text(json.dumps({"files": facts}, indent=1), encoding="utf-8")
    _flush(temporary)
    if final.exists():  # a damaged one, which the run went back behind
        _remove(final)
    _rename(temporary, final)
    _flush_folder(final.parent)
    trouble = damage(final, thorough=False)
    if trouble:
        raise OSError(f"the checkpoint did not reach the disk whole: {trouble}")


def _receipts(state, pieces):
    """{file: facts} of the pieces of the optimizer's state, as soon as all processes have written theirs."""
    facts = {}
    give_up = time.monotonic() + PATIENCE
    for number in range(pieces):
        name = _piece(number, pieces)
        receipt = state / Path(name).with_suffix(".receipt")
        while not receipt.is_file():
            if time.monotonic() > give_up:
                raise OSError(f"state/{name} did not come within {PATIENCE} s from its process")
            time.sleep(0.05)
        found = json.loads(receipt.read_text(encoding="utf-8"))
        receipt.unlink()
        if "error" in found:
            raise OSError(found["error"])
        facts[f"state/{name}"] = found
    return facts


_PIECE = re.compile(r"state/optimizer(-\d{5}-of-\d{5})?\.safetensors$")


def _piece(number, pieces):
    return "optimizer.safetensors" if pieces == 1 else f"optimizer-{number + 1:05d}-of-{pieces:05d}.safetensors"


def _facts(file):
    """Size and hash of a file, for the index."""
    return {"size": os.path.getsize(file), "sha256": _sha256(file)}


def _sha256(file):
    digest, buffer = hashlib.sha256(), bytearray(2**22)
    with open(file, "rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _prune(run, best_step, final, keep_last):
    """Delete the checkpoints that are neither among the newest nor the best."""
    best = _best(run, best_step, final)
    found = checkpoints(run)
    kept = found[:found.index(final) + 1][-keep_last:]
    for old in found:
        # later ones are damaged, for the run went back behind them; or another training's, and not ours to delete. A
        # folder that only has such a name is the user's
        is_ours = _is_checkpoint(old) and (old < final or damage(old) is not None)
        if old not in kept and old != best and is_ours:
            _remove(old)


def _is_checkpoint(path):
    """Whether a folder holds anything of a checkpoint, and not only has its name."""
    return any((path / name).is_file() for name in (*MODEL_FILES, TRAINER))


def begin(run, recipe, is_resumed):
    """Make the run folder and write run.yaml (the text `recipe`) into it; a run that is not resumed clears away the
    checkpoints, links and logs of the one before it."""
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    for leftover in run.glob(".push-*"):  # links of a process that was killed while it pushed
        shutil.rmtree(leftover, ignore_errors=True)
    if not is_resumed:
        for path in run.iterdir():
            if is_link(path) or _OUTPUT.fullmatch(path.name):
                path.unlink()
        for path in filter(_is_checkpoint, checkpoints(run)):  # by which a copy in a link's place was known
            _remove(path)
    temporary = run / "run.yaml.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(recipe)
        file.flush()
        os.fsync(file.fileno())  # an empty run.yaml would go on as another run
    os.replace(temporary, run / "run.yaml")


def damage(path, resumable=True, thorough=True):
    """What is missing or broken in a checkpoint folder, as text; None where it is whole.

    resumable: also look at state/, and insist on its index, which knows the size and hash of every file.
    thorough: compare hashes, not sizes alone. Without an index (a folder that came without its state/), JSON files
        have to parse and safetensors files to have the length that their header says.
    """
    path = Path(path)
    facts = _read_index(path)
    if facts is None and resumable:
        return f"{INDEX} is {'damaged' if (path / INDEX).exists() else 'missing'}"
    if facts is None:
        return next(filter(None, (_file_damage(path, name) for name in MODEL_FILES)), None)
    facts = {name: known for name, known in facts.items() if resumable or not name.startswith("state/")}
    for name, known in facts.items():  # before anything is read
        if not (path / name).is_file():
            return f"{name} is missing"
        if os.path.getsize(path / name) != known["size"]:
            return f"{name} is damaged"
    if resumable and not _is_trainer(path):
        return f"{TRAINER} is not that of this checkpoint"
    if thorough:
        with ThreadPoolExecutor() as pool:
            found = pool.map(_hash_of, [path / name for name in facts])
            for (name, known), hash_now in zip(facts.items(), found, strict=True):
                if hash_now != known["sha256"]:
                    return f"{name} is damaged"
    return None


def _file_damage(path, name):
    """Whether a JSON file parses and a safetensors file has the length that its header says, as `damage` tells it."""
    from safetensors import SafetensorError, safe_open

    try:
        if name.endswith(".json"):
            if not isinstance(json.loads((path / name).read_text(encoding="utf-8")), dict):
                return f"{name} is damaged"
        else:
            with safe_open(path / name, framework="np"):
                pass
    except FileNotFoundError:
        return f"{name} is missing"
    except (SafetensorError, ValueError, OSError):
        return f"{name} is damaged"
    return None


def _read_index(path):
    """{file: {"size": bytes, "sha256": hash}} of a checkpoint, or None where there is no whole index."""
    try:
        facts = json.loads((path / INDEX).read_text(encoding="utf-8"))["files"]
        is_whole = (facts.keys() >= {*MODEL_FILES, TRAINER} and any(map(_PIECE.match, facts))
                    and all(re.fullmatch(r"(state/)?[\w.-]{1,200}", name) for name in facts)
                    and all(known.keys() == {"size", "sha256"} for known in facts.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return facts if is_whole else None


def _is_trainer(path):
    """Whether trainer.json is that of a checkpoint of this name: its step decides where the run goes on."""
    try:
        trainer = read_trainer(path)
        return trainer["step"] == int(_NAME.match(path.name)[1]) and isinstance(trainer["best_step"], (int, type(None)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _hash_of(file):
    """The hash of a file, read once for as long as the file does not change."""
    try:
        facts = os.stat(file)
        return _hash_once(file, facts.st_size, facts.st_mtime_ns, facts.st_ino)
    except OSError:
        return None


@lru_cache(maxsize=1024)  # the files of some checkpoints; a long run writes many
def _hash_once(file, size, changed, number):
    return _sha256(file)


def newest_whole(run, warn=print, resumable=True, thorough=True):
    """The newest whole checkpoint of a run, or None where there is none. `warn` gets a line for each damaged one.

    resumable, thorough: as in `damage`.
    """
    for path in reversed(checkpoints(run)):
        trouble = damage(path, resumable, thorough)
        if trouble is None:
            return path
        warn(f"warning: {path}: {trouble}; taking the checkpoint before it")
    return None


def read_trainer(path):
    """The trainer.json of a checkpoint."""
    return json.loads((Path(path) / "state" / "trainer.json").read_text(encoding="utf-8"))


def shape_differences(path, config, shape):
    """Where a model's shape, {key: value}, differs from the `config` of the checkpoint at `path`: a list of
    problems."""
    differing = [key for key in shape if shape[key] != config[key]]
    # these follow from n_head and n_embd unless they are given, and are no second mistake
    own = [key for key in differing if key not in ("n_kv_head", "head_dim", "n_inner")]
    return [f"model.{key}={shape[key]}: the checkpoint {path} has {key}={config[key]}, and a run goes on with the "
            "shape that it began with" for key in own or differing]


def lock(run):
    """Take a run folder for this process, until it ends or releases it: the operating system's lock on a file, which
    also says who holds it. A process that died holds nothing.

    Raises:
        ValueError: another process has it.
    """
    from filelock import FileLock, Timeout

    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    held = FileLock(run / LOCK, timeout=0)
    try:
        held.acquire()
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):  # a file system without locks; a run there does without
            return held
        if not isinstance(error, Timeout):
            raise ValueError(f"out_dir={run}: {run / LOCK} cannot be locked ({error.strerror}); move it away, or take "
                             "another out_dir") from None
        raise ValueError(f"out_dir={run}: {_holder(run)} is training in it; wait for its end, stop it, or take another "
                         "out_dir") from None
    with suppress(OSError):  # only a help for others
        (run / HOLDER).write_text(json.dumps({"host": platform.node(), "pid": os.getpid()}), encoding="utf-8")
    return held


def check_lock(run):
    """Whether another process is training in a run folder, as a list of problems."""
    if not (Path(run) / LOCK).exists():
        return []
    try:
        lock(run).release()
    except ValueError as error:
        return [str(error)]
    return []


def _holder(run):
    try:
        holder = json.loads((run / HOLDER).read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def check_folder(folder):
    """Whether a new run may begin in a folder, as a list of problems: files of the user's own are not touched."""
    folder = Path(folder)
    names = ("README.md", "model.py", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
             "tokenizer_config.json")
    folders = [name for name in ("run.yaml", "metrics.jsonl", "samples.jsonl", "loss.png") if (folder / name).is_dir()]
    if folders:
        return [f"out_dir={folder}: {', '.join(folders)} is a folder there, and a run writes such a file; take another "
                "out_dir"]
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    own = [name for name in found if (name in names or _OUTPUT.fullmatch(name)) and not is_link(folder / name)]
    if own and not (folder / "run.yaml").exists():  # a run that was begun has one
        return [f"out_dir={folder}: holds {', '.join(own)}, but no run; take another out_dir"]
    return []


def check_empty(folder, key):
    """Whether a model folder can be made at a place: that it can be written to, holds nothing yet, and is no part of a
    run, which prunes what it does not know. A list of problems. key: for the message."""
    folder = Path(folder)
    if folder.is_symlink() and not folder.exists():
        return [f"{key}={folder}: a link to nothing; give another folder"]
    if folder.is_dir() and any(file.name != ".tmp" for file in folder.iterdir()):  # (of an export that was killed)
        return [f"{key}={folder}: holds something already; give a folder that does not exist yet, or is empty"]
    for parent in folder.absolute().resolve().parents:
        if _NAME.match(parent.name) or (parent / "run.yaml").is_file():
            return [f"{key}={folder}: lies in the run {parent}; give a folder outside"]
    return check_writable(folder, key)


def check_model(target):
    """Whether a target names a model, as far as that is known without a look into it: a list of problems."""
    return [] if may_be_model(target) else [f"{target}: {nanogpt_hint(target) or 'no such folder'}"]


def check_writable(folder, key="out_dir"):
    """Whether a folder can be made and written to, as a list of problems; the nearest one that exists is asked."""
    place = Path(folder)
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return [f"{key}={folder}: {place} is a file; take another folder"]
    try:
        with tempfile.TemporaryFile(dir=place):  # os.access says yes to root, even for /proc and /sys
            return []
    except OSError as error:
        return [f"{key}={folder}: cannot write in {place} ({error.strerror}); take another folder"]


def load_optimizer(path, accelerator, model, optimizer):
    """Put the saved optimizer state of a checkpoint into a fresh, prepared optimizer of the same model, whatever number
    of processes saved it.

    Raises:
        ValueError: the state is that of another model.
    """
    from safetensors import SafetensorError, safe_open

    from . import sharding

    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    places = {}  # "PARAMETER/FIELD" -> [(first row, file)], in order of the rows
    fields = {}  # PARAMETER -> {FIELD: None}, in order
    for file in (Path(path) / name for name in sorted(_read_index(Path(path))) if _PIECE.match(name)):
        try:
            opened = safe_open(file, framework="pt")
            first_rows = json.loads(opened.metadata()["first_rows"])
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{file}: no optimizer state of this toolkit ({error}); take the weights alone with "
                             f"init_from={path}") from None
        for key in opened.keys():  # noqa: SIM118 (no dict)
            name, _, field = key.rpartition("/")
            shape = tuple(opened.get_slice(key).get_shape())
            if name not in shapes or (shape and shape[key in first_rows:] != shapes[name][key in first_rows:]):
                raise ValueError(f"{file}: {name} is no parameter of this model, or of another shape: the file is of "
                                 f"another run; take the weights alone with init_from={path}")
            places.setdefault(key, []).append((first_rows.get(key, 0), opened))
            fields.setdefault(name, {})[field] = None

    def read(name, field, start, stop):
        """Rows start to stop - 1 of a field, from the files that hold them."""
        import torch

        key, parts = f"{name}/{field}", []
        for first, opened in sorted(places[key], key=lambda place: place[0]):
            part = opened.get_slice(key)
            if not part.get_shape():
                parts = [opened.get_tensor(key)]
                break
            low, high = max(start - first, 0), min(stop - first, part.get_shape()[0])
            if low < high:
                parts.append(part[low:high])
        found = torch.cat(parts) if len(parts) != 1 else parts[0]
        return found.clone() if os.name == "nt" else found  # Windows deletes no file that is mapped, as `found` is

    sharding.restore_optimizer(accelerator, model, optimizer, fields, read)


def find_model(target, warn=print, bars=True):
    """The local folder of a model: of a run folder its best checkpoint, a checkpoint folder, another model's folder,
    or what a Hub id stands for. warn: takes a line. bars: as for hub.download.

    Raises:
        ValueError, FileNotFoundError: nothing there that can be loaded; the message says what was looked for.
    """
    path = Path(target)
    for problem in check_model(target):
        raise FileNotFoundError(problem)
    if not path.is_dir():
        path = hub.download(str(target), warn, bars)
    elif checkpoints(path):
        newest = newest_whole(path, warn, resumable=False)
        if newest is None:
            raise ValueError(f"{target}: no whole checkpoint in this run folder")
        best_step = read_trainer(newest)["best_step"] if damage(newest) is None else None
        best = newest if best_step is None else checkpoint_path(path, best_step)
        return best if damage(best, resumable=False) is None else newest
    trouble = _model_damage(path)
    if trouble and (hint := nanogpt_hint(target)):
        raise ValueError(f"{target}: {hint}")
    if trouble:
        raise ValueError(f"{target}: {'neither a run nor' if Path(target).is_dir() else 'not'} a model folder: "
                         f"{trouble}")
    return path


def nanogpt_hint(target):
    """What to do with a ckpt.pt of nanoGPT, or a folder that holds one; empty for anything else."""
    path = Path(target)
    file = path if path.suffix == ".pt" else path / "ckpt.pt"
    return f"nanoGPT's: nanogpt-accel import {file} --to FOLDER makes it a model" if file.is_file() else ""


def may_be_model(target):
    """True for a folder that exists and for what has the form of a Hub id."""
    return Path(target).is_dir() or (hub.is_model_id(target) and not Path(target).exists())


def _model_damage(path):
    """What is missing or broken in a model folder of any origin, as text; None where it is whole."""
    weights = sorted(path.glob("*.safetensors"))
    if not weights and list(path.glob("pytorch_model*.bin")):
        return _file_damage(path, "config.json")
    names = ["config.json"] + [file.name for file in weights or [path / "model.safetensors"]]
    if (path / "model.safetensors.index.json").is_file():
        names.append("model.safetensors.index.json")
        if _file_damage(path, names[-1]) is None:
            index = json.loads((path / names[-1]).read_text(encoding="utf-8"))
            names += sorted(set(index.get("weight_map", {}).values()) - set(names))
    return next(filter(None, (_file_damage(path, name) for name in names)), None)


def _best(run, best_step, final):
    """The best checkpoint that is there: where saving the very best one failed, the one that was the best before."""
    if best_step is None:
        return final
    best, before = checkpoint_path(run, best_step), _origin(run / "model.safetensors") or final
    return best if best.exists() else before if before.exists() else final


def _publish(run, best_step, final):
    """Let the run folder itself load as its best checkpoint: a link for each file, replaced one by one. Where there are
    no links, as under Windows without the right to make them, a copy."""
    checkpoint = _best(run, best_step, final)
    for file in checkpoint.iterdir():
        if file.is_file() and _origin(run / file.name) != checkpoint:
            temporary = run / f".{file.name}.link"
            temporary.unlink(missing_ok=True)
            try:
                temporary.symlink_to(Path(checkpoint.name) / file.name)
            except OSError:
                shutil.copy2(file, temporary)  # with its time, which _origin knows it by
            os.replace(temporary, run / file.name)


def is_link(path):
    """True for one of the links or copies that _publish makes."""
    return _origin(path) is not None


def _origin(path):
    """The checkpoint folder that a file of the run folder is a link to, or a copy from; None where it is neither."""
    if path.is_symlink():
        name = os.path.dirname(os.readlink(path))
        return path.parent / name if _NAME.match(name) else None
    for folder in checkpoints(path.parent) if path.is_file() else ():
        with suppress(OSError):
            copied, held = os.stat(path), os.stat(folder / path.name)
            if (copied.st_size, copied.st_mtime_ns) == (held.st_size, held.st_mtime_ns):
                return folder
    return None


def _remove(folder):
    """Delete a checkpoint; under a hidden name first, so that a half-deleted one is never taken for a whole."""
    hidden = folder.with_name(f".{folder.name}.old")
    if hidden.exists():
        _delete(hidden)
    _rename(folder, hidden)
    _delete(hidden)


def _rename(folder, target):
    """os.rename of a folder. Windows refuses it while anybody has a file in it open, as a virus scanner has a new one
    for a moment."""
    for _ in range(20 if os.name == "nt" else 0):
        with suppress(PermissionError):
            return os.rename(folder, target)
        time.sleep(0.1)
    os.rename(folder, target)


def _delete(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _flush(folder):
    """fsync every file and folder below."""
    for place, _, files in os.walk(folder):
        for name in files:
            # Windows flushes only what is open for writing
            with open(os.path.join(place, name), "rb" if os.name == "posix" else "r+b") as file:
                os.fsync(file.fileno())
        _flush_folder(place)


def _flush_folder(folder):
    if os.name == "posix":  # Windows cannot open folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
