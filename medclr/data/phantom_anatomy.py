"""The inside of a synthetic patient: an organ with a rim and layers, among tissue that looks like it but has neither.

Lengths are in units of about a millimetre, for a field of view of ``REFERENCE_FOV``; the origin is the body's middle,
and the axes point to the right, to the front and to the top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medclr.data.phantom_shapes import Field, Lump, Matrix, Tube, Waves, any_rotation, damping, inside, rotation

REFERENCE_FOV = (56.0, 56.0, 48.0)
"""Units along each axis that the anatomy is made for."""

BACKGROUND, ORGAN, LESION = 0, 1, 2
"""Values of the masks."""

Look = Mapping[str, float]
"""How one scan shows the tissues: its value of each of ``TISSUES``."""

TISSUES = ("air", "fat", "soft", "bone", "marrow", "vessel", "organ", "rim", "lesion", "grain", "layer")
"""``grain`` is the standard deviation of the texture, ``layer`` the amplitude of the organ's layers."""

LAYER = 5.0
"""Distance between two layers of the organ; its neighbour's grain has the same wavelength, and no direction."""

_RIM = 2.0


@dataclass(frozen=True)
class Anatomy:
    """The shapes of one patient; :meth:`paint` shows them.

    Args:
        body, fat: the skin, and the inner surface of the fat under it.
        spine, great_vessel: landmarks; the organ lies to one side of them, its neighbour to the other.
        organ: the organ.
        stalk: a vessel from the great vessel into the organ.
        lesions: in the organ.
        neighbour: has the organ's intensity and grain of its layers' wavelength, but no rim and no layers.
        distractors: shapes with the tissue that each is made of.
        septa: thin sheets with the intensity of the rim.
        grain, fine: the texture of soft tissue, and that of the organ and of what resembles it.
        phase: of the layers, radians.
    """

    body: Lump
    fat: Lump
    spine: Tube
    great_vessel: Tube
    organ: Lump
    stalk: Tube
    lesions: tuple[Lump, ...]
    neighbour: Lump
    distractors: tuple[tuple[Lump | Tube, str], ...]
    septa: tuple[Lump, ...]
    grain: Waves
    fine: Waves
    phase: float

    @property
    def reach(self) -> float:
        """Radius of the organ."""
        return float(np.cbrt(self.organ.semi.prod()))

    def paint(self, points: Field, look: Look, blur: float) -> tuple[Field, NDArray[np.uint8]]:
        """What a scanner sees, without its noise.

        Args:
            points: where the voxels lie, (3, X, Y, Z).
            look: value of each tissue.
            blur: the scanner's resolution, the standard deviation of a Gaussian.

        Returns:
            values (X, Y, Z) float32 and the mask (X, Y, Z) uint8.
        """
        grain, fine = self.grain.at(points, blur), self.fine.at(points, blur)
        texture = np.float32(look["grain"]) * grain
        both = np.float32(look["grain"]) * (np.float32(0.8) * grain + np.float32(0.4) * fine)
        values = np.float32(look["soft"]) + both

        def lay(tissue: Field | float, share: Field) -> None:
            values[...] += (tissue - values) * share

        for septum in self.septa:
            lay(look["rim"], inside(np.abs(septum.distance(points)) - np.float32(0.7), blur))
        for shape, tissue in self.distractors:
            lay(np.float32(look[tissue]) + np.float32(0.5) * both, inside(shape.distance(points), blur))
        lay(
            np.float32(look["organ"]) + np.float32(0.5) * texture + np.float32(0.5 * look["layer"]) * fine,
            inside(self.neighbour.distance(points), blur),
        )
        lay(look["fat"] + np.float32(0.5) * texture, 1 - inside(self.fat.distance(points), blur))
        lay(look["vessel"], inside(self.great_vessel.distance(points), blur))

        depth = -self.organ.distance(points)
        number = 2 * np.pi / LAYER
        waves = np.cos(np.float32(number) * depth + np.float32(self.phase))
        amplitude = np.float32(look["layer"] * damping(number, blur))
        lay(np.float32(look["organ"]) + np.float32(0.3) * texture + amplitude * waves, inside(-depth, blur))
        lay(look["vessel"], inside(self.stalk.distance(points), blur))
        label = np.where(depth > 0, ORGAN, BACKGROUND).astype(np.uint8)
        for lesion in self.lesions:
            distance = np.maximum(lesion.distance(points), np.float32(_RIM) - depth)
            lay(np.float32(look["lesion"]) + np.float32(0.3) * texture, inside(distance, blur))
            label[distance < 0] = LESION
        lay(look["rim"], inside(np.abs(depth - np.float32(_RIM / 2)) - np.float32(_RIM / 2), blur))

        bone = self.spine.distance(points)
        discs = np.cos(self.spine.along(points) * np.float32(2 * np.pi / 13.0)) > 0.75
        marrow = np.where(discs, np.float32(look["soft"]), np.float32(look["marrow"]))
        lay(look["bone"], inside(bone, blur))
        lay(marrow, inside(bone + np.float32(1.3), blur))
        skin = self.body.distance(points)
        lay(look["air"], 1 - inside(skin, blur))
        label[(bone < 0) | (skin > 0)] = BACKGROUND
        return values, label


