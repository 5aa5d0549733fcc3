"""Two pictures of what the demo found: slices with both predictions, and a map of the embeddings."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from medclr import keys

# Colours of Okabe and Ito, which colour-blind eyes tell apart.
TRUTH, PRETRAINED, SCRATCH = "#F0E442", "#56B4E9", "#E69F00"
MARKERS = "osD^vP*X<>hp"
SHOWN_PATIENTS = 10


class Case(NamedTuple):
    """The files of one scan."""

    title: str
    image: Path
    truth: Path
    pretrained: Path
    scratch: Path


def draw_slices(path: Path, cases: Sequence[Case]) -> None:
    """One row a scan: the image, then the truth and both predictions as outlines, where most of the truth lies."""
    figure = Figure(figsize=(10, 2.6 * len(cases) + 0.5), layout="constrained")
    axes = figure.subplots(len(cases), 4, squeeze=False)
    for row, case in zip(axes, cases, strict=True):
        image, truth = _voxels(case.image), _voxels(case.truth)
        depth = int(np.argmax((truth > 0).sum(axis=(0, 1))))
        low, high = np.percentile(image, [0.5, 99.5])
        outlines: list[tuple[str, NDArray[Any] | None, str]] = [
            (case.title, None, ""),
            ("truth", truth, TRUTH),
            ("pretrained", _voxels(case.pretrained), PRETRAINED),
            ("from scratch", _voxels(case.scratch), SCRATCH),
        ]
        for place, (title, mask, colour) in zip(row, outlines, strict=True):
            place.imshow(image[:, :, depth].T, cmap="gray", vmin=low, vmax=high, origin="lower")
            if mask is not None:
                for level in np.unique(mask[mask > 0]):
                    part = (mask[:, :, depth] >= level).T
                    if part.any() and not part.all():
                        line = "solid" if level == 1 else "dashed"
                        # On a dark edge, so that it stands out from light and dark tissue alike, also in grey.
                        place.contour(part, [0.5], colors="black", linewidths=3.6, linestyles="solid")
                        place.contour(part, [0.5], colors=colour, linewidths=1.8, linestyles=line)
            overlap = "" if mask is None or title == "truth" else f", Dice {_dice(mask, truth):.2f}"
            place.set_title(title + overlap, fontsize=9)
            place.set_axis_off()
    _save(figure, path)


def draw_embeddings(path: Path, table: Path) -> None:
    """The embeddings of all scans on their first two principal components; a line joins the scans of a patient.

    The patients with most scans have a colour and a marker of their own, the others are grey.
    """
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name[:1] == "f" and name[1:].isdigit()]
    features = np.array([[float(row[name]) for name in names] for row in rows])
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    model = PCA(n_components=2).fit(features)
    points = model.transform(features)
    patients = np.array([row[keys.PATIENT_ID] for row in rows])
    unique, counts = np.unique(patients, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:SHOWN_PATIENTS]
    chosen = list(unique[order[counts[order] > 1]])
    figure = Figure(figsize=(7.5, 6), layout="constrained")
    axes = figure.subplots()
    for name in unique:
        part = points[patients == name]
        if name in chosen:
            number = chosen.index(name)
            style: dict[str, Any] = {"color": f"C{number}", "marker": MARKERS[number % len(MARKERS)], "zorder": 3}
            axes.plot(*part.T, linewidth=1.2, markersize=8, **style)
        else:
            axes.plot(*part.T, color="0.75", marker=".", linewidth=0.8, zorder=2)
    shares = model.explained_variance_ratio_
    axes.set_xlabel(f"first principal component ({shares[0]:.0%} of the variance)")
    axes.set_ylabel(f"second principal component ({shares[1]:.0%})")
    axes.set_title("Embeddings of all scans; a line joins the scans of one patient", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _voxels(path: Path) -> NDArray[Any]:
    return np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj)


def _dice(mask: NDArray[Any], truth: NDArray[Any]) -> float:
    return float(2 * ((mask > 0) & (truth > 0)).sum() / max(1, (mask > 0).sum() + (truth > 0).sum()))


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
