"""Figures in a notebook: drawn as SVG, each with the sentence that stands for it (its alt text).

A figure goes into the page as an `<img>` that holds its own SVG: it needs no file beside the
notebook, its ids meet no other figure's, and it shows in a page that was never run here
(JupyterLab takes inline `<svg>` out of those).
"""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def show(figure: Any, alt: str | None = None) -> None:
    """Display a matplotlib figure, an SVG's text or an SVG file; `alt` says what is seen in it.

    A figure of course.drawings or course.show.plots says it itself, in its `alt_text`.
    """
    words = getattr(figure, "alt_text", "") if alt is None else alt
    _display(_image(figure, words), words)


def steps(frames: Sequence[Any], captions: Sequence[str], alt: str) -> None:
    """Display pictures to step through: a slider in a page that was run, folds in a stored one.

    frames    figures, SVG texts or SVG files, in order
    captions  one a frame: what changed in this step
    alt       what the whole sequence shows; each frame's own is made of it and its caption
    """
    if not frames or len(frames) != len(captions):
        raise ValueError(f"{len(frames)} frames and {len(captions)} captions: one for each, please")
    folds = []
    for number, (frame, caption) in enumerate(zip(frames, captions, strict=True), start=1):
        title = f"Step {number} of {len(frames)}: {caption}"
        image = _image(frame, f"{alt.rstrip('.')}. {title}")
        is_open = " open" if number == 1 else ""
        folds.append(f"<details{is_open}><summary>{html.escape(title)}</summary>{image}</details>")
    slider = f"<script>{SLIDER}</script>"
    _display(f'<div class="course-steps">{"".join(folds)}{slider}</div>', alt)


def svg_of(figure: Any) -> str:
    """The SVG's text. The same figure gives the same text: no date, no random ids."""
    if isinstance(figure, Path):
        return figure.read_text(encoding="utf-8")
    if isinstance(figure, str):
        return figure
    import matplotlib
    from matplotlib import pyplot

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "course", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)  # or the notebook shows it a second time
    return file.getvalue()


def _image(figure: Any, alt: str) -> str:
    if not alt.strip():
        raise ValueError("alt is empty: say in a sentence what the figure shows")
    data = base64.b64encode(svg_of(figure).encode()).decode()
    return (
        f'<img alt="{html.escape(alt)}" style="max-width: 100%; background: white" '
        f'src="data:image/svg+xml;base64,{data}">'
    )


def _display(page: str, alt: str) -> None:
    from IPython.display import display

    display({"text/html": page, "text/plain": alt}, raw=True)


SLIDER = """
(() => {
  const box = document.currentScript.parentElement;
  const folds = [...box.querySelectorAll("details")];
  const button = (label, move) => {
    const made = document.createElement("button");
    made.textContent = label;
    made.onclick = () => go(Number(slider.value) + move);
    return made;
  };
  const slider = document.createElement("input");
  Object.assign(slider, { type: "range", min: 0, max: folds.length - 1, value: 0 });
  slider.setAttribute("aria-label", "step");
  slider.oninput = () => go(Number(slider.value));
  const go = (step) => {
    slider.value = step;
    folds.forEach((fold, at) => { fold.open = true; fold.hidden = at !== Number(slider.value); });
  };
  const bar = document.createElement("div");
  bar.append(button("\u2039 back", -1), slider, button("next \u203a", 1));
  box.prepend(bar);
  go(0);
})();
"""
