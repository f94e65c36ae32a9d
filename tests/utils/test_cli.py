"""cli.py and __main__.py: the grammar of the command line, help pages, exit statuses, and no heavy imports."""

import errno
import gc
import json
import os
import re
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from launching import package_env, run_python

import nanogpt_accel
from nanogpt_accel import train
from nanogpt_accel.__main__ import COMMANDS, main
from nanogpt_accel.commands import (
    bench,
    configs,
    data,
    doctor,
    evaluate,
    export,
    plan,
    push,
    recipes,
    report,
    sample,
    sweep,
)
from nanogpt_accel.recipe import FIELDS, SECTION_OF, SECTIONS, Recipe, load_recipe
from nanogpt_accel.utils import cli


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- the grammar


@pytest.mark.parametrize(
    ("words", "target", "options"),
    [
        ([], None, {}),
        (["recipes/a.yaml"], "recipes/a.yaml", {}),
        (["n_layer=6", "a.yaml"], "a.yaml", {"n_layer": "6"}),
        (["a.yaml", "--n_layer=6"], "a.yaml", {"n_layer": "6"}),
        (["a.yaml", "--n_layer", "6"], "a.yaml", {"n_layer": "6"}),
        (["--n-layer", "6", "a.yaml"], "a.yaml", {"n_layer": "6"}),
        (["model.n_layer=6"], None, {"model.n_layer": "6"}),
        (["--eval_only"], None, {"eval_only": "true"}),
        (["--eval_only", "a.yaml"], "a.yaml", {"eval_only": "true"}),
        (["--eval-only", "--bias", "n_layer=6"], None, {"eval_only": "true", "bias": "true", "n_layer": "6"}),
        (["--eval_only", "false", "a.yaml"], "a.yaml", {"eval_only": "false"}),
        (["--eval_only", "No"], None, {"eval_only": "No"}),
        (["--train.eval_only", "a.yaml"], "a.yaml", {"train.eval_only": "true"}),
        # compile is true, false, auto or regional
        (["--compile", "a.yaml"], "a.yaml", {"compile": "true"}),
        (["--compile", "regional", "a.yaml"], "a.yaml", {"compile": "regional"}),
        (["--no_eval_train", "a.yaml", "--no-compile"], "a.yaml", {"eval_train": "false", "compile": "false"}),
        # unknown keys, which `validate` reports
        (["a.yaml", "--verbose"], "a.yaml", {"verbose": ""}),
        (["a.yaml", "--verbose", "--n_layer", "2"], "a.yaml", {"verbose": "", "n_layer": "2"}),
        (["a.yaml", "--no_n_layer", "2"], "a.yaml", {"no_n_layer": "2"}),
        (["n_layer=5", "--n_layer=6"], None, {"n_layer": "6"}),  # the last one wins
        (["sample_prompt=a=b\nc"], None, {"sample_prompt": "a=b\nc"}),
        (["--sample_prompt", "x=1"], None, {"sample_prompt": "x=1"}),
        (["--sample_prompt", "--"], None, {"sample_prompt": "--"}),
        (["--learning_rate", "-1"], None, {"learning_rate": "-1"}),
        (["min_lr="], None, {"min_lr": ""}),
        (["runs/a=b"], "runs/a=b", {}),  # a path: keys have no slash
        (["./a=b.yaml"], "./a=b.yaml", {}),
    ],
)
def test_parse_targets_and_options(words, target, options):
    before = list(words)
    assert cli.parse(words, FIELDS) == (target, options)
    assert words == before


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["a.yaml", "b.yaml"], ["expected at most 1 target, got 2: a.yaml b.yaml"]),
        (["a.yaml", "--n_layer"], ["--n_layer: the value is missing"]),
        (["a", "b", "c", "--device"], ["--device: the value is missing", "expected at most 1 target, got 3"]),
        # an unknown option may be the cause
        (["a.yaml", "--verbose", "b.yaml", "c"], ["unknown key verbose", "expected at most 1 target, got 2"]),
        (["a.yaml", "-v", "b", "c"], ["unknown key v", "expected at most 1 target"]),
        (
            ["a.yaml", "--n_layr", "3", "b.yaml"],
            ["unknown key n_layr (did you mean n_layer?)", "at most 1"],
        ),
        # names of other programs
        (["a.yaml", "b.yaml", "lr=3", "--bs", "4"], ["lr; use learning_rate", "bs; use batch_size", "at most 1"]),
        (
            ["a.yaml", "--model.num_layers", "3", "--seed"],
            ["model.num_layers; use n_layer", "--seed: the value is missing"],
        ),
        (["a", "b", "dtype=bf16"], ["dtype; instead of nanoGPT's dtype, use mixed_precision=bf16", "at most 1"]),
    ],
)
def test_parse_refuses_bad_command_lines(words, messages):
    with pytest.raises(ValueError) as caught:
        cli.parse(words, FIELDS)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(messages) and all(m in line for m, line in zip(messages, lines, strict=True))


