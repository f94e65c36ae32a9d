"""Two "machines" on this computer: connected network namespaces with separate host names and disks.

    with Machines(folder) as machines:
        process = machines.start(0, ["python", "-m", "nanogpt_accel.train", "tiny.yaml"])

Each machine has its own /etc/hosts, in which its own name is 127.0.1.1 as on Debian and Ubuntu, and its own folder
`machines.work`, which is empty at first. With is_shared=True, both machines see the same files in this folder, as on a
network disk. All other files are those of this computer.
"""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from launching import package_env

NAMES = ("node1", "node2")


def problem():
    """Return why machines cannot be made here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if shutil.which("ip") is None:
        return "apt-get install iproute2"
    done = subprocess.run(["unshare", "-m", "-n", "-u", "true"], capture_output=True, text=True)
    return done.stderr.strip() or None if done.returncode else None


needs_machines = pytest.mark.skipif(problem() is not None, reason=f"network namespaces: {problem()}")


class Machines:
    """Two machines, as described above. folder: an empty folder for their disks."""

    def __init__(self, folder, is_shared=False):
        self.folder, self.is_shared, self.processes = Path(folder), is_shared, []
        self.work, self._id = self.folder / "work", f"ng{os.getpid() % 10000}"

    def __enter__(self):
        self.work.mkdir(parents=True)
        for i, name in enumerate(NAMES):
            self.disk(i).mkdir(exist_ok=True)
            lines = ["127.0.0.1 localhost"]
            lines += [f"{'127.0.1.1' if j == i else self.address(j)} {other}" for j, other in enumerate(NAMES)]
            (self.folder / f"{name}.hosts").write_text("\n".join(lines) + "\n")
            _run("ip", "netns", "add", self._space(i))
        _run("ip", "link", "add", self._space(0), "type", "veth", "peer", "name", self._space(1))
        for i in range(len(NAMES)):
            _run("ip", "link", "set", self._space(i), "netns", self._space(i))
            _run("ip", "-n", self._space(i), "addr", "add", f"{self.address(i)}/24", "dev", self._space(i))
            for device in ("lo", self._space(i)):
                _run("ip", "-n", self._space(i), "link", "set", device, "up")
        return self

    def __exit__(self, *error):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for i in range(len(NAMES)):
            self.kill(i)
            _run("ip", "netns", "delete", self._space(i))

    def kill(self, i):
        """Kill all processes of machine i, as when it loses power."""
        done = subprocess.run(["ip", "netns", "pids", self._space(i)], capture_output=True, text=True)
        for pid in done.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def disk(self, i):
        """Return the folder with the contents of machine i's `work`, as seen from outside."""
        return self.folder / ("disk" if self.is_shared else f"disk of {NAMES[i]}")

    @staticmethod
    def address(i):
        return f"10.22.0.{i + 1}"

    def start(self, i, command, **variables):
        """Start a command on machine i, in its folder `work`; its output goes to `output(i)`. Return the Popen."""
        setup = 'hostname "$1"; mount --bind "$2" /etc/hosts; mount --bind "$3" "$4"; cd "$4"; shift 4; exec "$@"'
        places = [NAMES[i], self.folder / f"{NAMES[i]}.hosts", self.disk(i), self.work]
        enter = ["ip", "netns", "exec", self._space(i), "unshare", "-m", "-u", "bash", "-ec", setup, "bash", *places]
        with open(self._output(i), "ab") as output:
            process = subprocess.Popen(
                [*map(str, enter), *map(str, command)],
                env=package_env(**variables),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def output(self, i):
        return self._output(i).read_text(errors="replace") if self._output(i).exists() else ""

    def _output(self, i):
        return self.folder / f"output of {NAMES[i]}"

    def _space(self, i):
        return f"{self._id}{'ab'[i]}"  # also the name of the network device, of at most 15 characters


def _run(*words):
    subprocess.run(words, check=True, capture_output=True)
