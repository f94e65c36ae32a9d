"""`export`: stock and custom models have the same logits, and a failed export leaves no files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import WITHOUT_THE_PACKAGE
from stock_models import CHARS, QWEN3, ROWS, STOCK, N, assert_close, gpt, logits, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanogpt_accel.__main__ import main
from nanogpt_accel.data.tokenizer import Tokenizer
from nanogpt_accel.model import GPT, GPTConfig
from nanogpt_accel.models import stock
from nanogpt_accel.models.export import export


@pytest.mark.parametrize("vocab", ["cut", "keep"])
@pytest.mark.parametrize("case", STOCK)
def test_export_writes_a_stock_model_with_the_same_logits(capsys, ids, case, vocab):
    switches, stock_class, fields = STOCK[case]
    # mup_base_width is not exported; with a tied head, it needs a weight in the final norm
    is_possible = switches.get("norm_weight", True) or not switches.get("tie_word_embeddings", True)
    model = gpt(**switches, mup_base_width=16 if is_possible else None)
    save_model(model, "ours")
    assert main(["export", "ours", "--to", "theirs", f"vocab={vocab}"]) == 0
    assert stock_class.__name__ in capsys.readouterr().out

    theirs, info = AutoModelForCausalLM.from_pretrained("theirs", output_loading_info=True)
    assert type(theirs) is stock_class
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    rows = N + 1 if vocab == "cut" else ROWS  # with the padding token
    assert_close(logits(theirs.eval(), ids), logits(model, ids)[..., :rows])

    config = json.loads(Path("theirs/config.json").read_text())
    fields = fields | {
        "vocab_size": rows,
        "bos_token_id": N - 1,
        "eos_token_id": N - 1,
        "pad_token_id": N,
        "dtype": "float32",
        "architectures": [stock_class.__name__],
    }
    assert {key: config.get(key) for key in fields} == fields
    assert not {"auto_map", "mup_base_width"} & config.keys() and not list(Path("theirs").glob("*.py"))
    generation = json.loads(Path("theirs/generation_config.json").read_text())
    assert generation["suppress_tokens"] == list(range(N, rows))
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (N - 1, N)
    tokenizer = AutoTokenizer.from_pretrained("theirs")
    assert (len(tokenizer), tokenizer.pad_token_id) == (N + 1, N)
    text = tokenizer("To be, or not", return_tensors="np")["input_ids"][0]
    assert "".join(CHARS[i] for i in text) == "To be, or not"


@pytest.mark.parametrize("keep_padding", [True, False])
def test_padding_is_never_generated(keep_padding):
    """`generate` samples neither the unused vocabulary entries nor the padding token."""
    model = gpt()
    with torch.no_grad():
        model.transformer.wte.weight[N:] *= -30  # so that these ids are by far the most likely
    assert export(save_model(model, "ours"), "theirs", "stock", keep_padding)[0] == "GPT2LMHeadModel"
    theirs = AutoModelForCausalLM.from_pretrained("theirs")
    prompt = torch.arange(4)[None]
    assert (logits(theirs, prompt)[0, -1].argmax() >= N) and theirs.generation_config.suppress_tokens
    new = theirs.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert new.max() < N


def test_export_stock_to_custom_to_stock_is_bitwise_equal(ids):
    """An exported model can be exported again."""
    model = gpt(**QWEN3)
    save_model(model, "ours")
    for source, to, form in (("ours", "one", "stock"), ("one", "two", "custom"), ("two", "three", "stock")):
        assert main(["export", source, f"--to={to}", f"form={form}"]) == 0
    assert type(AutoModelForCausalLM.from_pretrained("two")) is GPT
    # each card shows how to load its folder
    assert ["trust_remote_code" in Path(to, "README.md").read_text() for to in ("one", "two", "three")] == [
        False,
        True,
        False,
    ]
    one, three = load_file("one/model.safetensors"), load_file("three/model.safetensors")
    assert one.keys() == three.keys() and all(torch.equal(one[name], three[name]) for name in one)
    assert json.loads(Path("one/config.json").read_text()) == json.loads(Path("three/config.json").read_text())


@pytest.mark.parametrize("form", ["stock", "custom"])
@pytest.mark.parametrize("existed", [True, False])
def test_a_folder_with_other_logits_is_not_kept(refused, monkeypatch, form, existed):
    save_model(gpt(), "ours")
    if existed:
        Path("theirs").mkdir()
    save = Tokenizer.save

    def save_and_spoil(tokenizer, folder, **options):
        save(tokenizer, folder, **options)
        weights = load_file(f"{folder}/model.safetensors")
        weights["transformer.ln_f.weight"][0] += 1e-3
        save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})

    monkeypatch.setattr(Tokenizer, "save", save_and_spoil)
    with refused(
        ValueError, "theirs: removed, because its logits differ from those of the source model", "form=custom"
    ):
        export("ours", "theirs", form)
    assert sorted(os.listdir()) == ["ours", "theirs"][: 1 + existed]
    assert not existed or os.listdir("theirs") == []


def test_export_into_the_current_folder(monkeypatch, tmp_path):
    save_model(gpt(), "ours")
    Path("here").mkdir()
    monkeypatch.chdir("here")
    assert main(["export", "../ours", "--to", "."]) == 0
    assert (tmp_path / "here" / "model.safetensors").is_file()


FORMS = ["theirs", "theirs.gguf", "theirs.pt"]


@pytest.mark.parametrize("to", FORMS)
def test_a_setting_that_export_does_not_know_is_named(call, monkeypatch, to):
    """A user has added a field to GPTConfig and to recipes for an experiment. If it is off, the model is exported."""
    assert stock.unknown_settings(dict.fromkeys(GPTConfig.__annotations__, True)) == []
    monkeypatch.setitem(stock.DEFAULTS, "value_residual", False)
    save_model(gpt(), "ours")
    config = json.loads(Path("ours/config.json").read_text())
    Path("ours/config.json").write_text(json.dumps(config | {"value_residual": 0.5}))
    error = call("export", "ours", f"to={to}", status=2).splitlines()[-1]
    assert "does not support value_residual=0.5 (unknown to export)" in error and os.listdir() == ["ours"]
    assert to != "theirs" or "form=custom" in error
    Path("ours/config.json").write_text(json.dumps(config | {"value_residual": False}))
    call("export", "ours", f"to={to}")
    # a field that is on by default, and a checkpoint that was saved before the field was added
    monkeypatch.setattr(GPTConfig, "__annotations__", GPTConfig.__annotations__ | {"scaled": bool})
    monkeypatch.setattr(GPTConfig, "to_dict", lambda config: {"scaled": True})
    assert stock.unknown_settings(config) == ["scaled=True (unknown to export)"]


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("name", ["attn.gate.weight", "ln_1.shift", "scale"])
def test_a_weight_that_export_does_not_know_is_named(call, monkeypatch, to, name):
    """A user has added a module or a parameter to model.py. The error names it, even if it does not change the logits
    yet."""
    model = gpt()
    save_model(model, "ours")
    module, _, parameter = name.rpartition(".")
    layer = model.transformer.h[1]
    if module == "attn.gate":
        layer.attn.gate = torch.nn.Linear(2, 2, bias=False)
    else:
        layer.get_submodule(module).register_parameter(parameter, torch.nn.Parameter(torch.zeros(3)))
    monkeypatch.setattr("nanogpt_accel.models.export.load_model", lambda source: model)
    error = call("export", "ours", f"to={to}", status=2).splitlines()[-1]
    assert f"does not support transformer.h.1.{name}" in error and os.listdir() == ["ours"]


def test_a_model_with_nan_logits_is_not_exported(refused):
    model = gpt()
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = torch.nan
    save_model(model, "ours")
    with refused(ValueError, "theirs: nothing was written", "NaN"):
        export("ours", "theirs", "stock")
    assert os.listdir() == ["ours"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_or_interrupted_export_leaves_nothing(monkeypatch, refused, error):
    save_model(gpt(), "ours")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(Tokenizer, "save", fail)
    if isinstance(error, OSError):
        with refused(OSError, "theirs: cannot be written", "No space left"):
            export("ours", "theirs", "stock")
    else:
        with pytest.raises(KeyboardInterrupt):
            export("ours", "theirs", "stock")
    assert os.listdir() == ["ours"]


def test_export_into_an_empty_or_a_nested_folder():
    save_model(gpt(), "ours")
    Path("empty").mkdir()
    for to in ("empty", "deep/er/theirs"):
        assert main(["export", "ours", "--to", to]) == 0
        assert sorted(os.listdir(to)) == [
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    assert os.listdir("deep/er") == ["theirs"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["MODEL is missing", "--to is missing"]),
        (["ours"], ["--to is missing"]),
        (["ours", "to=full"], ["to=full: the folder is not empty"]),
        (["ours", "to=ours"], ["to=ours: the folder is not empty"]),
        (["ours", "to=full/file"], ["to=full/file: full/file is a file"]),
        (["ours", "to=x", "form=llama"], ["form=llama: must be 'auto', 'stock', 'custom', 'nanogpt' or 'gguf'"]),
        (
            ["ours", "to=full/file", "form=gguf"],
            ["to=full/file: the name does not fit form=gguf; a gguf"],
        ),
        (["ours", "to=x.pt", "form=stock"], ["to=x.pt: the name does not fit form=stock"]),
        (["ours", "to=x.gguf", "form=nanogpt"], ["to=x.gguf: the name does not fit form=nanogpt"]),
        (["ours", "to=a.pt"], ["to=a.pt: exists already; delete it"]),
        (["ours", "to=b.pt"], ["to=meta.pkl: exists already"]),
        (["ours", "to=a.pt/b.pt"], ["to=a.pt: a.pt is a file"]),
        (["ours", "to=full/x.pt", "dtype=q8_0"], ["dtype=q8_0 requires form=gguf, not nanogpt; set `to` to"]),
        (["nowhere/", "to=x"], ["nowhere/"]),
        (["full", "to=x"], ["full: neither a run nor a model folder"]),
    ],
)
def test_export_reports_every_wrong_option(capsys, argv, words):
    save_model(gpt(), "ours")
    Path("full").mkdir()
    for file in ("full/file", "a.pt", "meta.pkl"):
        Path(file).touch()
    assert main(["export", *argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True))
    assert not Path("x").exists() and os.listdir("full") == ["file"]


def test_a_missing_gguf_package_is_an_error(call, monkeypatch):
    save_model(gpt(), "ours")
    monkeypatch.setattr("nanogpt_accel.commands.export.find_spec", lambda name: None)
    assert "form=gguf requires the package gguf; install it" in call("export", "ours", "to=my.gguf", status=2)


PIPELINES = (
    WITHOUT_THE_PACKAGE
    + """
