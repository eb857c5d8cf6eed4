from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dr_jax.web.page import Response, extract
from dr_jax.web.scan import excess, harmless, modelled

FORMATTING = "".join(f"<font color={i}>" for i in range(1000))
BOMBS = {
    "nested div": "<div>" * 100_000,
    "nested div with stray ends": "<div></x>" * 50_000,
    "nested list": "<ul><li>" * 20_000,
    "unknown elements": "".join(f"<x{i}>" for i in range(50_000)),
    "links around blocks": "<a><div>" * 20_000,
    "ends that a scope stops": "<div><object></div></object>" * 20_000,
    "ends that a table stops": "<div><table><td></div></table>" * 20_000,
    "a script that is none": "<svg><script>" + "<g>" * 50_000,
    "a comment that is over": "<!-->" + "<div>" * 50_000,
    "options": "<select>" + "<option>" * 50_000,
    "attributes": "<p " + " ".join(f"a{i}=1" for i in range(50_000)) + ">",
    "attributes without spaces": "<p " + "".join(f"a{i}='1'" for i in range(50_000)) + ">",
    "attributes between slashes": "<p " + "/".join(f"a{i}" for i in range(50_000)) + ">",
    "attributes after a quoted end": '<p a=">" ' + " ".join(f"b{i}" for i in range(50_000)) + ">",
    "a quote that quotes nothing": ('<p ">' + "<div>" * 1000 + '">') * 100,
    "an equals sign that is a name": ('<p =">' + "<div>" * 1000 + '">') * 100,
    "an equals sign that is a value": ('<p a==">' + "<div>" * 1000 + '">') * 100,
    "a script in a text area": "<textarea><script></textarea>" + "<div>" * 50_000,
    "formatting": "<p>" + FORMATTING + "<p>x" * 6000,
    "formatting left open by blocks": f"<div>{FORMATTING}</div>" + "<p>x" * 6000,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused(bomb):
    assert excess(BOMBS[bomb])


HARMLESS = {
    "paragraphs without end tags": "<p>x" * 20_000,
    "items without end tags": "<ul>" + "<li>x" * 20_000 + "</ul>",
    "anchors without end tags": '<p>x<a name="n">' * 5000,
    "a script about tags": "<p>x<script>" + "if(a<b)c('<div>');" * 20_000 + "</script>",
    "a comment about tags": "<p>x<!-- " + "<div>" * 20_000 + " -->",
    "an image in its tag": f'<p>x<img src="data:image/png;base64,{"iVBOR/w0KGgo+" * 50_000}">',
    "ends without starts": "<p>x" + "</div>" * 20_000,
    "brackets": "<p>x" + "< " * 100_000,
    "many tables": "<table><tr><td>x</td></tr></table>" * 5000,
    "depth of a real page": "<div>" * 250 + "<p>x" + "</div>" * 250,
}


@pytest.mark.parametrize("html", HARMLESS)
def test_a_sloppy_page_is_read(html):
    assert excess(HARMLESS[html]) is None
    page = extract(Response("http://a.test/", "text/html", HARMLESS[html].encode()))
    assert "x" in page.segments[0]


PIECE = st.one_of(
    st.sampled_from(["<b>", "</b>", "<font color=x>", "<i ", "<a>", "<p>", "<div>", "</div>", "<option>", "<span>"]),
    st.sampled_from(["<!--", "-->", "<script>", "</script>", "<textarea>", "</textarea>", "<svg>", "<x<b>y</b>"]),
    st.sampled_from(["<", ">", "/", '"', "'", "=", ' a="', ' a="<b>x</b>"', ' "=">', "x", " ", "\n"]),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(PIECE, max_size=4), st.lists(PIECE, min_size=1, max_size=6), st.sampled_from([1, 400, 1100, 2100]))
def test_what_a_count_calls_harmless_is_harmless_to_the_model(start, unit, times):
    html = "".join(start) + "".join(unit) * times
    assert not harmless(html) or modelled(html) is None


def test_a_count_is_enough_for_an_ordinary_page():
    part = '<h2 id="p">Part</h2><p>Of <code class="x"><span>it</span></code> and <b>more</b>.<ul><li>One<li>Two</ul>'
    assert harmless(part * 150)
    assert harmless(f"<p>x<!-- {'x' * 100_000} -->")
    assert not harmless(f"<p {'x' * 100_000}>")
