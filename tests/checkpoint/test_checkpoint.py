"""checkpoint.py: a checkpoint is there whole or not at all, is found again, and loads with transformers alone."""

import ast
import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nanogpt_accel
from nanogpt_accel.checkpoint.layout import checkpoint_path, list_checkpoints, read_trainer
from nanogpt_accel.checkpoint.resume import load_optimizer
from nanogpt_accel.checkpoint.run_folder import check_run_folder, prepare_run_folder
from nanogpt_accel.checkpoint.save import Saver
from nanogpt_accel.checkpoint.verify import find_corruption, latest_valid, shape_differences
from nanogpt_accel.data.tokenizer import Tokenizer
from nanogpt_accel.model import GPT, GPTConfig
from nanogpt_accel.models.find import find_model
from nanogpt_accel.models.load import read_config
from nanogpt_accel.optim import make_optimizer
from nanogpt_accel.utils.files import check_writable, flush_tree

FILES = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "state/trainer.json",
    "state/optimizer.safetensors",
    "state/index.json",
]
TEXT = "it is a text, and ends\n"
TOKENIZER = Tokenizer.char([TEXT])
ALONE = SimpleNamespace(distributed_type="NO", is_main_process=True, wait_for_everyone=lambda: None)
CARD = "---\nlibrary_name: transformers\n---\n# a card\n"


class Run:
    """A tiny training run that saves where it is told to."""

    def __init__(self, folder, seed=0):
        torch.manual_seed(seed)
        self.folder, self.said = Path(folder), []
        self.model = GPT(
            GPTConfig(vocab_size=TOKENIZER.vocab_size, block_size=8, n_layer=1, n_head=2, n_embd=32, bias=True)
        )
        self.optimizer = make_optimizer(self.model, learning_rate=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.95)

    def train(self, step):
        ids = torch.randint(TOKENIZER.vocab_size, (2, 8), generator=torch.Generator().manual_seed(step))
        self.model(ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, step, best_step=None, keep_last=2):
        self.train(step)
        trainer = {"step": step, "best_step": best_step, "val_loss": 1 / 3, "best_val_loss": 0.1 + 0.2}
        saver = Saver(self.folder, ALONE, TOKENIZER, keep_last, say=self.said.append)
        saver.save(trainer, self.model, self.optimizer, CARD)
        if saver.trouble:
            raise OSError(saver.trouble)
        return checkpoint_path(self.folder, step)

    def steps(self):
        """The steps of the checkpoints that are there, each of them whole."""
        assert [find_corruption(path) for path in list_checkpoints(self.folder)] == [None] * len(
            list_checkpoints(self.folder)
        )
        return [read_trainer(path)["step"] for path in list_checkpoints(self.folder)]

    def leftovers(self):
        return [path.name for path in self.folder.iterdir() if path.name.startswith(".")]


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


def test_a_save_that_the_run_waits_for_is_announced_where_it_is_large(run, monkeypatch):
    small = run.save(10)
    monkeypatch.setattr(
        "nanogpt_accel.checkpoint.save.LARGE", sum(p.nbytes for p in run.model.parameters())
    )  # and two moments of AdamW
    large = run.save(20)
    assert run.said == [f"saved {small}", f"saving {large}, 0 MB", f"saved {large}"]


@pytest.fixture
def saved(run):
    """A run with the checkpoints 10 and 20, of which 10 is the best."""
    run.save(10, best_step=10)
    run.save(20, best_step=10)
    return run


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("original") / "run")
    run.save(10, best_step=10)
    run.save(20, best_step=10)
    return run.folder


@pytest.fixture
def folder(original, tmp_path):
    """The run folder of `saved` where only its files matter."""
    return shutil.copytree(original, tmp_path / "run", symlinks=True)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    assert a.keys() == b.keys() and len(a) > 10
    return all(torch.equal(a[name], b[name]) for name in a)


# ---- what a checkpoint holds


