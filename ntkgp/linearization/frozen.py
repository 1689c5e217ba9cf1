"""The user's network as a pure function of its weights: a private evaluation-mode copy and its four passes."""

from __future__ import annotations

import copy
import inspect
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

logger = logging.getLogger("ntkgp")

Weights = dict[str, Tensor]
_EMBEDDING = inspect.signature(F.embedding)
# Of one thread at a time: passes put hooks and weights into modules, and set what is global in torch.
_ALONE = threading.RLock()


@contextmanager
def pass_environment(device: torch.device | None = None) -> Iterator[None]:
    """Differentiable attention kernels, the network's own dtypes, and the global random state as it was found.

    Gradients are on: some kernels (oneDNN's LSTM) keep no workspace for their backward pass otherwise, whatever
    torch.func asks for. No graph is built as long as neither weights nor inputs require gradients.
    """
    cuda = [device] if device is not None and device.type == "cuda" else []
    with _ALONE:
        fast_path = torch.backends.mha.get_fastpath_enabled()
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            with (
                warnings.catch_warnings(),
                torch.random.fork_rng(devices=cuda),
                sdpa_kernel(SDPBackend.MATH),
                torch.autocast("cuda" if cuda else "cpu", enabled=False),
                torch.inference_mode(False),
                torch.enable_grad(),
            ):
                # torch's forward mode loads its own decompositions by a deprecated call when first used.
                warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
                # vmap loops over rows where torch has no batched formula (weight norm); the result is the same.
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


class _InDouble(TorchFunctionMode):
    """What a network casts to a lower precision, or makes in one, is float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        low = isinstance(result, Tensor) and result.dtype in (torch.float32, torch.float16, torch.bfloat16)
        return result.to(torch.float64) if low else result


class _PaddingHeld(TorchFunctionMode):
    """What an embedding reads as padding has no derivative in forward mode either; torch (2.13) gives it one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not F.embedding:
            return result
        given = _EMBEDDING.bind(*args, **(kwargs or {})).arguments
        padding = given.get("padding_idx")
        if padding is None:
            return result
        padding %= len(given["weight"])
        return torch.where((given["input"] == padding).unsqueeze(-1), result.detach(), result)


def _wants_graph(tensors: Sequence[Tensor]) -> bool:
    return any(tensor.requires_grad for tensor in tensors)


