"""A process that saves over a good file while another one kills it, or while its disk is full. Run by a test.

    python interrupted.py killed FOLDER ROUNDS SEED
    python interrupted.py full FOLDER

torch is imported once; each round is a process of its own, forked from here.
"""

from __future__ import annotations

import os
import random
import resource
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from models import bag

from psc_lightning.artifact import save


def models() -> list[torch.nn.Module]:
    """Two networks whose files have different lengths, each a few disk blocks long."""
    noise = torch.Generator().manual_seed(0)
    return [bag({"weight": torch.randn(size, generator=noise)}) for size in (6_000, 10_000)]


def child(work: Callable[[int], None]) -> tuple[int, int]:
    """A forked process that works; its number, and where it reports its progress."""
    out, into = os.pipe()
    number = os.fork()
    if number == 0:
        os.close(out)
        work(into)
        os._exit(0)
    os.close(into)
    return number, out


def killed(folder: Path, rounds: int, seed: int) -> None:
    """Kill a process that saves again and again; print what then lies under the final name, and how it was left."""
    choice = random.Random(seed)
    path = folder / "model.psc"
    networks = models()
    good = []
    for network in networks:
        save(network, path)
        good.append(path.read_bytes())

    def work(into: int) -> None:
        while True:
            for network in networks:
                save(network, path)
                os.write(into, b".")

    for at in range(rounds):
        number, out = child(work)
        saves = choice.randrange(1, 4)
        for _ in range(saves):
            assert os.read(out, 1) == b"."
        if at % 2:  # in the middle of a write, which is the shorter part of a save
            before = set(os.listdir(folder))
            while not set(os.listdir(folder)) - before and not select.select([out], [], [], 0)[0]:
                pass
        for _ in range(choice.randrange(20_000)):
            pass
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        os.close(out)
        print("whole" if path.read_bytes() in good else "broken")


def full(folder: Path) -> None:
    """Save where only small files find room; print the error."""
    path = folder / "model.psc"
    first, second = models()
    save(first, path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        save(second, path)
    except OSError as error:
        print(error)


if __name__ == "__main__":
    how, where, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    if how == "killed":
        killed(Path(where), *map(int, rest))
    else:
        full(Path(where))
