"""Weight-space and other comparators of the Gaussian processes, all with ``fit`` and ``predict``."""

from ntkgp.baselines.protocol import Baseline

__all__ = ["Baseline"]
