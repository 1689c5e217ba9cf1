"""Run the laws."""

from __future__ import annotations

import math
import traceback
import warnings
from collections.abc import Iterable

import torch

from ntkgp.laws.collection import LAWS
from ntkgp.laws.oracle import Dense
from ntkgp.laws.protocol import Adapter, Fitted, NotApplicableError
from ntkgp.laws.report import FAILS, HOLDS, NOT_APPLICABLE, RAISES, Report, Row
from ntkgp.laws.trial import Law, Trial

# Of float64: what a system of condition number c loses.
_UNIT = 4e-15


def check(adapter: Adapter, laws: Iterable[str] | None = None, structures: Iterable[str] | None = None) -> Report:
    """Try the laws of linearised Laplace and tangent-kernel Gaussian processes on a library.

    :param adapter: of the library; see :class:`~ntkgp.laws.Adapter`.
    :param laws: their ids, all by default (:data:`~ntkgp.laws.LAWS` has them).
    :param structures: names of structures of the adapter, all by default.
    :return: a row for each law, structure and problem. A law holds where its error is at most its tolerance, which
        grows with the condition number of the problem's system and by the adapter's stated rounding.
    :raises KeyError: an unknown law or structure.
    :raises TypeError: something that is no adapter.

    Global random state and warnings are put back afterwards. All laws take about ten fits per structure and problem,
    each of a network with some two hundred weights and twenty data.

    >>> from ntkgp.laws.adapters import DenseAdapter
    >>> report = check(DenseAdapter(), ["B1", "B8"], ["diagonal"])
    >>> report.ok, len(report)
    (True, 8)
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter: expected name, structures and fit(task), got {type(adapter).__name__}")
    chosen = list(LAWS) if laws is None else list(laws)
    names = list(adapter.structures) if structures is None else list(structures)
    for what, found, known in (("laws", chosen, LAWS), ("structures", names, adapter.structures)):
        unknown = [name for name in found if name not in known]
        if unknown:
            raise KeyError(f"{what}: unknown {unknown}, expected some of {list(known)}")
    rows = []
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        trials: dict[tuple[str, str], Trial] = {}
        for law in (LAWS[name] for name in sorted(chosen, key=list(LAWS).index)):
            for name in names:
                for problem in law.problems_of(adapter.structures[name].kind):
                    trial = trials.setdefault((name, problem), Trial(adapter, name, problem))
                    rows.append(_row(law, trial))
    return Report(adapter.name, tuple(rows))


def _row(law: Law, trial: Trial) -> Row:
    """Measure, and judge."""
    common = (law.id, law.statement, trial.name, trial.problem_name)
    if law.per_tensor and trial.structure.single_precision:
        return Row(*common, NOT_APPLICABLE, reason="has one precision for all weights")
    try:
        found = law.measure(trial)
    except NotApplicableError as silent:
        return Row(*common, NOT_APPLICABLE, reason=str(silent))
    except Exception as error:
        if any(isinstance(frame.f_locals.get("self"), Dense) for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise  # of the reference, not of the library
        if _is_missing_method(error):
            return Row(*common, NOT_APPLICABLE, reason=f"the adapter has no {error.name}")  # type: ignore[attr-defined]
        first = (str(error).strip().splitlines() or [""])[0]
        return Row(*common, RAISES, reason=f"{type(error).__name__}: {first[:110]}")
    measured, reason = found if isinstance(found, tuple) else (found, "")
    tolerance = law.tolerance
    if law.tolerance > 0 and law.tolerance < 1e-5:
        tolerance = max(tolerance, _UNIT * trial.condition)
    if not law.strict:
        tolerance = max(tolerance, trial.structure.rounding)
    holds = math.isfinite(measured) and measured <= tolerance
    return Row(*common, HOLDS if holds else FAILS, float(measured), tolerance, "" if holds else reason)


def _is_missing_method(error: Exception) -> bool:
    """Whether the fit itself lacks a method of the protocol."""
    if not isinstance(error, AttributeError) or error.name is None:
        return False
    return hasattr(Fitted, error.name) and not hasattr(error.obj, error.name) and _is_from_law(error)


def _is_from_law(error: BaseException) -> bool:
    """Whether it was raised by the law's own line, not inside the library."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return "ntkgp.laws" in frames[-1].f_globals.get("__name__", "")
