"""Reading the engine's code in a lesson: real source, with its file and line, coloured.

Colours are inline styles, which JupyterLab keeps in a page that was not run here (it takes out
`<style>`, so classes would be lost).
"""

import inspect
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def show_source(*objects: Any) -> None:
    """Display the source of functions, methods or classes, each under its file and line."""
    from IPython.display import display

    found = [located(thing) for thing in objects]
    page = "".join(f"<div><code>{where}</code></div>{coloured(code)}" for where, code in found)
    plain = "\n\n".join(f"# {where}\n{code}" for where, code in found)
    display({"text/html": page, "text/plain": plain}, raw=True)


def located(thing: Any) -> tuple[str, str]:
    """Where a function or class stands, as `folder/file.py, line N`, and its source."""
    lines, first = inspect.getsourcelines(thing)
    file = Path(inspect.getfile(thing)).resolve()
    name = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name
    return f"{name}, line {first}", inspect.cleandoc("\n" + "".join(lines))


def coloured(code: str) -> str:
    """HTML of Python source; every colour reads well on white."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    style = "padding: 8px 12px; background: #F7F7F7; overflow-x: auto"
    formatter = HtmlFormatter(noclasses=True, style="default", nobackground=True, prestyles=style)
    return highlight(code, PythonLexer(), formatter)
