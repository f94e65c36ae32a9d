"""The table of bad input: each mistake ends in one line, exit status 2, no traceback, before anything slow."""

import contextlib
import http.server
import io
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import nanogpt_accel
from nanogpt_accel.__main__ import main
from nanogpt_accel.data import sources

ENV = os.environ | {"PYTHONPATH": str(Path(nanogpt_accel.__file__).parents[1])}
RECIPE = """
data: {corpus: text.txt, tokenizer: char, val_fraction: 0.1}
model: {n_layer: 1, n_embd: 16, n_head: 2, block_size: 16}
optimizer: {learning_rate: 1e-2, warmup_iters: 2}
train: {batch_size: 2, gradient_accumulation_steps: 4, max_iters: 6, eval_interval: 2, eval_iters: 2, device: cpu}
"""
RANK_0_OF_2 = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a text, a recipe, and runs/tiny, trained on them."""
    folder = tmp_path_factory.mktemp("bad_input")
    draw = random.Random(3)
    (folder / "text.txt").write_text("".join(draw.choice("abcde ") for _ in range(3000)))
    (folder / "tiny.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.chdir(folder)
        assert main(["train", "tiny.yaml"]) == 0
    (folder / "nothing").mkdir()
    shutil.copytree(folder / "runs" / "tiny" / "checkpoint-000006", folder / "stock")
    (folder / "stock" / "config.json").write_text('{"model_type": "gpt2", "n_positions": 16}')
    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes("Übung ".encode("latin-1") * 99)
    (folder / "short.txt").write_text("abc")
    (folder / "few.txt").write_text("abcde " * 20)
    (folder / "torn.yaml").write_text("model:\n  n_layer: 1\ntrain: [1, 2\nseed: 3\n")
    (folder / "tab.yaml").write_text("model:\n\tn_layer: 1\n")
    (folder / "words.yaml").write_text("just words\n")
    (folder / "twice.yaml").write_text("model:\n  n_layer: 1\n  n_layer: 2\n")
    (folder / "misplaced.yaml").write_text("model: {learning_rate: 1e-3}\nmax_iters: 3\n")
    return folder


@pytest.fixture(autouse=True)
def there(workplace, monkeypatch):
    """Every test stands in the folder, and leaves it as it was."""
    monkeypatch.chdir(workplace)
    before = files(workplace)
    yield
    assert files(workplace) == before


def files(folder):
    """All but the prepared data, which are nobody's loss."""
    return sorted(str(path) for path in folder.rglob("*") if "data" not in path.relative_to(folder).parts)


def refusal(capsys, *words):
    """The lines of a command that must be refused, without their `error: `."""
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines), lines
    return [line.removeprefix("error: ") for line in lines]


def holds(line, words):
    return [word for word in words if word not in line] == []


# ---- what is known from the words and the files alone. Below it is also shown that none of these waits for torch.

