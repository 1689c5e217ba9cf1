"""Several networks instead of one: deep ensembles, Monte-Carlo dropout and SWAG."""

from __future__ import annotations

import copy
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from ntkgp.baselines.references import OutputSamples, minibatches, positive, training_loss
from ntkgp.linearization.frozen import private_copy
from ntkgp.models.batches import Batches

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger("ntkgp")

_DIVERGED = 10.0  # of an epoch's mean training loss, relative to the first one's

Train = Callable[[nn.Module, Any], nn.Module | None]


def reinitialized(net: nn.Module) -> nn.Module:
    """A copy of the network with new random weights; layers with frozen parameters keep theirs.

    :raises ValueError: parameters that no ``reset_parameters`` draws anew.
    """
    copied = copy.deepcopy(net)
    for name, module in copied.named_modules():
        own = list(module.parameters(recurse=False))
        if any(not p.requires_grad for p in own):
            continue
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is not None:
            reset()
        elif own:
            raise ValueError(
                f"net: {name or 'the module itself'!r} ({type(module).__name__}) has parameters and no "
                "reset_parameters(); pass factory=, a function that returns a new untrained network"
            )
    return copied


class DeepEnsemble(OutputSamples):
    r"""Networks trained from different random weights, mixed with equal weights.

    :param train: ``train(net, train_data)`` trains an untrained network in place, or returns the trained one; it gets
        what ``fit`` gets.
    :param members: trained networks, instead of ``train``; their outputs must have the shape of the network's own.
    :param size: number of networks, 5 by default.
    :param factory: returns a new untrained network; by default a copy of ``net`` with all layers reset.
    :param include_net: whether ``net`` itself is one of the ``size`` networks, so that only the others are trained.
    :param validation: held-out data for the noise or the temperature, in the forms that ``fit`` takes.
    :raises ValueError: neither ``train`` nor ``members``, or both.

    Member i is made and trained with torch's seed ``seed + i``; the global random state is left alone. All networks
    have one noise (a network has no output for it).

    Cost: ``size`` trainings and ``size`` forward passes.

    Source: Lakshminarayanan et al., *Simple and scalable predictive uncertainty estimation using deep ensembles*,
    NeurIPS 2017, without adversarial training.

    >>> def train(net, data):
    ...     optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    ...     for _ in range(50):
    ...         optimizer.zero_grad()
    ...         (net(data[0]) - data[1]).square().mean().backward()
    ...         optimizer.step()
    >>> x = torch.linspace(-1, 1, 20).unsqueeze(-1)
    >>> ensemble = DeepEnsemble(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)), train=train, size=3)
    >>> ensemble.fit((x, x**2)).predict(x[:4]).mean.shape
    torch.Size([4])
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: str = "regression",
        *,
        train: Train | None = None,
        members: Sequence[nn.Module] | None = None,
        size: int = 5,
        factory: Callable[[], nn.Module] | None = None,
        include_net: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(net, likelihood, **common)
        if (train is None) == (members is None):
            raise ValueError("train, members: expected one of them, a function that trains or trained networks")
        if members is not None and len(members) == 0:
            raise ValueError("members: expected at least one network, got none")
        self.size, self.include_net = positive("size", size), include_net
        self._train, self._given, self._factory = train, members, factory
        self.members: list[nn.Module] = []
        self._data: Any = None

    def fit(self, train_data: Any) -> Self:
        """Train the members on the data as they are given here; return itself."""
        self._data = train_data
        try:
            super().fit(train_data)
        finally:
            self._data = None
        return self

    def _prepare(self, batches: Batches) -> None:
        if self._given is not None:
            found = [private_copy(member) for member in self._given]
        else:
            first = [private_copy(self.net)] if self.include_net else []
            missing = range(len(first), self.size)
            found = first + [self._trained(i) for i in tqdm(missing, "members", disable=not self.progress)]
        self.members = [member.to(self.lin.frozen.device) for member in found]
        x = next(iter(batches))[0][:2]
        for index, member in enumerate(self.members):
            with self._environment():
                outputs = self._outputs(member, x)
            if outputs.shape[-1] != self.lin.num_outputs or not bool(outputs.isfinite().all()):
                raise ValueError(
                    f"member {index}: expected C = {self.lin.num_outputs} finite outputs per row, "
                    f"got shape {tuple(outputs.shape)}, finite: {bool(outputs.isfinite().all())}"
                )

    def _trained(self, index: int) -> nn.Module:
        assert self._train is not None
        cuda = list(range(torch.cuda.device_count()))
        with torch.random.fork_rng(devices=cuda), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(self.seed + index)
            net = reinitialized(self.net) if self._factory is None else self._factory()
            net.train()
            found = self._train(net, self._data)
        if found is not None and not isinstance(found, nn.Module):
            raise TypeError(
                f"train: expected it to return a network, or None after training in place, got {type(found).__name__}"
            )
        return private_copy(net if found is None else found)

    def _samples(self, x: Tensor) -> Tensor:
        with self._environment():
            return torch.stack([self._outputs(member, x) for member in self.members])

    def _get_state(self) -> dict[str, Tensor]:
        state = super()._get_state()
        for index, member in enumerate(self.members):
            state |= {f"members.{index}.{name}": value for name, value in member.state_dict().items()}
        return state

    def _set_state(self, state: dict[str, Tensor]) -> None:
        # Members of other architectures than `net` come from `factory`.
        own = {name: value for name, value in state.items() if not name.startswith("members.")}
        parts: dict[int, dict[str, Tensor]] = {}
        for name in state.keys() - own.keys():
            _, number, entry = name.split(".", 2)
            parts.setdefault(int(number), {})[entry] = state[name]
        if not parts:
            raise ValueError("state: missing the tensors of members")
        super()._set_state(own)
        self.members = []
        for index in sorted(parts):
            member = private_copy(self.net if self._factory is None else self._factory())
            member.load_state_dict(parts[index])
            self.members.append(member.to(self.lin.frozen.device))


class MCDropout(OutputSamples):
    r"""Monte-Carlo dropout: the network with its dropout left on, ``num_samples`` times.

    Everything that follows ``module.training`` runs as in training, except normalisation with running statistics, which
    keeps them. The same call gives the same prediction.

    :param num_samples: forward passes per prediction.
    :param rate: dropout probability of every dropout layer, instead of their own.
    :param validation: held-out data for the noise or the temperature, in the forms that ``fit`` takes.
    :raises ValueError: (by ``fit``) a network that is not random in training mode.

    Cost: ``num_samples`` forward passes.

    Source: Gal & Ghahramani, *Dropout as a Bayesian approximation*, ICML 2016; the noise is fitted, not searched.

    >>> net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))
    >>> x = torch.linspace(-1, 1, 20).unsqueeze(-1)
    >>> MCDropout(net).fit((x, x)).predict(x[:3]).stddev.shape
    torch.Size([3])
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: str = "regression",
        *,
        num_samples: int = 50,
        rate: float | None = None,
        **common: Any,
    ) -> None:
        super().__init__(net, likelihood, **common)
        if rate is not None and not 0 < rate < 1:
            raise ValueError(f"rate: expected a probability between 0 and 1, got {rate!r}")
        self.num_samples, self.rate = positive("num_samples", num_samples), rate
        self._module: nn.Module | None = None

    def _random_module(self) -> nn.Module:
        """The private copy with what is random switched on."""
        if self._module is None:
            module = private_copy(self.net).train()
            for part in module.modules():
                if isinstance(part, _NormBase):
                    part.eval()
                if isinstance(part, _DropoutNd) and self.rate is not None:
                    part.p = self.rate
            self._module = module
        return self._module

    def _prepare(self, batches: Batches) -> None:
        self._module = None
        samples = self._samples(next(iter(batches))[0][:64])
        if bool((samples == samples[0]).all()) and self.num_samples > 1:
            raise ValueError("net: its outputs are not random in training mode; expected dropout with 0 < p < 1")

    def _samples(self, x: Tensor) -> Tensor:
        module, found = self._random_module(), []
        with self._environment():
            for index in range(self.num_samples):
                torch.manual_seed(self.seed + index)
                found.append(self._outputs(module, x))
        return torch.stack(found)


