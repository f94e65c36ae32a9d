"""How large a run is, as arithmetic on its shape: parameters, FLOPs, bytes of memory, compute-optimal sizes.

A `shape` here is a dictionary with the fields of GPTConfig, every None resolved. Nothing is run and torch is not
imported. After nanoGPT's transformer_sizing.ipynb and scaling_laws.ipynb, with the switches of GPTConfig and the
sharding that Accelerate offers.

Letters: M = batch * block_size, the tokens of a micro-batch.
"""

import math

FLOAT, HALF = 4, 2  # bytes of a float32, of a bfloat16 or float16
LARGEST_LOGITS_CPU, LARGEST_LOGITS = 2**24, 2**27  # of more, model.py computes the loss in pieces

# OpenAI's weights, by the name that init_from takes
_GPT2 = {
    "vocab_size": 50257,
    "block_size": 1024,
    "bias": True,
    "norm": "layernorm",
    "norm_weight": True,
    "embd_norm": False,
    "qk_norm": False,
    "position": "learned",
    "activation": "gelu_new",
    "logit_softcap": None,
    "tie_word_embeddings": True,
}
GPT2_SHAPES = {
    name: {
        **_GPT2,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_kv_head": n_head,
        "n_embd": n_embd,
        "head_dim": n_embd // n_head,
        "n_inner": 4 * n_embd,
    }
    for name, (n_layer, n_head, n_embd) in {
        "gpt2": (12, 12, 768),
        "gpt2-medium": (24, 16, 1024),
        "gpt2-large": (36, 20, 1280),
        "gpt2-xl": (48, 25, 1600),
    }.items()
}

# Parameters and tokens of compute-optimal models: table 3, approach 2, of Hoffmann et al. 2022 ("Chinchilla")
_CHINCHILLA = (
    (400e6, 7.7e9),
    (1e9, 20.0e9),
    (10e9, 219.5e9),
    (67e9, 1.7e12),
    (175e9, 4.3e12),
    (280e9, 7.1e12),
    (520e9, 13.4e12),
    (1e12, 26.5e12),
    (10e12, 292.0e12),
)


# ---- parameters


def _widths(shape):
    """Outputs of a block's c_attn, inputs of its c_proj, and outputs of its c_fc."""
    queries, keys = shape["n_head"] * shape["head_dim"], shape["n_kv_head"] * shape["head_dim"]
    return queries + 2 * keys, queries, (2 if shape["activation"] == "swiglu" else 1) * shape["n_inner"]


def block_matrices(shape):
    """Parameters in the four matrices of a block: (attention, mlp)."""
    qkv, queries, fc = _widths(shape)
    return (qkv + queries) * shape["n_embd"], (fc + shape["n_inner"]) * shape["n_embd"]


def _norm(shape):
    """Parameters of a norm of the residual stream."""
    return shape["norm_weight"] * shape["n_embd"] * (2 if shape["bias"] and shape["norm"] == "layernorm" else 1)


def parameters(shape):
    """Parameters by part; their sum is the model's. A tied head counts as embedding."""
    width, n_layer = shape["n_embd"], shape["n_layer"]
    qkv, _, fc = _widths(shape)
    attention, mlp = block_matrices(shape)
    if shape["bias"]:
        attention, mlp = attention + qkv + width, mlp + fc + width
    qk_norms = 2 * shape["head_dim"] if shape["qk_norm"] and shape["norm_weight"] else 0
    return {
        "embedding": shape["vocab_size"] * width,
        "position": shape["block_size"] * width if shape["position"] == "learned" else 0,
        "attention": n_layer * attention,
        "mlp": n_layer * mlp,
        "norms": n_layer * (2 * _norm(shape) + qk_norms) + (1 + shape["embd_norm"]) * _norm(shape),
        "head": 0 if shape["tie_word_embeddings"] else shape["vocab_size"] * width,
    }


