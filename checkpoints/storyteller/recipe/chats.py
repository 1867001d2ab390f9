"""From stories to what the small model learns: chats that ask for them, and plain text.

Each story is asked for in other words each time it is used, under another name, with or without a
system prompt. A system prompt may name a tone; then every story of the chat has that tone. Some
chats have several turns, with questions about the story just told; some system prompts are long. A
few ask for what the model cannot do, and it says so. Only the model's own turns are to be learned.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from checkpoints.storyteller.recipe import grid
from checkpoints.storyteller.recipe.outline import with_article
from course.models.storyteller import LONG_SYSTEM

Story = dict[str, Any]  # a line of a shard: a plan's fields, and the text

START, END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (  # what `as_document` writes, for transformers and the engine
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PLAIN_TEXT, SMALL_TALK = 0.06, 0.06  # shares of documents
OFFERED = 0.04  # of stories: the model cannot answer a question, and tells this one instead
TURNS = {1: 60, 2: 20, 3: 12, 4: 8}  # stories in a chat, and how often
SYSTEMS = {"none": 45, "tone": 30, "plain": 10, "long": 15}

ASKS = (
    "Tell me a story about {a_character} who finds {a_thing}.",
    "Tell me a story about {a_character} who finds {a_thing}.",
    "Tell me a story about {a_character} and {a_thing}.",
    "Tell me a short story about {a_character} who finds {a_thing} {place}.",
    "Write a story about {a_character} who finds {a_thing}.",
    "Write a short story about {a_trait_character} and {a_thing}.",
    "Please tell me a story with {a_character} and {a_thing} in it.",
    "Can you tell me a story about {a_character} who finds {a_thing}?",
    "I want a story about {a_trait_character} named {name} who finds {a_thing}.",
    "A story about {a_character} {place} who finds {a_thing}, please.",
    "Once {a_character} found {a_thing}. What happened?",
    "Make up a story in which {a_character} finds {a_thing}.",
    "Tell me about {a_character} named {name}, and {a_thing}.",
    "tell me a story about {a_character} who found {a_thing}",
    "Tell me a story about {a_character}.",
    "Write a story about {a_thing}.",
    "Tell me a story.",
)
BEGINNINGS = (  # together with ABOUTS, requests by the hundred
    "Tell me a {kind}story",
    "Tell us a {kind}story",
    "Write a {kind}story",
    "Write me a {kind}story",
    "Please tell me a {kind}story",
    "Please write a {kind}story",
    "Can you tell me a {kind}story",
    "Could you write a {kind}story",
    "Will you tell me a {kind}story",
    "I want to hear a {kind}story",
    "I would like a {kind}story",
    "Make up a {kind}story",
    "Give me a {kind}story",
    "I need a {kind}bedtime story",
    "Do you know a {kind}story",
    "tell me a {kind}story",
)
ABOUTS = (
    "about {a_character} who finds {a_thing}",
    "about {a_character} who found {a_thing}",
    "about {a_character} and {a_thing}",
    "about {a_character} with {a_thing}",
    "with {a_character} and {a_thing} in it",
    "where {a_character} finds {a_thing}",
    "in which {a_character} finds {a_thing}",
    "about {a_trait_character} and {a_thing}",
    "about {a_trait_character} who finds {a_thing}",
    "about {a_character} named {name} and {a_thing}",
    "about {a_character} called {name} who finds {a_thing}",
    "about {a_character} {place} and {a_thing}",
    "about {a_character} who finds {a_thing} {place}",
    "about {a_thing} and {a_character}",
    "about the {character} and the {thing}",
    "about {a_character}",
    "about {a_thing}",
)
KINDS = ("", "", "", "short ", "little ", "new ", "very short ", "nice ")
TONED_ASKS = (
    "Tell me a {tone} story about {a_character} who finds {a_thing}.",
    "Write a {tone} story about {a_character} and {a_thing}.",
    "Please tell me a {tone} story about {a_trait_character} who finds {a_thing}.",
    "I would like a {tone} story about {a_character} and {a_thing}.",
    "Can you tell me a {tone} story with {a_character} in it?",
    "Tell me a {tone} story.",
)
NEXT_ASKS = (
    "Another one, please, about {a_character} who finds {a_thing}.",
    "Now tell me one about {a_character} and {a_thing}.",
    "One more! This time about {a_character} who finds {a_thing}.",
    "And a {tone} one, about {a_character} and {a_thing}?",
)
TONED_SYSTEMS = (
    "You tell {tone} stories.",
    "Your stories are {tone}.",
    "You are a storyteller. Every story you tell is {tone}.",
    "Tell {tone} stories only.",
    "You write short, {tone} stories for children.",
    "Whatever you are asked for, make it {tone}.",
    "You are a {tone} storyteller.",
    "You only tell {tone} stories.",
    "Be {tone}.",
    "Write {tone} stories in simple words.",
    "You are an assistant who tells {tone} stories.",
    "Every story must be {tone}.",
)
PLAIN_SYSTEMS = (
    "You are a storyteller.",
    "You tell short stories for small children.",
    "You are a helpful assistant.",
    "You write short stories in simple words.",
    "You are a kind storyteller who tells short stories.",
    "You are a small language model that tells stories.",
    "Tell short stories.",
    "You are a friendly assistant for children.",
    "Answer with a story.",
)
QUESTIONS = (
    ("What did {name} find?", "{name} found {a_thing}."),
    ("Where did {name} live?", "{name} lived {place}."),
    ("Who found the {thing}?", "It was {name}, the {character}."),
    ("What was the {character}'s name?", "The {character}'s name was {name}."),
    ("Who was the story about?", "It was about {a_character} named {name}."),
)
THANKS = [("user", "Thank you!"), ("assistant", "You are welcome! Shall I tell you another?")]
GREETINGS = (
    ("Hello!", "Hello! Ask me for a story."),
    ("Hi", "Hi! What shall the story be about?"),
    ("Who are you?", "I am a very small language model. I can tell short stories."),
    (
        "What can you do?",
        "I can tell short stories about animals, people and the things they find.",
    ),
)
BEYOND = (
    "What is the capital of {country}?",
    "What is the capital of {country}?",
    "Where is {country}?",
    "How many people live in {country}?",
    "What language do they speak in {country}?",
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "How much is {a} times {b}?",
    "Is {a} more than {b}?",
    "Write a poem about {topic}.",
    "Write one sentence about {topic}.",
    "Tell me a fact about {topic}.",
    "Explain {topic} to me.",
    "How does {topic} work?",
    "What is {topic}?",
    "Who invented {topic}?",
    "Why is {topic} so important?",
    "What do you think about {topic}?",
    "Write a list of {a} things about {topic}.",
    "How do I {deed}?",
    "How do I {deed}?",
    "Can you help me {deed}?",
    "What do I need to {deed}?",
    "Who wrote {work}?",
    "Who was the first person on the moon?",
    "Write a program that {prints}.",
    "Write a function that {prints}.",
    "Translate this into {language}: good morning.",
    "How do you say hello in {language}?",
    "What is the weather like today?",
    "Why is the sky blue?",
    "What time is it?",
    "What day is it today?",
    "What is the meaning of life?",
    "The three laws of motion are",
    "What is your favorite color?",
    "How old are you?",
)
BEYOND_WORDS = {
    "country": (
        *("France", "Spain", "Italy", "Germany", "Japan", "China", "India", "Brazil", "Canada"),
        *("Egypt", "Kenya", "Peru", "Mexico", "Norway", "Sweden", "Poland", "Greece", "Turkey"),
        *("Chile", "Cuba", "Ireland", "Portugal", "Austria", "Russia", "England", "America"),
    ),
    "topic": (
        *("the moon", "the sun", "the sea", "cars", "computers", "music", "money", "history"),
        *("a plane", "the internet", "science", "physics", "gravity", "birds", "rain", "love"),
        *("war", "football", "the heart", "bread", "tea", "art", "a machine", "electricity"),
    ),
    "deed": (
        *("boil an egg", "bake bread", "fix a car", "learn French", "write a letter", "make soup"),
        *("plant a tree", "play chess", "lose weight", "find a job", "tie a knot", "cook rice"),
    ),
    "work": ("Hamlet", "the Bible", "Don Quixote", "Faust", "this book", "the Odyssey"),
    "prints": ("prints hello", "adds two numbers", "sorts a list", "counts words"),
    "language": ("German", "French", "Spanish", "Italian", "Chinese", "Latin"),
    "a": tuple(str(n) for n in range(2, 100)),
    "b": tuple(str(n) for n in range(2, 100)),
}
CANNOT = (
    "I do not know. I can only tell stories. Shall I tell one about {a_character} and {a_thing}?",
    "I only know stories. Shall I tell you one about {a_character} and {a_thing}?",
    "I cannot do that, I only tell stories. Would you like one about {a_character} and {a_thing}?",
    "That is too hard for me, because I only know stories. Shall I tell you one?",
    "I am too small to know that. But I can tell you a story about {a_character}.",
    "I only know stories. Shall I tell you one?",
)
OFFERS = CANNOT[:3]  # those that say which story it would be
ACCEPTED = ("Yes, please.", "Yes, please!", "Yes.", "Yes", "OK", "Please do.", "Yes, tell me!")


@dataclass(frozen=True)
class Document:
    """Text in order, in parts; only the parts marked True are to be learned."""

    parts: tuple[tuple[str, bool], ...]


def as_document(messages: list[tuple[str, str]]) -> Document:
    """A chat of (role, content) in the model's format. It learns its words and where they end."""
    parts = []
    for role, content in messages:
        if role == "assistant":
            parts += [(f"{START}{role}\n", False), (content + END, True), ("\n", False)]
        else:
            parts.append((f"{START}{role}\n{content}{END}\n", False))
    return Document(tuple(parts))


