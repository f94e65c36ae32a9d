"""`import` of nanoGPT's ckpt.pt; nanoGPT's forward pass, written out below, gives the expected logits."""

import json
import os
import pickle
from importlib import import_module
from pathlib import Path

import pytest
import torch
from stock_models import CHARS, T_MAX, Evil, N, assert_close, logits
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from nanogpt_accel.__main__ import main
from nanogpt_accel.data.tokenizer import Tokenizer
from nanogpt_accel.model import GPT
from nanogpt_accel.models.nanogpt import read_nanogpt

find_tokenizer = import_module("nanogpt_accel.commands.import_nanogpt").find_tokenizer  # (`import` is a keyword)


NANOGPT = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": T_MAX, "vocab_size": N - 1, "dropout": 0.1}


def nanogpt(bias=True):
    """The state dict of a nanoGPT model: the head is tied to the embedding, and the dict contains both."""
    generator = torch.Generator().manual_seed(6)
    C, weights = 32, {}

    def add(name, *shape):
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) * 0.3 + (len(shape) == 1)
        if bias and not name.endswith(("wte", "wpe")):
            weights[f"{name}.bias"] = torch.randn(shape[:1], generator=generator) * 0.3

    add("transformer.wte", N - 1, C)
    add("transformer.wpe", T_MAX, C)
    for i in range(2):
        h = f"transformer.h.{i}"
        for name, shape in (
            ("ln_1", [C]),
            ("attn.c_attn", [3 * C, C]),
            ("attn.c_proj", [C, C]),
            ("ln_2", [C]),
            ("mlp.c_fc", [4 * C, C]),
            ("mlp.c_proj", [C, 4 * C]),
        ):
            add(f"{h}.{name}", *shape)
    add("transformer.ln_f", C)
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights


