"""laplace-torch, where it is installed (written for release 0.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from ntkgp.laws.protocol import Fitted, NotApplicableError, Optimum, Structure, Task

# Curvlinops multiplies the curvature with a float32 identity: law U8 says so, once.
_SINGLE = 1e-4
_SUBSETS = {"last_layer": "last_layer", "subnetwork": "subnetwork"}


class LaplaceTorchAdapter:
    """laplace-torch through its public calls, with default options where a task does not say otherwise.

    Latent moments of a classification are taken from ``_glm_predictive_distribution``, for which there is no public
    call. Functional structures use Curvlinops for their Jacobians, since their default, BackPACK, knows fewer layers.

    :param steps: of the tuning of precisions; 100 is the library's default.
    :raises ImportError: it is not installed.

    It is no dependency of this package and is imported only here.
    """

    structures: Mapping[str, Structure] = {
        "full": Structure("exact", rounding=_SINGLE),
        "full (BackPACK)": Structure("exact"),
        "last layer": Structure("last_layer", rounding=_SINGLE),
        # Its precisions are checked for one length when they are set and for another when they are used.
        "subnetwork": Structure("subnetwork", single_precision=True, rounding=_SINGLE),
        "diag": Structure("diagonal"),
        "kron": Structure("kfac"),
        "functional": Structure("exact", single_precision=True),
        "functional, subset": Structure("subset", single_precision=True),
        "ELLA": Structure("nystrom", single_precision=True),
        "VaLLA": Structure("variational", single_precision=True),
    }

    def __init__(self, steps: int = 100) -> None:
        try:
            self.name = f"laplace-torch {version('laplace-torch')}"
        except PackageNotFoundError as error:
            raise ImportError("laplace-torch is not installed: pip install laplace-torch==0.3") from error
        self.steps = steps

    def fit(self, task: Task) -> Fitted:
        """Fit at the task's hyper-parameters."""
        kinds = {"subset": _Functional, "nystrom": _Ella, "variational": _Valla}
        kind = _Functional if task.structure == "functional" else kinds.get(task.kind, _Parametric)
        return kind(task, self.steps)


class _Laplace(Fitted):
    """What all structures predict."""

    def __init__(self, task: Task, steps: int) -> None:
        self.task, self.steps = task, steps
        self.la = self._build()
        self.la.fit(task.loader)

    def _build(self) -> Any:
        raise NotImplementedError

    def _common(self, single: bool) -> dict[str, Any]:
        from laplace.curvature import BackPackGGN, CurvlinopsGGN  # type: ignore[import-not-found]

        precision = self.task.precision
        options = {
            "prior_precision": precision[:1] if single else precision,
            "backend": BackPackGGN if "BackPACK" in self.task.structure else CurvlinopsGGN,
        }
        if not self.task.classify:
            options["sigma_noise"] = torch.tensor(self.task.noise, dtype=torch.float64).sqrt()
        return options

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, covariance = self.la._glm_predictive_distribution(x) if self.task.classify else self.la(x)
        return mean.detach(), covariance.detach()

    def mean(self, x: Tensor) -> Tensor:
        """Of the GLM predictive."""
        return self._moments(x)[0]

    def covariance(self, x: Tensor) -> Tensor:
        """Of the GLM predictive."""
        return self._moments(x)[1]

    def joint_covariance(self, x: Tensor) -> Tensor:
        """``joint=True``."""
        if self.task.classify:
            raise NotApplicableError("joint predictions are of regressions only")
        return self.la(x, joint=True)[1].detach()

    def probabilities(self, x: Tensor) -> Tensor:
        """By probit."""
        return self.la(x, link_approx="probit").detach()

    def refit(self) -> None:
        """``fit`` again."""
        self.la.fit(self.task.loader)