TINY = ["train", "tiny.yaml", "out_dir=new"]
EARLY = [
    # unknown key, with the nearest name
    ([*TINY, "n_layr=3"], ["n_layr", "did you mean n_layer?"]),
    ([*TINY, "--model.droput", "0.1"], ["model.droput", "did you mean dropout?"]),
    ([*TINY, "dataset=x"], ["dataset", "corpus="]),
    (["trian", "tiny.yaml"], ["trian", "did you mean train?"]),
    (["train", "misplaced.yaml"], ["misplaced.yaml", "learning_rate", "optimizer:"], ["max_iters", "train:"]),
    (["sample", "runs/tiny", "temperatur=1"], ["temperatur", "did you mean temperature?"]),
    (["evaluate", "runs/tiny", "eval_iter=1"], ["eval_iter", "did you mean eval_iters?"]),
    # wrong type
    ([*TINY, "n_layer=two"], ["model.n_layer=two", "whole number"]),
    ([*TINY, "max_iters=1.5"], ["train.max_iters=1.5", "whole number"]),
    ([*TINY, "learning_rate=fast"], ["optimizer.learning_rate=fast", "number"]),
    ([*TINY, "bias=perhaps"], ["model.bias=perhaps", "boolean"]),
    ([*TINY, "sampling=sorted"], ["data.sampling=sorted", "'shuffle' or 'random'"]),
    ([*TINY, "eval_iters=some"], ["train.eval_iters=some"]),
    # out of range
    ([*TINY, "n_layer=0"], ["model.n_layer=0", "greater than or equal to 1"]),
    ([*TINY, "dropout=1.5"], ["model.dropout=1.5", "less than 1"]),
    ([*TINY, "val_fraction=0"], ["data.val_fraction=0", "greater than 0"]),
    ([*TINY, "learning_rate=nan"], ["optimizer.learning_rate=nan", "finite"]),
    ([*TINY, "eval_iters=0"], ["train.eval_iters=0", "1 or more"]),
    ([*TINY, "warmup_iters=99"], ["warmup_iters=99", "lr_decay_iters=6"]),
    (["sample", "runs/tiny", "top_p=0"], ["top_p=0", "greater than 0"]),
    # n_embd not divisible by n_head
    ([*TINY, "n_embd=33"], ["n_embd=33", "n_head=2", "n_embd=34"]),
    # several at once, all listed
    (
        [*TINY, "n_layer=0", "dropout=1.5", "val_fraction=0", "n_layr=1", "corpus=gone.txt"],
        ["n_layr"],
        ["val_fraction=0"],
        ["n_layer=0"],
        ["dropout=1.5"],
        ["corpus=gone.txt"],
    ),
    (
        [*TINY, "n_embd=33", "corpus=gone.txt", "tokenizer=chr", "init_from=./gone"],
        ["n_embd=33"],
        ["corpus=gone.txt"],
        ["tokenizer=chr", "did you mean char?"],
        ["init_from=./gone"],
    ),
    # recipe missing or not YAML
    (["train"], ["what to train?"]),
    (["train", "tinny.yaml"], ["tinny.yaml", "no such recipe", "did you mean tiny"]),
    (["train", "gone/tiny.yaml"], ["gone/tiny.yaml", "no such recipe"]),
    (["train", "torn.yaml"], ["torn.yaml", "not YAML", "line 4"]),
    (["train", "tab.yaml"], ["tab.yaml", "not YAML", "line 2"]),
    (["train", "twice.yaml"], ["twice.yaml", "line 3", "n_layer stands twice"]),
    (["train", "words.yaml"], ["words.yaml", "sections with keys"]),
    (["train", "latin.txt"], ["latin.txt", "UTF-8", "byte 0"]),
    (["train", "tiny.yaml", "other.yaml"], ["one target", "other.yaml"]),
    # corpus missing, empty, not UTF-8, shorter than a block, and a val split shorter than one
    ([*TINY, "corpus=gone.txt"], ["corpus=gone.txt", "no such corpus"]),
    ([*TINY, "corpus=shakespear"], ["corpus=shakespear", "did you mean shakespeare?"]),
    ([*TINY, "corpus=empty.txt"], ["corpus=empty.txt", "no text"]),
    ([*TINY, "corpus=nothing"], ["corpus=nothing", "no file of text"]),
    ([*TINY, "corpus=latin.txt"], ["corpus=latin.txt", "not UTF-8", "byte 0", "iconv"]),
    ([*TINY, "corpus=short.txt", "val_fraction=0.5"], ["train.bin", "17 tokens"], ["val.bin", "17 tokens"]),
    ([*TINY, "corpus=few.txt"], ["val.bin", "block_size=16", "has 12", "larger val_fraction"]),
    # out_dir not writable, or holding a run
    (["train", "tiny.yaml", "out_dir=text.txt/run"], ["out_dir=text.txt/run", "text.txt is a file"]),
    (["train", "tiny.yaml", "out_dir=/proc/run"], ["out_dir=/proc/run", "cannot write", "another folder"]),
    (
        ["train", "tiny.yaml"],
        ["out_dir=runs/tiny already holds a run", "`nanogpt-accel train runs/tiny`", "overwrite=true"],
    ),
    # nothing to resume
    ([*TINY, "init_from=resume"], ["nothing to resume", "out_dir=new", "same command with init_from=scratch"]),
    (["train", "nothing"], ["nothing", "no run.yaml"]),
    # resume with another shape
    (
        ["train", "runs/tiny", "n_layer=2", "n_embd=32"],
        ["model.n_layer=2", "checkpoint-000006", "n_layer=1"],
        ["model.n_embd=32", "n_embd=16"],
    ),
    (["train", "runs/tiny", "block_size=8"], ["model.block_size=8", "block_size=16"]),
    # resume with other data
    (["train", "runs/tiny", "val_fraction=0.2"], ["val_fraction=0.2", "prepared with val_fraction=0.1", "data_dir"]),
    (["train", "runs/tiny", "tokenizer=bpe", "vocab_size=258"], ["vocab_size=258", "prepared with tokenizer=char"]),
    # prompts
    (["sample", "runs/tiny", "--prompt", "Bäd"], ["prompt", "'B' (U+0042), 'ä' (U+00E4)"]),
    (["sample", "runs/tiny", "overflow=stop", "--prompt", "abcde" * 4], ["prompt", "20 tokens", "block_size=16"]),
    (["sample", "runs/tiny", "--prompt="], ["prompt", "give at least one"]),
    (["sample", "runs/tiny", "--start=FILE:gone.txt"], ["prompt=FILE:gone.txt", "No such file"]),
    (["sample", "runs/tiny", "--start=FILE:latin.txt"], ["prompt=FILE:latin.txt", "not UTF-8"]),
    ([*TINY, "sample_tokens=9", "sample_prompt=ROMEO"], ["sample_prompt='ROMEO'", "'E' (U+0045)", "another prompt"]),
    ([*TINY, "sample_tokens=9", "sample_prompt=" + "abcde" * 4], ["sample_prompt=", "20 tokens", "block_size=16"]),
    # models that are not there
    (["sample"], ["which model?", "runs/NAME"]),
    (["sample", "--out_dir=out", "--start=hi"], ["which model?", "nanogpt-accel sample out"]),  # nanoGPT's command
    (["sample", "./gone"], ["./gone", "no such folder"]),
    (["sample", "nothing"], ["nothing", "config.json is missing"]),
    (["sample", "stock"], ["stock", "type gpt2"]),
    (["evaluate", "stock", "--recipe", "tiny.yaml"], ["stock", "type gpt2"]),
    ([*TINY, "init_from=stock"], ["stock", "type gpt2"]),
    (["evaluate", "nothing"], ["nothing", "no run.yaml", "--recipe"]),
    # trackers
    ([*TINY, "trackers=wandbb"], ["trackers=wandbb", "wandb"]),
]


