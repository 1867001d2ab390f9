"""Which sentences and which stories are kept. Each filter answers with a reason, or None.

SmolLM2 writes many good sentences and some that ramble, repeat themselves, bring in people nobody
has met, or turn a sad story glad. The filters look for that, by rules that a reader can check. The
same rules, less strict, later judge what the trained model writes.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

from checkpoints.storyteller.recipe.grid import words as listed
from checkpoints.storyteller.recipe.outline import Plan

WORDS = (1, 14)  # of one completion
STORY_WORDS = (40, 160)
ALLOWED = re.compile(r"[A-Za-z ,.!?'\";:-]+")
WORD = re.compile(r"[a-z']+")
HE, SHE = set(listed("he him his himself")), set(listed("she her hers herself"))
UNWANTED = {
    *listed("bathroom bed blood body business dead death die died drug god gun hell human humans"),
    *listed("job kill killed market mommy money naked owner sex stupid suicide ugly war wine beer"),
    *listed("married marriage story stories character chapter kids app computer internet website"),
    *listed("phone social wife husband"),
    # What a small child cannot picture: the thread gets lost in these.
    *listed("life lives world difference opportunity important impossible creation talent talents"),
    *listed("success culture society community experience challenge challenges purpose problem"),
    *listed("continued realized pondering secret situation thing"),
}
GLAD = {
    *listed("happy happily smile smiled smiling laugh laughed laughing glad joy excited fun funny"),
}
SAD = set(listed("sad sadly cry cried crying tears tear lonely alone lost die died grief"))
MISFITS = {"happy": SAD, "sad": GLAD, "funny": {"died", "grief", "lonely"}}
LITTLE_WORDS = {
    *listed(
        "a an and at be but by for from had he her him his i in is it of on or she so that the"
    ),
    *listed("their them they to very was were with you not no did do said"),
}


def words_of(text: str) -> list[str]:
    """The words in order, in lower case."""
    return WORD.findall(text.lower())


def runs_of(words: Sequence[str], length: int) -> set[tuple[str, ...]]:
    """Every run of `length` words."""
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


# -- one sentence's end --------------------------------------------------------------------------


def completion_problem(completion: str, before: str, plan: Plan) -> str | None:
    """What is wrong with the end that the model gave to the sentence that `before` ends with."""
    words = words_of(completion)
    if not WORDS[0] <= len(words) <= WORDS[1]:
        return "length"
    if not ALLOWED.fullmatch(completion) or completion[-1] not in ".!?\"'":
        return "characters"
    if before[-1].isalpha() != completion.startswith(" "):
        return "joint"  # the model went on in the middle of a word, or with a comma
    if UNWANTED.intersection(words) or MISFITS[plan.tone].intersection(words):
        return "words"
    if (SHE if plan.pronoun == "he" else HE).intersection(words):
        return "pronoun"
    if plan.name.lower() in words and '"' not in completion:
        return "name again"  # "thought of her friend Olive", of Olive
    if has_stranger(completion, plan.name):
        return "stranger"
    if f" {plan.thing}" not in before and {plan.thing, "day", "morning"}.intersection(words):
        return "too early"  # the thing is yet to be found, one day
    return repetition_problem(words, words_of(before))


def has_stranger(completion: str, name: str) -> bool:
    """Whether a word inside a sentence has a capital, and is neither `I` nor our name."""
    inner = re.findall(r"(?<![.!?\"] )(?<![\"'])\b[A-Z][a-z]*", " " + completion.lstrip('"'))
    return any(word not in ("I", name) for word in inner)


def repetition_problem(words: list[str], before: list[str]) -> str | None:
    """Whether a sentence's end repeats itself, or what was said before."""
    content = [word for word in before[-2:] + words if word not in LITTLE_WORDS]
    if any(content.count(word) > 1 for word in content):
        return "repeats a word"
    if len(words) >= 3 and any(a == b for a, b in pairwise(words)):
        return "repeats a word"
    joined = before[-3:] + words
    if runs_of(joined, 4) & runs_of(before, 4):
        return "repeats the story"
    return None


# -- a whole story -------------------------------------------------------------------------------


def story_problem(text: str, character: str, thing: str, finished: bool = True) -> str | None:
    """What is wrong with a story that was to be about `character` and `thing`."""
    words = words_of(text)
    if not finished or not text.rstrip().endswith((".", "!", "?", '"')):
        return "not ended"
    if not STORY_WORDS[0] <= len(words) <= STORY_WORDS[1]:
        return "length"
    if character not in words:
        return "character"
    if thing not in words:
        return "thing"
    if text.count('"') % 2:
        return "quotes"
    sentences = [s.strip() for s in re.split(r"[.!?]", text) if len(words_of(s)) > 2]
    if len(set(sentences)) < len(sentences):
        return "repeats a sentence"
    return None


def tone_of(text: str) -> str | None:
    """The tone a story's words speak for: "happy", "sad", or None where neither prevails."""
    words = words_of(text)
    glad, sad = sum(w in GLAD for w in words), sum(w in SAD for w in words)
    return None if glad == sad else "happy" if glad > sad else "sad"
