"""`train` from start to end, and `sample` and `evaluate` on the runs that it writes."""

import contextlib
import io
import itertools
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import nanogpt_lr
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanogpt_accel.__main__ import main
from nanogpt_accel.recipe import load_recipe
from nanogpt_accel.tracking.metrics_log import read_metrics
from nanogpt_accel.training import check_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
STEPS, EVERY, BLOCK = 24, 8, 32
SYMBOLS = "\n adehilnorstuw"
RECIPE = f"""
data: {{corpus: text.txt, tokenizer: char, val_fraction: 0.1}}
model: {{n_layer: 2, n_embd: 32, n_head: 2, block_size: {BLOCK}, dropout: 0.2}}
optimizer: {{learning_rate: 1e-2, warmup_iters: 5, beta2: 0.99}}
train: {{batch_size: 4, gradient_accumulation_steps: 4, max_iters: {STEPS}, eval_interval: {EVERY}, eval_iters: 3,
         device: cpu, mixed_precision: no}}
checkpoint: {{keep_last: 1}}
"""
TINY = ["warmup_iters=0", "max_iters=2", "eval_interval=2", "gradient_accumulation_steps=1"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a text, tiny.yaml, and runs/tiny, a run of this recipe."""
    folder = tmp_path_factory.mktemp("train")
    draw = random.Random(5)
    words = ["".join(draw.choice(SYMBOLS[2:]) for _ in range(draw.randint(2, 7))) for _ in range(150)]
    text = " ".join(draw.choice(words) for _ in range(5000)).replace(" a", "\na")
    assert sorted(set(text)) == sorted(SYMBOLS)
    (folder / "text.txt").write_text(text)
    (folder / "tiny.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        assert main(["train", "tiny.yaml"]) == 0
    (folder / "output.txt").write_text(out.getvalue())
    return folder


@pytest.fixture(autouse=True)
def there(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


@pytest.fixture
def run(workplace):
    return workplace / "runs" / "tiny"


def last(run):
    return sorted(path for path in run.glob("checkpoint-*"))[-1]


def logits(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def losses(run, key="loss"):
    return [line[key] for line in read_metrics(run / "metrics.jsonl") if key in line]


# ---- the run folder


def test_the_files_of_a_run(workplace, run):
    names = {path.name for path in run.iterdir()}
    assert {"run.yaml", "metrics.jsonl", "loss.png", "config.json", "model.safetensors", "tokenizer.json"} < names
    assert {name for name in names if name.startswith(".")} == {".lock", ".lock.json"}
    assert (run / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    saved, asked = load_recipe(run / "run.yaml"), load_recipe("tiny.yaml")
    # run.yaml names the folder of the tokens, so that the run can be resumed even if the text was changed or deleted
    assert (Path(saved.data.data_dir) / "train.bin").is_file()
    assert saved.model_copy(update={"data": asked.data}) == asked
    assert saved.data.model_copy(update={"data_dir": asked.data.data_dir}) == asked.data
    newest = last(run)
    assert newest.name == f"checkpoint-{STEPS:06d}"
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "model.py",
    } <= {path.name for path in newest.iterdir()}
    assert {path.name for path in (newest / "state").iterdir()} == {
        "trainer.json",
        "optimizer.safetensors",
        "index.json",
    }
    for path in run.iterdir():
        if path.is_symlink():
            assert not os.path.isabs(os.readlink(path)) and path.exists()
    hint = (workplace / "output.txt").read_text().split("To try next")[1]
    assert "runs/tiny" in hint and f"max_iters={2 * STEPS}\n" in hint


def test_the_lines_of_the_log(run):
    lines = read_metrics(run / "metrics.jsonl")
    steps, evaluations = [li for li in lines if "loss" in li], [li for li in lines if "val_loss" in li]
    assert len(steps) + len(evaluations) == len(lines)
    assert [line["step"] for line in steps] == list(range(STEPS))
    assert [line["step"] for line in evaluations] == list(range(0, STEPS + 1, EVERY))
    for line in steps:
        assert {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second"} <= set(line)
        assert all(math.isfinite(value) and value >= 0 for value in line.values())
    for line in evaluations:
        assert {"train_loss", "val_loss", "perplexity", "bits_per_byte"} <= set(line)
        assert line["perplexity"] == pytest.approx(math.exp(line["val_loss"]))
        assert line["bits_per_byte"] == pytest.approx(line["val_loss"] / math.log(2))  # here, each token is one byte
    assert evaluations[0]["val_loss"] == pytest.approx(math.log(64), abs=0.1)  # like random guessing at the start ...
    assert evaluations[-1]["val_loss"] < math.log(len(SYMBOLS)) + 0.1  # ... then it knows which tokens occur


def test_the_learning_rates_are_nanogpts(run):
    expected = [
        nanogpt_lr(it, learning_rate=1e-2, warmup_iters=5, lr_decay_iters=STEPS, min_lr=1e-3) for it in range(STEPS)
    ]
    assert losses(run, "learning_rate") == pytest.approx(expected, rel=1e-12)


def test_the_run_loads_as_a_model_and_a_tokenizer(workplace, run):
    tokenizer = AutoTokenizer.from_pretrained(run)
    text = (workplace / "text.txt").read_text()[:BLOCK]
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == BLOCK and tokenizer.decode(ids) == text
    assert torch.equal(logits(run, ids), logits(last(run), ids))
    model = AutoModelForCausalLM.from_pretrained(run)
    assert model.dtype == torch.float32 and model.lm_head.weight is model.transformer.wte.weight


def test_best_and_last_are_kept_apart(call):
    """The validation losses are fixed by a patch, so that step 2 has the best one."""
    dictated = {0: 4.0, 1: 3.0, 2: 2.0, 3: 2.5, 4: 2.5, 5: 2.1}
    calls = itertools.count()  # two calls per evaluation: train, val
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanogpt_accel.training.mean_loss", lambda *args: dictated[next(calls) // 2])
        call("train", "tiny.yaml", *TINY, "out_dir=runs/best", "max_iters=5", "eval_interval=1")
    run = Path("runs/best")
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-000002", "checkpoint-000005"]
    trainer = json.loads((last(run) / "state/trainer.json").read_text())
    assert (trainer["best_step"], trainer["best_val_loss"], trainer["val_loss"]) == (2, 2.0, 2.1)
    ids = list(range(10))
    assert torch.equal(logits(run, ids), logits(run / "checkpoint-000002", ids))
    assert not torch.equal(logits(run, ids), logits(last(run), ids))
    assert '"runs/best/checkpoint-000002"' in call("evaluate", "runs/best", "--json", "eval_iters=1")


# ---- starting a run


def test_another_run_from_its_weights(call, run):
    score = json.loads(call("evaluate", run, "--json", "eval_iters=3"))
    # the architecture is that of the model in init_from, not that of the recipe
    out = call("train", "tiny.yaml", *TINY, f"init_from={run}", "out_dir=runs/next", "n_layer=3", "bias=true")
    first, *_, end = read_metrics("runs/next/metrics.jsonl")
    assert (first["step"], end["step"]) == (0, 2)
    assert first["val_loss"] == pytest.approx(score["val_loss"], rel=1e-6)  # evaluate sums window by window
    assert f"starting from the weights of {last(run)}" in out
    # the new run can be continued
    call("train", "runs/next", "max_iters=3")
    assert losses(Path("runs/next"), "step")[-1] == 3


def test_weights_with_another_tokenizer(call, run):
    err = call(
        "train", "tiny.yaml", *TINY, f"init_from={run}", "out_dir=runs/no", "tokenizer=bpe", "vocab_size=300", status=2
    )
    assert err.startswith(f"error: model.init_from={run}: ") and err.count("\n") == 1
    assert "char tokenizer (vocabulary size 15)" in err and "bpe tokenizer (vocabulary size 300)" in err
    assert "tokenizer=" in err
    assert not Path("runs/no").exists()


def test_a_block_size_other_than_the_weights(call, run):
    err = call("train", "tiny.yaml", *TINY, f"init_from={run}", "out_dir=runs/no", f"block_size={BLOCK + 1}", status=2)
    assert err.count("\n") == 1 and f"block_size={BLOCK + 1}" in err and f"block_size={BLOCK} or less" in err
    call("train", "tiny.yaml", *TINY, f"init_from={run}", "out_dir=runs/cropped", "block_size=8")
    model = AutoModelForCausalLM.from_pretrained("runs/cropped")
    assert model.config.block_size == 8 and model.transformer.wpe.weight.shape == (8, 32)
    with pytest.raises(ValueError, match="block_size=8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    # before training, the model is equal to the source model in the first 8 positions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanogpt_accel.training.mean_loss", lambda model, *args: found.append(model.state_dict()) or 1.0)
        found = []
        call("train", "tiny.yaml", f"init_from={run}", "out_dir=runs/no", "block_size=8", "eval_only=true")
    before = load_file(run / "model.safetensors")
    assert torch.equal(found[0]["transformer.wpe.weight"], before["transformer.wpe.weight"][:8])
    assert torch.equal(found[0]["transformer.wte.weight"], before["transformer.wte.weight"])


def stamps(folder):
    return {path: path.lstat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize("target", ["runs/tiny", "tiny.yaml"])
def test_eval_only_writes_nothing(call, workplace, target):
    before = stamps(workplace)
    out = call("train", target, "eval_only=true", *([] if target == "runs/tiny" else ["out_dir=runs/new"]))
    (line,) = [line for line in out.splitlines() if line.startswith("step ")]
    assert line.startswith(f"step {STEPS if target == 'runs/tiny' else 0}: train loss ")
    assert stamps(workplace) == before


def test_overwrite_replaces(call):
    call("train", "tiny.yaml", *TINY, "out_dir=runs/over", "max_iters=4")
    Path("runs/over/mine").symlink_to("..")  # files of the user stay
    Path("runs/over/notes.txt").touch()
    call("train", "tiny.yaml", *TINY, "out_dir=runs/over", "overwrite=true", "seed=2", "eval_interval=1")
    run = Path("runs/over")
    assert (run / "mine").is_symlink() and (run / "notes.txt").exists()
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-000002"]
    assert losses(run, "step") == [0, 0, 1, 1, 2]
    call("train", "tiny.yaml", *TINY, "out_dir=runs/fresh", "seed=2", "eval_interval=1")
    assert losses(run) == losses(Path("runs/fresh"))


def test_a_finished_run_goes_on(call, run, tmp_path):
    shutil.copytree(run, tmp_path / "tiny", symlinks=True)
    before = read_metrics(run / "metrics.jsonl")
    out = call("train", tmp_path / "tiny", f"max_iters={STEPS + 4}")
    assert f"from checkpoint-{STEPS:06d}" in out and f"iter {STEPS}:" in out and f"iter {STEPS - 1}:" not in out
    after = read_metrics(tmp_path / "tiny" / "metrics.jsonl")
    assert after[: len(before)] == before
    assert [line["step"] for line in after[len(before) :]] == [*range(STEPS, STEPS + 4), STEPS + 4]
    assert last(tmp_path / "tiny").name == f"checkpoint-{STEPS + 4:06d}"
    # once more, with nothing left to do, and with max_iters below the step that was reached
    for words in ([], ["max_iters=2"]):
        out = call("train", tmp_path / "tiny", *words)
        assert "iter " not in out and f"max_iters={2 * (STEPS + 4)}\n" in out.split("To try next")[1]
    assert read_metrics(tmp_path / "tiny" / "metrics.jsonl") == after


def test_an_existing_nanogpt_folder(call, workplace):
    """Train on train.bin, val.bin and meta.pkl as nanoGPT's data/shakespeare_char/prepare.py writes them."""
    folder = workplace / "shakespeare_char"
    folder.mkdir()
    data = (workplace / "text.txt").read_text()
    chars = sorted(list(set(data)))
    stoi = {ch: i for i, ch in enumerate(chars)}
    n = len(data)
    np.array([stoi[c] for c in data[: int(n * 0.9)]], dtype=np.uint16).tofile(folder / "train.bin")
    np.array([stoi[c] for c in data[int(n * 0.9) :]], dtype=np.uint16).tofile(folder / "val.bin")
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    call("train", "tiny.yaml", *TINY, f"data_dir={folder}", "out_dir=runs/theirs")
    call("train", "tiny.yaml", *TINY, "out_dir=runs/ours")
    assert losses(Path("runs/theirs")) == losses(Path("runs/ours"))
    assert losses(Path("runs/theirs"), "val_loss") == losses(Path("runs/ours"), "val_loss")
    assert sorted(path.name for path in folder.iterdir()) == ["meta.pkl", "train.bin", "val.bin"]


def test_the_recipe_of_gpt2(call, gpt2_files):
    """recipes/gpt2.yaml has the settings of nanoGPT's train_gpt2.py. A smaller model trains with them for a few
    steps."""
    recipe = load_recipe(RECIPES / "gpt2.yaml")
    assert recipe.train.batch_size * recipe.train.gradient_accumulation_steps * recipe.model.block_size == 491_520
    assert (recipe.train.max_iters, recipe.data.corpus, recipe.min_lr) == (600_000, "openwebtext", 6e-5)
    call(
        "train",
        RECIPES / "gpt2.yaml",
        "corpus=text.txt",
        "val_fraction=0.1",
        "n_layer=2",
        "n_embd=32",
        "n_head=2",
        f"block_size={BLOCK}",
        "gradient_accumulation_steps=2",
        "max_iters=2",
        "eval_iters=2",
        "device=cpu",
        "out_dir=runs/gpt2",
    )
    lines = [line for line in read_metrics("runs/gpt2/metrics.jsonl") if "val_loss" in line]
    assert [line["step"] for line in lines] == [0, 2]
    assert lines[0]["val_loss"] == pytest.approx(math.log(50304), abs=0.2) and lines[1]["val_loss"] < 11.1
    assert losses(Path("runs/gpt2"), "learning_rate")[0] == pytest.approx(6e-4 / 2001)
    tokenizer = AutoTokenizer.from_pretrained("runs/gpt2")
    assert tokenizer("Hello world")["input_ids"] == [15496, 995]
    assert (len(tokenizer), tokenizer.pad_token_id) == (50258, 50257)  # one of the unused 47 embeddings is for padding


def test_evaluations_that_are_left_out(call, run):
    """Skipping evaluations saves time and does not change the training losses."""
    call("train", "tiny.yaml", "out_dir=fewer", "eval_first=false", "eval_train=false")
    fewer, whole = read_metrics("fewer/metrics.jsonl"), read_metrics(run / "metrics.jsonl")
    assert [line["loss"] for line in fewer if "loss" in line] == [line["loss"] for line in whole if "loss" in line]
    evaluations = [{line["step"]: line["val_loss"] for line in lines if "val_loss" in line} for lines in (fewer, whole)]
    assert evaluations[1].pop(0) and evaluations[0] == evaluations[1]
    assert any("train_loss" in line for line in whole) and not any("train_loss" in line for line in fewer)


def test_activation_checkpointing_changes_no_number(call):
    for name, switch in (("plain", "false"), ("again", "true")):
        call("train", "tiny.yaml", *TINY, "max_iters=4", f"out_dir=runs/{name}", f"activation_checkpointing={switch}")
    for key in ("loss", "grad_norm", "val_loss"):
        assert losses(Path("runs/plain"), key) == losses(Path("runs/again"), key)


def test_trackers_leave_their_files(call, monkeypatch):
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    call("train", "tiny.yaml", *TINY, "out_dir=runs/tracked", "trackers=tensorboard,wandb", "project=tests")
    run = Path("runs/tracked")
    (events,) = run.glob("tests/events.out.tfevents.*")
    (offline,) = run.rglob("*.wandb")
    end = time.monotonic() + 20
    while b"val_loss" not in offline.read_bytes() and time.monotonic() < end:
        time.sleep(0.1)  # a separate process of wandb writes this file
    assert b"val_loss" in offline.read_bytes() and b"grad_norm" in offline.read_bytes()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = EventAccumulator(str(events.parent)).Reload()
    assert [scalar.step for scalar in logged.Scalars("loss")] == [0, 1]
    assert [scalar.value for scalar in logged.Scalars("loss")] == pytest.approx(losses(run))


# ---- NaN and Inf


def finite(folder):
    return all(torch.isfinite(tensor).all() for tensor in load_file(folder / "model.safetensors").values())


def test_a_loss_that_is_no_number(call):
    err = call(
        "train",
        "tiny.yaml",
        *TINY,
        "max_iters=9",
        "out_dir=runs/high",
        "learning_rate=1e9",
        "save_interval=1",
        "eval_interval=9",
        status=1,
    )
    assert err.startswith("error: loss of step ") and err.count("\n") == 1
    step, newest = int(err.split("loss of step ")[1].split()[0]), last(Path("runs/high"))
    assert f"latest valid checkpoint is {newest}" in err and "nanogpt-accel train runs/high learning_rate=" in err
    assert newest.name == f"checkpoint-{step:06d}" and all(map(finite, Path("runs/high").glob("checkpoint-*")))
    assert all("NaN" not in line for line in Path("runs/high/metrics.jsonl").read_text().splitlines())


def test_a_loss_that_is_no_number_at_once(call, monkeypatch):
    monkeypatch.setattr(F, "cross_entropy", lambda logits, *args, **kwargs: logits.sum() * math.inf)
    monkeypatch.setattr("nanogpt_accel.training.mean_loss", lambda *args: 4.0)
    err = call("train", "tiny.yaml", *TINY, "out_dir=runs/at_once", status=1)
    assert "loss of step 0 is" in err and "no checkpoint was saved yet" in err
    assert not list(Path("runs/at_once").glob("checkpoint-*"))


def test_a_gradient_that_is_no_number(call, monkeypatch):
    from accelerate import Accelerator

    clip, calls = Accelerator.clip_grad_norm_, itertools.count()

    def clip_grad_norm_(self, parameters, max_norm):
        parameters = list(parameters)
        if next(calls) == 3:
            parameters[0].grad[0, 0] = math.inf
        return clip(self, parameters, max_norm)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip_grad_norm_)
    err = call(
        "train", "tiny.yaml", *TINY, "max_iters=9", "out_dir=runs/inf", "save_interval=2", "eval_interval=9", status=1
    )
    assert "gradient norm of step 3" in err and "runs/inf/checkpoint-000002" in err
    assert finite(last(Path("runs/inf"))) and last(Path("runs/inf")).name == "checkpoint-000002"


