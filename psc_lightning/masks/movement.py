"""Movement mask: the weights that the labels push towards zero become zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from psc_lightning.masks.base import Mask
from psc_lightning.numerics.asking import Question
from psc_lightning.numerics.functional import give_gradient, zero_count
from psc_lightning.numerics.selection import choose, magnitudes, mark_largest, numbers
from psc_lightning.numerics.strips import blank_

__all__ = ["MovementMask"]

_LAST = -(2.0**100)  # the score of what has been pruned before: a weight of zero has no gradient to raise it


def _largest(weights: Tensor, scores: Tensor | None, zeros: int) -> Question[Tensor]:
    """All but the smallest in the order (score, |weight|, index); without scores by |weight|."""
    if zeros == 0 or zeros >= len(weights):
        return torch.full_like(weights, zeros == 0, dtype=torch.bool)
    if weights.device.type != "cpu":
        first = weights.abs() if scores is None else scores
        chosen = yield from choose(lambda: first[None], lambda: weights.abs()[None], zeros)
        return chosen[0]
    kept = torch.empty(len(weights), dtype=torch.bool)
    if scores is None:
        mark_largest(magnitudes(weights), None, zeros, kept.numpy())
    else:
        mark_largest(numbers(scores), magnitudes(weights), zeros, kept.numpy())
    return kept


class MovementMask(Mask):
    """score s is learned, ``s ← s - lr · g·w``; a share `threshold` of the weights, those of the lowest score, is zero.

    It grows where the loss moves w away from zero.
    Forward: ``w · m`` with m = 0 at the smallest s; s starts at 0 and ties fall back to |w|, so the first mask is the
    magnitude mask. Pseudo-gradient: ∂/∂w = g·m, ∂/∂s = g·w (straight through the top-k; a unit's is the sum).
    What is zero before the mask begins stays so: its score is the lowest.
    Rows without a gradient so far (words that fine-tuning has not seen) are masked by |w| among themselves, the same share.
    Stored: one bit a unit, entropy-coded. The scores are training state only.

    Args, shapes: see `Mask`. The scores are stepped by the plugin's own AdamW (`score_lr`, no decay).

    >>> mask = MovementMask((1, 4), threshold=0.5)
    >>> w = torch.tensor([[1.0, -4.0, 2.0, 3.0]])
    >>> mask.refresh(w)
    >>> mask.hard(w).tolist(), mask.pull(w, torch.tensor([[1.0, 1.0, -1.0, 2.0]])).tolist(), mask.scores.grad.tolist()
    ([[0.0, -4.0, 0.0, 3.0]], [[0.0, 1.0, 0.0, 2.0]], [[1.0, -4.0, -2.0, 6.0]])

    Source: Sanh et al. 2020, "Movement pruning", eq. 2-4 (hard variant); ours counts zeros exactly and breaks ties.
    """

    labels = "during"

    def __init__(self, shape: tuple[int, ...], **options: object) -> None:
        super().__init__(shape, **options)  # type: ignore[arg-type]  # Mask names and types them
        self.scores = nn.Parameter(torch.zeros(self.units.shape))

    def learned_scores(self) -> Tensor | None:
        """The scores, a matrix of units."""
        return self.scores

    @torch.no_grad()
    def observe(self, core: Tensor, gradient: Tensor) -> None:
        """One step of plain gradient descent on the scores, for use without an optimizer (one-shot)."""
        self.scores.sub_(self.units.mean(gradient * core))

    def _seen(self) -> Tensor:
        """Which rows have had a gradient."""
        if self.scores.device.type != "cpu":
            return ((self.scores != 0) & (self.scores != _LAST)).any(1)
        first = self.scores[:, 0]
        seen = (first != 0) & (first != _LAST)  # few rows need more than a glance
        rest = (~seen).nonzero().flatten()
        if len(rest):
            others = self.scores.index_select(0, rest)
            lowest = others.amin(1)  # `any` takes three times as long
            if bool((lowest == _LAST).any()):
                others = others.masked_fill(others == _LAST, 0.0)
                lowest = others.amin(1)
            seen[rest] = (others.amax(1) != 0) | (lowest != 0)
        return seen

    def refreshing(self, core: Tensor, strength: float = 1.0) -> Question[None]:
        """Choose which entries are zero now; `strength` scales the share."""
        (rows, columns), number = self.units.shape, 0
        if self.threshold and self.group == "tensor":
            seen = self._seen()
            number = yield seen.sum()
        if number in (0, rows):
            yield from super().refreshing(core, strength)
            return
        share = self.threshold * strength
        zeros = zero_count(share, rows * columns)
        # The same share of both, and the exact number in all.
        of_seen = min(max(zeros - round(share * (rows - number) * columns), 0), number * columns)
        if (yield self.scores.amin()) == _LAST:  # but none is dropped in one for what is zero in the other
            held = (self.scores == _LAST).sum(1)
            most, least = zeros - int(held[~seen].sum()), int(held[seen].sum())
            of_seen = max(min(of_seen, most), min(least, zeros))
        weights = self.units.mean(core if self.units.granularity == "element" else core.abs())
        kept = torch.empty(rows, columns, dtype=torch.bool, device=core.device)
        for part, scores, count in ((seen, self.scores, of_seen), (~seen, None, zeros - of_seen)):
            places = part.nonzero().flatten()
            magnitude = weights.index_select(0, places).float().reshape(-1)
            score = None if scores is None else scores.index_select(0, places).reshape(-1)
            chosen = yield from _largest(magnitude, score, count)
            kept.index_copy_(0, places, chosen.reshape(-1, columns))
        self.keep.copy_(self.units.expand(kept))

    @torch.no_grad()
    def pull(self, core: Tensor, gradient: Tensor) -> Tensor:
        """The core's gradient; the scores get theirs, a unit's is the sum of its entries'."""
        give_gradient(self.scores, self.units.sum(gradient * core))
        return blank_(gradient, self.keep)

    @torch.no_grad()
    def hold_zeros(self, core: Tensor) -> float:
        """As every mask; their scores are the lowest."""
        strength = super().hold_zeros(core)
        if strength:
            self.scores.masked_fill_(self.units.mean(core.abs()) == 0, _LAST)
        return strength

    @torch.no_grad()
    def restart(self) -> None:
        """Start from no scores."""
        self.scores.zero_()

    def score(self, core: Tensor) -> Tensor:
        """The learned scores."""
        return self.scores
