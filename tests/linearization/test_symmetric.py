"""Symmetric stacks: every method against dense float64, storage on disk, errors, pickles."""

from __future__ import annotations

import copy
import errno
import gc
import os
import pickle
import sys
import threading

import pytest
import torch

from ntkgp.linearization.symmetric import SymmetricGrams

SHAPES = [(1, 1, 256), (3, 7, 3), (2, 12, 4), (4, 33, 256), (5, 300, 256)]
DTYPES = {torch.float64: 1e-14, torch.float32: 1e-6}


def dense_stack(groups: int, size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    g = torch.Generator().manual_seed(groups * 1000 + size)
    rows = torch.randn(groups, size, 5, generator=g, dtype=torch.float64)
    grams = rows @ rows.mT
    return (0.5 * (grams + grams.mT)).to(dtype).double()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    assert a.dtype == torch.float64
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("storage", ["memory", "disk"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "size", "height"), SHAPES)
def test_every_method_against_the_dense_stack(groups, size, height, dtype, storage, tmp_path):
    # The reference holds numbers that the storage represents exactly: what is left is rounding of the float64 sums.
    grams = dense_stack(groups, size, dtype)
    directory = tmp_path if storage == "disk" else None
    stack = SymmetricGrams.from_dense(grams, dtype=dtype, storage=storage, strip_height=height, directory=directory)
    tolerance = 1e-13
    weights, vector, matrix = randn(groups), randn(size), randn(size, size)
    matrix = matrix + matrix.T
    total = stack.weighted_sum(weights)
    close(total, torch.einsum("g,gnm->nm", weights, grams), tolerance)
    assert torch.equal(total, total.T)
    for g in range(groups):
        assert torch.equal(stack.dense(g), grams[g])
    assert torch.equal(stack.diagonal(), grams.diagonal(dim1=1, dim2=2))
    close(stack.traces(), grams.diagonal(dim1=1, dim2=2).sum(-1), tolerance)
    close(stack.inner(matrix), torch.einsum("gnm,nm->g", grams, matrix), 1e-11)
    close(stack.inner(matrix.tril()), torch.einsum("gnm,nm->g", grams, matrix), 1e-11)
    close(stack.quadratic(vector), torch.einsum("gnm,n,m->g", grams, vector, vector), 1e-12)
    close(stack.matvec(vector), grams @ vector, tolerance)
    assert stack.is_finite()
    assert stack.shape == grams.shape
    assert (stack.dtype, stack.device, stack.storage) == (dtype, torch.device("cpu"), storage)


@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_storage_rounds_the_numbers_and_nothing_else(dtype):
    grams, vector = dense_stack(3, 40), randn(40)
    stack = SymmetricGrams.from_dense(grams, dtype=dtype)
    close(stack.matvec(vector), grams @ vector, DTYPES[dtype])
    close(stack.weighted_sum(torch.ones(3)), grams.sum(0), DTYPES[dtype])


def test_about_half_of_the_numbers_are_stored():
    stack = SymmetricGrams(2, 2000)
    assert stack.nbytes == 2 * 8 * sum((b - a) * b for a, b in stack.bounds)
    assert stack.nbytes <= 8 * 2 * (2000**2 / 2 + 2000 * 128)
    assert SymmetricGrams(2, 2000, dtype=torch.float32).nbytes == stack.nbytes // 2


def test_filled_strip_by_strip_and_the_upper_half_of_diagonal_blocks_is_not_read():
    grams = dense_stack(2, 11)
    stack = SymmetricGrams(2, 11, strip_height=4)
    assert stack.bounds == ((0, 4), (4, 8), (8, 11))
    assert not bool(stack.weighted_sum(torch.ones(2)).any())
    for k, (a, b) in enumerate(stack.bounds):
        stack.strips(k).copy_(grams[:, a:b, :b])
        stack.strip(1, k)[:, a:] += torch.ones(b - a, b - a).triu(1)
    assert torch.equal(stack.dense(1), grams[1])
    matrix = randn(11, 11)
    matrix, vector = matrix + matrix.T, randn(11)
    close(stack.inner(matrix), torch.einsum("gnm,nm->g", grams, matrix), 1e-12)
    close(stack.quadratic(vector), torch.einsum("gnm,n,m->g", grams, vector, vector), 1e-12)
    close(stack.matvec(vector), grams @ vector, 1e-13)
    close(stack.weighted_sum(torch.ones(2)), grams.sum(0), 1e-14)


def test_not_finite_is_seen():
    for value in (float("nan"), float("inf"), -float("inf")):
        stack = SymmetricGrams.from_dense(dense_stack(2, 9), strip_height=4)
        stack.strip(1, 2)[0, 3] = value
        assert not stack.is_finite()


def test_deepcopy_shares_and_pickle_carries_the_numbers(tmp_path):
    grams = dense_stack(2, 30)
    for storage in ("memory", "disk"):
        stack = SymmetricGrams.from_dense(grams, storage=storage, strip_height=8)
        assert copy.deepcopy(stack).strip(0, 0).data_ptr() == stack.strip(0, 0).data_ptr()
        loaded = pickle.loads(pickle.dumps(stack))
        assert (loaded.storage, loaded.bounds, loaded.shape) == (storage, stack.bounds, stack.shape)
        assert torch.equal(loaded.dense(1), grams[1])
        loaded.strip(1, 0).zero_()
        assert torch.equal(stack.dense(1), grams[1])
    gone = tmp_path / "gone"
    gone.mkdir()
    stack = SymmetricGrams.from_dense(grams, storage="disk", directory=gone)
    text = pickle.dumps(stack)
    gone.rmdir()
    assert torch.equal(pickle.loads(text).dense(0), grams[0])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_file_has_no_name_and_dies_with_the_object(tmp_path):
    def maps() -> int:
        with open("/proc/self/maps") as lines:
            return sum(str(tmp_path) in line for line in lines)

    stack = SymmetricGrams(2, 50, storage="disk", directory=tmp_path)
    view = stack.strip(1, 0)
    assert os.listdir(tmp_path) == []
    assert maps() == 1
    del stack
    gc.collect()
    view.fill_(1.0)
    assert maps() == 1
    del view
    gc.collect()
    assert maps() == 0


def test_threads_read_the_same():
    grams = dense_stack(3, 200)
    stack = SymmetricGrams.from_dense(grams, strip_height=16, storage="disk")
    vector, results = randn(200), []
    threads = [threading.Thread(target=lambda: results.append(stack.matvec(vector))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("reserves", [True, False], ids=["posix_fallocate", "elsewhere"])
def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch, reserves):
    if not reserves:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    size = 100 if reserves else 10**8
    with pytest.raises(OSError, match=r"cannot store Grams of .*No space left on device.*another directory") as caught:
        SymmetricGrams(20, size, storage="disk", directory=tmp_path, strip_height=size)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_works_without_posix_fallocate(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    grams = dense_stack(2, 9)
    assert torch.equal(SymmetricGrams.from_dense(grams, storage="disk", directory=tmp_path).dense(1), grams[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_groups": 0}, "num_groups: expected a positive integer, got 0"),
        ({"size": 2.0}, "size: expected a positive integer, got 2.0"),
        ({"strip_height": -1}, "strip_height: expected a positive integer, got -1"),
        ({"dtype": torch.float16}, "dtype: expected torch.float64 or torch.float32, got torch.float16"),
        ({"storage": "ram"}, r"storage: expected one of \('memory', 'disk'\), got 'ram'"),
        ({"storage": "disk", "directory": "/nowhere/at/all"}, "directory: expected an existing directory, got"),
        ({"storage": "disk", "device": "cuda"}, "device: storage='disk' is read by the CPU, got cuda"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SymmetricGrams(**{"num_groups": 2, "size": 3, **arguments})


def test_bad_tensors():
    stack = SymmetricGrams(2, 3)
    for call, message in (
        (lambda: stack.weighted_sum(torch.ones(3)), r"weights: expected shape \(2,\), got \(3,\)"),
        (lambda: stack.inner(torch.ones(2, 2)), r"matrix: expected shape \(3, 3\), got \(2, 2\)"),
        (lambda: stack.quadratic(torch.ones(2)), r"vector: expected shape \(3,\), got \(2,\)"),
        (lambda: stack.matvec(torch.ones(3, 1)), r"vector: expected shape \(3,\), got \(3, 1\)"),
        (lambda: SymmetricGrams.from_dense(torch.ones(2, 3)), r"grams: expected shape \(G, n, n\)"),
        (lambda: SymmetricGrams.from_dense(torch.ones(1, 2, 2, dtype=torch.long)), "grams: expected real numbers"),
        (lambda: SymmetricGrams.from_dense(torch.tensor([[[1.0, 0.5], [0.4, 1.0]]])), "matrix 0 is not symmetric"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="vector: expected a tensor, got list"):
        stack.matvec([1.0, 2.0, 3.0])
    with pytest.raises(TypeError, match="grams: expected a tensor, got list"):
        SymmetricGrams.from_dense([[1.0]])
