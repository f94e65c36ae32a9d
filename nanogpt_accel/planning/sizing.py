"""Compute the size of a run from its shape: parameters, FLOPs, bytes of memory, compute-optimal sizes.

A `shape` is a dictionary with the fields of GPTConfig, every None resolved. Nothing is run and torch is not imported.
After nanoGPT's transformer_sizing.ipynb and scaling_laws.ipynb, extended to all options of GPTConfig and to sharding.

Letters: M = batch * block_size, the tokens of a micro-batch; V is the vocabulary size.
"""

import math

FLOAT, HALF = 4, 2  # bytes of float32, and of bfloat16 or float16
# above these limits model.py computes the loss in chunks; it has a copy of them, because it must not import the package
LARGEST_LOGITS_CPU, LARGEST_LOGITS = 2**24, 2**27

# OpenAI's weights, by their name in init_from
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
    """Return the output width of a block's c_attn, the input width of its c_proj and the output width of its c_fc."""
    queries, keys = shape["n_head"] * shape["head_dim"], shape["n_kv_head"] * shape["head_dim"]
    return queries + 2 * keys, queries, (2 if shape["activation"] == "swiglu" else 1) * shape["n_inner"]


def block_matrices(shape):
    """Return the parameters in the four matrices of a block: (attention, mlp)."""
    qkv, queries, fc = _widths(shape)
    return (qkv + queries) * shape["n_embd"], (fc + shape["n_inner"]) * shape["n_embd"]


def _norm(shape):
    """Return the parameters of a norm on the residual stream."""
    return shape["norm_weight"] * shape["n_embd"] * (2 if shape["bias"] and shape["norm"] == "layernorm" else 1)


def parameters(shape):
    """Return the parameters by part; their sum is the model's. A tied head counts as embedding."""
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
    """Return the parameters of matrix products: all but those of tables that are only looked up."""
    parts = parameters(shape)
    return sum(parts.values()) - parts["position"] - (0 if shape["tie_word_embeddings"] else parts["embedding"])


# ---- FLOPs


def flops_per_token(shape):
    """Return the FLOPs of forward and backward per token: 6 N + 12 L C T (PaLM, appendix B), as nanoGPT counts.

    N are the parameters of matrix products, C is the width of all query heads together.
    """
    L, C, T = shape["n_layer"], shape["n_head"] * shape["head_dim"], shape["block_size"]
    return 6 * num_matmul_params(shape) + 12 * L * C * T


