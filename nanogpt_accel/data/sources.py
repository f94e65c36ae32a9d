"""The built-in corpora, and find_corpus, which names any corpus: built in, on the Hub, or local files.

    corpus = find_corpus("shakespeare")   # cheap, downloads nothing
    for text in corpus.documents():       # one str per file, line or row, read when it is asked for
        ...

To add a corpus, add an entry to URLS or HUB.
"""

import difflib
import hashlib
import http.client
import os
import platform
import re
import sysconfig
import urllib.request
from dataclasses import replace
from pathlib import Path

from ..utils.files import cache_folder, write_atomically
from .corpus import Corpus
from .hub_datasets import HubSet, hub_corpus
from .local_files import base_name, local_corpus, path_exists, walk
from .readers import decode

# name -> (URL, SHA-256) of one UTF-8 text
URLS = {
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}

# Pinned, so that the same recipe means the same text. datasets >= 4 runs no scripts, so if the main branch has
# nothing else the revision is the Hub's own parquet conversion of it.
HUB = {
    "openwebtext": HubSet(
        "Skylion007/openwebtext",
        "79d93d786212f7344586290adb811d4ae6a1762c",
        "plain_text",
        about="8,013,769 web pages that Reddit linked, 40 GB, CC0",
    ),
    "bookcorpus": HubSet(
        "bookcorpus/bookcorpus",
        "refs/convert/parquet",
        "plain_text",
        grouped="sentences",
        about="74 million sentences of novels, 4.9 GB, license unknown",
    ),
    "wikitext2": HubSet(
        "Salesforce/wikitext",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        "wikitext-2-raw-v1",
        {"train": "train", "val": "validation", "test": "test"},
        grouped="articles",
        about="720 Wikipedia articles, 13 MB, CC BY-SA 4.0",
    ),
    "fineweb_edu": HubSet(
        "HuggingFaceFW/fineweb-edu",
        "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        "sample-10BT",
        about="9,672,101 educational web pages, 50 GB, 10 billion tokens, ODC-By",
    ),
    "tinystories": HubSet(
        "roneneldan/TinyStories",
        "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        None,
        {"train": "train", "val": "validation"},
        about="2.1 million stories in words of small children, 2 GB, CDLA-Sharing 1.0",
    ),
}
BUILTIN = ("python", *URLS, *HUB)

# Folders of the standard library that teach a model little: tests (half of all the bytes), and tables that a
# program wrote: encodings/ is a hundred code pages, pydoc_data/ the manual as one literal, config-*/ and
# _sysconfigdata* hold the build paths of one machine. And site-packages, which is not the library.
PYTHON_SKIPPED = re.compile(r"(test|tests|idle_test|encodings|pydoc_data|config-.*|.*-packages|__pycache__)")

TIMEOUT = 30  # seconds without an answer after which a download is given up


def find_corpus(spec, *, text_column="text", lines=False, dataset_config=None, dataset_split="train", revision=None):
    """Return the Corpus that `spec` names: a built-in one, hub:USER/SET, or a local file, folder or glob.

    A built-in name wins over a path; write ./python for a folder of that name.

    Args:
        text_column: what has the text in .jsonl, .csv, .parquet and on the Hub. lines: whether each line of a plain
            text file is a document. dataset_config, dataset_split, revision: of hub:USER/SET.

    Raises:
        FileNotFoundError: no such name or path. ValueError: nothing to read there.
    """
    if spec == "python":
        return _python()
    if spec in URLS:
        source = {"kind": "url", "name": spec, "sha256": URLS[spec][1]}
        return Corpus(spec, source, True, lambda split, bad: iter([decode(spec, _fetch(spec, *URLS[spec]))]))
    if spec in HUB:
        return hub_corpus(spec, HUB[spec])
    if spec.startswith("hub:"):
        if not re.fullmatch(r"hub:[\w-][\w.-]*(/[\w.-]+)?", spec):
            raise ValueError(f"corpus={spec}: a data set of the Hub is named hub:USER/SET")
        return hub_corpus(spec, HubSet(spec[4:], revision, dataset_config, {"train": dataset_split}, text_column))
    if path_exists(spec):
        return local_corpus(spec, text_column, lines)
    # (a path is no misspelt name)
    close = [] if os.path.dirname(spec) else difflib.get_close_matches(spec, BUILTIN, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise FileNotFoundError(
        f"corpus={spec}: no such corpus{hint}; there are {', '.join(BUILTIN)}, "
        "and any text file, folder or glob that exists"
    )


def source_name(spec):
    """Return the `name` in the source of find_corpus(spec), without reading the disk."""
    return spec if spec in BUILTIN or spec.startswith("hub:") else base_name(spec)


def joined_text(name, split):
    """Return a built-in set of the Hub as one str, its rows joined by empty lines, as transformers' guide to perplexity
    and what was published after it read raw WikiText-2.

    Raises:
        ValueError: no such set, or the Hub cannot be read.
    """
    if name not in HUB or split not in HUB[name].splits:
        raise ValueError(
            f"text={name}: no such file, and no built-in set with a {split} split; there are "
            f"{', '.join(known for known in HUB if split in HUB[known].splits)}"
        )
    return "\n\n".join(hub_corpus(name, replace(HUB[name], grouped=None)).read(split, None))


def _python():
    """Return the source of the running interpreter's standard library: real text with no network, some 10 MB."""
    root = sysconfig.get_path("stdlib")
    if not os.path.isfile(os.path.join(root, "os.py")):
        raise ValueError(
            f"corpus=python: this Python has no library sources in {root}: take "
            "corpus=shakespeare or the path of some text"
        )

    def read(split, bad):
        for file in walk(root, PYTHON_SKIPPED):
            if file.endswith(".py") and not os.path.basename(file).startswith("_sysconfigdata"):
                try:
                    yield Path(file).read_bytes().decode("utf-8").replace("\r\n", "\n")  # as Windows' Python has them
                except UnicodeDecodeError:  # lib2to3 has files in other encodings, as fixtures
                    continue

    version = platform.python_version()
    return Corpus(f"python-{version}", {"kind": "python", "name": "python", "revision": version}, False, read)


# By hand, for what pooch (one more dependency), torch.hub (which takes seconds to import), tiktoken and datasets have
# lacks a time-out, or a check of the hash at each read, and their errors would still have to be put into words
def _fetch(name, url, sha256):
    """Return the bytes behind a URL, kept in the cache folder and checked each time that they are read."""
    cache = cache_folder()
    path = os.path.join(cache, f"{name}.txt")
    if os.path.isfile(path):
        raw = Path(path).read_bytes()
        if hashlib.sha256(raw).hexdigest() == sha256:
            return raw
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            raw = answer.read()
    except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
        reason = getattr(error, "reason", None) or error
        raise ValueError(
            f"corpus={name}: cannot download {url} ({reason}): with a copy of that file, give its path as corpus=PATH"
        ) from None
    got = hashlib.sha256(raw).hexdigest()
    if got != sha256:
        raise ValueError(
            f"corpus={name}: {url} has changed: its SHA-256 is {got}, expected {sha256}: with a "
            "copy of the right file, give its path as corpus=PATH"
        )
    try:
        os.makedirs(cache, exist_ok=True)
        write_atomically(path, raw)
    except OSError as error:
        raise OSError(
            f"corpus={name}: cannot keep the download in {cache} ({error.strerror}): set "
            "NANOGPT_ACCEL_CACHE to a folder that can be written"
        ) from None
    return raw
