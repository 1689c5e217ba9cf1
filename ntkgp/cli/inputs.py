"""What the commands read: a network from a factory and a file of weights, data from a file of arrays."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ntkgp.evaluation.training import seeded

_ARRAYS = ("x", "y", "x_test", "y_test", "x_ood")


class CommandError(Exception):
    """A mistake in what the user gave, said in one line."""


@dataclass(frozen=True)
class CommandData:
    """Arrays of the data file as tensors: inputs in the network's dtype, labels as integers."""

    x: Tensor
    y: Tensor
    x_test: Tensor | None
    y_test: Tensor | None
    x_ood: Tensor | None
    is_classification: bool

    @property
    def kind(self) -> str:
        """Of the likelihood."""
        return "classification" if self.is_classification else "regression"


def check_folder(path: Path) -> None:
    """
    Refuse a folder for results that cannot be made, before anything is computed.

    :param path: need not be there yet.
    :raises CommandError: it or a folder above it is a file, or may not be written to.
    """
    place = next(part for part in (path.absolute(), *path.absolute().parents) if os.path.lexists(part))
    if not place.is_dir():
        raise CommandError(f"--out: {place} is a file, expected a folder")
    if not os.access(place, os.W_OK):
        raise CommandError(f"--out: the folder {place} cannot be written to")


def load_network(target: str) -> nn.Module:
    """
    Call a factory named ``package.module:factory``; the current folder is searched first.

    :param target: module and function without arguments that returns the network.
    :return: the network.
    :raises CommandError: no such module or function, or something else than a network returned.
    """
    module_name, _, function_name = target.partition(":")
    if not module_name or not function_name:
        raise CommandError(f"--network: expected package.module:factory, got {target!r}")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise CommandError(
            f"--network: cannot import {module_name!r} from {here} or the environment: {error}"
        ) from error
    finally:
        sys.path.remove(here)
    factory = getattr(module, function_name, None)
    if not callable(factory):
        raise CommandError(f"--network: {module_name!r} has no function {function_name!r}")
    with seeded(0):
        net = factory()
    if not isinstance(net, nn.Module):
        raise CommandError(f"--network: {target} returned {type(net).__name__}, expected a torch.nn.Module")
    return net


def load_weights(net: nn.Module, path: Path) -> None:
    """
    Load a state dict, tensors only, into a network.

    :param net: changed in place.
    :param path: file written by ``torch.save(net.state_dict(), path)``.
    :raises CommandError: no such file, a file that holds more than tensors, names or shapes that do not fit.
    """
    if not path.is_file():
        raise CommandError(f"--weights: no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise CommandError(
            f"--weights: {path} is not a file of tensors only; write it with torch.save(net.state_dict(), path)"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CommandError(f"--weights: {path} holds {type(state).__name__}, expected a state dict of tensors")
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise CommandError(f"--weights: {path} does not fit the network: {error}") from error


def load_data(path: Path, likelihood: str, dtype: torch.dtype) -> CommandData:
    """
    Read ``x``, ``y`` and optionally ``x_test``, ``y_test``, ``x_ood`` from an ``.npz`` file without pickled objects.

    :param path: the file.
    :param likelihood: ``"regression"``, ``"classification"`` or ``"auto"`` (integer targets are labels).
    :param dtype: of the network; inputs are converted to it, unless those of `x` are integers: all stay integers then.
    :return: :class:`CommandData`.
    :raises CommandError: no such file, missing arrays, lengths that differ, labels that are not integers.
    """
    if not path.is_file():
        raise CommandError(f"--data: no file {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    # A plain .npy file gives an array, which is no context.
    except (ValueError, OSError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise CommandError(f"--data: {path} is not an .npz file of plain arrays: {error}") from error
    if not {"x", "y"} <= arrays.keys():
        raise CommandError(f"--data: {path} needs arrays x and y (and may have x_test, y_test), got {sorted(arrays)}")
    if "y_test" in arrays and "x_test" not in arrays:
        raise CommandError(f"--data: {path} has y_test but no x_test")
    for name, array in arrays.items():
        if name in _ARRAYS and (array.ndim == 0 or len(array) == 0):
            raise CommandError(f"--data: {name} has shape {array.shape}, expected at least one row")
    for inputs, targets in (("x", "y"), ("x_test", "y_test")):
        if targets in arrays and len(arrays[inputs]) != len(arrays[targets]):
            raise CommandError(f"--data: {len(arrays[inputs])} rows in {inputs}, {len(arrays[targets])} in {targets}")
    integer = np.issubdtype(arrays["y"].dtype, np.integer)
    classification = integer if likelihood == "auto" else likelihood == "classification"
    for name in ("y", "y_test"):
        if classification and name in arrays and not np.issubdtype(arrays[name].dtype, np.integer):
            raise CommandError(f"--data: classification needs integer labels in {name}, got {arrays[name].dtype}")
    tokens = np.issubdtype(arrays["x"].dtype, np.integer)
    tensors = {}
    for name in _ARRAYS:
        if name in arrays:
            if tokens and name.startswith("x") and not np.issubdtype(arrays[name].dtype, np.integer):
                raise CommandError(f"--data: x holds integers, {name} {arrays[name].dtype}; expected the same kind")
            is_long = tokens if name.startswith("x") else classification
            tensors[name] = _tensor(name, arrays[name], torch.long if is_long else dtype)
    x_test, y_test, x_ood = (tensors.get(name) for name in ("x_test", "y_test", "x_ood"))
    return CommandData(tensors["x"], tensors["y"], x_test, y_test, x_ood, bool(classification))


def _tensor(name: str, array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Array of numbers as a tensor."""
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise CommandError(f"--data: {name} holds {array.dtype}, expected numbers")
    return torch.as_tensor(np.ascontiguousarray(array, array.dtype.newbyteorder("="))).to(dtype)


def network_dtype(net: nn.Module) -> torch.dtype:
    """Of its first parameter of floating point."""
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
