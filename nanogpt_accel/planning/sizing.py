"""Compute parameters, FLOPs, memory and communication time from the shape of a model.

A `shape` is a dictionary of GPTConfig fields with defaults filled in. This module does not import torch. It follows
nanoGPT's transformer_sizing.ipynb, extended to all options of GPTConfig and to sharding.

M = batch * block_size is the number of tokens in a micro-batch; V is the vocabulary size.
"""

import math
from collections import Counter

from ..distributed.muon_exchange import deal, orthogonalization_flops
from ..recipe import Recipe
from ..scaling import block_matrices, widths

FLOAT, HALF = 4, 2  # bytes of float32, and of bfloat16 or float16
# above this number of logits, the loss is chunked. model.py repeats the numbers, because it must not import the package
LARGEST_LOGITS_CPU, LARGEST_LOGITS = 2**24, 2**27

# Fields of GPTConfig that the functions below take into account, or that need no parameters, memory or FLOPs. For all
# other fields, `plan` says that its estimates ignore them. If you extend the functions for a new field, add it here
COUNTED = {
    *("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "head_dim", "n_embd", "n_inner", "bias"),
    *("norm", "norm_weight", "norm_eps", "embd_norm", "qk_norm", "position", "rope_theta", "activation"),
    *("logit_softcap", "tie_word_embeddings", "mup_base_width"),
}

# OpenAI's GPT-2 models
_GPT2_OPTIONS = Recipe().replace(bias=True, activation="gelu_new").shape | {"vocab_size": 50257}


def _gpt2(n_layer, n_head, n_embd):
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_kv_head": n_head, "n_embd": n_embd}
    return _GPT2_OPTIONS | sizes | {"head_dim": n_embd // n_head, "n_inner": 4 * n_embd}


GPT2_SHAPES = {
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
}


# ---- parameters


def _norm(shape):
    """Return the number of parameters of one norm on the residual stream."""
    return shape["norm_weight"] * shape["n_embd"] * (2 if shape["bias"] and shape["norm"] == "layernorm" else 1)


def parameters(shape):
    """Return {part: number of parameters}. A tied head is counted under embedding."""
    width, n_layer = shape["n_embd"], shape["n_layer"]
    qkv, _, fc = widths(shape)
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
    """Return the number of parameters used in matrix products: all except embedding tables that are only looked up."""
    parts = parameters(shape)
    return sum(parts.values()) - parts["position"] - (0 if shape["tie_word_embeddings"] else parts["embedding"])


def muon_buckets(shape):
    """Return the matrices that Muon orthogonalizes, grouped by size: [(shorter side, longer side, number), ...].

    Muon splits fused weights, so queries, keys and values are separate matrices, and so are SwiGLU's gate and input.
    """
    width, n_gates = shape["n_embd"], 1 + (shape["activation"] == "swiglu")
    queries, keys = shape["n_head"] * shape["head_dim"], shape["n_kv_head"] * shape["head_dim"]
    sides = [queries, queries, keys, keys] + [shape["n_inner"]] * (n_gates + 1)  # q, attention's c_proj, k, v, the MLP
    counts = Counter(tuple(sorted((side, width))) for side in sides)
    return [(*sizes, n * shape["n_layer"]) for sizes, n in counts.items()]


# ---- FLOPs


def flops_per_token(shape):
    """Return the FLOPs of forward and backward per token, counted like nanoGPT: 6 N + 12 L C T (PaLM, appendix B).

    N is the number of parameters in matrix products, L the number of layers, C the total width of the query heads, T
    the block size.
    """
    L, C, T = shape["n_layer"], shape["n_head"] * shape["head_dim"], shape["block_size"]
    return 6 * num_matmul_params(shape) + 12 * L * C * T


def forward_flops(shape):
    """Return {part of the model: FLOPs of the forward pass of one sequence}. A multiply-add counts as two FLOPs.

    As in transformer_sizing.ipynb, norms and activations are ignored, and attention includes the masked half, which
    attention kernels skip.
    """
    T, n_layer = shape["block_size"], shape["n_layer"]
    qkv, queries, fc = widths(shape)
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
    """Return the bytes of float32 optimizer state.

    AdamW stores two moments per parameter. Muon stores one momentum per parameter of the blocks' matrices, and AdamW's
    moments for the others. The state of another optimizer is assumed to be as large as AdamW's.
    """
    hidden = shape["n_layer"] * sum(block_matrices(shape)) if algorithm == "muon" else 0
    return FLOAT * (2 * sum(parameters(shape).values()) - hidden)


def muon_cost(shape, layout, n_ranks, device="cuda"):
    """Return the cost of a step of Muon on the busiest rank, as a dictionary.

    Args:
        layout: see memory. n_ranks: number of processes that divide the work: `shards` under FSDP2, otherwise the
            number of all processes.

    Returns:
        dict with "flops"; "exchanged", the bytes that a rank receives (and sends) per step; and "memory", the peak
        bytes of temporary tensors. Under FSDP2, "exchanged" is a mean over the ranks. Some ranks receive more than
        others, because a fused weight contains several matrices, and a rank has the rows of only some of them.
    """
    size, buckets = HALF if device == "cuda" else FLOAT, muon_buckets(shape)
    owners = deal(buckets, n_ranks)
    counts = [[of_bucket.count(rank) for rank in range(n_ranks)] for of_bucket in owners]  # by bucket and rank

    def busiest(cost):
        """Add up the costs of the matrices of each rank. Return the largest sum. cost: function(rows, columns)."""
        costs = [cost(low, high) for low, high, _ in buckets]
        return max(sum(c * column[rank] for c, column in zip(costs, counts, strict=True)) for rank in range(n_ranks))

    total = sum(low * high * n for low, high, n in buckets)
    own = busiest(lambda low, high: low * high)
    padded = sum(low * high * max(column) for (low, high, _), column in zip(buckets, counts, strict=True))
    if n_ranks == 1:
        exchanged, kept = 0, FLOAT * total + size * total  # the updates before and after orthogonalization
    elif layout == "fsdp2":  # a rank receives all rows of its own matrices, and then its own rows of all results
        both = size * (own + total / n_ranks)
        exchanged, kept = both * (n_ranks - 1) / n_ranks, FLOAT * total / n_ranks + 2 * both
    else:  # an all-gather; each bucket is padded to the same number of matrices on all ranks
        exchanged, kept = size * padded * (n_ranks - 1), FLOAT * total + size * padded * (n_ranks + 1)
    # temporary tensors for the largest bucket: its matrices in float32, x, x x^T and the square of x x^T. The next x is
    # not added, because it needs the memory of a result
    work = max(
        max(column) * (low * high * (FLOAT + size) + 2 * low**2 * size)
        for (low, high, _), column in zip(buckets, counts, strict=True)
    )
    return {"flops": busiest(orthogonalization_flops), "exchanged": round(exchanged), "memory": round(kept + work)}


def checkpoint_bytes(shape, algorithm):
    """Return the bytes of a checkpoint on disk: float32 weights and optimizer state."""
    return FLOAT * sum(parameters(shape).values()) + optimizer_bytes(shape, algorithm)


def activation_bytes(shape, batch, half, checkpointing, device="cuda", dropout=0.0):
    """Return the bytes that the forward pass of a micro-batch saves for the backward pass, without the logits.

    The estimate is for eager torch with SDPA, which stores no (T, T) matrix. torch.compile saves less, because it
    recomputes cheap operations.

    Args:
        batch: sequences per micro-batch.
        half: whether autocast uses a half-precision dtype (bfloat16 or float16).
        checkpointing: whether each block saves only its input and is recomputed in the backward pass.
        device: device type. Without CUDA's fused kernels, RMSNorm saves more and dropout saves a float32 mask.
    """
    n_layer, width, fused = shape["n_layer"], shape["n_embd"], device == "cuda"
    M = batch * shape["block_size"]
    low = HALF if half else FLOAT  # dtype of linear layers and attention
    qkv, queries, fc = widths(shape)
    keys = (qkv - queries) // 2
    rotary, inner = shape["position"] == "rotary", shape["n_inner"]

    # a norm saves its float32 input and its statistics
    norm = FLOAT * width + FLOAT * (2 if shape["norm"] == "layernorm" else 1)
    if not fused and shape["norm"] == "rmsnorm" and shape["norm_weight"]:
        norm += FLOAT * width
    linear = low * width  # the input of a linear layer
    mask = (1 if fused else FLOAT) * width if dropout else 0
    attention = low * qkv  # q, k, v in one tensor
    if shape["qk_norm"]:
        attention += FLOAT * (shape["n_head"] + shape["n_kv_head"])
        attention += FLOAT * (queries + keys) * (half + (not fused and shape["norm_weight"]))
        attention += 0 if fused else low * queries
    if rotary or shape["qk_norm"]:
        attention += low * (queries + keys)  # q, k after norm and rotation; v is a view of the old tensor
    attention += low * queries + FLOAT * shape["n_head"]  # the output, and the log-sum-exp per head
    # input and output of the activation function, and swiglu's product; autocast computes relu2's square in float32
    mlp = low * (fc + 2 * inner if shape["activation"] == "swiglu" else 2 * inner)
    if shape["activation"] == "relu2" and half and fused:
        mlp += FLOAT * inner
    block = 2 * (norm + linear) + attention + mlp + 2 * mask  # bytes per token

    ends = norm * (1 + shape["embd_norm"]) + linear + mask
    tables = 2 * FLOAT * shape["block_size"] * shape["head_dim"] if rotary else 0
    return M * (n_layer * (FLOAT * width if checkpointing else block) + ends) + tables


def rows_per_chunk(n_tokens, vocab_size, device="cuda"):
    """Return how many tokens GPT.chunked_loss processes at a time. If the loss is not chunked, return n_tokens."""
    n_chunks = math.ceil(n_tokens * vocab_size / (LARGEST_LOGITS_CPU if device == "cpu" else LARGEST_LOGITS))
    n_rows = math.ceil(n_tokens / n_chunks)
    return math.ceil(n_rows / 128) * 128 if n_chunks > 1 and n_rows > 128 else n_rows


def logits_bytes(shape, batch, half=False, device="cuda", trains=True):
    """Return the peak bytes of the loss and its backward pass. For the arguments, see `memory`.

    The full loss needs the log-probabilities, their gradient and the gradient of the logits, always in float32. A
    soft-cap also saves its tanh. The chunked loss (GPT.chunked_loss) needs the gradients of the head and of the head's
    input, and the logits and temporary tensors of one chunk.
    """
    M, V, softcap = batch * shape["block_size"], shape["vocab_size"], bool(shape["logit_softcap"])
    n_rows = rows_per_chunk(M, V, device)
    if n_rows == M:
        return M * V * FLOAT * (3 + softcap)
    work = n_rows * V * FLOAT * (2 + softcap)
    if not trains:
        return work
    low = HALF if half else FLOAT
    if half:  # the logits of a chunk and the chunk's gradient of the head, in half precision
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
    device="cuda",
    dropout=0,
    trains=True,
):
    """Return the peak memory per GPU as {part: bytes}.

    The peak is in the backward pass of the second or a later micro-batch, because gradients already exist then. Weights
    are float32; autocast copies the matrices to half precision for the duration of a micro-batch.

    Args:
        layout: "ddp" (also for a single process), "fsdp2", "zero2" or "zero3".
        shards: number of processes that together store one copy of the sharded state.
        processes: world size. algorithm: see optimizer_bytes.
        batch: micro-batch size per process; half, checkpointing, device, dropout: see activation_bytes.
        trains: False for evaluation, which needs no gradients or saved activations.

    Returns:
        dict with the parts "weights", "gradients", "optimizer", "copies", "activations" and "logits". "copies" are
        additional copies of weights or gradients: half-precision weights, DDP's buckets, gathered blocks, DeepSpeed's
        float32 master weights. "logits" is the memory of the loss. With checkpointing, it is the maximum of
        the memory of the loss and of one recomputed block, which are never needed at the same time. If Muon's temporary
        tensors need more than activations and logits, the difference is added to "logits".
    """
    parts = parameters(shape)
    n_params, state = sum(parts.values()), optimizer_bytes(shape, algorithm)
    n_block = (parts["attention"] + parts["mlp"]) // shape["n_layer"]
    n_ends, low = parts["embedding"] + parts["position"] + parts["head"], HALF if half else FLOAT
    # embedding and head with their gradients, the current block, the prefetched block, the gradients of one block
    gathered = low * (2 * n_ends + 3 * n_block)
    if layout == "ddp":
        weights, gradients, optimizer = FLOAT * n_params, FLOAT * n_params, state
        head = parts["embedding"] if shape["tie_word_embeddings"] else parts["head"]
        copies = HALF * (shape["n_layer"] * sum(block_matrices(shape)) + head) if half else 0
        copies += FLOAT * n_params if processes > 1 else 0  # DDP's gradient buckets
    elif layout == "fsdp2":
        weights, gradients, optimizer = FLOAT * n_params / shards, FLOAT * n_params / shards, state / shards
        copies = gathered + (FLOAT * n_block if half and trains else 0)  # gradients are reduced in float32
    else:  # DeepSpeed trains a half-precision model and keeps float32 master weights
        weights, gradients, optimizer = low * n_params, low * n_params / shards, state / shards
        copies = FLOAT * n_params / shards
        if layout == "zero3":
            weights, copies = weights / shards, copies + gathered
    activations = activation_bytes(shape, batch, half, checkpointing, device, dropout)
    one_block = activation_bytes({**shape, "n_layer": 1}, batch, half, False, device, dropout)
    logits = logits_bytes(shape, batch, half, device, trains)
    if not trains:
        gradients, optimizer, activations = 0, 0, one_block
    elif checkpointing:
        logits = max(logits, one_block)
    if algorithm == "muon" and trains:
        n_ranks = shards if layout == "fsdp2" else processes
        logits = max(logits, muon_cost(shape, layout, n_ranks, device)["memory"] - activations)
    parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer, "copies": copies}
    return {part: round(n_bytes) for part, n_bytes in parts.items()} | {"activations": activations, "logits": logits}


