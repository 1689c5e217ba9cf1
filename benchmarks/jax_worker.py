"""neural-tangents' structured derivatives on the benchmark networks, as a process of its own.

    JAX_PYTHON -m benchmarks.jax_worker arrays.npz NET THREADS

It needs numpy, jax and neural-tangents and neither torch nor ntkgp. The archive holds the inputs as ``x`` and the
network's tensors by their PyTorch names. One line of JSON is printed when the kernel is compiled, then one for each
line of standard input: ``run`` (what one evaluation took), ``peak`` (growth of peak memory by one), ``save PATH``.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.timing import measure, peak_memory, reset_peak

Arrays = dict[str, Any]
Apply = Callable[[Arrays, Any], Any]

_BATCH_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def convert(tensors: Arrays) -> Arrays:
    """PyTorch layouts -> those that JAX contracts well: dense (in, out), convolutions (height, width, in, out).

    With dense weights as (out, in) the structure rules of neural-tangents do not apply (a 400-fold slower MLP).
    """
    converted = {}
    for name, value in tensors.items():
        if value.ndim == 4:
            converted[name] = value.transpose(2, 3, 1, 0)
        elif value.ndim == 2 and not name.startswith("pos"):
            converted[name] = value.T
        else:
            converted[name] = value
    return {name: np.ascontiguousarray(value) for name, value in converted.items()}


class Layers:
    """The layers of the benchmark networks in ``jax.numpy``, by the PyTorch names of their tensors.

    Images are (N, height, width, C).
    """

    def __init__(self) -> None:
        import jax  # type: ignore[import-not-found]
        import jax.numpy  # type: ignore[import-not-found]

        self.nn, self.np, self.lax = jax.nn, jax.numpy, jax.lax

    def dense(self, p: Arrays, name: str, x: Any) -> Any:
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    def convolution(self, p: Arrays, name: str, x: Any, padding: int, stride: int = 1) -> Any:
        numbers = ("NHWC", "HWIO", "NHWC")
        edges = ((padding, padding), (padding, padding))
        out = self.lax.conv_general_dilated(x, p[f"{name}.weight"], (stride, stride), edges, dimension_numbers=numbers)
        return out + p[f"{name}.bias"] if f"{name}.bias" in p else out

    def pool(self, x: Any) -> Any:
        return self.lax.reduce_window(x, -self.np.inf, self.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    def normalize(self, x: Any, axes: tuple[int, ...]) -> Any:
        mean = x.mean(axes, keepdims=True)
        return (x - mean) / self.np.sqrt(((x - mean) ** 2).mean(axes, keepdims=True) + 1e-5)

    def affine(self, p: Arrays, name: str, x: Any) -> Any:
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def batch_norm(self, p: Arrays, name: str, x: Any) -> Any:
        standard = (x - p[f"{name}.running_mean"]) / self.np.sqrt(p[f"{name}.running_var"] + 1e-5)
        return self.affine(p, name, standard)

    def group_norm(self, p: Arrays, name: str, x: Any, groups: int = 4) -> Any:
        grouped = x.reshape(*x.shape[:3], groups, -1)
        return self.affine(p, name, self.normalize(grouped, (1, 2, 4)).reshape(x.shape))

    def residual(self, p: Arrays, name: str, x: Any, stride: int) -> Any:
        z = self.nn.relu(self.batch_norm(p, f"{name}.main.1", self.convolution(p, f"{name}.main.0", x, 1, stride)))
        z = self.batch_norm(p, f"{name}.main.4", self.convolution(p, f"{name}.main.3", z, 1))
        if f"{name}.skip.0.weight" in p:
            x = self.batch_norm(p, f"{name}.skip.1", self.convolution(p, f"{name}.skip.0", x, 0, stride))
        return self.nn.relu(z + x)

    def encoder(self, p: Arrays, name: str, x: Any) -> Any:
        def split(z: Any) -> Any:
            return z.reshape(*x.shape[:2], 5, -1).transpose(0, 2, 1, 3)

        z = self.affine(p, f"{name}.n1", self.normalize(x, (2,)))
        q, k, v = (split(self.dense(p, f"{name}.{part}", z)) for part in "qkv")
        attention = self.nn.softmax(q @ k.transpose(0, 1, 3, 2) / q.shape[-1] ** 0.5, -1)
        x = x + self.dense(p, f"{name}.o", (attention @ v).transpose(0, 2, 1, 3).reshape(x.shape))
        hidden = self.dense(p, f"{name}.f1", self.affine(p, f"{name}.n2", self.normalize(x, (2,))))
        return x + self.dense(p, f"{name}.f2", self.nn.gelu(hidden, approximate=False))

    def double_convolution(self, p: Arrays, name: str, x: Any, stride: int = 1) -> Any:
        x = self.nn.silu(self.group_norm(p, f"{name}.1", self.convolution(p, f"{name}.0", x, 1, stride)))
        return self.nn.silu(self.group_norm(p, f"{name}.4", self.convolution(p, f"{name}.3", x, 1)))

    def enlarge(self, p: Arrays, name: str, x: Any) -> Any:
        # A transposed convolution whose stride is its kernel is a dense layer and a rearrangement.
        weight = p[f"{name}.weight"]
        rows, columns, out, channels = weight.shape
        z = x @ weight.transpose(3, 0, 1, 2).reshape(channels, -1)
        z = z.reshape(*x.shape[:3], rows, columns, out).transpose(0, 1, 3, 2, 4, 5)
        return z.reshape(len(x), x.shape[1] * rows, x.shape[2] * columns, out) + p[f"{name}.bias"]


class Networks(Layers):
    """f(parameters, x) of the benchmark networks."""

    def named(self, net: str) -> Apply:
        """One of them by its letter."""
        activation = self.np.tanh if net == "a" else self.nn.relu
        mlp = functools.partial(self.mlp, activation)
        return {"a": mlp, "b": mlp, "c": self.lenet, "d": self.resnet, "e": self.transformer, "f": self.unet}[net]

    def mlp(self, activation: Callable[[Any], Any], p: Arrays, x: Any) -> Any:
        return self.dense(p, "4", activation(self.dense(p, "2", activation(self.dense(p, "0", x)))))

    def lenet(self, p: Arrays, x: Any) -> Any:
        relu = self.nn.relu
        x = self.pool(relu(self.convolution(p, "0", x.transpose(0, 2, 3, 1), 2)))
        x = self.pool(relu(self.convolution(p, "3", x, 0)))
        x = relu(self.dense(p, "7", x.reshape(len(x), -1)))
        return self.dense(p, "11", relu(self.dense(p, "9", x)))

    def resnet(self, p: Arrays, x: Any) -> Any:
        x = self.nn.relu(self.batch_norm(p, "1", self.convolution(p, "0", x.transpose(0, 2, 3, 1), 1)))
        for k in range(8):
            x = self.residual(p, str(3 + k), x, 2 if k in (2, 4, 6) else 1)
        return self.dense(p, "13", x.mean((1, 2)))

    def transformer(self, p: Arrays, x: Any) -> Any:
        x = x.reshape(-1, 4, 7, 4, 7).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 49)
        x = self.dense(p, "emb", x) + p["pos.weight"]
        x = self.encoder(p, "enc.1", self.encoder(p, "enc.0", x))
        return self.dense(p, "head", self.affine(p, "norm", self.normalize(x, (2,))).mean(1))

    def unet(self, p: Arrays, x: Any) -> Any:
        fine = self.double_convolution(p, "down1", x.transpose(0, 2, 3, 1))
        middle = self.double_convolution(p, "down2", fine, 2)
        x = self.enlarge(p, "up2", self.double_convolution(p, "bottom", middle, 2))
        x = self.double_convolution(p, "merge2", self.np.concatenate([x, middle], -1))
        x = self.double_convolution(p, "merge1", self.np.concatenate([self.enlarge(p, "up1", x), fine], -1))
        return self.convolution(p, "out", x, 0).reshape(len(x), -1)


def load(path: str, net: str) -> tuple[Arrays, Arrays, Any]:
    """Parameters, constants and inputs from the archive, in JAX's layouts."""
    with np.load(path) as archive:
        tensors = {name: archive[name] for name in archive.files}
    x = tensors.pop("x")
    if net == "c":
        # The flattened image runs over channels first in PyTorch and last here.
        weight = tensors["7.weight"]
        tensors["7.weight"] = weight.reshape(-1, 16, 5, 5).transpose(0, 2, 3, 1).reshape(len(weight), -1)
    constants = {name: v for name, v in tensors.items() if name.rpartition(".")[2] in _BATCH_STATISTICS}
    parameters = {name: v for name, v in tensors.items() if name not in constants}
    return convert(parameters), constants, x


