"""Recipes: one YAML file defines a run. The launcher settings are in configs/.

The section classes define the default, constraints and help text of every key. Most defaults are those of nanoGPT's
GPT-2. torch and transformers are not imported here, so that mistakes in a recipe are reported immediately.
"""

import json
import math
import os
import re
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PrivateAttr, model_serializer

from .optim import OPTIMIZERS, SCHEDULES
from .scaling import scale
from .utils.fields import (
    Device,
    Float,
    Int,
    Name,
    Section,
    Words,
    nearest,
    raise_problems,
    show_value,
    unknown_key,
    validate,
)
from .utils.files import sha256
from .utils.packaged import list_packaged, packaged
from .utils.text import quoted


def _read_none(value):
    return None if isinstance(value, str) and value.lower() in ("none", "null", "") else value


def _read_no(value):
    return "no" if value is False else value  # YAML reads `no` as false


def _read_bool(value):
    return value.lower() == "true" if isinstance(value, str) and value.lower() in ("true", "false") else value


def _refuse_one(value):
    if str(value) == "1":
        raise ValueError("must be 2 or more, because train and val need at least one document each")
    return value


def _class_name(value):
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", value):
        raise ValueError("the name of a class, such as torch.optim.Adafactor")
    return value


def _read_numbers(value):
    """Convert strings such as "1e-3" in nested values, because YAML does not read them as numbers."""
    if isinstance(value, dict):
        return {str(key): _read_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_read_numbers(item) for item in value]
    if not isinstance(value, (str, int, float, type(None))):  # YAML also has dates, sets and bytes
        raise ValueError("must only contain numbers, strings, lists and mappings")
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def _yaml_or(empty):
    """Return a validator that reads a list or mapping from the command line: mix='[{corpus: python, weight: 1}]'."""

    def read(value):
        if not isinstance(value, str):
            return empty if value is None else value
        try:
            return empty if _read_none(value) is None else yaml.load(value, _UniqueKeyLoader)
        except (yaml.YAMLError, ValueError):
            raise ValueError("must be valid YAML") from None

    return BeforeValidator(read)


def _check_label(value):
    if value is not None and not re.fullmatch(r"[\w.-]+", value):
        raise ValueError("must consist of letters, digits, and the characters _ . -")
    return value


def _check_start(value):
    if value >= 1 and not value.is_integer():
        raise ValueError("must be a step, or a share of the run between 0 and 1")
    return value


IntOrNone = Annotated[Int | None, BeforeValidator(_read_none)]
FloatOrNone = Annotated[Float | None, BeforeValidator(_read_none)]
TextOrNone = Annotated[str | None, BeforeValidator(_read_none)]
NameOrNone = Annotated[Name | None, BeforeValidator(_read_none)]
Label = Annotated[str, AfterValidator(_check_label)]


class Corpus(Section):
    """The keys that define a corpus. The data section, each source of a mix and each validation set have these keys."""

    corpus: Name = Field(
        "openwebtext",
        description="training text: python, shakespeare, openwebtext, bookcorpus, wikitext2, fineweb_edu, tinystories, "
        "hub:USER/SET, or a path or URL (s3://, gs://, https://, hf://) of a file, a folder or a glob. Files are plain "
        "text, .jsonl, .csv or .parquet (also .gz and .zst). Token files (.bin, .npy, .ds) must be on this machine",
    )
    text_column: str = Field("text", description="text column of .jsonl, .csv and .parquet files and of Hub datasets")
    lines: bool = Field(False, description="treat each line of a plain text file as a document, not the whole file")
    split_by: Literal["auto", "name", "val_fraction"] = Field(
        "auto",
        description="how to split a corpus of files. name: by file or folder names (train, val, valid, validation, dev "
        "or test); val_fraction: use a part of the text for validation; auto: like name if there are files with such "
        "names, otherwise like val_fraction",
    )
    dataset_config: TextOrNone = Field(None, description="configuration of hub:USER/SET, if it is not the default one")
    dataset_split: str = Field(
        "train",
        description="split of hub:USER/SET to train on; its validation and test splits are used if they exist",
    )
    revision: TextOrNone = Field(None, description="branch, tag or commit of hub:USER/SET; default: main")
    skip_bad_documents: bool = Field(
        False, description="skip and count unreadable documents, instead of stopping with an error"
    )
    limit_documents: Annotated[IntOrNone, BeforeValidator(_refuse_one)] = Field(
        None, ge=2, description="use at most this many documents per split; default: all"
    )
    limit_tokens: IntOrNone = Field(
        None, ge=1, description="stop tokenizing after about this many tokens; default: all"
    )
    data_dir: NameOrNone = Field(
        None,
        description="folder of token files in the format of this package, nanoGPT, llm.c, modded-nanogpt, Megatron-LM, "
        "datatrove or numpy; default: a folder in data/ named after the corpus and the tokenizer. If data_dir is "
        "set on the command line, its token files replace the corpus of the recipe",
    )
    val_fraction: Float = Field(
        0.0005,
        gt=0,
        lt=1,
        description="fraction of the corpus for validation: documents drawn at random, or the end of the text "
        "if the corpus is a single document. The default is increased if val would have at most block_size tokens",
    )


class _Member(Corpus):
    """A corpus in a mix or in `validation`. Keys that are not given have their values from the data section."""

    @model_serializer(mode="wrap")
    def _given_keys(self, serialize):
        return {key: value for key, value in serialize(self).items() if key in self.model_fields_set}

    @property
    def given(self):
        """The given keys of the corpus, as a dictionary. It is empty for an entry that only names an earlier source."""
        keys = {key: getattr(self, key) for key in Corpus.model_fields if key in self.model_fields_set}
        return keys if keys.keys() & {"corpus", "data_dir"} else {}

    def section(self, data):
        """Return a data section that has only this corpus. data: the data section of the recipe."""
        defaults = {key: Corpus.model_fields[key].default for key in ("corpus", "data_dir")}
        others = {"mix": [], "stages": [], "validation": {}}
        section = data.model_copy(update=others | defaults | self.given)
        section.model_fields_set.difference_update((others | defaults).keys() - self.given.keys())
        return section


class Source(_Member):
    name: Label = Field(
        "", description="name of the source in logs; default: the file or folder name of corpus or data_dir"
    )
    weight: Float = Field(gt=0, description="share of the training tokens; the weights of a mix need not sum to 1")

    @property
    def label(self):
        path = (self.given.get("corpus") or self.data_dir or "").removeprefix("hub:").rstrip("/\\")
        return self.name or re.sub(r"[^\w-]+", "_", os.path.basename(path).split(".")[0])