def exchange_seconds(shape, layout, shards, processes, *, micro_steps, half, machine, near, far):
    """Return the seconds per step to communicate weights and gradients with ring collectives (Patarasuk and Yuan 2009).

    Each process sends n * (s - 1) / s bytes for an all-gather or reduce-scatter of n bytes over s processes, and twice
    that for an all-reduce.

    Args:
        layout, shards, processes, half: see memory.
        micro_steps: micro-batches per step on each process.
        machine: processes per machine. FSDP2 shards within a machine.
        near, far: bandwidth per process within a machine and between machines, in bytes per second.
    """
    n_params, low = sum(parameters(shape).values()), HALF if half else FLOAT
    ring = lambda n_bytes, s: n_bytes * (s - 1) / s  # noqa: E731
    # a ring over several machines uses the links of all processes of a machine
    around = near if processes <= machine else min(near, machine * far)
    if layout == "ddp":
        return 2 * ring(FLOAT * n_params, processes) / around
    if layout == "fsdp2":  # weights for the forward and the backward pass; float32 gradients, also between machines
        within = ring((2 * low + FLOAT) * n_params, shards) / near
        return micro_steps * (within + 2 * ring(FLOAT * n_params / shards, processes // shards) / far)
    if layout == "zero2":  # the gradients of every micro-batch and the new weights
        return (micro_steps + 1) * ring(low * n_params, processes) / around
    return 3 * micro_steps * ring(low * n_params, processes) / around


def muon_seconds(shape, layout, shards, processes, *, flops_per_second, machine, near, far):
    """Return the seconds per step that Muon takes to orthogonalize matrices and to exchange them. Computation and
    communication overlap in part, so the result, their sum, is an upper bound.

    flops_per_second: of one process. For the other arguments, see exchange_seconds.
    """
    cost = muon_cost(shape, layout, shards if layout == "fsdp2" else processes)
    around = near if layout == "fsdp2" or processes <= machine else min(near, machine * far)
    return cost["flops"] / flops_per_second + cost["exchanged"] / around
