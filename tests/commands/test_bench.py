"""bench: its output, its steps against those of train, and its memory against torch's MemTracker."""

import json
import math
from pathlib import Path

import pytest
import torch

from nanogpt_accel.__main__ import main
from nanogpt_accel.commands import bench
from nanogpt_accel.model import GPT
from nanogpt_accel.optim import make_optimizer
from nanogpt_accel.recipe import Optimizer, load_recipe
from nanogpt_accel.tracking.metrics_log import read_metrics
from nanogpt_accel.utils import cli

RECIPE = """
data: {corpus: text.txt, tokenizer: char, val_fraction: 0.1, data_dir: tokens}
model: {n_layer: 2, n_embd: 32, n_head: 2, block_size: 32, dropout: 0.2}
optimizer: {learning_rate: 1e-2, warmup_iters: 3}
train: {batch_size: 4, gradient_accumulation_steps: 2, max_iters: 4, eval_interval: 4, eval_iters: 1, device: cpu}
"""


@pytest.fixture(autouse=True)
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(RECIPE)
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 100)


def measured(*words, capfd):
    """Return the result as a dictionary, after a check that the profiler, which is C++ code, printed nothing."""
    assert main(["bench", "tiny.yaml", "steps=2", "warmup=1", "--json", *words]) == 0
    printed = capfd.readouterr()
    assert "profiler" not in printed.err.lower()
    return json.loads(printed.out)


def test_json_is_one_object(capfd):
    found = measured("--profile", "trace.json", capfd=capfd)
    assert found["recipe"] == "tiny.yaml" and found["data"].startswith("random tokens, vocabulary size 256 (")
    (line,) = found["variants"]
    assert line["tokens_per_step"] == 256 and line["ratio"] == 1 and line["mfu"] is None and line["name"] == "recipe"
    assert line["tokens_per_second"] == pytest.approx(256 / line["seconds"]["total"], rel=0.5)
    assert line["slowest"] <= line["tokens_per_second"] <= line["fastest"]
    parts = [line["seconds"][part] for part in bench.PARTS]
    assert min(parts) > 0 and sum(parts) < 1.5 * line["seconds"]["total"]
    trace = json.loads(Path("trace.json").read_text())  # the format of Perfetto
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"aten::addmm", "aten::embedding"} & names and all("ph" in event for event in trace["traceEvents"])
    assert not Path("tokens").exists() and not Path("runs").exists()


def test_combinations_of_variants(capfd):
    found = measured("--compare", "attention,loss,optimizer", capfd=capfd)
    names = [line["name"] for line in found["variants"]]
    assert len(set(names)) == 8
    assert names[0] == "sdpa, full loss, adamw" and names[-1] == "eager attention, chunked loss, muon"
    assert all(line["tokens_per_second"] > 0 and line["peak_memory"] > 0 for line in found["variants"])
    # Muon stores one float per parameter, AdamW two
    peaks = {line["name"]: line["peak_memory"] for line in found["variants"]}
    assert peaks["sdpa, full loss, muon"] < peaks["sdpa, full loss, adamw"]


def test_comparison_of_batch_sizes(capfd):
    found = measured("compare=batch_size", capfd=capfd)
    assert [(line["name"], line["tokens_per_step"]) for line in found["variants"]] == [
        ("batch_size=2", 128),
        ("batch_size=4", 256),
        ("batch_size=8", 512),
    ]


def test_steps_match_those_of_train(monkeypatch, capsys):
    """The losses equal those in train's log: same weights, batches, dropout, learning rates and optimizer."""
    assert main(["train", "tiny.yaml", "eval_first=false", "out_dir=run"]) == 0
    trained = [line["loss"] for line in read_metrics("run/metrics.jsonl") if "loss" in line]
    losses, forward = [], GPT.forward

    def record(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        losses.append(output.loss.item())
        return output

    monkeypatch.setattr(GPT, "forward", record)
    recipe = load_recipe("tiny.yaml")
    tokens, vocab_size, eot_id, source = bench.find_data(recipe)
    assert source == "tokens"  # train prepared them
    variant = bench.Variant(recipe, bench.find_config(recipe, vocab_size), tokens, eot_id, "", {})
    for _ in trained:
        variant.step()
    assert len(trained) == 4 and len(losses) == 8
    assert [(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)] == pytest.approx(trained, rel=1e-7)


def test_peak_memory_matches_mem_tracker():
    from torch.distributed._tools.mem_tracker import MemTracker

    recipe = load_recipe("tiny.yaml", {"n_embd": 128, "batch_size": 32, "dropout": 0, "mixed_precision": "no"})
    config = bench.find_config(recipe, 512)
    variant = bench.Variant(recipe, config, {"random": bench.RandomTokens(512)}, 511, "", {})
    variant.step()
    model = GPT(config).train()
    optimizer = make_optimizer(model, Optimizer(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95))
    ids = torch.randint(0, 512, (32, 33))
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        for _ in range(2):
            for _ in range(2):
                tracker.reset_mod_stats()
                model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:], return_logits=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    peak = sum(of_device["Total"] for of_device in tracker.get_tracker_snapshot("peak").values())
    assert variant.peak_memory() == pytest.approx(peak, rel=0.1)


