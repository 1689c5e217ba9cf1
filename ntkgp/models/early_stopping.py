"""Early stopping of a pass over the data: the sums of the part that predicts validation data best."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ntkgp.checkpoint import moved_to
from ntkgp.evidence.collapsed import Collapsed
from ntkgp.evidence.single_pass import current_noise
from ntkgp.evidence.streaming import StreamStatistics
from ntkgp.linearization.nystrom import LandmarkFeatures
from ntkgp.models.batches import Batches
from ntkgp.models.posterior import LowRankCovariance

if TYPE_CHECKING:
    from collections.abc import Callable

    from ntkgp.models.nystrom import NystromNTKGP


class EarlyStopping:
    """Looks at validation data during a pass and keeps the best sums."""

    def __init__(self, model: NystromNTKGP, features: LandmarkFeatures, batches: Batches, validation: Batches) -> None:
        self._model, self._features, self._total = model, features, batches.num_data
        self._x, self._y = validation.collect()
        self._psi = features.visit(self._x, diagonals=False)[0].flatten(0, 1)
        self._found: tuple[float, StreamStatistics, float] | None = None
        self._next = 0

    def state(self) -> dict[str, Any]:
        """As tensors and plain values."""
        best = None
        if self._found is not None:
            loss, statistics, scale = self._found
            best = {"loss": loss, "statistics": dict(statistics.__dict__), "scale": scale}
        return {"next": self._next, "best": best}

    def set_state(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        self._next, best = state["next"], state["best"]
        if best is not None:
            statistics = moved_to(best["statistics"], self._features.landmarks.device)
            self._found = best["loss"], StreamStatistics(**statistics), best["scale"]

    def every(self, rows: int) -> Callable[[StreamStatistics], bool]:
        """A callback that looks whenever so many more rows were seen."""
        if rows < 1:
            raise ValueError(f"search_frequency: expected a positive number, got {rows}")
        self._next = rows

        def look(statistics: StreamStatistics) -> bool:
            if statistics.num_data >= self._next and statistics.num_data < self._total:
                self._next = statistics.num_data + rows
                self._look(statistics)
            return False

        return look

    def _look(self, statistics: StreamStatistics) -> None:
        model, scale = self._model, statistics.num_data / self._total
        noise = current_noise(model.likelihood, model.num_outputs, statistics).values
        noise = noise if noise.numel() else torch.ones_like(statistics.counts)
        with torch.no_grad():
            precision = model.kernel.precision.detach() * scale
            found = Collapsed(statistics.sums(), self._features.group, self._features.stacked, precision, noise)
            phi = found.features(self._psi)
            latent = model._distribution(
                model._reported(self._x, phi, found), LowRankCovariance(found.covariance_root(phi))
            )
            loss = -float(model.likelihood.log_marginal(self._y, latent).mean())
        if self._found is None or loss < self._found[0]:
            self._found = loss, statistics.clone(), scale

    def best(self, statistics: StreamStatistics) -> tuple[StreamStatistics, float]:
        """The best sums and their share of the data."""
        self._look(statistics)
        assert self._found is not None
        return self._found[1], self._found[2]
