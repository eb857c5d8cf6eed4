"""Bytes -> text by the document's own structure.

One block of the page (a paragraph, a heading, a list item, a table row) is one line, whole, so that sentences stay
intact. Segments are runs of lines cut at headings and block ends, each with the path of the headings over it.

Parsing is CPU work on hostile input: `workers` runs `extract` in processes; never call it on the event loop.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from selectolax.lexbor import LexborHTMLParser, SelectolaxError

from dr_jax.records import Failure, FailureKind, Page
from dr_jax.web.scan import excess
from dr_jax.web.text import clean_line, decode
from dr_jax.web.walk import Heading, Walk, title_of

EXTRACTOR = "3"  # raise it with every change of what `extract` returns: it is part of the cache key

MAX_CHARS = 400_000  # of text; past it, tokenizers stall
_MAX_BYTES = 4 << 20
_MARKUP = re.compile(r"\s*<[!?a-zA-Z]")
_TRUNCATED = "[the page goes on]"


@dataclasses.dataclass(frozen=True)
class Response:
    """A page as it came: `url` after redirects, `content_type` as the server said it, the body decompressed."""

    url: str
    content_type: str
    body: bytes


def extract(response: Response, *, max_segment_chars: int = 4000) -> Page | Failure:
    """The main content as text: headings as `## heading`, list items as `- item`, table rows as `a | b`, infobox rows
    and definitions as `key: value`, <pre> between fences; navigation, forms, scripts and footers are left out. Never
    raises."""
    if len(response.body) > _MAX_BYTES:
        return Failure(FailureKind.PARSE_LIMIT, f"more than {_MAX_BYTES} bytes")
    if b"\x00" in response.body[:1024] and not response.body.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Failure(FailureKind.UNSUPPORTED_TYPE, "not text")
    if response.body.startswith(b"%PDF-"):
        return Failure(FailureKind.UNSUPPORTED_TYPE, "PDF outside a parser process")
    text = decode(response.body, response.content_type)
    if not _is_html(response.content_type, text):
        # Plain text is wrapped by hand: a blank line ends a block, a line break does not.
        blocks = [clean_line(block) for block in re.split(r"\n[ \t\r]*\n", text)]
        return page_of(response.url, "", blocks, {}, max_segment_chars)
    if bomb := excess(text):
        return Failure(FailureKind.PARSE_LIMIT, bomb)
    try:
        tree = LexborHTMLParser(text)
        walk = Walk(tree, response.url)
        lines = walk.main_lines()
    except SelectolaxError as error:
        return Failure(FailureKind.PARSE_LIMIT, type(error).__name__)
    return page_of(response.url, title_of(tree), lines, walk.links, max_segment_chars)


def _is_html(content_type: str, text: str) -> bool:
    media = content_type.partition(";")[0].strip().lower()
    return media in ("text/html", "application/xhtml+xml") or _MARKUP.match(text) is not None


def page_of(url: str, title: str, lines: list[str], links: dict[str, str], max_segment_chars: int) -> Page | Failure:
    """A page with `lines` cut to segments, past `MAX_CHARS` left out; `links` are URL -> text."""
    runs = list(_segments(_capped(list(filter(None, lines))), max_segment_chars))
    if not runs:
        return Failure(FailureKind.EMPTY, "no text")
    segments = tuple("\n".join(run) for run in runs)
    return Page(url, title, segments, tuple((text, target) for target, text in links.items()), tuple(_paths(runs)))


def to_plain(result: Page | Failure) -> dict[str, Any]:
    """What JSON can hold of an extraction, for `from_plain`."""
    return {"page" if isinstance(result, Page) else "failure": vars(result)}


def from_plain(plain: Mapping[str, Any]) -> Page | Failure:
    """The extraction that `to_plain` made plain. Raises ValueError for anything else."""
    match plain:
        case {"failure": fields}:
            return Failure(**{**fields, "kind": FailureKind(fields["kind"])})
        case {"page": fields}:
            links = tuple((text, url) for text, url in fields["links"])
            tuples = {name: tuple(fields[name]) for name in ("segments", "headings")}
            return Page(**{**fields, **tuples, "links": links})
    raise ValueError("neither a page nor a failure")


def _capped(lines: list[str]) -> list[str]:
    left = MAX_CHARS
    for number, line in enumerate(lines):
        if len(line) > left:
            return [*lines[:number], *filter(None, (line[:left].rstrip(),)), _TRUNCATED]
        left -= len(line) + 1
    return lines


# Segments -----------------------------------------------------------------------------------------------------------


def _segments(lines: list[str], max_chars: int) -> Iterator[list[str]]:
    """Runs of lines, at most `max_chars` long. A heading opens a new one once the last is half full; it never ends one
    where it fits the next."""
    run: list[str] = []
    size = 0  # of the run, a line break after each line included
    if max(map(len, lines), default=0) > max_chars:
        lines = [piece for line in lines for piece in ((line,) if len(line) <= max_chars else _pieces(line, max_chars))]
    for piece in lines:
        if run and (size + len(piece) > max_chars or (size > max_chars // 2 and isinstance(piece, Heading))):
            end = max((i for i, line in enumerate(run, 1) if not isinstance(line, Heading)), default=0)
            size = sum(len(line) + 1 for line in run[end:])
            if end == 0 or size + len(piece) > max_chars:
                end, size = len(run), 0
            yield run[:end]
            run = run[end:]
        run.append(piece)
        size += len(piece) + 1
    if run:
        yield run


def _paths(runs: Iterable[list[str]]) -> Iterator[str]:
    """For each run the headings over its first line of text, outermost first: `Ada > Films > Early`."""
    open_: list[tuple[int, str]] = []
    for run in runs:
        path = None
        for line in run:
            if isinstance(line, Heading):
                marks, _, text = line.partition(" ")
                open_ = [*(part for part in open_ if part[0] < len(marks)), (len(marks), text)]
            elif path is None:
                path = [text for _, text in open_]
        yield " > ".join([text for _, text in open_] if path is None else path)


def _pieces(line: str, max_chars: int) -> Iterator[str]:
    """`line`, in parts where it is longer than a segment: cut after a sentence, else at a space, else anywhere."""
    shortest = max(max_chars // 2, 1)
    while len(line) > max_chars:
        cut = max(line.rfind(mark, 0, max_chars) + 1 for mark in (". ", "! ", "? ", "。"))
        if cut < shortest:
            cut = line.rfind(" ", 0, max_chars)
        if cut < shortest:
            cut = max_chars
        if piece := line[:cut].rstrip():
            yield piece
        line = line[cut:].lstrip()
    if line:
        yield line
