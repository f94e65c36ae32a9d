"""Sharded training (FSDP2, DeepSpeed ZeRO) computes the same as one process, and any of them resumes from any other.

The ranks are CPU processes over gloo; sharded_on_cpu.py makes Accelerate shard there. DDP, FSDP2 and single processes
are forked (see launching.py); DeepSpeed and torch.compile use the real launcher.
"""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from launching import launch, needs_deepspeed, train_on_ranks
from runs import (
    SMALL,
    checkpoint,
    copy_without,
    losses,
    numbers,
    relative_difference,
    tensors,
    trainer,
    write_recipe,
)

from nanogpt_accel.commands import evaluate
from nanogpt_accel.model import GPT
from nanogpt_accel.recipe import load_recipe
from nanogpt_accel.training import check_recipe

pytestmark = pytest.mark.skipif(os.name != "posix", reason="fork is POSIX's")
STEPS, SAVE = 50, 25
CONFIG_OF = {
    "one": None,
    "ddp": "multi_gpu.yaml",
    "fsdp2": "fsdp2.yaml",
    "hybrid": "fsdp2_multi_node.yaml",
    "zero2": "deepspeed_zero2.yaml",
    "zero3": "deepspeed_zero3.yaml",
}
HYBRID = ["--parallelism_config_dp_replicate_size=2", "--parallelism_config_dp_shard_size=2"]
ONE_SHARDING = [
    *(
        (kind, processes, algorithm)
        for algorithm in ("adamw", "muon")
        for kind, processes in (("one", 1), ("ddp", 2), ("fsdp2", 2), ("hybrid", 4))
    ),
    ("fsdp2", 2, "torch.optim.NAdam"),
    pytest.param("zero2", 2, "adamw", marks=needs_deepspeed),
    pytest.param("zero3", 2, "adamw", marks=needs_deepspeed),
]
# the rows are not divisible by the number of ranks, and there are more ranks than matrices of one shape; SwiGLU and
# grouped-query attention have fused weights
MUON = {"n_layer": 1, "n_embd": 36, "n_kv_head": 1, "n_inner": 51, "activation": "swiglu", "qk_norm": True}
MUON |= {"position": "rotary", "algorithm": "muon", "learning_rate": 1e-2, "muon_weight_decay": 0.1}
MUON |= {"mup_base_width": 18}


def train(kind, processes, run, argv):
    """Train on this number of processes with the config of a kind; return the output."""
    argv = [*map(str, argv)]
    if kind.startswith("zero"):
        return launch(
            CONFIG_OF[kind],
            f"--num_processes={processes}",
            "--main_process_port=0",
            module="sharded_on_cpu",
            argv=argv,
            cwd=Path(run).parent,
        )
    return train_on_ranks(run, argv, CONFIG_OF[kind], processes, HYBRID if kind == "hybrid" else ())


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """{algorithm: path of a recipe}"""
    settings = SMALL | {"bias": True, "learning_rate": 3e-3, "max_iters": STEPS, "eval_interval": SAVE}
    folder = tmp_path_factory.mktemp("sharding")
    return {
        "adamw": write_recipe(folder, **settings, mup_base_width=16),  # more parameter groups
        "muon": write_recipe(folder, "muon.yaml", **settings | MUON),
        "torch.optim.NAdam": write_recipe(folder, "nadam.yaml", **settings, algorithm="torch.optim.NAdam"),
    }


@pytest.fixture(scope="module")
def recipe(recipes):
    return recipes["adamw"]


@pytest.fixture(scope="module")
def trained(recipes):
    """Return a function trained(kind, processes, algorithm) that trains a run of STEPS steps once and returns its
    folder."""
    runs = {}

    def get(kind, processes, algorithm="adamw"):
        key = (kind, processes, algorithm)
        if key not in runs:
            run = recipes[algorithm].parent / f"{kind}_{processes}_{algorithm}"
            train(kind, processes, run, [recipes[algorithm], f"out_dir={run}"])
            assert len(losses(run)) == STEPS and trainer(run, STEPS)["processes"] == processes
            runs[key] = run
        return runs[key]

    return get


