"""Real series of several vendors, held to their reference NIfTI files and to SimpleITK."""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from medclr.data.dicom_header import DicomHeader, NotDicom, read_header
from medclr.data.dicom_series import SeriesVolume, volumes_of
from medclr.data.dicom_volume import read_volume
from medclr.errors import ScanError

FAMILIES = {  # folder: number of volumes
    "dcm_qa_enh/Philips": 2,
    "dcm_qa_nih/20180918GE/mr_0004": 10,
    "dcm_qa_nih/20180918GE/mr_0005": 10,
    "dcm_qa_nih/20180918GE/mr_0006": 10,
    "dcm_qa_nih/20180918GE/mr_0007": 10,
    "dcm_qa_ts": 9,
    "dicom2nifti_tests/failing/gantrytilting/001": 1,
    "dicom2nifti_tests/failing/slicecount/001": 0,
    "dicom2nifti_tests/ge/anatomical/001": 1,
    "dicom2nifti_tests/ge/anatomical/001_implicit": 1,
    "dicom2nifti_tests/ge/anatomical/001_single_slice": 0,
    "dicom2nifti_tests/generic/anatomical/001": 1,
    "dicom2nifti_tests/generic/anatomical/001_implicit": 1,
    "dicom2nifti_tests/generic/anatomical/002_non_isotropic": 1,
    "dicom2nifti_tests/generic/compressed/001": 1,
    "dicom2nifti_tests/generic/compressed_j2k/001": 1,
    "dicom2nifti_tests/generic/compressed_rle/001": 1,
    "dicom2nifti_tests/generic/rgb/001": 0,
    "dicom2nifti_tests/hitachi/anatomical/001": 1,
    "dicom2nifti_tests/hitachi/anatomical/001_implicit": 1,
    "dicom2nifti_tests/philips_enhanced/anatomical/001": 1,
    "dicom2nifti_tests/philips_enhanced/anatomical/001_implicit": 1,
    "dicom2nifti_tests/siemens/anatomical/001": 1,
    "dicom2nifti_tests/siemens/anatomical/001_implicit": 1,
    "dicom2nifti_tests/siemens/fmri/001": 2,
    "dicom2nifti_tests/siemens/fmri/001_implicit": 2,
    "studyforrest_t1": 1,
}
REASONS = {
    "dicom2nifti_tests/failing/slicecount/001": "A volume has fewer than three slices.",
    "dicom2nifti_tests/ge/anatomical/001_single_slice": "A volume has fewer than three slices.",
    "dicom2nifti_tests/generic/rgb/001": "The image is no slice of a volume.",
}
# Their slices are numbered downwards. The reference turns them upwards, but leaves its origin at what was the first
# slice: it lies a whole stack above the place that the protocol in the same files gives.
BACKWARDS = ("dicom2nifti_tests/siemens/fmri/001", "dicom2nifti_tests/siemens/fmri/001_implicit")


@pytest.fixture(scope="session")
def dicom_dir(data_dir: Path) -> Path:
    folder = data_dir / "dicom"
    if not folder.is_dir():
        pytest.skip("real DICOM files not found: no folder dicom among the real scans")
    return folder


def headers_of(root: Path, folder: str = "") -> list[DicomHeader]:
    headers = []
    for path in sorted((root / folder).rglob("*")):
        try:
            if path.is_file():
                headers.append(read_header(path, str(path.relative_to(root))))
        except NotDicom:
            assert path.suffix in (".gz", ".txt", ".md")
    return headers


def canonical(voxels: NDArray[Any], affine: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(np.asarray(voxels, dtype=np.float64), affine))
    return np.asarray(image.dataobj), image.affine


def read(root: Path, volume: SeriesVolume) -> tuple[NDArray[Any], NDArray[np.float64]]:
    return read_volume(volume, lambda path: root / path)


@pytest.mark.parametrize("folder", FAMILIES)
def test_a_family_is_read_as_all_its_volumes_or_refused_with_its_reason(dicom_dir: Path, folder: str) -> None:
    volumes, refusals = volumes_of(headers_of(dicom_dir, folder))
    assert len(volumes) == FAMILIES[folder]
    assert {error.problem for error in refusals.values()} == ({REASONS[folder]} if folder in REASONS else set())
    for volume in volumes:
        voxels, affine = read(dicom_dir, volume)
        assert voxels.shape == volume.shape
        assert voxels.dtype == volume.dtype
        assert voxels.min() < voxels.max()
        np.testing.assert_array_equal(affine, volume.affine)
        assert np.linalg.det(affine[:3, :3]) != 0


