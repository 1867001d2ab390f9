"""Code of the engine, shown in a lesson as it stands in its file.

    show_source(apply_rope)
    show_source(Attention.forward, MLP.forward)    # several: one after the other

Colours are inline styles: JupyterLab takes style sheets out of a page that was never run there.

A stored page goes stale when the engine changes, though the lesson did not: `up_to_date` makes it
anew from its titles, which `python -m authoring.build` does, without a run.
"""

import ast
import html
import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from course.clone import ROOT

TITLE = re.compile(r"^# (\S+\.py): ([\w.]+)$", re.MULTILINE)
BOX = "border-left: 3px solid #0072B2; padding: 4px 12px; background: #F8F8F8; color: #222222"


def show_source(*objects: Callable[..., Any]) -> None:
    """Display functions, methods or classes: where each stands, and its lines."""
    show_texts([(f"{file_of(item)}: {item.__qualname__}", source_of(item)) for item in objects])


def file_of(item: Callable[..., Any]) -> str:
    """The file an object stands in, from the repository's root."""
    file = inspect.getsourcefile(inspect.unwrap(item))
    assert file is not None
    return Path(file).resolve().relative_to(ROOT).as_posix()


def source_of(item: Callable[..., Any]) -> str:
    """An object's lines, a method's as far left as a function's."""
    return textwrap.dedent(inspect.getsource(item)).rstrip()


def highlighted(text: str) -> str:
    """Python as HTML whose colours are inline."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    style = "margin: 4px 0 0 0; color: #222222; background: #F8F8F8; font-size: 13px"
    formatter = HtmlFormatter(noclasses=True, nowrap=True)
    return f'<pre style="{style}">{highlight(text, PythonLexer(), formatter)}</pre>'


def show_from(file: str, *names: str) -> None:
    """Display a file's functions and classes by name, without importing it (it may need Triton)."""
    show_texts([(f"{file}: {name}", cut_out(ROOT / file, name)) for name in names])


def show_texts(texts: list[tuple[str, str]]) -> None:
    """Display pieces of code, each (title, lines)."""
    from IPython.display import display

    display(page_of(texts), raw=True)


def page_of(texts: list[tuple[str, str]]) -> dict[str, str]:
    """Pieces of code, each (title, lines), as HTML and as plain text."""
    page = "".join(
        f'<div style="{BOX}"><b>{html.escape(title)}</b>{highlighted(text)}</div>'
        for title, text in texts
    )
    plain = "\n\n".join(f"# {title}\n{text}" for title, text in texts)
    return {"text/html": page, "text/plain": plain}


def up_to_date(plain: str) -> dict[str, str]:
    """The page whose plain text is given, with the code as it stands now.

    A piece that has moved is shown from its new file. ValueError if a piece is no more.
    """
    pieces = [(file_with(file, name), name) for file, name in TITLE.findall(plain)]
    return page_of([(f"{file}: {name}", cut_out(ROOT / file, name)) for file, name in pieces])


def file_with(file: str, name: str) -> str:
    """The file of a function or class that was in `file`: that one, or the one it has moved to.

    ValueError if it is no more, or if several other files of the folder have this name.
    """
    if defines(ROOT / file, name):
        return file
    folder = ROOT / Path(file).parts[0]
    found = [path for path in sorted(folder.rglob("*.py")) if defines(path, name)]
    if len(found) != 1:
        raise ValueError(f"{file} has no {name!r} any more, and {len(found)} other files have it")
    return found[0].relative_to(ROOT).as_posix()


def defines(file: Path, name: str) -> bool:
    try:
        return bool(cut_out(file, name))
    except (ValueError, OSError):
        return False


def cut_out(file: Path, name: str) -> str:
    """The lines of a function or class of a file ("f", "C", "C.f"), its decorators included."""
    source, node = file.read_text(), None
    inside: list[ast.stmt] = ast.parse(source).body
    for part in name.split("."):
        kinds = ast.FunctionDef | ast.ClassDef
        node = next((n for n in inside if isinstance(n, kinds) and n.name == part), None)
        if node is None:
            raise ValueError(f"{file.name} has no function or class {name!r}")
        inside = node.body
    assert node is not None
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return textwrap.dedent("\n".join(source.splitlines()[first - 1 : node.end_lineno])).rstrip()