def test_an_evaluation_that_is_no_number(call, monkeypatch):
    values = iter([4.0, 4.0, 3.9, 3.9, math.nan, math.nan])
    monkeypatch.setattr("nanogpt_accel.training.mean_loss", lambda *args: next(values))
    err = call("train", "tiny.yaml", *TINY, "max_iters=9", "out_dir=runs/nan", "eval_interval=2", status=1)
    assert "validation loss" in err and "4 steps" in err and "runs/nan/checkpoint-000002" in err
    assert [path.name for path in Path("runs/nan").glob("checkpoint-*")] == ["checkpoint-000002"]


# ---- printed output


def test_the_time_to_expect_where_the_peak_of_the_device_is_known(call, run, monkeypatch):
    """The FLOPs are counted as in nanoGPT's estimate_mfu."""
    weights = load_file(run / "model.safetensors")
    n_params = sum(w.numel() for name, w in weights.items() if name != "transformer.wpe.weight")
    flops = (6 * n_params + 12 * 2 * 32 * BLOCK) * 2 * 4 * BLOCK  # of two steps with 4 sequences each
    monkeypatch.setattr("nanogpt_accel.training.peak_flops", lambda name: flops / 0.4 / 125)
    out = call("train", "tiny.yaml", *TINY, "out_dir=runs/timed")
    assert "\ntime: 2:05 at an MFU of 40%" in out
    monkeypatch.setattr("nanogpt_accel.training.peak_flops", lambda name: None)
    assert "\ntime: " not in call("train", "tiny.yaml", *TINY, "out_dir=runs/untimed")


