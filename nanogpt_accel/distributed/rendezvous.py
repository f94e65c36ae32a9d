"""Connect the ranks before Accelerate creates the process group, through torch's TCPStore.

Until the process group exists, a waiting rank cannot know whether another rank has failed, is still preparing the data,
or never started. So the ranks first exchange their settings and failures in this store. The launcher or rank 0 opens
the store on the port of the process group, so no other port is needed.
"""

import functools
import ipaddress
import json
import os
import platform
import socket
import sys
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from ..utils.fields import raise_problems
from ..utils.files import nearest_existing
from ..utils.text import first_line
from .launcher import is_main, process_group, rank, world_size

POLL_S = 0.2  # seconds between two checks of the store
NOTE_S = 10  # seconds after which a rank reports what it is waiting for
SEEN_S = 5  # seconds within which a new file must be visible on all machines; network file systems may cache folders
ALIVE_S = 5  # seconds between two heartbeats of a rank that other ranks wait for
LAUNCHER_S = 30  # timeout to connect to the launcher's store, which the launcher opens before the ranks start


class OtherRankFailed(ConnectionError):
    """Another rank has failed, or the main process does not respond."""


class Rendezvous:
    """The connection of all ranks of a run, before the process group exists. Create it with `connect`.

    timeout: collective_timeout, seconds to wait for a rank that does not respond.

    Attributes:
        hosts: host name of each rank. machines: for each rank, the lowest rank on the same machine.
    """

    def __init__(self, timeout):
        self.timeout, self.rank, self._exchanges = timeout, rank(), 0
        is_connected = world_size() == 1 or process_group()
        self.store = None if is_connected else _open_store(timeout)
        here = {"host": platform.node(), "place": _place(), "address": _address_towards_main()}
        found = self.exchange(here, "connecting")
        self.hosts = [other["host"] for other in found]
        places = [other["place"] for other in found]
        self.machines = [places.index(place) for place in places]
        if len(set(self.machines)) > 1:
            others = [other["address"] for other in found if other["place"] != here["place"]]
            _choose_interface(others[0])

    def exchange(self, value, purpose):
        """Return a list with the value of each rank. All ranks must call this.

        value: the value of this rank, any JSON value. purpose: what the ranks are doing, for messages.

        Raises:
            ConnectionError: a rank failed, or did not respond within `timeout`.
        """
        if world_size() == 1:
            return [value]
        if group := process_group():  # Accelerate's debug_launcher
            values = [None] * world_size()
            group.all_gather_object(values, value)
            return values
        name, self._exchanges = f"exchange {self._exchanges}", self._exchanges + 1
        keys = {number: f"{name}/{number}" for number in range(world_size())}
        with _lost_store():
            self.store.set(keys[self.rank], json.dumps(value))
            if not is_main():  # wait SEEN_S longer than rank 0, which reports to all ranks which ranks are missing
                self._wait(lambda: self.store.check([name]), lambda: "the other ranks", purpose, self.timeout + SEEN_S)
                return json.loads(self.store.get(name))
            missing = set(keys)

            def are_all_here():
                missing.difference_update([number for number in missing if self.store.check([keys[number]])])
                return not missing

            self._wait(are_all_here, lambda: _name_ranks(missing), purpose, self.timeout)
            values = [json.loads(text) for text in self.store.multi_get(list(keys.values()))]
            self.store.set(name, json.dumps(values))
            return values

    @contextmanager
    def working(self, name):
        """Let the other ranks wait in wait_for(name) until the end of this `with` block."""
        if self.store is None:
            yield
            if group := process_group():
                group.barrier()
            return
        name = f"{name} after {self._exchanges} exchanges"  # so that a name can be used again after an exchange
        is_done = threading.Event()

        def count():  # the heartbeat
            with suppress(RuntimeError):  # the store is gone, because the main process has ended
                while not is_done.wait(min(ALIVE_S, self.timeout / 4)):
                    self.store.add(f"{name}: alive", 1)

        threading.Thread(target=count, daemon=True).start()
        try:
            yield
        finally:
            is_done.set()
        with _lost_store():
            self.store.set(name, "")

    def wait_for(self, name, by, purpose):
        """Wait until rank `by` leaves its block `with working(name)`. purpose: what that rank is doing, for messages.

        Raises:
            ConnectionError: a rank has failed, or rank `by` has not responded for `timeout`.
        """
        if group := process_group():
            group.barrier()
        elif self.store is not None:
            name = f"{name} after {self._exchanges} exchanges"
            with _lost_store():
                alive = lambda: self.store.add(f"{name}: alive", 0)  # noqa: E731
                self._wait(lambda: self.store.check([name]), lambda: self.describe([by]), purpose, self.timeout, alive)

    def find_blind(self, folder):
        """Return the machines that cannot see the files that the main process writes to a folder. Each machine is
        represented by its lowest rank."""
        if len(set(self.machines)) == 1:
            return []
        folder, token, name = Path(folder), None, f".nanogpt_accel-{uuid.uuid4().hex}"
        places = [folder, *folder.parents]
        if is_main():
            with suppress(OSError, ValueError):
                level = places.index(nearest_existing(folder))
                (places[level] / name).touch(exist_ok=False)
                token = [level, name]
        try:
            token = self.exchange(token, "comparing disks")[0]
            deadline, is_seen = time.monotonic() + SEEN_S, False
            while token and not is_seen and time.monotonic() < deadline:
                # nobody has looked up this random name before, so no file system has cached that it does not exist
                is_seen = places[token[0]].joinpath(token[1]).exists()
                if not is_seen:
                    time.sleep(POLL_S)
            seen = self.exchange(is_seen, "comparing disks")
        finally:
            if is_main() and token:
                places[token[0]].joinpath(token[1]).unlink(missing_ok=True)
        blind = {machine for machine, is_seen in zip(self.machines, seen, strict=True) if not is_seen}
        return sorted(blind - {0})

    def describe(self, numbers):
        """Return ranks as text, such as "ranks 8 to 15 (node2)". The hosts are omitted if the run has only one."""
        hosts = dict.fromkeys(self.hosts[number] for number in numbers)
        return _name_ranks(numbers) + f" ({', '.join(hosts)})" * (len(set(self.hosts)) > 1)

    def _wait(self, is_done, who, purpose, timeout, alive=lambda: None):
        """Wait until is_done(), or until a rank has failed.

        who: function that returns the names of the ranks to wait for. alive: function that returns the number of
        heartbeats so far. timeout: maximum number of seconds without a new heartbeat.
        """
        start = last_sign = time.monotonic()
        is_noted, sign = False, alive()
        while not is_done():
            if self.store.check(["failure"]):
                raise OtherRankFailed(self.store.get("failure").decode())
            if sign != (sign := alive()):
                last_sign = time.monotonic()
            seconds = time.monotonic() - start
            if time.monotonic() - last_sign > timeout:
                raise ConnectionError(
                    f"{who()} did not respond within collective_timeout={self.timeout:g} s ({purpose}); start the "
                    "command on each machine, and check its output there"
                )
            if seconds > NOTE_S and not is_noted:
                is_noted = True
                _note(f"waiting for {who()} ({purpose})")
            time.sleep(POLL_S)


