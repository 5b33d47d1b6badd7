"""What others do to a step: each beside its own plain twin and, on the same layers, beside ours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelPruning
from step.methods import Method
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from psc_lightning import MaskLearning, StraightThroughQuantization

__all__ = ["PEERS"]


def linears(net: nn.Module) -> dict[str, nn.Linear]:
    """The layers that all of them can change: plain `Linear` ones, whose forward is called (an attention's is not)."""
    return {name: layer for name, layer in net.named_modules() if type(layer) is nn.Linear}


def targets(net: nn.Module) -> list[str]:
    return [f"net.{name}.weight" for name in linears(net)]  # as the LightningModule names them


class Rounded(nn.Module):
    """Straight-through 4 bit with a scale a row, as many write it by hand."""

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight.detach().abs().amax(1, keepdim=True) / 7
        rounded = torch.clamp(torch.round(weight / scale), -7, 7) * scale
        return weight + (rounded - weight).detach()


def by_hand(net: nn.Module) -> None:
    for layer in linears(net).values():
        register_parametrization(layer, "weight", Rounded())


def torchao(net: nn.Module, dtype: torch.dtype = torch.int4) -> None:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    config = QATConfig(weight_config=IntxFakeQuantizeConfig(dtype, granularity="per_channel"), step="prepare")
    quantize_(net, config, lambda layer, name: type(layer) is nn.Linear)


def brevitas(net: nn.Module) -> None:
    from brevitas.nn import QuantLinear

    for name, layer in linears(net).items():
        made = QuantLinear(layer.in_features, layer.out_features, bias=True, weight_bit_width=4)
        made.load_state_dict(layer.state_dict(), strict=False)
        net.set_submodule(name, made)


def pruning(net: nn.Module) -> list[Callback]:
    """Prunes at the end of the first epoch; from then on the weight is masked in each forward pass."""
    return [
        ModelPruning(
            "l1_unstructured",
            parameters_to_prune=[(layer, "weight") for layer in linears(net).values()],
            amount=0.5,
            use_global_unstructured=False,
            apply_pruning=lambda epoch: epoch == 0,
            use_lottery_ticket_hypothesis=False,
        )
    ]


def ours(make: Callable[[list[str]], Callback]) -> Method:
    return Method(lambda net: [make(targets(net))])


#: by name; those whose package is not installed are told
PEERS: dict[str, Method] = {
    "Lightning's ModelPruning, 0.5": Method(pruning, before=1),
    "ours: magnitude 0.5": ours(lambda t: MaskLearning("magnitude", 0.5, targets=t, schedule="constant")),
    "4 bit by hand (parametrization)": Method(change=by_hand),
    "torchao QAT, int4": Method(change=torchao),
    "brevitas QuantLinear, 4 bit": Method(change=brevitas),
    "ours: uniform 4 bit": ours(lambda t: StraightThroughQuantization("uniform", 4, targets=t, schedule="constant")),
}
