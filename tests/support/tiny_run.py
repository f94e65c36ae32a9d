"""A tiny training run that saves checkpoints, without a recipe and without the training loop of train.py."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import torch

from nanogpt_accel.checkpoint.layout import checkpoint_path, list_checkpoints, read_trainer
from nanogpt_accel.checkpoint.save import Saver
from nanogpt_accel.checkpoint.verify import find_corruption
from nanogpt_accel.data.tokenizer import Tokenizer
from nanogpt_accel.model import GPT, GPTConfig
from nanogpt_accel.optim import make_optimizer
from nanogpt_accel.recipe import Optimizer

TEXT = "it is a text, and ends\n"
TOKENIZER = Tokenizer.char([TEXT])
# what Saver and load_optimizer need of an Accelerator
ACCELERATOR = SimpleNamespace(distributed_type="NO", is_main_process=True, wait_for_everyone=lambda: None)
CARD = "---\nlibrary_name: transformers\n---\n# a card\n"
FILES = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "state/trainer.json",
    "state/optimizer.safetensors",
    "state/index.json",
]


def make_model(n_embd=32):
    return GPT(GPTConfig(vocab_size=TOKENIZER.vocab_size, block_size=8, n_layer=1, n_head=2, n_embd=n_embd, bias=True))


def make_adamw(model):
    return make_optimizer(model, Optimizer(learning_rate=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.95))


class TinyRun:
    def __init__(self, folder, seed=0, in_background=False):
        torch.manual_seed(seed)
        self.folder, self.said = Path(folder), []
        self.model = make_model()
        self.optimizer = make_adamw(self.model)
        self.saver = Saver(self.folder, ACCELERATOR, TOKENIZER, 2, in_background, say=self.said.append)

    def train(self, step):
        ids = torch.randint(TOKENIZER.vocab_size, (2, 8), generator=torch.Generator().manual_seed(step))
        self.model(ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def start_save(self, step, best_step=None, keep_last=2):
        """Train a step and save. With in_background the save may still be running afterwards."""
        self.train(step)
        trainer = {"step": step, "best_step": best_step, "val_loss": 1 / 3, "best_val_loss": 0.1 + 0.2}
        self.saver.keep_last = keep_last
        self.saver.save(trainer, self.model, self.optimizer, CARD)

    def save(self, step, best_step=None, keep_last=2):
        """Train a step, save, and return the checkpoint folder; raise OSError if it is not saved."""
        self.start_save(step, best_step, keep_last)
        self.saver.wait()
        if self.saver.error:
            raise OSError(self.saver.error)
        return checkpoint_path(self.folder, step)

    def steps(self):
        """Return the steps of the checkpoints, after checking that all checkpoints are valid."""
        found = list_checkpoints(self.folder)
        assert [find_corruption(path) for path in found] == [None] * len(found)
        return [read_trainer(path)["step"] for path in found]

    def leftovers(self):
        return [path.name for path in self.folder.iterdir() if path.name.startswith(".")]


class Switched(torch.optim.SGD):
    """An optimizer that uses other weights for evaluations, as schedule-free optimizers do."""

    def eval(self):
        raise NotImplementedError


class Counting(torch.optim.SGD):
    """An optimizer that keeps a number outside of its state, so checkpoints do not store the number."""

    n_steps = 0

    def step(self, closure=None):
        self.n_steps += 1
        super().step()


class Odd(torch.optim.SGD):
    """An optimizer whose state has every kind of value. The update depends on all of them."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["n_steps"] = group.get("n_steps", 0) + 1
            for p in group["params"]:
                if not self.state[p]:
                    parts = {0: [torch.zeros(40, 40, dtype=torch.float64)], "pair": (torch.zeros(1), None), "on": True}
                    self.state[p] |= {"parts": parts, "seen": {1}, "n": 0.1, "low": p.detach().bfloat16(), "mode": "x"}
                state = self.state[p]
                state["seen"].add(group["n_steps"])
                state["n"] += 0.1
                state["parts"][0][0] += p.grad.sum()
                state["low"].lerp_(p.grad.bfloat16(), 0.1)
                factor = state["parts"][0][0].mean().float() + len(state["seen"]) + state["n"] + group["n_steps"]
                p.data -= 1e-3 * factor * state["low"]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def is_equal(a, b):
    assert a.keys() == b.keys() and len(a) > 10
    return all(torch.equal(a[name], b[name]) for name in a)


def disk_is_full(*args, **kwargs):
    """Stand in for a function that writes."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
