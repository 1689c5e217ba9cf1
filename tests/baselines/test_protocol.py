"""What all comparators owe to their protocol."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from ntkgp.baselines import (
    L2M,
    SWAG,
    DeepEnsemble,
    HessianFreeLaplace,
    Laplace,
    MCDropout,
    Point,
    PriorOnly,
    VariationalLaplace,
)
from ntkgp.baselines.laplace import model
from ntkgp.baselines.laplace.evidence import _companion, finds_mode_directly
from tests import reference as ref


@pytest.mark.parametrize("method", [Point, lambda net: Laplace(net, evidence=None)])
def test_a_second_fit_sees_what_the_network_has_become(method) -> None:
    with ref.seeded(0):
        net = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
        net, x = net.double(), torch.randn(12, 3, dtype=torch.float64)
        y = torch.randn(12, 2, dtype=torch.float64)
    fitted = method(net).fit((x, y))
    assert torch.allclose(fitted.predict(x).mean, net(x).detach())
    with torch.no_grad():
        net[0].weight.mul_(1.7)
        net[5].weight.mul_(0.3)
    assert not torch.allclose(fitted.predict(x).mean, net(x).detach())
    again = fitted.fit((x, y)).predict(x)
    expected = method(net).fit((x, y)).predict(x)
    assert torch.allclose(again.mean, net(x).detach())
    assert torch.allclose(again.variance, expected.variance)


def problem(kind):
    outputs = {"regression": 2, "binary": 1, "softmax": 3}[kind]
    with ref.seeded(0):
        net = nn.Sequential(
            nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Softplus(), nn.Dropout(0.1), nn.Linear(6, 4), nn.Tanh(),
            nn.Linear(4, outputs),
        ).double()  # fmt: skip
        x = torch.randn(14, 3, dtype=torch.float64)
        net(x)
        y = torch.randn(14, 2).double() if kind == "regression" else torch.randint(max(outputs, 2), (14,))
    return net.eval(), x, y, "regression" if kind == "regression" else "classification"


def moments(net, x):
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    net.zero_grad()
    return optimizer.state_dict()


def comparators(net, x, kind):
    """Functions that make each one anew."""
    state = moments(net, x)
    found = {
        "point": lambda: Point(net, kind),
        "prior": lambda: PriorOnly(net, kind, precision=1.0),
        "dropout": lambda: MCDropout(net, kind, num_samples=3),
        "swag": lambda: SWAG(net, kind, num_snapshots=3, rank=2, num_samples=2, batch_size=7),
        "ensemble": lambda: DeepEnsemble(net, kind, train=lambda net, data: None, size=2),
        "hfl": lambda: HessianFreeLaplace(net, kind, precision=1.0),
        "l2m": lambda: L2M(net, kind, optimizer=state, batch_size=7, precision=1.0),
        "vl": lambda: VariationalLaplace(net, kind, epochs=1),
    }
    for name in ("full", "kfac", "diagonal", "last_layer", "subnetwork"):
        options = {"size": 5} if name == "subnetwork" else {}
        found[name] = lambda name=name, options=options: Laplace(net, kind, structure=name, evidence=None, **options)
    return found


def numbers(found):
    return [found.probs] if hasattr(found, "probs") else [found.mean, found.variance]


def reason(method, state, x):
    """Why a state is refused; empty where it is taken."""
    try:
        method.load_state_dict(state, example=x[:2])
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["regression", "binary", "softmax"])
def test_states_survive_a_file_and_foreign_ones_are_refused(kind) -> None:
    net, x, y, likelihood = problem(kind)
    states = {}
    for name, make in comparators(net, x, likelihood).items():
        fitted = make().fit((x, y))
        file = io.BytesIO()
        torch.save(fitted.state_dict(), file)
        file.seek(0)
        states[name] = torch.load(file, weights_only=True)
        again = make().load_state_dict(states[name], example=x[:2])
        pairs = zip(numbers(fitted.predict(x)), numbers(again.predict(x)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), name
    for name, make in comparators(net, x, likelihood).items():
        into = make()
        before = dict(vars(into))
        for other, state in states.items():
            if name == other:
                continue
            assert reason(into, state, x).startswith("state: "), (name, other)
            assert vars(into) == before, (name, other)


def test_states_of_other_networks_are_refused() -> None:
    net, x, _, _ = problem("regression")
    other, _, labels, _ = problem("softmax")
    makes = comparators(net, x, "regression")
    for name, make in comparators(other, x, "classification").items():
        state = make().fit((x, labels)).state_dict()
        with pytest.raises(ValueError, match=r"state: expected that of .* for regression, got .* for classification"):
            makes[name]().load_state_dict(state, example=x[:2])


def test_theta_star_is_said_to_be_found_directly_where_the_whole_fits(monkeypatch) -> None:
    net, x, y, _ = problem("regression")
    asked = []

    def recorded(structure, tangent):
        asked.append((structure, tangent))
        return finds_mode_directly(structure, tangent)

    monkeypatch.setattr(model, "finds_mode_directly", recorded)
    answers = []
    # As many rows as weights: their Jacobian takes 32·74² bytes, the whole H in layers 8·(4 + 3)·74² or more.
    x, y = x.repeat(3, 1)[:37], y.repeat(3, 1)[:37]
    for memory in (100_000, 200_000, 10_000_000):
        Laplace(net, structure="diagonal", groups="layer", evidence=None, max_memory=memory).fit((x, y))
        structure, tangent = asked[-1]
        answers.append((tangent.is_kept, finds_mode_directly(structure, tangent)))
        assert answers[-1][1] == (_companion(structure, tangent) is not None)
    assert (True, False) in answers
    assert (True, True) in answers