def forward_flops(shape):
    """Return the FLOPs of the forward pass of one sequence by part; a multiply-add counts as two.

    Only matrix products count, as in transformer_sizing.ipynb, because norms and activations are negligible. Attention
    counts in full, although the kernels skip the masked half.
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
    """Return the bytes of float32 optimizer state: AdamW has two moments per parameter; Muon has one momentum for the
    matrices of the blocks and uses AdamW for the rest."""
    hidden = shape["n_layer"] * sum(block_matrices(shape)) if algorithm == "muon" else 0
    return FLOAT * (2 * sum(parameters(shape).values()) - hidden)


def checkpoint_bytes(shape, algorithm):
    """Return the bytes of a checkpoint on disk: float32 weights and optimizer state."""
    return FLOAT * sum(parameters(shape).values()) + optimizer_bytes(shape, algorithm)


def activation_bytes(shape, batch, half, checkpointing, cpu=False, dropout=0.0):
    """Return the bytes that the forward pass of a micro-batch saves for the backward pass, without the logits.

    Counts what eager torch saves with SDPA, which stores no (T, T) matrix. torch.compile saves less, because it
    recomputes cheap operations.

    Args:
        batch: sequences. half: autocast to bfloat16 or float16 instead of float32 everywhere.
        checkpointing: each block saves only its input and is recomputed in the backward pass.
        cpu: torch's CPU kernels, which save more of an RMSNorm and a float32 mask for dropout.
    """
    n_layer, width = shape["n_layer"], shape["n_embd"]
    M = batch * shape["block_size"]
    low = HALF if half else FLOAT  # dtype of linear layers and attention
    qkv, queries, fc = _widths(shape)
    keys = (qkv - queries) // 2
    rotary, inner = shape["position"] == "rotary", shape["n_inner"]

    # a norm saves its input, the float32 residual stream, and its statistics
    norm = FLOAT * width + FLOAT * (2 if shape["norm"] == "layernorm" else 1)
    if cpu and shape["norm"] == "rmsnorm" and shape["norm_weight"]:
        norm += FLOAT * width
    linear = low * width  # the input of a linear layer
    mask = (FLOAT if cpu else 1) * width if dropout else 0
    attention = low * qkv  # q, k, v in one tensor
    if shape["qk_norm"]:
        attention += FLOAT * (shape["n_head"] + shape["n_kv_head"])
        attention += FLOAT * (queries + keys) * (half + (cpu and shape["norm_weight"]))
        if cpu:
            attention += low * queries
    if rotary or shape["qk_norm"]:
        attention += low * (queries + keys)  # after norm and rotation; v is a view that keeps the old tensor alive
    attention += low * queries + FLOAT * shape["n_head"]  # the output, and the log-sum-exp per head
    # input, intermediate and output of the activation function
    mlp = {"swiglu": low * (fc + 2 * inner), "relu2": low * 2 * inner + (FLOAT * inner if half and not cpu else 0)}.get(
        shape["activation"], low * 2 * inner
    )
    block = 2 * (norm + linear) + attention + mlp + 2 * mask  # bytes per token

    ends = norm * (1 + shape["embd_norm"]) + linear + mask
    tables = 2 * FLOAT * shape["block_size"] * shape["head_dim"] if rotary else 0
    return M * (n_layer * (FLOAT * width if checkpointing else block) + ends) + tables


def rows_per_chunk(n_tokens, vocab_size, cpu=False):
    """Return how many rows of logits GPT.chunked_loss computes at once, or n_tokens if the loss needs no chunks."""
    n_chunks = math.ceil(n_tokens * vocab_size / (LARGEST_LOGITS_CPU if cpu else LARGEST_LOGITS))
    n_rows = math.ceil(n_tokens / n_chunks)
    return math.ceil(n_rows / 128) * 128 if n_chunks > 1 and n_rows > 128 else n_rows


def logits_bytes(shape, batch, half=False, cpu=False, trains=True):
    """Return the peak bytes of the loss and its backward pass. half, cpu, trains: see memory.

    Few logits are computed at once: log-probabilities, their gradient and the gradient of the logits, all float32 in
    every precision; a soft-cap also keeps its tanh. Many logits are computed in chunks, see GPT.chunked_loss: this
    takes the gradients of the head and of its input, and one chunk of logits with its temporaries.
    """
    M, V, softcap = batch * shape["block_size"], shape["vocab_size"], bool(shape["logit_softcap"])
    n_rows = rows_per_chunk(M, V, cpu)
    if n_rows == M:
        return M * V * FLOAT * (3 + softcap)
    work = n_rows * V * FLOAT * (2 + softcap)
    if not trains:
        return work
    low = HALF if half else FLOAT
    if half:  # logits of a chunk in half precision, next to the gradient of the head from this chunk
        work = max(work, n_rows * V * HALF + HALF * V * shape["n_embd"])
    return round(FLOAT * V * shape["n_embd"] + low * M * shape["n_embd"] + work)


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
    """Return the peak bytes on one GPU by part, for a step that already has gradients of an earlier micro-batch.

    Weights are float32; autocast copies the matrices to half precision for the duration of a micro-batch.

    Args:
        layout: "ddp" (also for a single process), "fsdp2", "zero2" or "zero3".
        shards: processes over which the layout shards. processes: world size.
        batch: sequences of a micro-batch per process; half, checkpointing, cpu, dropout: see activation_bytes.
        trains: False for a run that only evaluates; it has no gradients and saves no activations.

    Returns:
        {"weights", "gradients", "optimizer", "copies", "activations", "logits"}. "copies" are further tensors of
        weights or gradients: half-precision copies, DDP's buckets, gathered blocks, DeepSpeed's float32 master weights.
        "logits" is the memory of the loss, or with checkpointing that of one recomputed block if this is larger: the
        loss is finished before the first block is recomputed.
    """
    parts = parameters(shape)
    n_params, state = sum(parts.values()), optimizer_bytes(shape, algorithm)
    n_block = sum(parts[key] for key in ("attention", "mlp")) // shape["n_layer"]
    n_ends = parts["embedding"] + parts["position"] + parts["head"]
    low = HALF if half else FLOAT
    # gathered: embedding and head with their gradients; the current block, the prefetched block, one block's gradients
    gathered = low * (2 * n_ends + 3 * n_block)
    reduced = FLOAT * n_block if half else 0  # FSDP2 reduces gradients in float32
    if layout == "ddp":
        weights, gradients, optimizer = FLOAT * n_params, FLOAT * n_params, state
        head = parts["embedding"] if shape["tie_word_embeddings"] else parts["head"]
        copies = HALF * (shape["n_layer"] * sum(block_matrices(shape)) + head) if half else 0
        copies += FLOAT * n_params if processes > 1 else 0  # DDP's gradient buckets
    elif layout == "fsdp2":
        weights, gradients, optimizer = FLOAT * n_params / shards, FLOAT * n_params / shards, state / shards
        copies = gathered + (reduced if trains else 0)
    else:  # DeepSpeed trains a half-precision model and keeps float32 master weights
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
    """Return the seconds that communicating weights and gradients takes per step, with ring collectives (Patarasuk and
    Yuan 2009): all-gather or reduce-scatter of n bytes over s processes sends n * (s - 1) / s from each process, and
    all-reduce is both.

    Args:
        layout, shards, processes, half: see memory. micro_steps: micro-batches of a step per process.
        machine: processes per machine; FSDP2 shards within a machine.
        near, far: bytes per second that a process sends within its machine, and to other machines.
    """
    n_params, low = sum(parameters(shape).values()), HALF if half else FLOAT
    ring = lambda n_bytes, s: n_bytes * (s - 1) / s  # noqa: E731
    # a ring over all processes leaves a machine over the links of all its processes
    around = near if processes <= machine else min(near, machine * far)
    if layout == "ddp":
        return 2 * ring(FLOAT * n_params, processes) / around
    if layout == "fsdp2":  # weights for the forward and the backward pass; float32 gradients, also between machines
        return micro_steps * (
            ring((2 * low + FLOAT) * n_params, shards) / near
            + 2 * ring(FLOAT * n_params / shards, processes // shards) / far
        )
    if layout == "zero2":  # gradients of every micro-batch; then the new weights
        return (micro_steps + 1) * ring(low * n_params, processes) / around
    return 3 * micro_steps * ring(low * n_params, processes) / around


# ---- scaling laws


def optimal_tokens(n_params):
    """Return the compute-optimal number of training tokens for a model size: the line through the logarithms of
    Chinchilla's approach 2, as in scaling_laws.ipynb."""
    x = [math.log10(n) for n, _ in _CHINCHILLA]
    y = [math.log10(tokens) for _, tokens in _CHINCHILLA]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return 10 ** (mean_y + slope * (math.log10(n_params) - mean_x))


def optimal_size(flops):
    """Return the (parameters, tokens) with the lowest loss for these FLOPs, 6 * parameters * tokens, by Chinchilla's
    approach 3: loss = 1.69 + 406.4 / parameters**0.34 + 410.7 / tokens**0.28."""
    A, B, alpha, beta = 406.4, 410.7, 0.34, 0.28
    n_params = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
    return n_params, flops / 6 / n_params
