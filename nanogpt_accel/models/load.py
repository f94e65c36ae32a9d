"""Load a GPT from a model folder of any supported architecture."""

import json
import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path

from ..utils.text import one_line
from .stock import ARCHITECTURES, DEFAULTS, from_stock_config, from_stock_weights, to_stock_config
from .weight_files import WRAPPER_PREFIX, loading_error, read_shapes, weight_files

GPT_TYPE = "nanogpt_accel"  # GPTConfig.model_type
# maximum n_layer, unless the weight files contain more tensors. Without a limit, a wrong n_layer in config.json could
# take hours to detect, because building 1,000 empty layers takes 2 seconds
MAX_LAYERS = 1000


def read_config(folder):
    """Return the config of a model folder as a dict of GPTConfig's fields, with defaults filled in for None.

    Raises:
        ValueError: GPT does not support the architecture or one of its features. The message gives the reason.
    """
    try:
        stored = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder}: config.json was deleted, probably because a training run pruned the checkpoint; try again"
        ) from None
    kind = stored.get("model_type")
    try:
        for name in stored.get("architectures") or []:
            if str(name).endswith(("Classification", "QuestionAnswering")):
                raise ValueError(f"{name} is not a language model, because it has no output head")
        if kind == GPT_TYPE:
            config = {**DEFAULTS, "bos_token_id": None, "eos_token_id": None, **stored}
        elif kind in ARCHITECTURES:
            config = {**from_stock_config(kind, stored), "model_type": kind}
        else:
            raise ValueError(f"model_type={kind} is not supported")
        config["n_kv_head"] = config["n_kv_head"] or config["n_head"]
        config["head_dim"] = config["head_dim"] or config["n_embd"] // config["n_head"]
        config["n_inner"] = config["n_inner"] or 4 * config["n_embd"]
        for key in ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_inner"):
            if not isinstance(config[key], int) or not 1 <= config[key] < 2**31:
                raise ValueError(f"{key}={str(config[key])[:40]} is not an integer from 1 to 2**31 - 1")
        for key in ("norm_eps", "rope_theta", "logit_softcap"):  # torch does not accept very large integers
            if isinstance(config[key], int):
                config[key] = float(config[key])
    except (TypeError, AttributeError, ZeroDivisionError, OverflowError):
        raise ValueError(f"{folder}: config.json of model_type={kind} contains an invalid size") from None
    except KeyError as error:
        raise ValueError(f"{folder}: config.json of model_type={kind} has no {error.args[0]}") from None
    except ValueError as error:
        raise ValueError(
            f"{folder}: {error}. Supported models: nanogpt_accel, {', '.join(ARCHITECTURES)}, with default "
            "rotary embeddings and full attention"
        ) from None
    return config


def load_model(folder, **changes):
    """Load a model folder of any supported architecture as a GPT in float32 on the CPU, in eval mode.

    changes: config fields to override, such as dropout.

    Raises:
        ValueError: GPT does not support the architecture or a feature, or the weights do not fit the config.
    """
    from transformers import AutoModelForCausalLM

    kind, config, model_config, is_wrapped = check_weights(folder, **changes)
    options = {"config": model_config, "generation_config": _generation_config(folder, model_config)}
    model = load_strict(folder, key_mapping={WRAPPER_PREFIX: ""} if is_wrapped else None, **options)
    if kind == GPT_TYPE and is_wrapped:  # save_pretrained would restore the prefixes of this model, so build a new one
        renamed, model = model, AutoModelForCausalLM.from_config(model_config)
        model.load_state_dict(renamed.state_dict())
        model.generation_config = renamed.generation_config
    if kind == GPT_TYPE:
        return model.eval()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    # some stock architectures always have biases; if the exported GPT had none, `export` wrote zeros
    config["bias"] = any(tensor.any() for name, tensor in weights.items() if name.endswith(".bias"))
    with _config_errors(folder):
        model_config = gpt_config(config, **changes)
    return build_model(model_config, from_stock_weights(kind, config, weights))


def _generation_config(folder, config):
    """Return the GenerationConfig of a folder. If it is missing or not valid, return a new one, because save_pretrained
    refuses a GenerationConfig that is not valid. config: the config of the model."""
    from transformers import GenerationConfig

    with suppress(Exception), _quiet_transformers():  # the values may have any type
        stored = GenerationConfig.from_pretrained(folder, local_files_only=True)
        stored.validate(strict=True)
        return stored
    return GenerationConfig.from_model_config(config)


def check_weights(folder, **changes):
    """Compare the headers of the weight files with config.json, before memory is allocated for a model.

    changes: see load_model.

    Returns:
        (kind, config, model_config, is_wrapped): the model_type, the result of read_config, the config object, and
        whether the names of the weights have the prefixes of DistributedDataParallel or torch.compile.

    Raises:
        ValueError: the config is not valid, or a weight is missing or has another shape.
    """
    config, found = read_config(folder), read_shapes(folder)
    kind, n_layer = config.pop("model_type"), config["n_layer"]
    shapes = {re.sub(WRAPPER_PREFIX, "", name): shape for name, shape in found.items()}
    if n_layer > max(len(shapes), MAX_LAYERS):
        problem = f"n_layer={n_layer}, but the weight files contain only {len(shapes):,} tensors"
        raise ValueError(f"{folder}: config.json has {problem}")
    with _config_errors(folder):
        model_config = gpt_config(config, **changes) if kind == GPT_TYPE else stock_config(kind, config)
    _check_shapes(folder, model_config, shapes)
    return kind, config, model_config, shapes.keys() != found.keys()