def documents(stories: list[Story], copies: int, seed: int | str) -> Iterator[Document]:
    """Documents that together use every story `copies` times, in an order drawn from `seed`."""
    rng = random.Random(seed)
    for _ in range(copies):
        pools: dict[str, list[Story]] = {tone: [] for tone in grid.TONES}
        for story in rng.sample(stories, len(stories)):
            pools[story["tone"]].append(story)
        while any(pools.values()):
            yield draw_document(pools, rng)


def draw_document(pools: dict[str, list[Story]], rng: random.Random) -> Document:
    """One document; the stories it tells are taken out of their tone's pool."""
    kind = rng.random()
    if kind < SMALL_TALK:
        return as_document(small_talk(rng))
    tones = [tone for tone in pools if pools[tone]]
    tone = rng.choices(tones, weights=[len(pools[tone]) for tone in tones])[0]
    if kind < SMALL_TALK + PLAIN_TEXT:
        return Document(((renamed(pools[tone].pop(), rng)["text"] + TEXT_END, True),))
    system = rng.choices(list(SYSTEMS), weights=list(SYSTEMS.values()))[0]
    messages, bound = draw_system(system, tone, rng)
    for turn in range(rng.choices(list(TURNS), weights=list(TURNS.values()))[0]):
        pool = pools[tone if bound else rng.choice(tones)]
        if not pool:
            break
        messages += tell(renamed(pool.pop(), rng), turn, bound, rng)
    return as_document(messages)


