"""Partitions by hand and by rule; what a bound partition offers. Discovery itself is tested in test_homogeneity."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ntkgp
from ntkgp import ParameterGroups
from tests import reference as ref
from tests.architectures import CASES


def net() -> nn.Sequential:
    with ref.seeded(0):
        return nn.Sequential(
            nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)
        ).double()


X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NAMES = [name for name, _ in net().named_parameters()]


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        ("single", ["all"]),
        ("tensor", NAMES),
        ("layer", ["0", "1", "3", "4", "6"]),
        ("normalization", ["0", "3", "rest"]),
        (ParameterGroups({"norms": ["1.*", "4.*"], "rest": ["0.*", "[36].*"]}), ["norms", "rest"]),
        (ParameterGroups({"weights": "*.weight", "biases": ["?.bias"]}), ["weights", "biases"]),
    ],
)
def test_every_partition_covers_each_parameter_once(groups, names: list[str]) -> None:
    module = net()
    lin = ntkgp.LinearizedNetwork(module, X, groups=groups)
    assert list(lin.groups.names) == names
    assert sorted(name for members in lin.groups.members for name in members) == sorted(NAMES)
    assert sum(lin.groups.sizes) == lin.num_parameters
    expected = ref.index(module, [set(members) for members in lin.groups.members])
    assert torch.equal(lin.groups.index, expected)
    v = torch.randn(2, lin.num_parameters, dtype=torch.float64)
    sums = torch.stack([v[:, expected == g].sum(-1) for g in range(len(names))], -1)
    assert torch.allclose(lin.groups.sum_per_group(v), sums)
    numbers = torch.randn(3, len(names))
    assert torch.equal(lin.groups.expand(numbers), numbers[:, expected])


def test_groups_by_tensor_and_by_pattern_mix() -> None:
    module = net()
    groups = ParameterGroups({"head": [module[6].weight, "6.bias"], "body": ["[0134].*"]})
    lin = ntkgp.LinearizedNetwork(module, X, groups=groups)
    assert lin.groups.members[0] == ("6.weight", "6.bias")
    # The unbound partition stays what it was, and can be bound again.
    assert "not bound" in repr(groups)
    assert ntkgp.LinearizedNetwork(module, X, groups=groups).groups.sizes == lin.groups.sizes


def test_members_follow_the_order_of_theta() -> None:
    lin = ntkgp.LinearizedNetwork(net(), X, groups=ParameterGroups({"all": reversed(NAMES)}))
    assert list(lin.groups.members[0]) == NAMES


def test_tied_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.embed(ids).sum(1)))

    module = Tied()
    ids = torch.randint(0, 7, (4, 3))
    lin = ntkgp.LinearizedNetwork(module, ids, groups=ParameterGroups({"e": module.head.weight, "b": "head.bias"}))
    assert lin.groups.members == (("embed.weight",), ("head.bias",))
    assert lin.num_parameters == 28 + 7


@pytest.mark.parametrize(
    ("partition", "words"),
    [
        ({"body": ["0.*", "3.*"], "norms": ["1.*", "4.*"]}, "no group holds the trainable parameter.*6.weight, 6.bias"),
        ({"a": ["*"], "b": ["6.bias"]}, "groups: parameter '6.bias' is in two groups, 'a' and 'b'; expected"),
        ({"a": ["*"], "b": ["7.*"]}, "groups: '7.\\*' of group 'b' matches no trainable parameter"),
        ({"a": ["*"], "b": [torch.ones(3)]}, "groups: group 'b' holds a tensor of shape \\(3,\\) that is not"),
    ],
)
def test_a_partition_that_misses_or_repeats_a_parameter(partition, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ntkgp.LinearizedNetwork(net(), X, groups=ParameterGroups(partition))


@pytest.mark.parametrize(
    ("partition", "error", "words"),
    [
        ({}, ValueError, "partition: expected a non-empty mapping"),
        ([["a"]], ValueError, "partition: expected a non-empty mapping"),
        ({"a": []}, ValueError, "partition: group 'a' is empty"),
        ({"a": [3]}, TypeError, "partition: group 'a' holds a int"),
    ],
)
def test_malformed_partitions(partition, error, words: str) -> None:
    with pytest.raises(error, match=words):
        ParameterGroups(partition)


def test_a_frozen_parameter_belongs_to_no_group() -> None:
    module = net()
    module[0].requires_grad_(False)
    lin = ntkgp.LinearizedNetwork(module, X, groups="layer")
    assert lin.groups.names == ("1", "3", "4", "6")
    with pytest.raises(ValueError, match="matches no trainable parameter"):
        ntkgp.LinearizedNetwork(module, X, groups=ParameterGroups({"a": ["*"], "b": ["0.weight"]}))


def test_unbound_groups_say_so() -> None:
    groups = ParameterGroups({"a": "*"})
    assert len(groups) == 1
    with pytest.raises(AttributeError, match="names exists once the groups are given"):
        _ = groups.names
    with pytest.raises(RuntimeError, match="not bound to a network"):
        groups.verify(X)


def test_is_normalized_of_unions_and_parts() -> None:
    module = net()
    lin = ntkgp.LinearizedNetwork(module, X, groups=ParameterGroups({"both": ["0.*", "3.*"], "rest": "[146].*"}))
    assert lin.groups.is_normalized == (True, False)
    lin = ntkgp.LinearizedNetwork(module, X, groups=ParameterGroups({"a": "0.weight", "b": ["0.bias", "[1346].*"]}))
    assert lin.groups.is_normalized == (False, False)


def test_verify_tells_normalised_groups_from_others() -> None:
    lin = ntkgp.LinearizedNetwork(net(), X)
    errors = lin.groups.verify(torch.randn(20, 3, dtype=torch.float64))
    assert errors.dtype == torch.float64
    assert (errors[:2] < 1e-9).all()
    assert errors[2] > 1e-3


def test_the_table() -> None:
    text = repr(ntkgp.LinearizedNetwork(net(), X).groups)
    assert [line.split()[0] for line in text.splitlines()] == ["group", "0", "3", "rest"]
    assert "yes" in text.splitlines()[1]
    assert "no" in text.splitlines()[3].split()


def test_one_group_that_is_all_normalised_has_no_rest() -> None:
    case = CASES["mlp_layer_norm_plain"]()
    case.net[-1].requires_grad_(False)
    lin = ntkgp.LinearizedNetwork(case.net, case.example)
    assert "rest" not in lin.groups.names
    assert lin.groups.is_normalized == (True, True)


def test_verify_of_a_group_that_does_not_move_the_output_is_zero() -> None:
    """BatchNorm takes all but a sign off a single feature, in both layers: J_g is rounding, and so is J_g θ_g."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)
    )
    x = torch.randn(20, 1, dtype=torch.float64)
    lin = ntkgp.LinearizedNetwork(net.double().eval(), x)
    errors = dict(zip(lin.groups.names, lin.groups.verify(x).tolist(), strict=True))
    assert errors["0"] == errors["3"] == 0.0
    assert errors["rest"] > 1e-3
