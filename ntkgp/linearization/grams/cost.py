r"""What each order of summation costs, and which is the cheapest.

With N₁, N₂ samples, K₁, K₂ outputs of each, T positions, fan-in I, fan-out O, r channel groups, and h = ½ for a
symmetric block (1 otherwise), in multiply-adds counted as two flops:

=========  ================================================================  ================================
way        flops                                                             numbers written on the way
=========  ================================================================  ================================
product    h·2·N₁N₂·(I + K₁K₂O + K₁K₂)·r                        (T = 1)      h·N₁N₂·K₁K₂·r
rows       2·(N₁K₁ + N₂K₂)·T·O·I·r + h·2·N₁N₂·K₁K₂·O·I·r                     2·(N₁K₁ + N₂K₂)·O·I·r
positions  h·2·N₁N₂·(T²·I + T²·K₂·O + T·K₁K₂·O)·r                            h·N₁N₂·T·K₂·(O + K₁)·r
=========  ================================================================  ================================

(*rows* of a symmetric block forms one side only.) Flops are turned into seconds by the share of the matrix-product
ceiling that each kind of product reaches, and numbers by the memory traffic they cause; both were measured on two
machines' worth of cores in float32 and float64 and are in units of the ceiling, so no machine constant enters but
``_FLOPS_PER_NUMBER``. `Novak et al. 2022 <https://arxiv.org/abs/2206.08720>`_, "Fast Finite Width Neural Tangent
Kernel", compare such orders for the whole network; here every layer chooses for itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from ntkgp.linearization.grams.plan import Shape

# Flops of a large matrix product in the time in which one number is written and read again.
_FLOPS_PER_NUMBER = 24.0
# Flops in the time that one call takes.
_FLOPS_PER_CALL = 4e5


@dataclass(frozen=True)
class Cost:
    """Cost of one slot for one block.

    :param flops: multiply-adds times two.
    :param numbers: numbers that are written and read again.
    :param effort: flops of a large matrix product that take as long.
    """

    flops: float
    numbers: float
    effort: float


@dataclass(frozen=True)
class Block:
    """Sizes of a block: samples and outputs of both sides.

    :param share: h, the share of the block that is computed; for a symmetric one rows up to the end of their strip.
    """

    n1: int
    n2: int
    k1: int
    k2: int
    symmetric: bool
    share: float = 1.0

    @classmethod
    def of(cls, n1: int, n2: int, k1: int, k2: int, symmetric: bool) -> Block:
        """A block as it is computed: half of a symmetric one, and its diagonal."""
        return cls(n1, n2, k1, k2, symmetric, 0.5 * (1 + 1 / max(n1, 1)) if symmetric else 1.0)


def ways(shape: Shape, block: Block, bias: bool = False) -> dict[str, Cost]:
    """Cost of every way that is open to a slot of factors or rows.

    :param bias: a bias goes with the weight as one more input.
    """
    pairs = block.share * block.n1 * block.n2
    r, o, t = shape.blocks, shape.fan_out, shape.positions
    i = shape.fan_in + int(bias)
    outputs = block.k1 * block.k2
    formed = block.n1 * block.k1 + (0 if block.symmetric else block.n2 * block.k2)
    entries = min(shape.fan_in, t * (block.n1 + block.n2)) if shape.kind == "lookup" else i
    width = o * entries * r
    found = {"rows": _rows(shape, formed, width, pairs * outputs)}
    if shape.kind == "outer" and t == 1:
        numbers = pairs * outputs * r
        flops = 2 * pairs * (i + outputs * o + outputs) * r
        found["product"] = Cost(flops, numbers, flops / 0.8 + _FLOPS_PER_NUMBER * numbers + _FLOPS_PER_CALL)
    if shape.kind != "rows" and t > 1:
        numbers = pairs * t * block.k2 * (o + block.k1) * r
        first, last = 2 * pairs * t * t * (block.k2 * o) * r, 2 * pairs * t * outputs * o * r
        seen = 0 if shape.kind == "lookup" else 2 * pairs * t * t * i * r
        effort = seen / 0.8 + first / _thin(t) + last / _thin(block.k1) + _FLOPS_PER_NUMBER * numbers
        calls = r * max(1.0, numbers / 2**22)
        found["positions"] = Cost(seen + first + last, numbers, effort + calls * _FLOPS_PER_CALL)
    return found


def _rows(shape: Shape, formed: float, width: float, entries: float) -> Cost:
    making = 0.0 if shape.kind == "rows" else 2 * formed * shape.positions * width
    product = 2 * entries * width
    numbers = formed * width
    effort = making / 0.5 + product / 0.85 + _FLOPS_PER_NUMBER * numbers + _FLOPS_PER_CALL
    return Cost(making + product, numbers, effort)


def _thin(inner: float) -> float:
    """Share of the ceiling that products with a short side reach."""
    return inner / (inner + 12.0)


def choose(shape: Shape, block: Block, bias: bool = False) -> str:
    """The way with the least effort."""
    found = ways(shape, block, bias)
    return min(found, key=lambda way: found[way].effort)
