from __future__ import annotations

from urllib.parse import urldefrag, urljoin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selectolax.lexbor import LexborHTMLParser

from dr_jax.web.walk import MAX_LINKS, Walk


def walk(html: str, url: str = "http://lore.test/wiki/Ada") -> tuple[list[str], dict[str, str]]:
    """Lines and links."""
    walk = Walk(LexborHTMLParser(html), url)
    return walk.main_lines(), walk.links


def lines(html: str) -> list[str]:
    return walk(html)[0]


def test_links_are_absolute_unique_and_only_of_the_web():
    html = """<base href="https://other.test/dir/"><p><a href="a">first</a> <a href="a#x">again</a>
    <a href=" b\n ">b</a>
    <a href="javascript:x()">j</a> <a href="mailto:m@x">m</a> <a href="http://[">bad</a> <a>none</a> <a href="c"></a>
    <a href="http://lore.test/wiki/Ada#self">self</a>"""
    assert walk(html)[1] == {"https://other.test/dir/a": "first", "https://other.test/dir/b": "b"}
    assert len(walk("".join(f'<p><a href="/{i}">l</a>' for i in range(MAX_LINKS + 9)))[1]) == MAX_LINKS


HREF = st.lists(
    st.sampled_from(
        ["/", "//", "a", "b.html", ".", "..", ":", "?", "#", "=", "%20", ";", " ", "é", "[", "@", "http://", "https://"]
        + ["A.test", "a.test", ":80", "mailto:", "File:", "x" * 700]
    ),
    max_size=7,
).map("".join)


@settings(deadline=None)
@given(HREF, st.sampled_from(["http://a.test", "http://a.test/b/c.html?q=/x", "https://a.test/b/"]))
def test_a_link_leads_where_rfc_3986_says(href, base):
    try:
        target = urldefrag(urljoin(base, " ".join(href.split()))).url
    except ValueError:
        target = ""
    good = target.startswith(("http://", "https://")) and len(target) <= 2048 and target != base
    assert walk(f'<p><a href="{href}">text</a>', base)[1] == ({target: "text"} if good else {})


def test_a_table_is_data_unless_it_arranges_a_page_at_any_depth():
    data, arranged = "<tr><td>a<td>b", "<tr><td><div><h3>a</h3></div><td>b"
    assert lines(f"<table>{data}</table>") == ["a | b"]
    assert lines(f"<table>{arranged}</table><table>{data}</table>") == ["### a", "b", "a | b"]
    assert lines(f"<table><tr><td><table>{data}</table><td>c</table>") == ["a | b", "c"]


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("<pre>a\n  b\n</pre>", ["```", "a", "  b", "```"]),
        ("<pre>\n \n</pre>text", ["text"]),
        ("<pre>```\na\n```</pre>", ["````", "```", "a", "```", "````"]),
        ("<table><tr><td><pre>1\n2</pre><td><pre>x = 1\ny</pre></table>", ["1, 2 | x = 1, y"]),
    ],
)
def test_code_is_fenced_except_in_a_line_of_a_table(html, expected):
    assert lines(html) == expected
