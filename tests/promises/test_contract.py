"""Our class gives the same numbers as its stock export in transformers, PEFT, TRL and exporters.

The checks are in support/contract.py, which also prints them as a table. By default, a few fast ones run with the class
of the package. The slow tests run all of them, also with the remote code of the checkpoint.
"""

import subprocess
import sys

import contract
import pytest
from contract import CHECKS, FORMS, compare, run_form, write_models

CLIENTS = ("peft", "trl", "sentence_transformers", "onnxruntime", "executorch")
FAST = [  # (check, form); the other forms are slow
    ("Trainer: predict", "gpt2_bias"),
    ("Trainer: load best", "nanochat"),
    ("Trainer: accumulation, padded", "llama"),
    ("generate: beams", "llama"),
    ("generate: assisted", "gpt2"),
    ("generate: prompt lookup", "nanochat"),
    ("generate: static cache", "gpt2"),
    ("generate: left padding", "gpt2"),
    ("generate: inputs_embeds", "llama"),
    ("generate_batch (continuous batching)", "gpt2"),
    ("pipeline: batched", "gpt2"),
    ("resize_token_embeddings", "nanochat"),
    ("deepcopy, pickle", "llama"),
    ("bfloat16, float16", "qwen3"),
    ("disk offload", "gpt2"),
    ("AutoModelForSequenceClassification", "nanochat"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a function: form -> (GPT, stock export), which writes them once."""
    written = {}

    def models(form):
        if form not in written:
            written[form] = write_models(form, tmp_path_factory.mktemp(form))
        return written[form]

    return models


@pytest.mark.parametrize("check, form", FAST)
def test_gpt_equals_its_export(check, form, models, tmp_path):
    function, _ = CHECKS[check]
    ours, theirs = (function(subject, tmp_path / kind) for kind, subject in zip("ab", models(form), strict=True))
    differences, failed = compare(ours, theirs)
    assert not failed, differences


def run_all(form, names, folder):
    rows = run_form(form, names, folder)
    failed = [row for row in rows if row[1:4] != ("ok", "ok", "ok")]
    assert not failed, failed


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_package_and_remote_code_equal_the_export_in_transformers(form, tmp_path):
    run_all(form, [name for name in CHECKS if CHECKS[name][1] not in CLIENTS], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_package_and_remote_code_equal_the_export_in_clients(form, tmp_path):
    for client in CLIENTS:
        pytest.importorskip(client, reason='pip install -e ".[clients]"')
    run_all(form, [name for name in CHECKS if CHECKS[name][1] in CLIENTS], tmp_path)


@pytest.mark.slow
def test_script_prints_a_table(tmp_path):
    command = [sys.executable, contract.__file__, "llama", "--only", "from_config", "--folder", tmp_path]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert table[2].startswith("| from_config | transformers ") and " | llama | ok | ok | ok | " in table[2]
