"""Kill a training run again and again, and compare the result with an undisturbed run.

    python tests/support/torture.py 100
    python tests/support/torture.py 100 --processes 2 --async

SIGKILL ends all processes of the run at random moments, three times out of four while a checkpoint is being saved.
After each kill, every visible checkpoint must be valid, and the latest one must be no older than before. At the end,
metrics.jsonl (without times) and every file of the last checkpoint must equal those of the undisturbed run, bit by bit.
Do not edit the package meanwhile, because each checkpoint contains a copy of model.py.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch reads it

from launching import TIMEOUT_S, Ranks, train_on_ranks  # noqa: E402
from runs import SMALL, checkpoint, ordered_numbers, write_recipe  # noqa: E402

SAVE_INTERVAL = 2
STEPS_PER_KILL = 8  # enough steps, so that the run does not end before the last kill


def wait(job, condition):
    """Wait for a condition. Return False if the training ended before the condition was true."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if job.has_ended():
            job.finish()  # fails on an exit status other than 0
            return False
        if time.monotonic() > deadline:
            job.kill()
            raise AssertionError(f"the job timed out\n{job.says()}")
        time.sleep(0.0005)
    return True


def saving(run, since=0.0):
    """Return the names of temporary checkpoint folders that changed since a time, left by a running or killed save."""
    names = set()
    for path in run.glob(".checkpoint-*"):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime > since:
                names.add(path.name)
    return names


def check_checkpoints(run, previous_step):
    """Check after a kill that every visible checkpoint is valid and none got lost; return the step of the latest."""
    from nanogpt_accel.checkpoint.layout import list_checkpoints, read_trainer
    from nanogpt_accel.checkpoint.verify import find_corruption
    from nanogpt_accel.models.find import find_model

    found = list_checkpoints(run)
    for path in found:
        corruption = find_corruption(path)
        assert corruption is None, f"{path}: {corruption}"
    if found:
        find_model(run, warn=print)
        assert all(path.exists() for path in run.iterdir() if path.is_symlink()), f"{run}: dangling links"
    step = read_trainer(found[-1])["step"] if found else None
    assert previous_step is None or step is not None and step >= previous_step, f"checkpoint {previous_step} is lost"
    return step


def find_differences(run, reference, last_step):
    """Return (names of what differs between two runs, number of bytes compared)."""
    from nanogpt_accel.tracking.metrics_log import read_metrics

    pairs = list(zip(ordered_numbers(run), ordered_numbers(reference), strict=True))
    differing = [f"step {a['step']}" for a, b in pairs if a != b]
    if len(read_metrics(run / "metrics.jsonl")) != len((run / "metrics.jsonl").read_text().splitlines()):
        differing.append("metrics.jsonl has an incomplete line")
    compared = sum(len(str(line)) for _, line in pairs)
    for file in sorted(checkpoint(reference, last_step).rglob("*")):
        if file.is_file() and file.name != "README.md":  # it contains save_interval
            content, name = file.read_bytes(), file.relative_to(reference)
            differing += [str(name)] * ((run / name).read_bytes() != content)
            compared += len(content)
    return differing + sorted(saving(run)), compared


def torture(folder, kills, processes=1, in_background=False, seed=1):
    """Kill a training `kills` times and let it end.

    Returns:
        (summary line, names of what differs)
    """
    rng, start = random.Random(seed), time.monotonic()
    steps = STEPS_PER_KILL * kills + 50
    small = SMALL | {"batch_size": 2, "gradient_accumulation_steps": 2, "eval_iters": 2}
    recipe = write_recipe(folder, **small, max_iters=steps, eval_interval=10, keep_last=2, resume="auto", seed=seed)
    reference, run = folder / "reference", folder / "run"
    train_on_ranks(reference, [recipe, f"out_dir={reference}", f"save_interval={steps}"], processes=processes)

    done = while_saving = resumes = 0
    latest, save_s = None, 0.05  # step of the latest checkpoint; duration of the longest save seen
    argv = [recipe, f"out_dir={run}", f"save_interval={SAVE_INTERVAL}", f"async_save={in_background}"]
    while done < kills:
        job_start = time.time()
        job = Ranks(run, argv, processes=processes)
        if rng.random() < 0.75:
            for _ in range(rng.choice((0, 0, 1, 2))):  # let some saves end before the one that is interrupted
                wait(job, lambda since=job_start: saving(run, since))
                save_start, names = time.monotonic(), saving(run, job_start)
                wait(job, lambda since=job_start, names=names: saving(run, since) != names)
                save_s = min(max(save_s, time.monotonic() - save_start), 0.5)
            wait(job, lambda since=job_start: saving(run, since))
            time.sleep(rng.random() * 1.2 * save_s)
        else:  # during the start-up, or some steps later
            moment, most = time.monotonic() + rng.random() * 1.5, rng.randint(0, 10)
            wait(job, lambda job=job, moment=moment, most=most: time.monotonic() > moment or job.n_steps() > most)
        assert not job.has_ended(), "the run ended before it was killed often enough: increase STEPS_PER_KILL"
        job.kill()
        done += 1
        while_saving += bool(saving(run))
        resumes += latest is not None
        latest = check_checkpoints(run, latest)
    train_on_ranks(run, argv, processes=processes)
    resumes += latest is not None
    check_checkpoints(run, latest)

    differing, compared = find_differences(run, reference, steps)
    line = (
        f"{processes} process{'es' * (processes > 1)}, {'async_save' if in_background else 'plain saves'}: "
        f"{done} kills ({while_saving} while saving), {resumes} resumes, {compared:,} bytes compared, "
        f"{len(differing)} differences; {time.monotonic() - start:.0f} s"
    )
    return line, differing


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--async", action="store_true", dest="in_background")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        line, differing = torture(Path(folder), asked.kills, asked.processes, asked.in_background, asked.seed)
    print(*(f"differs: {name}" for name in differing), line, sep="\n")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
