"""The methods that can be compared, by name: each turns a network and training data into something that predicts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ntkgp import baselines
from ntkgp.baselines.ensembles import private_copy
from ntkgp.baselines.protocol import labelled, normal
from ntkgp.baselines.references import training_loss
from ntkgp.linearization import LinearizedNetwork
from ntkgp.models import from_network
from ntkgp.models.batches import collect_raw
from ntkgp.models.network_gp import NetworkGP

_ROWS_PER_CALL = 128
_MOMENT_STEPS, _MOMENT_BATCH = 1000, 32


class Predictor(Protocol):
    """What a fitted method is."""

    def predict(self, x: Any) -> Distribution:
        """The distribution of y at N inputs."""


class Method:
    """
    One row of a comparison: a method by name, with options of its own.

    :param name: one of :func:`method_names`, or the class's name (``"Laplace"``), in any spelling of case, spaces,
        dashes and underscores.
    :param label: the name in the table; default: `name`.
    :param net: another network than the compared one, where the method needs it (MC dropout: one with dropout).
    :param options: passed to the class, or to :func:`~ntkgp.from_network` for Gaussian processes; the shared ones
        (likelihood, groups, …) are passed by :func:`compare` and may be overridden here.
    :raises ValueError: an unknown name.

    >>> Method("laplace-kfac", evidence="theta")
    Method('laplace-kfac', evidence='theta')
    """

    def __init__(self, name: str, label: str | None = None, *, net: nn.Module | None = None, **options: Any) -> None:
        self.name, self.label, self.net, self.options = _canonical(name), label or name, net, options

    def __repr__(self) -> str:
        given = [repr(self.label), *(f"{name}={value!r}" for name, value in self.options.items())]
        return f"Method({', '.join(given)})"

    def build(self, net: nn.Module, train_data: Any, shared: Mapping[str, Any]) -> Predictor:
        """Fit to the training data."""
        own = net if self.net is None else self.net
        return _REGISTRY[self.name](own, train_data, {**shared, **self.options})


class GaussianProcess:
    """A Gaussian process model behind ``predict(x)``, in chunks of inputs.

    :param model: fitted, as :func:`~ntkgp.from_network` gives it.
    """

    def __init__(self, model: NetworkGP) -> None:
        self.model = model

    def predict(self, x: Any) -> Distribution:
        """As :meth:`Baseline.predict <ntkgp.baselines.Baseline.predict>`."""
        model = self.model.eval()  # type: ignore[attr-defined]
        packed = model._inputs(x)
        with torch.no_grad():
            parts = [self._moments(chunk) for chunk in packed.split(_ROWS_PER_CALL)]
        mean, covariance, observed = (torch.cat(columns) for columns in zip(*parts, strict=True))
        latent = normal(mean, covariance)
        if model.is_classification:
            return labelled(observed, latent)
        found = normal(mean, observed)
        found.latent = latent  # type: ignore[attr-defined]
        return found

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latent mean (N, C), covariances (N, C, C), and those of y or the probabilities."""
        latent = self.model(x)  # type: ignore[operator]
        observed = self.model.likelihood(latent)
        mean = latent.mean.reshape(len(x), -1).double()
        covariance = point_blocks(latent, mean.shape[-1])
        return (
            mean,
            covariance,
            observed.probs.double() if self.model.is_classification else point_blocks(observed, mean.shape[-1]),
        )


def point_blocks(found: Any, num_outputs: int) -> Tensor:
    """The C × C covariances of single inputs of a joint normal of N·C interleaved numbers, (N, C, C)."""
    if num_outputs == 1:
        return found.variance.reshape(-1, 1, 1).double()
    dense = found.covariance_matrix.double()
    n = len(dense) // num_outputs
    blocks = dense.reshape(n, num_outputs, n, num_outputs)
    return torch.diagonal(blocks, dim1=0, dim2=2).movedim(-1, 0)


def method_names() -> tuple[str, ...]:
    """All names that :class:`Method` knows.

    >>> "laplace-last-layer" in method_names()
    True
    """
    return tuple(_REGISTRY)


