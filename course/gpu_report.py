"""Reports of pytest in JUnit's XML, as a text to keep: what ran where, what did not, and why.

    python -m course.gpu_report gpu-tests.xml gpu-notebooks.xml > figures/data/h200_tests.txt

Several files may be parts of one run. Run it where the tests ran: it names this machine.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element as Case

from course import machine

ENDS = ("passed", "failed", "skipped")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.xml")
    files = parser.parse_args(arguments).files
    used = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
    print(f"{machine.describe()}; {used}")
    cases = [case for file in files for case in ElementTree.parse(file).iter("testcase")]
    for line in summary(cases):
        print(line)
    return int(any(end_of(case) == "failed" for case in cases))


def end_of(case: Case) -> str:
    """How a test case ended: one of ENDS."""
    children = {child.tag for child in case} - {"system-out", "system-err", "properties"}
    return "failed" if children & {"failure", "error"} else "skipped" if children else "passed"


def summary(cases: list[Case]) -> Iterator[str]:
    """A line for each file of tests or lesson, for each reason to skip, for each failure."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.get("classname") or case.get("name", "")].append(
            case
        )  # a skipped file has none
    yield from (line_of(name, group) for name, group in groups.items())
    yield line_of("in all", cases)
    reasons = Counter(reason.get("message") for case in cases for reason in case.iter("skipped"))
    yield from (f"skipped {count}: {reason}" for reason, count in reasons.most_common())
    for case in cases:
        if end_of(case) == "failed":
            yield f"FAILED {case.get('classname')}: {case.get('name')}"


def line_of(name: str, cases: list[Case]) -> str:
    counts = Counter(map(end_of, cases))
    found = ", ".join(f"{counts[end]} {end}" for end in ENDS if counts[end])
    return f"{sum(float(case.get('time', 0)) for case in cases):8.1f} s  {name}: {found}"


if __name__ == "__main__":
    sys.exit(main())
