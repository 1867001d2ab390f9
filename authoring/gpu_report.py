"""Reports of pytest in JUnit's XML, as a text to keep: what ran where, what did not, and why.

    python -m authoring.gpu_report gpu-results/*.xml > figures/data/h200_tests.txt

Each file is the result of one part of the GPU's tests, as authoring.gpu_tests writes it: its root
also says on which machine the part ran, how many seconds it took, and with which code pytest ended.
`python -m authoring.gpu_tests report` is this report over all parts, and names those that
did not run.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

ENDS = ("passed", "failed", "skipped")
MEANINGS = {0: "passed", 1: "FAILED", 2: "STOPPED BEFORE ITS END", 5: "FOUND NO TESTS"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.xml")
    return show(parser.parse_args(arguments).files)


def show(files: Sequence[Path]) -> int:
    """Print the report of all parts. Returns 0 if every file is there and its part passed, else 1.

    A missing file is a part that has not run.
    """
    parts = {file.stem: result(file) for file in files}
    roots = [root for root in parts.values() if root is not None]
    for here in dict.fromkeys(root.get("machine") for root in roots):
        print(here)
    cases = [case for root in roots for case in root.iter("testcase")]
    for line in summary([case for case in cases if case.get("name")]):  # the stopped one has none
        print(line)
    for name, root in parts.items():
        print(line_of_part(name, root))
    return int(any(root is None or root.get("exit") != "0" for root in parts.values()))


def result(file: Path) -> Element | None:
    """The root of a part's file, or None if there is no file."""
    if not file.exists():
        return None
    root = ElementTree.parse(file).getroot()
    if not {"machine", "seconds", "exit"} <= set(root.attrib):
        raise ValueError(f"{file} is not a result that authoring.gpu_tests has kept")
    return root


def line_of_part(name: str, root: Element | None) -> str:
    """How a part ended and how long it took."""
    if root is None:
        return f"{'':10}  part {name}: HAS NOT RUN"
    seconds, code = float(root.attrib["seconds"]), int(root.attrib["exit"])
    return f"{seconds:8.1f} s  part {name}: {meaning(code)}"


def meaning(code: int) -> str:
    """What pytest's exit code says; a negative one is the signal that killed it."""
    return MEANINGS.get(code, f"BROKE OFF (exit code {code})")


def end_of(case: Element) -> str:
    """How a test case ended: one of ENDS."""
    children = {child.tag for child in case} - {"system-out", "system-err", "properties"}
    return "failed" if children & {"failure", "error"} else "skipped" if children else "passed"


def summary(cases: list[Element]) -> Iterator[str]:
    """A line for each file of tests or lesson, for each reason to skip, for each failure."""
    groups: dict[str, list[Element]] = defaultdict(list)
    for case in cases:
        name = case.get("classname") or case.get("name", "")  # a skipped file has no class name
        groups[name].append(case)
    yield from (line_of(name, group) for name, group in groups.items())
    yield line_of("in all", cases)
    reasons = Counter(reason.get("message") for case in cases for reason in case.iter("skipped"))
    yield from (f"skipped {count}: {reason}" for reason, count in reasons.most_common())
    for case in cases:
        if end_of(case) == "failed":
            yield f"FAILED {case.get('classname')}: {case.get('name')}"


def line_of(name: str, cases: list[Element]) -> str:
    counts = Counter(map(end_of, cases))
    found = ", ".join(f"{counts[end]} {end}" for end in ENDS if counts[end])
    return f"{sum(float(case.get('time', 0)) for case in cases):8.1f} s  {name}: {found}"


if __name__ == "__main__":
    sys.exit(main())
