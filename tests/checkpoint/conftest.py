"""Runs with checkpoints, for the tests of this folder."""

import shutil

import pytest
from tiny_run import TinyRun


@pytest.fixture
def run(tmp_path):
    """A run without checkpoints."""
    return TinyRun(tmp_path / "run")


@pytest.fixture
def saved(run):
    """A run with the checkpoints 10 and 20; 10 is the best."""
    run.save(10, best_step=10)
    run.save(20, best_step=10)
    return run


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    run = TinyRun(tmp_path_factory.mktemp("original") / "run")
    run.save(10, best_step=10)
    run.save(20, best_step=10)
    return run.folder


@pytest.fixture
def folder(original, tmp_path):
    """A run folder as in `saved`, for tests that need only its files."""
    return shutil.copytree(original, tmp_path / "run", symlinks=True)
