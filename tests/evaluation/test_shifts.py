"""Rotations and graded corruptions: against scipy, Pillow and direct formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from ntkgp.evaluation.shifts import COMMON_CORRUPTIONS, SEVERITIES, common_corruption, rotate


def grey(n: int = 4, channels: int = 1, height: int = 28, width: int = 28, seed: int = 0) -> torch.Tensor:
    """Images of 256 levels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, channels, height, width), generator=generator).double() / 255


def cut(values: torch.Tensor) -> torch.Tensor:
    """To 256 levels, by an independent formula."""
    return torch.from_numpy((values.clamp(0, 1).numpy() * 255 + 1e-4).astype(np.uint8)).double() / 255


@pytest.mark.parametrize("degrees", [-340.0, 7.5, 15.0, 60.0, 135.0, 180.0])
@pytest.mark.parametrize("shape", [(28, 28), (11, 16)])
def test_rotation_is_that_of_scipy(degrees, shape):
    images = grey(3, 2, *shape)
    expected = ndimage.rotate(images.numpy(), degrees, axes=(3, 2), reshape=False, order=1, mode="grid-constant")
    torch.testing.assert_close(rotate(images, degrees), torch.from_numpy(expected), rtol=0, atol=1e-9)


def test_rotation_by_quarters_moves_pixels():
    images = grey(2, 1, 9, 9)
    for quarters in range(5):
        expected = images.rot90(quarters, (2, 3))
        torch.testing.assert_close(rotate(images, 90 * quarters), expected, rtol=0, atol=1e-12)
    single = images.float()
    assert rotate(single, 30).dtype == torch.float32
    torch.testing.assert_close(rotate(single, 30).double(), rotate(images, 30), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", COMMON_CORRUPTIONS)
def test_corruptions_grow_with_severity_and_follow_the_seed(kind):
    images = torch.nn.functional.avg_pool2d(grey(6, 1, 56, 56), 2).float()
    original, state = images.clone(), torch.get_rng_state()
    found = [common_corruption(images, kind, severity, seed=3) for severity in SEVERITIES]
    distances = [float((each - images).norm()) for each in found]
    assert distances == sorted(distances)
    assert distances[-1] > 1.2 * distances[0] > 0
    for each in found:
        assert each.shape == images.shape
        assert each.dtype == images.dtype
        assert 0 <= float(each.min()) <= float(each.max()) <= 1
        torch.testing.assert_close(255 * each, (255 * each).round(), rtol=0, atol=1e-4)
    assert torch.equal(found[2], common_corruption(images, kind, 3, seed=3))
    is_random = "noise" in kind
    assert torch.equal(found[2], common_corruption(images, kind, 3, seed=4)) != is_random
    assert torch.equal(images, original)
    assert torch.equal(torch.get_rng_state(), state)


def test_noises_have_their_moments():
    level = 0.4
    images = torch.full((200, 1, 28, 28), level, dtype=torch.float64)
    count = images.numel()
    for kind, constants, variance in (
        ("gaussian_noise", (0.04, 0.06, 0.08, 0.09, 0.10), lambda c: c**2),
        ("shot_noise", (500, 250, 100, 75, 50), lambda c: level / c),
        ("speckle_noise", (0.06, 0.1, 0.12, 0.16, 0.2), lambda c: (level * c) ** 2),
    ):
        for severity, c in zip(SEVERITIES, constants, strict=True):
            found = common_corruption(images, kind, severity)
            expected = variance(c)
            # Cutting to levels takes from 0 to 1 of them: at most half a one in standard deviation.
            assert -1 / 255 < float(found.mean()) - level + 5 * math.sqrt(expected / count)
            assert float(found.mean()) - level < 5 * math.sqrt(expected / count)
            sampling = 5 * math.sqrt(expected / (2 * count))
            assert abs(float(found.std()) - math.sqrt(expected)) < 0.5 / 255 + sampling
    for severity, c in zip(SEVERITIES, (0.01, 0.02, 0.03, 0.05, 0.07), strict=True):
        found = common_corruption(images, "impulse_noise", severity)
        error = 5 * math.sqrt(c / count)
        assert abs(float((found == 0).double().mean()) - c / 2) < error
        assert abs(float((found == 1).double().mean()) - c / 2) < error
        assert int(((found != 0) & (found != 1)).sum()) == int((found == cut(images)).sum())


def test_blurs_are_those_of_scipy():
    images = grey(2, 2, 28, 20)
    for severity, sigma in zip(SEVERITIES, (0.4, 0.6, 0.7, 0.8, 1.0), strict=True):
        expected = ndimage.gaussian_filter(images.numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4.0)
        torch.testing.assert_close(
            common_corruption(images, "gaussian_blur", severity), cut(torch.from_numpy(expected)), rtol=0, atol=1e-9
        )
    for severity, (radius, sigma) in zip(
        SEVERITIES, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)), strict=True
    ):
        down, right = np.mgrid[-8:9, -8:9]
        disc = (down**2 + right**2 <= radius**2).astype(float)
        kernel = ndimage.gaussian_filter(disc / disc.sum(), sigma, truncate=1 / sigma, mode="constant")
        expected = ndimage.correlate(images.numpy(), kernel[None, None], mode="mirror")
        torch.testing.assert_close(
            common_corruption(images, "defocus_blur", severity), cut(torch.from_numpy(expected)), rtol=0, atol=1e-9
        )


