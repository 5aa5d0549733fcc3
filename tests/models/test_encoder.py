from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable

import pytest
import torch
from monai.networks.nets import (
    FlexibleUNet,
    ResNet,
    SegResNet,
    SegResNetVAE,
    UNet,
    resnet10,
    resnet18,
    resnet50,
)
from monai.networks.nets.resnet import ResNetFeatures
from torch import Tensor, nn

from medclr.errors import ConfigError
from medclr.models import ARCHITECTURES, Encoder, build_encoder, encoder_prefixes, find_encoder

SMALL = (8, 16, 16, 32)


def segresnet(**settings: object) -> SegResNet:
    return SegResNet(**{"init_filters": 8, "blocks_down": (1, 2, 1), "blocks_up": (1, 1), "in_channels": 2, **settings})


def resnet(**settings: object) -> ResNet:
    return ResNet(
        **{"block": "basic", "layers": [1, 2, 1, 1], "block_inplanes": SMALL, "n_input_channels": 2, **settings}
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "segresnet": segresnet,
    "segresnet of 4 levels": lambda: segresnet(blocks_down=(1, 1, 1, 1), blocks_up=(1, 1, 1)),
    "segresnet, instance": lambda: segresnet(norm="instance", act=("leakyrelu", {"negative_slope": 0.2})),
    "segresnet, prelu": lambda: segresnet(act="prelu", norm="batch"),
    "segresnet, dropout": lambda: segresnet(dropout_prob=0.2),
    "segresnet, variational": lambda: SegResNetVAE((16, 16, 16), in_channels=2, init_filters=8),
    "resnet, basic": resnet,
    "resnet, prelu": lambda: resnet(act="prelu"),
    "resnet, bottleneck": lambda: resnet(block="bottleneck"),
    "resnet, shortcut A": lambda: resnet(shortcut_type="A"),
    "resnet, anisotropic": lambda: resnet(conv1_t_size=(3, 5, 7), conv1_t_stride=(1, 2, 2), no_max_pool=True),
    "resnet, no bias": lambda: resnet(bias_downsample=False, widen_factor=0.5, feed_forward=False),
    "flexible unet": lambda: FlexibleUNet(2, 3, "resnet10", spatial_dims=3),
}


