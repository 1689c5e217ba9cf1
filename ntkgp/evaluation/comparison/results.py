"""What a comparison found: rows, tables of them in four formats, and their pictures."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntkgp.evaluation import plots
from ntkgp.evaluation.comparison.scores import LARGER_IS_BETTER, Predicted
from ntkgp.evaluation.comparison.tables import Table
from ntkgp.evaluation.ranks import critical_difference_diagram, rank_test

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = {
    "regression": ("nll", "rmse", "crps", "cqm", "coverage", "ood_auc"),
    "classification": ("nll", "accuracy", "ece", "brier", "ood_auc", "ood_auc_variance"),
}
_TITLES = {
    "nll": "NLL", "rmse": "RMSE", "crps": "CRPS", "cqm": "CQM", "coverage": "95 % cov.", "width": "95 % width",
    "ood_auc": "OOD-AUC", "ood_aupr": "OOD-AUPR", "ood_fpr95": "OOD-FPR95", "ood_auc_variance": "OOD-AUC (var.)",
    "accuracy": "accuracy", "ece": "ECE", "adaptive_ece": "adaptive ECE", "brier": "Brier", "aurc": "AURC",
    "calibrated_nll": "NLL, temp.", "seconds": "seconds", "memory": "MiB",
}  # fmt: skip


_WIDEST = 72
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Row:
    """One method on one data set.

    :param method: its label.
    :param data: name of the data set and of the split.
    :param scores: by name; empty where the method failed.
    :param errors: standard errors over the test points, nan where a score is no mean over points.
    :param fit_seconds, predict_seconds: wall clock.
    :param memory: peak of the method's process above that with the network and the data alone, in MiB; nan where it was
        not measured.
    :param failure: why there are no scores.
    :param predicted: of the test inputs, for the curves.
    """

    method: str
    data: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    fit_seconds: float = math.nan
    predict_seconds: float = math.nan
    memory: float = math.nan
    failure: str = ""
    predicted: Predicted | None = field(default=None, repr=False, compare=False)

    @property
    def seconds(self) -> float:
        """Of fit and prediction together."""
        return self.fit_seconds + self.predict_seconds

    def value(self, column: str) -> float:
        """A score, the seconds or the memory; nan where there is none."""
        if column in ("seconds", "memory"):
            return float(getattr(self, column))
        return self.scores.get(column, math.nan)

    def to_json(self) -> str:
        """All but the predictions."""
        plain = asdict(replace(self, predicted=None))
        del plain["predicted"]
        return json.dumps(plain)

    @classmethod
    def from_json(cls, text: str) -> Row:
        """What :meth:`to_json` wrote."""
        return cls(**json.loads(text))


class Comparison:
    """Rows of several methods, on one data set or on many.

    :param rows: of all methods and data sets.
    :param kind: ``"regression"`` or ``"classification"``.
    :param targets: of each data set by name, as the predictions are scaled; for the curves.
    :param notes: what the reader of the table should know.
    """

    def __init__(
        self, rows: Iterable[Row], kind: str, targets: dict[str, Tensor] | None = None, notes: Iterable[str] = ()
    ) -> None:
        self.rows, self.kind, self.notes = list(rows), kind, list(dict.fromkeys(notes))
        self.targets = dict(targets or {})

    @classmethod
    def joined(cls, parts: Iterable[Comparison]) -> Comparison:
        """Comparisons of several data sets, or splits of them, as one: ``data`` before a ``/`` names the set.

        :raises ValueError: nothing to join, comparisons of different kinds, or two of the same method and data.
        """
        found = list(parts)
        kinds = {part.kind for part in found}
        if len(kinds) != 1:
            raise ValueError(f"parts: expected comparisons of one kind, got {sorted(kinds) or 'none'}")
        count = Counter((row.method, row.data) for part in found for row in part.rows)
        twice = [f"{method!r} on {data!r}" for (method, data), times in count.items() if times > 1]
        if twice:
            raise ValueError(f"parts: {', '.join(twice[:3])} more than once; give each comparison a name of its data")
        targets: dict[str, Tensor] = {}
        for name, y in (pair for part in found for pair in part.targets.items()):
            if name in targets and not torch.equal(targets[name], y):
                raise ValueError(f"parts: other test targets under the same name {name!r}")
            targets[name] = y
        notes = [note for part in found for note in part.notes]
        return cls([row for part in found for row in part.rows], kinds.pop(), targets, notes)

    @classmethod
    def from_csv(cls, path: str | Path, kind: str) -> Comparison:
        """What :meth:`to_csv` wrote: all but the predictions and the notes.

        :param path: of the file.
        :param kind: ``"regression"`` or ``"classification"``.
        """
        with Path(path).open(newline="", encoding="utf-8") as file:
            return cls([_parsed(line) for line in csv.DictReader(file)], kind)

    @property
    def methods(self) -> list[str]:
        """Labels in the order of their first row."""
        return list(dict.fromkeys(row.method for row in self.rows))

    @property
    def datasets(self) -> list[str]:
        """Names of data sets, without their splits."""
        return list(dict.fromkeys(_set(row.data) for row in self.rows))

    @property
    def failures(self) -> dict[tuple[str, str], str]:
        """Why a method has no scores, by method and data."""
        return {(row.method, row.data): row.failure for row in self.rows if row.failure}

    def __getitem__(self, method: str) -> Row:
        """The row of a method, where there is one data set.

        :raises KeyError: no or several rows of this label.
        """
        found = [row for row in self.rows if row.method == method]
        if len(found) != 1:
            raise KeyError(f"{len(found)} rows of {method!r}; methods: {', '.join(self.methods)}")
        return found[0]

    def summary(self, column: str, method: str, data: str) -> tuple[float, float, int]:
        """Mean and standard error of a column over the splits of a set, and the number of splits with scores.

        With one split the error is that over its test points. Splits on which the method failed, or whose score is nan,
        are left out: where the number is less than that of the set's splits, the mean is no mean of the set.
        """
        rows = [row for row in self.rows if row.method == method and _set(row.data) == data and not row.failure]
        rows = [row for row in rows if not math.isnan(row.value(column))]
        if not rows:
            return math.nan, math.nan, 0
        if len(rows) == 1:
            return rows[0].value(column), rows[0].errors.get(column, math.nan), 1
        tensor = torch.tensor([row.value(column) for row in rows], dtype=torch.float64)
        return float(tensor.mean()), float(tensor.std() / math.sqrt(len(rows))), len(rows)

    @property
    def table(self) -> Table:
        """The usual columns with their marks (:meth:`mark`); a mean over some of a set's splits says of how many."""
        return self.table_of()

    def table_of(self, columns: Sequence[str] | None = None) -> Table:
        """A table of some columns: names of scores, ``"seconds"``, ``"memory"``; by default those that matter most."""
        names = list(columns or [c for c in SHOWN[self.kind] if self._has(c)] + ["seconds", "memory"])
        several = len(self.datasets) > 1 or any(self.datasets)
        cells, values = [], []
        for data in self.datasets:
            splits = self._splits(data)
            best = {name: self._best(name, data) for name in names}
            for method in self.methods:
                found = {name: self.summary(name, method, data) for name in names}
                if not any(row.method == method and _set(row.data) == data for row in self.rows):
                    continue
                texts = [
                    _cell(name, *found[name], splits) + self._mark(name, method, data, best[name]) for name in names
                ]
                failure = self._failure(method, data)
                if failure and not any(count for _, _, count in found.values()):
                    texts = [shorten("failed: " + failure, _WIDEST, placeholder=" …")] + [""] * (len(names) - 1)
                cells.append([method, *([data] if several else []), *texts])
                values.append({"method": method, "data": data, "failure": failure}
                              | {name: found[name][0] for name in names}
                              | {f"{name}_error": found[name][1] for name in names})  # fmt: skip
        titles = ["method", *(["data"] if several else []), *(_TITLES.get(name, name) for name in names)]
        return Table(titles, cells, values)

    def mark(self, column: str, method: str, data: str = "") -> str:
        """``*`` where a method's mean of a score is the best on a set, ``°`` where it is not told from the best.

        With several splits: where its mean difference from the best one on the same splits is at most the standard
        error of that difference, for what makes a split hard is common to both. With one split, where only means over
        the test points are kept: at most the best one's standard error over these. Means are equally good where they
        are equal but for rounding, 1e-9 of their size. Nothing for a mean over some of the splits only, for what is no
        score of quality (coverage, width, seconds, memory), and where there is nobody to be better than.
        """
        return self._mark(column, method, data, self._best(column, data))

    def to_csv(self, path: str | Path | None = None) -> str:
        """Every number of every row as comma-separated values; also written to a file where one is named."""
        scores = list(dict.fromkeys(name for row in self.rows for name in row.scores))
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        header = ["method", "data", *scores, *(f"{name}_error" for name in scores)]
        writer.writerow([*header, "fit_seconds", "predict_seconds", "memory", "failure"])
        for row in self.rows:
            numbers = [*(row.scores.get(name) for name in scores), *(row.errors.get(name) for name in scores)]
            rest = [row.fit_seconds, row.predict_seconds, row.memory]
            writer.writerow([row.method, row.data, *map(_number, [*numbers, *rest]), row.failure])
        if path is not None:
            Path(path).write_text(out.getvalue(), encoding="utf-8")
        return out.getvalue()

    def to_markdown(self) -> str:
        """The table, its notes and the reasons of failures."""
        lines = [self.table.to_markdown(), ""]
        lines += [f"- {method}{' on ' + data if data else ''}: {why}" for (method, data), why in self.failures.items()]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)]).rstrip() + "\n"

    def to_latex(self) -> str:
        """The table as a LaTeX ``tabular``."""
        return self.table.to_latex()

    def rank_test(self, column: str = "nll") -> Any:
        """Friedman's test over the data sets, see :func:`~ntkgp.evaluation.ranks.rank_test`.

        A method that failed on a split of a set, or has no score there, ranks last on that set; one that was not asked
        on all sets is left out.

        :raises ValueError: fewer than two data sets, or than two methods that were asked on all of them.
        """
        methods = self._ranked()
        if len(methods) < 2 or len(self.datasets) < 2:
            raise ValueError(
                f"rows: expected two or more data sets and methods on all of them, got {len(self.datasets)} sets and "
                f"methods {', '.join(methods) or 'none'}"
            )
        worst = -math.inf if column in LARGER_IS_BETTER else math.inf
        # An infinite score is better than none.
        largest = torch.finfo(torch.float64).max
        means = [[self._whole(column, method, data)[0] for method in methods] for data in self.datasets]
        scores = torch.tensor(means, dtype=torch.float64).nan_to_num(nan=worst, posinf=largest, neginf=-largest)
        return rank_test(scores, methods, larger_is_better=column in LARGER_IS_BETTER)

    def plot(self, columns: Sequence[str] | None = None) -> Figure:
        """Panels of scores with standard errors; with one data set the curves of calibration, with several the
        critical-difference diagram of the NLL.

        :raises ImportError: matplotlib is not installed.
        :raises ValueError: no scores of these columns.
        """
        names = list(columns or SHOWN[self.kind][:4])
        shown = [name for name in names if name in ("seconds", "memory") or self._has(name)]
        if not shown or (columns and len(shown) < len(names)):
            raise ValueError(f"columns: expected scores that some method has, got none of {', '.join(names)}")
        return _figure(self, shown)

    def plot_calibration(
        self, data: str | None = None, *, colors: Mapping[str, str] | None = None, ax: Any = None
    ) -> Any:
        """Reliability (classification) or coverage of intervals (regression) of the methods, on one data set.

        :param data: its name, with that of its split; default: the first.
        :param colors: of methods by label.
        :param ax: where to draw; default: a new figure.
        :return: the axes.
        :raises ValueError: no predictions of this data set are kept.
        """
        rows = [row for row in self.rows if row.predicted is not None and row.data in self.targets]
        name = rows[0].data if data is None and rows else data
        kept = {r.method: r.predicted for r in rows if r.data == name and r.predicted is not None and _drawable(r)}
        if not kept:
            raise ValueError(f"data: no predictions of {name!r} are kept")
        target = self.targets[str(name)]
        if colors is None and len(kept) > len(plots.COLORS):
            colors = _many_colors(list(kept))
        if self.kind == "classification":
            classes = {method: p.probabilities for method, p in kept.items() if p.probabilities is not None}
            return plots.reliability_diagram(classes, target, colors=colors, ax=ax)
        pairs = {k: (p.mean, p.variance) for k, p in kept.items() if p.mean is not None and p.variance is not None}
        return plots.coverage_curve(pairs, target, colors=colors, ax=ax)

    def __str__(self) -> str:
        reasons = [f"{method}{' on ' + data if data else ''}: {why}" for (method, data), why in self.failures.items()]
        return "\n".join([str(self.table), *reasons, *self.notes])

    def __repr__(self) -> str:
        return f"Comparison({len(self.methods)} methods, {len(self.rows)} rows, {len(self.failures)} failures)"

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def _has(self, column: str) -> bool:
        return any(column in row.scores for row in self.rows)

    def _failure(self, method: str, data: str) -> str:
        return next((why for (m, d), why in self.failures.items() if m == method and _set(d) == data), "")

    def _splits(self, data: str) -> int:
        return len({row.data for row in self.rows if _set(row.data) == data})

    def _whole(self, column: str, method: str, data: str) -> tuple[float, float]:
        """Mean and standard error over all splits of a set; nan where one is missing."""
        mean, error, count = self.summary(column, method, data)
        return (mean, error) if count == self._splits(data) else (math.nan, math.nan)

    def _ranked(self) -> list[str]:
        """Methods that were asked on all sets."""
        asked = {(row.method, _set(row.data)) for row in self.rows}
        return [method for method in self.methods if all((method, data) in asked for data in self.datasets)]

    def _best(self, column: str, data: str) -> str | None:
        """The method with the best mean of a score; None for what is no score of quality."""
        if column in ("seconds", "memory", "coverage", "width"):
            return None
        means = {method: self._whole(column, method, data)[0] for method in self.methods}
        means = {method: mean for method, mean in means.items() if math.isfinite(mean)}
        if len(means) < 2:
            return None
        return (max if column in LARGER_IS_BETTER else min)(means, key=means.__getitem__)

    def _mark(self, column: str, method: str, data: str, best: str | None) -> str:
        if best is None:
            return ""
        mean, (top, error) = self._whole(column, method, data)[0], self._whole(column, best, data)
        if not math.isfinite(mean):
            return ""
        distance = abs(mean - top)
        if distance <= _ROUNDING * max(abs(mean), abs(top)):
            return "*"
        values = [
            {row.data: row.value(column) for row in self.rows if row.method == name and _set(row.data) == data}
            for name in (method, best)
        ]
        if len(values[0]) > 1:
            differences = torch.tensor([values[0][split] - values[1][split] for split in values[0]]).double()
            error = float(differences.std()) / math.sqrt(len(differences))
        return "°" if distance <= error else ""


