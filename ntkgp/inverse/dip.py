"""The deep image prior: an untrained network fitted to the measurements of one image."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from tqdm import tqdm

from ntkgp.inverse.geometry import Geometry
from ntkgp.inverse.noise import checked_measurements, estimate_noise
from ntkgp.inverse.operators import ForwardOperator
from ntkgp.inverse.pilot import ImageNetwork, check_network, filled, magnitude, pilot_image
from ntkgp.inverse.total_variation import TVPredCP, spatial_dims, total_variation
from ntkgp.inverse.unet import UNet
from ntkgp.linearization import LinearizedNetwork, ParameterGroups
from ntkgp.linearization.frozen import private_copy
from ntkgp.linearization.memory import parse_memory
from ntkgp.linearization.network import GROUPS

logger = logging.getLogger("ntkgp")

STOPS = ("discrepancy", "held_out")
INPUTS = ("auto", "fbp", "adjoint", "random")
_TV = 3.0  # weight of TV against a noise of variance one, for an image of range one
_RANDOM_CHANNELS = 32
_PROBES = 200
_PATIENCE, _PLATEAU = 200, 500  # iterations without progress that a fit is allowed at least
_SCALARS = (
    "noise", "scale", "tv_weight", "iteration", "best_iteration", "stopped_by", "residual", "_level", "_landmark"
)  # fmt: skip


class DeepImagePrior:
    r"""An image :math:`f(\theta)` whose network is fitted to its measurements :math:`y = A x + \varepsilon` alone.

    .. math:: \tilde\theta \approx \arg\min_\theta \tfrac{1}{d_y} \|A f(\theta) - y\|^2 + \gamma\, TV(f(\theta))

    by Adam from random weights, and *stopped early*: a network with more weights than measurements ends up fitting the
    noise. It is stopped where the residuals are what the noise is,

    * ``stop="discrepancy"``: at the first iterate with :math:`\|A f - y\|^2 \le \tau\, d_y \hat\sigma^2`
      (Morozov's principle), with σ̂ given or estimated from the measurements before the fit
      (:func:`~ntkgp.inverse.noise.estimate_noise`);
    * ``stop="held_out"``: at the iterate that best predicts a part of the measurements that neither the loss nor the
      network's input has seen; the search ends when it has not improved by a hundredth in the last third of the
      iterations.

    Nothing is tuned to the number of measurements, and no true image is looked at.

    :param A: forward operator: ``image_shape``, ``data_shape``, a differentiable call and ``adjoint``.
    :param net: any network whose output has as many numbers as the image; copied, never modified, and fitted from the
        weights that it has. ``None`` for a :class:`~ntkgp.inverse.unet.UNet` with these options of its own:
    :param unet: keywords of the U-Net, such as ``channels``, ``norm="group"``, ``output="sigmoid"``.
    :param input: the network's constant input: ``"fbp"``, ``"adjoint"``, ``"random"`` (32 channels of noise), a tensor
        with one row, or ``"auto"``: the operator's FBP, else a few steps of least squares. Images made of measurements
        leave held-out ones away, and are divided by ``scale``.
    :param scale: of the image: f = scale·net(input), so that the network works with numbers around one. ``None``: the
        size of the pilot image for the U-Net with linear outputs, else 1.
    :param tv_weight: γ; ``None`` for :math:`2 \hat\sigma^2 / (d_y\, b)`, b the size of the pilot image: a difference of
        neighbours of that size weighs as much as a residual of :math:`\sqrt2\,\sigma`.
    :param isotropic: of the two total variations.
    :param stop: ``"discrepancy"`` or ``"held_out"``.
    :param noise: σ, a number, or the known standard deviations of the measurements in their shape, by which the
        residuals in the loss and in the rule are then weighted. ``None`` to estimate one number.
    :param tau: τ of the discrepancy principle.
    :param held_out: the part of the measurements, a fraction or a boolean mask in their shape.
    :param learning_rate: of Adam.
    :param max_iterations: after which the best iterate so far is kept, with a warning; as where the loss stops falling
        before the discrepancy is reached.
    :param dtype: of the network and the iterations.
    :param seed: of the U-Net's weights, a random input, the held-out part and dropout.
    :param progress: show a progress bar with the residual.
    :param callback: called as ``callback(dip)`` every ``callback_every`` iterations, with ``dip.current`` the present
        picture and ``dip.iteration``, ``dip.residual`` where the fit stands.
    :param callback_every: iterations.
    :raises ValueError: an option out of its range, or an operator and a network that do not fit.
    :raises TypeError: something that is no forward operator.

    The global random state, the network given and its mode never change. An interrupt (``KeyboardInterrupt``) ends the
    fit with the best iterate so far, and :meth:`resume` goes on, also from :meth:`state_dict` on another day, with the
    same iterates as without it. The network runs in evaluation mode but for its dropout, as it is linearised.

    After :meth:`fit`: ``reconstruction`` in image_shape; ``noise``, the σ that was given or estimated (a tensor where
    it was one); ``net`` with the input ``input``; ``history``, the residual root mean square over σ of every iteration;
    ``best_iteration``; ``stopped_by``: "discrepancy", "held_out", "plateau", "max_iterations" or "interrupt"; and
    ``tv_weight``.

    Cost: a forward and a backward pass of network and operator for each iteration: about 10 ms at 28² with the default
    U-Net on one core, 60 ms at 128².

    Source: Ulyanov, Vedaldi & Lempitsky, CVPR 2018; Baguer, Leuschner & Schmidt, *Computed tomography reconstruction
    using deep image prior and learned reconstruction methods*, Inverse Problems 2020 (TV); Morozov 1966.

    >>> from ntkgp.inverse.geometry import ParallelBeam
    >>> from ntkgp.inverse.operators import RayTransform
    >>> x = torch.zeros(12, 12)
    >>> x[2:6, 3:9] = 1.0
    >>> A = RayTransform(ParallelBeam((12, 12), torch.arange(8) * torch.pi / 8))
    >>> y = A(x) + 0.3 * torch.randn(A.data_shape, generator=torch.Generator().manual_seed(0))
    >>> dip = DeepImagePrior(A, noise=0.3, unet={"channels": (8, 8), "skip_channels": (2,), "norm": "group"}).fit(y)
    >>> dip.reconstruction.shape, dip.stopped_by
    (torch.Size([12, 12]), 'discrepancy')
    """

    def __init__(
        self,
        A: ForwardOperator,
        net: nn.Module | None = None,
        *,
        unet: Mapping[str, Any] | None = None,
        input: str | Tensor = "auto",
        scale: float | None = None,
        tv_weight: float | None = None,
        isotropic: bool = False,
        stop: str = "discrepancy",
        noise: float | Tensor | None = None,
        tau: float = 1.0,
        held_out: float | Tensor = 0.1,
        learning_rate: float = 1e-3,
        max_iterations: int = 20_000,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        progress: bool = False,
        callback: Callable[[DeepImagePrior], None] | None = None,
        callback_every: int = 50,
    ) -> None:
        if not isinstance(A, ForwardOperator):
            hint = "; make it RayTransform(geometry)" if isinstance(A, Geometry) else ""
            raise TypeError(f"A: expected a ntkgp.inverse.ForwardOperator, got {type(A).__name__}{hint}")
        if stop not in STOPS:
            raise ValueError(f"stop: expected one of {STOPS}, got {stop!r}")
        if not (isinstance(input, Tensor) or input in INPUTS):
            raise ValueError(f"input: expected one of {INPUTS} or a tensor, got {input!r}")
        if net is not None and unet:
            raise ValueError("unet: its options are for net=None; a network is given")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
        for name, value in (
            ("scale", scale), ("tau", tau), ("learning_rate", learning_rate), ("max_iterations", max_iterations),
            ("callback_every", callback_every),
        ):  # fmt: skip
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a positive number, got {value!r}")
        if tv_weight is not None and not (math.isfinite(tv_weight) and tv_weight >= 0):
            raise ValueError(f"tv_weight: expected a number >= 0, got {tv_weight!r}")
        self.A, self._given_net, self._unet = A, net, dict(unet or {})
        self._asked_input, self._asked_scale, self._asked_tv = input, scale, tv_weight
        self.isotropic, self.stop, self._asked_noise, self.tau = isotropic, stop, noise, float(tau)
        self._asked_held_out, self.learning_rate, self.max_iterations = held_out, learning_rate, int(max_iterations)
        self.dtype, self.seed, self.progress = dtype, seed, progress
        self.callback, self.callback_every = callback, int(callback_every)
        self._module: ImageNetwork | None = None
        self._mean = 0.5  # of the first image

    # Set by `fit`; see the docstring of the class.
    noise: float | Tensor
    input: Tensor
    scale: float
    tv_weight: float
    history: list[float]
    iteration: int
    best_iteration: int
    stopped_by: str | None
    residual: float
    current: Tensor

    def fit(self, y: Tensor) -> DeepImagePrior:
        """Fit the network to measurements, from the beginning; return itself.

        :param y: in ``A.data_shape``, finite.
        :raises ValueError: another shape, or numbers that are not finite.
        :raises FloatingPointError: a loss that is not finite.
        """
        y = checked_measurements(y, self.A)
        with self._own_randomness(None):
            torch.manual_seed(self.seed)
            self._prepare(y)
            self._start(self._make_module())
            return self._run()

    def resume(self, max_iterations: int | None = None) -> DeepImagePrior:
        """Go on where a fit ended or was interrupted, or where the state that was loaded stands; return itself.

        A fit whose rule is met stays as it is, unless ``tau`` was set to another value.

        :param max_iterations: in total, instead of the constructor's.
        :raises RuntimeError: nothing was fitted or loaded.
        """
        self._fitted()
        if max_iterations is not None:
            self.max_iterations = int(max_iterations)
        if self.stopped_by == "discrepancy":
            self._best_value = math.inf  # the rule may be another one now
        with self._own_randomness(self._random_state):
            return self._run()

    @property
    def net(self) -> ImageNetwork:
        """A copy of the network at its best iterate, in evaluation mode: ``input`` -> (1, *image_shape)."""
        module = copy.deepcopy(self._fitted())
        module.load_state_dict(self._best)
        _lay_out(module, torch.contiguous_format)
        return module.eval()

    @property
    def reconstruction(self) -> Tensor:
        """The image at the best iterate, ``A.image_shape``, in the iterations' dtype."""
        with torch.no_grad():
            return self.net(self.input)[0]

    def linearize(
        self, groups: str | ParameterGroups = "normalization", *, parameters: str = "all", **options: Any
    ) -> LinearizedNetwork:
        r"""The tangent model of the fitted network: one input, as many outputs as pixels, in units of the image.

        :param groups: as :class:`~ntkgp.LinearizedNetwork` takes them, or ``"block"``: one group for each child of the
            network (of the U-Net: ``inc``, ``down{i}``, ``skip{i}``, ``up{i}``, ``out``).
        :param parameters: ``"all"``, or ``"convolutions"`` for the kernels of convolutions only, as bayes_dip has it.
        :param options: of :class:`~ntkgp.LinearizedNetwork`.
        :raises ValueError: an unknown choice of groups or parameters, or no convolution.
        """
        net = self.net
        if isinstance(groups, str) and groups not in (*GROUPS, "block"):
            raise ValueError(f"groups: expected one of {(*GROUPS, 'block')} or a ntkgp.ParameterGroups, got {groups!r}")
        if parameters not in ("all", "convolutions"):
            raise ValueError(f"parameters: expected 'all' or 'convolutions', got {parameters!r}")
        if parameters == "convolutions":
            kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
            kernels = {id(m.weight) for m in net.modules() if isinstance(m, kinds)}
            for parameter in net.parameters():
                parameter.requires_grad_(parameter.requires_grad and id(parameter) in kernels)
        if groups == "block":
            partition: dict[str, list[str]] = {}
            for name, parameter in net.named_parameters():
                if parameter.requires_grad:
                    partition.setdefault(name.split(".")[1], []).append(name)
            groups = ParameterGroups(partition) if partition else "single"
        return LinearizedNetwork(net, self.input, groups=groups, **options)

    def predcp(self, lin: LinearizedNetwork, scale: float = 1.0, **options: Any) -> TVPredCP:
        r"""The hyper-prior of expected total variations at the rate :math:`\text{scale}\cdot d_y\,\gamma`.

        d_y because the evidence has the sum of squares where the fit's loss has the mean.

        :param lin: of :meth:`linearize`.
        :param scale: bayes_dip's is 1, and 50 for its walnut.
        :param options: of :class:`~ntkgp.inverse.total_variation.TVPredCP`. Images whose Gram over pixels does not fit
            in ``max_memory`` (2 GiB) are probed with 200 random weight vectors by default.
        :raises ValueError: a fit without total variation.
        """
        if lin.gram_memory(1, 1) > parse_memory(options.get("max_memory", "2GiB")):
            options = {"num_probes": _PROBES, **options}
        rate = scale * math.prod(self.A.data_shape) * self.tv_weight
        return TVPredCP(lin, self.input, rate, image_shape=tuple(self.A.image_shape), **options)

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`resume` and the results need, but for operator, network class and options; for torch.save."""
        module = self._fitted()
        return {
            "net": copy.deepcopy(module.state_dict()), "best": copy.deepcopy(self._best),
            "optimizer": copy.deepcopy(self._optimizer.state_dict()), "random_state": self._random_state.clone(),
            "y": self._y.clone(), "kept": self._kept.clone(), "weights": self._weights.clone(),
            "input": self.input.clone(), "history": list(self.history), "best_value": self._best_value,
            **{name: getattr(self, name) for name in _SCALARS},
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> DeepImagePrior:
        """Take the state of a fit with the same operator, network and options; return itself.

        :raises ValueError: missing or unknown entries, or a state of another network or operator.
        """
        own = {"net", "best", "optimizer", "random_state", "y", "kept", "weights", "input", "history", "best_value"}
        if set(state) != own | set(_SCALARS):
            raise ValueError(f"state: missing or unknown entries {sorted((own | set(_SCALARS)) ^ set(state))}")
        self._y = checked_measurements(state["y"], self.A, "state['y']").clone()
        self._kept, self._weights = state["kept"].clone(), state["weights"].clone()
        self.input, self.history = state["input"].clone(), list(state["history"])
        for name in _SCALARS:
            setattr(self, name, state[name])
        with self._own_randomness(None):
            module = self._make_module()
        try:
            module.load_state_dict(state["net"])
        except RuntimeError as reason:
            raise ValueError(f"state: it belongs to another network ({reason})") from reason
        self._install(module)
        self._optimizer.load_state_dict(state["optimizer"])
        self._best, self._best_value = copy.deepcopy(dict(state["best"])), state["best_value"]
        self._random_state = state["random_state"].clone()
        return self

    def _fitted(self) -> ImageNetwork:
        if self._module is None:
            raise RuntimeError("DeepImagePrior: call fit(y) or load_state_dict(state) first")
        return self._module

    @contextmanager
    def _own_randomness(self, state: Tensor | None) -> Iterator[None]:
        """A random state of the fit's own; the global one is put back."""
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            if state is not None:
                torch.set_rng_state(state)
            yield

    def _prepare(self, y: Tensor) -> None:
        """Everything that is fixed before the first iteration: held-out part, noise, input, scale, γ."""
        self._kept = self._kept_measurements(y)
        self._weights = torch.ones_like(y, dtype=self.dtype)
        self._y = y.to(self.dtype)
        given = self._asked_noise
        if isinstance(given, Tensor) and given.dim() > 0:
            if given.shape != y.shape or not bool((given > 0).all() and given.isfinite().all()):
                raise ValueError(
                    f"noise: expected positive numbers of shape {tuple(y.shape)}, got {tuple(given.shape)}"
                )
            self.noise = given.detach().clone()
            level = float(given.double().square().mean().sqrt())
            self._weights = (level / given).to(self.dtype)
        else:
            if given is not None and not (math.isfinite(float(given)) and float(given) > 0):
                raise ValueError(f"noise: expected a positive number, got {given!r}")
            level = estimate_noise(y, self.A, progress=self.progress).sd if given is None else float(given)
            self.noise = level
        self._level = level
        kind = self._asked_input if self._asked_input in ("fbp", "adjoint") else "auto"
        pilot = pilot_image(self.A, filled(y, self._kept), str(kind))
        size = magnitude(pilot)
        own = self._given_net is None and self._unet.get("output", "linear") == "linear"
        self.scale = float(self._asked_scale or (size if own else 1.0))
        self._mean = float(pilot.mean()) / self.scale
        self.input = self._make_input(pilot)
        automatic = _TV * 2 * level**2 / (y.numel() * size)
        self.tv_weight = automatic if self._asked_tv is None else float(self._asked_tv)

    def _kept_measurements(self, y: Tensor) -> Tensor:
        """Which measurements the loss sees, in their shape."""
        if self.stop == "discrepancy":
            return torch.ones_like(y, dtype=torch.bool)
        part = self._asked_held_out
        if isinstance(part, Tensor):
            if part.dtype != torch.bool or part.shape != y.shape or not bool(part.any()) or bool(part.all()):
                raise ValueError(
                    f"held_out: expected a boolean mask of shape {tuple(y.shape)} that is neither empty nor full, "
                    f"got {part.dtype} of shape {tuple(part.shape)}"
                )
            return ~part
        count = round(part * y.numel())
        if not 0 < part < 1 or not 0 < count < y.numel():
            raise ValueError(f"held_out: expected a fraction that leaves measurements on both sides, got {part!r}")
        kept = torch.ones(y.numel(), dtype=torch.bool)
        kept[torch.randperm(y.numel())[:count]] = False
        return kept.reshape(y.shape).to(y.device)

    def _make_input(self, pilot: Tensor) -> Tensor:
        """The network's constant input, with a first dimension of 1."""
        asked = self._asked_input
        if isinstance(asked, Tensor):
            if asked.dim() == 0 or len(asked) != 1 or not bool(asked.isfinite().all()):
                raise ValueError(f"input: expected one row of finite numbers, got shape {tuple(asked.shape)}")
            return asked.detach().to(self._y)
        shape = tuple(self.A.image_shape)
        shape = (1, 1, *shape) if len(shape) == 2 else (1, *shape)
        if asked == "random":
            channels = _RANDOM_CHANNELS if self._given_net is None else shape[1]
            return 0.1 * torch.rand(1, channels, *shape[2:], dtype=self.dtype).to(self._y)
        return (pilot.to(self._y) / self.scale).reshape(shape)

    def _make_module(self) -> ImageNetwork:
        """The network in units of the image: a copy of the one given, or a U-Net."""
        shape = tuple(self.A.image_shape)
        if self._given_net is not None:
            net = private_copy(self._given_net)
        else:
            if len(shape) not in (2, 3):
                raise ValueError(f"net: the U-Net needs images (H, W) or (channels, H, W), not {shape}; give a network")
            channels = 1 if len(shape) == 2 else shape[0]
            net = UNet(self.input.shape[1], channels, **self._unet).start_at(self._mean)
        module = ImageNetwork(net, shape, self.scale).to(self._y)
        check_network(module, self.input)
        return module

    def _install(self, module: ImageNetwork) -> None:
        """Make a module the one that is fitted."""
        module.eval()
        for part in module.modules():
            if isinstance(part, _DropoutNd):
                part.train()
        if self.input.dim() == 4:
            _lay_out(module, torch.channels_last)  # 15 to 30 % faster on one thread
        parameters = [p for p in module.parameters() if p.requires_grad]
        self._module = module
        self._live = {name: tensor.detach() for name, tensor in module.state_dict().items()}
        self._optimizer = torch.optim.Adam(parameters, lr=self.learning_rate, fused=True)

    def _start(self, module: ImageNetwork) -> None:
        self._install(module)
        self.iteration = self.best_iteration = 0
        self.history, self.stopped_by, self._best_value = [], None, math.inf
        self._landmark, self.residual = (0, math.inf), math.inf
        self._best, self._random_state = copy.deepcopy(module.state_dict()), torch.get_rng_state()

    def _run(self) -> DeepImagePrior:
        """Iterate until a rule, the largest number of iterations or an interrupt ends it."""
        self.stopped_by = None
        bar = tqdm(
            desc="deep image prior", total=self.max_iterations, initial=self.iteration, disable=not self.progress
        )
        try:
            with bar:
                while not self._ends() and self.iteration < self.max_iterations:
                    self._step()
                    bar.update()
                    if self.iteration % self.callback_every == 0:
                        bar.set_postfix(residual=f"{self.residual:.3f}", best=self.best_iteration, refresh=False)
                        if self.callback is not None:
                            self.callback(self)
        except KeyboardInterrupt:
            self.stopped_by = "interrupt"
            logger.info("DeepImagePrior: interrupted at iteration %d", self.iteration)
        self.stopped_by = self.stopped_by or "max_iterations"
        if self.stopped_by in ("max_iterations", "plateau"):
            warnings.warn(
                f"DeepImagePrior: the rule {self.stop!r} was not met after {self.iteration} iterations "
                f"({self.stopped_by}); iterate {self.best_iteration}, of residual "
                f"{self.history[self.best_iteration]:.3g} σ, is kept. A smaller tv_weight or "
                "learning_rate, more iterations or another noise level may be needed",
                UserWarning,
                stacklevel=3,
            )
        return self

    def _ends(self) -> bool:
        """Evaluate the present iterate; whether the rule ends the fit here."""
        assert self._module is not None
        image = self._module(self.input)
        error = (self.A(image)[0] - self._y) * self._weights
        square = error[self._kept].square().mean()
        variation = total_variation(image, spatial_dims(self.A.image_shape), isotropic=self.isotropic)
        self._loss = square + self.tv_weight * variation if self.tv_weight else square
        self.current = image.detach()[0]
        self.residual = math.sqrt(float(square.detach())) / self._level
        if not math.isfinite(self.residual):
            raise FloatingPointError(
                f"DeepImagePrior: the loss became {float(self._loss.detach())} at iteration {self.iteration}; "
                "lower learning_rate"
            )
        self.history[self.iteration :] = [self.residual]
        if self.stop == "discrepancy":
            self._keep_best(float(self._loss.detach()))
            done = self.residual**2 <= self.tau
            if done:
                self._keep_best(-math.inf)
            elif self._is_flat(float(self._loss.detach()), _PLATEAU):
                self.stopped_by = "plateau"
                return True
        else:
            value = float(error.detach()[~self._kept].square().mean())
            self._keep_best(value)
            done = self._is_flat(value, _PATIENCE)
        if done:
            self.stopped_by = self.stop
        return done

    def _is_flat(self, value: float, least: int) -> bool:
        """Whether a value has fallen by less than a hundredth in the last third of the iterations, so many at least."""
        if value < 0.99 * self._landmark[1]:
            self._landmark = (self.iteration, value)
        return self.iteration - self._landmark[0] >= max(least, self.iteration // 3)

    def _keep_best(self, value: float) -> None:
        """Keep the present weights if their value is the least so far."""
        if value < self._best_value:
            # Made whole before it is kept: an interrupt may come at any time.
            best = {name: tensor.clone() for name, tensor in self._live.items()}
            self._best, self._best_value, self.best_iteration = best, value, self.iteration

    def _step(self) -> None:
        """One step of the optimizer from the iterate that was evaluated last."""
        self._optimizer.zero_grad()
        self._loss.backward()
        self._optimizer.step()
        self.iteration += 1
        self._random_state = torch.get_rng_state()


def _lay_out(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Put the kernels of two-dimensional convolutions into another order in memory; drop gradients."""
    for parameter in module.parameters():
        parameter.grad = None
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
