"""trackers.py: which trackers a recipe may name."""

from nanogpt_accel.tracking.trackers import TRACKERS, check_trackers


def test_unknown_and_missing_trackers_are_refused(monkeypatch):
    assert check_trackers([]) == []
    problems = check_trackers(["wandbb", "tensorboard", "nothing"])
    assert [p.partition(":")[0] for p in problems if "not supported" in p] == [
        "tracking.trackers=wandbb",
        "tracking.trackers=nothing",
    ]
    assert "wandb" in problems[0] and "tensorboard" in problems[0]
    monkeypatch.setattr("nanogpt_accel.tracking.trackers.find_spec", lambda name: None)
    assert check_trackers(["wandb"]) == ["tracking.trackers=wandb: not installed; run pip install wandb"]


def test_tracker_names_are_those_of_accelerate():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(TRACKERS) == {getattr(name, "value", name) for name in LOGGER_TYPE_TO_CLASS}
