"""Kills a training over and over, and compares what it comes to with one that was left alone.

    python tests/support/torture.py 100
    python tests/support/torture.py 100 --processes 2 --async

SIGKILL hits every process of the run at once, at random moments, three of four while a checkpoint is being written.
After each kill every checkpoint that can be seen is whole, and the newest one is no older than before. At the end the
numbers of metrics.jsonl and every file of the last checkpoint are those of the run that was left alone, to the last
bit. (Leave the package alone meanwhile: its model.py is one of these files.)

Processes are forked from this one, which has imported everything and computed nothing, so a life costs a second
instead of ten.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch reads it

LIMIT = 120  # seconds for anything that is waited for
SAVE, STEPS_A_KILL = 2, 8  # steps between checkpoints; steps of the run for each kill, so that none comes too late
RECIPE = """
data: {{corpus: {folder}/text.txt, tokenizer: char, val_fraction: 0.1, data_dir: {folder}/tokens}}
model: {{n_layer: 2, n_embd: 32, n_head: 2, block_size: 32, dropout: 0.2}}
optimizer: {{learning_rate: 1e-2, warmup_iters: 5}}
train: {{batch_size: 2, gradient_accumulation_steps: 2, max_iters: {steps}, eval_interval: 10, eval_iters: 2,
         device: cpu}}