def _parsed(line: Mapping[str, str]) -> Row:
    """A row from its line of a CSV file."""
    rest = {"method", "data", "fit_seconds", "predict_seconds", "memory", "failure"}
    numbers = {name: float(text) if text else math.nan for name, text in line.items() if name not in rest}
    scores = {name: value for name, value in numbers.items() if f"{name}_error" in line and not math.isnan(value)}
    seconds, predicting, memory = (
        float(line[name] or math.nan) for name in ("fit_seconds", "predict_seconds", "memory")
    )
    errors = {name: numbers[f"{name}_error"] for name in scores}
    return Row(line["method"], line["data"], scores, errors, seconds, predicting, memory, line["failure"])


_MARKERS = ("o", "s", "^", "D")


def _set(data: str) -> str:
    return data.split("/", 1)[0]


def _drawable(row: Row) -> bool:
    """Whether its predictions are numbers."""
    parts = vars(row.predicted).values()
    return all(bool(torch.isfinite(part).all()) for part in parts if part is not None)


def _cell(column: str, mean: float, error: float, count: int, splits: int) -> str:
    if not count:
        return "–"
    if column in ("seconds", "memory"):
        return f"{mean:.3g}" if mean < 100 else f"{mean:.0f}"
    text = f"{mean:.4g}" if abs(mean) < 1e4 else f"{mean:.3e}"
    if abs(mean) < 1e3:
        text = f"{mean:.3f}"
    if math.isfinite(error):
        text += f" ± {error:.3f}"
    return text if count == splits else text + f" ({count} of {splits})"


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else repr(float(value))


