from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from ignite.engine import Engine
from monai.handlers import CheckpointLoader
from monai.networks.nets import FlexibleUNet, ResNet, SegResNet, resnet10, resnet18, resnet50
from monai.networks.utils import copy_model_state
from torch import Tensor, nn

from medclr.errors import ConfigError, MedclrError, WeightsError
from medclr.models import Encoder, build_encoder, with_norm
from medclr.weights import (
    Coverage,
    Manifest,
    encoder_state_dict,
    find_manifest,
    load_encoder,
    read_manifest,
    save_encoder,
)
from medclr.weights.digest import DIGEST, TENSORS_DIGEST, seal
from medclr.weights.files import HEADER, share
from tests.test_disk import FAULT, FAULTS

MANIFEST = Manifest("SimCLR", steps=300, crop_size=(32, 48, 32))


def segresnet(**settings: object) -> SegResNet:
    return SegResNet(
        **{"init_filters": 8, "blocks_down": (1, 2, 1), "blocks_up": (1, 1), "out_channels": 3, **settings}
    )


def resnet(**settings: object) -> ResNet:
    return ResNet(
        **{
            "block": "basic",
            "layers": [1, 3, 1, 1],
            "block_inplanes": [8, 16, 16, 32],
            "n_input_channels": 1,
            **settings,
        }
    )


