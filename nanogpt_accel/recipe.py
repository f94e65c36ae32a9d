"""A recipe: one YAML file that says WHAT a run is (configs/ say WHERE it happens).

The sections below are the whole list of keys; their defaults are nanoGPT's train_gpt2 unless the comment
says otherwise. Nothing heavy is imported here, so that a mistake in a recipe is answered at once.
"""

import json
import math
import os
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BeforeValidator, Field

from .optim import OPTIMIZERS, SCHEDULES
from .utils.fields import Device, Float, Int, Section, Words, nearest, raise_problems, validate


def _none(value):
    return None if isinstance(value, str) and value.lower() in ("none", "null", "") else value


def _two(value):
    if str(value) == "1":
        raise ValueError("must be 2 or more, for one document cannot be both train and val")
    return value


def _no(value):
    return "no" if value is False else value  # YAML reads a bare `no` as false


def _switch(value):
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return value


class Data(Section):
    corpus: str = Field(
        "openwebtext",
        description="what to learn from: python, shakespeare, openwebtext, bookcorpus, "
        "wikitext2, fineweb_edu, tinystories, hub:USER/SET, or a local file, folder or glob of text, "
        ".jsonl, .csv or .parquet, also with .gz or .zst, or .bin files of token ids",
    )
    text_column: str = Field("text", description="what holds the text in .jsonl, .csv and .parquet, and on the Hub")
    lines: bool = Field(False, description="each line of a plain text file is a document, rather than each file")
    dataset_config: Annotated[str | None, BeforeValidator(_none)] = Field(
        None, description="configuration of hub:USER/SET; none: its default"
    )
    dataset_split: str = Field(
        "train",
        description="split of hub:USER/SET to train on; a validation and a test split of its own are taken as they are",
    )
    revision: Annotated[str | None, BeforeValidator(_none)] = Field(
        None, description="branch, tag or commit of hub:USER/SET; none: main"
    )
    skip_bad_documents: bool = Field(
        False, description="leave out what cannot be read, count it and go on; else it is an error"
    )
    limit_documents: Annotated[Int | None, BeforeValidator(_two), BeforeValidator(_none)] = Field(
        None, ge=2, description="for a taste: take so many documents of a split; none: all"
    )
    limit_tokens: Annotated[Int | None, BeforeValidator(_none)] = Field(
        None, ge=1, description="for a taste: stop when there are about so many tokens; none: all"
    )
    shard_tokens: Int = Field(100_000_000, ge=1000, description="tokens of a file; more lie in several, read as one")
    tokenizer: str = Field(
        "gpt2",
        description="gpt2, char, bpe (a byte-level BPE trained on the corpus), or a folder that holds a tokenizer.json",
    )
    vocab_size: Int = Field(
        4096, ge=257, le=1_000_000, description="symbols of `tokenizer: bpe`; the others bring their own"
    )
    data_dir: Annotated[str | None, BeforeValidator(_none)] = Field(
        None,
        description="folder of train.bin and val.bin, nanoGPT's too; none: data/ and a name made of the "
        "corpus and the tokenizer",
    )
    val_fraction: Float = Field(
        0.0005,
        gt=0,
        lt=1,
        description="share of the text kept for validation: the end "
        "of a single text, or whole documents where there are several",
    )
    sampling: Literal["shuffle", "random"] = Field(
        "shuffle",
        description="shuffle: every block once an epoch, in a new order each; "
        "random: nanoGPT's random crops, with replacement",
    )

    document_mask: bool = Field(
        False,
        description="attention stays inside a document: nothing before the last "
        "end-of-text is seen. Costs a mask, so it is slower",
    )


