"""`evaluate`: overlapping windows, texts, standard errors and lm-eval tasks."""

import fnmatch
import importlib.metadata
import importlib.util
import itertools
import json
import math
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import write_lm_eval_task
from shared import DATA, REPOSITORY
from stock_models import gpt, save_model
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from nanogpt_accel.__main__ import main
from nanogpt_accel.batches import sliding_windows
from nanogpt_accel.data.tokenizer import Tokenizer
from nanogpt_accel.evaluation import mean_and_error
from nanogpt_accel.utils.text import duration

CONTEXT = 32


def scores(capsys, *argv):
    """Return the JSON that a command prints."""
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder with a GPT-2 of transformers with random weights, and GPT-2's tokenizer."""
    if not (DATA / "tiktoken").is_dir():
        pytest.skip(f"{DATA}/tiktoken is not there")
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(n_positions=CONTEXT, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3))
    model.save_pretrained(folder)
    Tokenizer.gpt2().save(folder, max_length=CONTEXT)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    source = DATA / "wikitext2" / "valid.txt"
    if not source.is_file():
        pytest.skip(f"{source} is not there")
    path = tmp_path_factory.mktemp("text") / "valid.txt"
    path.write_text(source.read_text(encoding="utf-8")[:2500], encoding="utf-8")
    return path