def default_methods(net: nn.Module, shared: Mapping[str, Any]) -> list[str]:
    """What needs no more than the network and the data: all but ensembles, Hessian-free Laplace and held-out noise."""
    left_out = {"ensemble", "hfl", "gp-exact"}
    if shared.get("validation") is None:
        left_out.add("network-validated")
    if not any(isinstance(part, nn.modules.dropout._DropoutNd) for part in net.modules()):
        left_out.add("dropout")
    return [name for name in _REGISTRY if name not in left_out]


def _canonical(name: str) -> str:
    """The registry's spelling of a name."""
    if not isinstance(name, str):
        raise TypeError(f"methods: expected a name, a Method, a model or a function, got {type(name).__name__}")
    plain = _plain(name)
    for known in _REGISTRY:
        if plain == _plain(known):
            return known
    if plain in _ALIASES:
        return _ALIASES[plain]
    raise ValueError(f"methods: expected one of {', '.join(_REGISTRY)}, got {name!r}")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _process(inference: str = "auto") -> Callable[..., Predictor]:
    def build(net: nn.Module, data: Any, options: dict[str, Any]) -> Predictor:
        known = {name: value for name, value in options.items() if name not in ("seed", "validation")}
        known.setdefault("inference", inference)
        return GaussianProcess(from_network(net, data, **known))

    return build


def _baseline(
    kind: type[baselines.Baseline],
    *,
    prior: bool = False,
    needs: tuple[str, ...] = (),
    ignores: tuple[str, ...] = (),
    fixed: Mapping[str, Any] | None = None,
) -> Callable[..., Predictor]:
    """A comparator with the options that it takes.

    :param prior: the method has no evidence of its own: without a precision it gets that of the Gaussian process.
    :param needs: options without which there is nothing to do.
    :param ignores: shared options that the row is about not having.
    :param fixed: what the name stands for; options of the user's go before it.
    """
    takes = {name for base in kind.__mro__ for name in inspect.signature(base).parameters}
    # Not every method has held-out data; any other option that it does not take is the user's mistake.
    left_out = {*ignores, *({"validation"} - takes)}

    def build(net: nn.Module, data: Any, options: dict[str, Any]) -> Predictor:
        known = {**(fixed or {}), **{name: value for name, value in options.items() if name not in left_out}}
        for name in needs:
            if known.get(name) is None:
                raise ValueError(f"{name}: expected for {kind.__name__}, got nothing; Method(..., {name}=...)")
        if prior and known.get("precision") is None:
            known |= evidence_prior(net, data, options)
        if kind is baselines.L2M and isinstance(known.get("noise"), Tensor):
            known["noise"] = float(known["noise"].mean())  # it has one for all outputs
        return kind(net, **known).fit(data)

    return build


