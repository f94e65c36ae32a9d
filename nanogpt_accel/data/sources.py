"""Define the built-in corpora. find_corpus returns any corpus: a built-in one, one on the Hub, or local files.

    corpus = find_corpus("shakespeare")   # downloads nothing
    for text in corpus.documents():       # one str per file, line or row, read lazily
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
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..recipe import TEXT_SHA256
from ..utils.files import cache_folder, write_atomically
from .corpus import Corpus
from .hub_datasets import HubSet, hub_corpus
from .local_files import base_name, local_corpus, path_exists, walk
from .readers import decode

# name -> (URL, SHA-256) of one UTF-8 text
URLS = {
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        TEXT_SHA256["shakespeare"],
    ),
}

# The revisions are pinned, so that a recipe always reads the same text. datasets >= 4 does not run loading scripts. For
# a data set that has only a script, the revision is the Hub's parquet conversion.
HUB = {
    # 8,013,769 web pages linked on Reddit, 40 GB, CC0
    "openwebtext": HubSet("Skylion007/openwebtext", "79d93d786212f7344586290adb811d4ae6a1762c", "plain_text"),
    # 74 million sentences of novels, 4.9 GB, license unknown
    "bookcorpus": HubSet("bookcorpus/bookcorpus", "refs/convert/parquet", "plain_text", grouped="sentences"),
    # 720 Wikipedia articles, 13 MB, CC BY-SA 4.0
    "wikitext2": HubSet(
        "Salesforce/wikitext",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        "wikitext-2-raw-v1",
        splits={"train": "train", "val": "validation", "test": "test"},
        grouped="articles",
    ),
    # 9,672,101 educational web pages, 50 GB, 10 billion tokens, ODC-By
    "fineweb_edu": HubSet("HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9", "sample-10BT"),
    # 2.1 million stories in the vocabulary of small children, 2 GB, CDLA-Sharing 1.0
    "tinystories": HubSet(
        "roneneldan/TinyStories",
        "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        splits={"train": "train", "val": "validation"},
    ),
}
BUILTIN = ("python", *URLS, *HUB)

# Folders to skip: tests (half of all bytes), generated files (a hundred code pages in encodings/, the manual as one
# string in pydoc_data/, build paths in config-*/), and site-packages, which is not part of the standard library.
PYTHON_EXCLUDED = re.compile(r"(test|tests|idle_test|encodings|pydoc_data|config-.*|.*-packages|__pycache__)")

TIMEOUT = 30  # seconds; a download fails after this time without a response


def find_corpus(
    spec,
    *,
    text_column="text",
    lines=False,
    split_by="auto",
    dataset_config=None,
    dataset_split="train",
    revision=None,
):
    """Return the Corpus of a corpus setting: a built-in name, hub:USER/SET, or a local file, folder or glob.

    A built-in name has priority over a path; write ./python for a folder of that name.

    The other arguments are settings of the data section. dataset_config, dataset_split and revision only apply to
    hub:USER/SET.

    Raises:
        FileNotFoundError: no such name or path.
        ValueError: the path contains no supported file.
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
            raise ValueError(f"corpus={spec}: not a valid Hub id; set corpus=hub:USER/SET")
        return hub_corpus(spec, HubSet(spec[4:], revision, dataset_config, {"train": dataset_split}, text_column))
    if path_exists(spec):
        return local_corpus(spec, text_column, lines, split_by)
    # a setting with a slash is a path, not a misspelt name
    close = [] if os.path.dirname(spec) else difflib.get_close_matches(spec, BUILTIN, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    names = ", ".join(BUILTIN)
    raise FileNotFoundError(
        f"corpus={spec}: no such corpus{hint}; set corpus to {names}, or to an existing file, folder or glob"
    )


def source_name(spec):
    """Return the name of a corpus, the same as find_corpus(spec).source["name"], but without reading the disk."""
    return spec if spec in BUILTIN or spec.startswith("hub:") else base_name(spec)


def joined_text(name, split):
    """Return a split of a built-in Hub data set as one str, with rows joined by empty lines.

    The perplexity guide of transformers, and publications that follow it, read raw WikiText-2 this way. Raises
    ValueError if the data set does not exist or cannot be read.
    """
    names = [known for known in HUB if split in HUB[known].splits]
    if name not in names:
        raise ValueError(f"text={name}: no such file; set text to an existing file, or to one of {', '.join(names)}")
    return "\n\n".join(hub_corpus(name, replace(HUB[name], grouped=None)).read(split, None))


def _python():
    """Return the source code of Python's standard library: about 10 MB of text that needs no network."""
    root = sysconfig.get_path("stdlib")
    if not os.path.isfile(os.path.join(root, "os.py")):
        raise ValueError(f"corpus=python: {root} has no source files; set corpus=shakespeare, or corpus=PATH")

    def read(split, bad):
        for file in walk(root, PYTHON_EXCLUDED):
            if file.endswith(".py") and not os.path.basename(file).startswith("_sysconfigdata"):
                with suppress(UnicodeDecodeError):  # lib2to3 has test files in other encodings
                    yield Path(file).read_bytes().decode("utf-8").replace("\r\n", "\n")  # "\r\n" on Windows

    version = platform.python_version()
    return Corpus(f"python-{version}", {"kind": "python", "name": "python", "revision": version}, False, read)


# No library is used for this download: pooch would be one more dependency, torch.hub takes seconds to import, and the
# functions of tiktoken and datasets have no timeout, or do not verify the hash each time the file is read.
def _fetch(name, url, sha256):
    """Return the content of a URL. Use the copy in the cache folder if its hash is correct."""
    cache = cache_folder()
    path = os.path.join(cache, f"{name}.txt")
    if os.path.isfile(path):
        raw = Path(path).read_bytes()
        if hashlib.sha256(raw).hexdigest() == sha256:
            return raw
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            raw = response.read()
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", None) or error
        fix = "set corpus=PATH to a copy of this file"
        raise ValueError(f"corpus={name}: cannot download {url} ({reason}); {fix}") from None
    digest = hashlib.sha256(raw).hexdigest()
    if digest != sha256:
        raise ValueError(
            f"corpus={name}: {url} has changed: its SHA-256 is {digest} instead of {sha256}; set corpus=PATH to a copy "
            "of the original file"
        )
    try:
        os.makedirs(cache, exist_ok=True)
        write_atomically(path, raw)
    except OSError as error:
        problem = f"corpus={name}: cannot write the download to {cache} ({error.strerror})"
        raise OSError(f"{problem}; set NANOGPT_ACCEL_CACHE to a writable folder") from None
    return raw
