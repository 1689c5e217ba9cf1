"""Which laws of linearised Laplace hold for ntkgp's models, for its comparators and for laplace-torch.

    python scripts/conformance.py [--out docs/results] [--adapters ntkgp baselines laplace-torch] [--render]

It wants an environment with laplace-torch, which is no dependency of ntkgp: the head of tests/test_laplace_torch.py
has the commands. What was measured is kept in conformance.json, one structure after the other, and structures that are
there are not run again (delete the file for that); ``--render`` only writes the page from it. All in all some minutes
on one core.
"""

from __future__ import annotations

import json
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import common
from ntkgp import laws
from ntkgp.laws.__main__ import make
from ntkgp.laws.report import Report, Row

PACKAGES = ("laplace-torch", "curvlinops-for-pytorch", "backpack-for-pytorch", "torch")

PREAMBLE = """\
import copy, torch
from laplace import Laplace
from laplace.curvature import BackPackGGN, CurvlinopsGGN
from torch.utils.data import DataLoader, TensorDataset
from ntkgp.laws.problems import problem

def batches(p):
    return DataLoader(TensorDataset(p.x, p.y), batch_size=7, generator=torch.Generator().manual_seed(0))

def fitted(structure, name="normalised", subset="all", **options):
    p = problem(name)  # net, x, y, x_test: three hidden layers, three outputs
    options = {"backend": CurvlinopsGGN, "prior_precision": 2.0} | options
    if p.likelihood == "regression":
        options = {"sigma_noise": 0.3} | options
    la = Laplace(copy.deepcopy(p.net), p.likelihood, subset, structure, **options)
    la.fit(batches(p))
    return la

x, loader = problem("normalised").x_test, batches(problem("normalised"))
"""
# What a failing law of laplace-torch 0.3 is: laws, structures or None for all, kind, in words, two lines, right value.
BUG, DEFINITION, UNCLAIMED = "bug", "another definition", "not claimed"
FUNCTIONAL = ("functional", "functional, subset")
PARAMETRIC = ("full", "full (BackPACK)", "last layer", "subnetwork", "diag", "kron")
JUDGEMENTS: list[tuple[tuple[str, ...], tuple[str, ...] | None, str, str, str, str]] = [
    (
        ("U8",),
        ("full", "full (BackPACK)", "last layer", "subnetwork"),
        BUG,
        "Curvlinops' GGN is multiplied with a `torch.eye(P)` of the default dtype, single precision.",
        "a, b = fitted('full'), fitted('full', backend=BackPackGGN)\nfloat((a(x)[1] / b(x)[1] - 1).abs().max())",
        "0 or rounding of float64 is right",
    ),
    (
        ("B14",),
        ("full", "last layer", "subnetwork"),
        BUG,
        "A consequence of the single-precision curvature: with σ² = 1e-7 its rounding is as large as what is asked "
        "for.",
        "la = fitted('full', sigma_noise=1e-7 ** 0.5, prior_precision=1.0)\nfloat(la(x)[1].diagonal(dim1=1, "
        "dim2=2).min())",
        "a positive number is right",
    ),
    (
        ("U7",),
        PARAMETRIC,
        BUG,
        "`__call__` takes a generator and does not use it; `functional_samples` does.",
        "def draw(): return fitted('diag')(x, pred_type='nn', link_approx='mc', "
        "generator=torch.Generator().manual_seed(0))"
        "\nfloat((draw()[0] - draw()[0]).abs().max())",
        "0 is right",
    ),
    (
        ("B20",),
        PARAMETRIC,
        BUG,
        '`functional_samples(..., pred_type="glm")` draws one ε for all inputs: moments at each input are right, '
        "inputs are correlated perfectly, and Thompson sampling or an expectation over several inputs is not.",
        "draws = fitted('diag').functional_samples(x[:2], n_samples=2000)\n"
        "[float(torch.corrcoef(draws[..., 0].T)[0, 1]), fitted('diag')(x[:2], joint=True)[1][0, 3]]",
        "the first is the correlation of the draws, the second the covariance that they should have",
    ),
    (
        ("U3",),
        PARAMETRIC + FUNCTIONAL,
        DEFINITION,
        "`log_marginal_likelihood(prior_precision=…)` sets them: its documentation says that the current value is "
        "overwritten. Predictions are others after the call.",
        "la = fitted('diag'); la.log_marginal_likelihood(torch.tensor(5.0))\nfloat(la.prior_precision)",
        "an evaluation leaves 2.0",
    ),
    (
        ("U1",),
        None,
        BUG,
        "`fit` puts the network into evaluation mode and leaves it there, and writes `output_size` on it; no word of "
        "it. (The last-layer classes copy the network.)",
        "net = copy.deepcopy(problem('plain').net).train(); Laplace(net, 'regression', 'all', 'diag').fit(loader)\n"
        "[net.training, hasattr(net, 'output_size')]",
        "[True, False] is right",
    ),
    (
        ("U6",),
        None,
        UNCLAIMED,
        "Outputs are (N, C): an error from inside, which does not name the outputs.",
        "images = problem('images')\nfitted('diag', 'images')(images.x_test)[1].shape",
        "(6, 9, 9) of the flattened output",
    ),
    (
        ("A4", "A5", "A9", "B1", "B1-joint", "B8", "B11", "B13", "B14", "B20", "U5", "U7", "U8"),
        FUNCTIONAL,
        BUG,
        "`_kernel_batch_star` orders its result `bdce` where the reshape that follows needs `bdec`: the outputs of the "
        "test input and of the training input are exchanged. Hidden by one hidden layer or one output.",
        "la = fitted('gp', n_subset=20)\nfloat(la(x)[1].diagonal(dim1=1, dim2=2).min())",
        "a variance is positive",
    ),
    (
        ("U2",),
        (*FUNCTIONAL, "ELLA", "VaLLA"),
        UNCLAIMED,
        "A loader of its own, made without a generator, draws a seed from the global random state in each pass.",
        "state = torch.get_rng_state(); fitted('gp', n_subset=20)\ntorch.equal(state, torch.get_rng_state())",
        "True is right",
    ),
    (
        ("laws of several precisions",),
        ("subnetwork",),
        BUG,
        "A precision for each weight is documented, but the setter takes 1, T or P numbers and the posterior 1 or as "
        "many as the subnetwork has weights. So it is tried with one.",
        "indices = torch.arange(1, 179, 5); own = torch.full((36,), 2.0)\n"
        "fitted('full', subset='subnetwork', subnetwork_indices=indices, prior_precision=own)(x)[1].shape",
        "(6, 3, 3) is right",
    ),
    (
        ("B9", "B12"),
        ("functional, subset",),
        DEFINITION,
        "The prior variance is multiplied with M/N for M of N data, on purpose (`gp_kernel_prior_variance`): fewer "
        "data then give smaller error bars far from them. B9 also has the exchanged outputs.",
        "a, b = (fitted('gp', n_subset=m, sigma_noise=1e6)(x)[1] for m in (5, 20))\nfloat((a / b).mean())",
        "noise without end leaves the prior: 1 is right",
    ),
    (
        ("B4",),
        FUNCTIONAL,
        BUG,
        "log p(y|f) is added to ½(logdet + scatter), which is log N(y; m0, K + σ²I) already.",
        "la = fitted('gp', n_subset=20)\nfloat(la.log_marginal_likelihood().detach())",
        "the rows of B4 above have the right values, at their hyper-parameters",
    ),
    (
        ("U4",),
        FUNCTIONAL,
        BUG,
        "The sum of losses is not reset by a second `fit`.",
        "la = fitted('gp', n_subset=20); first = float(la.log_marginal_likelihood()); la.fit(loader)\n"
        "[first, float(la.log_marginal_likelihood())]",
        "both are to be equal",
    ),
    (
        ("D1", "D2", "D5"),
        FUNCTIONAL,
        BUG,
        "Of diag(p) − ppᵀ only the diagonal is used, which claims information on the sum of the logits; where it "
        "underflows a point gets the noise variance 10 (`nan_to_num(1 / Λ, posinf=10)`). The exchanged outputs add "
        "to it.",
        "la = fitted('gp', 'softmax', n_subset=20)\n"
        "float(torch.linalg.eigvalsh(la.predictive_moments(problem('softmax').x_test)[1]).min())",
        "a covariance has no negative eigenvalue",
    ),
    (
        ("C5",),
        ("ELLA",),
        DEFINITION,
        "One output of each landmark, drawn at random, as in the paper: with C outputs a third of what the data say, "
        "at C = 3, is projected away, and the variance with it.",
        "la = fitted('gp', functional_approximation='nystrom', subsample_size=20, n_eigenvalues=20)\n"
        "float((la(problem('normalised').x)[1] / fitted('full')(problem('normalised').x)[1]).diagonal(dim1=1, "
        "dim2=2).min())",
        "with all outputs of all data it is 1",
    ),
    (
        ("C9",),
        ("VaLLA",),
        DEFINITION,
        "100 Adam steps of 1e-3 (the defaults) from the identity do not reach the optimum, which is known in closed "
        "form.",
        "la = fitted('gp', functional_approximation='variational', inducing_classes=torch.arange(3).repeat(20), "
        "inducing_locations=problem('normalised').x.repeat_interleave(3, 0), alpha=0.0)\n"
        "float((la(x)[1] / fitted('full', prior_precision=float(la.prior_precision), sigma_noise=float(la.sigma_noise))"
        "(x)[1]).diagonal(dim1=1, dim2=2).max())",
        "1 is right at the optimum",
    ),
    (
        ("U4",),
        ("VaLLA",),
        DEFINITION,
        "A second `fit` resets the variational factor, as documented, and goes on with the precision and noise learned "
        "by the first.",
        "z = {'inducing_locations': problem('normalised').x[:3], 'functional_approximation': 'variational'}; "
        "la = fitted('gp', **z); first = float(la.prior_precision); la.fit(loader)\n"
        "[first, float(la.prior_precision)]",
        "2.0 was given",
    ),
    (
        ("B16", "B25"),
        None,
        DEFINITION,
        "100 Adam steps of 0.1 in log λ (the defaults) end one to three thousandths of a nat before the optimum: an "
        "accuracy, not a formula. More steps come nearer.",
        "la = fitted('full', 'softmax'); tune = lambda steps: la.optimize_prior_precision(method='marglik', "
        "prior_structure='layerwise', n_steps=steps)\n"
        "[(tune(steps), float(la.log_marginal_likelihood()))[1] for steps in (100, 2000)]",
        "the second is the larger one",
    ),
]


