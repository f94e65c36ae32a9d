"""Sharded training (FSDP2, DeepSpeed's ZeRO) does what one process does, and a checkpoint moves between all of them.

CPU processes over gloo stand in for GPUs; sharded_on_cpu.py makes the sharding real there. DDP, FSDP2 and one process
are forked (launching.py); DeepSpeed and torch.compile are launched."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from launching import (
    SAVE,
    STEPS,
    Ranks,
    copy_without,
    finish,
    launch,
    losses,
    needs_deepspeed,
    numbers,
    relative_difference,
    tensors,
    trainer,
    write_recipe,
)

from nanogpt_accel.commands import evaluate
from nanogpt_accel.model import GPT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="fork is POSIX's")
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
    """Train on so many processes of a kind; returns what was printed."""
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
    return finish(run, argv, CONFIG_OF[kind], processes, HYBRID if kind == "hybrid" else ())


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("sharding"))


@pytest.fixture(scope="module")
def trained(recipe):
    """trained((kind, processes)) -> the folder of a run of STEPS steps, which is made once."""
    runs = {}

    def get(kind, processes):
        if (kind, processes) not in runs:
            run = recipe.parent / f"{kind}_{processes}"
            train(kind, processes, run, [recipe, f"out_dir={run}"])
            assert len(losses(run)) == STEPS and trainer(run)["processes"] == processes
            runs[kind, processes] = run
        return runs[kind, processes]

    return get


def goes_on(run, kind, processes, target):
    """Let a run go on from its middle on other processes; returns the relative difference of what it did then."""
    copy_without(run, target, STEPS)
    train(kind, processes, target, [target])
    assert trainer(target)["processes"] == processes and len(losses(target)) == STEPS
    return relative_difference(target, run, first_step=SAVE)


# ---- the promise that matters


def test_fsdp2_goes_on_on_one_process(trained, tmp_path):
    run = trained("fsdp2", 2)
    pieces = sorted(file.name for file in (run / f"checkpoint-{SAVE:06d}" / "state").glob("*.safetensors"))
    assert pieces == ["optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"]
    assert goes_on(run, "one", 1, tmp_path / "run") < 1e-5


def test_what_fsdp2_saves_is_the_plain_model(trained, capsys):
    folder = trained("fsdp2", 2) / f"checkpoint-{STEPS:06d}"
    model, report = GPT.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    # one process that knows nothing of shards sees the loss that the sharded run saw
    capsys.readouterr()
    evaluate.main([str(folder), "--json", "eval_iters=3"])
    found = json.loads(capsys.readouterr().out)["val_loss"]
    assert found == pytest.approx(trainer(folder.parent)["val_loss"], rel=1e-5)


# ---- the same losses


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "processes"), KINDS[1:])
def test_the_same_losses(trained, kind, processes):
    difference = relative_difference(trained(kind, processes), trained("one", 1))
    print(f"{kind}: {difference:.1e}")
    assert difference < 1e-4


# ---- resumed


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "processes"), KINDS)
def test_resumes_exactly_on_itself(trained, kind, processes, tmp_path):
    run, target = trained(kind, processes), tmp_path / "run"
    assert goes_on(run, kind, processes, target) == 0
    assert numbers(target) == numbers(run)
    before, after = tensors(run / f"checkpoint-{STEPS:06d}"), tensors(target / f"checkpoint-{STEPS:06d}")
    assert before.keys() == after.keys() and any("/exp_avg" in name for _, name in before)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


ZERO = [("one", 1, "zero2", 2), ("zero2", 2, "fsdp2", 2), ("zero3", 2, "one", 1), ("fsdp2", 2, "zero3", 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begun", "n", "kind", "m"),
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
def test_goes_on_elsewhere(trained, begun, n, kind, m, tmp_path):
    difference = goes_on(trained(begun, n), kind, m, tmp_path / "run")
    print(f"{begun} {n} -> {kind} {m}: {difference:.1e}")
    assert difference < 1e-5


# ---- memory


def weigh():
    """In a rank: write down what it holds of parameters and optimizer state whenever it saves."""
    from torch.distributed.tensor import DTensor

    from nanogpt_accel.checkpoint.save import Saver

    def local_bytes(tensor):
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes

    def save(self, trainer, model, optimizer, card):
        held = [*model.parameters(), *(value for fields in optimizer.state.values() for value in fields.values())]
        Path(f"{self.run}.rank{os.environ['RANK']}").write_text(str(sum(map(local_bytes, held))))
        return saves(self, trainer, model, optimizer, card)

    saves, Saver.save = Saver.save, save


@pytest.mark.slow
def test_memory_of_a_rank(recipe, tmp_path):
    held = {}
    for kind in ("ddp", "fsdp2"):
        run = tmp_path / kind
        finish(
            run,
            [str(recipe), f"out_dir={run}", "max_iters=2", "warmup_iters=1", "n_embd=128"],
            CONFIG_OF[kind],
            2,
            before=weigh,
        )
        held[kind] = [int(Path(f"{run}.rank{rank}").read_text()) for rank in range(2)]
    parameters = trainer_parameters(tmp_path / "ddp" / "checkpoint-000002")
    # DDP: weights and two moments in float32, and a count of steps for each tensor
    assert all(0 <= n - 12 * parameters < 1000 for n in held["ddp"])
    ratio = max(held["fsdp2"]) / min(held["ddp"])
    print(f"bytes of a rank: {held}, {ratio:.3f}")
    assert ratio <= 0.55


def trainer_parameters(checkpoint):
    """Number of parameters in a checkpoint's model.safetensors."""
    return sum(tensor.numel() for (file, _), tensor in tensors(checkpoint).items() if file == "model.safetensors")


