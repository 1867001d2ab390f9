"""Drawings of a cache: what a row is said to hold adds up, and agrees with what stage 02 counts."""

import pytest
import torch

from course.drawings.cache_pictures import Span, batch_map, row_spans, share, token_frame

PROMPTS, OUTPUTS, MAX_LEN = [3, 5, 2], [6, 2, 4], 11


def test_a_row_by_hand():
    """After 2 steps: row 0 runs, row 1 is done, row 2 still has padding behind its output."""
    rows = row_spans(PROMPTS, OUTPUTS, 2, MAX_LEN)
    assert rows[0] == [
        Span("prompt, live", 0, 3),
        Span("output, live", 3, 5),
        Span("reserved, empty", 5, 11),
    ]
    assert rows[1] == [Span("finished, still held", 0, 7), Span("reserved, empty", 7, 11)]
    assert rows[2][2:] == [Span("padding", 4, 5), Span("reserved, empty", 5, 11)]


@pytest.mark.parametrize("step", range(6))
def test_rows_are_filled_without_gaps_and_live_is_what_the_stage_counts(step):
    rows = row_spans(PROMPTS, OUTPUTS, step, MAX_LEN)
    for row in rows:
        ends = [span.stop for span in row]
        assert [span.start for span in row] == [0, *ends[:-1]]
        assert ends[-1] == MAX_LEN
    live = sum(p + step for p, n in zip(PROMPTS, OUTPUTS, strict=True) if step < n)
    assert share(rows, "live") == live / (3 * MAX_LEN)


def test_maps_and_frames_are_drawn_with_their_words():
    picture = batch_map(row_spans(PROMPTS, OUTPUTS, 2, MAX_LEN), "Three rows", cells=True)
    for text in ("Three rows", "row 2", "F: finished, still held", "x: padding"):
        assert text in picture
    assert picture.count(">F</text>") == 1, "one rectangle for all places of the finished row"
    keys, query = torch.full((4, 4), 7.0), torch.full((1, 4), 5.0)
    frame = token_frame(keys, keys, query, 1)
    assert frame.count(">7</text>") == 2 * 2 * 4, "two stored rows of each table, no empty ones"
    assert frame.count(">5</text>") == 4
