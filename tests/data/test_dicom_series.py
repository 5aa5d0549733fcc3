"""Series become volumes: what splits them, what is refused, and where voxels end up."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import UID
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from medclr.errors import ScanError
from tests.data.dicom_files import (
    AXIAL,
    CT,
    ORIGIN,
    SPACING,
    anatomy,
    dimension,
    expected_affine,
    macro,
    placed,
    shared_groups,
    volumes_in,
    voxels_of,
    write_enhanced,
    write_stack,
)

OBLIQUE = tuple(Rotation.from_euler("xyz", [20, -13, 31], degrees=True).as_matrix()[:, :2].T.ravel())
ORIENTATIONS = {
    "axial": AXIAL,
    "sagittal": (0, 1, 0, 0, 0, -1),
    "coronal": (1, 0, 0, 0, 0, -1),
    "flipped": (-1, 0, 0, 0, 1, 0),
    "oblique": OBLIQUE,
}


def only(folder: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    volumes, refusals = volumes_in(folder)
    assert refusals == {}
    assert len(volumes) == 1
    return voxels_of(folder, volumes[0])


def problems(refusals: dict[str, ScanError]) -> set[str]:
    return {error.problem for error in refusals.values()}


@pytest.mark.parametrize("orientation", ORIENTATIONS.values(), ids=ORIENTATIONS)
@pytest.mark.parametrize("backwards", [False, True])
def test_a_stack_in_any_direction_and_order_lies_where_its_tags_say(
    tmp_path: Path, orientation: tuple[float, ...], backwards: bool
) -> None:
    voxels = anatomy()
    normal = np.cross(orientation[:3], orientation[3:])
    step = normal * SPACING[2] * (-1 if backwards else 1)
    write_stack(tmp_path, voxels, orientation=orientation, step=step)
    found, affine = only(tmp_path)
    origin = ORIGIN + 5 * step * backwards
    np.testing.assert_allclose(affine, expected_affine(orientation, origin), atol=1e-4)
    np.testing.assert_array_equal(found, voxels[:, :, ::-1] if backwards else voxels)
    assert found.dtype == np.int16


def test_the_gap_comes_from_positions_whatever_tags_say(tmp_path: Path) -> None:
    def thin(image: Dataset, _: int) -> None:
        image.SliceThickness, image.SpacingBetweenSlices = 0.3, 0.4

    write_stack(tmp_path, anatomy(), change=thin)
    np.testing.assert_allclose(only(tmp_path)[1], expected_affine(), atol=1e-5)


def test_each_slice_is_rescaled_by_its_own_slope(tmp_path: Path) -> None:
    voxels = anatomy()

    def scale(image: Dataset, z: int) -> None:
        image.RescaleSlope, image.RescaleIntercept = 0.5 + z, -3.25 * z

    write_stack(tmp_path, voxels, change=scale)
    found, _ = only(tmp_path)
    z = np.arange(6)
    np.testing.assert_allclose(found, voxels * (0.5 + z) - 3.25 * z, rtol=1e-6)
    assert found.dtype == np.float32


def test_a_slice_that_lacks_the_slope_of_the_others_is_noticed(tmp_path: Path) -> None:
    def scale(image: Dataset, z: int) -> None:
        if z != 2:
            image.RescaleSlope, image.RescaleIntercept = 1, -1024

    write_stack(tmp_path, anatomy(), change=scale)
    assert problems(volumes_in(tmp_path)[1]) == {"The slices of a volume scale differently."}


SPLITS: dict[str, Any] = {
    "echo": lambda image, part: setattr(image, "EchoNumbers", part + 1),
    "echo time": lambda image, part: setattr(image, "EchoTime", 4.6 * (part + 1)),
    "temporal position": lambda image, part: setattr(image, "TemporalPositionIdentifier", part + 1),
    "image type": lambda image, part: setattr(image, "ImageType", ["ORIGINAL", "PRIMARY", "MPR"[part]]),
    "b-value": lambda image, part: setattr(image, "DiffusionBValue", 500.0 * part),
    "acquisition": lambda image, part: setattr(image, "AcquisitionNumber", part + 1),
    "trigger time": lambda image, part: setattr(image, "TriggerTime", 55.0 * part),
    "inversion time": lambda image, part: setattr(image, "InversionTime", 100.0 * (part + 1)),
}


@pytest.mark.parametrize("what", SPLITS)
def test_what_tells_volumes_apart_splits_a_series(tmp_path: Path, what: str) -> None:
    parts = [anatomy(seed=part) for part in range(3)]
    for part, voxels in enumerate(parts):
        write_stack(tmp_path, voxels, name=f"{part}", change=lambda image, _, part=part: SPLITS[what](image, part))
    volumes, refusals = volumes_in(tmp_path)
    assert refusals == {}
    found = [voxels_of(tmp_path, volume)[0] for volume in volumes]
    for voxels in parts:
        assert sum(np.array_equal(voxels, other) for other in found) == 1
    assert all(what in dict(volume.told_by) for volume in volumes)


@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("first", [1, 0, 41])
def test_repetitions_without_a_tag_are_told_by_instance_numbers(tmp_path: Path, time_first: bool, first: int) -> None:
    parts = [anatomy(seed=part) for part in range(4)]
    for part, voxels in enumerate(parts):

        def number(image: Dataset, z: int, part: int = part) -> None:
            image.InstanceNumber = first + (z * 4 + part if time_first else part * 6 + z)

        write_stack(tmp_path, voxels, name=f"{part}", change=number)
    volumes, refusals = volumes_in(tmp_path)
    assert refusals == {}
    for volume, voxels in zip(volumes, parts, strict=True):
        np.testing.assert_array_equal(voxels_of(tmp_path, volume)[0], voxels)


def test_a_wrong_instance_number_costs_one_repetition(tmp_path: Path) -> None:
    parts = [anatomy(seed=part) for part in range(4)]
    for part, voxels in enumerate(parts):
        write_stack(tmp_path, voxels, name=f"{part}", first=1 + part * 6)
    path = tmp_path / "2_003"
    image = dcmread(path)
    image.InstanceNumber = 5000
    image.save_as(path)
    volumes, refusals = volumes_in(tmp_path)
    assert len(volumes) == 3
    assert all(name.startswith("2_") for name in refusals)
    for volume, voxels in zip(volumes, [parts[0], parts[1], parts[3]], strict=True):
        np.testing.assert_array_equal(voxels_of(tmp_path, volume)[0], voxels)


def test_repetitions_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    for part in range(2):
        write_stack(tmp_path, anatomy(seed=part), name=f"{part}")
    volumes, refusals = volumes_in(tmp_path)
    assert volumes == []
    assert problems(refusals) == {"Slices are there twice."}


def test_a_tag_that_differs_in_one_slice_alone_splits_nothing(tmp_path: Path) -> None:
    def odd(image: Dataset, z: int) -> None:
        image.EchoTime = 5 if z == 3 else 7
        image.AcquisitionNumber = z
        image.ImageType = ["DERIVED", "PRIMARY"] if z == 1 else ["ORIGINAL", "PRIMARY"]

    voxels = anatomy()
    write_stack(tmp_path, voxels, change=odd)
    np.testing.assert_array_equal(only(tmp_path)[0], voxels)


def test_two_orientations_are_two_volumes(tmp_path: Path) -> None:
    write_stack(tmp_path, anatomy(), name="a")
    write_stack(tmp_path, anatomy(seed=1), name="b", orientation=ORIENTATIONS["sagittal"])
    volumes, refusals = volumes_in(tmp_path)
    assert (len(volumes), refusals) == (2, {})


def test_a_slice_that_is_turned_is_refused_and_leaves_a_gap(tmp_path: Path) -> None:
    def turn(image: Dataset, z: int) -> None:
        if z == 2:
            image.ImageOrientationPatient = list(OBLIQUE)

    write_stack(tmp_path, anatomy(), change=turn)
    volumes, refusals = volumes_in(tmp_path)
    assert volumes == []
    assert problems(refusals) == {"Slices are missing.", "A volume has fewer than three slices."}


@pytest.mark.parametrize("lost", [[2], [1, 3], [2, 3]])
def test_a_missing_slice_is_noticed(tmp_path: Path, lost: list[int]) -> None:
    paths = write_stack(tmp_path, anatomy())
    for z in lost:
        paths[z].unlink()
    volumes, refusals = volumes_in(tmp_path)
    assert volumes == []
    assert problems(refusals) <= {"Slices are missing.", "The gaps between slices are uneven."}


def test_a_slice_missing_at_the_end_of_one_repetition_is_noticed(tmp_path: Path) -> None:
    for part in range(3):
        paths = write_stack(
            tmp_path,
            anatomy(seed=part),
            name=f"{part}",
            change=lambda image, _, part=part: SPLITS["temporal position"](image, part),
        )
    paths[-1].unlink()
    volumes, refusals = volumes_in(tmp_path)
    assert len(volumes) == 2
    assert problems(refusals) == {"Slices are missing."}


@pytest.mark.parametrize(("off", "fits"), [(0.0, True), (0.05, True), (0.3, False), (-1.0, False)])
def test_uneven_gaps_are_refused_but_not_rounding(tmp_path: Path, off: float, fits: bool) -> None:
    def move(image: Dataset, z: int) -> None:
        if z == 3:
            image.ImagePositionPatient[2] += off

    write_stack(tmp_path, anatomy(), change=move)
    volumes, refusals = volumes_in(tmp_path)
    assert bool(volumes) == fits
    assert problems(refusals) == (set() if fits else {"The gaps between slices are uneven."})


def test_a_slice_aside_of_the_others_is_refused(tmp_path: Path) -> None:
    def move(image: Dataset, z: int) -> None:
        if z == 3:
            image.ImagePositionPatient[0] += 0.4

    write_stack(tmp_path, anatomy(), change=move)
    assert problems(volumes_in(tmp_path)[1]) == {"The slices do not lie on a line."}


@pytest.mark.parametrize("slices", [1, 2])
def test_fewer_than_three_slices_are_no_volume(tmp_path: Path, slices: int) -> None:
    write_stack(tmp_path, anatomy((9, 7, slices)))
    assert problems(volumes_in(tmp_path)[1]) == {"A volume has fewer than three slices."}


def test_a_repeated_instance_is_a_duplicate_of_the_first(tmp_path: Path) -> None:
    paths = write_stack(tmp_path, anatomy())
    shutil.copy(paths[2], tmp_path / "zz_copy")
    volumes, refusals = volumes_in(tmp_path)
    assert len(volumes) == 1
    assert refusals.keys() == {"zz_copy"}
    assert refusals["zz_copy"].got == "duplicate of slice_002"


def test_two_images_under_one_instance_are_both_refused(tmp_path: Path) -> None:
    paths = write_stack(tmp_path, anatomy())
    image = dcmread(paths[5])
    image.SOPInstanceUID = dcmread(paths[4]).SOPInstanceUID
    image.save_as(paths[5])
    volumes, refusals = volumes_in(tmp_path)
    assert len(volumes) == 1
    assert volumes[0].shape == (9, 7, 4)
    assert refusals.keys() == {"slice_004", "slice_005"}


def test_slices_of_two_sizes_are_never_one_volume(tmp_path: Path) -> None:
    write_stack(tmp_path, anatomy((9, 7, 6))[:, :, :3], name="a")
    write_stack(tmp_path, anatomy((8, 7, 3)), name="b", origin=np.add(ORIGIN, (0, 0, 7.5)))
    volumes, _ = volumes_in(tmp_path)
    assert sorted(volume.shape for volume in volumes) == [(8, 7, 3), (9, 7, 3)]


def smooth(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """A scene (..., 3) -> values that linear interpolation follows closely."""
    return 300 + 100 * np.sin(points[..., 0] / 9) + 80 * np.cos(points[..., 1] / 7) + 3 * points[..., 2]


@pytest.mark.parametrize("degrees", [14.0, -22.0, 3.0])
@pytest.mark.parametrize("stated", [True, False])
def test_a_tilted_gantry_is_straightened(tmp_path: Path, degrees: float, stated: bool) -> None:
    angle = np.deg2rad(degrees)
    orientation = (1, 0, 0, 0, np.cos(angle), -np.sin(angle))
    step, shape, spacing = (0, 0, 4.0), (24, 30, 9), (0.9, 0.9, 0)
    axes = np.array(orientation).reshape(2, 3)
    x, y, z = np.meshgrid(*map(np.arange, shape), indexing="ij")
    points = ORIGIN + x[..., None] * 0.9 * axes[0] + y[..., None] * 0.9 * axes[1] + z[..., None] * np.array(step)
    voxels = smooth(points).round().astype(np.int16)

    def tilt(image: Dataset, _: int) -> None:
        if stated:
            image.GantryDetectorTilt = degrees

    write_stack(tmp_path, voxels, orientation=orientation, step=step, spacing=spacing, sop_class=CT, change=tilt)
    found, affine = only(tmp_path)
    axes_found = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes_found.T @ axes_found, np.eye(3), atol=1e-6)  # at right angles
    assert np.isclose(np.linalg.norm(affine[:3, 2]), 4 * np.cos(angle))
    index = np.stack(np.meshgrid(*map(np.arange, found.shape), indexing="ij"), axis=-1)
    world = (index @ affine[:3, :3].T + affine[:3, 3]) * [-1, -1, 1]
    # Back from the world to the tilted stack: voxels well inside must show the scene at their own place.
    skew = np.stack([axes[0] * 0.9, axes[1] * 0.9, np.array(step)], axis=1)
    lies = (world - ORIGIN) @ np.linalg.inv(skew).T
    inside = np.all((lies[..., :2] >= 1) & (lies[..., :2] <= np.array(shape[:2]) - 2), axis=-1)
    assert inside.mean() > 0.5
    np.testing.assert_allclose(found[inside], smooth(world)[inside], atol=1.5)
    # The same by an independent interpolation of the skewed stack.
    wanted = map_coordinates(voxels.astype(float), np.moveaxis(lies, -1, 0), order=1, mode="nearest")
    np.testing.assert_allclose(found[inside], wanted[inside], atol=1e-2)


def test_a_tilt_that_the_positions_do_not_show_is_refused(tmp_path: Path) -> None:
    write_stack(tmp_path, anatomy(), sop_class=CT, change=lambda image, _: setattr(image, "GantryDetectorTilt", -22))
    assert problems(volumes_in(tmp_path)[1]) == {"The gantry tilt contradicts the positions."}


def test_slices_that_run_along_their_own_plane_are_refused(tmp_path: Path) -> None:
    write_stack(tmp_path, anatomy(), step=(6.0, 0, 2.5))
    assert problems(volumes_in(tmp_path)[1]) == {"The stack of slices is tilted too far."}


@pytest.mark.parametrize(
    ("tags", "problem"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "The image is a localizer."),
        ({"ImageType": ["DERIVED", "SECONDARY", "PROJECTION IMAGE"]}, "The image is a projection."),
        ({"SOPClassUID": UID("1.2.840.10008.5.1.4.1.1.7")}, "The image is no slice of a volume."),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "The image is in colour."),
        ({"PixelSpacing": [0, 1]}, "The pixel spacing is absurd."),
        ({"PixelSpacing": [1, 4000]}, "The pixel spacing is absurd."),
        ({"PixelSpacing": None}, "The place of the image is not known."),
        ({"ImageOrientationPatient": [1, 0, 0, 0.5, 1, 0]}, "The orientation of the image is unusable."),
        ({"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]}, "The orientation of the image is unusable."),
        ({"ImagePositionPatient": [1, 2]}, "The place of the image is not known."),
        ({"RescaleSlope": 0}, "The rescale slope or intercept is unusable."),
        ({"BitsStored": 12}, "The pixels' type contradicts itself."),
        ({"Rows": 6}, "The pixel data is longer than the tags say."),
        ({"Rows": 8}, "The file is cut short."),
        ({"NumberOfFrames": 70000}, "The number of frames is absurd."),
    ],
)
def test_what_is_no_slice_is_left_out_with_the_reason(tmp_path: Path, tags: dict[str, Any], problem: str) -> None:
    def change(image: Dataset, _: int) -> None:
        for key, value in tags.items():
            setattr(image, key, value)

    write_stack(tmp_path, anatomy((9, 7, 3)) + 0, change=change)
    volumes, refusals = volumes_in(tmp_path)
    assert volumes == []
    assert problems(refusals) == {problem}
    assert len(refusals) == 3


@pytest.mark.parametrize(
    "tag", ["SOPClassUID", "Modality", "ImageType", "InstanceNumber", "PatientID", "SOPInstanceUID", "PatientName"]
)
def test_a_tag_that_geometry_does_not_need_may_be_missing(tmp_path: Path, tag: str) -> None:
    voxels = anatomy()
    write_stack(tmp_path, voxels, change=lambda image, z: delattr(image, tag))
    found, affine = only(tmp_path)
    np.testing.assert_array_equal(found, voxels)
    np.testing.assert_allclose(affine, expected_affine(), atol=1e-5)


def frames_at(voxels: NDArray[Any], **content: Any) -> list[tuple[NDArray[Any], Dataset]]:
    return [
        (voxels[:, :, z].T.copy(), placed(np.add(ORIGIN, (0, 0, z * SPACING[2])), **content))
        for z in range(voxels.shape[2])
    ]


def test_a_multi_frame_file_of_stacks_and_times_gives_each_volume(tmp_path: Path) -> None:
    parts = {(stack, time): anatomy(seed=10 * stack + time) for stack in (1, 2) for time in (1, 2, 3)}
    frames = []
    for (stack, time), voxels in parts.items():
        for z, (pixels, group) in enumerate(frames_at(voxels)):
            group.FrameContentSequence[0].StackID = str(stack)
            group.FrameContentSequence[0].InStackPositionNumber = z + 1
            group.FrameContentSequence[0].TemporalPositionIndex = time
            group.PlanePositionSequence[0].ImagePositionPatient[0] += 60 * (stack - 1)
            frames.append((pixels, group))
    order = np.random.default_rng(3).permutation(len(frames))
    write_enhanced(tmp_path / "file", [frames[k] for k in order], shared_groups())
    volumes, refusals = volumes_in(tmp_path)
    assert refusals == {}
    assert len(volumes) == len(parts)
    for volume in volumes:
        told = dict(volume.told_by)
        stack = 1 if np.isclose(volume.affine[0, 3], -ORIGIN[0]) else 2
        found, affine = voxels_of(tmp_path, volume)
        np.testing.assert_array_equal(found, parts[stack, int(float(told["temporal position"]))])
        np.testing.assert_allclose(affine, expected_affine(origin=np.add(ORIGIN, (60 * (stack - 1), 0, 0))))


def test_frames_are_told_apart_by_a_dimension_of_any_kind(tmp_path: Path) -> None:
    parts = [anatomy(seed=part) for part in range(2)]
    frames = []
    for part, voxels in enumerate(parts):
        for z, frame in enumerate(frames_at(voxels)):
            frame[1].FrameContentSequence[0].DimensionIndexValues = [z + 1, part + 1]
            frames.append(frame)
    path = write_enhanced(tmp_path / "file", frames, shared_groups())
    image = dcmread(path)
    image.DimensionIndexSequence = [dimension(0x00209057), dimension(0x00189087)]
    image.save_as(path)
    volumes, refusals = volumes_in(tmp_path)
    assert refusals == {}
    for volume, voxels in zip(volumes, parts, strict=True):
        np.testing.assert_array_equal(voxels_of(tmp_path, volume)[0], voxels)


def test_b_values_echoes_and_slopes_of_frames_count(tmp_path: Path) -> None:
    parts = {(b, echo): anatomy(seed=int(b + echo)) for b in (0.0, 1000.0) for echo in (10.0, 20.0)}
    frames = []
    for (b, echo), voxels in parts.items():
        for pixels, group in frames_at(voxels):
            group.MRDiffusionSequence = [macro(DiffusionBValue=b)]
            group.MREchoSequence = [macro(EffectiveEchoTime=echo)]
            group.PixelValueTransformationSequence = [macro(RescaleSlope=echo, RescaleIntercept=b, RescaleType="US")]
            frames.append((pixels, group))
    write_enhanced(tmp_path / "file", frames, shared_groups())
    volumes, _ = volumes_in(tmp_path)
    assert len(volumes) == 4
    for volume in volumes:
        told = dict(volume.told_by)
        b, echo = float(told["b-value"]), float(told["echo time"])
        np.testing.assert_allclose(voxels_of(tmp_path, volume)[0], parts[b, echo] * echo + b)


def test_one_multi_frame_file_a_time_gives_one_volume_a_file(tmp_path: Path) -> None:
    parts = [anatomy(seed=part) for part in range(3)]
    for part, voxels in enumerate(parts):
        write_enhanced(tmp_path / f"{part}", frames_at(voxels), shared_groups())
    volumes, refusals = volumes_in(tmp_path)
    assert refusals == {}
    for volume, voxels in zip(volumes, parts, strict=True):
        np.testing.assert_array_equal(voxels_of(tmp_path, volume)[0], voxels)


def test_functional_groups_for_other_frames_are_refused(tmp_path: Path) -> None:
    path = write_enhanced(tmp_path / "file", frames_at(anatomy()), shared_groups())
    image = dcmread(path)
    del image.PerFrameFunctionalGroupsSequence[3]
    image.save_as(path)
    assert problems(volumes_in(tmp_path)[1]) == {"The functional groups do not fit the frames."}


def test_frames_without_places_are_refused(tmp_path: Path) -> None:
    paths = write_stack(tmp_path, anatomy((9, 28, 1)))
    image = dcmread(paths[0])
    image.NumberOfFrames, image.Rows = 4, 7
    image.save_as(paths[0])
    assert problems(volumes_in(tmp_path)[1]) == {"Slices are there twice."}
