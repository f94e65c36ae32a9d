"""Scale a recipe to another depth: one setting for the size of a model and for everything that depends on the size.

The file of a recipe is the reference: its settings are good for its own n_layer and its own number of tokens. `scale`
derives the settings for another depth or another number of tokens, as nanochat does (github.com/karpathy/nanochat,
scripts/base_train.py). recipe.py calls `scale` when a recipe is loaded, so all other code sees an ordinary recipe.
"""

import math

MULTIPLE_OF = 16  # n_inner is rounded to a multiple of gcd(16, the n_inner of the recipe)

# ---- parameters


def widths(shape):
    """Return the output width of c_attn, the input width of the attention's c_proj and the output width of c_fc.

    shape: a dictionary of GPTConfig fields.
    """
    queries, keys = shape["n_head"] * shape["head_dim"], shape["n_kv_head"] * shape["head_dim"]
    return queries + 2 * keys, queries, (2 if shape["activation"] == "swiglu" else 1) * shape["n_inner"]


def block_matrices(shape):
    """Return the number of parameters in the matrices of a block: (attention, mlp)."""
    qkv, queries, fc = widths(shape)
    return (qkv + queries) * shape["n_embd"], (fc + shape["n_inner"]) * shape["n_embd"]


def scaling_params(shape):
    """Return the number of parameters N that scaling laws use here: the matrices of the blocks, and the head.

    nanochat found that this N gives the most regular laws (dev/LOG.md, 27 January 2026). Without "vocab_size" in the
    shape, the head is not counted.
    """
    return shape["n_layer"] * sum(block_matrices(shape)) + shape.get("vocab_size", 0) * shape["n_embd"]


def known_shape(recipe):
    """Return the shape of a recipe's model, with the vocabulary size if it is known before the data are prepared."""
    known = {"gpt2": 50257, "bpe": recipe.data.vocab_size}.get(recipe.data.tokenizer)
    return recipe.shape | ({"vocab_size": recipe.padded_vocab_size(known)} if known else {})


def tokens_per_param(reference, recipe):
    """Return the training tokens per parameter for the scaled recipe: by default, as many as in the reference."""
    return recipe.scaling.tokens_per_parameter or _tokens(reference) / scaling_params(known_shape(reference))


def _tokens(recipe):
    return recipe.train.max_iters * recipe.tokens_per_step


def _round(value):
    return float(f"{value:.6g}")


# ---- the rules: functions that return {key: (value, rule as text)}
# reference: the Recipe as in its file. recipe: the Recipe with the settings from the command line and the results of
# the previous rules. given: names of the settings on the command line, which `scale` does not change


