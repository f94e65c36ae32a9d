"""The training loop on a GPU: the losses of other implementations, fp16, torch.compile, no waiting for the device."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from on_gpu import DEVICE, IS_DRY, RECIPE, NoSynchronization, largest_difference, short_run, step_losses
from reference import nanogpt_lr
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from nanogpt_accel import training
from nanogpt_accel.batches import Batches
from nanogpt_accel.checkpoint.layout import list_checkpoints, read_trainer
from nanogpt_accel.checkpoint.run import Run
from nanogpt_accel.data.dataset import open_dataset
from nanogpt_accel.recipe import load_recipe
from nanogpt_accel.train import train

pytestmark = pytest.mark.gpu
NANOGPT = os.environ.get("NANOGPT")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---- the losses of other implementations


def first_weights(recipe, data):
    """Return the weights with which a run of this recipe starts."""
    torch.manual_seed(recipe.seed)
    return training.make_model(recipe, data.tokenizer, None).state_dict()


def transformers_model(recipe, weights):
    """Return GPT-2 of transformers with these weights: (model, function that returns the loss, optimizer)."""
    shape = recipe.model
    config = GPT2Config(
        vocab_size=len(weights["transformer.wte.weight"]),
        n_positions=shape.block_size,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # nanoGPT's GPT-2 does not have them
            parameter.requires_grad_(False).zero_()
        else:  # OpenAI's Conv1D stores (in, out)
            is_conv1d = ".h." in name and parameter.dim() == 2
            parameter.data.copy_(weights[name].t() if is_conv1d else weights[name])
    model.to(DEVICE).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": recipe.optimizer.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(recipe.optimizer.beta1, recipe.optimizer.beta2), fused=True)

    def loss(ids, targets):
        return F.cross_entropy(model(ids, use_cache=False).logits.float().flatten(0, 1), targets.flatten())

    return model, loss, optimizer


def nanogpt_model(recipe, weights):
    """Return nanoGPT's GPT with these weights, in the same form as transformers_model, with nanoGPT's optimizer."""
    if not NANOGPT:
        pytest.skip("set NANOGPT to a checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(NANOGPT).resolve() / "model.py")
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    shape = {key: getattr(recipe.model, key) for key in ("block_size", "n_layer", "n_head", "n_embd")}
    n_rows = len(weights["transformer.wte.weight"])
    model = nanogpt.GPT(nanogpt.GPTConfig(vocab_size=n_rows, dropout=0.0, bias=False, **shape))
    model.load_state_dict(weights)
    model.to(DEVICE).train()
    betas = recipe.optimizer.beta1, recipe.optimizer.beta2
    optimizer = model.configure_optimizers(recipe.optimizer.weight_decay, recipe.optimizer.learning_rate, betas, DEVICE)
    return model, lambda ids, targets: model(ids, targets)[1], optimizer


def losses_by_hand(make, recipe, precision, scaler):
    """Return the losses of nanoGPT's training loop with another model and optimizer."""
    data = open_dataset(recipe.data)
    model, loss_of, optimizer = make(recipe, first_weights(recipe, data))
    micro_steps, schedule = recipe.train.gradient_accumulation_steps, recipe.optimizer
    batches = Batches(
        data.train, recipe.model.block_size, recipe.train.batch_size, micro_steps, recipe.seed, recipe.data.sampling
    )
    losses = []
    for step in range(recipe.train.max_iters):
        for group in optimizer.param_groups:
            group["lr"] = nanogpt_lr(
                step, schedule.learning_rate, schedule.warmup_iters, schedule.lr_decay_iters, schedule.min_lr
            )
        total = 0.0
        for micro_step in range(micro_steps):
            rows = torch.as_tensor(batches(step, micro_step)).to(DEVICE)
            with torch.autocast(DEVICE, DTYPES[precision], enabled=precision != "no"):
                loss = loss_of(rows[:, :-1], rows[:, 1:].contiguous()) / micro_steps
            total += loss.item()
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    return losses


@pytest.mark.parametrize(
    ("precision", "micro_steps", "tolerance"),
    [("bf16", 1, 2e-2), ("no", 2, 1e-4 if IS_DRY else 5e-3)],  # on a GPU, float32 products are TF32 here and there
)
@pytest.mark.parametrize("make", [nanogpt_model, transformers_model])
def test_losses_equal_those_of_another_implementation(text, tmp_path, make, precision, micro_steps, tolerance):
    settings = short_run(text, tmp_path / "run", mixed_precision=precision, gradient_accumulation_steps=micro_steps)
    _, history = train(RECIPE, **settings)
    ours = step_losses(history)
    no_scaler = torch.amp.GradScaler(DEVICE, enabled=False)
    theirs = losses_by_hand(make, load_recipe(RECIPE, settings), precision, no_scaler)
    print(f"largest difference {largest_difference(ours, theirs):.2g}, loss from {ours[0]:.4f} to {ours[-1]:.4f}")
    assert ours[0] == pytest.approx(theirs[0], abs=tolerance / 10)  # the same weights and batch
    assert largest_difference(ours, theirs) < tolerance
    assert ours[0] - ours[-1] > 5 * tolerance


