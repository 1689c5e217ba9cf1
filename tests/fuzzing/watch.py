"""What no call may change, and what must not grow."""

from __future__ import annotations

import gc
import os
import random
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import ntkgp

PACKAGE = str(Path(ntkgp.__file__).parent)
REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, OSError)


class Find(AssertionError):
    """Something that must not be."""


def state_of(net: nn.Module) -> dict[str, Any]:
    """Everything of a user's that a call could have changed, comparable by ==."""
    numpy_state = np.random.get_state()  # noqa: NPY002 -- the global generator is what must not move
    tensors = net.state_dict(keep_vars=True).items()
    return {
        "modes": [m.training for m in net.modules()],
        "tensors": {n: (t.detach().numpy().tobytes(), t.requires_grad) for n, t in tensors},
        "gradients": [p.grad is None for p in net.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules()],
        "torch generator": torch.get_rng_state().numpy().tobytes(),
        "numpy generator": (numpy_state[1].tobytes(), numpy_state[2]),  # type: ignore[index]
        "python generator": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "flush denormals": float(torch.tensor(1e-310, dtype=torch.float64) * 1.0) == 0.0,
    }  # fmt: skip


@contextmanager
def untouched(net: nn.Module) -> Iterator[None]:
    """A find where the block warns, or leaves the network or a global state changed, whether it raises or not."""
    before = state_of(net)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error: Exception | None = None
        try:
            yield
        except Find:
            raise
        except Exception as raised:
            error = raised
        after = state_of(net)
        changed = [name for name in before if before[name] != after[name]]
        said = [f"{w.category.__name__} from {Path(w.filename).name}: {w.message}" for w in caught]
    if changed:
        raise Find(f"changed: {', '.join(changed)}") from error
    if said:
        raise Find(f"warned: {said[0]}") from error
    if error is not None:
        raise error


def is_clear(error: Exception, names: tuple[str, ...] = ()) -> bool:
    """Whether an error was raised by a line of the library itself, and names one of the arguments."""
    frames = traceback.extract_tb(error.__traceback__)
    # Compiled code has no frame of its own: what it raises comes from a line that raises nothing.
    own = bool(frames) and frames[-1].filename.startswith(PACKAGE) and "raise" in (frames[-1].line or "")
    text = str(error)
    return isinstance(error, REFUSALS) and own and bool(text) and (not names or any(name in text for name in names))


def where(error: Exception) -> str:
    """The last line of the library and the last of all in an error's traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename.startswith(PACKAGE)]
    shown = ([own[-1]] if own else []) + [frames[-1]]
    return " > ".join(dict.fromkeys(f"{Path(f.filename).name}:{f.lineno}" for f in shown))


def resources() -> dict[str, int]:
    """Open files, threads, live tensors and their bytes of this process."""
    gc.collect()
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
    return {
        "files": files, "threads": threading.active_count(), "tensors": len(tensors),
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
    }  # fmt: skip
