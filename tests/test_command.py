"""The command ``fisherprune``, as a process: dispatch, Ctrl-C, pipes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from trainings import SMALL_COMMAND

import fisherprune
from fisherprune.__main__ import COMMANDS, main

SOURCE = Path(fisherprune.__file__).parents[1]
SITE = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == os.environ.get("AT"):
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
"""
"""A module that Python imports as it starts: presses Ctrl-C at an import."""


@pytest.fixture
def python(tmp_path):
    """Return a function that runs Python in an empty folder."""
    (tmp_path / "sitecustomize.py").write_text(SITE)

    def run(*arguments, shell="", **variables):
        path = f"{tmp_path}{os.pathsep}{SOURCE}"
        command = [sys.executable, *arguments]
        if shell:
            command = ["bash", "-c", f'"$@" {shell}', "bash", *command]
        return subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_need_no_torch(python, option):
    script = (
        "import sys; from fisherprune.__main__ import main\n"
        f"try: main(['{option}'])\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = python("-c", script)
    assert done.returncode == 0 and done.stderr == "False\n"
    words = [fisherprune.__version__] if option == "--version" else [*COMMANDS]
    assert all(word in done.stdout for word in words)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["trian"],
            "argument COMMAND: must be one of train, check, fisher, experiments, "
            "report, doctor, got 'trian' (did you mean train?)",
        ),
        ([], "the following arguments are required: COMMAND"),
        (["--versoin"], "unrecognized arguments: --versoin (did you mean --version?)"),
    ],
)
def test_a_wrong_command(capsys, arguments, message):
    assert main(arguments) == 2
    assert capsys.readouterr() == ("", f"fisherprune: error: {message}\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("train --metod snip", "--metod snip (did you mean --method?)"),
        ("train --sparcity=0.5", "--sparcity=0.5 (did you mean --sparsity?)"),
        ("check --modle vgg11", "--modle vgg11 (did you mean --model?)"),
        ("experiments run x.toml --dry", "--dry (did you mean --dry-run?)"),
        ("report x --ouput y", "--ouput y (did you mean --output?)"),
        ("doctor --foo", "--foo"),
    ],
)
def test_a_wrong_option_of_a_command(capsys, arguments, message):
    assert main(arguments.split()) == 2
    name = f"fisherprune.{arguments.split()[0]}"
    error = f"{name}: error: unrecognized arguments: {message}\n"
    assert capsys.readouterr() == ("", error)


def test_a_wrong_subcommand(capsys):
    assert main(["experiments", "stauts", "x"]) == 2
    error = (
        "fisherprune.experiments: error: argument COMMAND: must be one of run, status, "
        "got 'stauts' (did you mean status?)\n"
    )
    assert capsys.readouterr() == ("", error)


WAYS = """
import os, runpy, sys
import fisherprune.experiments.__main__  # imports most of what the commands need
for way in sys.argv[1:]:
    print("==")
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        module, *arguments = way.split()
        for name in (module + ".__main__", module):  # -m imports neither before
            if name != "fisherprune":
                sys.modules.pop(name, None)
        sys.argv = [module, *arguments, "--help"]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        os._exit(1)  # it exits itself
    assert os.waitpid(pid, 0)[1] == 0
"""
"""Runs modules as Python's option -m does, from one process that has imported torch."""


def test_a_command_is_a_module(python):
    pairs = [
        (f"fisherprune {name}", module.removesuffix(".__main__"))
        for name, (module, _) in COMMANDS.items()
    ]
    done = python("-c", WAYS, *(way for pair in pairs for way in pair))
    assert (done.returncode, done.stderr) == (0, "")
    shown = done.stdout.split("==\n")[1:]
    assert len(shown) == 2 * len(pairs) and all(shown)
    assert shown[::2] == shown[1::2]


def test_only_the_chosen_command_is_imported(python):
    script = (
        "import sys; from fisherprune.__main__ import main\n"
        "try: main(['train', '--help'])\n"
        "finally: print(*sys.modules, sep='\\n', file=sys.stderr)"
    )
    modules = python("-c", script).stderr.split()
    assert "fisherprune.train.trainer" in modules
    others = ("fisherprune.experiments", "fisherprune.report", "fisherprune.doctor")
    assert not set(others) & set(modules)


@pytest.mark.parametrize("module", ["torch", "fisherprune.train.trainer"])
@pytest.mark.parametrize(
    "command", [["-m", "fisherprune.train"], ["-m", "fisherprune", "train"]]
)
def test_ctrl_c_during_the_imports_ends_silently(python, command, module):
    done = python(*command, "--epochs", "1", AT=module)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("name", ["experiments", "report"])
def test_ctrl_c_while_torch_is_imported(python, name):
    done = python("-m", f"fisherprune.{name}", "x", AT="torch")
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_ctrl_c_after_the_imports_is_told(python):
    command = ["fisherprune.train", *SMALL_COMMAND, "--quiet"]
    done = python("-m", *command, AT="sklearn.datasets")
    assert done.returncode == 130 and done.stdout == ""
    assert done.stderr.startswith("fisherprune.train: interrupted")


def test_other_programs_handle_ctrl_c(python):
    for script in ("import fisherprune.models", "from fisherprune import prune"):
        done = python("-c", script, AT="fisherprune.errors")
        assert "KeyboardInterrupt" in done.stderr


@pytest.mark.parametrize(
    "shell",
    [
        "| true; exit ${PIPESTATUS[0]}",
        "2>&1 >/dev/null | true; exit ${PIPESTATUS[0]}",
        "0<&- 1>&- 2>&-",
    ],
)
def test_a_run_goes_on_when_nobody_reads(python, tmp_path, shell):
    done = python("-u", "-m", "fisherprune.train", *SMALL_COMMAND, shell=shell)
    assert done.returncode == 0 and done.stderr == ""
    assert len(list(tmp_path.glob("runs/*/results.json"))) == 1


def test_a_report_and_a_study_go_on_when_nobody_reads(python, tmp_path):
    (tmp_path / "study.toml").write_text(
        'name = "s"\n[run]\ndataset = "digits"\nmodel = "resnet20"\nepochs = 1\n'
        'train_samples = 40\nscore_samples = 20\ndevice = "cpu"\n'
    )
    nobody = "2>&1 | true; exit ${PIPESTATUS[0]}"
    study = ["experiments", "run", "study.toml"]
    assert python("-m", "fisherprune", *study, shell=nobody).returncode == 0
    report = ["report", "results/s"]
    assert python("-m", "fisherprune", *report, shell=nobody).returncode == 0
    assert (tmp_path / "results/s/report/report.html").is_file()


def test_help_that_nobody_reads_ends_well(python):
    nobody = "| true; exit ${PIPESTATUS[0]}"
    done = python("-m", "fisherprune", "--help", shell=f"2>&1 {nobody}")
    assert done.returncode == 0


def test_output_that_cannot_be_written_is_told(python):
    done = python(
        "-m", "fisherprune", "--version", shell=">/dev/full", PYTHONUNBUFFERED=""
    )
    assert done.returncode != 0 and "No space left on device" in done.stderr
