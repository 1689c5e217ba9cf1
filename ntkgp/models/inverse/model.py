"""An image from measurements: the tangent model of an image network, conditioned through a linear operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood
from linear_operator import to_linear_operator
from linear_operator.operators import LinearOperator
from torch import Tensor

from ntkgp.evidence.sampled import SampledEvidence, sampled_evidence
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.memory import format_memory
from ntkgp.linearization.symmetric import SymmetricGrams
from ntkgp.models.exact import ExactNTKGP
from ntkgp.models.forms import Form
from ntkgp.models.inverse.checks import check_operator, image_input, measurements, root_weights
from ntkgp.models.inverse.iterative import IterativeSide, SolvedReduction
from ntkgp.models.inverse.measured import DerivedNetwork, MeasuredNetwork
from ntkgp.models.noise import has_fixed_noise
from ntkgp.models.posterior import PosteriorCovariance
from ntkgp.operators import NetworkHandle, NeuralTangentOperator

FORMS = ("auto", "dual", "primal", "matrix_free")


class ImageNormal(MultivariateNormal):
    """A normal distribution of pixels, or of measurements of them, whose variances may be zero.

    Saturated pixels and rays that miss the image have none; GPyTorch's own class warns of negative variances there.
    """

    @property
    def variance(self) -> Tensor:
        """Variances, shape (*batch, d)."""
        return self.lazy_covariance_matrix.diagonal(dim1=-1, dim2=-2).clamp_min(0.0).expand(self.loc.shape)


@dataclass(frozen=True)
class ImageMean:
    """The mean of any row as a function, whatever becomes of the model: a functional of one image.

    :param lin: the measured network.
    :param image: the mean of the pixels, shape (d,).
    """

    lin: MeasuredNetwork
    image: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate at packed indices, (N, 1) -> (N, 1)."""
        return self.lin.shared.measure(self.image.unsqueeze(0), self.lin._index(x)).reshape(-1, 1)


