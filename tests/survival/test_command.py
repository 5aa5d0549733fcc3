"""The command line, as a user or a scheduler meets it: Ctrl-C, SIGTERM, and the same command once more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from medclr.engine import STOPPED_EXIT_CODE
from medclr.weights import encoder_state_dict
from tests.bundles.test_contrastive_pretraining import BUNDLE, CONFIGS, write_datalist
from tests.survival.test_kills import BUNDLES, COMMON


def start(datalist: Path, output: Path, log: Path, **settings: Any) -> subprocess.Popen[bytes]:
    """Pretraining by ``python -m monai.bundle run``, with a process group of its own, as a shell would give it."""
    options = {
        "config_file": CONFIGS / "train.yaml",
        "meta_file": CONFIGS / "metadata.json",
        "logging_file": CONFIGS / "logging.conf",
        "bundle_root": BUNDLE,
        **COMMON,
        **BUNDLES["contrastive_pretraining"],
        "datalist": datalist,
        "output_dir": output,
        **settings,
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "monai.bundle", "run", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "workers"), [("SIGINT", 2), ("SIGTERM", 2), ("SIGTERM", 0)])
def test_a_signal_to_all_processes_of_a_run_saves_it_and_the_same_command_goes_on(
    cohort: list[dict[str, Any]], tmp_path: Path, name: str, workers: int
) -> None:
    datalist, output, log = write_datalist(cohort, tmp_path / "data", training=6), tmp_path / "run", tmp_path / "log"
    settings = {"num_workers": workers, "checkpoint_steps": 2, "max_epochs": 10}
    process = start(datalist, output, log, **settings)
    end = time.monotonic() + 60
    while not list(output.glob("checkpoints/*.json")) and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(process.pid, getattr(signal, name))
    assert process.wait(60) == STOPPED_EXIT_CODE, log.read_text()[-3000:]
    assert f"stopped by {name} after step" in log.read_text()
    assert (
        not (output / "encoder.safetensors").exists()
        or json.loads((output / "encoder.json").read_text())["epochs"] < 10
    )
    assert start(datalist, output, log, **settings).wait(60) == 0, log.read_text()[-3000:]
    assert start(datalist, tmp_path / "whole", log, **{**settings, "num_workers": 0}).wait(60) == 0
    expected, found = (encoder_state_dict(folder / "encoder.safetensors") for folder in (tmp_path / "whole", output))
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    attempts = json.loads((output / "run.json").read_text())["attempts"]
    assert [attempt["outcome"] for attempt in attempts] == [f"stopped by {name}", "completed"]
    assert attempts[0]["to_step"] == attempts[1]["from_step"] < attempts[1]["to_step"] == 60


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_what_to_do_and_loses_no_step(
    cohort: list[dict[str, Any]], tmp_path: Path
) -> None:
    datalist, output, log = write_datalist(cohort, tmp_path / "data", training=6), tmp_path / "run", tmp_path / "log"
    settings = {"num_workers": 1, "max_epochs": 200, "val_interval": 0, "save_interval": 0}
    process = start(datalist, output, log, **settings)
    end = time.monotonic() + 60
    while "epoch=2" not in log.read_text() and time.monotonic() < end:
        time.sleep(0.02)
    (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    assert process.wait(60) == 1
    assert "A data loader worker was killed by the system" in log.read_text().splitlines()[-4]
    assert log.read_text().splitlines()[-1].startswith("  fix: ")
    attempt = json.loads((output / "run.json").read_text())["attempts"][0]
    assert attempt["outcome"] == "failed: MedclrError"
    assert attempt["to_step"] > 6
    (checkpoint,) = output.glob("checkpoints/*.json")
    assert json.loads(checkpoint.read_text())["step"] == attempt["to_step"]
