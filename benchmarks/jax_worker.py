"""neural-tangents' structured derivatives on the benchmark networks, as a process of its own.

    JAX_PYTHON -m benchmarks.jax_worker arrays.npz NET THREADS

It needs numpy, jax and neural-tangents and neither torch nor ntkgp. The archive holds the inputs as ``x`` and the
network's tensors by their PyTorch names. One line of JSON is printed when the kernel is compiled, then one for each
line of standard input: ``run`` (what one evaluation took), ``peak`` (growth of peak memory by one), ``save PATH``.
"""

from __future__ import annotations

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


def functions(net: str) -> Apply:
    """f(parameters, x) of one of the benchmark networks, written in ``jax.numpy``; images are (N, height, width, C)."""
    import jax  # type: ignore[import-not-found]
    import jax.numpy as jnp  # type: ignore[import-not-found]
    from jax import lax

    def dense(p: Arrays, name: str, x: Any) -> Any:
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    def convolution(p: Arrays, name: str, x: Any, padding: int, stride: int = 1) -> Any:
        numbers = ("NHWC", "HWIO", "NHWC")
        edges = ((padding, padding), (padding, padding))
        out = lax.conv_general_dilated(x, p[f"{name}.weight"], (stride, stride), edges, dimension_numbers=numbers)
        return out + p[f"{name}.bias"] if f"{name}.bias" in p else out

    def pool(x: Any) -> Any:
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    def normalize(x: Any, axes: tuple[int, ...]) -> Any:
        mean = x.mean(axes, keepdims=True)
        return (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(axes, keepdims=True) + 1e-5)

    def affine(p: Arrays, name: str, x: Any) -> Any:
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def batch_norm(p: Arrays, name: str, x: Any) -> Any:
        return affine(p, name, (x - p[f"{name}.running_mean"]) / jnp.sqrt(p[f"{name}.running_var"] + 1e-5))

    def group_norm(p: Arrays, name: str, x: Any, groups: int = 4) -> Any:
        grouped = x.reshape(*x.shape[:3], groups, -1)
        return affine(p, name, normalize(grouped, (1, 2, 4)).reshape(x.shape))

    def mlp(p: Arrays, x: Any) -> Any:
        activation = jnp.tanh if net == "a" else jax.nn.relu
        return dense(p, "4", activation(dense(p, "2", activation(dense(p, "0", x)))))

    def lenet(p: Arrays, x: Any) -> Any:
        x = pool(jax.nn.relu(convolution(p, "0", x.transpose(0, 2, 3, 1), 2)))
        x = pool(jax.nn.relu(convolution(p, "3", x, 0)))
        x = jax.nn.relu(dense(p, "7", x.reshape(len(x), -1)))
        return dense(p, "11", jax.nn.relu(dense(p, "9", x)))

    def residual(p: Arrays, name: str, x: Any, stride: int) -> Any:
        z = jax.nn.relu(batch_norm(p, f"{name}.main.1", convolution(p, f"{name}.main.0", x, 1, stride)))
        z = batch_norm(p, f"{name}.main.4", convolution(p, f"{name}.main.3", z, 1))
        if f"{name}.skip.0.weight" in p:
            x = batch_norm(p, f"{name}.skip.1", convolution(p, f"{name}.skip.0", x, 0, stride))
        return jax.nn.relu(z + x)

    def resnet(p: Arrays, x: Any) -> Any:
        x = jax.nn.relu(batch_norm(p, "1", convolution(p, "0", x.transpose(0, 2, 3, 1), 1)))
        for k in range(8):
            x = residual(p, str(3 + k), x, 2 if k in (2, 4, 6) else 1)
        return dense(p, "13", x.mean((1, 2)))

    def encoder(p: Arrays, name: str, x: Any) -> Any:
        def split(z: Any) -> Any:
            return z.reshape(*x.shape[:2], 5, -1).transpose(0, 2, 1, 3)

        z = affine(p, f"{name}.n1", normalize(x, (2,)))
        q, k, v = (split(dense(p, f"{name}.{part}", z)) for part in "qkv")
        attention = jax.nn.softmax(q @ k.transpose(0, 1, 3, 2) / q.shape[-1] ** 0.5, -1)
        x = x + dense(p, f"{name}.o", (attention @ v).transpose(0, 2, 1, 3).reshape(x.shape))
        hidden = dense(p, f"{name}.f1", affine(p, f"{name}.n2", normalize(x, (2,))))
        return x + dense(p, f"{name}.f2", jax.nn.gelu(hidden, approximate=False))

    def transformer(p: Arrays, x: Any) -> Any:
        x = x.reshape(-1, 4, 7, 4, 7).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 49)
        x = dense(p, "emb", x) + p["pos.weight"]
        x = encoder(p, "enc.1", encoder(p, "enc.0", x))
        return dense(p, "head", affine(p, "norm", normalize(x, (2,))).mean(1))

    def double_convolution(p: Arrays, name: str, x: Any, stride: int = 1) -> Any:
        x = jax.nn.silu(group_norm(p, f"{name}.1", convolution(p, f"{name}.0", x, 1, stride)))
        return jax.nn.silu(group_norm(p, f"{name}.4", convolution(p, f"{name}.3", x, 1)))

    def enlarge(p: Arrays, name: str, x: Any) -> Any:
        # A transposed convolution whose stride is its kernel is a dense layer and a rearrangement.
        weight = p[f"{name}.weight"]
        rows, columns, out, channels = weight.shape
        z = x @ weight.transpose(3, 0, 1, 2).reshape(channels, -1)
        z = z.reshape(*x.shape[:3], rows, columns, out).transpose(0, 1, 3, 2, 4, 5)
        return z.reshape(len(x), x.shape[1] * rows, x.shape[2] * columns, out) + p[f"{name}.bias"]

    def unet(p: Arrays, x: Any) -> Any:
        fine = double_convolution(p, "down1", x.transpose(0, 2, 3, 1))
        middle = double_convolution(p, "down2", fine, 2)
        x = enlarge(p, "up2", double_convolution(p, "bottom", middle, 2))
        x = double_convolution(p, "merge2", jnp.concatenate([x, middle], -1))
        x = double_convolution(p, "merge1", jnp.concatenate([enlarge(p, "up1", x), fine], -1))
        return convolution(p, "out", x, 0).reshape(len(x), -1)

    return {"a": mlp, "b": mlp, "c": lenet, "d": resnet, "e": transformer, "f": unet}[net]


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
    apply = functions(net)
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
