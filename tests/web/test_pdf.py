from __future__ import annotations

import pytest

from dr_jax.records import FailureKind
from dr_jax.web import pdf
from dr_jax.web.page import Response
from dr_jax.web.workers import ParserPool

pytest.importorskip("pypdfium2")

LINES = (
    "The kite is a bird of prey that lives near the",
    "river. It builds its nest in the high-",
    "est trees of the valley.",
    "A second paragraph begins after the short line",
    "and ends here.",
)


def pdf_of(*pages: tuple[str, ...]) -> bytes:
    """A PDF by hand: each page a content stream of lines, one font for all."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    for i, lines in enumerate(pages):
        shown = " ".join(f"({line}) Tj 0 -14 Td" for line in lines)
        stream = f"BT /F1 12 Tf 40 700 Td {shown} ET"
        fonts = "/Resources<</Font<</F1 3 0 R>>>>"
        objects.append(f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]{fonts}/Contents {5 + 2 * i} 0 R>>")
        objects.append(f"<</Length {len(stream)}>>stream\n{stream}\nendstream")
    out, offsets = "%PDF-1.4\n", []
    for number, text in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj{text}endobj\n"
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    start = len(out)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    return (out + f"trailer<</Size {len(objects) + 1}/Root 1 0 R>>\nstartxref\n{start}\n%%EOF").encode()


async def test_a_pdf_by_pages_and_paragraphs_in_a_worker():
    response = Response("http://a.test/k", "application/octet-stream", pdf_of(LINES, (), ("Last page.",)))
    async with ParserPool(1) as pool:
        page = await pool.extract(response)
        assert page.segments == (
            "# Page 1\nThe kite is a bird of prey that lives near the river. It builds its nest in the highest trees "
            "of the valley.\nA second paragraph begins after the short line and ends here.\n# Page 3\nLast page.",
        )
        assert (await pool.extract(response, max_segment_chars=120)).headings == ("Page 1", "Page 1", "Page 3")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"%PDF-1.7 and then nothing of the kind", FailureKind.PARSE_LIMIT),
        (pdf_of(()), FailureKind.EMPTY),
        (pdf_of(LINES)[:300], FailureKind.PARSE_LIMIT),
    ],
)
async def test_a_pdf_without_text(body, kind):
    async with ParserPool(1) as pool:
        assert (await pool.extract(Response("u", "application/pdf", body))).kind is kind


async def test_pages_past_the_limit_are_left_out():
    many = pdf_of(*((f"This is {i}.",) for i in range(pdf.MAX_PAGES + 5)))
    async with ParserPool(1) as pool:
        page = await pool.extract(Response("u", "application/pdf", many))
    assert page.segments[-1].endswith(f"This is {pdf.MAX_PAGES - 1}.")
