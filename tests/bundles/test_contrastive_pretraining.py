from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow, verify_metadata, verify_net_in_out
from monai.bundle.workflows import _reject_executable_logging_config
from monai.networks.nets import SegResNet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medclr import load_encoder, save_encoder
from medclr.data import read_datalist
from medclr.engine import STOPPED_EXIT_CODE, CheckpointFolder
from medclr.errors import MedclrError, find_cause
from medclr.models import norm_argument
from medclr.weights import encoder_state_dict, patient_digests, read_manifest
from medclr.weights.manifest import LEFT_OUT

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "contrastive_pretraining"
CONFIGS = BUNDLE / "configs"
SETTINGS: dict[str, Any] = {
    "bundle_root": str(BUNDLE),
    "roi_size": [16, 16, 16],
    "init_filters": 8,
    "batch_size": 2,
    "passes": 2,
    "max_epochs": 2,
    "val_interval": 1,
    "save_interval": 1,
    "log_interval": 1,
    "device": "$torch.device('cpu')",
    "precision": "fp32",
}


def write_datalist(rows: list[dict[str, Any]], folder: Path, training: int) -> Path:
    """The first rows for training; the rest serve as validation and, as copies of other patients, as test."""
    folder.mkdir(parents=True, exist_ok=True)
    local: list[dict[str, Any]] = []
    for row in rows:
        image = folder / Path(row["image"]).name
        shutil.copy(row["image"], image)
        local.append({"image": image.name, "patient_id": row["patient_id"]})
    test = []
    for row in local[training:]:
        copy = f"test_{row['image']}"
        shutil.copy(folder / row["image"], folder / copy)
        test.append({"image": copy, "patient_id": f"test {row['patient_id']}"})
    path = folder / "datalist.json"
    path.write_text(json.dumps({"training": local[:training], "validation": local[training:], "test": test}))
    return path


def workflow(configs: list[str], kind: str, **settings: Any) -> ConfigWorkflow:
    return ConfigWorkflow(
        config_file=[str(CONFIGS / name) for name in configs],
        meta_file=str(CONFIGS / "metadata.json"),
        logging_file=False,  # type: ignore[arg-type]  # it would replace the handlers that watch the log here
        workflow_type=kind,
        **{**SETTINGS, **settings},
    )


