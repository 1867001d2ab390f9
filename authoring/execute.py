"""Run a notebook top to bottom in a fresh kernel, and keep of it what belongs in a repository."""

import sys
from pathlib import Path
from typing import Any

from course.clone import ROOT
from course.pages.source import code_digest, first_line, missing_requirement

CELL_SECONDS = 1800  # a limit for what hangs; a busy machine takes many times as long


def run_notebook(notebook: Any, path: Path) -> Any:
    """The notebook with the outputs of one run; a ValueError names the cell that failed."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError

    if reason := missing_requirement(notebook):
        raise ValueError(f"{path.name} cannot run on this machine: {reason}")
    metadata = dict(notebook.metadata)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError) as error:
        raise ValueError(f"{failed_cell(notebook, path)}\n{error}") from error
    notebook.metadata.update(metadata)
    sign_run(notebook)
    return notebook


def sign_run(notebook: Any) -> None:
    """Note which code the stored outputs come from, and take this machine's folders out of them."""
    notebook.metadata.setdefault("course", {})["run_of"] = code_digest(notebook)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            without_paths(output)


def failed_cell(notebook: Any, path: Path) -> str:
    """Which cell stopped the run: the last one that was started."""
    started = [
        (index, cell)
        for index, cell in enumerate(notebook.cells)
        if cell.cell_type == "code" and cell.execution_count is not None
    ]
    index, cell = max(started, key=lambda pair: pair[1].execution_count)
    return f"{path.name}, cell {index} ({first_line(cell.source)!r}) failed:"


def without_paths(output: Any) -> None:
    """Write this machine's folders as any reader's: the repository `.`, the home `~`."""
    shorter = {f"{sys.prefix}/": "", f"{ROOT}/": "", str(ROOT): ".", str(Path.home()): "~"}
    for holder, key in ((output, "text"), (output.get("data", {}), "text/plain")):
        if key in holder:
            for folder, short in shorter.items():
                holder[key] = holder[key].replace(folder, short)