@pytest.mark.parametrize(
    ("argv", "expected"), [pytest.param(argv, words, id=" ".join(argv)[:60]) for argv, *words in EARLY]
)
def test_one_line_a_mistake(capsys, argv, expected):
    lines = refusal(capsys, *argv)
    assert len(lines) == len(expected), lines
    for words in expected:
        assert any(holds(line, words) for line in lines), (words, lines)


def test_before_anything_slow():
    """All of the above in a fresh process: none of them has imported what takes seconds to import."""
    script = """
import contextlib, io, json, sys
from nanogpt_accel.__main__ import main
for argv in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        status = main(argv)
    print(json.dumps([argv, status, sorted({"torch", "transformers", "accelerate", "datasets"} & set(sys.modules))]))
"""
    argvs = [["--help"], *([command, "--help"] for command in ("prepare", "train", "sample", "evaluate"))]
    argvs += [argv for argv, *_ in EARLY]
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(argvs), env=ENV, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    answers = list(map(json.loads, done.stdout.splitlines()))
    assert len(answers) == len(argvs)
    assert [answer for answer in answers if answer[2]] == []
    assert [status for _, status, _ in answers] == [0] * 5 + [2] * len(EARLY)


@pytest.mark.parametrize(("argv", "status"), [(["--help"], 0), ([*TINY, "n_layr=3", "dropout=2"], 2)])
def test_a_process_of_its_own(argv, status):
    done = subprocess.run(
        [sys.executable, "-m", "nanogpt_accel", *argv], env=ENV, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status
    if status:
        assert done.stdout == "" and [line[:6] for line in done.stderr.splitlines()] == ["error:"] * 2
    else:
        assert done.stderr == "" and "prepare" in done.stdout and "quickstart.yaml" in done.stdout


# ---- downloads


def closed_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_download_impossible(capsys, monkeypatch):
    url = f"http://127.0.0.1:{closed_port()}/input.txt"
    monkeypatch.setitem(sources.URLS, "shakespeare", (url, sources.URLS["shakespeare"][1]))
    (line,) = refusal(capsys, *TINY, "corpus=shakespeare")
    assert holds(line, ["corpus=shakespeare", url, "cannot download", "refused", "corpus=PATH"])


def test_download_with_a_wrong_hash(capsys, monkeypatch, tmp_path):
    (tmp_path / "input.txt").write_text("First Citizen: I am another text.\n" * 99)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/input.txt"
        monkeypatch.setitem(sources.URLS, "shakespeare", (url, sources.URLS["shakespeare"][1]))
        (line,) = refusal(capsys, *TINY, "corpus=shakespeare")
        server.shutdown()
    assert holds(line, ["corpus=shakespeare", url, "SHA-256", sources.URLS["shakespeare"][1], "corpus=PATH"])
    assert not any(Path(os.environ["NANOGPT_ACCEL_CACHE"]).iterdir())


def test_the_hub_out_of_reach(capsys):
    for argv in (["sample", "nobody/nothing"], [*TINY, "init_from=nobody/nothing"]):
        (line,) = refusal(capsys, *argv)
        assert holds(line, ["nobody/nothing", "no such folder here", "Hub cannot be reached"])


# ---- resuming


def test_resume_with_a_changed_text(capsys, workplace):
    """The same recipe, but the file behind its words is another; the run's own run.yaml goes on with the old tokens."""
    text = (workplace / "text.txt").read_text()
    try:
        (workplace / "text.txt").write_text(text[::-1])
        (line,) = refusal(capsys, "train", "tiny.yaml", "init_from=resume", "out_dir=runs/tiny", "max_iters=8")
        before = (workplace / "runs" / "tiny" / "run.yaml").read_text()
        assert main(["train", "runs/tiny"]) == 0  # all its steps are done: nothing is trained
        assert (workplace / "runs" / "tiny" / "run.yaml").read_text() == before  # with what it began from
    finally:
        (workplace / "text.txt").write_text(text)
    assert holds(line, ["checkpoint-000006", "other data", "data_dir", "new run"])


def test_files_of_the_users_own_are_not_overwritten(capsys, workplace):
    (workplace / "nothing" / "README.md").write_text("mine")
    try:
        (line,) = refusal(capsys, "train", "tiny.yaml", "out_dir=nothing")
        assert (workplace / "nothing" / "README.md").read_text() == "mine"
    finally:
        (workplace / "nothing" / "README.md").unlink()
    assert holds(line, ["out_dir=nothing", "README.md", "another out_dir"])


def test_overwriting_what_the_run_begins_with(capsys):
    (line,) = refusal(capsys, "train", "tiny.yaml", "out_dir=runs/tiny", "init_from=runs/tiny", "overwrite=true")
    assert holds(line, ["init_from=runs/tiny", "overwrite=true", "another out_dir"])


@pytest.fixture
def copy(workplace, tmp_path):
    """runs/tiny at another place, where a test may break it."""
    shutil.copytree(workplace / "runs" / "tiny", tmp_path / "tiny", symlinks=True)
    return tmp_path / "tiny"


def cut(file, size):
    with open(file, "r+b") as opened:
        opened.truncate(size)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("model.safetensors", 900),
        ("model.safetensors", 0),
        ("config.json", 20),
        ("state/optimizer.safetensors", 900),
        ("state/trainer.json", 0),
        ("tokenizer.json", 99),
    ],
)
def test_a_truncated_checkpoint_falls_back(capsys, workplace, copy, name, size):
    cut(copy / "checkpoint-000006" / name, size)
    assert main(["train", str(copy)]) == 0
    out = capsys.readouterr().out
    (warning,) = [line for line in out.splitlines() if "warning" in line]
    assert holds(warning, [str(copy / "checkpoint-000006"), f"{name} is damaged", "the checkpoint before it"])
    assert f"resuming {copy} from checkpoint-000004" in out and "iter 5:" in out and "iter 3:" not in out
    again, first = (run / "checkpoint-000006" for run in (copy, workplace / "runs" / "tiny"))
    for file in ("model.safetensors", "config.json", "state/optimizer.safetensors", "tokenizer.json"):
        assert (again / file).read_bytes() == (first / file).read_bytes()


