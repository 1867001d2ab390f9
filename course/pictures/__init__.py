"""The lessons' drawings, as code: each module draws one, and says in words what it shows.

    python -m course.pictures            # writes figures/*.svg
    python -m course.pictures --check    # fails if a file is not what its code draws

A new picture: write a module with `draw() -> Picture`, and name it in PICTURES.
"""

from collections.abc import Callable
from pathlib import Path

from course.pictures import course_map, decoder, one_step
from course.pictures.svg import Picture

FIGURES = Path(__file__).resolve().parents[2] / "figures"
PICTURES: dict[str, Callable[[], Picture]] = {
    "course_map": course_map.draw,
    "decoder": decoder.draw,
    "one_step": one_step.draw,
}


def alt_text(name: str) -> str:
    """What a picture shows, in words: for `![...](../figures/NAME.svg)`."""
    return PICTURES[name]().alt


def build(folder: Path = FIGURES) -> list[Path]:
    """Write every picture; the files."""
    files = []
    for name, draw in PICTURES.items():
        files.append(folder / f"{name}.svg")
        files[-1].write_text(draw().svg(), encoding="utf-8")
    return files


def outdated(folder: Path = FIGURES) -> list[str]:
    """Pictures whose file is missing, or not what their code draws."""
    return [
        name
        for name, draw in PICTURES.items()
        if not (file := folder / f"{name}.svg").exists()
        or file.read_text(encoding="utf-8") != draw().svg()
    ]
