"""What all command lines share."""

import errno

import pytest

from fisherprune.commandline import Parser, number, path, reader, run_command, whole
from fisherprune.errors import FisherpruneError


def densities(text):
    raise FisherpruneError(f"densities must be known, got {text}")


@pytest.fixture
def parser():
    it = Parser("program")
    it.add_argument("--densities", type=reader(densities))
    it.add_argument("--factor", type=number)
    it.add_argument("--times", type=whole)
    commands = it.add_subparsers(dest="command", required=True, metavar="COMMAND")
    walk = commands.add_parser("walk", help="go")
    walk.add_argument("paths", nargs="+", type=path, metavar="PATH")
    walk.add_argument("--far", action="store_true")
    walk.add_argument("--to")
    commands.add_parser("run")
    return it


@pytest.mark.parametrize(
    "command, message",
    [
        ("", "the following arguments are required: COMMAND"),
        ("walk", "the following arguments are required: PATH"),
        ("walk --far", "the following arguments are required: PATH"),
        ("walk --to=x", "the following arguments are required: PATH"),
        ("--zzz", "unrecognized arguments: --zzz"),
        ("walk --zzz=3 -x", "unrecognized arguments: --zzz=3 -x"),
        (
            "walk there --zzz=3 --fa",
            "unrecognized arguments: --zzz=3 --fa (did you mean --far?)",
        ),
        ("walk --fra", "unrecognized arguments: --fra (did you mean --far?)"),
        (
            "--facto=2 walk x",
            "unrecognized arguments: --facto=2 (did you mean --factor?)",
        ),
        (
            "wlak x",
            "argument COMMAND: must be one of walk, run, got 'wlak' "
            "(did you mean walk?)",
        ),
        ("x", "argument COMMAND: must be one of walk, run, got 'x'"),
        ("walk --to", "argument --to: expected one argument"),
        ("--densities x walk", "argument --densities: densities must be known, got x"),
        ("--factor x walk", "argument --factor: must be a number, got 'x'"),
        ("--times 2.5 walk", "argument --times: must be a whole number, got '2.5'"),
    ],
)
def test_complaints(parser, command, message):
    with pytest.raises(FisherpruneError) as raised:
        parser.parse_args(command.split())
    assert str(raised.value) == message


def test_an_empty_path_is_no_path(parser):
    with pytest.raises(FisherpruneError, match="argument PATH: must be a path, got ''"):
        parser.parse_args(["walk", ""])


def test_what_is_right_is_read(parser):
    found = parser.parse_args("--factor 2 --times 3 walk a b --to=c".split())
    assert (found.factor, found.times, found.to) == (2.0, 3, "c")
    assert [str(p) for p in found.paths] == ["a", "b"]


@pytest.mark.parametrize(
    "error, code, err",
    [
        (FisherpruneError("x must be y"), 2, "name: error: x must be y\n"),
        (FisherpruneError("a\nb"), 2, "name: error: a\nname: error: b\n"),
        (
            OSError(errno.ENOSPC, "No space left", "file"),
            2,
            "name: error: [Errno 28] No space left: 'file'\n",
        ),
        (KeyboardInterrupt(), 130, "name: interrupted\n"),
        (KeyboardInterrupt("stopped; go on"), 130, "name: stopped; go on\n"),
    ],
)
def test_ends(error, code, err, capsys):
    def work():
        raise error

    assert run_command("name", work) == code
    assert capsys.readouterr() == ("", err)


def test_other_errors_are_no_mistakes():
    with pytest.raises(ZeroDivisionError):
        run_command("name", lambda: 1 // 0)
    assert run_command("name", lambda: 7) == 7
