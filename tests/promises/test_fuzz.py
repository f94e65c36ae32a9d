"""The promise that no recipe and no command line gets a traceback: random mistakes either pass the checks of `train` or
get exit status 2 and one line per mistake, within seconds."""

import os
import random
import signal
from pathlib import Path

import pytest
import yaml

from nanogpt_accel import train
from nanogpt_accel.__main__ import main
from nanogpt_accel.recipe import FIELDS, SECTIONS

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
TIMEOUT_S = 20  # for one check, which takes milliseconds
VALUES = [
    "",
    "0",
    "-1",
    "1",
    "2",
    "3",
    "7",
    "1e3",
    "1e400",
    "-1e400",
    "1e-400",
    "nan",
    "inf",
    "-inf",
    ".nan",
    ".inf",
    "0x10",
    "0o7",
    "1_000",
    "1,000",
    "12:30:00",
    "2024-01-01",
    "2024-99-99",
    "true",
    "false",
    "yes",
    "no",
    "on",
    "off",
    "null",
    "none",
    "~",
    "[]",
    "{}",
    "[1, 2]",
    "{a: 1}",
    "a b",
    "'",
    '"',
    "*a",
    "&a 1",
    "!!python/object:os.system x",
    "!!binary aGk=",
    "!!int x",
    "!!float x",
    "!!set {a}",
    "|\n  text",
    "> text",
    "%",
    "@",
    "`",
    "\t",
    "\0",
    "\x07",
    "\ud800",
    "\u202e",
    "é",
    "😀",
    "x" * 5000,
    "9" * 400,
    "-" + "9" * 400,
    str(2**63),
    str(2**64),
    "1.5",
    "-0",
    "+1",
    "gpt2",
    "char",
    "scratch",
    "resume",
    "auto",
    "all",
    "cpu",
    "cuda:99",
    "muon",
    "..",
    ".",
    "/",
    "/proc",
    "/dev/null",
    "/proc/self/mem",
    "~",
    "~nobody/x",
    "text.txt",
    "no/such/file",
    "*.txt",
    "**/*",
    "[",
    "hub:a/b",
    "hub:",
    "hub:a/b/c",
    "a/b@c",
    "wandb",
    "tensorboard,wandb",
    ",",
    "http://",
    "https://localhost:1/x",
    "$HOME",
    "%s",
    "{}",
    "{0}",
    "\\",
]


def random_options(rng):
    """Return some options as a user might type them, most of them wrong."""
    found = []
    for _ in range(rng.choice((0, 1, 1, 2, 3, 6))):
        key = rng.choice(list(FIELDS))
        if rng.random() < 0.1:
            key = mutate(rng, key)
        value = rng.choice(VALUES)
        found += rng.choice(
            (
                [f"{key}={value}"],
                [f"--{key}={value}"],
                [f"--{key}", value],
                [f"--{key}"],
                [key],
                [value],
                [f"{key.replace('_', '-')}={value}"],
            )
        )
    return [word.replace("\0", "") for word in found]  # not possible on a command line


def mutate(rng, text):
    """Return a text with one random mistake."""
    if not text:
        return rng.choice(VALUES)
    i, j = sorted((rng.randrange(len(text)), rng.randrange(len(text))))
    return rng.choice(
        (
            text[:i] + text[j:],
            text[:j] + text[i:j] + text[j:],
            text[:i] + rng.choice(VALUES) + text[i:],
            text[:i] + rng.choice("\0\t \n:-[]{}#&*!|>'\"%@`,?=é\x85\u2028") + text[i + 1 :],
            text[:i],
        )
    )


def damage_recipe(rng, recipe):
    """Return the bytes of a recipe with random mistakes."""
    values = yaml.safe_load(recipe)
    for _ in range(rng.choice((0, 1, 2, 4))):  # values of the wrong kind in the right place
        section = rng.choice(list(SECTIONS))
        keys = values.setdefault(section, {})
        if rng.random() < 0.1:
            values[section] = rng.choice([None, 3, "x", [], [1], {1: 2}, {None: None}, True, {"a": {"b": {}}}])
        elif isinstance(keys, dict):
            keys[rng.choice(list(SECTIONS[section].model_fields))] = rng.choice(
                [*VALUES, 0, -1, 3, 10**30, 1.5, float("nan"), float("inf"), None, True, [], {}, [1], {"a": 1}, b"x"]
            )
    text = rng.choice((recipe, yaml.safe_dump(values), yaml.safe_dump(values)))
    for _ in range(rng.choice((0, 0, 1, 2))):
        lines = text.split("\n")
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        text = rng.choice(
            (
                mutate(rng, text),
                "\n".join(lines[:i] + lines[i + 1 :]),
                "\n".join(lines[:i] + [lines[j]] + lines[i:]),
                "\n".join(lines[:i] + ["  " + lines[i]] + lines[i + 1 :]),
                "\n".join(lines[:i] + [mutate(rng, lines[i])] + lines[i + 1 :]),
            )
        )
    raw = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        i = rng.randrange(len(raw) + 1)
        raw = raw[:i] + bytes([rng.randrange(256)]) + raw[i + 1 :]
    return raw


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    Path("text.txt").write_text("it is a text, and ends\n" * 500)
    reached = []
    monkeypatch.setattr(train, "run_training", lambda recipe, signals: reached.append(recipe))
    return reached