def test_a_checkpoint_is_a_hub_repository(run):
    path = run.save(500, best_step=500)
    assert path == run.folder / "checkpoint-000500"
    found = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert found == {*FILES, "generation_config.json", "tokenizer_config.json", "README.md", "model.py"}
    source = Path(nanogpt_accel.__file__).with_name("model.py")
    assert (path / "model.py").read_bytes() == source.read_bytes()
    assert (path / "README.md").read_text() == CARD
    assert json.loads((path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "model.GPTConfig",
        "AutoModelForCausalLM": "model.GPT",
    }
    # floats come back as they were
    assert read_trainer(path) == {"step": 500, "best_step": 500, "val_loss": 1 / 3, "best_val_loss": 0.1 + 0.2}


def test_resuming_is_exact_to_the_bit(run, tmp_path):
    for step in range(3):
        run.train(step)
    path = run.save(3)
    other = Run(tmp_path / "other", seed=1)
    assert not same(weights(run.model), weights(other.model))
    other.model = GPT.from_pretrained(path, dtype=torch.float32)
    other.optimizer = make_optimizer(other.model, learning_rate=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.95)
    load_optimizer(path, ALONE, other.model, other.optimizer)

    by_name = [{name: runs.optimizer.state[p] for name, p in runs.model.named_parameters()} for runs in (run, other)]
    assert len(by_name[0]) == 16
    for name, before in by_name[0].items():
        after = by_name[1][name]
        assert before.keys() == after.keys() == {"step", "exp_avg", "exp_avg_sq"} and before["step"] == 4
        for field, tensor in before.items():
            assert tensor.dtype == after[field].dtype and torch.equal(tensor, after[field]), (name, field)
        assert before["exp_avg"].any()

    for step in range(4, 7):
        run.train(step)
        other.train(step)
    assert same(weights(run.model), weights(other.model))


def test_the_optimizer_of_an_untrained_model_loads(run):
    trainer = {"step": 0, "best_step": None}
    Saver(run.folder, ALONE, TOKENIZER, keep_last=1).save(trainer, run.model, run.optimizer, CARD)
    path = checkpoint_path(run.folder, 0)
    load_optimizer(path, ALONE, run.model, run.optimizer)
    assert not run.optimizer.state


def test_the_optimizer_of_another_model(run, refused, tmp_path):
    path = run.save(1)
    other = GPT(GPTConfig(vocab_size=TOKENIZER.vocab_size, block_size=8, n_layer=1, n_head=2, n_embd=16, bias=True))
    optimizer = make_optimizer(other, learning_rate=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.95)
    with refused(ValueError, path / "state" / "optimizer.safetensors", "another run", f"init_from={path}"):
        load_optimizer(path, ALONE, other, optimizer)


# ---- which ones stay


@pytest.mark.parametrize(
    ("keep_last", "best", "expected"),
    [
        (1, [1, 1, 1, 1, 1], [1, 5]),  # the first one stays the best
        (1, [1, 2, 3, 4, 5], [5]),
        (2, [1, 2, 2, 2, 2], [2, 4, 5]),
        (3, [1, 1, 1, 4, 4], [3, 4, 5]),
        (2, [None] * 5, [4, 5]),
        (9, [1, 1, 1, 1, 1], [1, 2, 3, 4, 5]),
    ],
)
def test_the_last_ones_and_the_best_stay(run, keep_last, best, expected):
    for step, best_step in enumerate(best, 1):
        run.save(step, best_step, keep_last)
    assert run.steps() == expected and run.leftovers() == []


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (1_000_000, 999_999, 20, 5):
        checkpoint_path(tmp_path, step).mkdir()
    for name in ("checkpoint-", "checkpoint-12x", ".checkpoint-000030.tmp", "checkpoint-best"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-000040").touch()  # a file
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "checkpoint-000005",
        "checkpoint-000020",
        "checkpoint-999999",
        "checkpoint-1000000",
    ]
    assert list_checkpoints(tmp_path / "no such run") == []


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_damaged_one_that_the_run_went_back_behind(run, keep_last):
    """10 is whole, 20 is not: the run goes on from 10, and what it saves on its way to 20 stays."""
    run.save(10, 10, keep_last)
    shutil.rmtree(run.save(20, 10, keep_last) / "state")
    assert latest_valid(run.folder, warn=lambda line: None).name == "checkpoint-000010"
    path = run.save(15, 10, keep_last)
    assert find_corruption(path) is None and latest_valid(run.folder, warn=pytest.fail) == path
    run.save(20, 10, keep_last)
    assert run.steps()[-1] == 20


def test_what_is_the_users_stays(saved):
    """Folders and files that only have such names are neither deleted nor in the way."""
    for name in ("checkpoint-000003", "checkpoint-000090", ".checkpoint-notes"):
        (saved.folder / name).mkdir()
        (saved.folder / name / "notes.txt").write_text("mine")
    (saved.folder / ".checkpoint-000005.old").write_text("a file in the way")
    saved.save(30, best_step=10)
    saved.save(40, best_step=10)
    assert [
        (saved.folder / name / "notes.txt").read_text()
        for name in ("checkpoint-000003", "checkpoint-000090", ".checkpoint-notes")
    ] == ["mine"] * 3
    assert latest_valid(saved.folder, lambda line: None).name == "checkpoint-000040"
    assert not (saved.folder / ".checkpoint-000005.old").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.pop("state/optimizer.safetensors"),
        lambda facts: facts.update({"../../elsewhere": {"size": 1, "sha256": "0"}}),
        lambda facts: facts.update({"config.json": None}),
        lambda facts: facts.update({"a" * 400: {"size": 1, "sha256": "0"}}),
    ],
)
def test_an_index_that_was_edited(folder, change):
    newer = list_checkpoints(folder)[-1]
    index = json.loads((newer / "state" / "index.json").read_text())
    change(index["files"])
    (newer / "state" / "index.json").write_text(json.dumps(index))
    assert find_corruption(newer) == "state/index.json is damaged"


