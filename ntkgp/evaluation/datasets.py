"""Small real data sets that need no download, a one-dimensional toy with a gap, corruptions, and UCI benchmark files.

Everything is returned as tensors, standardised by its training part, with what is needed to go back to the original
units. The same arguments always give the same tensors, and the global random state is never read or changed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "CORRUPTIONS",
    "ClassificationData",
    "RegressionData",
    "UCIData",
    "corrupt",
    "diabetes",
    "digits",
    "toy_gap",
    "toy_gap_function",
    "uci",
]


@dataclass(frozen=True)
class RegressionData:
    """Standardised inputs ``(N, D)`` and targets ``(N,)``; original targets are ``y·target_std + target_mean``."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    target_mean: float
    target_std: float


@dataclass(frozen=True)
class ClassificationData:
    """Inputs ``(N, …)`` and integer labels ``(N,)`` from 0 to ``num_classes − 1``."""

    name: str
    x_train: Tensor
    labels_train: Tensor
    x_test: Tensor
    labels_test: Tensor
    num_classes: int


def diabetes(seed: int = 0, test_size: int = 111, dtype: torch.dtype = torch.float32) -> RegressionData:
    """
    Disease progression of 442 patients from ten measurements (Efron et al., 2004), as shipped with scikit-learn.

    :param seed: of the random split.
    :param test_size: number of test patients, 1 to 441.
    :param dtype: of the tensors.
    :return: :class:`RegressionData`, inputs and targets standardised by the training part.
    :raises ValueError: a test size out of range.

    Example:
        >>> data = diabetes()
        >>> data.x_train.shape, data.x_test.shape
        (torch.Size([331, 10]), torch.Size([111, 10]))
    """
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True, scaled=False)
    train, test = _split(len(x), test_size, seed)
    return _standardised("diabetes", x, y, train, test, dtype)


def digits(seed: int = 0, train_size: int = 250, dtype: torch.dtype = torch.float32) -> ClassificationData:
    """
    Handwritten digits, 1797 images of 8 × 8 pixels in [0, 1] (Alpaydin and Kaynak, 1998), as shipped with scikit-learn.

    :param seed: of the random split.
    :param train_size: number of training images, 1 to 1796; all others are test images.
    :param dtype: of the images.
    :return: :class:`ClassificationData` with images ``(N, 1, 8, 8)``.
    :raises ValueError: a training size out of range.

    Example:
        >>> data = digits(train_size=200)
        >>> data.x_train.shape, data.x_test.shape, data.num_classes
        (torch.Size([200, 1, 8, 8]), torch.Size([1597, 1, 8, 8]), 10)
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    if not 1 <= train_size < len(images):
        raise ValueError(f"train_size: expected 1 to {len(images) - 1}, got {train_size}")
    train, test = _split(len(images), len(images) - train_size, seed)
    x = torch.as_tensor(images / 16.0, dtype=dtype).reshape(-1, 1, 8, 8)
    y = torch.as_tensor(labels, dtype=torch.long)
    return ClassificationData("digits", x[train], y[train], x[test], y[test], 10)


def toy_gap_function(x: Tensor) -> Tensor:
    """Noise-free function of :func:`toy_gap`: ``sin(2x) + x/4``."""
    return torch.sin(2 * x) + x / 4


def toy_gap(
    n: int = 60, seed: int = 0, noise: float = 0.15, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """
    One-dimensional regression with no data in the middle: inputs uniform on [−3, −1] and [1.2, 3].

    Targets are ``sin(2x) + x/4`` plus Gaussian noise.

    :param n: number of points; half (rounded down) lie left of the gap.
    :param seed: of inputs and noise.
    :param noise: standard deviation of the noise.
    :param dtype: of the tensors.
    :return: inputs ``(n, 1)``, sorted, and targets ``(n,)``.
    :raises ValueError: fewer than two points, a negative noise.

    Example:
        >>> x, y = toy_gap(40, seed=1)
        >>> x.shape, y.shape, bool(((x > -1) & (x < 1.2)).any())
        (torch.Size([40, 1]), torch.Size([40]), False)
    """
    if n < 2:
        raise ValueError(f"n: expected at least 2 points, got {n}")
    if noise < 0:
        raise ValueError(f"noise: expected a standard deviation, got {noise}")
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    left = n // 2
    x = torch.cat([-3 + 2 * u[:left], 1.2 + 1.8 * u[left:]]).sort().values
    y = toy_gap_function(x) + noise * torch.randn(n, generator=generator, dtype=torch.float64)
    return x.unsqueeze(-1).to(dtype), y.to(dtype)


def _noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise of standard deviation 0.3, clipped to [0, 1]."""
    return (images + 0.3 * torch.randn(images.shape, generator=generator, dtype=images.dtype)).clamp(0, 1)