# ---- switches


@pytest.mark.slow
def test_activation_checkpointing_with_dropout(recipe, trained, tmp_path):
    run = tmp_path / "run"
    train("fsdp2", 2, run, [recipe, f"out_dir={run}", "activation_checkpointing=true"])
    difference = relative_difference(run, trained("fsdp2", 2))
    print(f"activation checkpointing: {difference:.1e}")
    assert difference < 1e-6


@pytest.mark.slow
def test_bf16(recipe, trained, tmp_path):
    run = tmp_path / "run"
    said = train("fsdp2", 2, run, [recipe, f"out_dir={run}", "mixed_precision=bf16"])
    assert "mixed precision bf16" in said
    difference = relative_difference(run, trained("fsdp2", 2))
    print(f"bf16: {difference:.1e}")
    assert 1e-7 < difference < 0.02  # another precision, the same training
    saved = tensors(run / f"checkpoint-{STEPS:06d}")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert goes_on(run, "fsdp2", 2, tmp_path / "again") == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("compile", ["true", "regional"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_compiled(recipe, trained, tmp_path, kind, compile):
    run = tmp_path / "run"
    # no dropout: a compiled model draws other numbers
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
    # of every parameter there are weights and the optimizer's state, also of those outside of the blocks
    expected = {name for _, name in tensors(eager / "checkpoint-000006")}
    assert {name for _, name in tensors(run / "checkpoint-000006")} == expected
    names = {name for _, name in tensors(run / "checkpoint-000006")}
    assert not [name for name in names if "_orig_mod" in name or "module." in name]


@pytest.mark.slow
def test_muon_does_not_go_with_shards(recipe, tmp_path):
    """It works on whole matrices; said at the start, by one line of one process."""
    run = tmp_path / "run"
    job = Ranks(run, [str(recipe), f"out_dir={run}", "algorithm=muon"], "fsdp2.yaml", 2)
    assert job.end() == [2, 2]
    assert "Traceback" not in job.says()
    (line,) = [line for line in job.says().splitlines() if line.startswith("error: ")]
    assert "algorithm=muon" in line
    assert not list(run.glob("checkpoint-*"))