class ValidationSet(_Member):
    split: Literal["val", "test", "train", "all"] = Field(
        "val", description="split to evaluate on; all: all splits, for a corpus that is used only for validation"
    )


class Stage(Section):
    model_config = ConfigDict(serialize_by_alias=True)

    start: Annotated[Float, AfterValidator(_check_start)] = Field(
        alias="from",
        gt=0,
        le=1_000_000_000,
        description="first step of the stage; a number below 1 is a share of max_iters",
    )
    mix: list[Source] = Field(
        min_length=1,
        description="the sources from this step on; to use an earlier source again, give only its name and a weight",
    )


class Data(Corpus):
    mix: Annotated[list[Source], _yaml_or([])] = Field(
        [],
        description="train on several corpora: a list of sources, each of which has the keys of a corpus and a weight",
    )
    stages: Annotated[list[Stage], _yaml_or([])] = Field(
        [], description="later mixes: a list of {from: STEP or SHARE, mix: [...]}, in the order of the steps"
    )
    validation: Annotated[dict[Label, ValidationSet], _yaml_or({})] = Field(
        {},
        description="more validation sets: {NAME: {corpus: ..., split: ...}, ...}; the losses are called val_loss/NAME",
    )
    shard_tokens: Int = Field(
        100_000_000, ge=1000, description="number of tokens after which the next token file starts"
    )
    tokenizer: Name = Field(
        "gpt2",
        description="gpt2, char, bpe (byte-level BPE trained on the corpus), a folder with a tokenizer.json, or the "
        "tokenizer of a Hub model: hub:USER/NAME or hub:USER/NAME@REVISION",
    )
    eos_token: TextOrNone = Field(
        None,
        description="end-of-text token of a tokenizer from a folder or the Hub. Default: the token that is named in "
        "tokenizer_config.json, special_tokens_map.json or generation_config.json, otherwise <|endoftext|>",
    )
    vocab_size: Int = Field(
        4096, ge=257, le=1_000_000, description="vocabulary size of tokenizer=bpe; other tokenizers ignore it"
    )
    special_tokens: Literal["text", "tokens"] = Field(
        "text",
        description="how to encode special tokens, such as <|endoftext|>, that occur in the text of the corpus. text: "
        "as ordinary text, like nanoGPT; tokens: as their ids. If the corpus contains special tokens, prompts are "
        "encoded in the same way",
    )
    sampling: Literal["shuffle", "random"] = Field(
        "shuffle",
        description="shuffle: use each block once per epoch, in a new order every epoch; random: random crops with "
        "replacement, as in nanoGPT",
    )
    document_mask: bool = Field(False, description="mask attention to earlier documents in the same sequence; slower")

    @property
    def mixes(self):
        """One list of sources per stage. Without `mix`, the first list contains only the corpus, as a source with the
        name "corpus"."""
        keys = {key: getattr(self, key) for key in Corpus.model_fields if key in self.model_fields_set}
        keys = keys if keys.keys() & {"corpus", "data_dir"} else keys | {"corpus": self.corpus}
        first = self.mix or [Source(**keys, name="corpus", weight=1)]
        return [first, *(stage.mix for stage in self.stages)]

    @property
    def sources(self):
        """{name: Source} of all stages, in the order in which they first occur."""
        found = {}
        for source in (source for mix in self.mixes for source in mix if source.given):
            found.setdefault(source.label, source)
        return found


class Model(Section):
    init_from: Name = Field(
        "scratch",
        description="scratch, resume (continue the run in out_dir), or weights to start from: a run or checkpoint "
        "folder, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder or Hub id of a GPT-2, Llama, Qwen3 or NanoChat "
        "model. If weights are loaded, only block_size and dropout are read from the recipe; all other model settings "
        "are those of the loaded model",
    )
    depth: IntOrNone = Field(
        None,
        ge=1,
        le=1000,
        description="scale the recipe to this number of layers: derive width, heads, max_iters, batch size, learning "
        "rates and weight decay from those of the recipe, except for settings on the command line",
    )
    n_layer: Int = Field(12, ge=1, le=10_000, description="number of transformer blocks")
    n_head: Int = Field(12, ge=1, le=10_000, description="number of attention heads per block")
    n_embd: Int = Field(768, ge=1, le=1_000_000, description="hidden size: width of the residual stream")
    n_kv_head: IntOrNone = Field(
        None,
        ge=1,
        le=10_000,
        description="number of key-value heads, each shared by n_head / n_kv_head query heads; default: n_head",
    )
    head_dim: IntOrNone = Field(None, ge=1, le=100_000, description="size of each head; default: n_embd / n_head")
    n_inner: IntOrNone = Field(
        None,
        ge=1,
        le=10_000_000,
        description="MLP hidden size; default: 4 * n_embd. With swiglu, 8/3 * n_embd gives as many weights as 4 * "
        "n_embd with gelu",
    )
    block_size: Int = Field(1024, ge=2, description="context length in tokens")
    dropout: Float = Field(0.0, ge=0, lt=1, description="dropout rate; 0 for pretraining, 0.1 or more for finetuning")
    bias: bool = Field(
        False, description="use biases in Linear and LayerNorm, as in GPT-2; false is a bit better and faster"
    )
    norm: Literal["layernorm", "rmsnorm"] = Field(
        "layernorm", description="layernorm, as in GPT-2, or rmsnorm, as in Llama"
    )
    norm_weight: bool = Field(True, description="learn a weight in each norm; false: no weight, as in nanochat")
    norm_eps: Float = Field(1e-5, ge=0, lt=1, description="epsilon added to the variance in each norm")
    embd_norm: bool = Field(False, description="normalize the embedding before the first block, as in nanochat")
    qk_norm: bool = Field(False, description="apply RMSNorm to the queries and keys of each head, as in Qwen3")
    position: Literal["learned", "rotary"] = Field(
        "learned", description="learned: one embedding per position, as in GPT-2; rotary: RoPE, as in Llama"
    )
    rope_theta: Float = Field(10_000.0, ge=1, description="RoPE base; longer contexts need a larger base")
    activation: Literal["gelu", "gelu_new", "relu2", "swiglu"] = Field(
        "gelu",
        description="gelu: exact GELU, as in nanoGPT; gelu_new: tanh approximation, as in OpenAI's GPT-2; relu2: "
        "squared ReLU, as in nanochat; swiglu: SwiGLU, as in Llama, where gate and values have n_inner dimensions each",
    )
    logit_softcap: FloatOrNone = Field(
        None, ge=1, description="limit the logits to +-logit_softcap with tanh, as in nanochat (15); default: no limit"
    )
    tie_word_embeddings: bool = Field(True, description="share the weights of the token embedding and the output head")
    pad_vocab_to_multiple_of: Int = Field(
        64,
        ge=1,
        description="pad the vocabulary size to a multiple of this number, for faster kernels (50,257 becomes 50,304). "
        "One of the new entries is a padding token, for batched generation and fine-tuning. 1: no padding",
    )
    initializer_range: Float = Field(0.02, gt=0, description="standard deviation of the initial weights")
    zero_init: bool = Field(
        False, description="initialize the output projections of blocks with zeros; each block starts as the identity"
    )
    mup_base_width: IntOrNone = Field(
        None,
        ge=1,
        description="n_embd at which learning rates and initializer_range were tuned; muP scales them to the actual "
        "n_embd. n_head and n_inner must grow in proportion to n_embd. Default: no scaling",
    )


