"""What a learner sees: the notebooks in JupyterLab, in Chromium, stored and freshly run.

Skipped where playwright or Chromium is missing.
"""

import json
import shutil

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from planted import write

from authoring import lab
from authoring.execute import run_notebook
from authoring.screens import Lesson, copy_course
from course.clone import ROOT
from course.pages.source import KERNELSPEC

pytestmark = pytest.mark.skipif(bool(lab.why_not()), reason=str(lab.why_not()))

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="200" height="50">'
SVG += '<rect width="99" height="9"/></svg>'
STEPS = f"""from IPython.display import HTML
from course.show.display import show, steps
frame = {SVG!r}
steps([frame, frame, frame], ["one", "two", "three"], "A bar")"""
MARKDOWN = """# What survives

![A local picture](../figures/local.svg)

| left | right |
|:-----|------:|
| a    | 1     |

<details><summary>A fold</summary>Inside, $x^2$.</details>

<b style="color: red">styled</b> <script>window.hacked = 1</script>
"""
INLINE = "HTML('<i>beside</i>' + frame.replace('<svg', '<svg role=\"img\" aria-label=\"bar\"'))"
WIDGET = "import ipywidgets\n\nipywidgets.IntSlider()"
BAD = (
    """![broken](../figures/none.svg) $\\undefined$

<table><tr><td><pre style="white-space: pre">"""
    + "wide " * 300
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course")
    copy_course(folder)
    (folder / "figures/local.svg").write_text(SVG)
    path = folder / "notebooks/pages.ipynb"
    sources = [new_markdown_cell(MARKDOWN), *map(new_code_cell, (STEPS, INLINE, WIDGET))]
    metadata = {"kernelspec": KERNELSPEC, "course": {}}  # without a kernel JupyterLab asks for one
    notebook = new_notebook(cells=sources, metadata=metadata)
    write(run_notebook(notebook, path), path.parent, path.name)
    cells = [new_markdown_cell(BAD), new_code_cell("1 / 0")]
    bad = new_notebook(cells=cells, metadata={"kernelspec": KERNELSPEC})
    bad.cells[1].outputs = [new_output("error", ename="ZeroDivisionError", traceback=["no"])]
    write(bad, path.parent, "bad.ipynb")
    return folder


@pytest.fixture(scope="module")
def open_lesson(folder):
    with lab.jupyterlab(folder) as url, lab.browser() as page:

        def open_one(name):
            path = name if "/" in name else f"notebooks/{name}"
            cells = len(json.loads((folder / path).read_text())["cells"])
            return Lesson.open(page, url, path, cells)

        yield open_one


NOTEBOOKS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("notebooks", "exercises")
    for path in (ROOT / folder).glob("*.ipynb")
    if ".mine-" not in path.name
)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_stored_notebook_looks_right(name, open_lesson):
    assert open_lesson(name).problems() == []


def test_what_is_wrong_on_a_page_is_found(open_lesson):
    found = "\n".join(open_lesson("bad.ipynb").problems())
    assert "cell 0: broken image: broken" in found
    assert "cell 0: a formula is not TeX" in found
    assert "pixels wider than the page" in found
    assert "cell 1: an error is shown" in found


def test_what_a_page_keeps_that_was_never_run_here(open_lesson):
    """The facts that CONTRIBUTING.md tells authors."""
    page = open_lesson("pages.ipynb").page
    notebook = page.locator(".jp-Notebook")
    assert notebook.get_by_alt_text("A local picture").bounding_box()["width"] == 200
    cell = notebook.get_by_role("cell", name="1", exact=True)
    assert cell.evaluate("cell => getComputedStyle(cell).textAlign").endswith("right")
    assert notebook.locator("details mjx-container").count() == 1
    assert notebook.locator("b").evaluate("b => getComputedStyle(b).color") == "rgb(255, 0, 0)"
    assert page.evaluate("window.hacked") is None
    assert notebook.locator(".jp-OutputArea-output i").inner_text() == "beside"
    assert notebook.locator(".jp-OutputArea-output svg").count() == 0, "inline SVG is taken out"
    assert notebook.locator(".widget-slider").count() == 0, "its state lived in a kernel"
    assert notebook.get_by_text("IntSlider(value=0)").count() == 1, "all that is left of it"


def test_steps_are_folds_in_a_stored_page(open_lesson):
    lesson = open_lesson("pages.ipynb")
    pictures = lesson.page.locator(".course-steps img")
    assert [picture.is_visible() for picture in pictures.all()] == [True, False, False]
    assert lesson.page.locator(".course-steps input").count() == 0
    assert lesson.problems() == []
    assert all(picture.is_visible() for picture in pictures.all())


def test_steps_are_a_slider_in_a_page_that_was_run(open_lesson):
    lesson = open_lesson("pages.ipynb")
    lesson.run_all()
    pictures = lesson.page.locator(".course-steps img").all()

    def shown():
        return [picture.is_visible() for picture in pictures]

    assert shown() == [True, False, False]
    lesson.page.locator(".course-steps button", has_text="next").click()
    assert shown() == [False, True, False]
    lesson.page.locator(".course-steps input").press("End")
    assert shown() == [False, False, True]
    assert lesson.page.locator(".jp-OutputArea-output svg").count() == 1, "trusted now"
    assert lesson.page.locator(".widget-slider").count() == 1
    assert lesson.problems() == []


def test_pictures_are_taken_a_screenful_each(open_lesson, tmp_path):
    count = open_lesson(NOTEBOOKS[0]).take_pictures(tmp_path / "pictures")
    assert count == len(list((tmp_path / "pictures").glob("*.png"))) > 1
    shutil.rmtree(tmp_path / "pictures")
