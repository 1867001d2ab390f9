"""Check the links of every Markdown file and notebook of the repository.

    python -m authoring.links              relative links and anchors, without a network
    python -m authoring.links --external   links to other sites; each is fetched

A relative link has to lead to a file. An anchor has to name a heading of its page, an HTML `id`, or
a line of a file of code (`#L12`). The command prints one line for each broken link, and its exit
status is 1 if there is any.
"""

import argparse
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from course.clone import ROOT

# Folders that hold no page of this repository; a folder whose name begins with a dot is one, too.
NOT_OURS = {"build", "dist", "fetch", "wheelhouse", "gpu-results"}
EXTERNAL = re.compile(r"https?://", re.IGNORECASE)
OTHER_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.IGNORECASE)
LINES = re.compile(r"L(\d+)(?:-L(\d+))?")
DEAD = {404, 410}  # other errors, like 403 and 429, say that a site refuses programs
TRIES, SECONDS = 3, 20


class Elements(HTMLParser):
    """The start tags of some HTML, as (name, attributes)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def pages(root: Path = ROOT) -> list[Path]:
    """Every Markdown file and notebook below `root` that is part of the repository."""
    return sorted(path for path in below(root) if path.suffix in (".md", ".ipynb"))


def below(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            hidden = path.name.startswith(".") and path.name != ".github"
            if not hidden and path.name not in NOT_OURS:
                yield from below(path)
        elif ".mine-" not in path.name:  # a page that `course reset` put aside
            yield path


def elements(path: Path) -> list[tuple[str, dict[str, str | None]]]:
    """The HTML elements of a page as a reader sees it, with an id for each heading."""
    from markdown_it import MarkdownIt
    from mdit_py_plugins.anchors import anchors_plugin

    markdown, html = parts(path)
    # JupyterLab keeps the case and the punctuation of a heading, and GitHub's Markdown does not.
    slug = (lambda title: title.replace(" ", "-")) if path.suffix == ".ipynb" else None
    parser = MarkdownIt("commonmark").enable("table")
    parser.use(anchors_plugin, max_level=6, slug_func=slug)
    return Elements(parser.render(markdown) + html).found


def parts(path: Path) -> tuple[str, str]:
    """Return what a page holds as Markdown, and the HTML of a notebook's outputs."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8"), ""
    import nbformat

    cells = nbformat.read(path, as_version=4).cells
    outputs = [o.get("data", {}) for cell in cells for o in cell.get("outputs", [])]
    markdown = [cell.source for cell in cells if cell.cell_type == "markdown"]
    markdown += [data.get("text/markdown", "") for data in outputs]
    return "\n\n".join(markdown), "\n".join(data.get("text/html", "") for data in outputs)


def links(path: Path) -> list[str]:
    """The targets of a page's links and pictures, in the order of the page."""
    wanted = {"a": "href", "img": "src"}
    found = (attributes.get(wanted.get(tag, "")) for tag, attributes in elements(path))
    return [link for link in found if link]


def anchors(path: Path) -> set[str | None]:
    """What a link to this page may name after its #."""
    named = (attributes.get(key) for _, attributes in elements(path) for key in ("id", "name"))
    return {"top", *named}  # a browser scrolls to the top of any page


def problem(link: str, page: Path) -> str | None:
    """Say what is wrong with a relative link of `page`; None if it leads somewhere."""
    if OTHER_SCHEME.match(link):
        return None
    name, _, anchor = unquote(link).partition("#")
    target = (page.parent / name).resolve() if name else page
    if not target.exists():
        return f"the link to {link} leads nowhere"
    if not anchor:
        return None
    if target.suffix in (".md", ".ipynb"):
        if anchor in anchors(target):
            return None
        return f"the link to {link} names no heading of {target.name}"
    if target.is_file() and (lines := LINES.fullmatch(anchor)):
        last = len(target.read_text(encoding="utf-8").splitlines())
        if max(int(number) for number in lines.groups() if number) <= last:
            return None
        return f"the link to {link} names a line after the last one, which is {last}"
    return f"the link to {link} has an anchor, but {target.name} is no page"


def broken_links(page: Path) -> list[str]:
    return [found for link in links(page) if (found := problem(link, page))]


def broken_external_links(found: Iterable[Path]) -> list[str]:
    """Fetch every link to another site once, and name the pages of those that are dead."""
    pages_of: dict[str, list[Path]] = {}
    for page in found:
        for link in links(page):
            if EXTERNAL.match(link):
                pages_of.setdefault(link.partition("#")[0], []).append(page)
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(answer_of, pages_of)
    return [
        f"{', '.join(sorted({page.name for page in pages_of[link]}))}: {link}: {answer}"
        for link, answer in zip(pages_of, answers, strict=True)
        if answer
    ]


def answer_of(link: str) -> str | None:
    """Return why a link is dead; None if a page answers, or refuses to answer a program."""
    request = urllib.request.Request(link, headers={"User-Agent": "Mozilla/5.0 (link check)"})
    reason = ""
    for attempt in range(TRIES):
        time.sleep(attempt)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS):
                return None
        except urllib.error.HTTPError as error:
            if error.code in DEAD:
                return f"status {error.code}"
            if error.code < 500:
                return None
            reason = f"status {error.code}"
        except OSError as error:  # no such host, no connection, no answer in time
            reason = str(error)
    return f"{reason}, {TRIES} times"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--external", action="store_true", help="fetch links to other sites")
    if parser.parse_args(arguments).external:
        found = broken_external_links(pages())
    else:
        broken = {page.relative_to(ROOT): broken_links(page) for page in pages()}
        found = [f"{page}: {text}" for page, texts in broken.items() for text in texts]
    print("\n".join(found) or f"The links of {len(pages())} pages lead somewhere.")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
