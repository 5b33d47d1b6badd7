"""What a fit on a device leaves: the weights that the CPU would make, the file that the CPU would write."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from device.board import Board, Row
from device.fits import Losses, Window, built, fit, syncs
from lightning import Callback
from step.methods import METHODS, PLAIN, Method, levels, mask, sharing
from step.nets import Fit, Net, numbers
from torch import Tensor, nn

import psc_lightning
from psc_lightning import ActivationQuantization, ByteBudget, RatePenalty
from psc_lightning.levels import LEVELS
from psc_lightning.masks import MASKS
from psc_lightning.slots.live import compressed
from psc_lightning.tying import TYINGS

__all__ = ["measure"]

STEPS = 8
WATCHED = (3, 6)  # the steps whose waits are counted

CHOSEN: dict[str, Method] = {
    "plain": PLAIN,
    "row + magnitude + uniform": METHODS["row + magnitude 0.5 + uniform"],
    "cross_channel + movement + ternary": Method(
        lambda n: [sharing("cross_channel"), mask("movement"), levels("ternary")]
    ),
    "low_rank + movement + codebook": Method(
        lambda n: [sharing("low_rank"), mask("movement"), levels("codebook", k=16)]
    ),
    "separable + magnitude + log": Method(lambda n: [sharing("separable"), mask("magnitude"), levels("log")]),
    **{f"levels: {name}": Method(lambda net, name=name: [levels(name)]) for name in LEVELS},  # type: ignore[misc]
    **{f"mask: {name}": Method(lambda net, name=name: [mask(name)]) for name in MASKS},  # type: ignore[misc]
    **{f"tying: {name}": Method(lambda net, name=name: [sharing(name)]) for name in TYINGS},  # type: ignore[misc]
    "uniform, learned step": Method(lambda net: [levels("uniform", bits=4, learned_step=True)]),
    "uniform, inputs rounded": Method(
        lambda net: [levels("uniform", bits=7), ActivationQuantization(schedule="constant")]
    ),
    "uniform, rate penalty": Method(lambda net: [levels("uniform", bits=4), RatePenalty(weight=1e-6, every=2)]),
    "codebook by channel": Method(lambda net: [levels("codebook", k=4, group="channel")]),
    "uniform, log8 scales": Method(lambda net: [levels("uniform", bits=4, scales="log8")]),
    **{name: METHODS[name] for name in METHODS if "ramp" in name or name in ("clipping layer", "clipping agc")},
}
BUDGET = Method(lambda net: [levels("uniform", bits=6), ByteBudget("16kB")])  # the last row: it takes the longest
FIRST = ("separable + magnitude + log", "tying: separable", "clipping layer", "clipping agc")
IN_WORDS = ("plain", "levels: uniform", "levels: codebook", "mask: movement", "row + magnitude + uniform")
IN_PRECISIONS = ("levels: uniform", "levels: codebook", "low_rank + movement + codebook")
PRECISIONS = ("bf16-mixed", "16-mixed", "bf16-true")


def images() -> nn.Module:
    """Three convolutions, channels last, and a linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, 2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 16, 10)),
    ).to(memory_format=torch.channels_last)


class Words(nn.Module):
    """An embedding, an LSTM, whose weights lie in one flat buffer on a GPU, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.lstm, self.head = nn.Embedding(500, 64), nn.LSTM(64, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.lstm(self.rows(words))[0][:, -1])


NETS = {
    "images": Net("three convolutions", images, numbers(16, 3, 16, 16), adam=True),
    "words": Net(
        "embedding, LSTM",
        Words,
        lambda: [(torch.randint(0, 500, (16, 12)), torch.randint(0, 10, (16,))) for _ in range(2)],
        adam=True,
    ),
}


def apart(one: Tensor, other: Tensor) -> int:
    """How many entries have other bits."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return max(one.numel(), 1)
    bits = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return int((bits[0] != bits[1]).view(-1, one.element_size()).any(1).sum()) if one.numel() else 0


def states_apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """`equal`, or which tensors have other bits, and how many entries of them."""
    found = {name: apart(one[name], other[name]) for name in one if name in other}
    named = [f"{name}: {number} of {one[name].numel()}" for name, number in found.items() if number]
    missing = sorted(set(one) ^ set(other))
    return "; ".join(named[:3] + [f"only on one side: {missing[:3]}"] * bool(missing)) or "equal"


