from __future__ import annotations

import csv
import hashlib
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import spearmanr

from medclr.data.index import index
from medclr.data.phantom import make_cohort, phantom_patient, phantom_scan
from medclr.data.phantom_scan import PhantomScan
from medclr.data.phantom_shapes import Lump, Tube, Waves, any_rotation
from medclr.errors import ConfigError

SMALL: dict[str, Any] = {"shape": (20, 18, 12), "spacing": (2.4, 2.5, 3.5)}
LARGEST_DICE = 0.4


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    total = one.sum() + other.sum()
    return float(2 * (one & other).sum() / total) if total else 1.0


def largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    labels, count = ndimage.label(mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    return (labels == sizes.argmax()) & mask


# How hard it is


def best_threshold(image: NDArray[Any], truth: NDArray[np.bool_]) -> float:
    """The best Dice of all bands between two quantiles, open on either side, each reduced to its largest component."""
    bounds = [-np.inf, *np.quantile(image, np.linspace(0.06, 0.94, 9)), np.inf]
    best = 0.0
    for low, high in combinations(bounds, 2):
        band = (image >= low) & (image < high)
        found = (band & truth).sum()
        if 2 * found / (truth.sum() + found) > best:  # what any component of the band could reach
            best = max(best, dice(largest_component(band), truth))
    return best


def atlas_grid(scan: PhantomScan) -> NDArray[np.float64]:
    """The mask, turned to RAS, in the middle of one grid for all scans."""
    flips = tuple(slice(None, None, int(np.sign(scan.affine[axis, axis]))) for axis in range(3))
    mask = scan.mask[flips] > 0
    out = np.zeros((60, 60, 52))
    first = [(large - edge) // 2 for large, edge in zip(out.shape, mask.shape, strict=True)]
    out[tuple(slice(start, start + edge) for start, edge in zip(first, mask.shape, strict=True))] = mask
    return out


@pytest.mark.parametrize("modality", ["mr", "ct"])
def test_neither_the_best_threshold_nor_an_atlas_finds_the_foreground(modality: str) -> None:
    scans = [[phantom_scan(patient, scan, modality=modality) for scan in range(2)] for patient in range(16)]
    thresholds = [best_threshold(scan.image, scan.mask > 0) for pair in scans[:6] for scan in pair]
    training = [atlas_grid(scan) for pair in scans[:10] for scan in pair]
    unseen = [atlas_grid(scan) for pair in scans[10:] for scan in pair]
    mean = np.mean(training, axis=0)

    def score(level: float, masks: list[NDArray[np.float64]]) -> float:
        return float(np.mean([dice(mean >= level, mask > 0) for mask in masks]))

    level = max(np.linspace(0.05, 0.95, 37), key=lambda value: score(value, training))
    print(f"{modality}: threshold {np.mean(thresholds):.3f}, atlas {score(level, unseen):.3f}")
    assert 0.1 < np.mean(thresholds) < LARGEST_DICE
    assert 0.1 < score(level, unseen) < LARGEST_DICE


@pytest.mark.parametrize("modality", ["mr", "ct"])
def test_every_scan_has_foreground_of_both_kinds_where_severity_says_so(modality: str) -> None:
    for patient in range(8):
        for scan in range(3):
            made = phantom_scan(patient, scan, modality=modality)
            assert 0.015 < (made.mask > 0).mean() < 0.12
            assert (2 in made.mask) == (made.columns["severity"] != 0)
            assert made.mask.dtype == np.uint8
            assert set(np.unique(made.mask)) <= {0, 1, 2}


# One anatomy, several scans


def taken_over(source: PhantomScan, target: PhantomScan) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The source's foreground on the target's grid, by their poses alone, and which voxels the source shows."""
    between = np.linalg.inv(source.pose @ source.affine) @ target.pose @ target.affine
    places = np.indices(target.mask.shape).reshape(3, -1)
    places = np.rint(between[:3, :3] @ places + between[:3, 3:]).astype(int)
    edges = np.array(source.mask.shape)[:, None]
    seen = ((places >= 0) & (places < edges)).all(axis=0)
    found = source.mask[tuple(np.clip(places, 0, edges - 1))] > 0
    return (found & seen).reshape(target.mask.shape), seen.reshape(target.mask.shape)


def body_shift(scan: PhantomScan) -> NDArray[np.float64]:
    """Where the middle of the patient lies, in millimetres from the middle of the grid."""
    middle = np.append((np.array(scan.mask.shape) - 1) / 2, 1.0)
    return (np.linalg.inv(scan.pose)[:, 3] - scan.affine @ middle)[:3]


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.9, 1.1, 1.6)])
def test_repeat_scans_agree_once_their_pose_is_undone(spacing: tuple[float, ...]) -> None:
    scans = [[phantom_scan(patient, scan, spacing=spacing) for scan in range(3)] for patient in range(5)]
    moves = []
    for patient, (first, *later) in enumerate(scans):
        for repeat in later:
            moved, seen = taken_over(first, repeat)
            assert dice(moved, (repeat.mask > 0) & seen) > 0.9
            stranger = scans[(patient + 1) % len(scans)][0]
            moved, seen = taken_over(stranger, repeat)
            assert dice(moved, (repeat.mask > 0) & seen) < 0.75
            np.testing.assert_allclose(repeat.pose[:3, :3] @ repeat.pose[:3, :3].T, np.eye(3), atol=1e-12)
            assert not np.allclose(repeat.pose[:3, :3], first.pose[:3, :3], atol=0.02)
            moves.append(np.linalg.norm(body_shift(repeat) - body_shift(first)))
    assert np.mean(moves) > 2


def test_repeat_scans_differ_in_field_of_view_scanner_and_scale() -> None:
    for patient in range(6):
        scans = [phantom_scan(patient, scan) for scan in range(3)]
        assert len({scan.image.shape for scan in scans}) == 3
        assert all(max(np.subtract(scan.image.shape, (56, 56, 48))) <= 0 for scan in scans)
        assert all(min(scan.image.shape) >= 0.8 * 48 for scan in scans)
        assert len({scan.columns["scanner"] for scan in scans}) == 3
        days = [scan.columns["days"] for scan in scans]
        assert days == sorted(set(days))
        assert days[0] == 0
        brightest = [np.quantile(scan.image, 0.99) for scan in scans]
        assert max(brightest) / min(brightest) > 3


def test_ct_is_in_hounsfield_units() -> None:
    for patient in range(3):
        scan = phantom_scan(patient, modality="ct")
        assert scan.image.dtype == np.int16
        assert np.quantile(scan.image, 0.02) == pytest.approx(-1000, abs=40)
        assert 30 < np.median(scan.image[scan.mask == 1]) < 120


def test_the_anatomy_is_scaled_to_the_field_of_view() -> None:
    for patient in range(4):
        large = np.mean(phantom_scan(patient).mask > 0)
        small = np.mean(phantom_scan(patient, **SMALL).mask > 0)
        assert 0.5 < small / large < 2


# Columns


def test_severity_follows_age_genotype_and_laboratory_value() -> None:
    people = [phantom_patient(patient) for patient in range(400)]
    severity = np.array([person["severity"] for person in people])
    assert np.bincount(severity, minlength=4).min() > 30

    def relation(column: str) -> float:
        known = [place for place, person in enumerate(people) if person[column] is not None]
        return float(spearmanr([people[place][column] for place in known], severity[known]).statistic)

    assert relation("age") > 0.3
    assert relation("crp") > 0.4
    assert relation("snp_1") > 0.1
    assert relation("snp_4") < -0.1
    assert abs(relation("snp_2")) < 0.15
    for column in ("age", "crp", "snp_1"):
        assert 0 < sum(person[column] is None for person in people) < 80
    assert {person["snp_1"] for person in people} == {0, 1, 2, None}
    assert {person["sex"] for person in people} == {"F", "M"}


def test_lesions_grow_with_severity() -> None:
    scans = [phantom_scan(patient, shape=(28, 28, 24), spacing=(2, 2, 2)) for patient in range(40)]
    severity = [scan.columns["severity"] for scan in scans]
    volumes = [(scan.mask == 2).sum() * abs(np.linalg.det(scan.affine)) for scan in scans]
    assert spearmanr(severity, volumes).statistic > 0.8


# Files


def test_a_cohort_is_indexed_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "cohort"
    volumes = make_cohort(folder, patients=6, spacing=(0.8, 0.8, 2.0), shape=(40, 40, 16), snps=3)
    assert volumes == folder / "volumes.csv"
    result = index(folder, patients=volumes, workers=1, keep_ids=True)
    assert result.quarantine == []
    summary = result.summary
    assert summary["patients"] == 6
    assert summary["labelled"] == summary["scans"] == len(table(volumes))
    assert set(summary["scans_per_patient"]) == {2, 3}
    assert summary["spacing_mm"] == [[0.8, 0.8, 2.0], [0.8, 0.8, 2.0]]
    assert summary["shape"][0] < summary["shape"][1]
    assert summary["unused_table_rows"] == summary["without_table_row"] == 0
    number = 0
    for row in result.datalist.training:
        scan = int(row["study_id"]) - 1
        made = phantom_scan(int(row["patient_id"][1:]), scan, spacing=(0.8, 0.8, 2.0), shape=(40, 40, 16), snps=3)
        image, label = nibabel.load(row["image"]), nibabel.load(row["label"])
        np.testing.assert_array_equal(np.asanyarray(image.dataobj), made.image)
        np.testing.assert_array_equal(np.asanyarray(label.dataobj), made.mask)
        np.testing.assert_allclose(image.affine, made.affine, atol=1e-5)
        np.testing.assert_array_equal(label.affine, image.affine)
        assert label.get_data_dtype() == np.uint8
        for column in ("days", "scanner", "modality", "age", "sex", "crp", "severity", "snp_1", "snp_2", "snp_3"):
            assert row.get(column) == made.columns[column]
        number += 1
    assert number == summary["scans"]
    people = table(folder / "participants.csv")
    assert [person["patient"] for person in people] == [f"p{patient:04d}" for patient in range(6)]
    assert "synthetic" in (folder / "README.txt").read_text()


def test_the_same_arguments_give_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    here = make_cohort(tmp_path / "here", patients=3, seed=5, **SMALL).parent
    code = f"from medclr.data.phantom import make_cohort; make_cohort({str(tmp_path / 'there')!r}, patients=3, seed=5"
    code += "".join(f", {name}={value!r}" for name, value in SMALL.items()) + ")"
    environment = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert digests(here) == digests(tmp_path / "there")
    assert len(digests(here)) >= 3 + 2 * 2 * 3


def test_a_patient_does_not_depend_on_the_others(tmp_path: Path) -> None:
    few = digests(make_cohort(tmp_path / "few", patients=2, **SMALL).parent)
    many = digests(make_cohort(tmp_path / "many", patients=4, **SMALL).parent)
    scans = {name for name in few if name.endswith(".nii.gz")}
    assert len(scans) >= 8
    assert {name: few[name] for name in scans} == {name: many[name] for name in scans}
    rows = table(tmp_path / "few" / "participants.csv")
    assert rows == table(tmp_path / "many" / "participants.csv")[:2]


def test_another_seed_gives_other_patients() -> None:
    one, other = (phantom_scan(0, seed=seed, **SMALL) for seed in (0, 1))
    assert phantom_patient(0, seed=0) != phantom_patient(0, seed=1)
    moved, seen = taken_over(one, other)
    assert dice(moved, (other.mask > 0) & seen) < 0.75


def test_mr_and_ct_of_a_patient_show_one_anatomy() -> None:
    mr, ct = (phantom_scan(2, modality=modality) for modality in ("mr", "ct"))
    moved, seen = taken_over(mr, ct)
    assert dice(moved, (ct.mask > 0) & seen) > 0.9


def test_a_fixed_number_of_scans(tmp_path: Path) -> None:
    rows = table(make_cohort(tmp_path / "cohort", patients=3, scans_per_patient=4, **SMALL))
    assert [row["patient"] for row in rows] == [f"p{patient:04d}" for patient in range(3) for _ in range(4)]


@pytest.mark.parametrize(
    "settings",
    [
        {"patients": 0},
        {"patients": 2.5},
        {"patients": True},
        {"scans_per_patient": 0},
        {"scans_per_patient": (3, 2)},
        {"scans_per_patient": (2, 3, 4)},
        {"scans_per_patient": "23"},
        {"modality": "pet"},
        {"shape": (56, 56)},
        {"shape": (56, 56, 4)},
        {"shape": (56, 56, 48.5)},
        {"shape": "abc"},
        {"spacing": 1.0},
        {"spacing": (1, 1, 0)},
        {"spacing": (1, 1, float("nan"))},
        {"seed": 0.5},
        {"snps": -1},
    ],
    ids=str,
)
def test_unusable_settings_are_refused_before_anything_is_written(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))) as caught:
        make_cohort(tmp_path / "cohort", **settings)
    assert "fix:" in str(caught.value)
    assert not (tmp_path / "cohort").exists()


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="folder") as caught:
        make_cohort(tmp_path, patients=1)
    assert "not empty" in str(caught.value)
    with pytest.raises(ConfigError, match="folder"):
        make_cohort(tmp_path / "notes.txt", patients=1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("settings", [{"patient": -1}, {"scan": -1}, {"scan": 0.5}], ids=str)
def test_unusable_numbers_of_patients_and_scans_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        phantom_scan(**{"patient": 0, **settings})


# Shapes


def points_of(random: np.random.Generator, count: int = 2000) -> NDArray[np.float32]:
    return random.uniform(-20, 20, (3, count, 1, 1)).astype(np.float32)


def test_the_distance_to_a_sphere_and_to_a_tube_is_exact() -> None:
    random = np.random.default_rng(0)
    points, centre, turn = points_of(random), random.uniform(-5, 5, 3), any_rotation(random)
    away = points[:, :, 0, 0].T - centre
    sphere = Lump(centre, turn, np.full(3, 7.0)).distance(points)
    np.testing.assert_allclose(sphere.ravel(), np.linalg.norm(away, axis=1) - 7, atol=3e-3)
    tube = Tube(centre, turn, 2.0).distance(points)
    across = np.linalg.norm(np.cross(away, turn[2]), axis=1)
    np.testing.assert_allclose(tube.ravel(), across - 2, atol=1e-3)
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(turn) == pytest.approx(1)


def test_the_sign_of_the_distance_to_an_ellipsoid_is_exact() -> None:
    random = np.random.default_rng(1)
    points, turn, semi = points_of(random), any_rotation(random), np.array([5.0, 9.0, 14.0])
    radius = np.linalg.norm((points[:, :, 0, 0].T @ turn.T) / semi, axis=1)
    distance = Lump(np.zeros(3), turn, semi).distance(points).ravel()
    clear = np.abs(radius - 1) > 1e-4
    np.testing.assert_array_equal(distance[clear] < 0, radius[clear] < 1)


def test_a_texture_has_unit_variance_and_fades_with_blur() -> None:
    random = np.random.default_rng(2)
    points = points_of(random, 20000) * 20
    waves = Waves.draw(random, 10, 4.0, 6.0)
    spread = [float(waves.at(points, blur).std()) for blur in (0.0, 0.6, 1.2)]
    assert spread[0] == pytest.approx(1, abs=0.03)
    assert spread[0] > spread[1] > spread[2] > 0


def test_a_cohort_of_chosen_scanners_comes_from_those_alone() -> None:
    chosen = [phantom_scan(3, scan, shape=(16, 16, 16), scanners=("scanner_a", "scanner_b")) for scan in range(3)]
    names = [made.columns["scanner"] for made in chosen]
    assert set(names) == {"scanner_a", "scanner_b"}
    assert names[0] == names[2]


@pytest.mark.parametrize("scanners", [(), ("scanner_z",), "scanner_a"])
def test_unknown_scanners_are_refused(scanners: Any) -> None:
    with pytest.raises(ConfigError, match="scanners"):
        phantom_scan(0, scanners=scanners)