class InverseNTKGP(ExactNTKGP):
    r"""The image of an inverse problem as a Gaussian process: training space measurements, test space pixels.

    Data :math:`y = A\,h(\theta) + \varepsilon` of the tangent model
    :math:`h(\theta) = \tilde f + J(\theta - \tilde\theta)` of a network whose output is an image (a deep image prior at
    its fixed input, say), with :math:`\theta \sim N(0, \Lambda^{-1})`:

    .. math:: K_{yy} = \sum_g \lambda_g^{-1} (AJ_g)(AJ_g)^\top + \sigma^2 I, \qquad
        r_\star = y - A\tilde f + AJ\tilde\theta, \qquad
        h(\theta_\star) = \tilde f - J\tilde\theta + K_{xy}K_{yy}^{-1}r_\star .

    The measurements are rows of a linearised network (:class:`MeasuredNetwork`), and this is an
    :class:`~ntkgp.ExactNTKGP` on them: in train mode ``model()`` is the prior of the measurements, so that GPyTorch's
    marginal likelihood is the evidence at θ⋆; :func:`~ntkgp.fit_evidence` works as everywhere, with the residual
    :math:`y - A\tilde f` refused as a target, to which the network was fitted. In eval mode ``model()`` is the
    posterior of the pixels, and ``model(B)`` that of :math:`B h` for another operator B: held-out rays, next angles.
    Nothing is specific to tomography: A is any linear operator of the image.

    There are three forms: "dual" and "primal" as of :class:`~ntkgp.ExactNTKGP`, and "matrix_free", whose
    :math:`K_{yy}` is a product :math:`A\,\mathrm{jvp}(\Lambda^{-1}\mathrm{vjp}(A^\top\cdot))` behind conjugate
    gradients with a low-rank plus noise preconditioner. Its hyper-parameters come from :meth:`fit_sampled_evidence`,
    its pictures from :meth:`sample`.

    :param y: measurements, shape ``A.data_shape`` or flat.
    :param A: a forward operator, such as ``ntkgp.inverse.RayTransform``: ``image_shape``, ``data_shape``,
        ``num_measurements``, ``A(x)`` and ``A.adjoint(y)`` for batches.
    :param likelihood: ``GaussianLikelihood`` (learned noise), or ``FixedNoiseGaussianLikelihood`` with known variances
        of the flat measurements, alone or with ``learn_additional_noise=True``.
    :param lin: the linearised network, its example the one input, its C outputs the pixels. Its groups are those of
        the prior: ``groups="single"``, ``"layer"``, ``"normalization"``, or see :mod:`ntkgp.models.inverse.priors`.
    :param mean: ``"network"`` (the reported mean is the network's image) or ``"posterior"`` (h at θ⋆).
    :param weights: w > 0 of the measurements, such as transmission counts, in the shape of `y`: noise variances
        σ²/w, with w scaled to a geometric mean of one; needs a ``GaussianLikelihood``.
    :param x: the network's input, where `lin` was linearised with another example.
    :param form: "auto" (dual or primal by cost; matrix-free where the matrices do not fit in `max_memory`) or a form.
    :param max_memory: budget for Grams and matrices.
    :param progress: show a progress bar for passes in weight space.
    :raises ValueError: another shape of `y` or of the network's output than A has, NaN or infinite measurements,
        several inputs, an adjoint that is not the transpose, weights that are not positive.
    :raises TypeError: another likelihood, an A that is no forward operator.

    Cost: with n measurements and d pixels, the Grams once: min(n, d) backward passes at 28², then :math:`O(Gn^2 + n^3)`
    per evaluation of the evidence; the posterior d backward passes once, O(n·d·(n + d)). Matrix-free: two passes of the
    network per product and vector. Antorán, Barbano, Leuschner, Hernández-Lobato, Jin 2022, *Uncertainty estimation for
    computed tomography with a linearised deep image prior*, with the evidence of Antorán et al. 2022.

    >>> import gpytorch, ntkgp
    >>> class Blur(torch.nn.Module):  # keeps every second of 8 pixels' sums with their right neighbours
    ...     image_shape, data_shape, num_measurements = (8,), (4,), 4
    ...     rows = (torch.eye(8) + torch.eye(8).roll(1, 1))[::2]
    ...     def forward(self, image):
    ...         return image @ self.rows.mT.to(image)
    ...     def adjoint(self, data):
    ...         return data @ self.rows.to(data)
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))
    >>> lin = ntkgp.LinearizedNetwork(net, torch.ones(1, 3), groups="layer")
    >>> model = InverseNTKGP(torch.rand(4), Blur(), gpytorch.likelihoods.GaussianLikelihood(), lin)
    >>> report = ntkgp.fit_evidence(model)
    >>> image = model.eval()()
    >>> image.mean.shape, image.covariance_matrix.shape, model(Blur()).mean.shape
    (torch.Size([8]), torch.Size([8, 8]), torch.Size([4]))
    """

    def __init__(
        self,
        y: Tensor,
        A: Any,
        likelihood: gpytorch.likelihoods.Likelihood,
        lin: LinearizedNetwork,
        mean: str = "network",
        *,
        weights: Tensor | None = None,
        x: Any = None,
        form: str = "auto",
        max_memory: str | int | float = "2GiB",
        progress: bool = False,
    ) -> None:
        if not isinstance(lin, LinearizedNetwork):
            raise TypeError(f"lin: expected a ntkgp.LinearizedNetwork, got {type(lin).__name__}")
        if form not in FORMS:
            raise ValueError(f"form: expected one of {FORMS}, got {form!r}")
        if not isinstance(likelihood, GaussianLikelihood | FixedNoiseGaussianLikelihood):
            raise TypeError(
                "likelihood: expected gpytorch's GaussianLikelihood or FixedNoiseGaussianLikelihood for measurements, "
                f"got {type(likelihood).__name__}"
            )
        check_operator(A, lin)
        if weights is not None and has_fixed_noise(likelihood):
            raise ValueError("weights: the likelihood has noise variances of its own; expected a GaussianLikelihood")
        packed = image_input(lin, x)
        flat = measurements(y, A, "y").to(packed.device)
        roots = None if weights is None else root_weights(measurements(weights, A, "weights").to(packed.device))
        network = MeasuredNetwork(lin, packed, (A,), roots)
        self._inverse_form = form
        super().__init__(
            network.rows_of(0), flat if roots is None else flat * roots, likelihood, network, mean,
            max_memory=max_memory, form="dual" if form == "matrix_free" else form, progress=progress,
        )  # fmt: skip
        # Of the pixels' Gram at the last precisions, where those of the groups do not fit.
        self._pixels: tuple[Tensor, Tensor] | None = None

    lin: MeasuredNetwork

    @property
    def _rows(self) -> Tensor:
        """Packed indices of the measurements."""
        assert self.train_inputs is not None
        return self.train_inputs[0]

    @property
    def operator(self) -> Any:
        """The forward operator A."""
        return self.lin.shared.operators[0]

    @property
    def image_shape(self) -> torch.Size:
        """Shape of the image, as the operator has it."""
        return torch.Size(self.operator.image_shape)

    @property
    def reconstruction(self) -> Tensor:
        """The reported mean as an image, float64."""
        with torch.no_grad():
            return self._mean_image().reshape(self.image_shape)

    def _mean_image(self) -> Tensor:
        """The reported mean of the pixels, (d,): every other mean is measured of it."""
        if self.mean == "network":
            return self.lin.image
        pixels, factors = self.lin.rows_of(1), self._factors()[0]
        if self.form == "primal":
            return super()._mean(pixels)[:, 0]
        pulled = self.lin.vjp(self._rows, factors.alpha.unsqueeze(-1)).to(torch.float64)
        star = pulled / self.lin.groups.expand(self.kernel.precision.detach())
        return self.lin.image + self.lin.jvp(pixels, star - self.lin.theta)[:, 0]

    def _mean(self, x: Tensor, cross: Tensor | None = None) -> Tensor:
        return self._mean_of_now()(x)

    def _mean_of_now(self) -> ImageMean:
        return ImageMean(self.lin, self._mean_image())

    @property
    def noise_variance(self) -> Tensor:
        """Noise variances of the measurements as they are now, in their shape."""
        shape = torch.Size((self.lin.shared.sizes[0],))
        noise = self.likelihood._shaped_noise_covar(shape).diagonal().detach()
        roots = self.lin.shared.root_weights
        noise = noise if roots is None else noise / roots.square()
        return noise.expand(shape).reshape(self.operator.data_shape)

    def extra_repr(self) -> str:
        """Form and size."""
        if self.form == "matrix_free":
            return f"form='matrix_free' ({self._form.reason}), mean={self.mean!r}"
        return super().extra_repr()

    def _set_data(self, x: Any, y: Tensor | None) -> None:
        super()._set_data(x, y)
        form = self._form
        wanted = self._inverse_form == "matrix_free"
        if wanted or (self._inverse_form == "auto" and form.name == "dual" and form.nbytes > self.max_memory):
            reason = "as asked for" if wanted else f"max_memory {format_memory(self.max_memory)}"
            self._form = Form("matrix_free", form.rows, 0, f"{form.rows:,} measurements, {reason}")

    def set_train_data(self, inputs: Any = None, targets: Tensor | None = None, strict: bool = True) -> None:
        """Replace the measurements; the hyper-parameters and all that was computed for A stay.

        :param inputs: None, or the indices of the measurements.
        :param targets: new measurements y, in any shape that the constructor takes.
        """
        if targets is not None:
            flat, roots = measurements(targets, self.operator, "targets").to(self._rows), self.lin.shared.root_weights
            targets = flat if roots is None else flat * roots
        super().set_train_data(inputs, targets, strict)

    def _network_of_file(self) -> LinearizedNetwork:
        if isinstance(self.lin.base, DerivedNetwork):
            raise TypeError(
                "the prior has coordinates of its own (g_prior, filter_prior), which no file holds; keep state_dict() "
                "and make the model again"
            )
        return self.lin.base

    def _saved(self, training_data: bool) -> dict[str, Any]:
        """What the model is made of again but for its network, likelihood and operator."""
        if not training_data:
            raise ValueError(
                "training_data: a prediction needs the measurements; save the model with training_data=True"
            )
        roots = self.lin.shared.root_weights
        y: Any = self.train_targets
        y = y if roots is None else y / roots
        return {
            "seen": self._seen(), "x": self.lin.shared.x, "y": y,
            "weights": None if roots is None else roots.square(),
            "model": {"mean": self.mean, "max_memory": self.max_memory, "form": self._inverse_form},
        }  # fmt: skip

    @classmethod
    def _from_saved(cls, lin: LinearizedNetwork, likelihood: Any, state: dict[str, Any]) -> InverseNTKGP:
        """Inverse of :meth:`_saved`, with the operator in its place."""
        A, seen, options = state["operator"], state["seen"], state["model"]
        weights = state["weights"]
        model = cls(state["y"], A, likelihood, lin, weights=weights, x=state["x"], **options)
        if not torch.allclose(model._seen(), seen, rtol=1e-4, atol=1e-4 * float(seen.abs().max())):
            raise ValueError("operator: it measures the image of the network otherwise than the operator of the file")
        return model

    def _seen(self) -> Tensor:
        """A f(θ̃), flat."""
        return self.lin(self._rows)[:, 0]

    def __call__(self, x: Any = None, **kwargs: Any) -> MultivariateNormal:
        """Train mode: the prior of the measurements. Eval mode: the posterior of the pixels, or of what x says.

        :param x: eval mode: None for the pixels, a forward operator B for :math:`B h`, or packed indices of rows.
        """
        through = not isinstance(x, Tensor) and hasattr(x, "adjoint")
        if self.training and through:
            raise RuntimeError(
                "x: an operator asks for a prediction, and the model is in train mode; call model.eval()"
            )
        if self.training:
            return super().__call__(self._rows if x is None else x, **kwargs)
        if x is None:
            return super().__call__(self.lin.rows_of(1), **kwargs)
        if through:
            check_operator(x, self.lin.base, "x")
            return self._posterior_through(x)
        return super().__call__(x, **kwargs)

    def _distribution(self, mean: Tensor, covariance: LinearOperator | Tensor) -> MultivariateNormal:
        """One output per row."""
        return ImageNormal(mean.reshape(covariance.shape[:-1]), covariance)

    def _visit(self, x: Tensor | None) -> Any:
        """Pass over the measurements; over the pixels instead where these are few and their Grams fit."""
        if self.form == "matrix_free":
            assert x is not None
            return IterativeSide(self.lin, self.mean_module, x, self.max_memory)
        if self.form == "dual":
            measured, pixels = self.lin.shared.sizes[:2]
            if pixels <= 2 * measured and self._pixels_fit():
                with torch.no_grad():
                    self.lin.keep_pixels(self.max_memory, self._progress)
        return super()._visit(x)

    def _pixels_fit(self) -> bool:
        """Whether the Grams of the pixels can be kept beside those of the measurements."""
        measured, pixels = self.lin.shared.sizes[:2]
        groups = len(self.lin.groups)
        held = SymmetricGrams.size_of(groups, pixels) + SymmetricGrams.size_of(groups, measured)
        return held + 8 * 8 * max(pixels, measured) ** 2 <= self.max_memory

    def _pixel_gram(self) -> Tensor | None:
        """K of the pixels, (d, d), where it can be held: from kept Grams, or from one visit for these precisions."""
        pixels = self.lin.shared.sizes[1]
        if self.form != "dual" or 6 * 8 * pixels**2 > self.max_memory:
            return None
        variance = self.kernel.precision.detach().reciprocal().to(torch.float64)
        if self.lin.pixel_grams is None and self._pixels_fit():
            self.lin.keep_pixels(self.max_memory, self._progress)
        if self.lin.pixel_grams is not None:
            return self.lin.pixel_grams.weighted_sum(variance)
        if self._pixels is None or not torch.equal(self._pixels[0], variance):
            gram = self.lin.weighted_gram(self.lin.rows_of(1), None, variance, self.max_memory)
            self._pixels = variance.clone(), gram
        return self._pixels[1]

    def _posterior(self, x: Tensor) -> MultivariateNormal:
        """Latent posterior at packed indices."""
        if x.ndim == 2 and self.form == "matrix_free":
            return self._matrix_free_posterior(self.lin, x)
        if x.ndim != 2 or self.form != "dual":
            return super()._posterior(x)
        with torch.inference_mode(False), torch.no_grad():
            gram = self._pixel_gram()
            if gram is None:
                return super()._posterior(x)
            return self._through_pixels(self.lin, x, gram)

    def _posterior_through(self, operator: Any) -> MultivariateNormal:
        """Latent posterior of what another operator measures."""
        network = self.lin.with_operators(operator)
        x = network.rows_of(2)
        with torch.inference_mode(False), torch.no_grad():
            if self.form == "matrix_free":
                return self._matrix_free_posterior(network, x)
            gram = self._pixel_gram()
            if gram is not None:
                return self._through_pixels(network, x, gram)
            if self.form == "primal":
                return self._through_weights(network, x)
            variance = self.kernel.precision.detach().reciprocal().to(torch.float64)
            cross = network.weighted_gram(x, self._rows, variance, self.max_memory)
            return self._reduced(network, x, network.weighted_gram(x, None, variance, self.max_memory), cross)

    def _through_pixels(self, network: MeasuredNetwork, x: Tensor, gram: Tensor) -> MultivariateNormal:
        """Everything from the Gram of the pixels: Cov(Bh) = B Cov(h) Bᵀ."""
        rows, train = network._index(x), self.lin._index(self._rows)
        whole = torch.equal(rows, network.rows_of(1)[:, 0].long())
        left = gram if whole else network.project(gram, rows)  # shape: (T, d)
        prior = left if whole else network.shared.measure(left, rows)
        cross = network.shared.measure(left, train)
        return self._reduced(network, x, 0.5 * (prior + prior.mT), cross)

    def _reduced(self, network: MeasuredNetwork, x: Tensor, prior: Tensor, cross: Tensor) -> MultivariateNormal:
        """The posterior from prior covariance and cross-covariance."""
        covariance = PosteriorCovariance.from_root(prior, self._factors()[0].root(cross))
        return ImageNormal(ImageMean(network, self._mean_image())(x)[:, 0], covariance)

    def _through_weights(self, network: MeasuredNetwork, x: Tensor) -> MultivariateNormal:
        """The same in weight space, from the base model's own prediction of the pixels."""
        rows, pixels = network._index(x), super()._posterior(self.lin.rows_of(1))
        covariance = network.project(pixels.covariance_matrix, rows, rows)
        mean = network.shared.measure(pixels.mean.unsqueeze(0), rows)[0]
        return ImageNormal(mean, to_linear_operator(0.5 * (covariance + covariance.mT)))

    def _matrix_free_posterior(self, network: MeasuredNetwork, x: Tensor) -> MultivariateNormal:
        """The posterior as an operator that solves for every product."""
        with torch.inference_mode(False), torch.no_grad():
            handle = NetworkHandle(network, self.max_memory)
            variance = self.kernel.precision.detach().reciprocal().to(torch.float64)
            prior = NeuralTangentOperator(x, x, variance, handle)
            cross = NeuralTangentOperator(x, self._rows, variance, handle)
            covariance = PosteriorCovariance(prior, SolvedReduction(cross, self._factors()[0]))
            return ImageNormal(ImageMean(network, self._mean_image())(x)[:, 0], covariance)

    def pixel_covariance(self) -> Tensor:
        """The posterior covariance of the pixels, dense (d, d), in whatever mode the model is.

        :raises ValueError: it takes more than a quarter of `max_memory`.
        """
        needed = 4 * 8 * self.lin.shared.sizes[1] ** 2
        if needed > self.max_memory:
            raise ValueError(
                f"max_memory: {format_memory(self.max_memory)} is too small for the covariance of "
                f"{self.lin.shared.sizes[1]:,} pixels; the smallest possible is {format_memory(needed)}"
            )
        with torch.no_grad():
            return self._posterior(self.lin.rows_of(1)).covariance_matrix

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw images from the posterior by Matheron's rule in weight space, around the reported mean.

        :param num_samples: S ≥ 1.
        :param generator: makes the draw reproducible; the global random state is used without it.
        :return: shape (S, *image_shape), float64.

        Cost: 2·S forward-mode and S backward passes; O(S·n²) or S solves. Memory S·P.

        >>> import gpytorch, ntkgp
        >>> class Sum(torch.nn.Module):
        ...     image_shape, data_shape, num_measurements = (4,), (1,), 1
        ...     def forward(self, image):
        ...         return image.sum(-1, keepdim=True)
        ...     def adjoint(self, data):
        ...         return data.expand(*data.shape[:-1], 4)
        >>> lin = ntkgp.LinearizedNetwork(torch.nn.Linear(2, 4), torch.ones(1, 2))
        >>> model = InverseNTKGP(torch.ones(1), Sum(), gpytorch.likelihoods.GaussianLikelihood(), lin).eval()
        >>> model.sample(5, torch.Generator().manual_seed(0)).shape
        torch.Size([5, 4])
        """
        draws = self.sample_functions(num_samples, generator)
        with torch.no_grad():
            return draws(self.lin.rows_of(1)).reshape(num_samples, *self.image_shape)

    def standard_deviation(self, num_samples: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        r"""The error map: posterior standard deviations of the pixels, shape image_shape, float64.

        :param num_samples: None for the exact ones; S ≥ 1 to estimate them from S draws of :meth:`sample`, with a
            relative standard error of :math:`1/\sqrt{2S}`: for images whose covariance is too large.
        :param generator: of the draws.

        Cost: exact: a backward pass per pixel, besides the posterior's own; estimated: that of the draws.
        """
        with torch.no_grad():
            if num_samples is None:
                return self._posterior(self.lin.rows_of(1)).variance.sqrt().reshape(self.image_shape)
            draws = self.sample(num_samples, generator) - self.reconstruction
            return draws.square().mean(0).sqrt()

    def fit_sampled_evidence(self, num_samples: int = 16, **options: Any) -> SampledEvidence:
        """Fit and store the hyper-parameters on posterior draws, for measurements too many to factor.

        :param num_samples: see :func:`ntkgp.evidence.sampled_evidence`.
        :param options: its further ones.
        :return: what was found, in its report with standard errors of the logarithms.
        """
        options.setdefault("max_memory", self.max_memory)
        options.setdefault("form", "dual")
        found = sampled_evidence(self.lin, (self._rows, self.train_targets), self.likelihood, num_samples, **options)
        self.set_hyperparameters(found.precision, found.noise if found.noise.numel() else None)
        return found
