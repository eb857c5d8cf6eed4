"""What in a page would blow up the parser, found before parsing.

lexbor's cost is quadratic in depth (a minute for 0.5 MB of nested <div>), and it clones formatting elements left open
into every block after them (3.7 GB for 55 KB), so no limit on bytes protects it. The scan is a cheap model of the
parser that takes the worse side in doubt; it is not a proof.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

_MAX_DEPTH = 1000  # lexbor is quadratic in it: 0.1 s at 10,000, a minute at 100,000; browsers stop at 512
_MAX_MISNESTED = 2000  # end tags that close more than their own element: the parser may see it otherwise
_MAX_REOPENED = 200_000  # elements the parser would clone to carry open formatting into new blocks
_MAX_OPTIONS = 10_000
_MAX_ATTRIBUTES = 2000  # of one tag
_LONG_TAG_CHARS = 4 * _MAX_ATTRIBUTES

# A comment, or a tag (end mark, name, attributes), as HTML tokenizers cut them: a quote means something after "=" only.
# Every part may end at the end of the text, so that a match always succeeds and the scan is linear.
_VALUE = r"""(?:"[^"]*+(?:"|\Z)|'[^']*+(?:'|\Z)|[^ \t\n\r\f"'>][^ \t\n\r\f>]*+)"""
_ATTRIBUTE = re.compile(rf"[^ \t\n\r\f/>][^ \t\n\r\f/>=]*+(?:[ \t\n\r\f]*+=[ \t\n\r\f]*+{_VALUE}?+)?+")
_TAG = re.compile(
    r"<!--(?:-?>|(?s:.*?)(?:--!?>|\Z))|"
    rf"<(/?)([a-zA-Z][^ \t\n\r\f/>]*+)((?:[ \t\n\r\f/]++|{_ATTRIBUTE.pattern})*+)"
)
# Elements whose content is text up to their end tag, except where other rules hold.
_RAW = frozenset(str.split("script style textarea title"))
_OTHER_RULES = frozenset(str.split("svg math select"))

_FORMATTING = frozenset(str.split("a b big code em font i nobr s small strike strong tt u"))
_SINGLE = frozenset(str.split("a nobr"))  # formatting elements that end the one before
# Void elements, and those whose end tags may be left out: they do not nest.
_FLAT = frozenset(
    str.split(
        "a nobr area base br col embed hr img input link meta param source track wbr "
        "p li dt dd tr td th thead tbody tfoot colgroup option optgroup rp rt html head body"
    )
)

# What `harmless` counts. A name ends where `_TAG` ends it, and what hides tags (a comment, a script, a quoted value)
# ends with a character that no name holds: every tag is counted, and some that are none.
_NAME = re.compile(r"<([a-z][^ \t\n\r\f/>]*+)")
_QUOTED_END = re.compile(r"""=[ \t\n\r\f]*+(?:"[^">]*+>|'[^'>]*+>)""")  # a ">" in a quoted value
_SHORT_PIECES = re.compile(rf"(?:[^>]{{0,{_LONG_TAG_CHARS}}}+>)*+")
_TAG_START = re.compile("</?[a-z]")
_NESTING = _FORMATTING - _SINGLE
_SIMPLE = r'(?: [a-z-]++="[^"<>]*+")*+>'
_LEFT_OPEN = re.compile(  # a formatting element, unless it is over before another one opens
    rf"<({'|'.join(sorted(_NESTING))})(?![^ \t\n\r\f/>])"
    rf"(?!{_SIMPLE}(?:[^<]++|</?(?:span|a|br){_SIMPLE})*+</\1>)"
)


def excess(html: str) -> str | None:
    """What in `html` would cost the parser more than a page may, or None."""
    html = html.lower()
    return None if harmless(html) else modelled(html)


def harmless(html: str) -> bool:
    """Whether lower-case `html` has too few tags to reach a limit in any order: most pages do, and a count is cheap."""
    opened = Counter(_NAME.findall(html))
    total = opened.total()
    at_once = 1 + len(_SINGLE) + sum(opened[name] for name in _NESTING)  # formatting elements, at most
    if at_once * total > _MAX_REOPENED:
        at_once = 1 + len(_SINGLE) + len(_LEFT_OPEN.findall(html))
    return (
        total - sum(opened[name] for name in _FLAT) <= _MAX_DEPTH
        and html.count("</") <= _MAX_MISNESTED
        and at_once * total <= _MAX_REOPENED
        and opened["option"] <= _MAX_OPTIONS
        and _QUOTED_END.search(html) is None
        and _short_tags(html)
    )


def _short_tags(html: str) -> bool:
    """Whether no tag is longer than `_LONG_TAG_CHARS`, where each ends at the first ">"."""
    start = 0
    while (start := _SHORT_PIECES.match(html, start).end()) < len(html):
        end = html.find(">", start) + 1 or len(html)
        if _TAG_START.search(html, start, max(start, end - _LONG_TAG_CHARS)):
            return False
        start = end
    return True


def modelled(html: str) -> str | None:
    """What the model of the parser finds in lower-case `html`, tag by tag."""
    stack: list[str] = []
    opened: dict[str, int] = {}  # how many of the stack have this name
    active = dict.fromkeys(_FORMATTING, 0)  # formatting elements: an end tag of another element does not end them
    formatting = reopened = misnested = options = 0
    for end_mark, name, attributes in _tags(html):
        if len(attributes) > _LONG_TAG_CHARS and _count_up_to(_ATTRIBUTE, attributes, _MAX_ATTRIBUTES):
            return f"a tag with more than {_MAX_ATTRIBUTES} attributes"
        if name in _FORMATTING:
            change = -(active[name] > 0) if end_mark else name not in _SINGLE or not active[name]
            active[name] += change
            formatting += change
        if not end_mark:
            reopened += formatting
            if name not in _FLAT:
                stack.append(name)
                opened[name] = opened.get(name, 0) + 1
                if len(stack) > _MAX_DEPTH:
                    return f"elements nested more than {_MAX_DEPTH} deep"
            elif name == "option":
                options += 1
        elif opened.get(name):
            misnested += stack[-1] != name
            while (last := stack.pop()) != name:
                opened[last] -= 1
            opened[name] -= 1
    if misnested > _MAX_MISNESTED:
        return f"more than {_MAX_MISNESTED} elements nested wrongly"
    if reopened > _MAX_REOPENED or options > _MAX_OPTIONS:
        return "too many unclosed formatting elements or options"
    return None


def _tags(html: str) -> Iterator[tuple[str, str, str]]:
    """("/" of an end tag, name, attributes) of each tag of lower-case `html` outside comments, scripts and styles."""
    inside = dict.fromkeys(_OTHER_RULES, 0)
    start = 0
    while start >= 0:
        for match in _TAG.finditer(html, start):
            tag = end_mark, name, _ = match.groups("")
            if name:  # not a comment
                yield tag
            if name in _OTHER_RULES:
                inside[name] = max(0, inside[name] + (-1 if end_mark else 1))
            elif name in _RAW and not end_mark and not any(inside.values()):
                start = html.find(f"</{name}", match.end())
                break
        else:
            return


def _count_up_to(pattern: re.Pattern[str], text: str, limit: int) -> bool:
    return any(count >= limit for count, _ in enumerate(pattern.finditer(text)))
