"""Drawings of reserved memory and of blocks: what a cell is said to hold is what the tables say."""

from course.drawings.block_pictures import (
    block_cells,
    count,
    held_plot,
    reserved_cells,
    strip,
    waste_plot,
)
from course.show.display import svg_of

OWNERS = ["A", "A", "A", None, "B", "B"]


def test_the_first_places_of_a_reservation_are_live() -> None:
    cells = reserved_cells(OWNERS, {"A": 2, "B": 0})
    kinds = ["live", "live", "inside", "free", "inside", "inside"]
    assert [kind for _, kind in cells] == kinds
    assert [owner for owner, _ in cells] == ["A", "A", "A", "", "B", "B"]
    assert count(reserved_cells(OWNERS, {"A": 2, "B": 0}, refused=True), "outside") == 1


def test_tokens_fill_blocks_in_the_order_of_the_table() -> None:
    cells = block_cells({"A": [2, 0]}, {"A": 3}, num_blocks=3, block_size=2)
    assert cells == [
        ("A", "live"),
        ("A", "inside"),
        ("", "free"),
        ("", "free"),
        *[("A", "live")] * 2,
    ]


def test_a_strip_names_its_blocks_and_says_its_numbers_in_words() -> None:
    cells = block_cells({"A": [2, 0]}, {"A": 3}, num_blocks=3, block_size=2)
    picture = strip(cells, "Three blocks", ["A: [2, 0]"], block_size=2)
    words = "Three blocks. Places: holds a token: 3; taken, empty: 1; free: 2."
    assert picture.alt == words
    for text in ("block 2", "A: [2, 0]", "free: 2"):
        assert text in picture.svg()


def test_plots_are_drawn_with_their_words() -> None:
    waste = svg_of(waste_plot([1, 16], {"long": [0, 7.5]}, {"long": [0, 0.1]}))
    held = svg_of(held_plot({"rows": [(8, 3), (8, 1)], "blocks": [(4, 3)]}, 8))
    assert "<!-- long -->" in waste
    assert "<!-- (block_size - 1) / 2 -->" in waste
    assert "<!-- held, empty -->" in held
