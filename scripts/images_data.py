"""The images of scripts/images.py: which are trained on, and which are predicted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import common
from ntkgp.evaluation.shifts import COMMON_CORRUPTIONS, common_corruption, rotate

FILES = {"MNIST": "mnist", "Fashion-MNIST": "fashion_mnist"}
SEVERITIES = (1, 3, 5)
Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sizes:
    """Numbers of images, and of epochs.

    :param rotated: per angle.
    :param corrupted: per corruption and severity.
    """

    train: int = 30_000
    held_out: int = 5_000
    test: int = 2_000
    other: int = 1_000
    rotated: int = 200
    corrupted: int = 50
    step: int = 15
    epochs: int = 15
    exact: int = 200
    inducing: int = 100
    landmarks: int = 200

    @property
    def angles(self) -> range:
        """Of rotations, without 0."""
        return range(self.step, 181, self.step)


QUICK = Sizes(
    train=400, held_out=200, test=100, other=50, rotated=10, corrupted=1, step=60, exact=30, inducing=10, landmarks=50
)


class Images:
    """One set: what is trained on, and all images that are predicted, piece by piece.

    :ivar pieces: name and place of each piece of ``x``; the shifted pieces are made of the first test images.
    """

    def __init__(self, name: str, folder: Path, sizes: Sizes) -> None:
        other = next(each for each in FILES if each != name)
        generator = torch.Generator().manual_seed(0)

        def part(of: str, kind: str, count: int) -> Data:
            """Some images drawn at random."""
            images, labels = common.images(folder, FILES[of], kind)
            rows = torch.randperm(len(labels), generator=generator)[:count]
            return images[rows].float().unsqueeze(1) / 255, labels[rows]

        self.name = name
        x, y = part(name, "train", sizes.train + sizes.held_out)
        self.train: Data = (x[: sizes.train], y[: sizes.train])
        self.held_out: Data = (x[sizes.train :], y[sizes.train :])
        x, y = part(name, "test", sizes.test)
        parts: dict[str, Data] = {
            name: (x, y), "outside": part(other, "test", sizes.other),
        }  # fmt: skip
        for angle in sizes.angles:
            parts[f"{name} rotated/{angle}"] = (rotate(x[: sizes.rotated], angle).clamp(0, 1), y[: sizes.rotated])
        # Other images for each kind: more of them are seen at each severity.
        of_kind = {kind: x[i * sizes.corrupted :][: sizes.corrupted] for i, kind in enumerate(COMMON_CORRUPTIONS)}
        for severity in SEVERITIES:
            changed = [
                common_corruption(rows, kind, severity, seed=i) for i, (kind, rows) in enumerate(of_kind.items())
            ]
            parts[f"{name} corrupted/{severity}"] = (torch.cat(changed), y[: len(of_kind) * sizes.corrupted])
        self.x, self.y = (torch.cat([pair[i] for pair in parts.values()]) for i in (0, 1))
        ends = np.cumsum([len(labels) for _, labels in parts.values()]).tolist()
        self.pieces = dict(zip(parts, map(slice, [0, *ends[:-1]], ends), strict=True))
