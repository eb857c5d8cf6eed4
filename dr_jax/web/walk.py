"""The blocks of a parsed page as lines of text, and its links, in one pass over the tree."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from urllib.parse import urldefrag, urljoin

from selectolax.lexbor import LexborHTMLParser, LexborNode

from dr_jax.web.text import MAX_URL_CHARS, clean_indented, clean_line

MAX_LINKS = 500
_MAX_TITLE_CHARS = 300

_DROPPED_TAGS = frozenset(
    str.split(
        "nav footer aside script style noscript template svg math iframe object canvas audio video button input select "
        "textarea label dialog head title"
    )
)
_DROPPED_ROLES = frozenset(str.split("navigation banner contentinfo search dialog"))
_DROPPED = (
    "[hidden], [aria-hidden=true], [style*='display:none'], [style*='display: none'], .mw-editsection, .mw-jump-link, "
    ".navbox, .noprint, sup.reference, .cookie-banner, .cookie-consent, .cc-window, #onetrust-consent-sdk, "
    "#CybotCookiebotDialog"
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
_INLINE = frozenset(
    str.split("a abbr b bdi big cite code em font i ins kbd mark q s samp small span strong sub sup time tt u var")
)
_MAX_WALK_DEPTH = 120  # below it, text without structure; Python allows 1,000 frames, a level takes up to four
_SPARSE_CHARS = 200


class Heading(str):
    """A line `# text`, `## text`, ... that opens a part of the page; code may have lines that only look so."""

    __slots__ = ()


_BR = "\0"  # stands for <br>; the parser leaves no such character in a text
_PARAGRAPH_END = re.compile(rf"{_BR}\s*{_BR}")  # what old pages have for one

# A link that is whole, or only has to be put behind its host, its folder or one above: no other step begins with a dot
# or is empty, and the first is no scheme. The rest goes the long way of RFC 3986.
_STEP = r"[\w%~+,=()@!$&'*:-][\w%~+,=()@!$&'*:.-]*+"
_START = r"(?:https?://[a-z0-9.-]++(?::\d++)?)?/|(?:\.\./)++|(?![^/?#]*:)"
_PLAIN_LINK = re.compile(rf"({_START})({_STEP}(?:/{_STEP})*+/?+(?:\?[!\"$-~]++)?+)(?:#[!-~]*+)?+", re.ASCII)


class _Lines:
    """Finished lines, and the text of the block being written. `br_ends_line`: one <br> does, not only two."""

    __slots__ = ("_br_ends_line", "done", "inline")

    def __init__(self, *, br_ends_line: bool):
        self.done: list[str] = []
        self.inline: list[str] = []
        self._br_ends_line = br_ends_line

    def end_block(self) -> None:
        if not self.inline:
            return
        text = "".join(self.inline)
        self.inline.clear()
        if _BR not in text:
            if line := clean_line(text):
                self.done.append(line)
        else:  # in a table cell a <br> separates values
            lines = text.split(_BR) if self._br_ends_line else _PARAGRAPH_END.split(text)
            self.done.extend(filter(None, (clean_line(line.replace(_BR, " ")) for line in lines)))


class Walk:
    """One pass over a parsed page. `main_lines` fills `links` (URL -> text) on its way."""

    def __init__(self, tree: LexborHTMLParser, url: str):
        self.links: dict[str, str] = {}
        self._tree, self._url = tree, url
        base = tree.css_first("base[href]")
        self._base = _absolute(url, base.attributes.get("href") or "") or url if base else url
        self._infoboxes = {node.mem_id for node in tree.css(_INFOBOX)}
        roles = (node for node in tree.css("[role]") if node.attributes["role"] in _DROPPED_ROLES)
        self._dropped = {node.mem_id for node in itertools.chain(tree.css(_DROPPED), roles)} - self._infoboxes
        self._arranged = _around(tree.css(_LAYOUT))
        self._folder = _absolute(self._base, ".") or ""
        self._starts = {"": self._folder, "/": _absolute(self._base, "/") or ""}
        self._top = _absolute(self._base, "#")

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
        text = _only_text(node)
        if text is not None:
            line = clean_line(text)
            return [line] if line else []
        out = _Lines(br_ends_line=br_ends_line)
        self._render(node, out, depth, in_page)
        out.end_block()
        return out.done

    def _render(self, node: LexborNode, out: _Lines, depth: int, in_page: bool) -> None:
        inline, dropped = out.inline, self._dropped
        child = node.first_child
        while child is not None:
            tag = child.tag
            if tag == "-text":
                text = child.text_content or ""
                if inline or not text.isspace():  # a line does not begin with white space
                    inline.append(text)
            elif tag in _INLINE and depth < _MAX_WALK_DEPTH and child.mem_id not in dropped:
                if tag == "a":
                    self._note_link(child)
                text = _only_text(child)
                if text is None:
                    self._render(child, out, depth + 1, in_page)
                else:
                    inline.append(text)
            else:
                self._render_one(child, out, depth, in_page)
            child = child.next

    def _render_one(self, node: LexborNode, out: _Lines, depth: int, in_page: bool = False) -> None:
        tag = node.tag or ""  # lexbor has no name for a processing instruction
        if tag == "br":
            out.inline.append(_BR)
        elif node.mem_id in self._dropped or (tag not in _KEPT and self._skipped(node, tag, in_page)):
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
        if not tag[:1].isalpha():
            return True
        if tag in _DROPPED_TAGS:
            return node.mem_id not in self._infoboxes
        if tag == "form":
            return node.css_first(_FORM_CONTENT) is None
        return tag == "header" and in_page and node.css_first("h1") is None

    def _note_link(self, node: LexborNode) -> None:
        href = node.attrs.get("href")
        target = self._target(href) if href and len(self.links) < MAX_LINKS else None
        if target and target != self._url and target not in self.links:
            text = clean_line(node.text(), _MAX_TITLE_CHARS)
            if text:
                self.links[target] = text

    def _target(self, href: str) -> str | None:
        if href.startswith("#"):
            return self._top
        plain = _PLAIN_LINK.fullmatch(href)
        if plain is None or not self._folder or len(self._folder) + len(href) > MAX_URL_CHARS:
            return _absolute(self._base, href)
        start, rest = plain.groups()
        if start.startswith("..") and start not in self._starts:
            self._starts[start] = _absolute(self._base, start) or ""
        return self._starts.get(start, start) + rest

    def _heading(self, node: LexborNode, depth: int) -> list[str]:
        text = " ".join(self.lines(node, depth))
        return [Heading(f"{'#' * int(node.tag[1])} {text}")] if text else []

    def _list(self, node: LexborNode, depth: int) -> list[str]:
        out = []
        for item in node.iter():
            if item.tag == "li":
                if item.mem_id not in self._dropped and (lines := self.lines(item, depth)):
                    if lines[0]:
                        out.append(f"- {lines[0]}")
                    out.extend(f"  {line}" for line in lines[1:])
            else:  # a list right inside a list
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
        infobox = node.mem_id in self._infoboxes
        if not infobox and node.mem_id in self._arranged:
            return self.lines(node, depth)
        out = []
        for row in _parts(node, ("caption", "tr"), ("thead", "tbody", "tfoot")):
            if row.tag == "caption":
                out.append(_joined(self.lines(row, depth)))
                continue
            tags, texts = [], []
            for cell in row.iter():
                tag = cell.tag
                if tag in ("th", "td") and cell.mem_id not in self._dropped:
                    tags.append(tag)
                    texts.append(_joined(self.lines(cell, depth, br_ends_line=True)))
            if any(texts):
                keyed = (infobox and len(tags) == 2) or tags == ["th", "td"]
                out.append(f"{texts[0]}: {texts[1]}" if keyed and all(texts) else " | ".join(texts))
        return out

    def _preformatted(self, node: LexborNode, depth: int) -> list[str]:
        code = [line for line in map(clean_indented, node.text().splitlines()) if line]
        fence = "```"
        while any(fence in line for line in code):
            fence += "`"
        return [fence, *code, fence] if code else []


_STRUCTURES = {
    **{f"h{level}": Walk._heading for level in range(1, 7)},
    **dict.fromkeys(("ul", "ol", "menu"), Walk._list),
    "dl": Walk._definitions,
    "table": Walk._table,
    "pre": Walk._preformatted,
}
_KEPT = frozenset((*_STRUCTURES, *_INLINE, *_BLOCKS)) - _DROPPED_TAGS - {"form", "header"}


def _only_text(node: LexborNode) -> str | None:
    """The text of `node` where nothing else is in it."""
    first = node.first_child
    if first is None or first.next is not None or first.tag != "-text":
        return None
    return first.text_content or ""


def _parts(node: LexborNode, tags: tuple[str, ...], through: tuple[str, ...]) -> Iterator[LexborNode]:
    """Children of `node` with one of `tags`, and those inside its children of the tags `through`."""
    for child in node.iter():
        if child.tag in tags:
            yield child
        elif child.tag in through:
            yield from (inner for inner in child.iter() if inner.tag in tags)


def _around(nodes: Iterable[LexborNode]) -> set[int]:
    """Whatever has one of `nodes` inside."""
    around: set[int] = set()
    for node in nodes:
        outer = node.parent
        while outer is not None and outer.mem_id not in around:
            around.add(outer.mem_id)
            outer = outer.parent
    return around


def _joined(lines: list[str]) -> str:
    """Lines as one: sentences follow each other, other things are listed with commas, and code is not fenced."""
    out = ""
    for line in lines:
        if line.strip("`"):
            line = line.strip().removeprefix("- ")
            out += (" " if out.endswith((".", "!", "?", ":", ";", ",")) else ", ") + line if out else line
    return out


def _absolute(base: str, href: str) -> str | None:
    """`href` as an absolute http(s) URL without fragment, or None."""
    try:
        url = urldefrag(urljoin(base, clean_line(href))).url
    except ValueError:  # "http://[" and its like
        return None
    return url if url.startswith(("http://", "https://")) and len(url) <= MAX_URL_CHARS else None


def title_of(tree: LexborHTMLParser) -> str:
    node = tree.css_first("head > title") or tree.css_first("h1")
    return clean_line(node.text(), _MAX_TITLE_CHARS) if node else ""