def shaken(network: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and buffer another than at initialisation, so that none can hide."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return network.eval()


def image(size: tuple[int, int, int] = (32, 48, 32), channels: int = 2, batch: int = 1) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return shaken(NETWORKS[request.param]())


def test_the_encoder_holds_the_networks_own_tensors_under_their_own_names(network: nn.Module) -> None:
    prefixes = encoder_prefixes(network)
    state, whole = Encoder(network).state_dict(), network.state_dict()
    outer = "encoder." if isinstance(network, FlexibleUNet) else ""
    expected = {name for name in whole if name.startswith(tuple(f"{prefix}." for prefix in prefixes))}
    # The first activation of a ResNet is the one child of an encoder that seldom has a weight.
    expected |= {name for name in whole if name == "act.weight"}
    assert {f"{outer}{name}" for name in state} == expected
    assert all(state[name].data_ptr() == whole[f"{outer}{name}"].data_ptr() for name in state)


def test_every_parameter_of_the_encoder_gets_a_gradient(network: nn.Module) -> None:
    encoder = Encoder(network).train()
    encoder(image(batch=2)).square().sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


def test_sizes_are_those_of_the_maps(network: nn.Module) -> None:
    encoder = Encoder(network)
    with torch.no_grad():
        maps, vector = encoder.feature_maps(image()), encoder(image())
    assert tuple(x.shape[1] for x in maps) == encoder.channels
    assert vector.shape == (1, encoder.out_features)
    expected = tuple(-(-size // step) for size, step in zip((32, 48, 32), encoder.stride, strict=True))
    assert tuple(maps[-1].shape[2:]) == expected
    assert encoder.in_channels == 2


def test_a_segresnets_maps_are_what_its_decoder_reads() -> None:
    net = shaken(segresnet())
    with torch.no_grad():
        torch.testing.assert_close(Encoder(net).feature_maps(image()), net.encode(image())[1])


@pytest.mark.parametrize("name", ["resnet, basic", "resnet, bottleneck", "resnet, shortcut A", "resnet, anisotropic"])
def test_a_resnets_vector_is_what_its_classifier_reads(name: str) -> None:
    net = shaken(NETWORKS[name]())
    encoder = Encoder(net)
    net.fc = None
    with torch.no_grad():
        torch.testing.assert_close(encoder(image()), net(image()))


def test_a_resnets_maps_are_those_of_flexible_unet() -> None:
    net = shaken(FlexibleUNet(2, 3, "resnet10", spatial_dims=3))
    with torch.no_grad():
        torch.testing.assert_close(Encoder(net).feature_maps(image()), net.encoder(image()))


def test_the_mean_and_the_maximum_over_space_are_pooled() -> None:
    encoder = Encoder(shaken(segresnet()), pool="avgmax")
    with torch.no_grad():
        coarsest = encoder.feature_maps(image())[-1].flatten(2)
        expected = torch.cat([coarsest.mean(-1), coarsest.max(-1).values], dim=1)
        torch.testing.assert_close(encoder(image()), expected)
    assert encoder.out_features == expected.shape[1]


@pytest.mark.parametrize("pool", ["avg", "avgmax"])
def test_an_architecture_rebuilds_the_same_encoder(network: nn.Module, pool: str) -> None:
    encoder = Encoder(network, pool=pool)
    rebuilt = build_encoder(json.loads(json.dumps(encoder.architecture)))
    rebuilt.load_state_dict(encoder.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt.eval()(image()), encoder(image()), rtol=0, atol=0)
    assert rebuilt.architecture == encoder.architecture
    assert (rebuilt.stride, rebuilt.channels) == (encoder.stride, encoder.channels)


@pytest.mark.parametrize("norm", ["instance", "group", "batch"])
@pytest.mark.parametrize("make", [segresnet, resnet])
def test_an_architecture_with_a_norm_rebuilds_the_same_encoder(make: Callable[[], nn.Module], norm: str) -> None:
    encoder = shaken(Encoder(make(), norm=norm))
    rebuilt = build_encoder(encoder.architecture)
    rebuilt.load_state_dict(encoder.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt.eval()(image()), encoder(image()), rtol=0, atol=0)


def test_rebuilding_never_imports_what_a_file_names() -> None:
    with pytest.raises(ConfigError, match="not one that medclr builds") as caught:
        build_encoder({"network": {"_target_": "os.system", "command": "true"}})
    assert all(target in str(caught.value) for target in ARCHITECTURES)


@pytest.mark.parametrize("architecture", [{}, {"network": None}, {"network": {}}, {"network": {"_target_": ["a"]}}])
def test_an_architecture_without_a_target_is_refused(architecture: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        build_encoder(architecture)


@pytest.mark.parametrize(
    "change", [{"colour": 1}, {"blocks_down": "deep"}, {"norm": "unknown"}, {"act": "unknown"}, {"spatial_dims": 7}]
)
def test_an_architecture_with_unusable_arguments_is_refused(change: dict[str, object]) -> None:
    architecture = Encoder(segresnet()).architecture
    with pytest.raises(ConfigError):
        build_encoder({**architecture, "network": {**architecture["network"], **change}})


def test_an_unknown_network_is_refused_with_a_list_of_the_known() -> None:
    with pytest.raises(ConfigError) as caught:
        Encoder(UNet(3, 1, 2, (8, 16), (2,)))
    assert "UNet" in str(caught.value)
    assert all(target in str(caught.value) for target in ARCHITECTURES)


def test_a_subclass_that_may_compute_something_else_is_refused() -> None:
    class Custom(SegResNet):
        pass

    with pytest.raises(ConfigError, match="not known"):
        Encoder(Custom())


@pytest.mark.parametrize(
    "make", [lambda: SegResNet(2), lambda: resnet10(spatial_dims=2), lambda: FlexibleUNet(1, 2, "resnet10")]
)
def test_a_network_of_two_dimensions_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ConfigError, match="three-dimensional"):
        Encoder(make())


def test_an_unknown_pool_is_refused() -> None:
    with pytest.raises(ConfigError, match="pooling"):
        Encoder(segresnet(), pool="max")


@pytest.mark.parametrize("shape", [(2, 16, 16, 16), (1, 1, 16, 16, 16), (1, 2, 16, 16)])
def test_an_image_of_the_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="in_channels"):
        Encoder(segresnet())(torch.zeros(shape))


def test_a_crop_that_leaves_instance_norm_one_voxel_is_refused() -> None:
    encoder = Encoder(segresnet(), norm="instance")
    with pytest.raises(ConfigError, match="roi_size"):
        encoder(torch.zeros(2, 2, 4, 4, 4))
    assert encoder(torch.zeros(2, 2, 4, 4, 5)).shape == (2, 32)


def test_a_crop_that_leaves_batch_norm_one_value_is_refused_in_training_only() -> None:
    encoder = Encoder(segresnet(), norm="batch").train()
    with pytest.raises(ConfigError, match="batch norm"):
        encoder(torch.zeros(1, 2, 4, 4, 4))
    assert encoder.eval()(torch.zeros(1, 2, 4, 4, 4)).shape == (1, 32)


def test_an_activation_that_cannot_be_written_down_is_refused() -> None:
    with pytest.raises(ConfigError, match="MONAI's names"):
        Encoder(segresnet(act=(nn.Hardswish, {})))


@pytest.mark.parametrize("make", [segresnet, resnet])
@pytest.mark.parametrize("norm", ["instance", "group", "batch"])
def test_bf16_autocast_gives_finite_fp32_vectors_close_to_fp32(make: Callable[[], nn.Module], norm: str) -> None:
    encoder = Encoder(make(), norm=norm).eval()
    with torch.no_grad():
        exact = encoder(image())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = encoder(image())
    assert rough.dtype == torch.float32
    assert float((rough - exact).norm() / exact.norm()) < 0.05


def test_a_bf16_encoder_gives_bf16_vectors() -> None:
    encoder = Encoder(segresnet(), norm="instance").to(torch.bfloat16)
    assert encoder(image().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [segresnet, resnet])
def test_channels_last_gives_the_same_vectors(make: Callable[[], nn.Module]) -> None:
    encoder = Encoder(shaken(make()))
    with torch.no_grad():
        plain = encoder(image())
        encoder.to(memory_format=torch.channels_last_3d)
        last = encoder(image().to(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))])  # noqa: S301
