"""One torch thread, a fixed seed before each test, and a check that no test leaves global state behind."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch

from tests import elsewhere
from tests.fresh import FreshInterpreter

torch.set_num_threads(1)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin with what other processes do for the tests; and never look through what is imported by now for garbage.

    What is imported stays: to look through it again and again takes a twentieth of the time of all tests.
    """
    if not session.config.option.collectonly and not hasattr(session.config, "workerinput"):
        selected = {item.module.__name__ for item in session.items if isinstance(item, pytest.Function)}
        elsewhere.start(run for run in elsewhere.ALL if run.wanted_by in selected)
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    elsewhere.end()


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
