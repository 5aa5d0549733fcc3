from __future__ import annotations

import pytest
import torch
from monai.networks.nets import ResNet, SegResNet
from torch import nn

from medclr.errors import WeightsError
from medclr.models import Encoder
from medclr.weights.probe import TOLERANCE, check_probe, probe_image, take_probe


def small(**settings: object) -> Encoder:
    torch.manual_seed(0)
    return Encoder(SegResNet(**{"init_filters": 8, "blocks_down": (1, 2, 1), "blocks_up": (1, 1), **settings}))


def test_the_image_depends_on_its_arguments_alone() -> None:
    torch.manual_seed(1)
    first = probe_image((8, 6, 4), 2)
    torch.manual_seed(2)
    torch.testing.assert_close(probe_image((8, 6, 4), 2), first, rtol=0, atol=0)
    assert first.shape == (1, 2, 8, 6, 4)
    # Held to fixed numbers: files written today must be readable by a later version.
    assert first.sum().item() == pytest.approx(IMAGE_SUM, abs=1e-9)
    assert first[0, 1, 3, 2, 1].item() == pytest.approx(IMAGE_VOXEL, abs=1e-12)


IMAGE_SUM, IMAGE_VOXEL = -7.039790337520401, -1.5591798182720908


def test_no_two_axes_and_no_two_channels_of_the_image_are_alike() -> None:
    image = probe_image((8, 8, 8), 2)
    for axes in ((2, 3), (3, 4), (2, 4)):
        assert float((image - image.transpose(*axes)).abs().mean()) > 0.2
    assert float((image[:, 0] - image[:, 1]).abs().mean()) > 0.2
    for axis in (2, 3, 4):
        assert float((image - image.flip(axis)).abs().mean()) > 0.2


def test_the_same_encoder_passes_and_is_left_as_it_was() -> None:
    encoder = small(dropout_prob=0.5, norm="batch").train()
    encoder.down_layers[0].eval()
    modes = [module.training for module in encoder.modules()]
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        difference, first = check_probe(encoder, take_probe(encoder))
    assert (difference, first) == (0.0, -1)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())


@pytest.mark.parametrize(
    "change",
    [
        {"norm": "instance"},
        {"norm": ("group", {"num_groups": 4})},
        {"norm": ("group", {"num_groups": 8, "eps": 1e-2})},
        {"act": ("leakyrelu", {"negative_slope": 0.01})},
    ],
)
def test_what_leaves_no_trace_in_a_state_dict_is_noticed(change: dict[str, object]) -> None:
    settings = {"norm": ("group", {"num_groups": 8, "affine": False}), "init_filters": 16}
    norm = change.get("norm", settings["norm"])
    if isinstance(norm, tuple):
        norm = (norm[0], {**norm[1], "affine": False})
    saved, other = small(**settings), small(**{**settings, **change, "norm": norm})
    assert other.state_dict().keys() == saved.state_dict().keys()
    other.load_state_dict(saved.state_dict())
    difference, first = check_probe(other, take_probe(saved))
    assert difference > TOLERANCE
    assert first == 0


@pytest.mark.parametrize("change", [{"conv1_t_stride": 2}, {"no_max_pool": True}, {"shortcut_type": "A"}])
def test_a_resnets_strides_and_shortcuts_are_noticed(change: dict[str, object]) -> None:
    def build(**settings: object) -> Encoder:
        torch.manual_seed(0)
        return Encoder(ResNet("basic", [1, 1, 1, 1], [8, 16, 16, 32], n_input_channels=1, **settings))

    saved, other = build(), build(**change)
    other.load_state_dict(saved.state_dict(), strict=False)
    assert check_probe(other, take_probe(saved))[1] >= 0


def test_the_first_map_that_differs_is_named() -> None:
    saved, other = small(), small()
    probe = take_probe(saved)
    with torch.no_grad():
        weight = other.get_parameter("down_layers.2.1.conv1.conv.weight")
        weight.mul_(1 + 0.01 * torch.rand(weight.shape))
    assert check_probe(other, probe)[1] == 2


def test_a_swap_of_two_blocks_of_one_shape_is_noticed() -> None:
    encoder = small()
    probe = take_probe(encoder)
    blocks = encoder.down_layers[1]
    blocks[1], blocks[2] = blocks[2], blocks[1]
    difference, first = check_probe(encoder, probe)
    assert first == 1
    assert difference > 100 * TOLERANCE


@pytest.mark.parametrize("norm", [("instance", {"affine": True}), ("group", {"num_groups": 8}), ("batch", {})])
def test_every_parameter_and_running_statistic_counts(norm: object) -> None:
    encoder = small(norm=norm)
    probe, generator = take_probe(encoder), torch.Generator().manual_seed(4)
    for name, tensor in encoder.state_dict().items():
        if tensor.is_floating_point():
            before = tensor.clone()
            tensor.mul_(1 + 0.01 * torch.rand(tensor.shape, generator=generator)).add_(1e-3 * (tensor == 0))
            assert check_probe(encoder, probe)[1] >= 0, name
            tensor.copy_(before)
    assert check_probe(encoder, probe) == (0.0, -1)


def test_rounding_does_not_count() -> None:
    encoder = small()
    probe = take_probe(encoder)
    probe["features"] = [[[float(f"{x:.9g}") for x in pair] for pair in channels] for channels in probe["features"]]
    assert check_probe(encoder, probe)[1] == -1


def test_nan_counts_as_a_difference() -> None:
    encoder = small()
    probe = take_probe(encoder)
    nn.init.constant_(encoder.get_parameter("convInit.conv.weight"), float("nan"))
    assert check_probe(encoder, probe)[1] == 0


def test_maps_of_other_channels_are_a_difference() -> None:
    assert check_probe(small(), take_probe(small(init_filters=16))) == (float("inf"), 0)


@pytest.mark.parametrize(
    "probe",
    [
        {},
        {"size": [8, 8], "seed": 1, "features": [[[1.0, 1.0]]]},
        {"size": [8, 8, 10**9], "seed": 1, "features": [[[1.0, 1.0]]]},
        {"size": [8, 8, 8], "seed": 1, "features": []},
        {"size": [8, 8, 8], "seed": 1, "features": [[["x", 1.0]]]},
        {"size": [8, 8, 8], "seed": 1, "features": [[1.0, 2.0]]},
        {"size": [8, 8, 8], "seed": None, "features": [[[1.0, 1.0]]]},
    ],
)
def test_an_unreadable_probe_is_refused(probe: dict[str, object]) -> None:
    with pytest.raises(WeightsError, match="probe"):
        check_probe(small(), probe)