def test_the_report_is_a_table():
    line = {
        "name": "eager",
        "seconds": dict.fromkeys((*bench.PARTS, "total"), 0.0125),
        "tokens_per_second": 81920.4,
        "slowest": 8e4,
        "fastest": 9e4,
        "mfu": 0.512,
        "peak_memory": 3 * 10**9,
        "ratio": 1.5,
    }
    found = {
        "device": "NVIDIA H100",
        "processes": 2,
        "threads": 1,
        "torch": "2.13",
        "mixed_precision": "bf16",
        "data": "data/x",
        "steps": 10,
        "warmup": 3,
        "parameters": 124_000_000,
        "micro_batches": 4,
        "block_size": 1024,
        "profile": None,
        "variants": [line, {**line, "mfu": None, "peak_memory": None}],
    }
    lines = list(bench.report("a.yaml", found))
    assert "2 x NVIDIA H100" in lines[0] and "bf16" in lines[0] and "124,000,000" in lines[2]
    assert lines[-2].split() == ["eager", *["12.50"] * 5, "81,920", "80,000", "...", "90,000", "51.2%", "3,000", "1.50"]
    assert len({len(line) for line in lines[-3:]}) == 1


def test_the_shape_of_pretrained_weights_without_loading_them():
    config = bench.find_config(load_recipe("tiny.yaml", {"init_from": "gpt2-medium"}), 50257)
    assert (config.n_layer, config.n_embd, config.bias, config.block_size) == (24, 1024, True, 32)
    assert math.isclose(config.n_inner, 4096)


# ---- the coordinate check


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_changes_of_activations_do_not_depend_on_the_width_with_mup(capfd, algorithm):
    """Without mup_base_width, a step changes each weight by the same amount at any width, so the change of an output
    grows with the number of its inputs. With Muon, this is true for the head; the blocks start with larger outputs."""
    assert main(["prepare", "tiny.yaml"]) == 0
    capfd.readouterr()
    words = ["widths=64,128,256", "learning_rate=2e-3", "muon_learning_rate=0.01", "dropout=0"]
    words += [f"algorithm={algorithm}", f"tie_word_embeddings={algorithm == 'adamw'}"]
    found = measured("--coordinate-check", "widths.png", *words, capfd=capfd)
    assert Path("widths.png").read_bytes().startswith(b"\x89PNG")
    slopes = {(row["name"], row["activations"]): row["slopes"][-1] for row in found["rows"]}
    assert len(slopes) == 8
    for (name, activations), slope in slopes.items():
        assert abs(slope) < 0.3 if name == "muP" else slope > 0.3, (name, activations, slope)


def test_the_coordinate_check_keeps_the_proportions_of_the_model():
    recipe = load_recipe(None, {"n_embd": "192", "n_head": "12", "n_kv_head": "4", "n_inner": "288"})
    assert bench.smallest_width(recipe.model) == 48
    for width, sizes in ((48, (3, 1, 72)), (384, (24, 8, 576))):
        wide = bench.at_width(recipe, width)
        assert (wide.model.n_head, wide.model.n_kv_head, wide.model.n_inner, wide.shape["head_dim"]) == (*sizes, 16)
    wide = bench.at_width(load_recipe(None, {}), 128)  # GPT-2: 12 heads of size 64
    assert (wide.model.n_head, wide.model.n_kv_head, wide.shape["n_inner"], wide.shape["head_dim"]) == (
        2,
        None,
        512,
        64,
    )


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["coordinate_check=nowhere/x.png"], ["coordinate_check=nowhere/x.png"]),
        (["coordinate_check=x.png", "compare=loss"], ["coordinate_check: cannot be combined with compare"]),
        (["widths=64,128"], ["widths=64,128: only used with coordinate_check"]),
        (["widths=64,x", "coordinate_check=x.png"], ["widths=64,x"]),
        (["coordinate_check=x.png"], ["coordinate_check=x.png: the data are not prepared", "nanogpt-accel prepare"]),
        (["compare=atention"], ["compare=atention", "did you mean attention"]),
        (["profile=nowhere/trace.json"], ["profile=nowhere/trace.json"]),
        (["steps=0"], ["steps=0"]),
        (["init_from=someone/model"], ["init_from=someone/model", "n_layer"]),
        (["n_layr=2"], ["n_layr"]),
        (["algorithm=torch.optim.Adamm"], ["optimizer.algorithm=torch.optim.Adamm", "did you mean Adam?"]),
        (["algorithm=torch.optim.SGD", "options={nope: 1}"], ["optimizer.options={nope: 1}", "'nope'"]),
    ],
)
def test_mistakes_get_one_line(words, parts, capsys):
    assert main(["bench", "tiny.yaml", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert [part for part in parts if part not in printed.err] == [], printed.err


def test_no_recipe(capsys):
    assert cli.run(bench.main, []) == 2
    assert "RECIPE is missing; usage: nanogpt-accel bench" in capsys.readouterr().err
