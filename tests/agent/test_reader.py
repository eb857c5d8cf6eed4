from __future__ import annotations

import dataclasses

import pytest

from dr_jax.agent.reader import ExtractiveReader
from dr_jax.records import Page

LEAD = "Alda Brent is a writer. She likes rain."
ANN = Page(
    "http://a",
    "Alda Brent - Lore",
    (
        f"# Alda Brent\nSpouse: Kim Lee\n{LEAD}",
        "## Personal life\nAlda Brent walks daily. The spouse of Alda Brent is Kim Lee, who was born in Orsk.",
        "## Career\nAlda Brent directed the film Kite in 1999. Critics liked Alda Brent.",
    ),
)


async def read(page, question, *, query="Alda Brent", notes=(), **limits):
    return await ExtractiveReader(**limits).read(page, question=question, query=query, notes=notes)


async def test_quotes_the_sentence_that_matches_the_relation():
    found = await read(ANN, "Who is the spouse of Alda Brent?")
    assert found == (
        (0, "Spouse: Kim Lee"),
        (1, "The spouse of Alda Brent is Kim Lee, who was born in Orsk."),
    )


async def test_words_of_one_stem_match():
    found = await read(ANN, "Which film was by the director Alda Brent?")
    assert found == ((2, "Alda Brent directed the film Kite in 1999."),)


async def test_says_only_what_is_new():
    note = "Spouse: Kim Lee The spouse of Alda Brent is Kim Lee, who was born in Orsk."
    found = await read(ANN, "Who is the spouse of Alda Brent?", notes=[note])
    assert "Kim Lee" not in str(found)


async def test_without_a_telling_word_the_subject_itself_is_described():
    found = await read(ANN, "Alda Brent?")
    assert found[0][1].startswith("Alda Brent is a writer.")


async def test_nothing_in_common_is_nothing():
    assert await read(ANN, "Capital of Mars?", query="Mars") == ()
    assert await read(Page("http://a", "", ()), "Capital of Mars?") == ()


@pytest.mark.parametrize(("limits", "count"), [({}, 3), ({"max_sentences": 1}, 1), ({"max_chars": 60}, 2)])
async def test_limits(limits, count):
    facts = [f"Fact {name} of the moon is here." for name in "abcdefgh"]
    found = await read(Page("http://a", "Moon", ("\n".join(facts),)), "fact of the moon?", query="", **limits)
    quoted = " ".join(text for _, text in found)
    assert quoted.count("Fact") == count
    assert len(quoted) <= limits.get("max_chars", 600) + count


async def test_a_sentence_without_end_is_cut():
    page = Page("http://a", "Moon", ("grey moon rock " * 10_000,))
    ((segment, text),) = await read(page, "Which rock?", query="moon")
    assert (segment, len(text)) == (0, 600)


def paragraphs(count, telling):
    return tuple(f"Nothing of note in part {i}." for i in range(count)) + (telling,)


async def test_stops_early_on_a_page_about_something_else():
    late = "The spouse of Alda Brent is Kim Lee."
    question = "Who is the spouse of Alda Brent?"
    assert await read(Page("http://a", "Weather", paragraphs(3, late)), question) == ()
    assert await read(Page("http://a", "Weather", paragraphs(2, late)), question) == ((2, late),)


async def test_reads_on_where_the_page_is_the_one_asked_for():
    late = "The spouse of Alda Brent is Kim Lee."
    page = Page("http://a", "Alda Brent - Lore", paragraphs(20, late))
    assert await read(page, "Who is the spouse of Alda Brent?") == ((20, late),)


async def test_never_reads_past_its_limit():
    late = "The spouse of Alda Brent is Kim Lee."
    page = Page("http://a", "Alda Brent", paragraphs(24, late))
    assert await read(page, "Who is the spouse of Alda Brent?") == ()


async def test_repeated_sentences_are_quoted_once():
    page = Page("http://a", "Moon", ("The moon has a spouse here.",) * 3)
    found = await read(page, "spouse?", query="")
    assert sum(text.count("spouse") for _, text in found) == 1


LATE = "In 1999 she married Kim Lee."
LONG = Page(
    "http://a",
    "Alda Brent - Lore",
    (*paragraphs(30, f"## Spouse\n{LATE}"), *paragraphs(5, "Her spouse is not named here.")),
    headings=(*["Alda Brent > Career"] * 30, "Alda Brent > Spouse", *["Alda Brent > Reception"] * 6),
)


async def test_jumps_to_the_part_whose_heading_speaks_of_what_is_asked_for():
    question = "Whom did the spouse of Alda Brent name when they married?"
    without = dataclasses.replace(LONG, headings=())
    assert await read(LONG, question, max_segments=1) == ((30, LATE),)
    assert await read(without, question, max_segments=30) == ()
    assert (await read(without, question, max_segments=31))[-1] == (30, LATE)


async def test_what_was_read_out_of_order_is_quoted_in_reading_order():
    page = Page("http://a", "Alda", ("Her spouse paints.", "Her spouse sings."), headings=("Life", "Spouse"))
    assert await read(page, "spouse?", query="") == ((0, "Her spouse paints."), (1, "Her spouse sings."))
