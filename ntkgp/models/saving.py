"""Models in files: tensors and plain values, no code; bound again to the network that they belong to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gpytorch
import torch
from gpytorch.constraints import GreaterThan, Interval, LessThan, Positive
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    Likelihood,
    MultitaskGaussianLikelihood,
)
from gpytorch.utils.transforms import inv_sigmoid, inv_softplus
from torch import Tensor, nn

from ntkgp.checkpoint import moved_to, plain, read_file, write_file
from ntkgp.fingerprint import digest
from ntkgp.likelihoods import BernoulliLikelihood, CategoricalLikelihood, MultioutputGaussianLikelihood
from ntkgp.linearization import LinearizedNetwork, ParameterGroups
from ntkgp.linearization.packing import InputPacking, tree_unflatten

FORMAT = "ntkgp model"
SCHEMA = 1
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_CONSTRAINTS: dict[str, Any] = {c.__name__: c for c in (GreaterThan, Positive, LessThan, Interval)}
_TRANSFORMS: dict[str, tuple[Any, Any]] = {
    "softplus": (nn.Softplus(), inv_softplus), "exp": (torch.exp, torch.log), "sigmoid": (torch.sigmoid, inv_sigmoid),
}  # fmt: skip
_EXAMPLE_ROWS = 4


def save(model: Any, path: str | os.PathLike[str], training_data: bool = False) -> None:
    """Write a model; see :meth:`ntkgp.models.network_gp.NetworkGP.save`."""
    if type(model) not in _classes().values():
        # What a class inherits says nothing of what it adds.
        raise TypeError(f"{type(model).__name__} has no file format; keep its state_dict() and what it was made of")
    # Of an image, its network: that of the measurements is made of it again.
    lin = model._network_of_file()
    options = model._saved(bool(training_data))
    frozen = lin.frozen.module(lin.frozen.device).state_dict()
    state = plain(
        {
            "class": type(model).__name__,
            "options": options,
            "tensors": dict(model.state_dict()),
            "training": model.training,
            "likelihood": _of_likelihood(model.likelihood),
            "network": _digests(frozen),
            "trainable": list(lin.frozen.trainable),
            "groups": dict(zip(lin.groups.names, (list(members) for members in lin.groups.members), strict=True)),
            "inputs": _of_inputs(lin.packing, lin._probe_rows),
            "num_outputs": lin.num_outputs,
        },
        "model",
    )
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"path: expected a file, {path} is a folder")
    write_file(path, {"format": FORMAT, "schema": SCHEMA, "digest": digest(state), "state": state})


def load(
    path: str | os.PathLike[str],
    net: nn.Module,
    *,
    example: Any = None,
    output: Callable[[Any], Tensor] | None = None,
    likelihood: Likelihood | None = None,
    operator: Any = None,
) -> Any:
    """A model from the file that ``model.save(path)`` wrote, on its network.

    :param path: the file.
    :param net: the network that the model was made of, with the same weights; also on another device, where the model
        will be, or in another dtype, whose rounded weights are compared.
    :param example: inputs as the network takes them; needed where they are no tensors, dicts, tuples and lists of them,
        otherwise numbers of the same size and kind are made up for the network's checks.
    :param output: as of :class:`~ntkgp.LinearizedNetwork`, if it was made with one: functions are in no file.
    :param likelihood: one like the model's, where its class, priors or constraints are not the library's or GPyTorch's.
    :param operator: the forward operator A of an :class:`~ntkgp.InverseNTKGP`, which is in no file.
    :return: the model, of the class that was saved, in the mode (train or eval) that it was in. Predictions are the
        same bit by bit for the same device and dtype.
    :raises ValueError: another network (with the names of the parameters that differ), a broken or foreign file.
    :raises FileNotFoundError: no such file.

    Cost: that of a :class:`~ntkgp.LinearizedNetwork`; a model with training data in data space makes its Grams again.

    >>> import gpytorch, ntkgp, tempfile
    >>> x = torch.linspace(-1, 1, 40).unsqueeze(-1)
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> lin = ntkgp.LinearizedNetwork(net, x)
    >>> model = ntkgp.NystromNTKGP((x, x.sin()), gpytorch.likelihoods.GaussianLikelihood(), lin, 10).fit(progress=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save(folder + "/model.pt")
    ...     again = ntkgp.load(folder + "/model.pt", net)
    >>> torch.equal(again(x[:3]).variance, model(x[:3]).variance)
    True
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net: expected a torch.nn.Module, got {type(net).__name__}")
    path = Path(path)
    state = read_file(path, FORMAT, SCHEMA)["state"]
    _check_network(state, net, path)
    device = next(net.parameters()).device
    lin = LinearizedNetwork(
        net, _example(state["inputs"], device) if example is None else example, groups=ParameterGroups(state["groups"]),
        output=output,
    )  # fmt: skip
    if lin.num_outputs != state["num_outputs"]:
        raise ValueError(
            f"output: the model in {path} has {state['num_outputs']} outputs per input, the network returns "
            f"{lin.num_outputs}"
        )
    if likelihood is None:
        if state["likelihood"] is None:
            raise ValueError(
                f"likelihood: that of {path} has a class, priors or constraints of its own; give one like it"
            )
        likelihood = _likelihood(state["likelihood"])
    kind = _classes()[state["class"]]
    options = moved_to(state["options"], device)
    if (state["class"] == "InverseNTKGP") != (operator is not None):
        wanted = "none" if operator is not None else "the forward operator of its measurements"
        raise ValueError(f"operator: {path} holds a model of class {state['class']}, expected {wanted}")
    if operator is not None:
        options["operator"] = operator
    model = kind._from_saved(lin, likelihood, options).to(device)
    model.load_state_dict(moved_to(state["tensors"], device))
    return model.train(state["training"])


def _classes() -> dict[str, Any]:
    """Classes that have a file format: those of the library with ``_saved`` and ``_from_saved`` of their own."""
    from ntkgp import models

    found = (getattr(models, name) for name in models.__all__)
    return {kind.__name__: kind for kind in found if isinstance(kind, type) and "_from_saved" in vars(kind)}


def _digests(state: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Digests of every parameter and buffer, of floating ones in each dtype that a network may have."""
    out: dict[str, dict[str, str]] = {}
    for name, value in state.items():
        dtypes = _DTYPES if value.is_floating_point() else (value.dtype,)
        out[name] = {str(dtype): digest(value.to(dtype)) for dtype in dtypes}
    return out


def _check_network(state: Mapping[str, Any], net: nn.Module, path: Path) -> None:
    """Refuse another network than that of the file."""
    own, there = net.state_dict(), state["network"]
    trainable = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    different = sorted(set(own) ^ set(there)) or [
        name for name, value in own.items() if there[name].get(str(value.dtype)) != digest(value)
    ]
    if different:
        listed = ", ".join(different[:5]) + (", …" if len(different) > 5 else "")
        raise ValueError(f"net: expected the network of {path}, whose weights have another digest; different: {listed}")
    if trainable != state["trainable"]:
        changed = sorted(set(trainable) ^ set(state["trainable"]))
        raise ValueError(f"net: requires_grad is not as in {path} for {', '.join(changed)}")


def _of_inputs(packing: InputPacking, rows: Tensor) -> dict[str, Any] | None:
    """What the network takes: structure, shapes, dtypes, size of the numbers; None where that has no plain form."""
    try:
        spec = plain(packing._spec)
    except TypeError:
        return None
    if not _same_types(spec, packing._spec):
        return None
    leaves = []
    for leaf, shape, dtype in zip(packing.leaves(rows), packing.shapes, packing.dtypes, strict=True):
        values = leaf.double()
        spread = float(values.std()) if values.numel() > 1 else 0.0
        size = [float(values.mean()), spread, float(values.max())]
        leaves.append({"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "size": size})
    return {"spec": spec, "leaves": leaves}


def _same_types(a: Any, b: Any) -> bool:
    """Whether nothing but plain dicts, tuples and lists is in a structure."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return all(_same_types(a[key], b[key]) for key in a)
    return all(map(_same_types, a, b)) if isinstance(a, list | tuple) else True


def _example(inputs: Mapping[str, Any] | None, device: torch.device) -> Any:
    """Made-up inputs: random numbers of the size that there was, and integers that occurred."""
    if inputs is None:
        raise ValueError("example: the network's inputs are of classes that no file holds; give some inputs")
    generator = torch.Generator().manual_seed(0)
    leaves = []
    for leaf in inputs["leaves"]:
        mean, spread, largest = leaf["size"]
        dtype, shape = getattr(torch, leaf["dtype"]), (_EXAMPLE_ROWS, *leaf["shape"])
        values = torch.full(shape, largest, dtype=torch.float64)
        if dtype.is_floating_point:
            values = mean + (spread or 1.0) * torch.randn(shape, generator=generator, dtype=torch.float64)
        leaves.append(values.to(dtype).to(device))
    return tree_unflatten(leaves, inputs["spec"])


def _of_likelihood(likelihood: Likelihood) -> dict[str, Any] | None:
    """How to make a likelihood anew, but for its parameters; None where a file cannot say."""
    if any(True for _ in likelihood.named_priors()):
        return None
    constraints = {name: _of_constraint(constraint) for name, constraint in likelihood.named_constraints()}
    if None in constraints.values():
        return None
    names: tuple[str, ...]
    fixed: dict[str, Any] = {}
    kind = type(likelihood)
    if kind in (CategoricalLikelihood, BernoulliLikelihood):
        names = ("link", "num_samples", "seed", *(("num_classes",) if kind is CategoricalLikelihood else ()))
    elif kind is MultitaskGaussianLikelihood:
        names = ("num_tasks", "rank", "has_global_noise", "has_task_noise")
    elif kind in (GaussianLikelihood, FixedNoiseGaussianLikelihood, MultioutputGaussianLikelihood):
        names = ()
        if kind is FixedNoiseGaussianLikelihood or getattr(likelihood, "_fixed", False):
            fixed = {
                "noise": likelihood.noise_covar.noise.detach(),
                "learn_additional_noise": likelihood.second_noise_covar is not None,
            }
    else:
        return None
    options = {name: getattr(likelihood, name) for name in names}
    return {"class": kind.__name__, "options": options, "fixed": fixed, "constraints": constraints}


def _likelihood(state: Mapping[str, Any]) -> Likelihood:
    """Inverse of :func:`_of_likelihood`."""
    kind, fixed = state["class"], state["fixed"]
    likelihood: Likelihood
    if kind in ("CategoricalLikelihood", "BernoulliLikelihood", "MultitaskGaussianLikelihood"):
        kinds = (CategoricalLikelihood, BernoulliLikelihood, MultitaskGaussianLikelihood)
        likelihood = {k.__name__: k for k in kinds}[kind](**state["options"])
    else:
        likelihood = FixedNoiseGaussianLikelihood(**fixed) if fixed else GaussianLikelihood()
    for name, constraint in state["constraints"].items():
        owner: gpytorch.Module = likelihood
        *modules, last = name.split(".")
        for part in modules:
            owner = getattr(owner, part)
        owner.register_constraint(last.removesuffix("_constraint"), _constraint(constraint))
    return likelihood


def _of_constraint(constraint: Interval) -> dict[str, Any] | None:
    """Class, bounds and transform of a constraint; None for a class or a function of the user's own."""
    name = type(constraint).__name__
    transform = "none" if constraint._transform is None else None
    for known, (function, _) in _TRANSFORMS.items():
        softplus = isinstance(function, nn.Softplus) and isinstance(constraint._transform, nn.Softplus)
        if constraint._transform is function or softplus:
            transform = known
    if _CONSTRAINTS.get(name) is not type(constraint) or transform is None:
        return None
    bounds = [constraint.lower_bound.detach(), constraint.upper_bound.detach()]
    return {"class": name, "bounds": bounds, "transform": transform}


def _constraint(state: Mapping[str, Any]) -> Interval:
    """Inverse of :func:`_of_constraint`."""
    function, inverse = _TRANSFORMS.get(state["transform"], (None, None))
    options = {"transform": function, "inv_transform": inverse}
    low, high = state["bounds"]
    bounds = {"Interval": (low, high), "GreaterThan": (low,), "LessThan": (high,), "Positive": ()}[state["class"]]
    return _CONSTRAINTS[state["class"]](*bounds, **options)
