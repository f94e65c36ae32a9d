"""Where text comes from: a builtin name, or a local text file, folder or glob.

    corpus = find_corpus("shakespeare")   # cheap, downloads nothing
    for text in corpus.documents():       # one str a file or row, read when it is asked for
        ...

A builtin is an entry of a table below; a new one is a line there.
"""

import difflib
import glob
import hashlib
import http.client
import os
import platform
import re
import sysconfig
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# name -> (URL, SHA-256) of one UTF-8 text
URLS = {
    "shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
}
# name -> (Hub id, revision, text column). datasets >= 4 runs no scripts, so where the main branch holds a
# script the revision is the Hub's own parquet conversion of it.
HUB = {
    "openwebtext": ("Skylion007/openwebtext", "refs/convert/parquet", "text"),
}
BUILTIN = ("python", *URLS, *HUB)

# what a folder is searched for; a glob or a file takes any suffix
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cc", ".cpp", ".hpp",
                 ".cu", ".rs", ".go", ".java", ".js", ".ts", ".sh", ".sql", ".r", ".jl")

# Folders of the standard library that teach a model little: tests (half of all the bytes), and tables that a
# program wrote: encodings/ is a hundred code pages, pydoc_data/ the manual as one literal, config-*/ and
# _sysconfigdata* hold the build paths of one machine. And site-packages, which is not the library.
PYTHON_SKIPPED = re.compile(r"(test|tests|idle_test|encodings|pydoc_data|config-.*|.*-packages|__pycache__)")

TIMEOUT = 30  # seconds without an answer after which a download is given up


@dataclass(frozen=True)
class Corpus:
    """Text to learn from.

    name: short and fit for a file name. source: plain values that identify the content, for the manifest.
    is_single: true where it is one text, to be cut in two; else it is documents, to be dealt out whole.
    """

    name: str
    source: dict
    is_single: bool
    read: Callable[[], Iterator[str]]

    def documents(self):
        """Yield the documents that are not empty, each as one str; may be called again.

        Raises ValueError for text that is not UTF-8, cannot be fetched, or is not there at all.
        """
        empty = True
        for text in self.read():
            if text:
                empty = False
                yield text
        if empty:
            raise ValueError(f"corpus={self.source['name']}: there is no text in it: give another path")


def find_corpus(spec):
    """The Corpus that `spec` names: python, shakespeare, openwebtext, or a local text file, folder or glob.

    A builtin name wins over a path; write ./python for a folder of that name.

    Raises:
        FileNotFoundError: no such name or path. ValueError: nothing to read there.
    """
    if spec == "python":
        return _python()
    if spec in URLS:
        source = {"kind": "url", "name": spec, "sha256": URLS[spec][1]}
        return Corpus(spec, source, True, lambda: iter([_decode(spec, _fetch(spec, *URLS[spec]))]))
    if spec in HUB:
        source = {"kind": "hub", "name": spec, "id": HUB[spec][0], "revision": HUB[spec][1]}
        return Corpus(spec, source, False, lambda: _hub_rows(spec, *HUB[spec]))
    return _local(spec)


def source_name(spec):
    """The `name` in the source of find_corpus(spec), without a look at the disk."""
    if spec in BUILTIN:
        return spec
    return os.path.basename(os.path.abspath(os.path.expanduser(spec)))


