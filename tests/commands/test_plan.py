"""plan.py and sizing.py: against the model, counted tensors, nanoGPT's notebooks; and the page configs/SCALE.md."""

import json
import math
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from nanogpt_accel.__main__ import main
from nanogpt_accel.commands import bench, plan
from nanogpt_accel.model import GPT, GPTConfig
from nanogpt_accel.optim import make_optimizer
from nanogpt_accel.planning import sizing
from nanogpt_accel.planning.hardware import GPU_MEMORY, PEAK_FLOPS
from nanogpt_accel.planning.sizing import flops_per_token
from nanogpt_accel.recipe import Optimizer, load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
FAMILIES = {
    "gpt2": {},
    "openai": {"bias": True, "activation": "gelu_new"},
    "llama": {"norm": "rmsnorm", "position": "rotary", "activation": "swiglu", "n_kv_head": 2, "n_inner": 352},
    "qwen3": {
        "norm": "rmsnorm",
        "position": "rotary",
        "activation": "swiglu",
        "n_kv_head": 2,
        "n_inner": 352,
        "qk_norm": True,
        "head_dim": 48,
    },
    "nanochat": {
        "norm": "rmsnorm",
        "norm_weight": False,
        "position": "rotary",
        "activation": "relu2",
        "qk_norm": True,
        "embd_norm": True,
        "logit_softcap": 15,
        "tie_word_embeddings": False,
    },
    "odd": {"norm": "rmsnorm", "bias": True, "qk_norm": True, "activation": "relu2", "embd_norm": True},
}
BATCH, LENGTH = 4, 64


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing is prepared here


