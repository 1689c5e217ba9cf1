"""Variational Laplace: a mean-field Gaussian over the weights, trained with the Fisher information as its curvature."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from ntkgp.baselines.point import given_numbers
from ntkgp.baselines.protocol import Baseline, labelled, normal, observed
from ntkgp.baselines.references import (
    check_link,
    gaussian_logits,
    label_log_probabilities,
    minibatches,
    positive,
    probabilities_through,
)
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.frozen import Weights, pass_environment, private_copy
from ntkgp.models.batches import Batches

_KINKED = (
    "relu", "relu_", "leaky_relu", "leaky_relu_", "_prelu_kernel", "prelu", "rrelu_with_noise", "rrelu_with_noise_",
    "threshold", "threshold_", "hardtanh", "hardtanh_", "hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_",
    "hardshrink", "softshrink", "relu6",
)  # fmt: skip
_SMOOTHED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU)


class _Kinks(TorchDispatchMode):
    """Names of the operations of a pass whose first derivative jumps."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _KINKED or (name in ("clamp_min", "clamp_min_", "clamp", "clamp_") and _is_relu(args)):
            self.found.add(name.rstrip("_"))
        if name in ("elu", "elu_"):
            alpha, scale, input_scale = (*args[1:], 1, 1, 1)[:3]
            if abs(alpha * input_scale - 1) > 1e-6:
                self.found.add("selu" if scale != 1 else "elu with alpha != 1")
        return func(*args, **(kwargs or {}))


def _is_relu(args: tuple[Any, ...]) -> bool:
    """Whether a clamp cuts at zero from below only, as ReLU does; other clamps guard divisions."""
    return len(args) > 1 and args[1] == 0 and (len(args) < 3 or args[2] is None)


def smooth(net: nn.Module, sharpness: float = 1.0) -> nn.Module:
    r"""A copy of the network with ``softplus`` in place of ReLU, leaky ReLU, ReLU6, PReLU and RReLU modules.

    It is another function: train it before :class:`VariationalLaplace`. ReLUs called as functions are not replaced.

    :param sharpness: β of :math:`\log(1 + e^{\beta x})/\beta`.

    >>> smooth(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))[1]
    Softplus(beta=1.0, threshold=20.0)
    """
    copied = copy.deepcopy(net)
    for module in copied.modules():
        for name, child in module.named_children():
            if isinstance(child, _SMOOTHED):
                setattr(module, name, nn.Softplus(beta=float(positive("sharpness", sharpness, float))))
    return nn.Softplus(beta=float(sharpness)) if isinstance(copied, _SMOOTHED) else copied


