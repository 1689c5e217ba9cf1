"""The scripts behind docs/results/reproductions.md: what they compute, at sizes of seconds."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

DOUBLE = torch.float64
SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scripts find each other, and the thread count that they set is taken back."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def call(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """As from the command line."""
    monkeypatch.setattr(sys, "argv", [str(module.__file__), "--quick", *map(str, arguments)])
    module.main()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A data folder with two sets of random images whose class can be seen."""
    folder = tmp_path / "data" / "images"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("mnist", "fashion_mnist"):
        arrays = {}
        for part, count in (("train", 420), ("test", 130)):
            labels = random.integers(0, 10, count).astype(np.uint8)
            pixels = random.integers(0, 120, (count, 28, 28))
            for row, label in enumerate(labels):
                pixels[row, 2 * label : 2 * label + 6] += 120
            arrays |= {f"X_{part}": pixels.astype(np.uint8), f"y_{part}": labels}
        np.savez(folder / f"{name}.npz", **arrays)
    return folder.parent


# --- Hessian-free Laplace ---


def test_hfl_coverage_is_the_share_of_draws_inside() -> None:
    hfl = script("hfl")
    truth = torch.tensor([0.0, 0.3, -1.0], dtype=DOUBLE)
    found = hfl.Latent(torch.tensor([0.1, 0.0, 0.5], dtype=DOUBLE), torch.tensor([0.0, 0.02, 0.3], dtype=DOUBLE), 0.03)
    covered, width = hfl.coverage(found, truth)
    y = truth + hfl.NOISE**0.5 * torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    inside = (y - found.mean).abs() <= width / 2
    torch.testing.assert_close(covered, inside.double().mean(0), atol=4e-3, rtol=0)
    torch.testing.assert_close(width, 2 * 1.959964 * (found.variance + 0.03).sqrt())


def test_hfl_compares_all_methods_at_one_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    hfl = script("hfl")
    monkeypatch.setattr(hfl, "MEMBERS", 2)
    grid = torch.tensor([[-2.0], [0.0], [3.5]], dtype=DOUBLE)
    one = hfl.predictions("sinusoid", 0, grid, 300)
    by = one.predictions
    assert one.unconverged == 0
    torch.testing.assert_close(by["HFL"].variance, by["Laplace, full Hessian"].variance, rtol=1e-4, atol=0)
    assert float((by["Laplace, Gauss-Newton"].variance / by["HFL"].variance - 1).abs().max()) > 1e-2
    # Cauchy-Schwarz: a covariance with the mean is no larger than the largest variance.
    assert float(by["HFL, amortised, absolute value"].variance.max()) < float(by["HFL"].variance.max())
    assert float(by["network alone"].variance.max()) == 0
    rows = hfl.table("sinusoid", [one, one], grid)
    assert len([row for row in rows if row.startswith("|")]) == 2 + len(by)


# --- variational Laplace ---


def test_mean_field_divergence_is_the_kl_of_torch() -> None:
    vl = script("variational_laplace")
    net = vl.network(vl.QUICK, 0)
    found = vl.MeanField(net, 1.0, 1, spread=True)
    expected = torch.zeros(())
    for name, mean in found.mean.items():
        prior = Normal(torch.zeros_like(mean), found.precision[name].rsqrt())
        own = Normal(mean, found.log_std[name].exp())
        expected = expected + kl_divergence(Independent(own, mean.ndim), Independent(prior, mean.ndim))
    torch.testing.assert_close(found.divergence(), expected)


def test_mean_field_without_spread_is_ridge_regression_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    vl = script("variational_laplace")
    monkeypatch.setattr(vl, "RATE", 0.02)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 5, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    net = nn.Sequential(nn.Linear(5, 3))
    found = vl.MeanField(net, 2.0, 400, spread=False).fit((x, y), 0)
    weights = [w.detach().clone().requires_grad_() for w in found.mean.values()]
    loss = nn.functional.cross_entropy(x @ weights[0].T + weights[1], y)
    penalty = 2.0 / 64 * 5 * sum(w.square().sum() for w in weights) / 2
    for gradient in torch.autograd.grad(loss + penalty, weights):
        assert float(gradient.abs().max()) < 1e-4


def test_temperature_is_chosen_on_held_out_images() -> None:
    vl = script("variational_laplace")
    sizes = vl.Sizes(betas=(1.0, 0.1), seeds=2)
    # Held-out images prefer 1 for the first seed and 0.1 for the second, the test images the other way round.
    nll = {(0, 1.0): (0.2, 0.9), (0, 0.1): (0.3, 0.5), (1, 1.0): (0.4, 0.6), (1, 0.1): (0.1, 0.7)}
    rows = [
        vl.Row(seed, beta, "VL", part, value, 0.5, 0.1, 1.0)
        for (seed, beta), pair in nll.items()
        for part, value in zip(("held out", "test"), pair, strict=True)
    ]
    report = vl.Report(rows, sizes)
    assert report.best("VL", "held out") == [1.0, 0.1]
    assert report.chosen("VL", "nll").tolist() == [0.9, 0.7]
    assert report.chosen("VL", "nll", "test").tolist() == [0.5, 0.6]