def test_the_optimizer_of_another_run(capsys, workplace, copy, tmp_path):
    """Whole and of the same length, but not what was saved: the hashes tell."""
    assert main(["train", "tiny.yaml", "seed=2", f"out_dir={tmp_path / 'other'}"]) == 0
    state = Path("checkpoint-000006") / "state" / "optimizer.safetensors"
    shutil.copyfile(tmp_path / "other" / state, copy / state)
    capsys.readouterr()
    assert main(["train", str(copy)]) == 0
    out = capsys.readouterr().out
    (warning,) = [line for line in out.splitlines() if "warning" in line]
    assert holds(warning, [str(copy / "checkpoint-000006"), "state/optimizer.safetensors is damaged"])
    assert f"resuming {copy} from checkpoint-000004" in out


def test_a_truncated_checkpoint_and_sample(capsys, copy):
    cut(copy / "checkpoint-000006" / "model.safetensors", 900)
    assert main(["sample", str(copy), "num_samples=1", "max_new_tokens=2", "prompt=a"]) == 0
    assert "checkpoint-000006: model.safetensors is damaged" in capsys.readouterr().err


def test_no_whole_checkpoint(capsys, copy):
    for path in copy.glob("checkpoint-*"):
        cut(path / "model.safetensors", 900)
    (line,) = refusal(capsys, "train", copy)
    assert holds(line, ["nothing to resume", "no whole checkpoint", str(copy), "init_from=scratch"])
    assert main(["sample", str(copy)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {copy}: no whole checkpoint in this run folder"


# ---- processes


@pytest.mark.parametrize(("processes", "fits"), [(3, ["3 or 6", "1 or 2 processes"]), (8, ["to 8", "1 or 2 or 4"])])
def test_accumulation_that_cannot_be_shared(capsys, monkeypatch, processes, fits):
    for key, value in (RANK_0_OF_2 | {"WORLD_SIZE": str(processes)}).items():
        monkeypatch.setenv(key, value)
    (line,) = refusal(capsys, *TINY)
    assert holds(line, ["gradient_accumulation_steps=4", f"{processes} processes", *fits])


@pytest.mark.parametrize("argv", [TINY, ["evaluate", "runs/tiny"]])
def test_world_size_without_a_launcher(capsys, monkeypatch, argv):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (line,) = refusal(capsys, *argv)
    assert holds(line, ["WORLD_SIZE=2", "MASTER_ADDR", "accelerate launch"])


def test_accelerate_sees_one_process(capsys, monkeypatch):
    """The trap of FACTS.md: a launcher started two, but each would be the only one and train by itself."""
    from accelerate.state import PartialState

    assert PartialState().num_processes == 1  # the training of the fixture has settled that for this process
    for key, value in RANK_0_OF_2.items():
        monkeypatch.setenv(key, value)
    (line,) = refusal(capsys, *TINY)
    assert holds(line, ["WORLD_SIZE=2", "Accelerate sees 1", "ACCELERATE_USE_CPU=true", "--multi_gpu"])