def _many_colors(methods: Sequence[str]) -> dict[str, str]:
    """More colours than the usual ones, each once as far as they go."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return {method: to_hex(colormaps["tab20"](index % 20)) for index, method in enumerate(methods)}


def _figure(found: Comparison, columns: list[str]) -> Figure:
    kept = [row for row in found.rows if row.predicted is not None and row.data in found.targets]
    curves = len(found.datasets) == 1 and any(row.data == kept[0].data and _drawable(row) for row in kept)
    ranked = len(found.datasets) > 1 and len(found._ranked()) > 1 and found._has("nll")
    panels = len(columns) + curves + ranked
    across = min(panels, 3)
    down = math.ceil(panels / across)
    height = max(3.3, max(0.3, 0.08 * len(found.datasets)) * len(found.methods) + 1)
    figure, axes = plots.new_figure(down, across, (4.8 * across, height * down))
    for ax, column in zip(axes, columns, strict=False):
        _score_panel(found, column, ax)
    if curves:
        ax = found.plot_calibration(ax=axes[len(columns)])
        if len(found.methods) > len(plots.COLORS):  # beside the curves
            ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    if ranked:
        critical_difference_diagram(found.rank_test(), ax=axes[len(columns)])
    for ax in axes[panels:]:
        ax.set_visible(False)
    return figure


def _score_panel(found: Comparison, column: str, ax: Any) -> None:
    """Mean and standard error of every method, one below the other; colours are data sets."""
    methods = found.methods
    for index, data in enumerate(found.datasets):
        triples = [found.summary(column, method, data) for method in methods]
        places = [i + 0.8 * (index + 0.5) / len(found.datasets) - 0.4 for i in range(len(methods))]
        shown = [(x, place, error) for (x, error, _), place in zip(triples, places, strict=True) if math.isfinite(x)]
        if shown:
            values, heights, errors = zip(*shown, strict=True)
            bars = [error if math.isfinite(error) else 0.0 for error in errors]
            color = plots.COLORS[index % len(plots.COLORS)]
            marker = _MARKERS[index // len(plots.COLORS) % len(_MARKERS)]
            ax.errorbar(values, heights, xerr=bars, fmt=marker, ms=4, capsize=2, lw=1, color=color, label=data)
    ax.set_yticks(range(len(methods)), methods)
    ax.set_ylim(len(methods) - 0.5, -0.5)
    ax.set_title(_TITLES.get(column, column), loc="left", fontsize=10)
    if len(found.datasets) > 1:
        ax.legend(frameon=False, fontsize=7)
    means = [found.summary(column, method, data)[:2] for method in methods for data in found.datasets]
    limits = None if column in LARGER_IS_BETTER else _limits([pair for pair in means if math.isfinite(pair[0])])
    if limits is not None:
        ax.set_xlim(*limits)
        ax.set_xlabel("cut: some are beyond", fontsize=8)


def _limits(means: list[tuple[float, float]]) -> tuple[float, float] | None:
    """Where to cut means (with errors), so that a few absurd ones do not hide how the others differ; None: nowhere."""
    if len(means) < 3:
        return None
    values, errors = sorted(mean for mean, _ in means), sorted(e for _, e in means if math.isfinite(e))
    # At most a quarter of them is beyond.
    low, high = values[0], values[3 * (len(values) - 1) // 4]
    bar = errors[len(errors) // 2] if errors else 0.0
    spread = high - low
    # Where most of them tie there are no differences to be shown.
    if spread <= max(bar, 1e-3 * abs(high)) or values[-1] <= high + 8 * spread:
        return None
    return low - 0.5 * spread, high + 8 * spread
