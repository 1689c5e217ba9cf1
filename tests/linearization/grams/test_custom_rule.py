"""Rules of users: used where they are right, noticed where they are wrong; never a wrong result."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ntkgp
from ntkgp.linearization.rules import Outer, Rows, Term, register_rule, unregister_rule
from tests import reference as ref
from tests.linearization.grams.helper import DOUBLE, TOLERANCE, dense, diagonals, error, linear, noise


class Squared(nn.Module):
    """y = x (W ∘ W)ᵀ ∘ s."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(outputs, inputs, dtype=DOUBLE))
        self.scale = nn.Parameter(torch.randn(outputs, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.matrix.square().T) * self.scale


class RightRule:
    """J_W = 2 Σ (g ∘ s) ⊗ x ∘ W, J_s = g ∘ x (W ∘ W)ᵀ."""

    def __init__(self) -> None:
        self.calls = 0

    def inputs(self, layer: Squared, x: Tensor) -> Tensor:
        return x

    def terms(self, layer: Squared, inputs: Tensor, cotangents: Tensor) -> dict[str, Term]:
        self.calls += 1
        rows = Outer(inputs[:, None, :, None], (cotangents * layer.scale)[:, :, None, :, None]).dense()
        out = inputs @ layer.matrix.square().T
        return {
            "matrix": Rows(2 * rows * layer.matrix.flatten()),
            "scale": Rows(cotangents * out.unsqueeze(1)),
        }


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    unregister_rule(Squared)


def build() -> nn.Sequential:
    with ref.seeded(0):
        return nn.Sequential(linear(3, 4), nn.Tanh(), Squared(4, 5), nn.Tanh(), linear(5, 4), nn.Tanh(), Squared(4, 2))


def linearized(caplog: pytest.LogCaptureFixture, net: nn.Module | None = None) -> tuple[set[str], list[str]]:
    """Checks that everything is exact; parameters of the fallback, and warnings."""
    net = build() if net is None else net
    lin, x = ntkgp.LinearizedNetwork(net, noise(0, 2, 3)), noise(1, 5, 3)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="ntkgp"):
        j = ref.jacobian(net, x)
        assert error(lin.grams(x), dense(lin, j)) < TOLERANCE
        assert error(lin.grams(lin.factors(x), x[:2]), dense(lin, j, j[:2])) < TOLERANCE
        assert error(lin.gram_diagonals(x), diagonals(lin, j)) < TOLERANCE
    return set(lin.frozen.theta) - set(lin.engine.plan.shapes), [r.getMessage() for r in caplog.records]


OWN = {"2.matrix", "2.scale", "6.matrix", "6.scale"}


def test_a_right_rule_is_used(caplog: pytest.LogCaptureFixture) -> None:
    from ntkgp.linearization.rules.registry import rule_of

    register_rule(Squared)(RightRule)
    rule: Any = rule_of(build()[2])
    assert linearized(caplog) == (set(), [])
    assert rule.calls >= 2 * 3


def test_without_a_rule(caplog: pytest.LogCaptureFixture) -> None:
    assert linearized(caplog) == (OWN, [])


def test_a_rule_that_leaves_a_parameter_out(caplog: pytest.LogCaptureFixture) -> None:
    class Partial(RightRule):
        def terms(self, layer: Squared, inputs: Tensor, cotangents: Tensor) -> dict[str, Term]:
            found = super().terms(layer, inputs, cotangents)
            return {"matrix": found["matrix"]}

    register_rule(Squared)(Partial)
    assert linearized(caplog) == ({"2.scale", "6.scale"}, [])


def scaled(found: dict[str, Term]) -> dict[str, Term]:
    return found | {"matrix": Rows(found["matrix"].dense() * 0.5)}


def swapped(found: dict[str, Term]) -> dict[str, Term]:
    return found | {"scale": Rows(found["scale"].dense().flip(-1))}


def missized(found: dict[str, Term]) -> dict[str, Term]:
    return found | {"scale": Rows(found["scale"].dense()[..., :1])}


def not_finite(found: dict[str, Term]) -> dict[str, Term]:
    return found | {"matrix": Rows(found["matrix"].dense() * float("nan"))}


@pytest.mark.parametrize("spoil", [scaled, swapped, missized, not_finite])
def test_a_wrong_rule_is_noticed(spoil: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Wrong(RightRule):
        def terms(self, layer: Squared, inputs: Tensor, cotangents: Tensor) -> dict[str, Term]:
            return spoil(super().terms(layer, inputs, cotangents))

    register_rule(Squared)(Wrong)
    left, warnings = linearized(caplog)
    assert left == OWN
    assert sorted(warnings) == [
        f"{key} is used in a way that its rule does not describe: per-sample gradients are formed" for key in "26"
    ]


@pytest.mark.parametrize("kind", [KeyError, AttributeError, AssertionError, TypeError, ZeroDivisionError, RuntimeError])
@pytest.mark.parametrize("method", ["inputs", "terms"])
def test_a_rule_that_fails(kind: type[Exception], method: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*args: Any) -> Any:
        raise kind("no such thing")

    register_rule(Squared)(type("Failing", (RightRule,), {method: fail}))
    left, warnings = linearized(caplog)
    assert left == OWN, "the other layers go by their rules"
    assert any("the rule of 2 failed" in text and "no such thing" in text for text in warnings)


def test_a_subclass_with_its_own_forward(caplog: pytest.LogCaptureFixture) -> None:
    class Shifted(Squared):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 1)

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Named(nn.Linear):
        """Nothing but a name."""

    register_rule(Squared)(RightRule)
    with ref.seeded(1):
        net = nn.Sequential(Shifted(3, 4), nn.Tanh(), Doubled(4, 4).to(DOUBLE), nn.Tanh(), Named(4, 2).to(DOUBLE))
    left, warnings = linearized(caplog, net)
    assert left == {"0.matrix", "0.scale", "2.weight", "2.bias"}
    assert warnings == []


def test_another_forward_of_one_instance(caplog: pytest.LogCaptureFixture) -> None:
    net = build()
    net[0].forward = lambda x, layer=net[0]: torch.nn.functional.linear(x.sin(), layer.weight, layer.bias)
    net[0].forward.__defaults__[0].bias.requires_grad_(False)
    lin = ntkgp.LinearizedNetwork(net, noise(0, 2, 3))
    assert "0.weight" not in lin.engine.plan.shapes


def test_a_rule_found_wrong_is_reconsidered_by_other_networks(caplog: pytest.LogCaptureFixture) -> None:
    class Wrong(RightRule):
        def terms(self, layer: Squared, inputs: Tensor, cotangents: Tensor) -> dict[str, Term]:
            return scaled(super().terms(layer, inputs, cotangents))

    register_rule(Squared)(Wrong)
    assert linearized(caplog)[0] == OWN
    register_rule(Squared)(RightRule)
    assert linearized(caplog) == (set(), [])


def test_only_modules_have_rules() -> None:
    with pytest.raises(TypeError, match=r"types: expected subclasses of torch.nn.Module"):
        register_rule(int)(RightRule)
    unregister_rule(Squared)
    unregister_rule(Squared)
