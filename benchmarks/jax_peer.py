"""neural-tangents as a peer: a worker process with its own Python, told to run by lines of text."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.timing import Cost

NAME = "neural-tangents"
ROOT = Path(__file__).absolute().parent.parent


class NeuralTangents:
    """The structured derivatives of neural-tangents on one network and its inputs, compiled once.

    :param python: a Python that has jax and neural-tangents.
    :param name: the network's name in :data:`benchmarks.nets.NETS`.
    :raises RuntimeError: the worker did not start, or failed to compile or run; the message is its own.
    """

    def __init__(self, python: str, name: str, net: nn.Module, x: Tensor, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        archive = Path(self._folder.name) / "arrays.npz"
        tensors = {key: value.detach().cpu().numpy() for key, value in net.state_dict().items()}
        np.savez(archive, x=x.cpu().numpy(), **tensors)
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.jax_worker", str(archive), name, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        try:
            self.compile_seconds = float(self._read()["compiled"])
        except BaseException:
            self.close()
            raise

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"neural-tangents ended with status {self._process.wait()} (out of memory?)")
        answer = json.loads(line)
        if "failure" in answer:
            raise RuntimeError(answer["failure"])
        return answer

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._read()

    def run(self) -> Cost:
        """One evaluation, clocked in the worker."""
        answer = self._ask("run")
        return Cost(answer["cpu"], answer["wall"])

    def run_with_peak(self) -> tuple[Cost, int | None]:
        """One evaluation, and the growth of the worker's peak memory in bytes."""
        answer = self._ask("peak")
        return Cost(answer["cpu"], answer["wall"]), answer["peak"]

    def kernel(self) -> Tensor:
        """The kernel, (N, C, N, C)."""
        path = Path(self._folder.name) / "kernel.npy"
        self._ask(f"save {path}")
        return torch.from_numpy(np.load(path))

    def close(self) -> None:
        """End the worker."""
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def __enter__(self) -> NeuralTangents:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