def save(kept: dict[str, Any], path: Path) -> None:
    """As JSON with a row a line."""
    text = json.dumps(kept, ensure_ascii=False)
    with common.replacing(path) as part:
        text = text.replace("], [", "],\n[").replace('"structures"', '\n"structures"') + "\n"
        part.write_text(text, encoding="utf-8")


def measure(names: list[str], kept: dict[str, Any], path: Path) -> None:
    """Check structure by structure what is not there yet."""
    for name in names:
        adapter = make(name)
        found = kept["libraries"].setdefault(name, {"name": adapter.name, "structures": {}})
        for structure in adapter.structures:
            if structure in found["structures"]:
                continue
            print(f"{adapter.name}, {structure}", file=sys.stderr)
            rows = laws.check(adapter, structures=[structure])
            found["structures"][structure] = [
                [row.law, row.problem, row.outcome, row.error, row.tolerance, row.reason] for row in rows
            ]
            save(kept, path)


def reproduce(kept: dict[str, Any], path: Path) -> None:
    """Run the two lines of each judgement."""
    names: dict[str, Any] = {}
    exec(PREAMBLE, names)
    for *_, lines, _ in JUDGEMENTS:
        if lines in kept["reproductions"]:
            continue
        first, last = lines.split("\n")
        try:
            exec(first, names)
            found = repr(eval(last, names))
        except Exception as error:
            text = str(error).strip() or "no message"
            found = f"{type(error).__name__}: {text.splitlines()[0][:100]}"
        kept["reproductions"][lines] = found
        save(kept, path)


