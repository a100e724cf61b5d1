"""Forks children that run the command line, for tests that kill them.

A process that has imported torch forks in milliseconds what takes seconds to start. It
reads commands as lines of JSON and answers each with one.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path


class Zygote:
    """The other end: starts, kills and awaits children."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join(
                    str(Path(__file__).parents[i]) for i in (0, 2)
                )
            },
        )

    def _ask(self, **command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, argv, log, operations=None):
        """Run the command line in a child; return its process number.

        With ``operations`` it kills itself at that change of a file, from 0 on.
        """
        argv = [str(argument) for argument in argv]
        Path(log).touch()
        return self._ask(start=argv, log=str(log), operations=operations)

    def wait(self, pid, seconds):
        """Return the exit code of a child, None where it still runs."""
        return self._ask(wait=pid, seconds=seconds)

    def kill(self, pid):
        """Kill a child and all it started."""
        os.killpg(pid, signal.SIGKILL)
        return self.wait(pid, 60)

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)


@contextmanager
def zygote():
    it = Zygote()
    try:
        yield it
    finally:
        it.close()


def serve():
    import torch

    torch.set_num_threads(1)  # no threads that a fork would lose
    import fisherprune.experiments.__main__  # noqa: F401

    for line in sys.stdin:
        command = json.loads(line)
        if "start" in command:
            answer = fork(command)
        else:
            answer = reap(command["wait"], command["seconds"])
        print(json.dumps(answer), flush=True)


def fork(command):
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        log = os.open(command["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout.reconfigure(line_buffering=True)  # a test reads along
        from fisherprune.experiments.__main__ import main

        if command["operations"] is not None:
            die_at(command["operations"])
        code = main(command["start"])
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99
    os._exit(code)


def state(pid):
    """Return the letter by which the system says what a process does: T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def die_at(number):
    """Kill this process at the given change of a file: before or after it."""
    left = [number]

    def deadly(change):
        def changed(*args, **kwargs):
            left[0] -= 1
            if left[0] == -1:
                os.kill(os.getpid(), signal.SIGKILL)
            result = change(*args, **kwargs)
            left[0] -= 1
            if left[0] == -1:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return changed

    Path.replace = deadly(Path.replace)
    Path.unlink = deadly(Path.unlink)
    Path.mkdir = deadly(Path.mkdir)


def reap(pid, seconds):
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.002)


if __name__ == "__main__":
    serve()
