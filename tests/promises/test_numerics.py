"""The promise about NaN and Inf: a run stops and keeps the batch, or skips the step; fp16's scaler resumes exactly."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from runs import losses, numbers, weights, write_recipe
from safetensors.torch import load_file

from nanogpt_accel.__main__ import main
from nanogpt_accel.checkpoint.layout import list_checkpoints, read_trainer
from nanogpt_accel.distributed.accelerator import make_accelerator
from nanogpt_accel.model import GPT
from nanogpt_accel.tracking.metrics_log import Spikes

BLOCK, ROWS, MICRO = 16, 3, 2  # block_size, batch_size and micro-batches per step


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numerics")
    write_recipe(
        folder,
        block_size=BLOCK,
        batch_size=ROWS,
        gradient_accumulation_steps=MICRO,
        max_iters=12,
        lr_decay_iters=12,
        eval_interval=2,
    )
    return folder


@pytest.fixture
def poison(workplace, monkeypatch):
    """Return a function poison(bad, first=0) that makes the loss NaN in the steps `bad` of the next run, which starts
    at step `first`. The function returns a list to which the run appends the inputs of every training micro-batch."""
    monkeypatch.chdir(workplace)
    forward = GPT.forward

    def poison(bad, first=0):
        seen = []

        def poisoned(self, input_ids=None, **kwargs):
            output = forward(self, input_ids=input_ids, **kwargs)
            if self.training:
                seen.append(input_ids)
                if first + (len(seen) - 1) // MICRO in bad and len(seen) % MICRO == 0:
                    output.loss = output.loss * math.nan
            return output

        monkeypatch.setattr(GPT, "forward", poisoned)
        return seen

    return poison


def test_stop_on_nan_names_the_step_and_keeps_its_batch(workplace, poison, capsys):
    seen = poison({5})
    assert main(["train", "tiny.yaml", "out_dir=stopped", "save_interval=2", "log_interval=100"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: loss of step 5 is nan") and "stopped/nonfinite-5.json" in line
    assert "latest valid checkpoint is stopped/checkpoint-000004" in line and "learning_rate=..." in line
    for path in list_checkpoints("stopped"):
        assert all(tensor.isfinite().all() for tensor in load_file(path / "model.safetensors").values())
    kept = json.loads(Path("stopped/nonfinite-5.json").read_text())
    assert kept["step"] == 5 and len(kept["sequences"]) == ROWS * MICRO
    # token ids are the sorted characters of the text, so the kept batch can be compared with the text
    text = (workplace / "text.txt").read_text()
    tokens = np.fromfile("tokens/train.bin", np.uint16)
    assert "".join(sorted(set(text))[i] for i in tokens) == text[: len(tokens)]
    for sequence in kept["sequences"]:
        assert sequence["text"] == text[sequence["start"] : sequence["start"] + BLOCK + 1]
    read = torch.cat(seen[5 * MICRO : 6 * MICRO]).tolist()  # the inputs of the model in that step
    assert ["".join(sorted(set(text))[i] for i in row) for row in read] == [s["text"][:-1] for s in kept["sequences"]]
    # the run resumes from the checkpoint, and a new run in the same folder deletes the kept batch
    poison(set())
    assert main(["train", "stopped"]) == 0
    assert main(["train", "tiny.yaml", "out_dir=stopped", "overwrite=true", "max_iters=1", "warmup_iters=0"]) == 0
    assert not Path("stopped/nonfinite-5.json").exists()


def test_skip_equals_a_run_without_the_update_of_that_step(poison, monkeypatch, capsys):
    """The reference has finite losses and calls no optimizer step at these steps."""
    bad = {3, 7, 8}
    with monkeypatch.context() as patch:
        step, calls = AcceleratedOptimizer.step, []

        def step_or_not(self, closure=None):
            calls.append(None)
            if len(calls) - 1 not in bad:
                step(self, closure)

        patch.setattr(AcceleratedOptimizer, "step", step_or_not)
        poison(set())
        assert main(["train", "tiny.yaml", "out_dir=by_hand", "eval_interval=12"]) == 0
        assert len(calls) == 12
    poison(bad)
    assert main(["train", "tiny.yaml", "out_dir=skipped", "on_nonfinite=skip", "max_iters=8"]) == 0
    poison(bad, first=8)
    assert main(["train", "skipped", "max_iters=12"]) == 0
    assert "3 steps skipped" in capsys.readouterr().out
    for (step, right), (_, found) in zip(losses("by_hand").items(), losses("skipped").items(), strict=True):
        assert found == (None if step in bad else right), step
    assert weights("skipped", 12) == weights("by_hand", 12)
    counted = {line["step"]: line.get("skipped_steps", 0) for line in numbers("skipped") if "loss" in line}
    assert counted == {step: sum(other <= step for other in bad) for step in range(12)}  # also across the resume


@pytest.mark.parametrize(("bad", "ends"), [({3, 4, 5, 7, 8, 9}, None), ({0, 1, 2, 3}, 3), ({5, 7, 8, 9, 10}, 10)])
def test_more_than_max_skips_in_a_row_stop_the_run(poison, capsys, bad, ends):
    poison(bad)
    argv = ["train", "tiny.yaml", "out_dir=many", "overwrite=true", "on_nonfinite=skip", "max_skips=3"]
    assert main(argv) == (0 if ends is None else 1)
    errors = capsys.readouterr().err.splitlines()
    if ends is None:
        assert errors == []
    else:
        assert len(errors) == 1 and f"gradients of steps {ends - 3} to {ends} are not finite" in errors[0]
        assert Path(f"many/nonfinite-{ends}.json").is_file() and f"many/nonfinite-{ends}.json" in errors[0]
        assert ("no checkpoint was saved yet" in errors[0]) == (ends == 3 and not list_checkpoints("many"))


def test_skips_in_a_row_are_counted_across_a_resume(poison, capsys):
    poison({4, 5})
    argv = ["out_dir=rows", "on_nonfinite=skip", "max_skips=2", "max_iters=6"]
    assert main(["train", "tiny.yaml", *argv]) == 0
    poison({6}, first=6)
    assert main(["train", "rows", "max_iters=12"]) == 1
    assert "gradients of steps 4 to 6 are not finite" in capsys.readouterr().err


# ---- spikes


def log_of(path, losses):
    path.write_text("".join(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(losses)))
    return path


@pytest.mark.parametrize(
    ("n", "above", "expected"),
    [
        (100, 7.001, True),
        (100, 6.999, False),
        (1000, 7.001, True),
        (1000, 6.999, False),
        (99, 1000, False),
        (0, 9, False),
    ],
)
def test_spike_is_seven_standard_deviations_above_the_mean(tmp_path, n, above, expected):
    """Losses that alternate between 3.75 and 4.25 have mean 4 and standard deviation 0.25."""
    before = [4 + 0.25 * (-1) ** i for i in range(n)]
    loss = 4 + above * 0.25
    assert Spikes(log_of(tmp_path / "metrics.jsonl", before)).is_spike(loss) is expected
    live = Spikes(tmp_path / "no log yet")
    assert [live.is_spike(value) for value in before] == [False] * n and live.is_spike(loss) is expected


def test_spikes_use_recent_finite_losses_only(tmp_path):
    old, new = [9.0 + i % 2 for i in range(500)], [4 + 0.25 * (-1) ** i for i in range(1000)]
    spikes = Spikes(log_of(tmp_path / "metrics.jsonl", old + new))
    assert not spikes.is_spike(math.nan) and not spikes.is_spike(5.74)
    assert spikes.is_spike(9.5) and not spikes.is_spike(-9.5)


def test_resumed_run_marks_the_same_spikes(tmp_path):
    draw = random.Random(4)
    losses = [draw.gauss(3, 0.1) + 3 * (i % 90 == 89) for i in range(600)]
    live = Spikes(tmp_path / "none")
    whole = [live.is_spike(loss) for loss in losses]
    assert 3 <= sum(whole) <= 6
    for cut in (1, 99, 250, 500):
        resumed = Spikes(log_of(tmp_path / "metrics.jsonl", losses[:cut]))
        assert [resumed.is_spike(loss) for loss in losses[cut:]] == whole[cut:]


# ---- fp16


@pytest.fixture
def scaled(monkeypatch):
    """Return a function scaled(scale) that makes the next run use fp16 autocast and a gradient scaler with this initial
    scale. Accelerate does not support this on a CPU."""
    make = make_accelerator

    def scaled(scale):
        def make_accelerator(*args, **kwargs):
            accelerator = make(*args, **kwargs)
            accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
            return accelerator

        monkeypatch.setattr("nanogpt_accel.training.make_accelerator", make_accelerator)

    return scaled


def test_fp16_scaler_resumes_exactly(poison, scaled):
    scaled(2.0**8)
    assert main(["train", "tiny.yaml", "out_dir=fp16"]) == 0
    assert main(["train", "tiny.yaml", "out_dir=fp16_parts", "max_iters=4"]) == 0
    assert main(["train", "fp16_parts", "max_iters=12"]) == 0
    # it doubles every third step
    for run in ("fp16", "fp16_parts"):
        found = {read_trainer(path)["step"]: read_trainer(path)["scaler"] for path in list_checkpoints(run)}
        assert {step: state["scale"] for step, state in found.items()} == {
            step: 2.0 ** (8 + step // 3) for step in (2, 4, 6, 8, 10, 12)
        }
    assert losses("fp16") == losses("fp16_parts") and weights("fp16", 12) == weights("fp16_parts", 12)


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_fp16_scaler_skips_overflowing_steps_in_either_mode(poison, scaled, mode):
    """The scaler lowers its scale; only on_nonfinite=skip counts the skipped steps."""
    scaled(2.0**24)
    assert main(["train", "tiny.yaml", f"out_dir=over_{mode}", f"on_nonfinite={mode}"]) == 0
    lines = [line for line in numbers(f"over_{mode}") if "loss" in line]
    overflown = sum(line["grad_norm"] is None for line in lines)
    assert 0 < overflown < 12 and all(line["loss"] is not None for line in lines)
    assert lines[-1].get("skipped_steps", 0) == (overflown if mode == "skip" else 0)
