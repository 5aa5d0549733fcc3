from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from medclr.engine import explain, explained
from medclr.errors import ConfigError, DatalistError, MedclrError, ScanError


def raised(work: Any, *arguments: Any) -> BaseException:
    """What a call raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  # whatever the system raises
        work(*arguments)
    return caught.value


def meaning_of(error: BaseException) -> MedclrError:
    found = explain(error)
    assert found is not None
    assert str(found.got).strip()
    return found


def chained(inner: BaseException, *, cause: bool = True) -> RuntimeError:
    """As MONAI wraps what went wrong inside."""
    outer = RuntimeError("applying transform <monai.transforms.Compose object>")
    outer.__cause__, outer.__context__ = (inner, None) if cause else (None, inner)
    return outer


# Memory


def test_memory_of_the_machine_that_does_not_suffice_is_explained() -> None:
    for error in (raised(lambda: torch.empty(2**60, dtype=torch.uint8)), raised(lambda: np.empty(2**60, np.uint8))):
        found = meaning_of(error)
        assert "The machine is out of memory" in found.problem
        fix = found.fix
        assert fix.index("batch_size") < fix.index("roi_size") < fix.index("num_workers") < fix.index("cache_mb")


def test_memory_of_a_gpu_that_does_not_suffice_is_explained() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has " + 50 * "a total of ")
    found = meaning_of(error)
    assert "The GPU is out of memory" in found.problem
    assert found.fix.index("batch_size") < found.fix.index("roi_size") < found.fix.index("precision: bf16")
    assert "2.00 GiB" in str(found.got)
    assert len(str(found.got)) <= 200


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_that_is_full_is_explained() -> None:
    error = raised(lambda: torch.empty(2**50, dtype=torch.uint8, device="cuda"))
    assert "The GPU is out of memory" in meaning_of(error).problem


# Data loader workers


class Deadly(Dataset[Any]):
    """Its worker ends by a signal."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return 4

    def __getitem__(self, place: int) -> int:
        os.kill(os.getpid(), self.number)
        return place