class Optimizer(Section):
    algorithm: Literal[tuple(OPTIMIZERS)] | Annotated[str, AfterValidator(_class_name)] = Field(
        "adamw",
        description="adamw: AdamW for all parameters; muon: Muon for the matrices in the blocks and AdamW for all "
        "other parameters; or the name of an optimizer class in an installed package, such as torch.optim.Adafactor",
    )
    options: Annotated[dict, BeforeValidator(_read_numbers), _yaml_or({})] = Field(
        {}, description="arguments of an optimizer class, in addition to learning_rate and weight_decay"
    )
    learning_rate: Float = Field(6e-4, gt=0, description="maximum learning rate of AdamW or of an optimizer class")
    weight_decay: Float = Field(
        0.1,
        ge=0,
        description="weight decay of AdamW or of an optimizer class, for parameters with two or more dimensions",
    )
    beta1: Float = Field(0.9, ge=0, lt=1, description="decay rate of AdamW's first moment")
    beta2: Float = Field(0.95, ge=0, lt=1, description="decay rate of AdamW's second moment")
    grad_clip: Float = Field(1.0, ge=0, description="maximum gradient norm; 0: no clipping")
    muon_learning_rate: Float = Field(
        0.02, gt=0, description="maximum learning rate of Muon, with the same schedule as for AdamW"
    )
    muon_momentum: Float = Field(0.95, ge=0, lt=1, description="momentum of Muon")
    muon_weight_decay: Float = Field(0.0, ge=0, description="weight decay of Muon, for the matrices in the blocks")
    schedule: Literal[tuple(SCHEDULES)] = Field(
        "cosine",
        description="schedule after the warm-up. cosine: decay to min_lr along half a cosine; constant: no decay; "
        "warmup_stable_decay: constant at first, then linear decay to min_lr",
    )
    warmup_iters: Int = Field(2000, ge=0, description="number of warm-up steps; the learning rate increases linearly")
    lr_decay_iters: IntOrNone = Field(None, ge=1, description="step at which min_lr is reached; default: max_iters")
    min_lr: FloatOrNone = Field(None, ge=0, description="final learning rate; default: learning_rate / 10")
    decay_fraction: Float = Field(
        0.2, gt=0, le=1, description="for warmup_stable_decay: fraction of lr_decay_iters that the final decay takes"
    )


class Train(Section):
    batch_size: Int = Field(12, ge=1, le=1_000_000, description="number of sequences per micro-batch")
    gradient_accumulation_steps: Int = Field(
        40,
        ge=1,
        description="micro-batches per step, in total over ALL processes; so the tokens per step do not depend on the "
        "number of GPUs",
    )
    max_iters: Int = Field(600_000, ge=0, description="number of optimizer steps")
    eval_interval: Int = Field(2000, ge=1, description="steps between evaluations")
    eval_iters: Literal["all"] | Int = Field(
        200, description="number of batches per evaluation (always the same batches); all: the full validation split"
    )
    eval_first: bool = Field(True, description="also evaluate before the first step")
    eval_train: bool = Field(True, description="also evaluate on training data, with the same number of batches")
    eval_only: bool = Field(False, description="evaluate once and exit")
    log_interval: Int = Field(1, ge=1, description="steps between log lines")
    device: Device = Field(
        "auto",
        description="auto, cpu, cuda, cuda:N or mps; auto: cpu if the launcher requests it, otherwise the first "
        "available of cuda, mps and cpu",
    )
    mixed_precision: Annotated[Literal["auto", "no", "fp16", "bf16"], BeforeValidator(_read_no)] = Field(
        "auto",
        description="auto: the launcher's setting, otherwise bf16 if the hardware supports it natively (Ampere and "
        "later GPUs, CPUs with AMX or AVX512-BF16), fp16 on other CUDA devices, and no mixed precision elsewhere",
    )
    compile: Annotated[Literal["auto", "regional"] | bool, BeforeValidator(_read_bool)] = Field(
        "auto",
        description="use torch.compile; auto: on CUDA, except on Windows or with DeepSpeed; regional: compile one "
        "block and reuse it for all blocks",
    )
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: saves memory, takes about a third more time"
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="what to do when the loss or the gradient norm is NaN or Inf. stop: end the run with an error; "
        "skip: skip the step, which requires a check in every step and is slightly slower",
    )
    max_skips: Int = Field(10, ge=0, description="stop if on_nonfinite=skip skips more than this many steps in a row")
    max_hours: FloatOrNone = Field(
        None, gt=0, description="save a checkpoint and stop after this many hours; default: no limit"
    )
    collective_timeout: Float = Field(600.0, ge=1, description="timeout of collective operations in seconds")
    tasks: Words = Field(
        [], description="lm-eval tasks to evaluate during training, such as hellaswag,arc_easy; core: the tasks of CORE"
    )
    tasks_interval: IntOrNone = Field(
        None,
        ge=1,
        description="steps between evaluations on tasks, a multiple of eval_interval; default: eval_interval",
    )
    tasks_limit: IntOrNone = Field(None, ge=1, description="use at most this many questions per task; default: all")
    tasks_dir: TextOrNone = Field(None, description="folder with your own lm-eval task files")
    sample_tokens: Int = Field(
        0, ge=0, description="number of tokens per sample; a sample is printed after training. 0: no samples"
    )
    sample_prompt: str = Field(
        "\n", description="prompt of the samples; default: a newline, or the first token if no token contains a newline"
    )
    sample_interval: IntOrNone = Field(
        None, ge=1, description="steps between samples in samples.jsonl; default: only the sample at the end"
    )


