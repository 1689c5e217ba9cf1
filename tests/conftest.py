"""One torch thread, a fixed seed before each test, and a check that no test leaves global state behind."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch

from tests.fresh import FreshInterpreter

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is imported by now stays: to look through it again and again takes a twentieth of the time of all tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_global_state() -> Iterator[None]:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 -- libraries under test may read the legacy generator
    state = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    yield
    left = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    torch.set_default_dtype(state[0])
    torch.set_num_threads(state[1])
    torch.set_grad_enabled(state[2])
    assert left == state, f"default dtype, threads, grad mode before {state}, after {left}"


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FreshInterpreter]:
    interpreter = FreshInterpreter(tmp_path_factory.mktemp("fresh"))
    yield interpreter
    interpreter.close()