def evidence_prior(net: nn.Module, data: Any, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Precision of each group, and noise of each output, of the Gaussian process of the same network."""
    names = ("likelihood", "groups", "output", "max_memory")
    model = from_network(net, data, **{name: options[name] for name in names if name in options})
    found = {"precision": model.kernel.precision.detach().clone()}
    if not model.is_classification:
        found["noise"] = _noises(model)
    return found


def _noises(model: NetworkGP) -> Tensor:
    likelihood = model.likelihood
    noise = likelihood.task_noises if hasattr(likelihood, "task_noises") else likelihood.noise
    return noise.detach().double().flatten().clone()


def _subnetwork(net: nn.Module, data: Any, options: dict[str, Any]) -> Predictor:
    """A fifth of the weights, those of the largest variance, at most 1000."""
    if "size" not in options and "mask" not in options:
        count = sum(p.numel() for p in net.parameters() if p.requires_grad)
        options = {**options, "size": max(1, min(1000, count // 5))}
    return _baseline(baselines.Laplace, fixed={"structure": "subnetwork"})(net, data, options)


def _ensemble(net: nn.Module, data: Any, options: dict[str, Any]) -> Predictor:
    if options.get("train") is None and options.get("members") is None:
        raise ValueError("train: expected a function train(net, train_data), or members, trained networks; got neither")
    return _baseline(baselines.DeepEnsemble)(net, data, options)


def _l2m(variant: str) -> Callable[..., Predictor]:
    corrected = variant == "corrected"
    fit = _baseline(baselines.L2M, prior=corrected, fixed={"variant": variant})

    def build(net: nn.Module, data: Any, options: dict[str, Any]) -> Predictor:
        if options.get("optimizer") is None:
            options = {**options, **moments_at(net, data, options)}
        return fit(net, data, options)

    return build


def moments_at(net: nn.Module, train_data: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The second moments that AdamW has at these weights: 1000 steps of learning rate 0 on a copy of the network.

    :param net: the trained network.
    :param train_data: as :func:`compare` takes it.
    :param options: ``output``, ``seed`` and ``batch_size``, by default 32, or half of the data where they are fewer.
    :return: ``optimizer`` (a state dict with AdamW's usual weight decay) and ``batch_size``.
    """
    data = collect_raw(train_data)
    lin = LinearizedNetwork(net, data.example, groups="single", output=options.get("output"))
    x, n = lin.pack(data.x), len(data.y)
    size = int(options.get("batch_size") or min(_MOMENT_BATCH, max(1, n // 2)))
    copied = private_copy(net).eval()
    optimizer = torch.optim.AdamW([p for p in copied.parameters() if p.requires_grad], lr=0.0)
    generator = torch.Generator().manual_seed(int(options.get("seed", 0)))
    for _ in range(_MOMENT_STEPS):
        rows = torch.randperm(n, generator=generator)[:size]
        outputs = lin.frozen.run(copied, lin.packing.leaves(x[rows].to(lin.frozen.device)))
        optimizer.zero_grad()
        training_loss(outputs.reshape(size, -1), data.y[rows].to(outputs.device)).backward()
        optimizer.step()
    return {"optimizer": optimizer.state_dict(), "batch_size": size}


_REGISTRY: dict[str, Callable[[nn.Module, Any, dict[str, Any]], Predictor]] = {
    "network": _baseline(baselines.Point, ignores=("validation",)),
    "network-validated": _baseline(baselines.Point, needs=("validation",)),
    "gp": _process(),
    "gp-exact": _process("exact"),
    "gp-nystrom": _process("nystrom"),
    "gp-variational": _process("variational"),
    "laplace-full": _baseline(baselines.Laplace, fixed={"structure": "full"}),
    "laplace-kfac": _baseline(baselines.Laplace, fixed={"structure": "kfac", "evidence": "theta"}),
    "laplace-diagonal": _baseline(baselines.Laplace, fixed={"structure": "diagonal", "evidence": "theta"}),
    "laplace-last-layer": _baseline(baselines.Laplace, fixed={"structure": "last_layer"}),
    "laplace-subnetwork": _subnetwork,
    "laplace-sampled": _baseline(baselines.Laplace, fixed={"structure": "full", "prediction": "weights"}),
    "hfl": _baseline(baselines.HessianFreeLaplace, prior=True),
    "l2m": _l2m("corrected"),
    "l2m-paper": _l2m("paper"),
    "vl": _baseline(baselines.VariationalLaplace, fixed={"precision": None}),
    "ensemble": _ensemble,
    "dropout": _baseline(baselines.MCDropout),
    "swag": _baseline(baselines.SWAG),
    # Its prior is that of the other rows: held-out data would choose another one.
    "prior-only": _baseline(baselines.PriorOnly, ignores=("validation",)),
}
_ALIASES = {
    "point": "network", "map": "network", "networkalone": "network", "temperature": "network-validated",
    "ntkgp": "gp", "fromnetwork": "gp", "exactntkgp": "gp-exact", "exact": "gp-exact",
    "nystromntkgp": "gp-nystrom", "nystrom": "gp-nystrom", "ella": "gp-nystrom",
    "variationalntkgp": "gp-variational", "variational": "gp-variational", "valla": "gp-variational",
    "laplace": "laplace-full", "full": "laplace-full", "kfac": "laplace-kfac", "diagonal": "laplace-diagonal",
    "lastlayer": "laplace-last-layer", "subnetwork": "laplace-subnetwork",
    "hessianfreelaplace": "hfl", "l2mcorrected": "l2m", "variationallaplace": "vl",
    "deepensemble": "ensemble", "mcdropout": "dropout", "prior": "prior-only",
}  # fmt: skip