class Scaling(Section):
    """How to scale a recipe to another `depth` or `tokens_per_parameter`; see scaling.py."""

    tokens_per_parameter: FloatOrNone = Field(
        None,
        gt=0,
        description="number of training tokens per parameter, which determines max_iters; only the parameters of the "
        "matrices in the blocks and of the head are counted. Default: as in the recipe without scaling",
    )
    aspect_ratio: FloatOrNone = Field(
        None, gt=0, description="n_embd per layer of a scaled recipe; default: n_embd / n_layer of the recipe"
    )
    batch_exponent: Float = Field(
        0.383, ge=0, le=1, description="tokens per step grow as (number of training tokens)^batch_exponent"
    )
    width_exponent: Float = Field(
        -0.5, ge=-1, le=0, description="learning_rate scales as n_embd to this power; muon_learning_rate does not"
    )


class Checkpoint(Section):
    save_interval: IntOrNone = Field(
        None,
        ge=1,
        description="steps between checkpoints; default: eval_interval. Best and last checkpoints are always saved",
    )
    keep_last: Int = Field(2, ge=1, description="number of recent checkpoints to keep, in addition to the best one")
    best: TextOrNone = Field(
        None,
        description="validation set or source whose loss selects the best checkpoint; default: the mean loss over all "
        "sources",
    )
    mix_change: bool = Field(
        False,
        description="resume even if the checkpoint was trained on other data or another mix; later checkpoints record "
        "the change",
    )
    async_save: bool = Field(False, description="write checkpoints in the background, after copying the state")
    resume: Annotated[Literal["no", "auto"], BeforeValidator(_read_no)] = Field(
        "no", description="auto: continue from the latest valid checkpoint in out_dir, if any (for requeued jobs)"
    )
    mirror: TextOrNone = Field(
        None,
        description="copy every checkpoint in the background to this folder or URL, such as s3://bucket/run; if "
        "out_dir has no checkpoint, resume=auto continues from the copy (for spot instances)",
    )


class Tracking(Section):
    trackers: Words = Field([], description="experiment trackers of Accelerate, such as wandb or tensorboard")
    project: str = Field("nanogpt_accel", description="name of the project in the trackers")
    run_name: TextOrNone = Field(None, description="name of the run in the trackers; default: the name of out_dir")
    quiet: bool = Field(False, description="print only warnings and the final results")


class Hub(Section):
    push_to_hub: bool = Field(False, description="push every checkpoint to the Hugging Face Hub during training")
    hub_model_id: TextOrNone = Field(
        None, description="repository, USER/NAME; default: the name of out_dir, in the account that is logged in"
    )
    hub_private: bool = Field(False, description="if the repository does not exist, create it as private")
    hub_branch: TextOrNone = Field(None, description="branch to push to; default: main")


class Expect(Section):
    """The expected result, compared with the actual result at the end of a run. It can only be set in a recipe file."""

    val_loss: FloatOrNone = Field(
        None,
        gt=0,
        description="expected validation loss in nats per token, evaluated as in this recipe; default: no comparison",
    )
    tolerance: FloatOrNone = Field(
        None,
        gt=0,
        description="the run reproduces the expected result if its loss differs from val_loss by at most this value; "
        "default: only print the two losses",
    )
    evaluation: Literal["last", "best"] = Field("last", description="evaluation to compare: the last or the best")
    steps: IntOrNone = Field(None, ge=0, description="step at which val_loss was measured; default: max_iters")
    hardware: str = Field("", description="hardware on which val_loss was measured")
    time: str = Field("", description="duration of the run on that hardware")
    source: str = Field("", description="who measured or published val_loss")
    changed: list[str] = Field(
        [],
        description="set automatically: the keys that were changed on the command line; val_loss was measured without "
        "these changes",
    )


# settings that are left out when a recipe is published
LOCAL = {"out_dir": True, "data": {"data_dir"}, "checkpoint": {"mirror"}, "expect": True}