def test_contrast_and_brightness_follow_their_formulas():
    images = grey(3, 3, 12, 10)
    mean = images.mean((2, 3), keepdim=True)
    found = common_corruption(images, "contrast", 2)
    torch.testing.assert_close(found, cut((images - mean) * 0.5 + mean), rtol=0, atol=1e-9)
    single = grey(3)
    torch.testing.assert_close(common_corruption(single, "brightness", 4), cut(single + 0.2), rtol=0, atol=1e-9)
    colorsys = pytest.importorskip("matplotlib.colors")
    hsv = colorsys.rgb_to_hsv(images.movedim(1, -1).numpy())
    hsv[..., 2] = np.clip(hsv[..., 2] + 0.1, 0, 1)
    expected = torch.from_numpy(colorsys.hsv_to_rgb(hsv)).movedim(-1, 1)
    torch.testing.assert_close(common_corruption(images, "brightness", 2), cut(expected), rtol=0, atol=1e-9)


def test_pixelation_is_that_of_pillow():
    image = pytest.importorskip("PIL.Image")
    values = grey(1, 1, 28, 32)
    for severity, c in zip(SEVERITIES, (0.95, 0.9, 0.85, 0.75, 0.65), strict=True):
        small = (int(32 * c), int(28 * c))
        picture = image.fromarray(values[0, 0].numpy().astype(np.float32))
        expected = np.asarray(picture.resize(small, image.Resampling.BOX).resize((32, 28), image.Resampling.BOX))
        found = common_corruption(values, "pixelate", severity)[0, 0]
        difference = (found - torch.from_numpy(expected.astype(np.float64))).abs()
        assert float(difference.max()) < 1.01 / 255  # levels are cut


def enlarged(image: np.ndarray, factor: float) -> np.ndarray:
    """The middle of an image (H, W), enlarged: corner pixels of what is kept land on corners, the rest is linear."""
    for axis in (0, 1):
        size = image.shape[axis]
        kept = int(np.ceil(size / factor))
        first = (size - kept) // 2
        new = round(kept * factor)
        places = first + np.arange(new) * (kept - 1) / (new - 1)
        places = places[(new - size) // 2 :][:size]
        image = np.apply_along_axis(lambda line, at=places: np.interp(at, np.arange(len(line)), line), axis, image)
    return image


def test_zoom_blur_is_the_mean_of_enlargements():
    images = torch.nn.functional.avg_pool2d(grey(2, 1, 56, 60), 2)
    for severity, c in zip(SEVERITIES, (0.06, 0.11, 0.16, 0.21, 0.26), strict=True):
        factors = np.arange(1, 1 + c, 0.01)  # their last digits decide how many pixels are kept
        sums = [image + sum(enlarged(image, factor) for factor in factors) for image in images[:, 0].numpy()]
        expected = np.stack(sums) / (len(factors) + 1)
        found = common_corruption(images, "zoom_blur", severity)[:, 0]
        torch.testing.assert_close(found, cut(torch.from_numpy(expected)), rtol=0, atol=1e-9)


def test_bad_input_is_refused():
    images = grey(1)
    with pytest.raises(ValueError, match=r"kind: expected one of gaussian_noise, .*, got 'fog'"):
        common_corruption(images, "fog", 1)
    with pytest.raises(ValueError, match="severity: expected 1 to 5, got 0"):
        common_corruption(images, "contrast", 0)
    with pytest.raises(ValueError, match=r"values in \[0, 1\]"):
        common_corruption(2 * images, "contrast", 1)
    with pytest.raises(ValueError, match=r"at least 9 x 9 pixels, got \(1, 1, 8, 8\)"):
        common_corruption(images[..., :8, :8], "contrast", 1)
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        rotate(images.byte(), 10)
    with pytest.raises(ValueError, match="degrees: expected a finite number, got nan"):
        rotate(images, math.nan)