def test_fp16_skips_steps_until_the_scale_fits(text, tmp_path, monkeypatch):
    """The skipped steps and the final scale must equal those of torch's GradScaler in a hand-written loop."""
    make_accelerator, scale = training.make_accelerator, 2.0**30

    def with_large_scale(*args, **options):
        accelerator = make_accelerator(*args, **options)
        if IS_DRY:  # Accelerate has no fp16 on CPUs
            accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        accelerator.scaler = torch.amp.GradScaler(DEVICE, init_scale=scale)
        return accelerator

    monkeypatch.setattr(training, "make_accelerator", with_large_scale)
    settings = short_run(text, tmp_path / "run", mixed_precision="no" if IS_DRY else "fp16")
    _, history = train(RECIPE, **settings)
    skipped = [line["step"] for line in history if "loss" in line and line["grad_norm"] is None]
    assert 0 < len(skipped) < 15, skipped
    scaler = torch.amp.GradScaler(DEVICE, init_scale=scale)
    theirs = losses_by_hand(transformers_model, load_recipe(RECIPE, settings), "fp16", scaler)
    assert read_trainer(list_checkpoints(tmp_path / "run")[-1])["scaler"]["scale"] == scaler.get_scale()
    assert scaler.get_scale() == scale / 2 ** len(skipped)
    assert largest_difference(step_losses(history), theirs) < 2e-2


# ---- torch.compile, and waiting for the device

STEPS = 12


@pytest.fixture
def no_waiting(monkeypatch):
    """From step 3 on, let every synchronization with the GPU raise an error, except in the log section."""
    from nanogpt_accel import train as train_file

    refuse = NoSynchronization()
    modes = []
    learning_rate, check = train_file.learning_rate, training.NonFinite.check

    def start(step, **schedule):
        if step == 3:
            refuse.__enter__() if IS_DRY else torch.cuda.set_sync_debug_mode("error")
            modes.append("error")
        return learning_rate(step, **schedule)

    def stop(self, step, losses, grad_norm):
        if modes == ["error"]:
            refuse.__exit__(None, None, None) if IS_DRY else torch.cuda.set_sync_debug_mode("default")
            modes.append(len(losses))
        return check(self, step, losses, grad_norm)

    monkeypatch.setattr(train_file, "learning_rate", start)
    monkeypatch.setattr(training.NonFinite, "check", stop)
    yield modes
    if modes == ["error"]:  # the run failed
        refuse.__exit__(None, None, None) if IS_DRY else torch.cuda.set_sync_debug_mode("default")


# document_mask only with compile=true, the default on CUDA: otherwise, the mask of transformers reads whether there are
# several documents
LOOPS = {
    "eager": {},
    "eager, muon": {"algorithm": "muon", "muon_learning_rate": 0.02},
    "compiled": {"compile": True, "n_layer": 2},
    "compiled, document_mask": {"compile": True, "n_layer": 2, "document_mask": True},
}


@pytest.mark.parametrize("name", LOOPS)
def test_steps_between_log_lines_do_not_wait_for_the_gpu(text, tmp_path, no_waiting, backend, name):
    changes = {"dropout": 0.2, "max_iters": STEPS, "log_interval": STEPS} | LOOPS[name]
    if IS_DRY and changes.pop("compile", False):
        pytest.skip("in the dry form, torch.compile reads values from tensors itself")
    train(RECIPE, **short_run(text, tmp_path / "run", **changes))
    assert no_waiting == ["error", STEPS - 1]  # one log line at step 0, and one for the other steps


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "document_mask"])
def test_evaluations_do_not_compile_again(text, tmp_path, monkeypatch, backend, masked):
    """There is one graph to train and one to evaluate, although the last batch of an evaluation is smaller."""
    from torch._dynamo.utils import counters

    graphs, log_step = [], Run.log_step

    def count(self, *args, **options):
        graphs.append(counters["stats"]["unique_graphs"])
        return log_step(self, *args, **options)

    monkeypatch.setattr(Run, "log_step", count)
    counters.clear()
    changes = {"max_iters": 8, "eval_interval": 2, "eval_iters": "all", "n_layer": 2, "document_mask": masked}
    _, compiled = train(RECIPE, **short_run(text, tmp_path / "compiled", compile=True, **changes))
    assert graphs == [2] * 8
    _, eager = train(RECIPE, **short_run(text, tmp_path / "eager", **changes))
    assert largest_difference(step_losses(compiled), step_losses(eager)) < 2e-2
    scores = [[line["val_loss"] for line in history if "val_loss" in line] for history in (compiled, eager)]
    assert len(scores[0]) == 5 and largest_difference(*scores) < 2e-2