def test_variational_laplace_script_goes_on_where_it_stopped(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vl = script("variational_laplace")
    monkeypatch.setattr(vl, "QUICK", vl.Sizes(train=96, held_out=32, test=64, width=4, epochs=1, betas=(0.1,), seeds=2))
    out = tmp_path / "out"
    call(vl, monkeypatch, "--data", images, "--out", out)
    page = (out / "variational_laplace_quick.md").read_text(encoding="utf-8")
    assert all(f"| {method} |" in page for method in vl.METHODS)
    assert (out / "variational_laplace_quick.png").stat().st_size > 5000

    def never(*_: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr(vl, "fitted", never)
    call(vl, monkeypatch, "--data", images, "--out", out)
    assert (out / "variational_laplace_quick.md").read_text(encoding="utf-8") == page


# --- subnetworks ---


def test_draws_lie_on_the_intervals_and_have_the_noise() -> None:
    sub = script("subnetwork")
    x, y, truth = sub.draw(3)
    inside = sub.region(x)["data"]
    assert bool(inside.all())
    residual = y.flatten().numpy() - np.interp(x.flatten().numpy(), sub.GRID.numpy(), truth.numpy())
    assert np.std(residual) == pytest.approx(sub.NOISE_SD, rel=0.15)


def test_exact_scores_are_the_marginal_variances_of_all_weights() -> None:
    sub = script("subnetwork")
    x, y, _ = sub.draw(0)
    net = nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    with torch.no_grad():
        net[2].bias[1] = -50.0  # a dead unit: its weights come last
    full = sub.Laplace(net, groups="single", evidence=None, precision=0.7, noise=0.05).fit((x, y))
    rows = full.lin.jacobian(x)[:, 0]
    covariance = torch.linalg.inv(rows.T @ rows / 0.05 + 0.7 * torch.eye(rows.shape[1], dtype=DOUBLE))
    used = rows.abs().amax(0) > 0
    picked = sub.exact_mask(full, x, 10)
    assert bool(used[picked].all())
    assert not bool(used.all())
    smallest = covariance.diag()[picked].min()
    others = covariance.diag()[used].sort(descending=True).values
    torch.testing.assert_close(smallest, others[9])


def test_subnetwork_script(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sub = script("subnetwork")
    call(sub, monkeypatch, "--data", images, "--out", tmp_path, "--work", tmp_path / "work")
    curve, turned = (
        json.loads(next((tmp_path / "work").glob(f"*/{name}0.json")).read_text(encoding="utf-8"))
        for name in ("curve", "images")
    )
    for job in (curve, turned):
        for name, value in job.items():
            method, prior, _, what = f"{name}|||".split("|")[:4]
            if what == "largest" and prior == "common" and method not in ("KFAC", "diagonal"):
                assert value <= 1 + 1e-9, name
    assert turned["network|own|90|nll"] == turned["network|common|90|nll"]
    page = (tmp_path / "subnetwork_quick.md").read_text(encoding="utf-8")
    monkeypatch.setattr(sub, "curve", None)
    monkeypatch.setattr(sub, "Turned", None)
    call(sub, monkeypatch, "--data", images, "--out", tmp_path, "--work", tmp_path / "work")
    assert (tmp_path / "subnetwork_quick.md").read_text(encoding="utf-8") == page
    assert page.count("| all weights | 1.00 ± nan") == 2
    assert "## Rotated MNIST, 1 networks" in page


def test_expectations_are_those_of_the_true_density() -> None:
    sub = script("subnetwork")
    mean, variance, truth = (torch.tensor([v], dtype=DOUBLE) for v in (0.2, 0.04, 0.0))
    found = sub.expectations(mean, variance, 0.01, truth)
    y: Tensor = sub.NOISE_SD * torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    predictive = Normal(mean, (variance + 0.01).sqrt())
    assert float(found["nll"]) == pytest.approx(float(-predictive.log_prob(y).mean()), abs=5e-3)
    inside = (y - mean).abs() <= 1.959964 * predictive.stddev
    assert float(found["covers"]) == pytest.approx(float(inside.double().mean()), abs=3e-3)


def test_what_people_wrote_of_a_page_stays(tmp_path: Path) -> None:
    common, page = script("common"), tmp_path / "page.md"
    common.write(page, "# Title\n\nold 1\n")
    assert page.read_text(encoding="utf-8") == "# Title\n\nold 1\n"
    page.write_text("# Title\n\nold 1\n\n## Reading\n\nIt holds.\n", encoding="utf-8")
    common.write(page, "# Title\n\nnew 2\n")
    assert page.read_text(encoding="utf-8") == "# Title\n\nnew 2\n\n## Reading\n\nIt holds.\n"
    common.write(page, f"# Title\n\n{common.READING}\n\n## Table\n\nnew 3\n")
    assert page.read_text(encoding="utf-8") == "# Title\n\n## Reading\n\nIt holds.\n\n## Table\n\nnew 3\n"
