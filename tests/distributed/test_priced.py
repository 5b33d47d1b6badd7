"""A price on bytes, and a budget, in two processes: ranks agree, shards train as whole weights do, a resume is exact."""

from __future__ import annotations

import pytest
import torch
from training import differences

PENALTIES = ("budget", "price")


@pytest.fixture(scope="module")
def runs(trained):
    return trained("priced_script", "2") / "2"


def read(runs, name, rank=0):
    return torch.load(runs / f"{name}-{rank}.pt", weights_only=True)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "resumed"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_ranks_agree_bit_for_bit(runs, penalty, strategy):
    first, second = (read(runs, f"{penalty}_{strategy}", rank) for rank in (0, 1))
    assert first["weight"] == second["weight"]
    assert first["rate"] == second["rate"]
    assert differences(first["state"], second["state"]) == []


@pytest.mark.parametrize("penalty", PENALTIES)
def test_shards_are_priced_as_whole_weights_are(runs, penalty):
    whole, shards = read(runs, f"{penalty}_ddp"), read(runs, f"{penalty}_fsdp")
    assert shards["weight"] == pytest.approx(whole["weight"], rel=1e-4)
    assert shards["rate"] == pytest.approx(whole["rate"], rel=1e-4)
    latents = [key for key in whole["state"] if key.endswith(":latent")]
    assert latents
    for key in latents:
        torch.testing.assert_close(shards["state"][key], whole["state"][key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_resumed_run_ends_where_the_straight_one_did(runs, penalty, rank):
    straight, resumed = (read(runs, f"{penalty}_{name}", rank) for name in ("fsdp", "resumed"))
    assert straight["weight"] == resumed["weight"]
    assert differences(straight["state"], resumed["state"]) == []


def test_the_price_moves_the_size(runs):
    """After the run the budget's price is not the first one, and the price alone has made bits fewer."""
    assert read(runs, "budget_ddp")["rate"] > 0
    assert read(runs, "budget_ddp")["bytes"] < 1.6 * 1300
