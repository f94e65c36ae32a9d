"""The optimizer state of a checkpoint is restored exactly, and only into the same model."""

import torch
from tiny_run import ACCELERATOR, CARD, TinyRun, is_equal, make_adamw, make_model, weights

from nanogpt_accel.checkpoint.layout import checkpoint_path
from nanogpt_accel.checkpoint.resume import load_optimizer
from nanogpt_accel.model import GPT


def test_resuming_is_exact_to_the_bit(run, tmp_path):
    for step in range(3):
        run.train(step)
    path = run.save(3)
    other = TinyRun(tmp_path / "other", seed=1)
    assert not is_equal(weights(run.model), weights(other.model))
    other.model = GPT.from_pretrained(path, dtype=torch.float32)
    other.optimizer = make_adamw(other.model)
    load_optimizer(path, ACCELERATOR, other.model, other.optimizer)

    by_name = [{name: runs.optimizer.state[p] for name, p in runs.model.named_parameters()} for runs in (run, other)]
    assert len(by_name[0]) == 16
    for name, before in by_name[0].items():
        after = by_name[1][name]
        assert before.keys() == after.keys() == {"step", "exp_avg", "exp_avg_sq"} and before["step"] == 4
        for field, tensor in before.items():
            assert tensor.dtype == after[field].dtype and torch.equal(tensor, after[field]), (name, field)
        assert before["exp_avg"].any()

    for step in range(4, 7):
        run.train(step)
        other.train(step)
    assert is_equal(weights(run.model), weights(other.model))


def test_the_optimizer_of_an_untrained_model_loads(run):
    trainer = {"step": 0, "best_step": None}
    run.saver.save(trainer, run.model, run.optimizer, CARD)
    path = checkpoint_path(run.folder, 0)
    load_optimizer(path, ACCELERATOR, run.model, run.optimizer)
    assert not run.optimizer.state


def test_the_optimizer_state_of_another_model_is_refused(run, refused, tmp_path):
    path = run.save(1)
    other = make_model(n_embd=16)
    optimizer = make_adamw(other)
    with refused(ValueError, path / "state" / "optimizer.safetensors", "another run", f"init_from={path}"):
        load_optimizer(path, ACCELERATOR, other, optimizer)
