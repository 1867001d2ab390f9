"""Every term of the glossary is really in the lesson it names."""

import re

import pytest

from course.clone import ROOT
from course.lessons import FILES_OF_LESSON

ROW = re.compile(r"^\| ([^|]+) \| ([^|]+) \| (\d\d) \|$", re.MULTILINE)
TERMS = ROW.findall((ROOT / "course" / "GLOSSARY.md").read_text(encoding="utf-8"))
SOURCES = {path.stem[:2]: path for path in (ROOT / "notebooks" / "source").glob("[0-9]*.py")}
WRITTEN = [term for term in TERMS if term[2] in SOURCES]  # a lesson to come cannot be looked up


def prose(number: str) -> str:
    """A lesson's markdown on one line, without emphasis, in lower case."""
    lines = SOURCES[number].read_text(encoding="utf-8").splitlines()
    text = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    return re.sub(r"[*_`]", "", text).lower()


@pytest.mark.parametrize(("term", "meaning", "number"), WRITTEN, ids=[term[0] for term in WRITTEN])
def test_the_term_stands_in_its_lesson(term, meaning, number):
    assert re.search(rf"\b{re.escape(term.lower())}", prose(number)), (
        f"lesson {number} never says {term!r}: name the lesson that explains it"
    )
    assert len(meaning.split()) <= 45, f"{term}: one or two sentences"


def test_every_lesson_has_terms_and_no_term_stands_twice():
    names = [term[0].lower() for term in TERMS]
    assert len(names) == len(set(names))
    assert len(names) >= 40
    counted = {
        lesson[:2]: sum(term[2] == lesson[:2] for term in TERMS) for lesson in FILES_OF_LESSON
    }
    assert min(counted.values()) >= 2, counted