def num_matmul_params(shape):
    """Parameters that multiply something for each token: all but those of tables that are only read."""
    parts = parameters(shape)
    return sum(parts.values()) - parts["position"] - (0 if shape["tie_word_embeddings"] else parts["embedding"])


# ---- FLOPs


def flops_per_token(shape):
    """Return FLOPs of forward and backward for one token: 6 N + 12 L C T (PaLM, appendix B), as nanoGPT counts.

    N: parameters that multiply. C: width of all heads together.
    """
    attention = 12 * shape["n_layer"] * shape["n_head"] * shape["head_dim"] * shape["block_size"]
    return 6 * num_matmul_params(shape) + attention


def forward_flops(shape):
    """FLOPs of the forward pass of one sequence by part, a multiplication and an addition each counted.

    Matrix products alone, as in transformer_sizing.ipynb: norms and the like are irrelevant beside them. Attention
    counts in full, though the kernels leave out the masked half.
    """
    T, n_layer = shape["block_size"], shape["n_layer"]
    qkv, queries, fc = _widths(shape)
    return {
        "attention/qkv": n_layer * 2 * T * shape["n_embd"] * qkv,
        "attention/scores": n_layer * 2 * T * T * queries,
        "attention/reduce": n_layer * 2 * T * T * queries,
        "attention/proj": n_layer * 2 * T * queries * shape["n_embd"],
        "mlp/fc": n_layer * 2 * T * shape["n_embd"] * fc,
        "mlp/proj": n_layer * 2 * T * shape["n_inner"] * shape["n_embd"],
        "head": 2 * T * shape["n_embd"] * shape["vocab_size"],
    }


# ---- bytes


def optimizer_bytes(shape, algorithm):
    """Bytes of optimizer state in float32: AdamW's two moments of every parameter; with "muon" one momentum of the
    blocks' matrices and two moments of the rest."""
    hidden = shape["n_layer"] * sum(block_matrices(shape)) if algorithm == "muon" else 0
    return FLOAT * (2 * sum(parameters(shape).values()) - hidden)


def checkpoint_bytes(shape, algorithm):
    """Bytes on disk of a checkpoint: float32 weights and the optimizer's state."""
    return FLOAT * sum(parameters(shape).values()) + optimizer_bytes(shape, algorithm)


def activation_bytes(shape, batch, half, checkpointing, cpu=False, dropout=0.0):
    """Bytes that the forward pass of a micro-batch keeps for the backward pass, logits aside (logits_bytes).

    Counted as eager torch keeps them, with attention by SDPA, which stores no (T, T). torch.compile keeps less, for it
    computes again what is cheap.

    Args:
        batch: sequences. half: autocast to bfloat16 or float16 rather than float32 throughout.
        checkpointing: each block keeps its input alone (and is computed again for its backward pass).
        cpu: torch's kernels for CPUs, which keep more of an RMSNorm, and of dropout a float.
    """
    n_layer, width = shape["n_layer"], shape["n_embd"]
    M = batch * shape["block_size"]
    low = HALF if half else FLOAT  # what linear layers and attention work in
    qkv, queries, fc = _widths(shape)
    keys = (qkv - queries) // 2
    rotary, inner = shape["position"] == "rotary", shape["n_inner"]

    # a norm: its input, which is the float32 residual stream, and its statistics
    norm = FLOAT * width + FLOAT * (2 if shape["norm"] == "layernorm" else 1)
    if cpu and shape["norm"] == "rmsnorm" and shape["norm_weight"]:
        norm += FLOAT * width
    linear = low * width  # what goes into a linear layer
    mask = (FLOAT if cpu else 1) * width if dropout else 0
    attention = low * qkv  # q, k, v in one piece of memory
    if shape["qk_norm"]:
        attention += FLOAT * (shape["n_head"] + shape["n_kv_head"])
        attention += FLOAT * (queries + keys) * (half + (cpu and shape["norm_weight"]))
        if cpu:
            attention += low * queries
    if rotary or shape["qk_norm"]:
        attention += low * (queries + keys)  # turned or normed ones; v stays where it is and holds the old ones
    attention += low * queries + FLOAT * shape["n_head"]  # what comes out, and the softmax's denominators
    # what goes into the activation function, what it needs besides, and what comes out
    mlp = {"swiglu": low * (fc + 2 * inner), "relu2": low * 2 * inner + (FLOAT * inner if half and not cpu else 0)}.get(
        shape["activation"], low * 2 * inner
    )
    block = 2 * (norm + linear) + attention + mlp + 2 * mask  # bytes a token

    ends = norm * (1 + shape["embd_norm"]) + linear + mask
    tables = 2 * FLOAT * shape["block_size"] * shape["head_dim"] if rotary else 0
    return M * (n_layer * (FLOAT * width if checkpointing else block) + ends) + tables


