"""Files a second of `medclr index`, against a plain loop; and the memory of its bookkeeping.

    python tests/benchmarks/bench_index.py [--folder ../shared/data] [--workers 2] [--repeats 3] [--headers 10000]

The loop reads each file in one process: DICOM with pydicom and, for its voxels, SimpleITK, and NIfTI with SimpleITK. It
finds no series, no duplicates and no damage. `medclr index` reads every file anew, voxels too. Figures are of the
fastest of the repeats, which take turns; times are on the clock, since processes are what is compared.

The bookkeeping is that of as many DICOM headers (100 a series, 4 series a patient) that no file has: what is measured
is the working store, the grouping and the rows, and the most memory that a fresh process holds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pydicom
import SimpleITK

import medclr.data.index
from medclr.data.dicom_frames import Frame
from medclr.data.dicom_header import DicomHeader, read_header
from medclr.data.index import index
from medclr.data.index_dicom import update_of
from medclr.data.index_store import Update
from medclr.data.walk import Found

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.data.index_files import save_series

PATTERN = r"(?P<patient>[^/]+)\.nii"
SLICES, SERIES = 100, 4


def loop(folder: Path) -> int:
    """Read every file of a folder, one after the other; how many there were."""
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    number = 0
    for path in sorted(folder.rglob("*")):
        is_dicom = path.suffix == ".dcm"
        if not path.is_file() or not (is_dicom or path.name.endswith((".nii", ".nii.gz"))):
            continue
        number += 1
        try:
            if is_dicom:
                pydicom.dcmread(path)
            SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
        except Exception:
            pass
    return number


def indexed(folder: Path, workers: int) -> None:
    """Index a folder anew."""
    index(folder, patients=PATTERN, workers=workers, fresh=True)


def seconds(work: Callable[[], object]) -> float:
    """What a run takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(folder: Path, workers: int, repeats: int) -> None:
    """Print files a second of both."""
    number = loop(folder)
    taken: dict[str, list[float]] = {"loop": [], "index": []}
    for _ in range(repeats):
        taken["loop"].append(seconds(partial(loop, folder)))
        taken["index"].append(seconds(partial(indexed, folder, workers)))
    best = {name: min(times) for name, times in taken.items()}
    again = seconds(lambda: index(folder, patients=PATTERN, workers=workers))
    print(f"{folder}: {number} files, {workers} processes, best of {repeats}")
    for name, time_taken in best.items():
        print(f"{name:>22} {time_taken:7.2f} s {number / time_taken:8.0f} files/s {best['loop'] / time_taken:5.2f} x")
    print(f"{'index, nothing new':>22} {again:7.2f} s {number / again:8.0f} files/s")


def synthetic_walk(headers: int, *_: Any) -> Iterator[Found]:
    """Files that are not there."""
    for number in range(headers):
        yield Found(f"{number // SLICES:06d}/{number % SLICES:04d}.dcm", 1, 1, None)


def synthetic_look(template: DicomHeader, _: Path, __: Any, name: str) -> Update:
    """What the header of one of them says."""
    series, place = int(name[:6]), int(name[7:11])
    ids = {
        "PatientID": f"P{series // SERIES}",
        "StudyInstanceUID": f"1.2.{series // 2}",
        "SeriesInstanceUID": f"1.3.{series}",
        "SOPInstanceUID": f"1.4.{series}.{place}",
    }
    frame: Frame = template.frames[0]._replace(position=(0.0, 0.0, 2.0 * place), number=place)
    header = replace(template, path=name, identity=template.identity | ids, frames=(frame,))
    return update_of(header)


def print_bookkeeping(headers: int) -> None:
    """Seconds, and the most memory of this process before and after."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MEDCLR_HOME"] = folder
        root = Path(folder) / "scans"
        (path,) = save_series(root, 1, slices=1)
        template = read_header(path, path.name)
        medclr.data.index.walk = partial(synthetic_walk, headers)
        medclr.data.index.look_at = partial(synthetic_look, template)
        before = most_memory()
        began = time.perf_counter()
        result = index(root, workers=1, check_voxels=False)
        result.write(Path(folder) / "list.json")
        taken = time.perf_counter() - began
        print(
            f"{headers:>10} headers: {taken:6.1f} s, {result.summary['scans']} scans, "
            f"{before:.0f} MB before, {most_memory():.0f} MB at most"
        )


def most_memory() -> float:
    """The most that this process held, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("MEDCLR_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    parser.add_argument("--folder", type=Path, default=shared)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--headers", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--bookkeeping", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bookkeeping:
        print_bookkeeping(options.bookkeeping)
        return
    if options.folder.is_dir():
        with tempfile.TemporaryDirectory() as home:
            os.environ["MEDCLR_HOME"] = home
            for folder in (options.folder / "dicom", options.folder):
                compare(folder, options.workers, options.repeats)
    else:
        print(f"no real scans: {options.folder} is no folder; set MEDCLR_DATA")
    for headers in options.headers:
        subprocess.run([sys.executable, __file__, "--bookkeeping", str(headers)], check=True)


if __name__ == "__main__":
    main()