def report_of(library: dict[str, Any]) -> Report:
    """The report that its rows are."""
    by_law = [
        Row(law, laws.LAWS[law].statement, structure, *rest)
        for structure, rows in library["structures"].items()
        for law, *rest in rows
    ]
    order = list(laws.LAWS)
    return Report(library["name"], tuple(sorted(by_law, key=lambda row: order.index(row.law))))


def judgement(row: Row) -> int | None:
    """The number of the entry that explains a row."""
    for number, (ids, structures, *_) in enumerate(JUDGEMENTS, 1):
        if row.law in ids and (structures is None or row.structure in structures):
            return number
    return None


def judged(report: Report, reproductions: dict[str, str]) -> list[str]:
    """What does not hold, and what each is."""
    lines = ["| law | structure | problem | outcome | error | tolerance | | see |", "| --- " * 8 + "|"]
    for row in report.broken:
        figures = ["", ""] if row.error is None else [f"{row.error:.1e}", f"{row.tolerance:.1e}"]
        number = judgement(row)
        cells = [row.law, row.structure, row.problem, row.outcome, *figures, row.reason.replace("|", "\\|")]
        lines.append("| " + " | ".join([*cells, "**unexplained**" if number is None else f"({number})"]) + " |")
    lines += ["", "The two lines of each entry go below these:", "", "```text", PREAMBLE.rstrip(), "```", ""]
    for number, (ids, structures, kind, words, code, right) in enumerate(JUDGEMENTS, 1):
        where = "all structures" if structures is None else ", ".join(structures)
        lines += [f"**({number}) {', '.join(ids)}; {where}: {kind}.** {words}", "", "```text", *code.split("\n")]
        lines += [f"# {reproductions.get(code, 'not run')}; {right}", "```", ""]
    return lines


