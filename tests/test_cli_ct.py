"""``ntkgp ct``: what it writes, and what it says about mistakes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ntkgp.cli import main
from ntkgp.cli.ct import CTOptions, run_ct
from ntkgp.inverse import FanBeam, ParallelBeam, RayTransform, Sinogram, save_sinogram

SIZE, VIEWS = 12, 8
TINY = ["--size", str(SIZE), "--iterations", "40"]


def truth() -> torch.Tensor:
    image = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    image[2:6, 3:9] = 1.0
    image[7:10, 2:5] = 0.5
    return image


def geometry(views: int = VIEWS) -> ParallelBeam:
    return ParallelBeam((SIZE, SIZE), torch.arange(views) * math.pi / views)


def data(views: int = VIEWS) -> torch.Tensor:
    clean = RayTransform(geometry(views))(truth())
    return clean + 0.2 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def scan(path: Path, **changes: object) -> Path:
    """A file of arrays with some of them changed; None leaves one out."""
    given = {"sinogram": data().numpy(), "angles": geometry().angles.numpy(), "pixel_size": 1.0} | changes
    np.savez(path, **{name: value for name, value in given.items() if value is not None})
    return path


def test_a_sinogram_becomes_image_error_map_report_and_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = scan(tmp_path / "scan.npz", truth=truth().numpy())
    assert main(["ct", "--data", str(path), "--out", str(tmp_path / "out"), *TINY, "--views", "4"]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["figure.png", "report.txt", "result.npz"]
    text = (tmp_path / "out" / "report.txt").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    for part in ("4 of 8", "Evidence at theta_star", "4 views left out", "against the truth", "seconds", "not met"):
        assert part in text
    with np.load(tmp_path / "out" / "result.npz") as found:
        assert found["reconstruction"].shape == found["standard_deviation"].shape == (SIZE, SIZE)
        assert np.allclose(found["angles"], np.arange(0, 8, 2) * np.pi / 8)
        assert (found["standard_deviation"] > 0).all()
        assert "hounsfield" not in found


def test_known_variances_and_a_fan_beam(tmp_path: Path) -> None:
    fan = FanBeam((SIZE, SIZE), torch.arange(6) * math.pi / 3, source_origin=60.0, source_detector=90.0)
    y, variance = RayTransform(fan)(truth()), torch.linspace(0.01, 0.09, fan.num_measurements).reshape(fan.data_shape)
    save_sinogram(tmp_path / "fan.npz", Sinogram(y, fan, variance.double()))
    found = run_ct(
        CTOptions(tmp_path / "fan.npz", tmp_path / "out", size=SIZE, iterations=30, norm="none", output="sigmoid")
    )
    noise = found.model.noise_variance.flatten()
    assert torch.allclose(noise / noise[0], variance.double().flatten() / 0.01, rtol=1e-5)
    assert found.scores is None
    assert found.check is None


def test_draws_where_the_image_is_too_large_for_its_covariance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkgp.cli.ct._EXACT", 10)
    path = scan(tmp_path / "scan.npz", truth=truth().numpy())
    found = run_ct(CTOptions(path, tmp_path / "out", size=SIZE, iterations=20, views=6))
    assert found.draws is not None
    exact = found.model.standard_deviation()
    assert float((found.sd / exact).log().abs().mean()) < 0.15
    assert found.scores is not None
    assert "from 64 draws" in (tmp_path / "out" / "report.txt").read_text(encoding="utf-8")


def test_the_slice_of_the_example(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    options = CTOptions(None, tmp_path / "out", example=True, size=16, views=6, iterations=20)
    found = run_ct(options)
    assert found.scores is not None
    with np.load(tmp_path / "out" / "result.npz") as arrays:
        assert arrays["hounsfield"].shape == (16, 16)
        assert np.allclose(arrays["hounsfield_sd"], 50_000 * arrays["standard_deviation"])
        assert 0.01 < arrays["truth"].mean() < 0.02
        assert 0.02 < arrays["truth"].max() < 0.08


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err
    assert said.startswith("ntkgp: error: ")
    assert said.count("\n") == 1
    return said


WRONG = {
    "a transposed sinogram": ({"sinogram": data().T.numpy()}, "transposed"),
    "no angles": ({"angles": None}, "angles"),
    "empty angles": ({"angles": np.zeros(0), "sinogram": np.zeros((0, 17))}, "angles"),
    "angles in degrees": ({"angles": np.arange(8) * 22.5}, "degrees"),
    "NaN rays": ({"sinogram": np.where(np.eye(8, 17) > 0, np.nan, 1.0)}, "8 entries are NaN"),
    "no signal": ({"sinogram": np.zeros((8, 17))}, "zero"),
    "neither sinogram nor counts": ({"sinogram": None}, "'sinogram', or 'counts'"),
    "counts of zero": (
        {"sinogram": None, "counts": np.where(np.eye(8, 17) > 0, 0.0, 90.0), "white": np.full(17, 100.0)},
        "not above the dark field",
    ),
    "a white field of another detector": (
        {"sinogram": None, "counts": np.full((8, 17), 90.0), "white": np.full(16, 100.0)}, "as many as counts",
    ),
    "negative variances": ({"variance": np.full((8, 19), -1.0)}, "not positive"),
    "a truth of another size": ({"truth": np.zeros((5, 5))}, "truth"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, words = WRONG[case]
    path = scan(tmp_path / "scan.npz", **changes)
    assert main(["ct", "--data", str(path), "--out", str(tmp_path / "out"), *TINY]) == 2
    assert words in one_line(capsys)
    assert not (tmp_path / "out").exists()


OPTIONS = {
    "--views": (["--views", "9"], "fewer than 9"),
    "--views 0": (["--views", "0"], "at least 1"),
    "--size": (["--size", "3"], "--size"),
    "--binning": (["--binning", "100"], "binning"),
    "--max-memory": (["--max-memory", "plenty"], "max_memory"),
    "--rotation-axis": (["--rotation-axis", "nan"], "rotation_axis"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_wrong_option_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra, words = OPTIONS[case]
    path = scan(tmp_path / "scan.npz")
    arguments = ["ct", "--data", str(path), "--out", str(tmp_path / "out"), *TINY, *extra]
    assert main(arguments) == 2
    assert words in one_line(capsys)


def test_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ct", "--data", str(tmp_path / "nothing.npz")]) == 2
    assert "no file" in one_line(capsys)
    (tmp_path / "text.npz").write_text("no arrays", encoding="utf-8")
    assert main(["ct", "--data", str(tmp_path / "text.npz")]) == 2
    assert "npz, MATLAB or HDF5" in one_line(capsys)
    (tmp_path / "slice.dcm").write_bytes(b"nothing")
    assert main(["ct", "--data", str(tmp_path / "slice.dcm")]) == 2
    one_line(capsys)


def test_one_view_has_wide_error_bars(tmp_path: Path) -> None:
    found = run_ct(CTOptions(scan(tmp_path / "scan.npz"), tmp_path / "out", size=SIZE, views=1, iterations=20))
    assert bool(found.sd.isfinite().all())
    assert found.check is not None


def test_the_hyper_prior_narrows_the_error_map(tmp_path: Path) -> None:
    path = scan(tmp_path / "scan.npz")
    options = {"size": SIZE, "iterations": 30, "views": 4}
    free, bound = (run_ct(CTOptions(path, tmp_path / prior, prior=prior, **options)) for prior in ("none", "predcp"))
    assert torch.equal(free.image, bound.image)
    assert bound.model.kernel.precision.item() > free.model.kernel.precision.item()
    assert "hyper-prior predcp" in (tmp_path / "predcp" / "report.txt").read_text(encoding="utf-8")


def test_a_sigmoid_refuses_an_image_that_it_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = scan(tmp_path / "scan.npz", sinogram=-data().numpy())
    assert main(["ct", "--data", str(path), "--out", str(tmp_path / "out"), *TINY]) == 2
    assert "--output: sigmoid is for images >= 0" in capsys.readouterr().err
    found = run_ct(CTOptions(path, tmp_path / "out", size=SIZE, iterations=40, output="linear"))
    assert float(found.image.mean()) < 0