def build(path: str, net: str) -> Callable[[], Any]:
    """The compiled kernel as a function that waits for its result, (N, C, N, C)."""
    import jax
    import neural_tangents as nt  # type: ignore[import-not-found]

    parameters, constants, x = load(path, net)
    apply = Networks().named(net)
    structured = nt.NtkImplementation.STRUCTURED_DERIVATIVES
    kernel = nt.empirical_ntk_fn(
        lambda p, inputs: apply({**p, **constants}, inputs), trace_axes=(), vmap_axes=0, implementation=structured
    )
    x, parameters = jax.device_put(x), jax.device_put(parameters)
    compiled = jax.jit(lambda inputs, p: kernel(inputs, None, p)).lower(x, parameters).compile()
    return lambda: compiled(x, parameters).block_until_ready().transpose(0, 2, 1, 3)


def _answer(line: str, kernel: Callable[[], Any]) -> dict[str, Any]:
    command, _, rest = line.strip().partition(" ")
    if command == "run":
        cost = measure(kernel)[0]
        return {"cpu": cost.cpu, "wall": cost.wall}
    if command == "peak":
        before = reset_peak()
        cost = measure(kernel)[0]
        after = peak_memory()
        growth = None if before is None or after is None else after - before
        return {"cpu": cost.cpu, "wall": cost.wall, "peak": growth}
    np.save(rest, np.asarray(kernel()))
    return {"saved": rest}


def main() -> None:
    path, net, threads = sys.argv[1:4]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if int(threads) < len(cores):
        # XLA makes as many threads as it sees cores.
        os.sched_setaffinity(0, cores[: int(threads)])
    try:
        start = time.perf_counter()
        kernel = build(path, net)
        print(json.dumps({"compiled": time.perf_counter() - start}), flush=True)
        for line in sys.stdin:
            print(json.dumps(_answer(line, kernel)), flush=True)
    except Exception as error:
        print(json.dumps({"failure": f"{type(error).__name__}: {error}"}), flush=True)


if __name__ == "__main__":
    main()
