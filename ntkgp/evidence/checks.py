"""What about the data of an evidence problem deserves attention."""

from __future__ import annotations

from typing import Any

import torch

from ntkgp.evidence.problem import Problem, SoftmaxEvidence


def data_warnings(problem: Problem) -> list[str]:
    """Constant targets and repeated inputs."""
    out: list[str] = []
    if isinstance(problem, SoftmaxEvidence):
        constant = problem.labels.numel() > 1 and problem.labels.unique().numel() == 1
    else:
        observed: Any = problem.observations
        constant = observed is not None and observed.numel() > problem.outputs
        constant = constant and not bool(observed.reshape(-1, problem.outputs).std(0).any())
    if constant:
        out.append("constant targets: all training targets are equal")
    repeated = _repeated_inputs(problem)
    if repeated:
        out.append(f"{repeated} training inputs repeat another one (equal rows in every Gram)")
    return out


def _repeated_inputs(problem: Problem) -> int:
    """Count inputs whose Jacobians equal those of an earlier input."""
    traces = problem.stack.traces()
    weights = torch.where(traces > 0, 1.0 / traces, torch.zeros_like(traces))
    gram = problem.stack.weighted_sum(weights)
    diagonal = gram.diagonal()
    scale = diagonal[:, None] + diagonal
    # Rows of zeros, such as rays that miss the image, do not repeat anything.
    same = ((scale - gram - gram.mT) <= 1e-10 * scale) & (scale > 0)
    points = problem.rows // problem.outputs
    # Two inputs repeat when every output's Jacobian row does.
    pairs = same.reshape(points, problem.outputs, points, problem.outputs).diagonal(dim1=1, dim2=3).all(-1)
    return int(pairs.tril(-1).any(-1).sum())
