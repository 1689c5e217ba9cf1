"""``python -m ntkgp.laws``: which laws hold for a library."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from ntkgp.laws import LAWS, Adapter, check

_ADAPTERS = ("ntkgp", "baselines", "laplace-torch", "dense")


def make(name: str) -> Adapter:
    """The adapter of a name.

    :raises ImportError: its library is not installed.
    """
    from ntkgp.laws import adapters

    known: dict[str, Callable[[], Adapter]] = {
        "ntkgp": adapters.ModelsAdapter,
        "baselines": adapters.BaselinesAdapter,
        "laplace-torch": adapters.LaplaceTorchAdapter,
        "dense": adapters.DenseAdapter,
    }
    return known[name]()


def main(argv: Sequence[str] | None = None) -> int:
    """Check a library and print what was found.

    :param argv: arguments without the program name; those of the process by default.
    :return: exit status: 0 if every law holds or says nothing, 1 if one does not, 2 for a library that is missing or
        names that are unknown.

    >>> main(["--adapter", "dense", "--laws", "B8", "--structures", "exact"])
    dense reference: 1 holds, 0 fails, 0 raises, 0 not applicable
    0
    """
    parser = argparse.ArgumentParser(prog="python -m ntkgp.laws", description="Which laws hold for a library.")
    parser.add_argument("--adapter", choices=_ADAPTERS, default="ntkgp", help="the library (default: ntkgp)")
    parser.add_argument("--laws", nargs="+", metavar="ID", help="ids of laws (default: all)")
    parser.add_argument("--structures", nargs="+", metavar="NAME", help="names of structures (default: all)")
    parser.add_argument("--markdown", action="store_true", help="print tables")
    parser.add_argument("--list", action="store_true", help="print the laws and end")
    arguments = parser.parse_args(argv)
    if arguments.list:
        for law in LAWS.values():
            print(f"{law.id:9} {law.statement}")
        return 0
    try:
        report = check(make(arguments.adapter), arguments.laws, arguments.structures)
    except (ImportError, KeyError) as error:
        print(f"ntkgp.laws: error: {error.args[0]}", file=sys.stderr)
        return 2
    print(report.to_markdown() if arguments.markdown else report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
