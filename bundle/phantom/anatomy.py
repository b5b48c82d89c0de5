"""A parametric human body: the tissue at any point, with random build, organs and pose from one seed.

Lengths are millimetres of an adult of 1.7 m who stands at the origin: x to the patient's right, y to the front, z from
the soles up (RAS).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HEIGHT = 1700.0
TISSUES = ("air", "fat", "muscle", "organ", "fluid", "lung", "cortex", "marrow", "brain")
# z, half-width, half-depth of the trunk, from the crotch to the shoulders
TRUNK = np.array(
    [(800, 150, 90), (860, 172, 105), (930, 172, 108), (1020, 145, 98), (1100, 142, 102), (1220, 158, 115),
     (1320, 168, 112), (1390, 165, 95), (1430, 110, 75), (1455, 60, 60)], dtype=float
)  # fmt: skip

Point = tuple[float, float, float]


class Canvas:
    """A (D, H, W) map of tissues that is painted shape by shape, each computed in its bounding box only.

    Args:
        axes: coordinates of the voxels along x, y and z, mm of the 1.7 m adult.
    """

    def __init__(self, axes: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        self.axes = axes
        self.labels = np.zeros([len(axis) for axis in axes], dtype=np.uint8)

    def _box(self, low: np.ndarray, high: np.ndarray) -> tuple[tuple[slice, ...], tuple[np.ndarray, ...]]:
        box = tuple(
            slice(int(np.searchsorted(axis, a)), int(np.searchsorted(axis, b)))
            for axis, a, b in zip(self.axes, low, high)
        )
        return box, np.meshgrid(*(axis[part] for axis, part in zip(self.axes, box)), indexing="ij", sparse=True)

    def _paint(self, box: tuple[slice, ...], mask: np.ndarray, tissue: str, within: tuple[str, ...]) -> None:
        view = self.labels[box]
        if within:
            mask = mask & np.isin(view, [TISSUES.index(name) for name in within])
        view[mask] = TISSUES.index(tissue)

    def ball(self, tissue: str, centre: Point, radii: Point, within: tuple[str, ...] = ()) -> None:
        """Paint an ellipsoid along the axes; ``within`` limits it to voxels of these tissues."""
        c, r = np.array(centre), np.array(radii)
        box, points = self._box(c - r, c + r)
        mask = sum(((p - m) / s) ** 2 for p, m, s in zip(points, c, r)) < 1
        self._paint(box, mask, tissue, within)

    def rod(
        self, tissue: str, start: Point, end: Point, radii: tuple[float, float], within: tuple[str, ...] = ()
    ) -> None:
        """Paint a rounded cone from ``start`` to ``end`` with a radius at each end."""
        a, b, most = np.array(start), np.array(end), max(radii)
        box, points = self._box(np.minimum(a, b) - most, np.maximum(a, b) + most)
        line = b - a
        along = sum((p - m) * d for p, m, d in zip(points, a, line)) / (line @ line)
        along = np.clip(along, 0, 1)
        distance = sum((p - (m + along * d)) ** 2 for p, m, d in zip(points, a, line))
        self._paint(box, distance < (radii[0] + along * (radii[1] - radii[0])) ** 2, tissue, within)

    def bone(self, start: Point, end: Point, radii: tuple[float, float], cortex: float) -> None:
        """Paint a long bone: cortex of that thickness around marrow."""
        self.rod("cortex", start, end, radii)
        self.rod("marrow", start, end, (radii[0] - cortex, radii[1] - cortex))

    def column(self, tissue: str, outline: np.ndarray, shrink: float, within: tuple[str, ...] = ()) -> None:
        """Paint a stack of ellipses, ``shrink`` mm smaller than rows of ``outline``: z, half-width and half-depth."""
        half = outline[:, 1:].max()
        box, (x, y, z) = self._box(np.array([-half, -half, outline[0, 0]]), np.array([half, half, outline[-1, 0]]))
        width, depth = (np.maximum(np.interp(z, outline[:, 0], outline[:, k]) - shrink, 1) for k in (1, 2))
        self._paint(box, (x / width) ** 2 + (y / depth) ** 2 < 1, tissue, within)


@dataclass(frozen=True)
class Build:
    """The build of one person, in mm and radians.

    Attributes:
        girth: factor on all widths of soft parts.
        fat: thickness of the fat under the skin.
        arms, legs: angle of each limb to the trunk, right and left.
        elbows: bend of each.
        jitter: shift (x, y, z) of each organ by name.
        size: factor on each organ's radii by name.
    """

    girth: float
    fat: float
    arms: tuple[float, float]
    legs: tuple[float, float]
    elbows: tuple[float, float]
    jitter: dict[str, np.ndarray]
    size: dict[str, float]

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Build:
        return cls(
            girth=rng.uniform(0.9, 1.12),
            fat=rng.uniform(8, 24),
            arms=tuple(rng.uniform(0.12, 0.3, 2)),
            legs=tuple(rng.uniform(0.02, 0.1, 2)),
            elbows=tuple(rng.uniform(-0.1, 0.25, 2)),
            jitter={name: rng.uniform(-6, 6, 3) for name, *_ in ORGANS},
            size={name: rng.uniform(0.88, 1.12) for name, *_ in ORGANS},
        )


# name, tissue, centre, radii, tissues that it may replace
SOFT = ("muscle", "fat")
ORGANS: tuple[tuple[str, str, Point, Point, tuple[str, ...]], ...] = (
    ("right lung", "lung", (75, 5, 1270), (58, 82, 125), SOFT),
    ("left lung", "lung", (-75, 5, 1270), (56, 80, 122), SOFT),
    ("heart", "organ", (-22, 30, 1235), (48, 45, 58), ("muscle", "fat", "lung")),
    ("liver", "organ", (58, 18, 1120), (80, 70, 62), ("muscle", "lung")),
    ("spleen", "organ", (-92, -32, 1125), (30, 36, 48), ("muscle", "lung")),
    ("stomach", "fluid", (-50, 32, 1098), (38, 36, 42), ("muscle",)),
    ("gastric bubble", "air", (-52, 50, 1108), (18, 12, 16), ("fluid",)),
    ("right kidney", "organ", (62, -42, 1050), (24, 22, 50), ("muscle",)),
    ("left kidney", "organ", (-62, -42, 1060), (24, 22, 50), ("muscle",)),
    ("bowel", "organ", (0, 28, 1000), (95, 48, 60), ("muscle",)),
    ("right bowel gas", "air", (60, 40, 1000), (12, 12, 26), ("organ",)),
    ("left bowel gas", "air", (-58, 38, 1005), (11, 12, 28), ("organ",)),
    ("bladder", "fluid", (0, 30, 880), (36, 32, 32), ("muscle",)),
)


def paint_body(axes: tuple[np.ndarray, np.ndarray, np.ndarray], build: Build) -> np.ndarray:
    """Return the tissue of every point of a grid as an index into :data:`TISSUES`, (D, H, W)."""
    canvas = Canvas(axes)
    for tissue, shrink in (("fat", 0.0), ("muscle", build.fat)):
        _soft_parts(canvas, build, tissue, shrink)
    for name, tissue, centre, radii, within in ORGANS:
        where = tuple(np.array(centre) + build.jitter[name])
        canvas.ball(tissue, where, tuple(np.array(radii) * build.size[name]), within)
    _head(canvas)
    _trunk_bones(canvas, build)
    for side, arm, elbow, leg in zip((-1, 1), build.arms, build.elbows, build.legs):
        _limb_bones(canvas, *_arm(side, arm, elbow, build.girth), (16, 13, 11), 4.5)
        _limb_bones(canvas, *_leg(side, leg), (24, 19, 14), 6)
    return canvas.labels


def _arm(side: int, angle: float, elbow: float, girth: float) -> tuple[Point, Point, Point]:
    """Return the positions of shoulder, elbow and wrist."""
    direction = np.array([side * np.sin(angle), 0, -np.cos(angle)])
    shoulder = np.array([side * 178 * girth, 0, 1385])
    middle = shoulder + 300 * direction
    wrist = middle + 260 * np.array([side * np.sin(angle), np.sin(elbow), -np.cos(angle) * np.cos(elbow)])
    return tuple(shoulder), tuple(middle), tuple(wrist)


def _leg(side: int, angle: float) -> tuple[Point, Point, Point]:
    """Return the positions of hip, knee and ankle."""
    hip = np.array([side * 88, 0, 870])
    direction = np.array([side * np.sin(angle), 0, -np.cos(angle)])
    return tuple(hip), tuple(hip + 400 * direction), tuple(hip + 790 * direction)


def _soft_parts(canvas: Canvas, build: Build, tissue: str, shrink: float) -> None:
    """Paint trunk, head and limbs, ``shrink`` mm inside the skin (a third of it where there is little fat)."""
    outline = TRUNK * [1, build.girth, build.girth]
    canvas.column(tissue, outline, shrink)
    thin = shrink / 3
    canvas.rod(tissue, (0, -10, 1420), (0, -5, 1520), (56 - thin, 54 - thin))
    canvas.ball(tissue, (0, 8, 1595), (78 - thin, 96 - thin, 104 - thin))
    for side, arm, elbow, leg in zip((-1, 1), build.arms, build.elbows, build.legs):
        shoulder, middle, wrist = _arm(side, arm, elbow, build.girth)
        canvas.rod(tissue, (side * 60, 0, 1395), shoulder, (60 - shrink, 55 * build.girth - shrink))
        canvas.rod(tissue, shoulder, middle, (52 * build.girth - shrink, 40 * build.girth - thin))
        canvas.rod(tissue, middle, wrist, (40 * build.girth - thin, 26 - thin))
        hand = np.array(wrist) + (np.array(wrist) - middle) * 0.35
        canvas.rod(tissue, wrist, tuple(hand), (28 - thin, 30 - thin))
        hip, knee, ankle = _leg(side, leg)
        canvas.rod(tissue, hip, knee, (86 * build.girth - shrink, 56 * build.girth - thin))
        canvas.rod(tissue, knee, ankle, (56 * build.girth - thin, 38 - thin))
        canvas.rod(tissue, (ankle[0], -15, 42), (ankle[0] + side * 15, 150, 32), (40 - thin, 28 - thin))


def _head(canvas: Canvas) -> None:
    canvas.ball("cortex", (0, -2, 1605), (70, 84, 86))
    canvas.ball("marrow", (0, -2, 1605), (66, 80, 82))
    canvas.ball("cortex", (0, -2, 1605), (64, 78, 80))
    canvas.ball("fluid", (0, -2, 1605), (61, 75, 77))
    canvas.ball("brain", (0, -2, 1605), (58, 72, 74))
    for side in (-1, 1):
        canvas.ball("fluid", (side * 12, -2, 1612), (6, 28, 12))
    canvas.ball("air", (0, 70, 1560), (14, 18, 26))
    canvas.rod("cortex", (-42, 20, 1535), (0, 54, 1524), (8, 8))
    canvas.rod("cortex", (42, 20, 1535), (0, 54, 1524), (8, 8))
    canvas.rod("air", (0, 22, 1520), (0, 10, 1340), (8, 8))


def _trunk_bones(canvas: Canvas, build: Build) -> None:
    """Paint the spine with discs and cord, ribs, breastbone, collar bones and pelvis."""
    depth = -58 * build.girth
    for z in range(900, 1500, 32):
        radius = float(np.interp(z, (900, 1500), (26, 15)))
        back = float(np.interp(z, (900, 1080, 1300, 1500), (depth + 6, depth + 14, depth - 6, -22)))
        canvas.ball("cortex", (0, back, z), (radius, radius * 0.85, 14))
        canvas.ball("marrow", (0, back, z), (radius - 4, radius * 0.85 - 4, 11))
        canvas.rod("cortex", (0, back - 30, z - 6), (0, back - 44, z - 14), (6, 5))
        canvas.rod("fluid", (0, back - 24, z - 16), (0, back - 24, z + 16), (7, 7))
    _ribs(canvas, build)
    front = np.interp(1280, TRUNK[:, 0], TRUNK[:, 2]) * build.girth - build.fat - 8
    canvas.bone((0, front, 1210), (0, front - 14, 1370), (11, 14), 3.5)
    for side in (-1, 1):
        canvas.bone((side * 18, front - 18, 1385), (side * 165 * build.girth, -5, 1405), (8, 8), 3)
        canvas.bone((side * 60, -52, 940), (side * 105, 20, 965), (26, 16), 4)
        canvas.bone((side * 60, -52, 940), (side * 92, 0, 872), (24, 38), 5)
        canvas.bone((side * 92, 10, 866), (side * 14, 62, 838), (16, 13), 4)
        canvas.bone((side * 86, -20, 850), (side * 50, -28, 800), (18, 16), 4)
    canvas.bone((0, -60, 950), (0, -66, 860), (36, 16), 4)


def _ribs(canvas: Canvas, build: Build) -> None:
    """Paint twelve pairs of ribs that slant down to the front, in the chest wall."""
    half = TRUNK[:, 1:].max() * build.girth
    box, (x, y, z) = canvas._box(np.array([-half, -half, 1080]), np.array([half, half, 1400]))
    width, depth = (np.interp(z, TRUNK[:, 0], TRUNK[:, k]) * build.girth - build.fat for k in (1, 2))
    outer, inner = ((x / (width - s)) ** 2 + (y / (depth - s)) ** 2 for s in (5, 15))
    phase = (z + 0.45 * y) % 25
    between = (z + 0.45 * y > 1095) & (z + 0.45 * y < 1385)
    wall = (outer < 1) & (inner > 1) & between
    front_gap = (y > 0) & (np.abs(x) < np.interp(z, (1080, 1200, 1380), (110, 26, 22)))
    canvas._paint(box, wall & (phase < 11) & ~front_gap, "cortex", ())
    around, within = ((x / (width - s)) ** 2 + (y / (depth - s)) ** 2 for s in (8, 12))
    middle = (around < 1) & (within > 1) & (phase > 3) & (phase < 8)
    canvas._paint(box, wall & middle & ~front_gap, "marrow", ("cortex",))


def _limb_bones(
    canvas: Canvas, top: Point, middle: Point, end: Point, radii: tuple[float, float, float], cortex: float
) -> None:
    """Paint one bone from ``top`` to ``middle`` and two from there to ``end``, with thicker ends."""
    canvas.bone(top, middle, radii[:2], cortex)
    canvas.ball("marrow", top, (radii[0] * 1.25,) * 3, ("muscle", "cortex"))
    canvas.ball("marrow", middle, (radii[1] * 1.3,) * 3, ("muscle", "cortex", "fat"))
    side = np.sign(middle[0]) * radii[1] * 0.9
    for shift, radius in ((0.0, radii[1] * 0.8), (side, radii[2] * 0.6)):
        start, stop = ((point[0] + shift, *point[1:]) for point in (middle, end))
        canvas.bone(start, stop, (radius, radii[2] * radius / radii[1]), cortex * 0.6)
