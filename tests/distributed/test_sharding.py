"""Sharded training (FSDP2, DeepSpeed ZeRO) computes the same as one process, and any of them resumes from any other.

The ranks are CPU processes over gloo; sharded_on_cpu.py makes Accelerate shard there. DDP, FSDP2 and single processes
are forked (see launching.py); DeepSpeed and torch.compile use the real launcher.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from launching import Ranks, launch, needs_deepspeed, train_on_ranks
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
KINDS = [
    ("one", 1),
    ("ddp", 2),
    ("fsdp2", 2),
    ("hybrid", 4),
    pytest.param("zero2", 2, marks=needs_deepspeed),
    pytest.param("zero3", 2, marks=needs_deepspeed),
]


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
def recipe(tmp_path_factory):
    settings = SMALL | {"bias": True, "learning_rate": 3e-3, "max_iters": STEPS, "eval_interval": SAVE}
    return write_recipe(tmp_path_factory.mktemp("sharding"), **settings)


@pytest.fixture(scope="module")
def trained(recipe):
    """trained(kind, processes) -> the folder of a run of STEPS steps, which is trained once."""
    runs = {}

    def get(kind, processes):
        if (kind, processes) not in runs:
            run = recipe.parent / f"{kind}_{processes}"
            train(kind, processes, run, [recipe, f"out_dir={run}"])
            assert len(losses(run)) == STEPS and trainer(run, STEPS)["processes"] == processes
            runs[kind, processes] = run
        return runs[kind, processes]

    return get


def resume_on(run, kind, processes, target):
    """Resume a run from its middle on other processes; return the relative difference of the losses from there on."""
    copy_without(run, target, STEPS)
    train(kind, processes, target, [target])
    assert trainer(target, STEPS)["processes"] == processes and len(losses(target)) == STEPS
    return relative_difference(target, run, first_step=SAVE)


# ---- checkpoints of FSDP2


def test_fsdp2_checkpoint_resumes_on_one_process(trained, tmp_path):
    run = trained("fsdp2", 2)
    shards = sorted(file.name for file in (checkpoint(run, SAVE) / "state").glob("*.safetensors"))
    assert shards == ["optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"]
    assert resume_on(run, "one", 1, tmp_path / "run") < 1e-5


def test_fsdp2_checkpoint_is_a_plain_model(trained, capsys):
    folder = checkpoint(trained("fsdp2", 2), STEPS)
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
@pytest.mark.parametrize(("kind", "processes"), KINDS[1:])
def test_losses_equal_those_of_one_process(trained, kind, processes):
    difference = relative_difference(trained(kind, processes), trained("one", 1))
    print(f"{kind}: {difference:.1e}")
    assert difference < 1e-4


# ---- resumed


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "processes"), KINDS)
def test_resume_with_the_same_sharding_is_bitwise_equal(trained, kind, processes, tmp_path):
    run, target = trained(kind, processes), tmp_path / "run"
    assert resume_on(run, kind, processes, target) == 0
    assert numbers(target) == numbers(run)
    before, after = tensors(checkpoint(run, STEPS)), tensors(checkpoint(target, STEPS))
    assert before.keys() == after.keys() and any("/exp_avg" in name for _, name in before)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


ZERO = [("one", 1, "zero2", 2), ("zero2", 2, "fsdp2", 2), ("zero3", 2, "one", 1), ("fsdp2", 2, "zero3", 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("started_on", "n", "resumed_on", "m"),
    [
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
        *(pytest.param(*words, marks=needs_deepspeed) for words in ZERO),
    ],
)
def test_resume_on_other_processes(trained, started_on, n, resumed_on, m, tmp_path):
    difference = resume_on(trained(started_on, n), resumed_on, m, tmp_path / "run")
    print(f"{started_on} {n} -> {resumed_on} {m}: {difference:.1e}")
    assert difference < 1e-5


# ---- memory


def record_memory():
    """In a rank: make every save also write the bytes of its parameters and optimizer state to a file."""
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
def test_fsdp2_halves_the_memory_of_a_rank(recipe, tmp_path):
    n_bytes = {}
    for kind in ("ddp", "fsdp2"):
        run = tmp_path / kind
        train_on_ranks(
            run,
            [recipe, f"out_dir={run}", "max_iters=2", "warmup_iters=1", "n_embd=128"],
            CONFIG_OF[kind],
            2,
            before=record_memory,
        )
        n_bytes[kind] = [int(Path(f"{run}.rank{rank}").read_text()) for rank in range(2)]
    parameters = count_parameters(checkpoint(tmp_path / "ddp", 2))
    # DDP: weights and two moments in float32, and a count of steps for each tensor
    assert all(0 <= n - 12 * parameters < 1000 for n in n_bytes["ddp"])
    ratio = max(n_bytes["fsdp2"]) / min(n_bytes["ddp"])
    print(f"bytes of a rank: {n_bytes}, {ratio:.3f}")
    assert ratio <= 0.55


def count_parameters(folder):
    """Return the number of parameters in model.safetensors of a checkpoint."""
    return sum(tensor.numel() for (file, _), tensor in tensors(folder).items() if file == "model.safetensors")


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


@pytest.mark.slow
def test_muon_with_sharded_parameters_is_refused(recipe, tmp_path):
    """Muon needs full matrices. One process prints one error, before the first step."""
    run = tmp_path / "run"
    job = Ranks(run, [recipe, f"out_dir={run}", "algorithm=muon"], "fsdp2.yaml", 2)
    assert job.end() == [2, 2]
    assert "Traceback" not in job.says()
    (line,) = [line for line in job.says().splitlines() if line.startswith("error: ")]
    assert "algorithm=muon" in line
    assert not list(run.glob("checkpoint-*"))
