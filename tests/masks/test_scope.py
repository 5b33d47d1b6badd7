"""One share of zeros for all tensors: small ones keep more, all together have the share."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from training import QUIET, Net, fit

from psc_lightning import MaskLearning, compress, measure, plan
from psc_lightning.numerics.functional import zero_count
from psc_lightning.numerics.shares import shares

pytestmark = QUIET

SHAPES = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=8)


def test_by_hand() -> None:
    """0.2 of 1,024 + 16 entries may stay: 208. 72 of them by ε = 208/72 = 2.89: 8 · 2.89 = 23.1 > 16, so the small one is
    full, and the large one keeps the other 192."""
    assert shares([(32, 32), (4, 4)], 0.8, "global") == [pytest.approx(1 - 192 / 1024), 0.0]
    assert shares([(32, 32), (4, 4)], 0.8, "layer") == [0.8, 0.8]


@pytest.mark.parametrize(("threshold", "scope"), [(0.3, "layer"), (0.5, "layer"), (0.6, "global"), (0.9, "global")])
def test_auto_is_global_where_small_layers_cannot_spare_their_share(threshold: float, scope: str) -> None:
    shapes = [(16, 1, 3, 3), (32, 16, 3, 3), (10, 64)]
    assert shares(shapes, threshold, "auto") == shares(shapes, threshold, scope)


@settings(deadline=None)
@given(SHAPES, st.floats(0, 0.99))
def test_all_together_have_the_share(shapes: list[list[int]], threshold: float) -> None:
    found, sizes = shares(shapes, threshold, "global"), [prod(shape) for shape in shapes]
    assert all(0 <= share < 1 for share in found)
    kept = sum((1 - share) * size for share, size in zip(found, sizes, strict=True))
    assert kept == pytest.approx((1 - threshold) * sum(sizes), rel=1e-6, abs=1e-6)


@given(st.floats(0, 0.99), st.integers(1, 30))
def test_tensors_alike_are_alike(threshold: float, number: int) -> None:
    assert shares([(8, 8)] * number, threshold, "global") == pytest.approx([threshold] * number)


def test_each_tensor_has_exactly_its_count() -> None:
    model, _ = fit([MaskLearning("magnitude", 0.9, scope="global", schedule="constant", min_size=1)])
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    shapes = [tuple(p.shape) for p in weights.values()]
    zeros = [int((p == 0).sum()) for p in weights.values()]
    assert zeros == [zero_count(share, p.numel()) for share, p in zip(shares(shapes, 0.9, "global"), weights.values())]
    assert sum(zeros) == pytest.approx(0.9 * sum(p.numel() for p in weights.values()), abs=len(zeros))


def test_compress_and_plan_know_it() -> None:
    torch.manual_seed(0)
    made = [nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)) for _ in range(2)]
    mask = MaskLearning("magnitude", 0.8, scope="global")
    promised = plan(made[0], [mask])
    compress(made[1], [mask])
    zeros = [float((layer.weight == 0).float().mean()) for layer in (made[1][0], made[1][2])]
    assert zeros[0] > 0.8 > zeros[1]
    rows = {row.name: row.sparsity for row in measure(made[1]).tensors}
    assert [rows["0.weight"], rows["2.weight"]] == pytest.approx(zeros, abs=1e-6)
    assert promised.report.file_bytes == pytest.approx(measure(made[1]).file_bytes, rel=0.05)


def test_a_resumed_run_has_the_same_shares(tmp_path) -> None:
    def mask() -> MaskLearning:
        return MaskLearning("magnitude", 0.8, scope="global", schedule="constant", min_size=1)

    _, first = fit([mask()], max_epochs=2)
    _, halfway = fit([mask()], max_epochs=1)
    halfway.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit([mask()], Net(), ckpt=tmp_path / "half.ckpt", max_epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(first.lightning_module.parameters(), resumed.parameters()))


def test_a_scope_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="scope"):
        MaskLearning("magnitude", 0.5, scope="network")
