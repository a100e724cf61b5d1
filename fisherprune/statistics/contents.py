"""What a network computes beside its tensors: modules, settings and code, as values.

A ``Reader`` goes through all that a module holds and yields plain values, which
``fingerprint.py`` hashes. What it can't read completely it does not pass over.
"""

from __future__ import annotations

import enum
import functools
import inspect
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fisherprune.parameters import eager

BUILT_IN = vars(nn.Module()).keys() | {"_is_torch_compile", "_compiled_call_impl"}
"""Attributes that torch gives to modules: what counts of them is read by name."""

HELD = ("_parameters", "_buffers", "_modules")
HOOKS = ("forward_pre", "forward", "backward_pre", "backward")

PLAIN = (bool, int, float, complex, str, bytes, range, slice, type(None), type(...))
CONTAINERS = (tuple, list, dict, set, frozenset, OrderedDict)
TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
KNOWN_CODE = sys.stdlib_module_names | {"torch"}
"""Packages whose compiled functions do what their version and name say."""


class UnreadableError(Exception):
    """Something has content that can't be read; the message names it."""


class Reader:
    """Reads values to the end; what is met again counts as the one met before."""

    def __init__(self) -> None:
        self._met: dict[int, tuple[int, object]] = {}
        self._files: set[Path] = set()

    def read(self, value: object) -> Iterator[object]:
        """Yield plain values and tensors that say all that ``value`` holds.

        Raises:
            UnreadableError: where it holds something that can't be read.
        """
        try:
            yield from self._read(value)
        except RecursionError:
            raise UnreadableError("a chain of objects that is too long") from None

    def _read(self, value: object) -> Iterator[object]:
        if isinstance(value, TORCH) or type(value) in PLAIN:
            yield value
        elif type(value) in (*CONTAINERS, torch.Size):
            yield from self._read_container(value)
        elif isinstance(value, types.BuiltinFunctionType):
            yield from self._read_compiled(value)
        elif isinstance(value, types.MethodType):
            yield from self._read((value.__func__, value.__self__))
        elif id(value) in self._met:
            yield "met", self._met[id(value)][0]  # one value, as no other is a tuple
        else:
            # Kept alive, so that no other value gets its id.
            self._met[id(value)] = len(self._met), value
            yield from self._read_once(value)

    def _read_once(self, value: object) -> Iterator[object]:
        if isinstance(value, Tensor):
            yield from self._read_tensor(value)
        elif isinstance(value, nn.Module):
            yield from self._read_module(eager(value))
        elif isinstance(value, type):
            yield from self._read_class(value)
        elif isinstance(value, types.FunctionType):
            yield from self._read_function(value)
        elif isinstance(value, types.CodeType):
            yield from self._read_code(value)
        elif isinstance(value, types.ModuleType):
            yield value.__name__
            yield from self._read_file(value)
        elif isinstance(value, functools.partial):
            yield from self._read((value.func, value.args, value.keywords))
        elif isinstance(value, enum.Enum):
            yield from self._read((type(value), value.name))
        elif isinstance(value, torch.Generator):
            yield value.get_state()
        else:
            yield from self._read_object(value)

    def _read_container(self, value) -> Iterator[object]:
        yield _qualified(type(value))
        yield len(value)
        if isinstance(value, set | frozenset):  # in an order that no hash seed changes
            value = sorted(value, key=repr)
        elif isinstance(value, dict):
            value = [item for pair in value.items() for item in pair]
        for item in value:
            yield from self._read(item)

    def _read_tensor(self, tensor: Tensor) -> Iterator[object]:
        plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
        if not plain or tensor.layout != torch.strided or tensor.is_quantized:
            raise UnreadableError(f"a tensor {_qualified(type(tensor))}")
        yield tensor.detach()

    def _read_module(self, module: nn.Module) -> Iterator[object]:
        if isinstance(module, torch.jit.ScriptModule):
            raise UnreadableError(f"the compiled code of {_qualified(type(module))}")
        yield from self._read(type(module))
        held = vars(module)
        for key in (*HELD, *sorted(held.keys() - BUILT_IN)):
            yield key
            yield from self._read(held[key])
        for key in HOOKS:  # without their keys, which count up in each process
            yield from self._read(list(held[f"_{key}_hooks"].values()))

    def _read_class(self, cls: type) -> Iterator[object]:
        for base in cls.__mro__:
            yield _qualified(base)
            if _package(base) in ("torch", "builtins"):
                continue
            try:
                inspect.getsource(base)  # raises where its file does not hold it
            except (OSError, TypeError):
                raise UnreadableError(f"the code of {_qualified(base)}") from None
            yield from self._read_file(base)
            for name, member in sorted(vars(base).items()):
                member = getattr(member, "__func__", member)
                if isinstance(member, types.FunctionType) and not _generated(member):
                    yield name  # whatever stands there now, and wherever it comes from
                    yield from self._read(member)

    def _read_function(self, function: types.FunctionType) -> Iterator[object]:
        yield _qualified(function)
        if _package(function) != "torch":
            yield from self._read_file(function)
            yield from self._read(function.__code__)
        cells = function.__closure__ or ()
        yield from self._read([_content(cell) for cell in cells])
        yield from self._read((function.__defaults__, function.__kwdefaults__))

    def _read_code(self, code: types.CodeType) -> Iterator[object]:
        yield code.co_code
        yield from self._read((code.co_names, code.co_consts))

    def _read_compiled(self, function: types.BuiltinFunctionType) -> Iterator[object]:
        holder = function.__self__
        named = holder is None or isinstance(holder, type | types.ModuleType)
        if not named or _package(function) not in KNOWN_CODE:
            raise UnreadableError(f"the compiled code of {function.__qualname__}")
        yield _qualified(function)

    def _read_file(self, value) -> Iterator[object]:
        """Yield the text that something is written in, once for a file."""
        if isinstance(value, types.ModuleType) and _package(value) in KNOWN_CODE:
            return
        try:
            file = Path(inspect.getsourcefile(value))
            if file not in self._files:
                self._files.add(file)
                yield file.read_text()
        except (OSError, TypeError, UnicodeDecodeError):
            name = getattr(value, "__qualname__", value)
            raise UnreadableError(f"the code of {name}") from None

    def _read_object(self, value: object) -> Iterator[object]:
        """Read an object of a Python class: those of C hold what nobody sees."""
        kind = type(value)
        known = {base for base in kind.__mro__ if _package(base) == "builtins"}
        slots = [slot for base in kind.__mro__ for slot in _slots(base)]
        if known != {object} or not (hasattr(value, "__dict__") or slots):
            raise UnreadableError(f"an object {_qualified(kind)}")
        yield from self._read(kind)
        for slot in slots:
            yield from self._read((slot, getattr(value, slot, None)))
        yield from self._read(dict(getattr(value, "__dict__", {})))


def _qualified(value) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _package(value) -> str:
    """Return the package that a class, function or module is of."""
    module = value.__name__ if inspect.ismodule(value) else value.__module__
    if module is None:  # a function of a class in C, such as torch.relu
        module = getattr(value.__self__, "__module__", "")
    return module.partition(".")[0]


def _generated(function: types.FunctionType) -> bool:
    """Tell whether it is a method that dataclasses and the like made."""
    made = inspect.unwrap(function).__code__.co_filename.startswith("<")
    return made and function.__name__.startswith("__")


def _slots(cls: type) -> list[str]:
    slots = vars(cls).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return [
        f"_{cls.__name__.lstrip('_')}{name}"  # as the compiler mangles it
        if name.startswith("__")
        else name
        for name in names
        if not name.endswith("__")
    ]


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # of a variable that has no value yet
        return None
