"""DDP with two gloo processes: ranks agree bit for bit, a late start needs no `find_unused_parameters`, a resume is exact."""

from __future__ import annotations

import pytest
import torch
from training import differences


@pytest.fixture(scope="module")
def runs(trained):
    """One run in two processes and one alone."""
    return trained("ddp_script")


def read(path):
    return torch.load(path, weights_only=True)


def test_ranks_agree_bit_for_bit(runs):
    first, second = read(runs / "2-0.pt"), read(runs / "2-1.pt")
    assert first["steps"] == 12
    assert differences(first, second) == []
    strengths = [value for key, value in first.items() if key.endswith(":strength")]
    assert len(strengths) == 3 * 12
    assert all(strength.max() == 1 for strength in strengths)
    assert len([key for key in first if key.endswith(":latent")]) == 3 * 12


def test_two_processes_are_one_with_the_double_batch(runs):
    """To 1e-5 in all that is trained or chosen, after a late start."""
    two, one = read(runs / "2-double-0.pt"), read(runs / "1-double-0.pt")
    assert one["steps"] == 12
    assert one["nets.of_deep.3.weight"].dtype == torch.float64
    assert list(two) == list(one)
    far = [
        key for key, value in one.items() if not torch.allclose(two[key].double(), value.double(), rtol=1e-5, atol=1e-5)
    ]
    # The range of a batch's inputs is no mean of those of its halves.
    assert [key for key in far if not key.startswith("nets.of_integers")] == []


def test_labels_and_clusters_are_those_of_all_processes(runs):
    """Gradients are reduced before they are looked at, and centroids begin from weights that are the same."""
    first = read(runs / "2-0.pt")
    totals = [value for key, value in first.items() if key.endswith(".total")]
    centroids = [value for key, value in first.items() if key.endswith(".centroids")]
    assert len(totals) == 3 * 3  # saliency twice, and the labels of cross_channel
    assert len(centroids) == 2 * 3
    assert all(value.any() for value in totals + centroids)


def test_ranges_of_inputs_are_means_over_the_processes(runs):
    """Each has seen other samples, and rounds as the other does (the ranks agree)."""
    ranges = {key: value for key, value in read(runs / "2-1.pt").items() if ":inputs." in key and key.endswith(".high")}
    assert len(ranges) == 3 + 2
    assert all(value.any() for value in ranges.values())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_resumed_run_ends_where_the_straight_one_did(runs, rank):
    assert differences(read(runs / f"2-{rank}.pt"), read(runs / f"2-resumed-{rank}.pt")) == []


def test_rank_zero_saves_the_file(runs):
    assert (runs / "2-0.psc").read_bytes() == (runs / "2-resumed-0.psc").read_bytes()
    assert not list(runs.glob("2*-1.psc"))


def test_the_checkpoint_is_plain(runs):
    keys = [key for key in read(runs / "2-0.pt") if key.startswith("nets.") and ":" not in key]
    assert len(keys) == 6 * 12
    assert list(read(runs / "2.ckpt")["state_dict"]) == keys
