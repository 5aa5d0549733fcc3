"""Two ranks of which one is killed go on, and end as two of which none was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bundles.test_contrastive_pretraining import write_datalist

ROOT = Path(__file__).resolve().parents[2]


def torchrun(datalist: Path, output: Path, die_at: int) -> list[dict[str, Any]]:
    """What both ranks saved at the end."""
    output.mkdir()
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    script = ["-m", "tests.survival.two_ranks", str(datalist), str(output), str(die_at)]
    # Without the first setting, ranks of a second attempt may look for those of the first (pytorch issue 135712).
    settings = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with (output / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *command, *script],
            cwd=ROOT,
            env={**os.environ, **settings, "PYTHONWARNINGS": "ignore"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, (output / "log").read_text()[-3000:]
    return [torch.load(output / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
def test_a_run_of_which_one_rank_was_killed_ends_with_the_right_steps_and_equal_weights_on_both(
    cohort: list[dict[str, Any]], tmp_path: Path
) -> None:
    datalist = write_datalist(cohort, tmp_path / "data", training=8)
    whole = torchrun(datalist, tmp_path / "whole", die_at=0)
    killed = torchrun(datalist, tmp_path / "killed", die_at=8)
    total = whole[0]["steps"][-1]
    assert [rank["steps"] for rank in whole] == [list(range(1, total + 1))] * 2
    assert [rank["attempt"] for rank in killed] == [1, 1]
    assert [rank["steps"] for rank in killed] == [list(range(7, total + 1))] * 2
    for name, value in whole[0]["weights"].items():
        for rank in (*whole, *killed):
            assert torch.equal(value, rank["weights"][name]), name
    assert all(torch.equal(whole[rank]["random"], killed[rank]["random"]) for rank in (0, 1))
