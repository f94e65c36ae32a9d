"""The promise of `expect`: a run reports whether it reproduced the loss that its recipe expects. Also samples during
training, which do not change it, and quiet runs."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml
from runs import SMALL, numbers, val_losses, write_recipe
from safetensors.torch import load_file
from shared import REPOSITORY

from nanogpt_accel.__main__ import main
from nanogpt_accel.recipe import TEXT_SHA256, load_recipe
from nanogpt_accel.tracking.expectation import report_expectation

RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))
STEPS, EVERY, BLOCK = 24, 8, 32
SETTINGS = SMALL | {
    "block_size": BLOCK,
    "gradient_accumulation_steps": 2,
    "max_iters": STEPS,
    "lr_decay_iters": STEPS,
    "eval_interval": EVERY,
}
SAMPLES = ["sample_tokens=50", f"sample_interval={EVERY}", "sample_prompt=the"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expect")
    write_recipe(folder, **SETTINGS)
    return folder


@pytest.fixture(autouse=True)
def work_in_the_folder(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


def write_expecting(block):
    """Write expecting.yaml, the tiny recipe with this expect section."""
    recipe = yaml.safe_load(Path("tiny.yaml").read_text()) | {"expect": yaml.safe_load(block)}
    Path("expecting.yaml").write_text(yaml.safe_dump(recipe))


def samples(run):
    return [json.loads(line) for line in (Path(run) / "samples.jsonl").read_text().splitlines()]


# ---- the expect section of a recipe


@pytest.mark.parametrize(
    "overrides, changed",
    [
        ({}, []),
        (
            {
                "seed": "7",
                "out_dir": "x",
                "log_interval": "5",
                "device": "auto",
                "compile": "true",
                "max_hours": "1",
                "keep_last": "1",
                "trackers": "tensorboard",
                "sample_tokens": "9",
                "mixed_precision": "bf16",
                "activation_checkpointing": "true",
                "async_save": "true",
                "overwrite": "true",
            },
            [],
        ),
        (
            {"batch_size": "4", "learning_rate": "0.01", "n_layer": "2", "max_iters": "24"},
            [],
        ),  # the same values as the file
        ({"batch_size": "8"}, ["batch_size"]),
        (
            {"optimizer.learning_rate": "1e-3", "n_layer": "3", "corpus": "other.txt"},
            ["corpus", "learning_rate", "n_layer"],
        ),
        ({"max_iters": "48", "eval_iters": "all", "eval_interval": "12"}, ["eval_interval", "eval_iters", "max_iters"]),
        ({"init_from": "resume"}, []),
        ({"init_from": "gpt2"}, ["init_from"]),
        ({"eval_only": "true"}, ["eval_only"]),
    ],
)
def test_changed_settings_make_an_expectation_void(overrides, changed):
    write_expecting("{val_loss: 2.5, tolerance: 0.1}")
    recipe = load_recipe("expecting.yaml", overrides)
    assert recipe.expect.changed == changed
    # run.yaml stores them: a run resumed with other options is not the run of the file
    Path("run.yaml").write_text(recipe.to_yaml())
    assert load_recipe("run.yaml").expect.changed == changed
    again = load_recipe("run.yaml", {"init_from": "resume", "out_dir": "runs/x", "weight_decay": "0.5"})
    assert again.expect.changed == sorted({*changed, "weight_decay"})


@pytest.mark.parametrize(
    "corpus, text, changed",
    [("copy.txt", "To be", []), ("copy.txt", "Not to be", ["corpus"]), ("missing.txt", "To be", ["corpus"])],
)
def test_a_copy_of_a_built_in_text_is_no_change(tmp_path, monkeypatch, corpus, text, changed):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TEXT_SHA256, "shakespeare", hashlib.sha256(b"To be").hexdigest())
    Path("copy.txt").write_text(text)
    write_recipe(tmp_path, corpus="shakespeare")
    Path("expecting.yaml").write_text(Path("tiny.yaml").read_text() + "expect: {val_loss: 2.5}\n")
    assert load_recipe("expecting.yaml", {"corpus": corpus}).expect.changed == changed
    # the same file for a recipe that reads another corpus
    write_recipe(tmp_path, corpus="python")
    Path("expecting.yaml").write_text(Path("tiny.yaml").read_text() + "expect: {val_loss: 2.5}\n")
    assert load_recipe("expecting.yaml", {"corpus": corpus}).expect.changed == ["corpus"]


def test_expect_cannot_be_set_on_the_command_line(refused):
    write_expecting("{val_loss: 2.5, tolerance: 0.1}")
    with refused(ValueError, "val_loss: expected results can only be set in a recipe file"):
        load_recipe("expecting.yaml", {"val_loss": "1"})
    with refused(ValueError, "steps: expected results", "max_iters"):
        load_recipe("expecting.yaml", {"steps": "100"})
    with refused(ValueError, "expect.tolerance: expected results"):
        load_recipe("expecting.yaml", {"expect.tolerance": "1"})
    recipe = load_recipe("expecting.yaml")
    assert not {"val_loss", "tolerance", "source"} & recipe.flat().keys() and "expect" not in recipe.to_yaml(brief=True)
    write_expecting("{val_loss: 1.5, tolerance: -1}")
    with refused(ValueError, "expect.tolerance=-1"):
        load_recipe("expecting.yaml")


# ---- the end of a run


class Lines:
    def __init__(self):
        self.lines = []

    def say(self, line, always=False):
        assert always  # also in a quiet run
        self.lines.append(line)


@pytest.mark.parametrize(
    "block, overrides, last, best, line",
    [
        ("{val_loss: 1.47, tolerance: 0.015}", {}, 1.463, 1.4, "expected 1.470 +- 0.015, got 1.463: reproduced"),
        ("{val_loss: 1.47, tolerance: 0.015}", {}, 1.485, 1.4, "expected 1.470 +- 0.015, got 1.485: reproduced"),
        (
            "{val_loss: 1.47, tolerance: 0.015}",
            {},
            1.4851,
            1.4,
            "expected 1.470 +- 0.015, got 1.485: not reproduced, 0.015 higher",
        ),
        (
            "{val_loss: 1.47, tolerance: 0.015}",
            {},
            1.30,
            1.3,
            "expected 1.470 +- 0.015, got 1.300: not reproduced, 0.170 lower",
        ),
        (
            "{val_loss: 1.47, tolerance: 0.015, evaluation: best}",
            {},
            1.9,
            1.468,
            "expected 1.470 +- 0.015, got 1.468: reproduced",
        ),
        ("{val_loss: 2.85, source: a paper}", {}, 2.9, 2.8, "expected 2.850, got 2.900"),
        (
            "{val_loss: 1.47, tolerance: 0.5}",
            {"n_layer": "1", "seed": "2"},
            1.5,
            1.5,
            "expected 1.470 +- 0.5 for the unmodified recipe, got 1.500",
        ),
        (
            "{val_loss: 1.47, tolerance: 0.5, steps: 2000}",
            {},
            1.5,
            1.5,
            "expected 1.470 +- 0.5 after 2,000 steps, got 1.500",
        ),
        ("{val_loss: 1.47, tolerance: 0.5}", {}, None, None, None),
        ("{source: nobody}", {}, 1.5, 1.5, None),
    ],
)
def test_verdict_of_a_run(tmp_path, block, overrides, last, best, line):
    write_expecting(block)
    console = Lines()
    recipe = load_recipe("expecting.yaml", {**overrides, "out_dir": str(tmp_path)})
    report_expectation(recipe, last, best, console)
    assert console.lines == ([line] if line else [])
    assert (tmp_path / "expect.json").exists() == bool(line)
    if line:
        found = json.loads((tmp_path / "expect.json").read_text())
        assert found["got"] == (best if "best" in block else last) and found["step"] == STEPS
        assert (found["verdict"] or "") == (line.partition(": ")[2] if "reproduced" in line else "")
        assert found["changed"] == [key for key in overrides if key != "seed"]
        assert len(line) <= 80  # the other facts are in the file


# ---- samples during training


@pytest.fixture(scope="module")
def runs(workplace):
    """The same run without samples, with samples (its output in output.txt), and with samples and a resume."""
    with pytest.MonkeyPatch.context() as patch, open(workplace / "output.txt", "w") as out:
        patch.chdir(workplace)
        assert main(["train", "tiny.yaml", "out_dir=runs/plain"]) == 0
        patch.setattr("sys.stdout", out)
        write_expecting("{val_loss: 99, tolerance: 98}")
        assert main(["train", "expecting.yaml", "out_dir=runs/sampling", "trackers=tensorboard", *SAMPLES]) == 0
        assert main(["train", "tiny.yaml", "out_dir=runs/parts", f"max_iters={2 * EVERY}", *SAMPLES]) == 0
        assert main(["train", "runs/parts", f"max_iters={STEPS}"]) == 0
    return workplace / "runs"


def test_samples_change_no_number_of_the_training(runs):
    assert numbers(runs / "plain") == numbers(runs / "sampling")
    last = f"checkpoint-{STEPS:06}/model.safetensors"
    one, two = load_file(runs / "plain" / last), load_file(runs / "sampling" / last)
    assert one.keys() == two.keys() and all((one[key] == two[key]).all() for key in one)
    assert not (runs / "plain" / "samples.jsonl").exists()


def test_sample_equals_the_output_of_that_checkpoint(runs, call):
    kept = samples(runs / "sampling")
    assert [line["step"] for line in kept] == [EVERY, 2 * EVERY, STEPS]
    for line in kept:
        assert line["text"].startswith("the") and len(line["text"]) == 3 + 50  # one token per character
        written = call(
            "sample",
            runs / "sampling" / f"checkpoint-{line['step']:06}",
            "prompt=the",
            "num_samples=1",
            "max_new_tokens=50",
            "temperature=0.8",
            "top_k=200",
            "seed=1337",
        )
        assert line["text"] in written
    assert f"sample after {EVERY} steps: {kept[0]['text']}\n" in (runs.parent / "output.txt").read_text()


def test_resumed_run_has_each_sample_once(runs):
    assert samples(runs / "parts") == samples(runs / "sampling")


def test_tensorboard_gets_the_samples(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    file = max((runs / "sampling").rglob("*tfevents*"), key=lambda path: path.stat().st_size)  # others have the recipe
    events = EventAccumulator(str(file))
    events.Reload()
    got = [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors("sample/text_summary")]
    assert got == [(line["step"], line["text"]) for line in samples(runs / "sampling")]


def test_run_ends_with_its_verdict(runs):
    last = val_losses(runs / "sampling")[-1]
    assert f"expected 99.000 +- 98, got {last:.3f}: reproduced\n" in (runs.parent / "output.txt").read_text()
    found = json.loads((runs / "sampling" / "expect.json").read_text())
    assert found["got"] == last and found["verdict"] == "reproduced"
    assert not (runs / "plain" / "expect.json").exists()


def test_parameter_counts_by_part_add_up(runs):
    line = next(line for line in (runs.parent / "output.txt").read_text().splitlines() if line.startswith("model: "))
    total, parts = re.match(r"model: ([\d,]+) parameters \((.*?)\);", line).groups()
    weights = load_file(runs / "sampling" / "model.safetensors")
    numbers_by_part = {
        name: int(number.replace(",", "")) for name, number in (part.split() for part in parts.split(", "))
    }
    assert sum(numbers_by_part.values()) == int(total.replace(",", "")) == sum(w.numel() for w in weights.values())
    assert numbers_by_part["position"] == BLOCK * 32
    assert numbers_by_part["mlp"] == sum(w.numel() for key, w in weights.items() if ".mlp." in key)


def test_overwriting_a_run_deletes_its_samples(runs, call):
    out_dir = Path("runs/overwritten")
    train_words = ["train", "tiny.yaml", f"out_dir={out_dir}", "max_iters=2", "eval_interval=2", "warmup_iters=0"]
    train_words += ["sample_tokens=5", "sample_prompt=the"]
    call(*train_words, "sample_interval=1")
    assert [line["step"] for line in samples(out_dir)] == [1, 2]
    (out_dir / "expect.json").write_text("{}")
    out = call(*train_words, "overwrite=true", "quiet=true")
    assert not {"samples.jsonl", "expect.json"} & {path.name for path in out_dir.iterdir()}
    # a quiet run prints the last evaluation and the run folder
    first, blank, *rest = out.splitlines()
    assert first.startswith("step 2: train loss") and blank == ""
    assert rest[0].startswith(f"The run is in {out_dir}") and len(rest) == 4


def test_quiet_console_prints_warnings(capsys):
    from nanogpt_accel.tracking.console import Console

    console = Console(quiet=True)
    console.start(0, 10, 5)
    console.say("model: small")
    console.write("RO")
    console.step(1, 2.0, 0.1, 100, None)
    console.say("warning: the disk is full")
    console.say("done", always=True)
    console.stop()
    assert capsys.readouterr().out == "warning: the disk is full\ndone\n"


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_samples_of_a_sharded_model_are_refused(monkeypatch, name, call):
    monkeypatch.setenv(name, "true")
    said = call("train", "tiny.yaml", "out_dir=runs/none", *SAMPLES, status=2)
    assert f"error: train.sample_interval={EVERY}: sampling during training is not supported for sharded models" in said
    assert not Path("runs/none").exists()


def test_sample_interval_without_sample_tokens_is_refused(refused):
    with refused(ValueError, "train.sample_interval=8", "sample_tokens=200"):
        load_recipe("tiny.yaml", {"sample_interval": "8"})


# ---- the recipes of the repository


def number_words(expect):
    """Return the expected loss as the README writes it: 1.91 +- 0.01."""
    return f"{expect.val_loss:g}" + (f" +- {expect.tolerance:g}" if expect.tolerance else "")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_its_expected_loss_in_its_header(path):
    expect = load_recipe(path).expect
    header = " ".join(line.lstrip("# ") for line in path.read_text().split("\n\ndata:")[0].splitlines())
    assert expect.source and expect.hardware and not expect.changed
    assert expect.source in header and expect.hardware in header and expect.time in header
    if expect.val_loss is None:
        assert expect.tolerance is None and "not trained" in expect.source
    else:
        assert f"{expect.val_loss:g}" in header
        if expect.tolerance is None:
            assert "not reproduced" in expect.source  # the spread is known only from runs


def test_expected_losses_of_the_readme_are_those_of_the_recipes():
    table = (REPOSITORY / "README.md").read_text().split("## Recipes")[1].split("\n\n")[1].splitlines()[2:]
    rows = {
        name: row.rstrip(" |").split(" | ")[-1] for row in table for name in re.findall(r"recipes/(\w+)\.yaml", row)
    }
    assert set(rows) == {path.stem for path in RECIPES}
    for path in RECIPES:
        expect = load_recipe(path).expect
        assert expect.source in rows[path.stem], path.stem
        if expect.val_loss is not None:
            assert re.search(rf"(^|\s){re.escape(number_words(expect))}(?![\d.]*\d)", rows[path.stem]), path.stem
