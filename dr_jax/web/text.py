"""Bytes of the web as text that is safe to print, to encode and to tokenise."""

from __future__ import annotations

import re

import charset_normalizer
from w3lib import encoding as w3lib_encoding

MAX_URL_CHARS = 2048

# What browsers decode (WHATWG), by Python's names. Python knows more "encodings" than that (hex, rot13, idna,
# unicode_escape, ...), and a page may ask for any of them.
_ENCODINGS = frozenset({
    "utf-8", "utf-16-le", "utf-16-be", "cp1250", "cp1251", "cp1252", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257",
    "cp1258", "cp866", "cp874", "cp932", "cp949", "gb18030", "big5hkscs", "euc_jp", "iso2022_jp", "koi8-r", "koi8-u",
    "mac-roman", "iso8859-2", "iso8859-3", "iso8859-4", "iso8859-5", "iso8859-6", "iso8859-7", "iso8859-8",
    "iso8859-10", "iso8859-13", "iso8859-14", "iso8859-15", "iso8859-16",
})  # fmt: skip
_SNIFFED_BYTES = 1 << 14

# Controls (tab and newline are white space), soft hyphens, direction overrides, byte-order marks, lone surrogates.
_UNSAFE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def clean_line(text: str, max_chars: int | None = None) -> str:
    """`text` on one line: runs of white space are one space, and no character can break a terminal or an encoder."""
    line = text.replace("\n", " ")
    if line.isprintable() and "  " not in line:  # in print, a space is the only white space
        line = line.strip(" ")
    else:
        line = " ".join(text.split())
        if not line.isprintable():
            line = " ".join(_UNSAFE.sub("", text).split())
    return line if max_chars is None else line[:max_chars].rstrip()


def clean_indented(text: str) -> str:
    """A line of `text` as it stands, indentation included, without what `clean_line` takes out."""
    return _UNSAFE.sub("", text).expandtabs(4).rstrip()


def decode(body: bytes, content_type: str) -> str:
    """`body` as browsers decode it: byte-order mark, then HTTP header, then <meta>, then a guess. Never fails: unknown
    encodings are UTF-8, and undecodable bytes U+FFFD."""
    marked, mark = w3lib_encoding.read_bom(body)
    if marked is not None and mark is not None:
        return w3lib_encoding.to_unicode(body[len(mark) :], marked)
    named = w3lib_encoding.http_content_type_encoding(content_type) or w3lib_encoding.html_body_declared_encoding(body)
    if named in ("utf-16", "utf-16-le", "utf-16-be") and b"\x00" not in body[:_SNIFFED_BYTES]:
        named = "utf-8"  # who could read the label read ASCII
    if named in _ENCODINGS:
        return w3lib_encoding.to_unicode(body, named)
    return w3lib_encoding.to_unicode(body, "utf-8" if named else _guess(body))


def _guess(body: bytes) -> str:
    try:
        body.decode("utf-8")
    except UnicodeDecodeError:
        # Only now: the detector is slow, and mistakes short western texts for DOS code pages, hence the default.
        best = charset_normalizer.from_bytes(body[:_SNIFFED_BYTES]).best()
        guess = w3lib_encoding.resolve_encoding(best.encoding) if best else None
        return guess if guess in _ENCODINGS else "cp1252"
    return "utf-8"