def architecture(reference, recipe, given):
    """Keep the ratio of width to depth, the head dimension, and the number of query heads per key-value head."""
    old, depth = reference.model, recipe.model.depth or reference.model.n_layer
    old_head_dim = old.head_dim or old.n_embd // old.n_head
    head_dim = recipe.model.head_dim or old_head_dim
    multiple = head_dim if "head_dim" in given else math.gcd(head_dim, old.n_embd)
    ratio = recipe.scaling.aspect_ratio or old.n_embd / old.n_layer
    n_embd = multiple * max(1, math.ceil(round(depth * ratio / multiple, 6)))  # round removes floating-point errors
    n_embd = recipe.model.n_embd if "n_embd" in given else n_embd
    # the heads together can be wider or narrower than n_embd, if head_dim is set
    share = old.n_head * old_head_dim / old.n_embd if recipe.model.head_dim else 1
    n_head = recipe.model.n_head if "n_head" in given else max(1, round(share * n_embd / head_dim))
    derived = {
        "n_layer": (depth, "depth"),
        "n_embd": (n_embd, f"depth * {ratio:g}, rounded up to a multiple of {multiple}"),
        "n_head": (n_head, f"{f'{share:.4g} * ' * (share != 1)}n_embd / head_dim, with head_dim={head_dim}"),
    }
    if old.n_kv_head:
        queries = math.gcd(n_head, old.n_head // old.n_kv_head)
        derived["n_kv_head"] = (n_head // queries, f"n_head / {queries}")
    if old.n_inner:
        share, multiple = old.n_inner / old.n_embd, math.gcd(old.n_inner, MULTIPLE_OF)
        n_inner = multiple * max(1, round(share * n_embd / multiple))
        derived["n_inner"] = (n_inner, f"{share:.4g} * n_embd, rounded to a multiple of {multiple}")
    return derived


def batch_size(reference, recipe, given):
    """Scale the tokens per step B with the number of training tokens D: B ~ D^0.383 (Power Lines, Bergsma et al. 2025,
    arXiv 2505.13738). As in nanochat, change B only by factors of two, because the number of processes, often a
    power of two, must divide it."""
    train, exponent = recipe.train, recipe.scaling.batch_exponent
    tokens = tokens_per_param(reference, recipe) * scaling_params(known_shape(recipe))
    wanted = reference.tokens_per_step * (tokens / _tokens(reference)) ** exponent
    doublings = round(math.log2(wanted / recipe.tokens_per_step))
    sequences, micro_batches = train.batch_size, train.gradient_accumulation_steps
    for _ in range(doublings):  # more micro-batches, because larger ones may need too much memory
        if "gradient_accumulation_steps" in given:
            sequences *= 2
        else:
            micro_batches *= 2
    for _ in range(-doublings):
        if micro_batches % 2 == 0 and "gradient_accumulation_steps" not in given:
            micro_batches //= 2
        elif sequences % 2 == 0:
            sequences //= 2
    rule = f"tokens per step grow as (training tokens)^{exponent:g} to {wanted:,.0f}, "
    rule += f"rounded to 2^n * {recipe.tokens_per_step:,}"
    return {"gradient_accumulation_steps": (micro_batches, rule), "batch_size": (sequences, rule)}


def horizon(reference, recipe, given):
    """Train on the same number of tokens per parameter (Hoffmann et al. 2022), with a schedule of the same shape."""
    per_param = tokens_per_param(reference, recipe)
    params, per_step = scaling_params(known_shape(recipe)), recipe.tokens_per_step
    steps = max(1, int(round(per_param * params / per_step, 6)))  # round removes floating-point errors
    steps = recipe.train.max_iters if "max_iters" in given else steps
    rule = f"{per_param:.4g} tokens per parameter * {params:,} parameters / {per_step:,} tokens per step"
    derived = {"max_iters": (steps, rule)}
    for key in ("warmup_iters", "lr_decay_iters"):
        if old := getattr(reference.optimizer, key):
            share = old / reference.train.max_iters
            derived[key] = (max(1, round(share * steps)), f"{share:.4g} * max_iters")
    if recipe.data.stages:
        share = steps / reference.train.max_iters
        stages = [
            stage if stage.start < 1 else stage.model_copy(update={"start": float(max(1, round(share * stage.start)))})
            for stage in recipe.data.stages
        ]
        derived["stages"] = (stages, f"the steps in `from` are multiplied by {share:.4g}")
    return derived


def learning_rates(reference, recipe, given):
    """Scale the learning rates with the square root of the batch size, and AdamW's learning rate also with the width.

    For the width, nanochat uses the factor n_embd^-0.5. If mup_base_width is set, this factor is not used, because muP
    scales the learning rate of each kind of weight.
    """
    old, exponent = reference.optimizer, 0 if recipe.model.mup_base_width else recipe.scaling.width_exponent
    by_batch = math.sqrt(recipe.tokens_per_step / reference.tokens_per_step)
    by_width = (recipe.model.n_embd / reference.model.n_embd) ** exponent
    rule = f"* (tokens per step / {reference.tokens_per_step:,})^0.5"
    derived = {"muon_learning_rate": (_round(old.muon_learning_rate * by_batch), f"{old.muon_learning_rate:g} {rule}")}
    rule = f"{old.learning_rate:g} {rule}" + f" * (n_embd / {reference.model.n_embd})^{exponent:g}" * (exponent != 0)
    derived["learning_rate"] = (_round(old.learning_rate * by_batch * by_width), rule)
    if old.min_lr:
        share = old.min_lr / old.learning_rate
        rate = recipe.optimizer.learning_rate if "learning_rate" in given else derived["learning_rate"][0]
        derived["min_lr"] = (_round(share * rate), f"{share:.4g} * learning_rate")
    return derived


def weight_decay(reference, recipe, given):
    """Keep the product learning rate * weight decay * steps constant (Wang and Aitchison 2024, arXiv 2405.13698).

    With weight decay, AdamW's weights are a moving average of its updates. If the product is constant, the average
    spans the same share of every run.
    """
    derived = {}
    for key, rate in (("weight_decay", "learning_rate"), ("muon_weight_decay", "muon_learning_rate")):
        if decay := getattr(reference.optimizer, key):
            product = decay * getattr(reference.optimizer, rate) * reference.train.max_iters
            value = product / (getattr(recipe.optimizer, rate) * max(1, recipe.train.max_iters))
            derived[key] = (_round(value), f"{product:.4g} / ({rate} * max_iters)")
    return derived


RULES = (architecture, batch_size, horizon, learning_rates, weight_decay)


def scale(reference, recipe, given):
    """Scale a recipe to its depth and its tokens_per_parameter. For the arguments, see the comment above the rules.

    Returns:
        (recipe, lines): the scaled Recipe, and a line of text for each setting that differs from the reference.
    """
    old, lines = reference.flat(), []
    for rule in RULES:
        derived = {key: pair for key, pair in rule(reference, recipe, given).items() if key not in given}
        recipe = recipe.replace(**{key: value for key, (value, _) in derived.items()})
        for key, (value, text) in derived.items():
            if str(value) != str(old[key]):
                shown = [stage.start for stage in value] if key == "stages" else value
                lines.append(f"{key}={shown:g} ({text})" if isinstance(shown, float) else f"{key}={shown} ({text})")
    return recipe.replace(depth=None, tokens_per_parameter=None), lines
