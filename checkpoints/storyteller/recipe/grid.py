"""What stories are about: characters, things, places, names. Plain words, one a token or two."""

import zlib

HELD_OUT_EVERY = 50


def words(*lines: str) -> tuple[str, ...]:
    """The words of some lines."""
    return tuple(" ".join(lines).split())


CHARACTERS = words(
    "fox bear rabbit mouse cat dog owl frog duck hen pig goat horse lion tiger elephant",
    "monkey turtle squirrel hedgehog wolf deer penguin sheep cow donkey crow sparrow snail",
    "bee dragon robot boy girl king queen prince princess farmer baker sailor witch wizard",
    "giant knight pirate teacher clown",
)

THINGS = words(
    "key lamp ball book hat box bell boat map coin kite drum ring stone shell mirror flower",
    "seed egg feather apple cake cookie pumpkin balloon umbrella blanket boot sock spoon cup",
    "candle clock letter basket ladder rope whistle flute crown button acorn leaf scarf",
    "lantern chest doll wagon puzzle bone pear carrot pencil bucket pillow",
)

PLACES = (
    "in the forest",
    "by the river",
    "on a hill",
    "in a garden",
    "at the beach",
    "on a farm",
    "in a cave",
    "in a village",
    "at the market",
    "in the snow",
    "near a lake",
    "in an old house",
    "in the park",
    "in a castle",
    "in a barn",
    "in a meadow",
    "on a mountain",
    "by the sea",
    "in a small town",
    "near a bridge",
    "in the desert",
    "on an island",
)

SPOTS = (
    "in the grass",
    "under a bush",
    "behind a rock",
    "on the path",
    "in the mud",
    "beside a tree",
    "in a hole",
    "under a leaf",
    "by the road",
    "near a wall",
    "under an old bench",
    "on a tree stump",
)

TRAITS = words(
    "little brave shy curious hungry kind clever lonely lazy old young proud gentle noisy",
    "quiet tired",
)

LOOKS = words("small big old shiny red blue green yellow golden strange pretty dusty tiny new")

NAMES = {
    "he": words(
        "Finn Tom Ben Max Oscar Sam Leo Jack Hugo Otto Bill Gus Toby Henry Fred Felix Milo Paul",
        "Rufus Theo Alfie Basil Ned Pip",
    ),
    "she": words(
        "Mia Rosie Lily Nora Ruby Daisy Emma Anna Clara Ella Greta Holly Ivy Jane Lucy Molly Nell",
        "Olive Penny Poppy Sally Tess Wendy Zoe",
    ),
}

ONLY_HE = ("boy", "king", "prince", "wizard")
ONLY_SHE = ("hen", "girl", "queen", "princess", "witch", "cow")
TONES = ("happy", "sad", "funny")


def is_held_out(character: str, thing: str) -> bool:
    """Whether stories of this character with this thing are kept from training: a pair in fifty."""
    return zlib.crc32(f"{character} {thing}".encode()) % HELD_OUT_EVERY == 0
