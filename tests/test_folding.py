"""BatchNorm folded into scales: the same function, and the file holds the folded model bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from psc_lightning import StraightThroughQuantization, compress, fold_batchnorm, load, load_into, save
from psc_lightning.app.models import ResNet20
from psc_lightning.artifact import to_bytes
from psc_lightning.slots.live import compressed


def shaken(model: nn.Module) -> nn.Module:
    """In eval, with statistics as training leaves them: gains of both signs, one of them zero."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.normal_(generator=generator)
            module.bias.data.normal_(generator=generator)
            module.weight.data[0] = 0
    return model.eval()


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3, groups=2),
        nn.BatchNorm2d(6),
    ]
    return shaken(nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 36, 12, bias=False), nn.BatchNorm1d(12)))


PAIRS = {"0": "1", "3": "4", "6": "7"}


def inputs() -> torch.Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


METHODS = [
    ("binary", {}, 1e-3),
    ("ternary", {}, 1e-3),
    ("float", {}, 1e-3),
    ("float", {"bits": 1}, 1e-3),
    ("binary", {"form": "01"}, 5e-3),
    ("codebook", {"group": "channel", "k": 4}, 5e-3),
    ("binary", {"scales": "log8"}, 0.1),
    ("float", {"scales": "log8"}, 0.1),
    ("row", {}, 1e-3),
    ("cross_channel", {"groups": 2, "ignore": ["0.*"]}, 1e-3),
    ("low_rank", {}, 1e-3),
    ("separable", {"ignore": ["3.*"]}, 1e-3),
]


@pytest.mark.parametrize(("name", "options", "near"), METHODS, ids=lambda value: str(value))
def test_the_same_function_and_its_file(name, options, near, tmp_path, same_bits):
    model = net()
    compress(model, name, threshold=0.2, **options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    latent = {key: tensor.latent.clone() for key, tensor, _ in compressed(model)}
    expected = model(inputs())
    folded = fold_batchnorm(model, PAIRS)
    found = folded(inputs())
    assert float((found - expected).detach().abs().max() / expected.detach().abs().max()) < near
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # not touched
    assert all(torch.equal(tensor.latent, latent[key]) for key, tensor, _ in compressed(model))
    report = save(model, tmp_path / "model.psc", fold_batchnorm=PAIRS)
    plain = net()
    load_into(plain, tmp_path / "model.psc")
    assert torch.equal(plain(inputs()), found)
    held, expected_state = load(tmp_path / "model.psc"), dict(folded.state_dict())
    assert list(held) == list(expected_state)
    assert [key for key in held if not same_bits(held[key], expected_state[key])] == []
    assert report.file_bytes < to_bytes(model)[1].file_bytes
    for norm in (plain[1], plain[4], plain[7]):
        assert set(norm.weight.tolist()) <= {-1.0, 0.0, 1.0}
        assert not norm.running_mean.any()


def test_dense_layers_by_hand():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, eps=0.0)).eval()
    model[0].weight.data.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    model[0].bias.data.copy_(torch.tensor([1.0, -1.0]))
    model[1].weight.data.copy_(torch.tensor([3.0, -2.0]))
    model[1].bias.data.copy_(torch.tensor([0.5, 0.25]))
    model[1].running_mean.copy_(torch.tensor([2.0, 1.0]))
    model[1].running_var.copy_(torch.tensor([4.0, 16.0]))
    folded = fold_batchnorm(model, {"0": "1"})
    # slopes 3/2 and -2/4; shifts 0.5 + 1.5 · (1 - 2) and 0.25 - 0.5 · (-1 - 1)
    assert folded[0].weight.tolist() == [[1.5, 3.0], [1.5, 2.0]]
    assert folded[0].bias.tolist() == [0.0, 0.0]
    assert (folded[1].weight.tolist(), folded[1].bias.tolist()) == ([1.0, -1.0], [-1.0, 1.25])
    assert (folded[1].running_mean.tolist(), folded[1].running_var.tolist()) == ([0.0, 0.0], [1.0, 1.0])


def test_a_residual_network_is_traced():
    """Each of its 19 convolutions has its BatchNorm; a quarter of BatchNorm's numbers is left."""
    torch.manual_seed(0)
    model = shaken(ResNet20(10))
    compress(model, "binary")
    full, folded = to_bytes(model)[1], to_bytes(model, fold_batchnorm=True)[1]
    assert full.file_bytes - folded.file_bytes > 6000
    assert to_bytes(model, fold_batchnorm=True, leftovers="log8")[1].file_bytes < 36000


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (
            StraightThroughQuantization("uniform", group="tensor"),
            "0: with group='tensor'.*group='channel' gives it one",
        ),
        (StraightThroughQuantization("codebook"), "0: with group='tensor'"),
        (StraightThroughQuantization("log"), "0: LogLevels cannot take a factor"),
    ],
    ids=["tensor", "codebook", "log"],
)
def test_levels_without_a_scale_a_channel_are_refused(levels, message):
    model = net()
    compress(model, [levels])
    with pytest.raises(ValueError, match=message):
        to_bytes(model, fold_batchnorm=True)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        if float(x.sum()) > 0:
            x = -x
        return self.norm(self.conv(x))


def test_what_cannot_be_traced_is_named():
    model = shaken(Branches())
    with pytest.raises(ValueError, match=r"cannot be traced .*name the pairs"):
        fold_batchnorm(model)
    folded = fold_batchnorm(model, {"conv": "norm"})
    torch.testing.assert_close(folded(inputs()), model(inputs()), rtol=1e-4, atol=1e-5)


class Standardised(nn.Conv1d):
    """Makes something else of its weight: a factor on it would be lost."""

    def forward(self, x):
        return nn.functional.conv1d(x, self.weight / self.weight.std(), self.bias)


def tied():
    first, second = nn.Conv1d(3, 3, 1), nn.Conv1d(3, 3, 1)
    second.weight = first.weight
    return nn.Sequential(first, nn.BatchNorm1d(3), second)


@pytest.mark.parametrize(
    ("model", "pairs", "message"),
    [
        (nn.Sequential(nn.Linear(3, 3)), None, "found no convolution"),
        (
            nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
            {"0": "2"},
            "expected 2 to be one of BatchNorm1d.*found nothing",
        ),
        (
            nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
            {"1": "1"},
            "expected 1 to be one of Conv1d.*found BatchNorm1d",
        ),
        (
            nn.Sequential(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3, track_running_stats=False)),
            None,
            "no running statistics",
        ),
        (nn.Sequential(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3, affine=False)), None, "not affine"),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(4)), {"0": "1"}, "1 has 4 channels, 0 gives another number"),
        (
            nn.Sequential(weight_norm(nn.Conv1d(3, 3, 1)), nn.BatchNorm1d(3)),
            {"0": "1"},
            "expected 0 to be one of|no Parameter",
        ),
        (nn.Sequential(Standardised(3, 3, 1), nn.BatchNorm1d(3)), None, "found no convolution"),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), None, "found no convolution"),
        (tied(), {"0": "1"}, "0: other layers share its weight"),
    ],
    ids=["none", "name", "kind", "statistics", "affine", "channels", "weight_norm", "subclass", "linear", "tied"],
)
def test_what_cannot_be_folded_is_refused(model, pairs, message):
    with pytest.raises(ValueError, match=message):
        fold_batchnorm(model, pairs)


def test_a_convolution_that_two_read_is_left():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return y + self.norm(y)

    with pytest.raises(ValueError, match="found no convolution"):
        fold_batchnorm(Two())
