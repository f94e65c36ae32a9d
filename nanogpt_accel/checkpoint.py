"""Checkpoint folders: written whole or not at all, found again, verified, and pruned.

    runs/NAME/
      checkpoint-000500/     a Hub repository: config.json, model.safetensors, tokenizer, model card, model.py
        state/               what only resuming needs: trainer.json and optimizer.safetensors
      model.safetensors ...  links to the files of the best checkpoint, so that runs/NAME loads as a model

Everything read back is JSON or safetensors; nothing is unpickled.
"""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from . import hub

_TRAINER_KEYS = {"step", "best_step"}  # what this file itself reads
_NAME = re.compile(r"checkpoint-(\d+)$")


def checkpoint_path(run, step):
    return Path(run) / f"checkpoint-{step:06d}"


def checkpoints(run):
    """The checkpoint folders of a run, oldest first; whole or not."""
    found = [path for path in Path(run).glob("checkpoint-*") if _NAME.match(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(_NAME.match(path.name)[1]))


def save(run, trainer, *, model, tokenizer, card, optimizer, keep_last):
    """Write checkpoint-STEP beside its place, flush it to disk, rename it, and only then prune older ones.

    Args:
        run: the run folder.
        trainer: what trainer.json holds; `step` (steps done) and `best_step` are used here.
        model: the unwrapped GPT. tokenizer: has save(folder, max_length). card: text of README.md.
        optimizer: the torch optimizer of the model's parameters.
        keep_last: how many of the newest checkpoints stay; the best one stays besides.

    Returns:
        The checkpoint's path.

    Raises:
        OSError: disk full and the like; what was there before is untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    run = Path(run)
    for leftover in run.glob(".checkpoint-*"):  # of a process that was killed while it saved or pruned
        shutil.rmtree(leftover)
    final = checkpoint_path(run, trainer["step"])
    temporary = run / f".{final.name}.tmp"
    try:
        (temporary / "state").mkdir(parents=True)
        model.save_pretrained(temporary)
        tokenizer.save(temporary, max_length=model.config.block_size)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        save_file(_optimizer_tensors(model, optimizer), temporary / "state" / "optimizer.safetensors")
        (temporary / "state" / "trainer.json").write_text(json.dumps(trainer, indent=2), encoding="utf-8")
        _flush(temporary)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk is not kept full by half a checkpoint
        raise OSError(f"{final}: cannot be written ({error}); the checkpoints before it are untouched: make room and "
                      f"go on with nanogpt-accel train {run}") from None
    if final.exists():  # a damaged one, which the run went back behind
        _remove(final)
    os.rename(temporary, final)
    _flush_folder(run)
    trouble = damage(final)
    if trouble:
        raise OSError(f"{final}: the checkpoint did not reach the disk whole: {trouble}; the older ones were kept")

    best = checkpoint_path(run, trainer["best_step"]) if trainer["best_step"] is not None else final
    _publish(run, best if best.exists() else final)
    found = checkpoints(run)
    kept = found[:found.index(final) + 1][-keep_last:]
    for old in found:
        # later ones are damaged, for the run went back behind them; or another training's, and not ours to delete
        is_ours = old < final or damage(old) is not None
        if old not in kept and old != best and is_ours:
            _remove(old)
    return final


def begin(run, recipe, is_resumed):
    """Make the run folder and write run.yaml (the text `recipe`) into it; a run that is not resumed clears away the
    checkpoints, links and logs of the one before it."""
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    for leftover in run.glob(".push-*"):  # links of a process that was killed while it pushed
        shutil.rmtree(leftover, ignore_errors=True)
    if not is_resumed:
        for path in checkpoints(run):
            _remove(path)
        for path in run.iterdir():
            if is_link(path) or path.name in ("metrics.jsonl", "loss.png"):
                path.unlink()
    temporary = run / "run.yaml.tmp"
    temporary.write_text(recipe, encoding="utf-8")
    os.replace(temporary, run / "run.yaml")


def damage(path, resumable=True):
    """What is missing or broken in a checkpoint folder, as text; None where it is whole.

    Checked: that the JSON files parse and that the safetensors files have the length that their header says.
    resumable: also look at state/.
    """
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    names += ["state/trainer.json", "state/optimizer.safetensors"] if resumable else []
    return next(filter(None, (_file_damage(Path(path), name) for name in names)), None)


def _file_damage(path, name):
    from safetensors import SafetensorError, safe_open

    try:
        if name.endswith(".json"):
            values = json.loads((path / name).read_text(encoding="utf-8"))
            needed = _TRAINER_KEYS if name == "state/trainer.json" else set()
            if not isinstance(values, dict) or not needed <= values.keys():
                return f"{name} is damaged"
        else:
            with safe_open(path / name, framework="np"):
                pass
    except FileNotFoundError:
        return f"{name} is missing"
    except (SafetensorError, ValueError, OSError):
        return f"{name} is damaged"
    return None


def newest_whole(run, warn=print, resumable=True):
    """The newest whole checkpoint of a run, or None where there is none. `warn` gets a line for each damaged one.

    resumable: as in `damage`.
    """
    for path in reversed(checkpoints(run)):
        trouble = damage(path, resumable)
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


def check_folder(folder):
    """Whether a new run may begin in a folder, as a list of problems: files of the user's own are not touched."""
    folder = Path(folder)
    names = ("metrics.jsonl", "loss.png", "README.md", "model.py", "config.json", "generation_config.json",
             "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    own = [name for name in names if (folder / name).exists() and not is_link(folder / name)]
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


def load_optimizer(path, model, optimizer):
    """Put the saved optimizer state of a checkpoint into a fresh optimizer of the same model.

    Raises:
        ValueError: the state is that of another model.
    """
    from safetensors.torch import load_file

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    index_of = {id(p): i for i, p in enumerate(parameters)}
    index_of = {name: index_of[id(p)] for name, p in model.named_parameters()}
    state = {}
    for key, tensor in load_file(Path(path) / "state" / "optimizer.safetensors").items():
        name, _, field = key.rpartition("/")
        if name not in index_of or (tensor.dim() and tensor.shape != parameters[index_of[name]].shape):
            raise ValueError(f"{path}/state/optimizer.safetensors: {name} is no parameter of this model, or of another "
                             f"shape: the file is of another run; take the weights alone with init_from={path}")
        state.setdefault(index_of[name], {})[field] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def find_model(target, warn=print):
    """The local folder of a model: of a run folder its best checkpoint, a checkpoint folder, another model's folder,
    or what a Hub id stands for.

    Raises:
        ValueError, FileNotFoundError: nothing there that can be loaded; the message says what was looked for.
    """
    path = Path(target)
    for problem in check_model(target):
        raise FileNotFoundError(problem)
    if not path.is_dir():
        path = hub.download(str(target))
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


def _optimizer_tensors(model, optimizer):
    """The optimizer's state by parameter name: {"transformer.wte.weight/exp_avg": tensor, ...}."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    return {f"{name_of[id(p)]}/{field}": tensor.detach().contiguous().cpu()
            for p, fields in optimizer.state.items() for field, tensor in fields.items()}


def _publish(run, checkpoint):
    """Let the run folder itself load as this checkpoint: a link for each file, replaced one by one."""
    for file in checkpoint.iterdir():
        if file.is_file():
            temporary = run / f".{file.name}.link"
            temporary.unlink(missing_ok=True)
            try:
                temporary.symlink_to(Path(checkpoint.name) / file.name)
            except OSError:  # Windows without the right to link
                shutil.copyfile(file, temporary)
            os.replace(temporary, run / file.name)


def is_link(path):
    """True for one of the links that _publish makes."""
    return path.is_symlink() and _NAME.match(os.path.dirname(os.readlink(path))) is not None


def _remove(folder):
    """Delete a checkpoint; under a hidden name first, so that a half-deleted one is never taken for a whole."""
    hidden = folder.with_name(f".{folder.name}.old")
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def _flush(folder):
    """fsync every file and folder below."""
    for place, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(place, name), "rb") as file:
                os.fsync(file.fileno())
        _flush_folder(place)


def _flush_folder(folder):
    if os.name == "posix":  # Windows cannot open folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