class Eye(Callback):
    """At the end of training, while all is on the device: the state, the file, and what the CPU makes of it."""

    def __init__(self, row: Row, path: Path) -> None:
        self.row, self.path = row, path
        self.state: dict[str, Tensor] = {}
        self.names: list[str] = []

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.state = {name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()}
        found = list(compressed(pl_module))
        self.names = [name for name, _, _ in found]
        self.row["tensors"] = len(found)
        if not found:
            return
        same: list[str] = []
        anew: list[str] = []
        for name, tensor, parameter in found:
            latent = tensor.dense(parameter)
            near, far = tensor.slots.twin().to("cpu"), tensor.slots.twin()
            if number := apart(near.make(latent.cpu()), parameter):
                same.append(f"{name} ({number} of {latent.numel()})")
            far.refresh(latent)
            near.refresh(latent.cpu())
            there, here = far.make(latent).cpu(), near.make(latent.cpu())
            if number := apart(there, here):
                off = float((there.float() - here.float()).abs().max() / here.float().abs().max())
                anew.append(f"{name} ({number} of {latent.numel()}, by {off:.1e} of the largest)")
        self.row["CPU's weight from the same latent and tables"] = "; ".join(same) or "equal"
        self.row["and with the tables computed anew on both"] = "; ".join(anew) or "equal"
        psc_lightning.save(pl_module, self.path)


def run(row: Row, net: Net, method: Method, board: Board, **options: Any) -> None:
    """One fit as users run it, then its model on the CPU and its file; two deterministic ones."""
    with tempfile.TemporaryDirectory() as folder:
        there, here = Path(folder) / "there.psc", Path(folder) / "here.psc"
        eye, losses, lines = Eye(row, there), Losses(), Counter[str]()
        watch = [eye, losses, Window(*WATCHED, lambda: syncs(lines, board.device))]
        model, batches = built(net, board.device)
        module = Fit(model, net.adam)
        fit(module, batches, STEPS, board.device, [*method.callbacks(model), *watch], stay=False, **options)
        row["loss, first and last"] = ", ".join(f"{loss:.3f}" for loss in losses.numbers()[:: STEPS - 1])
        row["addresses unchanged"] = len(losses.places) == 1
        row["syncs a step"] = round(sum(lines.values()) / (WATCHED[1] - WATCHED[0]), 1)
        row["syncs by line"] = dict(lines.most_common(12))
        state = module.state_dict()
        row["after the fit, on the CPU"] = states_apart(eye.state, state)
        if eye.names:
            psc_lightning.save(module, here)
            row["file from the device = from the CPU"] = there.read_bytes() == here.read_bytes()
            loaded = psc_lightning.load(there)
            row["load = live"] = states_apart(*({name: part[name] for name in eye.names} for part in (state, loaded)))
            with torch.device("cpu"):
                Fit(net.build(), net.adam).to(next(module.parameters()).dtype).load_state_dict(loaded)
    states = []
    for _ in range(2):
        model, batches = built(net, board.device)
        keep = State()
        fit(
            Fit(model, net.adam),
            batches,
            STEPS,
            board.device,
            [*method.callbacks(model), keep],
            deterministic=True,
            **options,
        )
        states.append(keep.state)
    row["two deterministic runs"] = states_apart(*states)


class State(Callback):
    """The state at the end of training."""

    state: dict[str, Tensor]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.state = {name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()}


def measure(board: Board) -> None:
    chosen = [name for name in CHOSEN if board.all or name in FIRST][: 4 if board.small else None]
    for name in chosen:
        board.row(name, lambda row, name=name: run(row, NETS["images"], CHOSEN[name], board))  # type: ignore[misc]
    for name in IN_WORDS[-1:] if board.small else IN_WORDS:
        board.row(f"LSTM, {name}", lambda row, name=name: run(row, NETS["words"], CHOSEN[name], board))  # type: ignore[misc]
    for precision in PRECISIONS[:1] if board.small else PRECISIONS:
        for name in IN_PRECISIONS:

            def fill(row: Row, name: str = name, precision: str = precision) -> None:
                run(row, NETS["images"], CHOSEN[name], board, precision=precision)

            board.row(f"{precision}, {name}", fill)
    if not board.small:
        board.row("uniform, byte budget", lambda row: run(row, NETS["images"], BUDGET, board))
