"""What many tensors need alike, done for all at once: on a device each number read is a wait, each small operation a launch.

A *question* is a generator. It yields a tensor of one number, and is sent the number; or it yields a task, and goes on when
that is done. On the CPU neither costs more than its work, and each question is answered to its end before the next begins.
Those of a device go side by side: what they ask is read together, and tasks of a kind are done together, so that a step over
many tensors waits as often as one over a single tensor.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

__all__ = ["Copy", "Question", "Task", "answer", "answers", "read"]

T = TypeVar("T")


class Task(Protocol):
    """Something to do."""

    @property
    def device(self) -> torch.device:
        """Where."""

    def do(self) -> None:
        """Do it."""

    @staticmethod
    def do_all(tasks: list[Any]) -> None:
        """Do many of the kind, in few operations."""


Question = Generator[Tensor | Task, Any, T]


@dataclass(frozen=True)
class Copy:
    """Write one tensor into another of its shape."""

    source: Tensor
    into: Tensor

    @property
    def device(self) -> torch.device:
        """Where it is written."""
        return self.into.device

    def do(self) -> None:
        """Do it."""
        self.into.copy_(self.source)

    @staticmethod
    def do_all(tasks: list[Copy]) -> None:
        """All at once."""
        torch._foreach_copy_([task.into for task in tasks], [task.source for task in tasks])


def read(numbers: list[Tensor]) -> list[Any]:
    """Tensors of one number each, as Python's; one wait for each device and type.

    >>> read([torch.tensor(2), torch.tensor(True), torch.tensor(0.5)])
    [2, True, 0.5]
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, number in enumerate(numbers):
        kinds.setdefault((number.device, number.dtype), []).append(index)
    found: dict[int, Any] = {}
    for places in kinds.values():
        found |= zip(places, torch.stack([numbers[place].reshape(()) for place in places]).cpu().tolist())
    return [found[index] for index in range(len(numbers))]


@torch.no_grad()
def answers(questions: Iterable[Question[T]]) -> list[T]:
    """What these questions come to, in their order.

    >>> def larger(x: Tensor) -> Question[str]:
    ...     return "large" if (yield x.sum() > 1) else "small"
    >>> answers([larger(torch.ones(3)), larger(torch.zeros(3))])
    ['large', 'small']
    """
    done: dict[int, T] = {}
    waiting: list[tuple[int, Question[T], Tensor | Task]] = []

    def go_on(index: int, question: Question[T], number: Any) -> None:
        try:
            asked = question.send(number)
            while asked.device.type == "cpu":
                if isinstance(asked, Tensor):
                    asked = question.send(asked.item())
                else:
                    asked.do()
                    asked = next(question)
            waiting.append((index, question, asked))
        except StopIteration as end:
            done[index] = end.value

    for index, question in enumerate(questions):
        go_on(index, question, None)
    while waiting:
        now = list(waiting)
        waiting.clear()
        numbers: dict[int, Tensor] = {}
        tasks: dict[type[Task], list[Task]] = {}
        for index, _, asked in now:
            if isinstance(asked, Tensor):
                numbers[index] = asked
            else:
                tasks.setdefault(type(asked), []).append(asked)
        for kind, those in tasks.items():
            kind.do_all(those)
        found = dict(zip(numbers, read(list(numbers.values()))))
        for index, question, _ in now:
            go_on(index, question, found.get(index))
    return [done[index] for index in sorted(done)]


def answer(question: Question[T]) -> T:
    """What one comes to."""
    return answers([question])[0]
