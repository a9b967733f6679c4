"""Draws the sample catalogue: garments and accessories with the columns of DBQ/Burberry, and no download.

A product is a kind, a colour, a pattern, a size and a background. Its title, category and price follow from what the
picture shows, so a model that looks can learn them and a model that does not look cannot:

    >>> product = Product(kind="coat", colour="red", pattern="striped", size="large", background="grey")
    >>> product.title, product.category3_code, product.full_price
    ('Large Striped Red Coat', 'COATS', 2150.0)

Some pairs of kind and colour (two colours of every kind) are held out: they never occur in the train split, and half
of the test split is made of them.
"""

import argparse
import io
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFilter

Point = tuple[float, float]
Colour = tuple[int, int, int]
Part = tuple[str, list[Point]]  # what it is made of, its outline in a box from -1 to 1 (y points down)

# Kind -> category code and price in hundreds, small / medium / large.
KINDS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "coat": ("COATS", (14, 18, 21)),
    "dress": ("DRESSES", (9, 12, 15)),
    "trousers": ("TROUSERS", (6, 8, 10)),
    "scarf": ("SCARVES", (4, 6, 8)),
    "tie": ("TIES", (1, 2, 3)),
    "hat": ("HATS", (2, 3, 4)),
    "bag": ("BAGS", (13, 16, 24)),
    "shoe": ("SHOES", (5, 6, 7)),
    "belt": ("BELTS", (2, 4, 5)),
    "umbrella": ("UMBRELLAS", (3, 5, 7)),
}
COLOURS: dict[str, Colour] = {
    "red": (196, 32, 40),
    "yellow": (242, 200, 32),
    "green": (40, 134, 66),
    "blue": (36, 82, 184),
    "purple": (120, 52, 156),
    "pink": (244, 138, 178),
    "brown": (112, 68, 36),
    "beige": (216, 188, 144),
    "black": (36, 36, 40),
    "white": (248, 248, 246),
}
# Pattern -> what the price adds to its hundreds.
PATTERNS: dict[str, int] = {"plain": 20, "striped": 50, "checked": 90, "dotted": 70}
# Size -> half the height of the product, as a share of half the picture.
SIZES: dict[str, float] = {"small": 0.52, "medium": 0.68, "large": 0.90}
BACKGROUNDS: dict[str, Colour] = {
    "grey": (176, 178, 182),
    "cream": (246, 236, 208),
    "mint": (188, 226, 204),
    "sky": (178, 212, 240),
    "rose": (240, 206, 206),
}
PICTURE_SIZE = 192
_OVERSAMPLE = 2  # drawn twice as large, then shrunk: Pillow's polygons have no antialiasing
_SOLE: Colour = (70, 56, 48)
_GOLD: Colour = (204, 164, 72)


@dataclass(frozen=True)
class Product:
    """One product of the catalogue: everything that its picture shows, and what follows from that."""

    kind: str
    colour: str
    pattern: str
    size: str
    background: str

    @property
    def title(self) -> str:
        """`"Large Striped Red Coat"`; a medium size and a plain pattern go without saying: `"Red Coat"`."""
        words = ["" if self.size == "medium" else self.size, "" if self.pattern == "plain" else self.pattern]
        return " ".join(word.capitalize() for word in [*words, self.colour, self.kind] if word)

    @property
    def category3_code(self) -> str:
        """The category, in upper case as in the original."""
        return KINDS[self.kind][0]

    @property
    def full_price(self) -> float:
        """The hundreds follow from kind and size, the tens from the pattern."""
        return float(100 * KINDS[self.kind][1][list(SIZES).index(self.size)] + PATTERNS[self.pattern])

    @property
    def held_out(self) -> bool:
        """Whether this pair of kind and colour is kept away from training."""
        kind, colour = list(KINDS).index(self.kind), list(COLOURS).index(self.colour)
        return (3 * kind - colour) % len(COLOURS) in (0, 5)


