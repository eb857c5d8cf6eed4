"""PDF -> text. For parser processes only (see `workers`): the format's parsers are C++ and its files hostile."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from dr_jax.records import Failure, FailureKind, Page
from dr_jax.web.page import MAX_CHARS, Response, page_of
from dr_jax.web.text import clean_line
from dr_jax.web.walk import Heading

MAX_PAGES = 200
_MARK = b"%PDF-"
_FULL_LINE = 0.75  # of the longest on its page: the sentence goes on in the next line


def is_pdf(response: Response) -> bool:
    """By its first bytes: servers name these files as they like."""
    return response.body[:1024].lstrip().startswith(_MARK)


def extract(response: Response, *, max_segment_chars: int = 4000) -> Page | Failure:
    """The text of the first 200 pages under a heading `Page n` each; hand-wrapped lines are joined to paragraphs."""
    try:
        import pypdfium2
    except ImportError:
        return Failure(FailureKind.UNSUPPORTED_TYPE, "PDF; reading it needs the extra dr_jax[pdf]")
    try:
        with pypdfium2.PdfDocument(response.body) as document:
            title = clean_line(document.get_metadata_value("Title"), 300)
            lines = list(_capped_lines(document))
    except pypdfium2.PdfiumError:
        return Failure(FailureKind.PARSE_LIMIT, "not a PDF that can be read")
    if not any(not isinstance(line, Heading) for line in lines):
        return Failure(FailureKind.EMPTY, "no text")
    return page_of(response.url, title, lines, {}, max_segment_chars)


def _capped_lines(document) -> Iterator[str]:
    size = 0
    for number in range(min(len(document), MAX_PAGES)):
        textpage = document[number].get_textpage()
        blocks = list(filter(None, _paragraphs(textpage.get_text_bounded().split("\n"))))
        if blocks:
            yield from itertools.chain([Heading(f"# Page {number + 1}")], blocks)
        size += sum(map(len, blocks))
        if size > MAX_CHARS:  # `page_of` cuts the rest, and says so
            return


def _paragraphs(lines: list[str]) -> Iterator[str]:
    """Lines joined to paragraphs: a line that is much shorter than the others ends one."""
    # PDFium joins a word that was cut at the end of a line, and leaves U+0002 there.
    widths = [len(line.rpartition("\x02")[2]) for line in lines]
    full = _FULL_LINE * max(widths, default=0)
    run: list[str] = []
    for line, width in zip(lines, widths, strict=True):
        run.append(line)
        if width < full:
            yield clean_line(" ".join(run))
            run.clear()
    if run:
        yield clean_line(" ".join(run))
