"""Bundles that are killed by SIGKILL at random moments end with the weights of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from medclr.transfer.checkpoint import NETWORK
from medclr.weights import encoder_state_dict
from tests.bundles.test_contrastive_pretraining import write_datalist

ROOT = Path(__file__).resolve().parents[2]
COMMON: dict[str, Any] = {
    "roi_size": [16, 16, 16],
    "init_filters": 8,
    "batch_size": 2,
    "precision": "fp32",
    "device": "$torch.device('cpu')",
    "checkpoint_minutes": 0,
    "val_interval": 2,
}
BUNDLES: dict[str, dict[str, Any]] = {
    # 3 patients, 6 batches an epoch
    "contrastive_pretraining": {"passes": 4, "max_epochs": 4, "save_interval": 2, "log_interval": 1},
    "segmentation": {"steps_per_epoch": 6, "max_epochs": 4},
}


def run_nursery(order: dict[str, Any]) -> dict[str, Any]:
    """What it reports; its log is shown where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.survival.nursery", json.dumps(order)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**report, "log": done.stdout + done.stderr}


def weights_of(bundle: str, output: Path) -> dict[str, torch.Tensor]:
    if bundle == "contrastive_pretraining":
        return encoder_state_dict(output / "encoder.safetensors")
    files = {name: torch.load(output / name, weights_only=True)[NETWORK] for name in ("last.pt", "best.pt")}
    return {f"{name}.{key}": value for name, state in files.items() for key, value in state.items()}


def killed_and_whole(
    bundle: str, rows: list[dict[str, Any]], folder: Path, *, kills: int, seed: int, longer: int = 0
) -> dict[str, Any]:
    """Run one bundle with kills and without, and compare their weights; what the killed ones reported.

    Runs are ``longer`` epochs longer, so that many kills find something to kill.
    """
    if bundle == "segmentation":
        datalist = _with_masks(rows, folder / "data", _training(rows))
    else:
        datalist = write_datalist(rows, folder / "data", training=_training(rows))
    settings = {**COMMON, **BUNDLES[bundle], "datalist": str(datalist)}
    settings["max_epochs"] += longer
    order: dict[str, Any] = {"bundle": bundle, "most_events": 40, "seed": seed}
    whole = run_nursery({**order, "kills": 0, "settings": {**settings, "output_dir": str(folder / "whole")}})
    killed = run_nursery(
        {
            **order,
            "kills": kills,
            "settings": {**settings, "output_dir": str(folder / "killed"), "checkpoint_steps": 2},
        }
    )
    assert whole["codes"] == [0], whole["log"][-3000:]
    assert killed["codes"][-1] == 0, killed["log"][-3000:]
    expected, found = (weights_of(bundle, folder / name) for name in ("whole", "killed"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    return killed


def _training(rows: list[dict[str, Any]]) -> int:
    """How many rows to train on: six, or a few more, so that no patient is in two sections."""
    return next(n for n in range(6, len(rows)) if rows[n]["patient_id"] != rows[n - 1]["patient_id"])


def _with_masks(rows: list[dict[str, Any]], folder: Path, training: int) -> Path:
    folder.mkdir(parents=True)
    path = folder / "datalist.json"
    root = os.path.commonpath([row[key] for row in rows for key in ("image", "label")])
    path.write_text(json.dumps({"dataset_dir": root, "training": rows[:training], "validation": rows[training:]}))
    return path


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_run_killed_three_times_ends_with_the_weights_of_one_that_was_not(
    bundle: str, cohort: list[dict[str, Any]], tmp_path: Path
) -> None:
    report = killed_and_whole(bundle, cohort, tmp_path, kills=3, seed=1)
    assert report["codes"].count(-signal.SIGKILL) == 3
    attempts = json.loads((tmp_path / "killed" / "run.json").read_text())["attempts"]
    assert len(attempts) >= 2
    assert attempts[-1]["outcome"] == "completed"
    assert attempts[-1]["to_step"] == 24
