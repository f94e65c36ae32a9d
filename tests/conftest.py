"""Fixtures for all tests: no network, real data if they are there, commands and their errors; and the marker `fast`."""

import os
from contextlib import contextmanager

import pytest
from shared import DATA, FAST

# set before any test imports a library, because libraries read these variables only once
os.environ["OMP_NUM_THREADS"] = "1"  # sums of floats depend on the number of threads, and the models are tiny
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
if (DATA / "tiktoken").is_dir():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(DATA / "tiktoken")


def _is_fast_file(path):
    return any(path.match(f"tests/{pattern}") for pattern in FAST)


def pytest_ignore_collect(collection_path, config):
    """With `-m fast` and with `-m gpu`, do not import the other test files."""
    if collection_path.name.startswith("test_"):
        is_selected = {"fast": _is_fast_file, "gpu": lambda path: path.parent.name == "gpu"}
        return None if is_selected.get(config.option.markexpr, lambda path: True)(collection_path) else True


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items):
    """Mark the tests of the FAST files, unless they are slow or need a GPU."""
    for item in items:
        if _is_fast_file(item.path) and not any(item.get_closest_marker(name) for name in ("slow", "gpu")):
            item.add_marker("fast")


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path_factory):
    """Give each test its own empty download folder."""
    monkeypatch.setenv("NANOGPT_ACCEL_CACHE", str(tmp_path_factory.mktemp("cache")))


def _require(path):
    if not path.exists():
        pytest.skip(f"no {path}: set NANOGPT_ACCEL_TEST_DATA to a folder that contains it")
    return path


@pytest.fixture
def shared_data():
    """Return the folder of real data: tinyshakespeare/input.txt, wikitext2/valid.txt, tiktoken/."""
    return _require(DATA)


@pytest.fixture
def shakespeare():
    """Return the path of the tiny Shakespeare text."""
    return _require(DATA / "tinyshakespeare" / "input.txt")


@pytest.fixture(scope="session")
def gpt2_files():
    """Require GPT-2's vocabulary, which tiktoken would download."""
    return _require(DATA / "tiktoken")


@pytest.fixture
def no_launcher(monkeypatch):
    """Remove the variables of torchrun and `accelerate launch` from the environment."""
    for name in list(os.environ):
        if name.startswith("ACCELERATE_") or name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)


@pytest.fixture
def call(capsys):
    """Return a function that runs a command such as call("sample", ..., status=0), checks its exit status, and returns
    what it printed: stdout for status 0, stderr otherwise."""
    from nanogpt_accel.__main__ import main

    def call(*words, status=0):
        capsys.readouterr()
        assert main([str(word) for word in words]) == status, capsys.readouterr().err
        captured = capsys.readouterr()
        return captured.out if status == 0 else captured.err

    return call


@pytest.fixture
def refused():
    """Return a context manager, as in `with refused(ValueError, "a word", "another"):`. The block must raise a one-line
    error of this class with these words."""
    from nanogpt_accel.utils import cli

    @contextmanager
    def expect(kind, *words):
        with pytest.raises(kind) as caught:
            yield
        message = str(caught.value)
        assert "\n" not in message
        assert [word for word in map(str, words) if word not in message] == [], message
        assert cli._raised_here(caught.value), "a user would see a traceback"

    return expect