def fail_on_alarm(number, frame):
    raise AssertionError("the check did not end")


def check(capsys, reached, case, argv):
    """Run a command; require that it passes, or prints errors and returns 2. Return its status."""
    before = len(reached)
    signal.signal(signal.SIGALRM, fail_on_alarm)
    signal.alarm(TIMEOUT_S)
    try:
        status = main(argv)
    except BaseException as error:
        raise AssertionError(f"case {case}: {argv}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
    lines = capsys.readouterr().err.splitlines()
    if status == 0:
        is_help = "--help" in argv or argv[1] in ("-h", "help")
        assert lines == [] and len(reached) == before + (not is_help), (case, argv)
    else:
        assert status == 2 and lines and len(reached) == before, (case, argv, status, lines)
        assert all(line.startswith("error: ") for line in lines) and len(" ".join(lines)) > 20, (case, argv, lines)
    return status


def fuzz(capsys, reached, cases):
    counts = {0: 0, 2: 0}
    for case in cases:
        rng = random.Random(case)
        recipe = rng.choice(RECIPES).read_text()
        if rng.random() < 0.5:
            Path("recipe.yaml").write_bytes(damage_recipe(rng, recipe))
            options = random_options(rng) if rng.random() < 0.2 else []
        else:
            Path("recipe.yaml").write_text(recipe)
            options = random_options(rng)
        argv = ["train", rng.choice(["recipe.yaml"] * 9 + [rng.choice(VALUES).replace("\0", "")]), *options]
        counts[check(capsys, reached, case, argv)] += 1
    assert min(counts.values()) > len(cases) // 20, counts  # both answers occur
    assert {path.name for path in Path().iterdir()} <= {"text.txt", "recipe.yaml"}, "a check leaves no files"


def test_random_mistakes_get_an_answer_and_no_traceback(capsys, workplace):
    fuzz(capsys, workplace, range(150))


@pytest.mark.slow
def test_2000_random_mistakes_get_an_answer_and_no_traceback(capsys, workplace):
    fuzz(capsys, workplace, range(1000, 3000))


BOMB = "a: &a [x, x]\n" + "".join(f"{chr(b + 1)}: &{chr(b + 1)} [*{chr(b)}, *{chr(b)}]\n" for b in range(97, 121))


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "[" * 300,
        "{a: " * 3000,
        "- " * 5000,
        "a: &a {b: *a}\n",
        "train: &t\n  max_iters: *t\n",
        "<<: {seed: 1}\n",
        "train: {<<: [1]}\n",
        "? [a]\n: b\n",
        "seed: !!timestamp 2024-01-01\n",
        "--- 1\n--- 2\n",
        "\ufeffseed: 1\n",
        "%YAML 3.0\n---\na",
        "seed: " + "9" * 5000,
        "seed: 0b" + "1" * 5000,
        "seed: 1:" + ":".join(["59"] * 500),
        "seed: 1e" + "9" * 4000,
        "optimizer: {learning_rate: 1" + "0" * 400 + "}",
    ],
    ids=range(18),
)
def test_malicious_yaml_gets_an_answer_and_no_traceback(capsys, workplace, text):
    Path("recipe.yaml").write_text(text)
    check(capsys, workplace, text[:20], ["train", "recipe.yaml"])


@pytest.mark.parametrize("kind", ["folder", "fifo", "link to itself", "no permission", "name"])
def test_recipe_path_that_is_not_a_file_is_refused(capsys, workplace, kind):
    place = Path("recipe.yaml")
    if kind == "folder":
        place.mkdir()
    elif kind == "fifo":
        os.mkfifo(place)
    elif kind == "link to itself":
        place.symlink_to(place)
    elif kind == "no permission":
        place = Path("/proc/self/mem")
    else:
        place = Path("x" * 300)
    assert check(capsys, workplace, kind, ["train", str(place)]) == 2