@pytest.fixture(scope="module")
def trained(cohort_rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The datalist and the output folder of one short run through the bundle."""
    folder = tmp_path_factory.mktemp("pretraining")
    datalist, output = write_datalist(cohort_rows, folder / "data", training=6), folder / "output"
    run = workflow(["train.yaml"], "train", datalist=str(datalist), output_dir=str(output))
    run.initialize()
    run.run()
    run.finalize()
    return datalist, output


def test_a_run_leaves_an_encoder_that_fits_a_segmentation_network(trained: tuple[Path, Path]) -> None:
    _, output = trained
    network = SegResNet(init_filters=8, norm=norm_argument("group"), out_channels=3)
    assert load_encoder(output / "encoder.safetensors", into=network).fraction == 1.0


def test_the_manifest_says_how_the_weights_were_made(trained: tuple[Path, Path]) -> None:
    manifest = read_manifest(trained[1] / "encoder.safetensors")
    assert manifest.method == "SimCLR"
    assert manifest.steps == 6
    assert manifest.epochs == 2
    assert manifest.patients == 3
    assert manifest.scans == 6
    assert manifest.crop_size == [16, 16, 16]
    assert manifest.preprocessing is not None
    assert manifest.preprocessing["orientation"] == "RAS"
    assert manifest.datalist_digest


def test_the_manifest_knows_the_patients_by_digests_and_the_run_does_not(trained: tuple[Path, Path]) -> None:
    sections = read_datalist(trained[0])
    manifest = read_manifest(trained[1] / "encoder.safetensors")
    assert manifest.patient_digests == patient_digests(sections.training)
    assert manifest.validation_digests == patient_digests(sections.validation)
    assert len(manifest.patient_digests) == 3
    assert manifest.patient_digests[0] not in (trained[1] / "run.json").read_text()


def test_patients_of_before_a_forced_change_stay_in_the_manifest(trained: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(trained[1], tmp_path / "output")
    content = json.loads(trained[0].read_text())
    new = {**content["training"][3], "patient_id": "new"}  # the only scan of its patient
    other = trained[0].with_name("changed.json")
    other.write_text(json.dumps({"training": [*content["training"][:3], new, *content["training"][4:]]}))
    settings = {"datalist": str(other), "output_dir": str(tmp_path / "output"), "resume": "force", "val_interval": 0}
    run = workflow(["train.yaml"], "train", **settings, max_epochs=3)
    run.initialize()
    run.run()
    before, after = (read_manifest(folder / "encoder.safetensors") for folder in (trained[1], tmp_path / "output"))
    assert set(after.patient_digests or ()) > set(before.patient_digests or ())
    assert patient_digests([new])[0] in (after.patient_digests or ())
    assert after.validation_digests == before.validation_digests, "they were looked at, though not by this attempt"


def test_a_run_may_keep_its_patients_to_itself(trained: tuple[Path, Path], tmp_path: Path) -> None:
    settings = {"datalist": str(trained[0]), "output_dir": str(tmp_path), "val_interval": 0, "max_epochs": 1}
    run = workflow(["train.yaml"], "train", record_patients=False, **settings)
    run.initialize()
    run.run()
    manifest = read_manifest(tmp_path / "encoder.safetensors")
    assert manifest.patient_digests is manifest.validation_digests is None


def test_an_encoder_is_not_evaluated_on_its_training_patients_unless_a_key_allows_it(
    trained: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = json.loads(trained[0].read_text())
    leak = trained[0].with_name("leak.json")
    leak.write_text(json.dumps({"test": [*content["training"][:1], *content["test"]]}))
    settings = {"datalist": str(leak), "pretrained": str(trained[1] / "encoder.safetensors")}
    settings["output_dir"] = str(tmp_path)
    configs = ["train.yaml", "evaluate.yaml"]
    with pytest.raises(Exception) as caught:  # noqa: PT011  # MONAI wraps it in an error of its own
        workflow(configs, "train", **settings).initialize()
    assert "1 of 3 patients, whom encoder.safetensors was pretrained on" in str(find_cause(caught.value))
    for allowed in ({"allow_seen_patients": True}, {"untrained": True}):
        caplog.clear()
        workflow(configs, "train", **settings, **allowed).initialize()
        assert any("were seen" in message for message in caplog.messages) == ("untrained" not in allowed)


def test_the_checkpoint_holds_all_that_the_run_was(trained: tuple[Path, Path]) -> None:
    found = CheckpointFolder(trained[1] / "checkpoints").newest()
    assert found is not None
    assert set(found.state["items"]) == {"method", "optimizer", "lr_scheduler"}
    assert {"grad_scaler", "iteration"} <= set(found.state["trainer"])
    assert found.state["best"][0]["epoch"] >= 1
    assert found.about["completed"]
    assert found.about["step"] == 6
    assert found.about["configuration"]["train"]["trainer"]["clip_norm"] == 1.0


def test_run_and_weights_say_with_what_they_were_made(trained: tuple[Path, Path]) -> None:
    run = json.loads((trained[1] / "run.json").read_text())
    assert run["configuration"]["batch_size"] == 2
    assert run["configuration"]["val_metric"] in ("pair_recall", "effective_rank")
    assert run["datalist_digest"] == read_datalist(trained[0]).digest()
    manifest = read_manifest(trained[1] / "encoder.safetensors")
    assert manifest.settings["batch_size"] == 2
    assert manifest.settings["datalist"] == LEFT_OUT
    assert manifest.run["hardware"]["cores"]
    assert manifest.run["wall_s"] >= 0


def test_a_complete_run_is_not_run_again(trained: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    datalist, output = trained
    before = (output / "encoder.safetensors").stat().st_mtime_ns
    run = workflow(["train.yaml"], "train", datalist=str(datalist), output_dir=str(output))
    run.initialize()
    with caplog.at_level(logging.INFO):
        run.run()
    assert any("the run is complete (6 steps)" in message for message in caplog.messages)
    assert (output / "encoder.safetensors").stat().st_mtime_ns == before


def test_another_configuration_in_the_same_folder_is_refused_before_any_scan_is_read(
    trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"datalist": str(trained[0]), "output_dir": str(trained[1])}
    monkeypatch.setattr("medclr.data.Preprocessing.volume", lambda *values: pytest.fail("a scan was read"))
    run = workflow(["train.yaml"], "train", **settings, temperature=0.2, num_workers=1)
    with pytest.raises(Exception) as caught:  # noqa: PT011  # MONAI wraps it in an error of its own
        run.initialize()
    message = str(find_cause(caught.value))
    assert "temperature: 0.1 -> 0.2" in message
    assert "num_workers" not in message


def test_a_changed_datalist_is_refused(trained: tuple[Path, Path], tmp_path: Path) -> None:
    content = json.loads(trained[0].read_text())
    content["validation"] = content["validation"][:-1]
    other = trained[0].with_name("other.json")
    other.write_text(json.dumps(content))
    run = workflow(["train.yaml"], "train", datalist=str(other), output_dir=str(trained[1]))
    with pytest.raises(Exception) as caught:  # noqa: PT011  # MONAI wraps it in an error of its own
        run.initialize()
    assert "the datalist: other rows" in str(find_cause(caught.value))


@pytest.mark.parametrize("step", [3, 4, 6])
def test_a_run_stopped_by_a_signal_at_any_step_goes_on_to_the_same_encoder(
    trained: tuple[Path, Path], tmp_path: Path, step: int
) -> None:
    settings = {"datalist": str(trained[0]), "output_dir": str(tmp_path)}
    run = workflow(["train.yaml"], "train", **settings)
    run.initialize()
    trainer = run.parser.get_parsed_content("train::trainer")
    trainer.add_event_handler(Events.ITERATION_STARTED(once=step), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        run.run()
    assert stopped.value.code == STOPPED_EXIT_CODE
    again = workflow(["train.yaml"], "train", **settings)
    again.initialize()
    again.run()
    attempts = json.loads((tmp_path / "run.json").read_text())["attempts"]
    assert [attempt["to_step"] for attempt in attempts] == [step, 6]
    expected, found = (encoder_state_dict(folder / "encoder.safetensors") for folder in (trained[1], tmp_path))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [point.step for point in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_while_the_encoder_is_saved_ends_no_run(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = [True]

    def save(*values: Any) -> Any:
        if full.pop() if full else False:
            raise OSError(28, "No space left on device")
        return save_encoder(*values)

    monkeypatch.setattr("medclr.engine.saving.save_encoder", save)
    run = workflow(["train.yaml"], "train", datalist=str(trained[0]), output_dir=str(tmp_path))
    run.initialize()
    with caplog.at_level(logging.WARNING):
        run.run()
    assert any("the encoder cannot be saved: No space left on device" in message for message in caplog.messages)
    assert read_manifest(tmp_path / "encoder.safetensors").steps == 6


def test_an_output_folder_that_cannot_be_written_to_is_noticed_before_any_scan_is_read(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("medclr.data.Preprocessing.volume", lambda *values: pytest.fail("a scan was read"))
    with pytest.raises(Exception) as caught:  # noqa: PT011  # MONAI wraps it in an error of its own
        workflow(
            ["train.yaml"], "train", datalist=str(trained[0]), output_dir=str(tmp_path / "file" / "run")
        ).initialize()
    assert "The output folder cannot be written to" in str(find_cause(caught.value))


def test_tensorboard_has_losses_metrics_learning_rate_and_both_views(trained: tuple[Path, Path]) -> None:
    events = EventAccumulator(str(trained[1] / "tensorboard"))
    events.Reload()
    scalars, images = set(events.Tags()["scalars"]), set(events.Tags()["images"])
    assert {"train/loss", "train/plateau", "train/learning_rate", "train/padding", "train/effective_rank"} <= scalars
    assert {"validation/pair_recall", "validation/effective_rank"} <= scalars
    assert {"views/patient_0", "views/patient_1"} <= images
    assert len(events.Scalars("train/loss")) == 6
    steps = [point.step for point in events.Scalars("validation/pair_recall")]
    assert steps == [0, 3, 6], "the untrained encoder, then each epoch"


def test_no_patient_id_or_path_gets_into_what_a_run_writes(trained: tuple[Path, Path]) -> None:
    datalist, output = trained
    secrets = [b"patient 0", b"patient 3", datalist.parent.name.encode() + b"/scan", b"scan_0_image"]
    written = [path for path in output.rglob("*") if path.is_file() and path.name != "embeddings.csv"]
    assert written
    for path in written:
        content = path.read_bytes()
        for secret in secrets:
            assert secret not in content, f"{secret!r} in {path.name}"


def test_a_finished_encoder_is_evaluated_on_held_out_patients(
    trained: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    datalist, output = trained
    run = workflow(["train.yaml", "evaluate.yaml"], "train", datalist=str(datalist), output_dir=str(output))
    run.initialize()
    assert run.check_properties() in (None, [])
    with caplog.at_level(logging.INFO):
        run.run()
    assert any("pair_recall" in message for message in caplog.messages)
    assert run.parser.get_parsed_content("validate::metric").report["pair_recall"] >= 0


def test_an_untrained_encoder_is_evaluated_to_compare_with(trained: tuple[Path, Path], tmp_path: Path) -> None:
    reports = []
    for settings in ({}, {"untrained": True}):
        run = workflow(
            ["train.yaml", "evaluate.yaml"],
            "train",
            datalist=str(trained[0]),
            output_dir=str(trained[1]),
            **settings,
        )
        run.initialize()
        run.run()
        reports.append(run.parser.get_parsed_content("validate::metric").report)
    assert reports[0]["effective_rank"] != reports[1]["effective_rank"]


def test_embeddings_under_another_preprocessing_are_refused(trained: tuple[Path, Path]) -> None:
    datalist, output = trained
    run = workflow(["inference.yaml"], "infer", datalist=str(datalist), output_dir=str(output), orientation="LPS")
    with pytest.raises(Exception) as caught:  # noqa: PT011  # MONAI wraps it in an error of its own
        run.initialize()
    assert "orientation LPS here, RAS in pretraining" in str(find_cause(caught.value))


def test_inference_writes_one_row_a_scan(trained: tuple[Path, Path]) -> None:
    datalist, output = trained
    run = workflow(["inference.yaml"], "infer", datalist=str(datalist), output_dir=str(output))
    run.initialize()
    assert run.check_properties() in (None, [])
    run.run()
    with (output / "embeddings.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert {row["patient_id"] for row in rows} == {"test patient 3", "test patient 4"}
    features = [name for name in rows[0] if name.startswith("f")]
    assert len(features) == 64
    assert len({row["f0"] for row in rows}) == 3


def test_training_has_the_properties_of_a_training_bundle(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run = workflow(["train.yaml"], "train", datalist=str(trained[0]), output_dir=str(tmp_path))
    run.initialize()
    assert run.check_properties() in (None, [])


def test_the_embedder_takes_and_gives_what_the_metadata_says() -> None:
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(CONFIGS / "metadata.json"),
        config_file=str(CONFIGS / "inference.yaml"),
        device="cpu",
    )


def test_the_logging_configuration_is_one_that_monai_accepts() -> None:
    content = _reject_executable_logging_config(str(CONFIGS / "logging.conf"))
    assert "level=INFO" in content


def test_the_metadata_follows_the_schema(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    shutil.copy(Path(__file__).with_name("metadata_schema.json"), schema)
    verify_metadata(meta_file=str(CONFIGS / "metadata.json"), filepath=str(schema))


def test_the_same_seed_gives_the_same_encoder(trained: tuple[Path, Path], tmp_path: Path) -> None:
    datalist, output = trained
    run = workflow(
        ["train.yaml"], "train", datalist=str(datalist), output_dir=str(tmp_path), val_interval=0, save_interval=0
    )
    run.initialize()
    run.run()
    first, second = (encoder_state_dict(folder / "encoder.safetensors") for folder in (output, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("val_interval", [0, 1])
def test_a_run_without_held_out_patients_trains(
    cohort_rows: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture, val_interval: int
) -> None:
    datalist = write_datalist(cohort_rows, tmp_path / "data", training=6)
    content = json.loads(datalist.read_text())
    datalist.write_text(json.dumps({"training": content["training"]}))
    run = workflow(
        ["train.yaml"],
        "train",
        datalist=str(datalist),
        output_dir=str(tmp_path),
        max_epochs=1,
        val_interval=val_interval,
    )
    with caplog.at_level(logging.INFO):
        run.initialize()
    run.run()
    assert "there are no held-out patients to look at" in caplog.messages
    assert (tmp_path / "encoder.safetensors").exists()


def test_a_run_is_stopped_by_a_loss_that_is_no_number_and_says_what_to_change(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = {"datalist": str(trained[0]), "output_dir": str(tmp_path), "val_interval": 0, "max_epochs": 20}
    run = workflow(["train.yaml"], "train", learning_rate=1e30, save_interval=0, **settings)
    run.initialize()
    with pytest.raises(Exception) as caught:  # noqa: PT011  # MONAI wraps it in an error of its own
        run.run()
    assert "The loss is no number" in str(find_cause(caught.value))
    assert not (tmp_path / "encoder.safetensors").exists()
    batches = json.loads((tmp_path / "nonfinite_batches.json").read_text())
    assert {entry["scan"] for entry in batches["scans"]} <= set(range(6))
    assert batches["scans"]


def test_a_run_whose_embeddings_collapse_is_stopped(trained: tuple[Path, Path], tmp_path: Path) -> None:
    settings = {"datalist": str(trained[0]), "output_dir": str(tmp_path), "val_interval": 0, "max_epochs": 4}
    quick = {"_target_": "medclr.engine.CollapseGuard", "interval": 1, "window": 3, "after": 0}
    dead = "$torch.nn.init.zeros_(@network_def.projector.layers[3].weight)"
    first = ["$medclr.launch.begin()", dead, "$@collapse.attach(@train::trainer)"]
    run = workflow(["train.yaml"], "train", collapse=quick, initialize=first, learning_rate=0.0, **settings)
    run.initialize()
    with pytest.raises(Exception) as caught:  # noqa: PT011  # MONAI wraps it in an error of its own
        run.run()
    assert "The embeddings have collapsed" in str(find_cause(caught.value))


def test_a_small_batch_is_pointed_out(
    trained: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"datalist": str(trained[0]), "output_dir": str(tmp_path), "val_interval": 0, "max_epochs": 1}
    run = workflow(["train.yaml"], "train", **settings)
    run.initialize()
    with caplog.at_level(logging.WARNING):
        run.run()
    assert any("contrasted with 3 others" in message for message in caplog.messages)


def test_a_bad_scan_is_quarantined_and_the_run_goes_on(
    cohort_rows: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    datalist = write_datalist(cohort_rows, tmp_path / "data", training=6)
    bad = tmp_path / "data" / json.loads(datalist.read_text())["training"][0]["image"]
    bad.write_bytes(bad.read_bytes()[:500])
    run = workflow(["train.yaml"], "train", datalist=str(datalist), output_dir=str(tmp_path / "output"), max_epochs=1)
    run.initialize()
    with caplog.at_level(logging.INFO):
        run.run()
    assert any("1 scans quarantined" in message for message in caplog.messages)
    lines = (tmp_path / "output" / "quarantine_training.jsonl").read_text().splitlines()
    assert [json.loads(line)["scan"] for line in lines] == [0]
    assert bad.name not in lines[0]
    assert (tmp_path / "output" / "encoder.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"datalist": "nowhere.json"}, "nowhere.json"),
        ({"temperature": 0}, "temperature"),
        ({"batch_size": 64}, "no batch"),
        ({"norm": "none of these"}, "norm"),
        ({"precision": "fp8"}, "precision"),
        ({"roi_size": [16, 16]}, "size"),
        ({"spacing": [1, 0, 1]}, "spacing"),
    ],
)
def test_an_unusable_setting_ends_in_an_error_of_medclrs(
    settings: dict[str, Any], problem: str, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # MONAI wraps it in an error of its own
        workflow(
            ["train.yaml"], "train", **{"datalist": str(trained[0]), "output_dir": str(tmp_path), **settings}
        ).initialize()
    cause = find_cause(caught.value)
    assert isinstance(cause, MedclrError), f"no MedclrError behind {caught.value!r}"
    assert problem in str(cause)
    assert cause.fix
