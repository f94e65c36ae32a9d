"""The Hub: push, pull, and the pushes of a run, against a fake Hub on this machine (hub_server.py).

huggingface_hub reads its settings when it is imported, so every command runs in a child process that only knows the
fake Hub. One child runs many commands, because torch and transformers take seconds to import.
"""

import json
import math
import os
import queue
import random
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hub_server import HubServer, card_errors

import nanogpt_accel
from nanogpt_accel.hub.card import adapt_usage
from nanogpt_accel.hub.merge_card import merge_card
from nanogpt_accel.tracking.metrics_log import read_metrics

PACKAGE = str(Path(nanogpt_accel.__file__).parents[1])
TOKENS = {"hf_test": "me", "hf_test_other": "other"}
BLOCK = 16
RECIPE = f"""
data: {{corpus: text.txt, tokenizer: char, val_fraction: 0.1}}
model: {{n_layer: 1, n_embd: 16, n_head: 2, block_size: {BLOCK}, pad_vocab_to_multiple_of: 7}}
optimizer: {{learning_rate: 1e-2, warmup_iters: 2}}
train: {{batch_size: 2, gradient_accumulation_steps: 2, max_iters: 8, eval_interval: 2, eval_iters: 2, device: cpu}}
checkpoint: {{keep_last: 1}}
"""
EVERY_FILE = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
}
# executes code that it receives as lines of JSON, and answers with the exit status; its output goes to two files
CHILD = """
import json, os, sys, traceback
answers = os.fdopen(os.dup(1), "w")
for number, file in enumerate(sys.argv[1:], 1):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
names = {}
for line in sys.stdin:
    env, code = json.loads(line)
    for key, value in env.items():
        os.environ.pop(key, None) if value is None else os.environ.update({key: value})
    status = 0
    try:
        exec(code, names)
        status = names.pop("status", 0)
    except BaseException:
        status = 99
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    print(status, file=answers, flush=True)
"""

LOGITS = """
import json, torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
def logits(name, **more):
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **more).eval()
    with torch.no_grad():
        print(json.dumps([type(model).__name__, model(torch.arange(6)[None]).logits.flatten().tolist()]))
"""


