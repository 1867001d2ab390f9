"""A source file in jupytext's percent format -> a notebook without outputs.

What a source may say is small on purpose. In a cell's header line:

    # %% [markdown]
    # %% tags=["nbval-check-output"]           this output must be the same on every machine
    # %% jupyter={"source_hidden": true}       the code is folded; outputs_hidden folds the output

and in a YAML header at the top of the file, what the notebook cannot run without:

    # ---
    # jupyter:
    #   course:
    #     requires: [cuda]
    # ---

Sources in solutions/ hold exercises, and may say more: see exercise_cells.py.
"""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from course.machine import has_triton
from course.pages.exercise_cells import TAG

TAGS = {"nbval-check-output"}
FOLDS = {"source_hidden", "outputs_hidden"}
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"}


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


REQUIREMENTS = {
    "cuda": (has_cuda, "it needs an NVIDIA GPU, and there is none here"),
    "triton": (has_triton, "it needs triton, which is not installed here"),
}


def missing_requirement(notebook: Any) -> str | None:
    """Why this machine cannot run the notebook; None if it can."""
    for name in notebook.metadata.get("course", {}).get("requires", []):
        here, reason = REQUIREMENTS[name]
        if not here():
            return reason
    return None


def read_source(path: Path) -> Any:
    """The notebook of one source file: cells with ids and metadata, no outputs."""
    import jupytext
    from nbformat.v4 import new_notebook

    parsed = jupytext.reads(path.read_text(encoding="utf-8"), fmt="py:percent")
    cells = [clean_cell(cell, path) for cell in parsed.cells]
    for cell, cell_id in zip(cells, cell_ids(cells), strict=True):
        cell.id = cell_id
    requires = parsed.metadata.get("course", {}).get("requires", [])
    if unknown := set(requires) - set(REQUIREMENTS):
        raise ValueError(f"{path.name}: requires {sorted(unknown)}; known: {sorted(REQUIREMENTS)}")
    metadata = {
        "kernelspec": dict(KERNELSPEC),
        "language_info": dict(LANGUAGE),
        "course": {"requires": list(requires)},
    }
    return new_notebook(cells=cells, metadata=metadata, nbformat_minor=5)


def clean_cell(cell: Any, path: Path) -> Any:
    """The cell with the metadata that sources may set; an error names any other."""
    from nbformat.v4 import new_code_cell, new_markdown_cell

    where = f"{path.name}, cell starting {first_line(cell.source)!r}"
    if cell.cell_type not in ("code", "markdown"):
        raise ValueError(f"{where}: a cell is code or markdown, not {cell.cell_type}")
    metadata = {key: value for key, value in cell.metadata.items() if key != "lines_to_next_cell"}
    if unknown := set(metadata) - {"tags", "jupyter"}:
        raise ValueError(f"{where}: unknown metadata {sorted(unknown)}; tags and jupyter are known")
    tags = set(metadata.get("tags", []))
    if path.parent.name == "solutions":
        tags = {tag for tag in tags if not tag.startswith(TAG)}
    if unknown := tags - TAGS:
        raise ValueError(f"{where}: unknown tags {sorted(unknown)}; known: {sorted(TAGS)}")
    if unknown := set(metadata.get("jupyter", {})) - FOLDS:
        raise ValueError(f"{where}: unknown folds {sorted(unknown)}; known: {sorted(FOLDS)}")
    make = new_code_cell if cell.cell_type == "code" else new_markdown_cell
    return make(cell.source, metadata=metadata)


def first_line(source: str) -> str:
    return source.partition("\n")[0]


def cell_ids(cells: list[Any]) -> list[str]:
    """Ids from content alone, so that a cell keeps its id where others move; twins are numbered."""
    seen: Counter[str] = Counter()
    ids = []
    for cell in cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        seen[digest] += 1
        ids.append(digest if seen[digest] == 1 else f"{digest}-{seen[digest]}")
    return ids


def code_digest(notebook: Any) -> str:
    """One digest of all the code in its order: what a stored run was a run of."""
    code = "\n# %%\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]
