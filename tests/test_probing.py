"""`sensitivity`: what each tensor alone does to the loss; the model stays as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from psc_lightning import compress, sensitivity
from psc_lightning.report.numbers import Report


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 8))


BATCHES = [torch.randn(32, 16, generator=torch.Generator().manual_seed(n)) for n in range(3)]


def energy(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def test_it_is_what_compressing_that_tensor_alone_does() -> None:
    model = network()
    before, mode = copy.deepcopy(model.state_dict()), model.training
    found = sensitivity(model, BATCHES, energy)
    assert model.training is mode
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert {probe.tensor for probe in found.probes} == {"0.weight", "3.weight"}
    for setting, options in {"binary": {"levels": "binary"}, "4 bit": {"levels": "uniform", "bits": 4}}.items():
        (probe,) = [p for p in found.probes if (p.tensor, p.setting) == ("3.weight", setting)]
        alone = copy.deepcopy(model).eval()
        report: Report = compress(alone, targets=["3.weight"], **options)
        with torch.no_grad():
            expected = sum(float(energy(alone, x)) for x in BATCHES) / 3 - found.loss
        assert probe.rise == pytest.approx(expected, rel=1e-6)
        (row,) = [row for row in report.tensors if row.name == "3.weight"]
        assert probe.stored_bytes == pytest.approx(row.stored_bytes, abs=4)


def test_fewer_levels_cost_fewer_bytes_and_more_loss() -> None:
    model = network()
    targets = [model.eval()(x).detach() for x in BATCHES]
    found = sensitivity(
        model, list(zip(BATCHES, targets)), lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
    )
    assert found.loss == 0
    for tensor in ("0.weight", "3.weight"):
        of_it = {p.setting: p for p in found.probes if p.tensor == tensor}
        assert of_it["8 bit"].rise < of_it["4 bit"].rise < of_it["ternary"].rise
        assert of_it["8 bit"].stored_bytes > of_it["4 bit"].stored_bytes > of_it["ternary"].stored_bytes
    lines = str(found).splitlines()
    worst = max(found.probes, key=lambda probe: probe.rise).tensor
    assert lines[1].startswith(worst)
    assert lines[-1] == "loss 0, mean over 3 batches"


def test_settings_of_ones_own_and_a_picture(tmp_path) -> None:
    model = network()
    found = sensitivity(model, BATCHES, energy, {"half": {"mask": "magnitude", "threshold": 0.5}}, targets=["3"])
    assert [(p.tensor, p.setting) for p in found.probes] == [("3.weight", "half")]
    found.draw(tmp_path / "sensitivity.png")
    assert (tmp_path / "sensitivity.png").read_bytes()[:4] == b"\x89PNG"


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="batches: expected one or more"):
        sensitivity(network(), [], energy)
    with pytest.raises(ValueError, match="nothing"):
        sensitivity(network(), BATCHES, energy, targets=["nothing"])
    with pytest.raises(ValueError, match="bitz"):
        sensitivity(network(), BATCHES, energy, {"x": {"levels": "uniform", "bitz": 3}})