class VariationalLaplace(Baseline):
    r"""Variational Laplace: :math:`q(\theta) = N(\mu, \mathrm{diag}\,\sigma^2)` from the trained weights on.

    With minibatches of S out of N points it maximises, per point,

    .. math:: \frac1S \log p(y \mid \mu) - \frac S2 \sum_i \sigma_i^2\, \bar g_i^2
        - \frac\beta N \sum_i \frac12 \left[\lambda_i(\sigma_i^2 + \mu_i^2) - 1 - \log \lambda_i\sigma_i^2\right],
        \qquad \bar g = \nabla_\mu \frac1S \log p(\tilde y \mid \mu),

    with :math:`\tilde y` drawn from the network itself (the paper's eq. 30 has its fractions misprinted and lacks the
    expectation over :math:`\tilde y`). The gradient of :math:`\bar g^2` is a double backward pass: the second
    derivative of ReLU-like activations is a spike that it never sees, so they are refused; :func:`smooth` replaces
    them (max pooling, whose spikes are as invisible, passes). BatchNorm keeps its statistics and dropout is off
    throughout.

    At the optimum :math:`\sigma_i^2 = 1/(F_{ii}/\beta + \lambda_i)` with the Fisher information F of all data.

    :param precision: :math:`\lambda = 1/s^2`, one number or one per group; None maximises the bound over it, per group.
    :param noise: noise variances, one number or one per output, regression only; by default the mean squared residuals
        of the training data at μ. ``"bound"`` maximises the bound over them: with more parameters than data and fixed
        precisions that noise grows far beyond the targets' variance, because a mean-field posterior wide enough for the
        prior moves the outputs as much.
    :param temperature: β; below 1 the posterior is colder.
    :param variance: ``"closed_form"``: σ² is the optimum above at a running mean of :math:`N S \bar g^2`;
        ``"gradient"``: log σ is learned, starting from log s − 3, as in the paper.
    :param exact_fisher: with the closed form, end with the exact F at the final μ (C backward passes per row) instead
        of the running mean.
    :param prediction: ``"glm"``: outputs with covariance :math:`J(x)\,\mathrm{diag}(\sigma^2)J(x)^\top` at μ;
        ``"network"``: the network at μ alone, as the paper predicts.
    :param link: ``"probit"``, ``"mc"`` or ``"bridge"`` for linearised classification.
    :param epochs: passes over the data; the learning rate is divided by 10 after one half and three quarters of them.
    :param batch_size: S; a DataLoader has its own.
    :param learning_rate: Adam's, of μ.
    :param log_std_rate: factor of the learning rate for log σ.
    :param num_draws: outputs drawn per batch; each costs a double backward pass.
    :param decay: of the running mean; a step weighs 1 − decay.
    :raises ValueError: an unknown name, a number that is not positive; (by ``fit``) an activation that is not smooth,
        or a network that cannot be differentiated twice.
    :raises FloatingPointError: (by ``fit``) an objective that is not finite.

    Adam moves log σ by at most ``learning_rate·log_std_rate`` per step: ``"gradient"`` needs many steps.

    Cost: per step about three times a training step; O(P) memory beyond it. Predicting: C backward passes per row.

    Source: Unlu & Aitchison, *Variational Laplace for Bayesian neural networks*, arXiv 2103.00222.

    >>> net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> x = torch.linspace(-1, 1, 32).unsqueeze(-1)
    >>> VariationalLaplace(net, epochs=5).fit((x, x)).predict(x[:3]).latent.stddev.shape
    torch.Size([3])
    """

    _state = ("mean", "variance", "fisher", "precision", "noise")
    mean: Tensor  # μ, (P,), in the network's dtype
    variance: Tensor  # σ², (P,)
    fisher: Tensor  # diagonal of F over the data, (P,)
    precision: Tensor  # λ, (G,)
    noise: Tensor  # (C,); ones for labels

    def __init__(
        self,
        net: nn.Module,
        likelihood: str = "regression",
        *,
        precision: float | Tensor | None = 1.0,
        noise: float | Tensor | str | None = None,
        temperature: float = 1.0,
        variance: str = "closed_form",
        exact_fisher: bool = True,
        prediction: str = "glm",
        link: str = "probit",
        epochs: int = 200,
        batch_size: int = 128,
        learning_rate: float = 1e-4,
        log_std_rate: float = 10.0,
        num_draws: int = 1,
        decay: float = 0.99,
        **common: Any,
    ) -> None:
        super().__init__(net, likelihood, **common)
        for name, value, allowed in (
            ("variance", variance, ("closed_form", "gradient")),
            ("prediction", prediction, ("glm", "network")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")
        check_link(link)
        if noise is not None and self.is_classification:
            raise ValueError("noise: expected None with likelihood='classification'")
        if isinstance(noise, str) and noise != "bound":
            raise ValueError(f"noise: expected numbers, 'bound' or None, got {noise!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay!r}")
        self._bound_noise = isinstance(noise, str)
        self._given_precision, self._given_noise = precision, None if isinstance(noise, str) else noise
        self.by_gradient, self.exact_fisher = variance == "gradient", exact_fisher
        self.prediction, self.link, self.decay = prediction, link, decay
        self.beta = positive("temperature", temperature, float)
        self.learning_rate = positive("learning_rate", learning_rate, float)
        self.log_std_rate = positive("log_std_rate", log_std_rate, float)
        self.epochs, self.batch_size = positive("epochs", epochs), positive("batch_size", batch_size)
        self.num_draws = positive("num_draws", num_draws)
        self._at_mean: LinearizedNetwork | None = None

    # --- fitting ---

    def _fit(self, batches: Batches) -> None:
        if self.is_classification:
            check_link(self.link, self.lin.num_outputs)
        x, _ = next(iter(batches))
        with pass_environment(self.lin.frozen.device):
            self._check(x[:2])
            self._start(batches)
            self._optimise(batches)
        self._at_mean = None
        if self.exact_fisher and not self.by_gradient:
            self._finish(batches)

    def _check(self, x: Tensor) -> None:
        """Refuse networks whose squared gradients have no derivative."""
        frozen = self.lin.frozen
        with _Kinks() as kinks, torch.no_grad():
            frozen.run(frozen.module(frozen.device), self.lin.packing.leaves(x.to(frozen.device)))
        if kinks.found:
            raise ValueError(
                f"net: its activations ({', '.join(sorted(kinks.found))}) have kinks, whose second derivative is a "
                "spike that the gradient of ḡ² never sees; expected smooth ones: train "
                "ntkgp.baselines.variational_laplace.smooth(net), which has softplus in their place"
            )
        if not (frozen.functional and frozen.twice_differentiable):
            raise ValueError("net: cannot be differentiated twice; variational Laplace needs the gradient of ḡ²")

    def _start(self, batches: Batches) -> None:
        lin = self.lin
        groups, device = len(lin.groups), lin.frozen.device
        given = given_numbers("precision", self._given_precision, groups)
        each = torch.ones(groups, dtype=torch.float64) if given is None else given
        self.mean = lin.theta.detach().clone()
        self.precision = each.to(device)
        self.variance = math.exp(-6) / self._expanded  # log σ = log s − 3
        self.fisher = torch.zeros_like(self.variance)
        found = given_numbers("noise", self._given_noise, lin.num_outputs)
        if found is None and not self.is_classification:
            squares = [(y.reshape(len(y), -1) - lin(x).to(torch.float64)).square().cpu() for x, y in batches]
            found = torch.cat(squares).mean(0).clamp_min(1e-12)
        self.noise = (torch.ones(lin.num_outputs, dtype=torch.float64) if found is None else found).to(device)

    def _optimise(self, batches: Batches) -> None:
        """Adam on μ (and log σ), with σ², noise and precisions by their closed forms where they have one."""
        mean = self.mean.clone().requires_grad_()
        log_std = (self.variance.log() / 2).requires_grad_()
        parameters = [{"params": [mean], "lr": self.learning_rate}]
        if self.by_gradient:
            parameters.append({"params": [log_std], "lr": self.learning_rate * self.log_std_rate})
        optimizer = torch.optim.Adam(parameters)
        marks = sorted({max(1, self.epochs // 2), max(1, 3 * self.epochs // 4)})
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, marks)
        generator = torch.Generator(device=mean.device).manual_seed(self.seed)
        order = torch.Generator().manual_seed(self.seed)
        count = sum(len(x) for x, _ in batches)
        weight, steps = 0.0, torch.zeros_like(self.fisher)
        for _ in tqdm(range(self.epochs), "epochs", disable=not self.progress):
            spread, rows = torch.zeros_like(self.noise), 0
            for x, y in minibatches(batches, self.batch_size, order):
                x, y = x.to(mean.device), y.to(mean.device)
                variance = (2 * log_std).exp() if self.by_gradient else self.variance
                optimizer.zero_grad()
                loss, squares, residual = self._loss(mean, variance, x, y, count, generator)
                if not bool(loss.isfinite()):
                    raise FloatingPointError(
                        f"VariationalLaplace: the objective became {float(loss.detach())}; lower learning_rate"
                    )
                loss.backward()
                optimizer.step()
                steps = self.decay * steps + (1 - self.decay) * count * len(x) * squares
                weight = self.decay * weight + 1 - self.decay
                self.fisher = steps / weight
                self.variance = variance.detach() if self.by_gradient else self._best_variance()
                if self._learns_noise:
                    spread += residual.square().sum(0)
                    if self._bound_noise:
                        spread += self._wobble(mean.detach(), x, generator)
                    rows += len(x)
            schedule.step()
            if self._learns_noise and rows:
                self.noise = (spread / rows).clamp_min(1e-12)
            self._learn_precision(mean.detach())
        self.mean = mean.detach().clone()

    @property
    def _learns_noise(self) -> bool:
        return not self.is_classification and self._given_noise is None

    def _loss(
        self, mean: Tensor, variance: Tensor, x: Tensor, y: Tensor, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Minus the objective per point, ḡ² (P,) averaged over draws, and residuals (S, C)."""
        size = len(x)
        outputs = self.lin.frozen(self._tree(mean), self.lin.packing.leaves(x)).to(torch.float64)
        squares = torch.zeros_like(variance)
        for _ in range(self.num_draws):
            drawn = self._drawn(outputs.detach(), generator)
            log_p = self._log_likelihood(outputs, drawn) / size
            squares = squares + torch.autograd.grad(log_p, mean, create_graph=True)[0].to(torch.float64).square()
        squares = squares / self.num_draws
        mu = mean.to(torch.float64)
        precision = self._expanded
        divergence = (precision * (variance + mu.square()) - 1 - (precision * variance).log()).sum() / 2
        loss = -self._log_likelihood(outputs, y) / size
        loss = loss + size / 2 * (variance * squares).sum() + self.beta / count * divergence
        residual = outputs.detach() - y.reshape(outputs.shape) if not self.is_classification else outputs.detach()
        return loss, squares.detach(), residual

    def _tree(self, flat: Tensor) -> Weights:
        """Weights by name of a vector in θ's order."""
        theta = self.lin.frozen.theta
        parts = flat.split([p.numel() for p in theta.values()])
        return {name: part.reshape(p.shape).to(p.dtype) for (name, p), part in zip(theta.items(), parts, strict=True)}

    def _log_likelihood(self, outputs: Tensor, y: Tensor) -> Tensor:
        if self.is_classification:
            return label_log_probabilities(outputs, y).sum()
        scaled = (y.reshape(outputs.shape) - outputs).square() / self.noise
        return -(scaled + (2 * math.pi * self.noise).log()).sum() / 2

    def _drawn(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Targets drawn from the model at outputs (S, C)."""
        if not self.is_classification:
            noise = torch.randn(outputs.shape, generator=generator, dtype=torch.float64, device=outputs.device)
            return outputs + self.noise.sqrt() * noise
        if outputs.shape[-1] == 1:
            return torch.bernoulli(outputs.sigmoid().squeeze(-1), generator=generator)
        return torch.multinomial(outputs.softmax(-1), 1, generator=generator).squeeze(-1)

    def _best_variance(self) -> Tensor:
        return 1 / (self.fisher / self.beta + self._expanded)

    @property
    def _expanded(self) -> Tensor:
        """λ of each parameter, (P,)."""
        return self.lin.groups.expand(self.precision)

    def _wobble(self, mean: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
        """Σ_n (J_n δ)² of one draw δ ~ N(0, σ²), per output: its mean is what σ² adds to the squared residuals."""
        z = torch.randn(len(mean), generator=generator, dtype=torch.float64, device=mean.device)
        delta = (self.variance.sqrt() * z).to(mean.dtype)
        mean = mean.clone().requires_grad_()
        outputs = self.lin.frozen(self._tree(mean), self.lin.packing.leaves(x))
        u = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(outputs, mean, u, create_graph=True)[0]
        return torch.autograd.grad(pulled @ delta, u)[0].to(torch.float64).square().sum(0)

    def _learn_precision(self, mean: Tensor) -> None:
        """λ_g = P_g / Σ (σ² + μ²) where precisions are to be learned."""
        if self._given_precision is None:
            groups = self.lin.groups
            sums = groups.sum_per_group(self.variance + mean.to(torch.float64).square()).clamp_min(1e-30)
            sizes = torch.tensor(groups.sizes, dtype=torch.float64, device=mean.device)
            self.precision = sizes / sums

    def _finish(self, batches: Batches) -> None:
        """Exact Fisher at the final μ; σ², noise and precisions in turn until they stay."""
        lin, count = self.at_mean, 0
        errors = torch.zeros_like(self.noise)
        sums = errors.new_zeros(len(errors), len(self.mean))
        for x, y in batches:
            for part, target in zip(*(t.split(self._rows()) for t in (x, y)), strict=True):
                part, target = part.to(self.mean.device), target.to(self.mean.device)
                f, j = lin(part).to(torch.float64), lin.jacobian(part).to(torch.float64)
                if self.is_classification:
                    j = _fisher_root(f).mT @ j
                else:
                    errors = errors + (target.reshape(f.shape) - f).square().sum(0)
                sums += j.square().sum(0)
                count += len(part)
        for _ in range(200):
            before = self.variance
            self.fisher = (sums / self.noise.unsqueeze(-1)).sum(0)
            self.variance = self._best_variance()
            if self._learns_noise:
                wobble = sums @ self.variance if self._bound_noise else torch.zeros_like(errors)
                self.noise = ((errors + wobble) / count).clamp_min(1e-12)
            self._learn_precision(self.mean)
            if float((self.variance / before - 1).abs().max()) < 1e-12:
                break

    # --- predicting ---

    @property
    def at_mean(self) -> LinearizedNetwork:
        """The network linearised at μ."""
        if self._at_mean is None:
            module = private_copy(self.lin.frozen.module(self.lin.frozen.device))
            parameters = dict(module.named_parameters())
            with torch.no_grad():
                for name, weights in self._tree(self.mean).items():
                    parameters[name].copy_(weights)
            example = self.lin.unpack(self.lin._probe_rows)
            self._at_mean = LinearizedNetwork(
                module, example, groups="single", output=self._output, max_memory=self.max_memory
            )
        return self._at_mean

    def _rows(self) -> int:
        """Rows whose Jacobians are held at a time."""
        return max(1, self.max_memory // (32 * self.lin.num_outputs * self.lin.num_parameters))

    def _set_state(self, state: dict[str, Tensor]) -> None:
        super()._set_state(state)
        self._at_mean = None

    def latent_covariance(self, x: Tensor) -> Tensor:
        """J(x) diag(σ²) J(x)ᵀ at μ, per input: (N, C, C)."""
        found = []
        for part in x.split(self._rows()):
            j = self.at_mean.jacobian(part).to(torch.float64)
            found.append((j * self.variance.to(j)) @ j.mT)
        return torch.cat(found)

    def _predict(self, x: Tensor) -> Distribution:
        mean = self.at_mean(x).to(torch.float64)
        if self.prediction == "network":
            if self.is_classification:
                return labelled(mean.sigmoid().squeeze(-1) if mean.shape[-1] == 1 else mean.softmax(-1))
            return normal(mean, torch.diag_embed(self.noise.to(mean).expand_as(mean)))
        covariance = self.latent_covariance(x)
        if not self.is_classification:
            return observed(mean, covariance, self.noise.to(mean))
        p = probabilities_through(self.link, mean, covariance, self.seed)
        return labelled(p, gaussian_logits(mean, covariance))


def _fisher_root(logits: Tensor) -> Tensor:
    """S with S Sᵀ = diag(p) − ppᵀ, or p(1 − p), at each row: (N, C, C)."""
    if logits.shape[-1] == 1:
        p = logits.sigmoid()
        return (p * (1 - p)).sqrt().unsqueeze(-1)
    p = logits.softmax(-1)
    return torch.diag_embed(p.sqrt()) - p.unsqueeze(-1) * p.sqrt().unsqueeze(-2)