def nanogpt_logits(w, ids, gelu=F.gelu):
    """The forward pass of nanoGPT's model.py."""

    def norm(x, name):
        return F.layer_norm(x, (32,), w[f"{name}.weight"], w.get(f"{name}.bias"), 1e-5)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    T = ids.shape[1]
    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:T]
    for i in range(2):
        h = f"transformer.h.{i}"
        q, k, v = (
            y.view(-1, T, 4, 8).transpose(1, 2)
            for y in linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(32, dim=2)
        )
        att = (q @ k.transpose(-2, -1) / 8**0.5).masked_fill(torch.ones(T, T).tril() == 0, -torch.inf).softmax(-1)
        x = x + linear((att @ v).transpose(1, 2).reshape(-1, T, 32), f"{h}.attn.c_proj")
        x = x + linear(gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")), f"{h}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


def write_ckpt(path, weights, **model_args):
    """Write a checkpoint as nanoGPT's train.py does."""
    some = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(some.parameters())
    some(torch.ones(2)).sum().backward()
    optimizer.step()
    torch.save(
        {
            "model": weights,
            "optimizer": optimizer.state_dict(),
            "model_args": NANOGPT | model_args,
            "iter_num": 2000,
            "best_val_loss": torch.tensor(1.4697),
            "config": {"dataset": "shakespeare_char", "batch_size": 12, "compile": True, "device": "cpu"},
        },
        path,
    )


def write_meta(path, characters=CHARS):
    stoi = {c: i for i, c in enumerate(characters)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps({"vocab_size": len(stoi), "stoi": stoi, "itos": {i: c for c, i in stoi.items()}}))
    return path


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("version", ["plain", "compiled", "ddp and compiled", "old", "half"])
def test_read_nanogpt_gives_the_logits_of_nanogpt(ids, bias, version):
    weights = nanogpt(bias)
    kept, prefix, args = weights, "", {"bias": bias}
    if version == "old":  # the causal mask was in the state dict before flash attention
        mask = torch.ones(T_MAX, T_MAX).tril().view(1, 1, T_MAX, T_MAX)
        kept = weights | {f"transformer.h.{i}.attn.bias": mask for i in range(2)}
        args = args if not bias else {}  # the option did not exist yet
    elif version == "half":
        kept = {name: tensor.half() for name, tensor in weights.items()}
        weights = {name: tensor.float() for name, tensor in kept.items()}
    elif version != "plain":
        prefix = "_orig_mod." if version == "compiled" else "module._orig_mod."
    write_ckpt("ckpt.pt", {prefix + name: tensor for name, tensor in kept.items()}, **args)
    model, info = read_nanogpt("ckpt.pt")
    ids = ids.clamp(max=N - 2)
    assert type(model) is GPT and not model.training and model.config.bias is bias and model.config.dropout == 0.1
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_close(logits(model, ids), nanogpt_logits(weights, ids))
    assert info["iter_num"] == 2000 and info["config"]["dataset"] == "shakespeare_char"
    assert float(info["best_val_loss"]) == pytest.approx(1.4697)


def test_checkpoints_before_may_2023_use_gelu_new(ids):
    write_ckpt("ckpt.pt", nanogpt(), bias=True)
    meta = write_meta(Path("meta.pkl"))
    ids = ids.clamp(max=N - 2)
    wanted = nanogpt_logits(nanogpt(), ids, gelu=lambda x: F.gelu(x, approximate="tanh"))
    assert (wanted - nanogpt_logits(nanogpt(), ids)).abs().max() > 1e-4
    assert_close(logits(read_nanogpt("ckpt.pt", "gelu_new")[0], ids), wanted)
    assert main(["import", "ckpt.pt", "--to=imported", f"tokenizer={meta}", "activation=gelu_new"]) == 0
    assert_close(logits(AutoModelForCausalLM.from_pretrained("imported"), ids), wanted)


@pytest.mark.parametrize("bias", [True, False])
def test_import_writes_a_model_folder_with_the_logits_of_nanogpt(capsys, ids, bias):
    weights, ids = nanogpt(bias), ids.clamp(max=N - 2)
    write_meta(Path("data/shakespeare_char/meta.pkl"))
    Path("out").mkdir()
    write_ckpt("out/ckpt.pt", weights, bias=bias)
    assert main(["import", "out/ckpt.pt", "--to", "imported"]) == 0
    out = capsys.readouterr().out
    count = sum(tensor.numel() for name, tensor in weights.items() if name != "lm_head.weight")
    assert all(word in out for word in (f"{count:,} parameters", "char tokenizer", "2000 steps", "1.4697"))
    wanted = nanogpt_logits(weights, ids)
    assert_close(logits(AutoModelForCausalLM.from_pretrained("imported"), ids), wanted)
    assert Tokenizer.load("imported").encode("To be").tolist() == [CHARS.index(c) for c in "To be"]
    assert main(["sample", "imported", "prompt=To be", "num_samples=1", "max_new_tokens=5", "temperature=0"]) == 0
    text = capsys.readouterr().out
    prompt = [CHARS.index(c) for c in "To be"]
    for _ in range(5):
        prompt.append(nanogpt_logits(weights, torch.tensor([prompt]))[0, -1].argmax().item())
    assert text == "".join(CHARS[i] for i in prompt) + "\n---------------\n"
    # the imported model can be exported
    assert main(["export", "imported", "--to", "stock"]) == 0
    assert_close(logits(GPT2LMHeadModel.from_pretrained("stock").eval(), ids), wanted)


@pytest.mark.parametrize("n_unused", [0, 2])
def test_import_uses_the_first_unused_embedding_for_padding(n_unused):
    write_meta(Path("data/shakespeare_char/meta.pkl"), CHARS[: N - 1 - n_unused])
    Path("out").mkdir()
    write_ckpt("out/ckpt.pt", nanogpt())
    assert main(["import", "out/ckpt.pt", "--to", "imported"]) == 0
    pad_id = N - 1 - n_unused if n_unused else None
    config = json.loads(Path("imported/config.json").read_text())
    assert (config["vocab_size"], config["pad_token_id"]) == (N - 1, pad_id)
    assert AutoTokenizer.from_pretrained("imported").pad_token_id == pad_id
    assert Tokenizer.load("imported").vocab_size == N - 1 - n_unused


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("place", ["config", "model", "whole"])
def test_a_hostile_checkpoint_is_refused_and_not_executed(capsys, form, place):
    content = {"model": nanogpt(), "model_args": NANOGPT, "config": {}}
    content = Evil() if place == "whole" else content | {place: {"x": Evil()}}
    if form == "bare":
        Path("ckpt.pt").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, "ckpt.pt", _use_new_zipfile_serialization=form == "zip")
    assert main(["import", "ckpt.pt", "--to", "imported"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ckpt.pt: ") and ("refused" in line) == (form == "zip")
    assert not Path("hacked").exists() and not Path("imported").exists()
    # the file does contain code: an unsafe reader executes it
    if form == "bare":
        pickle.loads(Path("ckpt.pt").read_bytes())
    else:
        torch.load("ckpt.pt", weights_only=False)
    assert Path("hacked").exists()


def without(name):
    return {key: tensor for key, tensor in nanogpt().items() if key != name}


def truncated(length):
    write_ckpt("ckpt.pt", nanogpt())
    os.truncate("ckpt.pt", length)


FIT = "the weights do not match model_args"
NO_CKPT = "not a checkpoint of nanoGPT's train.py"


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda: Path("ckpt.pt").write_text("no checkpoint"), "not a file written by torch.save, or corrupted"),
        (lambda: Path("ckpt.pt").write_bytes(b""), "not a file written by torch.save, or corrupted"),
        (lambda: truncated(100), "not a file written by torch.save, or corrupted"),
        *(
            (
                lambda config=config: torch.save(
                    {"model": nanogpt(), "model_args": NANOGPT, "config": config}, "ckpt.pt"
                ),
                "ckpt.pt: the tokenizer of this model (vocabulary size 63) is unknown",
            )
            for config in ("x", {"dataset": 3})
        ),
        (lambda: truncated(20_000), "not a file written by torch.save, or corrupted"),
        (lambda: torch.save({"model_state": {}}, "ckpt.pt"), NO_CKPT),
        (lambda: torch.save(nanogpt(), "ckpt.pt"), NO_CKPT),
        (lambda: torch.save(torch.zeros(3), "ckpt.pt"), NO_CKPT),
        (lambda: torch.save([1, 2], "ckpt.pt"), NO_CKPT),
        (lambda: write_ckpt("ckpt.pt", nanogpt(), n_layer=3), FIT),
        (lambda: write_ckpt("ckpt.pt", nanogpt(), n_layer=1), FIT),
        (lambda: write_ckpt("ckpt.pt", nanogpt(), block_size=2 * T_MAX), FIT),
        (lambda: write_ckpt("ckpt.pt", nanogpt(), n_head=5), FIT),
        (lambda: write_ckpt("ckpt.pt", nanogpt(), n_embd="wide"), FIT),
        (lambda: write_ckpt("ckpt.pt", nanogpt(), bias=False), FIT),
        (lambda: write_ckpt("ckpt.pt", nanogpt(bias=False), bias=True), FIT),
        (lambda: write_ckpt("ckpt.pt", without("transformer.ln_f.weight")), FIT),
        (lambda: write_ckpt("ckpt.pt", without("transformer.wte.weight")), FIT),
        (lambda: write_ckpt("ckpt.pt", {}), FIT),
        (lambda: write_ckpt("ckpt.pt", [1, 2]), FIT),
        (lambda: write_ckpt("ckpt.pt", nanogpt() | {"transformer.wte.weight": 3}), FIT),
        (lambda: torch.save({"model": nanogpt(), "model_args": "small"}, "ckpt.pt"), FIT),
    ],
)
def test_a_file_that_is_not_a_nanogpt_checkpoint_is_refused(capsys, write, words):
    write()
    assert main(["import", "ckpt.pt", "--to", "imported"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ckpt.pt: ") and words in line and len(line) < 400
    assert not Path("imported").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["CKPT.pt is missing", "--to is missing"]),
        (["nowhere.pt", "to=x"], ["nowhere.pt: no such file"]),
        (["full", "to=x"], ["full: no such file"]),
        (["ckpt.pt", "to=full"], ["to=full: the folder is not empty"]),
        (["ckpt.pt", "to=ckpt.pt"], ["to=ckpt.pt: ckpt.pt is a file"]),
        (["ckpt.pt", "to=x", "activation=relu"], ["activation=relu: must be 'gelu' or 'gelu_new'"]),
        (["ckpt.pt", "to=x", "tokeniser=gpt2"], ["unknown key tokeniser (did you mean tokenizer?)"]),
    ],
)
def test_import_reports_every_wrong_option(capsys, argv, words):
    Path("full").mkdir()
    Path("full/file").touch()
    Path("ckpt.pt").touch()
    assert main(["import", *argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True))
    assert not Path("x").exists() and os.listdir("full") == ["file"]


