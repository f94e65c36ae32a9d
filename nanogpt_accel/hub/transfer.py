"""Download from and upload to the Hugging Face Hub."""

import re
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

from ..utils.text import first_line

_MODEL_ID = re.compile(r"(?P<repo>[\w-][\w.-]*(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
SOON = 2  # seconds after which a transfer is reported
# the files of a model that this toolkit reads, without the weights for other frameworks
_WANTED = ["*.json", "*.safetensors", "model.py", "merges.txt", "README.md"]


def is_model_id(text):
    """Return whether the text has the form of a model's name on the Hub."""
    return _MODEL_ID.fullmatch(str(text)) is not None


def download(model_id, report=print, bars=True):
    """Return a local folder with the files of a Hub model, from huggingface_hub's cache if they are there.

    Args:
        report: takes a line if the download is slow. bars: in a terminal, show huggingface_hub's progress bars instead.

    Raises:
        ValueError: the model cannot be downloaded; the message gives the reason and the fix.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # anything that matters is raised below
    match = _MODEL_ID.fullmatch(model_id)
    fetch = {"repo_id": match["repo"], "revision": match["revision"], "ignore_patterns": ["*/*"]}
    try:
        with _progress(f"fetching {model_id} from the Hub", report, bars):
            folder = Path(snapshot_download(**fetch, allow_patterns=_WANTED))
            if not list(folder.glob("*.safetensors")):  # old models have only torch's own format
                snapshot_download(**fetch, allow_patterns=["pytorch_model*.bin"])
    except Exception as error:  # from the Hub, the network or the disk
        raise ValueError(f"{model_id}: no such folder here, and {_explain(error)}") from None
    return folder


def check_push(model_id, key):
    """Check a push without using the network. Return a list of problems. key: for the message."""
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
    """Create the repository and the branch if they are missing, and return the repository's full name.

    Raises:
        PermissionError: the Hub refuses. ConnectionError: any other failure. The message gives the reason and the fix.
    """
    from huggingface_hub import HfApi

    with _hub_errors(model_id):
        api = HfApi()
        repo = api.create_repo(model_id, private=private, exist_ok=True).repo_id
        # create_repo accepts a repository that this token may only read; create_branch refuses it, also for main
        api.create_branch(repo, branch=branch or "main", exist_ok=True)
        return repo


def upload(folder, repo, message, branch=None, report=lambda line: None, bars=False):
    """Push a model folder as one commit and return the commit's address. Files that the Hub has are not sent again.

    report, bars: see download.

    Raises:
        PermissionError, ConnectionError: see create.
    """
    from huggingface_hub import HfApi

    size = sum(file.stat().st_size for file in Path(folder).iterdir())
    with _hub_errors(repo), _progress(f"sending {size / 1e6:,.1f} MB to {repo}", report, bars):
        commit = HfApi().upload_folder(repo_id=repo, folder_path=folder, revision=branch, commit_message=message)
        return commit.commit_url


@contextmanager
def _progress(what, report, bars):
    """Show huggingface_hub's progress bars in a terminal if wanted; otherwise report what takes longer than SOON."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    shows_bars = bars and sys.stderr.isatty()
    with warnings.catch_warnings():  # it warns if HF_HUB_DISABLE_PROGRESS_BARS overrides the call
        warnings.simplefilter("ignore")
        (enable_progress_bars if shows_bars else disable_progress_bars)()
    if shows_bars:
        yield
        return
    start = time.monotonic()
    timer = threading.Timer(SOON, report, [what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if time.monotonic() - start > SOON:
        report(f"{what}: done in {time.monotonic() - start:.0f} s")


@contextmanager
def _hub_errors(model_id):
    """Raise any error as a PermissionError if the Hub refused and a retry would not help, else as a ConnectionError."""
    try:
        yield
    except Exception as error:
        is_refusal = isinstance(error, ValueError) or _status(error) in (400, 401, 403, 404, 409)
        kind = PermissionError if is_refusal else ConnectionError
        raise kind(f"{model_id}: {_explain(error)}") from None


def _status(error):
    """The HTTP status of the Hub's answer, or None; an upload of a file has it in the error's cause."""
    return getattr(getattr(error.__cause__ or error, "response", None), "status_code", None)


def _explain(error):
    """Return the reason of a failed transfer and the fix, to follow the model's name in a message."""
    from huggingface_hub import errors

    status = _status(error)
    text = first_line(error).removeprefix("Got: ")
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
