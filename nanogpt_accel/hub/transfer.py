"""Download models from the Hugging Face Hub, and upload them."""

import re
import sys
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

from ..utils.files import write_atomically
from ..utils.text import first_line
from .merge_card import merge_card

_LOGIN = "run `hf auth login` or set HF_TOKEN"
_MODEL_ID = re.compile(r"(?P<repo>[\w-][\w.-]*(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
REPORT_AFTER_S = 2  # faster transfers are not reported
UPLOAD_ATTEMPTS = 3  # an upload is repeated if someone else has made a commit in the meantime
# the files of a model that nanogpt_accel reads, excluding weights for other frameworks
_ALLOW_PATTERNS = ["*.json", "*.safetensors", "model.py", "merges.txt", "chat_template.jinja", "README.md"]

_TOKENIZER_PATTERNS = ["*token*.json", "vocab.*", "merges.txt", "*.model", "*config.json", "chat_template.jinja"]


def is_model_id(text):
    """Return whether a text looks like the id of a Hub model: NAME, USER/NAME or USER/NAME@REVISION."""
    return _MODEL_ID.fullmatch(str(text)) is not None


def download(model_id, report=print, bars=True):
    """Download a Hub model to huggingface_hub's cache, and return its folder there.

    Args:
        report: called with one line if the download is slow.
        bars: in a terminal, show huggingface_hub's progress bars instead of this line.

    Raises:
        ValueError: the model cannot be downloaded; the message gives the reason and the fix.
    """
    folder = _download(model_id, _ALLOW_PATTERNS, report, bars)
    if not list(folder.glob("*.safetensors")):  # older models only have PyTorch's .bin files
        _download(model_id, ["pytorch_model*.bin"], report, bars)
    return folder


def download_tokenizer(model_id):
    """Download the tokenizer of a Hub model, and return its folder. For the errors, see download."""
    return _download(model_id, _TOKENIZER_PATTERNS, report=lambda line: None, bars=False)


def _download(model_id, patterns, report, bars):
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # no warnings, because they repeat the errors raised below
    match = _MODEL_ID.fullmatch(model_id)
    if match is None:
        raise ValueError(f"{model_id}: not the id of a Hub model; use USER/NAME or USER/NAME@REVISION")
    fetch = {"repo_id": match["repo"], "revision": match["revision"], "ignore_patterns": ["*/*"]}
    try:
        with _progress(f"downloading {model_id} from the Hub", report, bars):
            return Path(snapshot_download(**fetch, allow_patterns=patterns))
    except Exception as error:  # errors of the Hub, the network or the disk
        raise ValueError(f"{model_id}: no such folder, and {_explain(error)}") from None


def check_push(model_id, key):
    """Check the settings for a push, but do not use the network. Return a list of problems.

    key: the option that contains model_id, for the messages.
    """
    from huggingface_hub import get_token, is_offline_mode
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    problems = []
    try:
        validate_repo_id(model_id)
    except HFValidationError as error:
        problems.append(f"{key}={model_id}: not a valid repository name; use USER/NAME ({error})")
    if get_token() is None:
        problems.append(f"{key}={model_id}: no token found; {_LOGIN}")
    if is_offline_mode():
        problems.append(f"{key}={model_id}: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it to push")
    return problems


def create(model_id, private=False, branch=None):
    """Create the repository and the branch if they do not exist, and return the repository's full name.

    Raises:
        PermissionError: the Hub refuses the request. ConnectionError: any other failure. Messages include the fix.
    """
    from huggingface_hub import HfApi

    with _hub_errors(model_id):
        api = HfApi()
        repo = api.create_repo(model_id, private=private, exist_ok=True).repo_id
        # create_repo also succeeds with a token that can only read the existing repository; create_branch then fails
        api.create_branch(repo, branch=branch or "main", exist_ok=True)
        return repo


def upload(folder, repo, message, branch=None, warn=print, report=lambda line: None, bars=False):
    """Upload a model folder as one commit and return the URL of the commit. Unchanged files are not uploaded again.

    The folder's README.md is merged with the card on the Hub. Users' edits of that card are kept, see merge_card.

    Args:
        warn: called with a line of text if the text of the card on the Hub is not updated.
        report, bars: see download.

    Raises:
        PermissionError, ConnectionError: see create.
    """
    from huggingface_hub import HfApi

    api, readme, size = HfApi(), Path(folder) / "README.md", sum(file.stat().st_size for file in Path(folder).iterdir())
    card = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else None
    options = {"repo_id": repo, "folder_path": folder, "revision": branch, "commit_message": message}
    with _hub_errors(repo), _progress(f"uploading {size / 1e6:,.1f} MB to {repo}", report, bars):
        for attempts_left in reversed(range(UPLOAD_ATTEMPTS)):
            parent, note = api.model_info(repo, revision=branch).sha, ""
            if card is not None:
                merged, note = merge_card(_read_card(api, repo, parent), card)
                write_atomically(readme, merged.encode("utf-8", "surrogateescape"))
            try:
                # with parent_commit, the Hub rejects the upload if someone edited the card in the meantime
                url = api.upload_folder(**options, parent_commit=parent).commit_url
            except Exception as error:
                if not attempts_left or _status(error) != 412:
                    raise
                continue
            if note:
                fix = "delete the file on the Hub to get a new one with the next push"
                warn(f"warning: {repo}: README.md on the Hub keeps its text, because {note}; {fix}")
            return url


def _read_card(api, repo, revision):
    """Return the README.md of a repository, or "" if there is none."""
    from huggingface_hub.errors import EntryNotFoundError

    with tempfile.TemporaryDirectory() as folder:  # not in the cache, which may be read-only
        try:
            path = api.hf_hub_download(repo, "README.md", revision=revision, local_dir=folder)
        except EntryNotFoundError:
            return ""
        return Path(path).read_bytes().decode("utf-8", "surrogateescape")


@contextmanager
def _progress(what, report, bars):
    """Show huggingface_hub's progress bars in a terminal if `bars` is set. Otherwise report a slow transfer."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    shows_bars = bars and sys.stderr.isatty()
    with warnings.catch_warnings():  # there is a warning if HF_HUB_DISABLE_PROGRESS_BARS overrides this
        warnings.simplefilter("ignore")
        (enable_progress_bars if shows_bars else disable_progress_bars)()
    if shows_bars:
        yield
        return
    start = time.monotonic()
    timer = threading.Timer(REPORT_AFTER_S, report, [what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if (seconds := time.monotonic() - start) > REPORT_AFTER_S:
        report(f"{what}: done in {seconds:.0f} s")


@contextmanager
def _hub_errors(model_id):
    """Convert an error to a PermissionError if the Hub refused the request, otherwise to a ConnectionError."""
    try:
        yield
    except Exception as error:
        is_refusal = isinstance(error, ValueError) or _status(error) in (400, 401, 403, 404, 409)
        kind = PermissionError if is_refusal else ConnectionError
        raise kind(f"{model_id}: {_explain(error)}") from None


def _status(error):
    """Return the HTTP status of a failed request, or None. For a failed upload, the cause of `error` has the status."""
    return getattr(getattr(error.__cause__ or error, "response", None), "status_code", None)


def _explain(error):
    """Return the reason why a transfer failed, and the fix. Callers put the name of the model before this text."""
    from huggingface_hub import errors

    status = _status(error)
    text = first_line(error).removeprefix("Got: ")
    if isinstance(error, errors.GatedRepoError):
        return f"the model is gated on the Hub; accept its terms there and {_LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the model on the Hub has no such branch, tag or commit"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return f"no such model on the Hub, or it is private; check the name, or {_LOGIN}"
    if isinstance(error, errors.HFValidationError):
        return f"not a valid name for a Hub model ({text})"
    if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
        return f"the Hub rejected the token ({text}); {_LOGIN} with a token that has access (write access for a push)"
    return f"the Hub cannot be reached ({text})"
