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
from urllib.parse import urldefrag, urljoin

from selectolax.lexbor import LexborHTMLParser, LexborNode, SelectolaxError

from dr_jax.records import Failure, FailureKind, Page
from dr_jax.web.scan import excess
from dr_jax.web.text import MAX_URL_CHARS, clean_indented, clean_line, decode

EXTRACTOR = "2"  # raise it with every change of what `extract` returns: it is part of the cache key

MAX_CHARS = 400_000  # of text; past it, tokenizers stall
MAX_LINKS = 500
_MAX_BYTES = 4 << 20
_MAX_TITLE_CHARS = 300
_MARKUP = re.compile(r"\s*<[!?a-zA-Z]")
_TRUNCATED = "[the page goes on]"


@dataclasses.dataclass(frozen=True)
class Response:
    """A page as it came: `url` after redirects, `content_type` as the server said it, the body decompressed."""

    url: str
    content_type: str
    body: bytes


class Heading(str):
    """A line `# text`, `## text`, ... that opens a part of the page; code may have lines that only look so."""

    __slots__ = ()


def extract(response: Response, *, max_segment_chars: int = 4000) -> Page | Failure:
    """The main content as text: headings as `## heading`, list items as `- item`, table rows as `a | b`, infobox rows
    and definitions as `key: value`; navigation, forms, scripts and footers are left out. Never raises."""
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
        walk = _Walk(tree, response.url)
        lines = walk.main_lines()
    except SelectolaxError as error:
        return Failure(FailureKind.PARSE_LIMIT, type(error).__name__)
    return page_of(response.url, _title(tree), lines, walk.links, max_segment_chars)


def _is_html(content_type: str, text: str) -> bool:
    media = content_type.partition(";")[0].strip().lower()
    return media in ("text/html", "application/xhtml+xml") or _MARKUP.match(text) is not None


def page_of(url: str, title: str, lines: list[str], links: dict[str, str], max_segment_chars: int) -> Page | Failure:
    """A page with `lines` cut to segments, past `MAX_CHARS` left out; `links` are URL -> text."""
    runs = list(_segments(_capped(filter(None, lines)), max_segment_chars))
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


def _capped(lines: Iterable[str]) -> Iterator[str]:
    left = MAX_CHARS
    for line in lines:
        if len(line) > left:
            yield from filter(None, (line[:left].rstrip(), _TRUNCATED))
            return
        left -= len(line) + 1
        yield line


# Segments -----------------------------------------------------------------------------------------------------------


