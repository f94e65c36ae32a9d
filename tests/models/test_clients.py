"""Exported folders in other tools: servers, trainers, evaluators and inference engines, without this package.

PEFT, TRL, ONNX and ExecuTorch are in promises/test_contract.py. Each test needs an optional package, and is skipped if
that is not installed. The README lists the versions that were tested. No test uses the network.
"""

import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanogpt_accel.data.tokenizer import Tokenizer
from nanogpt_accel.model import GPT, GPTConfig
from nanogpt_accel.models.export import stock_vocab_size, write_model
from nanogpt_accel.models.stock import nearest_architecture

pytestmark = pytest.mark.slow

PROMPT = "the first one, and"
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
MODERN = {"norm": "rmsnorm", "position": "rotary", "rope_theta": 50_000.0, "activation": "swiglu", "n_kv_head": 2}
SHAPES = {
    "gpt2": {},  # zero biases in the export, exact GELU, tied head
    "gpt2_bias": {"bias": True, "activation": "gelu_new"},
    "llama": MODERN,
    "llama_untied": MODERN | {"tie_word_embeddings": False},
    "qwen3": MODERN | {"qk_norm": True, "head_dim": 32},
}


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory):
    """Return the path of a stock export, as str, of a small random model with a padded vocabulary."""
    tokenizer = Tokenizer.train_bpe(["the first one, and the second one, and the third\n" * 9], 320)
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            vocab_size=384,
            block_size=64,
            n_layer=2,
            n_head=4,
            n_embd=64,
            initializer_range=0.2,
            **SHAPES[request.param],
        )
    ).eval()
    to = tmp_path_factory.mktemp("exports") / request.param
    write_model(
        model,
        to,
        nearest_architecture(model.config.resolved())[0],
        tokenizer=tokenizer,
        card="",
        vocab_size=stock_vocab_size(tokenizer),
    )
    return str(to)


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def run(*command, **options):
    """Run a program, and show its output if it fails."""
    done = subprocess.run([str(c) for c in command], env=ENV, text=True, timeout=300, capture_output=True, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@torch.no_grad()
def greedy(model, ids, n):
    """Return the n greedy ids after `ids`, by transformers, whatever generation_config.json contains."""
    prompt = torch.tensor([ids])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, do_sample=False)
    return out[0, len(ids) :].tolist()


@torch.no_grad()
def logits_of(model, ids):
    return model(torch.tensor([ids])).logits[0]  # (T, V)


def test_transformers_serve_completes_a_prompt(folder, tmp_path):
    """A base model has no chat template, so the test uses /v1/completions."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason="pip install 'transformers[serving]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--device", "cpu"]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], env=ENV, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.3)
        # without max_tokens the server asks for 1024, more than a small model has positions
        body = {"model": folder, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
    finally:
        server.terminate()
        server.wait(30)
    model, tokenizer = load(folder)
    ids = tokenizer(PROMPT)["input_ids"]
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["choices"][0]["text"] == tokenizer.decode(greedy(model, ids, 12), skip_special_tokens=True)


def test_lm_eval_scores_local_tasks(folder, tmp_path):
    """Bits per byte equal those of the logits, and a multiple-choice task runs."""
    pytest.importorskip("lm_eval", reason="pip install 'lm-eval[hf]'")
    (tmp_path / "tasks").mkdir()
    texts, questions = tmp_path / "texts.jsonl", tmp_path / "questions.jsonl"
    texts.write_text(json.dumps({"text": PROMPT}) + "\n")
    rows = [{"question": "the first", "choices": ["one", "and"], "answer": i} for i in (0, 1)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # JSON is YAML
    common = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
    (tmp_path / "tasks" / "bits.yaml").write_text(
        json.dumps(
            common
            | {
                "task": "local_bits",
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{text}}",
                "dataset_kwargs": {"data_files": {"test": str(texts)}},
                "metric_list": [{"metric": "bits_per_byte"}],
            }
        )
    )
    (tmp_path / "tasks" / "choice.yaml").write_text(
        json.dumps(
            common
            | {
                "task": "local_choice",
                "output_type": "multiple_choice",
                "doc_to_text": "{{question}}",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "{{answer}}",
                "dataset_kwargs": {"data_files": {"test": str(questions)}},
                "metric_list": [{"metric": "acc"}],
            }
        )
    )
    run(
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={folder},dtype=float32",
        "--include_path",
        tmp_path / "tasks",
        "--tasks",
        "local_bits,local_choice",
        "--device",
        "cpu",
        "--output_path",
        tmp_path / "out",
        cwd=tmp_path,
    )
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]
    model, tokenizer = load(folder)
    ids = [
        tokenizer.eos_token_id,
        *tokenizer(PROMPT)["input_ids"],
    ]  # lm-eval starts a text with bos, here the same as eos
    nats = torch.nn.functional.cross_entropy(logits_of(model, ids[:-1]), torch.tensor(ids[1:]), reduction="sum").item()
    bits = nats / math.log(2) / len(PROMPT.encode())
    assert results["local_bits"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    assert results["local_choice"]["acc,none"] == 0.5  # the same question with two answers: one of them is chosen


def test_ctranslate2_agrees(folder, tmp_path):
    """An engine without torch gives the same logits and the same greedy text."""
    ctranslate2 = pytest.importorskip("ctranslate2", reason="pip install ctranslate2")
    np = pytest.importorskip("numpy")
    ctranslate2.converters.TransformersConverter(folder).convert(str(tmp_path / "ct2"))
    engine = ctranslate2.Generator(str(tmp_path / "ct2"), compute_type="float32")
    model, tokenizer = load(folder)
    ids = tokenizer(PROMPT)["input_ids"]
    theirs = torch.from_numpy(np.array(engine.forward_batch([ids]))[0])
    torch.testing.assert_close(theirs, logits_of(model, ids), atol=1e-3, rtol=1e-3)
    answer = engine.generate_batch(
        [tokenizer.convert_ids_to_tokens(ids)], max_length=12, sampling_topk=1, include_prompt_in_result=False
    )[0]
    ours = [i for i in greedy(model, ids, 12) if i != tokenizer.eos_token_id]  # ctranslate2 leaves the last eos out
    assert answer.sequences_ids[0] == ours


READ = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, out = sys.argv[1:]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
inputs = tokenizer(text, return_tensors="pt")
with torch.no_grad():
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist()
    torch.save([model(**inputs).logits[0], ids], out)
"""


def test_transformers_4_reads_the_same(folder, tmp_path):
    """Pass all outputs of the tokenizer to the model, as users do; there must be no token_type_ids."""
    python = os.environ.get("TRANSFORMERS_4_PYTHON")
    if not python:
        pytest.skip("set TRANSFORMERS_4_PYTHON to a Python that has torch and transformers 4")
    (tmp_path / "read.py").write_text(READ)
    run(python, tmp_path / "read.py", folder, PROMPT, tmp_path / "out.pt")
    logits, ids = torch.load(tmp_path / "out.pt")
    model, tokenizer = load(folder)
    prompt = tokenizer(PROMPT)["input_ids"]
    torch.testing.assert_close(logits, logits_of(model, prompt), atol=1e-5, rtol=1e-5)
    assert ids == prompt + greedy(model, prompt, 12)
