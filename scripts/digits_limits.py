"""What the Laplace posterior of a small classification does wrong: the figures of docs/guide/limits.md.

The network of `ntkgp demo` on digits, groups at θ⋆: accuracy, NLL and ECE for each predictive mean and link, and the
log evidence with and without what BatchNorm in evaluation mode adds to the prior mean.

    python scripts/digits_limits.py [--images 250]
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

import ntkgp
from ntkgp.cli.demo import digits_network
from ntkgp.evaluation.datasets import digits
from ntkgp.evaluation.metrics import accuracy, categorical_nll, expected_calibration_error
from ntkgp.evaluation.training import train
from ntkgp.evidence import fit_problem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=250)
    arguments = parser.parse_args()
    data = digits(seed=0, train_size=arguments.images)
    x, labels = data.x_test[:500], data.labels_test[:500]
    net = digits_network(0)
    train(net, data.x_train, data.labels_train, steps=400, weight_decay=1.0, batch_size=50, seed=0)
    model = ntkgp.from_network(net, (data.x_train, data.labels_train), likelihood="classification", tolerance=1e-5)
    print("| mean | link | accuracy | NLL | ECE |\n| --- | --- | --- | --- | --- |")

    def show(mean: str, link: str, probabilities: torch.Tensor) -> None:
        scores = (metric(probabilities, labels) for metric in (accuracy, categorical_nll, expected_calibration_error))
        print(f"| {mean} | {link} | " + " | ".join(f"{float(score):.3f}" for score in scores) + " |", flush=True)

    with torch.no_grad():
        show("network alone", "–", net(x).softmax(-1))
        for model.mean in ("network", "posterior"):
            latent = model(x)
            for model.likelihood.link in ("probit", "mc", "bridge"):
                show(f"`{model.mean}`", model.likelihood.link, model.likelihood(latent).probs)
    problem = model.evidence_problem()
    rest = torch.tensor([not flag for flag in model.lin.groups.is_normalized])
    tangent = problem.tangent_theta * rest.unsqueeze(-1)
    offset = problem.logits - tangent.sum(0).reshape_as(problem.logits)
    without = fit_problem(replace(problem, offset=offset, tangent_theta=tangent), tolerance=1e-5)
    for name, values in (("f", problem.logits), ("f − Jθ̃", problem.offset), ("without the normalised groups", offset)):
        print(f"root mean square of {name}: {float(values.square().mean().sqrt()):.2f}")
    print(f"log evidence {model.report.log_evidence:.1f}")
    print(f"log evidence without the offset of the normalised groups {without.log_evidence:.1f}")


if __name__ == "__main__":
    main()
