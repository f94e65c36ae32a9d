"""rendezvous.py: the ranks exchange settings and failures before the process group exists.

tests/cluster (slow) tests it on two machines."""

import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
from launching import free_port
from torch.distributed import HashStore, PrefixStore, TCPStore

from nanogpt_accel.distributed import rendezvous
from nanogpt_accel.distributed.rendezvous import OtherRankFailed, Rendezvous, _name_ranks, assert_ranks_agree

pytestmark = pytest.mark.usefixtures("no_launcher")


@pytest.fixture
def ranks(monkeypatch):
    """Return a function ranks(function, count) that calls function(Rendezvous) for each rank in a thread, and returns
    the list of results. If a call raises an exception, its result is the exception."""
    here = threading.local()
    monkeypatch.setattr(rendezvous, "rank", lambda: here.rank)
    monkeypatch.setattr(rendezvous, "is_main", lambda: here.rank == 0)
    monkeypatch.setattr(rendezvous, "POLL_S", 0.01)
    monkeypatch.setattr(rendezvous, "SEEN_S", 0.3)
    monkeypatch.setattr(rendezvous, "_place", lambda: f"machine {here.rank // 2}")  # two ranks per machine
    monkeypatch.setattr(rendezvous, "_choose_interface", lambda other: None)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")

    def run(function, count, timeout=5):
        monkeypatch.setattr(rendezvous, "world_size", lambda: count)
        results, store = [None] * count, HashStore()
        monkeypatch.setattr(rendezvous, "_open_store", lambda timeout: store)

        def work(number):
            here.rank = number
            try:
                results[number] = function(Rendezvous(timeout))
            except Exception as error:
                results[number] = error

        threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results

    return run


def test_one_process_needs_no_other():
    alone = Rendezvous(5)
    with alone.working("x"):
        alone.wait_for("y", 0, "testing")
    assert alone.exchange({"a": 1}, "testing") == [{"a": 1}] and alone.machines == [0] and alone.find_blind("x") == []
    assert_ranks_agree(5, recipe={"seed": 1})


def test_values_are_exchanged_in_the_order_of_the_ranks(ranks):
    assert (
        ranks(lambda r: (r.exchange(r.rank, "testing"), r.exchange(-r.rank, "testing"), r.machines), 4)
        == [([0, 1, 2, 3], [0, -1, -2, -3], [0, 0, 2, 2])] * 4
    )


def test_a_rank_that_does_not_respond_is_named_on_all(ranks):
    errors = ranks(lambda r: r.rank in (1, 3) or r.exchange(1, "testing"), 4, timeout=0.2)
    assert isinstance(errors[0], ConnectionError)
    assert "ranks 1 and 3 did not respond within collective_timeout=0.2 s (testing)" in str(errors[0])
    assert "the other ranks did not respond" in str(errors[2])


def test_a_failure_ends_the_waiting_ranks(ranks):
    def fail_or_wait(r):
        if r.rank == 1:
            r.store.compare_set("failure", "", "rank 1 failed: disk is full")
        return r.wait_for("never", 1, "testing")

    errors = ranks(fail_or_wait, 3)
    assert all(type(error) is OtherRankFailed and str(error) == "rank 1 failed: disk is full" for error in errors)


def test_a_rank_that_works_is_waited_for_as_long_as_it_is_alive(ranks, monkeypatch):
    def work_or_wait(r):
        if r.rank:
            return r.wait_for("work", 0, "testing")
        with r.working("work"):
            time.sleep(1)

    assert ranks(work_or_wait, 3, timeout=0.4) == [None] * 3
    monkeypatch.setattr(rendezvous, "ALIVE_S", 10)
    monkeypatch.setattr(rendezvous, "min", lambda *values: 10, raising=False)  # so the first heartbeat comes too late
    done, *errors = ranks(work_or_wait, 3, timeout=0.4)
    assert done is None and all("rank 0 did not respond within collective_timeout=0.4 s" in str(e) for e in errors)