def planned(*words, capsys):
    """What `nanogpt-accel plan WORDS --json` prints."""
    assert main(["plan", *map(str, words), "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out)


def config_of(name, **changes):
    return GPTConfig(
        **{
            "vocab_size": 512,
            "block_size": LENGTH,
            "n_layer": 3,
            "n_head": 4,
            "n_embd": 128,
            **FAMILIES[name],
            **changes,
        }
    )


# ---- parameters


def counted_by_part(config):
    """The parameters of the real model, by part."""
    with torch.device("meta"):
        model = GPT(config)
    parts = dict.fromkeys(("embedding", "position", "attention", "mlp", "norms", "head"), 0)
    for name, parameter in model.named_parameters():  # a tied head is not named a second time
        words = name.split(".")
        part = (
            "embedding"
            if "wte" in words
            else "position"
            if "wpe" in words
            else "head"
            if "lm_head" in words
            else "norms"
            if any(word.startswith("ln_") or word.endswith("_norm") for word in words)
            else "attention"
            if "attn" in words
            else "mlp"
        )
        parts[part] += parameter.numel()
    assert sum(parts.values()) == model.num_parameters()
    return parts


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_parameters_of_every_recipe_are_exact(path, capsys):
    recipe, found = load_recipe(path), planned(path, capsys=capsys)
    init_from = recipe.model.init_from
    if init_from == "scratch":
        shape = recipe.shape
    else:  # OpenAI's, from the shapes in nanoGPT's model.py
        n_layer, n_head, n_embd = {
            "gpt2": (12, 12, 768),
            "gpt2-medium": (24, 16, 1024),
            "gpt2-large": (36, 20, 1280),
            "gpt2-xl": (48, 25, 1600),
        }[init_from]
        shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": 1024, "bias": True}
        assert found["vocab_size"] == 50257
    expected = counted_by_part(GPTConfig(**{**shape, "vocab_size": found["vocab_size"]}))
    total = found["parameters"].pop("total")
    assert found["parameters"] == expected and total == sum(expected.values())
    with torch.device("meta"):
        model = GPT(GPTConfig(**{**shape, "vocab_size": found["vocab_size"]}))
    from nanogpt_accel.train import num_matmul_params

    config = model.config
    assert found["flops_per_token"] == flops_per_token(
        num_matmul_params(model), config.n_layer, config.n_head * config.head_dim, config.block_size
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_every_family(family):
    config = config_of(family)
    assert sizing.parameters(config.to_dict()) == counted_by_part(config)


@pytest.mark.parametrize(
    ("name", "millions"), [("gpt2", 124), ("gpt2-medium", 355), ("gpt2-large", 774), ("gpt2-xl", 1558)]
)
def test_openais_sizes(name, millions):  # as OpenAI names its files
    assert sum(sizing.parameters(sizing.GPT2_SHAPES[name]).values()) / 1e6 == pytest.approx(millions, abs=0.5)


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        (["tokenizer=gpt2"], 50304),
        (["tokenizer=gpt2", "pad_vocab_to_multiple_of=1"], 50257),
        (["tokenizer=char", "corpus=shakespeare"], 128),
        (["tokenizer=bpe", "vocab_size=1000"], 1024),
    ],
)
def test_rows_of_the_vocabulary(words, rows, capsys):
    assert planned(ROOT / "recipes" / "gpt2.yaml", *words, capsys=capsys)["vocab_size"] == rows


def test_prepared_data_are_asked(tmp_path, capsys):
    Path("text.txt").write_text("abcdefghij" * 500)
    words = [
        ROOT / "recipes" / "shakespeare_char.yaml",
        "corpus=text.txt",
        "block_size=16",
        "device=cpu",
        "pad_vocab_to_multiple_of=1",
    ]
    assert planned(*words, capsys=capsys)["vocab_size"] == 256  # a guess, and named one
    assert main(["prepare", *map(str, words)]) == 0
    capsys.readouterr()
    words += ["max_iters=10", "batch_size=9", "gradient_accumulation_steps=1"]
    found = planned(*words, "mixed_precision=no", capsys=capsys)
    assert found["vocab_size"] == 10 and found["train_tokens"] == 4500 and found["assumed"] == []
    (assumed,) = planned(*words, capsys=capsys)["assumed"]  # what auto means, this processor is not asked
    assert "AMX" in assumed
    assert found["tokens"] == 1440 and found["epochs"] == pytest.approx(0.32)


def test_a_folder_of_weights_has_its_own_shape(tmp_path, capsys):
    config = config_of("llama")
    GPT(config).save_pretrained("weights")
    capsys.readouterr()
    found = planned(ROOT / "recipes" / "finetune_shakespeare.yaml", "init_from=weights", "block_size=32", capsys=capsys)
    expected = counted_by_part(config)
    assert found["parameters"] == {**expected, "total": sum(expected.values())} and found["block_size"] == 32


# ---- nanoGPT's notebooks

# transformer_sizing.ipynb: GPT-2 without biases, 50,257 rows
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
    # 3.73 % of 40 GB are weights and buffers
    needed = sizing.memory(NOTEBOOK, "ddp", 1, 1, batch=12, half=True, checkpointing=False)
    assert f"{(needed['weights'] + needed['optimizer']) / 40e9:.2%}" == "3.73%"
    # and its ckpt.pt measures within the 4 % of "fluff"
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
    assert flops_per_token(sizing.num_matmul_params(NOTEBOOK), 12, 768, 1024) * 1024 == 875_062_886_400  # PaLM's


def test_days_of_the_notebook(capsys):
    # 8 A100 at an MFU of 30 %, 300B tokens: 3.46 days by 6 N D, which leaves out attention
    found = planned(ROOT / "recipes" / "gpt2.yaml", "gpus=8", "gpu=a100", "mfu=0.3", capsys=capsys)
    six_n_d = 6 * 124_337_664 * 300e9 / (312e12 * 8 * 0.3) / 86400
    assert f"{six_n_d:.2f}" == "3.46"
    per_token = 875_062_886_400 / 1024 / (6 * 124_337_664)  # PaLM's count beside 6 N
    assert found["days"] == pytest.approx(six_n_d * per_token * found["tokens"] / 300e9, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_that_torch_counts(family):
    from torch.utils.flop_counter import FlopCounterMode

    config = config_of(family)
    model = GPT(config).eval()
    model.set_attn_implementation("eager")  # attention in full, as the notebook counts it
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, LENGTH, dtype=torch.long), use_cache=False)
    assert sum(sizing.forward_flops(config.to_dict()).values()) == counter.get_total_flops()


