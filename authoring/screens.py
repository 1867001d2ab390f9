"""Look at the notebooks as a learner does: in JupyterLab, in Chromium, on a laptop's screen.

python -m authoring.screens             pictures of all pages, and what is wrong on them
python -m authoring.screens --run 00    run the notebook there first: outputs are trusted
python -m authoring.screens exercises/03    a page of exercises

Notebooks are opened from a copy, with no signature to trust them by, as after a clone. Needs
playwright (the extra `screens`) and an installed Chromium or Chrome ($COURSE_CHROMIUM, or on PATH).
"""

import argparse
import json
import secrets
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from authoring.lab import browser, jupyterlab, why_not
from course.arguments import local_path
from course.clone import ROOT

RUN_SECONDS = 1800


@dataclass
class Lesson:
    """One notebook open in the browser."""

    page: Any

    @classmethod
    def open(cls, page: Any, url: str, path: str, cells: int) -> "Lesson":
        """`cells` is how many there are: the page is complete when it shows them all."""
        # a workspace of its own, or JupyterLab opens the tabs of the last one too
        page.goto(url.format(workspace=secrets.token_hex(8), path=path))
        page.wait_for_function(
            "n => document.querySelectorAll('.jp-Notebook .jp-Cell').length === n", arg=cells
        )
        page.wait_for_function("() => !document.querySelector('#jupyterlab-splash')")
        lesson = cls(page)
        lesson.wait_until_drawn()
        return lesson

    def wait_until_drawn(self) -> None:
        """Until all markdown is rendered and every image has loaded, or failed to."""
        self.page.wait_for_function(DRAWN)
        self.page.wait_for_timeout(500)  # formulas are set after the text around them

    def run_all(self) -> None:
        """Run it top to bottom; its outputs are trusted from then on."""
        self.menu("Edit", "Clear Outputs of All Cells")  # so that a number means a run of now
        self.menu("Run", "Run All Cells")
        self.page.wait_for_function(RAN, timeout=RUN_SECONDS * 1000)
        self.wait_until_drawn()

    def menu(self, name: str, item: str) -> None:
        self.page.get_by_role("menuitem", name=name, exact=True).click()
        self.page.get_by_role("menuitem", name=item, exact=True).click()

    def problems(self) -> list[str]:
        """What is wrong on the page, from its DOM; every fold is opened by a click first."""
        return self.fold_problems() + self.page.evaluate(PROBLEMS)

    def fold_problems(self) -> list[str]:
        found = []
        closed = self.page.locator(".jp-Notebook details:not([open]):visible > summary")
        for _ in range(closed.count()):
            before = closed.count()
            title = closed.first.inner_text()
            closed.first.click()
            if closed.count() != before - 1:
                found.append(f"the fold {title!r} does not open")
                break
        return found

    def take_pictures(self, folder: Path) -> int:
        """A picture a screenful, top to bottom; returns how many."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        number, more = 0, self.page.evaluate(SCROLL, 0)
        while True:
            self.page.wait_for_timeout(150)
            number += 1
            self.page.screenshot(path=folder / f"{number:02}.png")
            if not more:
                return number
            more = self.page.evaluate(SCROLL, number)


DRAWN = """() => {
  const images = [...document.querySelectorAll('.jp-Notebook img')];
  const texts = [...document.querySelectorAll('.jp-MarkdownCell')];
  return images.every(i => i.complete) && texts.every(t => t.querySelector('.jp-MarkdownOutput'));
}"""
RAN = """() => [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].every(
  prompt => /\\[\\d+\\]/.test(prompt.textContent))
  && document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'"""
SCROLL = """screens => {
  const panel = document.querySelector('.jp-NotebookPanel .jp-WindowedPanel-outer');
  panel.scrollTop = screens * (panel.clientHeight - 40);
  return panel.scrollTop + panel.clientHeight + 2 < panel.scrollHeight;
}"""
PROBLEMS = """() => {
  const found = [];
  const cells = [...document.querySelectorAll('.jp-Notebook .jp-Cell')];
  cells.forEach((cell, number) => {
    const all = selector => [...cell.querySelectorAll(selector)];
    const say = text => found.push(`cell ${number}: ${text}`);
    for (const picture of all('.jp-RenderedHTMLCommon img, .jp-OutputArea img')) {
      const box = picture.getBoundingClientRect();
      const name = picture.alt || picture.src.slice(0, 60);
      if (picture.naturalWidth === 0) say(`broken image: ${name}`);
      else if (!picture.closest('[hidden]') && (box.width < 9 || box.height < 9))
        say(`an image without size: ${name}`);
      if (!picture.alt) say(`an image without alt text: ${name}`);
    }
    if (all('.jp-RenderedText[data-mime-type$=error], [data-mime-type$=stderr]').length)
      say('an error is shown');
    if (all('mjx-merror, mjx-container [style*="color: red"]').length) say('a formula is not TeX');
    const pages = '.jp-OutputArea-output, .jp-MarkdownOutput';
    for (const box of all(pages)) {
      const out = box.scrollWidth - box.clientWidth;
      if (out > 1) say(`${out} pixels wider than the page: ${box.textContent.slice(0, 50)}`);
    }
  });
  return found;
}"""


def look(
    folder: Path, names: list[str], run: bool, pictures: Path, dark: bool = False
) -> list[str]:
    """Open each notebook of a copy of the course; returns what is wrong, page by page."""
    problems = []
    with jupyterlab(folder, dark) as url, browser() as page:
        for name in names:
            cells = len(json.loads((folder / name).read_text())["cells"])
            lesson = Lesson.open(page, url, name, cells)
            if run:
                lesson.run_all()
            into = pictures / name.removeprefix("notebooks/").removesuffix(".ipynb")
            count = lesson.take_pictures(into)
            problems += [f"{name}, {text}" for text in lesson.problems()]
            print(f"{name}: {count} pictures in {into}")
    return problems


def copy_course(folder: Path) -> list[str]:
    """Copy notebooks and figures, as nothing here may write to the repository; returns paths."""
    for part in ("notebooks", "exercises", "solutions", "figures"):
        shutil.copytree(ROOT / part, folder / part, dirs_exist_ok=True)
    found = [
        path for part in ("notebooks", "exercises") for path in (folder / part).glob("*.ipynb")
    ]
    return [path.relative_to(folder).as_posix() for path in sorted(found)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Pictures of the notebooks in JupyterLab.")
    parser.add_argument("names", nargs="*", help="which, such as 00 (default: all)")
    parser.add_argument("--run", action="store_true", help="run each notebook first")
    parser.add_argument("--dark", action="store_true", help="in JupyterLab's dark theme")
    parser.add_argument("--out", type=local_path, default=ROOT / ".course/screens")
    args = parser.parse_args()
    if reason := why_not():
        parser.error(reason)
    with tempfile.TemporaryDirectory() as folder:
        names = copy_course(Path(folder))
        wanted = tuple(args.names) or ("",)
        names = [n for n in names if n.startswith(wanted) or Path(n).name.startswith(wanted)]
        problems = look(Path(folder), names, args.run, args.out, args.dark)
    print("\n".join(problems) or "Nothing wrong on any page.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
