"""How far ntkgp's Laplace comparator and laplace-torch agree, structure by structure, and where they do not and why.

Trained tanh networks 3-8-8-8-C in float64, one prior precision and one noise given to both libraries; relative
differences of the evidence at the trained weights, of predictive means, covariances and class probabilities.

    python scripts/laplace_torch.py [--out docs/results]

It needs laplace-torch, which is no dependency of ntkgp, and says so and ends where that is missing. It wants an
environment of its own: the head of tests/test_laplace_torch.py has the commands.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

import common
from ntkgp.baselines.laplace import Laplace
from ntkgp.evaluation.training import seeded

DOUBLE = torch.float64
NOISE, PRECISION, N, N_TEST = 0.09, 2.0, 30, 7
TASKS = ("regression, C = 1", "regression, C = 3", "softmax, C = 3")
STRUCTURES = (
    "full", "full (Curvlinops)", "kron", "kron (with biases)", "diag", "last layer, full", "last layer, kron",
    "last layer, diag", "subnetwork, full",
)  # fmt: skip
SUBNETWORK = torch.tensor([0, 3, 10, 30, 33, 40, 71, 105, 110, 140, 180, 181])
DRAWS = 200_000


class Problem:
    """A trained network and its data."""

    def __init__(self, task: str, hidden: int = 3, norm: bool = False, bias: bool = True) -> None:
        self.outputs, self.softmax = int(task[-1]), task.startswith("softmax")
        with seeded(hidden):
            layers: list[nn.Module] = []
            for width in [3] + [8] * (hidden - 1):
                layers += [nn.Linear(width, 8, bias=bias), *([nn.BatchNorm1d(8)] if norm else []), nn.Tanh()]
            self.net = nn.Sequential(*layers, nn.Linear(8, self.outputs)).double()
        generator = torch.Generator().manual_seed(hidden)
        self.x = torch.randn(N, 3, generator=generator, dtype=DOUBLE)
        self.x_test = 2 * torch.randn(N_TEST, 3, generator=generator, dtype=DOUBLE)
        signal = torch.sin(self.x @ torch.randn(3, self.outputs, generator=generator, dtype=DOUBLE))
        self.y = signal + 0.1 * torch.randn(signal.shape, generator=generator, dtype=DOUBLE)
        if self.softmax:
            self.y = torch.randint(0, self.outputs, (N,), generator=generator)
        optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-2, weight_decay=1e-3)
        for _ in range(60 if self.softmax else 300):
            optimizer.zero_grad()
            (cross_entropy if self.softmax else mse_loss)(self.net(self.x), self.y).backward()
            optimizer.step()
        self.net.eval()

    @property
    def loader(self) -> DataLoader:
        """Batches of ten."""
        return DataLoader(TensorDataset(self.x, self.y), batch_size=10)

    @property
    def kind(self) -> str:
        """The likelihood's name, the same in both libraries."""
        return "classification" if self.softmax else "regression"


def ours(problem: Problem, structure: str, **options: Any) -> Laplace:
    """Our comparator with the same weights under the posterior."""
    net = copy.deepcopy(problem.net)
    name, _, kind = structure.partition(", ")
    if name == "last layer" and kind != "full":
        for layer in list(net)[:-1]:
            layer.requires_grad_(False)
    names = {"kron": "kfac", "diag": "diagonal"}
    first = (kind or name).partition(" (")[0] if name != "last layer" or kind != "full" else "last_layer"
    chosen = "subnetwork" if name == "subnetwork" else names.get(first, first)
    if name == "subnetwork":
        options["mask"] = SUBNETWORK
    if not problem.softmax:
        options["noise"] = NOISE
    # K-FAC follows the groups: with one per tensor a layer's weight has a block without its bias, as theirs.
    defaults = {"groups": "tensor", "evidence": None, "precision": PRECISION}
    return Laplace(net, problem.kind, structure=chosen, **(defaults | options)).fit((problem.x, problem.y))


def theirs(laplace: Any, problem: Problem, structure: str, **options: Any) -> Any:
    """laplace-torch on a copy, since its backends extend the module they are given."""
    name, _, kind = structure.partition(", ")
    backends = laplace.curvature
    backend = backends.BackPackGGN if structure in ("full", "last layer, full") else backends.CurvlinopsGGN
    if not problem.softmax:
        options["sigma_noise"] = NOISE**0.5
    if name == "subnetwork":
        options["subnetwork_indices"] = SUBNETWORK
    subset = {"last layer": "last_layer", "subnetwork": "subnetwork"}.get(name, "all")
    shape = kind or name.partition(" (")[0]
    options = {"prior_precision": PRECISION, "backend": backend} | options
    la = laplace.Laplace(copy.deepcopy(problem.net), problem.kind, subset, shape, **options)
    la.fit(problem.loader)
    return la


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def problem_of(task: str, structure: str, norm: bool = False) -> Problem:
    """The task's problem; for K-FAC without hidden biases, which the libraries treat differently."""
    return Problem(task, norm=norm, bias=structure != "kron")


