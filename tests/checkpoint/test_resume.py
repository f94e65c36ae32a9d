"""The optimizer state of a checkpoint is restored exactly, and only into the same model."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import ACCELERATOR, CARD, TinyRun, is_equal, make_adamw, make_model, weights

from nanogpt_accel.checkpoint.layout import checkpoint_path
from nanogpt_accel.checkpoint.resume import load_optimizer
from nanogpt_accel.model import GPT
from nanogpt_accel.optim import make_optimizer
from nanogpt_accel.recipe import Optimizer
from nanogpt_accel.training import check_optimizer


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


def test_a_checkpoint_of_an_earlier_version_resumes(run, tmp_path):
    """Its optimizer state has the key first_rows instead of layout."""
    path = run.save(1)
    tensors = load_file(path / "state" / "optimizer.safetensors")
    save_file(tensors, path / "state" / "optimizer.safetensors", {"first_rows": "{}"})
    other = TinyRun(tmp_path / "other", seed=1)
    load_optimizer(path, ACCELERATOR, other.model, other.optimizer)
    assert is_same(other.optimizer.state_dict()["state"], run.optimizer.state_dict()["state"])


# ---- optimizers by name

# state with other shapes than the parameters, numbers, lists, sets and values that change in the groups
CLASSES = {
    "torch.optim.SGD": {"momentum": 0.9},
    "torch.optim.Adafactor": {"beta2_decay": -0.7},
    "torch.optim.ASGD": {},
    "torch.optim.NAdam": {"foreach": True},
    "torch.optim.Rprop": {},
    "tiny_run.Odd": {},
    "lion_pytorch.Lion": {"betas": [0.9, 0.98]},
    "pytorch_optimizer.Lion": {},
    "pytorch_optimizer.SOAP": {"precondition_frequency": 2},
    "pytorch_optimizer.Prodigy": {},
}


def is_same(a, b):
    """Return whether two nested values are equal, with the types of their numbers and tensors."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(is_same, a, b))
    return a == b


def strides(value):
    """Return the nested value with the strides of each tensor instead of the tensor."""
    if isinstance(value, torch.Tensor):
        return value.stride()
    if isinstance(value, dict):
        return {key: strides(item) for key, item in value.items()}
    return [strides(item) for item in value] if isinstance(value, (list, tuple)) else None


@pytest.mark.parametrize("name", CLASSES)
def test_the_state_of_an_optimizer_by_name_is_restored_exactly(run, tmp_path, monkeypatch, name):
    pytest.importorskip(name.partition(".")[0])
    decay = 0.0 if name.endswith(("Rprop", "Odd")) else 0.1
    settings = Optimizer(algorithm=name, options=CLASSES[name], learning_rate=1e-3, weight_decay=decay)
    assert check_optimizer(settings) == []
    run.optimizer = make_optimizer(run.model, settings)
    for step in range(3):
        run.train(step)
    path = run.save(3)
    other = TinyRun(tmp_path / "other", seed=1)
    other.model = GPT.from_pretrained(path, dtype=torch.float32)
    other.optimizer = make_optimizer(other.model, settings)
    load_optimizer(path, ACCELERATOR, other.model, other.optimizer)
    found, wanted = other.optimizer.state_dict(), run.optimizer.state_dict()
    assert found["state"].keys() == wanted["state"].keys() and len(found["state"]) == 16
    assert is_same(found["state"], wanted["state"]) and is_same(found["param_groups"], wanted["param_groups"])
    assert strides(found) == strides(wanted)  # matrix products can depend on them
    for step in range(4, 7):
        run.train(step)
        other.train(step)
    assert is_equal(weights(run.model), weights(other.model))
