"""One share of zeros for all tensors together, or the same for each."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

__all__ = ["SCOPES", "shares"]

SCOPES = ("layer", "global", "auto")
_HALF = 0.5  # zeros, up to which each tensor can spare its share


def shares(shapes: Sequence[Sequence[int]], threshold: float, scope: str = "layer") -> list[float]:
    """The share of zeros of each tensor.

    `layer`: `threshold` of each. `global`: of all of them together; a tensor of axes d₁, d₂, … keeps ``ε · Σ dᵢ`` of its
    ``Π dᵢ`` entries, at most all, with one ε for all: so a first convolution of 144 weights keeps them, and the large tensors
    pay for it. `auto`: `layer` up to half of them zero, `global` above.

    Args:
        shapes: of the tensors.
        threshold: share of the entries that are zero, 0 ≤ threshold < 1.
        scope: `layer`, `global` or `auto`.

    >>> [round(share, 3) for share in shares([(4, 4), (32, 32)], 0.9, "global")]
    [0.278, 0.91]
    >>> shares([(4, 4), (32, 32)], 0.9), shares([(4, 4), (32, 32)], 0.5, "auto")
    ([0.9, 0.9], [0.5, 0.5])

    Source: Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity"
    (Erdős-Rényi graphs); Evci et al. 2020, "Rigging the lottery", §3 (with a kernel's axes).
    """
    if scope == "layer" or threshold <= (_HALF if scope == "auto" else 0):
        return [threshold] * len(shapes)
    sizes, sums = [prod(shape) for shape in shapes], [sum(shape) for shape in shapes]
    left = (1 - threshold) * sum(sizes)
    kept = [0.0] * len(shapes)
    free = set(range(len(shapes)))
    while free:
        each = left / max(1, sum(sums[i] for i in free))
        full = {i for i in free if each * sums[i] >= sizes[i]}
        for i in full or free:
            kept[i] = min(each * sums[i], float(sizes[i]))
        left -= sum(sizes[i] for i in full)
        free = free - full if full else set()
    return [max(0.0, 1 - k / size) if size else threshold for k, size in zip(kept, sizes, strict=True)]