def logits_bytes(shape, batch, half=False, cpu=False, trains=True):
    """Bytes at the peak of the loss and its backward pass. half, cpu, trains: see memory.

    Small logits at once: the log-probabilities, their gradient and that of the logits, float32 each; a soft-cap keeps
    its tanh besides. Precision saves nothing here, for the loss is float32. Large ones in pieces, as GPT.loss_in_pieces
    has it: the gradients of the head and of what goes into it, and of one piece the logits and what they are made into.
    """
    M, rows, softcap = batch * shape["block_size"], shape["vocab_size"], bool(shape["logit_softcap"])
    n_pieces = math.ceil(M * rows / (LARGEST_LOGITS_CPU if cpu else LARGEST_LOGITS))
    if n_pieces == 1:
        return M * rows * FLOAT * (3 + softcap)
    piece = math.ceil(M / n_pieces) * rows
    if not trains:
        return piece * FLOAT * (2 + softcap)
    low = HALF if half else FLOAT
    work = piece * FLOAT * (2 + softcap)
    if half:  # the head's gradient from one piece, beside that piece's
        work = max(work, piece * HALF + HALF * rows * shape["n_embd"])
    return round(FLOAT * rows * shape["n_embd"] + low * M * shape["n_embd"] + work)


def memory(
    shape,
    layout,
    shards,
    processes,
    *,
    batch,
    half,
    checkpointing,
    algorithm="adamw",
    cpu=False,
    dropout=0.0,
    trains=True,
):
    """Bytes on one GPU by part, at the peak of a step that has gradients of an earlier micro-batch.

    Weights are float32; autocast makes copies of the matrices in half precision, which live as long as a micro-batch.

    Args:
        layout: "ddp" (also one process alone), "fsdp2", "zero2" or "zero3".
        shards: processes that share what the layout splits up. processes: all of them.
        batch: sequences of a micro-batch of one process; half, checkpointing, cpu, dropout: see activation_bytes.
        trains: False for a run that evaluates only, which has no gradients and keeps no activations.

    Returns:
        {"weights", "gradients", "optimizer", "copies", "activations", "logits"}. "copies" are what else holds weights
        or gradients: half-precision copies, DDP's buckets, gathered blocks, DeepSpeed's float32 masters. "logits" is
        the work of the loss, or with checkpointing that of the block computed again, if this is more: the one is over
        before the other begins.
    """
    parts = parameters(shape)
    n_params, state = sum(parts.values()), optimizer_bytes(shape, algorithm)
    n_block = sum(parts[key] for key in ("attention", "mlp")) // shape["n_layer"]
    n_ends = parts["embedding"] + parts["position"] + parts["head"]
    low = HALF if half else FLOAT
    # gathered: embedding and head with their gradients; the block at work, the one fetched ahead, a block's gradients
    gathered = low * (2 * n_ends + 3 * n_block)
    summed = FLOAT * n_block if half else 0  # what FSDP2 exchanges of them, in float32
    if layout == "ddp":
        weights, gradients, optimizer = FLOAT * n_params, FLOAT * n_params, state
        head = parts["embedding"] if shape["tie_word_embeddings"] else parts["head"]
        copies = HALF * (shape["n_layer"] * sum(block_matrices(shape)) + head) if half else 0
        copies += FLOAT * n_params if processes > 1 else 0  # the buckets in which gradients travel
    elif layout == "fsdp2":
        weights, gradients, optimizer = FLOAT * n_params / shards, FLOAT * n_params / shards, state / shards
        copies = gathered + (summed if trains else 0)
    else:  # DeepSpeed trains a model in half precision and keeps a float32 one
        weights, gradients, optimizer = low * n_params, low * n_params / shards, state / shards
        copies = FLOAT * n_params / shards
        if layout == "zero3":
            weights, copies = weights / shards, copies + gathered
    one_block = activation_bytes({**shape, "n_layer": 1}, batch, half, False, cpu, dropout)
    logits = logits_bytes(shape, batch, half, cpu, trains)
    if not trains:
        gradients, optimizer, activations = 0, 0, one_block
    elif checkpointing:
        activations, logits = activation_bytes(shape, batch, half, True, cpu, dropout), max(logits, one_block)
    else:
        activations = activation_bytes(shape, batch, half, False, cpu, dropout)
    return {
        "weights": round(weights),
        "gradients": round(gradients),
        "optimizer": round(optimizer),
        "copies": round(copies),
        "activations": activations,
        "logits": logits,
    }