@contextmanager
def _reentrant_checkpoints_refused() -> Iterator[None]:
    """An error where such checkpoints drop the derivatives of their weights, because no input requires gradients."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="None of the inputs have requires_grad=True")
        try:
            yield
        except UserWarning as dropped:
            raise ValueError(
                "net: torch.utils.checkpoint with use_reentrant=True leaves the weights inside out of the derivatives; "
                "expected use_reentrant=False"
            ) from dropped


def private_copy(net: nn.Module) -> nn.Module:
    """Deep copy in evaluation mode, without backward hooks; tensors that modules computed and kept are detached."""
    memo: dict[int, Any] = {}
    for module in net.modules():
        for value in tree_leaves(dict(vars(module))):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    copied = copy.deepcopy(net, memo).eval()
    for module in copied.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False
            module.scale_grad_by_freq = False  # a scaled gradient is none of the network's outputs
        # A hook that changes gradients in training must not change the Jacobian.
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return copied


def _forget_gradients(module: nn.Module) -> nn.Module:
    """Gradients that a user's ``backward()`` leaves at the private copy's weights are dropped as they come."""

    def forget(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(forget)
    return module


class _Attributes:
    """What the modules of a network hold, put back after a pass: forward may keep tensors (of torch.func's inside)."""

    def __init__(self, net: nn.Module) -> None:
        self._held = [(m, dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in net.modules()]

    def restore(self) -> None:
        """Put everything back that a pass assigned."""
        for module, attributes, parameters, buffers in self._held:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            # functional_call leaves its own weights in a module that goes by two names (torch 2.13).
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)


class OutputTypeError(TypeError):
    """What a network returned is not one floating-point tensor."""


def pick_output(output: Any, select: Callable[[Any], Tensor] | None) -> Tensor:
    """The one tensor that is the network's output, or an error that says how to choose it."""
    if select is not None:
        output = select(output)
    elif isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        output = output["logits"]
    elif isinstance(getattr(output, "logits", None), Tensor):
        output = output.logits
    if not isinstance(output, Tensor):
        raise OutputTypeError(
            f"net returned a {type(output).__name__}; expected one tensor. "
            "Pass `output=`, a function that picks the tensor, e.g. output=lambda out: out[0]"
        )
    if not output.is_floating_point():
        raise OutputTypeError(f"net returned a {output.dtype} tensor; expected floating-point outputs")
    return output


def _convention(module: nn.Module, tree: Any) -> str:
    """How ``forward`` takes its inputs: a dict by "keyword" and a tuple by "position" where the signature allows it."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return "single"
    kinds = {p.kind for p in parameters}
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if isinstance(tree, dict) and (inspect.Parameter.VAR_KEYWORD in kinds or set(tree) <= named):
        return "keyword"
    if isinstance(tree, tuple | list) and (
        inspect.Parameter.VAR_POSITIONAL in kinds or len(positional) >= len(tree) > 0
    ):
        return "position"
    return "single"


class _ActivationCounter(TorchDispatchMode):
    """Bytes of all intermediate results of a pass: an upper bound on what a backward pass keeps.

    :ivar pads: whether an embedding has a row for padding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.pads = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.pads |= func is torch.ops.aten.embedding.default and len(args) > 2 and args[2] >= 0
        self.bytes += sum(t.numel() * t.element_size() for t in tree_leaves(result) if isinstance(t, Tensor))
        return result


class FrozenNetwork:
    """A private copy of the network, called with weights and input leaves; the user's module is never touched.

    :param net: any module; copied, put in evaluation mode.
    :param to_tree: turns a list of input leaves into the pytree that the network takes.
    :param select: picks the output tensor out of what the network returns.
    :param leaf_dtypes: dtypes of the input leaves, kept where the network mixes dtypes.
    """

    def __init__(
        self,
        net: nn.Module,
        to_tree: Callable[[list[Tensor]], Any],
        select: Callable[[Any], Tensor] | None,
        leaf_dtypes: Sequence[torch.dtype],
    ) -> None:
        module = _forget_gradients(private_copy(net))
        self._to_tree, self._select = to_tree, select
        self.trainable: tuple[str, ...] = tuple(n for n, p in module.named_parameters() if p.requires_grad)
        parameters = dict(module.named_parameters())
        self.theta: Weights = {name: parameters[name].detach() for name in self.trainable}
        self.dtype: torch.dtype = next(iter(self.theta.values())).dtype if self.theta else torch.get_default_dtype()
        floating = {p.dtype for p in parameters.values() if p.is_floating_point()}
        self._leaf_dtypes = [
            self.dtype if dtype.is_floating_point and len(floating) == 1 else dtype for dtype in leaf_dtypes
        ]
        self.device: torch.device = next(iter(self.theta.values())).device if self.theta else torch.device("cpu")
        self._modules: dict[torch.device, nn.Module] = {self.device: module}
        self._attributes = {id(module): _Attributes(module)}
        self._convention: str | None = None
        self._pads = False
        # Each is switched off by `probe` where torch.func cannot do it, or does it wrongly, for this module.
        self.functional = self.forward_mode = self.vectorized = self.twice_differentiable = True

    def module(self, device: torch.device) -> nn.Module:
        """The private copy on a device."""
        if device not in self._modules:
            moved = _forget_gradients(copy.deepcopy(self._modules[self.device]).to(device))
            self._modules[device], self._attributes[id(moved)] = moved, _Attributes(moved)
        return self._modules[device]

    def weights(self, device: torch.device) -> Weights:
        """θ̃ by parameter name on a device, detached."""
        if device == self.device:
            return self.theta
        parameters = dict(self.module(device).named_parameters())
        return {name: parameters[name].detach() for name in self.trainable}

    def _arguments(
        self, leaves: Sequence[Tensor], cast: torch.dtype | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        dtypes = self._leaf_dtypes if cast is None else [cast] * len(leaves)
        tree = self._to_tree(
            [leaf.to(d) if leaf.is_floating_point() else leaf for leaf, d in zip(leaves, dtypes, strict=True)]
        )
        if self._convention is None:
            self._convention = _convention(self.module(self.device), tree)
        if self._convention == "keyword":
            return (), dict(tree)
        return (tuple(tree) if self._convention == "position" else (tree,)), {}

    def run(self, module: nn.Module, leaves: Sequence[Tensor], cast: torch.dtype | None = None) -> Tensor:
        """The module's own forward pass on input leaves, output event unflattened.

        :param cast: dtype of floating inputs, for a module that was moved to another dtype than the network's own.
        """
        args, kwargs = self._arguments(leaves, cast)
        try:
            with nullcontext() if cast is None else _InDouble():
                return pick_output(module(*args, **kwargs), self._select)
        finally:
            self._restore(module)

    def _restore(self, module: nn.Module) -> None:
        if id(module) in self._attributes:
            self._attributes[id(module)].restore()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_attributes": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attributes = {id(module): _Attributes(_forget_gradients(module)) for module in self._modules.values()}

    def __call__(self, weights: Weights, leaves: Sequence[Tensor]) -> Tensor:
        """f(x; θ) with the trainable weights replaced -> (N, C)."""
        args, kwargs = self._arguments(leaves)
        module = self.module(leaves[0].device)
        try:
            output = pick_output(functional_call(module, weights, args, kwargs), self._select)
        finally:
            self._restore(module)
        return output.reshape(leaves[0].shape[0], -1)

    def forward(self, leaves: Sequence[Tensor]) -> Tensor:
        """f(x; θ̃) -> (N, C)."""
        if self.functional:
            return self(self.weights(leaves[0].device), leaves)
        with torch.set_grad_enabled(_wants_graph(leaves)):
            return self.run(self.module(leaves[0].device), leaves).reshape(leaves[0].shape[0], -1)

    def _plain(self, leaves: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Output and parameters of an ordinary autograd pass: right for any module, however it reaches its weights."""
        module = self.module(leaves[0].device)
        parameters = dict(module.named_parameters())
        return self.run(module, leaves).reshape(leaves[0].shape[0], -1), [parameters[n] for n in self.trainable]

    def _gradient(self, output: Tensor, parameters: list[Tensor], cotangent: Tensor, graph: bool) -> list[Tensor]:
        if not output.requires_grad:
            return [torch.zeros_like(p) for p in parameters]
        found = torch.autograd.grad(
            output, parameters, cotangent, retain_graph=True, create_graph=graph, allow_unused=True
        )
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]

    def jvp(self, leaves: Sequence[Tensor], tangent: Weights) -> Tensor:
        """J v -> (N, C), by forward mode, by differentiating u ↦ Jᵀu, or by the rows of J."""
        if self.functional and self.forward_mode:
            weights = self.weights(leaves[0].device)
            with _PaddingHeld() if self._pads else nullcontext():
                return jvp(lambda w: self(w, leaves), (weights,), (tangent,))[1]
        if not self.twice_differentiable:
            rows = self.jacobian(leaves)
            return torch.stack([torch.tensordot(rows[n], tangent[n], tangent[n].ndim) for n in self.trainable]).sum(0)
        output, parameters = self._plain(leaves)
        cotangent = torch.zeros_like(output, requires_grad=True)
        pulled = self._gradient(output, parameters, cotangent, graph=True)
        dot = sum((g * tangent[n]).sum() for n, g in zip(self.trainable, pulled, strict=True) if g.requires_grad)
        if not isinstance(dot, Tensor):
            return torch.zeros_like(output)
        return torch.autograd.grad(dot, cotangent, create_graph=_wants_graph(leaves))[0]

    def pullback(self, leaves: Sequence[Tensor]) -> Callable[[Tensor], Weights]:
        """The map u ↦ Jᵀu by parameter name, from one forward pass."""
        if self.functional:
            value, pull = vjp(lambda w: self(w, leaves), self.weights(leaves[0].device))[:2]
            return lambda u: pull(u.to(value.dtype))[0]
        output, parameters = self._plain(leaves)
        return lambda u: dict(
            zip(
                self.trainable,
                self._gradient(output, parameters, u.to(output.dtype), graph=_wants_graph([*leaves, u])),
                strict=True,
            )
        )

    def jacobian(
        self, leaves: Sequence[Tensor], cotangents: Tensor | None = None, names: Sequence[str] | None = None
    ) -> Weights:
        """Rows of U J by parameter name, {name: (N, K, *shape)}; by default U = I: the Jacobian itself.

        :param cotangents: U, shape (K, C) for the same of every input, or (N, K, C).
        :param names: parameters whose rows are wanted; all by default.
        """
        names = self.trainable if names is None else names
        if self.functional and self.vectorized:
            everything = self.weights(leaves[0].device)
            rest = {name: w for name, w in everything.items() if name not in names}

            def single(weights: Weights, cotangents: Tensor | None, *row: Tensor) -> Weights:
                one = [leaf.unsqueeze(0) for leaf in row]
                output, pull = vjp(lambda w: self({**rest, **w}, one).squeeze(0), weights)[:2]
                basis = cotangents if cotangents is not None else torch.eye(len(output)).to(output)
                return vmap(lambda u: pull(u)[0])(basis)

            per_row = 0 if cotangents is not None and cotangents.ndim == 3 else None
            in_dims = (None, per_row, *(0 for _ in leaves))
            return vmap(single, in_dims)({name: everything[name] for name in names}, cotangents, *leaves)
        chosen = [self.trainable.index(name) for name in names]
        rows: list[list[Tensor]] = []
        for n in range(leaves[0].shape[0]):
            output, parameters = self._plain([leaf[n : n + 1] for leaf in leaves])
            parameters = [parameters[i] for i in chosen]
            basis = torch.eye(output.shape[-1]).to(output) if cotangents is None else cotangents
            units = basis[n] if basis.ndim == 3 else basis
            pulled = [self._gradient(output, parameters, unit.unsqueeze(0), _wants_graph(leaves)) for unit in units]
            rows.append([torch.stack(columns) for columns in zip(*pulled, strict=True)])
        stacked = (torch.stack(tensors) for tensors in zip(*rows, strict=True))
        return dict(zip(names, stacked, strict=True))

    def activation_bytes(self, leaves: Sequence[Tensor]) -> int:
        """Bytes per row of everything one forward pass computes."""
        with _ActivationCounter() as counter, torch.no_grad():
            self.run(self.module(leaves[0].device), leaves)
        self._pads = counter.pads
        return max(1, counter.bytes // leaves[0].shape[0])

    def probe(self, leaves: Sequence[Tensor]) -> None:
        """Find out which torch.func transforms this module supports, by comparing them with ordinary autograd."""
        generator = torch.Generator().manual_seed(0)
        with _reentrant_checkpoints_refused():
            output, parameters = self._plain(leaves)
        # Some cotangents, mixed differently for each row: enough for the row-wise transform, whatever C is. More of
        # them than rows, and one alone: torch (2.13) mixes up two batch dimensions of one size in nested vmap.
        basis = torch.randn(3, output.shape[-1], generator=generator, dtype=torch.float64).to(output)
        mixture = torch.randn(len(output), 3, generator=generator, dtype=torch.float64).to(output)
        u = mixture @ basis
        expected = torch.cat([g.reshape(-1) for g in self._gradient(output, parameters, u, graph=False)])
        v = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(expected)
        parts = v.split([p.numel() for p in parameters])
        tangent = {n: q.reshape(p.shape) for n, q, p in zip(self.trainable, parts, parameters, strict=True)}
        tolerance = 1e-3 if self.dtype != torch.float64 else 1e-8

        def agrees(compute: Callable[[], Tensor], target: Tensor) -> bool:
            try:
                found = compute().detach()
            except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, AttributeError):
                return False
            scale = target.abs().max().clamp_min(torch.finfo(target.dtype).tiny)
            return bool((found - target).abs().max() <= tolerance * scale)

        def flat(tree: Weights) -> Tensor:
            return torch.cat([tree[name].reshape(-1) for name in self.trainable])

        self.functional = agrees(lambda: flat(self.pullback(leaves)(u)), expected)
        if not self.functional:
            logger.warning("torch.func does not reproduce this network's gradients: ordinary autograd runs, row by row")
        forward_mode = self.functional
        self.forward_mode = False
        try:
            reference = self.jvp(leaves, tangent).detach()
        except (RuntimeError, NotImplementedError):
            logger.warning("this network can be differentiated once only: jvp runs by rows of the Jacobian")
            self.twice_differentiable = self.vectorized = False
            reference = self.jvp(leaves, tangent).detach()
        self.forward_mode = forward_mode and self._forward_mode_works(leaves, tangent, reference, agrees)
        if forward_mode and not self.forward_mode and self.twice_differentiable:
            logger.warning("forward-mode differentiation is missing for this network: jvp runs as a double vjp")
        self.vectorized = self.functional

        def by_rows(k: int) -> Tensor:
            rows = self.jacobian(leaves, basis[:k])
            return torch.cat([torch.einsum("nk,nk...->...", mixture[:, :k], rows[n]).reshape(-1) for n in rows])

        if self.vectorized:
            one = self.pullback(leaves)(mixture[:, :1] @ basis[:1])
            self.vectorized = agrees(lambda: by_rows(3), expected) and agrees(lambda: by_rows(1), flat(one))
        if self.functional and not self.vectorized:
            logger.warning("vmap does not support this network: its Jacobian is computed row by row")

    def _forward_mode_works(
        self, leaves: Sequence[Tensor], tangent: Weights, reference: Tensor, agrees: Callable[..., bool]
    ) -> bool:
        self.forward_mode = True
        return agrees(lambda: self.jvp(leaves, tangent), reference)
