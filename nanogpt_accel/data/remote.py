"""Read files of a corpus from s3://, gs://, https://, hf:// and other URLs, with fsspec.

    urls, is_folder = find("s3://bucket/stories/*.jsonl")
    for url in urls:
        with open_remote(url) as file:
            ...

Nothing is stored on this machine. fsspec loads a package per protocol: s3fs for s3://, gcsfs for gs://, aiohttp for
https://, huggingface_hub for hf://. Each of these packages has its own settings for credentials.
"""

import glob
import io
import re
from contextlib import contextmanager

from ..utils.text import one_line

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
FIXES = {
    "s3": "check the bucket and AWS_ENDPOINT_URL, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or run "
    "`aws configure`; for a public bucket, set FSSPEC_S3_ANON=true",
    "gs": "check the bucket, and run `gcloud auth application-default login`; for a public bucket, set "
    "FSSPEC_GS_TOKEN=anon",
    "hf": "check the name and HF_HUB_OFFLINE; a private or gated repository requires `hf auth login`",
}
# keys of fsspec's info about a file; the first of these that exists identifies the version of the file
CHANGES = ("ETag", "etag", "generation", "blob_id", "LastModified", "last_modified", "mtime")


def is_remote(path):
    """Return whether a path is a URL."""
    return re.match(r"[a-zA-Z][\w+.-]*://", str(path)) is not None


def name_of(path):
    """Return a path without the query of a URL: x.jsonl.gz for https://host/x.jsonl.gz?token=1."""
    return re.sub(r"[?#].*", "", path) if re.match("https?://", path) else path


def find(spec):
    """Return (sorted URLs of all files, whether `spec` is a folder). spec: the URL of a file, a folder or a glob.

    Hidden files are skipped, as in local folders. Raises ValueError if there are no files, or if they cannot be listed.
    """
    is_folder = False
    is_http = _protocol(spec) in ("http", "https")  # a web server has no folders, and "?" in a URL starts a query
    with _errors(spec):
        fs, path = _filesystem(spec)
        if "*" in path if is_http else glob.has_magic(path):
            paths = [found for found, info in fs.glob(path, detail=True).items() if info["type"] == "file"]
        elif is_http or fs.isfile(path):
            return [spec], False
        else:
            is_folder, paths = True, fs.find(path)
        if "/." not in path:
            paths = [found for found in paths if "/." not in found]
        urls = [str(fs.unstrip_protocol(found)) for found in paths if not found.endswith("/")]
    if not urls:
        raise ValueError(f"corpus={spec}: no such file; check the name, or set `corpus` to another URL")
    return sorted(urls), is_folder


def remote_state(url):
    """Return (bytes, version) of a file. If the file changes, its version changes. Unknown values are 0 and ""."""
    with _errors(url):
        fs, path = _filesystem(url)
        info = fs.info(path)
    return info.get("size") or 0, str(next((info[key] for key in CHANGES if info.get(key)), ""))


@contextmanager
def open_remote(url):
    """Open a remote file as bytes. If the file cannot be opened or read, this raises ValueError, not OSError."""
    with _errors(url):
        fs, path = _filesystem(url)
        file = fs.open(path, "rb")
    with file:
        yield io.BufferedReader(_Reader(url, file), 2**20)


class _Reader(io.RawIOBase):
    """A remote file that raises ValueError instead of OSError, because skip_bad_documents skips a file on OSError."""

    def __init__(self, url, file):
        self.url, self.file = url, file

    def readable(self):
        return True

    def seekable(self):
        return self.file.seekable()

    def seek(self, offset, whence=0):
        with _errors(self.url):  # some HTTP servers cannot send a part of a file
            return self.file.seek(offset, whence)

    def tell(self):
        return self.file.tell()

    def readinto(self, buffer):
        with _errors(self.url):
            data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _protocol(url):
    return url.partition("://")[0].lower()


def _filesystem(url):
    from fsspec.core import url_to_fs

    return url_to_fs(url)


@contextmanager
def _errors(url):
    """Convert any error of fsspec and of the libraries that it uses to a ValueError with a one-line message."""
    try:
        yield
    except ImportError as error:
        package = PACKAGES.get(_protocol(url))
        fix = f"run `pip install {package}`" if package else one_line(error)
        raise ValueError(f"corpus={url}: the package for {_protocol(url)}:// is not installed; {fix}") from None
    except FileNotFoundError as error:
        reason = f" ({one_line(error.__cause__)})" if error.__cause__ else ""
        raise ValueError(
            f"corpus={url}: no such file{reason}; check the name, or set `corpus` to another URL"
        ) from None
    except ValueError as error:
        if str(error).startswith("corpus="):
            raise
        raise ValueError(f"corpus={url}: {one_line(error)}; check the URL") from None
    except Exception as error:  # each library has its own exception types
        reason = f"{type(error).__name__}: {one_line(error)}"
        fix = FIXES.get(_protocol(url), "check the URL and the network")
        raise ValueError(f"corpus={url}: cannot be read ({reason}); {fix}") from error
