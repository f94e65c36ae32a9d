"""Two machines with separate networks, host names and disks: a run starts, or all its processes end soon with the
reason. Each host name is 127.0.1.1 on its own machine, as on Debian and Ubuntu."""

import subprocess
import sys
import time

import pytest
from launching import TIMEOUT_S, package_env
from machines import Machines, needs_machines
from runs import SMALL, make_text, numbers, write_recipe

pytestmark = [pytest.mark.slow, needs_machines]
TIME_OUT = 15  # collective_timeout
RUN = ["tiny.yaml", "out_dir=run", f"collective_timeout={TIME_OUT}"]
SETTINGS = SMALL | {"max_iters": 4, "eval_interval": 2, "corpus": "text.txt"}
UNSEEN = "out_dir=run: rank 1 (node2) cannot see the files that rank 0 (node1) writes there; set out_dir to a folder"


@pytest.fixture
def machines(tmp_path, request):
    with Machines(tmp_path, is_shared=getattr(request, "param", False)) as found:
        for folder in {found.disk(0), found.disk(1)}:
            write_recipe(folder, **SETTINGS)
            (folder / "text.txt").write_text(make_text(4000))
        yield found


shared = pytest.mark.parametrize("machines", [True], indirect=True, ids=["shared disk"])


def start(machines, i, argv, processes=1, launcher=True):
    """Start machine i of a run with `accelerate launch`, or without a launcher as srun does."""
    if launcher:
        words = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=2", f"--machine_rank={i}"]
        words += [f"--num_processes={2 * processes}", "--main_process_ip=node1", "--main_process_port=29511"]
        variables = {}
    else:
        words, variables = [], {"RANK": str(i), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        variables |= {"MASTER_ADDR": "node1", "MASTER_PORT": "29511"}
    variables |= {"ACCELERATE_USE_CPU": "true", "HF_HOME": str(machines.folder)}
    return machines.start(i, [sys.executable, *words, "-m", "nanogpt_accel.train", *argv], **variables)


def end(machines, processes, limit=TIME_OUT + 30):
    """Wait until all processes have ended; return their statuses. limit: in seconds, plus 15 to start Python."""
    begin = time.monotonic()
    for process in processes:
        try:
            process.wait(max(limit + 15 - (time.monotonic() - begin), 0))
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {limit} s\n{machines.output(0)}\n{machines.output(1)}")
    print(f"ended after {time.monotonic() - begin:.1f} s")
    return [process.returncode for process in processes]


def errors(machines, i):
    lines = [line for line in machines.output(i).splitlines() if "error: " in line]
    print("\n".join(lines))
    return lines


# ---- runs that succeed


@shared
@pytest.mark.parametrize("launcher", [True, False], ids=["accelerate", "srun"])
def test_host_names_that_are_loopback_addresses(machines, launcher):
    processes = 2 if launcher else 1
    jobs = [start(machines, i, RUN, processes, launcher) for i in (0, 1)]
    assert end(machines, jobs, TIMEOUT_S) == [0, 0], machines.output(0) + machines.output(1)
    assert f"({2 * processes} processes x" in machines.output(0) and "node2" not in machines.output(1)
    assert len(numbers(machines.disk(0) / "run")) == 4 + 3


def test_token_files_on_separate_disks_are_prepared_on_each(machines, tmp_path):
    argv = [RUN[0], f"out_dir={tmp_path}/shared", *RUN[2:]]
    jobs = [start(machines, i, argv, processes=2) for i in (0, 1)]
    assert end(machines, jobs, TIMEOUT_S) == [0, 0], machines.output(0) + machines.output(1)
    for i in (0, 1):
        (folder,) = (machines.disk(i) / "data").iterdir()
        assert (folder / "manifest.json").is_file()
        assert machines.output(i).count(" of text in ") == 1, "one rank per machine"
    assert f"node2: data/{folder.name}: " in machines.output(1)


# ---- runs that cannot start: all processes end, and both machines tell the reason


def test_out_dir_on_separate_disks_is_refused(machines):
    jobs = [start(machines, i, RUN, launcher=False) for i in (0, 1)]
    assert end(machines, jobs) == [2, 2]
    for i in (0, 1):
        assert UNSEEN in errors(machines, i)[0] and "Traceback" not in machines.output(i)
    assert not (machines.disk(0) / "run").exists()
    assert [path for i in (0, 1) for path in machines.disk(i).glob(".nanogpt_accel*")] == []


@pytest.mark.parametrize("argv", [[*RUN, "resume=auto"], ["run", RUN[2]]], ids=["auto", "run folder"])
def test_resume_on_separate_disks_is_refused(machines, argv):
    words = [sys.executable, "-m", "nanogpt_accel.train", *RUN, "max_iters=2"]
    subprocess.run(words, cwd=machines.disk(0), env=package_env(), check=True, timeout=TIMEOUT_S)
    jobs = [start(machines, i, argv, launcher=False) for i in (0, 1)]
    assert end(machines, jobs) == [2, 2]
    expected = UNSEEN if argv[0] == RUN[0] else "rank 1 on node2 failed: run: no such recipe or run folder"
    assert expected in errors(machines, 0)[0]


@shared
@pytest.mark.parametrize(
    ("options", "variables", "words"),
    [
        (["mixed_precision=bf16"], {}, "environment: mixed_precision=bf16 on rank 1 (node2), but no on rank 0 (node1)"),
        (["n_heads=3"], {}, "rank 1 on node2 failed: unknown key n_heads"),
    ],
)
def test_machines_that_differ_are_refused(machines, options, variables, words):
    jobs = [start(machines, i, RUN + i * options, launcher=False) for i in (0, 1)]
    assert end(machines, jobs) == [2, 2]
    assert words in errors(machines, 0)[0] and words.partition("failed: ")[2] in errors(machines, 1)[0]


@shared
@pytest.mark.parametrize("missing", [0, 1])
def test_a_machine_that_never_starts(machines, missing):
    job = start(machines, 1 - missing, RUN, launcher=False)
    assert end(machines, [job]) == [2]
    (line,) = errors(machines, 1 - missing)
    expected = ["rank 1 on node2 cannot connect to the main process", "rank 1 did not respond within"][missing]
    assert expected in line
    assert ["node2: waiting for the main process", "node1: waiting for rank 1"][missing] in machines.output(1 - missing)


@pytest.mark.parametrize("launcher", [True, False], ids=["accelerate", "srun"])
def test_a_main_process_that_is_killed_while_it_prepares_the_data(machines, launcher):
    (machines.disk(0) / "text.txt").write_text(make_text(2_000_000))  # takes seconds
    argv = [*RUN, "tokenizer=bpe", "vocab_size=2000", f"out_dir={machines.folder}/shared", "data_dir=tokens"]
    (machines.disk(1) / "tokens").mkdir()
    jobs = [start(machines, i, argv, launcher=launcher) for i in (0, 1)]
    begin = time.monotonic()
    while "training a BPE tokenizer" not in machines.output(0):
        assert time.monotonic() - begin < TIMEOUT_S and jobs[0].poll() is None, machines.output(0)
        time.sleep(0.1)
    machines.kill(0)
    assert 0 not in end(machines, jobs)
    assert "the main process at node1, port 29511 has ended" in errors(machines, 1)[0]