def exchange_seconds(shape, layout, shards, processes, *, micro_steps, half, machine, near, far):
    """Seconds that weights and gradients of one step are on the wire, with rings (Patarasuk and Yuan 2009), in which
    gathering or scattering n bytes over s processes sends n * (s - 1) / s from each, and a sum for all is both.

    Args:
        layout, shards, processes, half: see memory. micro_steps: micro-batches of a step on each process.
        machine: processes of one machine, in which FSDP2's shards lie.
        near, far: bytes a second that a process sends within its machine, and to others.
    """
    n_params, low = sum(parameters(shape).values()), HALF if half else FLOAT
    pass_on = lambda n_bytes, s: n_bytes * (s - 1) / s  # noqa: E731
    # what goes round all processes leaves a machine by the wires of all its processes, a part by each
    around = near if processes <= machine else min(near, machine * far)
    if layout == "ddp":
        return 2 * pass_on(FLOAT * n_params, processes) / around
    if layout == "fsdp2":  # weights before the forward and the backward pass; float32 gradients, also between machines
        return micro_steps * (
            pass_on((2 * low + FLOAT) * n_params, shards) / near
            + 2 * pass_on(FLOAT * n_params / shards, processes // shards) / far
        )
    if layout == "zero2":  # gradients of every micro-batch; then the new weights
        return (micro_steps + 1) * pass_on(low * n_params, processes) / around
    return 3 * micro_steps * pass_on(low * n_params, processes) / around


# ---- scaling laws


def optimal_tokens(n_params):
    """Tokens for which a model of so many parameters is compute-optimal: the line through the logarithms of
    Chinchilla's approach 2, as scaling_laws.ipynb draws it."""
    x = [math.log10(n) for n, _ in _CHINCHILLA]
    y = [math.log10(tokens) for _, tokens in _CHINCHILLA]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return 10 ** (mean_y + slope * (math.log10(n_params) - mean_x))


def optimal_size(flops):
    """(parameters, tokens) with the lowest loss for so many FLOPs, 6 * parameters * tokens of them, by Chinchilla's
    approach 3: loss = 1.69 + 406.4 / parameters**0.34 + 410.7 / tokens**0.28."""
    A, B, alpha, beta = 406.4, 410.7, 0.34, 0.28
    n_params = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
    return n_params, flops / 6 / n_params
