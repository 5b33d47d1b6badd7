"""Image classification data, kept in memory as tensors and served in whole batches.

A batch is one indexing operation, so that a small network is not loader-bound on two cores. The order of an epoch and the
augmentation of a batch depend on seed, epoch and batch number alone: a resumed epoch goes on with the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from psc_lightning.options import one_of, positive, whole

__all__ = ["AUGMENTATIONS", "Epochs", "ImageData", "Images", "Loader", "Splits"]


class Splits(NamedTuple):
    """uint8 images (count, channels, height, width) and int64 labels, for training and for the final test."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Draw(NamedTuple):
    """The samples of one batch, and the seed of what happens to them."""

    indices: Tensor
    seed: int


class Epochs(Sampler[Draw]):
    """The batches of each epoch; shuffled by (seed, epoch); able to start in mid-epoch.

    Args:
        samples: how many there are, 1 or more.
        batch_size: samples in a batch; the last one may be smaller.
        seed: None keeps the order of the data.
        rank: which share of each epoch, 0 … world-1.
        world: into how many equal shares each epoch is dealt.
    """

    def __init__(self, samples: int, batch_size: int, seed: int | None, rank: int = 0, world: int = 1) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.world = rank, world
        self.epoch = 0
        self.position = 0  # batches handed out in this epoch
        self.trained = (0, 0)  # an epoch, and how many of its batches were trained on before an interruption

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (Lightning calls this)."""
        self.epoch = epoch

    def __len__(self) -> int:
        share = self.samples // self.world
        return -(-share // self.batch_size)

    def __iter__(self) -> Iterator[Draw]:
        # One generator gives the order, then a seed for each batch, so that leaving batches out changes no other.
        generator = torch.Generator().manual_seed((self.seed or 0) * 1_000_003 + self.epoch)
        order = torch.arange(self.samples)
        if self.seed is not None:
            order = torch.randperm(self.samples, generator=generator)
        order = order[self.rank : self.samples // self.world * self.world : self.world]
        seeds = torch.randint(2**62, (len(self), self.world), generator=generator)[:, self.rank].tolist()
        skip = self.trained[1] if self.trained[0] == self.epoch else 0
        for number, (indices, seed) in enumerate(zip(torch.split(order, self.batch_size), seeds, strict=True)):
            if number >= skip:
                self.position = number + 1
                yield Draw(indices, seed)


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images normalised by channel, a batch at a time.

    Args:
        images: uint8 (count, channels, height, width).
        labels: int64 (count,).
        mean: of each channel, in 0 … 1.
        std: of each channel, above 0.
        augment: what happens to a training image, a key of `AUGMENTATIONS`.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: list[float], std: list[float], augment: str) -> None:
        self.images, self.labels = images, labels
        self.mean = torch.tensor(mean).view(1, -1, 1, 1)
        self.std = torch.tensor(std).view(1, -1, 1, 1)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        images = self.images[draw.indices]
        images = AUGMENTATIONS[self.augment](images, torch.Generator().manual_seed(draw.seed))
        return (images.float() / 255 - self.mean) / self.std, self.labels[draw.indices]


def crop_and_flip(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Return each image shifted by up to `padding` pixels (black comes in), and mirrored with probability 1/2.

    Shapes:
        (count, channels, height, width) -> the same
    """
    count, _, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, count), generator=generator).tolist()
    flip = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    padded = F.pad(images, (padding,) * 4)
    cut = torch.stack([image[:, t : t + height, k : k + width] for image, t, k in zip(padded, top, left, strict=True)])
    return torch.where(flip, cut.flip(3), cut)


