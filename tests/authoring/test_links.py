"""Every relative link and anchor of the documents and notebooks leads somewhere."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from planted import good_notebook, write

from authoring import links
from authoring.lints import lint

PAGES = links.pages()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(links.ROOT)))
def test_the_links_of_a_page_lead_somewhere(page):
    assert links.broken_links(page) == []


def test_the_pages_are_the_documents_and_the_notebooks():
    names = {str(page.relative_to(links.ROOT)) for page in PAGES}
    assert {"README.md", "docs/vllm_api.md", "notebooks/00_tour.ipynb"} <= names
    assert sum(len(links.links(page)) for page in PAGES) > 100


FOLDER = {
    "other.md": "# Two words, and `code`\n\n## Same\n\n## Same\n\n<a name='mark'></a>\n",
    "code.py": "one\ntwo\n",
    "with space.md": "# Title\n",
}
GOOD = [
    "other.md",
    "other.md#two-words-and-code",
    "other.md#same-1",
    "other.md#mark",
    "with%20space.md#title",
    "code.py#L2",
    "code.py#L1-L2",
    "#here",
    "#top",
    ".",
    "mailto:ann@example.org",
    "https://example.org/#nothing",
]
BROKEN = {
    "missing.md": "leads nowhere",
    "missing.md#here": "leads nowhere",
    "other.md#Same": "names no heading of other.md",
    "other.md#same-2": "names no heading of other.md",
    "#gone": "names no heading of page.md",
    "code.py#L3": "names a line after the last one, which is 2",
    "code.py#L1-L3": "names a line after the last one, which is 2",
    "code.py#main": "has an anchor, but code.py is no page",
}


@pytest.fixture
def folder(tmp_path):
    for name, text in FOLDER.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("form", ["[it]({})", "[it][1]\n\n[1]: {}", "<a href='{}'>it</a>"])
@pytest.mark.parametrize("link", [*GOOD, *BROKEN])
def test_a_link_is_broken_where_its_file_or_its_anchor_is_missing(link, form, folder):
    page = folder / "page.md"
    page.write_text(f"# Here\n\n{form.format(link)}\n")
    found = links.broken_links(page)
    assert len(found) == (link in BROKEN)
    assert all(f"the link to {link} {BROKEN[link]}" == text for text in found)


def test_a_picture_is_a_link_and_code_is_none(folder):
    page = folder / "page.md"
    page.write_text("![a map](map.svg)\n\n`[code](gone.md)`\n\n```\n[code](gone.md)\n```\n")
    assert links.broken_links(page) == ["the link to map.svg leads nowhere"]


def test_a_heading_of_a_notebook_keeps_its_case_as_in_jupyterlab(tmp_path):
    notebook = good_notebook()
    notebook.cells[1].source += "\n\n## Step 1: *look*\n\n[good](#Step-1:-look) [bad](#step-1-look)"
    page = write(notebook, tmp_path)
    assert links.broken_links(page) == ["the link to #step-1-look names no heading of " + page.name]
    assert any("cell 1 (" in text and "#step-1-look" in text for text in lint(page))


def test_pages_of_other_folders_and_put_aside_pages_are_left_out(tmp_path):
    for name in (".venv/a.md", "wheelhouse/b.md", "c.mine-1.ipynb", "d.txt", ".github/e.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert links.pages(tmp_path) == [tmp_path / ".github/e.md"]


class Site(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(int(self.path[1:4]))
        self.end_headers()

    def log_message(self, *_):
        """Print nothing."""


@pytest.fixture
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_dead_external_links_are_named_with_their_pages(site, folder, monkeypatch):
    monkeypatch.setattr(links.time, "sleep", lambda _: None)
    codes = {"200#part": "", "403": "", "404": "status 404", "503": "status 503, 3 times"}
    for name in ("a.md", "b.md"):
        (folder / name).write_text(" ".join(f"[it]({site}/{code})" for code in codes))
    found = links.broken_external_links([folder / "a.md", folder / "b.md"])
    assert found == [
        f"a.md, b.md: {site}/404: status 404",
        f"a.md, b.md: {site}/503: status 503, 3 times",
    ]


def test_a_site_without_an_answer_is_dead(monkeypatch):
    monkeypatch.setattr(links.time, "sleep", lambda _: None)
    assert "refused" in links.answer_of("http://127.0.0.1:1/")


def test_the_command_fails_where_a_link_is_broken(folder, monkeypatch, capsys):
    page = folder / "page.md"
    monkeypatch.setattr(links, "ROOT", folder)
    monkeypatch.setattr(links, "pages", lambda: [page])
    page.write_text("[it](gone.md)")
    assert links.main([]) == 1
    assert capsys.readouterr().out == "page.md: the link to gone.md leads nowhere\n"
    page.write_text("[it](other.md)")
    assert links.main([]) == 0
    assert capsys.readouterr().out == "The links of 1 pages lead somewhere.\n"
