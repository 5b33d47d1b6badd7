"""The price of bytes: what it says, and how it pulls."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from training import QUIET, Net, Shown, fit, slots_at

from psc_lightning import RatePenalty, StraightThroughQuantization, WeightSharing, measure
from psc_lightning.callbacks.rate import Rate
from psc_lightning.levels import LEVELS
from psc_lightning.prices import Prices
from psc_lightning.slots.ladder import rungs_of

pytestmark = QUIET

AT_ONCE = {"kind": "constant"}


def sparse(*shape: int, full: float = 0.1) -> Tensor:
    """Positions among the levels -3 … 3, unevenly full."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(shape[0], *(1,) * (len(shape) - 1), generator=generator)
    size = torch.randint(1, 4, shape, generator=generator) * (torch.rand(shape, generator=generator) < 2 * full * rows)
    return size * (torch.randint(0, 2, shape, generator=generator) * 2 - 1).float()


@pytest.mark.parametrize("shape", [(40,), (1, 40), (30, 20), (12, 6, 3, 3), (8, 4, 5)])
def test_a_slope_is_the_price_of_the_next_rung(shape):
    """Moving one entry from 0 to 1, or from 1 to 2, changes the price by the slope between, where no floor holds."""
    position = sparse(*shape, full=0.3)
    prices = Prices.learn(position, top=3)
    index = (0,) * len(shape)
    for rung in (0, 1, 2):
        here, there = position.clone(), position.clone()
        here[index], there[index] = rung, rung + 1
        inside = position.clone()
        inside[index] = rung + 0.5
        rise = prices.bits(there) - prices.bits(here)
        slope = float(prices.slope(inside)[index])
        assert slope == pytest.approx(rise, abs=2e-2) or (rung > 0 and slope > rise)


def test_an_empty_row_is_dearer_than_a_full_one():
    position = torch.zeros(4, 32)
    position[0] = 1
    slope = Prices.learn(position, top=1).slope(torch.full((4, 32), 0.2))
    assert slope[0].max() < slope[1].min()
    assert (slope >= 0).all()


@pytest.mark.parametrize("full", [0.03, 0.1, 0.3])
def test_the_price_is_about_what_the_file_spends(full):
    model = nn.Sequential(nn.Linear(256, 200, bias=False))
    levels = StraightThroughQuantization("uniform", bits=3, group="tensor")
    model[0].weight.data = 0.01 * sparse(200, 256, full=full)
    levels.attach(model)[0].tensor.harden(model[0].weight)
    stored = measure(model, names=False).tensors[0].stored_bytes
    slots = slots_at(model, "0.weight")
    (core,) = rungs_of(slots, model[0].weight.detach())
    price = Prices.learn(core.position, core.top).bits(core.position) / 8
    assert price == pytest.approx(stored, rel=0.12)


@pytest.mark.parametrize("name", [name for name in LEVELS if name not in ("binary", "float16", "bfloat16")])
def test_a_rounded_position_is_the_code(name):
    generator = torch.Generator().manual_seed(1)
    core = torch.randn(6, 5, 3, 3, generator=generator)
    levels = LEVELS[name]((6, 5, 3, 3))
    levels.begin(core)
    levels.refresh(core)
    position, slope = levels.ladder(core)
    value, rung = levels.hard(core), position.round().clamp(-levels.rungs, levels.rungs)
    for row in range(6):  # the same rung, the same value; further up, a larger one
        pairs = sorted(set(zip(rung[row].flatten().tolist(), value[row].flatten().tolist())))
        assert len({one for one, _ in pairs}) == len(pairs)
        assert [level for _, level in pairs] == sorted(level for _, level in pairs)
    near = levels.ladder(core + 1e-2 * core.abs())[0]
    steady = (near - position) / (1e-2 * core.abs())
    assert torch.isclose(steady, slope.expand_as(steady), rtol=0.03).float().mean() > 0.9  # the others cross a kink


