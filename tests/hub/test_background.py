"""Push checkpoints in the background, with fakes for create and upload."""

import os
import threading
from pathlib import Path

import pytest

from nanogpt_accel.checkpoint.run_folder import prepare_run_folder
from nanogpt_accel.hub.background import BackgroundPush


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".") and ".lock" not in path.name]


class Uploads:
    """Fakes of create and upload. An upload waits for `go`; the first `fails` uploads fail."""

    def __init__(self):
        self.started, self.go, self.done, self.fails, self.created = threading.Event(), threading.Event(), [], 0, []

    def create(self, repo, private, branch):
        self.created.append((repo, private, branch))
        return f"me/{repo}"

    def upload(self, folder, repo, message, branch, warn):
        self.started.set()
        assert self.go.wait(10)
        if self.fails:
            self.fails -= 1
            raise ConnectionError("no answer")
        self.done.append((message, {path.name: path.read_text() for path in Path(folder).iterdir()}))


@pytest.fixture
def uploads(monkeypatch):
    uploads = Uploads()
    monkeypatch.setattr("nanogpt_accel.hub.background.create", uploads.create)
    monkeypatch.setattr("nanogpt_accel.hub.background.upload", uploads.upload)
    return uploads


def checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
    (path / "state").mkdir(parents=True)
    (path / "config.json").write_text(f"step {step}")
    (path / "state" / "trainer.json").touch()
    return path


def test_only_the_latest_waiting_checkpoint_is_pushed(uploads, tmp_path):
    pusher = BackgroundPush("tiny", tmp_path, pytest.fail, private=True, branch="dev")
    pusher.push(checkpoint(tmp_path, 1), "1")
    assert uploads.started.wait(10)
    for step in (2, 3, 4):
        pusher.push(checkpoint(tmp_path, step), str(step))
    assert len(leftovers(tmp_path)) == 2  # the current push and the waiting one
    uploads.go.set()
    pusher.wait()
    assert uploads.done == [("1", {"config.json": "step 1"}), ("4", {"config.json": "step 4"})]
    assert leftovers(tmp_path) == [] and pusher.pushed == tmp_path / "checkpoint-4"
    assert uploads.created[0] == ("tiny", True, "dev") and pusher.repo.startswith("me/")


def test_a_checkpoint_may_be_pruned_before_it_is_pushed(uploads, tmp_path):
    pusher = BackgroundPush("tiny", tmp_path, pytest.fail)
    path = checkpoint(tmp_path, 1)
    pusher.push(path, "1")
    (path / "config.json").unlink()
    uploads.go.set()
    pusher.wait()
    assert uploads.done == [("1", {"config.json": "step 1"})]


def test_a_failure_is_reported_once_and_the_next_push_succeeds(uploads, tmp_path):
    uploads.fails, warnings = 1, []
    uploads.go.set()
    pusher = BackgroundPush("tiny", tmp_path, warnings.append)
    pusher.push(checkpoint(tmp_path, 1), "one")
    pusher.wait()
    assert warnings == ["warning: not pushed to the Hub: one: no answer. Later checkpoints will be pushed as usual"]
    assert pusher.pushed is None and uploads.done == [] and leftovers(tmp_path) == []
    pusher.push(checkpoint(tmp_path, 2), "two")
    pusher.wait()
    assert pusher.pushed == tmp_path / "checkpoint-2" and [message for message, _ in uploads.done] == ["two"]


def test_an_unreadable_checkpoint_gives_a_warning(uploads, tmp_path):
    warnings = []
    pusher = BackgroundPush("tiny", tmp_path, warnings.append)
    pusher.push(tmp_path / "gone", "gone")
    pusher.wait()
    assert len(warnings) == 1 and warnings[0].startswith("warning: not pushed to the Hub: ") and pusher.pushed is None
    assert uploads.created == []


def test_an_unreadable_checkpoint_leaves_no_links(uploads, tmp_path):
    BackgroundPush("tiny", tmp_path, lambda line: None).push(tmp_path / "gone", "gone")
    assert leftovers(tmp_path) == []


def test_files_are_copied_if_hard_links_are_not_supported(uploads, tmp_path, monkeypatch):
    def link(*args):
        raise OSError("not here")

    monkeypatch.setattr(os, "link", link)
    uploads.go.set()
    pusher = BackgroundPush("tiny", tmp_path, pytest.fail)
    pusher.push(checkpoint(tmp_path, 1), "1")
    pusher.wait()
    assert uploads.done == [("1", {"config.json": "step 1"})]


def test_wait_ends_after_the_timeout(uploads, tmp_path, monkeypatch):
    monkeypatch.setattr(BackgroundPush, "timeout_s", 0.05)
    pusher = BackgroundPush("tiny", tmp_path, pytest.fail)
    pusher.wait()  # there is no push
    pusher.push(checkpoint(tmp_path, 1), "1")
    pusher.wait()
    assert pusher.pushed is None
    monkeypatch.setattr(BackgroundPush, "timeout_s", 10)
    uploads.go.set()
    pusher.wait()
    assert [message for message, _ in uploads.done] == ["1"]


def test_links_of_a_killed_run_are_deleted(tmp_path):
    (tmp_path / ".push-abc").mkdir()
    (tmp_path / ".push-abc" / "config.json").touch()
    prepare_run_folder(tmp_path, "seed: 1\n", is_resumed=True)
    assert leftovers(tmp_path) == []
