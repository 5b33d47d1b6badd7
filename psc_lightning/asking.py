"""What a tensor's entries decide, asked of many tensors at once: on a device each answer is a wait for all that runs there.

A *question* is a generator that yields a tensor of one number, and is sent the number. On the CPU reading costs nothing, and
each question is answered to its end before the next begins. Those of a device go side by side: all that they ask is read
together, so that a step over many tensors waits as often as one over a single tensor.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["Question", "answer", "answers", "read"]

T = TypeVar("T")
Question = Generator[Tensor, Any, T]


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
    waiting: list[tuple[int, Question[T], Tensor]] = []

    def go_on(index: int, question: Question[T], number: Any) -> None:
        try:
            asked = question.send(number)
            while asked.device.type == "cpu":
                asked = question.send(asked.item())
            waiting.append((index, question, asked))
        except StopIteration as end:
            done[index] = end.value

    for index, question in enumerate(questions):
        go_on(index, question, None)
    while waiting:
        asked, numbers = list(waiting), read([number for _, _, number in waiting])
        waiting.clear()
        for (index, question, _), number in zip(asked, numbers, strict=True):
            go_on(index, question, number)
    return [done[index] for index in sorted(done)]


def answer(question: Question[T]) -> T:
    """What one comes to."""
    return answers([question])[0]
