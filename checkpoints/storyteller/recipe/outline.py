"""Outlines: a story's plan, beat by beat, with gaps that SmolLM2 is to fill.

A model of 135 million parameters finishes a sentence well and loses the thread of a story after
two. So the thread is ours: an outline gives the order of events and begins each sentence, and the
model ends those that hold a gap, written `...`. The outline is drawn by a story's number alone, so
that any story can be drawn again.
"""

import random
from dataclasses import dataclass

from checkpoints.storyteller.recipe import grid

GAP = "..."

OPENINGS = (
    "Once upon a time, {a_trait_character} named {name} lived {place}.",
    "Once upon a time, there was {a_trait_character} named {name}, who lived {place}.",
    "There was once {a_trait_character} called {name}. {He} lived {place}.",
    "{name} was {a_trait_character} who lived {place}.",
    "Long ago, {a_trait_character} named {name} lived {place}.",
    "{A_trait_character} named {name} lived {place}.",
    "Far away, {place}, there lived {a_trait_character}. {His} name was {name}.",
    "This is the story of {name}, {a_trait_character} who lived {place}.",
    "In a time long past, {a_trait_character} called {name} lived {place}.",
    "{A_trait_character} lived {place}. {His} name was {name}.",
    "There was {a_trait_character} {place} whose name was {name}.",
    "Not so long ago, {a_trait_character} named {name} lived {place}.",
)

HABITS = (
    "Every day, {he} liked to ...",
    "{name} loved to ...",
    "Every morning, {name} went out to ...",
    "{He} wanted to ...",
    "{He} lived with ...",
    "{He} was always ...",
    "In the evening, {he} often ...",
    "{He} was good at ...",
    "On warm days, {he} liked to ...",
    "{name} was known to everyone, because {he} ...",
    "Nobody knew that {name} could ...",
    "More than anything, {name} wished to ...",
    "",
    "",
    "",
    "",
)

DAYS = (
    "The sun was shining that day.",
    "It was a cold day, and the wind was blowing.",
    "The sky was gray, and it was quiet.",
    "It had rained all night.",
    "The birds were singing in the trees.",
    "It was early, and everybody was asleep.",
    "There was not much to do that day.",
    "It was the first day of spring.",
    *[""] * 8,
)

FINDINGS = (
    "One day, {name} found {a_thing} {spot}.",
    "One morning, {name} found {a_look_thing} {spot}.",
    "One day, {he} went for a walk and found {a_look_thing} {spot}.",
    "One afternoon, {name} saw something {spot}. It was {a_look_thing}!",
    "One day, {name} looked down and found {a_thing} {spot}.",
    "One evening, on the way home, {name} found {a_look_thing} {spot}.",
    "One day, when the sun was high, {name} found {a_thing} {spot}.",
    "Then, one day, {he} found {a_look_thing} {spot}.",
    "One day, after a storm, {name} found {a_thing} {spot}.",
    "One day, {name} was looking for lunch and found {a_look_thing} {spot}.",
    "One day, {name} almost fell over {a_look_thing} {spot}.",
    "One day, {name} heard a noise, looked around, and saw {a_look_thing} {spot}.",
    "Early one morning, {name} found {a_look_thing} {spot}.",
    "One day, {name} went out to play and found {a_thing} {spot}.",
)

REACTIONS = {
    "happy": (
        "{name} was so happy that {he} ...",
        "{He} picked up the {thing} and ...",
        "{name} smiled and thought about ...",
        '"What a lovely {thing}!" said {name}. "I will ...',
        "It was the most beautiful {thing} {he} had ever seen, and {he} ...",
        "{He} jumped for joy and ...",
        "{name} held the {thing} up to the sun and ...",
        '"I have always wanted {a_thing}!" said {name}, and {he} ...',
        "{name} took the {thing} home and ...",
        "{He} laughed out loud and ...",
        '"Now I can ...',
    ),
    "sad": (
        "But {name} was sad, because ...",
        "{He} picked up the {thing} and thought of ...",
        "It made {name} think of ...",
        "{name} wanted to show it to somebody, but ...",
        '"Who has lost this {thing}?" asked {name}. But nobody ...',
        "{He} looked at the {thing} and began to ...",
        "{name} held the {thing} close and ...",
        "It was broken, and {name} ...",
        '"I used to have {a_thing} like this," said {name}. {He} ...',
        "{He} sat down beside the {thing} and ...",
    ),
    "funny": (
        "{name} put the {thing} on {his} head and ...",
        "{He} sniffed the {thing}, sneezed, and ...",
        '"Hello, {thing}!" said {name}. "Do you ...',
        "{name} thought that it was something to eat, so {he} ...",
        '"Is this my lunch?" asked {name}. {He} took a bite and ...',
        "{He} tried to sit on the {thing}, but ...",
        "{name} kicked the {thing}, and it ...",
        "{He} looked at the {thing} from all sides and ...",
        '"Are you my brother?" {name} asked the {thing}. The {thing} ...',
        "{name} tied the {thing} to {his} foot and ...",
    ),
}

