from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.transforms import Compose, Identity, Invertd, NormalizeIntensity, ScaleIntensityRange
from scipy.ndimage import map_coordinates

from medclr.data import Preprocessing, Volume
from medclr.data.load import LoadScand
from medclr.errors import ConfigError, ScanError

AFFINE_NAMES = ["plain", "anisotropic", "flipped", "permuted", "oblique", "oblique and flipped"]
NAME = "Doe_Jane_1970-01-01"


def noise(shape: tuple[int, ...] = (11, 14, 9), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def sources(affine: np.ndarray, volume: Volume) -> np.ndarray:
    """Where in the file, in voxels (3, X, Y, Z), the world position of each voxel of the volume lies."""
    shape = volume.image.shape[1:]
    index = np.stack([*np.indices(shape), np.ones(shape)]).reshape(4, -1)
    source = np.linalg.inv(affine) @ volume.affine.numpy().astype(np.float64) @ index
    return source[:3].reshape(3, *shape)


@pytest.mark.parametrize("name", AFFINE_NAMES)
def test_orientation_agrees_with_nibabel(name: str, affines: dict, write_scan: Callable[..., str]) -> None:
    voxels = noise()
    path = write_scan("scan", voxels, affines[name])
    volume = Preprocessing(orientation="RAS", intensity=Identity()).volume({"image": path})
    wanted = nibabel.as_closest_canonical(nibabel.load(path))
    np.testing.assert_array_equal(volume.image[0].numpy(), wanted.get_fdata(dtype=np.float32))
    np.testing.assert_allclose(volume.affine.numpy(), wanted.affine, rtol=1e-6, atol=1e-5)
    assert volume.image.dtype == volume.affine.dtype == torch.float32
    assert type(volume.image) is type(volume.affine) is torch.Tensor


def test_without_orientation_and_spacing_the_grid_is_the_files(affines: dict, write_scan: Callable[..., str]) -> None:
    voxels = noise()
    volume = Preprocessing(orientation=None, intensity=Identity()).volume(
        {"image": write_scan("scan", voxels, affines["oblique and flipped"])}
    )
    np.testing.assert_array_equal(volume.image[0].numpy(), voxels)
    np.testing.assert_allclose(volume.affine.numpy(), affines["oblique and flipped"], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", AFFINE_NAMES)
@pytest.mark.parametrize(
    ("orientation", "spacing"), [("RAS", (1.0, 1.0, 1.0)), ("LPS", (0.7, 1.9, 1.3)), (None, (1.1, 0.9, 2.2))]
)
def test_resampling_puts_every_voxel_where_its_affine_says(
    name: str, orientation: str | None, spacing: tuple[float, ...], affines: dict, write_scan: Callable[..., str]
) -> None:
    voxels, mask = noise(), (noise(seed=1) * 4).astype(np.uint8)
    row = {"image": write_scan("scan", voxels, affines[name]), "label": write_scan("mask", mask, affines[name])}
    volume = Preprocessing(("image", "label"), orientation=orientation, spacing=spacing, intensity=Identity()).volume(
        row
    )
    np.testing.assert_allclose(volume.affine[:3, :3].norm(dim=0).numpy(), spacing, rtol=1e-5)
    places = sources(affines[name], volume)
    np.testing.assert_allclose(
        volume.image[0].numpy(), map_coordinates(voxels, places, order=1, mode="nearest"), atol=2e-4
    )
    assert volume.label is not None
    assert volume.label.shape == volume.image.shape[1:]
    nearest = map_coordinates(mask, places, order=0, mode="nearest")
    halfway = (np.abs(places % 1 - 0.5) < 1e-3).any(axis=0)  # may take either neighbour
    assert halfway.mean() < 0.5
    np.testing.assert_array_equal(volume.label.numpy()[~halfway], nearest[~halfway])
    assert set(volume.label.unique().tolist()) <= {0, 1, 2, 3}


def test_the_default_intensity_maps_percentiles_to_0_and_1_channel_by_channel(write_scan: Callable[..., str]) -> None:
    channels = [noise(seed=0) * 3000 - 500, np.exp(noise(seed=1) * 4)]
    paths = [write_scan(f"sequence{place}", voxels) for place, voxels in enumerate(channels)]
    volume = Preprocessing(orientation=None).volume({"image": paths})
    for voxels, image in zip(channels, volume.image.numpy(), strict=True):
        low, high = np.percentile(voxels, [0.5, 99.5])
        np.testing.assert_allclose(image, np.clip((voxels - low) / (high - low), 0, 1), atol=1e-5)


def test_a_ct_window_is_applied_as_given(write_scan: Callable[..., str]) -> None:
    voxels = noise() * 3000 - 1500
    window = ScaleIntensityRange(-1000, 400, 0, 1, clip=True)
    volume = Preprocessing(orientation=None, intensity=window).volume({"image": write_scan("ct", voxels)})
    np.testing.assert_allclose(volume.image[0].numpy(), np.clip((voxels + 1000) / 1400, 0, 1), atol=1e-6)


@pytest.mark.parametrize("absent", [0, 1, 2])
@pytest.mark.parametrize("spacing", [None, (1.2, 1.2, 1.2)])
def test_an_absent_sequence_is_a_zero_channel_and_leaves_the_others_alone(
    absent: int, spacing: tuple[float, ...] | None, affines: dict, write_scan: Callable[..., str]
) -> None:
    paths: list[Any] = [write_scan(f"s{place}", noise(seed=place) * 100 + 7, affines["flipped"]) for place in range(3)]
    preprocessing = Preprocessing(spacing=spacing)
    whole = preprocessing.volume({"image": paths})
    assert whole.channels.tolist() == [True, True, True]
    paths[absent] = None
    volume = preprocessing.volume({"image": paths})
    assert volume.channels.dtype == torch.bool
    assert volume.channels.tolist() == [place != absent for place in range(3)]
    assert not volume.image[absent].any()
    for place in {0, 1, 2} - {absent}:
        assert torch.equal(volume.image[place], whole.image[place])


def test_one_path_and_a_list_of_one_path_are_the_same(write_scan: Callable[..., str]) -> None:
    path = write_scan("scan", noise())
    for one, other in zip(*(Preprocessing().volume({"image": image}) for image in (path, [path])), strict=True):
        assert one is other is None or torch.equal(one, other)


def test_paths_may_be_path_objects(write_scan: Callable[..., str]) -> None:
    image, label = Path(write_scan("scan", noise())), Path(write_scan("mask", (noise() > 0.5).astype(np.uint8)))
    volume = Preprocessing(("image", "label")).volume({"image": image, "label": label})
    assert volume.label is not None
    assert int(volume.label.sum()) == int((noise() > 0.5).sum())


@pytest.mark.parametrize("row", [{}, {"label": None}], ids=["no label", "label null"])
def test_a_row_without_label_gives_a_volume_without_label(row: dict, write_scan: Callable[..., str]) -> None:
    volume = Preprocessing(("image", "label"), spacing=(1.0, 1.0, 2.0)).volume(
        {"image": write_scan("a", noise()), **row}
    )
    assert volume.label is None


@pytest.mark.parametrize("label", [3, "tumour"])
def test_a_label_that_is_a_class_is_left_alone_where_no_mask_is_wanted(
    label: Any, write_scan: Callable[..., str]
) -> None:
    row = {"image": write_scan("scan", noise()), "label": label}
    assert Preprocessing().volume(row).label is None
    assert Preprocessing()(row)["label"] == label


def test_a_label_within_the_tolerance_of_its_image_lands_on_the_very_same_grid(write_scan: Callable[..., str]) -> None:
    # 15 voxels of 0.75 mm reach over 10.5 mm: a hair decides between 11 and 12 voxels of 1 mm.
    for shift in np.linspace(-6e-4, 6e-4, 7):
        row = {
            "image": write_scan("scan", noise((15, 15, 15)), np.diag([0.75, 0.75, 0.75, 1.0])),
            "label": write_scan(
                "mask", (noise((15, 15, 15)) > 0.5).astype(np.uint8), np.diag([0.75 + shift] * 3 + [1.0])
            ),
        }
        volume = Preprocessing(("image", "label"), spacing=(1.0, 1.0, 1.0)).volume(row)
        assert volume.label is not None
        assert volume.label.shape == volume.image.shape[1:]


def test_a_point_travels_with_the_scan_and_a_trailing_axis_of_1_is_no_fourth_dimension(
    write_scan: Callable[..., str],
) -> None:
    volume = Preprocessing().volume({"image": write_scan("scan", noise((8, 9, 10, 1))), "point": [1, 2.5, -3]})
    assert volume.image.shape == (1, 8, 9, 10)
    assert volume.point is not None
    assert volume.point.tolist() == [1.0, 2.5, -3.0]


def with_value(value: float) -> np.ndarray:
    voxels = noise()
    voxels[3, 4, 5] = value
    return voxels


def shifted_by(millimetres: float) -> np.ndarray:
    affine = np.eye(4)
    affine[0, 3] = millimetres
    return affine


def almost_constant(sign: float) -> np.ndarray:
    voxels = np.zeros((20, 20, 20), np.float32)
    voxels[:2, :2, :2] = sign * (1000 + noise((2, 2, 2)))
    return voxels


SINGULAR = np.array([[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
ONE = (noise() > 0.5).astype(np.float32)
# name -> the row's files by key (voxels, affine), and words of the message
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "constant": ({"image": np.full((6, 7, 8), 3.0, np.float32)}, "constant"),
    "NaN": ({"image": with_value(np.nan)}, "no numbers"),
    "infinite": ({"image": with_value(np.inf)}, "no numbers"),
    "one sequence NaN": ({"image": [noise(), with_value(np.nan)]}, "no numbers"),
    "2D": ({"image": noise((12, 13))}, "not 3D"),
    "one slice": ({"image": noise((12, 13, 1))}, "not 3D"),
    "4D": ({"image": noise((6, 7, 8, 3))}, "not 3D"),
    "5D": ({"image": noise((6, 7, 8, 1, 3))}, "not 3D"),
    "no geometry": ({"image": (noise(), SINGULAR)}, "geometry"),
    "all but constant": ({"image": almost_constant(1)}, "cannot be normalised"),
    "all but constant below": ({"image": almost_constant(-1)}, "cannot be normalised"),
    "other shapes": ({"image": [noise(), noise((11, 14, 8))]}, "different grids"),
    "other places": ({"image": [noise(), (noise(), shifted_by(0.5))]}, "different grids"),
    "label of other shape": ({"image": noise(), "label": ONE[:-1]}, "another grid"),
    "label elsewhere": ({"image": noise(), "label": (ONE, shifted_by(0.5))}, "another grid"),
    "label flipped": ({"image": noise(), "label": (ONE, np.diag([-1.0, 1, 1, 1]))}, "another grid"),
    "label with fractions": ({"image": noise(), "label": noise()}, "no classes"),
    "label NaN": ({"image": noise(), "label": with_value(np.nan).round()}, "no classes"),
    "label infinite": ({"image": noise(), "label": with_value(np.inf).round()}, "no classes"),
    "label too large": ({"image": noise(), "label": ONE * 40000}, "no classes"),
    "label negative": ({"image": noise(), "label": ONE * -1}, "no classes"),
    "label 4D": ({"image": noise(), "label": np.stack([ONE, ONE], axis=-1)}, "not 3D"),
}


def refused(preprocessing: Preprocessing, row: dict[str, Any], tmp_path: Path) -> ScanError:
    with pytest.raises(ScanError) as caught:
        preprocessing.volume(row)
    message = str(caught.value)
    for word in ("got:", "wanted:", "fix:"):
        assert word in message
    shown = "".join(traceback.format_exception(caught.value))  # as an uncaught error would be shown, with its causes
    for secret in (NAME, str(tmp_path)):
        assert secret not in message
        assert secret not in shown
    assert ".nii" not in message
    return caught.value


@pytest.mark.parametrize("spacing", [None, (1.5, 1.5, 1.5)])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_scan_is_refused_with_a_reason_that_names_no_file(
    name: str,
    spacing: tuple[float, ...] | None,
    write_scan: Callable[..., str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    files, words = BAD[name]

    def written(key: str, values: Any) -> Any:
        if isinstance(values, list):
            return [written(f"{key}{place}", part) for place, part in enumerate(values)]
        return write_scan(f"{NAME}_{key}", *(values if isinstance(values, tuple) else (values,)))

    row = {key: written(key, values) for key, values in files.items()}
    with caplog.at_level(logging.INFO):
        error = refused(Preprocessing(("image", "label"), spacing=spacing), row, tmp_path)
    assert words in error.problem
    assert NAME not in caplog.text


def truncated(path: Path) -> None:
    whole = path.with_name("whole.nii.gz")
    nibabel.save(nibabel.Nifti1Image(noise((30, 30, 30)), np.eye(4)), whole)
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])


@pytest.mark.parametrize(
    "write",
    [
        truncated,
        lambda path: path.write_text("this is no image"),
        lambda path: path.write_bytes(b""),
        lambda path: path.mkdir(),
        lambda path: None,
    ],
    ids=["truncated", "text", "empty", "folder", "missing"],
)
@pytest.mark.parametrize("key", ["image", "label"])
def test_a_file_that_is_no_complete_image_is_refused(
    write: Callable[[Path], Any], key: str, write_scan: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / f"{NAME}.nii.gz"
    write(path)
    row = {"image": write_scan("good", noise()), key: str(path)}
    assert "cannot be read" in refused(Preprocessing(("image", "label")), row, tmp_path).problem


@pytest.mark.parametrize("image", [None, [], [None, None]])
def test_a_row_without_any_sequence_is_refused(image: Any, tmp_path: Path) -> None:
    assert "no sequence" in refused(Preprocessing(), {"image": image}, tmp_path).problem
    assert "no sequence" in refused(Preprocessing(), {}, tmp_path).problem


def test_a_class_where_a_mask_is_wanted_is_refused(write_scan: Callable[..., str], tmp_path: Path) -> None:
    row = {"image": write_scan("scan", noise()), "label": 3}
    assert "no file" in refused(Preprocessing(("image", "label")), row, tmp_path).problem


@pytest.mark.parametrize("point", [[1, 2], [1, 2, float("nan")], ["x", 1, 2], 5, "123"])
def test_an_unusable_point_is_refused(point: Any, write_scan: Callable[..., str], tmp_path: Path) -> None:
    row = {"image": write_scan("scan", noise()), "point": point}
    assert "point" in refused(Preprocessing(), row, tmp_path).problem


def test_grids_that_differ_by_rounding_are_one_grid(write_scan: Callable[..., str]) -> None:
    paths = [write_scan(str(shift), noise(), shifted_by(shift)) for shift in (0.0, 5e-3)]
    assert Preprocessing().volume({"image": paths}).image.shape[0] == 2


def test_the_affine_tolerance_is_one_of_corners_not_of_entries(write_scan: Callable[..., str]) -> None:
    paths = [write_scan(f"{step}", noise((200, 3, 3)), np.diag([step, 1, 1, 1.0])) for step in (1.0, 1.001)]
    with pytest.raises(ScanError, match=r"0\.199 mm apart"):
        Preprocessing().volume({"image": paths})


@pytest.mark.parametrize(
    "settings",
    [
        {"orientation": "XYZ"},
        {"orientation": "RR"},
        {"orientation": "RLA"},
        {"orientation": 3},
        {"spacing": 1.0},
        {"spacing": (1.0, 1.0)},
        {"spacing": (1.0, 1.0, 0.0)},
        {"spacing": (1.0, 1.0, -1.0)},
        {"spacing": (1.0, 1.0, float("nan"))},
        {"spacing": (1.0, 1.0, float("inf"))},
        {"spacing": ("a", 1.0, 1.0)},
        {"spacing": "111"},
        {"intensity": 3},
        {"intensity": {"_target_": "Identity"}},
        {"reader": "NoSuchReader"},
        {"load": ("label",)},
        {"load": ("image", "mask")},
        {"load": "image"},
    ],
    ids=str,
)
def test_unusable_settings_fail_at_construction(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Preprocessing(**settings)
    assert "fix:" in str(caught.value)


def test_describe_holds_the_settings_as_plain_values() -> None:
    described = Preprocessing(orientation="LPS", spacing=(1, 2, 3)).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["orientation"] == "LPS"
    assert described["spacing"] == [1.0, 2.0, 3.0]
    assert {"name": "ScaleIntensityRangePercentiles", "lower": 0.5, "upper": 99.5, "clip": True}.items() <= described[
        "intensity"
    ].items()
    assert Preprocessing(orientation=None).describe() | {"intensity": None} == {
        "orientation": None,
        "spacing": None,
        "intensity": None,
    }


def test_describe_tells_apart_what_is_nested() -> None:
    def composed(top: float) -> dict[str, Any]:
        steps = [ScaleIntensityRange(-1000, top, 0, 1, clip=True), NormalizeIntensity(nonzero=True)]
        return Preprocessing(intensity=Compose(steps)).describe()

    assert json.loads(json.dumps(composed(400))) == composed(400)
    assert composed(400) != composed(300)
    assert [part["name"] for part in composed(400)["intensity"]["transforms"]] == [
        "ScaleIntensityRange",
        "NormalizeIntensity",
    ]


@pytest.mark.parametrize("name", AFFINE_NAMES)
def test_orientation_is_inverted_without_loss(name: str, affines: dict, write_scan: Callable[..., str]) -> None:
    mask = ONE.astype(np.uint8)
    row = {
        "image": write_scan("scan", ONE + noise() / 4, affines[name]),
        "label": write_scan("mask", mask, affines[name]),
    }
    preprocessing = Preprocessing(("image", "label"))
    done = preprocessing(row)
    done["pred"] = done["label"].clone()
    back = Invertd(keys="pred", transform=preprocessing, orig_keys="image", nearest_interp=True)(done)["pred"]
    np.testing.assert_array_equal(back[0].numpy(), mask)
    np.testing.assert_allclose(back.affine.numpy(), affines[name], atol=1e-5)


def test_resampling_is_inverted_to_the_files_own_grid(cohort: list[dict]) -> None:
    preprocessing = Preprocessing(("image", "label"), spacing=(0.7, 0.7, 0.7))
    invert = Invertd(keys="pred", transform=preprocessing, orig_keys="image", nearest_interp=True)
    for row in cohort[:6]:
        done = preprocessing(row)
        done["pred"] = done["label"].clone()
        back, wanted = invert(done)["pred"], nibabel.load(row["label"])
        assert back.shape[1:] == wanted.shape
        np.testing.assert_allclose(back.affine.numpy(), wanted.affine, atol=1e-4)
        mask = np.asarray(wanted.dataobj) > 0
        assert 2 * (back[0].numpy() * mask).sum() / (back.sum() + mask.sum()) > 0.9


def test_reading_leaves_the_row_as_it_was_and_repeats_itself(cohort: list[dict]) -> None:
    row = cohort[0]
    before = dict(row)
    preprocessing = Preprocessing(("image", "label"), spacing=(1.0, 1.0, 1.0))
    first, second = preprocessing.volume(row), preprocessing.volume(row)
    assert row == before
    assert torch.equal(first.image, second.image)
    assert torch.equal(first.affine, second.affine)


def test_loading_warns_of_nothing(write_scan: Callable[..., str], recwarn: pytest.WarningsRecorder) -> None:
    load = LoadScand(("image", "label"))
    recwarn.clear()
    load({"image": write_scan("scan", noise()), "label": write_scan("mask", ONE)})
    assert [str(warning.message) for warning in recwarn] == []
