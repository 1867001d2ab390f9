"""Figures in pages: alt text in each, the same bytes for the same figure, steps that fold."""

import base64
import re

import pytest
from matplotlib import pyplot as plt

from course.show import display

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


@pytest.fixture
def shown(monkeypatch):
    """The pages displayed, as {kind: text}."""
    pages = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: pages.append(data))
    return pages


def draw():
    figure, axes = plt.subplots()
    axes.plot([1, 2], label="a")
    axes.legend()
    return figure


def test_a_figure_is_an_image_with_its_sentence(shown):
    figure = draw()
    display.show(figure, alt='A line from "1" to 2 & up')
    (page,) = shown
    assert 'alt="A line from &quot;1&quot; to 2 &amp; up"' in page["text/html"]
    assert page["text/plain"] == 'A line from "1" to 2 & up'
    data = re.search(r"base64,([^\"]+)", page["text/html"])[1]
    assert base64.b64decode(data).rstrip().endswith(b"</svg>")
    assert not plt.fignum_exists(figure.number), "else the notebook shows it once more"


def test_a_drawing_brings_its_own_sentence(shown):
    figure = draw()
    figure.alt_text = "A line up"
    display.show(figure)
    display.show(figure, alt="Another")
    assert [page["text/plain"] for page in shown] == ["A line up", "Another"]


def test_the_same_figure_is_the_same_text():
    assert display.svg_of(draw()) == display.svg_of(draw())


def test_a_file_is_shown_as_it_is(tmp_path):
    (tmp_path / "a.svg").write_text(SVG)
    assert display.svg_of(tmp_path / "a.svg") == SVG


@pytest.mark.parametrize("alt", ["", "  ", None])
def test_no_picture_without_alt_text(alt, shown):
    with pytest.raises(ValueError, match="alt is empty"):
        display.show(SVG, alt)
    with pytest.raises(ValueError, match="1 frames and 2 captions"):
        display.steps([SVG], ["a", "b"], "c")
    assert shown == []


def test_steps_fold_with_the_first_one_open(shown):
    display.steps([SVG, SVG], ["start", "a < b"], "Blocks fill.")
    page = shown[0]["text/html"]
    assert page.count("<details open>") == page.count("<details>") == 1
    assert "<summary>Step 2 of 2: a &lt; b</summary>" in page
    assert 'alt="Blocks fill. Step 1 of 2: start"' in page
