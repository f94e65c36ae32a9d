"""Compare sizes computed from a shape with the real model, with measured tensors and with nanoGPT's notebooks."""

from contextlib import nullcontext

import pytest
import torch
from families import FAMILIES, LENGTH, config_of, counted_by_part

from nanogpt_accel import model as model_file
from nanogpt_accel.commands import bench
from nanogpt_accel.model import GPT
from nanogpt_accel.optim import make_optimizer
from nanogpt_accel.planning import sizing
from nanogpt_accel.planning.hardware import peak_flops
from nanogpt_accel.planning.sizing import flops_per_token
from nanogpt_accel.recipe import Optimizer, load_recipe

BATCH = 4

# ---- parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_every_family(family):
    config = config_of(family)
    assert sizing.parameters(config.resolved()) == counted_by_part(config)


@pytest.mark.parametrize(
    ("name", "millions"), [("gpt2", 124), ("gpt2-medium", 355), ("gpt2-large", 774), ("gpt2-xl", 1558)]
)
def test_openais_models_have_their_published_sizes(name, millions):  # as OpenAI names its files
    assert sum(sizing.parameters(sizing.GPT2_SHAPES[name]).values()) / 1e6 == pytest.approx(millions, abs=0.5)


# ---- nanoGPT's notebooks

# transformer_sizing.ipynb: GPT-2 without biases
NOTEBOOK = {**sizing.GPT2_SHAPES["gpt2"], "bias": False, "activation": "gelu"}


def test_parameters_of_the_notebook():
    parts = sizing.parameters(NOTEBOOK)
    assert sum(parts.values()) == 124_337_664
    assert parts == {
        "position": 786_432,
        "embedding": 38_597_376,
        "attention": 12 * (1_769_472 + 589_824),
        "mlp": 12 * 2 * 2_359_296,
        "norms": 12 * 2 * 768 + 768,
        "head": 0,
    }


def test_checkpoint_size_of_the_notebook():
    assert f"{sizing.checkpoint_bytes(NOTEBOOK, 'adamw') / 1e9:.2f} GB" == "1.49 GB"
    # weights and buffers use 3.73 % of 40 GB
    needed = sizing.memory(NOTEBOOK, "ddp", 1, 1, batch=12, half=True, checkpointing=False)
    assert f"{(needed['weights'] + needed['optimizer']) / 40e9:.2%}" == "3.73%"
    # the notebook measures its ckpt.pt, with less than 4 % of "fluff"
    assert sizing.checkpoint_bytes(NOTEBOOK, "adamw") == pytest.approx(1_542_470_366, rel=0.04)


def test_flops_of_the_notebook():
    flops = sizing.forward_flops(NOTEBOOK)
    assert flops == {
        key: 12 * value
        for key, value in {
            "attention/qkv": 3_623_878_656,
            "attention/scores": 1_610_612_736,
            "attention/reduce": 1_610_612_736,
            "attention/proj": 1_207_959_552,
            "mlp/fc": 4_831_838_208,
            "mlp/proj": 4_831_838_208,
        }.items()
    } | {"head": 79_047_426_048}
    assert sum(flops.values()) == 291_648_307_200 and 3 * sum(flops.values()) == 874_944_921_600
    assert flops_per_token(NOTEBOOK) * 1024 == 875_062_886_400  # PaLM's


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_per_token_is_nanogpts_estimate_mfu(family):
    config = config_of(family)
    with torch.device("meta"):
        model = GPT(config)
    tables = [model.transformer.wpe] + ([] if config.tie_word_embeddings else [model.transformer.wte])
    N = model.num_parameters() - sum(table.weight.numel() for table in tables if table is not None)
    L, H, Q, T = config.n_layer, config.n_head, config.head_dim, config.block_size
    assert flops_per_token(config.resolved()) == 6 * N + 12 * L * H * Q * T


