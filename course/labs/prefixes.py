"""Prompts that begin alike, and what a prefix cache finds of them: lesson 04's bookkeeping.

prompts = questions(engine)                   # eight, under one long system prompt
seq, found = admit(manager, ids)              # a request enters a BlockManager, without an engine
turns = converse(engine, ANIMALS[:5])         # a chat, turn by turn
second = second_requests(cached, uncached)    # of four services: tokens computed, and TTFT
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from course.models.storyteller import LONG_SYSTEM
from course.serving import ask
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.sequence import Sequence as Request
from nanovllm.sampling_params import SamplingParams

ANIMALS = ("fox", "frog", "robot", "rabbit", "king", "mouse", "dragon", "bear")
SYSTEM = {"role": "system", "content": " ".join(LONG_SYSTEM)}
SERVICE_TOKENS = 672  # of each prompt of a service


def tell_of(animal: str) -> str:
    return f"Tell me a story about a {animal} who finds a key."


def prompt_of(engine: LLMEngine, text: str, *before: dict[str, str]) -> list[int]:
    """Token ids of a chat that ends in a user's text; before: the messages it begins with."""
    messages = [*before, {"role": "user", "content": text}]
    ids: list[int] = engine.get_tokenizer().apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    return ids


def questions(engine: LLMEngine) -> list[list[int]]:
    """Eight prompts under the storyteller's long system prompt."""
    return [prompt_of(engine, tell_of(animal), SYSTEM) for animal in ANIMALS]


def num_common(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens with which all of some prompts begin."""
    pairs = enumerate(zip(*prompts, strict=False))
    return next((i for i, ids in pairs if len(set(ids)) > 1), min(map(len, prompts)))


# -- without an engine ---------------------------------------------------------------------------


def admit(manager: BlockManager, ids: Sequence[int]) -> tuple[Request, int]:
    """A request takes what a manager has cached of its prompt, and blocks for the rest.

    The request, and how many of its tokens were found.
    """
    seq = Request("", None, list(ids), SamplingParams(), max_length=len(ids) + 1)
    hits = manager.find_cached_blocks(seq)
    manager.touch(seq, hits)
    manager.allocate(seq, len(ids))
    seq.num_scheduled = len(ids)  # what the scheduler notes when it plans a step
    manager.cache_full_blocks(seq)
    return seq, len(hits) * manager.block_size


def share_found(num_blocks: int, chats: int = 10, rounds: int = 5) -> float:
    """Share of prompt tokens found if chats of 20 blocks of 16 tokens come in turn."""
    manager, length, found = BlockManager(num_blocks, 16), 320, 0
    for _ in range(rounds):
        for chat in range(chats):
            seq, hit = admit(manager, range(chat * length, (chat + 1) * length))
            manager.free(seq)
            found += hit
    return found / (rounds * chats * length)


# -- with one ------------------------------------------------------------------------------------


def services(seed: int = 4) -> dict[str, Callable[[], list[int]]]:
    """Four services' prompts of 672 random ids; in three of them 640 are a system prompt."""
    rng = random.Random(seed)

    def some(count: int) -> list[int]:
        return [rng.randrange(4000) for _ in range(count)]

    shared = some(640)
    return {
        "one system prompt": lambda: shared + some(32),
        "a clock at its end": lambda: shared[:630] + some(10) + some(32),
        "a clock in front": lambda: some(10) + shared[10:] + some(32),
        "no system prompt": lambda: some(SERVICE_TOKENS),
    }


@dataclass(frozen=True)
class Second:
    """A service's second request: the prompt tokens that were computed, and TTFT in seconds."""

    service: str
    computed: int
    ttft: float
    computed_without: int  # by an engine without a prefix cache
    ttft_without: float

    def __str__(self) -> str:
        with_cache = f"{self.computed:4} computed, TTFT {1e3 * self.ttft:4.0f} ms"
        without = f"{self.computed_without:4} and {1e3 * self.ttft_without:4.0f} ms"
        return f"{self.service:20}{with_cache}; without a cache {without}"


def second_requests(cached: LLMEngine, uncached: LLMEngine) -> list[Second]:
    """What each service's second request costs, with a prefix cache and without.

    TTFT is the median of three requests that follow a first.
    """
    return [
        Second(name, *_second(cached, make_prompt), *_second(uncached, make_prompt))
        for name, make_prompt in services().items()
    ]


def _second(engine: LLMEngine, make_prompt: Callable[[], list[int]]) -> tuple[int, float]:
    seqs = [ask(engine, [make_prompt()])[0] for _ in range(4)][1:]
    times = sorted(seq.metrics.ttft or 0.0 for seq in seqs)
    return SERVICE_TOKENS - seqs[0].metrics.num_cached_tokens, times[1]


@dataclass(frozen=True)
class Turn:
    """One turn of a chat: its prompt's tokens, and those found in the cache."""

    tokens: int
    found: int


def converse(engine: LLMEngine, animals: Sequence[str]) -> Iterator[Turn]:
    """A chat that asks for one story after the other, each prompt with all that was said."""
    talk: list[dict[str, str]] = []
    for animal in animals:
        prompt = prompt_of(engine, tell_of(animal), *talk)
        [seq] = ask(engine, [prompt], count=120, ignore_eos=False)
        talk.append({"role": "user", "content": tell_of(animal)})
        talk.append({"role": "assistant", "content": seq.detokenizer.text})
        yield Turn(len(prompt), seq.metrics.num_cached_tokens)