def warp(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return each image turned by up to 9°, sheared and scaled by up to 10 %, and shifted by up to 4 % of its size.

    Shapes:
        (count, channels, height, width) uint8 -> the same, float32
    """
    turn, shear, scale, left, top = torch.rand(5, len(images), generator=generator).sub_(0.5).unbind()
    angle, scale = 0.3 * turn, 1 + 0.2 * scale
    rows = torch.stack((angle.cos() * scale, 0.2 * shear - angle.sin() * scale, 0.16 * left), 1)
    columns = torch.stack((angle.sin() * scale, angle.cos() * scale, 0.16 * top), 1)
    places = F.affine_grid(torch.stack((rows, columns), 1), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), places, align_corners=False)


#: what may happen to training images; `warp` suits signs that must not be mirrored
AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "none": lambda images, generator: images,
    "crop_and_flip": crop_and_flip,
    "warp": warp,
}


class Loader(DataLoader[tuple[Tensor, Tensor]]):
    """A DataLoader whose position in the epoch goes into Lightning's checkpoints."""

    def __init__(self, images: Images, epochs: Epochs) -> None:
        # batch_size=None: the sampler draws whole batches. The generator keeps iterating from using torch's global one.
        super().__init__(images, batch_size=None, sampler=epochs, generator=torch.Generator())
        self.epochs = epochs

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, and how many of its batches were handed out."""
        return {"epoch": self.epochs.epoch, "position": self.epochs.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Leave these batches out of that epoch."""
        self.epochs.trained = (state["epoch"], state["position"])


class ImageData(LightningDataModule):
    """Training, validation and test images. Validation images are training images that are not trained on.

    Args:
        source: gives the data, from `folder` if there is one (see `sources`); called once.
        folder: of the data's files.
        mean: of each channel, in 0 … 1.
        std: of each channel, above 0.
        batch_size: training samples per step.
        eval_batch_size: validation and test samples per forward.
        validation: share of the training images, 0 ≤ validation < 1; above 0, at least one. The same images for every seed.
        augment: what happens to training images: none, crop_and_flip (up to 4 pixels aside, mirrored or not) or warp
            (turned, sheared, scaled and shifted a little).
        seed: of order and augmentation.

    Raises:
        ValueError: an argument is of another type or out of range; in `setup`: the images have other channels.
    """

    def __init__(
        self,
        source: Callable[..., Splits],
        mean: list[float],
        std: list[float],
        folder: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 500,
        validation: float = 0.1,
        augment: str = "none",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if positive("validation", validation) >= 1:
            raise ValueError(f"validation: expected a number below 1, found {validation}")
        for name, values in (("mean", mean), ("std", std)):
            if not isinstance(values, list) or not [positive(name, value) for value in values]:
                raise ValueError(f"{name}: expected a number for each channel, found {values!r}")
        if 0 in std:
            raise ValueError(f"std: expected numbers above 0, found {std}")
        self.source = source
        self.folder = folder
        self.mean, self.std = mean, std
        self.batch_size = whole("batch_size", batch_size, 1)
        self.eval_batch_size = whole("eval_batch_size", eval_batch_size, 1)
        self.validation = validation
        self.augment = one_of("augment", augment, AUGMENTATIONS)
        self.seed = seed
        self.splits: Splits | None = None

    def setup(self, stage: str) -> None:
        """Read the data, and set the validation images aside."""
        if self.splits is None:
            self.splits = self.source() if self.folder is None else self.source(self.folder)
            count, channels = self.splits.train_images.shape[:2]
            if not len(self.mean) == len(self.std) == channels:
                raise ValueError(f"data: mean={self.mean}, std={self.std}, but the images have {channels} channels")
            order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
            held = max(1, int(count * self.validation)) if self.validation else 0
            self.validation_indices, self.train_indices = order[:held], order[held:]

    def train_dataloader(self) -> Loader:
        """Return shuffled, augmented training batches; each process of a distributed run gets its share."""
        assert self.splits is not None
        chosen = self.train_indices
        images = self.splits.train_images[chosen], self.splits.train_labels[chosen]
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        epochs = Epochs(len(chosen), self.batch_size, self.seed, rank, world)
        return Loader(Images(*images, self.mean, self.std, self.augment), epochs)

    def val_dataloader(self) -> Loader | list[Loader]:
        """Return validation batches in a fixed order; with no validation images, no loader."""
        assert self.splits is not None
        chosen = self.validation_indices
        if not len(chosen):
            return []
        return self._in_order(self.splits.train_images[chosen], self.splits.train_labels[chosen])

    def test_dataloader(self) -> Loader:
        """Return test batches in a fixed order."""
        assert self.splits is not None
        return self._in_order(self.splits.test_images, self.splits.test_labels)

    def _in_order(self, images: Tensor, labels: Tensor) -> Loader:
        data = Images(images, labels, self.mean, self.std, augment="none")
        return Loader(data, Epochs(len(labels), self.eval_batch_size, seed=None))
