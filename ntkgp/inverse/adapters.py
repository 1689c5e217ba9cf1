"""Forward operators made of what other libraries have, and one for CUQIpy; none of them is needed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from ntkgp.inverse.imaging import DenseOperator, check_size
from ntkgp.inverse.operators import ForwardOperator, SparseOperator
from ntkgp.inverse.packages import optional
from ntkgp.inverse.rays import as_pair

logger = logging.getLogger("ntkgp")

# Largest mismatch of ⟨Ax, y⟩ and ⟨x, Aᵀy⟩ that passes for rounding.
_TOLERANCE = 1e-4


def from_matrix(
    matrix: Any, image_shape: Sequence[int] | None = None, data_shape: Sequence[int] | None = None
) -> ForwardOperator:
    """A forward operator of a matrix, sparse or dense.

    :param matrix: (num_measurements × num_pixels): of scipy.sparse in any format, a numpy array, or a torch tensor,
        dense or sparse. float32 stays, everything else becomes float64.
    :param image_shape: shape of one image; (num_pixels,) by default.
    :param data_shape: shape of its measurements; (num_measurements,) by default.
    :raises ValueError: NaN or infinite entries, no entries, shapes of other sizes.
    :raises TypeError: complex entries.

    Columns of zeros are allowed, and logged: those pixels are seen by no measurement, and keep their prior.

    >>> import scipy.sparse
    >>> A = from_matrix(scipy.sparse.eye(12, format="coo"), (3, 4))
    >>> A(torch.rand(5, 3, 4)).shape
    torch.Size([5, 12])
    """
    if isinstance(matrix, Tensor) and matrix.layout != torch.strided:
        coo = matrix.detach().cpu().to_sparse_coo().coalesce()
        shape = tuple(coo.shape)
        matrix = scipy.sparse.coo_array((coo.values().numpy(), tuple(coo.indices().numpy())), shape=shape)
    if not scipy.sparse.issparse(matrix):
        operator: ForwardOperator = DenseOperator(matrix, image_shape, data_shape)
        unseen = int((operator.matrix(operator.dtype, max_memory=float(1 << 62)) == 0).all(0).sum())
        nothing = unseen == operator.num_pixels
    else:
        if np.iscomplexobj(matrix):
            raise TypeError(f"matrix: expected real numbers, got {matrix.dtype}")
        rows = scipy.sparse.csr_array(matrix, dtype=np.float32 if matrix.dtype == np.float32 else np.float64, copy=True)
        if not np.isfinite(rows.data).all():
            raise ValueError(f"matrix: {int((~np.isfinite(rows.data)).sum())} entries are NaN or infinite")
        rows.sum_duplicates()
        rows.eliminate_zeros()
        measurements, pixels = rows.shape
        operator = SparseOperator(
            *as_pair(rows),
            check_size(image_shape, pixels, "image_shape"),
            check_size(data_shape, measurements, "data_shape"),
        )  # fmt: skip
        unseen, nothing = int(operator.unseen.sum()), rows.nnz == 0
    if nothing:
        raise ValueError("matrix: has no entry that is not zero")
    if unseen:
        logger.warning("from_matrix: no measurement sees %d of %d pixels", unseen, operator.num_pixels)
    return operator


class CallableOperator(ForwardOperator):
    """A pair of functions as forward operator; see :func:`from_callables`, which checks them."""

    _anchor: Tensor

    def __init__(
        self,
        forward: Callable[[Any], Any],
        adjoint: Callable[[Any], Any],
        image_shape: Sequence[int],
        data_shape: Sequence[int],
        *,
        batched: bool,
        numpy: bool,
        runs_in: torch.dtype | None,
        device: torch.device | str,
    ) -> None:
        super().__init__(image_shape, data_shape)
        self._functions = (forward, adjoint)
        self._batched, self._numpy, self._runs_in = batched, numpy, runs_in
        self.register_buffer("_anchor", torch.zeros(0, dtype=runs_in or torch.float64, device=device), persistent=False)

    def _product(self, x: Tensor) -> Tensor:
        return self._call("forward", x, self.image_shape, self.data_shape)

    def _adjoint_product(self, y: Tensor) -> Tensor:
        return self._call("adjoint", y, self.data_shape, self.image_shape)

    def _call(self, name: str, rows: Tensor, takes: tuple[int, ...], gives: tuple[int, ...]) -> Tensor:
        function = self._functions[name == "adjoint"]
        if not len(rows):
            return rows.new_zeros(0, math.prod(gives))
        given = rows.to(self._runs_in or rows.dtype).reshape(len(rows), *takes)
        calls = [given] if self._batched else list(given)
        found = [function(call.cpu().numpy() if self._numpy else call) for call in calls]
        expected = (len(given), *gives) if self._batched else gives
        for result in found:
            if tuple(np.shape(result)) != expected:
                raise ValueError(f"{name}: expected a result of shape {expected}, got {tuple(np.shape(result))}")
        if self._numpy:
            found = [torch.from_numpy(np.array(result)) for result in found]
        # A function may give back its argument, which no result of an autograd function can be a view of.
        joined = found[0].clone() if self._batched else torch.stack(found)
        joined = joined.detach() if joined.requires_grad else joined
        return joined.reshape(len(rows), math.prod(gives)).to(rows)


def from_callables(
    forward: Callable[[Any], Any],
    adjoint: Callable[[Any], Any] | None,
    image_shape: Sequence[int],
    data_shape: Sequence[int],
    *,
    batched: bool = False,
    numpy: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    tolerance: float = _TOLERANCE,
) -> ForwardOperator:
    r"""A forward operator of two functions, tested before it is believed.

    That the functions are a linear map and its transpose is tested on random arguments: A(x + 2z) = A(x) + 2A(z) and
    :math:`\langle Ax, y\rangle = \langle x, A^\top y\rangle`. An adjoint that is only nearly one (another
    interpolation for the backprojection, say) makes covariances that are not symmetric, and is refused.

    :param forward: from an image (\*image_shape) to measurements (\*data_shape), linear.
    :param adjoint: from measurements to an image, by the transpose; None takes the transpose of a differentiable
        ``forward`` by autograd (torch only).
    :param image_shape: shape of one image.
    :param data_shape: shape of its measurements.
    :param batched: the functions take and give a leading batch dimension; otherwise they are called for each image.
    :param numpy: the functions take and give arrays instead of tensors.
    :param dtype: what the functions run in; by default that of their argument.
    :param device: where they expect tensors.
    :param tolerance: largest relative mismatch, of float32 rounding by default.
    :raises ValueError: results of another shape, NaN, functions that are not linear or not transposes.

    Derivatives come from the adjoint, so the functions need not be differentiable, and A is under autograd,
    forward mode and ``vmap`` whatever they are.

    >>> A = from_callables(lambda x: x.cumsum(-1), lambda y: y.flip(-1).cumsum(-1).flip(-1), (4, 4), (4, 4))
    >>> A(torch.ones(4, 4))[0]
    tensor([1., 2., 3., 4.])
    >>> from_callables(lambda x: x.cumsum(-1), lambda y: y, (4, 4), (4, 4))
    Traceback (most recent call last):
    ...
    ValueError: adjoint: is not the transpose of forward: ⟨Ax, y⟩ and ⟨x, Aᵀy⟩ differ by ... of ‖Ax‖‖y‖, ...
    """
    if dtype not in (None, torch.float32, torch.float64):
        raise TypeError(f"dtype: expected torch.float32, torch.float64 or None, got {dtype}")
    if adjoint is None:
        if numpy:
            raise ValueError("adjoint: expected a function; autograd needs tensors, and numpy=True")
        adjoint = _transpose(forward, tuple(image_shape), batched)
    operator = CallableOperator(
        forward, adjoint, image_shape, data_shape, batched=batched, numpy=numpy, runs_in=dtype, device=device
    )
    _check_linear(operator, tolerance)
    mismatch = operator.dot_test(dtype or torch.float64)
    if not mismatch <= tolerance:
        raise ValueError(
            f"adjoint: is not the transpose of forward: ⟨Ax, y⟩ and ⟨x, Aᵀy⟩ differ by {mismatch:.1e} of ‖Ax‖‖y‖, "
            f"beyond the tolerance {tolerance:.0e}; adjoint=None takes it from a differentiable forward"
        )
    return operator


def _transpose(forward: Callable[[Any], Any], image_shape: tuple[int, ...], batched: bool) -> Callable[[Any], Any]:
    """The transpose of a linear function by autograd."""

    def adjoint(y: Tensor) -> Tensor:
        zeros = y.new_zeros(*y.shape[:1], *image_shape) if batched else y.new_zeros(image_shape)
        return torch.func.vjp(forward, zeros)[1](y)[0]

    return adjoint


def _check_linear(operator: ForwardOperator, tolerance: float) -> None:
    """An error where A(x + 2z) differs from A(x) + 2A(z), or is not finite, or always zero."""
    generator = torch.Generator().manual_seed(0)
    x, z = torch.rand(2, operator.num_pixels, generator=generator, dtype=torch.float64).to(
        operator.device, operator.dtype
    )
    with torch.no_grad():
        ax, az, both = (operator._product(v.unsqueeze(0)) for v in (x, z, x + 2 * z))
    if not bool(torch.isfinite(both).all()):
        raise ValueError("forward: its result for a finite image is NaN or infinite")
    if not bool(both.any()):
        raise ValueError("forward: its result for a positive image is zero everywhere")
    error = float((both - ax - 2 * az).norm() / both.norm())
    if error > tolerance:
        raise ValueError(
            f"forward: is not linear: A(x + 2z) and A(x) + 2A(z) differ by {error:.1e}, beyond the tolerance "
            f"{tolerance:.0e}; a constant part belongs to the data"
        )


def from_deepinv(
    physics: Any,
    image_shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    tolerance: float = _TOLERANCE,
) -> ForwardOperator:
    """A forward operator of a linear ``deepinv.physics`` object, by its ``A`` and ``A_adjoint``.

    :param physics: for instance ``deepinv.physics.Tomography(..., adjoint_via_backprop=True)``: an adjoint that is only
        nearly one is refused, as in :func:`from_callables`. Its noise model is not used.
    :param image_shape: (C, H, W), or (H, W) for one channel.
    :param dtype: what the physics runs in.
    :param device: where it runs.
    :param tolerance: largest relative mismatch of the adjoint.
    :raises TypeError: no ``A`` and ``A_adjoint``.
    :raises ValueError: as :func:`from_callables`.

    Measurements have the shape that the physics gives them, without the batch dimension (and without a channel
    dimension of 1 where the image has none).
    """
    if not (callable(getattr(physics, "A", None)) and callable(getattr(physics, "A_adjoint", None))):
        raise TypeError(f"physics: expected a linear physics with A and A_adjoint, got {type(physics).__name__}")
    shape = tuple(image_shape)
    channels = (1,) if len(shape) == 2 else ()
    with torch.no_grad():
        measured = tuple(physics.A(torch.zeros(1, *channels, *shape, dtype=dtype, device=device)).shape[1:])
    squeezed = channels and len(measured) > 1 and measured[0] == 1
    return from_callables(
        lambda x: physics.A(x.reshape(len(x), *channels, *shape)).flatten(1, 2 if squeezed else 1),
        lambda y: physics.A_adjoint(y.reshape(len(y), *measured)).reshape(len(y), *shape),
        shape,
        measured[1:] if squeezed else measured,
        batched=True,
        dtype=dtype,
        device=device,
        tolerance=tolerance,
    )


def from_astra(projector: Any) -> ForwardOperator:
    """A forward operator of an ASTRA projector in two dimensions.

    :param projector: the number that ``astra.create_projector`` gave, or an ``astra.OpTomo`` of it.
    :raises ImportError: without the package ``astra-toolbox``.
    :raises TypeError: neither of the two.

    The matrix of a CPU projector is copied, with its exact transpose, and ASTRA is not needed afterwards; images have
    the orientation of :class:`~ntkgp.inverse.geometry.Geometry`. A CUDA projector stays and is called for each image;
    its transpose is tested to be one.
    """
    astra = optional("astra", "astra-toolbox")
    if isinstance(projector, int):
        projector = astra.OpTomo(projector)
    if not all(hasattr(projector, name) for name in ("proj_id", "vshape", "sshape")):
        raise TypeError(f"projector: expected a projector's number or an astra.OpTomo, got {type(projector).__name__}")
    image_shape, data_shape = tuple(projector.vshape), tuple(projector.sshape)
    if astra.projector.is_cuda(projector.proj_id):
        return from_callables(
            projector.FP, projector.BP, image_shape, data_shape, numpy=True, dtype=torch.float32
        )  # fmt: skip
    matrix = astra.projector.matrix(projector.proj_id)
    try:
        return from_matrix(astra.matrix.get(matrix), image_shape, data_shape)
    finally:
        astra.matrix.delete(matrix)


def to_cuqi(operator: ForwardOperator) -> Any:
    """A ``cuqi.model.LinearModel`` with the products of a forward operator, for the samplers of CUQIpy.

    :param operator: any forward operator; it runs in float64.
    :raises ImportError: without the package ``cuqipy``.

    Two-dimensional images and measurements get CUQIpy's ``Image2D`` geometry, others a plain one.
    """
    geometry, model = optional("cuqi.geometry", "cuqipy"), optional("cuqi.model", "cuqipy")

    def described(shape: tuple[int, ...]) -> Any:
        return geometry.Image2D(shape) if len(shape) == 2 else geometry.Continuous1D(math.prod(shape))

    def through(product: Callable[[Tensor], Tensor], vector: Any) -> np.ndarray:
        row = torch.as_tensor(np.asarray(vector, dtype=np.float64)).reshape(1, -1).to(operator.device)
        with torch.no_grad():
            return product(row)[0].cpu().numpy()

    return model.LinearModel(
        lambda x: through(operator._product, x),
        lambda y: through(operator._adjoint_product, y),
        range_geometry=described(operator.data_shape),
        domain_geometry=described(operator.image_shape),
    )