class Model(Section):
    init_from: str = Field(
        "scratch",
        description="scratch, resume (go on in out_dir), or where the weights come "
        "from: a run or checkpoint folder, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or another "
        "folder or Hub id of a GPT-2, Llama, Qwen3 or nanochat model. The shape is then its own, "
        "but for block_size and dropout",
    )
    n_layer: Int = Field(12, ge=1, le=10_000, description="number of blocks")
    n_head: Int = Field(12, ge=1, le=10_000, description="attention heads of a block")
    n_embd: Int = Field(768, ge=1, le=1_000_000, description="width of the residual stream")
    n_kv_head: Annotated[Int | None, BeforeValidator(_none)] = Field(
        None,
        ge=1,
        le=10_000,
        description="heads of keys and values, each shared by n_head / n_kv_head heads of queries; none: n_head",
    )
    head_dim: Annotated[Int | None, BeforeValidator(_none)] = Field(
        None, ge=1, le=100_000, description="width of a head; none: n_embd / n_head"
    )
    n_inner: Annotated[Int | None, BeforeValidator(_none)] = Field(
        None,
        ge=1,
        le=10_000_000,
        description="width inside the MLP; none: 4 * n_embd (8/3 of n_embd gives swiglu as many weights)",
    )
    block_size: Int = Field(1024, ge=2, description="context length in tokens")
    dropout: Float = Field(0.0, ge=0, lt=1, description="0 is good for pretraining, 0.1 and more for finetuning")
    bias: bool = Field(
        False, description="biases in the linear and LayerNorm layers, as GPT-2 has; false is a bit better and faster"
    )
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="layernorm: GPT-2's; rmsnorm: Llama's")
    norm_weight: bool = Field(True, description="whether norms have a learned gain; nanochat's have none")
    norm_eps: Float = Field(1e-5, ge=0, lt=1, description="what norms add to the variance")
    embd_norm: bool = Field(False, description="a norm between the embedding and the first block, as nanochat has")
    qk_norm: bool = Field(False, description="an RMSNorm on the queries and keys of each head, as Qwen3 has")
    position: Literal["learned", "rotary"] = Field(
        "learned", description="learned: GPT-2's embedding of block_size positions; rotary: Llama's"
    )
    rope_theta: Float = Field(10_000.0, ge=1, description="base of the rotary wavelengths; longer contexts take more")
    activation: Literal["gelu", "gelu_new", "relu2", "swiglu"] = Field(
        "gelu",
        description="gelu: the exact form, nanoGPT's; gelu_new: the tanh form of OpenAI's weights; relu2: "
        "squared ReLU, nanochat's; swiglu: Llama's, with a gate as wide as n_inner",
    )
    logit_softcap: Annotated[Float | None, BeforeValidator(_none)] = Field(
        None, ge=1, description="keep logits within this bound by tanh, as nanochat does (15); none: leave them"
    )
    tie_word_embeddings: bool = Field(True, description="the head is the embedding's matrix; false: its own")
    pad_vocab_to_multiple_of: Int = Field(
        64,
        ge=1,
        description="round the rows of the embedding up for faster "
        "kernels (GPT-2's 50,257 become 50,304); 1 leaves them",
    )
    initializer_range: Float = Field(0.02, gt=0, description="standard deviation of a new model's weights")
    zero_init: bool = Field(
        False,
        description="a new model begins with zeros in the matrices that add to the "
        "residual stream, so that each block begins as nothing",
    )


class Optimizer(Section):
    algorithm: Literal[tuple(OPTIMIZERS)] = Field(
        "adamw", description="adamw; or muon: Muon for the matrices inside the blocks, AdamW for the rest"
    )
    learning_rate: Float = Field(6e-4, gt=0, description="the highest learning rate; AdamW's")
    weight_decay: Float = Field(0.1, ge=0, description="AdamW's, on every parameter of two or more dimensions")
    beta1: Float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the mean")
    beta2: Float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the variance")
    grad_clip: Float = Field(1.0, ge=0, description="clip the norm of the gradient to this; 0 does not clip")
    muon_learning_rate: Float = Field(
        0.02, gt=0, description="Muon's highest learning rate; it rises and falls as AdamW's does"
    )
    muon_momentum: Float = Field(0.95, ge=0, lt=1, description="Muon's decay of the mean")
    muon_weight_decay: Float = Field(0.0, ge=0, description="Muon's, on the matrices inside the blocks")
    schedule: Literal[tuple(SCHEDULES)] = Field(
        "cosine",
        description="what follows the warm-up: half a cosine, nothing, or nothing and then a line down to min_lr",
    )
    warmup_iters: Int = Field(2000, ge=0, description="steps of linear warm-up")
    lr_decay_iters: Annotated[Int | None, BeforeValidator(_none)] = Field(
        None, ge=1, description="step at which min_lr is reached; none: max_iters"
    )
    min_lr: Annotated[Float | None, BeforeValidator(_none)] = Field(
        None, ge=0, description="lowest learning rate, at the end of the schedule; none: learning_rate / 10"
    )
    decay_fraction: Float = Field(
        0.2,
        gt=0,
        le=1,
        description="warmup_stable_decay: share of lr_decay_iters, its last steps, over which the rate falls",
    )


