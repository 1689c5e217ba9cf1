"""Record one forward pass as a graph of ATen operations, with in-place writes and views resolved."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only


@dataclass(frozen=True)
class Ref:
    """A value of the trace, by its position in ``Trace.values``."""

    index: int


@dataclass(frozen=True)
class Value:
    """What is kept of a tensor: nothing that grows with the data."""

    shape: torch.Size
    is_floating: bool
    parameter: int | None = None
    is_data: bool = False
    constant: float | None = None


@dataclass(frozen=True)
class Node:
    """One operation; ``arguments`` are named as in its schema and hold ``Ref`` in place of tensors.

    ``outputs`` may be fewer than the operation's tensors are (in-place writes without a return value have none).
    ``leaks`` marks an operation whose result left the tensors for Python, as ``Tensor.item`` does.
    """

    name: str
    arguments: Mapping[str, Any]
    outputs: tuple[int, ...]
    function: Callable[..., Any] | None = None
    leaks: bool = False

    def inputs(self) -> list[Ref]:
        """All tensor inputs."""
        return [leaf for leaf in tree_flatten(dict(self.arguments))[0] if isinstance(leaf, Ref)]


@dataclass
class Trace:
    """The operations that the output (or Python control flow) depends on, in the order in which they ran."""

    values: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    output: Ref = Ref(-1)

    def prune(self) -> None:
        """Drop the operations whose result is never used."""
        needed = {self.output.index}
        kept = []
        for node in reversed(self.nodes):
            if node.leaks or needed.intersection(node.outputs):
                kept.append(node)
                needed.update(ref.index for ref in node.inputs())
        self.nodes = kept[::-1]


def trace(call: Callable[[], Tensor], parameters: Mapping[str, nn.Parameter]) -> Trace:
    """Run ``call`` once without gradients and record it; parameters carry their position in ``parameters``."""
    recorder = _Recorder(parameters)
    devices = sorted({p.device.index for p in parameters.values() if p.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices=devices), _plain_attention(), recorder:
        output = call()
    recorder.trace.output = recorder.read(output)
    recorder.trace.prune()
    return recorder.trace


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as matrix products and a softmax, never as one fused operation."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


class _Recorder(TorchDispatchMode):
    """Keeps every tensor alive until the end, so that identities and storages stay unambiguous."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.trace = Trace()
        self._tensors: dict[int, Tensor] = {}
        self._refs: dict[int, Ref] = {}
        self._aliases: dict[int, list[Tensor]] = {}
        for position, parameter in enumerate(parameters.values()):
            if id(parameter) not in self._refs:
                self._bind(parameter, self._new(parameter, parameter=position))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # which hands over compound operations whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        given = self._named(func, args, kwargs)
        written = self._written(func, given)
        overwritten = {a.name for a in func._schema.arguments if a.kwarg_only and a.name in written}
        arguments = {
            name: tree_map_only(Tensor, self.read, value) for name, value in given.items() if name not in overwritten
        }
        result = func(*args, **kwargs)
        self._record(func, arguments, tree_flatten(list(written.values()))[0], result)
        return result

    @staticmethod
    def _named(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by their names in the schema, defaults included."""
        named = {}
        for position, argument in enumerate(func._schema.arguments):
            if position < len(args):
                named[argument.name] = args[position]
            elif argument.name in kwargs:
                named[argument.name] = kwargs[argument.name]
            elif argument.has_default_value():
                named[argument.name] = argument.default_value
        return named

    @staticmethod
    def _written(func: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments that the operation writes to."""
        writes = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        return {name: value for name, value in given.items() if name in writes and value is not None}

    def _record(self, func: Any, arguments: dict[str, Any], written: list[Any], result: Any) -> None:
        """Append the node, bind its outputs, and carry writes over to every alias."""
        leaves = tree_flatten(result)[0]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        refs = [self._new(tensor) for tensor in tensors]
        leaks = any(isinstance(leaf, bool | int | float | complex) for leaf in leaves)
        name = func.overloadpacket.__name__
        name = name if name.startswith("__") else name.rstrip("_")
        self.trace.nodes.append(Node(name, arguments, tuple(ref.index for ref in refs), func, leaks))
        for tensor, ref in zip(tensors, refs, strict=True):
            if any(tensor is target for target in written):
                self._write(tensor, ref)
            else:
                self._bind(tensor, ref)
        for target in written:
            if isinstance(target, Tensor) and not any(target is tensor for tensor in tensors):
                ref = self._new(target)
                self.trace.nodes.append(Node("unreturned_write", {"self": self.read(target)}, (ref.index,)))
                self._write(target, ref)

    def read(self, tensor: Tensor) -> Ref:
        """The current value of a tensor; one that was never seen is an alias of a known one, or data."""
        if id(tensor) in self._refs:
            return self._refs[id(tensor)]
        known = self._aliases.get(_storage(tensor), [])
        if not known:
            constant = float(tensor) if tensor.numel() == 1 and tensor.is_floating_point() else None
            ref = self._new(tensor, is_data=True, constant=constant)
        else:
            ref = self._new(tensor)
            whole = [other for other in known if _overlap(other, tensor) == "all"]
            sources = [self._refs[id(other)] for other in (whole[:1] or known)]
            self.trace.nodes.append(Node("partial_write", {"tensors": sources}, (ref.index,)))
        self._bind(tensor, ref)
        return ref

    def _new(self, tensor: Tensor, **properties: Any) -> Ref:
        """A new value of the trace."""
        is_floating = tensor.is_floating_point() or tensor.is_complex()
        self.trace.values.append(Value(tensor.shape, is_floating, **properties))
        return Ref(len(self.trace.values) - 1)

    def _bind(self, tensor: Tensor, ref: Ref) -> None:
        """From now on ``tensor`` has the value ``ref``."""
        if id(tensor) not in self._tensors:
            self._tensors[id(tensor)] = tensor
            self._aliases.setdefault(_storage(tensor), []).append(tensor)
        self._refs[id(tensor)] = ref

    def _write(self, tensor: Tensor, ref: Ref) -> None:
        """``tensor`` was written to: every alias changes with it, in full or in part."""
        self._bind(tensor, ref)
        storage = _storage(tensor)
        for alias in self._aliases[storage]:
            overlap = "none" if alias is tensor else _overlap(tensor, alias)
            if overlap == "none":
                continue
            updated = self._new(alias)
            sources = [ref] if overlap == "all" else [ref, self._refs[id(alias)]]
            self.trace.nodes.append(Node("partial_write", {"tensors": sources}, (updated.index,)))
            self._refs[id(alias)] = updated


def _storage(tensor: Tensor) -> int:
    """A key that views of one memory share."""
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:
        return -id(tensor)


def _overlap(written: Tensor, other: Tensor) -> str:
    """How much of ``other`` lies in the memory of ``written``: "none", "some" or "all"."""
    if written.layout != torch.strided or other.layout != torch.strided or written.dtype != other.dtype:
        return "some"
    size = written.untyped_storage().nbytes() // written.element_size()
    touched = torch.zeros(size, dtype=torch.bool, device="cpu")
    touched.as_strided(written.shape, written.stride(), written.storage_offset()).fill_(True)
    touched = touched.as_strided(other.shape, other.stride(), other.storage_offset())
    return "all" if bool(touched.all()) else "some" if bool(touched.any()) else "none"
