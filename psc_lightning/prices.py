"""What entries cost in a file, and how that grows with their size: a model of the coder that has slopes.

An entry stands at u on the ladder of its levels: 0 is the level zero, ±1, ±2, … the next ones. A coder that knows how full
an entry's row and column are spends

    rung 0: log2(1 + 2^a) bits,  rung j: log2(1 + 2^-a) + c_j bits,  a = row + column + tensor,

where a is the log-odds that the entry is not zero (each context adds what it knows beyond the tensor's own share), and c_j
the bits of its size, by how many have that size, and of its sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["Prices"]

_MOST = 12.0  # log-odds are held within ± this: contexts are guesses, and a coder keeps a door open
_FLOOR = 0.25  # of the first rung's price: the least that a further one costs, so that large entries can return
_LEAST = 0.5  # bits, where a rung seems to cost nothing


@dataclass(frozen=True)
class Prices:
    """The coder's contexts of one core, as `learn` found them.

    Attributes:
        row: log-odds of each output, beside `tensor`: ``(O, 1, …)``.
        column: of each input and each kernel position: ``(1, I, *kernel)``.
        tensor: of all entries.
        sizes: bits of |u| = 1, 2, … and the sign: ``(M,)``.

    >>> u = torch.tensor([[0.1, -1.2, 0.9, 0.0], [0.2, 0.1, 0.0, 0.3]])
    >>> prices = Prices.learn(u, top=1)
    >>> round(prices.bits(u), 2)  # half of the first row's entries are not zero, none of the second's
    5.04
    >>> prices.slope(u)[:, 0].mul(100).round().tolist()  # in 1/100 bits a rung: dear in an empty row
    [194.0, 511.0]

    Source: ours; row and column odds combined as naive Bayes does. Rate terms from a coder's statistics: Oktay et al. 2020,
    "Scalable model compression by entropy penalized reparameterization".
    """

    row: Tensor
    column: Tensor
    tensor: Tensor
    sizes: Tensor

    @classmethod
    @torch.no_grad()
    def learn(cls, position: Tensor, top: int, keep: Tensor | None = None, value: float | None = None) -> Prices:
        """Count how full rows, columns and kernel positions are, and how often each size occurs.

        Args:
            position: where each entry of a core stands: ``(O, I, *kernel)`` or ``(N,)``.
            top: the highest rung.
            keep: which entries a mask keeps; None: all.
            value: bits of an entry that is not zero, where they are known; None: those of its size and its sign.
        """
        rung = position.float().round().abs_().clamp_(max=top)
        if keep is not None:
            rung.mul_(keep)
        full, axes = (rung > 0).float(), list(range(rung.dim()))
        tensor = _odds(full.mean(), full.numel())
        row, column = torch.zeros_like(tensor), torch.zeros_like(tensor)
        if rung.dim() > 1 and rung.shape[0] > 1:
            row = _odds(full.mean(axes[1:], keepdim=True), full[0].numel()) - tensor
            inputs = _odds(full.mean([0, *axes[2:]], keepdim=True), full.numel() // full.shape[1]) - tensor
            column = inputs
            if rung.dim() > 2:
                column = inputs + _odds(full.mean([0, 1], keepdim=True), full.shape[0] * full.shape[1]) - tensor
        counts = torch.bincount(rung.reshape(-1).long().cpu(), minlength=top + 1)[1:].float().to(rung.device) + 1
        sizes = 1 - (counts / counts.sum()).log2()
        return cls(row, column, tensor, sizes if value is None else torch.full_like(sizes, value))

    def _log_odds(self) -> Tensor:
        return (self.row + self.tensor + self.column).clamp_(-_MOST, _MOST)

    @torch.no_grad()
    def bits(self, position: Tensor, keep: Tensor | None = None) -> float:
        """What a core costs, its tables apart."""
        rung = position.float().round().abs_().clamp_(max=len(self.sizes))
        if keep is not None:
            rung.mul_(keep)
        full = rung > 0
        odds = self._log_odds().expand(rung.shape)
        two = torch.exp2(torch.where(full, -odds, odds))
        size = self.sizes.index_select(0, (rung.reshape(-1).long() - 1).clamp_(min=0)).reshape(rung.shape)
        return float(torch.log2(1 + two).sum() + torch.where(full, size, 0.0).sum())

    @torch.no_grad()
    def slope(self, position: Tensor) -> Tensor:
        """Bits a rung, at each entry: what it costs more one rung further from zero, at least a quarter of the first rung's.

        The first rung's slope holds from 0 to 1: an entry that is rounded to zero is drawn on, and stays there.
        """
        first = self._log_odds().neg_().add_(self.sizes[0]).clamp_min_(0.0)
        steps = torch.cat((self.sizes[:1], self.sizes.diff(), self.sizes.new_zeros(1)))
        rung = position.abs().clamp_(max=len(self.sizes))
        further = steps.index_select(0, rung.to(torch.int32).reshape(-1)).reshape(position.shape)
        torch.maximum(further, first.clamp_min(_LEAST).mul_(_FLOOR), out=further)
        return torch.where(rung < 1, first, further)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs."""
        return {one.name: getattr(self, one.name).clone() for one in fields(self)}

    @classmethod
    def of(cls, state: Mapping[str, Tensor], device: torch.device) -> Prices:
        """From `state_dict`."""
        return cls(**{name: value.to(device) for name, value in state.items()})


def _odds(share: Tensor, number: int) -> Tensor:
    """log2 of the odds of a share of so many, half an entry of either kind added."""
    return ((share * number + 0.5) / ((1 - share) * number + 0.5)).log2()