class Train(Section):
    batch_size: Int = Field(12, ge=1, description="sequences of a micro-batch of one process")
    gradient_accumulation_steps: Int = Field(
        40,
        ge=1,
        description="micro-batches of a step over ALL processes, so that tokens a step do not depend on how many run",
    )
    max_iters: Int = Field(600_000, ge=0, description="optimizer steps of the run")
    eval_interval: Int = Field(2000, ge=1, description="steps between evaluations")
    eval_iters: Literal["all"] | Int = Field(
        200, description="batches of an evaluation, the same ones every time; all: the whole validation set"
    )
    eval_first: bool = Field(True, description="evaluate before the first step too")
    eval_train: bool = Field(True, description="an evaluation looks at as many batches of the training data too")
    eval_only: bool = Field(False, description="evaluate and stop")
    log_interval: Int = Field(1, ge=1, description="steps between lines of the log")
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:N or mps; auto: the launcher's, else the best")
    mixed_precision: Annotated[Literal["auto", "no", "fp16", "bf16"], BeforeValidator(_no)] = Field(
        "auto",
        description="auto: what the launcher says, else bf16 where the hardware has it (GPUs from Ampere on, "
        "CPUs with AMX), fp16 on other CUDA devices, no elsewhere",
    )
    compile: Annotated[Literal["auto", "regional"] | bool, BeforeValidator(_switch)] = Field(
        "auto", description="torch.compile the model; auto: on CUDA, not under Windows; regional: one block for all"
    )
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, about a third more time"
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="what a loss or gradient that is no number does: stop ends the run; skip leaves the step "
        "out, and looks at every step, which costs a little speed",
    )
    max_skips: Int = Field(10, ge=0, description="on_nonfinite=skip: more steps left out in a row end the run")
    max_hours: Annotated[Float | None, BeforeValidator(_none)] = Field(
        None, gt=0, description="stop after so many hours with a checkpoint to go on from; none: no limit"
    )
    collective_timeout: Float = Field(
        600.0, ge=1, description="seconds that a process waits for the others before the run ends"
    )
    sample_tokens: Int = Field(0, ge=0, description="tokens of the sample printed at the end; 0: none")
    sample_prompt: str = Field("\n", description="what that sample begins with")
    sample_interval: Annotated[Int | None, BeforeValidator(_none)] = Field(
        None,
        ge=1,
        description="steps between samples while the run goes on, which samples.jsonl keeps; none: at the end alone",
    )


class Checkpoint(Section):
    save_interval: Annotated[Int | None, BeforeValidator(_none)] = Field(
        None,
        ge=1,
        description="steps between checkpoints; none: eval_interval. The best and the last one are always saved",
    )
    keep_last: Int = Field(2, ge=1, description="newest checkpoints that stay; the best one stays besides")
    async_save: bool = Field(False, description="write checkpoints beside the training, which waits for the copy only")
    resume: Annotated[Literal["no", "auto"], BeforeValidator(_no)] = Field(
        "no",
        description="auto: go on from the newest whole checkpoint in out_dir where there is one, else begin; for "
        "jobs that are requeued",
    )


class Tracking(Section):
    trackers: Words = Field([], description="wandb, tensorboard and whatever else Accelerate logs to")
    project: str = Field("nanogpt_accel", description="the trackers' project")
    run_name: Annotated[str | None, BeforeValidator(_none)] = Field(
        None, description="the run's name there; none: the name of out_dir"
    )
    quiet: bool = Field(False, description="print nothing but warnings and the last lines")


