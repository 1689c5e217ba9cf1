"""L2M against its printed formula, simulated optimisers and dense sums of squared gradients."""

from __future__ import annotations

import copy
import functools
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from ntkgp.baselines.l2m import L2M, L2MEnsemble
from tests import reference

DOUBLE = torch.float64


def network(outputs: int, seed: int = 0) -> nn.Sequential:
    with reference.seeded(seed):
        return nn.Sequential(
            nn.Linear(2, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, outputs)
        ).double()  # fmt: skip


def data(n: int, outputs: int, classification: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, generator=generator, dtype=DOUBLE)
    if classification:
        return x, (x[:, 0] + 0.7 * torch.randn(n, generator=generator, dtype=DOUBLE) > 0).long() + (
            (x[:, 1] > 0.5).long() if outputs > 1 else 0
        )
    y = torch.sin(x.sum(-1, keepdim=True) + torch.arange(outputs, dtype=DOUBLE))
    return x, y + 0.3 * torch.randn(y.shape, generator=generator, dtype=DOUBLE)


def loss_of(f: Tensor, y: Tensor) -> Tensor:
    if y.is_floating_point():
        return mse_loss(f, y)
    return binary_cross_entropy_with_logits(f[:, 0], y.to(f)) if f.shape[-1] == 1 else cross_entropy(f, y)


