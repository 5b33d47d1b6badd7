"""Processes that start from this one: what they learned is in this one's model afterwards, or they refuse to begin."""

from __future__ import annotations

import pytest
import torch
from training import Net, differences


@pytest.fixture(scope="module")
def runs(trained):
    """Runs in two processes, and alone."""
    return trained("spawn_script", "2")


@pytest.mark.parametrize("name", ["ternary_movement", "separable_lsq"])
def test_the_model_comes_back_with_its_slots(runs, name):
    """Both processes see the same batches, so that the file is that of one process, byte for byte."""
    assert (runs / f"2-{name}.psc").read_bytes() == (runs / f"1-{name}.psc").read_bytes()


@pytest.mark.parametrize("name", ["ternary_movement", "separable_lsq"])
def test_latent_weights_come_back_beside_the_hard_ones(runs, name):
    """So that training can go on; the model's own state is the plain one."""
    two, one = (torch.load(runs / f"{devices}-{name}.pt", weights_only=True) for devices in (2, 1))
    assert list(two["model"]) == list(Net().state_dict())
    assert differences(two["model"], one["model"]) == []
    assert len(two["latents"]) == 3
    assert differences(two["latents"], one["latents"]) == []
    assert not torch.equal(two["latents"]["net.3.weight"], two["model"]["net.3.weight"])


@pytest.mark.parametrize("name", ["ternary_movement", "separable_lsq"])
def test_ranges_of_inputs_come_back(runs, name):
    two, one = (torch.load(runs / f"{devices}-{name}.pt", weights_only=True)["ranges"] for devices in (2, 1))
    assert [bool(two[f"net.{layer}.begun"]) for layer in (0, 3, 7)] == [True, True, True]
    assert differences(two, one) == []


def test_a_model_without_slots_is_refused(runs):
    assert (
        "call psc_lightning.attach(model, callbacks) before fit, or use strategy='ddp'"
        in (runs / "refused").read_text()
    )
