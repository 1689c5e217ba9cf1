"""Certified intervals of the exact posterior variance, from solvers that may stop at any time."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import Any

import torch
from linear_operator.operators import DiagLinearOperator
from torch import Tensor

from ntkgp.evidence.bounds import EvidenceSystem, variance_bounds
from ntkgp.evidence.newton_cg import CURVATURE_TOLERANCE, iterative_mode
from ntkgp.likelihoods import curvature_factor
from ntkgp.models.noise import is_classification
from ntkgp.solvers import NystromPreconditioner, TangentGram, WhitenedSystem, solve

# What models do not keep themselves; no attributes, which copies and pickles of the model would carry.
_GRAMS: weakref.WeakKeyDictionary[Any, TangentGram] = weakref.WeakKeyDictionary()
_MADE_AT: weakref.WeakKeyDictionary[NystromPreconditioner, tuple[Tensor, ...]] = weakref.WeakKeyDictionary()
_DATA: weakref.WeakKeyDictionary[Any, tuple[Any, tuple[Tensor, Tensor]]] = weakref.WeakKeyDictionary()


class Certified:
    """Adds :meth:`posterior_bounds` to a model of the tangent kernel that has its training data."""

    lin: Any
    kernel: Any
    likelihood: Any
    max_memory: int

    def posterior_bounds(
        self,
        x: Any,
        max_iterations: int = 20,
        preconditioner: NystromPreconditioner | int | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Lower and upper bound of the exact latent variance at x, without a factorisation (B21, B22, C16).

        Exact means: of :class:`~ntkgp.ExactNTKGP` at this model's data, precisions and noise. With
        :math:`A = I + W^\top KW` (:math:`WW^\top = D^{-1}`, or the curvature B of a classification) and k⋆ the
        whitened cross-covariance, an iterate w of preconditioned conjugate gradients and its true residual r,

        .. math:: U = k_{\star\star} - w^\top(k_\star + r), \qquad
            U - r^\top(I + \hat K)^{-1}r \;\le\; \mathrm{Var}[h(x) | \mathrm{data}] \;\le\; U .

        The interval holds after any number of iterations; these decide its width only.

        :param x: inputs as for a prediction, T of them.
        :param max_iterations: products with A per output of an input; one more computes the residual.
        :param preconditioner: number of random training inputs of a Nyström approximation (default: about 8·√n rows),
            or one made before by ``model.nystrom(...)``, at the same data and hyper-parameters.
        :returns: (lower, upper), each of shape (T,) for C = 1, else (T, C), float64; batch dimensions of x in front.
            Moved outward by an estimate of rounding (of a float32 network's passes where no Gram is kept), and with
            ``curvature="full"`` by what the distance from the mode can change.
        :raises ValueError: a model without training data, a preconditioner of another size, or one of ``nystrom`` at
            other data or hyper-parameters, whose approximation need not stand below this kernel.

        Cost: `max_iterations` products with K, N·C × N·C, with T·C vectors: by the kept Grams where they fit in
        `max_memory`, otherwise a backward and a forward pass over the data per vector. Nothing of size (N·C)³. The
        bounds are of the tangent model, not of the network's true posterior. Artemev et al. 2021.

        >>> import gpytorch, ntkgp
        >>> x = torch.linspace(-1, 1, 30).unsqueeze(-1)
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> likelihood = gpytorch.likelihoods.GaussianLikelihood()
        >>> model = ntkgp.ExactNTKGP(x, torch.sin(3 * x), likelihood, ntkgp.LinearizedNetwork(net, x)).eval()
        >>> low, high = model.posterior_bounds(2 * x, max_iterations=5)
        >>> variance = model(2 * x).variance
        >>> bool((low <= variance * (1 + 1e-9)).all() and (variance <= high * (1 + 1e-9)).all())
        True
        """
        if not isinstance(max_iterations, int) or isinstance(max_iterations, bool) or max_iterations < 0:
            raise ValueError(f"max_iterations: expected an integer >= 0, got {max_iterations!r}")
        packed = self._inputs(x).detach()  # type: ignore[attr-defined]
        flat, c = packed.reshape(-1, packed.shape[-1]), self.lin.num_outputs
        with torch.inference_mode(False), torch.no_grad():
            flat = flat.clone() if flat.is_inference() else flat
            gram = self._tangent_gram()
            system, slack = self._system()
            if not isinstance(preconditioner, NystromPreconditioner):
                preconditioner = system.nystrom(self._landmarks(system, preconditioner, 0))
            self._check_preconditioner(preconditioner, system)
            variance = self.kernel.precision.detach().reciprocal().to(torch.float64)
            diagonal = 1.0 + system.diagonal()
            # Cross-covariances, iterate, residual, direction and its image are held at a time.
            step = max(1, self.max_memory // (8 * 8 * gram.rows * c))
            parts = []
            for points in flat.split(step):
                cross = system.reduce(self.lin.weighted_gram(points, gram.x, variance, self.max_memory).mT)
                prior = torch.einsum("g,gncc->nc", variance, self.lin.gram_diagonals(points)).reshape(-1)
                found = solve(
                    system, cross, preconditioner=preconditioner, tolerance=1e-12, max_iterations=max_iterations
                )
                parts.append(
                    variance_bounds(
                        system, cross, prior, found.solution, preconditioner, diagonal=diagonal, unit=gram.precision
                    )
                )
        shape = (*packed.shape[:-1], c) if c > 1 else packed.shape[:-1]
        low, high = (torch.cat(side).reshape(shape) for side in zip(*parts, strict=True))
        return low * math.exp(-slack), high * math.exp(slack)

    def nystrom(self, num_points: int | None = None, seed: int = 0) -> NystromPreconditioner:
        """The preconditioner of :meth:`posterior_bounds` from random training inputs.

        :param num_points: how many (default: about 8·√n rows, as far as they fit in `max_memory`).
        """
        with torch.inference_mode(False), torch.no_grad():
            system = self.whitened_system()
            found = system.nystrom(self._landmarks(system, num_points, seed))
            _MADE_AT[found] = tuple(value.clone() for value in self._determinants(system))
            return found

    def _determinants(self, system: WhitenedSystem) -> tuple[Tensor, ...]:
        """What a preconditioner is made of: inputs, precisions and noise."""
        return self._data()[0], self.kernel.precision.detach(), system.factor

    def _check_preconditioner(self, preconditioner: NystromPreconditioner, system: WhitenedSystem) -> None:
        """Refuse one that certifies nothing here."""
        if preconditioner.shape != (system.size, system.size):
            raise ValueError(
                f"preconditioner: expected {system.size} rows as the data have, got {tuple(preconditioner.shape)}"
            )
        known = _MADE_AT.get(preconditioner)
        if known is None:
            return
        for name, old, new in zip(("data", "precisions", "noise"), known, self._determinants(system), strict=True):
            if old.shape != new.shape or not torch.allclose(old, new, rtol=1e-10, atol=0.0):
                raise ValueError(
                    f"preconditioner: made at other {name}; expected model.nystrom() of the model as it is"
                )

    def _landmarks(self, system: WhitenedSystem, num_points: int | None, seed: int) -> Tensor:
        """Indices of random training inputs whose columns, basis and workspace fit in the budget by default."""
        points = system.landmarks(num_points, seed)
        if num_points is None:
            most = self.max_memory // (4 * 8 * system.size * self.lin.num_outputs)
            points = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:most].sort()[0]]
        return points if len(points) else system.landmarks(1, seed)

    def whitened_system(self) -> WhitenedSystem:
        """I + WᵀKW at the present hyper-parameters, for :func:`ntkgp.solvers.solve`; nothing is factored."""
        return self._system()[0]

    def _system(self) -> tuple[WhitenedSystem, float]:
        """The system, and r with e⁻ʳB ≼ B⋆ ≼ eʳB for its curvature B and that at the exact mode: 0 but for "full"."""
        gram, variance = self._tangent_gram(), self.kernel.precision.detach().reciprocal()
        with torch.no_grad():
            system = WhitenedSystem(
                gram.product(variance), lambda points: gram.columns(points, variance), gram.blocks(variance),
                self._noise_factor(gram.x),
            )  # fmt: skip
            if self._has_labels() and getattr(self, "curvature", "simple") == "full":
                mode = iterative_mode(system, self._prior_mean(gram.x), self._data()[1], tolerance=CURVATURE_TOLERANCE)
                slack = mode.curvature_slack(system.blocks)
                return replace(system, factor=curvature_factor(mode.logits)), slack
            return system, 0.0

    def evidence_system(self) -> EvidenceSystem:
        """What :func:`ntkgp.evidence.bounds.evidence_bounds` needs: the system with the data."""
        gram, (system, slack) = self._tangent_gram(), self._system()
        with torch.no_grad():
            offset, y = self._prior_mean(gram.x), self._data()[1]
            if not self._has_labels():
                return EvidenceSystem.gaussian(system, y.reshape(-1) - offset.reshape(-1), gram.precision)
            variant, logits = getattr(self, "curvature", "simple"), self.lin(gram.x).to(torch.float64)
            # The factor of "full" is that of the mode already.
            variant = "simple" if variant == "full" else variant
            found = EvidenceSystem.softmax(system, logits, offset, y, variant, gram.precision)
            return replace(found, curvature_slack=slack)

    def _has_labels(self) -> bool:
        """Whether the likelihood is a classification's."""
        return is_classification(self.likelihood)

    def _data(self) -> tuple[Tensor, Tensor]:
        """Packed training inputs and targets: of a loader, collected once."""
        inputs: Any = getattr(self, "train_inputs", None)
        if inputs:
            return inputs[0], self.train_targets  # type: ignore[attr-defined]
        source: Any = getattr(self, "_source", None)
        source = getattr(self, "_batches", None) if source is None else source.batches
        if source is None:
            raise ValueError("the model was given no training data, which its bounds multiply with")
        known = _DATA.get(self)
        if known is None or known[0] is not source:
            known = _DATA[self] = source, source.collect()
        return known[1]

    def _prior_mean(self, x: Tensor) -> Tensor:
        """m0 = f − Jθ̃, shape (N, C)."""
        tangent = self.lin.jvp(x, self.lin.theta).to(torch.float64)
        return self.lin(x).to(torch.float64) - tangent

    def _tangent_gram(self) -> TangentGram:
        """K at the training inputs: kept Grams of the model, or of an earlier call, or matrix-free."""
        x = self._data()[0]
        kept: Any = getattr(self, "_kept", None)
        if getattr(kept, "form", None) == "dual" and kept.x is x:
            return TangentGram(self.lin, x, self.max_memory, kept.grams)
        known = _GRAMS.get(self)
        if known is None or known.x is not x:
            with torch.inference_mode(False), torch.no_grad():
                known = _GRAMS[self] = TangentGram.best(self.lin, x, self.max_memory)
        return known

    def _noise_factor(self, x: Tensor) -> Tensor:
        """The blocks of W, shape (N, C, R)."""
        if self._has_labels():
            return curvature_factor(self.lin(x))
        n, c = len(x), self.lin.num_outputs
        noise = self.likelihood._shaped_noise_covar(torch.Size((n,) if c == 1 else (n, c)))
        if isinstance(noise, DiagLinearOperator):
            return torch.diag_embed(noise.diagonal().detach().to(torch.float64).rsqrt().reshape(n, c))
        # Noise that is correlated between the outputs of an input is the same for every input.
        block = self.likelihood._shaped_noise_covar(torch.Size((1, c))).to_dense().detach().to(torch.float64)
        root = torch.linalg.cholesky(block.reshape(c, c))
        eye = torch.eye(c, dtype=torch.float64, device=root.device)
        return torch.linalg.solve_triangular(root, eye, upper=False).mT.expand(n, c, c)