def gpt_config(config, **changes):
    """Return the GPTConfig for a dict from read_config. transformers' own keys of config.json are ignored, so that a
    file cannot change the behavior of transformers.

    Raises:
        ValueError: the config has a setting that GPTConfig does not have. Ignoring it could change the logits.
    """
    from ..model import GPTConfig

    fields = GPTConfig.__annotations__.keys() | DEFAULTS.keys()
    others = fields | GPTConfig().to_dict().keys() | GPTConfig.attribute_map.keys()
    unknown = [f"{key}={str(config[key])[:40]}" for key in config if config[key] and key not in others]
    if unknown := [setting for setting in unknown if not setting.startswith("_")]:
        fix = "use the version that saved the model, or remove the key if it does not affect the logits"
        raise ValueError(f"this version of nanogpt_accel does not have {', '.join(unknown[:3])}; {fix}")
    return GPTConfig(**{key: value for key, value in config.items() if key in fields} | changes)


def stock_config(kind, config):
    """Return transformers' config of the architecture `kind` for a dict of GPTConfig's fields."""
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **to_stock_config(kind, config))


@contextmanager
def _config_errors(folder):
    """Convert any error in the `with` block to a ValueError that names config.json. The block builds a config or a
    model."""
    try:
        with _quiet_transformers():
            yield
    except Exception as error:  # ValueError, TypeError, RuntimeError and errors of huggingface_hub
        raise ValueError(f"{folder}: config.json is not valid: {one_line(error)}") from None


@contextmanager
def _quiet_transformers():
    """Disable transformers' progress bars and warnings. The bars would interfere with our output, and our own errors
    name the missing weights."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _check_shapes(folder, config, shapes):
    """Compare {name: shape} with the parameters of the model that the config object describes."""
    import torch
    from transformers import AutoModelForCausalLM

    with _config_errors(folder), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    prefix = f"{model.base_model_prefix}."  # from_pretrained accepts names with and without this prefix
    found = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    parameters = {}  # id -> (shape, names): a tied weight has several names, and a file may contain only one
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameters.setdefault(id(parameter), (tuple(parameter.shape), []))[1].append(name)
    keys = {name.removeprefix(prefix) for _, names in parameters.values() for name in names}
    instead = next((f", but there is {name}" for name in shapes if name.removeprefix(prefix) not in keys), "")
    problems = []
    for expected, names in parameters.values():
        shape = next((found[key] for key in (name.removeprefix(prefix) for name in names) if key in found), None)
        if shape is None:
            problems.append(f"{names[0]} is missing{instead}")
        elif shape != expected:
            problems.append(f"the shape of {names[0]} is {shape} instead of {expected}")
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        files = ", ".join(weight_files(folder)[:3])
        raise ValueError(f"{folder}: {files} does not match config.json: {problems[0]}{more}")


def load_strict(folder, **options):
    """Load a folder with from_pretrained in float32, and raise an error if the weights do not match the model.

    from_pretrained reads sharded files and older formats, but it initializes missing weights at random and ignores
    unexpected ones.

    options: arguments of from_pretrained. Without `config` and `generation_config`, it reads both from the folder.
    """
    import torch
    from transformers import AutoModelForCausalLM

    options |= {"dtype": torch.float32, "local_files_only": True}
    try:
        with _quiet_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # corrupted files may raise any exception
        files = ", ".join(weight_files(folder)[:3])
        raise ValueError(f"{folder}: cannot be loaded from {files}: {loading_error(error)}") from error
    wrong = set(info["missing_keys"])
    if model.config.model_type == GPT_TYPE:  # older files of other models may contain unused buffers
        wrong |= set(info["unexpected_keys"])
    if wrong:
        names = ", ".join(sorted(wrong)[:3]) + ", ..." * (len(wrong) > 3)
        raise ValueError(f"{folder}: weights are missing or unexpected: {names}")
    if os.name == "nt":  # Windows cannot delete or replace a file while weights are memory-mapped from it
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model.eval()


def build_model(config, weights):
    """Return a GPT with these weights, in eval mode. Random initialization is skipped to save time.

    Raises:
        RuntimeError: a tensor is missing or unexpected, or has the wrong shape.
    """
    import torch

    from ..model import GPT

    with torch.device("meta"):
        model = GPT(config)
    tied = {"lm_head.weight": weights["transformer.wte.weight"]} if config.tie_word_embeddings else {}
    model.load_state_dict(weights | tied, assign=True)
    model.tie_weights()
    return model.eval()


def check_tokenizer(tokenizer, config, folder):
    """Check that the model has an embedding for every token. Return a list of problems."""
    n_tokens, vocab_size = tokenizer.vocab_size, config["vocab_size"]
    problem = f"{folder}: the tokenizer has {n_tokens:,} tokens, but the model has only {vocab_size:,} embeddings"
    return [f"{problem}; use the tokenizer that the model was trained with"] if n_tokens > vocab_size else []


def fit_to_tokenizer(model, tokenizer):
    """Configure a model for its tokenizer: padding and end-of-text token, and the ids that `generate` must avoid."""
    has_pad = tokenizer.pad_id is not None and tokenizer.pad_id < model.config.vocab_size
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_id if has_pad else None
        if config.eos_token_id is None:
            config.bos_token_id = config.eos_token_id = tokenizer.eot_id
    model.generation_config.suppress_tokens = list(range(tokenizer.vocab_size, model.config.vocab_size)) or None