def page(kept: dict[str, Any]) -> str:
    """All of it."""
    versions = ", ".join(f"{name} {number}" for name, number in kept["versions"].items())
    reports = {name: report_of(library) for name, library in kept["libraries"].items()}
    lines = [
        "# Which laws hold", "",
        "Made by `python scripts/conformance.py`, in an environment with laplace-torch.", "",
        "A network linearised at its trained weights is a linear model: its posterior, its evidence and its "
        "invariances are identities, which `ntkgp.laws` compares with dense float64 algebra (`torch.func.jacrev`, full "
        "matrices). The networks are trained and have three hidden layers, three outputs and, but for two of them, a "
        "normaliser; hyper-parameters are given. Mistakes that one hidden layer or one output hide show there. Any "
        "library can be put to it: an adapter is one class with `fit(task)` (`ntkgp.laws.Adapter`), and a method that "
        "it lacks makes a law not applicable. `python -m ntkgp.laws --list` prints the laws, `python -m ntkgp.laws "
        "--adapter ntkgp` runs them.", "",
        f"{versions}. ✓ holds on all problems, **✗** does not on at least one, *error* is an exception in place of a "
        "number, an empty cell says nothing: not claimed, or no law for this approximation.", "",
        "| library | holds | fails | raises | not applicable |", "| --- | --: | --: | --: | --: |",
        *(f"| {r.library} | " + " | ".join(map(str, r.counts().values())) + " |" for r in reports.values()), "",
    ]  # fmt: skip
    titles = {"ntkgp": "The models", "baselines": "The comparators"}
    for name, report in reports.items():
        lines += [f"## {titles.get(name, report.library)}", "", report.to_markdown(details=name in titles), ""]
        if name == "laplace-torch":
            lines += [*NOTE, "", *judged(report, kept["reproductions"])]
    lines += LIMITS
    return "\n".join(lines).rstrip() + "\n"


NOTE = [
    "Its functional structures have one precision for all weights, so that laws about several say nothing of them. "
    "`full`, `last layer` and `subnetwork` use the default backend, Curvlinops, whose curvature is single precision "
    "(entry of U8); to count this once, all their other laws have the tolerance 1e-4. `functional` is all data, "
    "`functional, subset` 5 of 20; ELLA has all data as landmarks, VaLLA an inducing point for each output of all "
    "data.",
]
LIMITS = [
    "## What this is not", "",
    "Laws say that numbers are what their definitions say, not that they are good error bars: see [the comparison on "
    "UCI sets](uci.md). The problems are small, so that nothing is said of speed or memory: see "
    "[performance](../performance.md). An empty cell is no defect. U3 says little of the comparators, which are made "
    "anew for each evaluation of their evidence. K-FAC is compared only where all its definitions are one matrix (no "
    "biases in hidden layers); [agreement with laplace-torch](laplace_torch.md) has the links and the tuned "
    "precisions, the [errata](../errata.md) the reasons.",
]  # fmt: skip


def main() -> None:
    parser = common.parser(__doc__, data=False)
    parser.add_argument("--adapters", nargs="+", default=["laplace-torch", "ntkgp", "baselines"])
    parser.add_argument("--render", action="store_true", help="only write the page again")
    arguments = parser.parse_args()
    path = arguments.out / "conformance.json"
    kept: dict[str, Any] = {"versions": {}, "libraries": {}, "reproductions": {}}
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
    if not arguments.render:
        try:
            kept["versions"] = {name: version(name) for name in PACKAGES}
        except PackageNotFoundError as missing:
            print(
                f"skipped: this script needs {missing.name}, which is not installed (see tests/test_laplace_torch.py)"
            )
            return
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        measure(arguments.adapters, kept, path)
        reproduce(kept, path)
    common.write(arguments.out / "conformance.md", page(kept))
    broken = [row for library in kept["libraries"].values() for row in report_of(library).broken]
    print(f"{len(broken)} rows that fail or raise")


if __name__ == "__main__":
    main()