# ---- sample


def samples(out):
    assert out.endswith("\n---------------\n")
    return out.removesuffix("\n---------------\n").split("\n---------------\n")


def test_seeds_can_be_repeated(call, run):
    options = ["sample", run, "prompt=the", "max_new_tokens=20"]
    two = samples(call(*options, "num_samples=2", "seed=7"))
    assert len(two) == 2 and two[0] != two[1] and all(len(text) == 23 and text.startswith("the") for text in two)
    assert samples(call(*options, "num_samples=2", "seed=7")) == two
    assert samples(call(*options, "num_samples=1", "seed=8")) == two[1:]


def test_temperature_0_is_the_likeliest(call, run):
    tokenizer = AutoTokenizer.from_pretrained(run)
    ids = tokenizer("the ")["input_ids"]
    while len(ids) < BLOCK:
        ids.append(logits(run, ids)[-1, : len(SYMBOLS)].argmax().item())
    assert (
        samples(
            call("sample", run, "--prompt", "the ", "temperature=0", "num_samples=2", f"max_new_tokens={BLOCK - 4}")
        )
        == [tokenizer.decode(ids)] * 2
    )


def test_padded_rows_are_never_drawn(call, run, tmp_path):
    """The model prefers the unused vocabulary entries to all others, but they are never sampled."""
    shutil.copytree(last(run), tmp_path / "padded")
    weights = load_file(tmp_path / "padded" / "model.safetensors")
    wte = weights["transformer.wte.weight"]
    assert wte.shape == (64, 32)
    wte[len(SYMBOLS) :] = 100 * torch.randn(64 - len(SYMBOLS), 32, generator=torch.Generator().manual_seed(1))
    save_file(weights, tmp_path / "padded" / "model.safetensors", metadata={"format": "pt"})
    assert logits(tmp_path / "padded", [0, 1, 2])[-1].argmax() >= len(SYMBOLS)
    # transformers' generate needs generation_config.json to suppress these entries, but `sample` does not
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    ids = model.generate(torch.tensor([[0]]), max_new_tokens=25, do_sample=True)
    assert ids.max() < len(SYMBOLS)
    (tmp_path / "padded" / "generation_config.json").unlink()
    for options in (["temperature=0"], ["temperature=1.5", "top_k=0"], ["top_k=3"], ["top_p=0.5"]):
        (text,) = samples(
            call("sample", tmp_path / "padded", "prompt=a", "num_samples=1", "max_new_tokens=60", *options)
        )
        assert len(text) == 61 and set(text) <= set(SYMBOLS)