class Hub(Section):
    push_to_hub: bool = Field(False, description="push every checkpoint to the Hugging Face Hub while the run goes on")
    hub_model_id: Annotated[str | None, BeforeValidator(_none)] = Field(
        None, description="USER/NAME there; none: the name of out_dir, under the token's user"
    )
    hub_private: bool = Field(False, description="a repository that is made is private")
    hub_branch: Annotated[str | None, BeforeValidator(_none)] = Field(None, description="branch to push to; none: main")


class Expect(Section):
    """What the run comes to; at its end it says whether it did. It is no setting, so it stands in a file alone."""

    val_loss: Annotated[Float | None, BeforeValidator(_none)] = Field(
        None,
        gt=0,
        description="validation loss that the run comes to, nats a token, as it measures it itself; none: not known",
    )
    tolerance: Annotated[Float | None, BeforeValidator(_none)] = Field(
        None, gt=0, description="how far from it still counts as reproduced; none: no verdict"
    )
    evaluation: Literal["last", "best"] = Field("last", description="which of the run's evaluations is meant")
    steps: Annotated[Int | None, BeforeValidator(_none)] = Field(
        None, ge=0, description="after so many steps; none: max_iters"
    )
    hardware: str = Field("", description="what it ran on")
    time: str = Field("", description="how long it takes there")
    source: str = Field("", description="who saw it")
    changed: list[str] = Field(
        [],
        description="written by train: keys that a command line gave other values than the "
        "file's, so that the recipe's number is not this run's to reach",
    )


