"""Bytes -> text by the document's own structure.

One block of the page (a paragraph, a heading, a list item, a table row) is one line, whole, so that sentences stay
intact. Segments are runs of lines cut at headings and block ends.

Parsing is CPU work on hostile input: call `extract` in a thread, never on the event loop. A page that would blow up
the parser is refused by a scan of its tags; the scan is a cheap model of the parser, not a proof.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from urllib.parse import urldefrag, urljoin

from selectolax.lexbor import LexborHTMLParser, LexborNode, SelectolaxError

from dr_jax.records import Failure, FailureKind, Page
from dr_jax.web.text import clean_indented, clean_line, decode

EXTRACTOR = "1"  # raise it with every change of what `extract` returns: it is part of the cache key

MAX_URL_CHARS = 2048
MAX_CHARS = 400_000  # of text; past it, tokenizers stall
MAX_LINKS = 500
_MAX_BYTES = 4 << 20
_MAX_TITLE_CHARS = 300
_TRUNCATED = "[the page goes on]"


@dataclasses.dataclass(frozen=True)
class Response:
    """A page as it came: `url` after redirects, `content_type` as the server said it, the body decompressed."""

    url: str
    content_type: str
    body: bytes


def extract(response: Response, *, max_segment_chars: int = 4000) -> Page | Failure:
    """The main content as text: headings as `## heading`, list items as `- item`, table rows as `a | b`, infobox rows
    and definitions as `key: value`; navigation, forms, scripts and footers are left out. Never raises."""
    if len(response.body) > _MAX_BYTES:
        return Failure(FailureKind.PARSE_LIMIT, f"more than {_MAX_BYTES} bytes")
    if b"\x00" in response.body[:1024] and not response.body.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Failure(FailureKind.UNSUPPORTED_TYPE, "not text")
    text = decode(response.body, response.content_type)
    if not _is_html(response.content_type, text):
        # Plain text is wrapped by hand: a blank line ends a block, a line break does not.
        blocks = [clean_line(block) for block in re.split(r"\n[ \t\r]*\n", text)]
        return _page(response.url, "", blocks, {}, max_segment_chars)
    if excess := _excess(text):
        return Failure(FailureKind.PARSE_LIMIT, excess)
    try:
        tree = LexborHTMLParser(text)
        walk = _Walk(tree, response.url)
        lines = walk.main_lines()
    except SelectolaxError as error:
        return Failure(FailureKind.PARSE_LIMIT, type(error).__name__)
    return _page(response.url, _title(tree), lines, walk.links, max_segment_chars)


def _is_html(content_type: str, text: str) -> bool:
    media = content_type.partition(";")[0].strip().lower()
    return media in ("text/html", "application/xhtml+xml") or text.lstrip()[:1] == "<"


def _page(url: str, title: str, lines: list[str], links: dict[str, str], max_segment_chars: int) -> Page | Failure:
    segments = tuple(_segments(_capped(filter(None, lines)), max_segment_chars))
    if not segments:
        return Failure(FailureKind.EMPTY, "no text")
    return Page(url=url, title=title, segments=segments, links=tuple((text, target) for target, text in links.items()))


def _capped(lines: Iterable[str]) -> Iterator[str]:
    left = MAX_CHARS
    for line in lines:
        if len(line) > left:
            yield from filter(None, (line[:left].rstrip(), _TRUNCATED))
            return
        left -= len(line) + 1
        yield line


# Segments -----------------------------------------------------------------------------------------------------------


def _segments(lines: Iterable[str], max_chars: int) -> Iterator[str]:
    """Runs of lines, at most `max_chars` long. A heading opens a new one once the last is half full; it never ends one
    where it fits the next."""
    run: list[str] = []
    size = 0  # of the run, a line break after each line included
    for piece in (piece for line in lines for piece in _pieces(line, max_chars)):
        if run and (size + len(piece) > max_chars or (piece.startswith("#") and size > max_chars // 2)):
            end = max((i for i, line in enumerate(run, 1) if not line.startswith("#")), default=0)
            size = sum(len(line) + 1 for line in run[end:])
            if end == 0 or size + len(piece) > max_chars:
                end, size = len(run), 0
            yield "\n".join(run[:end])
            run = run[end:]
        run.append(piece)
        size += len(piece) + 1
    if run:
        yield "\n".join(run)


def _pieces(line: str, max_chars: int) -> Iterator[str]:
    """`line`, in parts where it is longer than a segment: cut after a sentence, else at a space, else anywhere."""
    while len(line) > max_chars:
        cut = max((line.rfind(mark, 0, max_chars) + 1 for mark in (". ", "! ", "? ", "。")), default=0)
        if cut < max_chars // 2:
            cut = line.rfind(" ", 0, max_chars)
        if cut < max_chars // 2:
            cut = max_chars
        yield line[:cut].rstrip()
        line = line[cut:].lstrip()
    yield line


# The scan -----------------------------------------------------------------------------------------------------------

_MAX_DEPTH = 1000  # lexbor is quadratic in it: 0.1 s at 10,000, a minute at 100,000; browsers stop at 512
_MAX_MISNESTED = 2000  # end tags that close more than their own element: the parser may see it otherwise
_MAX_REOPENED = 200_000  # elements the parser would clone to carry open formatting into new blocks
_MAX_OPTIONS = 10_000
_MAX_ATTRIBUTES = 2000  # of one tag
_LONG_TAG_CHARS = 4 * _MAX_ATTRIBUTES

# A comment, or a tag: end mark, name, attributes. Every alternative may end at the end of the text, so that a match
# always succeeds and the scan is linear.
_TAG = re.compile(
    r"""<!--(?:-?>|(?s:.*?)(?:--!?>|\Z))|<(/?)([a-zA-Z][^\s/>]*+)((?:"[^"]*+(?:"|\Z)|'[^']*+(?:'|\Z)|[^"'>])*+)"""
)
_RAW_END = {name: re.compile(f"</{name}", re.IGNORECASE) for name in ("script", "style")}
_ATTRIBUTE = re.compile(r"""[^\s"'>/=]+""")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FORMATTING = _names("a b big code em font i nobr s small strike strong tt u")
_SINGLE = _names("a nobr")  # formatting elements that end the one before
# Void elements, and those whose end tags may be left out: they do not nest.
_FLAT = _names(
    "a nobr area base br col embed hr img input link meta param source track wbr "
    "p dt dd tr td th thead tbody tfoot colgroup option optgroup rp rt html head body"
)


def _excess(html: str) -> str | None:
    """What in `html` would cost the parser more than a page may, or None."""
    stack: list[str] = []
    opened: Counter[str] = Counter()  # of the stack
    active: Counter[str] = Counter()  # formatting elements: an end tag of another element does not end them
    formatting = reopened = misnested = options = 0
    for is_end, name, attributes in _tags(html):
        if len(attributes) > _LONG_TAG_CHARS and _count_up_to(_ATTRIBUTE, attributes, _MAX_ATTRIBUTES):
            return f"a tag with more than {_MAX_ATTRIBUTES} attributes"
        if name in _FORMATTING:
            change = -(active[name] > 0) if is_end else name not in _SINGLE or not active[name]
            active[name] += change
            formatting += change
        reopened += 0 if is_end else formatting
        options += name == "option"
        if not is_end and name not in _FLAT:
            stack.append(name)
            opened[name] += 1
        elif is_end and opened[name]:
            misnested += stack[-1] != name
            while (last := stack.pop()) != name:
                opened[last] -= 1
            opened[name] -= 1
        if len(stack) > _MAX_DEPTH or misnested > _MAX_MISNESTED:
            return f"elements nested more than {_MAX_DEPTH} deep, or more than {_MAX_MISNESTED} of them wrongly"
        if reopened > _MAX_REOPENED or options > _MAX_OPTIONS:
            return "too many unclosed formatting elements or options"
    return None


def _tags(html: str) -> Iterator[tuple[bool, str, str]]:
    """(is an end tag, name, attributes) of each tag outside comments, scripts and styles."""
    foreign = 0  # inside <svg> and <math>, scripts are elements like others
    match = _TAG.search(html)
    while match:
        end = match.end()
        if match.group(2):
            is_end, name = bool(match.group(1)), match.group(2).lower()
            yield is_end, name, match.group(3)
            foreign += name in ("svg", "math")
            if name in _RAW_END and not is_end and not foreign:
                closing = _RAW_END[name].search(html, end)
                end = closing.start() if closing else len(html)
        match = _TAG.search(html, end)


def _count_up_to(pattern: re.Pattern[str], text: str, limit: int) -> bool:
    return any(count >= limit for count, _ in enumerate(pattern.finditer(text)))


# The walk -----------------------------------------------------------------------------------------------------------

_DROPPED_TAGS = _names(
    "nav footer aside script style noscript template svg math iframe object canvas audio video button input select "
    "textarea label dialog head title"
)
_DROPPED = (
    "[hidden], [aria-hidden=true], [role=navigation], [role=banner], [role=contentinfo], [role=search], [role=dialog], "
    "[style*='display:none'], [style*='display: none'], .mw-editsection, .mw-jump-link, .navbox, .noprint, "
    "sup.reference"
)
_INFOBOX = ".infobox, .portable-infobox"
_LAYOUT = "table, h1, h2, h3, h4"  # a table with one of these in it arranges a page; it is not data
_FORM_CONTENT = "p, h1, h2, h3, table, li"  # some sites put whole pages into a form
_BLOCKS = _names(
    "address article aside blockquote body caption center dd details div dt fieldset figcaption figure footer form "
    "header hgroup hr legend li main p section summary table tbody td tfoot th thead tr"
)
_MAX_WALK_DEPTH = 200  # below it, text without structure; Python's own recursion limit is 1,000
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
            self.done.extend(filter(None, map(clean_line, self._break.split("".join(self.inline)))))
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
        if depth > _MAX_WALK_DEPTH:
            out.inline.append(node.text(separator=" "))
            return
        for child in node.iter(include_text=True):
            tag = child.tag
            if tag == "-text":
                out.inline.append(_SPACE.sub(" ", child.text_content or ""))
            elif tag == "br":
                out.inline.append("\n")
            elif self._skipped(child, tag, in_page):
                continue
            elif structure := _STRUCTURES.get(tag):
                out.end_block()
                out.done.extend(structure(self, child, depth + 1))
            else:
                if tag == "a":
                    self._note_link(child)
                if tag in _BLOCKS:
                    out.end_block()
                self._render(child, out, depth + 1, in_page and tag not in ("main", "article"))
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
        target = _absolute(self._base, node.attributes.get("href") or "")
        text = clean_line(node.text(), _MAX_TITLE_CHARS)
        if target and text and target != self._url and len(self.links) < MAX_LINKS:
            self.links.setdefault(target, text)

    def _heading(self, node: LexborNode, depth: int) -> list[str]:
        text = " ".join(self.lines(node, depth))
        return [f"{'#' * int(node.tag[1])} {text}"] if text else []

    def _list(self, node: LexborNode, depth: int) -> list[str]:
        out = []
        for item in node.iter():
            if not self._skipped(item, item.tag, False):
                first, *rest = self.lines(item, depth) or [""]
                out += [f"- {first}"] * bool(first) + [f"  {line}" for line in rest]
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
_SPACE = re.compile(r"\s+")


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
