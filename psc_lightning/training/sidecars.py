"""The one optimizer of what slots train beside the weights: scores, steps, centroids, factors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from psc_lightning.numerics.asking import read

__all__ = ["Sidecars"]


def _finite(gradients: list[Tensor]) -> bool:
    """Whether all entries are finite numbers: their sums tell, ten times as fast, unless one is too large itself."""
    return all(map(math.isfinite, read([gradient.sum() for gradient in gradients]))) or all(
        read([gradient.isfinite().all() for gradient in gradients])
    )


class Sidecars:
    """An AdamW without decay, a group for each slot callback; it steps those that have a gradient, exactly when asked.

    The user's optimizers keep the groups, the states and the schedule of the plain run.

    Args:
        groups: a learning rate and what it is for.
    """

    def __init__(self, groups: Sequence[tuple[float, Iterable[nn.Parameter]]]) -> None:
        found = [(lr, list(params)) for lr, params in groups]
        self.rates = [lr for lr, params in found if params]
        filled: list[dict[str, Any]] = [{"params": params, "lr": lr} for lr, params in found if params]
        # Fused it takes a third of the time; a mask's scores are as many as its weights.
        fused = all(p.device.type in ("cpu", "cuda") for group in filled for p in group["params"])
        self.optimizer = AdamW(filled, weight_decay=0.0, fused=fused) if filled else None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of them."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return [parameter for group in groups for parameter in group["params"]]

    def step(self, factor: float, scale: float = 1.0) -> None:
        """Take a step with the gradients that there are, unless one of them is not finite; then they are gone.

        Args:
            factor: the user's learning rate in units of the one that training started with.
            scale: what the gradients were multiplied by.
        """
        if self.optimizer is None:
            return
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if gradients and _finite(gradients):
            if scale != 1.0:
                torch._foreach_div_(gradients, scale)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def forget(self) -> None:
        """Leave out a step: the gradients are gone."""
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any] | None:
        """The optimizer's; None without one."""
        return self.optimizer.state_dict() if self.optimizer is not None else None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Put it back."""
        if self.optimizer is not None and state is not None:
            self.optimizer.load_state_dict(state)
