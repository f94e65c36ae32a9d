"""A real Slurm on this computer: munged, slurmctld and two slurmd on the loopback network, with four fake GPUs each.

with Slurm(folder) as slurm:
    job = slurm.submit("configs/slurm/single_node.sbatch", "tiny.yaml", sbatch=["--time=1"])
    slurm.wait(job)
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import package_env
from shared import REPOSITORY

NODES, GPUS, TIMEOUT_S = ("node1", "node2"), 4, 600
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=1,sched_interval=2
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait=20
ReturnToService=2
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 Gres=gpu:{gpus}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 Gres=gpu:{gpus}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
"""


def problem():
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux"
    if any(shutil.which(name) is None for name in ("munged", "slurmctld", "slurmd", "sbatch", "pkill")):
        return "apt-get install slurm-wlm"
    return None


needs_slurm = pytest.mark.skipif(problem() is not None, reason=f"Slurm: {problem()}")


class Slurm:
    def __init__(self, folder):
        self.folder, self._daemons = Path(folder), []

    def __enter__(self):
        folder = self.folder
        (folder / "state").mkdir(parents=True)
        sockets = [socket.socket() for _ in range(3)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        ports = [sock.getsockname()[1] for sock in sockets]
        for sock in sockets:
            sock.close()
        host = socket.gethostname()
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, ports=ports, gpus=GPUS, host=host))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
        for i in range(GPUS):
            os.mknod(folder / f"gpu{i}", 0o20666, os.makedev(1, 3))  # like /dev/null
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        (folder / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(NODES)}\n")
        names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        files = [f"--{option}={folder / name}" for option, name in names.items()]
        self._daemon("munged", "--foreground", "--force", *files, f"--log-file={folder / 'munge.log'}")
        self._until(lambda: (folder / "munge.socket").exists())
        self._daemon("slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        for node in NODES:
            # this /etc/hosts lets the jobs resolve the names of the nodes
            words = ["slurmd", "-D", "-N", node, "-f", str(folder / "slurm.conf")]
            mount = 'mount --bind "$1" /etc/hosts; shift; exec "$@"'
            self._daemon("unshare", "-m", "bash", "-ec", mount, "bash", str(folder / "hosts"), *words)
        self._until(lambda: self.run("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"])
        return self

    def __exit__(self, *error):
        subprocess.run(["scancel", "--user=root"], env=self._env(), capture_output=True)
        time.sleep(2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def submit(self, script, *argv, sbatch=(), config=None, before=None):
        """Submit a script of configs/slurm from the repository; return the number of the job. before: a folder that
        is first in PYTHONPATH."""
        words = ["sbatch", "--parsable", f"--output={self.folder}/%j.log", *sbatch, script, *argv]
        env = self._env() | ({"CONFIG": config} if config else {})
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(before or ""), env["PYTHONPATH"]]))
        done = subprocess.run([str(word) for word in words], env=env, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def log(self, job):
        file = self.folder / f"{job}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def state(self, job):
        """Return (state, number of restarts) of a job."""
        text = self.run("scontrol", "show", "job", str(job))
        return re.search(r"JobState=(\w+)", text)[1], int(re.search(r"Restarts=(\d+)", text)[1])

    def wait(self, job):
        """Wait for the end of a job; return its last state and its number of restarts."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        self._until(lambda: self.state(job)[0] in ends, lambda: self.log(job))
        return self.state(job)

    def run(self, *words):
        return subprocess.run(words, env=self._env(), capture_output=True, text=True).stdout

    def _env(self):
        # the batch scripts call `python` and `accelerate`
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return package_env(SLURM_CONF=str(self.folder / "slurm.conf"), PATH=path)

    def _daemon(self, *words):
        with open(self.folder / "daemons.log", "ab") as log:
            self._daemons.append(subprocess.Popen(words, env=self._env(), stdout=log, stderr=log))

    def _until(self, condition, describe=lambda: ""):
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            dead = [daemon.args[0] for daemon in self._daemons if daemon.poll() is not None]
            log = (self.folder / "daemons.log").read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline and not dead, f"{dead}\n{describe()}\n{log}"
            time.sleep(0.5)