checkpoint: {{keep_last: 2, resume: auto}}
"""


class Life:
    """A training from its start, or from its last checkpoint, to its end or its death."""

    def __init__(self, argv, processes, output):
        from launching import free_port

        self.pids, self.codes, self.output = [], {}, output
        self.output.touch()
        self.before = self.output.stat().st_size  # what earlier lives have said
        port = str(free_port())
        for rank in range(processes):
            pid = os.fork()
            if pid == 0:
                self._train(argv, processes, rank, port)
            self.pids.append(pid)

    def _train(self, argv, processes, rank, port):
        """What a forked process does; it does not come back."""
        from nanogpt_accel.__main__ import main

        code = 1
        try:
            file = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            if processes > 1:  # what torchrun sets
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(processes),
                    "LOCAL_WORLD_SIZE": str(processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
            code = main(argv)
            sys.stdout.flush()
        finally:
            os._exit(code)

    def is_over(self):
        """Whether all of its processes have ended, each of them well."""
        for pid in self.pids:
            if pid not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        if any(self.codes.values()):
            self.kill()
            raise AssertionError(f"exit statuses {self.codes}\n{self.output.read_text()[-4000:]}")
        return len(self.codes) == len(self.pids)

    def wait(self, condition):
        """Wait for a condition; False where the end of the training came first."""
        give_up = time.monotonic() + LIMIT
        while not condition():
            if self.is_over():
                return False
            if time.monotonic() > give_up:
                self.kill()
                raise AssertionError(f"nothing happens any more\n{self.output.read_text()[-4000:]}")
            time.sleep(0.0005)
        return True

    def steps(self):
        """Number of steps that it has reported so far."""
        return self.output.read_bytes()[self.before :].count(b"\niter ")

    def kill(self):
        for pid in self.pids:
            if pid not in self.codes:
                os.kill(pid, signal.SIGKILL)
        for pid in self.pids:
            if pid not in self.codes:
                self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def saving(run, since=0.0):
    """The names of hidden checkpoint folders that were touched since a time.time(): of a save that goes on, or of one
    that a kill interrupted."""
    names = set()
    for path in run.glob(".checkpoint-*"):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime > since:
                names.add(path.name)
    return names


def check(run, newest):
    """After a kill: every checkpoint that can be seen is whole. `newest`: the step before; returns the one of now."""
    from nanogpt_accel.checkpoint.layout import list_checkpoints, read_trainer
    from nanogpt_accel.checkpoint.verify import find_corruption
    from nanogpt_accel.models.find import find_model

    found = list_checkpoints(run)
    for path in found:
        trouble = find_corruption(path)
        assert trouble is None, f"{path}: {trouble}"
    if found:
        find_model(run, warn=print)
        assert all(path.exists() for path in run.iterdir() if path.is_symlink()), f"{run}: links to nothing"
    now = read_trainer(found[-1])["step"] if found else None
    assert newest is None or now is not None and now >= newest, f"checkpoint {newest} is lost, {now} is the newest"
    return now


def torture(folder, kills, processes=1, in_background=False, seed=1):
    """Kill a training `kills` times and let it end.

    Returns:
        (closing line, names of what differs)
    """
    from launching import ordered_numbers, write_recipe

    from nanogpt_accel.tracking.metrics_log import read_metrics

    draw, began = random.Random(seed), time.monotonic()
    steps = STEPS_A_KILL * kills + 50
    write_recipe(folder, RECIPE, steps=steps)
    calm, run = folder / "calm", folder / "run"
    train = ["train", str(folder / "recipe.yaml"), f"seed={seed}"]

    life = Life([*train, f"out_dir={calm}", f"save_interval={steps}"], processes, folder / "calm.output")
    assert not life.wait(lambda: False)

    done = while_saving = resumes = 0
    newest, duration = None, 0.05  # seconds of the longest save seen
    argv = [*train, f"out_dir={run}", f"save_interval={SAVE}", f"async_save={in_background}"]
    while done < kills:
        born = time.time()
        life = Life(argv, processes, folder / "run.output")
        if draw.random() < 0.75:
            for _ in range(draw.choice((0, 0, 1, 2))):  # saves that end well before the one in which to die
                life.wait(lambda born=born: saving(run, born))
                appeared, names = time.monotonic(), saving(run, born)
                life.wait(lambda born=born, names=names: saving(run, born) != names)
                duration = min(max(duration, time.monotonic() - appeared), 0.5)
            life.wait(lambda born=born: saving(run, born))
            time.sleep(draw.random() * 1.2 * duration)
        else:
            moment, most = time.monotonic() + draw.random() * 1.5, draw.randint(0, 10)  # while it starts, or later
            life.wait(lambda life=life, moment=moment, most=most: time.monotonic() > moment or life.steps() > most)
        if life.is_over():
            raise AssertionError("the run ended before it was killed often enough: more STEPS_A_KILL")
        life.kill()
        done += 1
        while_saving += bool(saving(run))
        resumes += newest is not None
        newest = check(run, newest)
    life = Life(argv, processes, folder / "run.output")
    assert not life.wait(lambda: False)
    resumes += newest is not None
    check(run, newest)

    differing = [
        f"step {a['step']}" for a, b in zip(ordered_numbers(run), ordered_numbers(calm), strict=True) if a != b
    ]
    if len(read_metrics(run / "metrics.jsonl")) != len((run / "metrics.jsonl").read_text().splitlines()):
        differing.append("metrics.jsonl has a torn line")
    compared = sum(len(str(line)) for line in ordered_numbers(calm))
    last = f"checkpoint-{steps:06d}"
    for file in sorted((calm / last).rglob("*")):
        if file.is_file() and file.name != "README.md":  # which names save_interval
            content, name = file.read_bytes(), file.relative_to(calm / last)
            differing += [str(name)] * ((run / last / name).read_bytes() != content)
            compared += len(content)
    differing += sorted(saving(run))
    line = (
        f"{processes} process{'es' * (processes > 1)}, {'async_save' if in_background else 'plain saves'}: "
        f"{done} kills ({while_saving} while saving), {resumes} resumes, {compared:,} bytes compared, "
        f"{len(differing)} differences; {time.monotonic() - began:.0f} s"
    )
    return line, differing


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--async", action="store_true", dest="in_background")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()

    import matplotlib.figure  # noqa: F401 (before the forks)
    import torch.distributed  # noqa: F401
    import transformers.generation  # noqa: F401

    import nanogpt_accel.train  # noqa: F401
    from nanogpt_accel.distributed import (
        sharding,  # noqa: F401
    )

    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        line, differing = torture(Path(folder), asked.kills, asked.processes, asked.in_background, asked.seed)
    print(*(f"differs: {name}" for name in differing), line, sep="\n")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
