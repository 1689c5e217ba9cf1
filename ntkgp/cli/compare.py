"""``ntkgp compare``: methods side by side on your network and data, written to a folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ntkgp.cli.inputs import CommandError, load_data, load_network, load_weights, network_dtype
from ntkgp.distributed import rank
from ntkgp.evaluation.comparison import Comparison, compare


@dataclass(frozen=True)
class CompareOptions:
    """Arguments of ``ntkgp compare``."""

    network: str
    weights: Path
    data: Path
    out: Path
    methods: list[str] | None = None
    likelihood: str = "auto"
    groups: str = "normalization"
    seed: int = 0
    time_limit: float | None = None


def run_compare(options: CompareOptions) -> Comparison:
    """
    Compare methods, print their table, and write ``table.md``, ``table.tex``, ``scores.csv`` and ``figure.png``.

    Results are kept in the folder ``methods`` beside them: the same command again computes only what is missing.

    :param options: arguments of the command.
    :return: the comparison.
    :raises CommandError: a mistake in the arguments or files.
    """
    net = load_network(options.network)
    load_weights(net, options.weights)
    data = load_data(options.data, options.likelihood, network_dtype(net))
    if data.x_test is None or data.y_test is None:
        raise CommandError(f"--data: {options.data} needs arrays x_test and y_test to compare on")
    # The methods' processes look for the network's class where the factory was found.
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = compare(
            net.eval(), (data.x, data.y), (data.x_test, data.y_test), options.methods, data.x_ood,
            likelihood=data.kind, groups=options.groups,
            seed=options.seed, time_limit=options.time_limit, folder=options.out / "methods",
            progress=sys.stderr.isatty(),
        )  # fmt: skip
    finally:
        sys.path.remove(here)
    if rank() != 0:
        return found
    (options.out / "table.md").write_text(found.to_markdown(), encoding="utf-8")
    (options.out / "table.tex").write_text(found.to_latex() + "\n", encoding="utf-8")
    found.to_csv(options.out / "scores.csv")
    print(found)
    try:
        found.plot().savefig(options.out / "figure.png")
    except (ImportError, ValueError) as error:  # no matplotlib, or no scores
        print(f"no figure: {error}")
    written = sorted(path.name for path in options.out.iterdir() if path.is_file())
    print(f"\nwritten to {options.out}: {', '.join(written)}")
    return found
