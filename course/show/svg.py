"""A small helper for pictures: boxes, arrows and text on a grid of pixels, written as SVG.

    picture = Picture(700, 300, "Title", alt="What it shows, in words.")
    a = picture.box(20, 40, 160, 48, "token ids", "[tokens]")
    b = picture.box(260, 40, 160, 48, "embedding", "[tokens, hidden]", SKY)
    picture.arrow(a.right, b.left)
    text = picture.svg()

x grows to the right and y down, in pixels. The picture brings its own white background, so it reads
the same on a light and on a dark page. Numbers are rounded, so the same code gives the same bytes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

# Okabe and Ito's colours, and pale forms of them to write on.
INK, GREY, PALE = "#222222", "#5C5C5C", "#F3F3F3"
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9",
)  # fmt: skip
TINT = {
    BLUE: "#DCEBF5",
    ORANGE: "#FCF0D6",
    GREEN: "#DBF1EA",
    VERMILLION: "#F9E4D7",
    PURPLE: "#F7E8F0",
    SKY: "#E3F2FB",
    GREY: PALE,
}
FONT = "font-family='DejaVu Sans, Verdana, Helvetica, Arial, sans-serif'"
MONO = "font-family='DejaVu Sans Mono, Menlo, Consolas, monospace'"
LINE = 1.35  # distance of two lines of text, in font sizes

Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A rectangle, and the middles of its sides."""

    x: float
    y: float
    width: float
    height: float

    @property
    def left(self) -> Point:
        return self.x, self.y + self.height / 2

    @property
    def right(self) -> Point:
        return self.x + self.width, self.y + self.height / 2

    @property
    def top(self) -> Point:
        return self.x + self.width / 2, self.y

    @property
    def bottom(self) -> Point:
        return self.x + self.width / 2, self.y + self.height

    @property
    def centre(self) -> Point:
        return self.x + self.width / 2, self.y + self.height / 2


def number(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


class Picture:
    """An SVG file in the making. What is drawn later lies above."""

    def __init__(self, width: int, height: int, title: str, alt: str):
        self.width, self.height, self.title, self.alt = width, height, title, alt
        self._parts: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        label: str = "",
        shape: str = "",
        colour: str = GREY,
        size: float = 14,
        dashed: bool = False,
        radius: float = 7,
    ) -> Box:
        """A rounded box with a label, and below it a shape or file name in a fixed-width font."""
        box = Box(x, y, width, height)
        dash = " stroke-dasharray='5 4'" if dashed else ""
        fill = "none" if dashed else TINT[colour]
        self._parts.append(
            f"<rect x='{number(x)}' y='{number(y)}' width='{number(width)}' "
            f"height='{number(height)}' rx='{number(radius)}' fill='{fill}' stroke='{colour}' "
            f"stroke-width='1.6'{dash}/>"
        )
        middle = y + height / 2
        if label:
            self.text((x + width / 2, middle - (9 if shape else 0)), label, size)
        if shape:
            self.text((x + width / 2, middle + (10 if label else 0)), shape, size - 2, mono=True)
        return box

    def text(
        self,
        at: Point,
        text: str,
        size: float = 14,
        anchor: str = "middle",
        colour: str = INK,
        mono: bool = False,
        bold: bool = False,
    ) -> None:
        """Text centred in height on `at`; anchor: start, middle or end. Lines are cut at \\n."""
        lines = text.split("\n")
        x, top = at[0], at[1] - (len(lines) - 1) * size * LINE / 2 + size * 0.35
        weight = " font-weight='bold'" if bold else ""
        for i, line in enumerate(lines):
            self._parts.append(
                f"<text x='{number(x)}' y='{number(top + i * size * LINE)}' font-size='{size:g}' "
                f"text-anchor='{anchor}' fill='{colour}' {MONO if mono else FONT}{weight}>"
                f"{escape(line)}</text>"
            )

    def arrow(self, *points: Point, colour: str = INK, dashed: bool = False) -> None:
        """A line through the points, with a head at the last one."""
        (x0, y0), (x1, y1) = points[-2:]
        length = max(1e-9, ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5)
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        bx, by = x1 - 9 * dx, y1 - 9 * dy  # where the head begins
        wings = [(x1, y1), (bx - 4 * dy, by + 4 * dx), (bx + 4 * dy, by - 4 * dx)]
        self.line(*points[:-1], (bx, by), colour=colour, dashed=dashed)
        self._parts.append(f"<polygon points='{joined(wings)}' fill='{colour}'/>")

    def line(self, *points: Point, colour: str = INK, dashed: bool = False) -> None:
        dash = " stroke-dasharray='5 4'" if dashed else ""
        self._parts.append(
            f"<polyline points='{joined(points)}' fill='none' stroke='{colour}' "
            f"stroke-width='1.6' stroke-linejoin='round'{dash}/>"
        )

    def svg(self) -> str:
        """The whole file."""
        head = (
            f"<svg xmlns='http://www.w3.org/2000/svg' width='{self.width}' height='{self.height}' "
            f"viewBox='0 0 {self.width} {self.height}' role='img' aria-labelledby='title desc'>"
        )
        back = f"<rect width='{self.width}' height='{self.height}' rx='12' fill='#FFFFFF'/>"
        title = f"<title id='title'>{escape(self.title)}</title>"
        desc = f"<desc id='desc'>{escape(self.alt)}</desc>"
        return "\n".join([head, title, desc, back, *self._parts, "</svg>"]) + "\n"


def joined(points: Iterable[Point]) -> str:
    return " ".join(f"{number(x)},{number(y)}" for x, y in points)
