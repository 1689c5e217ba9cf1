"""Inverse problems: linear forward operators, deep image priors, and what a Gaussian process of an image needs."""

from ntkgp.inverse.adapters import from_astra, from_callables, from_deepinv, from_matrix, to_cuqi
from ntkgp.inverse.design import Design, expected_information_gain, greedy_design
from ntkgp.inverse.diagnosis import diagnose
from ntkgp.inverse.dip import DeepImagePrior
from ntkgp.inverse.fbp import FilteredBackprojection
from ntkgp.inverse.geometry import FanBeam, ParallelBeam, Rays
from ntkgp.inverse.imaging import Blur, DenseOperator, Inpainting
from ntkgp.inverse.measured import Sinogram, line_integrals, load_dicom, load_sinogram, save_sinogram
from ntkgp.inverse.noise import estimate_noise
from ntkgp.inverse.operators import ForwardOperator, RayTransform
from ntkgp.inverse.total_variation import (
    HalfCauchyPrior,
    ScalePrior,
    TVPredCP,
    collapse_warnings,
    expected_total_variation,
    total_variation,
)
from ntkgp.inverse.unet import UNet
from ntkgp.models.inverse.priors import filter_lengthscales, filter_prior, g_prior

__all__ = [
    "Blur",
    "DeepImagePrior",
    "DenseOperator",
    "Design",
    "FanBeam",
    "FilteredBackprojection",
    "ForwardOperator",
    "HalfCauchyPrior",
    "Inpainting",
    "ParallelBeam",
    "RayTransform",
    "Rays",
    "ScalePrior",
    "Sinogram",
    "TVPredCP",
    "UNet",
    "collapse_warnings",
    "diagnose",
    "estimate_noise",
    "expected_information_gain",
    "expected_total_variation",
    "filter_lengthscales",
    "filter_prior",
    "from_astra",
    "from_callables",
    "from_deepinv",
    "from_matrix",
    "g_prior",
    "greedy_design",
    "line_integrals",
    "load_dicom",
    "load_sinogram",
    "save_sinogram",
    "to_cuqi",
    "total_variation",
]
