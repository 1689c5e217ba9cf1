"""Training data in passes: tensors, a Dataset or a DataLoader, checked batch by batch and named by their index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ntkgp.distributed import broadcast_object, checksum, gather_numbers, world_size
from ntkgp.likelihoods import validate_labels
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.packing import tree_flatten, tree_unflatten
from ntkgp.models.noise import is_classification

_BATCH = 256
OTHER_DATA = (
    "the processes were given different data, or the same in another order; give each of them all of the data (no "
    "DistributedSampler), in an order that does not depend on the process"
)


def shaped_targets(y: Any, lin: LinearizedNetwork, classification: bool, num_rows: int, name: str) -> Tensor:
    """Targets in GPyTorch's shape, a copy: labels (N,), else float64 (N,) for one output and (N, C) for several.

    :raises TypeError: no tensor of real numbers.
    :raises ValueError: another shape, NaN or infinite values, labels out of range.
    """
    c = lin.num_outputs
    if not isinstance(y, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(y).__name__}")
    if classification:
        flat = y.squeeze(-1) if y.ndim == 2 and y.shape[-1] == 1 else y
        try:
            return validate_labels(flat, max(c, 2), torch.Size((num_rows,))).clone()
        except (TypeError, ValueError) as reason:
            raise type(reason)(f"{name}: {reason}") from None
    shapes = {(num_rows, c), (num_rows, *lin.output_shape)} | ({(num_rows,)} if c == 1 else set())
    if tuple(y.shape) not in shapes:
        raise ValueError(
            f"{name}: expected shape {' or '.join(map(str, sorted(shapes, key=len)))}, got {tuple(y.shape)}"
        )
    if y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"{name}: expected real numbers, got {y.dtype}")
    if not torch.isfinite(y).all():
        raise ValueError(f"{name} holds NaN or infinite values")
    # A copy: what the caller later does to the tensor in place must not reach half of the model.
    return y.detach().to(torch.float64).reshape((num_rows,) if c == 1 else (num_rows, c)).clone()


def packed_inputs(x: Any, lin: LinearizedNetwork, name: str) -> Tensor:
    """Raw or packed inputs, (N,) where D = 1, as packed float64."""
    packing = lin.packing
    if isinstance(x, Tensor) and x.ndim == 1 and packing.width == 1 and not packing.is_raw(x):
        x = x.unsqueeze(-1)
    return packing.pack(x, name).to(torch.float64)


class Batches:
    """Training data as something that can be passed over again and again, each pass checked.

    Built by :meth:`of`. ``for x, y in batches`` is one pass: packed float64 inputs (B, D) and targets, float64 (B,) for
    one output or (B, C), or labels (B,). Empty batches are left out. Errors name the batch.

    :param source: a list of pairs of tensors, or a DataLoader.
    """

    def __init__(
        self, source: DataLoader | tuple[Tensor, Tensor], lin: LinearizedNetwork, classification: bool, name: str,
        batch_size: int | None,
    ) -> None:  # fmt: skip
        self._source, self._lin, self._classification, self._name = source, lin, classification, name
        self._batch_size = batch_size or _BATCH
        self._num_data = len(source[0]) if isinstance(source, tuple) else None
        self._passes: _Undisturbed | None = None

    @classmethod
    def of(
        cls,
        data: Any,
        lin: LinearizedNetwork,
        likelihood: Likelihood,
        batch_size: int | None = None,
        name: str = "train_data",
    ) -> Batches:
        """Passes over ``(x, y)``, a Dataset, a DataLoader, or what another call returned.

        :param data: ``(x, y)`` with x as the network takes it or packed; a Dataset or DataLoader of such pairs, or of
            dicts with ``"labels"``.
        :param batch_size: rows per batch of tensors and Datasets, 256 by default; a DataLoader has its own.
        :param name: how errors call the data.
        :raises TypeError: other data.
        :raises ValueError: no rows, or tensors that the model refuses.
        """
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size: expected a positive number, got {batch_size}")
        if isinstance(data, cls):
            return data
        classification = is_classification(likelihood)
        if isinstance(data, Dataset) and not isinstance(data, DataLoader):
            if not isinstance(data, IterableDataset) and len(data) == 0:  # type: ignore[arg-type]
                raise ValueError(f"{name} has N = 0 rows; expected at least one")
            data = DataLoader(data, batch_size=batch_size or _BATCH)
        if isinstance(data, DataLoader):
            return cls(data, lin, classification, name, None)
        if isinstance(data, tuple | list) and len(data) == 2:
            x = packed_inputs(data[0], lin, f"{name}: x")
            y = shaped_targets(data[1], lin, classification, len(x), f"{name}: y")
            return cls((x.detach().clone(), y), lin, classification, name, batch_size)
        raise TypeError(f"{name}: expected (x, y), a Dataset or a DataLoader, got {type(data).__name__}")

    @property
    def num_data(self) -> int:
        """N; for a DataLoader known after the first whole pass, or from the length of its dataset."""
        if self._num_data is None:
            dataset = getattr(self._source, "dataset", None)
            if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
                raise ValueError(f"{self._name}: its number of rows is known after the first pass")
            loader = self._source
            assert isinstance(loader, DataLoader)
            if loader.drop_last or loader.sampler is None or loader.batch_size is None:
                raise ValueError(f"{self._name}: its number of rows is known after the first pass")
            return len(loader.sampler)  # type: ignore[arg-type]
        return self._num_data

    def __len__(self) -> int:
        """Number of batches, where it is known."""
        if isinstance(self._source, tuple):
            return -(-len(self._source[0]) // self._batch_size)
        return len(self._source)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass.

        :raises ValueError: bad data in a batch, no rows at all, or another number of rows than in the pass before.
        """
        if isinstance(self._source, tuple):
            x, y = self._source
            yield from zip(x.split(self._batch_size), y.split(self._batch_size), strict=True)
            return
        rows = 0
        if self._passes is None:
            self._passes = _Undisturbed(self._source)
        for index, batch in self._passes:
            label = f"{self._name}: batch {index}"
            inputs, targets = as_pair(batch, label)
            if isinstance(targets, Tensor) and targets.ndim and len(targets) == 0:
                continue
            x = packed_inputs(inputs, self._lin, f"{label}: x")
            y = shaped_targets(targets, self._lin, self._classification, len(x), f"{label}: y")
            rows += len(x)
            yield x, y
        if rows == 0:
            raise ValueError(f"{self._name} has no rows; expected at least one")
        if self._num_data is not None and rows != self._num_data:
            raise ValueError(f"{self._name}: this pass had {rows} rows, the one before {self._num_data}")
        self._num_data = rows

    @property
    def batch_size(self) -> int | None:
        """Rows per batch; None where they are a loader's own affair."""
        return self._batch_size if isinstance(self._source, tuple) else None

    def rows(self) -> Any:
        """What stands for the data in a digest, see :func:`ntkgp.fingerprint.digest`."""
        return self._source

    def random_state(self) -> dict[str, Tensor]:
        """The random numbers by which the next pass shuffles; empty for tensors."""
        if isinstance(self._source, tuple):
            return {}
        if self._passes is None:
            self._passes = _Undisturbed(self._source)
        return self._passes.state()

    def set_random_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`random_state`: the next pass has the order that it had then."""
        if state:
            self.random_state()
            assert self._passes is not None
            self._passes.set_state(state)

    def share(self) -> None:
        """Before passes that all processes share: give them the random state of rank 0, so that they shuffle alike.

        :raises ValueError: tensors that differ between the processes.
        """
        if world_size() == 1:
            return
        self.set_random_state(broadcast_object(self.random_state()))
        if isinstance(self._source, tuple) and len(set(gather_numbers(checksum(0, *self._source)))) > 1:
            raise ValueError(f"{self._name}: {OTHER_DATA}")

    @property
    def in_memory(self) -> bool:
        """Whether the data are tensors."""
        return isinstance(self._source, tuple)

    def collect(self) -> tuple[Tensor, Tensor]:
        """All rows at once, packed inputs (N, D) and targets."""
        if isinstance(self._source, tuple):
            return self._source
        pairs = list(self)
        return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


class _Undisturbed:
    """Passes over a loader with their own random state: each shuffles anew, the caller's state stays as it is."""

    def __init__(self, loader: DataLoader) -> None:
        self._loader, self._state = loader, torch.get_rng_state()

    def state(self) -> dict[str, Tensor]:
        """Of the passes, and of the loader's own generator if it has one."""
        generator = self._loader.generator
        return {"own": self._state.clone(), **({} if generator is None else {"loader": generator.get_state()})}

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`state`."""
        self._state = state["own"].clone()
        if self._loader.generator is not None and "loader" in state:
            self._loader.generator.set_state(state["loader"])

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        with self._own_state():
            iterator = enumerate(self._loader)
        while True:
            with self._own_state():
                item = next(iterator, None)
            if item is None:
                return
            yield item

    @contextmanager
    def _own_state(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._state)
            try:
                yield
            finally:
                self._state = torch.get_rng_state()


def as_pair(batch: Any, name: str) -> tuple[Any, Any]:
    """Inputs and targets of what a loader yields.

    :raises TypeError: neither a pair nor a dict with ``"labels"``.
    """
    if isinstance(batch, Mapping) and "labels" in batch:
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise TypeError(
        f"{name}: expected (x, y) or a dict with 'labels', got {type(batch).__name__}"
        + (f" of length {len(batch)}" if isinstance(batch, tuple | list) else "")
    )


class RawData(NamedTuple):
    """Training data before there is a network to pack its inputs.

    :ivar x: all inputs as the network takes them; None where they are more than the limit.
    :ivar y: all targets.
    :ivar example: some inputs.
    """

    x: Any
    y: Tensor
    example: Any


def collect_raw(train_data: Any, name: str = "train_data", limit: int | None = None) -> RawData:
    """All rows of ``(x, y)``, or of a Dataset or DataLoader, as the network takes them.

    :param limit: bytes that the inputs of a Dataset or a DataLoader may take.
    :raises TypeError: other data.
    :raises ValueError: no rows, or a batch whose inputs and targets differ in their number of rows.
    """
    if isinstance(train_data, Dataset) and not isinstance(train_data, DataLoader):
        if not isinstance(train_data, IterableDataset) and len(train_data) == 0:  # type: ignore[arg-type]
            raise ValueError(f"{name} has N = 0 rows; expected at least one")
        train_data = DataLoader(train_data, batch_size=_BATCH)
    if not isinstance(train_data, DataLoader):
        if isinstance(train_data, tuple | list) and len(train_data) == 2:
            return RawData(train_data[0], train_data[1], train_data[0])
        raise TypeError(f"{name}: expected (x, y), a Dataset or a DataLoader, got {type(train_data).__name__}")
    parts: list[list[Tensor]] = []
    targets: list[Tensor] = []
    example, structure, held = None, None, 0
    for index, batch in _Undisturbed(train_data):
        x, y = as_pair(batch, f"{name}: batch {index}")
        leaves, structure = tree_flatten(x)
        rows = {len(leaf) if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in (*leaves, y)}
        if len(rows) != 1 or None in rows:
            raise ValueError(
                f"{name}: batch {index} has inputs and targets with different numbers of rows, or a scalar; "
                "expected tensors whose first dimension is the batch (a DataLoader with a batch_size)"
            )
        targets.append(y)
        if len(y) == 0:
            continue
        example = x if example is None else example
        held += sum(leaf.numel() * leaf.element_size() for leaf in leaves)
        if limit is None or held <= limit:
            parts.append(leaves)
    if example is None:
        raise ValueError(f"{name} has no batches; expected at least one row")
    whole = limit is None or held <= limit
    inputs = tree_unflatten([torch.cat(c) for c in zip(*parts, strict=True)], structure) if whole else None
    return RawData(inputs, torch.cat(targets), example)
