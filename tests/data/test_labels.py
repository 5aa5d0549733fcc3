from __future__ import annotations

import numpy as np
import pytest

from medclr.data.labels import GRID_TOLERANCE_MM, LabelFolders, LabelTemplate, refuse_other_grid
from medclr.data.nifti import Probe
from medclr.errors import ConfigError, ScanError


@pytest.mark.parametrize(
    ("image", "labels"),
    [
        ("imagesTr/a.nii.gz", ["labelsTr/a.nii.gz"]),
        ("x/imagesTr/a.nii", ["x/labelsTr/a.nii.gz"]),
        ("imagesTs/a.nii.gz", ["labelsTs/a.nii.gz"]),
        ("images/P1/a.nii.gz", ["labels/P1/a.nii.gz"]),
        ("images/a.nii.gz", ["labels/a.nii", "labels/a.nii.gz"]),
        ("imagesTr/none.nii.gz", []),
        ("scans/a.nii.gz", []),
        ("images.nii.gz", []),
    ],
)
def test_labels_are_found_by_folder(image: str, labels: list[str]) -> None:
    files = [
        *("labelsTr/a.nii.gz", "x/labelsTr/a.nii.gz", "labelsTs/a.nii.gz", "labels/P1/a.nii.gz"),
        *("labels/a.nii", "labels/a.nii.gz", image),
    ]
    rule = LabelFolders(files)
    assert rule.candidates(image) == labels
    assert not rule.is_label(image)
    assert all(rule.is_label(file) for file in files[:-1])


@pytest.mark.parametrize(
    ("template", "image", "label"),
    [
        ("{folder}/labelsTr/{name}", "imagesTr/a.nii.gz", "labelsTr/a.nii.gz"),
        ("labelsTr/{name}", "imagesTr/a.nii.gz", "labelsTr/a.nii.gz"),
        ("{parent}/{stem}_seg.nii.gz", "x/y/a.nii", "x/y/a_seg.nii.gz"),
        ("{parent}/{stem}_seg.nii.gz", "a.nii", "a_seg.nii.gz"),
        ("{parent}/../masks/{stem}-m.nii", "x/y/a.nii", "x/masks/a-m.nii"),
        ("masks/{parent}/{name}", "P1/a.nii", "masks/P1/a.nii"),
        ("{parent}/gt*.nii", "P1/a.nii", "P1/gt_final.nii"),
        ("{parent}/{stem}*seg.nii", "P1/a[1].nii", "P1/a[1]_x_seg.nii"),
    ],
)
def test_labels_are_found_by_template(template: str, image: str, label: str) -> None:
    rule = LabelTemplate(template, [image, label])
    assert rule.candidates(image) == [label]
    assert rule.is_label(label)
    assert not rule.is_label(image)


def test_a_template_tells_labels_without_an_image_too() -> None:
    rule = LabelTemplate("{parent}/{stem}_seg.nii.gz", ["a.nii.gz", "a_seg.nii.gz", "x/b_seg.nii.gz"])
    assert rule.is_label("x/b_seg.nii.gz")


def test_several_candidates_are_all_returned() -> None:
    files = ["P/a.nii", "P/a_seg1.nii", "P/a_seg2.nii", "P/b_seg1.nii", "P2/a_seg1.nii"]
    assert LabelTemplate("{parent}/{stem}_seg*.nii", files).candidates("P/a.nii") == ["P/a_seg1.nii", "P/a_seg2.nii"]


@pytest.mark.parametrize(
    "template",
    [
        "nix/{name}",
        "{parent}/{name}",
        "labels/{patient}",
        "labels/x.nii",
        "{folder}/*/{name}",
        "/abs/{name}",
        "{name",
        "",
    ],
)
def test_bad_templates_are_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="labels cannot be found"):
        LabelTemplate(template, ["images/a.nii", "labels/a.nii"])


def probe(shape: tuple[int, int, int] = (10, 20, 30), shift: float = 0, angle: float = 0) -> Probe:
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine[0, 3] = shift
    return Probe(shape, affine, (1, 1, 1), "uint8", "")


def test_a_label_lies_on_the_grid_of_its_image() -> None:
    refuse_other_grid(probe(), probe(shift=0.9 * GRID_TOLERANCE_MM))
    with pytest.raises(ScanError, match="elsewhere"):
        refuse_other_grid(probe(), probe(shift=1.1 * GRID_TOLERANCE_MM))
    with pytest.raises(ScanError, match="elsewhere"):  # the first voxel agrees, the last does not
        refuse_other_grid(probe(), probe(angle=1e-3))
    with pytest.raises(ScanError, match="another shape"):
        refuse_other_grid(probe(), probe((10, 20, 31)))