def guide(folder, text, stride):
    """The loop of transformers' guide "Perplexity of fixed-length models"."""
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    encodings = GPT2TokenizerFast.from_pretrained(folder)(text, return_tensors="pt")
    max_length, seq_len = model.config.n_positions, encodings.input_ids.size(1)
    nll_sum, n_tokens, prev_end_loc = 0.0, 0, 0
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        input_ids = encodings.input_ids[:, begin_loc:end_loc]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        with torch.no_grad():
            neg_log_likelihood = model(input_ids, labels=target_ids).loss
        num_valid_tokens = (target_ids != -100).sum().item()
        num_loss_tokens = num_valid_tokens - 1
        nll_sum += neg_log_likelihood.item() * num_loss_tokens
        n_tokens += num_loss_tokens
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    return math.exp(nll_sum / n_tokens)


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_perplexity_with_a_stride_is_that_of_transformers_guide(capsys, gpt2, text, stride):
    found = scores(
        capsys, "evaluate", str(gpt2), f"text={text}", f"stride={stride}", "device=cpu", "mixed_precision=no"
    )
    assert found["perplexity"] == pytest.approx(guide(gpt2, text.read_text(encoding="utf-8"), stride), rel=1e-3)
    assert found["text_loss"] == pytest.approx(math.log(found["perplexity"]))
    n_tokens = len(Tokenizer.gpt2().encode(text.read_text(encoding="utf-8")))
    # without overlap, the first token of each window has no context, and the guide does not predict it
    assert found["tokens"] == (n_tokens - 1 if stride < CONTEXT else n_tokens - -(-n_tokens // CONTEXT))
    nats = found["text_loss"] * n_tokens / math.log(2) / text.stat().st_size
    assert found["bits_per_byte"] == pytest.approx(nats, rel=1e-6)


@pytest.mark.parametrize(
    ("n", "block_size", "stride"),
    [(100, 16, 15), (100, 16, 5), (17, 16, 15), (5, 16, 3), (2, 16, 16), (33, 16, 1), (257, 7, 4)],
)
def test_every_token_after_the_first_counts_once(n, block_size, stride):
    counted, least = np.zeros(n, int), {}
    for starts, length, count in sliding_windows(n, block_size, stride, batch_size=3):
        assert 1 <= len(starts) <= 3 and length < block_size
        for start in starts:
            targets = range(start + 1, start + 1 + length)
            assert targets[-1] < n
            for place in targets[len(targets) - count :]:
                counted[place] += 1
                least[place] = place - start
    assert counted.tolist() == [0] + [1] * (n - 1)
    # the context of a prediction: all tokens before it near the start, else at least the overlap
    assert all(before >= min(place, block_size - stride) for place, before in least.items())


def test_the_standard_error_over_windows_agrees_with_the_bootstrap():
    draw = np.random.default_rng(2)
    sums, counts = draw.normal(30, 4, 50), np.full(50, 10.0)
    mean, error = mean_and_error(sums, counts)
    assert mean == pytest.approx(sums.mean() / 10)
    assert error == pytest.approx(sums.std(ddof=1) / 10 / math.sqrt(50))
    # for windows of unequal length, the error equals that of the bootstrap
    counts = draw.integers(5, 50, 400).astype(float)
    sums = counts * draw.normal(3, 0.5, 400)
    _, error = mean_and_error(sums, counts)
    chosen = draw.integers(0, 400, (3000, 400))
    assert error == pytest.approx((sums[chosen].sum(1) / counts[chosen].sum(1)).std(), rel=0.1)
    assert mean_and_error(sums[:1], counts[:1])[1] is None


def test_without_a_stride_every_target_counts_once_within_its_block(capsys, gpt2, text):
    """As in nanoGPT, every target is predicted once, from the tokens before it in its block."""
    found = scores(capsys, "evaluate", str(gpt2), f"text={text}", "device=cpu", "mixed_precision=no", "batch_size=5")
    model = GPT2LMHeadModel.from_pretrained(gpt2).eval()
    ids = torch.from_numpy(Tokenizer.gpt2().encode(text.read_text(encoding="utf-8")).astype(np.int64))
    total = 0.0
    for start in range(0, len(ids) - 1, CONTEXT):
        row = ids[start : start + CONTEXT + 1]
        with torch.no_grad():
            logits = model(row[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
    assert found["text_loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)


def test_a_byte_order_mark_is_no_text(capsys, gpt2, text, tmp_path):
    words = ["device=cpu", "mixed_precision=no", "eval_iters=1"]
    expected = scores(capsys, "evaluate", str(gpt2), f"text={text}", *words)
    marked = tmp_path / "marked.txt"
    marked.write_bytes(b"\xef\xbb\xbf" + text.read_bytes())
    found = scores(capsys, "evaluate", str(gpt2), f"text={marked}", *words)
    assert {key: found[key] for key in ("text_loss", "tokens")} == {
        key: expected[key] for key in ("text_loss", "tokens")
    }
    marked.write_bytes(text.read_bytes()[:1000] + b"\xe9")
    assert main(["evaluate", str(gpt2), f"text={marked}", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    subprocess.run(line.split("convert it with `")[1].split("`")[0], shell=True, check=True)
    assert scores(capsys, "evaluate", str(gpt2), f"text={marked}", *words)["text_loss"] > 0


def test_progress_goes_to_stderr_and_json_to_stdout(capsys, gpt2, text, monkeypatch):
    expected = scores(capsys, "evaluate", str(gpt2), f"text={text}", "device=cpu", "batch_size=2")
    clock = itertools.count(0, 3)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert main(["evaluate", str(gpt2), f"text={text}", "device=cpu", "batch_size=2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == expected
    lines = [line for line in err.splitlines() if line.startswith("evaluating: ")]
    total = -(-(expected["tokens"] // CONTEXT) // 2) + 1  # the last batch is a shorter block
    assert lines == [
        f"evaluating: {n} of {total} batches, about {duration(3 * (total - n))} left" for n in range(2, total, 2)
    ]  # a progress line every 6 s


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["text=nowhere.txt"], ["text=nowhere.txt", "wikitext2"]),
        (["text=TEXT", "stride=64"], ["stride=64", "block_size=32"]),
        (["text=TEXT", "stride=8", "eval_iters=3"], ["eval_iters=3", "stride"]),
        (["stride=0", "text=TEXT"], ["stride=0"]),
    ],
)
def test_wrong_options_are_reported(capsys, gpt2, text, words, expected):
    words = [word.replace("TEXT", str(text)) for word in words]
    assert main(["evaluate", str(gpt2), *words, "device=cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert [word for word in expected if word not in line] == []


@pytest.fixture
def lm_eval(monkeypatch):
    """A replacement for lm-eval. known: {task or group: list of tasks, or the error when it is loaded}."""
    known, calls = {}, []

    def load(names):
        for name in names if isinstance(names, list) else [names]:
            if isinstance(known.get(name), Exception):
                raise known[name]
        return {"tasks": dict.fromkeys(known.get(names, []) if isinstance(names, str) else []), "groups": {}}

    manager = SimpleNamespace(match_tasks=lambda names: fnmatch.filter(known, names[0]), load=load)
    modules = {
        "lm_eval": {"simple_evaluate": lambda **options: calls.append(options)},
        "lm_eval.tasks": {"TaskManager": lambda include_path: manager},
    }
    for name, values in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**values))
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.12" if name == "lm_eval" else version(name))
    return SimpleNamespace(known=known, calls=calls)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A model of characters in the folder `tiny`, and a text. Return the model."""
    monkeypatch.chdir(tmp_path)
    model = gpt()
    save_model(model, "tiny")
    (tmp_path / "text.txt").write_text("To be, or not to be\n" * 20)
    return model


@pytest.mark.parametrize(("weight", "loss"), [(math.nan, None), (math.inf, None), (1e30, "finite"), (1e4, "finite")])
def test_json_has_null_instead_of_nan_and_infinity(tiny, capsys, weight, loss):
    """A finite loss of 700 nats or more also has an infinite perplexity."""
    with torch.no_grad():
        tiny.transformer.ln_f.weight[:] = weight
    tiny.save_pretrained("tiny")
    assert main(["evaluate", "tiny", "text=text.txt", "device=cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["perplexity"] is None and (found["text_loss"] is None) == (loss is None)
    assert loss is None or found["text_loss"] > 700


def test_scores_of_tasks_have_null_instead_of_nan(tiny, capsys, monkeypatch):
    """lm-eval's standard error of a single question is NaN."""
    scores = {"parity": {"acc,none": 0.5, "acc_stderr,none": math.nan}}
    for name, result in (("check_tasks", []), ("load_tasks", None), ("score_tasks", scores)):
        monkeypatch.setattr(f"nanogpt_accel.commands.evaluate.{name}", lambda *args, result=result: result)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", SimpleNamespace(HFLM=dict))
    assert main(["evaluate", "tiny", "tasks=parity", "device=cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["tasks"] == {"parity": {"acc,none": 0.5, "acc_stderr,none": None}}


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny, capsys):
    Tokenizer.char([*map(chr, range(1, 200))]).save("tiny")
    assert main(["evaluate", "tiny", "text=text.txt", "device=cpu"]) == 2
    assert "the tokenizer has 200 tokens, but the model has only 80 embeddings" in capsys.readouterr().err


def test_characters_that_the_tokenizer_loses_are_reported(tiny, capsys, tmp_path):
    """A BPE without an unknown token silently drops characters that it does not know, so bits per byte is too low."""
    backend = Backend(models.BPE({c: i for i, c in enumerate("To be,\nrnt")}, []))
    backend.decoder = decoders.Fuse()
    backend.save("tiny/tokenizer.json")
    for text, lost in (
        ("To be\n" * 20, ""),
        ("To bé, 世\n" * 20, "40 of 180 characters are lost: 'é' (20), '世' (20)"),
    ):
        (tmp_path / "text.txt").write_text(text)
        assert main(["evaluate", "tiny", "text=text.txt", "device=cpu"]) == 0
        warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        assert len(warnings) == bool(lost) and lost in "".join(warnings)


@pytest.mark.parametrize("version", [None, "0.4.9", "0.4.11"])
def test_tasks_without_a_recent_lm_eval_are_refused(call, gpt2, monkeypatch, version):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    monkeypatch.setattr("nanogpt_accel.models.tasks.find_spec", lambda name: None)
    (line,) = call("evaluate", gpt2, "tasks=hellaswag", status=2).splitlines()
    # the command works in a clone, a wheel or a copy of the package, and has the version that setup.cfg requires
    (requirement,) = re.findall(r"tasks=hellaswag: .*; run pip install \"(lm-eval>=[\d.]+)\"$", line)
    assert f"\neval = {requirement}\n" in (REPOSITORY / "setup.cfg").read_text()


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub\n(OfflineModeIsEnabled)"),
        FileNotFoundError("Unable to find 'rows.jsonl'"),
        RuntimeError("Dataset scripts are no longer supported"),
        ModuleNotFoundError("No module named 'antlr4'"),
        ValueError("Duplicate task 'a': found in both 'b' and 'c'"),
        KeyError(),
    ],
)
def test_task_that_cannot_be_loaded_is_reported_before_the_model_is_loaded(call, lm_eval, monkeypatch, gpt2, error):
    monkeypatch.setattr("nanogpt_accel.commands.evaluate.find_model", lambda *args, **options: pytest.fail("too late"))
    lm_eval.known.update(arc=["arc"], hellaswag=error)
    *progress, line = call("evaluate", gpt2, "tasks=hellaswag", "device=cpu", status=2).splitlines()
    assert progress == ["loading lm-eval and its tasks hellaswag"]
    assert line.startswith(
        f"error: tasks=hellaswag: lm-eval cannot load this task or its dataset ({type(error).__name__}: "
    )
    assert "check the network, HF_HUB_OFFLINE" in line and not lm_eval.calls


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tasks=hellaswig,arc"], "tasks=hellaswig: unknown to lm-eval"),
        (["tasks=arc", "tasks_dir=gone"], "tasks_dir=gone: no such folder"),
        (["tasks=arc", "device=cuda:99"], "device=cuda:99"),
    ],
)
def test_wrong_tasks_are_reported_before_the_model_is_loaded(call, lm_eval, monkeypatch, gpt2, words, message):
    monkeypatch.setattr("nanogpt_accel.commands.evaluate.find_model", lambda *args, **options: pytest.fail("too late"))
    lm_eval.known["arc"] = ["arc"]
    assert f"error: {message}" in call("evaluate", gpt2, *words, status=2).splitlines()[-1]
    assert "./gone: no such folder" in call("evaluate", "./gone", "tasks=arc", status=2).splitlines()[-1]


@pytest.mark.slow
def test_accuracy_on_an_lm_eval_task_is_that_of_the_likelihoods(capsys, gpt2, tmp_path, monkeypatch):
    """A local task has two choices. The expected accuracy is computed by hand: the choice with the higher
    log-likelihood counts."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    rows = [{"question": f"the {n} of", "choices": [" may", " see"], "answer": n % 2} for n in range(20)]
    write_lm_eval_task(tmp_path, rows, "parity", "parity_too")
    (tmp_path / "both.yaml").write_text("group: both\ntask: [parity, parity_too]\n")
    folder = [f"tasks_dir={tmp_path}", "device=cpu"]
    for name, reason in (("hellaswag", "ConnectionError: "), ("both,parity", "Duplicate task")):
        assert main(["evaluate", str(gpt2), f"tasks={name}", *folder]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: tasks=") and "cannot load this task" in line and reason in line
    assert scores(capsys, "evaluate", str(gpt2), "tasks=both", *folder)["tasks"].keys() == {
        "parity",
        "parity_too",
        "both",
    }
    found = scores(capsys, "evaluate", str(gpt2), "tasks=parity*", *folder)
    assert found["tasks"].keys() == {"parity", "parity_too"}
    model, tokenizer = GPT2LMHeadModel.from_pretrained(gpt2).eval(), Tokenizer.gpt2()

    def likelihood(question, choice):
        before, after = tokenizer.encode(question), tokenizer.encode(question + choice)
        with torch.no_grad():
            logs = model(torch.tensor([after.tolist()])).logits[0].log_softmax(-1)
        return sum(logs[i - 1, after[i]].item() for i in range(len(before), len(after)))

    right = 0
    for row in rows:
        first, second = (likelihood(row["question"], choice) for choice in row["choices"])
        right += (second > first) == row["answer"]
    assert 0 < right < 20
    assert found["tasks"]["parity"]["acc,none"] == pytest.approx(right / 20)
    assert found["tasks"]["parity"]["acc_stderr,none"] > 0
