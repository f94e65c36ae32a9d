"""The Hugging Face Hub: fetch a model, push a folder, and push in the background while a run goes on.

A model is named USER/NAME, or USER/NAME@REVISION for a branch, a tag or a commit. The token is huggingface_hub's:
`hf auth login`, or HF_TOKEN.
"""

import os
import re
import shutil
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

_MODEL_ID = re.compile(r"(?P<repo>[\w-][\w.-]*(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
PATIENCE = 1800  # seconds that the end of a run waits for a push
SOON = 2  # seconds without a word
# the files of a model that this toolkit reads: not the same weights again for other frameworks
_WANTED = ["*.json", "*.safetensors", "model.py", "merges.txt", "README.md"]


def is_model_id(text):
    """True for what has the form of a model's name on the Hub."""
    return _MODEL_ID.fullmatch(str(text)) is not None


def download(model_id, report=print, bars=True):
    """The local copy of a Hub model's files: fetched once, then kept in huggingface_hub's cache.

    Args:
        report: takes a line, where it takes a while. bars: huggingface_hub's own in place of lines, in a terminal.

    Raises:
        ValueError: it cannot be had; the message says why and what helps.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # what it warns of is either no trouble or an error below
    match = _MODEL_ID.fullmatch(model_id)
    fetch = {"repo_id": match["repo"], "revision": match["revision"], "ignore_patterns": ["*/*"]}
    try:
        with _progress(f"fetching {model_id} from the Hub", report, bars):
            folder = Path(snapshot_download(**fetch, allow_patterns=_WANTED))
            if not list(folder.glob("*.safetensors")):  # old models have torch's own format only
                snapshot_download(**fetch, allow_patterns=["pytorch_model*.bin"])
    except Exception as error:  # of the Hub, of the network below it, of the disk
        raise ValueError(f"{model_id}: no such folder here, and {_reason(error)}") from None
    return folder


def check_push(model_id, key):
    """What is wrong with a push as far as that is known without a network: a list of problems. key: for the message."""
    from huggingface_hub import get_token, is_offline_mode
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    problems = []
    try:
        validate_repo_id(model_id)
    except HFValidationError as error:
        problems.append(f"{key}={model_id}: not a name that the Hub takes, which is USER/NAME ({error})")
    if get_token() is None:
        problems.append(f"{key}={model_id}: there is no token to push with: run `hf auth login`, or set HF_TOKEN")
    if is_offline_mode():
        problems.append(f"{key}={model_id}: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so nothing can be pushed; "
                        "unset it")
    return problems


def create(model_id, private=False, branch=None):
    """Make the repository and the branch where they are missing, and return the repository's full name.

    Raises:
        PermissionError: the Hub says no; the message says why and what helps. ConnectionError: it says nothing.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        repo = api.create_repo(model_id, private=private, exist_ok=True).repo_id
        # create_repo is content with a repository that this token may only read; this is not, for main too
        api.create_branch(repo, branch=branch or "main", exist_ok=True)
        return repo
    except Exception as error:
        kind = PermissionError if _is_refusal(error) else ConnectionError
        raise kind(f"{model_id}: {_reason(error)}") from None


def upload(folder, repo, message, branch=None, report=lambda line: None, bars=False):
    """Push a model folder as one commit; files that the Hub holds already are not sent again.

    report, bars: as for download.

    Returns:
        The commit's address.

    Raises:
        PermissionError, ConnectionError: as in create.
    """
    from huggingface_hub import HfApi

    size = sum(file.stat().st_size for file in Path(folder).iterdir())
    try:
        with _progress(f"sending {size / 1e6:,.1f} MB to {repo}", report, bars):
            commit = HfApi().upload_folder(repo_id=repo, folder_path=folder, revision=branch, commit_message=message)
        return commit.commit_url
    except Exception as error:
        kind = PermissionError if _is_refusal(error) else ConnectionError
        raise kind(f"{repo}: {_reason(error)}") from None


def model_card(name, text, needs_code, more=""):
    """README.md of a model folder in the Hub's form.

    Args:
        name: its title. text: what the model is, in Markdown; more: what comes after how to load it.
        needs_code: whether it loads with the model.py beside it only.
    """
    remote = ", trust_remote_code=True" if needs_code else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [nanogpt_accel]
---
# {name}

{text}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
path = "."  # this folder, or its id on the Hub
model = AutoModelForCausalLM.from_pretrained(path{remote})
tokenizer = AutoTokenizer.from_pretrained(path)
print(tokenizer.decode(model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=20)[0]))
```

{more}"""


def converted_card(source, name, needs_code):
    """The card of a model that was converted: the source folder's where this toolkit wrote it, else a short one with
    `name` as its title."""
    own = Path(source) / "README.md"
    text = own.read_text(encoding="utf-8", errors="replace") if own.is_file() else ""
    if "tags: [nanogpt_accel]" not in text:
        return model_card(name, "Weights that nanogpt_accel converted from another form.", needs_code)
    plain, with_code = "ForCausalLM.from_pretrained(path)", "ForCausalLM.from_pretrained(path, trust_remote_code=True)"
    return text.replace(plain, with_code) if needs_code else text.replace(with_code, plain)


class BackgroundPush:
    """Pushes checkpoints while the run goes on: one at a time, and where several wait, the newest.

    The files are linked aside at once, so that a checkpoint may be pruned while it is on its way. What fails is
    reported in one line, once until a push succeeds, and done with: the next checkpoint tries again.
    """

    def __init__(self, repo, folder, warn, private=False, branch=None):
        """repo: on the Hub, made where it is missing. folder: of the run; the links stand in it. warn: takes a line."""
        self.repo, self.private, self.branch, self.warn = repo, private, branch, warn
        self.pushed = None  # the checkpoint that the Hub holds now, as far as this process knows
        self._folder, self._is_warned = Path(folder), False
        self._lock = threading.Lock()
        self._waiting = None  # (folder of links, checkpoint, message)
        self._worker = None

    def push(self, checkpoint, message):
        """Push a checkpoint folder as soon as the one before it is through; returns at once."""
        links = self._folder / f".push-{Path(checkpoint).name}-{time.monotonic_ns()}"
        try:
            links.mkdir()
            for file in Path(checkpoint).iterdir():
                if file.is_file():
                    _link(file, links / file.name)
        except OSError as error:
            shutil.rmtree(links, ignore_errors=True)
            self._fail(message, error)
            return
        with self._lock:
            if self._waiting is not None:
                shutil.rmtree(self._waiting[0], ignore_errors=True)
            self._waiting = (links, Path(checkpoint), message)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, daemon=True)
                self._worker.start()

    def wait(self):
        """Return when nothing is on its way any more; at the latest after PATIENCE, for a Hub that is silent."""
        worker = self._worker
        if worker is not None:
            worker.join(PATIENCE)

    def _work(self):
        while True:
            with self._lock:
                if self._waiting is None:
                    self._worker = None
                    return
                (links, checkpoint, message), self._waiting = self._waiting, None
            try:
                self.repo = create(self.repo, self.private, self.branch)
                upload(links, self.repo, message, self.branch)
                self.pushed, self._is_warned = checkpoint, False
            except OSError as error:
                self._fail(message, error)
            finally:
                shutil.rmtree(links, ignore_errors=True)

    def _fail(self, message, error):
        if self._is_warned:
            return
        self._is_warned = True
        self.warn(f"warning: not pushed, the next checkpoint tries again: {message}: {error}")


@contextmanager
def _progress(what, report, bars):
    """huggingface_hub's own progress bars in a terminal, where they are wanted; else a line about what takes more than
    SOON, and its time."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    shows_bars = bars and sys.stderr.isatty()
    with warnings.catch_warnings():  # HF_HUB_DISABLE_PROGRESS_BARS has the last word, and need not say so
        warnings.simplefilter("ignore")
        (enable_progress_bars if shows_bars else disable_progress_bars)()
    began = time.monotonic()
    timer = threading.Timer(SOON, report, [what])
    timer.daemon = True
    if not shows_bars:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if not shows_bars and time.monotonic() - began > SOON:
        report(f"{what}: done in {time.monotonic() - began:.0f} s")


def _link(file, place):
    try:
        os.link(file, place)
    except OSError:  # a file system without hard links
        shutil.copyfile(file, place)


def _is_refusal(error):
    """True where the Hub itself said no, and saying it again would not help."""
    return isinstance(error, ValueError) or _status(error) in (400, 401, 403, 404, 409)


def _status(error):
    """The HTTP status that the Hub answered with, if it did; a failed file of a push hides it in its cause."""
    return getattr(getattr(error.__cause__ or error, "response", None), "status_code", None)


def _reason(error):
    """Why something failed between here and the Hub, and what helps."""
    from huggingface_hub import errors

    status = _status(error)
    text = (str(error).strip().splitlines() or [type(error).__name__])[0].removeprefix("Got: ")
    login = "run `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"on the Hub it is gated: accept its terms there, and {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "on the Hub it has no such branch, tag or commit"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return f"on the Hub there is no such model, or it is private: {login}"
    if isinstance(error, errors.HFValidationError):
        return f"on the Hub no model can have this name ({text})"
    if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
        return f"the Hub does not let this token do it ({text}): {login} with one that may write"
    return f"the Hub cannot be reached: {text}"
