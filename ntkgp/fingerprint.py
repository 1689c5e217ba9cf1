"""A hash of all that a result depends on: of values and of code, never of addresses."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import BuiltinFunctionType, CodeType, EllipsisType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ntkgp.linearization.packing import tree_flatten

_PLAIN = (NoneType, bool, int, float, complex, str, bytes, EllipsisType)
_NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format, numpy.dtype)
# What a module says of itself besides its weights and the user's attributes.
_BOOKKEEPING = frozenset(vars(nn.Module()))
_LIBRARIES = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}


class Unknowable(TypeError):
    """Something whose state cannot be read, so that nobody can say whether it is the same as before."""


def fingerprint(*values: Any) -> str:
    """
    The same for the same values in any process, another one for others.

    Tensors and arrays count by their numbers, data sets by their rows in any order, networks by their classes, weights,
    attributes and which of them are trained, objects by what pickle would keep. Functions and classes that belong to no
    installed library count by their code, defaults and closures, and by the functions, classes and constants of their
    module that they name.

    :raises Unknowable: an open file, a lock, a running generator.

    Cost: one pass over all numbers.

    >>> fingerprint([1, 2]) == fingerprint([1, 2]), fingerprint([1, 23]) == fingerprint([12, 3])
    (True, False)
    """
    return _Reader()(values).hex()


class _Reader:
    """Hashes of values, each object once."""

    def __init__(self) -> None:
        self._known: dict[int, bytes] = {}
        self._alive: list[Any] = []  # so that no address is used twice

    def __call__(self, value: Any) -> bytes:
        if type(value) in _PLAIN or isinstance(value, _NAMED):
            return _hash(type(value).__name__, repr(value))
        known = self._known.get(id(value))
        if known is not None:
            return known
        self._alive.append(value)
        # For what contains itself.
        self._known[id(value)] = _hash("itself", str(len(self._known)))
        found = _hash(*self._parts(value))
        self._known[id(value)] = found
        return found

    def _parts(self, value: Any) -> Iterator[str | bytes]:
        if isinstance(value, Tensor):
            yield from _tensor(value)
        elif isinstance(value, numpy.ndarray) and not value.dtype.hasobject:
            yield from ("array", str(value.dtype), str(value.shape), numpy.ascontiguousarray(value).tobytes())
        elif isinstance(value, nn.Module):
            yield from self._module(value)
        elif isinstance(value, DataLoader | Dataset):
            yield from _rows(value)
        elif type(value) in (list, tuple):
            yield type(value).__name__
            yield from map(self, value)
        elif isinstance(value, set | frozenset):
            yield "set"
            yield from sorted(map(self, value))
        elif isinstance(value, Mapping):
            yield "mapping"
            yield from sorted(self(key) + self(value[key]) for key in value)
        elif isinstance(value, FunctionType):
            yield from self._function(value)
        elif isinstance(value, MethodType):
            yield from ("method", self(value.__func__), self(value.__self__))
        elif isinstance(value, BuiltinFunctionType):
            owner = value.__self__
            yield from ("builtin", value.__qualname__, self(None if isinstance(owner, ModuleType) else owner))
        elif isinstance(value, ModuleType):
            yield from ("python module", value.__name__)
        elif isinstance(value, type):
            yield from self._class(value)
        elif isinstance(value, torch.Generator):
            yield from ("generator", *_tensor(value.get_state()))
        elif isinstance(value, CodeType):
            yield from ("code", value.co_code, self(value.co_consts), self(value.co_names))
        else:
            yield from self._object(value)

    def _object(self, value: Any) -> Iterator[str | bytes]:
        try:
            reduced = value.__reduce_ex__(4)
        except Exception as error:
            raise Unknowable(f"a {type(value).__name__} has no state that can be read: {error}") from error
        if isinstance(reduced, str):
            yield from ("global", type(value).__module__, reduced, self(getattr(value, "__wrapped__", None)))
            return
        yield "object"
        yield self(type(value))
        for part in reduced[:3]:
            yield self(part)
        for items in reduced[3:5]:
            yield self(None if items is None else list(items))

    def _module(self, value: nn.Module) -> Iterator[str | bytes]:
        yield "network"
        yield self(type(value))
        for kind in ("_parameters", "_buffers", "_modules"):
            for name, part in vars(value)[kind].items():
                yield from (kind, name, self(part))
        for hooks in (value._forward_pre_hooks, value._forward_hooks):
            yield from map(self, hooks.values())
        first: dict[int, str] = {}
        for name, parameter in value.named_parameters(remove_duplicate=False):
            yield first.setdefault(id(parameter), name)
        for name in sorted(vars(value).keys() - _BOOKKEEPING):
            yield from ("attribute", name, self(vars(value)[name]))

    def _function(self, value: FunctionType) -> Iterator[str | bytes]:
        yield from ("function", value.__module__ or "", value.__qualname__)
        yield from map(self, (value.__defaults__, value.__kwdefaults__))
        for cell in value.__closure__ or ():
            try:
                yield self(cell.cell_contents)
            except ValueError:
                yield "empty"
        if _is_own(value):
            yield self(value.__code__)
            for name in sorted(_names(value.__code__) & value.__globals__.keys()):
                used = value.__globals__[name]
                if _is_constant(used) or (
                    isinstance(used, FunctionType | type) and used.__module__ == value.__module__
                ):
                    yield from (name, self(used))

    def _class(self, value: type) -> Iterator[str | bytes]:
        yield from ("class", value.__module__, value.__qualname__)
        if not _is_own(value):
            return
        yield from map(self, value.__bases__)
        for name, part in sorted(vars(value).items()):
            if isinstance(part, staticmethod | classmethod):
                part = part.__func__
            if isinstance(part, property):
                yield name
                yield from map(self, (part.fget, part.fset))
            elif isinstance(part, FunctionType) or (_is_constant(part) and not name.startswith("__")):
                yield from (name, self(part))


def _hash(*parts: str | bytes) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        plain = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        found.update(len(plain).to_bytes(8, "little"))
        found.update(plain)
    return found.digest()


def _bytes(value: Tensor) -> numpy.ndarray:
    """(N, bytes of a row)."""
    rows = len(value) if value.ndim else 1
    if not value.numel():
        return numpy.zeros((rows, 0))
    plain = value.detach().to("cpu").to_dense().resolve_conj().resolve_neg().reshape(-1)
    # One number counts as contiguous whatever its stride, which a view as bytes minds.
    return plain.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().reshape(rows, -1)


def tensor_bytes(value: Tensor) -> bytes:
    """The numbers of a tensor, wherever it is and however it is strided."""
    return _bytes(value).tobytes()


def _tensor(value: Tensor) -> Iterator[str | bytes]:
    yield from ("tensor", str(value.dtype), str(tuple(value.shape)), str(value.requires_grad and value.is_leaf))
    yield tensor_bytes(value)


def _rows(data: DataLoader | Dataset) -> Iterator[str | bytes]:
    """Rows in an order of their own: a loader may shuffle."""
    # The rooms above this one must not be imported at the top.
    from ntkgp.models.batches import collect_raw

    try:
        found = collect_raw(data)
    except Exception as error:
        raise Unknowable(f"a {type(data).__name__} cannot be read: {error}") from error
    leaves, structure = tree_flatten(found.x)
    parts = [*leaves, found.y]
    yield from ("data", str(structure), *(f"{part.dtype} {tuple(part.shape[1:])}" for part in parts))
    table = [_bytes(part) for part in parts]
    yield from sorted(_hash(*(part[row].tobytes() for part in table)) for row in range(len(found.y)))


def _names(code: CodeType) -> set[str]:
    """Global names that code and the functions within it may use."""
    return set(code.co_names).union(*(_names(part) for part in code.co_consts if isinstance(part, CodeType)))


def _is_constant(value: Any) -> bool:
    return type(value) in _PLAIN or (type(value) is tuple and all(map(_is_constant, value)))


def _is_own(value: Any) -> bool:
    """Whether it belongs to no installed library: code that the user may have changed since."""
    name = value.__module__ or ""
    if name == "__main__":  # in a notebook its file is the kernel's
        return True
    if name.partition(".")[0] == __name__.partition(".")[0] or name in sys.builtin_module_names:
        return False
    file = getattr(sys.modules.get(name), "__file__", None)
    return file is None or not any(Path(file).resolve().is_relative_to(folder) for folder in _LIBRARIES)


def digest(value: Any) -> str:
    """SHA-256 of a value, in hexadecimal: two values with the same digest are taken for the same.

    Tensors count by dtype, shape and bytes, wherever they are; mappings in any order of their keys; data classes by
    their fields; modules by their structure and state; Datasets and DataLoaders by their rows, in the order of the
    dataset; functions, classes and all other objects by what :func:`fingerprint` reads of them.

    :param value: anything.

    Cost: that of reading all tensors once, or all data.

    >>> digest([1, 23]) == digest([12, 3]), digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    (False, True)
    """
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    """Add a value to a hash; every part is closed by a mark, so that no two values run into each other."""
    if isinstance(value, Tensor):
        found.update(f"tensor {value.dtype} {tuple(value.shape)}:".encode())
        found.update(tensor_bytes(value))
    elif isinstance(value, Mapping):
        found.update(f"map {len(value)}:".encode())
        for key in sorted(value, key=repr):
            _feed(found, key)
            _feed(found, value[key])
    elif isinstance(value, list | tuple):
        found.update(f"sequence {len(value)}:".encode())
        for part in value:
            _feed(found, part)
    elif isinstance(value, nn.Module):
        _feed(found, [str(value), value.state_dict()])
    elif isinstance(value, DataLoader | Dataset):
        _feed_rows(found, value)
    elif value is None or isinstance(value, str | int | float | bool | bytes | torch.dtype):
        text = repr(value).encode()
        found.update(f"plain {len(text)}:".encode() + text)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        _feed(found, [type(value).__qualname__, fields])
    else:
        _feed(found, fingerprint(value))


def _feed_rows(found: Any, data: Any) -> None:
    """Add the rows of a Dataset or a DataLoader, whatever order a loader would draw them in."""
    # The rooms above this one must not be imported at the top.
    from ntkgp.models.batches import collect_raw

    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset) and data.batch_size is not None:
        _feed(found, [type(data.sampler).__name__, data.batch_size, data.drop_last])
        data = DataLoader(data.dataset, batch_size=data.batch_size, collate_fn=data.collate_fn)
    raw = collect_raw(data)
    _feed(found, [torch.utils._pytree.tree_flatten(raw.x)[0], raw.y])
