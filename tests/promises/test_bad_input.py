"""The promise about bad input: each mistake gets one line and exit status 2, no traceback, before anything slow."""

import contextlib
import http.server
import io
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from launching import free_port, run_python, torchrun_variables
from runs import make_text, write_recipe

from nanogpt_accel.__main__ import main
from nanogpt_accel.data import sources
from nanogpt_accel.utils.text import quoted


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a text, a recipe, and runs/tiny, trained on them."""
    folder = tmp_path_factory.mktemp("bad_input")
    (folder / "text.txt").write_text(make_text(600, letters="abcde"))
    settings = {"dropout": None, "warmup_iters": 2, "gradient_accumulation_steps": 4, "keep_last": None}
    write_recipe(folder, **settings, max_iters=6, eval_interval=2, corpus="text.txt")
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
    """Run every test in the folder, and check that it leaves no files there."""
    monkeypatch.chdir(workplace)
    before = files(workplace)
    yield
    assert files(workplace) == before


def files(folder):
    """Return the paths of all files but the prepared data."""
    return sorted(str(path) for path in folder.rglob("*") if "data" not in path.relative_to(folder).parts)


def refusal(capsys, *words):
    """Run a command that must be refused; return its error lines without `error: `."""
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines), lines
    return [line.removeprefix("error: ") for line in lines]


def has_all(line, words):
    return all(word in line for word in words)


# ---- mistakes in the command and the files, which are found without torch

TINY = ["train", "tiny.yaml", "out_dir=new"]
EARLY = [
    # unknown key, with the nearest name
    ([*TINY, "n_layr=3"], ["n_layr", "did you mean n_layer?"]),
    ([*TINY, "--model.droput", "0.1"], ["model.droput", "did you mean dropout?"]),
    ([*TINY, "dataset=x"], ["dataset", "corpus="]),
    (["trian", "tiny.yaml"], ["trian", "did you mean train?"]),
    (
        ["train", "misplaced.yaml"],
        ["misplaced.yaml", "learning_rate", "section optimizer"],
        ["max_iters", "section train"],
    ),
    (["sample", "runs/tiny", "temperatur=1"], ["temperatur", "did you mean temperature?"]),
    (["evaluate", "runs/tiny", "eval_iter=1"], ["eval_iter", "did you mean eval_iters?"]),
    # wrong type
    ([*TINY, "n_layer=two"], ["model.n_layer=two", "must be an integer"]),
    ([*TINY, "max_iters=1.5"], ["train.max_iters=1.5", "must be an integer"]),
    ([*TINY, "learning_rate=fast"], ["optimizer.learning_rate=fast", "number"]),
    ([*TINY, "bias=perhaps"], ["model.bias=perhaps", "boolean"]),
    ([*TINY, "sampling=sorted"], ["data.sampling=sorted", "'shuffle' or 'random'"]),
    ([*TINY, "eval_iters=some"], ["train.eval_iters=some"]),
    ([*TINY, "options=3"], ["optimizer.options=3", "{KEY: VALUE}"]),
    ([*TINY, "options={betas: [0.9"], ["optimizer.options={betas: [0.9", "valid YAML"]),
    # unknown optimizers, and options for one that has none
    ([*TINY, "algorithm=adam"], ["optimizer.algorithm=adam", "'adamw' or 'muon'", "torch.optim.Adafactor"]),
    ([*TINY, "algorithm=gone.Lion"], ["optimizer.algorithm=gone.Lion", "cannot import gone", "install its package"]),
    (
        [*TINY, "options={betas: [0.9, 0.99]}"],
        ["optimizer.options={betas: [0.9, 0.99]}", "only for an optimizer class"],
    ),
    # out of range
    ([*TINY, "n_layer=0"], ["model.n_layer=0", "greater than or equal to 1"]),
    ([*TINY, "dropout=1.5"], ["model.dropout=1.5", "less than 1"]),
    ([*TINY, "val_fraction=0"], ["data.val_fraction=0", "greater than 0"]),
    ([*TINY, "learning_rate=nan"], ["optimizer.learning_rate=nan", "finite"]),
    ([*TINY, "eval_iters=0"], ["train.eval_iters=0", "at least 1"]),
    ([*TINY, "warmup_iters=99"], ["warmup_iters=99", "lr_decay_iters=6"]),
    (["sample", "runs/tiny", "top_p=0"], ["top_p=0", "greater than 0"]),
    # n_embd not divisible by n_head
    ([*TINY, "n_embd=33"], ["n_embd=33", "n_head=2", "n_embd=34"]),
    # several problems, all listed
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
    (["train"], ["RECIPE or RUN_FOLDER is missing; usage: nanogpt-accel train"]),
    (["train", "tinny.yaml"], ["tinny.yaml", "no such recipe", "did you mean tiny"]),
    (["train", "gone/tiny.yaml"], ["gone/tiny.yaml", "no such recipe"]),
    (["train", "torn.yaml"], ["torn.yaml", "invalid YAML", "line 4"]),
    (["train", "tab.yaml"], ["tab.yaml", "invalid YAML", "line 2"]),
    (["train", "twice.yaml"], ["twice.yaml", "line 3", "duplicate key n_layer"]),
    (["train", "words.yaml"], ["words.yaml", "sections with keys"]),
    (["train", "latin.txt"], ["latin.txt", "UTF-8", "byte at position 0"]),
    (["train", "tiny.yaml", "other.yaml"], ["expected at most 1 target", "other.yaml"]),
    # corpus missing, empty, not UTF-8, shorter than a block, and a val split shorter than one
    ([*TINY, "corpus=gone.txt"], ["corpus=gone.txt", "no such corpus"]),
    ([*TINY, "corpus=shakespear"], ["corpus=shakespear", "did you mean shakespeare?"]),
    ([*TINY, "corpus=empty.txt"], ["corpus=empty.txt", "no text"]),
    ([*TINY, "corpus=nothing"], ["corpus=nothing", "contains no text file"]),
    ([*TINY, "corpus=latin.txt"], ["corpus=latin.txt", "not UTF-8", "byte 0", "iconv"]),
    ([*TINY, "corpus=short.txt", "val_fraction=0.5"], ["the train split", "17 tokens"], ["the val split", "17 tokens"]),
    ([*TINY, "corpus=few.txt", "val_fraction=0.1"], ["the val split", "block_size=16", "has 12", "val_fraction=0.5"]),
    # out_dir not writable, or already a run
    (["train", "tiny.yaml", "out_dir=text.txt/run"], ["out_dir=text.txt/run", "text.txt is a file"]),
    (["train", "tiny.yaml", "out_dir=/proc/run"], ["out_dir=/proc/run", "cannot write", "another folder"]),
    (
        ["train", "tiny.yaml"],
        ["out_dir=runs/tiny: already contains a run", "`nanogpt-accel train runs/tiny`", "overwrite=true"],
    ),
    # nothing to resume
    ([*TINY, "init_from=resume"], ["nothing to resume", "out_dir=new", "to start over, set init_from=scratch"]),
    (["train", "nothing"], ["nothing", "no run.yaml"]),
    # resume with another shape
    (
        ["train", "runs/tiny", "n_layer=2", "n_embd=32"],
        ["model.n_layer=2", "checkpoint-000006", "n_layer=1"],
        ["model.n_embd=32", "n_embd=16"],
    ),
    (["train", "runs/tiny", "block_size=8"], ["model.block_size=8", "block_size=16"]),
    # resume with another optimizer
    (
        ["train", "runs/tiny", "algorithm=muon"],
        ["algorithm=muon", "checkpoint-000006 contains the optimizer state of algorithm=adamw", "init_from="],
    ),
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
    # missing models
    (["sample"], ["MODEL is missing", "runs/NAME"]),
    (["sample", "--out_dir=out", "--start=hi"], ["MODEL is missing", "nanogpt-accel sample out"]),  # nanoGPT's command
    (["sample", "./gone"], ["./gone", "no such folder"]),
    (["sample", "nothing"], ["nothing", "config.json is missing"]),
    (["sample", "stock"], ["stock", "model_type=gpt2"]),
    (["evaluate", "stock", "--recipe", "tiny.yaml"], ["stock", "model_type=gpt2"]),
    ([*TINY, "init_from=stock"], ["stock", "model_type=gpt2"]),
    (["evaluate", "nothing"], ["nothing: no run.yaml in or next to this folder, so the data is unknown", "--recipe"]),
    # trackers
    ([*TINY, "trackers=wandbb"], ["trackers=wandbb", "wandb"]),
]


@pytest.mark.parametrize(
    ("argv", "expected"), [pytest.param(argv, words, id=" ".join(argv)[:60]) for argv, *words in EARLY]
)
def test_each_mistake_gets_one_line(capsys, argv, expected):
    lines = refusal(capsys, *argv)
    assert len(lines) == len(expected), lines
    for words in expected:
        assert any(has_all(line, words) for line in lines), (words, lines)


def test_paths_in_hints_can_be_pasted(capsys, workplace, tmp_path):
    run, folder, data = (tmp_path / f"it's {name}" for name in ("a run", "a folder", "tokens"))
    shutil.copytree(workplace / "runs" / "tiny", run, symlinks=True)
    shutil.copytree(next((workplace / "data").iterdir()), data)
    folder.mkdir()
    for words, hint in (
        (["train", "tiny.yaml", f"out_dir={run}"], f"nanogpt-accel train {quoted(run)}"),
        (["train", run, "out_dir=new"], f"init_from={quoted(run)}"),
        (["prepare", "tiny.yaml", f"corpus={folder}"], quoted(folder / "*.log")),
        (["prepare", "tiny.yaml", f"corpus={data}"], f"data_dir={quoted(data)}"),
        (["sample", "runs/tiny", f"out_dir={run}"], f"nanogpt-accel sample {quoted(run)}"),
    ):
        (line,) = refusal(capsys, *words)
        assert hint in line


def test_mistakes_are_found_before_anything_slow_is_imported():
    """Run all commands of the tests above in one new process."""
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
    done = run_python("-c", script, input=json.dumps(argvs))
    answers = list(map(json.loads, done.stdout.splitlines()))
    assert len(answers) == len(argvs)
    assert [answer for answer in answers if answer[2]] == []
    assert [status for _, status, _ in answers] == [0] * 5 + [2] * len(EARLY)


@pytest.mark.parametrize(("argv", "status"), [(["--help"], 0), ([*TINY, "n_layr=3", "dropout=2"], 2)])
def test_exit_status_and_streams_of_the_process(argv, status):
    done = run_python("-m", "nanogpt_accel", *argv, status=status)
    if status:
        assert done.stdout == "" and [line[:6] for line in done.stderr.splitlines()] == ["error:"] * 2
    else:
        assert done.stderr == "" and "prepare" in done.stdout and "train quickstart" in done.stdout


# ---- downloads


def test_failed_download_names_the_url_and_an_alternative(capsys, monkeypatch):
    url = f"http://127.0.0.1:{free_port()}/input.txt"
    monkeypatch.setitem(sources.URLS, "shakespeare", (url, sources.URLS["shakespeare"][1]))
    (line,) = refusal(capsys, *TINY, "corpus=shakespeare")
    assert has_all(line, ["corpus=shakespeare", url, "cannot download", "refused", "corpus=PATH"])


def test_download_with_a_wrong_hash_is_refused_and_deleted(capsys, monkeypatch, tmp_path):
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
    assert has_all(line, ["corpus=shakespeare", url, "SHA-256", sources.URLS["shakespeare"][1], "corpus=PATH"])
    assert not any(Path(os.environ["NANOGPT_ACCEL_CACHE"]).iterdir())


def test_unreachable_hub_is_one_line(capsys):
    for argv in (["sample", "nobody/nothing"], [*TINY, "init_from=nobody/nothing"]):
        (line,) = refusal(capsys, *argv)
        assert has_all(line, ["nobody/nothing", "no such folder", "Hub cannot be reached"])


# ---- resuming


def test_resume_with_a_changed_corpus_file_is_refused(capsys, workplace):
    """The recipe is the same, but the file has changed. Resuming by the run folder uses the old tokens."""
    text = (workplace / "text.txt").read_text()
    try:
        (workplace / "text.txt").write_text(text[::-1])
        (line,) = refusal(capsys, "train", "tiny.yaml", "init_from=resume", "out_dir=runs/tiny", "max_iters=8")
        before = (workplace / "runs" / "tiny" / "run.yaml").read_text()
        assert main(["train", "runs/tiny"]) == 0  # all steps are done, nothing is trained
        assert (workplace / "runs" / "tiny" / "run.yaml").read_text() == before  # unchanged
    finally:
        (workplace / "text.txt").write_text(text)
    assert has_all(line, ["checkpoint-000006: trained on different data", "set data_dir", "new run"])


def test_files_of_the_user_are_not_overwritten(capsys, workplace):
    (workplace / "nothing" / "README.md").write_text("mine")
    try:
        (line,) = refusal(capsys, "train", "tiny.yaml", "out_dir=nothing")
        assert (workplace / "nothing" / "README.md").read_text() == "mine"
    finally:
        (workplace / "nothing" / "README.md").unlink()
    assert has_all(line, ["out_dir=nothing", "README.md", "out_dir to another folder"])


def test_overwriting_the_model_of_init_from_is_refused(capsys):
    (line,) = refusal(capsys, "train", "tiny.yaml", "out_dir=runs/tiny", "init_from=runs/tiny", "overwrite=true")
    assert has_all(line, ["init_from=runs/tiny", "overwrite=true", "change out_dir"])


@pytest.fixture
def copy(workplace, tmp_path):
    """A copy of runs/tiny, for tests that damage it."""
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
def test_resume_falls_back_from_a_truncated_checkpoint(capsys, workplace, copy, name, size):
    cut(copy / "checkpoint-000006" / name, size)
    assert main(["train", str(copy)]) == 0
    out = capsys.readouterr().out
    (warning,) = [line for line in out.splitlines() if "warning" in line]
    assert has_all(warning, [str(copy / "checkpoint-000006"), f"{name} is corrupted", "skipping this checkpoint"])
    assert f"resuming {copy} from checkpoint-000004" in out and "iter 5:" in out and "iter 3:" not in out
    again, first = (run / "checkpoint-000006" for run in (copy, workplace / "runs" / "tiny"))
    for file in ("model.safetensors", "config.json", "state/optimizer.safetensors", "tokenizer.json"):
        assert (again / file).read_bytes() == (first / file).read_bytes()


def test_resume_falls_back_from_the_optimizer_of_another_run(capsys, workplace, copy, tmp_path):
    """The file is complete and of the same size, but its hash differs."""
    assert main(["train", "tiny.yaml", "seed=2", f"out_dir={tmp_path / 'other'}"]) == 0
    state = Path("checkpoint-000006") / "state" / "optimizer.safetensors"
    shutil.copyfile(tmp_path / "other" / state, copy / state)
    capsys.readouterr()
    assert main(["train", str(copy)]) == 0
    out = capsys.readouterr().out
    (warning,) = [line for line in out.splitlines() if "warning" in line]
    assert has_all(warning, [str(copy / "checkpoint-000006"), "state/optimizer.safetensors is corrupted"])
    assert f"resuming {copy} from checkpoint-000004" in out


def test_sample_falls_back_from_a_truncated_checkpoint(capsys, copy):
    cut(copy / "checkpoint-000006" / "model.safetensors", 900)
    assert main(["sample", str(copy), "num_samples=1", "max_new_tokens=2", "prompt=a"]) == 0
    assert "checkpoint-000006: model.safetensors is corrupted" in capsys.readouterr().err


def test_run_without_a_valid_checkpoint_is_refused(capsys, copy):
    for path in copy.glob("checkpoint-*"):
        cut(path / "model.safetensors", 900)
    (line,) = refusal(capsys, "train", copy)
    assert has_all(line, ["nothing to resume", "no valid checkpoint", str(copy), "init_from=scratch"])
    assert main(["sample", str(copy)]) == 2
    message = f"error: {copy}: the run folder does not contain a valid checkpoint; use another model"
    assert capsys.readouterr().err.splitlines()[-1] == message


# ---- processes


@pytest.mark.parametrize(("processes", "fits"), [(3, ["3 or 6", "1 or 2 processes"]), (8, ["to 8", "1 or 2 or 4"])])
def test_accumulation_not_divisible_by_the_processes_is_refused(capsys, monkeypatch, processes, fits):
    for key, value in torchrun_variables(0, processes).items():
        monkeypatch.setenv(key, value)
    (line,) = refusal(capsys, *TINY)
    assert has_all(line, ["gradient_accumulation_steps=4", f"{processes} processes", *fits])


@pytest.mark.parametrize("argv", [TINY, ["evaluate", "runs/tiny"]])
def test_world_size_without_a_launcher_is_refused(capsys, monkeypatch, argv):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (line,) = refusal(capsys, *argv)
    assert has_all(line, ["WORLD_SIZE=2", "MASTER_ADDR", "accelerate launch"])


def test_launched_process_that_accelerate_runs_alone_is_refused(capsys, monkeypatch):
    """The launcher started two processes, but each of them would train alone."""
    from accelerate.state import AcceleratorState, PartialState
    from torch.distributed import HashStore

    from nanogpt_accel.distributed import rendezvous

    monkeypatch.setattr(rendezvous, "_open_store", lambda timeout: HashStore())
    monkeypatch.setattr(rendezvous.Rendezvous, "exchange", lambda self, value, purpose: [value, value])  # two ranks
    assert PartialState().num_processes == 1  # from the training in the fixture
    monkeypatch.setattr(AcceleratorState, "_reset_state", lambda **options: None)
    for key, value in torchrun_variables(0, 2).items():
        monkeypatch.setenv(key, value)
    (line,) = refusal(capsys, *TINY)
    assert has_all(line, ["WORLD_SIZE=2", "Accelerate sees 1", "ACCELERATE_USE_CPU=true", "--multi_gpu"])