_connected, _opened = None, 0  # the Rendezvous, and the number of stores that this process has opened


def connect(timeout):
    """Return the Rendezvous of all ranks; connect if this process is not connected yet.

    timeout: collective_timeout, seconds to wait for a rank that does not respond.

    Raises:
        ConnectionError: a rank failed, or did not respond in time.
    """
    global _connected
    if _connected is None:
        _connected = Rendezvous(timeout)
    return _connected


def close():
    """Disconnect, after the process group has been created."""
    global _connected
    _connected = None


def share_failures(function):
    """Decorate the main function of a command. If it fails before the process group exists, the other ranks end too,
    and their message names this rank."""

    @functools.wraps(function)
    def wrapper(*arguments):
        try:
            return function(*arguments)
        except Exception as error:
            with suppress(Exception):  # the other ranks may have ended
                if world_size() > 1 and not process_group():
                    _share(error)
            raise
        finally:
            close()

    return wrapper


def _share(error):
    is_other, is_connected = isinstance(error, OtherRankFailed), _connected is not None
    if is_other and not is_connected:  # the store of the main process is not reachable
        return
    store = _connected.store if is_connected else _open_store(NOTE_S)
    if not is_other:
        what = first_line(error) if isinstance(error, (ValueError, OSError)) else repr(error)
        store.compare_set("failure", "", f"rank {rank()} on {platform.node()} failed: {what}")
    if not is_main():
        store.add("ended", 1)
    deadline = time.monotonic() + SEEN_S  # the others must read the failure before the store ends with this process
    while is_main() and store.add("ended", 0) < world_size() - 1 and time.monotonic() < deadline:
        time.sleep(POLL_S)


