"""metrics_log.py: metrics.jsonl, its repair after a kill, and its plot."""

import json
import math
import os
import struct
import subprocess
import sys

import pytest

from nanogpt_accel.tracking.metrics_log import MetricsLog, Spikes, plot_losses, read_metrics

# ---- metrics.jsonl


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def a_run(path, first, last, resume_step=None, every=5, tag=""):
    """Log the steps first to last - 1 as the training loop does, with an evaluation before every fifth step and at the
    end."""
    log = MetricsLog(path, resume_step)
    for step in range(first, last + 1):
        if (step % every == 0 or step == last) and step != resume_step:
            log.write(step=step, val_loss=100 - step, by=tag)
        if step < last:
            log.write(step=step, loss=50 - step, by=tag)
    log.close()


def steps(lines, key):
    return [line["step"] for line in lines if key in line]


def test_line_is_on_disk_as_soon_as_it_is_written(path):
    log = MetricsLog(path)
    log.write(step=0, loss=1 / 3, mfu=None)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 0, "loss": 1 / 3, "mfu": None}]
    log.write(step=1, loss=2.5)
    assert path.read_text().count("\n") == 2 and path.read_text().endswith("\n")
    log.close()


@pytest.mark.parametrize("stopped", [12, 15, 17, 19])
def test_each_step_is_logged_once_after_a_resume(path, stopped):
    """The run is killed at step `stopped` and continues from the checkpoint of step 10."""
    a_run(path, 0, 40, tag="complete")
    complete = [(line["step"], "loss" in line) for line in read_metrics(path)]
    path.unlink()
    log = MetricsLog(path)
    for step in range(stopped):
        if step % 5 == 0:
            log.write(step=step, val_loss=100 - step, by="first")
        log.write(step=step, loss=50 - step, by="first")
    log.close()
    a_run(path, 10, 40, resume_step=10, tag="second")

    lines = read_metrics(path)
    assert [(line["step"], "loss" in line) for line in lines] == complete
    assert steps(lines, "loss") == list(range(40)) and steps(lines, "val_loss") == list(range(0, 41, 5))
    # at step 10, the evaluation is from before the resume, and the training line is from after it
    at_ten = [line for line in lines if line["step"] == 10]
    assert [(("val_loss" in line), line["by"]) for line in at_ten] == [(True, "first"), (False, "second")]
    assert all(line["by"] == ("first" if line["step"] < 10 else "second") for line in lines if line["step"] != 10)


def test_resume_of_a_finished_run_keeps_all_lines(path):
    a_run(path, 0, 10)
    before = path.read_text()
    MetricsLog(path, resume_step=10).close()
    assert path.read_text() == before


@pytest.mark.parametrize("torn", ['{"step": 7, "lo', "{", '{"step": 7, "loss": 4', "\0\0\0\0", '"'])
def test_incomplete_last_line_is_repaired(path, torn):
    a_run(path, 0, 7)
    before = read_metrics(path)
    with open(path, "a") as file:
        file.write(torn)
    assert read_metrics(path) == before
    log = MetricsLog(path, resume_step=7)
    log.write(step=7, loss=1.0)
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]  # every line is complete
    assert lines[-1] == {"step": 7, "loss": 1.0}
    assert lines[:-1] == [line for line in before if line["step"] < 7 or "val_loss" in line]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_resume_without_a_log_starts_one(path):
    assert read_metrics(path) == []
    log = MetricsLog(path, resume_step=5)
    log.write(step=5, loss=1.0)
    log.close()
    assert read_metrics(path) == [{"step": 5, "loss": 1.0}]


DIGITS = "9" * 5000
HOSTILE = [
    f'{{"step": {DIGITS}, "loss": 1.0}}',
    f'{{"step": {DIGITS[:400]}, "loss": 1.0}}',
    '{"step": 3, "loss": ' + "[" * 100_000,
    '{"step": 3, "loss": ' + '{"a":' * 100_000,
    '{"step": 3.0}',
    "[]",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_lines_after_an_invalid_line_are_ignored(path, text):
    path.write_text(f'{{"step": 2, "loss": 1.0}}\n{text}\n{{"step": 4, "loss": 1.0}}\n')
    assert read_metrics(path) == [{"step": 2, "loss": 1.0}]
    Spikes(path).is_spike(2.0)
    MetricsLog(path, resume_step=9).close()
    assert path.read_text() == '{"step": 2, "loss": 1.0}\n'


def test_losses_that_are_not_numbers_are_ignored(path, tmp_path):
    lines = [{"step": s, "loss": loss, "val_loss": loss} for s, loss in enumerate(["1.0", [1.0], None, {}, 2.0])]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(path) == lines
    assert not Spikes(path).is_spike(2.0)
    plot_losses(path, tmp_path / "loss.png")


def test_large_integers_of_other_metrics_become_floats(path):
    path.write_text(f'{{"step": 2, "loss": {DIGITS}, "peak_memory": {DIGITS[:19]}, "mine": {DIGITS[:18]}}}\n')
    (line,) = read_metrics(path)
    assert line == {"step": 2, "loss": math.inf, "peak_memory": 1e19, "mine": int(DIGITS[:18])}
    MetricsLog(path, resume_step=9).close()
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["loss"] is None  # valid JSON


# ---- the plot


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


@pytest.mark.filterwarnings("error")  # for example matplotlib's about an empty legend
@pytest.mark.parametrize(
    "lines",
    [
        [{"step": s, "loss": 4 - s / 10} for s in range(20)] + [{"step": 20, "val_loss": 2.0}],
        [{"step": 0, "val_loss": 2.0}],
        [{"step": 0, "loss": 2.0}],
        [{"step": 0, "loss": None}, {"step": 1, "val_loss": None}],  # NaN
        [],
        [{"step": s, "val_loss": 4.0, "val_loss/wiki": 3.0, "val_loss/code": None} for s in (0, 9)],
    ],
)
def test_plot_losses_writes_a_png(path, tmp_path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_losses(path, tmp_path / "loss.png")
    width, height = png_size(tmp_path / "loss.png")
    assert width > 400 and height > 200 and os.path.getsize(tmp_path / "loss.png") > 5000


def test_plot_ignores_the_backend_of_a_notebook(path, tmp_path):
    """Some versions of matplotlib cannot be imported if MPLBACKEND names a package that is not installed. In the kernel
    of the notebook itself, later plots must still use the backend."""
    path.write_text('{"step": 0, "loss": 2.0}')
    code = f"""
import os
from nanogpt_accel.tracking.metrics_log import History, plot_losses
plot_losses({str(path)!r}, "loss.png")
import matplotlib
assert os.environ["MPLBACKEND"] == matplotlib.rcParams["backend"] == "module://not_installed"
History().plot().figure.savefig("history.png")
"""
    env = os.environ | {"MPLBACKEND": "module://not_installed"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert png_size(tmp_path / "loss.png") and png_size(tmp_path / "history.png")