class SWAG(OutputSamples):
    r"""SWAG: a Gaussian over the weights from the moments of SGD iterates around the trained weights.

    .. math:: \theta = \bar\theta + \tfrac1{\sqrt2} \Sigma_\text{diag}^{1/2} z_1
        + \tfrac1{\sqrt{2(K-1)}} \hat D z_2

    with :math:`\hat D` the last K = ``rank`` deviations from the running mean; ``rank=0`` is the diagonal form
    :math:`\bar\theta + \Sigma_\text{diag}^{1/2} z`. BatchNorm statistics are computed anew for each drawn network.

    :param rank: K, or 0.
    :param num_snapshots: passes over the data, with one iterate taken after each.
    :param learning_rate: of SGD; the iterates' spread, so the posterior's width, depends on it.
    :param momentum: of SGD.
    :param weight_decay: of SGD.
    :param batch_size: rows per step; a DataLoader has its own. With all rows in one batch there is no noise.
    :param num_samples: networks that are drawn.
    :param validation: held-out data for the noise or the temperature, in the forms that ``fit`` takes.
    :raises ValueError: a rank of 1 or beyond ``num_snapshots``, or numbers that are not positive.
    :raises FloatingPointError: (by ``fit``) a loss that is not finite.

    The loss is the mean squared error or the cross-entropy. Drawn weights have mean :math:`\bar\theta`
    (:attr:`mean`), and :attr:`variance` and :attr:`deviations` hold the rest of the Gaussian.

    Cost: ``num_snapshots`` epochs of training; ``num_samples`` passes over the data where there is BatchNorm.

    Source: Maddox et al., *A simple baseline for Bayesian uncertainty in deep learning*, NeurIPS 2019, Algorithm 1;
    defaults of the optimiser as laplace-torch has them.

    >>> net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    >>> x = torch.linspace(-1, 1, 64).unsqueeze(-1)
    >>> SWAG(net, rank=5, num_snapshots=10, num_samples=8).fit((x, x**2)).predict(x[:3]).stddev.shape
    torch.Size([3])
    """

    _state = ("noise", "temperature", "mean", "variance", "deviations", "weights", "statistics")
    mean: Tensor  # (P,)
    variance: Tensor  # diagonal, (P,)
    deviations: Tensor  # D̂ᵀ, (K, P)
    weights: Tensor  # drawn, (S, P)
    statistics: Tensor  # BatchNorm's, of each draw, (S, B)

    def __init__(
        self,
        net: nn.Module,
        likelihood: str = "regression",
        *,
        rank: int = 20,
        num_snapshots: int = 40,
        learning_rate: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 3e-4,
        batch_size: int = 32,
        num_samples: int = 30,
        **common: Any,
    ) -> None:
        super().__init__(net, likelihood, **common)
        self.num_snapshots, self.num_samples = (
            positive("num_snapshots", num_snapshots), positive("num_samples", num_samples)
        )  # fmt: skip
        if rank != 0 and not 2 <= rank <= num_snapshots:
            raise ValueError(f"rank: expected 0 or 2 to num_snapshots = {num_snapshots}, got {rank}")
        if not 0 <= momentum < 1 or weight_decay < 0:
            raise ValueError(
                f"momentum, weight_decay: expected 0 <= momentum < 1 and weight_decay >= 0, "
                f"got {momentum} and {weight_decay}"
            )
        self.rank, self.momentum, self.weight_decay = rank, momentum, weight_decay
        self.learning_rate = positive("learning_rate", learning_rate, float)
        self.batch_size = positive("batch_size", batch_size)
        self._module: nn.Module | None = None

    def _set_state(self, state: dict[str, Tensor]) -> None:
        super()._set_state(state)
        self._module = None

    def _prepare(self, batches: Batches) -> None:
        module = private_copy(self.net)
        with self._environment():
            torch.manual_seed(self.seed)
            self._collect(module, batches)
            generator = torch.Generator().manual_seed(self.seed)
            self.weights = torch.stack([self._draw(generator) for _ in range(self.num_samples)])
            found = []
            for weights in tqdm(self.weights, "draws", disable=not self.progress):
                self._set(module, weights)
                found.append(self._recomputed(module, batches))
        self.statistics, self._module = torch.stack(found), module.eval()

    def _collect(self, module: nn.Module, batches: Batches) -> None:
        """SGD from the trained weights, and the moments of its iterates by Welford's recursion."""
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(
            parameters, lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )
        generator = torch.Generator().manual_seed(self.seed)
        mean = torch.zeros(self.lin.num_parameters, dtype=torch.float64, device=self.lin.frozen.device)
        squares, last = torch.zeros_like(mean), deque[Tensor](maxlen=max(1, self.rank))
        module.train()
        losses: list[float] = []
        for count in tqdm(range(1, self.num_snapshots + 1), "epochs", disable=not self.progress):
            total, rows = 0.0, 0
            for x, y in minibatches(batches, self.batch_size, generator):
                if len(x) == 1 and _tracking(module):
                    continue  # one row has no batch statistics
                optimizer.zero_grad()
                leaves = self.lin.packing.leaves(x.to(mean.device))
                outputs = self.lin.frozen.run(module, leaves)
                loss = training_loss(outputs.reshape(len(x), -1), y.to(mean.device))
                if not bool(loss.isfinite()):
                    raise FloatingPointError(f"SWAG: the loss became {float(loss.detach())}; lower learning_rate")
                loss.backward()
                optimizer.step()
                total, rows = total + float(loss.detach()) * len(x), rows + len(x)
            losses.append(total / max(rows, 1))
            theta = parameters_to_vector(parameters).detach().to(torch.float64)
            step = theta - mean
            mean = mean + step / count
            squares = squares + step * (theta - mean)
            last.append(theta - mean)
        if losses[-1] > _DIVERGED * losses[0]:
            logger.warning(
                "SWAG: the training loss of an epoch rose from %.3g to %.3g: SGD leaves the trained weights; lower "
                "learning_rate",
                losses[0], losses[-1],
            )  # fmt: skip
        self.mean, self.variance = mean, (squares / self.num_snapshots).clamp_min(1e-30)
        self.deviations = torch.stack(list(last)) if self.rank else mean.new_zeros(0, len(mean))

    def _draw(self, generator: torch.Generator) -> Tensor:
        """One draw from the Gaussian over the weights."""
        z = torch.randn(len(self.mean), generator=generator, dtype=torch.float64).to(self.mean)
        if not self.rank:
            return self.mean + self.variance.sqrt() * z
        low = torch.randn(self.rank, generator=generator, dtype=torch.float64).to(self.mean)
        spread = self.variance.sqrt() * z + low @ self.deviations / math.sqrt(self.rank - 1)
        return self.mean + spread / math.sqrt(2)

    @staticmethod
    def _set(module: nn.Module, weights: Tensor) -> None:
        parameters = [p for p in module.parameters() if p.requires_grad]
        with torch.no_grad():
            vector_to_parameters(weights.to(parameters[0]), parameters)

    def _recomputed(self, module: nn.Module, batches: Batches) -> Tensor:
        """Running statistics of the module's weights over the data, set in it and returned in one vector."""
        norms = _tracking(module.eval())
        held = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative mean
            norm.train()
        if norms:
            for x, _ in batches:
                if len(x) > 1:
                    with torch.no_grad():
                        self.lin.frozen.run(module, self.lin.packing.leaves(x.to(self.mean.device)))
        for norm, momentum in zip(norms, held, strict=True):
            norm.momentum = momentum
        module.eval()
        parts = [value.reshape(-1).to(torch.float64) for value in _statistics(module)]
        return torch.cat(parts).clone() if parts else self.mean.new_zeros(0)

    def _samples(self, x: Tensor) -> Tensor:
        if self._module is None:
            self._module = private_copy(self.net)
        buffers, found = _statistics(self._module), []
        with self._environment():
            for weights, statistics in zip(self.weights, self.statistics, strict=True):
                self._set(self._module, weights)
                parts = statistics.split([buffer.numel() for buffer in buffers])
                for buffer, part in zip(buffers, parts, strict=True):
                    buffer.copy_(part.reshape(buffer.shape))
                found.append(self._outputs(self._module, x))
        return torch.stack(found)


def _tracking(module: nn.Module) -> list[_NormBase]:
    """Normalisation layers with running statistics."""
    return [part for part in module.modules() if isinstance(part, _NormBase) and part.running_mean is not None]


def _statistics(module: nn.Module) -> list[Tensor]:
    """Running means and variances of all normalisation layers."""
    pairs = [(norm.running_mean, norm.running_var) for norm in _tracking(module)]
    return [value for pair in pairs for value in pair if value is not None]
