"""`export` to a GGUF file: read by the gguf package, by transformers' own GGUF loader, and by llama.cpp (slow)."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from stock_models import CHARS, LLAMA, NANOCHAT, QWEN3, assert_close, gpt, logits, save_model
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanogpt_accel.__main__ import main
from nanogpt_accel.data.tokenizer import Tokenizer
from nanogpt_accel.model import GPT, GPTConfig
from nanogpt_accel.models.export import export_gguf
from nanogpt_accel.models.load import fit_to_tokenizer

gguf = pytest.importorskip("gguf", reason="pip install gguf")

TEXT = "the first one, and the second one, and the third: 'twas 1, 22 and\n\n  333\n" * 9
# transformers' GGUF loader does not read n_inner, block_size and head_dim, so these shapes have its defaults
SHAPES = {
    "gpt2": {"block_size": 1024, "n_inner": None},
    "gpt2 with biases": {"block_size": 1024, "n_inner": None, "bias": True, "activation": "gelu_new"},
    "gpt2 without norm weights": {"block_size": 1024, "n_inner": None, "norm_weight": False, "activation": "gelu_new"},
    "llama": {**LLAMA, "n_kv_head": 2},
    "llama with a head": {**LLAMA, "tie_word_embeddings": False, "norm_weight": False},
    "qwen3": {**QWEN3, "n_kv_head": 1, "head_dim": 128},
}


def bpe():
    return Tokenizer.train_bpe([TEXT], 280)


def save(folder="ours", tokenizer=None, **switches):
    """Save a random model with 40 rows of padding."""
    tokenizer = tokenizer or bpe()
    model = gpt(**{"vocab_size": tokenizer.vocab_size + 40, "n_embd": 64, "eos_token_id": None, **switches})
    save_model(model, folder, tokenizer)
    return model


def fields(path):
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


@pytest.mark.parametrize("kind", ["bpe", "char"])
@pytest.mark.parametrize("case", SHAPES)
def test_transformers_computes_the_same_logits_from_the_file(capsys, ids, case, kind):
    tokenizer = bpe() if kind == "bpe" else Tokenizer.char([CHARS])
    model = save(tokenizer=tokenizer, **SHAPES[case])
    assert main(["export", "ours", "to=out/my.gguf"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"out/my.gguf: llama.cpp's {case.split()[0]}, largest logit difference from ours over ")
    is_gelu = model.config.activation == "gelu"
    assert ("tanh approximation" in out) == is_gelu and (": 0.0e+00" in out) != is_gelu
    theirs = AutoModelForCausalLM.from_pretrained("out", gguf_file="my.gguf").eval()
    if is_gelu:
        for block in model.transformer.h:
            block.mlp.act = lambda x: F.gelu(x, approximate="tanh")
    ids = ids.clamp(max=tokenizer.vocab_size - 1)
    assert_close(logits(theirs, ids), logits(model, ids)[..., : tokenizer.vocab_size])
    if kind == "bpe":
        tokens = AutoTokenizer.from_pretrained("out", gguf_file="my.gguf")(TEXT)["input_ids"]
        assert tokens == tokenizer.encode(TEXT).tolist()


def test_metadata_of_a_file():
    tokenizer = bpe()
    save(**LLAMA, n_kv_head=2, head_dim=24, block_size=48)
    assert export_gguf("ours", "my.gguf", report=str)[0] == "llama.cpp's llama"
    found, tensors = fields("my.gguf")
    expected = {
        "general.architecture": "llama",
        "llama.context_length": 48,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 56,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 24,
        "llama.attention.value_length": 24,
        "llama.rope.dimension_count": 24,
        "llama.vocab_size": tokenizer.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": tokenizer.eot_id,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["llama.rope.freq_base"] == 700 and found["llama.attention.layer_norm_rms_epsilon"] == np.float32(2e-3)
    assert [tokenizer.vocab[token] for token in found["tokenizer.ggml.tokens"]] == list(range(tokenizer.vocab_size))
    kinds = gguf.TokenType
    assert found["tokenizer.ggml.token_type"] == [kinds.NORMAL] * (tokenizer.vocab_size - 1) + [kinds.CONTROL]
    assert "output.weight" not in tensors and {t.tensor_type.name for t in tensors.values()} == {"F32"}


def test_padding_of_the_vocabulary_is_kept_as_unused_tokens():
    tokenizer = bpe()
    save(**LLAMA)
    assert main(["export", "ours", "to=my.gguf", "vocab=keep"]) == 0
    found, tensors = fields("my.gguf")
    assert found["tokenizer.ggml.token_type"][tokenizer.vocab_size :] == [gguf.TokenType.UNUSED] * 40
    assert len(set(found["tokenizer.ggml.tokens"])) == tokenizer.vocab_size + 40
    assert tensors["token_embd.weight"].shape.tolist() == [64, tokenizer.vocab_size + 40]


def test_characters_are_the_vocabulary_of_a_longest_match():
    tokenizer = Tokenizer.char(["ab\\\n", "b a"])  # two documents, so there is an end-of-text token
    save(tokenizer=tokenizer, **LLAMA)
    assert main(["export", "ours", "to=my.gguf"]) == 0
    found, _ = fields("my.gguf")
    assert found["tokenizer.ggml.tokens"] == ["\n", " ", r"\\", "a", "b", "<|endoftext|>"]
    assert found["tokenizer.ggml.model"] == "rwkv" and found["tokenizer.ggml.eos_token_id"] == 5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_dtypes_round_the_matrices_and_nothing_else(dtype):
    model = save(bias=True, activation="gelu_new", n_inner=48)
    _, difference, _, _ = export_gguf("ours", "my.gguf", dtype=dtype, report=str)
    found, tensors = fields("my.gguf")
    kind = {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert 0 < difference < {"float16": 0.05, "bfloat16": 0.5, "q8_0": 1}[dtype]
    assert found["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind}"]
    for name, ours in {
        "token_embd.weight": model.transformer.wte.weight[:-40],
        "position_embd.weight": model.transformer.wpe.weight,
        "blk.1.attn_qkv.weight": model.transformer.h[1].attn.c_attn.weight,
        "blk.1.attn_qkv.bias": model.transformer.h[1].attn.c_attn.bias,
        "blk.0.ffn_down.weight": model.transformer.h[0].mlp.c_proj.weight,  # rows of 48, not a multiple of 32
        "output_norm.weight": model.transformer.ln_f.weight,
    }.items():
        theirs, ours = tensors[name], ours.detach().numpy()
        is_float32 = ours.ndim == 1 or name == "position_embd.weight"
        wanted = "F32" if is_float32 else "F16" if dtype == "q8_0" and ours.shape[1] % 32 else kind
        assert theirs.tensor_type.name == wanted, name
        # the largest rounding error relative to the largest weight
        limit = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 225}[wanted]
        error = np.abs(gguf.dequantize(theirs.data, theirs.tensor_type) - ours).max()
        assert error <= limit * np.abs(ours).max(), name


def words_tokenizer():
    backend = Backend(models.BPE({"a": 0, "b": 1, "<|endoftext|>": 2}, []))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(backend.to_str())


@pytest.mark.parametrize(
    ("switches", "tokenizer", "words"),
    [
        (NANOCHAT, bpe, ["activation=relu2", "embd_norm=True"]),
        ({"activation": "relu2"}, bpe, ["closest architecture: gpt2", "support activation=relu2;"]),
        ({**LLAMA, "logit_softcap": 3.0}, bpe, ["closest architecture: llama", "support logit_softcap=3.0;"]),
        ({}, lambda: Tokenizer.char(["é a"]), ["characters other than ASCII"]),
        ({}, words_tokenizer, ["a tokenizer that is neither a character tokenizer nor a byte-level BPE"]),
    ],
)
def test_what_llama_cpp_does_not_support_is_named_in_one_line(call, switches, tokenizer, words):
    save(tokenizer=tokenizer(), **switches)
    error = call("export", "ours", "to=out/my.gguf", status=2)
    assert error.count("error: ") == 1 and [word for word in words if word not in error] == []
    assert not Path("out").exists()


def test_a_failed_export_leaves_nothing(call, monkeypatch):
    save(**LLAMA)

    def fail(writer):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    error = call("export", "ours", "to=out/my.gguf", status=2)
    assert "out/my.gguf: cannot be written: [Errno 28] No space left on device; check the disk space" in error
    assert os.listdir() == ["ours"]


def test_weights_that_float16_cannot_represent_are_an_error(call):
    model = gpt(**LLAMA)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight[0, 0] = 1e5
    save_model(model, "ours")
    assert "too large for the chosen dtype" in call("export", "ours", "to=my.gguf", "dtype=float16", status=2)
    assert os.listdir() == ["ours"]


# ---- llama.cpp


def trained(tokenizer, switches):
    """Return a model that has learned TEXT, so that rounding does not change its greedy text."""
    torch.manual_seed(0)
    shape = {"vocab_size": tokenizer.vocab_size, "block_size": 128, "n_layer": 2, "n_head": 4, "n_embd": 64}
    model = GPT(GPTConfig(**shape | switches))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1 * (p.dim() == 1))  # so that biases and norms change the logits
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.from_numpy(tokenizer.encode(TEXT).astype(np.int64))
    for step in range(200):
        starts = torch.randint(len(ids) - 64, (8,), generator=torch.Generator().manual_seed(step)).tolist()
        batch = torch.stack([ids[start : start + 64] for start in starts])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    fit_to_tokenizer(model, tokenizer)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bpe", "char"])
@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"bias": True, "activation": "gelu_new", "n_inner": 96},
        {"tie_word_embeddings": False},
        {**LLAMA, "n_kv_head": 2},
        {**LLAMA, "n_kv_head": 2, "bias": True, "tie_word_embeddings": False, "head_dim": 24},
        {**QWEN3, "n_kv_head": 2, "head_dim": 32},
    ],
    ids=["gpt2", "gpt2-biases", "gpt2-head", "llama", "llama-biases", "qwen3"],
)
def test_llama_cpp_agrees(switches, kind):
    xllamacpp = pytest.importorskip("xllamacpp", reason="pip install xllamacpp (llama.cpp as a wheel)")
    tokenizer = bpe() if kind == "bpe" else Tokenizer.char([TEXT])
    model = trained(tokenizer, switches)
    save_model(model, "ours", tokenizer)
    prompt = "the first one, and\n\n the"
    ids = torch.tensor([tokenizer.encode_prompt(prompt)])
    expected = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    expected_logprobs = logits(model, ids)[0, -1].log_softmax(-1)
    for dtype in ("float32", "q8_0"):
        assert main(["export", "ours", f"to={dtype}.gguf", f"dtype={dtype}"]) == 0
        params = xllamacpp.CommonParams()
        params.model.path = f"{dtype}.gguf"
        params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.warmup = 128, 1, 1, False
        # by default, llama.cpp's flash attention and KV cache use float16
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        engine, n = xllamacpp.Server(params), tokenizer.vocab_size
        options = {"temperature": 0, "n_probs": n, "cache_prompt": False}
        answer = engine.handle_completions({"prompt": prompt, "n_predict": 40, **options})
        assert answer["usage"]["prompt_tokens"] == ids.shape[1]
        assert answer["choices"][0]["text"] == tokenizer.decode(expected)
        first = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = torch.empty(n).scatter_(
            0, torch.tensor([entry["id"] for entry in first]), torch.tensor([entry["logprob"] for entry in first])
        )
        # llama.cpp computes GELU by a table in float16
        tolerance = 0.15 if dtype == "q8_0" else 1e-4 if switches.get("position") else 1e-2
        torch.testing.assert_close(found, expected_logprobs, rtol=0, atol=tolerance)
        del engine
