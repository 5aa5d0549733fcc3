from __future__ import annotations

import csv
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow, verify_metadata, verify_net_in_out
from monai.networks.nets import SegResNet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medclr import Encoder, Manifest, load_encoder, save_encoder
from medclr.data import Preprocessing, read_datalist
from medclr.errors import MedclrError, find_cause
from medclr.models import norm_argument
from medclr.weights import patient_digests
from tests.distributed.conftest import run_ranks as run_ranks

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "segmentation"
CONFIGS = BUNDLE / "configs"
SETTINGS: dict[str, Any] = {
    "bundle_root": str(BUNDLE),
    "roi_size": [16, 16, 16],
    "init_filters": 8,
    "batch_size": 2,
    "max_epochs": 2,
    "steps_per_epoch": 2,
    "val_interval": 1,
    "device": "$torch.device('cpu')",
    "precision": "fp32",
}


def workflow(configs: list[str], kind: str, **settings: Any) -> ConfigWorkflow:
    return ConfigWorkflow(
        config_file=[str(CONFIGS / name) for name in configs],
        meta_file=str(CONFIGS / "metadata.json"),
        logging_file=False,  # type: ignore[arg-type]  # it would replace the handlers that watch the log here
        workflow_type=kind,
        **{**SETTINGS, **settings},
    )


def run(configs: list[str], kind: str, **settings: Any) -> ConfigWorkflow:
    done = workflow(configs, kind, **settings)
    done.initialize()
    done.run()
    done.finalize()
    return done


@pytest.fixture(scope="module")
def datalist(cohort_rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three patients with six scans for training, one with two for validation, and copies of those two for test.

    The copies lie in two folders and have the same file name.
    """
    folder = tmp_path_factory.mktemp("segmentation")
    local: list[dict[str, Any]] = []
    for row in cohort_rows:
        names = {key: Path(row[key]).name for key in ("image", "label")}
        for key, name in names.items():
            shutil.copy(row[key], folder / name)
        local.append({**names, "patient_id": row["patient_id"]})
    test = []
    for number, row in enumerate(local[6:8]):
        (folder / f"site {number}").mkdir()
        copies = {key: f"site {number}/{key}.nii.gz" for key in ("image", "label")}
        for key, name in copies.items():
            shutil.copy(folder / row[key], folder / name)
        test.append({**copies, "patient_id": f"test {number}"})
    path = folder / "datalist.json"
    path.write_text(json.dumps({"training": local[:6], "validation": local[6:8], "test": test}))
    return path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder that fits the bundle's network, with weights that no initialisation would draw."""
    path = tmp_path_factory.mktemp("pretraining") / "encoder.safetensors"
    encoder = Encoder(SegResNet(init_filters=8, norm=norm_argument("group")))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).reshape(parameter.shape) + 0.01)
    save_encoder(path, encoder, Manifest("SimCLR", preprocessing=Preprocessing().describe()))
    return path


