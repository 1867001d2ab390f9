"""An engine in two calls, and the drawings of a prefix cache."""

from types import SimpleNamespace as Namespace

from course.drawings.prefix_pictures import hit_rates, pool_frame, turns
from course.serving import ask, start_engine
from nanovllm.engine.block_manager import BlockManager


class Watched(BlockManager):
    """A manager of one's own."""


def test_asking_gives_each_prompt_its_tokens_in_order():
    engine = start_engine(Watched, block_size=4)
    assert isinstance(engine.block_manager, Watched)
    prompts = [[5, 6, 7, 8, 9], [5, 6, 7, 8, 10]]
    seqs = ask(engine, prompts, count=3)
    assert [seq.token_ids[:5] for seq in seqs] == prompts
    assert [len(seq.output_ids) for seq in seqs] == [3, 3]
    assert [seq.metrics.num_cached_tokens for seq in ask(engine, prompts)] == [4, 4]


def test_a_frame_says_the_state_of_each_block():
    pool = Namespace(refs=[2, 0, 0], free={2: None, 1: None}, key_of={0: "k", 1: "l"})
    svg = pool_frame(pool, {"A": [0], "B": [0]}, {0: [7, 8], 1: [9], 2: [3]})
    for text in ("refs 2: A, B", "refs 0: free", ">cached<", ">no key<", ">7 8<", ">9<"):
        assert text in svg
    assert ">3<" not in svg  # what stands in a block that is free and empty is nobody's
    assert "free queue" in svg


def test_what_is_computed_is_written_on_the_bars():
    fig = turns([24, 138], [0, 112])
    assert [text.get_text() for text in fig.axes[0].texts] == ["24 of 24", "26 of 138"]
    assert len(hit_rates([1, 2], [0.0, 0.5], needed=2).axes[0].lines) == 2
