"""Code shown in a lesson: the file's own lines, in colours that a stored page keeps."""

import re
from typing import Any

import pytest

from course.show.reading import highlighted, show_source, source_of, up_to_date
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import ScheduledSequence
from nanovllm.layers.rope import apply_rope
from nanovllm.models.decoder import Decoder


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    pages: list[dict[str, Any]] = []
    monkeypatch.setattr("IPython.display.display", lambda page, raw: pages.append(page))
    return pages


def test_a_method_begins_at_the_left_and_keeps_its_body() -> None:
    text = source_of(Decoder.compute_logits)
    assert text.startswith("def compute_logits(")
    assert text.endswith("    return self.lm_head.norm_linear(hidden, self.norm)")


def test_the_page_names_the_file_and_holds_every_word_of_the_code(
    shown: list[dict[str, Any]],
) -> None:
    show_source(apply_rope, Decoder.compute_logits)
    (page,) = shown
    text = re.sub(r"<[^>]+>", "", page["text/html"])
    assert "nanovllm/layers/rope.py" in text
    assert "nanovllm/models/decoder.py: Decoder.compute_logits" in text
    assert "cos_sin[:, None].unbind(2)" in text
    assert source_of(apply_rope) in page["text/plain"]


def test_colours_are_inline() -> None:
    page = highlighted("def f(x):\n    return x < 1")
    assert "class=" not in page
    assert "<style" not in page
    assert re.search(r'<span style="[^"]*color: #\w+[^"]*">def</span>', page)
    assert "&lt;" in page


def test_a_light_box_has_dark_text(shown: list[dict[str, Any]]) -> None:
    """In a dark theme inherited text is white, and on a light box nobody can read it."""
    show_source(apply_rope)
    boxes = re.findall(r'style="([^"]*background[^"]*)"', shown[0]["text/html"])
    assert boxes
    assert all(re.search(r"(^|; )color: #222222", style) for style in boxes)


def test_a_page_made_anew_from_its_titles_is_the_same(shown: list[dict[str, Any]]) -> None:
    """Functions, methods, and what has decorators."""
    show_source(apply_rope, Decoder.compute_logits, ModelRunner.launch, ScheduledSequence)
    assert up_to_date(shown[0]["text/plain"]) == shown[0]


def test_code_that_has_moved_is_shown_from_its_new_file():
    page = up_to_date("# nanovllm/old_folder/old_file.py: BlockManager.free\ndef free(): ...")
    assert page["text/plain"].startswith("# nanovllm/engine/block_manager.py: BlockManager.free\n")
    with pytest.raises(ValueError, match=r"0 other files have it"):
        up_to_date("# nanovllm/engine/block_manager.py: BlockManager.gone\n")
