from __future__ import annotations

import encodings.aliases

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dr_jax.web.text import clean_indented, clean_line, decode

GERMAN = "Größe: 5 € – „schön“, groß und überall für die Bücher der Straße, wo wir häufig übernachten möchten"
JAPANESE = "日本語の文章です。東京は日本の首都であり、世界最大級の都市の一つです。"


@pytest.mark.parametrize(
    ("body", "content_type", "text"),
    [
        (GERMAN.encode(), "text/html", GERMAN),
        (GERMAN.encode("cp1252"), "text/html; charset=ISO-8859-1", GERMAN),  # as browsers read latin-1
        (GERMAN.encode("cp1252"), "text/html", GERMAN),  # says nothing: guessed
        (b'<meta charset="windows-1252">' + GERMAN.encode("cp1252"), "", '<meta charset="windows-1252">' + GERMAN),
        (b"<meta charset=utf-8>" + JAPANESE.encode("cp932"), "text/html;charset=Shift_JIS", None),  # header first
        (JAPANESE.encode("euc_jp"), 'text/html; charset="euc-jp"', JAPANESE),
        ("中文".encode("gb18030"), "text/html; charset=gb2312", "中文"),
        ("한국어".encode("cp949"), "text/html; charset=ks_c_5601-1987", "한국어"),
        ("Привет".encode("koi8-r"), "text/html; charset=koi8-r", "Привет"),
        (b"\xef\xbb\xbf" + JAPANESE.encode(), "text/html; charset=latin-1", JAPANESE),  # the mark wins
        (b"\xff\xfe" + JAPANESE.encode("utf-16-le"), "", JAPANESE),
        (b"\xfe\xff" + JAPANESE.encode("utf-16-be"), "", JAPANESE),
        (b"<meta charset=utf-16>" + GERMAN.encode(), "", "<meta charset=utf-16>" + GERMAN),
        (b"caf\xe9 \xff", "text/html; charset=utf-8", "caf� �"),
    ],
)
def test_decode_as_browsers_do(body, content_type, text):
    decoded = decode(body, content_type)
    assert decoded == text if text else decoded.endswith(JAPANESE)


@pytest.mark.parametrize("label", ["hex", "rot13", "undefined", "utf-7", "unicode_escape", "cp037", "idna", "bogus"])
def test_a_lie_about_the_charset_is_utf_8(label):
    assert decode(b"+ADw- \\u0041 6869 \xc3\xa9", f"text/html; charset={label}") == "+ADw- \\u0041 6869 é"


@settings(deadline=None)
@given(st.sampled_from(sorted(set(encodings.aliases.aliases))), st.binary(max_size=64), st.booleans())
def test_no_charset_makes_decode_raise(label, body, in_meta):
    text = decode(b"<meta charset=" + label.encode() + b">" + body, "" if in_meta else f"text/html; charset={label}")
    clean_line(text).encode()


@settings(deadline=None)
@given(st.text(st.characters(categories=["Cs", "Cc", "Cf", "Zs", "Zl", "Zp", "Lu", "Co"])))
def test_a_clean_line_is_one_line_that_encodes(text):
    line = clean_line(text)
    line.encode()
    assert len(line.splitlines()) <= 1
    assert line == line.strip()
    assert clean_line(line) == line
    assert not set(line) & set("\x00\x1b\x7f\x9b\xad\u202e\u2066\ufeff")


def test_clean_line_keeps_what_scripts_need():
    assert clean_line(" a\t\n b\u00a0c  नी\u200d 👩\u200d🔬 ") == "a b c नी\u200d 👩\u200d🔬"
    assert clean_line("hy\u00adphen \x1b[31mred", 9) == "hyphen [3"
    assert clean_indented("\tif x:\x00  ") == "    if x:"
