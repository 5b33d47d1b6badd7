"""`coarsest`: what is outside the slots is stored as coarsely as the loss of training batches allows, and no more so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from training import QUIET, Net, fit

import psc_lightning
from psc_lightning import ByteBudget, StraightThroughQuantization, coarsest, compress

pytestmark = QUIET


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4))
    for _ in range(20):
        net(torch.randn(16, 1, 5, 5))
    nn.init.uniform_(net[1].weight, 0.5, 2.0)
    nn.init.normal_(net[1].bias)
    return net.eval()


def batches(number: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 1, 5, 5, generator=generator) for _ in range(number)]


def energy(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def test_what_the_loss_does_not_feel_is_stored_coarsely_and_folded() -> None:
    net = network()
    compress(net, "binary", min_size=1)
    whole = psc_lightning.measure(net).file_bytes
    found = coarsest(net, batches(), lambda model, x: 1 + 1e-6 * energy(model, x))
    assert found.writing == {"leftovers": "log8", "fold_batchnorm": True}
    assert psc_lightning.measure(net, **found.writing).file_bytes < 0.6 * whole
    assert found.batches == 4
    assert found.loss == pytest.approx(found.exact)


def test_what_the_loss_feels_stays_exact() -> None:
    """A loss of how far the outputs are from the exact ones: any rounding at all is far more than 1 % of nothing."""
    net = network()
    compress(net, "binary", min_size=1)
    exact = copy.deepcopy(psc_lightning.detach(copy.deepcopy(net)))
    found = coarsest(net, batches(), lambda model, x: (model(x) - exact(x)).square().mean())
    assert found.writing == {"leftovers": "float32", "fold_batchnorm": False}
    assert found.loss == found.exact == 0


def test_the_loss_is_that_of_the_file(tmp_path) -> None:
    net = network()
    compress(net, "ternary", min_size=1)
    found = coarsest(net, batches(), energy, fold_batchnorm=False)
    assert found.writing["fold_batchnorm"] is False
    psc_lightning.save(net, tmp_path / "x.psc", **found.writing)
    plain = network(3)
    psc_lightning.load_into(plain, tmp_path / "x.psc")
    with torch.no_grad():
        losses = [float(energy(plain, x)) for x in batches()]
    assert found.loss == pytest.approx(sum(losses) / 4, rel=1e-12)
    assert found.loss <= found.exact * 1.01 + 0.25 * torch.tensor(losses).std() / 2


def test_what_is_given_is_kept_and_the_model_is_left_alone() -> None:
    net = network()
    compress(net, "binary", min_size=1)
    before, mode = copy.deepcopy(net.state_dict()), net.training
    assert coarsest(net, batches(), energy, leftovers="float16", fold_batchnorm=False).writing["leftovers"] == "float16"
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert net.training is mode


def test_levels_that_can_take_no_factor_are_not_folded() -> None:
    net = network()
    compress(net, "binary", min_size=1, group="tensor")
    found = coarsest(net, batches(), lambda model, x: 1 + 1e-6 * energy(model, x))
    assert found.writing == {"leftovers": "log8", "fold_batchnorm": False}


def test_numbers_beyond_float16_are_passed_over() -> None:
    net = network()
    compress(net, "binary", min_size=1)
    net[1].running_var[0] = 2.0**110
    found = coarsest(net, batches(), lambda model, x: 1 + 1e-6 * energy(model, x), fold_batchnorm=False)
    assert found.writing["leftovers"] == "float32"


def test_no_batches_is_an_error() -> None:
    with pytest.raises(ValueError, match="batches: expected one or more, found none"):
        coarsest(network(), [], energy)


def test_a_budget_says_how_it_was_steered() -> None:
    """`save(model, path, **budget.writing)` is the file that was steered for."""
    budget, net = ByteBudget(1100), Net()
    levels = StraightThroughQuantization("uniform", bits=3, learned_step=True, schedule={"kind": "constant"})
    fit([levels, budget], net)
    assert budget.writing == {"leftovers": "log8", "names": True, "fold_batchnorm": True}
    assert psc_lightning.measure(net, **budget.writing).file_bytes == budget.report.file_bytes
