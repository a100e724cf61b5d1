"""The Python code of README.md and of the pages below docs/, and how it is run."""

import ast
import json
import os
import re
import subprocess
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""What torchrun tells the one process that it starts: code of several runs in it."""


ELSEWHERE = {"docs/from_other_libraries.md"}
"""Pages whose code other tests run: it is of several libraries beside each other."""


def pages():
    """Return the pages whose Python code is run, by their path in the repository."""
    written = sorted((ROOT / "docs").rglob("*.md"))
    paths = [path for path in written if "generated" not in path.parts]
    texts = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for path in (ROOT / "README.md", *paths)
    }
    return {n: t for n, t in texts.items() if BLOCK.search(t) and n not in ELSEWHERE}


def code_of(text):
    """Return the blocks of a page as one program with the page's line numbers."""
    program = ""
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start(1))
        program += "\n" * (line - program.count("\n")) + found[1]
    return program


def imported(code):
    """Return the names of the modules that code imports."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def missing(code):
    """Return the modules that code imports and that are not installed."""
    return {name for name in imported(code) if not exists(name)}


def exists(module):
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that is not there
        return False


def failures(programs, folder):
    """Run each program in a process and a folder of its own; return what went wrong.

    One process imports torch, and forks for each of them: seconds less for each.
    """
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(programs),
        cwd=folder,
        env=os.environ | ALONE | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def serve():
    import torch

    torch.set_num_threads(1)  # no threads that a fork would lose
    import fisherprune.pruning  # noqa: F401

    print(
        json.dumps({n: run(n, program) for n, program in json.load(sys.stdin).items()})
    )


def run(name, program):
    place = Path.cwd() / name.replace("/", "_")
    place.mkdir()
    pid = os.fork()
    if not pid:
        child(place, name, program)
    _, status = os.waitpid(pid, 0)
    return "" if status == 0 else (place / "output").read_text() or f"status {status}"


def child(place, name, program):
    code = 1
    try:
        os.chdir(place)
        os.symlink(ROOT / "studies" / "results", "results")  # of studies that are run
        output = os.open("output", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        exec(compile(program, name, "exec"), {"__name__": "__main__"})
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