@pytest.mark.parametrize("command", ["train", "prepare", "plan", "bench", "evaluate"])
def test_every_command_with_a_recipe_knows_the_names_of_other_programs(capsys, command):
    Path("a.yaml").touch()
    recipe = ["recipe=a.yaml"] if command == "evaluate" else []
    for words in ([], ["b.yaml"]):
        assert main([command, "a.yaml", *words, *recipe, "lr=3", "--epochs", "2"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[:2] == [
            "error: unknown key lr; use learning_rate",
            "error: unknown key epochs; use max_iters, the number of training steps",
        ]


def test_hints_name_only_keys_of_the_command(capsys):
    for words in (["sample", "x", "lr=3", "bs=2"], ["sample", "x", "y", "lr=3", "bs=2"]):
        assert main(words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[:2] == ["error: unknown key lr", "error: unknown key bs; use batch_size"]
    assert main(["doctor", "lr=3"]) == 2 and capsys.readouterr().err == "error: unknown key lr\n"


def test_parse_takes_any_pydantic_fields():
    """parse needs only their annotation, so it works for recipes and for options of a command."""
    fields = {"json": SimpleNamespace(annotation=bool), "recipe": SimpleNamespace(annotation=str)}
    assert cli.parse(["x", "--json", "--recipe", "a.yaml"], fields) == ("x", {"json": "true", "recipe": "a.yaml"})


# ---- the help pages

OWN = {
    "sample": sample.SampleOptions,
    "evaluate": evaluate.EvaluateOptions,
    "export": export.ExportOptions,
    "import": import_module("nanogpt_accel.commands.import_nanogpt").ImportOptions,
    "push": push.PushOptions,
    "data": data.DataOptions,
    "plan": plan.PlanOptions,
    "bench": bench.BenchOptions,
    "recipes": recipes.RecipesOptions,
    "configs": configs.ConfigsOptions,
    "report": report.ReportOptions,
    "doctor": doctor.DoctorOptions,
    "sweep": sweep.SweepOptions,
}
SETTINGS = {key for key, section in SECTION_OF.items() if section != "expect"}  # set in recipe files only
TAKEN = {
    "train": sorted(SETTINGS),
    "prepare": list(SECTIONS["data"].model_fields),
    **{
        command: [field.alias or key for key, field in options.model_fields.items()] for command, options in OWN.items()
    },
    "evaluate": [
        "recipe",
        "split",
        "json",
        *SECTIONS["data"].model_fields,
        "batch_size",
        "eval_iters",
        "device",
        "mixed_precision",
        "compile",
    ],
}


def words_of(text):
    """Return a text without line breaks and indents."""
    return " ".join(text.split())


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_shows_every_key(capsys, command, word):
    assert main([command, word]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: nanogpt-accel {command}")
    own = OWN.get(command)
    fields = FIELDS | ({field.alias or key: field for key, field in own.model_fields.items()} if own else {})
    for key in TAKEN[command]:
        assert re.search(rf"^ *{key}=", out, re.MULTILINE), key
        assert words_of(fields[key].description) in words_of(out), key


def test_help_is_shown_in_spite_of_mistakes(capsys):
    assert main(["train", "no/such.yaml", "n_layr=6", "--help"]) == 0
    assert "n_layer=" in capsys.readouterr().out


def test_help_shows_types_and_defaults_that_can_be_typed(capsys):
    main(["train", "--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    shown = {line.partition("=")[0]: line for line in lines if re.match(r"[a-z_0-9]+=", line)}
    assert set(shown) == SETTINGS
    for key, words in {
        "n_layer": ["12"],
        "bias": ["true|false", "false"],
        "sampling": ["shuffle|random"],
        "learning_rate": ["0.0006"],
        "min_lr": ["none"],
        "eval_iters": ["all|int", "200"],
        "compile": ["auto|regional|true|false"],
    }.items():
        assert all(word in shown[key] for word in words), shown[key]
    # every default, typed as shown, is read as the default
    typed = {key: match[1] for key, line in shown.items() if (match := re.search(r"\[(.*)\]$", line))}
    typed = {key: text for key, text in typed.items() if key not in ("out_dir", "sample_prompt")}
    assert len(typed) > 35
    Path("empty.yaml").touch()
    assert load_recipe("empty.yaml", typed) == load_recipe("empty.yaml")


@pytest.mark.parametrize("words", [["sample", "runs/x", "-h"], ["train", "a.yaml", "--help"], ["plan", "help"]])
def test_help_is_shown_wherever_it_is_requested(words, capsys):
    assert main(words) == 0 and "usage: nanogpt-accel" in capsys.readouterr().out


# ---- the table of commands


def test_list_of_commands_and_version(capsys):
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert all(re.search(rf"^  {command} ", out, re.MULTILINE) for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nanogpt-accel {nanogpt_accel.__version__}\n"
    assert main(["trian", "x"]) == 2
    assert capsys.readouterr().err == (
        f"error: unknown command 'trian' (did you mean train?); commands: {', '.join(COMMANDS)}\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "RECIPE or RUN_FOLDER is missing; usage: nanogpt-accel train"),
        (["prepare"], "RECIPE is missing; usage: nanogpt-accel prepare"),
        (["sample"], "MODEL is missing"),
        (["evaluate"], "MODEL is missing"),
        (["train", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
        (["train", "."], ".: not a run folder, because it has no run.yaml"),
        (["prepare", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
        (["evaluate", "runs/x"], "runs/x: no such folder, so the data is unknown; add --recipe"),
        (["sample", "./nowhere"], "./nowhere: no such folder"),
        (["sample", "x", "--prompt=FILE:nowhere.txt"], "prompt=FILE:nowhere.txt: No such file"),
        (["sample", "x", "tempreature=1"], "unknown key tempreature (did you mean temperature?)"),
        (["train", "a.yaml", "b.yaml"], "expected at most 1 target"),
    ],
)
def test_mistake_prints_one_line_and_exits_with_2(capsys, words, message):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"error: {message}")


# ---- how a command ends


def ends(monkeypatch, error):
    """Return the exit status of a command in which a function of the package raises `error`."""

    def look():
        raise error

    look.__code__ = look.__code__.replace(co_filename=str(Path(cli.__file__).with_name("corpus.py")))
    return cli.run(lambda argv: look(), [])


def test_exit_status_and_message_of_each_kind_of_error(monkeypatch, capsys):
    assert ends(monkeypatch, ValueError("first\nsecond")) == 2
    assert capsys.readouterr() == ("", "error: first\nerror: second\n")
    assert ends(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "x")) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'x'\n"
    assert ends(monkeypatch, ValueError()) == 2
    assert capsys.readouterr().err == "error: ValueError\n"
    assert ends(monkeypatch, FloatingPointError("the loss is nan")) == 1
    assert capsys.readouterr().err == "error: the loss is nan\n"
    assert ends(monkeypatch, KeyboardInterrupt()) == 130
    assert "interrupted" in capsys.readouterr().err
    assert ends(monkeypatch, BrokenPipeError()) == 1 and capsys.readouterr() == ("", "")
    assert cli.run(lambda argv: print(argv), ["x"]) == 0 and capsys.readouterr().out == "['x']\n"
    monkeypatch.setenv("RANK", "3")
    assert ends(monkeypatch, ValueError("first\nsecond")) == 2
    assert capsys.readouterr().err == "rank 3: error: first\nrank 3: error: second\n"


NO_MEMORY = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), ["not enough memory (MemoryError)", "smaller batch_size"]),
        (MemoryError("Unable to allocate 8 TiB"), ["not enough memory (Unable to allocate 8 TiB)"]),
        (RuntimeError(NO_MEMORY), ["not enough memory (", "you tried"]),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory."), ["memory (CUDA out of memory)"]),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ["Cannot allocate memory"]),
        (RuntimeError("can't start new thread"), ["can't start new thread", "ulimit -u"]),
    ],
)
def test_too_little_memory_or_too_few_threads_is_one_line(monkeypatch, capsys, error, words):
    def fail(argv):
        exec(compile("raise error", "a library", "exec"), {"error": error})

    assert cli.run(fail, []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words)
    monkeypatch.setenv("NANOGPT_ACCEL_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.run(fail, [])


def test_commands_report_that_they_cannot_start_a_thread(monkeypatch, capsys):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    Path("notes").mkdir()
    for i in range(3):
        Path(f"notes/{i}.txt").write_text("so it goes. " * 9)
    Path("a.yaml").write_text("data: {corpus: notes, tokenizer: char, val_fraction: 0.3, data_dir: data}")
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert main(["prepare", "a.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: can't start new thread; ") and not Path("data").exists()


@pytest.mark.skipif(os.name == "nt", reason="names on Windows are Unicode")
@pytest.mark.parametrize("name", [b"a\xff", b"\xc3", b"\xed\xa0\x80"])
def test_arguments_that_are_not_utf8_are_refused(monkeypatch, capsys, name):
    """Libraries in Rust and C++ cannot open such paths, and the model card cannot be written."""
    monkeypatch.setattr(train, "run_training", pytest.fail)
    name = os.fsdecode(name)
    Path("a.yaml").write_text("data: {corpus: python}")
    Path(name).mkdir()
    for words in (
        ["train", "a.yaml", f"out_dir={name}"],
        ["prepare", "a.yaml", "--data_dir", name],
        ["train", name],
        ["sample", name],
        ["sample", ".", f"prompt={name}"],
        ["report", name],
        ["export", ".", f"to={name}"],
        ["data", name],
    ):
        assert main(words) == 2
        line = capsys.readouterr().err.splitlines()[0]
        assert line.isprintable() and line.endswith(": must be UTF-8; use another name")


@pytest.mark.parametrize("key", ["out_dir", "corpus", "data_dir", "tokenizer", "init_from"])
def test_names_in_recipes_that_are_not_utf8_are_refused(monkeypatch, capsys, key):
    monkeypatch.setattr(train, "run_training", pytest.fail)
    Path("a.yaml").write_text(
        f'{key}: "runs/\\uDCFF"' if key == "out_dir" else f'{SECTION_OF[key]}: {{{key}: "\\uDCFF"}}'
    )
    assert main(["train", "a.yaml"]) == 2
    assert r"\udcff: must be UTF-8" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="Linux without a UTF-8 locale")
@pytest.mark.parametrize("words", [["train", "a.yaml", "out_dir=ü"], ["train", "b.yaml"]])
def test_c_locale_refuses_names_that_it_cannot_encode(words):
    """Python uses UTF-8 in a C locale, unless PYTHONUTF8=0."""
    Path("a.yaml").write_text("data: {corpus: python}", encoding="utf-8")
    Path("b.yaml").write_text("data: {corpus: python}\nout_dir: ü", encoding="utf-8")
    env = package_env(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    done = run_python("-m", "nanogpt_accel", *words, status=2, env=env)
    (line,) = done.stderr.splitlines()
    assert line.endswith("cannot be used with the encoding ascii of this locale; set PYTHONUTF8=1")


def test_messages_have_no_control_characters_and_a_limited_length(monkeypatch, capsys):
    for error, status in ((ValueError, 2), (FloatingPointError, 1), (cli.Stopped, 75), (KeyboardInterrupt, 130)):
        assert ends(monkeypatch, error("a\x1b[31m\x9b2J\x07\rb" + 9_000 * "x" + "\nuse y\r")) == status
        first, second = [line for line in capsys.readouterr().err.split("\n") if line][:2]
        assert r"a\x1b[31m\x9b2J\x07\rbxxx" in first and first.endswith("xxx") and len(first) < 1100
        assert second.endswith("use y")
    assert ends(monkeypatch, ValueError("\n".join(map(str, range(3_000))))) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 51 and lines[49:] == ["error: 49", "error: ... and 2,950 more"]


@pytest.mark.parametrize(
    "words",
    [
        ["train", "\x1b]0;owned\x07" + 5_000 * "x"],
        ["train", "a.yaml", "\x1b[2Jn_layer=3"],
        ["train", "a.yaml", f"n_layer=\x1b[2J{5_000 * 'x'}"],
        ["train", "a.yaml", f"--{5_000 * 'x'}"],
        ["train", "a.yaml", f"out_dir=a\x1b/{5_000 * 'x'}"],
        ["prepare", "a.yaml", "corpus=\x1b[2J"],
        ["prepare", "a.yaml", "tokenizer=\x1b[2J"],
        ["sample", "\x1b[2J"],
        ["sample", "x", 9_000 * "x"],
        ["\x1b[2J" + 5_000 * "x"],
        ["report", "\x9b2J"],
        ["plan", "a.yaml", "gpu=\x1b[2J"],
    ],
)
def test_arguments_reach_the_terminal_without_control_characters(capsys, words):
    Path("a.yaml").touch()
    assert main(words) == 2
    lines = capsys.readouterr().err.split("\n")[:-1]
    assert lines and all(line.isprintable() and len(line) < 1100 for line in lines)


@pytest.mark.parametrize("closed", [["stdout"], ["stderr"], ["stdin"], ["stdin", "stdout", "stderr"]])
def test_closed_streams_are_opened_again(monkeypatch, closed):
    """For example, `>&-` closes stdout, and under pythonw all streams are closed."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None if name in closed else getattr(sys, name))
    streams = []
    for words in (["--help"], ["train", "nowhere.yaml"]):
        assert main(words) == (0 if words == ["--help"] else 2)
        streams += [getattr(sys, name) for name in closed]
    assert all(not stream.isatty() for stream in streams)
    for stream in streams[: len(closed)]:
        stream.close()


def test_open_missing_streams_fills_the_descriptors():
    """If a standard descriptor stayed free, a file that we open could get it, and C libraries would print to this
    file."""
    script = """
import os, sys
from nanogpt_accel.utils import cli
cli.run(lambda argv: None, [])
descriptors = [stream.fileno() for stream in (sys.stdin, sys.stdout, sys.stderr)]
with open(sys.argv[1], "w") as file:
    os.write(1, b"printed by C")
    file.write(f"{descriptors} {file.fileno()}")
"""
    bare = f"{sys.executable} -c '{script}' out.txt <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", bare], env=package_env()).returncode == 0
    assert Path("out.txt").read_text() == "[0, 1, 2] 3"


def test_openmp_threads_spin_less_unless_the_user_set_it(monkeypatch):
    """The test starts a new process that imports torch afterwards. Its OpenMP library prints the settings."""
    script = "from nanogpt_accel.utils import cli; cli.run(lambda argv: __import__('torch').ones(9).sum(), [])"
    for given, expected in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)):
        bare = {key: value for key, value in package_env().items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        done = run_python("-c", script, env=bare | given | {"OMP_DISPLAY_ENV": "VERBOSE"})
        found = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
        if not found:
            pytest.skip("this torch does not use GNU OpenMP")
        assert expected in (found[0], None) and (expected or int(found[0]) > 1000)


def test_garbage_collection_threshold_is_restored(monkeypatch):
    before, within = gc.get_threshold(), []
    assert cli.run(lambda argv: within.append(gc.get_threshold()), []) == 0
    assert ends(monkeypatch, ValueError("no")) == 2
    assert within[0][0] > before[0] and gc.get_threshold() == before


def test_errors_that_are_not_the_users_keep_their_traceback(monkeypatch):
    with pytest.raises(ValueError):  # raised in another library
        cli.run(lambda argv: json.loads("{"), [])
    for error in (KeyError("x"), RuntimeError("x"), RecursionError("x"), NotImplementedError()):
        with pytest.raises(type(error)):
            ends(monkeypatch, error)
    with pytest.raises(AssertionError):
        ends(monkeypatch, AssertionError("ours"))
    monkeypatch.setenv("NANOGPT_ACCEL_DEBUG", "1")
    with pytest.raises(ValueError):
        ends(monkeypatch, ValueError("first"))


# ---- nothing heavy before it is needed

LIGHT = [
    "nanogpt_accel",
    "nanogpt_accel.__main__",
    *(
        f"nanogpt_accel.{name}"
        for name in (
            "utils.cli",
            "recipe",
            "batches",
            "evaluation",
            "tracking.console",
            "tracking.metrics_log",
            "data.sources",
            "data.tokenizer",
            "data.token_files",
            "data.dataset",
            "checkpoint.verify",
            "checkpoint.save",
            "models.load",
            "distributed.launcher",
            "distributed.accelerator",
            "commands.prepare",
            "train",
            "commands.evaluate",
            "commands.sample",
        )
    ),
]
SCRIPT = """
import contextlib, importlib, io, json, sys
heavy = ("torch", "transformers", "accelerate", "datasets", "safetensors", "matplotlib", "huggingface_hub")
seen = {}

def look(what):
    seen[what] = [name for name in heavy if name in sys.modules]

look("at first")
for name in sys.argv[1].split():
    importlib.import_module(name)
    look(name)
from nanogpt_accel.__main__ import COMMANDS, main
for words in [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS), ["trian"],
              ["train", "nowhere.yaml"], ["train", "bad.yaml"], ["train", "good.yaml", "n_layr=6"],
              ["train", "good.yaml", "n_embd=100", "corpus=nowhere.txt"], ["sample", "./nowhere"],
              ["train", "good.yaml", "init_from=resume"], ["prepare", "good.yaml", "tokenizer=nowhere"]]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(words)
    assert status == (0 if words[-1][0] == "-" else 2), (words, err.getvalue())
    look(" ".join(words))
print(json.dumps(seen))
"""


def test_mistakes_are_found_before_anything_heavy_is_imported():
    Path("good.yaml").write_text("data: {corpus: python}\n")
    Path("bad.yaml").write_text("model: {n_layer: six}\n")
    seen = json.loads(run_python("-c", SCRIPT, " ".join(LIGHT)).stdout)
    assert len(seen) == 1 + len(LIGHT) + 10 + len(COMMANDS)
    assert {what: names for what, names in seen.items() if names} == {}


# ---- the package itself


def test_public_names_load_lazily_and_are_documented():
    assert set(nanogpt_accel.__all__) == {"GPT", "GPTConfig", "Recipe", "load_recipe"}
    for name in nanogpt_accel.__all__:
        assert len(getattr(nanogpt_accel, name).__doc__.strip()) > 20, name
    assert nanogpt_accel.Recipe is Recipe and nanogpt_accel.load_recipe is load_recipe
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nanogpt_accel.nothing
