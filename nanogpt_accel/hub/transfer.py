"""Download from and upload to the Hugging Face Hub."""

import re
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

_MODEL_ID = re.compile(r"(?P<repo>[\w-][\w.-]*(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
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
        raise ValueError(f"{model_id}: no such folder here, and {_explain(error)}") from None
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
        problems.append(
            f"{key}={model_id}: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so nothing can be pushed; unset it"
        )
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
        raise kind(f"{model_id}: {_explain(error)}") from None


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
        raise kind(f"{repo}: {_explain(error)}") from None


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


def _is_refusal(error):
    """True where the Hub itself said no, and saying it again would not help."""
    return isinstance(error, ValueError) or _status(error) in (400, 401, 403, 404, 409)


def _status(error):
    """The HTTP status that the Hub answered with, if it did; a failed file of a push hides it in its cause."""
    return getattr(getattr(error.__cause__ or error, "response", None), "status_code", None)


def _explain(error):
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