def test_mfu_of_nanogpts_notebook():
    # 124M on an A100: 755 ms for 100 sequences of 1,024 tokens are 37 % (transformer_sizing.ipynb)
    flops = flops_per_token(NOTEBOOK)
    assert flops == 6 * 123_551_232 + 12 * 12 * 768 * 1024
    assert flops * 100 * 1024 / 0.755 / peak_flops("NVIDIA A100-SXM4-80GB") == pytest.approx(0.37, abs=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_match_torchs_flop_counter(family):
    from torch.utils.flop_counter import FlopCounterMode

    config = config_of(family)
    model = GPT(config).eval()
    model.set_attn_implementation("eager")  # the notebook also counts the masked half
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, LENGTH, dtype=torch.long), use_cache=False)
    assert sum(sizing.forward_flops(config.resolved()).values()) == counter.get_total_flops()


# ---- memory


def saved_bytes(model, ids, autocast):
    """Return the bytes of all distinct tensors that a forward pass saves, without parameters."""
    seen = {parameter.untyped_storage().data_ptr(): None for parameter in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        seen.setdefault(
            storage.data_ptr(), (storage.nbytes(), tensor)
        )  # keep the tensor, so that its address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        loss = model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:]).loss
    assert loss.requires_grad
    return sum(entry[0] for entry in seen.values() if entry)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["full", "checkpointing"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt2", "openai", "llama", "qwen3", "nanochat"])
def test_activations_match_the_tensors_that_torch_saves(family, half, checkpointing):
    config = config_of(family)
    model, shape = GPT(config).train(), config.resolved()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    autocast = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
    saved = saved_bytes(model, torch.randint(0, 512, (BATCH, LENGTH + 1)), autocast)
    # subtract the log-probabilities, the tanh of a soft-cap, and the copies of the weights in bfloat16
    saved -= BATCH * LENGTH * 512 * (4 + 4 * (family == "nanochat"))
    if half:
        blocks = 0 if checkpointing else shape["n_layer"] * sum(sizing.block_matrices(shape))
        saved -= 2 * (blocks + 512 * 128)
    assert sizing.activation_bytes(shape, BATCH, half, checkpointing, "cpu") == pytest.approx(saved, rel=0.1)


@pytest.mark.parametrize(
    ("family", "vocab_size", "checkpointing", "algorithm"),
    [  # with a large vocabulary, the loss is the peak
        ("gpt2", 2048, False, "adamw"),
        ("gpt2", 2048, True, "adamw"),
        ("gpt2", 128, True, "adamw"),
        ("llama", 128, False, "adamw"),
        ("llama", 2048, True, "adamw"),
        ("nanochat", 2048, False, "adamw"),
        ("llama", 128, True, "muon"),  # Muon's update is the peak
    ],
)
def test_memory_matches_the_peak_of_mem_tracker(family, vocab_size, checkpointing, algorithm):
    from torch.distributed._tools.mem_tracker import MemTracker

    config = config_of(family, vocab_size=vocab_size)
    model = GPT(config).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(model, Optimizer(algorithm=algorithm))
    ids = torch.randint(0, vocab_size, (BATCH, LENGTH + 1))
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        for _ in range(2):
            for _ in range(2):
                tracker.reset_mod_stats()
                model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    peak = sum(of_device["Total"] for of_device in tracker.get_tracker_snapshot("peak").values())
    options = {"batch": BATCH, "half": False, "checkpointing": checkpointing, "device": "cpu", "algorithm": algorithm}
    needed = sizing.memory(config.resolved(), "ddp", 1, 1, **options)
    assert sum(needed.values()) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("family", ["gpt2", "nanochat"])
def test_memory_of_the_chunked_loss_matches_bench(family, precision):
    config = config_of(family, vocab_size=8192, block_size=256, n_layer=1)
    recipe = load_recipe(
        None,
        {
            "batch_size": 9,
            "block_size": 256,
            "gradient_accumulation_steps": 2,
            "device": "cpu",
            "mixed_precision": precision,
        },
    )
    variant = bench.Variant(recipe, config, {"random": bench.RandomTokens(8192)}, 8191, "", {})
    variant.step()
    needed = sizing.memory(
        config.resolved(), "ddp", 1, 1, batch=9, half=precision == "bf16", checkpointing=False, device="cpu"
    )
    assert sum(needed.values()) == pytest.approx(variant.peak_memory(), rel=0.1)
    assert needed["logits"] < 2.5 * 9 * 256 * 8192 * 4


@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta represents GPUs and MPS
def test_chunks_of_the_loss_match_the_model(monkeypatch, device):
    """model.py has its own copy of the limits and of the rounding, because it must not import the package."""
    chunks = []

    def record(x, weight, targets, softcap, n_rows, needs_grad):
        chunks.append(n_rows)
        return x.new_zeros((), dtype=torch.float32)

    monkeypatch.setattr(model_file.FusedLinearCrossEntropy, "apply", record)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # not defined for meta
    limit = sizing.LARGEST_LOGITS_CPU if device == "cpu" else sizing.LARGEST_LOGITS
    for n_tokens, vocab_size in [(1024, limit // 1024), (1024, limit // 1024 + 1), (1000, limit // 128), (96, limit)]:
        config = config_of("gpt2", vocab_size=vocab_size, block_size=n_tokens, n_layer=1, n_head=1, n_embd=2)
        with torch.device("meta"):
            model = GPT(config)
        if device == "cpu":
            model.to_empty(device="cpu")
        ids = torch.zeros(1, n_tokens, dtype=torch.long, device=device)
        chunks.clear()
        model(input_ids=ids, shift_labels=ids, return_logits=False)
        expected = sizing.rows_per_chunk(n_tokens, vocab_size, "cpu" if device == "cpu" else "mps")
        assert chunks == ([] if expected == n_tokens else [expected]), (n_tokens, vocab_size)
        assert (expected == n_tokens) == (n_tokens * vocab_size <= limit)


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
@pytest.mark.parametrize("family", ["openai", "qwen3", "nanochat"])
def test_weights_gradients_and_optimizer_are_exact(family, algorithm):
    config = config_of(family)
    model = GPT(config).train()
    optimizer = make_optimizer(
        model,
        Optimizer(
            learning_rate=1e-3,
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.95,
            algorithm=algorithm,
            muon_learning_rate=0.02,
            muon_momentum=0.95,
            muon_weight_decay=0.0,
        ),
    )
    ids = torch.randint(0, 512, (BATCH, LENGTH + 1))
    model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:]).loss.backward()
    optimizer.step()
    needed = sizing.memory(
        config.resolved(), "ddp", 1, 1, batch=BATCH, half=False, checkpointing=False, algorithm=algorithm
    )
    assert needed["weights"] == sum(p.nbytes for p in model.parameters())
    assert needed["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    # without the step counts, one number per tensor
    state = [t for fields in optimizer.state.values() for t in fields.values() if t.dim()]
    assert needed["optimizer"] == sum(t.nbytes for t in state)


def test_sharding_divides_weights_gradients_and_optimizer_state():
    shape = config_of("llama", n_layer=64).resolved()
    size = {"batch": 1, "half": True, "checkpointing": False}
    n = sum(sizing.parameters(shape).values())
    alone = sizing.memory(shape, "ddp", 1, 1, **size)
    ddp = sizing.memory(shape, "ddp", 1, 8, **size)
    assert ddp["copies"] - alone["copies"] == 4 * n  # DDP's buckets
    states = {
        layout: [sizing.memory(shape, layout, 8, 8, **size)[key] for key in ("weights", "gradients", "optimizer")]
        for layout in ("fsdp2", "zero2", "zero3")
    }
    assert states["fsdp2"] == [round(4 * n / 8), round(4 * n / 8), 8 * n / 8]
    assert states["zero2"] == [2 * n, round(2 * n / 8), 8 * n / 8]
    assert states["zero3"] == [round(2 * n / 8), round(2 * n / 8), 8 * n / 8]
    for layout in states:
        needed = sizing.memory(shape, layout, 8, 8, **size)
        assert needed["activations"] == ddp["activations"] and sum(needed.values()) < sum(ddp.values())


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_muon_buckets_are_those_of_the_optimizer(activation):
    config = config_of("llama", activation=activation)
    optimizer = make_optimizer(GPT(config), Optimizer(algorithm="muon"))
    found = []
    optimizer.orthogonalize_buckets = lambda buckets: found.extend(buckets) or list
    for p in optimizer.param_groups[-1]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    wanted = {tuple(sorted(bucket[0].shape)): len(bucket) for bucket in found}
    assert {(low, high): n for low, high, n in sizing.muon_buckets(config.resolved())} == wanted


def test_muon_seconds_are_flops_and_bytes_by_hand():
    # per layer: q, k, v and c_proj of 768 x 768; two matrices of 768 x 3072
    shape = sizing.GPT2_SHAPES["gpt2"] | {"block_size": 1024}
    small, large = 5 * 6 * 768**3, 5 * (4 * 768**2 * 3072 + 2 * 768**3)
    n = 12 * 12 * 768**2
    options = {"flops_per_second": 1e12, "machine": 8, "near": 1e11, "far": 1e10}
    alone = sizing.muon_seconds(shape, "ddp", 1, 1, **options)
    assert alone == pytest.approx((48 * small + 24 * large) / 1e12)
    # on 8 GPUs, a rank has 6 small and 3 large matrices, and receives the others in bfloat16
    ddp, fsdp2 = (sizing.muon_seconds(shape, layout, 8, 8, **options) for layout in ("ddp", "fsdp2"))
    assert ddp == pytest.approx(alone / 8 + 2 * n * 7 / 8 / 1e11)
    # two all-to-alls of an eighth of all elements in bfloat16; of these, an eighth is already on the right rank
    assert fsdp2 == pytest.approx(alone / 8 + 2 * 2 * n / 8 * 7 / 8 / 1e11)
    # on 2 machines, FSDP2's shards are within one; DDP's ring uses the links of all GPUs
    assert sizing.muon_seconds(shape, "fsdp2", 8, 16, **options) == fsdp2
    # a rank has 3 small matrices and 1 or 2 large ones, so the all-gather is padded to 2
    received = 2 * 15 * (3 * 768**2 + 2 * 768 * 3072)
    ddp = sizing.muon_seconds(shape, "ddp", 1, 16, **options)
    assert ddp == pytest.approx((3 * small + 2 * large) / 1e12 + received / 8e10)


def test_exchange_seconds_of_ring_collectives():
    shape = config_of("gpt2", n_layer=10).resolved()
    n = sum(sizing.parameters(shape).values())

    def seconds(layout, shards, processes, micro_steps=1):
        return sizing.exchange_seconds(
            shape, layout, shards, processes, micro_steps=micro_steps, half=True, machine=8, near=1e10, far=1e9
        )

    assert seconds("ddp", 1, 1) == 0
    # a ring all-reduce sends the float32 gradients twice, except for a process's own share
    assert seconds("ddp", 1, 4, micro_steps=9) == pytest.approx(2 * 4 * n * 3 / 4 / 1e10)
    # eight links between machines in parallel
    assert seconds("ddp", 1, 128) == pytest.approx(2 * 4 * n * 127 / 128 / 8e9)
    # ZeRO's paper: stage 3 sends 1.5 times as much as an all-reduce, here in half precision
    assert seconds("zero3", 4, 4) == pytest.approx(1.5 * 2 * 2 * n * 3 / 4 / 1e10)
    assert seconds("zero2", 4, 4) == pytest.approx(2 * 2 * n * 3 / 4 / 1e10)  # stage 2: as much as an all-reduce
    # one machine: everything over the near link; 16 machines: an eighth of the float32 gradients over each far link,
    # for every micro-batch
    assert seconds("fsdp2", 8, 8) == pytest.approx((2 * 2 + 4) * n * 7 / 8 / 1e10)
    assert seconds("fsdp2", 8, 128) - seconds("fsdp2", 8, 8) == pytest.approx(2 * 4 * n / 8 * 15 / 16 / 1e9)
    assert seconds("fsdp2", 8, 128, micro_steps=3) == pytest.approx(3 * seconds("fsdp2", 8, 128))