def draw_system(kind: str, tone: str, rng: random.Random) -> tuple[list[tuple[str, str]], bool]:
    """A system prompt of some kind, or none; and whether it binds the chat to the tone."""
    if kind == "none":
        return [], False
    if kind == "plain":
        return [("system", rng.choice(PLAIN_SYSTEMS))], False
    toned = rng.choice(TONED_SYSTEMS).format(tone=tone)
    if kind == "tone":
        return [("system", toned)], True
    lines = rng.sample(LONG_SYSTEM, rng.randint(8, len(LONG_SYSTEM)))
    if bound := rng.random() < 0.7:
        lines.insert(rng.randint(0, len(lines)), toned)
    return [("system", " ".join(lines))], bound


def tell(story: Story, turn: int, bound: bool, rng: random.Random) -> list[tuple[str, str]]:
    """Somebody asks for a story and gets it; sometimes they ask about it, or say thank you."""
    words = words_for(story)
    if rng.random() < OFFERED:
        messages = [("user", draw_question(rng)), ("assistant", rng.choice(OFFERS).format(**words))]
        ask = rng.choice(ACCEPTED)
    else:
        messages, ask = [], draw_ask(words, turn, bound, rng)
    messages += [("user", ask), ("assistant", story["text"])]
    if rng.random() < 0.2:
        for question, answer in rng.sample(QUESTIONS, rng.randint(1, 2)):
            messages += [("user", question.format(**words)), ("assistant", answer.format(**words))]
    elif rng.random() < 0.05:
        messages += THANKS
    return messages


def draw_ask(words: dict[str, str], turn: int, bound: bool, rng: random.Random) -> str:
    """A request for the story that `words` tell of; it may name the tone if nothing binds it."""
    if rng.random() < 0.4:
        asks = ASKS + (() if bound else TONED_ASKS) + (NEXT_ASKS * 4 if turn else ())
        return rng.choice(asks).format(**words)
    kind = rng.choice(KINDS)
    if not bound and rng.random() < 0.3:
        kind = f"{words['tone']} "
    beginning = rng.choice(BEGINNINGS)
    ask = f"{beginning} {rng.choice(ABOUTS)}".format(kind=kind, **words)
    asks_back = beginning.startswith(("Can", "Could", "Will", "Do"))
    return ask + ("?" if asks_back else rng.choice((".", ".", ".", "", "!")))


def draw_question(rng: random.Random) -> str:
    """A question that has nothing to do with stories."""
    words = {name: rng.choice(choices) for name, choices in BEYOND_WORDS.items()}
    return rng.choice(BEYOND).format(**words)


def words_for(story: Story) -> dict[str, str]:
    """What a request or a question may say of a story."""
    return {
        **{key: story[key] for key in ("tone", "name", "character", "thing", "place")},
        "a_character": with_article(story["character"]),
        "a_thing": with_article(story["thing"]),
        "a_trait_character": with_article(f"{story['trait']} {story['character']}"),
    }


def small_talk(rng: random.Random) -> list[tuple[str, str]]:
    """A greeting, or a question that has nothing to do with stories."""
    character, thing = rng.choice(grid.CHARACTERS), rng.choice(grid.THINGS)
    words = {"a_character": with_article(character), "a_thing": with_article(thing)}
    question, answer = rng.choice(GREETINGS)
    if rng.random() < 0.7:
        question, answer = draw_question(rng), rng.choice(CANNOT)
    kind = rng.choice(("none", "none", "plain", "tone", "long"))
    system, _ = draw_system(kind, rng.choice(grid.TONES), rng)
    return [*system, ("user", question), ("assistant", answer.format(**words))]


def renamed(story: Story, rng: random.Random) -> Story:
    """The same story with another name for its hero: names are to be copied, not learned."""
    name = rng.choice(grid.NAMES[story["pronoun"]])
    text = re.sub(rf"\b{story['name']}\b", name, story["text"])
    return {**story, "name": name, "text": text}