def resume_on(run, kind, processes, target):
    """Resume a run from its middle on other processes; return the relative difference of the losses from there on."""
    copy_without(run, target, STEPS)
    train(kind, processes, target, [target])
    assert trainer(target, STEPS)["processes"] == processes and len(losses(target)) == STEPS
    return relative_difference(target, run, first_step=SAVE)


# ---- checkpoints of FSDP2


def test_fsdp2_checkpoint_resumes_on_one_process(trained, tmp_path):
    run = trained("fsdp2", 2, "muon")
    shards = sorted(file.name for file in (checkpoint(run, SAVE) / "state").glob("*.safetensors"))
    assert shards == ["optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"]
    assert resume_on(run, "one", 1, tmp_path / "run") < 1e-5


def test_fsdp2_checkpoint_is_a_plain_model(trained, capsys):
    folder = checkpoint(trained("fsdp2", 2, "muon"), STEPS)
    model, report = GPT.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    # evaluated by one process, the loss is that of the sharded run
    capsys.readouterr()
    evaluate.main([str(folder), "--json", "eval_iters=3"])
    found = json.loads(capsys.readouterr().out)["val_loss"]
    assert found == pytest.approx(trainer(folder.parent, STEPS)["val_loss"], rel=1e-5)


# ---- the same losses


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "processes", "algorithm"), [*ONE_SHARDING, ("ddp", 4, "muon"), ("fsdp2", 4, "muon")])
def test_losses_equal_those_of_one_process(trained, kind, processes, algorithm):
    difference = relative_difference(trained(kind, processes, algorithm), trained("one", 1, algorithm))
    print(f"{kind} {processes} {algorithm}: {difference:.1e}")
    assert difference < 1e-4


# ---- resumed


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "processes", "algorithm"), ONE_SHARDING)
def test_resume_with_the_same_sharding_is_bitwise_equal(trained, kind, processes, algorithm, tmp_path):
    run, target = trained(kind, processes, algorithm), tmp_path / "run"
    assert resume_on(run, kind, processes, target) == 0
    assert numbers(target) == numbers(run)
    before, after = tensors(checkpoint(run, STEPS)), tensors(checkpoint(target, STEPS))
    assert before.keys() == after.keys() and any("/exp_avg" in name for _, name in before)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


