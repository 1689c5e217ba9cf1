"""Any pytree of tensors <-> the (N, D) matrix, exactly."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch

from ntkgp.linearization.packing import InputPacking, tree_flatten, tree_unflatten

Pair = namedtuple("Pair", ["left", "right"])
LARGE = 2**53

TREES = {
    "tensor": torch.randn(4, 3),
    "image": torch.randn(4, 2, 3, 5),
    "scalar_rows": torch.randn(4),
    "half": torch.randn(4, 3).half(),
    "bfloat16": torch.randn(4, 3).bfloat16(),
    "int64": torch.tensor([[LARGE, -LARGE], [LARGE - 1, 0], [1, -1], [7, 9]]),
    "int8": torch.randint(-128, 127, (4, 3), dtype=torch.int8),
    "bool": torch.tensor([[True, False], [False, False], [True, True], [False, True]]),
    "dict": {"ids": torch.randint(0, 100, (4, 6)), "mask": torch.ones(4, 6, dtype=torch.bool), "x": torch.randn(4, 2)},
    "tuple": (torch.randn(4, 2), torch.randn(4, 3, 2)),
    "list": [torch.randn(4, 2), torch.randint(5, (4,))],
    "named_tuple": Pair(torch.randn(4, 2), torch.randn(4)),
    "nested": {"a": (torch.randn(4, 2), [torch.randint(9, (4, 2)), {"b": torch.randn(4, 1, 1)}]), "c": torch.randn(4)},
    "mixed_floats": (torch.randn(4, 2).half(), torch.randn(4, 2), torch.randn(4, 2, dtype=torch.float64)),
    "no_columns": {"empty": torch.randn(4, 0), "x": torch.randn(4, 2)},
}


def assert_same(a, b) -> None:
    leaves_a, spec_a = tree_flatten(a)
    leaves_b, spec_b = tree_flatten(b)
    assert spec_a == spec_b
    assert type(tree_unflatten(leaves_a, spec_a)) is type(tree_unflatten(leaves_b, spec_b))
    for x, y in zip(leaves_a, leaves_b, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", TREES)
def test_round_trip_is_exact(name: str) -> None:
    tree = TREES[name]
    packing = InputPacking(tree)
    packed = packing.pack(tree)
    leaves = tree_flatten(tree)[0]
    assert packed.shape == (4, sum(leaf[0].numel() for leaf in leaves)) == (4, packing.width)
    assert packed.is_floating_point()
    assert_same(packing.unpack(packed), tree)
    assert torch.equal(packing.pack(packed), packed)
    # Also through the float64 matrix that the models keep.
    assert_same(packing.unpack(packed.double()) if len(leaves) > 1 else packing.unpack(packed), tree)


def test_other_numbers_of_rows() -> None:
    packing = InputPacking(TREES["dict"])
    tree = {"ids": torch.randint(0, 9, (11, 6)), "mask": torch.zeros(11, 6, dtype=torch.bool), "x": torch.randn(11, 2)}
    assert_same(packing.unpack(packing.pack(tree)), tree)


@pytest.mark.parametrize("mapping", [OrderedDict, UserDict])
def test_mappings_such_as_a_tokenizer_returns(mapping) -> None:
    ids = torch.randint(0, 100, (4, 6))
    tree = mapping({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    packing = InputPacking(tree)
    assert torch.equal(packing.unpack(packing.pack(tree))["input_ids"], ids)


def test_keys_in_another_order() -> None:
    tree = TREES["dict"]
    packing = InputPacking(tree)
    assert torch.equal(packing.pack(dict(reversed(tree.items()))), packing.pack(tree))


def test_single_floating_leaf_is_a_view_and_keeps_its_graph() -> None:
    x = torch.randn(4, 2, 3, requires_grad=True)
    packed = InputPacking(x).pack(x)
    assert packed.data_ptr() == x.data_ptr()
    assert packed.requires_grad


def test_gradient_reaches_every_floating_leaf() -> None:
    a, b = torch.randn(4, 2, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    InputPacking((a, b)).pack((a, b)).sum().backward()
    assert torch.equal(a.grad, torch.ones_like(a))
    assert torch.equal(b.grad, torch.ones_like(b))


def test_an_integer_that_float64_cannot_hold_is_refused() -> None:
    packing = InputPacking(torch.tensor([[1]]))
    for value in (LARGE + 1, -LARGE - 1, 2**63 - 1):
        with pytest.raises(ValueError, match="2\\^53"):
            packing.pack(torch.tensor([[value]]))


@pytest.mark.parametrize(
    ("example", "error", "words"),
    [
        ({}, ValueError, "example holds no tensor"),
        ([1.0, 2.0], TypeError, "example holds a float"),
        ({"a": None}, TypeError, "example holds a NoneType"),
        (torch.ones(2, 1, dtype=torch.complex64), TypeError, "complex"),
        (torch.tensor(1.0), ValueError, "example holds a scalar"),
        (torch.ones(0, 3), ValueError, "example has N = 0 rows"),
        ((torch.ones(2, 1), torch.ones(3, 1)), ValueError, "example: tensors disagree on the number of rows"),
    ],
)
def test_bad_examples(example, error, words: str) -> None:
    with pytest.raises(error, match=words):
        InputPacking(example)


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        (torch.ones(3, 7), ValueError, r"int64 of shape \(N, 2\).*packed \(N, 5\) tensor; got float32 tensor of shape"),
        ({"ids": torch.ones(3, 2, dtype=torch.long)}, ValueError, "inputs: expected"),
        ({"ids": torch.ones(3, 2), "x": torch.ones(3, 3)}, TypeError, "inputs: expected"),
        ({"ids": torch.ones(3, 2, dtype=torch.long), "x": torch.ones(2, 3)}, ValueError, "rows N"),
        ({"ids": torch.ones(0, 2, dtype=torch.long), "x": torch.ones(0, 3)}, ValueError, "N = 0"),
        ({"ids": torch.ones(1, 2, dtype=torch.long), "x": torch.full((1, 3), float("nan"))}, ValueError, "inputs: NaN"),
        (torch.tensor([[0.0] * 5, [0, 0, 0, float("inf"), 0]]), ValueError, "first in row 1"),
        (torch.ones(0, 5), ValueError, "N = 0"),
        (torch.ones(5), ValueError, "inputs: expected"),
        ("text", ValueError, "inputs: expected"),
    ],
)
def test_bad_inputs(inputs, error, words: str) -> None:
    packing = InputPacking({"ids": torch.ones(2, 2, dtype=torch.long), "x": torch.ones(2, 3)})
    with pytest.raises(error, match=words):
        packing.pack(inputs)


def test_the_error_names_the_argument_of_the_caller() -> None:
    with pytest.raises(ValueError, match="train_x: NaN"):
        InputPacking(torch.ones(2, 2)).pack(torch.full((2, 2), float("nan")), "train_x")


def test_unpack_refuses_another_shape() -> None:
    packing = InputPacking(TREES["tuple"])
    for bad in (torch.ones(8), torch.ones(2, 7), torch.ones(2, 2, 8), [1]):
        with pytest.raises(ValueError, match=r"x: expected a packed \(N, 8\) tensor"):
            packing.unpack(bad)


def test_a_list_stands_for_a_tuple() -> None:
    a, b = TREES["tuple"]
    packing = InputPacking((a, b))
    assert torch.equal(packing.pack([a, b]), packing.pack((a, b)))
    assert isinstance(packing.unpack(packing.pack([a, b])), tuple)