def draw_anatomy(random: np.random.Generator, severity: int) -> Anatomy:
    """Draw a patient.

    Args:
        random: draws everything.
        severity: 0 to 3; number and size of the lesions grow with it.
    """
    wide, deep, skin = random.uniform(25, 28), random.uniform(20.5, 23.5), random.uniform(1.8, 3.5)
    upright = rotation(0, 0, 0)
    spine = Tube(
        np.array([random.uniform(-2, 2), -0.66 * deep, random.uniform(-6, 6)]),
        upright,
        random.uniform(3.4, 4.4),
        swing=random.uniform(0.3, 1.5),
        wavelength=random.uniform(50, 80),
        phase=random.uniform(0, 2 * np.pi),
    )
    great_vessel = Tube(
        spine.centre + np.array([random.uniform(-2, 2), random.uniform(6.5, 8), 0]),
        upright,
        random.uniform(1.7, 2.4),
        swing=random.uniform(0.3, 1.2),
        wavelength=random.uniform(30, 60),
        phase=random.uniform(0, 2 * np.pi),
    )
    side = float(random.choice([-1.0, 1.0]))
    organ = _organ(random, side, wide - skin, deep - skin)
    neighbour = _organ(random, -side, wide - skin, deep - skin)
    outline = np.concatenate(
        [0.05 * random.standard_normal(1), np.zeros(2), 0.04 * random.standard_normal(1), np.zeros(3)]
    )
    body = Lump(np.zeros(3), upright, np.array([wide, deep, 1e3]), outline)
    inner = Lump(np.zeros(3), upright, np.array([wide - skin, deep - skin, 1e3]), outline)
    return Anatomy(
        body=body,
        fat=inner,
        spine=spine,
        great_vessel=great_vessel,
        organ=organ,
        stalk=_stalk(great_vessel.centre, organ),
        lesions=_lesions(random, organ, severity),
        neighbour=neighbour,
        distractors=(*_blobs(random, wide, deep), *_vessels(random, wide, deep)),
        septa=tuple(
            Lump(np.append(random.uniform(-40, 40, 2), 0.0), any_rotation(random), random.uniform(25, 45, 3))
            for _ in range(2)
        ),
        grain=Waves.draw(random, 10, 6.0, 25.0),
        fine=Waves.draw(random, 8, 0.9 * LAYER, 1.2 * LAYER),
        phase=random.uniform(0, 2 * np.pi),
    )


def _organ(random: np.random.Generator, side: float, wide: float, deep: float) -> Lump:
    radius = random.uniform(10.0, 12.0)
    semi = np.exp(random.uniform(-0.22, 0.22, 3))
    centre = np.array([side * random.uniform(8, 14), random.uniform(-4, 7), random.uniform(-7, 7)])
    # Deep enough under the skin that the body hardly cuts it.
    room = np.array([wide, deep]) - 0.95 * radius
    centre[:2] /= max(1.0, float(np.linalg.norm(centre[:2] / room)))
    wobble = 0.09 * random.standard_normal(7)
    return Lump(centre, any_rotation(random), radius * semi / np.cbrt(semi.prod()), wobble)


def _stalk(start: Matrix, organ: Lump) -> Tube:
    """From the great vessel, at the height of the organ, a third of the way into the organ."""
    start = np.array([start[0], start[1], organ.centre[2]])
    way = organ.centre - start
    length = float(np.linalg.norm(way))
    forward = way / length
    across = np.cross(forward, [0.0, 0.0, 1.0])
    across /= np.linalg.norm(across)
    turn = np.stack([across, np.cross(forward, across), forward])
    reach = (length - 0.6 * float(np.cbrt(organ.semi.prod()))) / 2
    return Tube(start + forward * reach, turn, 1.2, reach=max(reach, 1.0))


def _lesions(random: np.random.Generator, organ: Lump, severity: int) -> tuple[Lump, ...]:
    low, high = ((0, 0), (1, 2), (3, 4), (5, 7))[severity]
    lesions = []
    for _ in range(int(random.integers(low, high + 1))):
        direction = random.standard_normal(3)
        place = direction / np.linalg.norm(direction) * 0.62 * np.cbrt(random.uniform(0, 1))
        radius = float(np.cbrt(organ.semi.prod())) * random.uniform(0.17, 0.24) * (1 + 0.12 * severity)
        semi = radius * np.exp(random.uniform(-0.2, 0.2, 3))
        lesions.append(Lump(organ.centre + organ.turn.T @ (place * organ.semi), any_rotation(random), semi))
    return tuple(lesions)


def _blobs(random: np.random.Generator, wide: float, deep: float) -> list[tuple[Lump | Tube, str]]:
    blobs: list[tuple[Lump | Tube, str]] = []
    for tissue in ("organ", "organ", "organ", "rim", "lesion", "lesion", "vessel", "fat"):
        angle, share = random.uniform(0, 2 * np.pi), np.sqrt(random.uniform(0, 0.8))
        centre = np.array([wide * share * np.cos(angle), deep * share * np.sin(angle), random.uniform(-26, 26)])
        blobs.append((Lump(centre, any_rotation(random), random.uniform(2.5, 6.5, 3)), tissue))
    return blobs


def _vessels(random: np.random.Generator, wide: float, deep: float) -> list[tuple[Lump | Tube, str]]:
    vessels: list[tuple[Lump | Tube, str]] = []
    for tissue in ("vessel", "vessel", "rim", "rim"):
        centre = random.uniform(-0.6, 0.6, 3) * [wide, deep, 20]
        tube = Tube(
            centre,
            any_rotation(random),
            random.uniform(0.9, 1.6),
            swing=random.uniform(2, 5),
            wavelength=random.uniform(20, 40),
            phase=random.uniform(0, 2 * np.pi),
        )
        vessels.append((tube, tissue))
    return vessels