def test_a_nested_index(folder):
    newer = list_checkpoints(folder)[-1]
    (newer / "state" / "index.json").write_text("[" * 200_000)
    assert find_corruption(newer) == "state/index.json is damaged"


def test_a_checkpoint_under_another_steps_name(folder):
    """Its step would count for less than its name says, and hide all that is saved after it."""
    list_checkpoints(folder)[-1].rename(folder / "checkpoint-000099")
    lines = []
    assert latest_valid(folder, lines.append).name == "checkpoint-000010"
    assert "checkpoint-000099: state/trainer.json is not that of this checkpoint" in lines[0]


def test_a_damaged_one_is_replaced_by_its_own_step(saved):
    os.truncate(saved.folder / "checkpoint-000020" / "model.safetensors", 5)
    saved.save(20, best_step=10)
    assert saved.steps() == [10, 20] and saved.leftovers() == []


# ---- the run folder is a model


def test_the_run_folder_loads_as_the_best_checkpoint(run):
    run.save(10, best_step=10)
    best = weights(run.model)
    run.save(20, best_step=10)
    last = weights(run.model)
    assert not same(best, last)
    assert same(weights(AutoModelForCausalLM.from_pretrained(run.folder)), best)
    run.save(30, best_step=30)
    newer = weights(run.model)
    assert same(weights(AutoModelForCausalLM.from_pretrained(run.folder)), newer)
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT and tokenizer.model_max_length == 8
    assert tokenizer(TEXT).input_ids == [sorted(set(TEXT)).index(c) for c in TEXT]
    # by links, and without what only resuming needs
    assert not (run.folder / "state").exists() and (run.folder / "model.safetensors").is_symlink()
    assert run.leftovers() == []


def test_without_evaluations_the_run_folder_is_the_last_checkpoint(run):
    run.save(10)
    run.save(20)
    assert same(weights(AutoModelForCausalLM.from_pretrained(run.folder)), weights(run.model))


def test_a_moved_run_folder_still_loads(run, tmp_path):
    run.save(10)
    moved = run.folder.rename(tmp_path / "moved")
    assert find_corruption(moved, resumable=False) is None
    AutoModelForCausalLM.from_pretrained(moved)