def compare(laplace: Any, problem: Problem, structure: str) -> list[str]:
    """A row of the table."""
    mine, la = ours(problem, structure), theirs(laplace, problem, structure)
    predicted = mine.predict(problem.x_test)
    mean, covariance = (t.detach() for t in la._glm_predictive_distribution(problem.x_test))
    latent = predicted.latent
    if problem.outputs == 1:
        found = latent.mean.unsqueeze(-1), latent.variance[:, None, None]
    else:
        found = latent.mean, latent.covariance_matrix
    evidence = float(la.log_marginal_likelihood())
    row = [
        f"{abs(mine.log_evidences['theta'] / evidence - 1):.0e}", f"{relative(found[0], mean):.0e}",
        f"{relative(found[1], covariance):.0e}",
    ]  # fmt: skip
    if not problem.softmax:
        return [*row, "", "", ""]
    probit = relative(predicted.probs, la(problem.x_test, link_approx="probit"))
    bridge = relative(
        ours(problem, structure, link="bridge").predict(problem.x_test).probs, la(problem.x_test, link_approx="bridge")
    )
    sampled = la(problem.x_test, link_approx="mc", n_samples=DRAWS).detach()
    drawn = ours(problem, structure, link="mc", num_samples=DRAWS // 10).predict(problem.x_test).probs
    # Standard error of the difference, with the largest variance that probabilities p can have.
    error = (drawn * (1 - drawn) * (10 / DRAWS + 1 / DRAWS)).sqrt()
    return [*row, f"{probit:.0e}", f"{bridge:.0e}", f"{float(((sampled - drawn) / error).abs().max()):.1f}"]


def weights_prediction(laplace: Any, problem: Problem, structure: str) -> str:
    """Probabilities of the network itself at sampled weights: largest difference in standard errors."""
    samples = 4000
    la = theirs(laplace, problem, structure)
    sampled = la(problem.x_test, pred_type="nn", link_approx="mc", n_samples=samples).detach()
    mine = ours(problem, structure, prediction="weights", num_samples=samples).predict(problem.x_test).probs
    return f"{float(((sampled - mine) / (mine * (1 - mine) * 2 / samples).sqrt()).abs().max()):.1f}"


def tuned(laplace: Any, problem: Problem, structure: str) -> list[str]:
    """One precision by the evidence at θ̃: theirs with 100 and 2000 steps, ours."""
    found = []
    for steps in (100, 2000):
        la = theirs(laplace, problem, structure)
        la.optimize_prior_precision(method="marglik", n_steps=steps)
        found.append((float(la.prior_precision), float(la.log_marginal_likelihood())))
    # Noise is not tuned by theirs; softmax has none.
    mine = ours(problem, structure, groups="single", evidence="theta")
    found.append((float(mine.precision), mine.log_evidences["theta"]))
    return [f"{precision:.4f}, {value:.6f}" for precision, value in found]


def jacobian(net: nn.Module, x: Tensor) -> Tensor:
    """Rows (N, C, P), one output at a time."""
    rows = []
    for out in net(x).reshape(-1):
        grads = torch.autograd.grad(out, list(net.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows).reshape(len(x), -1, rows[0].numel())


def disagreements(laplace: Any) -> list[tuple[str, str, str, str]]:
    """What 0.3 gives, what the dense reference gives, and why, for cases in which it is not right."""
    rows = []
    for hidden in (1, 3):
        p = Problem(TASKS[1], hidden)
        la = theirs(laplace, p, "gp", n_subset=N)
        j, j_test = jacobian(p.net, p.x).flatten(0, 1), jacobian(p.net, p.x_test)
        inverse = torch.linalg.inv(j.T @ j / NOISE + PRECISION * torch.eye(j.shape[1], dtype=DOUBLE))
        right = (j_test @ inverse @ j_test.mT).diagonal(dim1=1, dim2=2).min()
        mine = ours(p, "full").predict(p.x_test).latent.variance.min()
        assert abs(float(mine / right) - 1) < 1e-9
        found = la._glm_predictive_distribution(p.x_test)[1].detach().diagonal(dim1=1, dim2=2).min()
        why = "exact: the blocks of one hidden layer are symmetric" if hidden == 1 else (
            "K(x, X) is laid out with the outputs of x and of X exchanged (`_kernel_batch_star`)"
        )  # fmt: skip
        rows.append(
            (f"functional Laplace, C = 3, {hidden} hidden: smallest variance", f"{found:.4f}", f"{right:.4f}", why)
        )
    p = Problem(TASKS[0])
    la = theirs(laplace, p, "gp", n_subset=N)
    first = float(la.log_marginal_likelihood())
    la.fit(p.loader)
    second = float(la.log_marginal_likelihood())
    j, f = jacobian(p.net, p.x)[:, 0], p.net(p.x).detach()[:, 0]
    theta = nn.utils.parameters_to_vector(p.net.parameters()).detach()
    prior = torch.distributions.MultivariateNormal(
        f - j @ theta, j @ j.T / PRECISION + NOISE * torch.eye(N, dtype=DOUBLE)
    )
    right = float(prior.log_prob(p.y[:, 0]))
    rows.append((
        "functional Laplace, C = 1: log evidence, and after a second fit", f"{first:.3f}, {second:.3f}", f"{right:.3f}",
        "the likelihood is counted twice; the sum of losses is not reset",
    ))  # fmt: skip
    p = Problem(TASKS[1], norm=True)
    try:
        theirs(laplace, p, "kron")
        outcome = "no error"
    except Exception as error:
        outcome = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
    value = ours(p, "kron").log_evidences["theta"]
    rows.append(("kron with BatchNorm: log evidence", outcome, f"{value:.3f} (ntkgp)", "a refusal, not a wrong number"))
    return rows


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def results(laplace: Any) -> dict[str, list[list[Any]]]:
    """The rows of each table."""
    rows = [[task, name, *compare(laplace, problem_of(task, name), name)] for task in TASKS for name in STRUCTURES]
    p = Problem(TASKS[1], norm=True)
    rows += [["regression, C = 3, BatchNorm", name, *compare(laplace, p, name)] for name in ("full", "diag")]
    softmax = {name: problem_of(TASKS[2], name) for name in ("full", "kron", "diag", "last layer, full")}
    return {
        "same": rows,
        "sampled": [[name, weights_prediction(laplace, softmax[name], name)] for name in ("full", "kron", "diag")],
        "tuned": [[name, *tuned(laplace, p, name)] for name, p in softmax.items()],
        "wrong": [list(row) for row in disagreements(laplace)],
    }


def page(found: dict[str, list[list[Any]]], seconds: float) -> str:
    """The tables and what they mean."""
    release = version("laplace-torch")
    compared = ["problem", "structure", "log evidence at θ̃", "mean", "covariance", "probit", "bridge", "mc"]
    lines = [
        f"laplace-torch {release}, Curvlinops {version('curvlinops-for-pytorch')}, BackPACK "
        f"{version('backpack-for-pytorch')}, torch {torch.__version__}; N = {N}, σ² = {NOISE}, λ = {PRECISION}, "
        f"three hidden layers of 8 tanh, float64; {seconds:.0f} s.",
        "",
        "## Same numbers",
        "",
        "Differences relative to the largest entry. Sampled probabilities (mc): largest difference in standard errors "
        f"of {DRAWS} and {DRAWS // 10} draws (with the bound p(1 − p) for the variance of a draw).",
        "",
        *table(compared, found["same"]),
        "",
        "`full (Curvlinops)`: that backend multiplies the curvature with a single-precision identity whatever the "
        "network's dtype; the others are double throughout. `kron`: a network whose hidden layers have no biases. With "
        "them the two are different approximations, both computed as they are defined: laplace-torch has one block per "
        "bias, ntkgp joins a bias with its layer's weight where they share a group and else "
        '(`groups="tensor"`, as here) puts all biases into one exact block. '
        "`last layer, kron` and `diag`: ntkgp's `kfac` and `diagonal` with all other layers frozen. Not compared: "
        "the diagonal of a subnetwork, which ntkgp does not have, and `lowrank`, whose backend is on no package index.",
        "",
        "Probabilities of the network itself at 4000 sampled weights (softmax), largest difference in standard errors:",
        "",
        *table(["structure", "difference"], found["sampled"]),
        "",
        "## Tuned precision",
        "",
        "One precision by the evidence at θ̃ (softmax): precision, log evidence. 100 steps are laplace-torch's default. "
        "`kron` differs by the head's bias, which ntkgp joins with its weight under one precision.",
        "",
        *table(["structure", "laplace-torch, 100 steps", "2000 steps", "ntkgp"], found["tuned"]),
        "",
        f"## Where {release} is not right, or stops",
        "",
        *table(["quantity", "laplace-torch", "dense reference", "why"], found["wrong"]),
        "",
        "The parametric approximations above are right in every case tried. The [errata](../errata.md) have the rest.",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = common.parser(__doc__, data=False)
    arguments = parser.parse_args()
    try:
        version("laplace-torch")
    except PackageNotFoundError:
        print("skipped: this script needs laplace-torch, which is not installed (see tests/test_laplace_torch.py)")
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import laplace
    import laplace.curvature

    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.perf_counter()
    found = results(laplace)
    text = page(found, time.perf_counter() - start)
    print(text)
    command = "Made by `python scripts/laplace_torch.py`, in an environment with laplace-torch.\n\n"
    common.write(arguments.out / "laplace_torch.md", "# Agreement with laplace-torch\n\n" + command + text)


if __name__ == "__main__":
    main()
