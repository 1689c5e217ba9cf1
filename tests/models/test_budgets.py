"""Budgets of Nyström and variational models: the one that a refusal names is enough, for the same numbers."""

from __future__ import annotations

import functools
import re
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood
from torch import Tensor, nn

import ntkgp
from ntkgp.evidence import one_pass
from ntkgp.linearization.memory import parse_memory
from tests import reference

N = 12


class Tokens(nn.Module):
    """Attention with a residual connection on four tokens of six."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(24, 3)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 24) -> (N, 3)."""
        tokens = self.norm(x.unflatten(-1, (4, 6)))
        return self.head(torch.tanh(tokens + self.attention(tokens, tokens, tokens)[0]).flatten(1))


NETS = {
    "mlp": lambda: nn.Sequential(nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4, 6)), nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 3, 3),
        nn.Tanh(), nn.Flatten(), nn.Linear(24, 3),
    ),
    "attention": Tokens,
}  # fmt: skip


@functools.cache
def problem(name: str) -> tuple[ntkgp.LinearizedNetwork, Tensor, Tensor]:
    with reference.seeded(3) as generator:
        net, x = NETS[name]().double(), torch.randn(N, 24, generator=generator, dtype=torch.float64)
        lin = ntkgp.LinearizedNetwork(net, x[:2], groups="layer")
        return lin, x, torch.randn(N, lin.num_outputs, generator=generator).double()


def nystrom(name: str, memory: Any, **options: Any) -> Tensor:
    lin, x, y = problem(name)
    y = y if lin.num_outputs > 1 else y[:, 0]
    model = ntkgp.NystromNTKGP((x, y), GaussianLikelihood(), lin, 5, max_memory=memory, **options)
    return model.fit(progress=False)(x[:2]).variance.detach()


def passed(name: str, memory: Any, kind: str = "shared") -> Tensor:
    lin, x, y = problem(name)
    c = lin.num_outputs
    likelihood: Any = GaussianLikelihood()
    if kind == "classification":
        likelihood = ntkgp.CategoricalLikelihood(c) if c > 1 else ntkgp.likelihoods.BernoulliLikelihood()
        y = y.argmax(-1) if c > 1 else (y[:, 0] > 0).long()
    elif kind == "per_output":
        likelihood = MultitaskGaussianLikelihood(c, rank=0) if c > 1 else likelihood
    return one_pass(lin, (x, y), likelihood, num_landmarks=5, max_memory=memory).statistics.second.tril()


def variational(name: str, memory: Any, evidence: str | None = None, one_output: bool = False) -> Tensor:
    lin, x, y = problem(name)
    index = torch.zeros(6, dtype=torch.long) if one_output else None
    model = ntkgp.VariationalNTKGP(
        x[:6], GaussianLikelihood(), lin, N, learn_inducing=False, output_index=index, max_memory=memory
    )
    fitted = model.fit((x, y), evidence=evidence, evidence_rows=3 * lin.num_outputs, progress=False)
    with torch.no_grad(), gpytorch.settings.fast_computations(False, False, False):
        return fitted(x[:2]).variance


CALLS: dict[str, Any] = {
    "nystrom": lambda n, m: nystrom(n, m, num_features=4),
    "nystrom, all rows": lambda n, m: nystrom(n, m, num_features=None),
    "nystrom, one output": lambda n, m: nystrom(n, m, num_features=4, output_selection="random"),
    "nystrom, greedy": lambda n, m: nystrom(n, m, num_features=4, landmarks="greedy"),
    "one pass": passed,
    "one pass, per output": lambda n, m: passed(n, m, "per_output"),
    "one pass, classes": lambda n, m: passed(n, m, "classification"),
    "variational": variational,
    "variational, evidence": lambda n, m: variational(n, m, "bound"),
    "variational, one output": lambda n, m: variational(n, m, one_output=True),
}


# Every call on one network, the three kinds of fit on all.
PAIRS = [(call, "convolutions") for call in CALLS]
PAIRS += [(call, name) for call in ("nystrom", "one pass", "variational") for name in ("mlp", "attention")]


@pytest.mark.parametrize(("call", "name"), PAIRS)
def test_the_budget_that_is_named_is_enough(call: str, name: str) -> None:
    with pytest.raises(ValueError, match=r"max_memory: 1 B is too small for .*; the smallest possible is") as refused:
        CALLS[call](name, 1)
    least = parse_memory(re.search(r"smallest possible is (.*)", str(refused.value))[1])  # type: ignore[index]
    found = CALLS[call](name, least)
    # The evidence on a part of the data has as many of them as the budget allows.
    if call != "variational, evidence":
        torch.testing.assert_close(found, CALLS[call](name, "2GiB"), rtol=1e-7, atol=1e-9)
    with pytest.raises(ValueError, match=r"max_memory: .*smallest possible is"):
        CALLS[call](name, least // 4 if "pass" in call or "nystrom" in call else int(0.97 * least))


def test_a_second_refusal_names_what_the_ranks_ask_for() -> None:
    """Between what the landmarks ask for and what the statistics of their features do."""
    lin, x, y = problem("convolutions")
    likelihood = MultitaskGaussianLikelihood(3, rank=0)
    model = ntkgp.NystromNTKGP((x, y), likelihood, lin, N, None, max_memory="1MiB")
    with pytest.raises(ValueError, match=r"the statistics of \d+ features and a pass with them; the small") as refused:
        model.fit(progress=False)
    least = parse_memory(re.search(r"smallest possible is (.*)", str(refused.value))[1])  # type: ignore[index]
    small = ntkgp.NystromNTKGP((x, y), likelihood, lin, N, None, max_memory=least).fit(progress=False)
    assert small.features is not None
    assert small.features.max_memory == least


def test_batches_of_a_variational_fit_are_cut_where_they_do_not_fit() -> None:
    lin, x, y = problem("convolutions")
    many, targets = x.repeat(10, 1), y.repeat(10, 1)

    def model(memory: Any, **options: Any) -> ntkgp.VariationalNTKGP:
        return ntkgp.VariationalNTKGP(x[:4], GaussianLikelihood(), lin, len(many), max_memory=memory, **options)

    with pytest.raises(ValueError, match="products of 1 input") as refused:
        model(1, learn_inducing=False)
    least = parse_memory(re.search(r"smallest possible is (.*)", str(refused.value))[1])  # type: ignore[index]
    parts = [model(m, learn_inducing=False).statistics((many, targets)) for m in (least, "2GiB")]
    torch.testing.assert_close(parts[0].second, parts[1].second)
    torch.testing.assert_close(parts[0].first, parts[1].first)
    assert parts[0].num_data == parts[1].num_data == len(many)
    with pytest.raises(ValueError, match="products of 120 input"):
        model(1)
    with pytest.raises(ValueError, match="products of 100 input"):
        model(least, learn_inducing=False).fit(
            (many, targets), validation=(many, targets), batch_size=100, evidence=None, progress=False
        )
