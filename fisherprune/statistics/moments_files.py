"""Files of gradient moments: safetensors, one or several with an index.

Tensors are called ``sum/NAME`` and ``sum_sq/NAME``. All else, the *facts*, is JSON in
the metadata of each file. Several files have an index in Hugging Face's layout, so
others can read the tensors of both.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fisherprune import __version__
from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.files import read_json, whole_file, write_text
from fisherprune.statistics.key import hash_of
from fisherprune.statistics.settings import checked_number

FORMAT = "fisherprune-moments-1"
"""Changes whenever the files do."""
INDEX = ".index.json"
SHARD_BYTES = 5 * 10**9
"""Of tensors in one file, where nothing else is asked for."""

Tensors = dict[str, Tensor]
Facts = dict[str, Any]


def write_moments(
    path: str | os.PathLike[str],
    parts: Mapping[str, Mapping[str, Tensor]],
    facts: Facts,
    max_shard_bytes: int,
) -> None:
    """Write moments as ``GradientMoments.save`` does.

    Args:
        path: of the file; of several, their names and the index's begin like it.
        parts: "sum" and "sum_sq", each by parameter name.
        facts: what JSON can hold.
        max_shard_bytes: bytes of tensors in one file; a larger tensor has one alone.
    """
    path = _checked_path(path, "save")
    if path.name.endswith(INDEX):
        raise FieldError("save: path", f"one without {INDEX}, which is added", path)
    checked_number("save: max_shard_bytes", max_shard_bytes)
    names = list(next(iter(parts.values())))
    tensors = {f"{part}/{n}": parts[part][n] for n in names for part in parts}
    shards = list(_shards(tensors, max_shard_bytes))
    versions = {"fisherprune": __version__, "torch": torch.__version__}
    checksums = [_checksum(shard) for shard in shards]
    facts = {**facts, "parameters": names, **versions, "checksums": checksums}
    facts["checksum"] = _digest(facts)
    old = _old_shards(path)
    files = _files(path, len(shards), facts["checksum"])
    for file, shard in zip(files, shards, strict=True):
        _write(file, shard, facts)
    if len(files) > 1:
        places = {n: f.name for f, s in zip(files, shards, strict=True) for n in s}
        size = sum(t.nbytes for t in tensors.values())
        about = {"metadata": {"total_size": size, FORMAT: facts}, "weight_map": places}
        write_text(_index(path), json.dumps(about, indent=2) + "\n")
        path.unlink(missing_ok=True)  # what is loaded would be the file of before
    else:
        _index(path).unlink(missing_ok=True)
    for file in {*old} - {*files}:
        file.unlink(missing_ok=True)


def read_moments(path: str | os.PathLike[str]) -> tuple[dict[str, Tensors], Facts]:
    """Read moments as ``GradientMoments.load`` does: the parts, and the facts."""
    path = _checked_path(path, "load")
    files, facts = [path], None
    if path.name.endswith(INDEX) or not path.is_file():
        index = path if path.name.endswith(INDEX) else _index(path)
        if not index.is_file():
            raise FisherpruneError(f"moments file {str(path)!r} does not exist")
        facts, files = _read_index(index)
    tensors: Tensors = {}
    for i, file in enumerate(files):
        found, held = _read(file)
        if facts not in (None, held):
            raise _damaged(file, "it is of other moments than the index")
        facts = held
        if facts["checksums"][i : i + 1] != [_checksum(found)]:
            raise _damaged(file, "its checksum is wrong")
        tensors |= found
    if facts is None or len(facts["checksums"]) != len(files):
        raise _damaged(path, "it holds a part of the moments: load the index")
    parts: dict[str, Tensors] = {
        part: {n: tensors[f"{part}/{n}"] for n in facts["parameters"]}
        for part in ("sum", "sum_sq")
    }
    return parts, facts


def _checked_path(path: str | os.PathLike[str], where: str) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise FieldError(f"{where}: path", "a path", shown(path))
    if Path(path).is_dir():
        raise FieldError(f"{where}: path", "the path of a file", f"the folder {path}")
    return Path(path)


def _damaged(path: Path, why: object) -> FisherpruneError:
    reason = " ".join(f"{why}".split())
    return FisherpruneError(f"moments file {str(path)!r} can't be read: {reason}")


def _index(path: Path) -> Path:
    return path.with_name(path.name + INDEX)


def _files(path: Path, count: int, checksum: str) -> list[Path]:
    """Return the file of each shard.

    Names of several have digits of their content, so they take no other's place: the
    moments change when the index does.
    """
    if count == 1:
        return [path]
    stem = f"{path.name.removesuffix('.safetensors')}.{checksum[:8]}"
    names = (f"{stem}-{i:05}-of-{count:05}" for i in range(1, count + 1))
    return [path.with_name(f"{name}.safetensors") for name in names]


def _shards(tensors: Tensors, max_bytes: int) -> Iterator[Tensors]:
    shard: Tensors = {}
    for name, tensor in tensors.items():
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > max_bytes:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _checksum(tensors: Tensors) -> str:
    """Return a hash of names and tensors, whatever their order."""
    return hash_of(*(v for n in sorted(tensors) for v in (n, _plain(tensors[n]))))


def _plain(tensor: Tensor) -> Tensor:
    """Return what a file holds of a tensor."""
    return tensor.detach().cpu().contiguous()


def _unshared(tensors: Tensors) -> Tensors:
    """Copy tensors that share memory, which a file takes none of.

    The others, memory-mapped ones too, are written from where they are.
    """
    memory = {name: tensor.untyped_storage() for name, tensor in tensors.items()}
    users = Counter(each.data_ptr() for each in memory.values())
    return {
        name: tensor
        if users[memory[name].data_ptr()] == 1
        and memory[name].nbytes() == tensor.nbytes
        else tensor.clone()
        for name, tensor in tensors.items()
    }


def _digest(facts: Facts) -> str:
    others = {name: fact for name, fact in facts.items() if name != "checksum"}
    try:
        return hash_of(json.dumps(others, sort_keys=True, allow_nan=False))
    except (TypeError, ValueError) as error:
        wanted = "a dict of what JSON can hold"
        raise FieldError("save: provenance", wanted, f"{error}") from None


def _write(path: Path, tensors: Tensors, facts: Facts) -> None:
    # One entry of metadata: safetensors writes several in an order that differs each
    # time.
    plain = _unshared({name: _plain(tensor) for name, tensor in tensors.items()})
    with whole_file(path) as temporary:
        mode = temporary.stat().st_mode  # safetensors puts a file of its own there
        save_file(plain, temporary, {FORMAT: json.dumps(facts)})
        temporary.chmod(stat.S_IMODE(mode))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())


def _read(path: Path) -> tuple[Tensors, Facts]:
    """Return all that a file holds, on the CPU."""
    if not path.is_file():
        raise _damaged(path, "it is missing, and the index names it")
    try:
        with safe_open(path, framework="pt") as file:
            facts = _checked_facts(path, file.metadata() or {}, json.loads)
            # Copies: what is checked stays, whatever becomes of the file.
            return {n: file.get_tensor(n).clone() for n in file.keys()}, facts
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def _read_index(path: Path) -> tuple[Facts, list[Path]]:
    content = read_json(path)
    about, places = content.get("metadata"), content.get("weight_map")
    facts = _checked_facts(path, about if isinstance(about, dict) else {}, lambda x: x)
    files = list(places.values()) if isinstance(places, dict) else []
    if not files or not all(isinstance(f, str) and Path(f).name == f for f in files):
        raise _damaged(path, "its weight_map must name the file of each tensor")
    return facts, [path.with_name(name) for name in dict.fromkeys(files)]


def _checked_facts(path: Path, metadata: Mapping[str, Any], read: Any) -> Facts:
    """Return the facts in a file's metadata, which nothing has changed.

    Raises:
        FisherpruneError: where it has none, or others than were written.
    """
    if FORMAT not in metadata:
        other = [n for n in metadata if n.startswith(FORMAT.rstrip("0123456789"))]
        if other:
            raise FieldError(f"moments file {str(path)!r}", f"of {FORMAT}", other[0])
        raise FisherpruneError(f"{str(path)!r} holds no gradient moments")
    try:
        facts = read(metadata[FORMAT])
        right = facts["checksum"] == _digest(facts)
    except (TypeError, ValueError, KeyError):
        right = False
    if not right:
        raise _damaged(path, "the checksum of its metadata is wrong")
    return facts


def _old_shards(path: Path) -> list[Path]:
    """Return the shards of moments that were saved at a path before.

    Raises:
        FisherpruneError: where the index is of something else: it stays.
    """
    index = _index(path)
    return _read_index(index)[1] if index.exists() else []