MEETINGS = {
    "happy": (
        'Then {a_friend} came along. "That is a nice {thing}," said the {friend}. "Can we ...',
        "{name} showed the {thing} to {a_friend}, and the {friend} ...",
        "On the way home, {name} met {a_friend} who ...",
        '{A_friend} came by and asked, "...',
        '"May I see it?" asked {a_friend}. {name} said yes, and together they ...',
        "{A_friend} heard {name} singing and came to ...",
        'Soon {name} met {a_friend}. "Look what I have found!" said {name}. "We can ...',
        "Then {name} saw {a_friend} who looked lonely, so {he} ...",
        '{A_friend} said, "I know what this {thing} is for! You can ...',
    ),
    "sad": (
        "{name} asked {a_friend} for help, but the {friend} ...",
        "Then the wind began to blow, and the {thing} ...",
        "{A_friend} came by, looked at the {thing}, and ...",
        '"That is mine," said {a_friend}. The {friend} ...',
        "That afternoon the rain came, and {name} ...",
        "The {thing} fell out of {his} hands and ...",
        '"You must give it back," said {a_friend}. {name} ...',
        "{name} went to show the {thing} to {a_friend}, but the {friend} ...",
        "On the way home, {name} tripped, and the {thing} ...",
    ),
    "funny": (
        'Just then {a_friend} walked by and laughed. "Why are you ...',
        'The {friend} next door looked at the {thing} and shouted, "...',
        'Suddenly {a_friend} jumped out and said, "...',
        "{A_friend} saw this and laughed so hard that ...",
        '"That is my {thing}!" cried {a_friend}. "I use it to ...',
        '{A_friend} looked at {name} and asked, "Is that {a_thing}, or ...',
        "{A_friend} thought that {name} was a monster and ...",
        '"I want that {thing}!" said {a_friend}. "I will give you ten potatoes." So {name} ...',
    ),
}

TURNS = {
    "happy": (
        "{name} gave the {thing} to the {friend}, and the {friend} ...",
        "They laughed and ...",
        "{name} had a good idea. {He} ...",
        "{name} and the {friend} took the {thing} and ...",
        "All afternoon, they ...",
        "Together, {name} and the {friend} ...",
        '"You can have half of it," said {name}, and the {friend} ...',
        "When evening came, {name} and the {friend} ...",
        "{name} and the {friend} put the {thing} on a big rock and ...",
    ),
    "sad": (
        "{name} looked everywhere, but ...",
        "In the evening, {name} sat alone and ...",
        "{He} tried to be brave, but ...",
        '"I wish I had a friend," said {name}, and {he} ...',
        "{name} tried to sing, but ...",
        "There was nothing {name} could do, so {he} ...",
        "Night came, and {name} ...",
        "A tear ran down {his} face, and {he} ...",
    ),
    "funny": (
        "{name} tried to run away, but ...",
        "Then {name} slipped and ...",
        "{He} jumped up, fell into the mud, and ...",
        "The {friend} pulled at the {thing}, {name} pulled too, and ...",
        "{name} danced around with the {thing} until ...",
        '"Watch this!" said {name}, and {he} ...',
        "{name} threw the {thing} up into the air, and it ...",
        "The {friend} put the {thing} on and ...",
    ),
}

