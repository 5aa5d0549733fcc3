from __future__ import annotations

import csv
import itertools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Engine
from monai.engines import SupervisedEvaluator
from monai.inferers import Inferer
from torch import Tensor
from torch.utils.data import DataLoader

from medclr.data import Preprocessing, Quarantine, ScanReader
from medclr.engine import EmbeddingMetric
from medclr.errors import ConfigError, DatalistError
from medclr.evaluate import EmbeddingTable, ScanDataset, WindowEmbedder


class Features(torch.nn.Module):
    """Features that depend on where things are in the window, and that count what they were shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[int, ...]] = []

    def forward(self, windows: Tensor) -> Tensor:
        self.shown.append(tuple(windows.shape))
        ramp = torch.linspace(1, 2, windows[0].numel()).view_as(windows[0])
        corner = windows[:, :, 0, 0, 0].sum(dim=1)
        return torch.stack([windows.flatten(1).mean(dim=1), (windows * ramp).flatten(1).sum(dim=1), corner], dim=1)


def starts(edge: int, window: int, overlap: float) -> list[int]:
    step, found = max(1, round(window * (1 - overlap))), [0]
    while found[-1] + window < edge:
        found.append(min(found[-1] + step, edge - window))
    return found


def slow_embedding(scan: Tensor, roi: tuple[int, ...], overlap: float) -> Tensor:
    """One window at a time."""
    for axis, window in enumerate(roi, start=1):
        lack = max(0, window - scan.shape[axis])
        if lack:
            zeros = [torch.zeros_like(scan.select(axis, 0)).unsqueeze(axis)]
            scan = torch.cat(zeros * (lack // 2) + [scan] + zeros * (lack - lack // 2), dim=axis)
    corners = itertools.product(
        *[starts(edge, window, overlap) for edge, window in zip(scan.shape[1:], roi, strict=True)]
    )
    rows = []
    for x, y, z in corners:
        window = scan[:, x : x + roi[0], y : y + roi[1], z : z + roi[2]]
        assert window.shape[1:] == roi
        rows.append(Features()(window[None])[0])
    return torch.stack(rows).mean(dim=0)


edges = st.tuples(*[st.integers(1, 11)] * 3)
windows = st.tuples(*[st.integers(1, 6)] * 3)


@given(shape=edges, roi=windows, overlap=st.sampled_from([0.0, 0.25, 0.5, 0.8]), batch_size=st.integers(1, 7))
def test_an_embedding_is_the_mean_over_windows(
    shape: tuple[int, ...], roi: tuple[int, ...], overlap: float, batch_size: int
) -> None:
    scans = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(sum(shape)))
    network = Features()
    embedded = WindowEmbedder(roi, overlap=overlap, batch_size=batch_size)(scans, network)
    wanted = torch.stack([slow_embedding(scan, roi, overlap) for scan in scans])
    torch.testing.assert_close(embedded, wanted, rtol=1e-4, atol=1e-4)
    assert all(0 < shown[0] <= batch_size and shown[2:] == roi for shown in network.shown)


def test_the_windows_cover_every_voxel() -> None:
    for shape, roi, overlap in (((9, 10, 11), (4, 4, 4), 0.0), ((13, 7, 5), (6, 3, 5), 0.25)):
        seen = torch.zeros(1, 1, *shape)
        scan = torch.arange(seen.numel(), dtype=torch.float32).view_as(seen)

        def mark(windows: Tensor, seen: Tensor = seen) -> Tensor:
            seen.view(-1)[windows.flatten().long()] += 1
            return windows.flatten(1).mean(dim=1, keepdim=True)

        WindowEmbedder(roi, overlap=overlap)(scan, mark)
        assert (seen > 0).all()


def test_a_scan_of_the_windows_size_is_seen_as_it_is_and_a_small_one_in_the_middle_of_zeros() -> None:
    shown: list[Tensor] = []

    def watch(windows: Tensor) -> Tensor:
        shown.append(windows)
        return windows.flatten(1).sum(dim=1, keepdim=True)

    scan = torch.rand(1, 1, 4, 4, 4)
    WindowEmbedder((4, 4, 4))(scan, watch)
    assert torch.equal(shown.pop(), scan)
    WindowEmbedder((8, 7, 4))(scan, watch)
    (window,) = shown
    assert torch.equal(window[:, :, 2:6, 1:5], scan)
    assert float(window.sum()) == pytest.approx(float(scan.sum()), rel=1e-5)


def test_half_precision_features_are_averaged_in_fp32_and_arguments_are_passed_on() -> None:
    def network(windows: Tensor, scale: float, *, offset: float) -> Tensor:
        return (windows.flatten(1).mean(dim=1, keepdim=True) * scale + offset).bfloat16()

    scan = torch.full((1, 1, 9, 9, 9), 2.0)
    embedded = WindowEmbedder((4, 4, 4))(scan, network, 3.0, offset=1.0)
    assert embedded.dtype == torch.float32
    assert embedded.tolist() == [[7.0]]


@pytest.mark.parametrize(
    "settings",
    [
        {"roi_size": 4},
        {"roi_size": (4, 4)},
        {"roi_size": (4, 4, 0)},
        {"overlap": 1.0},
        {"overlap": -0.1},
        {"overlap": float("nan")},
        {"batch_size": 0},
    ],
    ids=str,
)
def test_unusable_windows_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        WindowEmbedder(**{"roi_size": (4, 4, 4), **settings})
    assert isinstance(WindowEmbedder((4, 4, 4)), Inferer)


# The data set


def scans(datalist: list[dict], path: Path | None = None, **settings: Any) -> ScanDataset:
    reader = ScanReader(Preprocessing(), quarantine=Quarantine(path), **settings)
    return ScanDataset(datalist, reader)


def test_every_usable_scan_is_an_item_that_knows_its_row_and_patient(cohort: list[dict]) -> None:
    dataset = scans(cohort)
    assert len(dataset) == len(cohort)
    for place, row in enumerate(cohort):
        item = dataset[place]
        assert torch.equal(item["image"], Preprocessing().volume(row).image)
        assert int(item["scan"]) == place
        assert item["label"].dtype == item["scan"].dtype == torch.int64
    assert [int(dataset[place]["label"]) for place in range(len(cohort))] == [0, 0, 0, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize("cache_mb", [64, 0.03, 0])
def test_bad_scans_are_quarantined_before_the_run_however_small_the_cache(
    cache_mb: float, cohort: list[dict], write_scan: Callable[..., str], tmp_path: Path
) -> None:
    for bad in (3, 8):
        cohort[bad]["image"] = write_scan(f"flat{bad}", np.ones((5, 5, 5), np.float32))
    dataset = scans(cohort, tmp_path / "quarantine.jsonl", cache_mb=cache_mb)
    assert dataset.scans == [0, 1, 2, 4, 5, 6, 7]
    assert list(dataset.reader.quarantine.reasons()) == [3, 8]
    assert dataset.summary() == "7 scans embedded, 2 quarantined"
    assert [int(dataset[place]["scan"]) for place in range(len(dataset))] == dataset.scans
    assert [int(dataset[place]["label"]) for place in range(len(dataset))] == [0, 0, 0, 2, 2, 3, 3]


def test_a_repaired_scan_is_used_again(cohort: list[dict], tmp_path: Path) -> None:
    path, good = tmp_path / "quarantine.jsonl", cohort[2]["image"]
    cohort[2]["image"] = str(tmp_path / "missing.nii.gz")
    assert len(scans(cohort, path)) == len(cohort) - 1
    cohort[2]["image"] = good
    assert len(scans(cohort, path)) == len(cohort)


def test_a_section_without_usable_scans_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatalistError, match="no scan to embed"):
        scans([])
    with pytest.raises(DatalistError, match="No scan of the datalist"):
        scans([{"image": str(tmp_path / "missing.nii.gz"), "patient_id": "a"}])


def test_an_empty_section_may_be_allowed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        dataset = ScanDataset([], ScanReader(Preprocessing()), allow_empty=True)
    assert len(dataset) == 0
    assert "no held-out patients" in caplog.text


# The table


def embed(dataset: ScanDataset, path: Path, network: torch.nn.Module, workers: int = 0) -> list[dict[str, str]]:
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(dataset, batch_size=1, num_workers=workers),
        network=network,
        inferer=WindowEmbedder((8, 8, 8)),
        val_handlers=[EmbeddingTable(path, dataset)],
        decollate=False,
    )
    evaluator.run()
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_table_holds_each_scans_row_and_features(
    workers: int, cohort: list[dict], write_scan: Callable[..., str], tmp_path: Path
) -> None:
    cohort[1]["image"] = write_scan("flat", np.ones((5, 5, 5), np.float32))
    cohort[4]["site"] = 'Mercy, "North"'
    dataset = scans(cohort)
    rows = embed(dataset, tmp_path / "new folder" / "table.csv", Features(), workers)
    assert list(rows[0]) == ["scan", "patient_id", "days", "site", "f0", "f1", "f2"]
    assert [int(row["scan"]) for row in rows] == [0, 2, 3, 4, 5, 6, 7, 8]
    for place, row in enumerate(rows):
        source = cohort[int(row["scan"])]
        assert row["patient_id"] == source["patient_id"]
        assert row["days"] == str(source["days"])
        assert row["site"] == source.get("site", "")
        wanted = WindowEmbedder((8, 8, 8))(dataset[place]["image"][None], Features())[0]
        np.testing.assert_allclose([float(row[f"f{k}"]) for k in range(3)], wanted.numpy(), rtol=2e-5, atol=1e-7)


def test_the_table_names_no_files_and_the_log_no_patients(
    cohort: list[dict], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        embed(scans(cohort), tmp_path / "table.csv", Features())
    assert ".nii" not in (tmp_path / "table.csv").read_text()
    assert "9 scans embedded, 0 quarantined; 3 features each" in caplog.text
    assert "patient 0" not in caplog.text


def test_a_scan_that_vanishes_later_is_quarantined_and_left_out(cohort: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [{**row, "image": str(shutil.copy(row["image"], tmp_path / f"{n}.nii.gz"))} for n, row in enumerate(cohort)]
    dataset = ScanDataset(rows, ScanReader(Preprocessing(), cache_mb=0))
    Path(rows[3]["image"]).unlink()
    metric, table = EmbeddingMetric("effective_rank"), EmbeddingTable(tmp_path / "embeddings.csv", dataset)
    embed = WindowEmbedder((16, 16, 16))

    def step(engine: Engine, batch: dict[str, Any]) -> dict[str, Any]:
        features = embed(batch["image"], lambda image: image.flatten(1)[:, ::500])
        return {"pred": features, "label": batch["label"]}

    engine = Engine(step)
    metric.attach(engine, "rank")
    table.attach(engine)
    engine.run(DataLoader(dataset, batch_size=1))
    with (tmp_path / "embeddings.csv").open() as file:
        assert [int(row["scan"]) for row in csv.DictReader(file)] == [n for n in range(len(rows)) if n != 3]
    assert sum(map(len, metric._patients)) == len(rows) - 1
    assert dataset.summary() == f"{len(rows) - 1} scans embedded, 1 quarantined"
    assert list(dataset.reader.quarantine.reasons()) == [3]
