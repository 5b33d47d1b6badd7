"""FSDP2 with two gloo processes: the bits of DDP, sharded; what cannot work says so before training."""

from __future__ import annotations

import pytest
import torch
from training import differences

import psc_lightning


@pytest.fixture(scope="module")
def runs(trained):
    """All runs in two processes, and those to compare with alone."""
    return trained("fsdp_script")


def read(path):
    return torch.load(path, weights_only=False)  # the tests' own


RUNS = ("alike", "accumulated", "mixed", "straight", "from_whole", "from_shards", "clipped", "answers")


@pytest.mark.parametrize("run", RUNS)
def test_ranks_agree_bit_for_bit(runs, run):
    """Weights, latent weights, thresholds, centroids, labels, factors, and what the plugin's own optimizer remembers."""
    assert differences(read(runs / f"2/{run}-0.pt"), read(runs / f"2/{run}-1.pt")) == []


def test_the_file_is_that_of_one_process(runs):
    """Byte for byte, every method: where both processes see the same batches, the mean of two equal gradients is exact."""
    two, one = runs / "2/alike-0.psc", runs / "1/alike-0.psc"
    assert two.read_bytes() == one.read_bytes()
    assert read(runs / "2/alike-0.pt")["bytes"] == read(runs / "2/alike-1.pt")["bytes"] == two.stat().st_size
    state = read(runs / "2/alike-0.pt")["state"]
    assert [key for key, value in state.items() if key.endswith(":strength") and value.max() < 1] == []


def test_everything_learns(runs):
    """Weights and sidecars get gradients: neither stays where it began."""
    state = read(runs / "2/alike-0.pt")["state"]
    learned = [value for key, value in state.items() if key.endswith((".scores", ".centroids", ".step", ".u", ".p"))]
    assert len(learned) > 15
    assert all(value.any() for value in learned)
    begun = [key.removesuffix(":latent") for key in state if key.endswith(":latent")]
    assert len(begun) == 3 * 12
    assert not any(torch.equal(state[key], state[f"{key}:latent"]) for key in begun if "of_low_rank" not in key)
    moved = [value for key, value in state.items() if key.startswith("optimizer.") and "momentum" in key]
    assert all(value.any() for value in moved)


def test_halves_of_a_batch_train_as_under_ddp(runs):
    """Bit for bit, clipped by a norm over all shards; one process with the whole batch adds in another order: to 1e-5."""
    fsdp, ddp, one = (read(runs / name) for name in ("2/straight-0.pt", "2/ddp-0.pt", "1/one-0.pt"))
    assert differences(fsdp, ddp) == []
    assert (runs / "2/straight-0.psc").read_bytes() == (runs / "2/ddp-0.psc").read_bytes()
    assert max(fsdp["norms"]) > 1
    torch.testing.assert_close(torch.stack(fsdp["norms"]), torch.stack(one["norms"]), rtol=1e-5, atol=0)
    weights = psc_lightning.load(runs / "1/one-0.psc")
    for name, value in psc_lightning.load(runs / "2/straight-0.psc").items():
        torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=1e-5)


def test_mixed_precision_is_that_of_ddp(runs):
    fsdp, ddp = (read(runs / f"2/{name}-0.pt") for name in ("mixed", "mixed_ddp"))
    assert differences(fsdp["state"], ddp["state"]) == []
    assert (runs / "2/mixed-0.psc").read_bytes() == (runs / "2/mixed_ddp-0.psc").read_bytes()


def test_accumulated_steps_are_those_of_ddp(runs):
    """FSDP2 adds over processes first, DDP over batches: to rounding."""
    fsdp, ddp = (read(runs / f"2/{name}-0.pt")["state"] for name in ("accumulated", "accumulated_ddp"))
    assert fsdp["step"] == ddp["step"] == 6
    weights = psc_lightning.load(runs / "2/accumulated_ddp-0.psc")
    for name, value in psc_lightning.load(runs / "2/accumulated-0.psc").items():
        torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("run", ["from_whole", "from_shards"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_resumed_run_ends_where_the_straight_one_did(runs, run, rank):
    """From one file saved in the ramp, and from a folder of shards saved by the run that the file had resumed."""
    straight, resumed = (read(runs / f"2/{name}-{rank}.pt")["state"] for name in ("straight", run))
    assert differences(straight, resumed) == []
    assert (runs / "2/straight.ckpt").is_file()
    assert (runs / "2/from_whole.ckpt").is_dir()


def test_rank_zero_saves_the_file(runs):
    assert (runs / "2/straight-0.psc").read_bytes() == (runs / "2/from_shards-0.psc").read_bytes()
    assert not list(runs.glob("2/*-1.psc"))


@pytest.mark.parametrize("limit", ["global", "layer", "weight", "value", "adaptive"])
def test_clipping_cuts_shards_as_it_cuts_whole_gradients(runs, limit):
    (norms, whole), (sharded_norms, sharded) = read(runs / "2/clipped-0.pt")[limit]
    assert norms.clipped
    assert sharded_norms == pytest.approx(norms, rel=1e-6)
    for one, other in zip(whole, sharded, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-9)


def test_a_model_that_is_sharded_already_is_compressed(runs):
    """As one that was attached to before, to the byte; by a second callback later; in bfloat16."""
    answers = read(runs / "2/answers-0.pt")
    assert answers["attached"] == answers["unseen"] == answers["second"] == answers["half"] == "trained"
    assert answers["same"]
    assert answers["types"] == ["torch.bfloat16"]
    assert len(answers["levels"]) == 3
    assert max(answers["levels"]) <= 16 + 1  # and zero


def test_what_cannot_work_says_so(runs):
    answers = read(runs / "2/answers-0.pt")
    assert "net.7.weight is a shard even while its layer runs" in answers["rows"]
    assert "MaskLearning('magnitude')" in answers["rows"]
    assert "into a plain model" in answers["detach"]
    assert "before fully_shard" in answers["load_into"]
    assert "cannot write model.psc" in answers["save"]  # on every rank, though one writes