def _blur(images: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian blur with a standard deviation of one pixel."""
    offsets = torch.arange(-2, 3, dtype=images.dtype)
    kernel = torch.exp(-0.5 * offsets.square())
    kernel = torch.outer(kernel, kernel)
    channels = images.shape[1]
    weight = (kernel / kernel.sum()).expand(channels, 1, 5, 5)
    return torch.nn.functional.conv2d(images, weight, padding=2, groups=channels)


def _shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moved by a quarter of the image along one of the four directions, drawn per image; zeros come in."""
    step = max(1, images.shape[-1] // 4)
    moved = torch.zeros_like(images)
    direction = torch.randint(4, (len(images),), generator=generator)
    moved[direction == 0, ..., step:] = images[direction == 0, ..., :-step]
    moved[direction == 1, ..., :-step] = images[direction == 1, ..., step:]
    moved[direction == 2, ..., step:, :] = images[direction == 2, ..., :-step, :]
    moved[direction == 3, ..., :-step, :] = images[direction == 3, ..., step:, :]
    return moved


def _inverted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Black and white exchanged."""
    return 1 - images


_CORRUPTIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "shift": _shift,
    "inverted": _inverted,
}
CORRUPTIONS = tuple(_CORRUPTIONS)
"""Names that :func:`corrupt` knows."""


def corrupt(images: Tensor, kind: str, seed: int = 0) -> Tensor:
    """
    Images no longer like the training images, for out-of-distribution scores.

    ``"noise"`` adds Gaussian noise of standard deviation 0.3, ``"blur"`` convolves with a Gaussian of one pixel,
    ``"shift"`` moves by a quarter of the image in a random direction, ``"inverted"`` exchanges black and white.

    :param images: ``(N, channels, height, width)`` in [0, 1], at least 4 pixels wide and high.
    :param kind: one of :data:`CORRUPTIONS`.
    :param seed: of the random ones.
    :return: corrupted images, same shape and dtype, in [0, 1].
    :raises ValueError: an unknown kind, images of another shape or range.

    Example:
        >>> corrupt(torch.zeros(2, 1, 8, 8), "inverted").unique()
        tensor([1.])
    """
    if kind not in _CORRUPTIONS:
        raise ValueError(f"kind: expected one of {', '.join(CORRUPTIONS)}, got {kind!r}")
    if images.dim() != 4 or not images.is_floating_point() or min(images.shape[-2:]) < 4:
        raise ValueError(
            "images: expected floating-point (N, channels, height, width) of at least 4 x 4 pixels, "
            f"got {tuple(images.shape)} {images.dtype}"
        )
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError("images: expected values in [0, 1]")
    return _CORRUPTIONS[kind](images, torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class UCIData:
    """
    A UCI regression set with the published splits: x ``(n, D)`` and y ``(n,)`` in raw units, float64.

    ``standard_splits`` and ``gap_splits`` are tuples of (training indices, test indices). Gap split j leaves out the
    middle third of the data along feature j (Foong et al., 2019).
    """

    name: str
    x: Tensor
    y: Tensor
    standard_splits: tuple[tuple[Tensor, Tensor], ...]
    gap_splits: tuple[tuple[Tensor, Tensor], ...]

    def standard(self, index: int, dtype: torch.dtype = torch.float32) -> RegressionData:
        """
        Return one standard split, standardised by its training part (a standard deviation below 1e-10 counts as 1).

        :param index: number of the split.
        :param dtype: of the tensors.
        :return: :class:`RegressionData`.
        :raises IndexError: no split of that number.
        """
        return self._take("standard", self.standard_splits, index, dtype)

    def gap(self, index: int, dtype: torch.dtype = torch.float32) -> RegressionData:
        """
        Return one gap split, standardised by its training part (a standard deviation below 1e-10 counts as 1).

        :param index: number of the feature along which the middle third is the test set.
        :param dtype: of the tensors.
        :return: :class:`RegressionData`.
        :raises IndexError: no split of that number.
        """
        return self._take("gap", self.gap_splits, index, dtype)

    def _take(
        self, kind: str, splits: tuple[tuple[Tensor, Tensor], ...], index: int, dtype: torch.dtype
    ) -> RegressionData:
        if not 0 <= index < len(splits):
            raise IndexError(f"index: {self.name} has {len(splits)} {kind} splits, got {index}")
        train, test = splits[index]
        name = f"{self.name} {kind} {index}"
        return _standardised(name, self.x.numpy(), self.y.numpy(), train, test, dtype)


def uci(name: str, folder: str | Path | None = None) -> UCIData:
    """
    Load a UCI regression set from ``<folder>/uci/<name>.npz`` or ``<folder>/<name>.npz``.

    The file holds ``X``, ``y`` and either index arrays ``std_train``, ``std_test`` and optionally ``gap_train``,
    ``gap_test`` (one split a row), or ``test_mask`` (a column of packed bits per fold) and ``n``.

    :param name: file name without ``.npz``, for example ``"concrete"``.
    :param folder: where the files are; default: the environment variable ``NTKGP_DATA``.
    :return: :class:`UCIData`.
    :raises FileNotFoundError: no folder named, or no such file in it.
    :raises ValueError: a file without the expected arrays.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     rows = {"std_train": [[0, 1, 2]], "std_test": [[3]]}
    ...     np.savez(Path(folder) / "four.npz", X=np.eye(4), y=np.arange(4.0), **rows)
    ...     uci("four", folder).standard(0).x_train.shape
    torch.Size([3, 4])
    """
    place = folder if folder is not None else os.environ.get("NTKGP_DATA")
    if place is None:
        raise FileNotFoundError(
            f"folder: none given for {name!r}; pass the folder with the UCI .npz files or set NTKGP_DATA to it"
        )
    candidates = [Path(place) / "uci" / f"{name}.npz", Path(place) / f"{name}.npz"]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"folder: no {name}.npz in {Path(place) / 'uci'} or {Path(place)}")
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    if not {"X", "y"} <= arrays.keys() or not ({"std_train", "std_test"} <= arrays.keys() or "test_mask" in arrays):
        raise ValueError(f"{path}: expected X, y and std_train, std_test or test_mask, got {sorted(arrays)}")
    x = torch.as_tensor(arrays["X"].astype(np.float64))
    y = torch.as_tensor(arrays["y"].astype(np.float64))
    if "test_mask" in arrays:
        return UCIData(name, x, y, _folds(arrays["test_mask"], len(x)), ())
    gaps = _indices(arrays, "gap") if "gap_train" in arrays else ()
    return UCIData(name, x, y, _indices(arrays, "std"), gaps)


def _indices(arrays: dict[str, np.ndarray], kind: str) -> tuple[tuple[Tensor, Tensor], ...]:
    """Splits stored as one row of training and one of test indices."""
    both = zip(arrays[f"{kind}_train"], arrays[f"{kind}_test"], strict=True)
    return tuple((torch.as_tensor(a.astype(np.int64)), torch.as_tensor(b.astype(np.int64))) for a, b in both)


def _folds(packed: np.ndarray, n: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Splits stored as packed bits, one column per fold, 1 = test point."""
    mask = torch.as_tensor(np.unpackbits(packed, axis=0)[:n].astype(bool))
    return tuple((torch.nonzero(~column).squeeze(-1), torch.nonzero(column).squeeze(-1)) for column in mask.T)


def _split(n: int, test_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random training and test indices."""
    if not 1 <= test_size < n:
        raise ValueError(f"test_size: expected 1 to {n - 1}, got {test_size}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[test_size:], order[:test_size]


def _standardised(
    name: str, x: np.ndarray, y: np.ndarray, train: Tensor, test: Tensor, dtype: torch.dtype
) -> RegressionData:
    """Inputs and targets with mean 0 and standard deviation 1 on the training part; constant columns keep scale 1."""
    inputs, targets = torch.as_tensor(x, dtype=torch.float64), torch.as_tensor(y, dtype=torch.float64)
    mean, scale = inputs[train].mean(0), inputs[train].std(0, correction=0)
    scale = torch.where(scale < 1e-10, torch.ones_like(scale), scale)
    target_mean, target_std = float(targets[train].mean()), float(targets[train].std(correction=0))
    if not math.isfinite(target_std) or target_std < 1e-10:
        target_std = 1.0
    inputs, targets = ((inputs - mean) / scale).to(dtype), ((targets - target_mean) / target_std).to(dtype)
    return RegressionData(name, inputs[train], targets[train], inputs[test], targets[test], target_mean, target_std)