class Failing(Dataset[Any]):
    """Its worker raises an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 4

    def __getitem__(self, place: int) -> int:
        raise self.error


def all_of(loader: DataLoader[Any]) -> list[Any]:
    """All batches; after an error torch would wait five seconds for each worker, and here they are asked to end."""
    batches = iter(loader)
    try:
        return list(batches)
    except Exception:
        for worker in getattr(batches, "_workers", ()):
            worker.terminate()
        raise


def loaded(data: Dataset[Any], workers: int = 1) -> list[Any]:
    return all_of(DataLoader(data, num_workers=workers))


def test_a_worker_that_the_system_killed_is_explained() -> None:
    found = meaning_of(raised(loaded, Deadly(signal.SIGKILL)))
    assert "killed by the system, most likely because the machine is out of memory" in found.problem
    assert "num_workers" in found.fix
    assert "cache_mb" in found.fix


def test_a_worker_without_shared_memory_is_explained() -> None:
    found = meaning_of(raised(loaded, Deadly(signal.SIGBUS)))
    assert "shared memory" in found.problem
    assert "--shm-size" in found.fix
    assert "num_workers: 0" in found.fix


def test_a_worker_that_was_asked_to_end_is_not_said_to_be_out_of_memory() -> None:
    assert explain(raised(loaded, Deadly(signal.SIGTERM))) is None


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_ours_comes_out_of_a_worker_as_what_it_is(workers: int) -> None:
    ours = DatalistError("The scans are gone.", got="3 of 4", wanted="at most 1", fix="Mount the folder.")
    found = meaning_of(raised(loaded, Failing(ours), workers))
    assert type(found) is DatalistError
    assert str(found) == str(ours)


def test_a_full_disk_that_a_worker_met_is_explained_though_its_number_is_lost_on_the_way() -> None:
    error = raised(loaded, Failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    assert isinstance(error, OSError)
    assert error.errno is None
    assert "The disk is full" in meaning_of(error).problem


# Disks


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_explained(number: int) -> None:
    found = meaning_of(OSError(number, os.strerror(number), "run/checkpoint.pt"))
    assert "The disk is full" in found.problem
    assert found.got == f"run/checkpoint.pt: {os.strerror(number)}"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_full_for_torch_python_and_safetensors_is_explained(tmp_path: Path) -> None:
    def write() -> None:
        with open("/dev/full", "wb") as file:
            file.write(b"x" * 10**5)

    weights = {"weight": torch.zeros(10**5)}
    for error in (raised(write), raised(torch.save, weights, "/dev/full")):
        assert "The disk is full" in meaning_of(error).problem
    # safetensors writes beside the file and renames, so its error is made up from what it says on a full disk
    kind = type(raised(save_file, weights, tmp_path / "no folder" / "weights.safetensors"))
    rust = kind("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "The disk is full" in meaning_of(rust).problem


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_folder_that_may_not_be_written_to_is_explained(number: int) -> None:
    found = meaning_of(OSError(number, os.strerror(number), "run"))
    assert "does not allow to write" in found.problem
    assert "output_dir" in found.fix


def test_a_real_refusal_of_the_system_is_explained() -> None:
    if not Path("/proc/sys/kernel/ostype").exists():
        pytest.skip("needs a file that not even root may write")
    error = raised(Path("/proc/sys/kernel/ostype").write_text, "other")
    assert isinstance(error, OSError)
    assert "does not allow to write" in meaning_of(error).problem


# Ranks


def be_a_rank(rank: int, folder: str) -> None:
    """Rank 1 is killed between two steps of the run."""
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = (Path(folder) / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    dist.all_reduce(torch.ones(1))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    error = raised(dist.all_reduce, torch.ones(10**6))
    (Path(folder) / "found").write_text(str(explain(error)))


@pytest.mark.slow
def test_a_rank_that_was_killed_is_explained_to_the_others(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=be_a_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    text = (tmp_path / "found").read_text()
    assert text.startswith("Another rank has died")
    assert "torchrun --max-restarts" in text


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:2395, remote process exited or there was a network"),
        dist.DistNetworkError("Connection reset by peer"),
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:4242"),
        RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation"),
    ],
    ids=str,
)
def test_what_ranks_say_of_lost_peers_is_explained(error: Exception) -> None:
    assert "Another rank has died" in meaning_of(error).problem


# What is none of these


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a mistake"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        RuntimeError("Distributed package doesn't have NCCL built in"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),  # of a worker's queue
        RuntimeError("Caught TypeError in DataLoader worker process 0.\nOriginal Traceback: medclr.errors.nothing: x"),
        AssertionError(),
    ],
    ids=repr,
)
def test_what_is_not_known_is_not_explained(error: Exception) -> None:
    assert explain(error) is None
    with pytest.raises(type(error)) as caught, explained():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("cause", [True, False])
def test_causes_are_looked_through_from_the_outside_in(cause: bool) -> None:
    full = OSError(errno.ENOSPC, "full")
    assert "The disk is full" in meaning_of(chained(chained(full), cause=cause)).problem
    ours = ConfigError("Bad.", got=1, wanted=2, fix="Set 2.")
    assert explain(chained(ours, cause=cause)) is ours
    assert explain(ours) is ours
    full.__context__ = ScanError("The scan is bad.", got="noise", wanted="anatomy", fix="Scan again.")
    assert "The disk is full" in meaning_of(full).problem  # while a bad scan was being written down
    full.__context__.__context__ = full
    ours.__cause__ = full
    assert explain(chained(ours)) is ours


# Raising


def test_an_explained_error_is_raised_from_what_it_explains() -> None:
    full = OSError(errno.ENOSPC, "full")
    with pytest.raises(MedclrError, match="The disk is full") as caught, explained():
        raise full
    assert caught.value.__cause__ is full


def test_an_error_of_ours_is_raised_as_it_is_or_taken_out_of_its_wrapping() -> None:
    ours = ConfigError("Bad.", got=1, wanted=2, fix="Set 2.")
    with pytest.raises(ConfigError) as caught, explained():
        raise ours
    assert caught.value is ours
    wrapping = chained(ours)
    with pytest.raises(ConfigError, match=r"Bad\.") as caught, explained():
        raise wrapping
    assert caught.value.__cause__ is wrapping
    assert str(caught.value) == str(ours)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_a_wish_to_end_is_let_through(kind: type[BaseException]) -> None:
    wish = kind(3)
    wish.__context__ = OSError(errno.ENOSPC, "full")
    with pytest.raises(kind) as caught, explained():
        raise wish
    assert caught.value is wish


def test_the_last_lines_of_a_program_say_what_it_died_of() -> None:
    program = (
        "import torch; from medclr.engine import explained; from medclr.errors import show_errors_last\n"
        "show_errors_last()\n"
        "with explained(): torch.empty(2**60, dtype=torch.uint8)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert "DefaultCPUAllocator" in done.stderr
    assert done.stderr.rstrip().splitlines()[-4].endswith("The machine is out of memory.")