def test_where_links_are_not_allowed_files_are_copied(run, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("a privilege is not held")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    run.save(10, best_step=10)
    run.save(20, best_step=20)
    assert not any(path.is_symlink() for path in run.folder.iterdir())
    assert same(weights(AutoModelForCausalLM.from_pretrained(run.folder)), weights(run.model))


# ---- damage


def test_a_whole_checkpoint_shows_no_damage(folder):
    for path in list_checkpoints(folder):
        assert find_corruption(path) is None and find_corruption(str(path)) is None


SPOILERS = [
    (Path.unlink, "missing"),
    (lambda file: os.truncate(file, 0), "damaged"),
    (lambda file: os.truncate(file, 1), "damaged"),
    # half of a JSON file; all but the last byte of a safetensors file
    (
        lambda file: os.truncate(file, file.stat().st_size // 2 if file.suffix == ".json" else file.stat().st_size - 1),
        "damaged",
    ),
    (lambda file: file.write_bytes(b"\xff" * 99), "damaged"),
]


@pytest.mark.parametrize("name", FILES)
def test_damage_names_the_file(folder, name):
    older, newer = list_checkpoints(folder)
    before = (newer / name).read_bytes()
    for spoil, word in SPOILERS:
        (newer / name).write_bytes(before)
        assert find_corruption(newer) is None
        spoil(newer / name)
        assert find_corruption(newer) == f"{name} is {word}"
        assert (find_corruption(newer, resumable=False) is None) == name.startswith("state/")
        lines = []
        assert latest_valid(folder, lines.append) == older
        (line,) = lines
        assert str(newer) in line and name in line and word in line


def test_no_whole_checkpoint(refused, folder):
    for path in list_checkpoints(folder):
        (path / "config.json").unlink()
    lines = []
    assert latest_valid(folder, lines.append) is None and len(lines) == 2
    with refused(ValueError, folder, "no whole checkpoint"):
        find_model(folder, warn=lambda line: None)
    assert latest_valid(folder / "nowhere", pytest.fail) is None


# ---- a save that fails


def fail(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["model", "tokenizer", "optimizer", "trainer", "flush", "rename"])
def test_a_save_that_fails_leaves_what_was_there(saved, monkeypatch, where):
    best = weights(AutoModelForCausalLM.from_pretrained(saved.folder))
    with monkeypatch.context() as patch:
        if where == "model":
            # half of the weights reach the disk, and then it is full
            def half(model, folder, **kwargs):
                (folder / "model.safetensors").write_bytes(b"\0" * 100)
                fail()

            patch.setattr(GPT, "save_pretrained", half)
        elif where == "tokenizer":
            patch.setattr(TOKENIZER, "save", fail)
        elif where == "optimizer":
            patch.setattr("safetensors.torch.save_file", fail)
        elif where == "trainer":
            patch.setattr("nanogpt_accel.checkpoint.save.json.dumps", fail)
        elif where == "flush":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="No space left"):
            saved.save(30, best_step=30)
    assert "checkpoint-000030 is NOT SAVED: " in saved.said[-1] and "No space left" in saved.said[-1]
    assert saved.steps() == [10, 20]
    assert same(weights(AutoModelForCausalLM.from_pretrained(saved.folder)), best)
    assert latest_valid(saved.folder, pytest.fail).name == "checkpoint-000020"
    saved.save(30, best_step=30)  # room was made
    assert saved.steps() == [20, 30] and saved.leftovers() == []


def test_the_best_before_stays_where_the_best_could_not_be_saved(saved, monkeypatch):
    best = weights(AutoModelForCausalLM.from_pretrained(saved.folder))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            saved.save(30, best_step=30)
    saved.save(40, best_step=30)
    saved.save(50, best_step=30)
    assert saved.steps() == [10, 40, 50]
    assert same(weights(AutoModelForCausalLM.from_pretrained(saved.folder)), best)
    saved.save(60, best_step=60)
    assert saved.steps() == [50, 60]


def test_an_error_after_the_rename_loses_nothing(saved, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("nanogpt_accel.checkpoint.save.publish", fail)  # the links of the run folder
        saved.save(30, best_step=30)
    assert "cleaning up after checkpoint-000030 failed" in saved.said[-1] and "No space left" in saved.said[-1]
    assert saved.steps() == [10, 20, 30]
    saved.save(40, best_step=30)
    assert saved.steps() == [30, 40] and saved.leftovers() == []
    assert read_trainer(find_model(saved.folder))["step"] == 30


def test_an_interrupted_pruning_is_no_half_checkpoint(saved, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        saved.save(30, best_step=30)
    assert saved.steps() == [20, 30] and saved.leftovers() == [".checkpoint-000010.old"]
    saved.save(40, best_step=30)
    assert saved.steps() == [30, 40] and saved.leftovers() == []


def test_a_checkpoint_that_did_not_reach_the_disk_is_not_trusted(saved, monkeypatch):
    flush = flush_tree

    def lose(folder):
        flush(folder)
        os.truncate(folder / "model.safetensors", 1000)

    monkeypatch.setattr("nanogpt_accel.checkpoint.save.flush_tree", lose)
    with pytest.raises(OSError, match=r"model\.safetensors is damaged"):
        saved.save(30, best_step=30)
    assert [path.name for path in list_checkpoints(saved.folder)][:2] == ["checkpoint-000010", "checkpoint-000020"]
    assert latest_valid(saved.folder, warn=lambda line: None).name == "checkpoint-000020"
    AutoModelForCausalLM.from_pretrained(saved.folder)  # still the best of the older ones


def test_all_is_flushed_before_the_rename(run, monkeypatch):
    order, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append("rename"), rename(a, b)))
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc to name the flushed files by")
    path = run.save(10)
    before = {Path(name).name for name in order[: order.index("rename")]}
    assert before >= {file.name for file in path.rglob("*")}
    assert order[order.index("rename") + 1] == str(run.folder)  # and the new name after it


# ---- a new run in an old folder


def test_begin(saved):
    own = ["notes.txt", "report-mine.png", "nonfinite-notes.json"]
    for name in ("metrics.jsonl", "report.html", "report-loss.png", "nonfinite-12.json", *own):
        (saved.folder / name).write_text("{}\n")
    prepare_run_folder(saved.folder, "seed: 1\n", is_resumed=True)
    assert saved.steps() == [10, 20] and (saved.folder / "metrics.jsonl").exists()
    (saved.folder / "checkpoint-7").mkdir()
    (saved.folder / "checkpoint-7" / "thesis.txt").write_text("mine")
    prepare_run_folder(saved.folder, "seed: 2\n", is_resumed=False)
    assert sorted(path.name for path in saved.folder.iterdir()) == sorted([*own, "checkpoint-7", "run.yaml"])
    assert (saved.folder / "checkpoint-7" / "thesis.txt").read_text() == "mine"
    assert (saved.folder / "run.yaml").read_text() == "seed: 2\n"


@pytest.mark.parametrize("name", ["metrics.jsonl", "report.html", "report-loss.png", "nonfinite-3.json", "config.json"])
def test_a_file_of_the_users_in_the_place_of_ours(tmp_path, name):
    (tmp_path / name).write_text("mine")
    (problem,) = check_run_folder(tmp_path)
    assert f"out_dir={tmp_path}" in problem and name in problem


def test_a_file_in_the_place_of_out_dir(tmp_path):
    (tmp_path / "file").touch()
    assert check_writable(tmp_path / "a" / "b" / "c") == []
    (problem,) = check_writable(tmp_path / "file" / "run")
    assert f"out_dir={tmp_path / 'file' / 'run'}" in problem and f"{tmp_path / 'file'} is a file" in problem


def test_shape_differences(folder):
    path = list_checkpoints(folder)[0]
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 8, "bias": True, "activation": "gelu"}
    config = read_config(path)
    assert shape_differences(path, config, shape) == []
    problems = shape_differences(path, config, shape | {"n_layer": 2, "bias": False, "n_inner": 7})
    assert len(problems) == 2
    assert "model.n_layer=2" in problems[0] and "n_layer=1" in problems[0] and "model.bias=False" in problems[1]
    assert "model.n_inner=7" in shape_differences(path, config, shape | {"n_inner": 7})[0]