def shaken(network: nn.Module, seed: int = 1) -> nn.Module:
    """Every parameter and buffer another than at initialisation, so that none can hide."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(
                0.05 * torch.randn(tensor.shape, generator=generator).abs_() * tensor.abs().mean().clamp_min(0.1)
            )
        else:
            tensor.add_(seed)
    return network


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def changed(network: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}


def image(network: nn.Module) -> Tensor:
    return torch.randn(1, Encoder(network).in_channels, 16, 16, 32, generator=torch.Generator().manual_seed(3))


def saved(folder: Path, network: nn.Module, name: str = "encoder.safetensors") -> Path:
    save_encoder(folder / name, Encoder(network), MANIFEST)
    return folder / name


def refused(path: Path, into: nn.Module, **options: object) -> str:
    """The error of a load that must fail and must leave the target as it was."""
    before = snapshot(into)
    with pytest.raises(MedclrError) as caught:
        load_encoder(path, into, **{"quiet": True, **options})
    assert changed(into, before) == set()
    return str(caught.value)


QUARTER = {"n_input_channels": 1, "widen_factor": 0.25}
PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "segresnet into an encoder": (segresnet, lambda: Encoder(segresnet())),
    "segresnet into a segresnet": (segresnet, segresnet),
    "segresnet into another decoder": (segresnet, lambda: segresnet(out_channels=5, upsample_mode="deconv")),
    "segresnet with instance norm": (
        lambda: with_norm(segresnet(), "instance"),
        lambda: with_norm(segresnet(), "instance"),
    ),
    "two channels": (lambda: segresnet(in_channels=2), lambda: segresnet(in_channels=2)),
    "small resnet with instance norm": (
        lambda: with_norm(resnet(), "instance"),
        lambda: with_norm(resnet(), "instance"),
    ),
    "small resnet, shortcut A": (lambda: resnet(shortcut_type="A"), lambda: resnet(shortcut_type="A", num_classes=2)),
    "resnet10": (lambda: resnet10(**QUARTER), lambda: resnet10(**QUARTER, num_classes=2)),
    "resnet18": (lambda: resnet18(**QUARTER), lambda: resnet18(**QUARTER, feed_forward=False)),
    "resnet50": (lambda: resnet50(**QUARTER), lambda: Encoder(resnet50(**QUARTER))),
    "resnet18 into flexible unet": (
        lambda: resnet18(n_input_channels=1, shortcut_type="A", conv1_t_stride=2),
        lambda: FlexibleUNet(1, 2, "resnet18", spatial_dims=3),
    ),
}


WHOLE = {
    f"{make.__name__} at full width": (partial(make, n_input_channels=1),) * 2
    for make in (resnet10, resnet18, resnet50)
}


@pytest.mark.parametrize("pair", [*PAIRS, *(pytest.param(name, marks=pytest.mark.slow) for name in WHOLE)])
def test_what_is_saved_is_loaded_with_the_same_features(pair: str, tmp_path: Path) -> None:
    make, make_target = {**PAIRS, **WHOLE}[pair]
    source, target = shaken(make()).eval(), shaken(make_target(), seed=2).eval()
    before = snapshot(target)
    coverage = load_encoder(saved(tmp_path, source), target, quiet=True)
    assert coverage.fraction == 1.0
    assert coverage.complete
    assert coverage.ignored == ()
    assert coverage.checked.startswith("equal to those of the saved encoder")
    inner = target if isinstance(target, Encoder) else Encoder(target)
    with torch.no_grad():
        voxels = image(source)
        for ours, theirs in zip(inner.feature_maps(voxels), Encoder(source).feature_maps(voxels), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    outer = "encoder." if isinstance(target, FlexibleUNet) else ""
    assert changed(target, before) == {f"{outer}{name}" for name in coverage.matched}
    assert set(coverage.matched) == set(Encoder(source).state_dict())


def test_tensors_are_filled_in_place_so_that_an_optimizer_keeps_its_hold(tmp_path: Path) -> None:
    target = segresnet()
    held = dict(target.named_parameters())
    load_encoder(saved(tmp_path, shaken(segresnet())), target, quiet=True)
    assert all(parameter is held[name] and parameter.requires_grad for name, parameter in target.named_parameters())


def test_a_target_keeps_its_precision_and_modes(tmp_path: Path) -> None:
    source, target = shaken(segresnet()), segresnet().to(torch.bfloat16)
    target.down_layers[0].eval()
    modes = [module.training for module in target.modules()]
    state = torch.get_rng_state()
    load_encoder(saved(tmp_path, source), target, quiet=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in target.modules()] == modes
    assert target.convInit.conv.weight.dtype == torch.bfloat16
    torch.testing.assert_close(target.convInit.conv.weight, source.convInit.conv.weight.bfloat16(), rtol=0, atol=0)


class Holder(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(2, 2)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        Holder,
        lambda net: nn.DataParallel(Holder(Encoder(net))),
        nn.SyncBatchNorm.convert_sync_batchnorm,
    ],
)
def test_wrapped_networks_are_loaded_and_saved(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    source, target = shaken(segresnet(norm="batch")), segresnet(norm="batch")
    save_encoder(tmp_path / "encoder.safetensors", wrap(source), MANIFEST)
    assert load_encoder(tmp_path / "encoder.safetensors", wrap(target), quiet=True).complete
    assert torch.equal(target.convInit.conv.weight, source.convInit.conv.weight)


# What must fail


def test_another_architecture_fails(tmp_path: Path) -> None:
    error = refused(saved(tmp_path, shaken(resnet())), segresnet())
    assert "another architecture" in error
    assert "monai.networks.nets.ResNet" in error
    assert "monai.networks.nets.SegResNet" in error


def test_another_architecture_fails_however_low_the_bar_and_without_a_manifest(tmp_path: Path) -> None:
    torch.save(shaken(resnet()).state_dict(), tmp_path / "weights.pt")
    assert "another architecture" in refused(tmp_path / "weights.pt", segresnet(), minimum_coverage=1e-6)
    path = saved(tmp_path, shaken(resnet()))
    assert "another architecture" in refused(path, segresnet(), minimum_coverage=1e-6, same_features=False)


@pytest.mark.parametrize(
    ("make", "first", "second"),
    [
        (segresnet, "down_layers.1.1", "down_layers.1.2"),
        (segresnet, "down_layers.1.2.conv1", "down_layers.1.2.conv2"),
        (resnet, "layer2.1", "layer2.2"),
        (resnet, "bn1.weight", "bn1.bias"),
        (resnet, "layer2.1.bn1.running_mean", "layer2.1.bn2.running_mean"),
    ],
)
def test_a_transposed_key_map_fails(make: Callable[[], nn.Module], first: str, second: str, tmp_path: Path) -> None:
    path = saved(tmp_path, shaken(make()))
    error = refused(path, shaken(make(), seed=2), key_map={first: second, second: first})
    assert "other features than the saved one" in error
    assert "key_map" in error


def test_all_zero_weights_fail(tmp_path: Path) -> None:
    path = saved(tmp_path, shaken(segresnet()))
    rewrite(path, {name: torch.zeros_like(tensor) for name, tensor in safetensors.torch.load_file(path).items()})
    assert "zero" in refused(path, segresnet())
    torch.save({name: torch.zeros_like(tensor) for name, tensor in segresnet().state_dict().items()}, tmp_path / "w.pt")
    assert "zero" in refused(tmp_path / "w.pt", segresnet())


def test_one_layer_of_zeros_fails_and_a_bias_of_zeros_does_not(tmp_path: Path) -> None:
    net = shaken(segresnet())
    nn.init.zeros_(net.get_parameter("down_layers.0.1.norm1.bias"))
    path = saved(tmp_path, net)
    assert load_encoder(path, segresnet(), quiet=True).complete
    nn.init.zeros_(net.get_parameter("down_layers.1.1.conv1.conv.weight"))
    with pytest.raises(WeightsError, match=r"down_layers\.1\.1\.conv1\.conv\.weight"):
        saved(tmp_path, net, "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_fail_both_ways(value: float, tmp_path: Path) -> None:
    net = shaken(resnet())
    path = saved(tmp_path, net)
    tensors = safetensors.torch.load_file(path)
    tensors["layer2.0.bn1.running_var"][3] = value
    rewrite(path, tensors)
    assert "layer2.0.bn1.running_var" in refused(path, resnet())
    net.get_buffer("layer2.0.bn1.running_var")[3] = value
    with pytest.raises(WeightsError, match="not finite"):
        saved(tmp_path, net, "other.safetensors")


def rewrite(
    path: Path,
    tensors: dict[str, Tensor],
    change: Callable[[dict[str, Any]], object] | None = None,
    *,
    sealed: bool = True,
    key: str = HEADER,
) -> None:
    """Replace the tensors, or the header, of a file of save_encoder, with digests that fit or the old ones."""
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[HEADER])
    if change is not None:
        change(header)
    if sealed:
        header = seal({name: value for name, value in header.items() if name not in (TENSORS_DIGEST, DIGEST)}, tensors)
    safetensors.torch.save_file(tensors, path, metadata={key: json.dumps(header)})


def test_slightly_wrong_weights_fail_though_the_digest_fits(tmp_path: Path) -> None:
    path = saved(tmp_path, shaken(segresnet()))
    tensors = safetensors.torch.load_file(path)
    tensors["down_layers.1.1.conv1.conv.weight"][0, 0, 0, 0, 0] += 1.0
    rewrite(path, tensors)
    assert "from feature map 1 on" in refused(path, segresnet())


def test_the_smallest_change_of_a_weight_is_damage(tmp_path: Path) -> None:
    path = saved(tmp_path, shaken(segresnet()))
    tensors = safetensors.torch.load_file(path)
    first = tensors["convInit.conv.weight"].view(-1)
    first[0] = torch.nextafter(first[0], torch.tensor(9.0))
    rewrite(path, tensors, sealed=False)
    assert "is damaged" in refused(path, segresnet())
    assert "digest of its tensors" in refused(path, segresnet(), minimum_coverage=1e-6, same_features=False)
    with pytest.raises(WeightsError, match="is damaged"):
        encoder_state_dict(path)
    assert read_manifest(path).method == "SimCLR"  # it lies in the header, which is whole


def test_a_changed_manifest_is_noticed_without_reading_the_weights(tmp_path: Path) -> None:
    path = saved(tmp_path, shaken(segresnet()))
    rewrite(path, safetensors.torch.load_file(path), lambda header: header["manifest"].update(steps=301), sealed=False)
    for read in (read_manifest, find_manifest, encoder_state_dict):
        with pytest.raises(WeightsError, match="is damaged") as caught:
            read(path)
        assert "digest of its header" in str(caught.value)
        assert "Copy or download it again" in str(caught.value)


@pytest.mark.parametrize("names", [(DIGEST,), (TENSORS_DIGEST, DIGEST)])
def test_a_header_without_a_digest_is_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    path = saved(tmp_path, shaken(segresnet()))
    tensors = safetensors.torch.load_file(path)
    rewrite(path, tensors, lambda header: [header.pop(name) for name in names], sealed=False)
    assert "older development version" in refused(path, segresnet())
    with pytest.raises(WeightsError, match="is damaged"):
        find_manifest(path)


@pytest.mark.parametrize("key", ["medclq", "Medclr", "medcl", "format"])
def test_a_header_under_another_name_does_not_make_a_foreign_file(key: str, tmp_path: Path) -> None:
    path = saved(tmp_path, shaken(segresnet()))
    rewrite(path, safetensors.torch.load_file(path), key=key)
    assert "the name of its header" in refused(path, segresnet())
    with pytest.raises(WeightsError, match="is damaged"):
        find_manifest(path)


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"manifest": "v1", "note": 'a "probe" of the model'}])
def test_a_foreign_file_with_metadata_of_its_own_is_a_plain_state_dict(
    metadata: dict[str, str], tmp_path: Path
) -> None:
    path, source = tmp_path / "weights.safetensors", shaken(segresnet())
    safetensors.torch.save_file(source.state_dict(), path, metadata=metadata)
    assert find_manifest(path) is None
    assert load_encoder(path, segresnet(), quiet=True).complete


@pytest.mark.parametrize("keep", [0, 7, 200, 0.3, 0.7, -1])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_truncated_file_fails(keep: float, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"encoder.{suffix}"
    if suffix == "pt":
        torch.save(segresnet().state_dict(), path)
    else:
        saved(tmp_path, shaken(segresnet()))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    error = refused(path, segresnet())
    assert "cannot be read" in error
    assert "cut short" in error


@pytest.mark.parametrize("name", ["encoder.pt", "encoder.pth", "encoder.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_planted_pickle_fails_and_is_not_executed(name: str, zipped: bool, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Planted:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {canary}",)

    path = tmp_path / name
    content = {"conv1.weight": Planted()}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    error = refused(path, segresnet())
    assert "cannot be read" in error if name.endswith("safetensors") else "not executed" in error
    assert not canary.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state_dict": {"conv1.weight": torch.zeros(1)}, "epoch": 3}, "state dicts under state_dict"),
        ({"conv1.weight": 3.0}, "no plain state dict"),
        ({}, "no plain state dict"),
        ([torch.zeros(1)], "no plain state dict"),
        (torch.zeros(1), "no plain state dict"),
        ({1: torch.zeros(1)}, "no plain state dict"),
        ({"conv1.weight": torch.eye(2).to_sparse()}, "no plain state dict"),
    ],
)
def test_a_file_that_is_no_state_dict_fails(content: object, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pt")
    assert words in refused(tmp_path / "weights.pt", segresnet())


def test_a_file_that_is_not_there_or_of_an_unknown_kind_fails(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    assert "no such weights file" in refused(tmp_path / "missing.safetensors", segresnet())
    assert "no such weights file" in refused(tmp_path, segresnet())
    assert "Unknown kind" in refused(tmp_path / "weights.bin", segresnet())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_another_number_of_channels_fails_and_says_so(suffix: str, tmp_path: Path) -> None:
    source = shaken(segresnet(in_channels=2))
    path = saved(tmp_path, source)
    if suffix == ".pt":
        path = path.with_suffix(".pt")
        torch.save(source.state_dict(), path)
    error = refused(path, segresnet(in_channels=1))
    assert "in_channels" in error
    assert "convInit.conv.weight: float (8, 2, 3, 3, 3), wanted float (8, 1, 3, 3, 3)" in error


@pytest.mark.parametrize("bar", [1.0, 1e-6])
def test_another_width_of_the_same_architecture_fails_and_says_so(bar: float, tmp_path: Path) -> None:
    error = refused(saved(tmp_path, shaken(segresnet())), segresnet(init_filters=16), minimum_coverage=bar)
    assert "init_filters is 8 in the file and 16 here" in error
    assert "0.0% of" in error


@pytest.mark.parametrize(("theirs", "ours"), [("A", "B"), ("B", "A")])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_another_resnet_shortcut_fails(theirs: str, ours: str, suffix: str, tmp_path: Path) -> None:
    source = shaken(resnet(shortcut_type=theirs))
    path = saved(tmp_path, source)
    if suffix == ".pt":
        path = path.with_suffix(".pt")
        torch.save(source.state_dict(), path)
    error = refused(path, resnet(shortcut_type=ours))
    assert "downsample" in error
    assert ("left over" if theirs == "B" else "missing") in error
    assert suffix == ".pt" or f"shortcut_type is {theirs} in the file and {ours} here" in error


def test_the_default_resnet18_does_not_go_into_flexible_unet(tmp_path: Path) -> None:
    source = shaken(resnet18(n_input_channels=1))
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    target = FlexibleUNet(1, 2, "resnet18", spatial_dims=3)
    assert "and 18 more left over" in refused(tmp_path / "weights.pt", target)
    error = refused(saved(tmp_path, source), target)
    assert "shortcut_type is B in the file and A here" in error


def test_flexible_unets_stride_is_noticed_though_every_key_matches(tmp_path: Path) -> None:
    path = saved(tmp_path, shaken(resnet10(n_input_channels=1, bias_downsample=False)))
    target = FlexibleUNet(1, 2, "resnet10", spatial_dims=3)
    error = refused(path, target)
    assert "other features" in error
    assert "conv1_t_stride is [1, 1, 1] in the file and [2, 2, 2] here" in error
    assert "same_features=False" in error
    coverage = load_encoder(path, target, same_features=False, quiet=True)
    assert coverage.complete
    assert coverage.checked == "not run: same_features is False"


def test_a_norm_without_parameters_is_noticed(tmp_path: Path) -> None:
    group = ("group", {"num_groups": 4, "affine": False})
    path = saved(tmp_path, shaken(segresnet(norm=("instance", {}))))
    error = refused(path, segresnet(norm=group))
    assert "other features" in error
    assert "norm is ['instance', {}] in the file" in error


def test_batch_norm_does_not_go_into_instance_norm(tmp_path: Path) -> None:
    path = saved(tmp_path, shaken(segresnet(norm="batch")))
    error = refused(path, segresnet(norm=("instance", {"affine": True})))
    assert "left over" in error
    assert "norm is ['batch', {}] in the file" in error


# Coverage and the bar


def test_a_lower_bar_loads_what_fits_and_leaves_the_rest(tmp_path: Path) -> None:
    source, target = shaken(segresnet(blocks_down=(1, 1, 1))), shaken(segresnet(), seed=2)
    path, before = saved(tmp_path, source), snapshot(target)
    required = len(Encoder(target).state_dict())
    error = refused(path, target)
    assert "missing" in error
    assert "blocks_down is [1, 1, 1] in the file and [1, 2, 1] here" in error
    coverage = load_encoder(path, target, minimum_coverage=0.5, quiet=True)
    assert coverage.fraction == (required - 6) / required
    assert coverage.checked == "not run: not all of the encoder was loaded"
    assert changed(target, before) == set(coverage.matched)
    assert "lower minimum_coverage" in refused(path, shaken(segresnet(), seed=2), minimum_coverage=0.9)


@pytest.mark.parametrize("bar", [0, -1, 1.1, float("nan")])
def test_an_unusable_bar_is_refused(bar: float, tmp_path: Path) -> None:
    assert "minimum_coverage" in refused(tmp_path / "encoder.safetensors", segresnet(), minimum_coverage=bar)


@pytest.mark.parametrize("parts", [(), ("decoder",), ("encoder", "projector")])
def test_parts_that_the_file_does_not_hold_are_refused(parts: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="file holds: encoder"):
        load_encoder(saved(tmp_path, shaken(segresnet())), segresnet(), parts=parts, quiet=True)


def test_a_target_without_a_known_encoder_or_without_memory_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, shaken(segresnet()))
    assert "not known to medclr" in refused(path, nn.Linear(2, 2))
    with torch.device("meta"):
        target = segresnet()
    with pytest.raises(ConfigError, match="meta"):
        load_encoder(path, target, quiet=True)


def test_the_coverage_is_printed_once_also_when_it_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, shaken(segresnet()))
    load_encoder(path, segresnet())
    printed = capsys.readouterr().out
    assert printed.count("encoder.safetensors into SegResNet: 100.0%") == 1
    assert "equal to those of the saved encoder" in printed
    with pytest.raises(WeightsError):
        load_encoder(path, segresnet(in_channels=2))
    assert "mismatched" in capsys.readouterr().out
    load_encoder(path, segresnet(), quiet=True)
    assert capsys.readouterr().out == ""


# Other people's files


@pytest.mark.parametrize(
    "prefix", ["", "module.", "encoder.", "network.", "module.encoder.", "module.network.encoder."]
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_a_plain_state_dict_is_read_under_the_usual_prefixes(prefix: str, suffix: str, tmp_path: Path) -> None:
    source, target, path = shaken(segresnet()), segresnet(), tmp_path / f"weights{suffix}"
    state = OrderedDict((f"{prefix}{name}", tensor) for name, tensor in source.state_dict().items())
    state["head.weight"] = torch.ones(2)
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    coverage = load_encoder(path, target, quiet=True)
    assert coverage.complete
    assert coverage.checked == "not run: the file has no features to compare with"
    assert "head.weight" in coverage.ignored
    assert any(name.startswith("up_layers") for name in coverage.ignored)
    assert torch.equal(target.convInit.conv.weight, source.convInit.conv.weight)


def test_a_prefix_is_not_taken_off_where_that_would_not_fit_wholly(tmp_path: Path) -> None:
    state = {f"encoder.{name}": tensor for name, tensor in shaken(segresnet()).state_dict().items()}
    del state["encoder.convInit.conv.weight"]
    torch.save(state, tmp_path / "weights.pt")
    assert "key_map" in refused(tmp_path / "weights.pt", segresnet(), minimum_coverage=0.5)
    coverage = load_encoder(
        tmp_path / "weights.pt", segresnet(), minimum_coverage=0.5, key_map={"encoder": ""}, quiet=True
    )
    assert coverage.missing == ("convInit.conv.weight",)


def test_a_file_with_two_encoders_is_refused_until_one_is_named(tmp_path: Path) -> None:
    first, second, target = shaken(segresnet()), shaken(segresnet(), seed=2), segresnet()
    state = {f"encoder.{name}": tensor for name, tensor in first.state_dict().items()}
    state |= {f"network.{name}": tensor for name, tensor in second.state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    assert "several encoders" in refused(tmp_path / "weights.pt", target)
    load_encoder(tmp_path / "weights.pt", target, key_map={"network": ""}, quiet=True)
    assert torch.equal(target.convInit.conv.weight, second.convInit.conv.weight)


def test_a_key_map_renames_modules_and_tensors_the_longest_name_first(tmp_path: Path) -> None:
    source, target = shaken(segresnet()), segresnet()
    state = {
        name.replace("convInit.conv.weight", "stem").replace("down_layers", "levels"): tensor
        for name, tensor in source.state_dict().items()
    }
    state["levels.0.1.first"] = state.pop("levels.0.1.conv1.conv.weight")
    torch.save(state, tmp_path / "weights.pt")
    key_map = {
        "stem": "convInit.conv.weight",
        "levels": "down_layers",
        "levels.0.1.first": "down_layers.0.1.conv1.conv.weight",
    }
    assert load_encoder(tmp_path / "weights.pt", target, key_map=key_map, quiet=True).complete
    assert torch.equal(target.convInit.conv.weight, source.convInit.conv.weight)


def test_a_key_map_that_joins_two_tensors_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, shaken(segresnet()))
    assert "two tensors one name" in refused(path, segresnet(), key_map={"down_layers.1.1": "down_layers.1.2"})


# The file itself


def test_the_manifest_is_read_back_and_rebuilds_the_encoder(tmp_path: Path) -> None:
    source = with_norm(shaken(segresnet(in_channels=2)), "instance")
    written = save_encoder(tmp_path / "a.safetensors", Encoder(source), MANIFEST)
    manifest = read_manifest(tmp_path / "a.safetensors")
    assert manifest == written
    assert (manifest.method, manifest.steps, manifest.in_channels) == ("SimCLR", 300, 2)
    assert manifest.norm == ["instance", {"affine": True}]
    assert manifest.parts == ["encoder"]
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(manifest.to_json())
    rebuilt = build_encoder(manifest.architecture)
    assert load_encoder(tmp_path / "a.safetensors", rebuilt, quiet=True).complete


def test_the_header_is_the_truth_and_the_json_beside_it_is_for_reading(tmp_path: Path) -> None:
    path = saved(tmp_path, shaken(segresnet()))
    path.with_suffix(".json").write_text("nonsense")
    assert read_manifest(path).method == "SimCLR"
    assert load_encoder(path, segresnet(), quiet=True).complete


def test_the_same_encoder_gives_the_same_bytes(tmp_path: Path) -> None:
    net = shaken(segresnet())
    assert saved(tmp_path, net, "a.safetensors").read_bytes() == saved(tmp_path, net, "b.safetensors").read_bytes()


@pytest.mark.parametrize(("owner", "name", "fault"), FAULTS)
def test_a_failed_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, fault: Any
) -> None:
    net = shaken(segresnet())
    path = saved(tmp_path, net)
    before = path.read_bytes()
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises(OSError, match=FAULT):
        saved(tmp_path, shaken(net))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["encoder.json", "encoder.safetensors"]


def test_folders_are_made_and_other_suffixes_refused(tmp_path: Path) -> None:
    save_encoder(tmp_path / "new" / "deep" / "encoder.safetensors", shaken(segresnet()), MANIFEST)
    assert (tmp_path / "new" / "deep" / "encoder.json").is_file()
    with pytest.raises(ConfigError, match=r"encoder\.safetensors"):
        save_encoder(tmp_path / "encoder.pt", segresnet(), MANIFEST)


def test_shared_tensors_are_stored_once_and_come_back_under_all_names(tmp_path: Path) -> None:
    def tied() -> SegResNet:
        net = segresnet()
        net.down_layers[1][2] = net.down_layers[1][1]
        return net

    source = shaken(tied())
    path = saved(tmp_path, source)
    stored = safetensors.torch.load_file(path)
    state = encoder_state_dict(path)
    assert len(stored) < len(state)
    assert state.keys() == Encoder(source).state_dict().keys()
    assert torch.equal(state["down_layers.1.2.conv1.conv.weight"], source.down_layers[1][2].conv1.conv.weight)
    assert load_encoder(path, tied(), quiet=True).complete
    assert load_encoder(path, segresnet(), quiet=True).complete


def test_views_of_one_storage_are_stored_as_tensors_of_their_own() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    unique, aliases = share(
        {"a": base, "b": base.T, "c": base[1:], "d": base, "e": torch.zeros(0), "f": torch.zeros(0)}
    )
    assert aliases == {"d": "a"}
    assert all(tensor.is_contiguous() for tensor in unique.values())
    assert torch.equal(unique["b"], base.T)
    assert torch.equal(unique["c"], base[1:])
    safetensors.torch.save(unique)


def test_channels_last_weights_are_saved_and_loaded(tmp_path: Path) -> None:
    source = shaken(segresnet()).to(memory_format=torch.channels_last_3d)
    target = segresnet().to(memory_format=torch.channels_last_3d)
    assert load_encoder(saved(tmp_path, source), target, quiet=True).complete
    assert target.convInit.conv.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(target.convInit.conv.weight, source.convInit.conv.weight)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.pop("manifest"),
        lambda header: header.update(probe=None),
        lambda header: header.update(probe={}),
        lambda header: header.update(aliases={"new": "not there"}),
        lambda header: header["manifest"].update(format_version=99),
        lambda header: header["manifest"].update(method=3),
        lambda header: header["probe"].update(size=[8, 8, 10**6]),
        lambda header: header["probe"].update(features=[[[float("nan")] * 2] * 8] * 3),
    ],
)
@pytest.mark.parametrize("sealed", [True, False])
def test_a_header_that_was_tampered_with_fails(
    change: Callable[[dict[str, Any]], object], sealed: bool, tmp_path: Path
) -> None:
    path = saved(tmp_path, shaken(segresnet()))
    rewrite(path, safetensors.torch.load_file(path), change, sealed=sealed)
    assert ("is damaged" in refused(path, segresnet())) != sealed


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"text"', "[" * 100_000])
def test_a_header_that_is_no_json_object_fails(text: str, tmp_path: Path) -> None:
    path = saved(tmp_path, shaken(segresnet()))
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata={HEADER: text})
    assert "is damaged" in refused(path, segresnet())


def test_a_file_without_a_manifest_has_none_to_read(tmp_path: Path) -> None:
    safetensors.torch.save_file(segresnet().state_dict(), tmp_path / "weights.safetensors")
    torch.save(segresnet().state_dict(), tmp_path / "weights.pt")
    for name in ("weights.safetensors", "weights.pt"):
        with pytest.raises(WeightsError, match="no manifest"):
            read_manifest(tmp_path / name)


# MONAI's own loaders


def test_copy_model_state_takes_the_plain_state_dict(tmp_path: Path) -> None:
    source, target = shaken(segresnet()), segresnet()
    state = encoder_state_dict(saved(tmp_path, source))
    _, updated, _ = copy_model_state(target, state)
    assert set(updated) == set(state) == set(Encoder(source).state_dict())
    assert torch.equal(target.convInit.conv.weight, source.convInit.conv.weight)


@pytest.mark.parametrize("make", [segresnet, lambda: Encoder(segresnet())])
def test_checkpoint_loader_reads_the_plain_state_dict(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    source, target = shaken(segresnet()), make()
    torch.save(encoder_state_dict(saved(tmp_path, source)), tmp_path / "encoder.pt")
    # Never strict_shape=False: of a plain state dict CheckpointLoader then loads nothing, and does not say so.
    strict = isinstance(target, Encoder)
    CheckpointLoader(str(tmp_path / "encoder.pt"), {"network": target}, strict=strict)(
        Engine(lambda engine, batch: None)
    )
    state, wanted = target.state_dict(), Encoder(source).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())


def test_the_coverage_type_is_public() -> None:
    assert Coverage.__module__ == "medclr.weights.coverage"


def test_another_preprocessing_is_refused_where_it_is_asked_for_and_the_target_is_left_alone(tmp_path: Path) -> None:
    theirs = {"orientation": "RAS", "spacing": [1.0, 1.0, 1.0], "intensity": {"name": "Scale", "upper": 99.5}}
    save_encoder(tmp_path / "a.safetensors", segresnet(), Manifest("SimCLR", preprocessing=theirs))
    target = segresnet()
    before = snapshot(target)
    with pytest.raises(WeightsError, match="preprocessed otherwise") as caught:
        load_encoder(tmp_path / "a.safetensors", into=target, preprocessing={**theirs, "spacing": None})
    assert "spacing None here, [1.0, 1.0, 1.0] in pretraining" in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())
    same = {**theirs, "spacing": (1.0, 1.0, 1.0)}
    assert load_encoder(tmp_path / "a.safetensors", into=target, preprocessing=same).complete


def test_weights_of_unknown_preprocessing_fit_any(tmp_path: Path) -> None:
    save_encoder(tmp_path / "a.safetensors", segresnet(), MANIFEST)
    assert load_encoder(tmp_path / "a.safetensors", into=segresnet(), preprocessing={"spacing": None}).complete