def test_a_copy_is_independent_and_computes_the_same(
    network: nn.Module, duplicate: Callable[[Encoder], Encoder]
) -> None:
    encoder = Encoder(network)
    with torch.no_grad():
        before = encoder(image())
        twin = duplicate(encoder)
        for parameter in encoder.parameters():
            parameter.zero_()
        torch.testing.assert_close(twin(image()), before, rtol=0, atol=0)


def test_wrapping_a_network_leaves_its_mode_alone() -> None:
    net = segresnet().eval()
    assert not Encoder(net).training
    assert not any(module.training for module in net.modules())


def test_one_samples_vector_does_not_depend_on_the_others_without_batch_norm() -> None:
    encoder = Encoder(resnet(), norm="instance").train()
    both = image(batch=2)
    with torch.no_grad():
        torch.testing.assert_close(encoder(both)[:1], encoder(both[:1]), rtol=1e-4, atol=1e-5)


class Holder(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.head, self.encoder = nn.Linear(2, 2), encoder


@pytest.mark.parametrize("wrap", [nn.Identity, Holder, nn.DataParallel, lambda net: nn.DataParallel(Holder(net))])
def test_an_encoder_is_found_inside_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    encoder = Encoder(segresnet())
    if wrap is nn.Identity:
        assert find_encoder(encoder) is encoder
    else:
        assert find_encoder(wrap(encoder)) is encoder
        assert find_encoder(wrap(segresnet())).state_dict().keys() == encoder.state_dict().keys()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (SegResNet, ("convInit", "down_layers")),
        (resnet10, ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")),
        (
            lambda: FlexibleUNet(1, 2, "resnet18", spatial_dims=3),
            tuple(f"encoder.{name}" for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")),
        ),
        (lambda: nn.DataParallel(SegResNet()), ("module.convInit", "module.down_layers")),
    ],
)
def test_prefixes_name_the_encoder(make: Callable[[], nn.Module], expected: tuple[str, ...]) -> None:
    assert encoder_prefixes(make()) == expected


@pytest.mark.parametrize(
    ("make", "backbone", "features"),
    [
        (lambda: resnet10(n_input_channels=1, conv1_t_stride=2, bias_downsample=False), "resnet10", 512),
        (lambda: resnet18(n_input_channels=1, conv1_t_stride=2, shortcut_type="A"), "resnet18", 512),
        (lambda: resnet50(n_input_channels=1, conv1_t_stride=2, bias_downsample=False), "resnet50", 2048),
    ],
)
def test_the_arguments_that_match_flexible_unet(make: Callable[[], nn.Module], backbone: str, features: int) -> None:
    ours, theirs = Encoder(make()), Encoder(FlexibleUNet(1, 2, backbone, spatial_dims=3))
    assert ours.architecture == theirs.architecture
    assert ours.out_features == features
    assert {name: x.shape for name, x in ours.state_dict().items()} == {
        name: x.shape for name, x in theirs.state_dict().items()
    }


def test_the_default_shortcut_of_resnet18_leaves_21_keys_over() -> None:
    ours = Encoder(resnet18(n_input_channels=1)).state_dict()
    theirs = Encoder(FlexibleUNet(1, 2, "resnet18", spatial_dims=3)).state_dict()
    assert len(set(ours) - set(theirs)) == 21


def test_features_of_resnet_features_are_kept() -> None:
    net = shaken(ResNetFeatures("resnet10", pretrained=False, in_channels=2))
    with torch.no_grad():
        torch.testing.assert_close(Encoder(net).feature_maps(image()), net(image()))


def test_bf16_that_would_give_wrong_gradients_is_refused() -> None:
    encoder = Encoder(SegResNet(init_filters=8))
    small, large = torch.rand(1, 1, 16, 24, 24), torch.rand(1, 1, 24, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ConfigError, match="bf16"):
            encoder(small)
        encoder(large)
        with torch.no_grad():
            encoder(small)
    encoder(small)
