"""Inverse problems: the image behind linear measurements as a Gaussian process."""

from ntkgp.models.inverse.measured import MeasuredNetwork
from ntkgp.models.inverse.model import ImageNormal, InverseNTKGP

__all__ = ["ImageNormal", "InverseNTKGP", "MeasuredNetwork"]