def test_absurd_values_in_a_checkpoint_are_refused_quickly(capsys, refused):
    write_ckpt("ckpt.pt", nanogpt(), n_layer=10**7)
    assert main(["import", "ckpt.pt", "to=out"]) == 2
    assert "n_layer=10000000" in capsys.readouterr().err
    with refused(ValueError, "vocabulary size 64"):
        find_tokenizer("auto", Path("/ckpt.pt"), "x" * 5000, 64)


def test_other_commands_point_to_import_for_a_nanogpt_checkpoint(capsys):
    Path("out").mkdir()
    write_ckpt("out/ckpt.pt", nanogpt())
    for argv in (
        ["sample", "out/ckpt.pt"],
        ["sample", "out"],
        ["export", "out", "to=x"],
        ["evaluate", "out", "corpus=python"],
    ):
        assert main(argv) == 2
        assert "nanogpt-accel import out/ckpt.pt --to FOLDER" in capsys.readouterr().err


def test_find_tokenizer_takes_meta_pkl_next_to_the_checkpoint_or_the_given_one(refused):
    Path("out").mkdir()
    ckpt = Path("out/ckpt.pt")
    with refused(ValueError, "out/ckpt.pt", "vocabulary size 64", "data/shakespeare_char/meta.pkl", "set tokenizer to"):
        find_tokenizer("auto", ckpt, "shakespeare_char", 64)
    write_meta(Path("data/shakespeare_char/meta.pkl"), "cab")
    assert find_tokenizer("auto", ckpt, "shakespeare_char", 64).encode("abc").tolist() == [1, 2, 0]
    other = write_meta(Path("elsewhere/meta.pkl"), "bac")
    assert find_tokenizer(str(other), ckpt, "shakespeare_char", 64).encode("abc").tolist() == [1, 0, 2]
    Tokenizer.char(["abc"]).save("elsewhere")
    assert find_tokenizer("elsewhere", ckpt, "shakespeare_char", 3).encode("cab").tolist() == [2, 0, 1]
    for asked in (str(other), "elsewhere"):
        with refused(
            ValueError,
            f"tokenizer={asked}: has 3 tokens",
            "out/ckpt.pt only has 2; set tokenizer to the one that the model was trained with",
        ):
            find_tokenizer(asked, ckpt, "", 2)
    with refused(ValueError, "tokenizer=no/meta.pkl: no such file"):
        find_tokenizer("no/meta.pkl", ckpt, "", 64)
    with refused(FileNotFoundError, "out/tokenizer.json"):
        find_tokenizer("out", ckpt, "", 64)
    Path("evil.pkl").write_bytes(pickle.dumps({"stoi": Evil()}))
    with refused(ValueError, "evil.pkl"):
        find_tokenizer("evil.pkl", ckpt, "", 64)
    assert not Path("hacked").exists()


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_find_tokenizer_recognizes_gpt2_by_its_vocabulary_size(gpt2_files, refused, vocab_size):
    assert find_tokenizer("auto", Path("out/ckpt.pt"), "openwebtext", vocab_size).kind == "gpt2"
    with refused(ValueError, "tokenizer=gpt2: has 50,257 tokens, but out/ckpt.pt only has 64"):
        find_tokenizer("gpt2", Path("out/ckpt.pt"), "openwebtext", 64)
