"""Data sets: shapes, standardisation, disjoint splits, reproducibility, corruptions and the UCI file format."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits

from ntkgp.evaluation import datasets


def test_diabetes_is_standardised_by_its_training_part_and_invertible():
    data = datasets.diabetes(seed=3, dtype=torch.float64)
    torch.testing.assert_close(data.x_train.mean(0), torch.zeros(10).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(data.x_train.std(0, correction=0), torch.ones(10).double(), rtol=0, atol=1e-12)
    assert abs(float(data.y_train.mean())) < 1e-12
    assert float(data.x_test.mean(0).abs().max()) > 1e-3
    raw = torch.cat([data.y_train, data.y_test]) * data.target_std + data.target_mean
    expected = torch.as_tensor(load_diabetes().target)
    torch.testing.assert_close(raw.sort().values, expected.sort().values, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("load", [datasets.diabetes, datasets.digits])
def test_splits_follow_the_seed_and_leave_the_global_state_alone(load):
    before = torch.get_rng_state()
    first, again, other = load(seed=1), load(seed=1), load(seed=2)
    assert torch.equal(first.x_test, again.x_test)
    assert not torch.equal(first.x_test, other.x_test)
    assert torch.equal(before, torch.get_rng_state())


def test_digits_cover_the_set_once():
    data = datasets.digits(train_size=300)
    images = torch.cat([data.x_train, data.x_test]).reshape(-1, 64)
    expected = torch.as_tensor(load_digits().data / 16, dtype=torch.float32)
    assert {tuple(row) for row in images.tolist()} == {tuple(row) for row in expected.tolist()}
    assert data.x_train.shape == (300, 1, 8, 8)
    assert float(images.min()) == 0.0
    assert float(images.max()) == 1.0
    assert set(data.labels_train.tolist()) == set(range(10))
    assert data.labels_test.dtype == torch.long
    with pytest.raises(ValueError, match="train_size: expected 1 to 1796, got 1797"):
        datasets.digits(train_size=1797)
    with pytest.raises(ValueError, match="test_size: expected 1 to 441, got 0"):
        datasets.diabetes(test_size=0)


def test_toy_has_a_gap_and_its_noise():
    x, y = datasets.toy_gap(4001, seed=0, dtype=torch.float64)
    assert x.shape == (4001, 1)
    assert y.shape == (4001,)
    assert not bool(((x > -1) & (x < 1.2)).any())
    assert bool((x.diff(dim=0) >= 0).all())
    assert int((x < 0).sum()) == 2000
    residual = y - datasets.toy_gap_function(x.squeeze(-1))
    assert abs(float(residual.std()) - 0.15) < 0.01
    with pytest.raises(ValueError, match="n: expected at least 2"):
        datasets.toy_gap(1)
    with pytest.raises(ValueError, match="noise"):
        datasets.toy_gap(5, noise=-1.0)


@pytest.mark.parametrize("kind", datasets.CORRUPTIONS)
def test_corruptions_stay_images_and_change_every_one(kind):
    images = datasets.digits(train_size=20).x_train
    original = images.clone()
    state = torch.get_rng_state()
    corrupted = datasets.corrupt(images, kind, seed=1)
    assert corrupted.shape == images.shape
    assert corrupted.dtype == images.dtype
    assert float(corrupted.min()) >= 0
    assert float(corrupted.max()) <= 1
    assert bool(((corrupted - images).abs().amax(dim=(1, 2, 3)) > 0.05).all())
    assert torch.equal(corrupted, datasets.corrupt(images, kind, seed=1))
    assert torch.equal(images, original)
    assert torch.equal(state, torch.get_rng_state())


def test_corruptions_do_what_they_say():
    point = torch.zeros(64, 1, 8, 8, dtype=torch.float64)
    point[:, :, 4, 4] = 1.0
    shifted = datasets.corrupt(point, "shift", seed=0)
    places = {tuple(torch.nonzero(image[0])[0].tolist()) for image in shifted}
    assert places == {(2, 4), (6, 4), (4, 2), (4, 6)}
    blurred = datasets.corrupt(point, "blur")
    torch.testing.assert_close(blurred[0, 0, 4, 5] / blurred[0, 0, 4, 4], torch.tensor(-0.5).double().exp())
    torch.testing.assert_close(blurred.sum(dim=(1, 2, 3)), torch.ones(64).double())
    torch.testing.assert_close(datasets.corrupt(point, "inverted"), 1 - point)
    noisy = datasets.corrupt(torch.full((100, 1, 8, 8), 0.5), "noise")
    assert abs(float(noisy.std()) - 0.27) < 0.02  # 0.3, less what is clipped


def test_corruptions_refuse_bad_input():
    with pytest.raises(ValueError, match="kind: expected one of noise, blur, shift, inverted, got 'fog'"):
        datasets.corrupt(torch.zeros(1, 1, 8, 8), "fog")
    with pytest.raises(ValueError, match=r"values in \[0, 1\]"):
        datasets.corrupt(torch.full((1, 1, 8, 8), 16.0), "blur")
    with pytest.raises(ValueError, match=r"got \(8, 8\)"):
        datasets.corrupt(torch.zeros(8, 8), "blur")
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        datasets.corrupt(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "blur")


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(12, 3)).astype(np.float32)
    x[:, 2] = 5.0
    y = generator.normal(loc=30.0, scale=4.0, size=12).astype(np.float32)
    order = np.stack([generator.permutation(12) for _ in range(2)]).astype(np.uint16)
    (tmp_path / "uci").mkdir()
    gap = {"gap_train": order[:1, :8], "gap_test": order[:1, 8:]}
    np.savez(tmp_path / "uci" / "small.npz", X=x, y=y, std_train=order[:, :10], std_test=order[:, 10:], **gap)
    mask = np.zeros((12, 3), dtype=bool)
    mask[np.arange(12), np.arange(12) % 3] = True
    np.savez(tmp_path / "folds.npz", X=x, y=y, n=12, test_mask=np.packbits(mask, axis=0))
    np.savez(tmp_path / "wrong.npz", X=x)
    return tmp_path


def test_uci_standard_and_gap_splits(folder):
    data = datasets.uci("small", folder)
    assert (len(data.standard_splits), len(data.gap_splits)) == (2, 1)
    split = data.standard(1, dtype=torch.float64)
    train, test = data.standard_splits[1]
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(12))
    torch.testing.assert_close(split.y_test * split.target_std + split.target_mean, data.y[test])
    torch.testing.assert_close(split.x_train[:, 2], torch.zeros(10).double())  # constant column: scale 1
    assert data.gap(0).x_test.shape == (4, 3)
    assert split.name == "small standard 1"
    with pytest.raises(IndexError, match="small has 1 gap splits, got 1"):
        data.gap(1)


def test_uci_folds(folder):
    data = datasets.uci("folds", folder)
    assert len(data.standard_splits) == 3
    assert sorted(torch.cat([test for _, test in data.standard_splits]).tolist()) == list(range(12))
    assert data.standard_splits[1][1].tolist() == [1, 4, 7, 10]
    assert data.gap_splits == ()


def test_uci_folder_from_the_environment(folder, monkeypatch):
    monkeypatch.setenv("NTKGP_DATA", str(folder))
    assert datasets.uci("small").name == "small"


def test_uci_says_what_is_missing(folder, monkeypatch):
    monkeypatch.delenv("NTKGP_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"folder: none given for 'small'.*NTKGP_DATA"):
        datasets.uci("small")
    with pytest.raises(FileNotFoundError, match=r"folder: no absent\.npz"):
        datasets.uci("absent", folder)
    with pytest.raises(ValueError, match=r"wrong\.npz: expected X, y and std_train"):
        datasets.uci("wrong", folder)