class _Parametric(_Laplace):
    """full, kron, diag, last layer, subnetwork."""

    def _build(self) -> Any:
        from laplace import Laplace  # type: ignore[import-not-found]

        task, options = self.task, self._common(single=False)
        shape = {"kfac": "kron", "diagonal": "diag"}.get(task.kind, "full")
        options["prior_precision"] = self._own(task.precision)
        if task.kind == "subnetwork":
            options["subnetwork_indices"] = task.indices
        return Laplace(task.net, task.likelihood, _SUBSETS.get(task.kind, "all"), shape, **options)

    def _own(self, precision: Tensor) -> Tensor:
        """For the weights of the structure."""
        if self.task.kind == "last_layer":
            sizes = torch.tensor([p.numel() for p in self.task.net.parameters()])
            return precision[-2:].repeat_interleave(sizes[-2:])
        return precision[:1] if self.task.kind == "subnetwork" else precision

    def log_evidence_map(self, precision: Tensor | None = None, noise: float | None = None) -> float:
        """``log_marginal_likelihood``."""
        own = None if precision is None else self._own(precision)
        sigma = None if noise is None else torch.tensor(noise, dtype=torch.float64).sqrt()
        return float(self.la.log_marginal_likelihood(own, sigma).detach())

    def optimum(self) -> Optimum:
        """``optimize_prior_precision(method="marglik")``."""
        structure = "scalar" if self.task.kind in ("last_layer", "subnetwork") else "layerwise"
        self.la.optimize_prior_precision(method="marglik", prior_structure=structure, n_steps=self.steps)
        return Optimum(self.la.prior_precision.detach().double(), None, "theta_map")

    def samples(self, x: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """``functional_samples``."""
        return self.la.functional_samples(x, pred_type="glm", n_samples=size, generator=generator).detach()

    def random_prediction(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """``pred_type="nn"``."""
        return self.la(x, pred_type="nn", link_approx="mc", n_samples=5, generator=generator)[0].detach()

    def update(self, x: Tensor, y: Tensor) -> Fitted:
        """``fit(..., override=False)``."""
        if self.task.kind == "last_layer":
            raise NotApplicableError("last-layer classes refuse override=False")
        self.la.fit(replace(self.task, x=x, y=y).loader, override=False)
        return self


class _InFunctionSpace(_Laplace):
    """What is drawn at all inputs jointly."""

    def samples(self, x: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """``functional_samples`` with ``joint=True``."""
        return self.la.functional_samples(x, n_samples=size, generator=generator, joint=True).detach()


class _Functional(_InFunctionSpace):
    """Functional Laplace on all data or on a subset."""

    def _build(self) -> Any:
        from laplace import Laplace

        task = self.task
        size = task.subset if task.kind == "subset" else len(task.x)
        return Laplace(task.net, task.likelihood, "all", "gp", n_subset=size, **self._common(single=True))

    def log_evidence(self, precision: Tensor | None = None, noise: float | None = None) -> float:
        """``log_marginal_likelihood``, which is that of the Gaussian process by its documentation."""
        own = None if precision is None else precision[:1]
        sigma = None if noise is None else torch.tensor(noise, dtype=torch.float64).sqrt()
        return float(self.la.log_marginal_likelihood(own, sigma).detach())

    def optimum(self) -> Optimum:
        """``optimize_prior_precision(method="marglik")``."""
        self.la.optimize_prior_precision(method="marglik", n_steps=self.steps)
        return Optimum(self.la.prior_precision.detach().double().reshape(1), None, "theta_star")


class _Ella(_InFunctionSpace):
    """ELLA with all data as landmarks and as many features."""

    def _build(self) -> Any:
        from laplace import Laplace

        task, n = self.task, len(self.task.x)
        return Laplace(
            task.net, task.likelihood, "all", "gp", functional_approximation="nystrom", subsample_size=n,
            n_eigenvalues=n, **self._common(single=True),
        )  # fmt: skip


class _Valla(_InFunctionSpace):
    """VaLLA with an inducing point for each output of all data, and the ELBO as its objective."""

    def _build(self) -> Any:
        from laplace import Laplace

        task = self.task
        c = int(task.y.max()) + 1 if task.classify else task.y.shape[1]
        options = self._common(single=True) | ({} if task.classify else {"alpha": 0.0})
        return Laplace(
            task.net, task.likelihood, "all", "gp", functional_approximation="variational",
            inducing_locations=task.x.repeat_interleave(c, 0), inducing_classes=torch.arange(c).repeat(len(task.x)),
            **options,
        )  # fmt: skip

    def hyperparameters(self) -> tuple[Tensor, float]:
        """As learned."""
        noise = self.task.noise if self.task.classify else float(self.la.sigma_noise.detach()) ** 2
        return self.la.prior_precision.detach().double().reshape(1), noise
