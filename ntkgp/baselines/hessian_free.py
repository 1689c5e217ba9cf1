"""Hessian-free Laplace: variances from how far a prediction moves when the loss is regularised by it."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from tqdm import tqdm

from ntkgp.baselines.newton_cg import Minima, minimise
from ntkgp.baselines.protocol import Baseline, check_entries, labelled, normal, observed
from ntkgp.baselines.regularised import RegularisedLoss, WeightedOutputs
from ntkgp.linearization.checks import real_numbers
from ntkgp.linearization.frozen import FrozenNetwork, pass_environment
from ntkgp.models.batches import Batches

logger = logging.getLogger("ntkgp")

MODELS = ("network", "tangent")
FORMS = ("central", "signed", "absolute")
_INVARIANT = 1e-3
_LOST = 0.3  # of the gradient of a refit's perturbation: what is left where it made no progress
_STEPS = 5  # Newton steps with one preconditioner


class Drift(NamedTuple):
    """How far the control, a minimisation without any perturbation, went from the given weights.

    :ivar weights: ‖θ̂ − θ̃‖ / ‖θ̃‖.
    :ivar outputs: largest change of an output at a training input.
    :ivar gradient_before: norm of the gradient of the loss at θ̃.
    :ivar gradient_after: at θ̂.
    :ivar converged: whether the control reached its gradient norm.
    """

    weights: float
    outputs: float
    gradient_before: float
    gradient_after: float
    converged: bool


class HessianFreeLaplace(Baseline):
    r"""Variances of the predictions without a Hessian, by implicit differentiation of refitted weights.

    With the negative log joint :math:`L(\theta) = -\log p(y \mid \theta) + \tfrac12\theta^\top\Lambda\theta`, its
    minimiser :math:`\hat\theta` and that of the loss regularised by a prediction,
    :math:`\theta_\mu = \arg\min L(\theta) + \mu f(x; \theta)`,

    .. math::
        -\frac{f(x'; \theta_\mu) - f(x'; \hat\theta)}{\mu} \;\longrightarrow\;
        \nabla f(x')^\top (\nabla^2 L)^{-1} \nabla f(x) \qquad (\mu \to 0):

    the covariances of the Laplace approximation with the *full Hessian* of the network, not with the generalised
    Gauss-Newton matrix of a linearised one. On the tangent model with a Gaussian likelihood it is the exact posterior
    covariance for any step. The minimisations are Newton steps by conjugate gradients on Hessian products, all inputs
    side by side, from the control's weights to a stated gradient norm; in float64 whatever the network's dtype,
    because variances are differences of outputs that are nearly the same. Up to 1000 weights the conjugate gradients
    are preconditioned by the Hessian itself, which changes their number and not the result.

    :param net: the trained network; copied, never modified. The loss is written for the network in evaluation mode.
    :param likelihood: ``"regression"`` or ``"classification"``.
    :param precision: λ of the prior N(0, Λ⁻¹), one number or one for each group.
    :param noise: σ², one number or one for each output; the mean squared residuals of the network by default.
    :param model: ``"network"``, or ``"tangent"`` for the network linearised at the given weights.
    :param step: μ, in the units of the summed loss (a loss that is a mean over N rows has the step μ/N).
    :param form: ``"central"`` differences (f₋ − f₊)/2μ, error O(μ²); ``"signed"``, one-sided, error O(μ);
        ``"absolute"``: regularised by \|f\|, variance \|f_μ − f̂\|/μ, with the sign of f held at its value at θ̂: the
        exact \|f\| has a kink where f = 0, and a prediction caught there would have the variance \|f̂\|/μ. Its
        covariances between outputs are left out. No evidence is known that it helps off the data.
    :param amortised: one refit for many inputs, regularised by the mean of their predictions. It gives
        :math:`\mathrm{Cov}(f(x), \frac1n\sum_j f(x_j))` and not the variance of f(x), of which it was measured to be
        3 to 36 %, and negative at 10 to 48 % of the inputs: see :meth:`average_covariance`; :meth:`predict` refuses.
    :param tolerance: gradient norm at which a refit ends, relative to the gradient of its perturbation, μ‖∇f(x)‖; the
        control's is relative to the smallest perturbation of a training input.
    :param max_iterations: Newton steps of a refit.
    :param common: groups, output, max_memory, seed, progress, see :class:`~ntkgp.baselines.Baseline`.
    :raises ValueError: an option out of its range; at :meth:`fit`, a network whose loss has no minimum because its
        function does not change with the scale of some weights, which the prior shrinks for ever.
    :raises RuntimeError: at :meth:`predict`, refits that end with most of the gradient of their perturbation, as at the
        kinks of ReLU.

    ``predict(x)`` refits 2C times for each input (C for one-sided forms). Its mean is the model's at the control's
    weights θ̂; ``drift`` says how far these are from the given ones.

    Cost: per refit a few Newton steps of tens to hundreds of Hessian products, each about four passes over all training
    data. Memory: K·P numbers for K refits at a time and their activations within ``max_memory``.

    Source: `McInerney & Kallus 2024 <https://arxiv.org/abs/2403.10671>`_, Theorems 3.1 and 3.2. What the amortised form
    is, and that the limit has the Hessian, is not said there.

    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    >>> x = torch.linspace(-1, 1, 12).unsqueeze(-1)
    >>> hfl = HessianFreeLaplace(net, noise=0.1, model="tangent").fit((x, x.sin()))
    >>> hfl.predict(x[:3]).latent.variance.shape
    torch.Size([3])
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: str = "regression",
        *,
        precision: float | Tensor = 1.0,
        noise: float | Tensor | None = None,
        model: str = "network",
        step: float = 1e-3,
        form: str = "central",
        amortised: bool = False,
        tolerance: float = 1e-6,
        max_iterations: int = 200,
        **common: Any,
    ) -> None:
        super().__init__(net, likelihood, **common)
        for name, value, known in (("model", model, MODELS), ("form", form, FORMS)):
            if value not in known:
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")
        for name, number in (("step", step), ("tolerance", tolerance), ("max_iterations", max_iterations)):
            if not (math.isfinite(number) and number > 0):
                raise ValueError(f"{name}: expected a positive number, got {number!r}")
        self.model, self.step, self.form, self.amortised = model, step, form, amortised
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self.precision = _positive(precision, "precision")
        self.given_noise = None if noise is None else _positive(noise, "noise")
        self.drift: Drift | None = None
        self.unconverged = 0
        # Training data, noise, precision of each weight, and the control's weights.
        self._given: dict[str, Tensor] = {}
        self._loss: RegularisedLoss | None = None

    def _fit(self, batches: Batches) -> None:
        x, y = batches.collect()
        noise = torch.zeros(0, dtype=torch.float64) if self.is_classification else self._noise_of(x, y)
        weights = self._precision_of_weights()
        self._given = {"x": x, "y": y, "noise": noise, "precision": weights, "theta": torch.zeros(0)}
        loss = self._make_loss()
        if self.model == "network":
            self._refuse_invariant(x)
        c = self.lin.num_outputs
        forms = self._forms(loss, x[: min(len(x), 64)], self.step * torch.eye(c, dtype=torch.float64))
        start = loss.theta.unsqueeze(0)
        try:
            goal = self.tolerance * loss.perturbed(forms).output_gradient_norms()
            before = float(loss.value_and_gradient(start, torch.zeros(1, dtype=torch.long))[1].norm())
        except (RuntimeError, NotImplementedError) as reason:  # torch has no second derivative of some layers
            raise ValueError(
                f"net: model={self.model!r} needs derivatives by torch.func that this network lacks ({reason})"
            ) from reason
        if not bool((goal > 0).any()):
            raise ValueError("net: its gradients are zero at all training inputs, which no refit can tell apart")
        # The control goes further than the refits that start from it.
        found = self._minimise(loss, start, 0.1 * goal[goal > 0].min().reshape(1), "control", forcing=0.01)
        theta = found.theta[0]
        change = (loss.outputs(theta, x) - loss.outputs(loss.theta, x)).abs().max()
        relative = (theta - loss.theta).norm() / loss.theta.norm()
        after, converged = float(found.gradient_norms), bool(found.converged)
        self.drift = Drift(float(relative), float(change), before, after, converged)
        self._given["theta"] = theta
        logger.info("HessianFreeLaplace: the control moved the weights; %s", self.drift)

    def _predict(self, x: Tensor) -> Distribution:
        if self.amortised:
            raise ValueError(
                "amortised=True gives covariances of predictions with their mean, which are no variances (they may be "
                "negative); call average_covariance(x), or predict with amortised=False"
            )
        mean, covariance = self._moments(x)
        if not self.is_classification:
            return observed(mean, covariance, self._given["noise"])
        spread = (1 + math.pi / 8 * covariance.diagonal(dim1=-2, dim2=-1)).sqrt()
        if mean.shape[-1] == 1:
            return labelled((mean / spread)[:, 0].sigmoid(), normal(mean, covariance))
        return labelled((mean / spread).softmax(-1), normal(mean, covariance))

    def covariance(self, x: Any) -> Tensor:
        """Covariances (N, C, C) of the outputs at N inputs as the differences give them.

        Not symmetric and not positive beyond what the step and the tolerance give: :meth:`predict` makes it so.
        """
        with torch.no_grad():
            return self._covariance(self.lin.pack(x).to(torch.float64))

    def average_covariance(self, x: Any) -> Tensor:
        r""":math:`\mathrm{Cov}(f_c(x_n), \frac1N\sum_j f_{c'}(x_j))` of N inputs, shape (N, C, C), from 2C refits.

        What one refit with the mean prediction as regulariser gives (Theorem 3.2 of the source): row sums of the joint
        covariance over N, not variances.
        """
        packed = self.lin.pack(x).to(torch.float64)
        loss, c = self._fitted(), self.lin.num_outputs
        mean = torch.eye(c, dtype=torch.float64) / len(packed)
        with torch.no_grad():
            return self._differences(loss, packed.unsqueeze(0), mean)[0]

    def _get_state(self) -> dict[str, Tensor]:
        self._fitted()
        return self._given

    def _set_state(self, state: dict[str, Tensor]) -> None:
        check_entries(state, ("x", "y", "noise", "precision", "theta"))
        if state["theta"].shape != (self.lin.num_parameters,):
            raise ValueError(f"state: theta has shape {tuple(state['theta'].shape)}, not ({self.lin.num_parameters},)")
        self._given = state
        self._make_loss()

    def _fitted(self) -> RegularisedLoss:
        if self._loss is None:
            raise RuntimeError("HessianFreeLaplace: call fit(train_data) first")
        return self._loss

    def _make_loss(self) -> RegularisedLoss:
        copied = copy.deepcopy(self.lin.frozen.module(self.lin.frozen.device)).double()
        frozen = FrozenNetwork(copied, self.lin.packing.tree, self._output, self.lin.packing.dtypes)
        state = self._given
        with pass_environment(frozen.device):
            leaves = self.lin.packing.leaves(state["x"][:2].to(frozen.device))
            frozen.probe([leaf.to(torch.float64) if leaf.is_floating_point() else leaf for leaf in leaves])
        if not frozen.functional or (self.model == "tangent" and not frozen.forward_mode):
            raise ValueError(f"net: model={self.model!r} needs derivatives by torch.func that this network lacks")
        self._loss = RegularisedLoss(
            self.lin, frozen, state["x"], state["y"], tangent=self.model == "tangent",
            noise=None if self.is_classification else state["noise"], precision=state["precision"],
            max_memory=self.max_memory,
        )  # fmt: skip
        return self._loss

    def _noise_of(self, x: Tensor, y: Tensor) -> Tensor:
        c = self.lin.num_outputs
        if self.given_noise is None:
            f = self.lin(x).to(torch.float64)
            found = (f - y.to(f.device).reshape(f.shape)).square().mean(0)
            if not bool((found > 0).all()):
                raise ValueError("noise: the network has no residuals to take it from; expected a positive number")
            return found
        if self.given_noise.shape not in ((), (c,)):
            raise ValueError(f"noise: expected a number or shape ({c},), got {tuple(self.given_noise.shape)}")
        return self.given_noise.expand(c).clone()

    def _precision_of_weights(self) -> Tensor:
        g = len(self.lin.groups)
        if self.precision.shape not in ((), (g,)):
            raise ValueError(f"precision: expected a number or shape ({g},), got {tuple(self.precision.shape)}")
        return self.lin.groups.expand(self.precision.expand(g).clone())

    def _refuse_invariant(self, x: Tensor) -> None:
        """An error where the function does not change with the scale of some weights, as the network runs."""
        theta, names = self.lin.theta, list(self.lin.frozen.theta.items())
        owner = torch.cat([torch.full((p.numel(),), i) for i, (_, p) in enumerate(names)])
        probe = x[: min(len(x), 16)]
        change = self.lin.jvp(probe, theta).abs().max().clamp_min(self.lin(probe).abs().max())
        for label, members in self.lin.normalized:
            ids = torch.tensor([i for i, (name, _) in enumerate(names) if name in members])
            inside = torch.isin(owner, ids).to(theta)
            if self.lin.jvp(probe, theta * inside).abs().max() <= _INVARIANT * change:
                raise ValueError(
                    f"net: its function does not change with the scale of the weights of {label!r}, so the loss with "
                    'their prior has no minimum to differentiate; expected model="tangent"'
                )

    def _minimise(
        self, loss: RegularisedLoss, start: Tensor, tolerance: Tensor, name: str, forcing: float = 1e-4
    ) -> Minima:
        """Minima from the start; what has not reached its gradient norm is counted and said."""
        with tqdm(desc=f"HFL {name}", disable=not self.progress, leave=False) as bar:
            done, theta, steps = 0, start, _STEPS if len(start) > 1 else 1
            while True:
                # The preconditioner is that of the first start, made anew where it has become a bad one.
                found = minimise(
                    loss, theta, tolerance, loss.preconditioner(theta[0]), forcing=forcing,
                    max_iterations=min(steps, self.max_iterations - done), step_done=bar.update,
                )  # fmt: skip
                done, theta = done + found.iterations, found.theta
                if (
                    found.iterations < steps
                    or bool(found.stuck.all())
                    or done >= self.max_iterations
                    or bool(found.converged.all())
                ):
                    break
        self.unconverged = int((~found.converged).sum())
        if self.unconverged:
            worst = float((found.gradient_norms / tolerance).max())
            logger.warning(
                "HessianFreeLaplace: %d of %d minimisations (%s) ended with a gradient up to %.1e times the tolerance",
                self.unconverged, len(start), name, worst,
            )  # fmt: skip
        return found

    @staticmethod
    def _forms(loss: RegularisedLoss, x: Tensor, weights: Tensor) -> WeightedOutputs:
        """K·C perturbations: each of K sets of R inputs (K, R, D), or of K inputs, with each row of weights (C, C)."""
        points = x.unsqueeze(1) if x.ndim == 2 else x
        k, r, c = len(points), points.shape[1], len(weights)
        flat = loss.leaves(points.reshape(k * r, -1))
        leaves = tuple(
            leaf.reshape(k, 1, r, *leaf.shape[1:]).expand(-1, c, *(-1,) * leaf.ndim).flatten(0, 1) for leaf in flat
        )
        return WeightedOutputs(leaves, weights.to(loss.theta.device)[None, :, None].expand(k, c, r, c).flatten(0, 1))

    def _differences(self, loss: RegularisedLoss, points: Tensor, weights: Tensor) -> Tensor:
        """−∂f(x)/∂μ for regularisers wᵀf: sets of inputs (K, R, D), weights (C, C) -> (K, R, C, C), columns by w."""
        signs = (1, -1) if self.form == "central" else (1,)
        base = loss.perturbed(self._forms(loss, points, weights))
        theta = self._given["theta"]
        k, c = len(points), self.lin.num_outputs
        start = theta.expand(k * c, -1)
        reference = base.outputs_in_forms(start)
        direction = torch.ones_like(reference[:, :1, :1])
        if self.form == "absolute":
            own = reference.reshape(k, c, -1, c).diagonal(dim1=1, dim2=3).permute(0, 2, 1).reshape(k * c, -1, 1)
            direction = torch.where(own < 0, -1.0, 1.0).to(own)
        goal = self.tolerance * self.step * base.output_gradient_norms().clamp_min(1e-300)
        moved = []
        for sign in signs:
            forms = self._forms(loss, points, weights)
            scaled = forms.weights * (sign * self.step) * direction
            run = loss.perturbed(WeightedOutputs(forms.leaves, scaled))
            found = self._minimise(run, start, goal, f"refits {sign:+d}")
            lost = ~found.converged & (found.gradient_norms * self.tolerance > _LOST * goal)
            if bool(lost.any()):
                raise RuntimeError(
                    f"HessianFreeLaplace: {int(lost.sum())} of {len(lost)} refits did not follow their perturbation, "
                    "as at the kinks of ReLU-like activations, where the loss has no Hessian; use "
                    "baselines.variational_laplace.smooth(net) or model='tangent'"
                )
            moved.append(run.outputs_in_forms(found.theta))
        change = (moved[1] - moved[0]) / 2 if len(moved) == 2 else reference - moved[0]
        change = change / self.step
        if self.form == "absolute":
            flipped = int((moved[0] * reference < 0).any(-1).any(-1).sum())
            if flipped:
                logger.warning("HessianFreeLaplace: %d refits moved an output through zero", flipped)
            change = change.abs()
        return change.reshape(k, c, -1, c).permute(0, 2, 3, 1)

    def _covariance(self, x: Tensor) -> Tensor:
        c = self.lin.num_outputs
        found = self._differences(self._fitted(), x.unsqueeze(1), torch.eye(c, dtype=torch.float64))[:, 0]
        if self.form == "absolute":
            return torch.diag_embed(found.diagonal(dim1=-2, dim2=-1))
        return found

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (N, C) at the control's weights and covariances (N, C, C), made symmetric and positive."""
        covariance = self._covariance(x)
        values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
        floor = 1e-10 * values.abs().amax(-1, keepdim=True)
        negative = int((values < -floor).any(-1).sum())
        if negative:
            logger.warning(
                "HessianFreeLaplace: %d of %d covariances are not positive: the refits found another minimum, or the "
                "control is none; negative eigenvalues are cut",
                negative, len(x),
            )  # fmt: skip
        positive = vectors * values.maximum(floor).unsqueeze(-2) @ vectors.mT
        return self._fitted().outputs(self._given["theta"], x), positive


def _positive(value: float | Tensor, name: str) -> Tensor:
    found = real_numbers(value, name)
    if not bool((torch.isfinite(found) & (found > 0)).all()):
        raise ValueError(f"{name}: expected positive numbers, got {value!r}")
    return found
