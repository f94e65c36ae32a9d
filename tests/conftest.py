"""What the tests share: real data where they are, no network, and what every refusal has in common."""

import os
from contextlib import contextmanager

import pytest
from shared import DATA

# before any test imports the libraries that read them once
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and threads that wait for each other cost more
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
if (DATA / "tiktoken").is_dir():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(DATA / "tiktoken")


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path_factory):
    """Downloads go to a folder of the test's own."""
    monkeypatch.setenv("NANOGPT_ACCEL_CACHE", str(tmp_path_factory.mktemp("cache")))


def _there(path):
    if not path.exists():
        pytest.skip(f"no {path}: set NANOGPT_ACCEL_TEST_DATA to a folder that holds it")
    return path


@pytest.fixture
def shared_data():
    """The folder of real data: tinyshakespeare/input.txt, wikitext2/valid.txt, tiktoken/."""
    return _there(DATA)


@pytest.fixture
def shakespeare():
    """Path of the tiny Shakespeare text."""
    return _there(DATA / "tinyshakespeare" / "input.txt")


@pytest.fixture(scope="session")
def gpt2_files():
    """For tests that need GPT-2's vocabulary without a network."""
    return _there(DATA / "tiktoken")


@pytest.fixture
def call(capsys):
    """call("sample", ...) -> what that command printed; it has to end well, or with the `status` that is given."""
    from nanogpt_accel.__main__ import main

    def call(*words, status=0):
        capsys.readouterr()
        assert main([str(word) for word in words]) == status, capsys.readouterr().err
        captured = capsys.readouterr()
        return captured.out if status == 0 else captured.err

    return call


@pytest.fixture
def refused():
    """`with refused(ValueError, "a word", "another"):` the block must end in one clear line to the user."""
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
