"""What all scripts do alike: arguments, data at hand, pages, tables and files that are whole or not there."""

from __future__ import annotations

import argparse
import csv
import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Row = dict[str, Any]
# The line of a text where what people wrote of the page goes.
READING = "<!-- reading -->"


# --- arguments and data ---


def parser(doc: str | None, quick: str = "", data: bool = True) -> argparse.ArgumentParser:
    """A parser with the script's docstring as help, --out, and --data and --quick where they are of use.

    :param quick: what --quick leaves out; without it there is no such option.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if quick:
        made.add_argument("--quick", action="store_true", help=quick)
    if data:
        made.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[1] / ".." / "shared" / "data")
    made.add_argument("--out", type=Path, default=Path("docs/results"))
    return made


def parse(made: argparse.ArgumentParser, **quick: Any) -> argparse.Namespace:
    """The arguments; with --quick other defaults."""
    if made.parse_args().quick:
        made.set_defaults(**quick)
    return made.parse_args()


def absent(folder: Path, *files: str, what: str = "skipped") -> bool:
    """Whether any of the files is missing, which is said."""
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        print(f"{what}: no {', '.join(missing)} in {folder}")
    return bool(missing)


def images(folder: Path, name: str, kind: str) -> tuple[Tensor, Tensor]:
    """Images (N, 28, 28) of bytes and labels (N,), of the ``"train"`` or the ``"test"`` part of a set."""
    with np.load(folder / "images" / f"{name}.npz") as file:
        pixels, labels = (torch.from_numpy(file[f"{letter}_{kind}"]) for letter in "Xy")
    return pixels, labels.long()


def agw1d(folder: Path) -> tuple[Tensor, Tensor, str]:
    """The published 1-D data where they are at hand, else three clusters of a smooth function; and which they are."""
    path = folder / "toys" / "agw1d.npz"
    if path.is_file():
        with np.load(path) as file:
            x, y = (torch.from_numpy(file[name]).double().reshape(-1, 1) for name in ("x", "y"))
        return x, y, "agw1d"
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(
        [centre + 2.4 * torch.rand(133, 1, generator=generator, dtype=torch.float64) for centre in (-7.2, -1.2, 4.8)]
    )
    y = 0.5 * torch.sin(x) + 0.02 * x.square() + 0.05 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x, y - y.mean(), "generated (agw1d is not at hand)"


# --- files ---


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside another, to write to; it takes the other's place at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    yield part
    part.replace(path)


def digest(sizes: object) -> str:
    """A name for what was computed with these numbers."""
    return hashlib.sha256(repr(sizes).encode()).hexdigest()[:10]


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV file, none where it is missing; empty fields are left out."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: value for name, value in row.items() if value != ""} for row in csv.DictReader(file)]


def write_rows(path: Path, rows: list[Row]) -> None:
    """All rows as a CSV file, with the columns of all of them and six figures."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


# --- pages ---


def page_of(arguments: argparse.Namespace, name: str) -> Path:
    """Where a page goes; --quick makes one of its own."""
    return arguments.out / f"{name}{'_quick' * getattr(arguments, 'quick', False)}.md"


def kept(page: Path) -> str:
    """The section "## Reading" of a page, without blank lines around it; empty where there is none."""
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    found = re.search(r"^## Reading\n.*?(?=^## |\Z)", old, re.MULTILINE | re.DOTALL)
    return found[0].strip() if found else ""


def write(page: Path, text: str) -> None:
    """Write a page of results; what people wrote under "Reading" on the old one stays, at READING or at its end."""
    before, _, after = text.partition(READING)
    parts = (part.strip("\n") for part in (before, kept(page), after))
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def mean_error(values: Iterable[float] | Tensor) -> tuple[float, float]:
    """Mean and standard error; nan where there are too few values."""
    found = np.array([float(value) for value in values])
    mean = float(found.mean()) if len(found) else math.nan
    return mean, float(found.std(ddof=1) / math.sqrt(len(found))) if len(found) > 1 else math.nan
