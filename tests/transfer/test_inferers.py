from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.inferers import Inferer, SimpleInferer, SlidingWindowInferer
from torch import Tensor, nn

from medclr.errors import ConfigError
from medclr.transfer import AutocastInferer, needs_scaler


class Watched(nn.Conv3d):
    """Keeps what it was shown and what it answered in."""

    def __init__(self) -> None:
        super().__init__(1, 2, 3, padding=1)
        self.kinds: list[type] = []
        self.dtypes: list[torch.dtype] = []

    def forward(self, image: Tensor) -> Tensor:
        prediction = super().forward(image)
        self.kinds.append(type(image))
        self.dtypes.append(prediction.dtype)
        return prediction


def inferer_of(inferer: Inferer, *, bf16: bool = True) -> AutocastInferer:
    return AutocastInferer(inferer, torch.autocast("cpu", torch.bfloat16, enabled=bf16))


INFERERS = [SimpleInferer(), SlidingWindowInferer((8, 8, 8), sw_batch_size=2, overlap=0.5)]


@pytest.mark.parametrize("inferer", INFERERS, ids=lambda inferer: type(inferer).__name__)
def test_the_network_computes_in_bf16_and_the_prediction_is_float32(inferer: Inferer) -> None:
    network, image = Watched(), torch.randn(1, 1, 12, 9, 8)
    prediction = inferer_of(inferer)(image, network)
    assert set(network.dtypes) == {torch.bfloat16}
    assert prediction.dtype == torch.float32
    assert prediction.shape == (1, 2, 12, 9, 8)
    exact = inferer(image, network)
    torch.testing.assert_close(prediction, exact, rtol=0.05, atol=0.05)
    assert not torch.equal(prediction, exact)


@pytest.mark.parametrize("inferer", INFERERS, ids=lambda inferer: type(inferer).__name__)
def test_without_autocast_it_is_the_inferer_itself(inferer: Inferer) -> None:
    network, image = Watched(), torch.randn(1, 1, 12, 9, 8)
    assert torch.equal(inferer_of(inferer, bf16=False)(image, network), inferer(image, network))
    assert set(network.dtypes) == {torch.float32}


@pytest.mark.parametrize("inferer", INFERERS, ids=lambda inferer: type(inferer).__name__)
def test_the_network_sees_plain_tensors_and_the_image_keeps_its_affine(inferer: Inferer) -> None:
    network, affine = Watched(), torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    image = MetaTensor(torch.randn(1, 1, 12, 9, 8), affine=affine)
    prediction = inferer_of(inferer)(image, network)
    assert set(network.kinds) == {Tensor}
    assert type(prediction) is Tensor
    assert isinstance(image, MetaTensor)
    assert torch.equal(image.affine, affine)


def test_the_context_is_left_again_also_after_an_error() -> None:
    inferer = inferer_of(SimpleInferer())
    for _ in range(2):
        inferer(torch.zeros(1, 1, 4, 4, 4), Watched())
        assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(RuntimeError):
        inferer(torch.zeros(1, 7, 4, 4, 4), Watched())
    assert not torch.is_autocast_enabled("cpu")


def test_arguments_are_passed_on() -> None:
    def network(image: Tensor, scale: float, *, offset: float) -> Tensor:
        return image * scale + offset

    prediction = inferer_of(SimpleInferer())(torch.ones(1, 1, 2, 2, 2), network, 3.0, offset=1.0)
    assert prediction.unique().tolist() == [4.0]


def test_gradients_reach_the_parameters_in_float32() -> None:
    network = Watched()
    inferer_of(SimpleInferer())(torch.randn(1, 1, 6, 6, 6), network).square().mean().backward()
    assert network.weight.grad is not None
    assert network.weight.grad.dtype == torch.float32
    assert bool(network.weight.grad.any())


def test_monais_engines_compute_the_loss_and_the_metrics_outside_of_the_context() -> None:
    network, seen = Watched(), []

    def loss(prediction: Tensor, label: Tensor) -> Tensor:
        seen.append((prediction.dtype, torch.is_autocast_enabled("cpu")))
        return nn.functional.cross_entropy(prediction, label)

    data = [{"image": torch.randn(1, 1, 6, 6, 6), "label": torch.zeros(1, 6, 6, 6, dtype=torch.int64)}]
    common: dict[str, Any] = {"device": "cpu", "network": network, "inferer": inferer_of(SimpleInferer())}
    SupervisedTrainer(
        max_epochs=1,
        train_data_loader=data,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=loss,
        decollate=False,
        **common,
    ).run()
    evaluator = SupervisedEvaluator(val_data_loader=data, decollate=False, **common)
    evaluator.run()
    assert seen == [(torch.float32, False)]
    assert network.dtypes == [torch.bfloat16] * 2


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1", torch.device("cuda", 0)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fp32_and_bf16_need_no_scaler_on_any_device(device: Any, precision: str) -> None:
    assert needs_scaler(device, precision) is False


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0)])
def test_fp16_needs_a_scaler_on_cuda(device: Any) -> None:
    assert needs_scaler(device, "fp16") is True


@pytest.mark.parametrize("device", ["cpu", "mps", torch.device("cpu")])
def test_fp16_elsewhere_is_refused(device: Any) -> None:
    with pytest.raises(ConfigError, match="CUDA") as caught:
        needs_scaler(device, "fp16")
    assert torch.device(device).type in str(caught.value.got)
