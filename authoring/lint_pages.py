"""Lints of what a reader sees: pictures have alt text and are local, links lead somewhere,
and no output tells whose machine it was made on."""

import getpass
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from authoring.links import Elements, problem

Notebook = Any
Found = Iterator[tuple[int | None, str]]

MARKDOWN_IMAGE = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<src>[^)\s]+)")
IMAGE_BY_REFERENCE = re.compile(r"!\[[^\]]*\](?!\()")
STYLE_URL = re.compile(r"(?:url\(\s*|@import\s+)['\"]?([^)'\"\s;]+)")
MARKDOWN_LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<href>[^)\s]+)")
GITHUB_SOURCE = re.compile(r"https?://github\.com/[\w.-]+/[\w.-]+/(?:blob|tree|raw)/([^/\s)#]+)")
RELEASE_TAG = re.compile(r"v?\d+(\.\d+)+\S*")
REMOTE = re.compile(r"(?:[a-z]+:)?//", re.IGNORECASE)
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<~-])/(?!/)[\w.-]+/[\w.~-]+(?:/[\w.~-]*)*|\b[A-Za-z]:\\\w+")
COMMON_NAMES = {"root", "user", "runner", "ubuntu", "jovyan", "localhost", "admin"}
PICTURES = ("image/png", "image/jpeg", "image/gif", "image/svg+xml")
WIDGET = "application/vnd.jupyter.widget-view+json"


def pages(notebook: Notebook) -> Iterator[tuple[int, str]]:
    """Everything that is shown as HTML: markdown cells and HTML outputs.

    HTML is no markdown: `norms[0](query)` in code that is shown is not a link.
    """
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            yield index, without_code(cell.source)
        for output in cell.get("outputs", []):
            for kind in ("text/html", "text/markdown"):
                if kind in output.get("data", {}):
                    page = output.data[kind]
                    yield index, page.replace("](", "] (") if kind == "text/html" else page


def without_code(markdown: str) -> str:
    """Markdown with its code blocks and code spans blanked: nothing in them is a link."""
    return re.sub(r"```.*?```|`[^`\n]+`", " ", markdown, flags=re.DOTALL)


def lint_alt_text(notebook: Notebook, path: Path) -> Found:
    for index, page in pages(notebook):
        for image in MARKDOWN_IMAGE.finditer(page):
            if not image["alt"].strip():
                yield index, f"the image {image['src']} has no alt text"
        for tag, attributes in Elements(page).found:
            if tag == "img" and not (attributes.get("alt") or "").strip():
                yield index, "an <img> has no alt text"
            if tag == "svg" and not (attributes.get("aria-label") or "").strip():
                yield index, "an inline <svg> has no aria-label; course.show.display.show gives one"
    for index, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            for kind in set(PICTURES) & set(output.get("data", {})):
                yield (
                    index,
                    f"shows an {kind} without alt text: course.show.display.show(figure, alt)",
                )
            if WIDGET in output.get("data", {}):
                yield index, "a live widget is empty in a stored page: course.show.display.steps"


def lint_images_are_local(notebook: Notebook, path: Path) -> Found:
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            for image in IMAGE_BY_REFERENCE.findall(without_code(cell.source)):
                yield index, f"{image} is an image by reference: write ![what it shows](file)"
    for index, page in pages(notebook):
        sources = [image["src"] for image in MARKDOWN_IMAGE.finditer(page)]
        for tag, attributes in Elements(page).found:
            if tag in ("img", "script", "iframe", "source", "video", "link", "object", "image"):
                sources += [attributes.get(key) or "" for key in ("src", "href", "data")]
                sources += re.findall(r"[^\s,]\S*[/.]\S*", attributes.get("srcset") or "")
            sources += STYLE_URL.findall(attributes.get("style") or "")
        for style in re.findall(r"<style.*?</style>", page, flags=re.DOTALL | re.IGNORECASE):
            sources += STYLE_URL.findall(style)
        for source in filter(None, sources):
            if REMOTE.match(source):
                yield index, f"loads {source} from another machine"
            elif not source.startswith("data:") and not (path.parent / source).is_file():
                yield index, f"there is no file {source}"


def lint_links(notebook: Notebook, path: Path) -> Found:
    for index, page in pages(notebook):
        links = [link["href"] for link in MARKDOWN_LINK.finditer(page)]
        links += [a.get("href") or "" for tag, a in Elements(page).found if tag == "a"]
        for link in links:
            if found := problem(link, path):
                yield index, found
        for reference in GITHUB_SOURCE.findall(page):
            if not RELEASE_TAG.fullmatch(reference):
                yield index, f"a link to GitHub source at {reference!r}: pin a release's tag"


def lint_privacy(notebook: Notebook, path: Path) -> Found:
    """No folder, host or user of the machine that made the outputs."""
    names = {socket.gethostname(), getpass.getuser()} - COMMON_NAMES
    names = {name for name in names if len(name) > 3}
    for index, cell in enumerate(notebook.cells):
        for text in output_texts(cell):
            if found := ABSOLUTE_PATH.search(text):
                yield index, f"an output holds the absolute path {found[0]}"
            for name in names:
                if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text):
                    yield index, f"an output holds the host or user name {name!r}"


def output_texts(cell: Any) -> Iterator[str]:
    """What the outputs say, without the tags and the pictures inside an HTML page."""
    for output in cell.get("outputs", []):
        yield output.get("text", "")
        yield "\n".join([output.get("evalue", ""), *output.get("traceback", [])])
        for kind, data in output.get("data", {}).items():
            if kind.startswith("text/"):
                yield re.sub(r"</|\bdata:[^\"']+|<script>.*?</script>", " ", data, flags=re.DOTALL)


PAGE_LINTS: list[Callable[[Notebook, Path], Found]] = [
    lint_alt_text,
    lint_images_are_local,
    lint_links,
    lint_privacy,
]