def test_compute_optimal_sizes():
    # scaling_laws.ipynb, approach 2: the line fitted to the table gives 2.292426e+09 tokens for 124M parameters
    assert sizing.optimal_tokens(124e6) == pytest.approx(2.292426e9, rel=1e-6)
    # approach 3: the lowest loss that a search finds
    loss = lambda n, d: 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28  # noqa: E731
    for flops in (2.21e19, 1e23):
        n, tokens = sizing.optimal_size(flops)
        sizes = 10 ** np.arange(7, 13, 1e-4)
        assert n == pytest.approx(sizes[np.argmin(loss(sizes, flops / 6 / sizes))], rel=1e-3)
        assert 6 * n * tokens == pytest.approx(flops)
    # which the notebook's coarse search puts at 316.23M and 11.65B
    n, tokens = sizing.optimal_size(2.21e19)
    assert abs(math.log10(n / 316.23e6)) <= 2**-4 and abs(math.log10(tokens / 11.65e9)) <= 2**-4


# ---- memory, tensors counted


def kept_for_backward(model, ids, autocast):
    """Bytes of all distinct tensors that a forward pass saves, parameters aside."""
    seen = {parameter.untyped_storage().data_ptr(): None for parameter in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        seen.setdefault(storage.data_ptr(), (storage.nbytes(), tensor))  # (held, so that no address comes twice)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        loss = model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:]).loss
    found = sum(entry[0] for entry in seen.values() if entry)
    assert loss.requires_grad
    return found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointing"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt2", "openai", "llama", "qwen3", "nanochat"])
def test_activations_are_those_that_torch_keeps(family, half, checkpointing):
    config = config_of(family)
    model, shape = GPT(config).train(), config.to_dict()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    autocast = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
    kept = kept_for_backward(model, torch.randint(0, 512, (BATCH, LENGTH + 1)), autocast)
    # at this place, of the logits the log-probabilities and what a soft-cap keeps; and copies in bfloat16
    kept -= BATCH * LENGTH * 512 * (4 + 4 * (family == "nanochat"))
    if half:
        blocks = 0 if checkpointing else shape["n_layer"] * sum(sizing.block_matrices(shape))
        kept -= 2 * (blocks + 512 * 128)
    assert sizing.activation_bytes(shape, BATCH, half, checkpointing, cpu=True) == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize(
    ("family", "rows", "checkpointing"),
    [  # many rows: the loss is the peak
        ("gpt2", 2048, False),
        ("gpt2", 2048, True),
        ("gpt2", 128, True),
        ("llama", 128, False),
        ("llama", 2048, True),
        ("nanochat", 2048, False),
    ],
)
def test_memory_is_the_peak_that_torch_tracks(family, rows, checkpointing):
    from torch.distributed._tools.mem_tracker import MemTracker

    config = config_of(family, vocab_size=rows)
    model = GPT(config).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(model, Optimizer(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95))
    ids = torch.randint(0, rows, (BATCH, LENGTH + 1))
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
    needed = sizing.memory(
        config.to_dict(), "ddp", 1, 1, batch=BATCH, half=False, checkpointing=checkpointing, cpu=True
    )
    assert sum(needed.values()) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("family", ["gpt2", "nanochat"])
