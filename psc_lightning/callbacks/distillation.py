"""A teacher beside the labels."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from psc_lightning.checkpoint import read_tensors
from psc_lightning.copies import copied
from psc_lightning.options import positive, share
from psc_lightning.slots.live import detach
from psc_lightning.words import hinting

__all__ = ["Distillation"]

Match = Callable[[Tensor, Tensor], Tensor]


class Distillation(Callback):
    """Lets a teacher's outputs pull on the network's, without a change to the user's loss.

    At a module's output z of training batches, with t the teacher's output for the same inputs, the gradient becomes

        (1 - weight) · ∂loss/∂z + weight · ∂/∂z T² · KL(softmax(t/T) || softmax(z/T)),

    the mean over the batch (over all positions but the class axis, which is the last). So the loss that is logged stays the
    user's. It pays where a network is made very small (recipes/results/NOTES.md: half the validation loss in 1,400 bytes).

    Args:
        teacher: None: the network as it is when training starts, before anything is compressed; else a module that takes
            the same inputs, or a checkpoint's path, whose weights the network's own class takes.
        temperature: T > 0.
        weight: share of the pull that is the teacher's, 0 ≤ weight < 1.
        output: name of the submodule whose output is matched; "" is the LightningModule itself, which works where its
            training step calls `self(x)`.
        match: another distance of two outputs, the network's first, as a scalar; None: the one above.

    Raises:
        ValueError: a wrong value (the argument is named); before training, no such submodule; in the first batch, an output
            that is no tensor.

    >>> Distillation(temperature=2.0, output="net").weight
    0.5

    Source: Hinton et al. 2015, "Distilling the knowledge in a neural network", section 2; here by the gradient at the output.
    """

    @hinting
    def __init__(
        self,
        teacher: nn.Module | str | os.PathLike[str] | None = None,
        temperature: float = 2.0,
        weight: float = 0.5,
        output: str = "",
        match: Match | None = None,
    ) -> None:
        super().__init__()
        if not positive("temperature", temperature) > 0:
            raise ValueError(f"temperature: expected a number > 0, found {temperature!r}")
        self.teacher, self.temperature, self.weight = teacher, float(temperature), share("weight", weight)
        self.output, self.match = output, match
        self._copy: nn.Module | None = None  # that teaches
        self._restored: dict[str, Tensor] | None = None
        self._scale = 1.0
        self._hooks: list[Any] = []
        self._inner: list[bool] = []  # of the calls that are under way, whether they are the network's own

    # ------------------------------------------------------------------------------------------------ the teacher

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the teacher up, and listen to the network's output."""
        try:
            student = pl_module.get_submodule(self.output)
        except AttributeError:
            names = [name for name, _ in pl_module.named_children()]
            raise ValueError(f"output: no submodule {self.output!r}; there are {', '.join(names)}, …") from None
        teacher = self.teacher if isinstance(self.teacher, nn.Module) else _plain_copy(student)
        if isinstance(self.teacher, str | os.PathLike):
            whole = _plain_copy(pl_module)
            whole.load_state_dict(read_tensors(Path(self.teacher).expanduser()))
            teacher = whole.get_submodule(self.output)
        if self._restored is not None:
            teacher.load_state_dict(self._restored)
        self._copy = teacher.to(pl_module.device).eval().requires_grad_(False)
        self._hooks = [
            student.register_forward_pre_hook(self._enter),
            student.register_forward_hook(self._see, with_kwargs=True),
        ]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take what the loss will be multiplied by before its gradient is taken."""
        self._inner = []
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._scale = 1.0 if scaler is None else float(scaler.get_scale())
        if pl_module.automatic_optimization:
            self._scale /= trainer.accumulate_grad_batches

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook. Strategies of several processes call the training step by the module's `forward`."""
        self._inner.append("_ForwardRedirection" not in getattr(module.forward, "__qualname__", ""))

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook: from here the gradient at this output has the teacher's part."""
        inner = self._inner.pop()
        if not inner or not torch.is_grad_enabled() or self._copy is None:
            return
        if not isinstance(output, Tensor):
            raise ValueError(
                f"output: {self.output or 'the module'} gives a {type(output).__name__}, not a tensor of logits"
            )
        if not output.requires_grad:
            return
        with torch.no_grad():
            target = self._copy(*args, **kwargs)
        scale = self._scale

        def pull(gradient: Tensor) -> Tensor:
            with torch.enable_grad():
                own = output.detach().float().requires_grad_()
                (found,) = torch.autograd.grad(self._distance(own, target.float()), own)
            return (1 - self.weight) * gradient + self.weight * scale * found.to(gradient.dtype)

        output.register_hook(pull)  # type: ignore[no-untyped-call]  # torch's

    def _distance(self, own: Tensor, target: Tensor) -> Tensor:
        if self.match is not None:
            return self.match(own, target)
        soft = F.log_softmax(target / self.temperature, -1)
        mine = F.log_softmax(own / self.temperature, -1)
        each = F.kl_div(mine, soft, reduction="none", log_target=True).sum(-1)
        return self.temperature**2 * each.mean()

    # ------------------------------------------------------------------------------------------------ its end

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the teacher."""
        self._forget()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Forget the teacher."""
        self._forget()

    def _forget(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._inner = [], []
        self._copy = self._restored = None

    def state_dict(self) -> dict[str, Any]:
        """The teacher's weights, where it is the network's start: a resumed run starts from others."""
        if self.teacher is not None or self._copy is None:
            return {}
        return {"teacher": dict(self._copy.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put them back."""
        self._restored = state_dict.get("teacher")


def _plain_copy(module: nn.Module) -> nn.Module:
    """As it is now, without slots."""
    return detach(copied(module))