def _local(spec):
    """The text files that a path or glob means, ordered by their names below it."""
    path = os.path.expanduser(spec)
    if os.path.isfile(path):
        root, files = os.path.dirname(path), [path]
    elif os.path.isdir(path):
        root, files = path, [f for f in _walk(path) if f.lower().endswith(TEXT_SUFFIXES)]
        if not files:
            raise ValueError(f"corpus={spec}: no text file ({' '.join(TEXT_SUFFIXES)}) below this folder: "
                             f"name the files by a glob, such as '{os.path.join(spec, '*.log')}'")
    elif glob.has_magic(path):
        root, files = ".", [f for f in glob.glob(path, recursive=True) if os.path.isfile(f)]
        if not files:
            raise FileNotFoundError(f"corpus={spec}: no file matches this glob")
    else:
        close = [] if os.sep in spec else difflib.get_close_matches(spec, BUILTIN, n=1)  # a path is no misspelt name
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise FileNotFoundError(f"corpus={spec}: no such corpus{hint}; there are {', '.join(BUILTIN)}, "
                                "and any text file, folder or glob that exists")
    files = sorted((Path(os.path.relpath(f, root or ".")).as_posix(), f) for f in files)
    listing = hashlib.sha256()
    size = 0
    for name, file in files:
        stat = os.stat(file)
        size += stat.st_size
        listing.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    name = source_name(spec)
    source = {"kind": "files", "name": name, "files": len(files), "bytes": size,
              "listing": listing.hexdigest()}
    stem = os.path.splitext(name)[0] if len(files) == 1 else name
    short = re.sub(r"[^\w.-]+", "-", stem, flags=re.ASCII).strip("-.") or "text"

    def read():
        for _, file in files:
            yield _decode(spec, _read(file), file)

    return Corpus(short[:40], source, len(files) == 1, read)


def _python():
    """The source of the running interpreter's standard library: real text with no network, some 10 MB."""
    root = sysconfig.get_path("stdlib")
    if not os.path.isfile(os.path.join(root, "os.py")):
        raise ValueError(f"corpus=python: this Python has no library sources in {root}: take "
                         "corpus=shakespeare or the path of some text")

    def read():
        for file in _walk(root, PYTHON_SKIPPED):
            if file.endswith(".py") and not os.path.basename(file).startswith("_sysconfigdata"):
                try:
                    yield _read(file).decode("utf-8")
                except UnicodeDecodeError:  # lib2to3 has files in other encodings, as fixtures
                    continue

    version = platform.python_version()
    return Corpus(f"python-{version}", {"kind": "python", "name": "python", "revision": version}, False, read)


def _walk(root, skipped=None):
    """The files below `root` that are not hidden, in one order on every machine."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".") and not (skipped and skipped.fullmatch(f))]
        found += [os.path.join(folder, f) for f in files if not f.startswith(".")]
    return sorted(found, key=lambda f: Path(f).parts)


def _read(path):
    with open(path, "rb") as file:
        return file.read()


def _decode(spec, raw, path=None):
    """UTF-8 bytes as str, character for character: line ends stay as they are."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{path}: " if path else ""
        raise ValueError(f"corpus={spec}: {where}not UTF-8 text at byte {error.start}: convert it "
                         "(iconv -t utf-8), or leave that file out") from None


def _fetch(name, url, sha256):
    """The bytes behind a URL, kept in the cache folder and checked each time that they are read."""
    cache = os.environ.get("NANOGPT_ACCEL_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "nanogpt_accel")
    path = os.path.join(cache, f"{name}.txt")
    if os.path.isfile(path):
        raw = _read(path)
        if hashlib.sha256(raw).hexdigest() == sha256:
            return raw
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            raw = answer.read()
    except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
        reason = getattr(error, "reason", None) or error
        raise ValueError(f"corpus={name}: cannot download {url} ({reason}): with a copy of that file, "
                         "give its path as corpus=PATH") from None
    got = hashlib.sha256(raw).hexdigest()
    if got != sha256:
        raise ValueError(f"corpus={name}: {url} has changed: its SHA-256 is {got}, expected {sha256}: with a "
                         "copy of the right file, give its path as corpus=PATH")
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        os.makedirs(cache, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(raw)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"corpus={name}: cannot keep the download in {cache} ({error.strerror}): set "
                      "NANOGPT_ACCEL_CACHE to a folder that can be written") from None
    return raw


def _hub_rows(name, repository, revision, column):
    """The text column of a Hub data set's train split, streamed."""
    try:
        from datasets import load_dataset

        for row in load_dataset(repository, split="train", revision=revision, streaming=True):
            yield row[column]
    except Exception as error:  # the Hub's clients raise errors of five libraries here
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"corpus={name}: cannot read {repository} ({revision}) from the Hugging Face Hub "
                         f"({type(error).__name__}: {reason}): look at the network, HF_HUB_OFFLINE and "
                         "HF_ENDPOINT, or give a path as corpus=PATH") from error