def test_memory_is_what_bench_measures(family, precision):
    """Large logits, which come in pieces."""
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
    variant = bench.Variant(recipe, config, bench.RandomTokens(8192), 8191, "", {})
    variant.step()
    needed = sizing.memory(
        config.to_dict(), "ddp", 1, 1, batch=9, half=precision == "bf16", checkpointing=False, cpu=True
    )
    assert sum(needed.values()) == pytest.approx(variant.peak_memory(), rel=0.1)
    assert needed["logits"] < 2.5 * 9 * 256 * 8192 * 4


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointing"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "nanochat"])
def test_memory_is_the_peak_on_a_gpu(family, checkpointing):
    config = config_of(family, vocab_size=4096, block_size=512, n_layer=6, n_embd=512)
    before = torch.cuda.memory_allocated()
    model = GPT(config).train().cuda()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(model, Optimizer(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95))
    ids = torch.randint(0, 4096, (16, 513), device="cuda")
    for step in range(2):
        if step == 1:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:], return_logits=False).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    needed = sizing.memory(config.to_dict(), "ddp", 1, 1, batch=16, half=True, checkpointing=checkpointing)
    assert sum(needed.values()) == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)


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
        config.to_dict(), "ddp", 1, 1, batch=BATCH, half=False, checkpointing=False, algorithm=algorithm
    )
    assert needed["weights"] == sum(p.nbytes for p in model.parameters())
    assert needed["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    # (the count of steps aside, one number a tensor)
    state = [t for fields in optimizer.state.values() for t in fields.values() if t.dim()]
    assert needed["optimizer"] == sum(t.nbytes for t in state)


def test_a_checkpoint_on_disk_has_the_size_that_was_planned(capsys):
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 300)
    words = [
        ROOT / "recipes" / "shakespeare_char_cpu.yaml",
        "corpus=text.txt",
        "max_iters=2",
        "eval_iters=1",
        "sample_tokens=0",
        "out_dir=run",
        "warmup_iters=0",
        "lr_decay_iters=2",
    ]
    assert main(["train", *map(str, words)]) == 0
    capsys.readouterr()
    found = planned(*words, capsys=capsys)
    on_disk = sum(file.stat().st_size for file in Path("run/checkpoint-000002").rglob("*.safetensors"))
    assert on_disk == pytest.approx(found["checkpoint_bytes"], rel=0.01)  # names and shapes come on top


def test_sharding_divides():
    shape = config_of("llama", n_layer=64).to_dict()
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


def test_what_is_on_the_wire():
    shape = config_of("gpt2", n_layer=10).to_dict()
    n = sum(sizing.parameters(shape).values())

    def seconds(layout, shards, processes, micro_steps=1):
        return sizing.exchange_seconds(
            shape, layout, shards, processes, micro_steps=micro_steps, half=True, machine=8, near=1e10, far=1e9
        )

    assert seconds("ddp", 1, 1) == 0
    # a ring's all-reduce sends each byte of the float32 gradients twice, but for the own share
    assert seconds("ddp", 1, 4, micro_steps=9) == pytest.approx(2 * 4 * n * 3 / 4 / 1e10)
    # between machines by eight wires at once
    assert seconds("ddp", 1, 128) == pytest.approx(2 * 4 * n * 127 / 128 / 8e9)
    # ZeRO's paper: stage 3 sends 1.5 times what a sum for all does, here in half precision
    assert seconds("zero3", 4, 4) == pytest.approx(1.5 * 2 * 2 * n * 3 / 4 / 1e10)
    assert seconds("zero2", 4, 4) == pytest.approx(2 * 2 * n * 3 / 4 / 1e10)  # and stage 2 as much
    # in one machine all by the near wire; on 16, an eighth of the gradients by each far one
    # (the gradients in float32), for every micro-batch
    assert seconds("fsdp2", 8, 8) == pytest.approx((2 * 2 + 4) * n * 7 / 8 / 1e10)
    assert seconds("fsdp2", 8, 128) - seconds("fsdp2", 8, 8) == pytest.approx(2 * 4 * n / 8 * 15 / 16 / 1e9)
    assert seconds("fsdp2", 8, 128, micro_steps=3) == pytest.approx(3 * seconds("fsdp2", 8, 128))


def test_the_longer_one_of_computing_and_exchange_counts(capsys):
    words = ["batch_size=1", "gradient_accumulation_steps=1024"]
    near = planned(ROOT / "recipes" / "gpt2.yaml", *words, "gpus=8", capsys=capsys)
    far = planned(ROOT / "recipes" / "gpt2.yaml", *words, "gpus=1024", capsys=capsys)
    assert near["seconds_per_step"] == near["computing_seconds"] > near["exchange_seconds"]
    assert far["seconds_per_step"] == far["exchange_seconds"] > far["computing_seconds"]
    for found in (near, far):
        assert found["tokens_per_second_per_gpu"] * found["gpus"] * found["days"] * 86400 == pytest.approx(
            found["tokens"]
        )


