"""A notebook that every lint passes, small enough to make one thing wrong in it."""

from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

CARD = """# 02 · A planted lesson

| This lesson | |
|---|---|
| Minutes | 45 |
| Difficulty | easy |
| Hardware | any laptop |
| Needs | lesson 01 |
| Ends in | nothing new |
"""
PROSE = "Word after word of quiet prose. " * 60
NAME = "02_kv_cache.ipynb"  # a lesson that ends in no file


def code(number: int, source: str, printed: str, **metadata: Any) -> Any:
    outputs = [new_output("stream", name="stdout", text=printed)]
    return new_code_cell(source, execution_count=number, outputs=outputs, metadata=metadata)


def good_notebook() -> Any:
    """20 cells: 0 the card, 1 and 2 prose, then code cells 3 to 19, run as 1 to 17."""
    cells = [new_markdown_cell(CARD), new_markdown_cell(PROSE), new_markdown_cell(PROSE)]
    cells.append(code(1, "assert 1 + 1 == 2\nprint('sum')", "sum\n"))
    cells += [code(n, f"print({n})", f"{n}\n") for n in range(2, 18)]
    return new_notebook(cells=cells)


def write(notebook: Any, folder: Path, name: str = NAME) -> Path:
    path = folder / name
    nbformat.write(notebook, path)
    return path