MOVES = [
    ("ddp", 2, "one", 1),
    ("one", 1, "ddp", 2),
    ("ddp", 2, "ddp", 4),
    # not to the last bit: DDP rebuilds its buckets after the first step of a process, which changes the order
    # in which more than two numbers are added
    ("ddp", 4, "ddp", 4),
    ("one", 1, "fsdp2", 2),
    ("fsdp2", 2, "fsdp2", 4),
    ("ddp", 2, "fsdp2", 2),
    ("fsdp2", 2, "ddp", 2),
    ("hybrid", 4, "one", 1),
    ("fsdp2", 2, "hybrid", 4),
]
PLACES = [("one", 1), ("ddp", 2), ("ddp", 4), ("fsdp2", 2), ("fsdp2", 4), ("hybrid", 4)]
ZERO = [("one", 1, "zero2", 2), ("zero2", 2, "fsdp2", 2), ("zero3", 2, "one", 1), ("fsdp2", 2, "zero3", 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("started_on", "n", "resumed_on", "m", "algorithm"),
    [
        *((*move, "adamw") for move in MOVES),
        *((*started_on, *resumed_on, "muon") for started_on, resumed_on in itertools.permutations(PLACES, 2)),
        ("ddp", 4, "ddp", 4, "muon"),
        *(pytest.param(*move, "adamw", marks=needs_deepspeed) for move in ZERO),
    ],
)
def test_resume_on_other_processes(trained, started_on, n, resumed_on, m, algorithm, tmp_path):
    difference = resume_on(trained(started_on, n, algorithm), resumed_on, m, tmp_path / "run")
    print(f"{algorithm} {started_on} {n} -> {resumed_on} {m}: {difference:.1e}")
    assert difference < 1e-5


# ---- memory


def record_memory():
    """Make every save also write the bytes of the parameters and optimizer state of a rank to a file. Each rank calls
    this."""
    from torch.distributed.tensor import DTensor

    from nanogpt_accel.checkpoint.save import Saver

    def local_bytes(tensor):
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes

    def save(self, trainer, model, optimizer, card):
        local = [*model.parameters(), *(value for fields in optimizer.state.values() for value in fields.values())]
        Path(f"{self.run}.rank{os.environ['RANK']}").write_text(str(sum(map(local_bytes, local))))
        return saves(self, trainer, model, optimizer, card)

    saves, Saver.save = Saver.save, save


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_fsdp2_halves_the_memory_of_a_rank(recipes, tmp_path, algorithm):
    n_bytes = {}
    for kind in ("ddp", "fsdp2"):
        run = tmp_path / kind
        train_on_ranks(
            run,
            [recipes[algorithm], f"out_dir={run}", "max_iters=2", "warmup_iters=1", "n_embd=128"],
            CONFIG_OF[kind],
            2,
            before=record_memory,
        )
        n_bytes[kind] = [int(Path(f"{run}.rank{rank}").read_text()) for rank in range(2)]
    saved = tensors(checkpoint(tmp_path / "ddp", 2))
    # DDP: the weights, and a state of the same size as in the checkpoint
    assert n_bytes["ddp"] == [sum(tensor.nbytes for tensor in saved.values())] * 2
    ratio = max(n_bytes["fsdp2"]) / min(n_bytes["ddp"])
    print(f"bytes of a rank: {n_bytes}, {ratio:.3f}")
    assert ratio <= 0.55


# ---- switches


@pytest.mark.slow
def test_activation_checkpointing_keeps_dropout(recipe, trained, tmp_path):
    run = tmp_path / "run"
    train("fsdp2", 2, run, [recipe, f"out_dir={run}", "activation_checkpointing=true"])
    difference = relative_difference(run, trained("fsdp2", 2))
    print(f"activation checkpointing: {difference:.1e}")
    assert difference < 1e-6


@pytest.mark.slow
def test_fsdp2_in_bf16_saves_float32_and_resumes_exactly(recipe, trained, tmp_path):
    run = tmp_path / "run"
    said = train("fsdp2", 2, run, [recipe, f"out_dir={run}", "mixed_precision=bf16"])
    assert "mixed precision bf16" in said
    difference = relative_difference(run, trained("fsdp2", 2))
    print(f"bf16: {difference:.1e}")
    assert 1e-7 < difference < 0.02  # another precision, but nearly the same losses
    saved = tensors(checkpoint(run, STEPS))
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert resume_on(run, "fsdp2", 2, tmp_path / "again") == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("compile", ["true", "regional"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_compiled_run_computes_and_saves_the_same(recipe, trained, tmp_path, kind, compile):
    run = tmp_path / "run"
    # no dropout: a compiled model draws other random numbers
    options = ["dropout=0", "max_iters=6", "eval_interval=3"]
    module = {"ddp": "nanogpt_accel.train", "fsdp2": "sharded_on_cpu"}[kind]
    launch(
        CONFIG_OF[kind],
        "--num_processes=2",
        "--main_process_port=0",
        module=module,
        cwd=tmp_path,
        argv=[recipe, f"out_dir={run}", *options, f"compile={compile}"],
    )
    eager = tmp_path / "eager"
    train("one", 1, eager, [recipe, f"out_dir={eager}", *options])
    difference = relative_difference(run, eager)
    print(f"{kind} compile={compile}: {difference:.1e}")
    assert difference < 1e-4
    # every parameter has weights and optimizer state, also those outside the blocks
    expected = {name for _, name in tensors(checkpoint(eager, 6))}
    assert {name for _, name in tensors(checkpoint(run, 6))} == expected
    names = {name for _, name in tensors(checkpoint(run, 6))}
    assert not [name for name in names if "_orig_mod" in name or "module." in name]


def test_muon_with_deepspeed_is_refused(recipes, refused, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("importlib.util.find_spec", lambda package: "installed")
    with refused(ValueError, "optimizer.algorithm=muon", "DeepSpeed", "configs/fsdp2.yaml"):
        load_recipe(recipes["muon"], check=check_recipe)
