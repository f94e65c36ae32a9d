"""Fixtures for models and model folders."""

import pytest
import torch
from stock_models import T_MAX, N


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ids():
    """Random ids, (3, T_MAX)."""
    return torch.randint(N, (3, T_MAX), generator=torch.Generator().manual_seed(3))