def test_longer_than_the_context(call, run):
    (text,) = samples(call("sample", run, "prompt=a", "num_samples=1", f"max_new_tokens={3 * BLOCK}"))
    assert len(text) == 1 + 3 * BLOCK
    full = "the sun and " * 4  # as long as the context allows
    (text,) = samples(call("sample", run, f"prompt={full[:BLOCK]}", "num_samples=1", "max_new_tokens=5"))
    assert text.startswith(full[:BLOCK]) and len(text) == BLOCK + 5


def test_a_prompt_from_a_file(call, run, tmp_path):
    (tmp_path / "prompt.txt").write_text("the sun\nand ")
    for key in ("--start", "--prompt"):
        (text,) = samples(
            call("sample", run, f"{key}=FILE:{tmp_path / 'prompt.txt'}", "num_samples=1", "max_new_tokens=3")
        )
        assert text.startswith("the sun\nand ") and len(text) == 15
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfthe sun\n")  # the tokenizer has no byte order mark
    for key in ("prompt=FILE:", "prompts="):
        (text,) = samples(call("sample", run, f"{key}{tmp_path / 'mark.txt'}", "num_samples=1", "max_new_tokens=3"))
        assert text.startswith("the sun")
    (tmp_path / "utf16.txt").write_text("the sun\n", encoding="utf-16")
    for key in ("prompt=FILE:", "prompts="):
        line = call("sample", run, f"{key}{tmp_path / 'utf16.txt'}", status=2)
        subprocess.run(line.split("convert it with `")[1].split("`")[0], shell=True, check=True)
        samples(call("sample", run, f"{key}{tmp_path / 'utf16.txt'}", "num_samples=1", "max_new_tokens=3"))
        (tmp_path / "utf16.txt").write_text("the sun\n", encoding="utf-16")