def test_share_failures_tells_the_reason_once(monkeypatch):
    store, shared = HashStore(), []
    monkeypatch.setattr(rendezvous, "world_size", lambda: 2)
    monkeypatch.setattr(rendezvous, "rank", lambda: 1)
    monkeypatch.setattr(rendezvous, "is_main", lambda: False)
    monkeypatch.setattr(rendezvous, "_connected", SimpleNamespace(store=store))
    monkeypatch.setattr(rendezvous.platform, "node", lambda: "node2")

    def fail(error):
        raise error

    for error in (OtherRankFailed("rank 0 failed"), ValueError("corpus=x: no such file"), ValueError("later")):
        monkeypatch.setattr(rendezvous, "_connected", SimpleNamespace(store=store))
        with pytest.raises(type(error)):
            rendezvous.share_failures(fail)(error)
        shared.append(store.get("failure").decode() if store.check(["failure"]) else None)
    assert shared == [None, *["rank 1 on node2 failed: corpus=x: no such file"] * 2]


def test_a_machine_that_does_not_see_the_disk_is_found(ranks, tmp_path):
    def look(r):
        folder = tmp_path / ("disk" if r.rank < 2 else "other disk") / "runs" / "x"
        folder.parent.mkdir(parents=True, exist_ok=True)
        return r.find_blind(folder)

    assert ranks(look, 4) == [[2]] * 4
    assert ranks(lambda r: r.find_blind(tmp_path / "runs" / "x"), 4) == [[]] * 4
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_setting_that_differs_between_ranks_is_named(refused, monkeypatch):
    def require(*gathered):
        ranks = SimpleNamespace(exchange=lambda own, purpose: list(gathered), hosts=["node1"] * 2 + ["node2"] * 9)
        ranks.describe = lambda numbers: Rendezvous.describe(ranks, numbers)
        monkeypatch.setattr(rendezvous, "connect", lambda timeout: ranks)
        assert_ranks_agree(**gathered[0])

    facts = {"recipe": {"seed": 1, "learning_rate": 1e-3}, "data": {"train": "abc"}}
    other = {**facts, "recipe": {"seed": 2, "learning_rate": 1e-3}}
    require(facts, facts, facts)
    with refused(ValueError, "recipe: seed=2 on ranks 2 to 3 (node2), but 1 on rank 0 (node1)"):
        require(facts, facts, other, other)
    with refused(ValueError, "data: val=x on rank 1 (node1), but None on rank 0 (node1)"):
        require(facts, {**facts, "data": {"train": "abc", "val": "x"}})
    with pytest.raises(ValueError) as caught:
        require(facts, {"recipe": {"seed": 2, "learning_rate": 1e-3}, "data": {"train": "?"}})
    assert len(str(caught.value).splitlines()) == 2


def test_ranks_are_named_briefly():
    assert [_name_ranks(numbers) for numbers in ([3], [1, 0], [1, 3, *range(8, 16)])] == [
        "rank 3",
        "ranks 0 to 1",
        "ranks 1, 3 and 8 to 15",
    ]


def test_gloo_uses_the_interface_that_routes_to_the_other_machine(monkeypatch):
    import psutil

    addresses = {"lo": ["127.0.0.1", "::1"], "eth0": ["192.168.7.1"], "eth1": ["10.22.0.1", "fe80::1%eth1"]}
    found = {name: [SimpleNamespace(address=a) for a in values] for name, values in addresses.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    routes = {"node1": "127.0.1.1", "10.22.0.2": "10.22.0.1"}  # node1 is this machine, as on Debian
    monkeypatch.setattr(rendezvous, "_address_towards", routes.get)
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    rendezvous._choose_interface("10.22.0.2")
    assert rendezvous.os.environ["GLOO_SOCKET_IFNAME"] == "mine"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    rendezvous._choose_interface("10.22.0.2")
    assert rendezvous.os.environ.pop("GLOO_SOCKET_IFNAME") == "eth1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "restored by monkeypatch")


def test_the_process_group_can_use_the_same_port(monkeypatch):
    """rank 0 opens the store, and later the process group opens its own on the same port."""
    port = free_port()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    first = rendezvous._open_store(5)
    assert isinstance(first, PrefixStore)
    second = TCPStore("127.0.0.1", port, is_master=True, timeout=timedelta(seconds=5), multi_tenant=True)
    first.set("x", "1")
    assert not second.check(["x"]) and second.check([f"nanogpt_accel/0/{rendezvous._opened}/x"])
