"""Checkpoints are found by their names, in the order of their steps."""

from nanogpt_accel.checkpoint.layout import checkpoint_path, list_checkpoints


def test_checkpoints_are_listed_in_the_order_of_their_steps(tmp_path):
    for step in (1_000_000, 999_999, 20, 5):
        checkpoint_path(tmp_path, step).mkdir()
    for name in ("checkpoint-", "checkpoint-12x", ".checkpoint-000030.tmp", "checkpoint-best"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-000040").touch()  # a file
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "checkpoint-000005",
        "checkpoint-000020",
        "checkpoint-999999",
        "checkpoint-1000000",
    ]
    assert list_checkpoints(tmp_path / "no such run") == []
