"""Laplace: the weight-space Laplace approximation as a comparator."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from torch import Tensor, nn
from torch.distributions import Distribution

from ntkgp.baselines.laplace import selection
from ntkgp.baselines.laplace.capture import own_module
from ntkgp.baselines.laplace.evidence import Evidence, finds_mode_directly
from ntkgp.baselines.laplace.kfac import Kfac
from ntkgp.baselines.laplace.last_layer import Head, LastLayer
from ntkgp.baselines.laplace.structures import Diagonal, Dual, Primal, Structure
from ntkgp.baselines.laplace.tangent import Tangent, inputs_at_a_time, squared_errors
from ntkgp.baselines.protocol import Baseline, labelled, normal, observed
from ntkgp.likelihoods import BernoulliLikelihood, CategoricalLikelihood
from ntkgp.linearization.checks import real_numbers
from ntkgp.linearization.frozen import pass_environment
from ntkgp.models.batches import Batches

logger = logging.getLogger("ntkgp")

STRUCTURES = ("full", "kfac", "diagonal", "last_layer", "subnetwork")
EVIDENCES = ("theta_star", "theta")
PREDICTIONS = ("glm", "weights")
LINKS = ("probit", "mc", "bridge")
MEANS = ("network", "posterior")
FORMS = ("auto", "primal", "dual")
_ROWS = 1024


class Laplace(Baseline):
    r"""Laplace approximation :math:`q(\theta) = N(\tilde\theta, (H + \Lambda)^{-1})` with the generalised Gauss–Newton
    matrix :math:`H = \sum_n J_n^\top B_n J_n` at θ̃, in one of five structures:

    ==============  ====================================================================================================
    full            all of H: P × P, or NC × NC Grams where NC < P (``form``)
    kfac            :math:`G \otimes A` for each Linear and Conv layer; other weights get one exact block, up to 1000 of
                    them, and the diagonal beyond (a line in the log of ``"ntkgp"`` says which)
    diagonal        the diagonal of H, streamed
    last_layer      all of H of the last layer (``layer``), from its features where it is a linear head
    subnetwork      all of H of ``size`` weights: those of the largest ``score``, or a ``mask``; the rest stay at θ̃
    ==============  ====================================================================================================

    Each structure has its own evidence, over one precision per group (``groups="single"`` for one) and the noise of
    each output. At θ̃ it has the likelihood of the network; at θ⋆ that of the minimiser of the convex loss of the
    tangent model in the structure's weights (Antorán et al. 2022; "simple": H stays at θ̃). θ⋆ is of the exact loss, by
    conjugate gradients preconditioned with the structure's posterior (with the whole one where it is small); only the
    log-determinant is the structure's. The diagonal overstates it, so that its evidence may prune every weight where P
    is larger than N·C. Noise found at θ⋆ is that of h(θ⋆), not of the network: it goes with ``mean="posterior"``.

    :param net, likelihood, common: groups, output, max_memory, seed, progress as in :class:`~ntkgp.baselines.Baseline`.
    :param structure: of H, see above.
    :param evidence: ``"theta_star"``, ``"theta"``, or None to keep ``precision`` and ``noise``.
    :param prediction: ``"glm"`` (outputs of the tangent model, Gaussian) or ``"weights"`` (the network itself at
        weights drawn from q).
    :param mean: ``"network"`` (around θ̃) or ``"posterior"`` (around θ⋆).
    :param link: of classification with ``"glm"``: ``"probit"``, ``"mc"``, ``"bridge"`` (softmax only).
    :param precision: where the evidence starts, or what is used without: a number or one per group.
    :param noise: likewise for σ², a number or one per output; the network's training error by default.
    :param form: ``"auto"``, ``"primal"`` or ``"dual"``, of ``structure="full"``.
    :param layer: name of the module taken as last layer.
    :param size: of the subnetwork, a number of weights.
    :param score: ``"laplace"`` or ``"swag"`` (marginal variances of diagonal approximations) or ``"random"``.
    :param mask: of the subnetwork, (P,) booleans or (k,) indices in the order of ``lin.theta``; instead of `score`.
    :param num_samples: of weights for ``prediction="weights"`` and of outputs for ``link="mc"``.
    :param swag_snapshots, swag_lr, swag_weight_decay: of ``score="swag"``: SGD with momentum 0.9 from θ̃, a snapshot per
        epoch.
    :ivar precision: of each group, (G,); 1 or the start for groups outside the structure.
    :ivar noise: of each output, (C,).
    :ivar log_evidences: at ``"theta"`` and ``"theta_star"`` (left out where nothing asks for θ⋆ and it would take many
        products: rows that do not fit in memory, or large approximate structures). Their difference,
        :math:`\tfrac12\lVert\theta_\star - \tilde\theta\rVert^2_{H + \Lambda}` for a Gaussian likelihood and full H,
        says how wrong the one at θ̃ is.
    :ivar theta_star: all weights, (P,); those outside the structure as in θ̃.
    :raises ValueError: an unknown option, or one that the structure does not have; a `max_memory` that does not hold
        the structure, some vectors of its weights and a pass of one input: the message gives the smallest.

    Cost: one pass with C backward chains per row, then per evaluation of the evidence at θ⋆ a few passes (products with
    kept rows where they fit in a quarter of `max_memory`) and a factorisation: P³ or (NC)³ (full), p³ (subnetwork),
    C·F³ (last layer; (CF)³ for softmax), O³ + I³ per layer (kfac), P (diagonal).

    Sources: MacKay 1992; Immer et al. 2021 (GLM predictive); Antorán et al. 2022 (θ⋆); Daxberger et al. 2021
    (subnetworks); Martens & Grosse 2015, Eschenhagen et al. 2023 (kfac); Maddox et al. 2019 (SWAG).

    >>> x = torch.linspace(-1, 1, 20).unsqueeze(-1)
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    >>> la = Laplace(net, structure="last_layer").fit((x, torch.sin(3 * x)))
    >>> la.predict(torch.zeros(2, 1)).latent.mean.shape
    torch.Size([2])
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: str = "regression",
        *,
        structure: str = "full",
        evidence: str | None = "theta_star",
        prediction: str = "glm",
        mean: str = "network",
        link: str = "probit",
        precision: float | Tensor = 1.0,
        noise: float | Tensor | None = None,
        form: str = "auto",
        layer: str | None = None,
        size: int | None = None,
        score: str = "laplace",
        mask: Tensor | None = None,
        num_samples: int = 200,
        swag_snapshots: int = 40,
        swag_lr: float = 0.01,
        swag_weight_decay: float = 3e-4,
        **common: Any,
    ) -> None:
        super().__init__(net, likelihood, **common)
        _among("structure", structure, STRUCTURES)
        _among("prediction", prediction, PREDICTIONS)
        _among("mean", mean, MEANS)
        _among("form", form, FORMS)
        _among("score", score, selection.SCORES)
        if evidence is not None:
            _among("evidence", evidence, EVIDENCES)
        if structure != "subnetwork" and (size is not None or mask is not None):
            raise ValueError(f"size, mask: expected for structure='subnetwork' only, got structure={structure!r}")
        if structure == "subnetwork" and (size is None) == (mask is None):
            raise ValueError("structure='subnetwork' needs either size (with score) or mask")
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ValueError(f"size: expected a positive integer, got {size!r}")
        if structure != "last_layer" and layer is not None:
            raise ValueError(f"layer: expected for structure='last_layer' only, got structure={structure!r}")
        _among("link", link, LINKS)
        if noise is not None and likelihood == "classification":
            raise ValueError("noise: expected for likelihood='regression' only")
        for name, number in (("num_samples", num_samples), ("swag_snapshots", swag_snapshots)):
            if not isinstance(number, int) or number < 2:
                raise ValueError(f"{name}: expected an integer of 2 or more, got {number!r}")
        self.structure, self.evidence, self.prediction, self.mean = structure, evidence, prediction, mean
        self.link, self.form, self.num_samples = link, form, num_samples
        self._start_precision, self._start_noise = precision, noise
        self._layer, self._size, self._score, self._mask = layer, size, score, mask
        self._swag = (swag_snapshots, swag_lr, swag_weight_decay)
        self._curvature: Structure | None = None

    @property
    def curvature(self) -> Structure:
        """The fitted structure.

        :raises RuntimeError: before the first fit.
        """
        if self._curvature is None:
            raise RuntimeError("Laplace: call fit(train_data) first")
        return self._curvature

    def _fit(self, batches: Batches) -> None:
        self._example = next(iter(batches))[0][:2].clone()
        precision = self._positive("precision", self._start_precision, len(self.lin.groups))
        given = self._start_noise
        noise = self._positive("noise", 1.0 if given is None else given, self._num_channels)
        with torch.no_grad():
            structure, tangent = self._gather(batches, precision, noise)
            evidence = Evidence(structure, tangent, self.evidence or "theta_star")
            if given is None and not self.is_classification:
                noise = (squared_errors(tangent) / tangent.num_data).clamp_min(1e-12)
            if self.evidence is not None:
                precision, noise = evidence.maximise(precision, noise, fit_noise=True)
            self._finish(structure, tangent, precision, noise)

    @property
    def _num_channels(self) -> int:
        return 1 if self.is_classification else self.lin.num_outputs

    def _finish(self, structure: Structure, tangent: Tangent, precision: Tensor, noise: Tensor) -> None:
        """The evidences and θ⋆ at the final precisions; θ⋆ not where it is unasked for and takes many passes."""
        star = self.evidence == "theta_star" or self.mean == "posterior" or finds_mode_directly(structure, tangent)
        self.log_evidences, self._delta = {}, None
        for at in EVIDENCES[not star :][::-1]:
            found = Evidence(structure, tangent, at).evaluate(precision, noise)
            self.log_evidences[at] = found.value
            if at == "theta_star":
                self._delta = found.delta
        self.precision, self.noise = precision, noise
        if isinstance(structure, Dual):
            structure.views = None
        self._curvature = structure
        logger.info("Laplace %s: log evidence %.4f", self.structure, self.log_evidence)

    @property
    def log_evidence(self) -> float:
        """At the point that ``evidence`` names; for None at θ⋆ where it is known, else at θ̃."""
        return self.log_evidences.get(self.evidence or "theta_star", self.log_evidences["theta"])

    def _positive(self, name: str, value: float | Tensor, count: int) -> Tensor:
        found = real_numbers(value, name)
        if found.ndim == 0:
            found = found.expand(count).clone()
        if found.shape != (count,) or not bool(((found > 0) & found.isfinite()).all()):
            raise ValueError(f"{name}: expected a positive number or {count} of them, got {value}")
        return found

    def _gather(self, batches: Batches, precision: Tensor, noise: Tensor) -> tuple[Structure, Tangent]:
        """The structure with what the data say of it, and the data."""
        columns, features = None, None
        if self.structure == "last_layer":
            head = Head(self.lin, self._example, self._layer)
            columns, features = head.columns, head.features if head.is_linear else None
            structure = self._head_structure(head)
        elif self.structure == "subnetwork":
            self._check_subnetwork()
            columns = self._select(batches, precision, noise)
            structure = Primal(self.lin, columns, self.is_classification, self.max_memory)
        else:
            count = self._tangent(batches, self.max_memory).count() if self.structure == "full" else 0
            structure = self._over_all(self._is_dual(count), count)
        return structure, self._collected(structure, batches, columns, features)

    def _check_subnetwork(self) -> None:
        """Refuse a budget that only the scores of the weights would fit in."""
        if self._size is None or self._size > self.lin.num_parameters or self._score != "laplace":
            return
        columns = torch.arange(self._size)
        parts: list[Structure] = [
            Primal(self.lin, columns, self.is_classification, self.max_memory),
            Diagonal(self.lin, None, self.is_classification, self.max_memory),
        ]
        max((self._sized(part) for part in parts), key=Structure.smallest_budget).check_memory()

    def _sized(self, structure: Structure) -> Structure:
        """The structure, once it knows whether θ⋆ is sought."""
        structure.seeks_mode = self.evidence == "theta_star" or self.mean == "posterior"
        return structure

    def _tangent(
        self, batches: Batches, max_memory: int, columns: Tensor | None = None, features: Any = None
    ) -> Tangent:
        return Tangent(self.lin, batches, self.is_classification, max_memory, columns, features, self.progress)

    def _collected(
        self, structure: Structure, batches: Batches, columns: Tensor | None = None, features: Any = None
    ) -> Tangent:
        """The data, once a structure has gathered what they say."""
        self._sized(structure).check_memory()
        tangent = self._tangent(batches, structure.room, columns, features)
        structure.collect(tangent)
        return tangent

    def _head_structure(self, head: Head) -> Structure:
        if head.is_linear:
            return LastLayer(self.lin, head, self.is_classification, self.max_memory)
        return Primal(self.lin, head.columns, self.is_classification, self.max_memory)

    def _over_all(self, dual: bool, num_data: int = 0) -> Structure:
        if self.structure == "kfac":
            return Kfac(self.lin, self._example, self.is_classification, self.max_memory)
        if dual:
            return Dual(self.lin, num_data, self.is_classification, self.max_memory)
        kind = Diagonal if self.structure == "diagonal" else Primal
        return kind(self.lin, None, self.is_classification, self.max_memory)

    def _is_dual(self, num_data: int) -> bool:
        if self.structure != "full" or self.form != "auto":
            return self.structure == "full" and self.form == "dual"
        return num_data * self.lin.num_outputs < self.lin.num_parameters

    def _select(self, batches: Batches, precision: Tensor, noise: Tensor) -> Tensor:
        if self._mask is not None:
            return selection.chosen_by_mask(self.lin, self._mask)
        p = self.lin.num_parameters
        assert self._size is not None
        if self._size > p:
            raise ValueError(f"size: expected at most P = {p} weights, got {self._size}")
        if self._score == "random":
            order = torch.randperm(p, generator=torch.Generator().manual_seed(self.seed))
            return order[: self._size].sort().values
        if self._score == "laplace":
            diagonal = Diagonal(self.lin, None, self.is_classification, self.max_memory)
            tangent = self._collected(diagonal, batches)
            if self._start_noise is None and not self.is_classification:
                noise = (squared_errors(tangent) / tangent.num_data).clamp_min(1e-12)
            return selection.largest(selection.laplace_scores(diagonal, precision, 1 / noise), self._size)
        snapshots, lr, decay = self._swag
        scores = selection.swag_scores(
            self.lin, batches, self.is_classification, snapshots=snapshots, lr=lr, weight_decay=decay, seed=self.seed
        )
        return selection.largest(scores, self._size)

    @property
    def theta_star(self) -> Tensor:
        """θ⋆ of the structure's weights within θ̃, (P,)."""
        columns = self.curvature.columns
        if self._delta is None:
            raise RuntimeError("theta_star: was not computed; expected evidence='theta_star' or mean='posterior'")
        return self.lin.theta.double().index_add(0, columns, self._delta)

    def sample_weights(self, num_samples: int, seed: int | None = None) -> Tensor:
        """Draws of all weights, (S, P), from N(θ̃, Σ), or N(θ⋆, Σ) for ``mean="posterior"``; others stay at θ̃."""
        generator = torch.Generator().manual_seed(self.seed if seed is None else seed)
        centre = self.theta_star if self.mean == "posterior" else self.lin.theta.double()
        with torch.no_grad():
            moves = self.curvature.sample(num_samples, generator)
        return centre.repeat(num_samples, 1).index_add(1, self.curvature.columns, moves)

    def _predict(self, x: Tensor) -> Distribution:
        return self._predict_sampled(x) if self.prediction == "weights" else self._predict_linearised(x)

    def _predict_linearised(self, x: Tensor) -> Distribution:
        chunks = x.split(inputs_at_a_time(self.lin, self.curvature.room))
        mean = torch.cat([self.lin(chunk).double() for chunk in chunks])
        if self.mean == "posterior":
            move = (self.theta_star - self.lin.theta.double()).to(self.lin.dtype)
            mean = mean + torch.cat([self.lin.jvp(chunk, move).double() for chunk in chunks])
        covariance = _definite(self.curvature.covariance(x))
        if not self.is_classification:
            return observed(mean, covariance, self.noise)
        return labelled(self._probabilities(mean, covariance), normal(mean, covariance))

    def _probabilities(self, mean: Tensor, covariance: Tensor) -> Tensor:
        c = mean.shape[1]
        if c == 1:
            bernoulli = BernoulliLikelihood(link=self.link, num_samples=self.num_samples, seed=self.seed)
            return bernoulli(MultivariateNormal(mean, covariance)).probs.squeeze(-1)
        softmax = CategoricalLikelihood(c, link=self.link, num_samples=self.num_samples, seed=self.seed)
        return softmax(MultitaskMultivariateNormal(mean.unsqueeze(1), covariance)).probs.squeeze(1)

    def _predict_sampled(self, x: Tensor) -> Distribution:
        """Moments of the network's outputs over draws of the weights; the average of their probabilities."""
        draws = self._outputs_at(self.sample_weights(self.num_samples), x)  # shape: (S, N, C)
        mean = draws.mean(0)
        centred = draws - mean
        covariance = _definite(torch.einsum("snc,snd->ncd", centred, centred) / (len(draws) - 1))
        if not self.is_classification:
            return observed(mean, covariance, self.noise)
        probabilities = draws.sigmoid().mean(0)[:, 0] if draws.shape[-1] == 1 else draws.softmax(-1).mean(0)
        return labelled(probabilities, normal(mean, covariance))

    def _outputs_at(self, thetas: Tensor, x: Tensor) -> Tensor:
        module = own_module(self.lin)
        weights = [p for p in module.parameters() if p.requires_grad]
        sizes = [p.numel() for p in weights]
        out = torch.empty(len(thetas), len(x), self.lin.num_outputs, dtype=torch.float64)
        for s, theta in enumerate(thetas):
            with torch.no_grad():
                for p, part in zip(weights, theta.split(sizes), strict=True):
                    p.copy_(part.reshape(p.shape))
            start = 0
            for chunk in x.split(_ROWS):
                with pass_environment(x.device), torch.no_grad():
                    f = self.lin.frozen.run(module, self.lin.packing.leaves(chunk))
                out[s, start : start + len(chunk)] = f.reshape(len(chunk), -1).double()
                start += len(chunk)
        return out

    def _get_state(self) -> dict[str, Tensor]:
        example = self.lin.unpack(self._example)
        values = [self.log_evidences.get(at, torch.nan) for at in EVIDENCES]
        state = {
            "precision": self.precision, "noise": self.noise, "theta": self.lin.theta,
            "columns": self.curvature.columns, "example": example if isinstance(example, Tensor) else self._example,
            "log_evidences": torch.tensor(values, dtype=torch.float64),
            "structure": torch.tensor(STRUCTURES.index(self.structure)),
        }  # fmt: skip
        state |= {} if self._delta is None else {"delta": self._delta}
        return state | {f"curvature.{key}": value for key, value in self.curvature.state().items()}

    def _set_state(self, state: dict[str, Tensor]) -> None:
        own = STRUCTURES[int(state["structure"])]
        if own != self.structure:
            raise ValueError(f"state: of structure={own!r}, not {self.structure!r}")
        if state["theta"].shape != self.lin.theta.shape or not torch.equal(state["theta"], self.lin.theta):
            raise ValueError("state: was fitted to a network with other weights")
        shapes = {"precision": (len(self.lin.groups),), "noise": (self._num_channels,)}
        for name, shape in shapes.items():
            if tuple(state[name].shape) != shape:
                raise ValueError(f"state: expected {name} of shape {shape}, got {tuple(state[name].shape)}")
        self._example = self.lin.pack(state["example"]).double()
        curvature = {key.removeprefix("curvature."): v for key, v in state.items() if key.startswith("curvature.")}
        structure = self._empty(state["columns"], dual="grams" in curvature)
        try:
            structure.load(curvature)
        except KeyError as missing:
            raise ValueError(f"state: has no {missing} of structure={self.structure!r}") from None
        self.precision, self.noise, self._delta = state["precision"], state["noise"], state.get("delta")
        structure.update(self.precision, 1 / self.noise)
        values = dict(zip(EVIDENCES, state["log_evidences"].tolist(), strict=True))
        self.log_evidences = {at: value for at, value in values.items() if not math.isnan(value)}
        self._curvature = structure

    def _empty(self, columns: Tensor, dual: bool) -> Structure:
        if self.structure == "last_layer":
            return self._head_structure(Head(self.lin, self._example, self._layer))
        if self.structure == "subnetwork":
            return Primal(self.lin, columns, self.is_classification, self.max_memory)
        return self._over_all(dual)


def _among(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name}: expected one of {options}, got {value!r}")


def _definite(covariance: Tensor) -> Tensor:
    """Covariances with as little added to the diagonal as their Cholesky factor needs; nothing for definite ones."""
    covariance = (covariance + covariance.mT) / 2
    singular = torch.linalg.cholesky_ex(covariance).info != 0
    if not bool(singular.any()):
        return covariance
    scale = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    added = torch.where(singular, 1e-10 * scale, 0.0)
    return covariance + torch.diag_embed(added.unsqueeze(-1).expand(covariance.shape[:-1]))
