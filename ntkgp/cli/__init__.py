"""The command ``ntkgp``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    :param argv: arguments without the program name; default: those of the process.
    :return: exit status: 0, or 2 after an error in what was given.

    Example:
        >>> main(["fit", "--network", "nothing", "--weights", "w.pt", "--data", "d.npz", "--out", "."])
        2
    """
    arguments = _parser().parse_args(argv)
    if arguments.command == "demo":
        from ntkgp.cli.demo import run_demo

        run_demo(arguments.out, arguments.seed, arguments.quick)
        return 0
    from ntkgp.cli.fit import CommandError, FitOptions, run_fit

    options = {name: value for name, value in vars(arguments).items() if name != "command"}
    try:
        run_fit(FitOptions(**options))
    except (CommandError, ValueError, TypeError, MemoryError) as error:
        print(f"ntkgp: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    """Arguments of all commands."""
    parser = argparse.ArgumentParser(
        prog="ntkgp", description="Turn a trained PyTorch network into a Gaussian process."
    )
    parser.add_argument("--version", action="version", version=f"ntkgp {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | fit")
    demo = commands.add_parser("demo", help="train three small networks on data shipped with scikit-learn and show")
    demo.add_argument("--out", type=Path, default=Path("ntkgp-demo"), help="folder for table and figure (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of splits, networks and training (%(default)s)")
    demo.add_argument("--quick", action="store_true", help="a fraction of the work, for a first look")
    fit = commands.add_parser(
        "fit",
        help="your network and data",
        description="Build the Gaussian process of a trained network, fit prior precisions and noise by the model "
        "evidence, and write report.txt, posterior.pt, predictions.npz and figure.png.",
    )
    fit.add_argument("--network", required=True, help="package.module:factory, a function without arguments")
    fit.add_argument("--weights", required=True, type=Path, help="file of torch.save(net.state_dict(), file)")
    fit.add_argument("--data", required=True, type=Path, help=".npz with x, y and optionally x_test, y_test")
    fit.add_argument("--out", required=True, type=Path, help="folder for the results")
    fit.add_argument(
        "--likelihood",
        choices=("auto", "regression", "classification"),
        default="auto",
        help="auto: integer y are labels (%(default)s)",
    )
    fit.add_argument(
        "--groups",
        choices=("normalization", "layer", "tensor", "single"),
        default="normalization",
        help="which weights share a prior precision (%(default)s)",
    )
    fit.add_argument(
        "--mean", choices=("network", "posterior"), default="network", help="predictive mean (%(default)s)"
    )
    fit.add_argument(
        "--at", choices=("theta_star", "theta_map"), default="theta_star", help="evidence at (%(default)s)"
    )
    fit.add_argument("--method", choices=("mackay", "lbfgs"), default="mackay", help="optimiser (%(default)s)")
    return parser


def _version() -> str:
    """Version of the installed package."""
    try:
        return version("ntkgp")
    except PackageNotFoundError:
        return "(not installed)"
