"""Every overlay of the pretraining bundle trains, alone, with others, and in two ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow

from medclr import distributed
from medclr.errors import ConfigError, MedclrError, find_cause
from medclr.weights import encoder_state_dict, read_manifest
from tests.bundles.test_contrastive_pretraining import CONFIGS, SETTINGS
from tests.distributed.conftest import run_ranks as run_ranks

OVERLAYS = {
    "moco.yaml": {"queue_size": 12},
    "mocov3.yaml": {},
    "byol.yaml": {},
    "supcon.yaml": {"label_column": "diagnosis"},
    "yaware.yaml": {},
    "patient.yaml": {"batch_size": 8, "passes": 8},  # more draws than patients: one comes twice
    "cached.yaml": {"batch_size": 4, "chunk_size": 2},
}
METHODS = {"moco.yaml": "MoCo v2", "mocov3.yaml": "MoCo v3", "byol.yaml": "BYOL"}


@pytest.fixture(scope="module")
def datalist(cohort_rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four patients in training, with what the overlays ask of their columns."""
    folder = tmp_path_factory.mktemp("overlays")
    rows = []
    for number, row in enumerate(cohort_rows[:8]):
        name = Path(row["image"]).name
        shutil.copy(row["image"], folder / name)
        patient = int(row["patient_id"].split()[1])
        columns = {"age": 50.0 + 7 * patient, "diagnosis": "ab"[patient % 2], "site": f"site {patient % 2}"}
        rows.append({"image": name, "patient_id": row["patient_id"], "days": 30 * number, **columns})
    path = folder / "datalist.json"
    path.write_text(json.dumps({"training": rows}))
    return path


def trained(configs: list[str], datalist: Path, output: Path, **settings: Any) -> ConfigWorkflow:
    run = ConfigWorkflow(
        config_file=[str(CONFIGS / name) for name in ["train.yaml", *configs]],
        meta_file=str(CONFIGS / "metadata.json"),
        logging_file=False,  # type: ignore[arg-type]
        workflow_type="train",
        **{
            **SETTINGS,
            "batch_size": 4,
            "passes": 4,
            "val_interval": 0,
            "datalist": str(datalist),
            "output_dir": str(output),
            **settings,
        },
    )
    run.initialize()
    run.run()
    return run


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_trains_and_leaves_an_encoder_of_its_method(overlay: str, datalist: Path, tmp_path: Path) -> None:
    run = trained([overlay], datalist, tmp_path, **OVERLAYS[overlay])
    assert run.check_properties() in (None, [])
    manifest = read_manifest(tmp_path / "encoder.safetensors")
    assert manifest.method == METHODS.get(overlay, "SimCLR")
    assert manifest.steps == 8
    plain = tmp_path / "plain"
    trained([], datalist, plain, **{name: OVERLAYS[overlay].get(name, 4) for name in ("batch_size", "passes")})
    states = [encoder_state_dict(folder / "encoder.safetensors") for folder in (tmp_path, plain)]
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0]), "it changes nothing"


@pytest.mark.parametrize(
    "overlays",
    [
        ["moco.yaml", "patient.yaml"],
        ["mocov3.yaml", "cached.yaml", "supcon.yaml"],
        ["byol.yaml", "cached.yaml"],
        ["moco.yaml", "yaware.yaml", "cached.yaml"],
    ],
)
def test_overlays_go_together(overlays: list[str], datalist: Path, tmp_path: Path) -> None:
    settings = {name: value for overlay in overlays for name, value in OVERLAYS[overlay].items()}
    trained(overlays, datalist, tmp_path, **settings, max_epochs=1)
    assert read_manifest(tmp_path / "encoder.safetensors").steps == 4


def test_sites_can_be_drawn_alike(datalist: Path, tmp_path: Path) -> None:
    trained([], datalist, tmp_path, balance="site", max_epochs=1)
    assert read_manifest(tmp_path / "encoder.safetensors").steps == 4


@pytest.mark.parametrize(
    ("overlay", "settings", "problem"),
    [
        ("supcon.yaml", {"label_column": "stage"}, "stage"),
        ("yaware.yaml", {"bandwidth": -1}, "bandwidth"),
        ("moco.yaml", {"queue_size": 2}, "queue"),
        ("cached.yaml", {"head_norm": "batch"}, "norm"),
        ("cached.yaml", {"chunk_size": 0}, "chunk"),
        ("byol.yaml", {"balance": "scanner"}, "scanner"),
    ],
)
def test_an_unusable_setting_ends_in_an_error_of_medclrs(
    overlay: str, settings: dict[str, Any], problem: str, datalist: Path, tmp_path: Path
) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # MONAI wraps it in an error of its own
        trained([overlay], datalist, tmp_path, **{**OVERLAYS[overlay], **settings})
    cause = find_cause(caught.value)
    assert isinstance(cause, MedclrError), f"no MedclrError behind {caught.value!r}"
    assert problem in str(cause)
    assert isinstance(cause, ConfigError) or "datalist" in str(cause)


def in_this_rank(datalist: Path, folder: Path) -> dict[str, Any]:
    """All methods, one after the other; the weights that this rank ends with."""
    weights = {}
    for overlay in ("", "moco.yaml", "mocov3.yaml", "byol.yaml", "cached.yaml"):
        configs = [*([overlay] if overlay else []), "multi_gpu.yaml"]
        settings = {**OVERLAYS.get(overlay, {}), "max_epochs": 1, "head_norm": "layer"}
        run = trained(configs, datalist, folder / (overlay or "simclr"), **settings)
        weights[overlay or "simclr"] = {
            name: value.clone() for name, value in run.parser.get_parsed_content("network_def").state_dict().items()
        }
        assert distributed.world_size() == 2
    return weights


@pytest.mark.slow
def test_every_method_ends_with_equal_weights_on_two_ranks(
    datalist: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    first, second = run_ranks(in_this_rank, datalist, tmp_path / "output", timeout=200.0)
    assert set(first) == {"simclr", "moco.yaml", "mocov3.yaml", "byol.yaml", "cached.yaml"}
    for method, state in first.items():
        for name, value in state.items():
            assert torch.equal(value, second[method][name]), f"{method}: {name}"
        assert read_manifest(tmp_path / "output" / method / "encoder.safetensors").steps == 2
