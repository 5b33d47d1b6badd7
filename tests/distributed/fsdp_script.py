"""Trains under FSDP2 with two gloo processes, or alone, and writes what came out."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from ddp_script import NAMES, Keep, Nets, Shares, beside, slot_callbacks, trainer
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from training import INPUTS, LABELS, Loader, conductor, latents, layers

import psc_lightning
from psc_lightning import GradientClipping, MaskLearning, StraightThroughQuantization
from psc_lightning.artifact import to_bytes
from psc_lightning.sharding import gather

torch.set_num_threads(1)

RESUMED = ("ternary_movement", "saliency", "separable_lsq", "deep")
LIMITS = {
    "global": {"max_norm": 0.1},
    "layer": {"max_norm": 0.1, "scope": "layer"},
    "weight": {"max_norm": 0.1, "scope": "weight"},
    "value": {"max_value": 0.01},
    "adaptive": {"adaptive": 0.01},
}


class Sharded(Nets):
    """One layer of each network is a unit of its own, the others are one together, whole after a forward pass."""

    def configure_model(self) -> None:
        for net in self.nets.values():
            fully_shard(net[3])
            fully_shard(net)


def fsdp(whole: bool = True) -> dict[str, Any]:
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=not whole, process_group_backend="gloo")
    return {"devices": 2, "strategy": strategy}


def state_of(model: LightningModule, made: Trainer) -> dict[str, Any]:
    """All that a run leaves, whole on every rank."""
    state: dict[str, Any] = {key: gather(value.detach()).clone() for key, value in model.state_dict().items()}
    state |= beside(model)
    for index, slot in enumerate(made.optimizers[0].state.values()):
        state |= {f"optimizer.{index}.{key}": gather(value) for key, value in slot.items()}
    clipping = [callback.state_dict() for callback in made.callbacks if isinstance(callback, GradientClipping)]
    ours: dict[str, Any] = {}
    conductor(made).on_save_checkpoint(made, model, ours)
    return {**state, "ours": ours, "clipping": clipping, "step": made.global_step}


def end(model: LightningModule, made: Trainer, folder: Path, run: str, **more: Any) -> None:
    name = f"{run}-{made.global_rank}"
    report = psc_lightning.save(model, folder / f"{name}.psc")
    torch.save({"state": state_of(model, made), "bytes": report.file_bytes, **more}, folder / f"{name}.pt")


def alike(model: Nets, folder: Path, **options: Any) -> None:
    """Each process sees the same batches, so that a mean over processes changes no bit."""
    seed_everything(0, verbose=False)
    made = trainer(slot_callbacks(NAMES), **options)
    made.fit(model, Loader(), Loader(count=1))
    end(model, made, folder, "alike")


def halves(model: Nets, folder: Path, run: str, saves: int, resumes: str | None = None, **options: Any) -> None:
    """Each process sees its half of a batch; gradients are clipped; a checkpoint is saved after `saves` steps."""
    seed_everything(0, verbose=False)
    keep = Keep(folder / f"{run}.ckpt", saves)
    made = trainer([*slot_callbacks(RESUMED), GradientClipping(max_norm=1.0), keep], **options)
    data = [Shares(made.global_rank, made.world_size) for _ in range(2)]
    made.fit(model, *data, ckpt_path=None if resumes is None else folder / f"{resumes}.ckpt")
    end(model, made, folder, run, norms=keep.norms)


def clipped() -> dict[str, Any]:
    """What each kind of limit does to sharded gradients, one of them plain, and to the same gradients whole."""
    found = {}
    for name, limit in LIMITS.items():
        nets = []
        for shards in (False, True):
            torch.manual_seed(0)
            net = nn.Sequential(layers()[0], nn.ReLU(), nn.ConvTranspose2d(8, 6, 3), nn.Flatten(), nn.Linear(384, 4))
            if shards:
                for layer in (net[0], net[2]):
                    fully_shard(layer)
            nn.functional.cross_entropy(net(INPUTS), LABELS).backward()
            norms = GradientClipping(**limit).clip(net, net.parameters())
            nets.append((norms, [gather(parameter.grad) for parameter in net.parameters()]))
        found[name] = nets
    return found


class Built(LightningModule):
    """Builds its layers in `configure_model` and shards them there: attached to before, or after, or along their rows."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "rows":
            self.net = layers()

    def configure_model(self) -> None:
        if self.how == "rows":
            parallelize_module(self.net, init_device_mesh("cpu", (2,)), {"7": ColwiseParallel()})
        elif not hasattr(self, "net"):
            torch.manual_seed(0)
            self.net = layers()
            if self.how == "attached":
                psc_lightning.attach(self, self.trainer.callbacks)
            fully_shard(self.net)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02)


def asked(model: nn.Module, *callbacks: Any, **options: Any) -> str:
    """What training says before it starts."""
    try:
        trainer(callbacks, limit_val_batches=0, **fsdp(), **options).fit(model, Loader())
    except ValueError as error:
        return str(error)
    return "trained"


def answers(folder: Path) -> dict[str, str]:
    mask, levels = MaskLearning("movement", schedule="constant"), StraightThroughQuantization("codebook")
    unseen, attached, half = Built("unseen"), Built("attached"), Built("unseen")
    found = {"unseen": asked(unseen, mask), "attached": asked(attached, mask)}
    found["same"] = to_bytes(unseen)[0] == to_bytes(attached)[0]
    found["rows"] = asked(Built("rows"), MaskLearning("magnitude"))
    found["half"] = asked(half, mask, levels, precision="bf16-true")
    found["types"] = sorted({str(latent.dtype) for latent in latents(half).values()})
    found["levels"] = [row.levels for row in to_bytes(half)[1].tensors if row.method == "movement+codebook"]
    found["second"] = asked(attached, mask, levels)
    for name, action in {
        "detach": lambda: psc_lightning.detach(attached),
        "load_into": lambda: psc_lightning.load_into(attached, folder / "alike-0.psc"),
        "save": lambda: psc_lightning.save(attached, folder / "missing" / "model.psc"),
    }.items():
        try:
            action()
        except (OSError, ValueError) as error:
            found[name] = str(error)
    return found


def main(devices: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    folder /= str(devices)
    folder.mkdir(exist_ok=True)
    if devices == 1:
        alike(Nets(NAMES), folder, devices=1)
        halves(Nets(RESUMED), folder, "one", saves=6, devices=1)
        return
    alike(Sharded(NAMES), folder, **fsdp())
    halves(Sharded(RESUMED), folder, "straight", saves=6, **fsdp())
    halves(Sharded(RESUMED), folder, "from_whole", saves=9, resumes="straight", **fsdp(whole=False))
    halves(Sharded(RESUMED), folder, "from_shards", saves=12, resumes="from_whole", **fsdp(whole=False))
    for name, options in {"accumulated": {"accumulate_grad_batches": 2}, "mixed": {"precision": "bf16-mixed"}}.items():
        halves(Sharded(RESUMED), folder, name, saves=3, **options, **fsdp())
        ddp = DDPStrategy(process_group_backend="gloo")
        halves(Nets(RESUMED), folder, f"{name}_ddp", saves=3, devices=2, strategy=ddp, **options)
    ddp = DDPStrategy(process_group_backend="gloo")
    halves(Nets(RESUMED), folder, "ddp", saves=6, devices=2, strategy=ddp)
    rank = torch.distributed.get_rank()
    torch.save(clipped(), folder / f"clipped-{rank}.pt")
    torch.save(answers(folder), folder / f"answers-{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