# ---- finding a model


def test_find_model(saved):
    ten, twenty = list_checkpoints(saved.folder)
    assert find_model(saved.folder) == find_model(str(saved.folder)) == ten  # the best one
    assert find_model(twenty) == twenty
    saved.save(30)  # no best one known
    assert find_model(saved.folder).name == "checkpoint-000030"


def test_find_model_where_the_best_is_damaged(folder):
    ten, twenty = list_checkpoints(folder)
    os.truncate(ten / "model.safetensors", 10)
    assert find_model(folder) == twenty
    shutil.rmtree(ten)
    assert find_model(folder) == twenty


def test_find_model_takes_an_exported_folder(folder, tmp_path):
    shutil.copytree(folder / "checkpoint-000010", tmp_path / "export")
    shutil.rmtree(tmp_path / "export" / "state")
    assert find_model(tmp_path / "export") == tmp_path / "export"


@pytest.mark.parametrize(
    ("target", "kind", "words"),
    [
        ("./nowhere", FileNotFoundError, ["./nowhere", "no such folder"]),
        ("a/b/c", FileNotFoundError, ["a/b/c", "no such folder"]),
        ("/no/such/place", FileNotFoundError, ["/no/such/place", "no such folder"]),
        ("runs/no--such", ValueError, ["runs/no--such: no such folder here", "no model can have this name"]),
        ("runs/..", ValueError, ["runs/..: no such folder here"]),
        ("empty", ValueError, ["empty", "neither a run nor a model folder", "config.json is missing"]),
        (
            "nobody/no-such-model",
            ValueError,
            ["nobody/no-such-model: no such folder here", "the Hub cannot be reached"],
        ),
        ("no-such-model", ValueError, ["no-such-model: no such folder here", "the Hub cannot be reached"]),
    ],
)
def test_nothing_to_find(refused, tmp_path, monkeypatch, target, kind, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with refused(kind, *words):
        find_model(target)


# ---- safety


def test_nothing_is_unpickled():
    """Only two files name pickle: manifest.py, to refuse everything but plain values, and nanogpt.py, which reads
    nanoGPT's ckpt.pt with weights_only, for the name of the error that torch raises."""
    loaders = {"torch", "pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "np", "numpy"}
    uses = []
    for file in sorted(Path(nanogpt_accel.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
                uses += [(file.name, f"import {name}") for name in names & (loaders - {"torch", "np", "numpy"})]
            elif isinstance(node, ast.ImportFrom):
                module = (node.module or "").partition(".")[0]
                if module in loaders - {"torch", "np", "numpy"}:
                    uses.append((file.name, f"from {module}"))
                if module in loaders:
                    uses += [
                        (file.name, f"from {module} import {alias.name}")
                        for alias in node.names
                        if alias.name in ("load", "loads")
                    ]
            elif isinstance(node, ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else None
                if (
                    owner in loaders
                    and node.attr in ("load", "loads")
                    or node.attr in ("Unpickler", "load_state", "fromfile_pickle", "__reduce__")
                ):
                    uses.append((file.name, f"{owner}.{node.attr}"))
            elif isinstance(node, ast.keyword):
                allows = node.arg == "allow_pickle" or (
                    node.arg == "weights_only" and not getattr(node.value, "value", False)
                )
                if allows:
                    uses.append((file.name, node.arg))
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert [ast.unparse(k.value) for k in node.keywords if k.arg == "weights_only"] == ["True"]
    assert sorted(uses) == [
        ("manifest.py", "import pickle"),
        ("manifest.py", "pickle.Unpickler"),
        ("nanogpt.py", "import pickle"),
        ("nanogpt.py", "torch.load"),
    ]