class Child:
    """A process that runs commands in `folder` with this environment."""

    def __init__(self, env, folder, name):
        self.output = ""  # the output of all commands
        self.files = [folder / f"{name}.{kind}" for kind in ("out", "err")]
        self.read = [0, 0]  # the number of characters read from each file
        env |= {"PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *map(str, self.files)],
            env=env,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answers = queue.Queue()
        threading.Thread(target=lambda: [self.answers.put(line) for line in self.process.stdout], daemon=True).start()

    def start(self, code, env=None):
        self.process.stdin.write(json.dumps([env or {}, code]) + "\n")
        self.process.stdin.flush()

    def result(self):
        """Return (status, out, err) of the command that was started."""
        status = int(self.answers.get(timeout=60))
        texts = []
        for i, file in enumerate(self.files):
            text = file.read_text()
            texts.append(text[self.read[i] :])
            self.read[i] = len(text)
        self.output += "".join(texts)
        return status, *texts

    def python(self, code):
        """Run code, which must succeed, and return its output."""
        self.start(code)
        status, out, err = self.result()
        assert status == 0, err
        return out

    def __call__(self, *argv, token="hf_test", mean_loss=None):
        """Return (status, out, err) of a command. mean_loss: code that replaces evaluation.mean_loss."""
        code = f"from nanogpt_accel.__main__ import main\nstatus = main({[str(word) for word in argv]!r})"
        if mean_loss is not None:
            indented = code.replace("\n", "\n    ")
            code = (
                "import itertools, threading, time\nfrom unittest import mock\nfrom nanogpt_accel import evaluation\n"
                f"true_mean_loss = evaluation.mean_loss\n{mean_loss}\n"
                f"with mock.patch('nanogpt_accel.training.mean_loss', mean_loss):\n    {indented}"
            )
        self.start(code, {"HF_TOKEN": token})
        return self.result()

    def ok(self, *argv, **more):
        """Return the output of a command, which must succeed."""
        status, out, err = self(*argv, **more)
        assert status == 0, err
        return out

    def refused(self, *argv, lines=1, **more):
        """Return the error message of a command. lines: the number of lines on stderr; None: any number."""
        status, out, err = self(*argv, **more)
        err_lines = err.splitlines()
        assert status == 2 and "Traceback" not in err and "iter 0" not in out, out + err
        assert [line for line in err_lines if line.startswith("error: ")] == err_lines[-1:], err
        assert lines is None or len(err_lines) == lines, err
        return err_lines[-1].removeprefix("error: ")

    def close(self):
        self.process.kill()
        self.process.wait()


class SlowHub(HubServer):
    """A Hub that delays the first request whose path contains `delayed_path` until `until()` is true."""

    delayed_path, until, waited = None, None, False

    def fault(self, request):
        if self.delayed_path and self.delayed_path in request.path:
            self.delayed_path, deadline = None, time.monotonic() + 10
            while not self.until() and time.monotonic() < deadline:
                time.sleep(0.02)
            self.waited = self.until()
        return super().fault(request)


@pytest.fixture(scope="module")
def hub():
    with SlowHub(TOKENS) as hub:
        yield hub


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder in which every command runs, with a text and tiny.yaml."""
    folder = tmp_path_factory.mktemp("hub")
    draw = random.Random(3)
    (folder / "text.txt").write_text("".join(draw.choice(["abc ", "bad ", "cede "]) for _ in range(800)))
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def clean_child_and_hub(place):
    """Return (child, hub): a child process that does not import this package, and a separate Hub."""
    with HubServer(TOKENS) as hub:
        env = hub.env(place / "home2", token=None, NANOGPT_ACCEL_CACHE=str(place / "cache"))
        child = Child(env, place, "clean_child")
        child.start(LOGITS)  # takes seconds; the other child trains in the meantime
        yield child, hub
        child.close()


@pytest.fixture(scope="module")
def child(hub, place, clean_child_and_hub):
    """A child that has trained runs/tiny. Its only token is the one passed to each command."""
    child = Child(hub.env(place / "home", token=None, NANOGPT_ACCEL_CACHE=str(place / "cache")), place, "child")
    child.ok("train", "tiny.yaml")
    yield child
    child.close()


@pytest.fixture(scope="module")
def loaded(pushed, hub, clean_child_and_hub):
    """The logits of the pushed models, loaded by transformers without this package."""
    child, their_hub = clean_child_and_hub
    assert child.result()[0] == 0
    their_hub.repos = hub.repos
    child.start(
        "import os; os.environ['HF_TOKEN'] = 'hf_test'\nlogits('me/tiny')\n"
        "logits('me/secret', revision='dev', trust_remote_code=True)\n"
        "import sys; status = int('nanogpt_accel' in sys.modules)"
    )
    status, out, err = child.result()
    assert status == 0, err
    return list(map(json.loads, out.splitlines()))


@pytest.fixture(scope="module")
def no_hub(loaded, clean_child_and_hub):
    """A child that cannot reach its Hub."""
    child, their_hub = clean_child_and_hub
    their_hub.close()
    return child


@pytest.fixture(scope="module")
def pushed(child, hub):
    """Push runs/tiny twice: to me/tiny, as stock model, and to me/secret@dev, as custom model and private."""
    first = child("push", "runs/tiny", "me/tiny")
    second = child("push", "runs/tiny", "me/secret", "--form", "custom", "branch=dev", "--private")
    return first, second


@pytest.fixture
def run(child, place):
    return place / "runs" / "tiny"


@pytest.fixture(autouse=True)
def restore_hub(request):
    """Make the Hub work again after every test."""
    yield
    if "hub" in request.fixturenames:
        hub = request.getfixturevalue("hub")
        hub.faults.clear()
        hub.delayed_path = None


def steps(titles):
    return [int(title.split("step ")[1].split(",")[0]) for title in titles]


def losses(folder, key="loss"):
    return [line[key] for line in read_metrics(folder / "metrics.jsonl") if key in line]


def commits(hub, repo, **more):
    """Return the titles of the commits that were pushed, oldest first."""
    first, *titles = [title for title, _ in hub.commits(repo, **more)]
    assert first == "initial commit"
    return titles


# ---- push


def test_push_writes_a_stock_model_and_its_card(pushed, hub, run):
    (status, out, err), _ = pushed
    assert status == 0 and out.startswith(hub.url + "/me/tiny/commit/") and "GPT2LMHeadModel" in err
    files = hub.files("me/tiny")
    assert files.keys() == EVERY_FILE | {".gitattributes"}
    assert json.loads(files["config.json"])["model_type"] == "gpt2"
    assert commits(hub, "me/tiny") == ["tiny, checkpoint-000008"]
    assert not hub.repos["me/tiny"].private
    card = files["README.md"].decode()
    assert card_errors(card) == [] and "trust_remote_code" not in card and 'path = "me/tiny"\n' in card
    assert (run / "tokenizer.json").read_bytes() == files["tokenizer.json"]


def test_push_form_custom_to_a_branch_of_a_private_repository(pushed, hub):
    assert pushed[1][0] == 0
    files = hub.files("me/secret", "dev")
    assert files.keys() == EVERY_FILE | {".gitattributes", "model.py"}
    assert json.loads(files["config.json"])["model_type"] == "nanogpt_accel"
    card = files["README.md"].decode()
    assert card_errors(card) == [] and 'path = "me/secret"\n' in card
    assert 'from_pretrained(path, revision="dev", trust_remote_code=True)' in card
    assert commits(hub, "me/secret") == [] and hub.repos["me/secret"].private


def test_transformers_alone_loads_a_pushed_model(loaded, child):
    """The process that loads the model does not import this package."""
    (stock, theirs), (custom, ours) = loaded
    _, here = json.loads(child.python(LOGITS + "logits('runs/tiny')"))
    assert (stock, custom) == ("GPT2LMHeadModel", "GPT") and len(here) == 6 * 7  # 6 characters and a padding token
    assert theirs == pytest.approx(here, abs=1e-5) and ours == pytest.approx(here, abs=1e-5)


def test_a_repeated_push_uploads_nothing(pushed, child, hub):
    sent, before = hub.bytes_received("PUT"), hub.commits("me/tiny")
    assert hub.url in child.ok("push", "runs/tiny", "me/tiny")
    assert hub.bytes_received("PUT") == sent and hub.commits("me/tiny") == before
    before = hub.commits("me/secret", "dev")
    child.ok("push", "runs/tiny", "me/secret", "form=custom", "branch=dev")
    assert hub.bytes_received("PUT") == sent and hub.commits("me/secret", "dev") == before


def test_a_failed_push_resumes_without_sending_weights_again(child, hub):
    """The Hub fails after the upload of the weights, before the commit."""
    hub.fail(1, 500, method="POST", path="/me/broken/commit/")
    line = child.refused("push", "runs/tiny", "me/broken", lines=5)
    assert line.startswith("me/broken: ") and "500" in line
    assert commits(hub, "me/broken") == []
    sent = hub.bytes_received("PUT")
    child.ok("push", "runs/tiny", "me/broken")
    assert hub.bytes_received("PUT") == sent
    assert hub.files("me/broken").keys() == EVERY_FILE | {".gitattributes"}
    assert commits(hub, "me/broken") == ["tiny, checkpoint-000008"]


OWN_TEXT = "Trained by me, for poems."


def edit_card(hub, repo, **more):
    """Commit a card with another license and own text, as a user would on the Hub. A second call does nothing."""
    card = hub.files(repo, **more)["README.md"].decode()
    edited = card.replace("---\n\n<!--", f"license: mit\n---\n\n# Poems\n\n{OWN_TEXT}\n\n<!--", 1)
    return edited == card or hub.add(repo, {"README.md": edited.encode()}, **more)


def is_kept(card):
    return OWN_TEXT in card and "\nlicense: mit\n" in card and card_errors(card) == []


def test_a_push_keeps_a_card_that_was_edited_on_the_hub(child, hub):
    child.ok("push", "runs/tiny", "me/poems")
    edit_card(hub, "me/poems")
    child.ok("push", "runs/tiny", "me/poems", "form=custom")
    card = hub.files("me/poems")["README.md"].decode()
    assert is_kept(card) and card.count("trust_remote_code=True") == 2 and card.count("# tiny") == 1
    before = hub.commits("me/poems")
    child.ok("push", "runs/tiny", "me/poems", "form=custom")
    assert hub.commits("me/poems") == before


def test_a_card_that_is_edited_during_a_push_is_kept(child, hub):
    child.ok("push", "runs/tiny", "me/race")
    hub.delayed_path, hub.until = "/me/race/commit/", lambda: edit_card(hub, "me/race")
    child.ok("push", "runs/tiny", "me/race", "dtype=bfloat16")
    assert hub.waited and is_kept(hub.files("me/race")["README.md"].decode())
    assert commits(hub, "me/race")[-1] == "tiny, checkpoint-000008"


def test_an_edited_section_of_a_card_is_kept_and_reported(child, hub):
    child.ok("push", "runs/tiny", "me/changed")
    card = hub.files("me/changed")["README.md"].decode().replace("# tiny", "# My own title")
    hub.add("me/changed", {"README.md": card.encode()})
    status, _, err = child("push", "runs/tiny", "me/changed", "dtype=bfloat16")
    assert status == 0 and "warning: me/changed: README.md on the Hub keeps its text" in err
    assert hub.files("me/changed")["README.md"].decode() == card


# ---- pull


def test_sample_accepts_a_hub_id(pushed, child):
    options = ["prompt=ab", "num_samples=1", "max_new_tokens=9", "temperature=0"]
    here = child.ok("sample", "runs/tiny", *options)
    assert here.startswith("ab")
    assert child.ok("sample", "me/tiny", *options) == here
    assert child.ok("sample", "me/secret@dev", *options) == here
    assert child.ok("sample", "me/tiny@main", *options) == here


def test_evaluate_accepts_a_hub_id(pushed, child):
    options = ["--recipe", "tiny.yaml", "--json"]
    there = json.loads(child.ok("evaluate", "me/tiny", *options))
    here = json.loads(child.ok("evaluate", "runs/tiny", *options))
    assert there["val_loss"] == pytest.approx(here["val_loss"], abs=1e-6) and there["tokens"] == here["tokens"]


def test_init_from_accepts_a_hub_id(pushed, child, place, run):
    child.ok("train", "tiny.yaml", "init_from=me/tiny", "out_dir=runs/next", "max_iters=2")
    before, after = losses(run, "val_loss"), losses(place / "runs" / "next", "val_loss")
    assert after[0] == pytest.approx(before[-1], abs=1e-6)
    child.ok("train", "runs/next", "max_iters=3")  # and can be continued
    assert losses(place / "runs" / "next", "step") == [0, 0, 1, 2, 2, 3]


def test_export_accepts_a_hub_id(pushed, child, place, hub):
    child.ok("export", "me/secret@dev", "--to", "exported")
    files = {path.name: path.read_bytes() for path in (place / "exported").iterdir()}
    pushed = hub.files("me/tiny")
    assert files.keys() == EVERY_FILE and files["model.safetensors"] == pushed["model.safetensors"]


GPT2 = f"""
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
torch.manual_seed(1)
model = GPT2LMHeadModel(GPT2Config(vocab_size=6, n_positions={BLOCK}, n_embd=16, n_layer=2, n_head=2,
                                   bos_token_id=None, eos_token_id=None))
model.save_pretrained("theirs")
torch.save({{name: tensor.clone() for name, tensor in model.state_dict().items()}}, "theirs.bin")
AutoTokenizer.from_pretrained("runs/tiny").save_pretrained("theirs")
"""


def test_download_fetches_only_the_needed_files(child, hub, place):
    """Weights for other frameworks are not downloaded."""
    child.python(GPT2)
    files = {path.name: path.read_bytes() for path in (place / "theirs").iterdir()}
    junk = {
        "onnx/model.onnx",
        "tf_model.h5",
        "flax_model.msgpack",
        "rust_model.ot",
        "pytorch_model.bin",
        "64.tflite",
        "onnx/config.json",
        "training_args.bin",
        "state/optimizer.safetensors",
    }
    hub.add("they/gpt2", files | {name: b"\0junk" * 99 for name in junk})
    hub.requests.clear()
    options = ["prompt=ab", "temperature=0", "num_samples=1", "max_new_tokens=9"]
    text = child.ok("sample", "they/gpt2", *options, token=None)
    assert child.ok("sample", "theirs", *options) == text
    fetched = {
        request.path.split("/resolve/")[1].split("/", 1)[1]
        for request in hub.requests
        if "/they/gpt2/resolve/" in request.path
    }
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched and not fetched & junk

    # an older repository only has PyTorch's format
    old = {name: content for name, content in files.items() if name != "model.safetensors"}
    hub.add("they/old", old | {"pytorch_model.bin": (place / "theirs.bin").read_bytes(), "tf_model.h5": b"\0junk"})
    assert child.ok("sample", "they/old", *options, token=None) == text


def test_push_accepts_a_hub_id(child, hub, place):
    child.python(GPT2)
    hub.add("they/model", {path.name: path.read_bytes() for path in (place / "theirs").iterdir()})
    child.ok("push", "they/model", "me/copy", "--private")
    assert hub.files("me/copy").keys() == EVERY_FILE | {".gitattributes"} and hub.repos["me/copy"].private


def test_the_card_of_a_hub_model_has_its_name(child, hub, place):
    child.python(GPT2)
    hub.add("they/named", {path.name: path.read_bytes() for path in (place / "theirs").iterdir()})
    child.ok("export", "they/named", "to=named")
    (title,) = [line for line in (place / "named" / "README.md").read_text().splitlines() if line.startswith("# ")]
    assert title in ("# named", "# they/named")


# ---- the pushes of a run

PUSH = ["push_to_hub=true", "hub_model_id=me/{0}", "out_dir=runs/{0}"]


def pushing(name):
    return ["train", "tiny.yaml", *(word.format(name) for word in PUSH)]


def closing(out):
    return out.splitlines()[-1]


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".") and ".lock" not in path.name]


def test_the_loop_does_not_wait_for_a_push(child, hub, place, run):
    """The Hub does not answer until all steps are logged and the checkpoint being pushed is pruned."""
    folder = place / "runs" / "slow"
    hub.waited, hub.until = (
        False,
        lambda: (folder / "loss.png").exists() and not (folder / "checkpoint-000002").exists(),
    )
    hub.delayed_path = "/me/slow/preupload/"
    out = child.ok(*pushing("slow"))
    assert hub.waited, "the run waited until the Hub answered"
    assert "warning" not in out and closing(out) == "pushed to the Hub: me/slow"
    # checkpoints in between may be skipped
    first, *_, last = titles = commits(hub, "me/slow")
    assert first.startswith("slow, step 2, validation loss ") and len(titles) <= 3
    assert losses(folder) == losses(run) and losses(folder, "val_loss") == losses(run, "val_loss")
    assert leftovers(folder) == []
    # the commit of the pruned checkpoint is complete
    files = hub.files("me/slow", hub.commits("me/slow")[1][1])
    assert files.keys() == EVERY_FILE | {".gitattributes", "model.py"}
    assert "after 2 steps" in files["README.md"].decode()


def test_the_pushes_of_a_run_keep_an_edited_card(child, hub, place):
    """The repository has a card before the run, which is edited again during the run."""
    own = "---\nlicense: mit\n---\n# Poems\n\nTrained by me.\n"
    hub.add("me/verses", {"README.md": own.encode()})

    def edit():
        card = hub.files("me/verses")["README.md"].decode()
        return hub.add("me/verses", {"README.md": card.replace("Trained by me.", OWN_TEXT).encode()})

    hub.delayed_path, hub.until = "/me/verses/commit/", edit
    out = child.ok(*pushing("verses"))
    assert hub.waited and closing(out) == "pushed to the Hub: me/verses" and "warning" not in out
    card = hub.files("me/verses")["README.md"].decode()
    assert is_kept(card) and "after 8 steps" in card and card.count("## Evaluation") == 1
    local = (place / "runs" / "verses" / "checkpoint-000008" / "README.md").read_text()
    assert OWN_TEXT not in local and "nanogpt_accel: section" not in local


def test_every_checkpoint_is_a_commit_in_its_order(child, hub, place):
    """In this test, the run waits for each push."""
    slow_mean_loss = """
def mean_loss(*args):
    while any(thread.name.endswith("(_work)") for thread in threading.enumerate()):
        time.sleep(0.01)
    return true_mean_loss(*args)
"""
    child.ok(*pushing("steady"), "hub_branch=nightly", "hub_private=true", mean_loss=slow_mean_loss)
    folder = place / "runs" / "steady"
    titles = commits(hub, "me/steady", revision="nightly")
    values = {line["step"]: line["val_loss"] for line in read_metrics(folder / "metrics.jsonl") if "val_loss" in line}
    expected = [f"steady, step {step}, validation loss {values[step]:.4f} nats per token" for step in (2, 4, 6, 8)]
    assert titles == expected  # the last one is the best, so it is not pushed again
    assert commits(hub, "me/steady") == [] and hub.repos["me/steady"].private


def test_the_best_checkpoint_is_pushed_last(child, hub, place):
    """The validation losses are fixed; that of step 4 is the best."""
    fixed_mean_loss = "count = itertools.count()\nmean_loss = lambda *args: [4.0, 3.0, 2.0, 2.5, 2.5][next(count) // 2]"
    out = child.ok(*pushing("best"), mean_loss=fixed_mean_loss)
    folder = place / "runs" / "best"
    titles = commits(hub, "me/best")
    assert titles[-1] == "best, step 4, best validation loss" and closing(out) == "pushed to the Hub: me/best"
    assert steps(titles[:-1]) == sorted(steps(titles[:-1])) and steps(titles[-2:-1]) == [8]
    best = folder / "checkpoint-000004"
    files = hub.files("me/best")
    del files[".gitattributes"]
    card, local_card = files.pop("README.md").decode(), (best / "README.md").read_text()
    assert 'path = "me/best"\n' in card and card == merge_card("", adapt_usage(local_card, True, "me/best"))[0]
    assert 'path = "."  # this folder\n' in local_card
    assert files == {path.name: path.read_bytes() for path in best.iterdir() if path.is_file() and path.suffix != ".md"}


def test_failing_pushes_do_not_change_the_run(child, hub, place, run):
    hub.fail(math.inf, 500, method="POST", path="/commit/")
    status, out, err = child(*pushing("down"))
    folder = place / "runs" / "down"
    assert status == 0 and "Traceback" not in err
    (line,) = [line for line in out.splitlines() if line.startswith("warning: not pushed")]  # once
    assert "500" in line
    assert closing(out) == "not pushed to the Hub; retry with: nanogpt-accel push runs/down me/down form=custom"
    assert losses(folder) == losses(run) and losses(folder, "val_loss") == losses(run, "val_loss")
    assert leftovers(folder) == [] and commits(hub, "me/down") == []
    # the suggested command works
    hub.faults.clear()
    child.ok(*closing(out).split("nanogpt-accel ")[1].split())
    assert commits(hub, "me/down") == ["down, checkpoint-000008"]


def test_a_failed_push_is_repeated_with_the_next_checkpoint(child, hub):
    hub.fail(1, 500, method="POST", path="/me/once/commit/")
    out = child.ok(*pushing("once"))
    (warning,) = [line for line in out.splitlines() if "warning" in line]
    assert "step 2" in warning and "Later checkpoints will be pushed as usual" in warning
    assert closing(out) == "pushed to the Hub: me/once" and 8 in steps(commits(hub, "me/once"))


def test_a_run_without_network_finishes(no_hub, place, run):
    """The Hub cannot be reached during the entire run."""
    status, out, err = no_hub(*pushing("alone"))
    assert (status, err) == (0, "")
    lines = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert "the run continues" in lines[0] and "Later checkpoints will be pushed as usual" in lines[1]
    assert closing(out) == "not pushed to the Hub; retry with: nanogpt-accel push runs/alone me/alone form=custom"
    folder = place / "runs" / "alone"
    assert losses(folder) == losses(run) and leftovers(folder) == []


def test_the_suggested_push_command_keeps_private_and_branch(no_hub):
    _, out, _ = no_hub(*pushing("shy"), "hub_private=true", "hub_branch=nightly", "max_iters=2")
    assert "nanogpt-accel push runs/shy me/shy" in closing(out)
    assert "private=true" in closing(out) and "branch=nightly" in closing(out)


def test_a_resumed_run_pushes_its_new_checkpoints(child, hub):
    """The pushes of its first part failed. The repository has the name of the run."""
    hub.fail(math.inf, 500, method="POST", path="/commit/")
    child.ok("train", "tiny.yaml", "out_dir=runs/later", "push_to_hub=true", "max_iters=2")
    assert commits(hub, "me/later") == []
    hub.faults.clear()
    status, out, err = child("train", "runs/later", "max_iters=4")
    assert (status, err, closing(out)) == (0, "", "pushed to the Hub: me/later")
    assert steps(commits(hub, "me/later"))[0] == 4


def test_a_finished_run_does_not_claim_a_push_that_failed(child, hub):
    """The last push failed, and no save follows: the run must push now, or not report success."""
    hub.fail(math.inf, 500, method="POST", path="/me/never/commit/")
    child.ok(*pushing("never"), "max_iters=2")
    hub.faults.clear()
    out = child.ok("train", "runs/never")
    assert commits(hub, "me/never") or closing(out) != "pushed to the Hub: me/never"


# ---- refusals


@pytest.fixture(scope="module")
def others(hub, pushed):
    """Models of other users that cannot be loaded, for different reasons."""
    files = hub.files("me/tiny")
    hub.add("me/hidden", files, private=True)
    hub.add("they/open", files)
    hub.add("they/gated", files, gated=True)
    hub.add("they/private", files, private=True)
    hub.add("they/bert", files | {"config.json": b'{"model_type": "bert", "hidden_size": 8}'})
    hub.add("they/empty", {"config.json": files["config.json"], "README.md": b"hello"})
    hub.add("they/card", {"README.md": b"hello"})


@pytest.fixture
def no_run(place):
    """Check that a refused command has written no model, and delete its folder."""
    yield
    written = [(place / "none").exists(), *(place / "runs").glob("none/checkpoint-*")]
    shutil.rmtree(place / "runs" / "none", ignore_errors=True)
    assert written == [False]


PULLS = [
    ["sample", "{}"],
    ["evaluate", "{}", "--recipe", "tiny.yaml"],
    ["export", "{}", "to=none"],
    ["train", "tiny.yaml", "init_from={}", "out_dir=runs/none"],
    ["push", "{}", "me/none"],
]
PUSHES = [
    ["push", "runs/tiny", "{}"],
    ["train", "tiny.yaml", "push_to_hub=true", "hub_model_id={}", "out_dir=runs/none"],
]


def words_of(uses, name):
    return [[word.format(name) for word in use] for use in uses]


@pytest.mark.parametrize(
    ("name", "token", "words"),
    [
        ("me/nothing", "hf_test", ["me/nothing", "no such folder", "no such model", "private"]),
        ("me/nothing", None, ["me/nothing", "no such model", "private", "hf auth login", "HF_TOKEN"]),
        ("me/tiny@nope", "hf_test", ["me/tiny@nope", "no such branch, tag or commit"]),
        ("me/hidden", None, ["me/hidden", "private", "hf auth login", "HF_TOKEN"]),
        ("they/private", "hf_test", ["they/private", "private"]),
        ("they/gated", "hf_test", ["they/gated", "gated", "accept its terms"]),
        ("they/gated", None, ["they/gated", "gated", "hf auth login"]),
        ("they/open", "hf_wrong", ["they/open", "token", "hf auth login"]),
        ("they/bert", "hf_test", ["model_type=bert", "gpt2, llama, qwen3, nanochat"]),
        ("me/..bad", "hf_test", ["me/..bad", "not a valid name"]),
        ("a/b/c", "hf_test", ["a/b/c", "folder"]),
    ],
)
def test_every_command_explains_why_a_download_fails(child, others, no_run, name, token, words):
    for argv in words_of(PULLS, name)[: None if token == "hf_test" else -1]:  # a push requires a token first
        line = child.refused(*argv, token=token)
        assert not [word for word in words if word not in line], line


@pytest.mark.parametrize(("name", "missing"), [("they/empty", "model.safetensors"), ("they/card", "config.json")])
def test_a_repository_without_weights(child, others, no_run, name, missing):
    for argv in words_of(PULLS, name):
        line = child.refused(*argv, lines=None)
        assert line == f"{name}: not a model folder: {missing} is missing"


def test_a_repository_without_weights_is_one_line(child, others):
    child.refused("sample", "they/empty")


@pytest.mark.parametrize(
    ("repo", "token", "words"),
    [
        ("me/new", None, ["me/new", "no token", "hf auth login", "HF_TOKEN"]),
        ("me/new", "hf_wrong", ["me/new", "token", "hf auth login"]),
        ("they/new", "hf_test", ["they/new", "token", "write access"]),
        ("a/b/c", "hf_test", ["a/b/c", "USER/NAME"]),
        ("me/..bad", "hf_test", ["me/..bad", "USER/NAME"]),
    ],
)
def test_a_refused_push_names_the_reason_and_creates_nothing(child, hub, no_run, repo, token, words):
    before = set(hub.repos)
    for argv in words_of(PUSHES, repo):
        line = child.refused(*argv, token=token)
        assert not [word for word in words if word not in line], line
    assert set(hub.repos) == before


def test_a_push_to_the_repository_of_another_user_is_refused(child, pushed, hub):
    """The repository exists and is readable, so only the push itself is refused."""
    before = hub.commits("me/tiny")
    line = child.refused("push", "runs/tiny", "me/tiny", token="hf_test_other")
    assert "me/tiny" in line and "write access" in line and hub.commits("me/tiny") == before


def test_a_run_that_may_not_push_is_refused(child, pushed):
    child.refused(
        "train",
        "tiny.yaml",
        "push_to_hub=true",
        "hub_model_id=me/tiny",
        "out_dir=runs/theirs",
        "max_iters=2",
        token="hf_test_other",
    )


def test_a_refused_push_does_not_overwrite_a_run(child, place):
    child.ok("train", "tiny.yaml", "out_dir=runs/mine", "max_iters=2")
    child.refused(
        "train", "tiny.yaml", "out_dir=runs/mine", "overwrite=true", "push_to_hub=true", "hub_model_id=they/new"
    )
    assert (place / "runs" / "mine" / "checkpoint-000002").exists()


def test_a_push_is_refused_before_data_is_prepared(child, place, no_run):
    (place / "other.txt").write_text("abcde " * 500)
    child.refused(
        "train", "tiny.yaml", "corpus=other.txt", "push_to_hub=true", "hub_model_id=they/new", "out_dir=runs/none"
    )
    assert not list((place / "data").glob("other*"))


def test_offline_mode_is_reported_before_torch_is_imported(pushed, child, place, hub, no_run):
    offline = Child(hub.env(place / "home3", HF_HUB_OFFLINE="1"), place, "offline")
    try:
        for argv in words_of(PUSHES, "me/new"):
            assert "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set" in offline.refused(*argv)
        for argv in words_of(PULLS[:-1], "me/tiny"):
            line = offline.refused(*argv)
            assert "me/tiny" in line and "cannot be reached" in line
        assert "torch" not in offline.python("import sys; print(*sys.modules)").split()
    finally:
        child.output += offline.output
        offline.close()


def test_a_downloaded_model_is_found_offline(pushed, child, place, hub):
    child.ok("sample", "me/tiny", "prompt=ab", "num_samples=1", "max_new_tokens=2")
    script = "from nanogpt_accel.models.find import find_model; print(find_model('me/tiny'))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        text=True,
        capture_output=True,
        timeout=60,
        env=hub.env(place / "home", HF_HUB_OFFLINE="1", PYTHONPATH=PACKAGE),
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in Path(done.stdout.strip()).iterdir()} == EVERY_FILE


def test_slow_transfers_are_reported_without_a_terminal(pushed, child, place, hub):
    hub.add(
        "they/slow",
        {path.name: path.read_bytes() for path in (place / "runs/tiny/checkpoint-000008").iterdir() if path.is_file()},
    )
    child.python("from nanogpt_accel.hub import transfer; transfer.REPORT_AFTER_S = 0.1")
    for words, path, what in (
        (
            ("sample", "they/slow", "prompt=ab", "num_samples=1", "max_new_tokens=2"),
            "/they/slow/resolve/",
            "downloading they/slow from the Hub",
        ),
        (("push", "runs/tiny", "me/late"), "/me/late/preupload/", "uploading 0.0 MB to me/late"),
    ):
        start = time.monotonic()
        hub.delayed_path, hub.until = path, lambda start=start: time.monotonic() > start + 0.5
        status, out, err = child(*words)
        assert status == 0, err
        first, second = [line for line in err.splitlines() if line.startswith(what)]
        assert first == what and second.startswith(what + ": done in ")
        assert what not in out and "%" not in err  # no progress bars
    child.python("transfer.REPORT_AFTER_S = 2")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such terminals")
@pytest.mark.parametrize("bars", [True, False])
def test_a_terminal_shows_progress_bars_only_on_request(pushed, place, hub, bars):
    """The command runs in a separate terminal. transformers disables the bars, but this has no effect here."""
    import fcntl
    import pty
    import struct
    import termios

    here, there = pty.openpty()
    fcntl.ioctl(here, termios.TIOCSWINSZ, struct.pack("4H", 25, 120, 0, 0))
    script = (
        "from huggingface_hub.utils import disable_progress_bars as off; off()\n"
        "from nanogpt_accel.hub import transfer\n"
        f"print(transfer.download('me/tiny', print, {bars}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        text=True,
        stdout=subprocess.PIPE,
        stderr=there,
        timeout=60,
        env=hub.env(place / f"bars{bars}", PYTHONPATH=PACKAGE, TERM="xterm"),
    )
    os.close(there)
    shown = b""
    with suppress(OSError):  # at the end of the output
        while piece := os.read(here, 65536):
            shown += piece
    os.close(here)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1, shown
    assert (b"100%" in shown) == bars


def test_a_missing_network_is_reported(no_hub, no_run):
    for argv in words_of(PULLS[:-1], "me/never") + words_of(PUSHES[:1], "me/new"):
        line = no_hub.refused(*argv)
        assert ("me/never" in line or "me/new" in line) and "cannot be reached" in line


# ---- the token


def test_the_token_is_never_written(child, no_hub, pushed, hub, place):
    """No output or file of the tests above, which run first, contains the token."""
    assert "hf_test" not in child.output + no_hub.output
    written = [path for path in place.rglob("*") if path.is_file() and "hf_test" in path.read_text(errors="replace")]
    assert written == [] and list(place.glob("runs/*/metrics.jsonl"))
    for repo in hub.repos.values():
        for title, files in repo.commits.values():
            assert "hf_test" not in title and not [path for path in files if b"hf_test" in files[path]]
