"""Measured data: sinograms with their geometry from files, counts to line integrals, DICOM slices to attenuation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy
import torch
from torch import Tensor

from ntkgp.inverse.geometry import FanBeam, ParallelBeam, as_count, as_shape
from ntkgp.inverse.packages import optional

# Attenuation of water per mm at the mean energy of a clinical tube, about 65 keV.
WATER = 0.02

# What the arrays of a file are called here, and elsewhere (DXchange, tomopy's examples, HelTomo).
_ALIASES = {
    "sinogram": "sinogram", "data": "counts", "counts": "counts", "proj": "counts", "exchange/data": "counts",
    "white": "white", "flat": "white", "exchange/data_white": "white",
    "dark": "dark", "exchange/data_dark": "dark",
    "angles": "angles", "angles_degrees": "angles_degrees", "theta_deg": "angles_degrees",
    "exchange/theta": "angles_degrees",
    "variance": "variance",
}  # fmt: skip
_SCALARS = ("pixel_size", "detector_size", "detector_offset", "rotation_axis", "source_origin", "source_detector")
_SETTINGS = (*_SCALARS, "image_shape", "image_centre")
_HELTOMO = ("CtDataLimited", "CtDataFull", "CtData")


@dataclass(frozen=True, eq=False)
class Sinogram:
    """Line integrals with where they were measured, and how precisely.

    :param data: (views, detectors), float64.
    :param geometry: of the data.
    :param variance: of the noise of every entry, where it is known, such as from counts.

    :raises ValueError: another shape than the geometry's, entries that are not finite, variances that are not positive.

    ``sinogram[::3]`` takes views.

    >>> scan = Sinogram(torch.zeros(6, 9), ParallelBeam((6, 6), torch.arange(6) * 0.5, 9))
    >>> scan[::3].data.shape
    torch.Size([2, 9])
    """

    data: Tensor
    geometry: ParallelBeam | FanBeam
    variance: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("data", "variance"):
            value = getattr(self, name)
            if value is None:
                continue
            if tuple(value.shape) != self.geometry.data_shape:
                hint = "; it looks transposed" if tuple(value.shape)[::-1] == self.geometry.data_shape else ""
                raise ValueError(
                    f"{name}: expected (views, detectors) = {self.geometry.data_shape}, got {tuple(value.shape)}{hint}"
                )
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name}: {int((~torch.isfinite(value)).sum())} entries are NaN or infinite")
        if self.variance is not None and not bool((self.variance > 0).all()):
            raise ValueError(f"variance: {int((self.variance <= 0).sum())} entries are not positive")

    def __getitem__(self, chosen: Any) -> Sinogram:
        taken = self.geometry.places(chosen)
        return Sinogram(self.data[taken], self.geometry[taken], None if self.variance is None else self.variance[taken])


class AttenuationImage(NamedTuple):
    """A slice of a body.

    :ivar attenuation: linear attenuation coefficient per mm, (H, W), not negative.
    :ivar hounsfield: the same in Hounsfield units, as stored.
    :ivar pixel_size: side of a pixel in mm.
    """

    attenuation: Tensor
    hounsfield: Tensor
    pixel_size: float


def line_integrals(
    counts: Any, white: Any, dark: Any = 0.0, *, gain: float | None = 1.0, minimum: float | None = None
) -> tuple[Tensor, Tensor]:
    r"""Line integrals of the attenuation and their noise variance, from what a detector counts.

    With the mean white field w (beam on, no object) and the mean dark field d (beam off),

    .. math::
        p = -\log\frac{c - d}{w - d}, \qquad
        \operatorname{Var} p \approx \frac{(c-d)/g + \rho^2}{(c-d)^2} + \frac{(w-d)/g + \rho^2}{n_w (w-d)^2}
        + \frac{\rho^2}{n_d}\Big(\frac1{c-d} - \frac1{w-d}\Big)^2,

    for Poisson counts of g photons each: to first order, fair above about ten photons. ρ² is the variance of repeated
    dark frames of the detector, or d/g where there is one. That all views of a detector share the same white and dark
    fields correlates them slightly (rings), which a variance per ray cannot say.

    :param counts: (V, D).
    :param white: (D,) or repeats (n_w, D); a number for an even beam.
    :param dark: (D,) or repeats (n_d, D), or a number.
    :param gain: g, photons per count; None takes it from the repeated white frames (photon transfer: mean over
        variance, the frames scaled to the same total first).
    :param minimum: counts above the dark field are raised to this; by default too few are an error.
    :returns: p and its variance, (V, D) each, in float64.
    :raises ValueError: NaN, fields of another number of detectors, a white field not above the dark one, counts that
        are not above the dark field.

    >>> p, variance = line_integrals([[500.0, 1000.0]], 1000.0)
    >>> p, variance
    (tensor([[0.6931, 0.0000]], dtype=torch.float64), tensor([[0.0030, 0.0020]], dtype=torch.float64))
    """
    counted = _array(counts, "counts")
    if counted.ndim != 2:
        raise ValueError(f"counts: expected (views, detectors), got shape {tuple(counted.shape)}")
    whites, darks = (_field(value, name, counted.shape[1]) for value, name in ((white, "white"), (dark, "dark")))
    d, open_beam = darks.mean(0), whites.mean(0) - darks.mean(0)
    if not bool((open_beam > 0).all()):
        column = int((open_beam <= 0).nonzero()[0])
        raise ValueError(
            f"white: not above the dark field at {int((open_beam <= 0).sum())} detectors, first at {column}"
        )
    if gain is None:
        gain = _photon_transfer(whites, darks)
    if not (math.isfinite(gain) and gain > 0):
        raise ValueError(f"gain: expected a positive number of photons per count, got {gain!r}")
    signal = counted - d
    if minimum is not None:
        if not (math.isfinite(minimum) and minimum > 0):
            raise ValueError(f"minimum: expected a positive number of counts, got {minimum!r}")
        signal = signal.clamp_min(minimum)
    if not bool((signal > 0).all()):
        view, column = (int(i) for i in (signal <= 0).nonzero()[0])
        raise ValueError(
            f"counts: {int((signal <= 0).sum())} of {signal.numel()} are not above the dark field (first: view {view}, "
            f"detector {column}, {float(counted[view, column]):g} counts); drop these rays, or give minimum="
        )
    read = darks.var(0) if len(darks) > 1 else d.clamp_min(0) / gain
    variance = (signal / gain + read) / signal.square()
    variance = variance + (open_beam / gain + read) / (len(whites) * open_beam.square())
    variance = variance + read / len(darks) * (1 / signal - 1 / open_beam).square()
    return (open_beam / signal).log(), variance


def _photon_transfer(whites: Tensor, darks: Tensor) -> float:
    """Photons per count, from the spread of repeated white frames."""
    if len(whites) < 2:
        raise ValueError(f"gain: None needs repeated white frames, got {len(whites)}")
    frames = whites - darks.mean(0)
    # The beam's own drift is no counting noise.
    frames = frames * (frames.mean() / frames.mean(1, keepdim=True))
    spread = frames.var(0).mean() - (darks.var(0).mean() if len(darks) > 1 else 0.0)
    if spread <= 0:
        raise ValueError("gain: the white frames do not differ; give the photons per count")
    return float(frames.mean() / spread)


def load_dicom(path: str | Path, water: float = WATER) -> AttenuationImage:
    r"""A computed-tomography slice in DICOM as attenuation, :math:`\mu = \mu_w (1 + \text{HU}/1000)`, at least 0.

    :param path: the file.
    :param water: :math:`\mu_w` per mm; 0.02 at about 65 keV.
    :raises ImportError: without the package ``pydicom``.
    :raises ValueError: no DICOM file, another modality than CT, several frames, no rescaling to Hounsfield units,
        pixels that are not square.

    Padding outside the scanned circle (``PixelPaddingValue``) becomes air, −1000 HU.
    """
    pydicom = optional("pydicom", "ntkgp[ct]")
    if not (math.isfinite(water) and water > 0):
        raise ValueError(f"water: expected a positive attenuation per mm, got {water!r}")
    try:
        record = pydicom.dcmread(path)
    except pydicom.errors.InvalidDicomError as reason:
        raise ValueError(f"path: {path} is not a DICOM file") from reason
    if getattr(record, "Modality", None) != "CT":
        raise ValueError(f"path: expected a CT slice, got the modality {getattr(record, 'Modality', None)!r} in {path}")
    if not (hasattr(record, "RescaleSlope") and hasattr(record, "RescaleIntercept")):
        raise ValueError(f"path: {path} has no RescaleSlope and RescaleIntercept to Hounsfield units")
    stored = np.asarray(record.pixel_array)
    if stored.ndim != 2:
        raise ValueError(f"path: expected one slice (H, W), got shape {stored.shape} in {path}")
    rows, columns = (float(s) for s in record.PixelSpacing)
    if not (rows > 0 and math.isclose(rows, columns, rel_tol=1e-4)):
        raise ValueError(f"path: expected square pixels, got {rows:g} × {columns:g} mm in {path}")
    hounsfield = stored * float(record.RescaleSlope) + float(record.RescaleIntercept)
    padding = getattr(record, "PixelPaddingValue", None)
    if padding is not None:
        # It is written unsigned whatever the pixels are.
        hounsfield[(stored == padding) | (stored == np.array(padding).astype(np.uint16).view(np.int16))] = -1000.0
    image = torch.from_numpy(hounsfield)
    return AttenuationImage((water * (1 + image / 1000)).clamp_min(0.0), image, rows)


def load_sinogram(
    path: str | Path,
    image_shape: Sequence[int] | None = None,
    *,
    layer: int = 0,
    binning: int = 1,
    gain: float | None = 1.0,
    minimum: float | None = None,
    **settings: Any,
) -> Sinogram:
    """A sinogram with its geometry from an npz, MATLAB or HDF5 file.

    What the file holds, under these names:

    - ``sinogram`` (V, D), with ``variance`` if it is known; or raw ``counts`` with ``white`` and ``dark`` fields, which
      go through :func:`line_integrals`. Counts of several detector rows are (V, rows, D).
    - ``angles`` in radians or ``angles_degrees``.
    - any of ``image_shape``, ``pixel_size``, ``detector_size``, ``detector_offset``, ``rotation_axis``,
      ``image_centre`` as in :class:`ParallelBeam`; ``source_origin`` and ``source_detector`` make it a
      :class:`FanBeam`.

    DXchange files (``exchange/data`` …, by tomopy) and the structures of HelTomo and the Helsinki tomography challenge
    (``CtDataLimited``) are understood as they are.

    :param path: ``.npz``, ``.mat`` (version 5 by scipy, 7.3 by h5py), ``.h5`` or ``.hdf5``.
    :param image_shape: (H, W) to reconstruct; from the file by default. Where the file holds another shape with its
        pixel size, the pixels become those that cover the same width.
    :param layer: which of several detector rows.
    :param binning: so many detectors become one: counts are added before the logarithm, line integrals averaged.
        Columns that do not fill a bin are dropped.
    :param gain: for counts, as in :func:`line_integrals`.
    :param minimum: for counts, as there.
    :param settings: further names of the list above, which go before those of the file: ``angles``,
        ``angles_degrees``, ``rotation_axis``, … Sizes and columns are those of the detector before binning. Without a
        ``pixel_size`` the width of the image is the field that the detector sees.
    :raises ValueError: missing names, shapes that do not fit (a transposed sinogram is one), entries that are not
        finite.
    :raises TypeError: unknown settings.
    :raises FileNotFoundError: no such file.
    :raises ImportError: HDF5 without h5py.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "scan.npz")
    ...     np.savez(path, counts=np.full((4, 12), 500.0), white=np.full(12, 1000.0), angles_degrees=[0, 45, 90, 135])
    ...     scan = load_sinogram(path, (8, 8), binning=2)
    >>> scan.geometry
    ParallelBeam(image_shape=(8, 8), 4 views from 0° to 135°, 6 detectors of 2 mm)
    """
    unknown = set(settings) - {*_SETTINGS, "angles", "angles_degrees"}
    if unknown:
        raise TypeError(f"settings: unknown {sorted(unknown)}; expected names of {(*_SETTINGS, 'angles')}")
    found = _read(Path(path))
    if "angles" in settings or "angles_degrees" in settings:
        found = {name: value for name, value in found.items() if not name.startswith("angles")}
    if "detector_offset" in settings:
        found.pop("rotation_axis", None)
    found.update(settings)
    if image_shape is not None:
        if "pixel_size" not in settings:
            _keep_field(found, image_shape)
        found["image_shape"] = image_shape
    if "image_shape" not in found:
        raise ValueError(f"image_shape: expected (H, W), which {path} does not hold")
    if as_count(binning) is None:
        raise ValueError(f"binning: expected a positive number of detectors, got {binning!r}")
    data, variance = _data(found, path, layer, binning, gain, minimum)
    columns = np.shape(found["sinogram"] if "sinogram" in found else found["counts"])[-1]
    return Sinogram(data, _geometry(found, path, columns, binning), variance)


def _keep_field(found: dict[str, Any], image_shape: Sequence[int]) -> None:
    """Pixels of another size where there are to be more or fewer of them than in the file."""
    held, wanted = as_shape(tuple(np.ravel(found.get("image_shape", ())).tolist())), as_shape(image_shape)
    if "pixel_size" not in found or not held or not wanted or held[-1] == wanted[-1]:
        return
    size = float(np.squeeze(found["pixel_size"]))
    if "detector_size" not in found:
        fan = [float(np.squeeze(found[n])) for n in ("source_detector", "source_origin") if n in found]
        found["detector_size"] = size * (fan[0] / fan[1] if len(fan) == 2 else 1.0)
    found["pixel_size"] = size * held[-1] / wanted[-1]


def save_sinogram(path: str | Path, sinogram: Sinogram) -> None:
    """Write a sinogram and its geometry to an npz file that :func:`load_sinogram` reads.

    :param path: of the file; numpy adds ``.npz`` where it is missing.
    :param sinogram: of a parallel or a fan beam.

    >>> import tempfile
    >>> scan = Sinogram(torch.ones(3, 9), ParallelBeam((6, 6), [0.0, 1.0, 2.0], 9))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_sinogram(Path(folder, "scan.npz"), scan)
    ...     load_sinogram(Path(folder, "scan.npz")).data.shape
    torch.Size([3, 9])
    """
    geometry = sinogram.geometry
    arrays: dict[str, Any] = {"sinogram": sinogram.data.cpu().numpy(), "angles": geometry.angles.numpy()}
    if sinogram.variance is not None:
        arrays["variance"] = sinogram.variance.cpu().numpy()
    for name in _SETTINGS:
        if name != "rotation_axis" and hasattr(geometry, name):
            arrays[name] = getattr(geometry, name)
    np.savez(path, **arrays)


def _data(
    found: Mapping[str, Any], path: Any, layer: int, binning: int, gain: float | None, minimum: float | None
) -> tuple[Tensor, Tensor | None]:
    """Line integrals and their variance, binned."""
    if "sinogram" in found:
        data = _array(found["sinogram"], "sinogram")
        variance = _array(found["variance"], "variance") if "variance" in found else None
        if data.ndim != 2:
            raise ValueError(f"sinogram: expected (views, detectors), got shape {tuple(data.shape)} in {path}")
        _check_views(data, found, "sinogram")
        return _binned(data, binning), None if variance is None else _binned(variance, binning) / binning
    if "counts" not in found or "white" not in found:
        raise ValueError(
            f"path: expected 'sinogram', or 'counts' with 'white' (and 'dark'), in {path}; found {sorted(found)}"
        )
    counts = _array(found["counts"], "counts")
    fields = {name: _array(found.get(name, 0.0), name) for name in ("white", "dark")}
    if counts.ndim == 3:
        if not 0 <= layer < counts.shape[1]:
            raise ValueError(f"layer: expected one of the {counts.shape[1]} detector rows, got {layer}")
        counts = counts[:, layer]
        fields = {name: value[:, layer] if value.ndim == 3 else value for name, value in fields.items()}
    _check_views(counts, found, "counts")
    counts = _binned(counts, binning) * binning
    fields = {name: _binned(v, binning) * binning if v.ndim else v * binning for name, v in fields.items()}
    return line_integrals(counts, fields["white"], fields["dark"], gain=gain, minimum=minimum)


def _check_views(data: Tensor, found: Mapping[str, Any], name: str) -> None:
    """Refuse data that do not have one row for each angle."""
    angles = found.get("angles", found.get("angles_degrees"))
    if angles is None:
        raise ValueError("angles: expected them in the file, or as angles= or angles_degrees=")
    views = int(np.size(angles))
    if data.shape[0] != views:
        hint = "; it looks transposed" if data.ndim == 2 and data.shape[1] == views else ""
        raise ValueError(f"{name}: expected one row for each of the {views} angles, got {tuple(data.shape)}{hint}")


def _geometry(found: Mapping[str, Any], path: Any, columns: int, binning: int) -> ParallelBeam | FanBeam:
    """The geometry of data with so many columns, once they are binned."""
    image_shape = as_shape(tuple(np.ravel(found["image_shape"]).tolist()))
    given: dict[str, Any] = {name: float(np.squeeze(found[name])) for name in _SCALARS if name in found}
    fan: dict[str, Any] = {n: given.pop(n) for n in ("source_origin", "source_detector") if n in given}
    if len(fan) == 1:
        raise ValueError(f"source_origin, source_detector: expected both for a fan beam, got {fan} in {path}")
    magnification = fan["source_detector"] / fan["source_origin"] if fan else 1.0
    size = given.get("detector_size", given.get("pixel_size", 1.0) * magnification)
    axis = given.get("rotation_axis", (columns - 1) / 2 - given.get("detector_offset", 0.0) / size)
    detectors = columns // binning
    options: dict[str, Any] = {
        **fan,
        "detector_size": size * binning,
        "rotation_axis": (axis - (binning - 1) / 2) / binning,
        "pixel_size": given.get("pixel_size"),
    }
    if options["pixel_size"] is None:
        options["pixel_size"] = size * binning * detectors / magnification / (image_shape or (1,))[-1]
    if "image_centre" in found:
        options["image_centre"] = tuple(float(c) for c in np.ravel(found["image_centre"]))
    degrees = "angles" not in found
    angles = np.ravel(found["angles_degrees" if degrees else "angles"]).astype(np.float64)
    kind: Any = FanBeam if fan else ParallelBeam
    return kind(image_shape, angles, detectors, degrees=degrees, **options)


def _read(path: Path) -> dict[str, Any]:
    """Arrays of a file under the names used here."""
    if not path.is_file():
        raise FileNotFoundError(f"path: there is no file {path}")
    with path.open("rb") as file:
        start = file.read(8)
    if start == b"\x89HDF\r\n\x1a\n" or path.suffix in (".h5", ".hdf5"):
        named = _read_hdf5(path)
    elif start[:4] == b"PK\x03\x04":
        with np.load(path, allow_pickle=False) as arrays:
            named = {name: arrays[name] for name in arrays.files}
    elif start == b"MATLAB 7":
        # MATLAB stores by columns, h5py reads by rows.
        named = {name: np.asarray(value).T for name, value in _read_hdf5(path).items()}
    elif start[:6] == b"MATLAB":
        named = scipy.io.loadmat(path, squeeze_me=True, struct_as_record=False)
        for name in _HELTOMO:
            if name in named:
                return _heltomo(named[name])
    else:
        raise ValueError(f"path: expected an npz, MATLAB or HDF5 file, got {path}")
    found = {_ALIASES.get(name, name): value for name, value in named.items()}
    return {name: found[name] for name in (*dict.fromkeys(_ALIASES.values()), *_SETTINGS) if name in found}


def _read_hdf5(path: Path) -> dict[str, Any]:
    """All arrays of an HDF5 file by their full names."""
    h5py = optional("h5py", "ntkgp[ct]")
    named: dict[str, Any] = {}
    with h5py.File(path, "r") as file:
        file.visititems(lambda name, item: named.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return named


def _heltomo(record: Any) -> dict[str, Any]:
    """A structure of HelTomo, which is flat-fielded, centred and logarithmic."""
    given = record.parameters
    return {
        "sinogram": record.sinogram,
        "angles_degrees": given.angles,
        "source_origin": given.distanceSourceOrigin,
        "source_detector": given.distanceSourceDetector,
        "detector_size": given.pixelSizePost,
    }


def _array(value: Any, name: str) -> Tensor:
    found = torch.as_tensor(np.asarray(value, dtype=np.float64))
    if not bool(torch.isfinite(found).all()):
        raise ValueError(f"{name}: {int((~torch.isfinite(found)).sum())} entries are NaN or infinite")
    return found


def _field(value: Any, name: str, detectors: int) -> Tensor:
    """A white or dark field as repeats (n, D)."""
    found = _array(value, name)
    if found.ndim == 0:
        return found.expand(1, detectors)
    if found.ndim > 2 or found.shape[-1] != detectors:
        raise ValueError(f"{name}: expected (repeats, {detectors}), as many as counts, got shape {tuple(found.shape)}")
    return found.reshape(-1, detectors)


def _binned(values: Tensor, binning: int) -> Tensor:
    """Means of so many adjacent entries of the last dimension."""
    if values.shape[-1] < binning:
        raise ValueError(f"binning: {binning} is more than the {values.shape[-1]} detectors")
    return values[..., : values.shape[-1] // binning * binning].unflatten(-1, (-1, binning)).mean(-1)
