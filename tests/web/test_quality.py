"""Saved pages against what a careful reader would keep of each (`pages/*.txt`, written by hand); and real ones, of
Debian's documentation packages, where they are installed:

    apt-get install --no-install-recommends python3-doc sqlite3-doc postgresql-doc apache2-doc w3m
"""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
from collections import Counter

import pytest
from selectolax.lexbor import LexborHTMLParser

from dr_jax.web.page import Response, extract

PAGES = sorted((pathlib.Path(__file__).parent / "pages").glob("*.html"))
FLOOR = 0.99
# What is known to be kept, or lost, without structure to tell it by: raise these, never lower them.
FLOORS = {"css_hidden_menu": 0.92, "layout_table": 0.97, "cookie_bar_soup": 0.91, "related_links": 0.82}
MEAN_FLOOR = 0.98


def score(path: pathlib.Path) -> float:
    """F1 of the words of the extracted text, marks of the text format (#, -, |, `) left aside."""
    page = extract(Response("http://a.test/", "text/html", path.read_bytes()))
    got, wanted = (
        Counter(re.findall(r"\w+|[^\w\s#|:,`-]", text))
        for text in ("\n".join(page.segments), path.with_suffix(".txt").read_text())
    )
    return 2 * (got & wanted).total() / (got.total() + wanted.total())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_keeps_what_a_reader_would(path):
    assert score(path) >= FLOORS.get(path.stem, FLOOR)


def test_the_mean_of_all_pages():
    assert len(PAGES) >= 30
    assert sum(map(score, PAGES)) / len(PAGES) >= MEAN_FLOOR


# Real pages. The reference is w3m's text of what the documentation's own markup calls its content: `content`, without
# `around`. It is fair because w3m shares no code with us and prints whatever it is given, and because where the content
# begins is a fact of each project's page template, which extraction is not told. Words are compared, not lines or
# marks, which w3m draws as a terminal would. Every n-th page with 2,000 characters of text or more counts.
DOCS = pathlib.Path("/usr/share/doc")
PACKAGES = {
    "python3-doc": (DOCS / "python3-doc/html", "div.body[role=main]", ".nothing"),
    "sqlite3-doc": (DOCS / "sqlite3", "body", ".nosearch, svg"),  # w3m prints the labels of a drawing, one by one
    "postgresql-doc": (next(DOCS.glob("postgresql-doc-*/html"), DOCS / "none"), "body", ".navheader, .navfooter"),
    "apache2-doc": (DOCS / "apache2-doc/manual", "#page-content", ".toplang, #quickview, #comments_section"),
}
ENOUGH_CHARS = 2000
REAL_FLOORS = {  # worst page, mean; of Debian 12. Navigation without a mark, and numbers of lists, are what is lost.
    "python3-doc": (0.96, 0.99),
    "sqlite3-doc": (0.89, 0.965),
    "postgresql-doc": (0.88, 0.965),
    "apache2-doc": (0.90, 0.96),
}


def declared(body: bytes) -> str:
    """The encoding these pages declare, all in the same way."""
    match = re.search(rb"charset=[\"']?([\w-]+)", body[:2000])
    return match[1].decode() if match else "utf-8"


def rendered(body: bytes, content: str, around: str) -> str:
    tree = LexborHTMLParser(body.decode(declared(body)))
    for node in tree.css(around):
        node.decompose()
    node = tree.css_first(content)
    if node is None:
        return ""
    command = ("w3m", "-dump", "-T", "text/html", "-I", "UTF-8", "-O", "UTF-8", "-cols", "400")
    return subprocess.run(command, input=node.html.encode(), capture_output=True, check=True).stdout.decode()


def words(text: str) -> Counter[str]:
    return Counter(re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|\w+", text))  # Japanese and Chinese have no spaces


def real_scores(folder: pathlib.Path, content: str, around: str, pages: int = 40) -> dict[str, float]:
    paths = sorted(path for path in folder.rglob("*.html") if path.stat().st_size < 500_000)
    scores = {}
    for path in paths[:: max(1, len(paths) // pages)]:
        wanted = rendered(path.read_bytes(), content, around)
        if len(wanted) >= ENOUGH_CHARS:
            page = extract(Response("http://a.test/", "text/html", path.read_bytes()))
            left, right = words("\n".join(page.segments)), words(wanted)
            scores[str(path)] = 2 * (left & right).total() / (left.total() + right.total())
    return scores


@pytest.mark.skipif(shutil.which("w3m") is None, reason="w3m writes the reference: see the top of this file")
@pytest.mark.parametrize("package", PACKAGES)
def test_real_documentation_keeps_its_content(package):
    folder, content, around = PACKAGES[package]
    if not folder.exists():
        pytest.skip(f"{package} is not installed: see the top of this file")
    scores = real_scores(folder, content, around)
    worst, mean = REAL_FLOORS[package]
    assert len(scores) >= 15
    if package == "apache2-doc":  # the one with translations in other encodings
        assert {declared(pathlib.Path(path).read_bytes()) for path in scores} >= {"UTF-8", "EUC-KR", "ISO-8859-1"}
    assert min(scores.values()) >= worst, min(scores, key=scores.get)
    assert sum(scores.values()) / len(scores) >= mean
