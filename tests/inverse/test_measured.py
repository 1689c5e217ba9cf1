"""Measured data: noise of line integrals by simulation, files of every kind written here, DICOM, what is refused."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch

from ntkgp.inverse.geometry import FanBeam, ParallelBeam
from ntkgp.inverse.measured import Sinogram, line_integrals, load_dicom, load_sinogram, save_sinogram

DOUBLE = torch.float64


def counted(rng: np.random.Generator, repeats: int = 4000) -> tuple[np.ndarray, ...]:
    """Simulated counts with electronic noise: (repeats, 2, 3) of them, 5 white and 4 dark frames each time."""
    attenuation = np.array([[0.0, 0.5, 2.0], [1.0, 3.0, 0.1]])
    beam, dark, read = np.array([900.0, 1000.0, 1200.0]), np.array([40.0, 50.0, 60.0]), 5.0

    def detect(mean: np.ndarray, *shape: int) -> np.ndarray:
        size = (repeats, *shape)
        return rng.poisson(np.broadcast_to(mean, size)) + dark + read * rng.normal(size=size)

    return attenuation, detect(beam * np.exp(-attenuation), 2, 3), detect(beam, 5, 3), detect(np.zeros(3), 4, 3)


def test_line_integrals_and_their_variance_are_those_of_repeated_counts() -> None:
    attenuation, counts, white, dark = counted(np.random.default_rng(0))
    found = [line_integrals(c, w, d) for c, w, d in zip(counts, white, dark, strict=True)]
    values, variances = torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found])
    spread = values.var(0)
    # Standard errors: of a mean, and of a variance, sqrt(2/n) of it; the bias of a logarithm is half a variance.
    assert ((values.mean(0) - torch.from_numpy(attenuation)).abs() < 4 * (spread / 4000).sqrt() + spread).all()
    assert ((variances.mean(0) / spread - 1).abs() < 4 * math.sqrt(2 / 4000) + 0.05).all()


def test_the_gain_is_found_from_repeated_white_frames() -> None:
    rng = np.random.default_rng(0)
    gain, beam = 3.7, rng.uniform(800, 1200, size=400)
    drift = rng.uniform(0.95, 1.05, size=(40, 1))
    white = rng.poisson(gain * beam * drift) / gain
    _, known = line_integrals(white[:2] * 0.5, white, gain=gain)
    _, found = line_integrals(white[:2] * 0.5, white, gain=None)
    assert torch.allclose(found, known, rtol=0.05)
    # Electronic noise of the dark frames is taken off first.
    dark = 100 + 20 * rng.normal(size=(40, 400))
    noisy = white + 100 + 20 * rng.normal(size=white.shape)
    _, found = line_integrals(noisy[:2], noisy, dark, gain=None)
    _, known = line_integrals(noisy[:2], noisy, dark, gain=gain)
    assert torch.allclose(found, known, rtol=0.2)


def test_simple_counts() -> None:
    p, variance = line_integrals([[100.0, 400.0]], 400.0)
    assert torch.allclose(p, torch.tensor([[math.log(4), 0.0]], dtype=DOUBLE))
    assert torch.allclose(variance, torch.tensor([[1 / 100 + 1 / 400, 2 / 400]], dtype=DOUBLE))
    p, _ = line_integrals([[0.0, 400.0]], 400.0, minimum=1.0)
    assert float(p[0, 0]) == pytest.approx(math.log(400))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            ([[1.0, 0.0]], 9.0),
            {},
            r"counts: 1 of 2 are not above the dark field \(first: view 0, detector 1, 0 counts\)",
        ),
        (([[1.0, -3.0]], 9.0), {}, "counts: 1 of 2 are not above the dark field"),
        (([[5.0, 5.0]], 9.0, [5.0, 0.0]), {}, r"first: view 0, detector 0, 5 counts.*give minimum="),
        (([[math.nan, 1.0]], 9.0), {}, "counts: 1 entries are NaN or infinite"),
        (([1.0, 2.0], 9.0), {}, r"counts: expected \(views, detectors\), got shape \(2,\)"),
        (([[1.0, 2.0]], [9.0, 9.0, 9.0]), {}, r"white: expected \(repeats, 2\), as many as counts, got shape \(3,\)"),
        (([[1.0, 2.0]], 9.0, [[1.0]]), {}, r"dark: expected \(repeats, 2\)"),
        (([[1.0, 2.0]], [9.0, 1.0], 1.0), {}, "white: not above the dark field at 1 detectors, first at 1"),
        (([[1.0, 2.0]], 9.0), {"gain": 0.0}, "gain: expected a positive number of photons per count, got 0.0"),
        (([[1.0, 2.0]], 9.0), {"gain": None}, "gain: None needs repeated white frames, got 1"),
        (([[1.0, 2.0]], [[9.0, 9.0]] * 3), {"gain": None}, "gain: the white frames do not differ"),
        (([[1.0, 2.0]], 9.0), {"minimum": -1.0}, "minimum: expected a positive number of counts, got -1.0"),
    ],
)
def test_bad_counts(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        line_integrals(*arguments, **options)


ANGLES = np.linspace(0, 3, 6)


def integrals(detectors: int = 10) -> np.ndarray:
    return np.random.default_rng(0).random((6, detectors))


@pytest.mark.parametrize("fan", [False, True])
@pytest.mark.parametrize("variance", [None, torch.full((6, 10), 0.3, dtype=DOUBLE)])
def test_a_sinogram_comes_back_from_its_file(fan: bool, variance: torch.Tensor | None, tmp_path: Path) -> None:
    common: dict[str, Any] = {"pixel_size": 0.7, "detector_size": 0.9, "image_centre": (0.5, -1.0)}
    geometry = (
        FanBeam((8, 7), ANGLES, 10, source_origin=50, source_detector=80, rotation_axis=5.2, **common)
        if fan
        else ParallelBeam((8, 7), ANGLES, 10, detector_offset=0.4, **common)
    )
    saved = Sinogram(torch.from_numpy(integrals()), geometry, variance)
    save_sinogram(tmp_path / "scan.npz", saved)
    found = load_sinogram(tmp_path / "scan.npz")
    assert type(found.geometry) is type(geometry)
    assert torch.equal(found.data, saved.data)
    assert (found.variance is None) == (variance is None)
    assert variance is None or torch.equal(found.variance, variance)  # type: ignore[arg-type]
    for ours, theirs in zip(found.geometry.rays(), geometry.rays(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    assert found.geometry.image_shape == (8, 7)
    assert found.geometry.pixel_size == 0.7
    assert found.geometry.image_centre == (0.5, -1.0)


def test_views_of_a_sinogram() -> None:
    whole = Sinogram(torch.from_numpy(integrals()), ParallelBeam((8, 8), ANGLES, 10), torch.ones(6, 10))
    for chosen in (slice(None, None, 2), [0, 2, 4], torch.tensor([True, False] * 3)):
        part = whole[chosen]
        assert torch.equal(part.data, whole.data[::2])
        assert torch.equal(part.geometry.angles, whole.geometry.angles[::2])
        assert part.variance is not None
        assert part.variance.shape == (3, 10)
    assert whole[-1].data.shape == (1, 10)


def test_counts_of_several_rows_become_line_integrals(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    counts = rng.uniform(100, 900, size=(6, 2, 10))
    white, dark = rng.uniform(950, 1050, size=(3, 2, 10)), rng.uniform(5, 10, size=(4, 2, 10))
    np.savez(tmp_path / "raw.npz", proj=counts, white=white, dark=dark, theta_deg=np.rad2deg(ANGLES))
    found = load_sinogram(tmp_path / "raw.npz", (8, 8), layer=1)
    data, variance = line_integrals(counts[:, 1], white[:, 1], dark[:, 1])
    assert torch.allclose(found.data, data)
    assert found.variance is not None
    assert torch.allclose(found.variance, variance)
    assert np.allclose(found.geometry.angles, ANGLES)
    with pytest.raises(ValueError, match="layer: expected one of the 2 detector rows, got 2"):
        load_sinogram(tmp_path / "raw.npz", (8, 8), layer=2)


@pytest.mark.parametrize("columns", [12, 13])
def test_binning_moves_the_axis_with_the_detectors(columns: int, tmp_path: Path) -> None:
    data = integrals(columns)
    common: dict[str, Any] = {"angles": ANGLES, "pixel_size": 2.0, "detector_size": 0.5, "variance": np.ones_like(data)}
    for placed in ({}, {"rotation_axis": 4.3}, {"detector_offset": 0.25}):
        np.savez(tmp_path / "scan.npz", sinogram=data, **common, **placed)
        plain, binned = (load_sinogram(tmp_path / "scan.npz", (8, 8), binning=b) for b in (1, 3))
        assert torch.allclose(binned.data, torch.from_numpy(data)[:, :12].reshape(6, 4, 3).mean(-1))
        assert binned.variance is not None
        assert torch.allclose(binned.variance, torch.full((6, 4), 1 / 3, dtype=DOUBLE))
        # A bin lies where its detectors are.
        expected = plain.geometry.detector_coordinates[:12].reshape(4, 3).mean(-1)
        assert torch.allclose(binned.geometry.detector_coordinates, expected)


def test_counts_are_binned_before_the_logarithm(tmp_path: Path) -> None:
    counts = np.array([[100.0, 300.0]])
    np.savez(tmp_path / "raw.npz", counts=counts, white=np.array(1000.0), angles=np.zeros(1))
    found = load_sinogram(tmp_path / "raw.npz", (2, 2), binning=2)
    assert float(found.data) == pytest.approx(math.log(2000 / 400))
    assert found.variance is not None
    assert float(found.variance) == pytest.approx(1 / 400 + 1 / 2000)


def test_the_image_is_as_wide_as_what_the_detector_sees(tmp_path: Path) -> None:
    np.savez(tmp_path / "scan.npz", sinogram=integrals(), angles=ANGLES, detector_size=0.5)
    assert load_sinogram(tmp_path / "scan.npz", (8, 8)).geometry.pixel_size == pytest.approx(5 / 8)
    fan = load_sinogram(tmp_path / "scan.npz", (8, 8), source_origin=40.0, source_detector=80.0)
    assert isinstance(fan.geometry, FanBeam)
    assert fan.geometry.pixel_size == pytest.approx(2.5 / 8)


def test_what_is_given_goes_before_the_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "scan.npz", sinogram=integrals(), angles=ANGLES, image_shape=(9, 9), rotation_axis=3.0)
    found = load_sinogram(
        tmp_path / "scan.npz", (8, 8), angles_degrees=np.arange(6) * 10.0, pixel_size=0.5, detector_offset=0.0
    )
    assert found.geometry.image_shape == (8, 8)
    assert float(found.geometry.angles[-1]) == pytest.approx(math.radians(50))
    assert found.geometry.detector_offset == 0.0
    with pytest.raises(TypeError, match=r"settings: unknown \['pixels'\]"):
        load_sinogram(tmp_path / "scan.npz", pixels=3)


def test_matlab_files_of_the_helsinki_challenge(tmp_path: Path) -> None:
    parameters = {
        "angles": np.arange(6) * 0.5 + 269, "distanceSourceOrigin": 410.66, "distanceSourceDetector": 553.74,
        "pixelSizePost": 0.2, "numDetectorsPost": 10,
    }  # fmt: skip
    scipy.io.savemat(
        tmp_path / "ta.mat", {"CtDataLimited": {"sinogram": integrals(), "parameters": parameters}}, do_compression=True
    )
    found = load_sinogram(tmp_path / "ta.mat", (8, 8))
    assert isinstance(found.geometry, FanBeam)
    assert (found.geometry.source_origin, found.geometry.source_detector) == (410.66, 553.74)
    assert found.geometry.detector_size == 0.2
    assert np.allclose(found.geometry.angles, np.deg2rad(parameters["angles"]))
    assert np.allclose(found.data, integrals())


def test_plain_matlab_files(tmp_path: Path) -> None:
    scipy.io.savemat(tmp_path / "scan.mat", {"sinogram": integrals(), "angles": ANGLES, "image_shape": [8, 8]})
    found = load_sinogram(tmp_path / "scan.mat")
    assert np.allclose(found.data, integrals())
    assert found.geometry.image_shape == (8, 8)


class Hdf5File:
    """What h5py.File shows of a tree of arrays."""

    class Dataset:
        def __init__(self, value: np.ndarray) -> None:
            self.value = value

        def __getitem__(self, index: tuple[()]) -> np.ndarray:
            return self.value

    def __init__(self, tree: dict[str, np.ndarray | None]) -> None:
        self.tree = tree

    def __enter__(self) -> Hdf5File:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def visititems(self, visit: Any) -> None:
        for name, value in self.tree.items():
            visit(name, None if value is None else self.Dataset(value))


@pytest.mark.parametrize("matlab", [False, True])
def test_hdf5_by_the_interface_of_h5py(matlab: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree: dict[str, np.ndarray | None] = {
        "exchange": None,
        "exchange/data": np.full((6, 1, 10), 100.0),
        "exchange/data_white": np.full((2, 1, 10), 1000.0),
        "exchange/data_dark": np.zeros((2, 1, 10)),
        "exchange/theta": np.rad2deg(ANGLES),
    }
    if matlab:
        tree = {"sinogram": integrals().T, "angles": ANGLES[:, None]}
    module = types.ModuleType("h5py")
    vars(module).update(File=lambda path, mode: Hdf5File(tree), Dataset=Hdf5File.Dataset)
    monkeypatch.setitem(sys.modules, "h5py", module)
    path = tmp_path / ("scan.mat" if matlab else "scan.h5")
    path.write_bytes(b"MATLAB 7.3 MAT-file" if matlab else b"\x89HDF\r\n\x1a\n")
    found = load_sinogram(path, (8, 8))
    assert np.allclose(found.data, integrals() if matlab else math.log(10))
    assert np.allclose(found.geometry.angles, ANGLES)


def test_hdf5_itself(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["exchange/data"] = np.full((6, 2, 10), 100.0)
        file["exchange/data_white"] = np.full((2, 2, 10), 1000.0)
        file["exchange/theta"] = np.rad2deg(ANGLES)
    assert np.allclose(load_sinogram(tmp_path / "scan.h5", (8, 8), layer=1).data, math.log(10))


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        (
            {"sinogram": integrals().T},
            {},
            r"sinogram: expected one row for each of the 6 angles, got \(10, 6\); it looks",
        ),
        ({"sinogram": integrals()[:5]}, {}, r"sinogram: expected one row for each of the 6 angles, got \(5, 10\)"),
        ({"sinogram": integrals()[0]}, {}, r"sinogram: expected \(views, detectors\), got shape \(10,\)"),
        ({"sinogram": integrals() * math.nan}, {}, "sinogram: 60 entries are NaN or infinite"),
        ({"sinogram": integrals(), "variance": integrals() - 1}, {}, "variance: 60 entries are not positive"),
        (
            {"sinogram": integrals(), "variance": integrals(9)},
            {},
            r"variance: expected \(views, detectors\) = \(6, 10\)",
        ),
        ({"counts": integrals()}, {}, r"path: expected 'sinogram', or 'counts' with 'white' .*; found \['angles', 'co"),
        ({"other": integrals()}, {}, "path: expected 'sinogram'"),
        ({"counts": integrals(), "white": np.ones(9)}, {}, r"white: expected \(repeats, 10\)"),
        ({"sinogram": integrals()}, {"binning": 11}, "binning: 11 is more than the 10 detectors"),
        ({"sinogram": integrals()}, {"binning": 0}, "binning: expected a positive number of detectors, got 0"),
        ({"sinogram": integrals()}, {"image_shape": None}, r"image_shape: expected \(H, W\), which .* does not hold"),
        ({"sinogram": integrals()}, {"image_shape": (8,)}, "image_shape: expected two positive integers"),
        ({"sinogram": integrals()}, {"source_origin": 40.0}, "source_origin, source_detector: expected both for a fan"),
        ({"sinogram": integrals()}, {"angles": np.arange(6) * 10.0}, "angles: expected radians, got values up to 50"),
    ],
)
def test_bad_files(arrays: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "scan.npz", angles=ANGLES, **arrays)
    with pytest.raises(ValueError, match=message):
        load_sinogram(tmp_path / "scan.npz", **{"image_shape": (8, 8), **options})


def test_files_without_angles_and_no_files_at_all(tmp_path: Path) -> None:
    np.savez(tmp_path / "scan.npz", sinogram=integrals())
    with pytest.raises(ValueError, match=r"angles: expected them in the file, or as angles= or angles_degrees="):
        load_sinogram(tmp_path / "scan.npz", (8, 8))
    (tmp_path / "scan.txt").write_text("1 2 3")
    with pytest.raises(ValueError, match="path: expected an npz, MATLAB or HDF5 file, got"):
        load_sinogram(tmp_path / "scan.txt", (8, 8))
    with pytest.raises(FileNotFoundError, match="path: there is no file"):
        load_sinogram(tmp_path / "none.npz", (8, 8))


def test_a_transposed_sinogram_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"data: expected \(views, detectors\) = \(6, 10\), got \(10, 6\); it looks tran"
    ):
        Sinogram(torch.from_numpy(integrals().T), ParallelBeam((8, 8), ANGLES, 10))


def dicom_record(**changes: Any) -> types.SimpleNamespace:
    record: dict[str, Any] = {
        "Modality": "CT", "RescaleSlope": 2.0, "RescaleIntercept": -1024.0, "PixelSpacing": [0.66, 0.66],
        "pixel_array": np.array([[12, 512, 1012], [0, 500, -2000]], dtype=np.int16), "PixelPaddingValue": 63536,
    }  # fmt: skip
    record.update(changes)
    return types.SimpleNamespace(**{name: value for name, value in record.items() if value is not None})


def stand_in(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    module = types.ModuleType("pydicom")
    vars(module)["dcmread"] = lambda path: dicom_record(**changes)
    monkeypatch.setitem(sys.modules, "pydicom", module)


def test_a_dicom_slice_becomes_attenuation(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    found = load_dicom("slice.dcm")
    # −2000 is the padding 63536 read as a signed number: air.
    assert found.hounsfield.tolist() == [[-1000.0, 0.0, 1000.0], [-1024.0, -24.0, -1000.0]]
    assert torch.allclose(found.attenuation, torch.tensor([[0.0, 0.02, 0.04], [0.0, 0.02 * 0.976, 0.0]], dtype=DOUBLE))
    assert found.pixel_size == 0.66
    assert torch.allclose(load_dicom("slice.dcm", water=0.03).attenuation, 1.5 * found.attenuation)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Modality": "MR"}, "path: expected a CT slice, got the modality 'MR' in slice.dcm"),
        ({"RescaleSlope": None}, "path: slice.dcm has no RescaleSlope and RescaleIntercept"),
        ({"PixelSpacing": [0.5, 0.6]}, "path: expected square pixels, got 0.5 × 0.6 mm"),
        ({"pixel_array": np.zeros((3, 4, 4))}, r"path: expected one slice \(H, W\), got shape \(3, 4, 4\)"),
    ],
)
def test_bad_dicom_files(changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, **changes)
    with pytest.raises(ValueError, match=message):
        load_dicom("slice.dcm")


def test_bad_water_and_no_pydicom(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    with pytest.raises(ValueError, match="water: expected a positive attenuation per mm, got 0"):
        load_dicom("slice.dcm", water=0)
    for name in ("pydicom", "h5py"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pydicom: .*; it comes with `pip install ntkgp\[ct\]`"):
        load_dicom("slice.dcm")


def test_hdf5_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "scan.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(ImportError, match=r"h5py: .*; it comes with `pip install ntkgp\[ct\]`"):
        load_sinogram(tmp_path / "scan.h5", (8, 8))


def test_pydicom_itself() -> None:
    data = pytest.importorskip("pydicom.data")
    found = load_dicom(data.get_testdata_file("CT_small.dcm"))
    assert found.attenuation.shape == (128, 128)
    assert found.pixel_size == pytest.approx(0.661468)
    assert float(found.hounsfield.min()) >= -1024
    assert 0.02 < float(found.attenuation.max()) < 0.06


@pytest.mark.parametrize("fan", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_more_pixels_than_the_file_has_cover_the_same_field(tmp_path, fan, stored):
    angles, beam = torch.arange(4) * 0.7, {"source_origin": 40.0, "source_detector": 60.0} if fan else {}
    geometry = (FanBeam if fan else ParallelBeam)((8, 8), angles, 13, pixel_size=1.5, **beam)
    path = tmp_path / "scan.npz"
    arrays = {"sinogram": np.ones((4, 13)), "angles": angles.numpy(), "image_shape": (8, 8), "pixel_size": 1.5, **beam}
    np.savez(path, **arrays, **({"detector_size": geometry.detector_size} if stored else {}))
    found = load_sinogram(path, (16, 16)).geometry
    assert found.pixel_size == pytest.approx(0.75)
    assert found.detector_size == pytest.approx(geometry.detector_size)
    assert load_sinogram(path).geometry.pixel_size == 1.5
    assert load_sinogram(path, (16, 16), pixel_size=1.0).geometry.pixel_size == 1.0