def draw_product(rng: random.Random, *, held_out: bool | None = None) -> Product:
    """Draws a random product; its pair of kind and colour is, is not, or may be one of the held-out pairs."""
    while True:
        product = Product(
            kind=rng.choice(list(KINDS)),
            colour=rng.choice(list(COLOURS)),
            pattern=rng.choice(list(PATTERNS)),
            size=rng.choice(list(SIZES)),
            background=rng.choice(list(BACKGROUNDS)),
        )
        if held_out in (None, product.held_out):
            return product


def draw_picture(product: Product, rng: random.Random) -> PILImage.Image:
    """
    Draws the picture of a product; place, scale, tilt, proportions, shades and noise vary with `rng`.

    Args:
        product (`Product`): What to draw.
        rng (`random.Random`): Source of every variation; the same state gives the same pixels.

    Returns:
        `PIL.Image.Image`: RGB picture of `PICTURE_SIZE` × `PICTURE_SIZE` pixels.
    """
    side = PICTURE_SIZE * _OVERSAMPLE
    fabric_colour = _vary(COLOURS[product.colour], rng, 9)
    trim = _shade(fabric_colour, 0.62)
    outline = _shade(fabric_colour, 0.45)
    fabric = _fabric(product.pattern, fabric_colour, side, rng)
    place = _placement(SIZES[product.size], side, rng)
    parts = [(material, [place(point) for point in points]) for material, points in _SHAPES[product.kind](rng)]

    picture = _backdrop(_vary(BACKGROUNDS[product.background], rng, 7), side)
    _cast_shadow(picture, parts, side)
    canvas = ImageDraw.Draw(picture)
    fills = {"trim": trim, "sole": _SOLE, "gold": _GOLD}
    for material, points in parts:
        if material == "fabric":
            mask = PILImage.new("1", (side, side))
            ImageDraw.Draw(mask).polygon(points, fill=1)
            picture.paste(fabric, mask=mask)
            canvas.line([*points, points[0]], fill=outline, width=3)
        elif material in fills:
            canvas.polygon(points, fill=fills[material], outline=outline)
        else:
            widths = {"seam": 2, "cord": 7, "strap": 13}
            canvas.line(points, fill=outline if material == "seam" else trim, width=widths[material], joint="curve")
    picture = picture.reduce(_OVERSAMPLE)
    noise = np.random.default_rng(rng.getrandbits(64)).integers(-6, 7, (PICTURE_SIZE, PICTURE_SIZE, 3), dtype=np.int16)
    return PILImage.fromarray((np.asarray(picture, dtype=np.int16) + noise).clip(0, 255).astype(np.uint8))


def catalogue_row(product: Product, product_code: str, rng: random.Random) -> dict[str, object]:
    """Returns the row of a product: the columns of the catalogue, with the picture as JPEG bytes."""
    buffer = io.BytesIO()
    draw_picture(product, rng).save(buffer, format="JPEG", quality=90)
    return {
        "product_code": product_code,
        "title": product.title,
        "category3_code": product.category3_code,
        "full_price": product.full_price,
        "image": {"bytes": buffer.getvalue(), "path": f"{product_code}.jpg"},
    }


