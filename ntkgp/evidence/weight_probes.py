"""Expectation steps of the sampled evidence in weight space: any number of rows, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ntkgp.distributed import OrderedFold, Turns, sum_over_batches
from ntkgp.evidence.probes import Expectation, Settings
from ntkgp.evidence.problem import NoiseModel
from ntkgp.likelihoods import curvature_factor, log_likelihood, residual, whitened_targets
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.statistics import jacobian_rows
from ntkgp.solvers import solve
from ntkgp.solvers.tangent import pull, push

# Number of a batch, the batch, standard normal numbers for its rows, and which of its inputs are landmarks.
_Drawn = tuple[int, "_Rows", Tensor, Tensor]
_NEWTON_STEPS = 50
_HALVINGS = 20


class _Rows:
    """One batch: Jacobian products by its rows, where they fit in the budget, or by passes; what the network says."""

    def __init__(self, lin: LinearizedNetwork, x: Tensor, y: Tensor, budget: int) -> None:
        self.lin, self.x, self.y = lin, x, y
        self._budget = budget

    @cached_property
    def jacobian(self) -> Tensor | None:
        """J, shape (B·C, P), or None where the passes are left to each vector."""
        # The rows are made with about as much again on the way.
        if 2 * 8 * len(self.x) * self.lin.num_outputs * self.lin.num_parameters > self._budget:
            return None
        return jacobian_rows(self.lin, self.x, self._budget).flatten(0, 1)

    @cached_property
    def logits(self) -> Tensor:
        """f, shape (B, C)."""
        return self.lin(self.x).to(torch.float64)

    @cached_property
    def offset(self) -> Tensor:
        """m0 = f − Jθ̃, shape (B, C)."""
        return self.logits - self.push(self.lin.theta.to(torch.float64).unsqueeze(0)).squeeze(-1)

    def push(self, v: Tensor) -> Tensor:
        """J V, (k, P) -> (B, C, k)."""
        if self.jacobian is None:
            return push(self.lin, self.x, v)
        return (self.jacobian @ v.mT).reshape(len(self.x), -1, len(v))

    def pull(self, u: Tensor) -> Tensor:
        """Jᵀ U, (B, C, k) -> (k, P)."""
        flat = u.reshape(-1, u.shape[-1])
        return pull(self.lin, self.x, flat) if self.jacobian is None else (self.jacobian.mT @ flat).mT


class WeightProbes:
    """In weight space, P rows: products with H = Σ JᵀBJ batch by batch; no more than the draws and a batch is held.

    Jacobian rows are kept where all of them fit in half of the budget, otherwise made anew in every pass for a batch at
    a time; batches too large for that are left to one backward and one forward pass per vector. The ranks of a process
    group share the batches.

    :param batches: pairs of packed inputs and targets, iterated once per product.
    :param num_data: N.
    :param noise: of a regression, learned only, its components by output; None for a classification.
    """

    def __init__(
        self,
        lin: LinearizedNetwork,
        batches: Iterable[tuple[Tensor, Tensor]],
        num_data: int,
        noise: NoiseModel | None,
        settings: Settings,
    ) -> None:
        self.lin, self.noise, self.settings, self.num_data = lin, noise, settings, num_data
        self._batches = batches
        keep = 2 * 8 * num_data * lin.num_outputs * lin.num_parameters <= settings.max_memory
        self._kept = [_Rows(lin, x, y, settings.max_memory) for x, y in batches] if keep else None
        self._passed: Iterable[Any] = batches if self._kept is None else self._kept
        self.component = None if noise is None or not noise.num_learned else noise.component[: lin.num_outputs]
        self._generator = torch.Generator().manual_seed(settings.seed)
        s, p = settings.num_samples, lin.num_parameters
        self.prior = torch.randn(s, p, generator=self._generator, dtype=torch.float64).to(lin.theta.device)
        self.last: Tensor | None = None
        self._theta: Tensor | None = None
        self._gather()

    def _rows(self) -> Iterator[_Rows]:
        """One pass over the data."""
        if self._kept is not None:
            yield from self._kept
            return
        for x, y in self._batches:
            yield _Rows(self.lin, x, y, self.settings.max_memory // 4)

    def _summed(self, visit: Callable[[_Rows], Tensor], like: Tensor) -> Tensor:
        """Sum over the batches, which the ranks share."""
        return sum_over_batches(self._rows(), visit, like, Turns(self._passed))

    def _gather(self) -> None:
        """The first pass: what does not depend on the hyper-parameters."""
        s, p = self.settings.num_samples, self.lin.num_parameters
        parts = 1 if self.noise is None else max(self.noise.num_learned, 1)
        sizes = [parts * s * p, parts * p, len(self.lin.groups), parts, parts]
        sums = sum_over_batches(self._drawn(), self._first_sums, self.prior.new_zeros(sum(sizes)), Turns(self._passed))
        pulled, moment, self._traces, self._squares, self._errors = (part.clone() for part in sums.split(sizes))
        self._pulled, self._moment = pulled.view(parts, s, p), moment.view(parts, p)
        self._landmarks, self._landmark_factor = self._chosen()

    def _drawn(self) -> Iterator[_Drawn]:
        """One pass, with the random numbers of each batch: all ranks draw all of them."""
        wanted, s, r = self._num_landmarks(), self.settings.num_samples, self._whitened_outputs()
        seen = taken = 0
        self._picked: list[int] = []
        self._own: dict[int, tuple[Tensor, Tensor]] = {}
        for index, rows in enumerate(self._rows()):
            epsilon = torch.randn(len(rows.x), r, s, generator=self._generator, dtype=torch.float64).to(self.prior)
            seen += len(rows.x)
            quota = -(-wanted * seen // self.num_data) - taken
            pick = torch.empty(0, dtype=torch.long)
            if quota > 0:
                pick = torch.randperm(len(rows.x), generator=self._generator)[:quota].sort().values
            taken += len(pick)
            self._picked.append(len(pick))
            yield index, rows, epsilon, pick.to(rows.x.device)

    def _first_sums(self, drawn: _Drawn) -> Tensor:
        """What a batch adds to the sums of the first pass; keeps its rows among the landmarks."""
        index, rows, epsilon, pick = drawn
        c, parts = self.lin.num_outputs, 1 if self.noise is None else max(self.noise.num_learned, 1)
        masks, targets = self._whitening(rows), self._targets(rows)
        pulled, moment = [], []
        squares, errors = self.prior.new_zeros(parts), self.prior.new_zeros(parts)
        for part in range(parts):
            mask = masks if self.noise is None else masks * self._indicator(part)
            pulled.append(rows.pull(mask @ epsilon))
            if targets is None:
                moment.append(self.prior.new_zeros(self.lin.num_parameters))
            else:
                reduced = mask.mT @ targets if self.noise is not None else targets
                moment.append(rows.pull(mask @ reduced)[0])
                squares[part] = reduced.square().sum()
            if self.noise is not None:
                missed = (rows.y.reshape(-1, c) - rows.logits).unsqueeze(-1)
                errors[part] = (mask.mT @ missed).square().sum()
        if len(pick):
            self._own[index] = jacobian_rows(self.lin, rows.x[pick]), masks[pick]
        budget = max(self.settings.max_memory, self.lin.diagonals_memory(len(rows.x)))
        traces = torch.einsum("gncc->g", self.lin.gram_diagonals(rows.x, max_memory=budget))
        return torch.cat([*(part.flatten() for part in (*pulled, *moment)), traces, squares, errors])

    def _chosen(self) -> tuple[Tensor, Tensor]:
        """Rows of the landmarks (m, C, P) and their whitening (m, C, R), of all ranks."""
        c, shapes = self.lin.num_outputs, (self.lin.num_parameters, self._whitened_outputs())
        columns = []
        for position, width in enumerate(shapes):
            parts = [
                self._own[index][position] if index in self._own else self.prior.new_zeros(size, c, width)
                for index, size in enumerate(self._picked)
            ]
            own = torch.cat(parts)
            # Every entry is zero on all ranks but one.
            fold = OrderedFold(torch.zeros_like(own).flatten())
            fold.add([own.flatten()])
            columns.append(fold.total().view_as(own))
        self._own = {}
        return columns[0], columns[1]

    def _whitened_outputs(self) -> int:
        """R, rows of an input after whitening."""
        c = self.lin.num_outputs
        return c if self.noise is not None else max(c - 1, 1)

    def _num_landmarks(self) -> int:
        """Inputs of the preconditioner, whose P-sized rows must fit in a quarter of the budget."""
        c, p = self.lin.num_outputs, self.lin.num_parameters
        # With as many rows as weights the sum over them is close to that over all; a product costs that of an eighth.
        wanted = self.settings.num_landmarks or -(-max(200, min(self.num_data * c // 8, p, 2000)) // c)
        return max(1, min(wanted, self.num_data, self.settings.max_memory // (4 * 2 * 8 * c * p)))

    def _indicator(self, part: int) -> Tensor:
        """Which outputs have a noise component, a diagonal (C, C)."""
        c = self.lin.num_outputs
        if self.component is None:
            return torch.eye(c, dtype=torch.float64, device=self.prior.device)
        return torch.diag((self.component == part).to(self.prior))

    def _whitening(self, rows: _Rows) -> Tensor:
        """S of a classification at the network's logits, (B, C, R); the identity for a regression, noise left out."""
        if self.noise is None:
            return curvature_factor(rows.logits)
        eye = torch.eye(self.lin.num_outputs, dtype=torch.float64, device=self.prior.device)
        return eye.expand(len(rows.x), -1, -1)

    def _targets(self, rows: _Rows) -> Tensor | None:
        """T of a regression (B, C, 1), or whitened ones (B, R, 1) of the quadratic variant."""
        if self.noise is not None:
            return (rows.y.reshape(rows.logits.shape) - rows.offset).unsqueeze(-1)
        if self.settings.curvature != "quadratic":
            return None
        return whitened_targets(rows.logits, rows.y, rows.offset).targets.unsqueeze(-1)

    def warm_start(self) -> dict[str, Any]:
        """What the next step starts from."""
        return {"last": self.last, "theta": self._theta}

    def set_warm_start(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`warm_start`."""
        self.last, self._theta = state["last"], state["theta"]

    def traces(self) -> Tensor:
        """Tr K_g, shape (G,)."""
        return self._traces

    def _counts(self) -> Tensor:
        """Rows of each noise component."""
        parts = range(len(self._squares))
        return torch.stack([self._indicator(part).diagonal().sum() for part in parts]) * self.num_data

    def squared_errors(self) -> Tensor | None:
        """Mean squared residual of the network per noise component; None for labels."""
        return None if self.noise is None else self._errors / self._counts()

    def target_squares(self) -> Tensor:
        """Mean square of the evidence's targets per noise component."""
        return self._squares / self._counts()

    def _variance(self, noise: Tensor) -> Tensor:
        """Noise variance of each output, (C,), or of each noise component where `noise` is given per component."""
        assert self.noise is not None
        if self.component is None:
            return self.noise.fixed[:1].expand(self.lin.num_outputs)
        return noise[self.component]

    def _curve(self, rows: _Rows, image: Tensor, noise: Tensor, logits: Tensor | None = None) -> Tensor:
        """B V for one batch, (B, C, k)."""
        if self.noise is not None:
            return image / self._variance(noise).unsqueeze(-1)
        factor = curvature_factor(rows.logits if logits is None else logits)
        return factor @ (factor.mT @ image)

    def _hessian(self, v: Tensor, noise: Tensor, at: Tensor | None = None) -> Tensor:
        """H V, (k, P) -> (k, P); the curvature of a classification at weights `at` if given."""

        def product(rows: _Rows) -> Tensor:
            logits = None if at is None else rows.offset + rows.push(at.unsqueeze(0)).squeeze(-1)
            return rows.pull(self._curve(rows, rows.push(v), noise, logits))

        return self._summed(product, v)

    def _preconditioner(self, scale: Tensor, noise: Tensor) -> Any:
        """(I + (N/m) Λ⁻¹ᐟ²J_ZᵀB_ZJ_ZΛ⁻¹ᐟ²)⁻¹ by Woodbury."""
        factor = self._landmark_factor
        if self.noise is not None:
            factor = factor * self._variance(noise).rsqrt()
        rows = torch.einsum("mcr,mcp->mrp", factor, self._landmarks).flatten(0, 1) * scale
        inner = rows @ rows.mT
        inner.diagonal().add_(len(self._landmarks) / self.num_data + 1e-14 * float(inner.diagonal().max()))
        cholesky = torch.linalg.cholesky(inner)
        return lambda v: v - rows.mT @ torch.cholesky_solve(rows @ v, cholesky)

    def _solve(self, scale: Tensor, noise: Tensor, rhs: Tensor, x0: Tensor | None, at: Tensor | None = None) -> Any:
        """(I + Λ⁻¹ᐟ²HΛ⁻¹ᐟ²)⁻¹ applied to (P, k)."""
        return solve(
            lambda v: v + (self._hessian((v.mT * scale).contiguous(), noise, at) * scale).mT,
            rhs, preconditioner=self._preconditioner(scale, noise), tolerance=self.settings.tolerance,
            max_iterations=self.settings.max_iterations, x0=x0,
        )  # fmt: skip

    def __call__(self, precision: Tensor, noise: Tensor) -> Expectation:
        """One expectation step."""
        s, groups = self.settings.num_samples, self.lin.groups
        scale = groups.expand(precision.rsqrt())
        weights = self.prior * scale
        sigma = noise.new_ones(1)
        if self.noise is not None:
            sigma = noise.sqrt() if self.noise.num_learned else self.noise.fixed[:1].sqrt()
        data = torch.einsum("c,csp->sp", sigma.reciprocal(), self._pulled)
        rhs = [self._hessian(weights, noise) - data]
        linear = self.noise is not None or self.settings.curvature == "quadratic"
        if linear:
            rhs.append((self._moment / sigma.square().unsqueeze(-1)).sum(0, keepdim=True))
        found = self._solve(scale, noise, (torch.cat(rhs) * scale).mT.contiguous(), self.last)
        self.last = found.solution
        scaled = found.solution.mT
        converged = found.converged
        if linear:
            theta = scaled[s] * scale
        else:
            theta, settled = self._mode(scale, noise)
            converged = converged and settled
        draws = weights - scaled[:s] * scale
        traces = groups.sum_per_group(scaled[:s].square()).mT
        quadratics = groups.sum_per_group((theta / scale).square())
        if self.noise is not None and self.noise.num_learned:
            per_draw, alphas = self._noise_terms(draws, theta, noise)
            traces, quadratics = torch.cat([traces, per_draw]), torch.cat([quadratics, alphas])
        return Expectation(traces, quadratics, draws, theta, found.iterations, converged)

    def _noise_terms(self, draws: Tensor, theta: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """σ²tr(A⁻¹) over the rows of each component from each draw (the leverages are Var[h]/σ²), and σ²Σα²."""
        parts = range(len(noise))
        both = torch.cat([draws, theta.unsqueeze(0)])
        on = torch.stack([self._indicator(part).diagonal() for part in parts])  # shape: (S, C)

        def visit(rows: _Rows) -> Tensor:
            image, targets = rows.push(both), self._targets(rows)
            assert targets is not None
            squares = image[..., :-1].square().sum(0)  # shape: (C, number of draws)
            missed = (targets.squeeze(-1) - image[..., -1]).square().sum(0)  # shape: (C,)
            return on @ torch.cat([squares, missed.unsqueeze(-1)], -1)

        sums = self._summed(visit, draws.new_zeros(len(parts), len(both)))
        leverage, errors = sums[:, :-1], sums[:, -1]
        return self._counts().unsqueeze(-1) - leverage / noise.unsqueeze(-1), errors / noise

    def _log_joint(self, theta: Tensor, scale: Tensor, gradient: bool) -> tuple[float, Tensor | None]:
        """Log p(y | h) − ½‖θ‖²_Λ, and its gradient in θ."""

        def visit(rows: _Rows) -> Tensor:
            logits = rows.offset + rows.push(theta.unsqueeze(0)).squeeze(-1)
            value = log_likelihood(logits, rows.y).sum().reshape(1)
            return torch.cat([value, rows.pull(residual(logits, rows.y).unsqueeze(-1))[0]]) if gradient else value

        sums = self._summed(visit, theta.new_zeros(1 + gradient * len(theta)))
        total = float(sums[0]) - 0.5 * float((theta / scale).square().sum())
        return total, (sums[1:] - theta / scale.square()) if gradient else None

    def _mode(self, scale: Tensor, noise: Tensor) -> tuple[Tensor, bool]:
        """theta_star of the true loss by damped Newton–CG over the data, from the last one."""
        theta = torch.zeros_like(scale) if self._theta is None else self._theta
        for _ in range(_NEWTON_STEPS):
            value, gradient = self._log_joint(theta, scale, True)
            assert gradient is not None
            step = self._solve(scale, noise, (gradient * scale).unsqueeze(-1), None, theta).solution[:, 0] * scale
            gain = float(step @ gradient)
            if gain <= 1e-8 * (1.0 + float((theta / scale).square().sum())):
                self._theta = theta + step
                return self._theta, True
            size = 1.0
            for _ in range(_HALVINGS):
                if self._log_joint(theta + size * step, scale, False)[0] >= value + 1e-4 * size * gain:
                    break
                size *= 0.5
            else:
                break
            theta = theta + size * step
        self._theta = theta
        return theta, False
