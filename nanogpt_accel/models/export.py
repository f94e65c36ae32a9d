"""Write a GPT as a model folder or a file for other tools, and check that the written model gives the same logits."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..data.tokenizer import Tokenizer
from ..hub.card import converted_card
from ..utils.fields import raise_problems
from ..utils.files import atomic_path, copy_mode
from ..utils.text import first_line
from .gguf import gguf_architecture, read_gguf, write_gguf
from .load import (
    build_model,
    check_tokenizer,
    fit_to_tokenizer,
    gpt_config,
    load_model,
    load_strict,
    read_config,
    stock_config,
)
from .nanogpt import nanogpt_obstacles, read_nanogpt, write_meta, write_nanogpt
from .stock import (
    ARCHITECTURES,
    from_stock_weights,
    nearest_architecture,
    to_stock_weights,
    unknown_settings,
    unknown_weights,
)

# sample text for the comparison of the logits
_TEXT = """A language model reads the start of a text and predicts which token comes next. If it is trained on enough
text, it learns spelling first, then grammar, and in the end something of what the text is about.
In 1948, C. E. Shannon drew letters from a book by hand; "the process is laborious", he wrote, and stopped.
    def loss(logits, target): return -log_softmax(logits)[target]  # in nats
"""


def export(source, to, form, keep_padding=False, dtype="float32", report=print, repo=None, branch=None):
    """Convert a model and write it to a new folder.

    Args:
        source: a model folder of any supported architecture. to, dtype, report: see `write_model`.
        form: "stock" for a model class of transformers, "custom" for GPT with its model.py.
        keep_padding: keep the padded vocabulary size in a stock model.
        repo, branch: Hub repository and branch to name in the model card, if the folder will be uploaded.

    Returns:
        (name of the model class, largest absolute difference of the logits, number of tokens compared)

    Raises:
        ValueError: no stock architecture supports the model. The message names the unsupported settings.
    """
    config, tokenizer = _read_source(source)
    name, is_stock = "GPT", form == "stock"
    if is_stock:
        form, obstacles = nearest_architecture(config)
        name = ARCHITECTURES[form].model_class
        _raise_no_stock(source, name, obstacles or unknown_settings(config))
    report(f"exporting {source} as {name}")
    model = load_model(source)
    if is_stock:
        _raise_no_stock(source, name, unknown_weights(form, dict(model.named_parameters())))
    place = {"needs_code": form == "custom", "repo": repo, "branch": branch}
    card = converted_card(source, Path(to).name, tokenizer, config["block_size"], **place)
    vocab_size = None if keep_padding else stock_vocab_size(tokenizer)
    options = {"tokenizer": tokenizer, "card": card, "vocab_size": vocab_size, "dtype": dtype, "report": report}
    return name, *write_model(model, to, form, **options)


def _raise_no_stock(source, name, obstacles):
    if obstacles:
        raise ValueError(
            f"{source}: no stock architecture supports this model. The closest is {name}, but it does not support "
            f"{', '.join(obstacles)}. Set form=custom to export the model with its model.py; loading that export "
            "requires trust_remote_code=True"
        )


def stock_vocab_size(tokenizer):
    """Return the vocabulary size of a stock model that is exported without unused vocabulary entries.

    The padding token counts as used, because batched generation and fine-tuning need it. For GPT-2's tokenizer, the
    size is 50257, without a padding token: tools expect this size and pad with the end-of-text token.
    """
    if tokenizer.kind == "gpt2" or tokenizer.pad_id is None:
        return tokenizer.vocab_size
    return max(tokenizer.vocab_size, tokenizer.pad_id + 1)


def _read_source(source):
    """Return (config, tokenizer) of a model folder."""
    config, tokenizer = read_config(source), Tokenizer.load(source)
    raise_problems(check_tokenizer(tokenizer, config, source))
    return config, tokenizer


def export_nanogpt(source, to, keep_padding=False, dtype="float32", report=print):
    """Convert a model to nanoGPT's ckpt.pt. For a character tokenizer, also write meta.pkl next to it.

    Args:
        source, keep_padding, dtype, report: see `export`. to: the new file.

    Returns:
        (description, difference, tokens, notes): the kind of the file, the largest absolute difference of the logits,
        the number of tokens compared, and lines for the user.

    Raises:
        ValueError: nanoGPT does not support the model. The message names the unsupported settings.
        OSError: the file cannot be written.
    """
    import torch

    config, tokenizer = _read_source(source)
    _raise_obstacles(source, "nanoGPT", nanogpt_obstacles(config, tokenizer) or unknown_settings(config))
    model, config = _load_for_file(source, config, tokenizer, keep_padding, report)
    model.config.mup_base_width = None  # muP would split nanoGPT's two parameter groups into more
    _raise_obstacles(source, "nanoGPT", unknown_weights("gpt2", dict(model.named_parameters())))
    meta, notes = Path(to).with_name("meta.pkl"), []
    with _new_file(to) as temporary:
        model.to(getattr(torch, dtype))
        dataset, is_resumable = write_nanogpt(temporary, model, config, tokenizer, source)
        report("loading the written model to compare the logits")
        written = read_nanogpt(temporary)[0]
        results = _compare_logits(model.float(), written, to, tokenizer, config["vocab_size"])
        if tokenizer.kind == "char":
            write_meta(meta, tokenizer)
            notes.append(f"{meta}: copy it to nanoGPT's data/{dataset}/meta.pkl, where sample.py looks for it")
    if config["mup_base_width"]:
        notes.append("nanoGPT has no mup_base_width: its train.py uses the same learning rate for all weights")
    if not is_resumable:
        notes.append(
            "nanoGPT's train.py resumes from this file with a new optimizer, because the model has no AdamW state"
        )
    return "nanoGPT checkpoint", *results, notes


def export_gguf(source, to, keep_padding=False, dtype="float32", report=print):
    """Convert a model to a GGUF file for llama.cpp. dtype may also be "q8_0". The other arguments, the result and the
    errors are those of `export_nanogpt`."""
    config, tokenizer = _read_source(source)
    form, obstacles = gguf_architecture(config, tokenizer)
    program = f"llama.cpp (closest architecture: {form})"
    _raise_obstacles(source, program, obstacles or unknown_settings(config))
    model, config = _load_for_file(source, config, tokenizer, keep_padding, report)
    _raise_obstacles(source, program, unknown_weights(form, dict(model.named_parameters())))
    config["pad_token_id"] = None  # the file has no padding token
    weights, notes = _stock_model(model, form, config["vocab_size"])[1], []
    as_in_llama_cpp = {"norm_weight": True}  # if the model has no norm weights, the file contains ones
    if form == "gpt2" and config["activation"] == "gelu":
        as_in_llama_cpp["activation"] = "gelu_new"
        notes.append(
            "part of the difference comes from GELU: llama.cpp uses the tanh approximation, the model uses exact GELU"
        )
    with _new_file(to) as temporary:
        write_gguf(temporary, form, config, weights, tokenizer, dtype)
        report("loading the written model to compare the logits")
        weights = from_stock_weights(form, config, read_gguf(temporary, form, config, weights))
        written = build_model(gpt_config(config, **as_in_llama_cpp), weights)
        # q8_0 changes the logits by about 1 % of the largest logit; a wrong weight changes them by far more
        results = _compare_logits(model, written, to, tokenizer, config["vocab_size"], tolerance=0.1)
    return f"llama.cpp's {form}", *results, notes


def _raise_obstacles(source, program, obstacles):
    if obstacles:
        fix = "export the model to a folder instead"
        raise ValueError(f"{source}: {program} does not support {', '.join(obstacles)}; {fix}")


def _load_for_file(source, config, tokenizer, keep_padding, report):
    """Load a model to write it to a file. Return (model, config) with the vocab_size that the file will have."""
    report(f"exporting {source}")
    model = load_model(source)
    report(f"writing {model.num_parameters():,} parameters")
    vocab_size = config["vocab_size"] if keep_padding else tokenizer.vocab_size
    return model, config | {"vocab_size": vocab_size, "bias": model.config.bias}


@contextmanager
def _new_file(to):
    """Yield a temporary path for the new file `to`, and create the folder of `to`. After an error, delete the temporary
    file. Also delete the folder if this function created it."""
    folder = Path(to).parent
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(to) as temporary:
            yield temporary
    except OSError as error:
        problem = f"{to}: cannot be written: {first_line(error)}"
        raise OSError(f"{problem}; check the disk space and permissions") from None
    finally:
        if not existed and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def write_model(model, to, form, *, tokenizer, card, vocab_size=None, dtype="float32", report=print):
    """Write a GPT as a model folder for transformers, load the folder, and compare the logits on a sample text.

    Args:
        model: the GPT, in float32 on the CPU, in eval mode. Its weights are rounded to dtype in place.
        to: a new or empty folder.
        form: a key of ARCHITECTURES that supports the model, or "custom" for GPT with its model.py.
        tokenizer: the model's Tokenizer. card: the text of README.md.
        vocab_size: vocabulary size of the stock model; vocabulary entries above this size are removed. None: keep all
            entries.
        dtype: dtype of the written weights: "float32", "bfloat16" or "float16".
        report: called with a line of text before each slow operation.

    Returns:
        (largest absolute difference of the logits, number of tokens compared)

    Raises:
        ValueError: the logits differ, so the written files were removed. OSError: the folder cannot be written.
    """
    import torch
    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.disable_progress_bar()
    to, existed = Path(to), Path(to).exists()
    temporary = to / ".tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # from an interrupted export
        temporary.mkdir(parents=True)
        report(f"writing {model.num_parameters():,} parameters")
        fit_to_tokenizer(model, tokenizer)
        model.to(getattr(torch, dtype))
        if form == "custom":
            vocab_size = model.config.vocab_size
            model.save_pretrained(temporary)
        else:
            vocab_size = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
            _save_stock(model, temporary, form, vocab_size, tokenizer.vocab_size)
        pad_id = model.config.pad_token_id
        has_pad = pad_id is not None and pad_id < vocab_size
        tokenizer.save(temporary, max_length=model.config.block_size, has_pad=has_pad)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        copy_mode(temporary / "README.md", temporary)

        report("loading the written model to compare the logits")
        written = load_strict(temporary)
        difference, tokens = _compare_logits(model.float(), written, to, tokenizer, vocab_size)
        # config.json last, because a folder without config.json is not recognized as a model
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, to / file.name)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{to}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not existed and to.exists() and not any(to.iterdir()):
            to.rmdir()
    return difference, tokens


def _compare_logits(model, written, to, tokenizer, vocab_size, tolerance=1e-5):
    """Compare the logits of a model and of its written copy. Return (largest absolute difference, number of tokens).

    tolerance: maximum allowed difference. If the largest logit is above 1, the tolerance is relative to it.
    """
    import torch

    text = _TEXT if tokenizer.kind != "char" else "".join(c for c in _TEXT if c in tokenizer.vocab)
    try:
        ids = tokenizer.encode(text) if text else range(tokenizer.vocab_size)
    except ValueError:  # the vocabulary does not cover the sample text
        ids = range(tokenizer.vocab_size)
    ids = torch.tensor(np.resize(np.asarray(ids, dtype=np.int64), (1, min(model.config.block_size, 1024))))  # (1, T)
    with torch.no_grad():
        ours, theirs = model(ids).logits[..., :vocab_size], written(ids).logits
    if not ours.isfinite().all():
        raise ValueError(f"{to}: nothing was written, because the logits of the source model contain NaN or Inf")
    if not theirs.isfinite().all():
        problem = "some weights are too large for the chosen dtype"
        raise ValueError(f"{to}: nothing was written, because {problem}; set dtype=float32")
    difference = (ours - theirs).abs().max().item()
    if not difference <= tolerance * max(1.0, ours.abs().max().item()):
        problem = f"its logits differ from those of the source model by {difference:.2g}"
        raise ValueError(f"{to}: removed, because {problem}; if you changed model.py, set form=custom")
    return difference, ids.numel()


def _stock_model(model, form, vocab_size):
    """Convert a GPT to a stock model with this vocabulary size. Return (model on the meta device, {name: weight})."""
    import torch
    from transformers import AutoModelForCausalLM

    config = model.config.resolved() | {"vocab_size": vocab_size}
    if config["pad_token_id"] is not None and config["pad_token_id"] >= vocab_size:
        config["pad_token_id"] = None
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for name in weights.keys() & {"transformer.wte.weight", "lm_head.weight"}:
        weights[name] = weights[name][:vocab_size]
    weights = to_stock_weights(form, config, weights)
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(stock_config(form, config))
    stock.to(model.dtype)
    for name, parameter in stock.named_parameters():
        if name not in weights:  # a bias or norm weight that GPT does not have: set it to zeros or ones
            assert parameter.dim() == 1, name
            weights[name] = torch.full(parameter.shape, float(name.endswith("weight")), dtype=model.dtype)
    return stock, weights


def _save_stock(model, folder, form, vocab_size, n_tokens):
    """Save the model as a stock model with `vocab_size` embeddings. n_tokens: number of tokens of the tokenizer."""
    from transformers import GenerationConfig

    stock, weights = _stock_model(model, form, vocab_size)
    if form != "gpt2":
        # transformers 4 reads this key; its default is 10,000
        stock.config.rope_theta = float(model.config.rope_theta)
    stock.generation_config = GenerationConfig(
        bos_token_id=stock.config.bos_token_id,
        eos_token_id=stock.config.eos_token_id,
        pad_token_id=stock.config.pad_token_id,
        suppress_tokens=list(range(n_tokens, vocab_size)) or None,
    )
    stock.save_pretrained(folder, state_dict=weights)
