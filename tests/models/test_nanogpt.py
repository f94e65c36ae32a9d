"""`import` and `export` of nanoGPT's ckpt.pt; nanoGPT's forward pass, written out below, gives the expected logits."""

import json
import os
import pickle
from importlib import import_module
from pathlib import Path

import pytest
import torch
from stock_models import CHARS, T_MAX, Evil, N, assert_close, gpt, logits, save_model
from tiny_run import TOKENIZER, TinyRun, make_adamw
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from nanogpt_accel.__main__ import main
from nanogpt_accel.data.tokenizer import Tokenizer
from nanogpt_accel.model import GPT, GPTConfig
from nanogpt_accel.models.export import export_nanogpt
from nanogpt_accel.models.nanogpt import read_nanogpt
from nanogpt_accel.recipe import Recipe

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
        (lambda: torch.save({"transformer.h.0.attn.c_q.weight": torch.zeros(3)}, "ckpt.pt"), "nanochat"),
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


def test_find_tokenizer_takes_meta_pkl_next_to_the_checkpoint_or_the_given_one(refused, monkeypatch):
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
    monkeypatch.setattr("nanogpt_accel.data.find_tokenizer._download", {"me/tok@v1": "elsewhere"}.get)
    assert find_tokenizer("hub:me/tok@v1", ckpt, "shakespeare_char", 3).encode("cab").tolist() == [2, 0, 1]
    with refused(ValueError, "tokenizer=char: cannot be built without the training text", "meta.pkl"):
        find_tokenizer("char", ckpt, "", 64)
    for asked in (str(other), "elsewhere"):
        with refused(
            ValueError,
            f"tokenizer={asked}: has 3 tokens",
            "out/ckpt.pt is only 2; set tokenizer to the tokenizer that the model was trained with",
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


def test_find_tokenizer_takes_meta_pkl_of_a_checkpoint_without_a_dataset(refused):
    ckpt = Path("out/ckpt.pt")
    with refused(ValueError, "out/meta.pkl does not exist"):
        find_tokenizer("auto", ckpt, "", 64)
    write_meta(Path("out/meta.pkl"), "cab")
    assert find_tokenizer("auto", ckpt, "", 64).decode([0, 1]) == "ca"


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_find_tokenizer_recognizes_gpt2_by_its_vocabulary_size(gpt2_files, refused, vocab_size):
    assert find_tokenizer("auto", Path("out/ckpt.pt"), "openwebtext", vocab_size).kind == "gpt2"
    with refused(ValueError, "tokenizer=gpt2: has 50,257 tokens, but the vocabulary size of out/ckpt.pt is only 64"):
        find_tokenizer("gpt2", Path("out/ckpt.pt"), "openwebtext", 64)


# ---- export

KEYS = {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}  # as nanoGPT's train.py writes them


def load_ckpt(path):
    """Load a checkpoint as nanoGPT does, with torch's default of weights_only=True."""
    return torch.load(path, map_location="cpu")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("vocab", ["cut", "keep"])
def test_export_writes_a_ckpt_with_which_nanogpt_computes_the_same(capsys, ids, bias, vocab):
    model = gpt(bias=bias, dropout=0.1)
    save_model(model, "ours")
    assert main(["export", "ours", "--to", "out/ckpt.pt", f"vocab={vocab}"]) == 0
    line, meta_line, optimizer_line = capsys.readouterr().out.splitlines()
    assert line == "out/ckpt.pt: nanoGPT checkpoint, largest logit difference from ours over 32 tokens: 0.0e+00"
    assert meta_line.startswith("out/meta.pkl: copy it to nanoGPT's data/ours_char/meta.pkl")
    assert "new optimizer" in optimizer_line
    ckpt, rows = load_ckpt("out/ckpt.pt"), N if vocab == "cut" else model.config.vocab_size
    assert ckpt.keys() == KEYS and ckpt["iter_num"] == 0 and ckpt["best_val_loss"] == 1e9
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": T_MAX}
    assert ckpt["model_args"] == shape | {"bias": bias, "vocab_size": rows, "dropout": 0.1}
    assert ckpt["model"].keys() == nanogpt(bias).keys() and ckpt["config"] == {"dataset": "ours_char"}
    assert_close(nanogpt_logits(ckpt["model"], ids), logits(model, ids)[..., :rows])
    # as sample.py reads it
    meta = pickle.loads(Path("out/meta.pkl").read_bytes())
    assert meta["vocab_size"] == N and "".join(meta["itos"][meta["stoi"][c]] for c in CHARS) == CHARS
    assert meta["itos"][N - 1] == "<|endoftext|>"
    assert main(["import", "out/ckpt.pt", "to=again"]) == 0
    assert_close(logits(AutoModelForCausalLM.from_pretrained("again"), ids), logits(model, ids)[..., :rows])
    assert Tokenizer.load("again").encode("To be").tolist() == [CHARS.index(c) for c in "To be"]


def test_export_of_an_import_has_the_same_weights():
    weights = nanogpt()
    write_ckpt("ckpt.pt", weights, bias=True)
    assert main(["import", "ckpt.pt", "to=ours", f"tokenizer={write_meta(Path('meta.pkl'))}"]) == 0
    assert main(["export", "ours", "to=out", "form=nanogpt", "dtype=float16"]) == 0
    written = load_ckpt("out/ckpt.pt")["model"]
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name].half()) for name in weights)