def _segments(lines: Iterable[str], max_chars: int) -> Iterator[list[str]]:
    """Runs of lines, at most `max_chars` long. A heading opens a new one once the last is half full; it never ends one
    where it fits the next."""
    run: list[str] = []
    size = 0  # of the run, a line break after each line included
    for piece in (piece for line in lines for piece in _pieces(line, max_chars)):
        if run and (size + len(piece) > max_chars or (isinstance(piece, Heading) and size > max_chars // 2)):
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


# The walk -----------------------------------------------------------------------------------------------------------

_DROPPED_TAGS = frozenset(
    str.split(
        "nav footer aside script style noscript template svg math iframe object canvas audio video button input select "
        "textarea label dialog head title"
    )
)
_DROPPED = (
    "[hidden], [aria-hidden=true], [role=navigation], [role=banner], [role=contentinfo], [role=search], [role=dialog], "
    "[style*='display:none'], [style*='display: none'], .mw-editsection, .mw-jump-link, .navbox, .noprint, "
    "sup.reference, .cookie-banner, .cookie-consent, .cc-window, #onetrust-consent-sdk, #CybotCookiebotDialog"
)
_INFOBOX = ".infobox, .portable-infobox"
_LAYOUT = "table, h1, h2, h3, h4"  # a table with one of these in it arranges a page; it is not data
_FORM_CONTENT = "p, h1, h2, h3, table, li"  # some sites put whole pages into a form
_BLOCKS = frozenset(
    str.split(
        "address article aside blockquote body caption center dd details div dt fieldset figcaption figure footer form "
        "header hgroup hr legend li main p section summary table tbody td tfoot th thead tr"
    )
)
_MAX_WALK_DEPTH = 120  # below it, text without structure; Python allows 1,000 frames, a level takes up to four
_SPARSE_CHARS = 200


class _Lines:
    """Finished lines, and the text of the block being written."""

    def __init__(self, *, br_ends_line: bool):
        self.done: list[str] = []
        self.inline: list[str] = []
        # Two <br> in a row are what old pages have for a paragraph; in a table cell one <br> separates values.
        self._break = re.compile(r"\n" if br_ends_line else r"\n\s*\n")

    def end_block(self) -> None:
        if self.inline:
            text = "".join(self.inline)
            lines = self._break.split(text) if "\n" in text else (text,)
            self.done.extend(filter(None, map(clean_line, lines)))
            self.inline.clear()


class _Walk:
    """One pass over a parsed page. `main_lines` fills `links` (URL -> text) on its way."""

    def __init__(self, tree: LexborHTMLParser, url: str):
        self.links: dict[str, str] = {}
        self._tree, self._url = tree, url
        base = tree.css_first("base[href]")
        self._base = _absolute(url, base.attributes.get("href") or "") or url if base else url
        self._infoboxes = {node.mem_id for node in tree.css(_INFOBOX)}
        self._dropped = {node.mem_id for node in tree.css(_DROPPED)} - self._infoboxes

    def main_lines(self) -> list[str]:
        """Lines of what is marked as the main part; of the whole body where nothing is, or it holds next to nothing."""
        body = self._tree.body
        if body is None:
            return []
        marked = self._tree.css("main, [role=main]") or self._tree.css("article")
        lines = self.lines(marked[0]) if len(marked) == 1 else []
        if sum(map(len, lines)) >= _SPARSE_CHARS:
            return lines
        links, self.links = self.links, {}
        everything = self.lines(body, in_page=True)
        if lines and sum(map(len, everything)) < 5 * sum(map(len, lines)):
            self.links = links
            return lines
        return everything

    def lines(
        self, node: LexborNode, depth: int = 0, *, in_page: bool = False, br_ends_line: bool = False
    ) -> list[str]:
        """The blocks inside `node`, a line each. `in_page`: not inside an article, so <header> is the site's."""
        out = _Lines(br_ends_line=br_ends_line)
        self._render(node, out, depth, in_page)
        out.end_block()
        return out.done

    def _render(self, node: LexborNode, out: _Lines, depth: int, in_page: bool) -> None:
        for child in node.iter(include_text=True):
            self._render_one(child, out, depth, in_page)

    def _render_one(self, node: LexborNode, out: _Lines, depth: int, in_page: bool = False) -> None:
        tag = node.tag or ""  # lexbor has no name for a processing instruction
        if tag == "-text":
            out.inline.append((node.text_content or "").replace("\n", " "))  # "\n" is for <br>
        elif tag == "br":
            out.inline.append("\n")
        elif self._skipped(node, tag, in_page):
            return
        elif depth > _MAX_WALK_DEPTH:
            out.inline.append(node.text(separator=" "))
        elif structure := _STRUCTURES.get(tag):
            out.end_block()
            out.done.extend(structure(self, node, depth + 1))
        else:
            if tag == "a":
                self._note_link(node)
            if tag in _BLOCKS:
                out.end_block()
            self._render(node, out, depth + 1, in_page and tag not in ("main", "article"))
            if tag in _BLOCKS:
                out.end_block()

    def _skipped(self, node: LexborNode, tag: str, in_page: bool) -> bool:
        if not tag[:1].isalpha() or node.mem_id in self._dropped:
            return True
        if tag in _DROPPED_TAGS:
            return node.mem_id not in self._infoboxes
        if tag == "form":
            return node.css_first(_FORM_CONTENT) is None
        return tag == "header" and in_page and node.css_first("h1") is None

    def _note_link(self, node: LexborNode) -> None:
        href = node.attributes.get("href")
        target = _absolute(self._base, href) if href else None
        text = clean_line(node.text(), _MAX_TITLE_CHARS)
        if target and text and target != self._url and len(self.links) < MAX_LINKS:
            self.links.setdefault(target, text)

    def _heading(self, node: LexborNode, depth: int) -> list[str]:
        text = " ".join(self.lines(node, depth))
        return [Heading(f"{'#' * int(node.tag[1])} {text}")] if text else []

    def _list(self, node: LexborNode, depth: int) -> list[str]:
        out = []
        for item in node.iter():
            if item.tag == "li" and item.mem_id not in self._dropped:
                first, *rest = self.lines(item, depth) or [""]
                out += [f"- {first}"] * bool(first) + [f"  {line}" for line in rest]
            elif item.tag != "li":  # a list right inside a list
                inner = _Lines(br_ends_line=False)
                self._render_one(item, inner, depth)
                inner.end_block()
                out += [f"  {line}" for line in inner.done]
        return out

    def _definitions(self, node: LexborNode, depth: int) -> list[str]:
        out: list[str] = []
        terms: list[str] = []
        defined = True
        for item in _parts(node, ("dt", "dd"), ("div",)):
            text = _joined(self.lines(item, depth))
            if not text:
                continue
            if item.tag == "dd":
                out.append(f"{', '.join(terms)}: {text}" if terms else text)
            else:
                terms = [text] if defined else [*terms, text]
            defined = item.tag == "dd"
        return out if defined else out + terms

    def _table(self, node: LexborNode, depth: int) -> list[str]:
        inner = (found for found in node.css(_LAYOUT) if found.mem_id != node.mem_id)
        infobox = node.mem_id in self._infoboxes
        if not infobox and next(inner, None) is not None:
            return self.lines(node, depth)
        out = []
        for row in _parts(node, ("caption", "tr"), ("thead", "tbody", "tfoot")):
            if row.tag == "caption":
                out.append(_joined(self.lines(row, depth)))
                continue
            cells = [cell for cell in row.iter() if cell.tag in ("th", "td") and cell.mem_id not in self._dropped]
            texts = [_joined(self.lines(cell, depth, br_ends_line=True)) for cell in cells]
            keyed = infobox or [cell.tag for cell in cells] == ["th", "td"]
            if any(texts):
                out.append(f"{texts[0]}: {texts[1]}" if keyed and len(texts) == 2 and all(texts) else " | ".join(texts))
        return out

    def _preformatted(self, node: LexborNode, depth: int) -> list[str]:
        return [line for line in map(clean_indented, node.text().splitlines()) if line]


_STRUCTURES = {
    **{f"h{level}": _Walk._heading for level in range(1, 7)},
    **dict.fromkeys(("ul", "ol", "menu"), _Walk._list),
    "dl": _Walk._definitions,
    "table": _Walk._table,
    "pre": _Walk._preformatted,
}


def _parts(node: LexborNode, tags: tuple[str, ...], through: tuple[str, ...]) -> Iterator[LexborNode]:
    """Children of `node` with one of `tags`, and those inside its children of the tags `through`."""
    for child in node.iter():
        if child.tag in tags:
            yield child
        elif child.tag in through:
            yield from (inner for inner in child.iter() if inner.tag in tags)


def _joined(lines: list[str]) -> str:
    """Lines as one: sentences follow each other, other things are listed with commas."""
    out = ""
    for line in (line.strip().removeprefix("- ") for line in lines):
        out += (" " if out.endswith((".", "!", "?", ":", ";", ",")) else ", ") + line if out else line
    return out


def _absolute(base: str, href: str) -> str | None:
    """`href` as an absolute http(s) URL without fragment, or None."""
    try:
        url = urldefrag(urljoin(base, clean_line(href))).url
    except ValueError:  # "http://[" and its like
        return None
    return url if url.startswith(("http://", "https://")) and len(url) <= MAX_URL_CHARS else None


def _title(tree: LexborHTMLParser) -> str:
    node = tree.css_first("head > title") or tree.css_first("h1")
    return clean_line(node.text(), _MAX_TITLE_CHARS) if node else ""
