"""Gram blocks written into strips of symmetric storage."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkgp.linearization.symmetric import SymmetricGrams


class PackedWriter:
    """Hands out room for one group's block at a time, and copies it into strips when the next is asked for.

    :param stack: where the strips are.
    :param outputs: K, rows of the matrices per input.
    :param dtype: in which blocks are summed.
    """

    def __init__(self, stack: SymmetricGrams, outputs: int, dtype: torch.dtype) -> None:
        self._stack, self._outputs, self._dtype = stack, outputs, dtype
        self._place: tuple[int, slice, slice] | None = None
        self._buffer: Tensor | None = None

    def start(self) -> None:
        """Forget a block that was not finished."""
        self._place = None

    def __call__(self, g: int, rows: slice, columns: slice) -> Tensor:
        """Room for the block of a group, zero when it is first asked for."""
        place, k = (g, rows, columns), self._outputs
        shape = (rows.stop - rows.start) * k, (columns.stop - columns.start) * k
        if place != self._place:
            self.flush()
            if self._buffer is None or self._buffer.shape != shape:
                self._buffer = torch.zeros(shape, dtype=self._dtype, device=self._stack.device)
            else:
                self._buffer.zero_()
            self._place = place
        assert self._buffer is not None
        return self._buffer

    def flush(self) -> None:
        """Copy the present block into its strips."""
        if self._place is None or self._buffer is None:
            return
        g, rows, columns = self._place
        k = self._outputs
        first, last, left, right = rows.start * k, rows.stop * k, columns.start * k, columns.stop * k
        for i, (a, b) in enumerate(self._stack.bounds):
            top, bottom, end = max(a, first), min(b, last), min(b, right)
            if top < bottom and left < end:
                part = self._buffer[top - first : bottom - first, : end - left]
                self._stack.strip(g, i)[top - a : bottom - a, left:end] = part
        self._place = None