def gradients(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of the loss of each example, (N, P), one at a time."""
    net = copy.deepcopy(net).eval()
    rows = []
    for n in range(len(x)):
        found = torch.autograd.grad(loss_of(net(x[n : n + 1]), y[n : n + 1]), list(net.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    return torch.stack(rows)


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, b: int, count: int) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        rows = torch.randperm(len(x), generator=generator)[:b]
        optimizer.zero_grad()
        loss_of(net(x[rows]), y[rows]).backward()
        optimizer.step()


@functools.cache
def trained(outputs: int = 2, classification: bool = False, n: int = 40, decay: float = 0.1):
    """A network, its AdamW and its data after minibatch training."""
    net, (x, y) = network(outputs), data(n, outputs, classification)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=decay)
    steps(net, optimizer, x, y, 8, 200)
    return net, optimizer, x, y


def flat(optimizer: torch.optim.Optimizer, name: str = "exp_avg_sq") -> Tensor:
    return torch.cat([optimizer.state[p][name].reshape(-1) for p in optimizer.param_groups[0]["params"]])


def test_printed_form_is_as_printed_and_says_that_the_data_do_not_matter(caplog: pytest.LogCaptureFixture) -> None:
    net, optimizer, x, y = trained()
    with caplog.at_level(logging.WARNING, "ntkgp"):
        l2m = L2M(net, optimizer=optimizer, variant="paper").fit((x, y))
    torch.testing.assert_close(l2m.weight_precision, flat(optimizer) + 1 / 0.1 + 1e-8, rtol=1e-14, atol=0)
    torch.testing.assert_close(l2m.data_share, flat(optimizer) / l2m.weight_precision, rtol=1e-14, atol=0)
    assert any("come from the data" in record.getMessage() for record in caplog.records)


def test_printed_form_is_the_same_for_20_and_2000_data_and_the_corrected_is_not() -> None:
    spread = {}
    for n in (20, 2000):
        net, optimizer, x, y = trained(outputs=1, n=n)
        printed = L2M(net, optimizer=optimizer, variant="paper").fit((x, y))
        corrected = L2M(net, optimizer=optimizer, batch_size=8, precision=1.0, noise=0.09).fit((x, y))
        spread[n] = printed.weight_precision.rsqrt(), corrected.weight_precision.rsqrt()
    for printed, _ in spread.values():
        torch.testing.assert_close(printed, torch.full_like(printed, 0.1**0.5), rtol=0.02, atol=0)
    assert float((spread[20][1] / spread[2000][1]).median()) > 3


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize(("outputs", "classification"), [(1, False), (3, False), (1, True), (3, True)])
def test_corrected_form_is_the_sum_of_squared_gradients(outputs: int, classification: bool, replacement: bool) -> None:
    """With v = E over batches of the squared batch gradient, exactly, the correction gives Σ g² exactly."""
    net, (x, y) = network(outputs), data(30, outputs, classification)
    g = gradients(net, x, y)
    n, b, scale = len(x), 4, 1.0
    mean, variance = g.mean(0), g.var(0, correction=0)
    v = mean.square() + variance / b * (1.0 if replacement else (n - b) / (n - 1))
    beta, t = 0.99, 7
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, beta))
    parts = (v * (1 - beta**t)).split([p.numel() for p in net.parameters()])
    for p, part in zip(net.parameters(), parts, strict=True):
        optimizer.state[p] = {"step": torch.tensor(float(t)), "exp_avg_sq": part.reshape(p.shape)}
    l2m = L2M(
        net, "classification" if classification else "regression", groups="tensor", optimizer=optimizer, batch_size=b,
        replacement=replacement, precision=torch.arange(1.0, 9.0), noise=None if classification else 0.2,
    ).fit((x, y))  # fmt: skip
    if not classification:
        scale = outputs / (2 * 0.2)
    index = reference.index(net, [{name} for name, _ in net.named_parameters()])
    expected = scale**2 * g.square().sum(0) + torch.arange(1.0, 9.0, dtype=DOUBLE)[index]
    torch.testing.assert_close(l2m.weight_precision, expected, rtol=1e-9, atol=0)


def test_batches_without_replacement_by_simulation() -> None:
    net, (x, y) = network(1), data(20, 1, False)
    g = gradients(net, x, y)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, betas=(0.9, 0.9999), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        rows = torch.randperm(20, generator=generator)[:8]
        for p, part in zip(net.parameters(), g[rows].mean(0).split([p.numel() for p in net.parameters()]), strict=True):
            p.grad = part.reshape(p.shape)
        optimizer.step()
    l2m = L2M(net, optimizer=optimizer, batch_size=8, precision=1e-12, noise=0.5).fit((x, y))
    assert float((l2m.weight_precision / g.square().sum(0) - 1).abs().max()) < 0.2
    assert float((l2m.weight_precision.sum() / g.square().sum()) - 1) < 0.05


@pytest.mark.parametrize("kind", ["Adam", "RMSprop"])
def test_coupled_decay_is_a_precision_and_leaves_the_second_moment(kind: str) -> None:
    net, (x, y) = network(1), data(30, 1, False)
    g = gradients(net, x, y)
    theta, decay, b, t = reference.theta(net), 0.02, 5, 50
    v = (g.mean(0) + decay * theta).square() + g.var(0, correction=0) / b * (25 / 29)
    optimizer = getattr(torch.optim, kind)(net.parameters(), weight_decay=decay)
    memory = optimizer.param_groups[0]["betas"][1] if kind == "Adam" else optimizer.param_groups[0]["alpha"]
    held = "exp_avg_sq" if kind == "Adam" else "square_avg"
    parts = (v * (1 - memory**t)).split([p.numel() for p in net.parameters()])
    for p, part in zip(net.parameters(), parts, strict=True):
        optimizer.state[p] = {"step": torch.tensor(float(t)), held: part.reshape(p.shape)}
    l2m = L2M(net, optimizer=optimizer, batch_size=b, noise=0.25).fit((x, y))
    expected = 4 * g.square().sum(0) + 30 * decay / (2 * 0.25)
    torch.testing.assert_close(l2m.weight_precision, expected, rtol=1e-8, atol=0)


def test_state_dict_of_the_optimiser_gives_the_same() -> None:
    net, optimizer, x, y = trained()
    live = L2M(net, optimizer=optimizer, variant="paper").fit((x, y))
    saved = L2M(copy.deepcopy(net), optimizer=optimizer.state_dict(), variant="paper").fit((x, y))
    assert torch.equal(live.weight_precision, saved.weight_precision)
    swapped = [{"params": list(net.parameters())[4:]}, {"params": list(net.parameters())[:4]}]
    other = torch.optim.AdamW(swapped, weight_decay=0.1)
    for p in net.parameters():
        other.state[p] = optimizer.state[p]
    assert torch.equal(live.weight_precision, L2M(net, optimizer=other, variant="paper").fit((x, y)).weight_precision)
    named = torch.optim.AdamW(list(net.named_parameters())[::-1], weight_decay=0.1)
    for p in net.parameters():
        named.state[p] = optimizer.state[p]
    assert torch.equal(
        live.weight_precision, L2M(net, optimizer=named.state_dict(), variant="paper").fit((x, y)).weight_precision
    )


def test_frozen_parameters_and_parameters_without_gradients() -> None:
    net, (x, y) = network(1), data(30, 1, False)
    net[0].requires_grad_(False)
    everything = torch.optim.AdamW(net.parameters(), weight_decay=0.1)
    some = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], weight_decay=0.1)
    for optimizer in (everything, some):
        steps(net, optimizer, x, y, 5, 3)
        for given in (optimizer, optimizer.state_dict()):
            found = L2M(net, optimizer=given, variant="paper").fit((x, y)).weight_precision
            expected = torch.cat(
                [optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in net.parameters() if p.requires_grad]
            )
            torch.testing.assert_close(found, expected + 10 + 1e-8, rtol=1e-14, atol=0)
    unused = nn.Sequential(net, nn.Identity())
    unused.register_parameter("spare", nn.Parameter(torch.ones(3, dtype=DOUBLE)))
    optimizer = torch.optim.AdamW(unused.parameters(), weight_decay=0.1)
    steps(unused, optimizer, x, y, 5, 3)
    l2m = L2M(unused, optimizer=optimizer, variant="paper").fit((x, y))
    torch.testing.assert_close(l2m.data_share[:3], torch.zeros(3, dtype=DOUBLE), rtol=0, atol=0)


def test_linearised_prediction_has_the_exact_moments() -> None:
    net, optimizer, x, y = trained(outputs=3)
    l2m = L2M(
        net, optimizer=optimizer, batch_size=8, precision=2.0, noise=0.1, prediction="glm", max_memory="64KiB"
    ).fit((x, y))
    x_test = 2 * x[:7]
    j = reference.jacobian(net, x_test)
    expected = torch.einsum("ncp,p,ndp->ncd", j, 1 / l2m.weight_precision, j)
    found = l2m.predict(x_test)
    torch.testing.assert_close(found.latent.covariance_matrix, expected, rtol=1e-7, atol=1e-9)
    noisy = expected + 0.1 * torch.eye(3, dtype=DOUBLE)
    torch.testing.assert_close(found.covariance_matrix, noisy, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.mean, reference.outputs(net, x_test), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("outputs", "classification"), [(1, False), (3, False), (1, True), (3, True)])
def test_weight_samples_go_through_the_network_itself(outputs: int, classification: bool) -> None:
    net, optimizer, x, y = trained(outputs, classification)
    l2m = L2M(
        net, "classification" if classification else "regression", optimizer=optimizer, batch_size=8, precision=5.0,
        noise=None if classification else 0.2, num_samples=20, prediction="weights",
    ).fit((x, y))  # fmt: skip
    own = copy.deepcopy(net)
    rows = []
    for weights in l2m.weight_samples():
        nn.utils.vector_to_parameters(weights, own.parameters())
        rows.append(own(x[:6]).detach())
    f = torch.stack(rows)
    torch.testing.assert_close(l2m.output_samples(x[:6]), f, rtol=1e-10, atol=1e-12)
    found = l2m.predict(x[:6])
    torch.testing.assert_close(found.latent.mean.reshape(6, -1), f.mean(0), rtol=1e-10, atol=1e-12)
    if classification:
        probs = f.sigmoid().mean(0)[:, 0] if outputs == 1 else f.softmax(-1).mean(0)
        torch.testing.assert_close(found.probs, probs, rtol=1e-9, atol=1e-12)
        return
    for n in range(6):
        covariance = torch.cov(f[:, n].T).reshape(outputs, outputs)
        latent = found.latent.variance[n] if outputs == 1 else found.latent.covariance_matrix[n]
        torch.testing.assert_close(latent.reshape(outputs, outputs), covariance, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.variance, found.latent.variance + 0.2, rtol=1e-9, atol=1e-9)


def test_weight_samples_have_the_right_variances() -> None:
    net, optimizer, x, y = trained(outputs=1)
    l2m = L2M(net, optimizer=optimizer, batch_size=8, precision=5.0, num_samples=4000).fit((x, y))
    samples = torch.stack(list(l2m.weight_samples()))
    torch.testing.assert_close(samples.var(0) * l2m.weight_precision, torch.ones(samples.shape[1], dtype=DOUBLE),
                               rtol=0.12, atol=0)  # fmt: skip
    deviation = (samples.mean(0) - reference.theta(net)) * l2m.weight_precision.sqrt() * 4000**0.5
    assert float(deviation.abs().max()) < 4.5
    assert torch.equal(samples[0], next(l2m.weight_samples()))
    other = L2M(net, optimizer=optimizer, batch_size=8, precision=5.0, seed=1).fit((x, y))
    assert not torch.equal(samples[0], next(other.weight_samples()))


def test_corrected_form_is_near_the_diagonal_gauss_newton_matrix() -> None:
    """A well-specified model near its mode: the empirical Fisher is the expected one within a factor of two."""
    net, (x, y) = network(1), data(2000, 1, False)
    steps(net, torch.optim.Adam(net.parameters(), lr=1e-2), x, y, 100, 600)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=1e-4)
    steps(net, optimizer, x, y, 20, 500)
    l2m = L2M(net, optimizer=optimizer, batch_size=20, precision=1.0).fit((x, y))
    j = torch.func.vmap(torch.func.jacrev(lambda w, row: torch.func.functional_call(net, w, row)), (None, 0))(
        {name: p.detach() for name, p in net.named_parameters()}, x
    )
    squares = torch.cat([rows.square().sum(0).reshape(-1) for rows in j.values()])
    diagonal = squares / float(l2m.state_dict()["noise"]) + 1.0
    ratio = (l2m.weight_precision / diagonal).sqrt()
    assert 0.5 < float(ratio.median()) < 2
    assert float(((ratio > 0.5) & (ratio < 2)).double().mean()) > 0.9


@pytest.mark.parametrize("classification", [False, True])
def test_ensemble_of_l2m_is_their_mixture(classification: bool) -> None:
    kind = "classification" if classification else "regression"
    x, y = data(30, 2, classification)
    outputs = 3 if classification else 2
    members = []
    for seed in range(3):
        net = network(outputs, seed)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
        steps(net, optimizer, x, y, 6, 30)
        members.append(L2M(net, kind, optimizer=optimizer, batch_size=6, precision=3.0, num_samples=30))
    ensemble = L2MEnsemble(members).fit((x, y))
    found, single = ensemble.predict(x[:4]), [m.predict(x[:4]) for m in members]
    if classification:
        torch.testing.assert_close(found.probs, sum(d.probs for d in single) / 3, rtol=1e-10, atol=0)
    means = torch.stack([d.latent.mean for d in single])
    covariance = sum(d.latent.covariance_matrix for d in single) / 3
    for n in range(4):
        expected = covariance[n] + torch.cov(means[:, n].T, correction=0)
        torch.testing.assert_close(found.latent.covariance_matrix[n], expected, rtol=1e-9, atol=1e-12)
    again = L2MEnsemble([L2M(m.net, kind, num_samples=30) for m in members])
    again.load_state_dict(ensemble.state_dict(), example=x[:2])
    torch.testing.assert_close(again.predict(x[:4]).latent.mean, found.latent.mean, rtol=1e-12, atol=0)


def test_state_dict_of_tensors_restores_predictions() -> None:
    net, optimizer, x, y = trained()
    l2m = L2M(net, optimizer=optimizer, batch_size=8, precision=3.0, num_samples=10).fit((x, y))
    state = l2m.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    other = L2M(net, num_samples=10)
    with pytest.raises(ValueError, match="example"):
        other.load_state_dict(state)
    other.load_state_dict(state, example=x[:2])
    assert torch.equal(other.predict(x).mean, l2m.predict(x).mean)
    with pytest.raises(ValueError, match="state: expected"):
        other.load_state_dict({name: state[name] for name in ("method", "noise")})


def test_users_network_optimiser_and_random_state_are_left_alone() -> None:
    net, optimizer, x, y = trained(outputs=3)
    net.train()
    before, moments = copy.deepcopy(net.state_dict()), flat(optimizer).clone()
    state = torch.get_rng_state()
    L2M(net, optimizer=optimizer, batch_size=8, precision=1.0, num_samples=3).fit((x, y)).predict(x[:2])
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert torch.equal(flat(optimizer), moments)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


def test_optimisers_that_are_refused() -> None:
    net, (x, y) = network(1), data(20, 1, False)

    def fit(optimizer, **options):
        return L2M(net, optimizer=optimizer, **{"precision": 1.0, "batch_size": 5} | options).fit((x, y))

    amsgrad = torch.optim.AdamW(net.parameters(), amsgrad=True)
    steps(net, amsgrad, x, y, 5, 2)
    for given in (amsgrad, amsgrad.state_dict()):
        with pytest.raises(ValueError, match="AMSGrad"):
            fit(given)
    for kind in (torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adamax):
        optimizer = kind(net.parameters())
        steps(net, optimizer, x, y, 5, 2)
        with pytest.raises(TypeError, match="no second moments"):
            fit(optimizer)
    momentum = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    steps(net, momentum, x, y, 5, 2)
    with pytest.raises(TypeError, match="no second moments"):
        fit(momentum)
    with pytest.raises(ValueError, match="no step"):
        fit(torch.optim.Adam(net.parameters()))
    with pytest.raises(TypeError, match="expected Adam"):
        fit([1, 2])
    with pytest.raises(ValueError, match="got None"):
        fit(None)
    foreign = network(1, seed=5)
    other = torch.optim.Adam(foreign.parameters())
    steps(foreign, other, x, y, 5, 2)
    with pytest.raises(ValueError, match="not this network's"):
        fit(other)
    part = torch.optim.Adam(net[0].parameters())
    steps(net, part, x, y, 5, 2)
    with pytest.raises(ValueError, match=r"does not have the trainable parameter\(s\) 1.weight"):
        fit(part)
    with pytest.raises(ValueError, match="state_dict has 2 parameters"):
        fit(part.state_dict())
    wide = network(2)
    steps(wide, adam := torch.optim.Adam(wide.parameters()), *data(20, 2, False), 5, 2)
    with pytest.raises(ValueError, match="have shape"):
        fit(adam.state_dict())


def test_what_the_corrected_and_printed_forms_need() -> None:
    net, optimizer, x, y = trained(outputs=1)
    with pytest.raises(ValueError, match="batch_size: expected the size"):
        L2M(net, optimizer=optimizer, precision=1.0).fit((x, y))
    with pytest.raises(ValueError, match="smaller than the data set"):
        L2M(net, optimizer=optimizer, precision=1.0, batch_size=40).fit((x, y))
    with pytest.raises(ValueError, match="decoupled"):
        L2M(net, optimizer=optimizer, batch_size=8).fit((x, y))
    with pytest.raises(ValueError, match="one per group"):
        L2M(net, optimizer=optimizer, batch_size=8, precision=torch.ones(9)).fit((x, y))
    plain = torch.optim.Adam(net.parameters(), lr=0.0)
    steps(net, plain, x, y, 8, 2)
    with pytest.raises(ValueError, match="1/0"):
        L2M(net, optimizer=plain, variant="paper").fit((x, y))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "printed"}, "variant: expected one of"),
        ({"loss": "l1"}, "loss: expected one of"),
        ({"prediction": "map"}, "prediction: expected one of"),
        ({"num_samples": 1}, "num_samples: expected a whole number"),
        ({"batch_size": 0}, "batch_size: expected a whole number"),
        ({"noise": -1.0}, "noise: expected a positive number"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        L2M(network(1), **options)
    with pytest.raises(ValueError, match="loss: expected 'nll'"):
        L2M(network(1), "classification", loss="mse")


def test_before_fit() -> None:
    l2m = L2M(network(1))
    for use in (l2m.state_dict, lambda: l2m.weight_precision, lambda: l2m.predict(torch.zeros(2, 2))):
        with pytest.raises(RuntimeError, match="fit"):
            use()
