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
    from ntkgp.cli.inputs import CommandError, check_folder

    options = {name: value for name, value in vars(arguments).items() if name != "command"}
    try:
        check_folder(arguments.out)
        if arguments.command == "demo":
            from ntkgp.cli.demo import run_demo

            run_demo(**options)
        elif arguments.command == "fit":
            from ntkgp.cli.fit import FitOptions, run_fit

            run_fit(FitOptions(**options))
        elif arguments.command == "ct":
            from ntkgp.cli.ct import CTOptions, run_ct

            run_ct(CTOptions(**options))
        elif arguments.command == "evidence":
            from ntkgp.cli.evidence import EvidenceOptions, processes, run_evidence

            with processes():
                run_evidence(EvidenceOptions(**options))
        else:
            from ntkgp.cli.compare import CompareOptions, run_compare
            from ntkgp.cli.evidence import processes

            with processes():
                run_compare(CompareOptions(**options))
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
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | fit | evidence | compare | ct")
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
    _add_inputs(fit)
    fit.add_argument(
        "--mean", choices=("network", "posterior"), default="network", help="predictive mean (%(default)s)"
    )
    fit.add_argument(
        "--at", choices=("theta_star", "theta_map"), default="theta_star", help="evidence at (%(default)s)"
    )
    fit.add_argument("--method", choices=("mackay", "lbfgs"), default="mackay", help="optimiser (%(default)s)")
    _add_evidence(
        commands.add_parser(
            "evidence",
            help="any number of data, by one process or many",
            description="Fit prior precisions and noise by one pass over the data, and write report.txt and "
            "evidence.pt. With torchrun --nproc-per-node W -m ntkgp evidence ... the processes share the pass; its "
            "sums are the same bit by bit.",
        )
    )
    compare = commands.add_parser(
        "compare",
        help="methods side by side on your network and data",
        description="Fit methods to a trained network and its data, score their predictions of x_test and y_test (and "
        "how well they tell x_ood from x_test), and write table.md, table.tex, scores.csv and figure.png.",
    )
    _add_inputs(compare)
    compare.add_argument("--methods", nargs="+", metavar="NAME", help="default: all that need nothing more")
    compare.add_argument("--seed", type=int, default=0, help="of all that is random (%(default)s)")
    compare.add_argument("--time-limit", type=float, metavar="SECONDS", help="for each method")
    _add_ct(
        commands.add_parser(
            "ct",
            help="a tomogram with an error map",
            description="Fit a deep image prior to a sinogram (or to the simulated scan of a slice in DICOM), make it "
            "a Gaussian process by the model evidence, and write result.npz, report.txt and figure.png.",
        )
    )
    return parser


def _add_evidence(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ntkgp evidence``."""
    _add_inputs(parser, required=False)
    parser.add_argument("--example", type=int, metavar="ROWS", help="a made-up network and so many rows, instead")
    parser.add_argument("--landmarks", type=int, default=128, help="inputs that span the features (%(default)s)")
    parser.add_argument("--features", type=int, help="mixtures of their gradients (default: all)")
    parser.add_argument("--batch-size", type=int, default=4096, help="rows at a time (%(default)s)")
    parser.add_argument("--max-memory", default="2GiB", help="of each process (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the landmarks (%(default)s)")


def _add_ct(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ntkgp ct``."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help=".npz, .mat or .h5 with sinogram (or counts, white, dark), angles or angles_degrees, and what "
        "ntkgp.inverse.load_sinogram knows of the geometry; or a slice in DICOM, whose scan is simulated",
    )
    source.add_argument("--example", action="store_true", help="the slice CT_small.dcm of the package pydicom")
    parser.add_argument("--out", type=Path, default=Path("ntkgp-ct"), help="folder for the results (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of the image in pixels (%(default)s)")
    parser.add_argument("--views", type=int, help="so many at equal distances (all of a sinogram, 30 of a slice)")
    parser.add_argument("--noise", type=float, default=0.01, help="of a simulated scan: part of its mean (%(default)s)")
    parser.add_argument("--layer", type=int, default=0, help="which of several detector rows (%(default)s)")
    parser.add_argument("--binning", type=int, default=1, help="detectors that become one (%(default)s)")
    parser.add_argument("--rotation-axis", type=float, metavar="COLUMN", help="detector column, before binning")
    parser.add_argument(
        "--groups",
        choices=("single", "block", "layer", "normalization"),
        default="single",
        help="which weights share a prior precision (%(default)s)",
    )
    parser.add_argument(
        "--at", choices=("theta_star", "theta_map"), default="theta_star", help="evidence at (%(default)s)"
    )
    parser.add_argument("--prior", choices=("none", "predcp"), default="predcp", help="of the precisions (%(default)s)")
    parser.add_argument("--norm", choices=("group", "none"), default="none", help="of the U-Net (%(default)s)")
    parser.add_argument("--output", choices=("linear", "sigmoid"), default="sigmoid", help="of it (%(default)s)")
    parser.add_argument("--iterations", type=int, default=20_000, help="of its fit at most (%(default)s)")
    parser.add_argument("--max-memory", default="4GiB", help="for matrices (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (%(default)s)")


def _add_inputs(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """What every command on a user's network reads, and where it writes."""
    parser.add_argument("--network", required=required, help="package.module:factory, a function without arguments")
    parser.add_argument("--weights", required=required, type=Path, help="file of torch.save(net.state_dict(), file)")
    parser.add_argument(
        "--data", required=required, type=Path, help=".npz with x, y and optionally x_test, y_test, x_ood"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for the results")
    parser.add_argument(
        "--likelihood",
        choices=("auto", "regression", "classification"),
        default="auto",
        help="auto: integer y are labels (%(default)s)",
    )
    parser.add_argument(
        "--groups",
        choices=("normalization", "layer", "tensor", "single"),
        default="normalization",
        help="which weights share a prior precision (%(default)s)",
    )


def _version() -> str:
    """Version of the installed package."""
    try:
        return version("ntkgp")
    except PackageNotFoundError:
        return "(not installed)"