@pytest.mark.parametrize("has_recipe", [True, False])
def test_nanogpt_resumes_with_the_adamw_state_of_a_run(has_recipe):
    run = TinyRun("run")
    shape = {"vocab_size": TOKENIZER.vocab_size + 7, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 32}
    run.model = GPT(GPTConfig(**shape, mup_base_width=None if has_recipe else 16))
    run.optimizer = make_adamw(run.model)
    run.save(4)
    checkpoint = run.save(9, best_step=9)
    if has_recipe:
        settings = {"corpus": "my texts/x.txt", "tokenizer": "char"}
        optimizer = {"weight_decay": 0.3, "learning_rate": 1e-2, "beta2": 0.95}
        Path("run/run.yaml").write_text(Recipe(data=settings, optimizer=optimizer).to_yaml())
    notes = export_nanogpt(checkpoint, "out/ckpt.pt", report=str)[-1]
    ckpt = load_ckpt("out/ckpt.pt")
    assert len(notes) == (1 if has_recipe else 2) and ckpt["iter_num"] == 9 and ckpt["best_val_loss"] == 0.1 + 0.2
    assert ckpt["config"]["dataset"] == ("x_char" if has_recipe else "checkpoint-000009_char")
    # nanoGPT's configure_optimizers, and a step of train.py
    theirs = {name: torch.nn.Parameter(t) for name, t in ckpt["model"].items() if name != "lm_head.weight"}
    groups = [
        {"params": [p for p in theirs.values() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95))
    optimizer.load_state_dict(ckpt["optimizer"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3 if has_recipe else 0.1, 0.0]
    for group in (*optimizer.param_groups, *run.optimizer.param_groups):
        group["lr"], group["weight_decay"] = 1e-2, 0.1 * (group["params"][0].dim() == 2)
    for name, ours in run.model.named_parameters():
        ours.grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(len(name)))
        theirs[name].grad = ours.grad[: len(theirs[name])].clone()
    optimizer.step()
    run.optimizer.step()
    for name, ours in run.model.named_parameters():
        torch.testing.assert_close(theirs[name], ours[: len(theirs[name])], rtol=0, atol=1e-7)
    assert len(theirs["transformer.wte.weight"]) == TOKENIZER.vocab_size


def test_a_gpt2_tokenizer_needs_no_meta_pkl(gpt2_files):
    save_model(gpt(vocab_size=50304), "ours", Tokenizer.gpt2())
    assert main(["export", "ours", "to=out/ckpt.pt"]) == 0
    assert os.listdir("out") == ["ckpt.pt"]
    assert load_ckpt("out/ckpt.pt")["model"]["transformer.wte.weight"].shape == (50257, 32)


@pytest.mark.parametrize(
    ("switch", "value"),
    [
        ("position", "rotary"),
        ("norm", "rmsnorm"),
        ("norm_weight", False),
        ("norm_eps", 1e-6),
        ("embd_norm", True),
        ("qk_norm", True),
        ("activation", "gelu_new"),
        ("n_kv_head", 2),
        ("head_dim", 16),
        ("n_inner", 64),
        ("logit_softcap", 3.0),
        ("tie_word_embeddings", False),
        ("tokenizer", "bpe"),
    ],
)
def test_settings_that_nanogpt_does_not_have_are_named_in_one_line(call, switch, value):
    if switch == "tokenizer":
        save_model(gpt(vocab_size=300), "ours", Tokenizer.train_bpe(["ab cd ab cd " * 9], 260))
    else:
        save_model(gpt(**{switch: value}), "ours")
    error = call("export", "ours", "to=out/ckpt.pt", status=2)
    assert error.count("error: ") == 1 and f"ours: nanoGPT does not support {switch}={value}" in error
    assert not Path("out").exists()


def test_a_ckpt_that_cannot_be_written_leaves_nothing(call, monkeypatch):
    save_model(gpt(), "ours")

    def fail(*args):  # as torch does on a full disk
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nframe #0")

    monkeypatch.setattr(torch, "save", fail)
    error = call("export", "ours", "to=out/ckpt.pt", status=2)
    assert "error: out/ckpt.pt: cannot be written: [enforce fail" in error and "frame" not in error
    assert os.listdir() == ["ours"]
