"""What a report says of a run that went wrong, and what to try: sentences for `Report.notes`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["is_share", "main_metric", "notes_of", "predictions"]

_SHARES = ("acc", "top1", "top-1", "f1", "auroc", "precision", "recall")  # in a metric's name: 0 … 1, more is better
_POINTS = 0.05  # a fall that is said


def main_metric(metrics: Mapping[str, Any], chosen: str | None = None) -> str | None:
    """The metric that tables and plots show: the chosen one, else `accuracy`, else the first but for the loss.

    >>> main_metric({"loss": 1.0, "mae": 2.0}), main_metric({"mae": 2.0, "loss": 1.0}, "loss"), main_metric({})
    ('mae', 'loss', None)
    """
    names = [*metrics]
    return next(
        (name for name in (chosen, "accuracy", *(n for n in names if n != "loss"), *names) if name in names), None
    )


def is_share(metric: str) -> bool:
    """Whether a metric, by its name, is a share, of which more is better.

    >>> is_share("test/Accuracy"), is_share("loss")
    (True, False)
    """
    return any(part in metric.lower() for part in _SHARES)


@contextmanager
def predictions(model: nn.Module) -> Iterator[Counter[int]]:
    """Count, within it, how often each class gets the largest of the logits that the model gives: (batch, classes)."""
    counts: Counter[int] = Counter()

    def see(model: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1:
            counts.update(output.argmax(1).tolist())

    handle = model.register_forward_hook(see)
    try:
        yield counts
    finally:
        handle.remove()


def notes_of(
    metrics: Mapping[str, Mapping[str, float]], predicted: Mapping[int, int], tries: Sequence[str]
) -> list[str]:
    """What to say of a file whose metrics are more than 5 points below the dense start, or that predicts one class.

    Args:
        metrics: of the `dense` start and of the `compressed` file.
        predicted: how often the file predicts each class, where it names classes.
        tries: what may help, the likeliest first.

    >>> notes_of({"dense": {"accuracy": 0.99}, "compressed": {"accuracy": 0.9}}, {0: 5, 1: 5}, ["longer training"])
    ['accuracy of the file is 0.9, 9.0 points below the dense start (0.99); what may help: longer training']
    """
    help_ = f"; what may help: {', '.join(tries)}"
    dense, found = metrics["dense"], metrics["compressed"]
    shares = [name for name in found if name in dense and is_share(name)]
    notes = [
        f"{name} of the file is {found[name]:.4g}, {100 * (dense[name] - found[name]):.1f} points below the dense start "
        f"({dense[name]:.4g}){help_}"
        for name in shares
        if dense[name] - found[name] > _POINTS
    ]
    if shares and len(predicted) == 1:
        ((only, number),) = predicted.items()
        if number > 1:
            notes.insert(0, f"the file predicts one class, {only}, for all {number} test inputs{help_}")
    return notes
