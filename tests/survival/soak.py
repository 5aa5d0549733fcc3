"""Half an hour of being killed and of running on: `make soak` prints the figures, and fails where one is wrong.

First each bundle is killed by SIGKILL 30 times at random moments, going on each time; its weights are compared, bit for
bit, with those of a run that nobody disturbed. Then one pretraining runs for the rest of the time with frequent
checkpoints and evaluations, while its memory and its files are watched.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from medclr.data.index import index
from medclr.data.phantom import make_cohort
from tests.survival.test_kills import BUNDLES, COMMON, ROOT, killed_and_whole

SHAPE, SPACING = (24, 24, 20), (2.4, 2.4, 2.4)


def cohort(folder: Path) -> list[dict[str, Any]]:
    """Rows of a small synthetic cohort."""
    table = make_cohort(folder, patients=8, shape=SHAPE, spacing=SPACING)
    return [dict(row) for row in index(folder, patients=str(table)).datalist.training]


def kills(rows: list[dict[str, Any]], folder: Path, count: int) -> None:
    """Both bundles, with their figures."""
    for bundle in BUNDLES:
        start = time.monotonic()
        report = killed_and_whole(bundle, rows, folder / bundle, kills=count, seed=7, longer=count)
        killed = report["codes"].count(-signal.SIGKILL)
        attempts = json.loads((folder / bundle / "killed" / "run.json").read_text())["attempts"]
        print(
            f"{bundle}: killed {killed} times, {len(attempts)} attempts that had a checkpoint or reached the end, "
            f"{attempts[-1]['to_step']} steps; weights equal bit for bit; {time.monotonic() - start:.0f} s",
            flush=True,
        )
        assert killed == count, f"it was to be killed {count} times"
        assert len(attempts) > count // 2, "most attempts were to go on with a checkpoint"


def memory_mb(process: int) -> float:
    """Resident memory of a process."""
    return int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[0]) / 1024


def long_run(datalist: Path, folder: Path, minutes: float) -> None:
    """One pretraining, watched."""
    bundle, output = ROOT / "bundles" / "contrastive_pretraining", folder / "long"
    settings = {
        **COMMON,
        **BUNDLES["contrastive_pretraining"],
        "datalist": datalist,
        "output_dir": output,
        "max_epochs": 10**6,
        "checkpoint_steps": 20,
        "val_interval": 5,
        "save_interval": 5,
        "learning_rate": 1e-6,  # else it would know its few patients by heart before the time is up, and collapse
        "on_collapse": "warn",
    }
    files = {"config_file": "train.yaml", "meta_file": "metadata.json", "logging_file": "logging.conf"}
    options = {**{name: bundle / "configs" / file for name, file in files.items()}, "bundle_root": bundle, **settings}
    command = [sys.executable, "-m", "monai.bundle", "run"]
    with (folder / "long.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *(part for name, value in options.items() for part in (f"--{name}", str(value)))],
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
        samples: list[tuple[float, float, int, float]] = []
        start = time.monotonic()
        while process.poll() is None and time.monotonic() - start < 60 * minutes:
            time.sleep(1)
            if (output / "checkpoints").is_dir() and process.poll() is None:
                every = [path.stat().st_size for path in output.rglob("*") if path.is_file()]
                samples.append((time.monotonic() - start, memory_mb(process.pid), len(every), sum(every) / 2**20))
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    print((folder / "long.log").read_text()[-600:])
    assert code == 75, f"exit code {code} after SIGTERM"
    steps = json.loads((output / "run.json").read_text())["attempts"][-1]["to_step"]
    times, memory, counts, sizes = (np.array(column) for column in zip(*samples, strict=True))
    settled = times > times[-1] / 5
    slope = float(np.polyfit(times[settled], memory[settled], 1)[0] * 3600)
    first, last = (float(np.median(memory[settled][part])) for part in (slice(0, 30), slice(-30, None)))
    print(
        f"long run: {steps} steps in {times[-1] / 60:.1f} min; memory {first:.0f} MB after a fifth of the time, "
        f"{last:.0f} MB at the end, {memory.max():.0f} MB at most, {slope:+.1f} MB an hour; "
        f"files {counts[settled].min()} to {counts.max()}, {sizes[settled][0]:.1f} MB then {sizes[-1]:.1f} MB"
    )
    assert last < first * 1.05 + 10, "memory has grown"
    assert counts[settled].max() <= counts[settled].min() + 4, "files have become more"


def main() -> None:
    """Run both parts in a folder of their own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="for all of it")
    parser.add_argument("--kills", type=int, default=30, help="of each bundle")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = cohort(folder / "cohort")
        kills(rows, folder, options.kills)
        datalist = folder / "contrastive_pretraining" / "data" / "datalist.json"
        long_run(datalist, folder, max(1.0, options.minutes - (time.monotonic() - start) / 60))


if __name__ == "__main__":
    main()