def test_prices_come_back_to_where_their_tensors_are():
    """A checkpoint is read on the CPU, whatever the weights are on."""
    state = {"bits": 8.0, "prices": {"a": {"core": Prices.learn(sparse(4, 4), top=3).state_dict()}}}
    rate = Rate()
    rate.load_state_dict([SimpleNamespace(name="a", parameter=torch.empty(4, 4, device="meta"))], state)
    assert {value.device.type for value in rate.prices["a"]["core"].state_dict().values()} == {"meta"}


def test_levels_that_follow_a_groups_scale_are_not_pulled_to_shrink_it():
    core = torch.tensor([[3.0, -1.0, 0.5, 0.1], [2.0, 2.0, -4.0, 0.0]])
    levels = LEVELS["ternary"]((2, 4), group="channel")
    pulled = levels.unscaled(core, torch.tensor([[1.0, -2.0, 3.0, 4.0], [0.5, 1.0, -1.0, 2.0]]))
    assert (pulled * core).sum(1).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    learned = LEVELS["uniform"]((2, 4), bits=3, learned_step=True)
    assert torch.equal(learned.unscaled(core, core), core)


class Linear(Net):
    """One matrix, plain gradient descent, and a look at what it steps."""

    def __init__(self, look):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(72, 4, bias=False))
        self.look = look

    def configure_optimizers(self):
        return Shown(self.parameters(), self.look)


def gradients(*callbacks, **options):
    found = []
    fit(callbacks, Linear(lambda o: found.append(o.param_groups[0]["params"][0].grad.clone())), max_epochs=1, **options)
    return found


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}])
def test_the_pull_is_weight_times_bits_times_slope(options):
    def levels():
        return StraightThroughQuantization("uniform", bits=3, group="tensor", learned_step=True, schedule=AT_ONCE)

    plain = gradients(levels(), **options)[0]
    pulled = gradients(levels(), RatePenalty(2.0), **options)[0]
    model = Linear(lambda optimizer: None)
    latent = model.net[1].weight.detach()
    own = LEVELS["uniform"]((4, 72), bits=3, group="tensor", learned_step=True)
    own.begin(latent)
    position, slope = own.ladder(latent)
    expected = 2.0 / 8000 * Prices.learn(position, 3).slope(position) * slope * latent.sign()
    assert torch.allclose(pulled - plain, expected, rtol=1e-3, atol=1e-7)
    assert expected.abs().max() > 1e-4


def test_the_dearer_the_bytes_the_smaller_the_file():
    sizes = []
    for weight in (0.0, 1.0, 10.0):
        levels = StraightThroughQuantization("uniform", bits=3, group="tensor", learned_step=True, schedule=AT_ONCE)
        model, _ = fit([levels, RatePenalty(weight)], Net("sgd"), max_epochs=4)
        sizes.append(measure(model).file_bytes)
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize(("tying", "options"), [("row", {}), ("low_rank", {"factor_lr": 0.01})])
def test_tied_weights_are_priced_as_their_cores(tying, options):
    def size(*more):
        levels = StraightThroughQuantization("uniform", bits=4, group="tensor", learned_step=True, schedule=AT_ONCE)
        return measure(
            fit([WeightSharing(tying, schedule=AT_ONCE, **options), levels, *more], Net("sgd"), max_epochs=4)[0]
        ).file_bytes

    assert size(RatePenalty(30.0)) < 0.95 * size()


@pytest.mark.parametrize("callbacks", [[], [StraightThroughQuantization("binary")], [WeightSharing("row")]])
def test_what_has_no_zero_is_refused(callbacks):
    with pytest.raises(ValueError, match="RatePenalty needs levels that have a zero, found"):
        fit([*callbacks, RatePenalty(0.1)], max_epochs=1)


@pytest.mark.parametrize(("arguments", "name"), [((-1.0,), "weight"), (("x",), "weight"), ((0.1, 0), "every")])
def test_wrong_values_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        RatePenalty(*arguments)