import json
from transformers import pipeline

json.dump({folder: pipeline("text-generation", model=folder)("To be", max_new_tokens=20, do_sample=False)[0]
           for folder in sys.argv[1:]}, open("texts.json", "w"))
"""
)


def test_transformers_pipeline_and_sample_write_the_same_text(capsys):
    wanted = {}
    for form, case, vocab in (
        ("gpt2", "gpt2 without biases", "cut"),
        ("llama", "llama with biases", "keep"),
        ("qwen3", "qwen3", "cut"),
        ("nanochat", "nanochat", "keep"),
    ):
        save_model(gpt(**STOCK[case][0], eos_token_id=None), f"{form}-ours")
        assert main(["export", f"{form}-ours", f"to={form}", f"vocab={vocab}"]) == 0
        capsys.readouterr()
        assert (
            main(["sample", f"{form}-ours", "prompt=To be", "temperature=0", "max_new_tokens=20", "num_samples=1"]) == 0
        )
        wanted[form] = {"generated_text": capsys.readouterr().out.removesuffix("\n---------------\n")}
        assert len(set(wanted[form]["generated_text"])) > 6
    Path("script.py").write_text(PIPELINES)
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "script.py", *wanted], env=env, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("texts.json").read_text()) == wanted


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("run/checkpoint-000999", "inside the run"),
        ("run/checkpoint-000002/copy", "inside the run"),
        ("run/x/y", "inside the run"),
        ("run/checkpoint-000002/ckpt.pt", "inside the run"),
        ("run/my.gguf", "inside the run"),
        ("dangling", "broken link"),
    ],
)
def test_export_into_a_run_folder_is_refused(capsys, to, words):
    """The run would take such a folder for one of its checkpoints, and prune it."""
    Path("run").mkdir()
    Path("run/run.yaml").touch()
    Path("dangling").symlink_to("nowhere")
    save_model(gpt(), "ours")
    assert main(["export", "ours", f"to={to}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"to={to}" in line and words in line
    assert os.listdir("run") == ["run.yaml"]


def test_export_expands_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    save_model(gpt(), "ours")
    assert main(["export", "ours", "to=~/out"]) == 0
    assert (tmp_path / "home" / "out" / "config.json").is_file() and not Path("~").exists()


@pytest.mark.parametrize("form", ["stock", "custom"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_export_rounds_weights_to_the_requested_dtype(form, dtype, ids):
    model = gpt()
    save_model(model, "ours")
    assert main(["export", "ours", "to=out", f"dtype={dtype}", f"form={form}"]) == 0
    written = load_file("out/model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {getattr(torch, dtype)}
    assert json.loads(Path("out/config.json").read_text())["dtype"] == dtype
    rounded = logits(model.to(getattr(torch, dtype)).float(), ids)[..., :N]
    loaded = AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32).eval()
    assert_close(logits(loaded, ids)[..., :N], rounded)


@pytest.mark.parametrize("content", ["[]", '{"eos_token": {"a": 1}}', '{"eos_token": ["a"]}', '{"eos_token": 3}'])
def test_export_ignores_an_invalid_tokenizer_config_and_readme(content):
    save_model(gpt(), "ours")
    Path("ours/tokenizer_config.json").write_text(content)
    Path("ours/README.md").write_bytes(b"caf\xe9")
    assert main(["export", "ours", "to=out"]) == 0