# ---- evaluate


def test_evaluate_by_hand(call, workplace, run):
    (val,) = (workplace / "data").glob("text_char-*/val.bin")
    ids = torch.from_numpy(np.fromfile(val, dtype=np.uint16).astype(np.int64))
    model = AutoModelForCausalLM.from_pretrained(run).eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, BLOCK):  # every token but the first is predicted once
            x, y = ids[start : start + BLOCK], ids[start + 1 : start + BLOCK + 1]
            total += F.cross_entropy(model(x[None, : len(y)]).logits[0].double(), y, reduction="sum").item()
    by_hand = total / (len(ids) - 1)

    score = json.loads(call("evaluate", run, "--json"))  # one object and nothing else
    assert score["tokens"] == len(ids) - 1
    assert score["val_loss"] == pytest.approx(by_hand, abs=1e-6)
    assert score["perplexity"] == pytest.approx(math.exp(by_hand), rel=1e-5)
    assert score["bits_per_byte"] == pytest.approx(by_hand / math.log(2), rel=1e-5)
    assert score["model"] == str(last(run)) and Path(score["data"]).resolve() == val.parent
    # the result is the same for the checkpoint, with a recipe and another batch size, and printed as text
    same = json.loads(call("evaluate", last(run), "--recipe", "tiny.yaml", "batch_size=7", "--json"))
    assert same["val_loss"] == pytest.approx(by_hand, abs=1e-6)
    assert f"val loss {by_hand:.4f}" in call("evaluate", run)