def write_catalogue(folder: str | Path, *, rows: int = 2400, test_rows: int = 192, seed: int = 0) -> Path:
    """
    Writes `train.parquet` and `test.parquet`, which `datasets.load_dataset(folder)` reads as two splits.

    The same arguments give the same bytes. Every second test row shows a held-out pair of kind and colour.

    Args:
        folder (`str` or `Path`): Where to write; made if it is not there.
        rows (`int`): Number of train rows.
        test_rows (`int`): Number of test rows.
        seed (`int`): Another seed gives other products and other pictures.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If a split would be empty.
    """
    from datasets import Dataset, Features, Image, Value  # `demo --help` need not wait for it

    if rows < 1 or test_rows < 1:
        raise ValueError(f"the sample catalogue needs at least one row per split, got {rows=} and {test_rows=}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    columns = {name: Value("string") for name in ("product_code", "title", "category3_code")}
    features = Features({**columns, "full_price": Value("float64"), "image": Image()})
    for split, first, count in (("train", 0, rows), ("test", rows, test_rows)):
        records = []
        for index in range(first, first + count):
            rng = random.Random(f"catalogue {seed} {index}")
            product = draw_product(rng, held_out=split == "test" and index % 2 == 0)
            # 7919 is prime: the codes look random, and no two of the first ten million are the same.
            records.append(catalogue_row(product, f"8{index * 7919 % 10**7:07d}", rng))
        Dataset.from_list(records, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def _vary(colour: Colour, rng: random.Random, spread: int) -> Colour:
    red, green, blue = (min(255, max(0, value + rng.randint(-spread, spread))) for value in colour)
    return red, green, blue


def _shade(colour: Colour, factor: float) -> Colour:
    """Darkens a colour (factor below 1) or lightens it towards white (above 1)."""
    if factor <= 1:
        red, green, blue = (int(value * factor) for value in colour)
    else:
        red, green, blue = (int(255 - (255 - value) * (2 - factor)) for value in colour)
    return red, green, blue


def _backdrop(colour: Colour, side: int) -> PILImage.Image:
    """A studio wall that gets darker towards the floor."""
    darker = PILImage.new("RGB", (side, side), _shade(colour, 0.82))
    return PILImage.composite(darker, PILImage.new("RGB", (side, side), colour), _ramp(side))


def _ramp(side: int) -> PILImage.Image:
    return PILImage.linear_gradient("L").resize((side, side))


def _cast_shadow(picture: PILImage.Image, parts: list[Part], side: int) -> None:
    """Darkens the wall behind the product, a little below and to the right of it."""
    small = side // 4  # a blur costs as much as everything else at full size, and nothing here
    mask = PILImage.new("L", (small, small))
    for material, points in parts:
        if material not in ("seam", "cord", "strap"):
            ImageDraw.Draw(mask).polygon([(x / 4 + 2, y / 4 + 3) for x, y in points], fill=90)
    mask = mask.filter(ImageFilter.GaussianBlur(2.5)).resize((side, side))
    picture.paste(PILImage.new("RGB", (side, side), (20, 20, 28)), mask=mask)


def _placement(scale: float, side: int, rng: random.Random) -> Callable[[Point], Point]:
    """Returns the map from a shape's box to pixels: tilt, stretch, scale, place."""
    scale *= rng.uniform(0.95, 1.05) * side / 2
    stretch = rng.uniform(0.92, 1.08)
    tilt = math.radians(rng.uniform(-7, 7))
    slack = max(0.0, side / 2 - scale) * 0.4
    left, top = side / 2 + rng.uniform(-slack, slack), side / 2 + rng.uniform(-slack, slack)

    def place(point: Point) -> Point:
        x, y = point[0] * stretch * scale, point[1] * scale
        return left + x * math.cos(tilt) - y * math.sin(tilt), top + x * math.sin(tilt) + y * math.cos(tilt)

    return place


def _fabric(pattern: str, colour: Colour, side: int, rng: random.Random) -> PILImage.Image:
    """A square of cloth; the pattern is light on dark colours and dark on light ones."""
    cloth = PILImage.new("RGB", (side, side), colour)
    canvas = ImageDraw.Draw(cloth)
    light = sum(colour) > 480
    accent = _shade(colour, 0.5) if light else _shade(colour, 1.75)
    pitch = rng.uniform(9, 12) * _OVERSAMPLE
    offset = rng.uniform(0, pitch)
    steps = [offset + pitch * step for step in range(-1, int(side / pitch) + 1)]
    if pattern == "striped":
        slope = rng.choice([0.0, 0.0, 1.0, -1.0]) * side
        upright = rng.random() < 0.5
        for at in [step + extra for step in steps for extra in ((0,) if not slope else (-side, 0, side))]:
            ends = [(at, 0.0), (at + slope, float(side))]
            canvas.line(ends if upright else [(y, x) for x, y in ends], fill=accent, width=int(pitch * 0.42))
    elif pattern == "checked":
        band = _shade(colour, 0.74) if light else _shade(colour, 1.4)
        width = pitch * 0.5
        for at in steps:
            canvas.line([(at, 0), (at, side)], fill=band, width=int(width))
            canvas.line([(0, at), (side, at)], fill=band, width=int(width))
        for x in steps:
            for y in steps:
                canvas.rectangle([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=accent)
    elif pattern == "dotted":
        radius = pitch * 0.24
        for row, y in enumerate(steps):
            for x in steps:
                middle = x + pitch / 2 * (row % 2)
                canvas.ellipse([middle - radius, y - radius, middle + radius, y + radius], fill=accent)
    return cloth


def _mirrored(half: list[Point]) -> list[Point]:
    """Completes an outline whose right half is given from top to bottom."""
    return half + [(-x, y) for x, y in reversed(half)]


def _rounded(points: list[Point], *, times: int = 2) -> list[Point]:
    """Cuts the corners of a closed outline (Chaikin), which makes cloth and leather of polygons."""
    for _ in range(times):
        cut: list[Point] = []
        for start, end in zip(points, points[1:] + points[:1], strict=True):
            share = min(0.25, 0.08 / max(math.dist(start, end), 0.01))  # a long edge keeps its corners crisp
            for at in (share, 1 - share):
                cut.append((start[0] * (1 - at) + end[0] * at, start[1] * (1 - at) + end[1] * at))
        points = cut
    return points


def _arc(x: float, y: float, width: float, height: float, start: float, end: float) -> list[Point]:
    """Points on an ellipse, angles in degrees, clockwise from the right as y points down."""
    angles = [math.radians(start + (end - start) * step / 14) for step in range(15)]
    return [(x + width * math.cos(angle), y + height * math.sin(angle)) for angle in angles]


def _box(left: float, top: float, right: float, bottom: float) -> list[Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _circle(x: float, y: float, radius: float) -> list[Point]:
    return _arc(x, y, radius, radius, 0, 360)


def _coat(rng: random.Random) -> list[Part]:
    hem, waist = rng.uniform(0.56, 0.68), rng.uniform(0.36, 0.42)
    sleeve = [(0.36, -0.82), (0.52, -0.74), (0.80, 0.26), (0.62, 0.32), (0.40, -0.2)]
    body = _mirrored([(0.14, -0.94), (0.42, -0.84), (waist, -0.1), (hem, 0.96)])
    parts: list[Part] = [("fabric", _rounded(sleeve)), ("fabric", _rounded([(-x, y) for x, y in sleeve]))]
    parts.append(("fabric", _rounded(body, times=1)))
    for sign in (1, -1):
        parts.append(("trim", [(sign * 0.02, -0.42), (sign * 0.16, -0.96), (sign * 0.32, -0.82), (sign * 0.24, -0.66)]))
        parts.append(("trim", [(sign * x, y) for x, y in ((0.2, 0.26), (0.4, 0.2), (0.41, 0.27), (0.21, 0.33))]))
        parts.extend(("gold", _circle(sign * 0.11, y, 0.035)) for y in (-0.3, -0.08, 0.14))
    parts.append(("seam", [(0, -0.42), (0, 0.96)]))
    parts.append(("trim", [(-waist - 0.01, -0.01), (waist + 0.01, -0.01), (waist + 0.02, 0.06), (-waist - 0.02, 0.06)]))
    return parts


def _dress(rng: random.Random) -> list[Part]:
    waist, hem = rng.uniform(0.2, 0.25), rng.uniform(0.66, 0.82)
    half = [(0.2, -0.96), (0.3, -0.96), (0.36, -0.56), (waist, -0.14), (hem, 0.92), (hem * 0.5, 0.98)]
    outline = _mirrored(half)
    outline = [*outline, (-0.2, -0.96), (-0.12, -0.68), (0.12, -0.68)]  # the neckline
    parts: list[Part] = [("fabric", _rounded(outline, times=1))]
    parts.append(("trim", [(-waist, -0.17), (waist, -0.17), (waist + 0.02, -0.07), (-waist - 0.02, -0.07)]))
    parts.extend(("seam", [(x * 0.3, -0.05), (x * hem, 0.9)]) for x in (-0.5, -0.15, 0.2, 0.55))
    return parts


def _trousers(rng: random.Random) -> list[Part]:
    return _legs(waist=0.42, inner=rng.uniform(0.1, 0.16), outer=rng.uniform(0.46, 0.56), top=-0.95, hem=0.95)


def _legs(*, waist: float, inner: float, outer: float, top: float, hem: float) -> list[Part]:
    crotch = top + 0.6
    body = _mirrored([(waist, top), (waist + 0.1, crotch - 0.1), (outer, hem), (inner, hem), (0.02, crotch)])
    return [
        ("fabric", _rounded(body, times=1)),
        ("trim", [(-waist, top - 0.02), (waist, top - 0.02), (waist + 0.02, top + 0.12), (-waist - 0.02, top + 0.12)]),
        ("seam", [(0, top + 0.12), (0, crotch)]),
        ("seam", [(waist * 0.5, top + 0.12), (waist + 0.06, top + 0.34)]),
        ("seam", [(-waist * 0.5, top + 0.12), (-waist - 0.06, top + 0.34)]),
        ("gold", _circle(0, top + 0.05, 0.035)),
    ]


def _scarf(rng: random.Random) -> list[Part]:
    left, right = rng.uniform(0.55, 0.8), rng.uniform(0.7, 0.82)
    parts: list[Part] = []
    for sign, end in ((-1, left), (1, right)):
        tail = [(sign * x, y) for x, y in ((0.02, -0.45), (0.34, -0.55), (0.52, end), (0.14, end + 0.02))]
        parts.extend(
            ("seam", [(sign * (0.17 + 0.066 * step), end), (sign * (0.18 + 0.07 * step), end + 0.15)])
            for step in range(6)
        )
        parts.append(("fabric", tail))
    collar = _arc(0, -0.5, 0.58, 0.42, 0, 360)
    parts.append(("fabric", collar))
    parts.append(("trim", _arc(0, -0.62, 0.32, 0.16, 0, 360)))
    parts.append(("seam", _arc(0, -0.52, 0.46, 0.3, 20, 160)))
    return parts


def _tie(rng: random.Random) -> list[Part]:
    width = rng.uniform(0.28, 0.34)
    blade = _mirrored([(0.1, -0.68), (width, 0.62), (0.0, 0.97)])
    knot = _mirrored([(0.2, -0.97), (0.11, -0.66)])
    return [("fabric", blade), ("fabric", _rounded(knot, times=1)), ("seam", [(-0.1, -0.69), (0.1, -0.69)])]


def _hat(rng: random.Random) -> list[Part]:
    crown, height = rng.uniform(0.46, 0.54), rng.uniform(-0.66, -0.54)
    outline = [(-crown, 0.16), (-crown + 0.06, height), (-0.14, height - 0.06), (0, height + 0.04)]
    outline += [(0.14, height - 0.06), (crown - 0.06, height), (crown, 0.16), (0, 0.3)]
    band = [(-crown, 0.0), (0, 0.1), (crown, 0.0), (crown + 0.01, 0.2), (0, 0.3), (-crown - 0.01, 0.2)]
    return [
        ("fabric", _arc(0, 0.24, 0.96, 0.26, 0, 360)),
        ("fabric", _rounded(outline)),
        ("trim", band),
    ]


def _bag(rng: random.Random) -> list[Part]:
    top, flap = rng.uniform(0.62, 0.72), rng.uniform(0.22, 0.34)
    body = [(-top, -0.26), (top, -0.26), (0.86, 0.78), (-0.86, 0.78)]
    parts: list[Part] = [("strap", _arc(0, -0.26, 0.42, 0.62, 180, 360))]
    parts.append(("fabric", _rounded(body, times=1)))
    parts.append(("trim", _rounded([(-top, -0.28), (top, -0.28), (top * 0.9, 0.0), (0, flap), (-top * 0.9, 0.0)])))
    parts.append(("gold", _circle(0, flap - 0.02, 0.09)))
    parts.append(("seam", [(-0.8, 0.66), (0.8, 0.66)]))
    return parts


def _facing(parts: list[Part], rng: random.Random) -> list[Part]:
    """Lets the product look to the left or to the right."""
    sign = rng.choice((-1, 1))
    return [(material, [(sign * x, y) for x, y in points]) for material, points in parts]


def _shoe(rng: random.Random) -> list[Part]:
    toe = rng.uniform(0.9, 0.96)
    upper = [(-0.82, -0.3), (-0.3, -0.24), (-0.12, -0.36), (0.12, -0.02), (0.7, 0.12), (toe, 0.4), (-0.86, 0.4)]
    parts: list[Part] = [("fabric", _rounded(upper))]
    parts.append(("sole", _rounded([(-0.9, 0.36), (toe + 0.02, 0.36), (toe, 0.5), (-0.9, 0.5)], times=1)))
    parts.append(("sole", [(-0.88, 0.48), (-0.42, 0.48), (-0.44, 0.6), (-0.88, 0.6)]))
    parts.extend(("cord", [(-0.2 + step, -0.2 + step), (0.02 + step, -0.24 + step)]) for step in (0.0, 0.09, 0.18))
    parts.append(("trim", _rounded([(-0.82, -0.1), (-0.62, 0.0), (-0.62, 0.36), (-0.85, 0.36)], times=1)))
    return _facing(parts, rng)


def _belt(rng: random.Random) -> list[Part]:
    height, sag = rng.uniform(0.19, 0.24), rng.uniform(-0.08, 0.08)
    xs = [-0.96 + 0.16 * step for step in range(13)]
    top = [(x, sag * math.cos(x * 1.6) - height) for x in xs]
    bottom = [(x, sag * math.cos(x * 1.6) + height) for x in reversed(xs)]
    parts: list[Part] = [("fabric", [*top, (1.0, 0), *bottom])]
    parts.extend(("trim", _circle(x, sag * math.cos(x * 1.6), 0.035)) for x in (0.4, 0.56, 0.72, 0.88))
    middle = sag * math.cos(0.7)
    parts.append(("gold", _rounded(_box(-0.7, middle - height - 0.12, -0.18, middle + height + 0.12))))
    parts.append(("fabric", _box(-0.58, middle - height, -0.3, middle + height)))
    parts.append(("gold", _box(-0.46, middle - 0.04, -0.14, middle + 0.04)))
    return _facing(parts, rng)


def _umbrella(rng: random.Random) -> list[Part]:
    height = rng.uniform(0.84, 0.94)
    dome = _arc(0, 0.04, 0.96, height, 180, 360)
    scallops = [point for x in (0.72, 0.24, -0.24, -0.72) for point in _arc(x, 0.04, 0.24, 0.12, 0, -180)]
    hook = [(0.0, -0.1), (0.0, 0.76), *_arc(0.13, 0.76, 0.13, 0.18, 180, 0)]
    return [
        ("cord", [(0, 0.04 - height - 0.1), (0, 0.04 - height)]),
        ("cord", hook),
        ("fabric", dome + scallops),
        *(("seam", [(0, 0.04 - height), (x, 0.04)]) for x in (-0.48, 0, 0.48)),
    ]


_SHAPES: dict[str, Callable[[random.Random], list[Part]]] = {
    "coat": _coat,
    "dress": _dress,
    "trousers": _trousers,
    "scarf": _scarf,
    "tie": _tie,
    "hat": _hat,
    "bag": _bag,
    "shoe": _shoe,
    "belt": _belt,
    "umbrella": _umbrella,
}


def main() -> None:
    """Writes a catalogue from the command line."""
    parser = argparse.ArgumentParser(description="Draw the sample catalogue.")
    parser.add_argument("--output_dir", default="data/catalogue", help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=2400, help="train rows (default: %(default)s)")
    parser.add_argument("--test_rows", type=int, default=192, help="test rows (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args()
    folder = write_catalogue(options.output_dir, rows=options.rows, test_rows=options.test_rows, seed=options.seed)
    print(f"{folder}: {options.rows} train and {options.test_rows} test rows")


if __name__ == "__main__":
    main()
