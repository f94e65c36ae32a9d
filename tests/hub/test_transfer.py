"""Names of models on the Hub. Transfers are tested in test_hub.py, against a fake Hub."""

from pathlib import Path

import pytest

from nanogpt_accel.hub.transfer import is_model_id


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("gpt2", True),
        ("me/tiny", True),
        ("me/tiny-1.5_b", True),
        ("me/tiny@dev", True),
        ("gpt2@main", True),
        ("me/tiny@refs/pr/1", True),
        ("me/tiny@0123abc", True),
        (Path("me/tiny"), True),
        ("", False),
        (".", False),
        ("..", False),
        ("./gone", False),
        ("../gone", False),
        ("~/gone", False),
        ("/gone", False),
        ("a/b/c", False),
        ("me/", False),
        ("/tiny", False),
        ("me/tiny@", False),
        ("@dev", False),
        ("me/tiny@a@b", False),
        ("me/my tiny", False),
        ("C:\\gone", False),
        ("me/tiny\n", False),
        ("hf://me/tiny", False),
    ],
)
def test_is_model_id(name, is_id):
    assert is_model_id(name) is is_id