def assert_ranks_agree(timeout=600, **facts):
    """Raise a ValueError on every rank if `facts` are not the same on all ranks. Each keyword argument in `facts` is a
    dictionary of plain values, such as recipe={"seed": 1}."""
    ranks = connect(timeout)
    all_facts = ranks.exchange(facts, "comparing settings")
    differing = {}  # (name, key, value) -> ranks
    for number, other in enumerate(all_facts):
        for name in facts:
            for key in all_facts[0][name] | other[name]:
                if other[name].get(key) != all_facts[0][name].get(key):
                    differing.setdefault((name, key, other[name].get(key)), []).append(number)
    raise_problems(
        [
            f"{name}: {key}={value} on {ranks.describe(numbers)}, but {all_facts[0][name].get(key)} on "
            f"{ranks.describe([0])}; use the same recipe, options, files and software on all ranks"
            for (name, key, value), numbers in differing.items()
        ]
    )


def _open_store(timeout):
    """Connect to the launcher's store. If the launcher has none, rank 0 opens one, and the others connect to it.

    Raises:
        ConnectionError: the store is not reachable.
    """
    global _opened
    from torch.distributed import PrefixStore, TCPStore

    _opened += 1  # a second run in the same processes must not read the values of the first
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    deadline = time.monotonic() + (min(timeout, LAUNCHER_S) if is_launchers else timeout)
    while True:
        left = deadline - time.monotonic()
        try:
            store = TCPStore(
                address,
                port,
                is_master=is_main() and not is_launchers,
                timeout=timedelta(seconds=max(1, min(NOTE_S, left))),
                wait_for_workers=False,
                multi_tenant=True,  # rank 0 later opens the store of the process group on the same port
                use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
            )
        except RuntimeError as error:
            if is_main() or left <= NOTE_S:
                where = f"MASTER_ADDR={address}, MASTER_PORT={port}: rank {rank()} on {platform.node()} cannot"
                why = "its launcher has ended" if is_launchers else first_line(error)
                if is_main() and not is_launchers:
                    raise OtherRankFailed(f"{where} open this port ({why}); set another port") from None
                raise OtherRankFailed(
                    f"{where} connect to the main process ({why}); check the output of rank 0, the address and the port"
                ) from None
            _note(f"waiting for the main process at {address}, port {port}")
            continue
        store.set_timeout(timedelta(seconds=timeout))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"nanogpt_accel/{attempt}/{_opened}", store)


@contextmanager
def _lost_store():
    """Convert errors of the store to a ConnectionError. They mean that the main process or its launcher has ended."""
    try:
        yield
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
        problem = f"the main process at {where} has ended ({first_line(error)})"
        raise OtherRankFailed(f"{problem}; check its output") from None


def _note(text):
    """Print a line on the first rank of this machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{platform.node()}: {text}", file=sys.stderr, flush=True)


def _name_ranks(numbers):
    """Return the numbers of ranks as text: rank 3, or ranks 1, 3 and 8 to 15."""
    runs = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    *texts, last = [str(low) if low == high else f"{low} to {high}" for low, high in runs]
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(texts)}{' and ' * bool(texts)}{last}"


# ---- machines and their networks


def _place():
    """Return a text that identifies the machine or the container in which this rank runs."""
    with suppress(OSError):  # Linux
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
        return f"{platform.node()} {boot_id} {os.readlink('/proc/self/ns/mnt')}"
    return platform.node()


def _address_towards(address, port=9):
    """Return the address of this machine on the network that routes to `address`, or None. Nothing is sent."""
    with suppress(OSError):
        family, kind, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as sock:
            sock.connect(target)
            return sock.getsockname()[0]


def _address_towards_main():
    return _address_towards(os.environ.get("MASTER_ADDR", "127.0.0.1"))


def _choose_interface(other):
    """Let gloo use the network interface that routes to another machine, unless GLOO_SOCKET_IFNAME is set.

    By default, gloo uses the address of this machine's host name. On Debian and Ubuntu, this is 127.0.1.1, which other
    machines cannot reach. other: the address of the other machine.
    """
    import psutil

    found = {_address_towards_main(), _address_towards(other)} - {None}
    own = {address for address in found if not ipaddress.ip_address(address).is_loopback}
    for name, addresses in psutil.net_if_addrs().items():
        if own & {entry.address.partition("%")[0] for entry in addresses}:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