class Recipe(Section):
    """A whole run. Every leaf name is unique over the sections, so `n_layer=6` and `model.n_layer=6` both work."""

    seed: Int = Field(1337, ge=0, lt=2**63, description="batches, initial weights and dropout follow from it")
    out_dir: str = Field("", description="folder of the run; empty: runs/ and the recipe's name")
    overwrite: bool = Field(False, description="replace the run that out_dir holds")
    data: Data = Data()
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()
    hub: Hub = Hub()
    expect: Expect = Expect()

    @property
    def shape(self):
        """What GPTConfig takes of the model section, every None resolved as it does; a run keeps its shape for life."""
        model = self.model
        others = {"init_from", "dropout", "pad_vocab_to_multiple_of", "initializer_range", "zero_init"}
        return model.model_dump(exclude=others) | {
            "n_kv_head": model.n_kv_head or model.n_head,
            "head_dim": model.head_dim or model.n_embd // model.n_head,
            "n_inner": model.n_inner or 4 * model.n_embd,
        }

    def replace(self, **values):
        """Return a copy with other values, by leaf key: recipe.replace(batch_size=6, compile=False)."""
        changed = {}
        for key, value in values.items():
            changed.setdefault(SECTION_OF[key], {})[key] = value
        top = changed.pop("", {})
        sections = {name: getattr(self, name).model_copy(update=leaves) for name, leaves in changed.items()}
        return self.model_copy(update=top | sections)

    @property
    def lr_schedule(self):
        """Keyword arguments of optim.learning_rate, with every None resolved."""
        settings = self.optimizer.model_dump(include={"schedule", "learning_rate", "warmup_iters", "decay_fraction"})
        return settings | {"lr_decay_iters": self.lr_decay_iters, "min_lr": self.min_lr}

    def should_evaluate(self, step):
        """Return whether an evaluation is due before a step."""
        return step % self.train.eval_interval == 0 and (step > 0 or self.train.eval_first)

    def should_save(self, step):
        """Return whether a checkpoint is due before a step, whatever its validation loss."""
        return step > 0 and step % self.save_interval == 0

    def should_sample(self, step):
        """Return whether a sample is due before a step."""
        return step > 0 and self.train.sample_interval is not None and step % self.train.sample_interval == 0

    def should_log(self, step):
        """Return whether a step is logged. The last step before an evaluation or a checkpoint always is, so that no
        checkpoint is written of a model that has diverged."""
        is_before_save = (step + 1) % self.train.eval_interval == 0 or (step + 1) % self.save_interval == 0
        return step % self.train.log_interval == 0 or is_before_save or step + 1 == self.train.max_iters

    @property
    def min_lr(self):
        return self.optimizer.learning_rate / 10 if self.optimizer.min_lr is None else self.optimizer.min_lr

    @property
    def lr_decay_iters(self):
        return self.optimizer.lr_decay_iters or max(self.train.max_iters, 1)

    def padded_vocab_size(self, vocab_size):
        """Return the vocabulary size of the model: the tokenizer's, rounded up to pad_vocab_to_multiple_of."""
        multiple = self.model.pad_vocab_to_multiple_of
        return -(-vocab_size // multiple) * multiple

    @property
    def save_interval(self):
        return self.checkpoint.save_interval or self.train.eval_interval

    def flat(self):
        """One flat dictionary of plain values, which every tracker can take: all settings, not what is expected."""
        values = self.model_dump()
        leaves = {
            key: values[section][key] if section else values[key]
            for key, section in SECTION_OF.items()
            if not section or section in SETTINGS
        }
        return {
            key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in leaves.items()
        }

    def to_yaml(self, brief=False):
        """The recipe as a file that load_recipe reads back to an equal recipe; brief: without defaults, and without
        the places where it ran, for others to read."""
        if not brief:
            return yaml.safe_dump(self.model_dump(), sort_keys=False)
        values = self.model_dump(exclude_defaults=True, exclude={"out_dir": True, "data": {"data_dir"}, "expect": True})
        if "corpus" in values.get("data", {}):
            values["data"]["corpus"] = os.path.basename(values["data"]["corpus"]) or values["data"]["corpus"]
        return yaml.safe_dump(values, sort_keys=False)


SECTIONS = {
    name: field.annotation
    for name, field in Recipe.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
# what a command line may set; what a recipe expects stands in its file alone
SETTINGS = {name: section for name, section in SECTIONS.items() if name != "expect"}
# leaf key -> its section's name, "" for the keys at the top
SECTION_OF = {key: "" for key in Recipe.model_fields if key not in SECTIONS}
SECTION_OF |= {key: name for name, section in SECTIONS.items() for key in section.model_fields}
FIELDS = {key: (SECTIONS[name] if name else Recipe).model_fields[key] for key, name in SECTION_OF.items()}
FIELDS |= {f"{name}.{key}": FIELDS[key] for key, name in SECTION_OF.items() if name}

# what an expected loss depends on: these sections and these keys. A seed is left out, for a tolerance covers seeds
SECTIONS_THAT_MATTER = ("data", "model", "optimizer")
KEYS_THAT_MATTER = (
    "batch_size",
    "gradient_accumulation_steps",
    "max_iters",
    "eval_interval",
    "eval_iters",
    "eval_first",
    "eval_only",
)

# nanoGPT's keys that have another name here, each with what to write instead
NANOGPT_KEYS = {
    "dataset": "corpus=NAME, or data_dir=FOLDER for a folder of .bin files",
    "dtype": "mixed_precision=bf16, fp16 or no",
    "decay_lr": "schedule=constant warmup_iters=0",
    "wandb_log": "trackers=wandb",
    "wandb_project": "project=NAME",
    "wandb_run_name": "run_name=NAME",
    "always_save_checkpoint": "save_interval and keep_last; the best and the last checkpoint are kept apart",
    "backend": "the launcher's choice, see `accelerate config`",
}

# (keys, is it right?, what is wrong and what helps). A check is made where its keys are right by themselves.
CROSS_CHECKS = [
    (
        ("n_embd", "n_head", "head_dim"),
        lambda r: r.model.head_dim or r.model.n_embd % r.model.n_head == 0,
        lambda r: (
            f"model.n_embd={r.model.n_embd} is not divisible by model.n_head={r.model.n_head}: "
            f"take n_embd={-(-r.model.n_embd // r.model.n_head) * r.model.n_head}, or another n_head"
        ),
    ),
    (
        ("n_head", "n_kv_head"),
        lambda r: r.model.n_head % (r.model.n_kv_head or 1) == 0,
        lambda r: (
            f"model.n_head={r.model.n_head} is not divisible by model.n_kv_head={r.model.n_kv_head}: take n_kv_head="
            + " or ".join(str(n) for n in range(1, r.model.n_head + 1) if r.model.n_head % n == 0)
        ),
    ),
    (
        ("n_embd", "n_head", "head_dim", "position"),
        lambda r: r.model.position != "rotary" or r.shape["head_dim"] % 2 == 0,
        lambda r: (
            f"model.head_dim={r.shape['head_dim']}: position=rotary turns pairs, so heads have an even width"
            + ("" if r.model.head_dim else " (n_embd / n_head)")
        ),
    ),
    (
        ("sample_interval", "sample_tokens"),
        lambda r: not r.train.sample_interval or r.train.sample_tokens,
        lambda r: f"train.sample_interval={r.train.sample_interval}: of how many tokens? Say sample_tokens=200 or so",
    ),
    (
        ("eval_iters",),
        lambda r: r.train.eval_iters == "all" or r.train.eval_iters >= 1,
        lambda r: f"train.eval_iters={r.train.eval_iters}: must be 1 or more, or all",
    ),
    (
        ("min_lr", "learning_rate"),
        lambda r: r.min_lr <= r.optimizer.learning_rate,
        lambda r: f"optimizer.min_lr={r.min_lr} is above optimizer.learning_rate={r.optimizer.learning_rate}",
    ),
    (
        ("warmup_iters", "lr_decay_iters", "max_iters", "schedule"),
        lambda r: r.optimizer.schedule != "cosine" or r.optimizer.warmup_iters <= r.lr_decay_iters,
        lambda r: (
            f"optimizer.warmup_iters={r.optimizer.warmup_iters} is above lr_decay_iters={r.lr_decay_iters}: "
            f"set warmup_iters to {r.lr_decay_iters // 20} or so"
        ),
    ),
    (
        ("warmup_iters", "lr_decay_iters", "max_iters", "schedule", "decay_fraction"),
        lambda r: (
            r.optimizer.schedule != "warmup_stable_decay"
            or r.optimizer.warmup_iters <= r.lr_decay_iters * (1 - r.optimizer.decay_fraction) + 1e-6
        ),
        lambda r: (
            f"optimizer.warmup_iters={r.optimizer.warmup_iters} reaches into the last decay_fraction="
            f"{r.optimizer.decay_fraction} of lr_decay_iters={r.lr_decay_iters}, where the rate falls: set "
            "warmup_iters to "
            f"{math.floor(r.lr_decay_iters * (1 - r.optimizer.decay_fraction) + 1e-6)} or less"
        ),
    ),
]


def load_recipe(path, overrides=None, check=None):
    """Read a recipe file, apply overrides, and report everything that is wrong at once.

    Args:
        path: the YAML file, or a run's folder, which has one; None: all defaults.
        overrides: {key: value or text}; a key is a leaf name or section.leaf. They win over the file.
        check: an optional function recipe -> list of problems, for what only a command can know. It sees
            defaults in place of values that were refused.

    Returns:
        The frozen Recipe; out_dir is runs/ and the file's name unless it is given.

    Raises:
        FileNotFoundError: no such file.
        ValueError: one line for each problem.
    """
    path = Path(path) if path else None
    if path and (path / "run.yaml").is_file():
        path = path / "run.yaml"
    given = {name: {} for name in ("", *SECTIONS)}  # section -> {leaf: value}
    problems = []

    # 1) what the file says
    for key, value in (_read_yaml(path) if path else {}).items():
        if key in SECTIONS and not isinstance(value, (dict, type(None))):
            problems.append(f"{path}: {key}={value}: a section holds keys, one a line, indented")
        elif key in SECTIONS:
            for leaf in value or {}:
                if leaf in SECTIONS[key].model_fields:
                    given[key][leaf] = value[leaf]
                else:
                    problems.append(_misplaced(path, f"{key}.{leaf}", leaf))
        elif SECTION_OF.get(key) == "":
            given[""][key] = value
        else:
            problems.append(_misplaced(path, key, key))

    # 2) what the command line says wins
    filed = {name: dict(values) for name, values in given.items()}
    for key, value in (overrides or {}).items():
        section, dot, leaf = key.rpartition(".")
        home = SECTION_OF.get(leaf)
        if home is None or (dot and section != home):
            problems.append(_unknown(key))
        elif home == "expect":
            problems.append(
                f"{key}: what a recipe expects stands in its file, not on a command line"
                + " (the steps of the run are max_iters)" * (leaf == "steps")
            )
        else:
            given[home][leaf] = value

    # 3) every section is checked by itself, then what spans several
    built, wrong = {}, set()
    for name, section in SECTIONS.items():
        built[name], found, refused = validate(section, given[name], f"{name}.")
        problems += found
        wrong |= refused
    top, found, refused = validate(Recipe, given[""])
    problems += found
    wrong |= refused
    out_dir = top.out_dir or os.path.join("runs", path.stem if path else "default")
    recipe = top.model_copy(update=built | {"out_dir": os.path.expanduser(out_dir)})
    for keys, is_right, message in CROSS_CHECKS:
        if wrong.isdisjoint(keys) and not is_right(recipe):
            problems.append(message(recipe))
    if check is not None:
        problems += check(recipe)
    raise_problems(problems)
    if overrides and recipe.expect.val_loss is not None:
        changed = sorted({*recipe.expect.changed, *_changed(filed, recipe)})
        recipe = recipe.model_copy(update={"expect": recipe.expect.model_copy(update={"changed": changed})})
    return recipe


def _changed(filed, recipe):
    """The keys which an expected loss depends on and which the file has otherwise than the recipe."""
    for name in (*SECTIONS_THAT_MATTER, "train"):
        before, after = validate(SECTIONS[name], filed[name])[0].model_dump(), getattr(recipe, name).model_dump()
        for key in KEYS_THAT_MATTER if name == "train" else before:
            is_resumed = key == "init_from" and "resume" in (before[key], after[key])
            if before[key] != after[key] and not is_resumed:
                yield key


def _misplaced(path, key, leaf):
    """The message for a key of a file that does not stand where it was found."""
    if leaf not in SECTION_OF:
        return f"{path}: {_unknown(key)}"
    home = SECTION_OF[leaf]
    return f"{path}: {key}: {leaf} stands {f'under {home}:' if home else 'at the top, outside the sections'}"


def _unknown(key):
    leaf = key.rpartition(".")[2]
    if leaf in NANOGPT_KEYS:
        return f"unknown key {key}: nanoGPT's {leaf} is here {NANOGPT_KEYS[leaf]}"
    return f"unknown key {key}{nearest(leaf, SECTION_OF)}"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key that stands twice is a mistake rather than a silent last word."""


def _mapping(loader, node):
    seen = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
        if key_node.value in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key_node.value} stands twice", key_node.start_mark
            )
        seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _read_yaml(path):
    """The file's top mapping."""
    if not path.is_file():
        names = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = nearest(path.stem, names).replace("?", ".yaml?") or (f"; there are: {', '.join(names)}" if names else "")
        raise FileNotFoundError(f"{path}: no such recipe or run folder{hint}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file (byte {error.start})") from None
    except (ValueError, KeyError, AttributeError, RecursionError) as error:  # PyYAML's answer to 2024-99-99 or !!int x
        raise ValueError(f"{path}: not YAML: a value that cannot be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{path}: not YAML: {line}{getattr(error, 'problem', None) or error}") from None
    if values is None and path.name == "run.yaml":
        raise ValueError(f"{path}: is empty, and a run's is not: begin it again from its recipe, with overwrite=true")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is sections with keys, this is a {type(values).__name__}")
    if {"compute_environment", "distributed_type"} & values.keys():
        raise ValueError(
            f"{path}: this is a launch configuration, no recipe: accelerate launch --config_file {path} "
            "-m nanogpt_accel.train RECIPE.yaml"
        )
    return {str(key): value for key, value in values.items()}


def schema():
    """The JSON schema of recipe files, by which editors complete and check them; recipes/recipe.schema.json holds it
    (python -m nanogpt_accel.recipe > recipes/recipe.schema.json)."""
    found = Recipe.model_json_schema()
    trackers = found["$defs"]["Tracking"]["properties"]["trackers"]
    trackers["type"] = ["array", "string", "null"]  # `trackers: wandb` will do
    return json.dumps(found, indent=1) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