@pytest.mark.parametrize("folder", [name for name in FAMILIES if name.startswith("dicom2nifti") and FAMILIES[name]])
def test_a_family_equals_its_reference(dicom_dir: Path, folder: str) -> None:
    file = dicom_dir / f"{folder}_ground_truth.nii.gz"
    if not file.exists():
        pytest.skip("the family has no reference file")
    reference = nibabel.load(file)
    wanted = np.asarray(reference.dataobj)
    wanted = wanted[..., None] if wanted.ndim == 3 else wanted
    wanted_affine = reference.affine.copy()
    if folder in BACKWARDS:
        wanted_affine[:3, 3] -= (wanted.shape[2] - 1) * wanted_affine[:3, 2]
    volumes, _ = volumes_of(headers_of(dicom_dir, folder))
    assert len(volumes) == wanted.shape[3]
    for time, volume in enumerate(volumes):
        voxels, affine = canonical(*read(dicom_dir, volume))
        reference_voxels, reference_affine = canonical(wanted[..., time], wanted_affine)
        np.testing.assert_allclose(affine, reference_affine, atol=1e-3)
        np.testing.assert_allclose(voxels, reference_voxels, rtol=1e-6, atol=1e-3)


PLAIN = [
    name
    for name in FAMILIES
    if FAMILIES[name] and not any(word in name for word in ("tilting", "fmri", "dcm_qa_ts", "nhanced", "dcm_qa_enh"))
]


@pytest.mark.parametrize("folder", PLAIN)
def test_a_series_equals_what_simpleitk_reads(dicom_dir: Path, folder: str) -> None:
    volumes, _ = volumes_of(headers_of(dicom_dir, folder))
    for volume in volumes:
        reader = sitk.ImageSeriesReader()
        files = [str(dicom_dir / path) for path, _ in volume.slices]
        reader.SetFileNames(files if len(volumes) > 1 else gdcm_names(dicom_dir / folder))
        image = reader.Execute()
        affine = np.eye(4)
        affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
        affine[:3, 3] = image.GetOrigin()
        voxels, own = canonical(*read(dicom_dir, volume))
        wanted, theirs = canonical(sitk.GetArrayFromImage(image).T, np.diag([-1.0, -1, 1, 1]) @ affine)
        np.testing.assert_allclose(own, theirs, atol=1e-3)
        np.testing.assert_allclose(voxels, wanted, rtol=1e-6, atol=1e-3)


def gdcm_names(folder: Path) -> list[str]:
    return list(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))


def test_the_same_image_in_nine_transfer_syntaxes_gives_the_same_voxels(dicom_dir: Path) -> None:
    volumes, _ = volumes_of(headers_of(dicom_dir, "dcm_qa_ts"))
    arrays = [read(dicom_dir, volume) for volume in volumes]
    for (voxels, affine), (others, other) in itertools.pairwise(arrays):
        np.testing.assert_array_equal(voxels, others)
        np.testing.assert_array_equal(affine, other)


def test_a_mosaic_lies_where_its_protocol_says(dicom_dir: Path) -> None:
    for folder in ("dcm_qa_ts", *BACKWARDS):
        volume = volumes_of(headers_of(dicom_dir, folder))[0][0]
        text = (dicom_dir / volume.slices[0][0]).read_bytes()
        block = text[text.rfind(b"### ASCCONV BEGIN") :].decode("latin-1")
        ends = []
        for number in (0, volume.shape[2] - 1):
            place = []
            for axis in ("Sag", "Cor", "Tra"):
                line = f"sSliceArray.asSlice[{number}].sPosition.d{axis}"
                found = [
                    part.split("=")[1] for part in block.splitlines() if part.startswith((line + " ", line + "\t"))
                ]
                place.append(float(found[0]) if found else 0.0)
            ends.append(np.array(place) * [-1, -1, 1])
        middle = np.array(volume.shape[:2]) / 2
        for z, wanted in ((0, ends[0]), (volume.shape[2] - 1, ends[1])):
            lies = (volume.affine @ [*middle, z, 1])[:3]
            np.testing.assert_allclose(lies, wanted, atol=1.5 * volume.spacing[0])


def test_folders_that_share_a_series_give_each_image_once(dicom_dir: Path) -> None:
    by_series = defaultdict(list)
    for header in headers_of(dicom_dir):
        by_series[header.identity["SeriesInstanceUID"]].append(header)
    assert sum(map(len, by_series.values())) == 771
    assert len(by_series) == 23
    handled, accepted = set(), 0
    for headers in by_series.values():
        volumes, refusals = volumes_of(headers)
        used = {path for volume in volumes for path, _ in volume.slices}
        assert used.isdisjoint(refusals)
        handled |= used | set(refusals)
        accepted += bool(volumes)
        assert all(error.problem == "The file is a duplicate." or not volumes for error in refusals.values()), (
            "nothing of a good series is refused but its duplicates"
        )
    assert len(handled) == 771
    assert accepted == 22  # all but the secondary captures in colour


def test_a_header_survives_json(dicom_dir: Path) -> None:
    for header in headers_of(dicom_dir, "dicom2nifti_tests") + headers_of(dicom_dir, "dcm_qa_ts"):
        assert DicomHeader.from_json(header.to_json()) == header


def test_a_volume_survives_json(dicom_dir: Path) -> None:
    for folder in ("dcm_qa_ts", "studyforrest_t1", "dcm_qa_enh/Philips"):
        for volume in volumes_of(headers_of(dicom_dir, folder))[0]:
            assert SeriesVolume.from_json(volume.to_json()) == volume
    with pytest.raises(ScanError, match="series file is unreadable"):
        SeriesVolume.from_json("{}")
