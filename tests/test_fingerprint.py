"""Fingerprints of what users write themselves: members of classes, closures, methods, data that cannot be read."""

from __future__ import annotations

import math

import pytest
from torch.utils.data import Dataset

from ntkgp.fingerprint import Unknowable, fingerprint


def scaled(by):
    """A class of one's own whose members depend on a number."""

    class Scaled:
        def __init__(self, power=1):
            self.power = power

        @property
        def factor(self):
            return by

        @staticmethod
        def plain(x, shift=by):
            return x + shift

        @classmethod
        def made(cls, power=by):
            return cls(power)

        def __call__(self, x):
            return x**self.power

    return Scaled


@pytest.mark.parametrize("member", ["factor", "plain", "made"])
def test_each_member_of_a_class_counts(member):
    first, same, other = scaled(2.0), scaled(2.0), scaled(3.0)
    assert fingerprint(first) == fingerprint(same)
    # Only this one differs.
    setattr(same, member, vars(other)[member])
    assert fingerprint(first) != fingerprint(same)


def test_a_bound_method_counts_with_its_object():
    kind = scaled(2.0)
    assert fingerprint(kind(2).__call__) == fingerprint(kind(2).__call__)
    assert fingerprint(kind(2).__call__) != fingerprint(kind(3).__call__)


def test_a_closure_may_be_empty_still_and_modules_count_by_name():
    def closed(filled):
        def inner():
            return later

        if filled:
            later = 3.0
        return inner

    assert fingerprint(closed(False)) == fingerprint(closed(False))
    assert fingerprint(closed(False)) != fingerprint(closed(True))
    assert fingerprint(math) == fingerprint(math) != fingerprint(pytest)


def test_data_that_cannot_be_read_have_no_fingerprint():
    class Broken(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise OSError("no such disk")

    with pytest.raises(Unknowable, match="a Broken cannot be read: no such disk"):
        fingerprint(Broken())