class Recipe(Section):
    """All settings of a run. Key names are unique across sections, so `n_layer=6` and `model.n_layer=6` both work."""

    seed: Int = Field(1337, ge=0, lt=2**63, description="random seed for the batches, the initial weights and dropout")
    out_dir: Name = Field("", description="run folder; default: runs/ plus the name of the recipe")
    overwrite: bool = Field(False, description="replace an existing run in out_dir")
    data: Data = Data()
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    scaling: Scaling = Scaling()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()
    hub: Hub = Hub()
    expect: Expect = Expect()
    _derived: tuple[str, ...] = PrivateAttr(())

    @property
    def derived(self):
        """One line of text for each setting that load_recipe derived from `depth` and `tokens_per_parameter`: the value
        and how it was computed."""
        return self._derived

    @property
    def shape(self):
        """The architecture as a dictionary of GPTConfig fields, with defaults filled in for None."""
        model = self.model
        others = {"init_from", "dropout", "pad_vocab_to_multiple_of", "initializer_range", "zero_init", "depth"}
        return model.model_dump(exclude=others) | {
            "n_kv_head": model.n_kv_head or model.n_head,
            "head_dim": model.head_dim or model.n_embd // model.n_head,
            "n_inner": model.n_inner or 4 * model.n_embd,
        }

    @property
    def min_lr(self):
        return self.optimizer.learning_rate / 10 if self.optimizer.min_lr is None else self.optimizer.min_lr

    @property
    def lr_decay_iters(self):
        return self.optimizer.lr_decay_iters or max(self.train.max_iters, 1)

    @property
    def max_warmup_iters(self):
        """The largest number of warm-up steps that the schedule allows."""
        if self.optimizer.schedule == "warmup_stable_decay":  # the decay must not start during the warm-up
            return math.floor(self.lr_decay_iters * (1 - self.optimizer.decay_fraction) + 1e-6)
        return self.lr_decay_iters if self.optimizer.schedule == "cosine" else math.inf

    @property
    def warmup_iters(self):
        """The number of warm-up steps. If the setting is above max_warmup_iters, use a tenth of lr_decay_iters, but at
        most max_warmup_iters."""
        if self.optimizer.warmup_iters <= self.max_warmup_iters:
            return self.optimizer.warmup_iters
        return min(self.max_warmup_iters, self.lr_decay_iters // 10)

    @property
    def tokens_per_step(self):
        return self.train.batch_size * self.train.gradient_accumulation_steps * self.model.block_size

    @property
    def save_interval(self):
        return self.checkpoint.save_interval or self.train.eval_interval

    @property
    def lr_schedule(self):
        """Keyword arguments for optim.learning_rate, with defaults filled in for None."""
        settings = self.optimizer.model_dump(include={"schedule", "learning_rate", "decay_fraction"})
        derived = {"warmup_iters": self.warmup_iters, "lr_decay_iters": self.lr_decay_iters, "min_lr": self.min_lr}
        return settings | derived

    @property
    def stages(self):
        """The mixes of the run, as batches.Mixture needs them: ((first step, {source: share}), ...)."""
        starts = [
            stage.start if stage.start >= 1 else round(stage.start * self.train.max_iters) for stage in self.data.stages
        ]
        stages = []
        for start, mix in zip((0, *starts), self.data.mixes, strict=True):
            weights = {source.label: Fraction(str(source.weight)) for source in mix}
            stages.append((int(start), {name: weight / sum(weights.values()) for name, weight in weights.items()}))
        return tuple(stages)

    def source_tokens(self):
        """Return the number of tokens that the run trains on from each source: {name: tokens}."""
        train, used = self.train, dict.fromkeys(self.data.sources, 0)
        ends = [min(step, train.max_iters) for step, _ in self.stages[1:]] + [train.max_iters]
        for (start, shares), end in zip(self.stages, ends, strict=True):
            for name, share in shares.items():
                used[name] += round(max(end - start, 0) * self.tokens_per_step * share)
        return used

    @property
    def best_loss(self):
        """The name, in metrics.jsonl, of the loss that selects the best checkpoint."""
        return f"val_loss/{self.checkpoint.best}" if self.checkpoint.best else "val_loss"

    def padded_vocab_size(self, vocab_size):
        """Return the vocabulary size of the model. vocab_size: that of the tokenizer. Padding adds at least one entry,
        for the padding token."""
        multiple = self.model.pad_vocab_to_multiple_of
        return vocab_size if multiple == 1 else math.ceil((vocab_size + 1) / multiple) * multiple

    def should_evaluate(self, step):
        """Return whether to evaluate the model before this training step."""
        return step % self.train.eval_interval == 0 and (step > 0 or self.train.eval_first)

    def should_run_tasks(self, step):
        """Return whether the evaluation before this training step includes the tasks."""
        interval = self.train.tasks_interval or self.train.eval_interval
        return bool(self.train.tasks) and (step % interval == 0 or step >= self.train.max_iters)

    def should_save(self, step):
        """Return whether to save a checkpoint before this training step, regardless of the validation loss."""
        return step > 0 and step % self.save_interval == 0

    def should_sample(self, step):
        """Return whether to generate a sample before this training step."""
        return step > 0 and self.train.sample_interval is not None and step % self.train.sample_interval == 0

    def should_log(self, step):
        """Return whether to log this step. The last step before an evaluation or a checkpoint is always logged, because
        logging also detects a diverged model, which must not be saved."""
        is_before_save = (step + 1) % self.train.eval_interval == 0 or (step + 1) % self.save_interval == 0
        return step % self.train.log_interval == 0 or is_before_save or step + 1 == self.train.max_iters

    def replace(self, **values):
        """Return a copy with changed settings, which are named without sections: recipe.replace(batch_size=6)."""
        changes = {}
        for key, value in values.items():
            changes.setdefault(SECTION_OF[key], {})[key] = value
        top = changes.pop("", {})
        return self.model_copy(
            update=top | {name: getattr(self, name).model_copy(update=leaves) for name, leaves in changes.items()}
        )

    def flat(self):
        """Return all settings except `expect` as a flat dictionary, with types that every tracker accepts."""
        values = {}
        for key, section in SECTION_OF.items():
            if section != "expect":
                value = getattr(getattr(self, section) if section else self, key)
                values[key] = value if isinstance(value, (bool, int, float, str)) else str(value)
        return values

    def to_yaml(self, brief=False):
        """Return the recipe as YAML; load_recipe returns an equal recipe for this text.

        brief: for publication, leave out default values, expected results and local folders.
        """
        if not brief:
            return yaml.safe_dump(self.model_dump(), sort_keys=False)
        values = self.model_dump(exclude_defaults=True, exclude=LOCAL)
        data = values.get("data", {})
        members = [*data.get("mix", []), *data.get("validation", {}).values()]
        members += [source for stage in data.get("stages", []) for source in stage["mix"]]
        for corpus in (data, *members):
            if "corpus" in corpus:
                corpus.pop("data_dir", None)
            for key in {"corpus", "data_dir"} & corpus.keys():
                if not str(corpus[key]).startswith("hub:"):
                    corpus[key] = os.path.basename(corpus[key]) or corpus[key]
        return yaml.safe_dump(values, sort_keys=False)


SECTIONS = {
    name: field.annotation
    for name, field in Recipe.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
SETTINGS = {name: section for name, section in SECTIONS.items() if name != "expect"}  # allowed on the command line
# key -> its section, or "" for top-level keys
SECTION_OF = {key: "" for key in Recipe.model_fields if key not in SECTIONS}
SECTION_OF |= {key: name for name, section in SECTIONS.items() for key in section.model_fields}
FIELDS = {key: (SECTIONS[name] if name else Recipe).model_fields[key] for key, name in SECTION_OF.items()}
FIELDS |= {f"{name}.{key}": FIELDS[key] for key, name in SECTION_OF.items() if name}

# the settings that affect the expected loss. The seed is not among them, because the tolerance covers its effect
LOSS_SECTIONS = ("data", "model", "optimizer")
LOSS_TRAIN_KEYS = ("batch_size", "gradient_accumulation_steps", "max_iters")
LOSS_TRAIN_KEYS += ("eval_interval", "eval_iters", "eval_first", "eval_only")

# the keys of the data section that still have an effect after the data are prepared
DATA_USE_KEYS = ("data_dir", "validation", "sampling", "document_mask")


# SHA-256 of the built-in corpora that are a single text
TEXT_SHA256 = {"shakespeare": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"}


def _conflicts(recipe, overridden):
    """Yield (keys, problem) for values that are valid individually, but not in combination.

    overridden: names of the settings that the user changed on the command line.
    """
    model, optimizer, train, head_dim = recipe.model, recipe.optimizer, recipe.train, recipe.shape["head_dim"]
    if "\0" in recipe.out_dir:
        yield {"out_dir"}, f"out_dir={recipe.out_dir!r} contains a null byte; set out_dir to another folder"
    if model.n_embd % model.n_head and not model.head_dim:
        multiple = -(-model.n_embd // model.n_head) * model.n_head
        yield (
            {"n_embd", "n_head", "head_dim"},
            f"model.n_embd={model.n_embd} is not divisible by model.n_head={model.n_head}; "
            f"set n_embd={multiple} or change n_head",
        )
    if model.n_head % (model.n_kv_head or 1):
        divisors = " or ".join(str(n) for n in range(1, model.n_head + 1) if model.n_head % n == 0)
        yield (
            {"n_head", "n_kv_head"},
            f"model.n_head={model.n_head} is not divisible by model.n_kv_head={model.n_kv_head}; "
            f"set n_kv_head={divisors}",
        )
    if model.position == "rotary" and head_dim % 2:
        formula = "" if model.head_dim else " (n_embd / n_head)"
        yield (
            {"n_embd", "n_head", "head_dim", "position"},
            f"model.head_dim={head_dim}{formula} must be even for position=rotary; set head_dim={head_dim + 1}",
        )
    if model.mup_base_width and model.tie_word_embeddings and not model.norm_weight:
        yield (
            {"mup_base_width", "tie_word_embeddings", "norm_weight"},
            f"model.mup_base_width={model.mup_base_width}: muP with tied embeddings requires a final norm with a "
            "weight, but norm_weight=false; set tie_word_embeddings=false or norm_weight=true",
        )
    if model.mup_base_width and not model.head_dim and model.mup_base_width % head_dim:
        largest = math.gcd(model.n_embd, model.mup_base_width)
        yield (
            {"mup_base_width", "n_embd", "n_head", "head_dim"},
            f"model.mup_base_width={model.mup_base_width} is not a multiple of head_dim={head_dim} (n_embd / n_head), "
            "but the models with widths n_embd and mup_base_width must have the same head_dim; "
            f"set n_head={model.n_embd // largest} or a multiple of it",
        )
    if train.sample_interval and not train.sample_tokens:
        yield (
            {"sample_interval", "sample_tokens"},
            f"train.sample_interval={train.sample_interval} requires sample_tokens; set sample_tokens=200, for example",
        )
    if train.eval_iters != "all" and train.eval_iters < 1:
        yield {"eval_iters"}, f"train.eval_iters={train.eval_iters}: must be at least 1, or all"
    if optimizer.options and optimizer.algorithm in OPTIMIZERS:
        yield (
            {"options", "algorithm"},
            f"optimizer.options={show_value(optimizer.options)}: only for an optimizer class, such as algorithm="
            f"torch.optim.Adafactor; for {optimizer.algorithm}, use the other keys of the section optimizer",
        )
    if recipe.min_lr > optimizer.learning_rate:
        yield (
            {"min_lr", "learning_rate"},
            f"optimizer.min_lr={recipe.min_lr} is greater than optimizer.learning_rate={optimizer.learning_rate}; "
            "lower min_lr or raise learning_rate",
        )
    yield from _mix_conflicts(recipe)
    if train.tasks_interval and train.tasks_interval % train.eval_interval:
        yield (
            {"tasks_interval", "eval_interval"},
            f"train.tasks_interval={train.tasks_interval}: must be a multiple of eval_interval={train.eval_interval}",
        )
    if "warmup_iters" in overridden and optimizer.warmup_iters > recipe.max_warmup_iters:
        decay = f"lr_decay_iters={recipe.lr_decay_iters}"
        if optimizer.schedule == "warmup_stable_decay":
            decay += f" and decay_fraction={optimizer.decay_fraction}"
        yield (
            {"warmup_iters", "lr_decay_iters", "max_iters", "schedule", "decay_fraction"},
            f"optimizer.warmup_iters={optimizer.warmup_iters} is too long for schedule={optimizer.schedule} with "
            f"{decay}; set warmup_iters to {recipe.max_warmup_iters} or less, or leave it out",
        )


def _mix_conflicts(recipe):
    """Yield (keys, problem) for the sources, stages and validation sets."""
    data, keys = recipe.data, {"mix", "stages", "max_iters"}
    default = Corpus.model_fields["corpus"].default
    for key in ("corpus", "data_dir") if data.mix else ():
        value = getattr(data, key)
        if value not in (None, default):
            fix = f"add a source with this {key} to the mix, or remove {key} or mix"
            yield {key, "mix"}, f"data.{key}={value}: not used with data.mix; {fix}"
    defined = {}  # name -> its definition
    for i, mix in enumerate(data.mixes):
        where = "data.stages" if i else "data.mix"
        names = [source.label for source in mix]
        for source in mix:
            name, extra = source.label, sorted(source.model_fields_set - {"name", "weight"})
            if source.given and not name:
                yield keys, f"{where}: the source with corpus={source.corpus} has no name; set its key `name`"
            elif not name or not (source.given or name in defined):
                missing = f"no source is named {name}{nearest(name, defined)}" if name else "a source has no corpus"
                yield keys, f"{where}: {missing}; set its corpus or data_dir"
            elif extra and not source.given:
                problem, extra = f"{name} is defined in an earlier mix", ", ".join(extra)
                fix = f"set {extra} there, or define another source with another name and its own corpus"
                yield keys, f"{where}: {problem}, so {extra} cannot be set here; {fix}"
            elif source.given != defined.setdefault(name, source.given) and source.given:
                yield keys, f"{where}: two different sources are named {name}; change the name of one of them"
            elif names.count(name) > 1 and source is not mix[names.index(name)]:
                yield keys, f"{where}: {name} is twice in the same mix; list it once, with the sum of the weights"
    starts = [start for start, _ in recipe.stages]
    if sorted(set(starts)) != starts:
        is_short = any(stage.start < 1 for stage in data.stages)  # shares of a short run are rounded to the same step
        yield (
            keys,
            f"data.stages: start steps must be above 0 and in increasing order, but are {show_value(starts[1:])}"
            + f" with max_iters={recipe.train.max_iters}; increase max_iters, or set stages=none" * is_short,
        )
    for name, corpus in data.validation.items():
        if not corpus.given:
            yield {"validation"}, f"data.validation.{name}: set its corpus or data_dir"
    for name in set(data.validation) & set(data.sources):
        yield {"validation", "mix"}, f"data.validation.{name}: a source has the same name; choose another name"
    names, best = [*(data.sources if len(data.sources) > 1 else ()), *data.validation], recipe.checkpoint.best
    if best is not None and best not in names:
        problem = f"checkpoint.best={best}: no such validation set or source{nearest(best, names)}"
        yield {"best", "validation", "mix", "stages"}, f"{problem}; choose one of these: {show_value(names)}"


def load_recipe(path, overrides=None, check=None):
    """Read a recipe file, apply overrides, and report all problems together.

    Args:
        path: a file, a run folder or a name, see find_recipe. None: use only defaults.
        overrides: {key: value or text}, which replace values of the file. Keys have the form n_layer or model.n_layer.
        check: function that takes the recipe, with defaults instead of invalid values, and returns a list of problems.

    Returns:
        The Recipe, which is immutable. If out_dir is not set, it is runs/ plus the name of the file. If the overrides
        change the corpus, the tokenizer or data_dir, val_fraction and sample_prompt from the file no longer count as
        set: they are removed from pydantic's model_fields_set. Code that opens the data may then replace them.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: there are problems; the message has one line per problem.
    """
    path = None if path is None else find_recipe(path)
    values = {name: {} for name in ("", *SECTIONS)}  # section -> {key: value}
    problems = []

    # 1) the file
    for key, value in (_read_yaml(path) if path else {}).items():
        section, leaves = (key, {} if value is None else value) if key in SECTIONS else ("", {key: value})
        if not isinstance(leaves, dict):
            problems.append(f"{path}: {key}={value}: write the keys of this section on separate, indented lines")
            continue
        for leaf, leaf_value in leaves.items():
            if SECTION_OF.get(leaf) == section:
                values[section][leaf] = leaf_value
            else:
                problems.append(f"{path}: {_misplaced(section, leaf)}")
    file_values = {name: dict(leaves) for name, leaves in values.items()}

    # 2) the command line
    for key, value in (overrides or {}).items():
        section, dot, leaf = key.rpartition(".")
        home = SECTION_OF.get(leaf)
        if home is None or (dot and section != home):
            problems.append(unknown_key(key, SECTION_OF))
        elif home == "expect":
            hint = "; for the number of training steps, use max_iters" * (leaf == "steps")
            problems.append(f"{key}: expected results can only be set in a recipe file, not on the command line{hint}")
        else:
            values[home][leaf] = value
    given = {key.rpartition(".")[2] for key in overrides or {}}
    if given & {"corpus", "data_dir"}:  # a corpus on the command line replaces the mix of the recipe
        values["data"] = {key: value for key, value in values["data"].items() if key not in {"mix", "stages"} - given}
    if "data_dir" in given and "corpus" not in given and _has_token_files(values["data"]["data_dir"]):
        kept = given.union(DATA_USE_KEYS, _foreign_keys(values["data"]))
        values["data"] = {key: value for key, value in values["data"].items() if key in kept}

    # 3) validate each value, then combinations of values
    sections, invalid = {}, set()
    for name, section in {**SECTIONS, "": Recipe}.items():
        sections[name], section_problems, section_invalid = validate(section, values[name], f"{name}." if name else "")
        problems += section_problems
        invalid |= section_invalid
    recipe = sections.pop("")
    out_dir = recipe.out_dir or os.path.join("runs", path.stem if path else "default")
    recipe = recipe.model_copy(update=sections | {"out_dir": os.path.expanduser(out_dir)})
    if given & {"corpus", "tokenizer", "data_dir"}:  # the values in the file were chosen for other data
        for section, key in (("data", "val_fraction"), ("train", "sample_prompt")):
            if key not in given:
                sections[section].model_fields_set.discard(key)
    if (recipe.model.depth or recipe.scaling.tokens_per_parameter) and not invalid:
        recipe = _scale(path, file_values, recipe, given, problems)
    found = (problem for keys, problem in _conflicts(recipe, given) if invalid.isdisjoint(keys))
    problems += [problem for problem in found if problem not in problems]
    if check is not None:
        problems += check(recipe)
    raise_problems(problems)
    if overrides and recipe.expect.val_loss is not None:
        if recipe.derived:  # the expectation of a file with `depth` is for the scaled recipe
            with suppress(ValueError):
                file_values = load_recipe(path).model_dump()
        changed = sorted({*recipe.expect.changed, *_changed_keys(file_values, recipe)})
        recipe = recipe.model_copy(update={"expect": recipe.expect.model_copy(update={"changed": changed})})
    return recipe


def _scale(path, file_values, recipe, given, problems):
    """Return the recipe scaled to its depth and tokens_per_parameter. If that is not possible, append to `problems`.

    file_values: {section: {key: value}} of the file, which is the reference. For the other arguments, see load_recipe.
    """
    reference = Recipe().model_copy(update={name: validate(SECTIONS[name], file_values[name])[0] for name in SECTIONS})
    key = "model.depth" if recipe.model.depth else "scaling.tokens_per_parameter"
    name = f"{key}={recipe.model.depth or recipe.scaling.tokens_per_parameter:g}"
    if path and path.name == "run.yaml":
        problems.append(f"{name}: only for a new run; to train this run for longer, set max_iters")
    elif recipe.model.init_from not in ("scratch", "resume"):
        problem = f"not possible with init_from={recipe.model.init_from}, because the size of this model is fixed"
        problems.append(f"{name}: {problem}; remove {key}")
    elif not reference.train.max_iters:
        problems.append(f"{name}: the recipe does not train (max_iters=0), so there is nothing to scale; set max_iters")
    elif {"tokens_per_parameter", "max_iters"} <= given and recipe.scaling.tokens_per_parameter:
        given_both = (
            f"tokens_per_parameter={recipe.scaling.tokens_per_parameter:g} and max_iters={recipe.train.max_iters}"
        )
        problems.append(f"{given_both} both set the number of steps; remove one of them")
    elif invalid := [problem for _, problem in _conflicts(reference, set())]:
        problems += invalid
    else:
        # for token files in data_dir, assume the vocabulary size of the reference
        data = reference.data if "data_dir" in given else recipe.data
        scaled, lines = scale(reference, recipe.model_copy(update={"data": data}), given)
        recipe = scaled if data is recipe.data else scaled.model_copy(update={"data": recipe.data})
        recipe._derived = tuple(lines)
    return recipe


def find_recipe(target):
    """Return the path of a recipe's file.

    Args:
        target: a file, a run folder (its run.yaml is the recipe), or the name of a recipe. A path that exists takes
            precedence over a name. The recipe NAME is the file NAME.yaml, if it exists, otherwise a packaged recipe.
            The names NAME.yaml and recipes/NAME.yaml also work, so the README's commands can be used in any folder.

    Raises:
        FileNotFoundError: there is no such recipe; the message has the nearest name.
        ValueError: the target is a folder, but not a run.
    """
    path, files = Path(target), [Path(target), Path(f"{target}.yaml")]
    if (path / "run.yaml").is_file():
        return path / "run.yaml"
    name = re.fullmatch(r"(recipes/)?([\w-]+)(\.yaml)?", str(target).replace(os.sep, "/"))
    if name and not (name[1] and path.parent.is_dir()):  # if recipes/ exists, it is a folder of the user
        files.append(packaged(f"recipes/{name[2]}.yaml"))
    found = next((file for file in files if file.is_file()), None)
    if path.is_dir():
        fix = f"for the recipe, use {path}.yaml" if found else "use a recipe or a run folder"
        raise ValueError(f"{target}: not a run folder, because it has no run.yaml; {fix}")
    if found is None:
        stem, suffix = path.name.removesuffix(".yaml"), ".yaml" * path.name.endswith(".yaml")
        known = {run.parent.name for run in path.parent.glob("*/run.yaml")}
        known |= {file.stem for file in (*path.parent.glob("*.yaml"), *(list_packaged("recipes") if name else ()))}
        hint = nearest(stem, sorted(known)).replace("?", f"{suffix}?") or "; `nanogpt-accel recipes` lists all recipes"
        raise FileNotFoundError(f"{target}: no such recipe or run folder{hint}")
    return found


def _has_token_files(data_dir):
    """Return whether data_dir seems to contain prepared data, which replace the corpus and the tokenizer of the recipe.

    Only the file names are checked here. Later, dataset.check reports files that are not token files.
    """
    folder = Path(os.path.expanduser(str(data_dir)))
    return folder.is_file() or any(any(folder.glob(name)) for name in ("manifest.json", "*.bin", "*.npy", "*.ds"))


def _foreign_keys(data):
    """Return the keys of the data section that apply to the token files in data_dir, in addition to DATA_USE_KEYS.
    None apply to files of this package, which store these settings. Some apply to files of other projects, which do
    not store them."""
    folder = Path(os.path.expanduser(str(data["data_dir"])))
    if (folder / "manifest.json").is_file():
        return ()
    is_named = data.get("tokenizer", "gpt2") not in ("gpt2", "char", "bpe")
    has_tokenizer = is_named and not any((folder / name).is_file() for name in ("meta.pkl", "tokenizer.json"))
    return ("val_fraction", "tokenizer", "eos_token") if has_tokenizer else ("val_fraction",)


def _changed_keys(file_values, recipe):
    """Yield the keys that affect the expected loss and whose values differ from those in the recipe file. A local copy
    of a built-in corpus is not a change."""
    for name in (*LOSS_SECTIONS, "train"):
        before, after = validate(SECTIONS[name], file_values[name])[0], getattr(recipe, name)
        for key in LOSS_TRAIN_KEYS if name == "train" else SECTIONS[name].model_fields:
            values = getattr(before, key), getattr(after, key)
            is_same = values[0] == values[1] or (key == "init_from" and "resume" in values)
            if not is_same and not (key == "corpus" and _is_copy(values[1], values[0])):
                yield key


def _is_copy(path, corpus):
    """Return whether a file contains the text of a built-in corpus."""
    path = os.path.expanduser(path)
    try:  # built-in texts are smaller than 16 MiB, so reading 16 MiB of a file is enough
        return corpus in TEXT_SHA256 and os.path.isfile(path) and sha256(path, size=2**24) == TEXT_SHA256[corpus]
    except OSError:
        return False


def _misplaced(section, leaf):
    """Return the error message for a key in the wrong section."""
    key = f"{section}.{leaf}" if section else leaf
    if leaf not in SECTION_OF:
        return unknown_key(key, SECTION_OF)
    home = SECTION_OF[leaf]
    return f"{key} is in the wrong place; move {leaf} to " + (f"the section {home}" if home else "the top level")


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader with an error for duplicate keys. PyYAML itself silently uses the last one."""

    def construct_mapping(self, node, deep=False):
        keys = set()
        for key, _ in node.value:
            problem = None
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key must be a string"
            elif key.value in keys:
                problem = f"duplicate key {key.value}"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep=True)  # deep=True raises an error if a mapping contains itself


def _read_yaml(path):
    """Return the top-level mapping of a YAML file."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file (invalid byte at position {error.start})") from None
    except (ValueError, KeyError, AttributeError, RecursionError) as error:  # for values such as !!int x or 2024-99-99
        raise ValueError(f"{path}: invalid YAML: cannot read a value ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{path}: invalid YAML: {line}{getattr(error, 'problem', None) or error}") from None
    if values is None and path.name == "run.yaml":
        raise ValueError(f"{path}: the file is empty; restart the run from its recipe with overwrite=true")
    if not isinstance(values, dict | None):
        raise ValueError(f"{path}: a recipe must contain sections with keys, but this is a {type(values).__name__}")
    values = values or {}
    if {"compute_environment", "distributed_type"} & values.keys():
        raise ValueError(
            f"{path}: this is a launch configuration, not a recipe; use it with "
            f"accelerate launch --config_file {quoted(path)} -m nanogpt_accel.train RECIPE.yaml"
        )
    return {str(key): value for key, value in values.items()}


def schema():
    """Return the JSON schema of recipe files, which editors use for completion and validation.

    To update the file: python -m nanogpt_accel.recipe > recipes/recipe.schema.json
    """
    definition = Recipe.model_json_schema()
    # a single tracker may be written without a list: `trackers: wandb`
    definition["$defs"]["Tracking"]["properties"]["trackers"]["type"] = ["array", "string", "null"]
    return json.dumps(definition, indent=1) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
