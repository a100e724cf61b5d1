import errno
import json
import os
import threading
import time

import pytest

from fisherprune.errors import FisherpruneError
from fisherprune.experiments import leases as locks
from fisherprune.experiments.leases import Lock, LockLost, Watch, held


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "locks"


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose only item is the watcher's monotonic time."""
    now = [1000.0]
    monkeypatch.setattr(locks.time, "monotonic", lambda: now[0])
    return now


def claimed(folder, generation=1, **kwargs):
    lock = Lock(folder, "run", generation, **kwargs)
    assert lock.claim()
    return lock


def change(folder, generation, **fields):
    """Rewrite a lock's file as its holder would, or another machine."""
    folder.mkdir(exist_ok=True)
    path = folder / f"run.{generation}"
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | fields))


def test_one_holds_and_the_next_follows(folder):
    watch = Watch(folder, "run")
    assert watch.next() == 1 and not watch.left()
    first = claimed(folder)
    assert watch.next() is None and not watch.left()
    assert f"process {os.getpid()} on" in watch.holder()
    first.check()
    assert not Lock(folder, "run", 1).claim()
    first.release()
    assert watch.next() == 2 and watch.left()
    second = claimed(folder, 2)
    assert watch.next() is None
    second.release(done=True)
    assert list(folder.iterdir()) == []


def test_names_do_not_touch_each_other(folder):
    lock = claimed(folder)
    for name in ("ru", "run.1", "runs", "run.x"):
        other = Lock(folder, name, Watch(folder, name).next())
        assert other.claim()
        other.release(done=True)
    assert Watch(folder, "run").next() is None
    lock.release()


def test_of_many_one_wins(folder):
    won, start = [], threading.Barrier(8)

    def compete():
        lock = Lock(folder, "run", 1)
        start.wait()
        if lock.claim():
            won.append(lock)

    threads = [threading.Thread(target=compete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    won[0].release()


def test_a_lock_of_a_process_that_is_gone_is_free_at_once(folder):
    lock = claimed(folder)
    change(folder, 1, pid=2**22 + 1)  # above any number Linux gives
    assert Watch(folder, "run").next() == 2
    change(folder, 1, pid=os.getpid(), started="1")  # the number was given again
    assert Watch(folder, "run").next() == 2
    child = os.fork()
    if child == 0:
        os._exit(0)
    while locks._text(f"/proc/{child}/stat").rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.001)
    change(folder, 1, pid=child)  # it has ended, and nobody has asked how
    assert Watch(folder, "run").next() == 2
    os.waitpid(child, 0)
    lock.release()


FAR = {"machine": ["far", "boot", "pid"], "pid": 1, "started": "1"}


@pytest.mark.parametrize(
    "before, after",
    [(json.dumps(FAR | {"beat": 0}), json.dumps(FAR | {"beat": 1})), ("", "[1]")]
    + [('{"mach', '{"machine"'), ("[1]", "{}"), ('{"pid": 3}', '{"pid": 4}')],
)
def test_elsewhere_a_holder_is_dead_when_its_counter_stands_still(
    folder, clock, before, after
):
    folder.mkdir()
    (folder / "run.3").write_text(before)
    watch = Watch(folder, "run", expiry=60)
    assert watch.next() is None
    clock[0] += 59
    assert watch.next() is None
    (folder / "run.3").write_text(after)
    clock[0] += 59
    assert watch.next() is None
    clock[0] += 59
    assert watch.next() is None
    clock[0] += 1
    assert watch.next() == 4


def test_clocks_that_jump_change_nothing(folder, clock, monkeypatch):
    change(folder, 1, **FAR)
    watch = Watch(folder, "run", expiry=60)
    assert watch.next() is None
    for jump in (-1e9, 1e9):
        monkeypatch.setattr(time, "time", lambda jump=jump: jump)
        os.utime(folder / "run.1", (max(0, jump), max(0, jump)))
        assert watch.next() is None
    clock[0] += 60
    assert watch.next() == 2


def test_a_holder_shows_signs_of_life(folder):
    lock = claimed(folder, heartbeat=0.01)
    seen = {(folder / "run.1").read_text()}
    end = time.monotonic() + 10
    while len(seen) < 3 and time.monotonic() < end:
        seen.add((folder / "run.1").read_text())
    assert len(seen) == 3
    lock.release()


def test_a_holder_that_was_taken_for_dead_stops_without_harm(folder):
    first = claimed(folder, heartbeat=0.01)
    second = claimed(folder, 2)
    with pytest.raises(LockLost, match="run.1: another process has taken over"):
        first.check()
    first._thread.join(10)
    assert not first._thread.is_alive()
    first.release(done=True)
    second.check()
    assert Watch(folder, "run").next() is None
    second.release(done=True)
    assert not (folder / "run.2").exists()


def test_a_holder_that_slept_through_the_end_of_another_has_lost(folder):
    first = claimed(folder, heartbeat=3600)  # stopped: it shows no sign of life
    second = claimed(folder, 2)
    second.release(done=True)
    assert list(folder.iterdir()) == []
    assert first.lost()
    with pytest.raises(LockLost, match="run.1: another process has taken over"):
        first.check()
    first.heartbeat = 0  # it goes on, with the sign of life that is due
    first._stop.wait = lambda seconds: False
    first._beat()
    first._write("held")  # had it looked just before the other's end
    assert list(folder.iterdir()) == []
    third = claimed(folder)  # the first number is given again
    assert first.lost()
    first.release(done=True)
    third.check()
    assert Watch(folder, "run").next() is None
    third.release(done=True)
    assert list(folder.iterdir()) == []


def test_a_claim_that_can_not_be_written_is_withdrawn(folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(locks.os, "pwrite", full)
    with pytest.raises(OSError, match="No space left on device"):
        Lock(folder, "run", 1).claim()
    assert list(folder.iterdir()) == []


def test_a_claim_below_a_higher_one_is_withdrawn(folder):
    second = claimed(folder, 2)  # its predecessor's file is removed already
    assert not Lock(folder, "run", 1).claim()
    assert [path.name for path in folder.iterdir()] == ["run.2"]
    second.release()


def test_what_killed_processes_left_goes_with_the_lock(folder):
    lock = claimed(folder)
    (folder / ".run.1.abc").touch()
    (folder / ".other.1.abc").touch()
    lock.release(done=True)
    assert [path.name for path in folder.iterdir()] == [".other.1.abc"]


def test_a_sweep_removes_what_nobody_holds(folder):
    gone, mine = claimed(folder), Lock(folder, "other", 1)
    assert mine.claim()
    change(folder, 1, pid=2**22 + 1)
    (folder / "far.1").write_text(json.dumps(FAR | {"beat": 0}))
    locks.sweep(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["far.1", "other.1"]
    gone.release()
    mine.release(done=True)
    locks.sweep(folder / "missing")


def test_held_waits_and_says_for_whom(folder, monkeypatch):
    monkeypatch.setattr(locks, "POLL", 0.001)
    first, told = claimed(folder), []
    threading.Timer(0.05, first.release).start()
    with held(folder, "run", waiting=told.append) as lock:
        assert lock.generation == 2
    assert len(told) == 1 and str(os.getpid()) in told[0]
    assert list(folder.iterdir()) == []


def test_held_gives_back_what_failed(folder):
    with pytest.raises(ZeroDivisionError), held(folder, "run"):
        1 / 0  # noqa: B018
    assert Watch(folder, "run").next() == 2


def test_a_folder_that_can_not_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FisherpruneError, match="file/locks/run.1: Not a directory"):
        with held(tmp_path / "file" / "locks", "run"):
            pass
