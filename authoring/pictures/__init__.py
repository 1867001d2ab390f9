"""The lessons' drawings, as code: each module draws one, and says in words what it shows.

    python -m authoring.pictures            # writes figures/*.svg
    python -m authoring.pictures --check    # fails if a file is not what its code draws

A new picture: write a module with `draw() -> Picture` here; its name is the file's.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from course.show.svg import Picture

FIGURES = Path(__file__).resolve().parents[2] / "figures"
PICTURES: dict[str, Callable[[], Picture]] = {
    module.name: import_module(f"authoring.pictures.{module.name}").draw
    for module in iter_modules(__path__)
    if module.name not in ("svg", "__main__")
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