def test_json_is_all_that_evaluate_prints(capfd, monkeypatch, workplace, run, tmp_path):
    """The data are not prepared yet, so the command also prints messages about the preparation, but not to stdout."""
    shutil.copy(workplace / "text.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(run), "--json", "eval_iters=2"]) == 0
    captured = capfd.readouterr()
    assert captured.out.count("\n") == 1 and "val_loss" in json.loads(captured.out)
    assert "B of text" in captured.err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_model_is_compiled_twice(workplace, call):
    """The model is compiled once to train and once to evaluate, although the last batches of the full split are
    smaller."""
    from torch._dynamo.utils import counters

    counters.clear()
    options = [*TINY, "eval_iters=all", "max_iters=4", "dropout=0"]  # compiled dropout draws other numbers
    call("train", "tiny.yaml", *options, "compile=true", "out_dir=runs/compiled")
    call("train", "tiny.yaml", *options, "out_dir=runs/eager")
    assert counters["stats"]["unique_graphs"] == 2
    compiled, eager = (losses(workplace / "runs" / name, "val_loss") for name in ("compiled", "eager"))
    assert compiled == pytest.approx(eager, rel=1e-5) and len(eager) == 3


def test_out_dir_may_have_the_name_of_a_keyword(tmp_path, monkeypatch):
    """init_from=scratch means a new model, even if out_dir is the folder `scratch`."""
    monkeypatch.chdir(tmp_path)
    for out_dir in (".", "scratch"):
        recipe = load_recipe(None, {"out_dir": out_dir, "overwrite": "true"})
        assert not [problem for problem in check_recipe(recipe) if "init_from" in problem]
    (tmp_path / "scratch").mkdir()
    recipe = load_recipe(None, {"out_dir": "scratch", "init_from": "./scratch", "overwrite": "true"})
    assert [problem for problem in check_recipe(recipe) if "which overwrite=true deletes" in problem]


def test_a_prompt_and_a_val_fraction_of_the_file_give_way_to_another_corpus(workplace, call):
    """sample_prompt and val_fraction of the recipe file are replaced only if they do not fit the corpus on the command
    line. The run saves the values that it used, so that it can be resumed and evaluated."""
    Path("own.yaml").write_text(
        RECIPE.replace("0.1}", "0.0001}", 1).replace("batch_size: 4, ", "sample_prompt: abc, ", 1)
    )
    Path("digits.txt").write_text("0123456789" * 500)
    words = ["train", "own.yaml", *TINY, "corpus=digits.txt", "sample_tokens=3", "batch_size=2", "out_dir=digits"]
    out = call(*words)
    assert "val_fraction=0.01 instead of 0.0001, because val had only 1 token, fewer than block_size + 1 = 33\n" in out
    assert "train.sample_prompt='abc': the tokenizer has no 'a' (U+0061), " in out
    assert "; using sample_prompt='0' instead\n" in out
    assert "  nanogpt-accel sample digits --prompt 0\n" in out
    used = load_recipe("digits")
    assert (used.data.val_fraction, used.train.sample_prompt) == (0.01, "0")
    out = call("train", "digits", "max_iters=3", "sample_prompt= ", "sample_tokens=0")
    assert "resuming digits from" in out and "  nanogpt-accel sample digits\n" in out
    for given, problem in (
        ("sample_prompt=abc", "error: train.sample_prompt='abc': the tokenizer has no 'a'"),
        ("val_fraction=0.0001", "error: block_size=32: a sample has 33 tokens, but the val split of data/digits_char"),
    ):
        assert call(*words, "overwrite=true", given, status=2).startswith(problem)


def test_a_changed_precision_is_reported(capsys, tmp_path):
    folder, words = tmp_path / "run", ["sample_tokens=0", *TINY]
    assert main(["train", "tiny.yaml", "mixed_precision=no", f"out_dir={folder}", *words]) == 0
    assert json.loads((last(folder) / "state/trainer.json").read_text())["mixed_precision"] == "no"
    capsys.readouterr()
    assert main(["train", str(folder), "max_iters=4"]) == 0
    assert "the precision changes" not in capsys.readouterr().out
    assert main(["train", str(folder), "max_iters=6", "mixed_precision=bf16"]) == 0
    message = "the run was trained with mixed_precision=no, and continues with mixed_precision=bf16"
    assert message in " ".join(capsys.readouterr().out.split())
