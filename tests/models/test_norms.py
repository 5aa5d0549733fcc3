from __future__ import annotations

import pytest
import torch
from monai.networks.nets import ResNet, SegResNet, resnet10
from torch import nn

from medclr.errors import ConfigError
from medclr.models import Encoder, norm_argument, with_norm
from medclr.models.norms import describe_norm, norm_of, synchronised

NORMS = {"instance": nn.InstanceNorm3d, "group": nn.GroupNorm, "batch": nn.BatchNorm3d}
KINDS = (nn.InstanceNorm3d, nn.GroupNorm, nn.BatchNorm3d)


def small_resnet(norm: object = "batch") -> ResNet:
    return ResNet("basic", [1, 1, 1, 1], [8, 8, 16, 16], n_input_channels=1, norm=norm)


@pytest.mark.parametrize("norm", NORMS)
def test_a_segresnet_can_be_built_with_each_norm(norm: str) -> None:
    net = SegResNet(init_filters=8, norm=norm_argument(norm, channels=8))
    kinds = {type(layer) for layer in net.modules() if isinstance(layer, KINDS)}
    assert kinds == {NORMS[norm]}
    assert norm_of(net) == norm_argument(norm)


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_of_a_resnet_is_replaced(norm: str) -> None:
    net = with_norm(small_resnet(), norm)
    layers = [layer for layer in net.modules() if isinstance(layer, KINDS)]
    assert len(layers) == len([layer for layer in small_resnet().modules() if isinstance(layer, KINDS)])
    assert {type(layer) for layer in layers} == {NORMS[norm]}
    assert net(torch.zeros(2, 1, 32, 32, 32)).shape == (2, 400)


def test_a_norm_that_is_there_already_keeps_its_weights() -> None:
    net = small_resnet()
    before = [layer for layer in net.modules() if isinstance(layer, KINDS)]
    with_norm(net, "batch")
    after = [layer for layer in net.modules() if isinstance(layer, KINDS)]
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_a_replacement_takes_over_kind_of_number_and_mode() -> None:
    net = with_norm(small_resnet().double().eval(), "instance")
    assert all(parameter.dtype == torch.float64 for parameter in net.parameters())
    assert not any(module.training for module in net.modules())


def test_monais_resnet_with_a_norm_of_its_own_is_refused_as_a_mixture() -> None:
    net = small_resnet(("instance", {"affine": True}))
    with pytest.raises(ConfigError, match="mixes several norms") as caught:
        Encoder(net)
    assert "instance" in str(caught.value)
    assert "batch" in str(caught.value)
    assert Encoder(net, norm="instance").architecture["norm"] == ["instance", {"affine": True}]


@pytest.mark.parametrize("norm", ["layer", "", "instance_nvfuser", 3, None, ("group",), ("group", 4), ("x", {})])
def test_an_unknown_norm_is_refused(norm: object) -> None:
    with pytest.raises(ConfigError, match="Unknown norm"):
        norm_argument(norm)


@pytest.mark.parametrize(
    ("norm", "channels"),
    [("group", 12), ("group", 4), (("group", {"num_groups": 3}), 8), (("group", {"num_groups": 0}), None)],
)
def test_channels_that_the_groups_do_not_divide_are_refused(norm: object, channels: int | None) -> None:
    with pytest.raises(ConfigError, match="init_filters"):
        norm_argument(norm, channels)


def test_replacing_by_groups_that_do_not_divide_changes_nothing() -> None:
    net = ResNet("basic", [1, 1, 1, 1], [8, 12, 16, 16], n_input_channels=1)
    with pytest.raises(ConfigError, match="init_filters"):
        with_norm(net, "group")
    assert norm_of(net) == ("batch", {})


def test_a_pair_is_taken_as_it_is() -> None:
    assert norm_argument(["group", {"num_groups": 4}], channels=12) == ("group", {"num_groups": 4})
    assert norm_argument(("instance", {})) == ("instance", {})
    assert norm_argument(("GROUP", {})) == ("group", {"num_groups": 8})


def test_group_norm_of_eight_channels_is_instance_norm() -> None:
    x = torch.randn(2, 8, 4, 4, 4)
    torch.testing.assert_close(nn.GroupNorm(8, 8)(x), nn.InstanceNorm3d(8)(x))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.BatchNorm3d(8), ("batch", {})),
        (nn.SyncBatchNorm(8), ("batch", {})),
        (nn.BatchNorm3d(8, eps=1e-3), ("batch", {"eps": 1e-3})),
        (nn.InstanceNorm3d(8), ("instance", {})),
        (nn.InstanceNorm3d(8, affine=True), ("instance", {"affine": True})),
        (nn.GroupNorm(2, 8), ("group", {"num_groups": 2})),
        (nn.Conv3d(1, 1, 1), None),
    ],
)
def test_a_layer_is_described_by_the_argument_that_makes_it(layer: nn.Module, expected: object) -> None:
    assert describe_norm(layer) == expected


def test_a_lone_norm_layer_cannot_be_replaced_in_place() -> None:
    with pytest.raises(ConfigError, match="in place"):
        with_norm(nn.BatchNorm3d(8), "instance")


def test_instance_norm_in_a_bundle_reaches_every_layer_of_resnet10() -> None:
    encoder = Encoder(resnet10(n_input_channels=1), norm="instance")
    assert not [name for name, _ in encoder.named_buffers()]


def test_batch_norms_of_all_ranks_keep_their_parameters_and_need_a_gpu() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.GroupNorm(2, 4))
    before = list(network.parameters())
    converted = synchronised(network, "cuda")
    assert [type(layer) for layer in converted] == [nn.Linear, nn.SyncBatchNorm, nn.GroupNorm]
    assert all(new is old for new, old in zip(converted.parameters(), before, strict=True))
    with pytest.raises(ConfigError, match="sync_norms: true on cpu"):
        synchronised(network, "cpu")
