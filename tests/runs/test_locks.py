"""No two processes do the same thing at a time; each is a process of its own here."""

import errno
import os
import socket

import pytest
from holders import FORK, LIMIT, Holder, holder_of

from fisherprune.errors import FisherpruneError
from fisherprune.runs import locks
from fisherprune.runs.locks import Held, check, held, holder, sweep


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "POLL", 0.001)
    return tmp_path / "locks" / "run.lock"


def is_free(path):
    try:
        with held(path):
            return True
    except Held:
        return False


def test_one_holds_and_the_next_follows(path):
    assert holder(path) is None and not path.parent.exists()
    with holder_of(path) as first:
        name = f"process {first.pid} on {socket.gethostname()}"
        assert holder(path) == name
        with pytest.raises(Held, match=name), held(path):
            pass
        assert is_free(path.with_name("other.lock"))
        first.release()
        assert holder(path) is None
        assert list(path.parent.iterdir()) == []
        assert is_free(path)


def test_the_lock_of_a_process_that_is_killed_is_free_at_once(path):
    with holder_of(path) as first:
        first.kill()
    assert path.exists() and holder(path) is None
    with holder_of(path) as second:
        assert f"process {second.pid} on" in holder(path)
        second.kill()
    sweep(path.parent)
    assert list(path.parent.iterdir()) == []


def test_a_process_that_is_stopped_keeps_its_lock(path):
    with holder_of(path) as first:
        first.stop()
        assert not is_free(path)
        assert f"process {first.pid} on" in holder(path)
        first.go_on()
        assert not is_free(path)
        first.release()
    assert is_free(path)


@pytest.mark.parametrize("end", [Holder.release, Holder.kill])
def test_who_waits_follows(path, end):
    with holder_of(path) as first:
        second = Holder(path)
        end(first)
        assert second.has_it()
        assert f"process {second.pid} on" in holder(path)
        second.release()
    assert list(path.parent.iterdir()) == []


def count_up(path, number, times):
    for _ in range(times):
        with held(path, wait=True):
            number.write_text(str(int(number.read_text()) + 1))


def test_of_many_one_at_a_time_holds(path, tmp_path):
    number = tmp_path / "number"
    number.write_text("0")
    many = [FORK.Process(target=count_up, args=(path, number, 50)) for _ in range(6)]
    for each in many:
        each.start()
    for each in many:
        each.join(LIMIT)
    assert number.read_text() == "300"


def test_a_child_does_not_keep_the_lock_of_its_parent(path):
    here, there = FORK.Pipe()
    forked = FORK.Event()

    def child():
        forked.set()
        there.recv()

    def parent():
        with held(path):
            FORK.Process(target=child).start()
            forked.wait()
            os._exit(0)

    process = FORK.Process(target=parent)
    process.start()
    process.join()  # with a limit it would wait for the child
    try:
        assert process.exitcode == 0 and is_free(path)
    finally:
        here.send("end")


def test_what_is_held_is_free_after_an_error(path):
    with pytest.raises(ZeroDivisionError), held(path):
        1 / 0  # noqa: B018
    assert list(path.parent.iterdir()) == [] and is_free(path)


def test_a_full_disk_hides_the_name_of_the_holder(path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(locks.os, "pwrite", full)
    with held(path):
        assert holder(path) == "another process"
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("text", [b"\xff\0\xfe", b"process 1 on a b", b"{" * 200])
def test_odd_bytes_in_a_lock(path, text):
    path.parent.mkdir()
    path.write_bytes(text)
    assert holder(path) is None
    with held(path):
        path.write_bytes(text)
        assert holder(path) == "another process"


def test_odd_files_beside_the_locks(path):
    (path.parent / "folder.lock").mkdir(parents=True)
    os.symlink("nowhere", path.parent / "link.lock")
    odd = [b"\xff.lock", b"line\nbreak.lock", "²".encode() + b".lock", b".lock"]
    for name in odd:
        (path.parent / os.fsdecode(name)).touch()
    (path.parent / "0123456789abcdef.3").write_text("of an older version")
    with holder_of(path) as it:
        sweep(path.parent)
        left = {each.name for each in path.parent.iterdir()}
        others = {"0123456789abcdef.3", "folder.lock", "link.lock"}
        assert left == {"run.lock", *others}
        it.release()
    assert is_free(path)
    sweep(path.parent / "missing")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(path, number, monkeypatch):
    def missing(*_):
        raise OSError(number, os.strerror(number))

    path.parent.mkdir()
    monkeypatch.setattr("fcntl.flock", missing)
    message = (
        f"locks must be on a file system with locks, got one without "
        f".{os.strerror(number)}.: give a folder on a local disk by --output, or use "
        "--shard I/N or --executor ray, which need none"
    )
    with pytest.raises(FisherpruneError, match=message), held(path):
        pass
    with pytest.raises(FisherpruneError, match=message):
        check(path.parent)
    with held(path, needed=False):
        assert holder(path) is None
    sweep(path.parent)
    assert list(path.parent.iterdir()) == []


def test_a_folder_that_can_not_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file/locks"):
        with held(tmp_path / "file" / "locks" / "run.lock"):
            pass
    check(tmp_path / "file" / "locks")  # this is said by others
