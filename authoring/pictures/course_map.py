"""figures/course_map.svg: the ten lessons, and the files of nanovllm/ each of them ends in."""

from course.lessons import FILES_OF_LESSON
from course.show.svg import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, Picture

TITLE = "Ten lessons, and the files of nanovllm/ they end in"
COLOURS = {
    "": BLUE,
    "models": PURPLE,
    "engine": ORANGE,
    "layers": GREEN,
    "kernels": GREY,
    "distributed": VERMILLION,
}
FOLDERS = {folder: f"{folder or 'nanovllm'}/" for folder in COLOURS}
INSTEAD = {
    "02_kv_cache": "begins layers/attention.py, which 03 completes",
    "09_the_ladder": "measures all of it together",
}
LEFT, CHIP, GAP, LINE = 250, 26, 8, 34  # pixels
CHARACTER = 7.3  # width of one in the chips' font
RIGHT = 680


def alt() -> str:
    """Every lesson and its files, in words."""
    rows = [
        f"{stem}: {', '.join(files) if files else INSTEAD[stem]}"
        for stem, files in FILES_OF_LESSON.items()
    ]
    return f"{TITLE}. " + "; ".join(rows) + "."


def rows_of(files: tuple[str, ...]) -> list[list[tuple[str, float]]]:
    """Files with their chips' widths, in rows that fit between LEFT and RIGHT."""
    rows: list[list[tuple[str, float]]] = [[]]
    x = LEFT
    for file in files:
        width = len(file) * CHARACTER + 20
        if x + width > RIGHT and rows[-1]:
            rows.append([])
            x = LEFT
        rows[-1].append((file, width))
        x += width + GAP
    return rows


def draw() -> Picture:
    heights = [LINE * len(rows_of(files)) + 12 for files in FILES_OF_LESSON.values()]
    p = Picture(700, round(94 + sum(heights) + 8), TITLE, alt())
    p.text((20, 30), TITLE, 17, anchor="start", bold=True)
    legend(p)
    y = 94.0
    last = len(FILES_OF_LESSON) - 1
    for i, ((stem, files), height) in enumerate(zip(FILES_OF_LESSON.items(), heights, strict=True)):
        lesson(p, y, height, stem, files)
        if i < last:
            p.arrow((115, y + height - 8), (115, y + height + 2), colour=GREY)
        y += height
    return p


def legend(p: Picture) -> None:
    """Which colour is which folder; the names in the chips say it too."""
    x = 20.0
    for folder, colour in COLOURS.items():
        p.box(x, 54, 18, 18, colour=colour)
        p.text((x + 26, 63), FOLDERS[folder], 12.5, "start", mono=True)
        x += 38 + 7.6 * len(FOLDERS[folder])
    p.box(x, 54, 18, 18, colour=SKY)
    p.text((x + 26, 63), "others", 12.5, "start", mono=True)


def lesson(p: Picture, y: float, height: float, stem: str, files: tuple[str, ...]) -> None:
    """One row: the lesson on the left, its files on the right."""
    number, _, topic = stem.partition("_")
    p.box(20, y, 190, height - 10)
    middle = y + (height - 10) / 2
    p.text((34, middle), number, 14, "start", bold=True)
    p.text((64, middle), topic.replace("_", " "), 14, "start")
    p.line((210, middle), (LEFT - 14, middle), colour=GREY, dashed=True)
    if not files:
        p.text((LEFT, middle), INSTEAD[stem], 12.5, "start", GREY)
    rows = rows_of(files)
    top = middle - (len(rows) - 1) * LINE / 2 - CHIP / 2
    for row, chips in enumerate(rows):
        x = LEFT
        for file, width in chips:
            colour = COLOURS.get(file.rpartition("/")[0], SKY)
            p.box(x, top + row * LINE, width, CHIP, shape=file, colour=colour, size=14)
            x += width + GAP