# ---- the command


def test_it_answers_without_torch():
    script = (
        "import sys; from nanogpt_accel.__main__ import main; "
        f"assert main(['plan', {str(ROOT / 'recipes' / 'gpt2.yaml')!r}]) == 0; "
        "assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_text_says_what_json_says(capsys):
    words = ["plan", str(ROOT / "recipes" / "gpt2.yaml"), "gpus=8", "gpu=A100", "mfu=0.37"]
    assert main(words) == 0
    text = capsys.readouterr().out
    for part in (
        "124,373,760",
        "491,520 tokens",
        "294,912,000,000 tokens",
        "32.64 epochs",
        "1.49 GB",
        "8 x A100",
        "configs/multi_gpu.yaml",
        "configs/fsdp2.yaml",
        "ZeRO-3",
        "nanoGPT's count",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("words", "config"),
    [
        (["gpus=1"], "single_gpu.yaml"),
        (["gpus=8"], "multi_gpu.yaml"),
        (["gpus=40"], "multi_node.yaml"),
        (["device=cpu"], "cpu.yaml"),
        (["gpus=8", "gpu_memory=8"], "fsdp2.yaml"),  # 7.5 GiB by DDP, 5.6 sharded, of which 7.2 are free
        (["gpus=40", "gpu_memory=8"], "fsdp2_multi_node.yaml"),
        (["gpus=8", "gpu_memory=7.5", "algorithm=muon"], None),  # is not sharded
    ],
)
def test_the_config_that_fits(words, config, capsys):
    assert planned(ROOT / "recipes" / "gpt2.yaml", *words, capsys=capsys)["config"] == config


@pytest.mark.parametrize(
    "words",
    [
        ["gpu_memory=6"],
        ["gpu_memory=4"],
        ["gpus=8", "gpu_memory=5"],
        ["n_layer=48", "n_head=25", "n_embd=1600", "gpu=a40"],
        ["gpus=8", "gpu_memory=2", "activation_checkpointing=true"],
    ],
)
def test_the_remedy_fits(words, capsys):
    recipe = ROOT / "recipes" / "gpt2.yaml"
    found = planned(recipe, *words, capsys=capsys)
    assert found["config"] is None
    settings = [word for word in found["remedy"].split() if "=" in word]
    mended = planned(recipe, *words, *settings, capsys=capsys)
    assert mended["config"] is not None and mended["tokens_per_step"] == found["tokens_per_step"]


def test_where_nothing_helps(capsys):
    found = planned(ROOT / "recipes" / "gpt2.yaml", "gpu_memory=1", capsys=capsys)
    assert found["config"] is None and found["remedy"].startswith("more gpus")


def test_an_evaluation_needs_no_gradients(capsys):
    found = planned(ROOT / "recipes" / "eval_gpt2_xl.yaml", "gpu=l4", capsys=capsys)
    needed = found["memory"]["ddp"]
    assert needed["gradients"] == needed["optimizer"] == found["tokens"] == 0
    assert found["config"] == "single_gpu.yaml"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["gpu=h1000"], ["gpu=h1000", "did you mean h100"]),
        (["gpus=7"], ["gradient_accumulation_steps=40", "gpus=7", "35 or 42"]),
        (["gpus=20"], ["gpus=20", "gpus_per_node=8"]),
        (["mfu=40"], ["mfu=40"]),
        (["gpus=0"], ["gpus=0"]),
        (["init_from=someone/model"], ["init_from=someone/model", "n_layer"]),
        (["gpuz=8"], ["gpuz"]),
    ],
)
def test_mistakes_get_one_line(words, parts, capsys):
    assert main(["plan", str(ROOT / "recipes" / "gpt2.yaml"), *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert [part for part in parts if part not in printed.err] == [], printed.err


def test_no_target(capsys):
    assert main(["plan"]) == 2
    assert "RECIPE.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "config"),
    [
        (["device=cpu"], "cpu.yaml"),
        (["device=cpu", "gpus=2"], "cpu_2proc.yaml"),
        (["device=cpu", "gpus=4"], "cpu_2proc.yaml --num_processes 4"),
        (["device=mps"], "mps.yaml"),
    ],
)
def test_a_launch_without_a_gpu(words, config, capsys):
    assert main(["plan", str(ROOT / "recipes" / "gpt2.yaml"), *words]) == 0
    printed = capsys.readouterr().out
    assert f"launch with configs/{config}\n" in printed
    assert (ROOT / "configs" / config.split()[0]).is_file()


@pytest.mark.parametrize("typed", ["rtx4090", "RTX 4090", "rtx_4090", "rtx-4090"])
def test_a_gpu_as_people_type_it(typed, capsys):
    assert planned(ROOT / "recipes" / "gpt2.yaml", f"gpu={typed}", capsys=capsys)["gpu"] == "RTX 4090"


def test_a_run_folder_is_its_recipe(capsys):
    Path("runs/mine").mkdir(parents=True)
    recipe = load_recipe(ROOT / "recipes" / "shakespeare_char_cpu.yaml", {"n_layer": 3, "out_dir": "runs/mine"})
    Path("runs/mine/run.yaml").write_text(recipe.to_yaml())
    assert load_recipe("runs/mine") == recipe
    one, other = (planned(target, capsys=capsys) for target in ("runs/mine", "runs/mine/run.yaml"))
    assert one["parameters"] == other["parameters"]


@pytest.mark.parametrize("command", ["plan", "prepare", "train"])
def test_a_launch_configuration_is_no_recipe(command, capsys):
    path = str(ROOT / "configs" / "fsdp2.yaml")
    assert main([command, path]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: this is a launch configuration" in line and f"accelerate launch --config_file {path}" in line


def test_the_memory_of_small_models_is_told_in_mib(capsys):
    words = [str(ROOT / "recipes" / "shakespeare_char_cpu.yaml")]
    needed = planned(*words, capsys=capsys)["memory"]["ddp"]
    assert main(["plan", *words]) == 0
    rows = capsys.readouterr().out.splitlines()
    at = next(i for i, row in enumerate(rows) if row.startswith("MiB"))
    figures = dict(zip(rows[at].split()[1:], map(float, rows[at + 1].split()[2:]), strict=True))
    assert figures == {key: pytest.approx(needed[key] / 2**20, abs=0.006) for key in figures} and figures["weights"] > 1


def test_every_gpu_with_a_peak_has_a_memory():
    assert GPU_MEMORY.keys() == PEAK_FLOPS.keys()


# ---- the page


def scale_rows(capsys):
    """The table of configs/SCALE.md, from the commands that stand below it."""
    page = (ROOT / "configs" / "SCALE.md").read_text(encoding="utf-8")
    for line in page.splitlines():
        if not line.startswith("nanogpt-accel plan "):
            continue
        _, _, recipe, *words = shlex.split(line)
        found = planned(ROOT / recipe, *words, capsys=capsys)
        layout = found["fitting"][0]
        speed = found["tokens_per_second_per_gpu"]
        cells = (
            plan.short(found["parameters"]["total"]),
            f"{found['gpus']:,}",
            found["config"],
            f"{found['batch_size']} x {found['block_size']:,}",
            f"{found['tokens_per_step']:,}",
            f"{found['memory'][layout]['total'] / plan.GIB:.1f}",
            f"{found['computing_seconds']:.3g}",
            f"{found['exchange_seconds']:.2g}",
            f"{speed:,.0f}",
            plan.short(speed * found["gpus"]),
            f"{found['days']:,.3g}",
            f"{found['checkpoint_bytes'] / 1e9:.3g} GB",
        )
        yield "| " + " | ".join(cells) + " |"


def test_the_table_of_the_page_is_what_plan_computes(capsys):
    page = (ROOT / "configs" / "SCALE.md").read_text(encoding="utf-8")
    rows = list(scale_rows(capsys))
    assert len(rows) == 9
    table = page.split("| --- |", 1)[1].split("\n\n")[0].splitlines()[1:]
    assert table == rows, "put these rows there:\n" + "\n".join(rows)