ENDINGS = {
    "happy": (
        "From that day on, {name} and the {friend} were best friends.",
        "{name} went home with a big smile.",
        "It was the happiest day of {his} life.",
        "That night, {name} fell asleep with the {thing} beside {him}, and {he} smiled.",
        "And they all lived happily ever after.",
        "{name} and the {friend} played with the {thing} every day after that.",
        '"This is the best day ever!" said {name}, and everyone cheered.',
        "{name} was glad, because a friend is better than any {thing}.",
        "{name} laughed all the way home.",
        "What a good day it had been!",
        "{name} put the {thing} by the window, where the sun made it shine.",
        "And whenever {name} saw {a_thing}, {he} thought of that day and smiled.",
        '"Thank you," said the {friend}, and gave {name} a big hug.',
        "Everybody was happy, and {name} was the happiest of all.",
    ),
    "sad": (
        "{name} never saw the {thing} again.",
        "That night, {name} cried until {he} fell asleep.",
        "{He} walked home alone in the rain.",
        "{name} waited for a long time, but nobody came.",
        "The {thing} was gone, and {name} was alone again.",
        '"Goodbye," said {name} in a small, sad voice.',
        "{name} put the {thing} away and did not smile for many days.",
        "And {he} missed {his} old friend very much.",
        "{name} went to bed without a word.",
        "It was a long, cold night, and nobody came to say good night.",
        "{name} sat under a tree and watched the rain fall.",
        "After that, {name} did not play {place} any more.",
        '"I wish you were here," said {name}, but nobody could hear {him}.',
        "{He} looked back once, and then {he} walked away with {his} head down.",
    ),
    "funny": (
        "Everyone laughed, and {name} laughed the loudest.",
        "And that is why nobody gives {a_thing} to {a_character}.",
        "From then on, everyone called {him} the {thing} {character}.",
        '"Next time," said {name}, "I will find a sandwich."',
        "The {friend} laughed for three days.",
        "{name} looked very silly, but {he} did not mind at all.",
        "{name} bowed, and fell right over again.",
        '"I meant to do that," said {name}.',
        "The {friend} is still laughing about it today.",
        "And {name} never took off the {thing} again, not even in the bath.",
        '"Well," said {name}, "at least nobody saw me." But everybody had.',
        "{name} turned as red as a tomato and hid behind a tree.",
        "The next day, everyone wanted {a_thing} just like it.",
        '"Who put this {thing} here?" asked {name}, and sat down in the mud.',
    ),
}


@dataclass(frozen=True)
class Plan:
    """One story before it is written: who, what, where, in which tone, and its beats."""

    number: int
    tone: str
    name: str
    pronoun: str  # "he" or "she"
    trait: str
    character: str
    thing: str
    place: str
    friend: str  # another character
    beats: tuple[str, ...]  # sentences in order; one that ends in GAP is to be finished


def draw_plan(number: int, seed: int = 0) -> Plan:
    """The plan of story `number`: always the same one for the same number and seed."""
    rng = random.Random(f"{seed}/{number}")
    tone = grid.TONES[number % len(grid.TONES)]
    character, friend = rng.sample(grid.CHARACTERS, 2)
    pronoun = draw_pronoun(character, rng)
    drawn = {
        "name": rng.choice(grid.NAMES[pronoun]),
        "trait": rng.choice(grid.TRAITS),
        "thing": rng.choice(grid.THINGS),
        "place": rng.choice(grid.PLACES),
        "character": character,
        "friend": friend,
    }
    words = spell_out(drawn, pronoun, rng.choice(grid.SPOTS), rng.choice(grid.LOOKS))
    parts = (
        OPENINGS,
        HABITS,
        DAYS,
        FINDINGS,
        REACTIONS[tone],
        MEETINGS[tone],
        TURNS[tone],
        ENDINGS[tone],
    )
    beats = tuple(rng.choice(part).format(**words) for part in parts)
    return Plan(number, tone, pronoun=pronoun, beats=tuple(filter(None, beats)), **drawn)


def draw_pronoun(character: str, rng: random.Random) -> str:
    """A king is a he; a fox may be either."""
    if character in grid.ONLY_HE:
        return "he"
    return "she" if character in grid.ONLY_SHE else rng.choice(("he", "she"))


def spell_out(drawn: dict[str, str], pronoun: str, spot: str, look: str) -> dict[str, str]:
    """Every word that a beat may ask for, with its article or in its case."""
    he, him, his = ("he", "him", "his") if pronoun == "he" else ("she", "her", "her")
    trait_character = f"{drawn['trait']} {drawn['character']}"
    words = {
        **drawn,
        "spot": spot,
        "he": he,
        "him": him,
        "his": his,
        "a_trait_character": with_article(trait_character),
        "a_character": with_article(drawn["character"]),
        "a_thing": with_article(drawn["thing"]),
        "a_look_thing": with_article(f"{look} {drawn['thing']}"),
        "a_friend": with_article(drawn["friend"]),
    }
    raised = {name.capitalize(): words[name].capitalize() for name in ("he", "him", "his")}
    for name in ("a_trait_character", "a_friend"):
        raised[name.capitalize()] = words[name][0].upper() + words[name][1:]
    return words | raised


def with_article(words: str) -> str:
    """-> . Of our words none begins with a vowel that does not sound like one."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