@pytest.fixture(scope="module")
def trained(datalist: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one short run from pretrained weights."""
    output = tmp_path_factory.mktemp("output")
    run(["train.yaml"], "train", datalist=str(datalist), output_dir=str(output), pretrained=str(pretrained))
    return output


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, weights_only=True)
    assert set(content) == {"network", "settings", "run", "patients", "digest"}
    return content["network"]


def test_training_leaves_the_best_and_the_last_network_and_its_curves(trained: Path) -> None:
    assert weights_of(trained / "best.pt").keys() == weights_of(trained / "last.pt").keys()
    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"loss", "learning_rate", "dice"} <= scalars
    assert len(events.Scalars("loss")) == 4
    assert [point.step for point in events.Scalars("dice")] == [2, 4]


def test_the_run_and_its_networks_say_with_what_they_were_made(trained: Path, datalist: Path) -> None:
    content = json.loads((trained / "run.json").read_text())
    assert content["configuration"]["out_channels"] == 2
    assert content["datalist_digest"] == read_datalist(datalist).digest()
    assert [attempt["outcome"] for attempt in content["attempts"]] == ["completed"]
    about = torch.load(trained / "last.pt", weights_only=True)["run"]
    assert about["hardware"]["cores"]
    assert str(datalist) not in json.dumps(about)


def with_test_patients(datalist: Path, name: str, patients: list[str]) -> Path:
    """The same scans, but for the patients that those of the test section are said to be of."""
    content = json.loads(datalist.read_text())
    training = [row for row in content["training"] if row["patient_id"] not in patients]
    test = [{**row, "patient_id": patient} for row, patient in zip(content["test"], patients, strict=True)]
    path = datalist.with_name(name)
    path.write_text(json.dumps({"training": training, "test": test}))
    return path


def test_the_networks_know_their_patients_by_digests_and_the_run_does_not(trained: Path, datalist: Path) -> None:
    sections = read_datalist(datalist)
    seen = torch.load(trained / "best.pt", weights_only=True)["patients"]
    assert seen["training"] == patient_digests(sections.training)
    assert seen["validation"] == patient_digests(sections.validation)
    assert seen["pretraining"] is None, "the fixture's encoder does not say"
    assert seen["training"][0] not in (trained / "run.json").read_text()


def test_a_network_is_not_evaluated_on_its_training_patients_unless_a_key_allows_it(
    trained: Path, datalist: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leak = with_test_patients(datalist, "leak.json", ["patient 0", "test 1"])
    settings = {"datalist": str(leak), "checkpoint": str(trained / "best.pt"), "output_dir": str(tmp_path)}
    with pytest.raises(Exception) as caught:  # noqa: PT011  # MONAI wraps it in an error of its own
        run(["train.yaml", "evaluate.yaml"], "train", **settings)
    message = str(find_cause(caught.value))
    assert "1 of 2 patients, whom best.pt was fine-tuned on" in message
    assert "patient 0" not in message
    assert not (tmp_path / "dice_test.csv").exists()
    run(["train.yaml", "evaluate.yaml"], "train", **settings, allow_seen_patients=True)
    assert "1 of 2 patients of test were seen: best.pt was fine-tuned on them" in caplog.messages
    assert (tmp_path / "dice_test.csv").exists()


@pytest.mark.parametrize("configs", [["train.yaml"], ["train.yaml", "evaluate.yaml", "train_evaluate.yaml"]])
def test_no_training_starts_from_an_encoder_that_knows_its_test_patients(
    configs: list[str], datalist: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(SegResNet(init_filters=8, norm=norm_argument("group")))
    load_encoder(pretrained, into=encoder, quiet=True)
    weights = tmp_path / "encoder.safetensors"
    digests = patient_digests([{"patient_id": "test 1"}, {"patient_id": "patient 0"}])
    save_encoder(weights, encoder, Manifest("SimCLR", patient_digests=digests))
    monkeypatch.setattr("medclr.data.Preprocessing.volume", lambda *values: pytest.fail("a scan was read"))
    settings = {"datalist": str(datalist), "output_dir": str(tmp_path / "output"), "pretrained": str(weights)}
    with pytest.raises(Exception) as caught:  # noqa: PT011  # MONAI wraps it in an error of its own
        run(configs, "train", **settings)
    assert "1 of 2 patients, whom encoder.safetensors was pretrained on" in str(find_cause(caught.value))


def test_a_complete_training_is_not_run_again_and_another_one_in_its_place_is_refused(
    trained: Path, datalist: Path, pretrained: Path
) -> None:
    settings = {"datalist": str(datalist), "output_dir": str(trained), "pretrained": str(pretrained)}
    before = (trained / "last.pt").stat().st_mtime_ns
    run(["train.yaml"], "train", **settings)
    assert (trained / "last.pt").stat().st_mtime_ns == before
    with pytest.raises(Exception) as caught:  # noqa: PT011  # MONAI wraps it in an error of its own
        run(["train.yaml"], "train", **settings, learning_rate=0.1)
    assert "learning_rate: 0.002 -> 0.1" in str(find_cause(caught.value))


def test_a_run_that_an_error_stops_leaves_no_network_of_its_last_step(datalist: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # MONAI wraps it in an error of its own
        run(
            ["train.yaml"],
            "train",
            datalist=str(datalist),
            output_dir=str(tmp_path),
            learning_rate=1e30,
            val_interval=0,
            max_skipped=0,
            max_epochs=20,
        )
    assert "The loss is no number" in str(find_cause(caught.value))
    assert not (tmp_path / "last.pt").exists()
    assert json.loads((tmp_path / "nonfinite_batches.json").read_text())["scans"]


def test_a_frozen_encoder_is_the_pretrained_one_after_training(
    datalist: Path, pretrained: Path, tmp_path: Path
) -> None:
    run(
        ["train.yaml"],
        "train",
        datalist=str(datalist),
        output_dir=str(tmp_path),
        pretrained=str(pretrained),
        val_interval=0,
        freeze_steps=4,
    )
    network = SegResNet(init_filters=8, norm=norm_argument("group"))
    fresh = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    source = Encoder(network)
    load_encoder(pretrained, into=source, quiet=True)
    state = weights_of(tmp_path / "last.pt")
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert not torch.equal(state["conv_final.2.conv.weight"], fresh["conv_final.2.conv.weight"])
    assert not (tmp_path / "best.pt").exists()


def test_an_encoder_from_scratch_is_never_frozen(datalist: Path, tmp_path: Path) -> None:
    states = []
    for steps in (0, 4):
        output = tmp_path / str(steps)
        run(["train.yaml"], "train", datalist=str(datalist), output_dir=str(output), val_interval=0, freeze_steps=steps)
        states.append(weights_of(output / "last.pt"))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_training_and_evaluation_in_one_run_give_what_two_runs_give(datalist: Path, tmp_path: Path) -> None:
    together, apart = tmp_path / "together", tmp_path / "apart"
    settings = {"datalist": str(datalist), "val_interval": 0}
    run(["train.yaml", "evaluate.yaml", "train_evaluate.yaml"], "train", output_dir=str(together), **settings)
    run(["train.yaml"], "train", output_dir=str(apart), **settings)
    run(["train.yaml", "evaluate.yaml"], "train", output_dir=str(apart), predictions=str(apart / "masks"), **settings)
    assert (together / "dice_test.csv").read_text() == (apart / "dice_test.csv").read_text()
    assert len(list((apart / "masks").rglob("*_seg.nii.gz"))) == 2


def test_pretraining_and_scratch_differ_in_the_encoder_alone_at_the_start(
    datalist: Path, pretrained: Path, tmp_path: Path
) -> None:
    states, crops = [], []
    for weights in (None, str(pretrained)):
        done = workflow(
            ["train.yaml"],
            "train",
            datalist=str(datalist),
            output_dir=str(tmp_path),
            pretrained=weights,
            val_interval=0,
        )
        done.initialize()
        network = done.parser.get_parsed_content("network_def")
        states.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        crops.append(next(iter(done.parser.get_parsed_content("train::dataloader")))["image"].as_tensor())
    names = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert names
    assert all(name.startswith(("convInit", "down_layers")) for name in names)
    torch.testing.assert_close(crops[0], crops[1], rtol=0, atol=0)


def test_the_same_seed_gives_the_same_network(datalist: Path, tmp_path: Path) -> None:
    states = []
    for place in ("first", "second"):
        run(["train.yaml"], "train", datalist=str(datalist), output_dir=str(tmp_path / place), val_interval=0)
        states.append(weights_of(tmp_path / place / "last.pt"))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_evaluation_compares_on_the_scans_own_grid(datalist: Path, trained: Path) -> None:
    run(["train.yaml", "evaluate.yaml"], "train", datalist=str(datalist), output_dir=str(trained))
    with (trained / "dice_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    summary = json.loads((trained / "dice_test.json").read_text())
    assert [row["patient"] for row in rows] == ["test 0", "test 1"]
    assert summary["patients"] == summary["scans"] == 2
    values = [float(row["class_1"]) for row in rows]
    assert summary["mean"] == pytest.approx(np.mean(values), abs=1e-5)


def test_inference_writes_a_file_a_scan_on_its_own_grid_and_agrees_with_evaluation(
    datalist: Path, trained: Path
) -> None:
    run(["train.yaml", "evaluate.yaml"], "train", datalist=str(datalist), output_dir=str(trained))
    run(["inference.yaml"], "infer", datalist=str(datalist), output_dir=str(trained))
    with (trained / "dice_test.csv").open() as file:
        dice = [float(row["class_1"]) for row in csv.DictReader(file)]
    for number in range(2):
        place = datalist.parent / f"site {number}"
        written = nibabel.load(trained / "predictions" / f"site {number}" / "image_seg.nii.gz")
        image, mask = nibabel.load(place / "image.nii.gz"), nibabel.load(place / "label.nii.gz")
        assert written.shape == image.shape
        assert written.get_data_dtype() == np.uint8
        np.testing.assert_allclose(written.affine, image.affine, atol=1e-4)
        prediction, truth = np.asarray(written.dataobj) == 1, np.asarray(mask.dataobj) == 1
        expected = 2 * (prediction & truth).sum() / (prediction.sum() + truth.sum())
        assert dice[number] == pytest.approx(expected, abs=1e-5)


def test_predictions_of_resampled_scans_return_to_their_grid(datalist: Path, tmp_path: Path) -> None:
    settings = {"datalist": str(datalist), "output_dir": str(tmp_path), "spacing": [1.3, 1.3, 1.3]}
    run(["train.yaml"], "train", val_interval=0, max_epochs=1, **settings)
    run(["inference.yaml"], "infer", checkpoint=str(tmp_path / "last.pt"), **settings)
    for number in range(2):
        written = nibabel.load(tmp_path / "predictions" / f"site {number}" / "image_seg.nii.gz")
        image = nibabel.load(datalist.parent / f"site {number}" / "image.nii.gz")
        assert written.shape == image.shape
        np.testing.assert_allclose(written.affine, image.affine, atol=1e-4)


@pytest.mark.parametrize(
    ("configs", "kind"),
    [(["train.yaml"], "train"), (["train.yaml", "evaluate.yaml"], "train"), (["inference.yaml"], "infer")],
)
def test_a_workflow_has_the_properties_that_monai_asks_for(
    configs: list[str], kind: str, datalist: Path, trained: Path, tmp_path: Path
) -> None:
    output = tmp_path if configs == ["train.yaml"] else trained
    done = workflow(configs, kind, datalist=str(datalist), output_dir=str(output))
    done.initialize()
    assert done.check_properties() in (None, [])


def test_the_network_takes_and_gives_what_the_metadata_says() -> None:
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(CONFIGS / "metadata.json"),
        config_file=str(CONFIGS / "inference.yaml"),
        device="cpu",
    )


def test_the_metadata_follows_the_schema(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    shutil.copy(Path(__file__).with_name("metadata_schema.json"), schema)
    verify_metadata(meta_file=str(CONFIGS / "metadata.json"), filepath=str(schema))


def test_a_bad_mask_is_quarantined_and_the_run_goes_on(
    datalist: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(datalist.parent, folder)
    mask = nibabel.load(folder / "scan_0_label.nii.gz")
    wrong = np.asarray(mask.dataobj).astype(np.uint8) * 7
    nibabel.save(nibabel.Nifti1Image(wrong, mask.affine), folder / "scan_0_label.nii.gz")
    with caplog.at_level(logging.INFO):
        run(
            ["train.yaml"],
            "train",
            datalist=str(folder / "datalist.json"),
            output_dir=str(tmp_path / "output"),
            val_interval=0,
        )
    assert "1 scans quarantined" in caplog.messages
    (line,) = (tmp_path / "output" / "quarantine_training.jsonl").read_text().splitlines()
    assert "class 7" in json.loads(line)["reason"]


@pytest.mark.parametrize(
    ("configs", "kind", "settings", "problem"),
    [
        (["train.yaml"], "train", {"pretrained": "nowhere.safetensors"}, "not there"),
        (["train.yaml"], "train", {"roi_size": [16, 16, 20]}, "windows of this size"),
        (["train.yaml"], "train", {"norm": "none of these"}, "norm"),
        (["train.yaml"], "train", {"in_channels": 2}, "sequences"),
        (["train.yaml"], "train", {"precision": "fp16"}, "fp16"),
        (["train.yaml"], "train", {"freeze_steps": -1}, "freeze"),
        (["train.yaml", "evaluate.yaml"], "train", {"section": "tset"}, "tset"),
        (["train.yaml", "evaluate.yaml"], "train", {"spacing": [2.0, 2.0, 2.0]}, "spacing"),
        (["train.yaml", "evaluate.yaml"], "train", {"init_filters": 16}, "init_filters"),
        (["train.yaml", "evaluate.yaml"], "train", {"out_channels": 3}, "conv_final"),
        (["train.yaml", "evaluate.yaml"], "train", {"class_names": ["one", "two"]}, "names"),
        (["inference.yaml"], "infer", {"checkpoint": "nowhere.pt"}, "not there"),
        (["inference.yaml"], "infer", {"orientation": "LPS"}, "orientation"),
    ],
)
def test_an_unusable_setting_ends_in_an_error_of_medclrs(
    configs: list[str],
    kind: str,
    settings: dict[str, Any],
    problem: str,
    datalist: Path,
    trained: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path if configs == ["train.yaml"] else trained
    with pytest.raises(Exception) as caught:  # noqa: PT011  # MONAI wraps it in an error of its own
        run(configs, kind, **{"datalist": str(datalist), "output_dir": str(output), **settings})
    cause = find_cause(caught.value)
    assert isinstance(cause, MedclrError), f"no MedclrError behind {caught.value!r}"
    assert problem in str(cause)
    assert cause.fix


def in_this_rank(datalist: str, output: str) -> dict[str, torch.Tensor]:
    """One short training in several ranks; the weights that this rank ends with."""
    configs = ["train.yaml", "multi_gpu.yaml"]
    done = workflow(configs, "train", datalist=datalist, output_dir=output, pretrained=None, freeze_steps=1)
    done.initialize()
    done.run()  # and no end of the process group, which is the test's
    state = done.parser.get_parsed_content("network_def").state_dict()
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.slow
def test_two_ranks_end_with_one_network(
    datalist: Path, tmp_path: Path, run_ranks: Callable[..., list[dict[str, torch.Tensor]]]
) -> None:
    first, second = run_ranks(in_this_rank, str(datalist), str(tmp_path / "output"))
    saved = weights_of(tmp_path / "output" / "last.pt")
    assert all(torch.equal(value, second[name]) and torch.equal(value, saved[name]) for name, value in first.items())
    assert (tmp_path / "output" / "best.pt").exists()
