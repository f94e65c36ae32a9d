"""Finished runs as points of a scaling law: which runs are used, and which cannot share a law."""

import json
import math
from functools import partial

import pytest
from runs import HASHES, checkpoint
from runs import write_finished_run as write_run

from nanogpt_accel.checkpoint.finished_runs import fit_ladder, read_ladder

write_finished_run = partial(write_run, max_iters=100)
LAW = {"E": 1.5, "K": 2.0 * 1e11**0.2, "c": 0.2}


def test_a_run_is_a_point(tmp_path):
    """The expected size is computed by hand: depth 4 has 32 dimensions, so 12 * 32**2 weights per block, and a head of
    576 entries."""
    write_finished_run(tmp_path / "a", LAW, depth=4, max_iters=50)
    (run,), recipe, vocab_size, data, notes = read_ladder([tmp_path / "a"])
    assert run.name == "a" and run.n_params == 4 * 12 * 32**2 + 576 * 32 and vocab_size == 576 and not notes
    assert run.tokens == 50 * 32 * 32 and data == HASHES and recipe.model.n_layer == 4
    norms_and_attention = 12 * 4 * 32 * 32
    assert run.flops == run.tokens * (6 * run.n_params + norms_and_attention)
    assert run.loss == pytest.approx(1.5 + 2.0 * (1e11 / run.flops) ** 0.2)


def test_a_folder_of_runs_is_a_ladder_in_which_unfinished_runs_are_named(tmp_path):
    for depth in (2, 3, 4):
        write_finished_run(tmp_path / f"depth={depth}", LAW, depth=depth)
    write_finished_run(tmp_path / "stopped", LAW, depth=5, trainer={"step": 40})
    write_finished_run(tmp_path / "diverged", LAW, depth=6, trainer={"val_loss": math.nan})
    write_finished_run(tmp_path / "zero", LAW, depth=6, trainer={"val_loss": 0.0})
    tuned = write_finished_run(tmp_path / "tuned", LAW, depth=6)
    (tuned / "run.yaml").write_text((tuned / "run.yaml").read_text().replace("init_from: scratch", "init_from: gpt2"))
    (write_finished_run(tmp_path / "started", LAW, depth=7) / "checkpoint-000100").rename(tmp_path / "elsewhere")
    (tmp_path / "sweep.json").write_text("{}")
    ladder = read_ladder([tmp_path])
    assert [run.name for run in ladder.runs] == ["depth=2", "depth=3", "depth=4"]
    notes = "\n".join(ladder.notes)
    assert (
        read_ladder([*sorted(tmp_path.glob("depth=*")), tmp_path / "sweep.json"]).runs == ladder.runs
    )  # the pattern sweep/*
    with pytest.raises(
        ValueError, match="the runs have 3; (.|\n)*stopped: not used: the last checkpoint is at step 40"
    ):
        fit_ladder(ladder)
    assert "stopped: not used: the last checkpoint is at step 40 of 100" in notes
    assert "diverged: not used: the last validation loss is nan" in notes
    assert "zero: not used: the last validation loss is 0.0" in notes
    assert "started: not used: the run has no checkpoint" in notes
    assert "tuned: not used: the run started from the weights of gpt2" in notes


def test_seeds_are_all_used_and_of_several_learning_rates_the_best(tmp_path):
    for seed in (1, 2):
        write_finished_run(tmp_path / f"good{seed}", LAW, error=seed / 100, depth=3, seed=seed)
        write_finished_run(tmp_path / f"bad{seed}", LAW, error=seed / 50, depth=3, seed=seed, learning_rate=0.1)
    write_finished_run(tmp_path / "large", LAW, depth=4, learning_rate=0.1)
    ladder = read_ladder([tmp_path])
    assert [run.name for run in ladder.runs] == ["good1", "good2", "large"]
    assert ladder.notes == ["bad1, bad2: not used: runs of the same size have a lower loss (good1, good2)"]


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    for parent in ("one", "two"):
        write_finished_run(tmp_path / parent / "depth=2", LAW, depth=2)
    ladder = read_ladder([tmp_path / "one", tmp_path / "two", tmp_path / "two" / "depth=2"])
    assert [run.name for run in ladder.runs] == ["one/depth=2", "two/depth=2"]


@pytest.mark.parametrize(
    ("other", "parts"),
    [
        ({"data": HASHES | {"val": "c" * 64}}, ["the data, tokenizers or validation splits differ: a / b"]),
        ({"vocab_size": 1000}, ["vocab_size differs: 576 in a; 1024 in b"]),
        ({"activation": "gelu"}, ["model.activation differs: relu2 in a; gelu in b"]),
        ({"block_size": 64}, ["model.block_size differs: 32 in a; 64 in b"]),
        ({"algorithm": "adamw", "schedule": "cosine"}, ["optimizer.algorithm differs", "optimizer.schedule differs"]),
        ({"eval_iters": 5}, ["train.eval_iters differs: all in a; 5 in b"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_runs_that_cannot_share_a_law_are_refused_with_their_names(other, parts, tmp_path):
    write_finished_run(tmp_path / "a", LAW, depth=3)
    write_finished_run(tmp_path / "b", LAW, depth=4, **other)
    with pytest.raises(ValueError, match="cannot share a scaling law") as caught:
        read_ladder([tmp_path])
    assert [part for part in parts if part not in str(caught.value)] == []
    assert len(str(caught.value).splitlines()) == len(parts)


def test_stages_may_start_at_other_steps(tmp_path):
    """Two runs of different length have the same mix. Their second stages start at the same share of the run, so at
    different steps."""
    sources = [{"name": name, "train": "a" * 64, "val": "b" * 64} for name in ("web", "code")]
    for name, start in (("short", 50), ("long", 100)):
        stages = [{"from": 0, "mix": {"web": "1"}}, {"from": start, "mix": {"code": "1"}}]
        data = {"tokenizer": "t" * 64, "sources": sources, "stages": stages}
        write_finished_run(tmp_path / name, LAW, depth=3, max_iters=2 * start, data=data)
    assert len(read_ladder([tmp_path]).runs) == 2


def test_folders_without_runs_are_refused(tmp_path):
    (tmp_path / "file").touch()
    reasons = {tmp_path: "contains no runs", tmp_path / "missing": "no such folder", tmp_path / "file": "not a folder"}
    for target, problem in reasons.items():
        with pytest.raises(ValueError, match=problem):
            read_ladder([target])
    write_finished_run(tmp_path / "stopped", LAW, depth=5, trainer={"step": 40})
    with pytest.raises(ValueError, match="step 40 of 100"):
        read_ladder([tmp_path])


def test_a_damaged_run_is_not_used(tmp_path):
    write_finished_run(tmp_path / "a", LAW, depth=3)
    for name, file in (("b", "state/trainer.json"), ("c", "config.json")):
        write_finished_run(tmp_path / name, LAW, depth=4)
        (checkpoint(tmp_path / name, 100) / file).write_text("{")
    write_finished_run(tmp_path / "d", LAW, depth=4, trainer={"data": None})
    (write_finished_run(tmp_path / "e", LAW, depth=4) / "run.yaml").write_text("model: {n_layers: 3}")
    ladder = read_ladder([tmp_path])
    assert [run.name for run in ladder.runs] == ["a"]
    assert [note[:11] for note in ladder.notes] == [f"{name}: not used" for name in "bcde"], json.dumps(ladder.notes)
