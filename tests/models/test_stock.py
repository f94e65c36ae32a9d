"""Convert configs and weights to and from stock architectures; transformers' own models give the expected logits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stock_models import LLAMA, NANOCHAT, QWEN3, STOCK, STOCK_MODELS, assert_close, gpt, logits, save_model, save_stock
from transformers import AutoModelForCausalLM

from nanogpt_accel.__main__ import main
from nanogpt_accel.model import GPT, GPTConfig
from nanogpt_accel.models.export import export
from nanogpt_accel.models.load import load_model, read_config
from nanogpt_accel.models.stock import ARCHITECTURES, nearest_architecture


@pytest.mark.parametrize("case", STOCK)
def test_gpt_to_stock_and_back_is_bitwise_equal(case):
    switches, _, _ = STOCK[case]
    model = gpt(**switches)
    export(save_model(model, "ours"), "theirs", "stock", keep_padding=True)
    back = load_model("theirs")
    assert type(back) is GPT and not back.training and all(p.requires_grad for p in back.parameters())
    before, after = dict(model.named_parameters()), dict(back.named_parameters())
    # a norm without weight becomes one with a weight of ones
    gains = after.keys() - before.keys()
    assert bool(gains) == (case in ("llama with wide heads", "gpt2 with a head"))
    assert not before.keys() - after.keys() and all((after[name] == 1).all() for name in gains)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for key in set(GPTConfig().to_dict()) - {"norm_weight", "architectures", "dtype"}:
        assert getattr(back.config, key, None) == getattr(model.config, key, None), key


@pytest.mark.parametrize("case", STOCK_MODELS)
@pytest.mark.parametrize("written", ["whole", "sharded", "bin", "bfloat16"])
def test_load_model_gives_the_logits_of_the_stock_model(ids, case, written):
    stock = save_stock(case)
    if written == "sharded":
        Path("theirs/model.safetensors").unlink()
        stock.save_pretrained("theirs", max_shard_size="10KB")
        assert len(list(Path("theirs").glob("*.safetensors"))) > 3
    elif written == "bin":
        Path("theirs/model.safetensors").unlink()
        torch.save(stock.state_dict(), "theirs/pytorch_model.bin")
    elif written == "bfloat16":
        for p in stock.parameters():
            p.data = p.data.bfloat16().float()
        stock.save_pretrained("theirs", state_dict={k: v.bfloat16() for k, v in stock.state_dict().items()})
        assert {t.dtype for t in load_file("theirs/model.safetensors").values()} == {torch.bfloat16}
    ours = load_model("theirs", dropout=0.25)
    assert type(ours) is GPT and not ours.training and ours.config.dropout == 0.25
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_close(logits(ours, ids), logits(stock, ids))
    assert (ours.config.bos_token_id, ours.config.eos_token_id) == (1, 2)


@pytest.mark.parametrize("case", STOCK_MODELS)
def test_stock_to_gpt_and_back_is_bitwise_equal(case):
    stock = save_stock(case)
    assert main(["export", "theirs", "--to=ours", "form=custom"]) == 0
    assert main(["export", "ours", "--to=back"]) == 0
    back = AutoModelForCausalLM.from_pretrained("back")
    assert type(back) is type(stock)
    before, after = stock.state_dict(), back.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("switches", "form", "obstacles"),
    [
        ({"position": "rotary"}, "gpt2", ["position=rotary"]),
        ({"norm": "rmsnorm"}, "gpt2", ["norm=rmsnorm"]),
        ({"activation": "swiglu"}, "gpt2", ["activation=swiglu"]),
        ({"qk_norm": True}, "gpt2", ["qk_norm=True"]),
        ({"embd_norm": True}, "gpt2", ["embd_norm=True"]),
        ({"logit_softcap": 15.0}, "gpt2", ["logit_softcap=15.0"]),
        ({"n_kv_head": 2}, "gpt2", ["n_kv_head=2"]),
        ({"head_dim": 12}, "gpt2", ["head_dim=12"]),
        ({"n_kv_head": 1, "logit_softcap": 15.0}, "gpt2", ["n_kv_head=1", "logit_softcap=15.0"]),
        ({**LLAMA, "position": "learned"}, "llama", ["position=learned"]),
        ({**LLAMA, "norm": "layernorm"}, "llama", ["norm=layernorm"]),
        ({**LLAMA, "logit_softcap": 30.0, "n_kv_head": 2}, "llama", ["logit_softcap=30.0"]),
        ({**LLAMA, "embd_norm": True}, "llama", ["embd_norm=True"]),
        ({**LLAMA, "activation": "gelu"}, "llama", ["activation=gelu"]),
        ({**QWEN3, "bias": True}, None, None),  # Llama lacks qk_norm, Qwen3 lacks biases
        ({**QWEN3, "logit_softcap": 15.0}, "qwen3", ["logit_softcap=15.0"]),
        ({**NANOCHAT, "norm_weight": True}, "nanochat", ["norm_weight=True"]),
        ({**NANOCHAT, "embd_norm": False}, None, None),  # nanochat, or Qwen3 except for relu2
        ({**NANOCHAT, "bias": True}, "nanochat", ["bias=True"]),
    ],
)
def test_export_names_the_switches_that_no_stock_architecture_supports(refused, ids, switches, form, obstacles):
    """The error names the unsupported settings, and no others; form=custom supports all."""
    model = gpt(**switches)
    save_model(model, "ours")
    nearest, found = nearest_architecture(read_config("ours"))
    assert (nearest, set(found)) == (form, set(obstacles)) if form else len(found) == 1
    with refused(
        ValueError,
        "ours: no stock architecture supports this model",
        ARCHITECTURES[nearest].model_class,
        *found,
        "form=custom",
        "trust_remote_code=True",
    ):
        export("ours", "theirs", "stock")
    assert not Path("theirs").exists()
    assert main(["export", "ours", "--to", "custom", "form=custom"]) == 0
    copy = AutoModelForCausalLM.from_pretrained("custom", trust_remote_code=True)
    assert torch.equal(logits(copy, ids), logits(model, ids)) and Path("custom/model.py").is_file()
    assert "trust_remote_code=True" in Path("custom/README.md").read_text()


def test_the_default_config_is_a_stock_gpt2():
    config = GPTConfig().resolved()
    assert nearest_architecture(config) == ("gpt2", [])
    for key, value in (("bias", True), ("n_inner", 100), ("norm_eps", 1e-6), ("tie_word_embeddings", False)):
        assert nearest_architecture(config | {key: value}) == ("gpt2", [])
