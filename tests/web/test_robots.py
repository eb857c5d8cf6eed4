from __future__ import annotations

import asyncio
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protego import Protego
from yarl import URL

from dr_jax.records import Failure, FailureKind
from dr_jax.web.robots import AGENT, FAILURE_TTL_S, MAX_BYTES, OURS_TTL_S, TTL_S, Robots, ours

PAGE = URL("https://site.test/private/page?q=1")


class Site:
    """What a site answers for its robots.txt, and what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    async def __call__(self, url):
        self.asked.append(str(url))
        await asyncio.sleep(0)
        return self.answers[min(len(self.asked), len(self.answers)) - 1]


async def check(answer, url=PAGE):
    return await Robots().check(url, Site(answer))


NO = b"User-agent: *\nDisallow: /private/\n"


@pytest.mark.parametrize(
    ("rules", "allowed"),
    [
        (b"", True),
        (NO, False),
        (b"\xef\xbb\xbfUSER-AGENT: *\r\nDISALLOW: /private/\r\n", False),
        (b"User-agent: *\nDisallow: /private/\nAllow: /private/page", True),  # the longest match decides
        (b"User-agent: *\nDisallow: /*/page?q=1$", False),
        (b"User-agent: *\nDisallow: /*.pdf$", True),
        (b"User-agent: DR_JAX\nDisallow: /\nUser-agent: *\nAllow: /", False),
        (b"User-agent: dr_jax/0.1 (research agent)\nDisallow: /", False),
        (b"User-agent: dr_jax # you\nAllow: /\nUser-agent: *\nDisallow: /", True),
        (b"User-agent: a\nUser-agent: dr_jax\nUser-agent: b\nDisallow: /", False),
        (b"User-agent: dr\nDisallow: /", True),  # another robot's name
        (b"User-agent: dr_jax_other\nDisallow: /", True),
        (b"User-agent: GPTBot\nDisallow: /\n\nUser-agent: *\nDisallow:", True),
        (b"User-agent: *\nDisallow: /\x00\xff\n" + NO, False),
        (os.urandom(10_000).replace(b"*", b""), True),
        (b"<html><body>Not found</body></html>", True),
    ],
)
async def test_what_rules_say(rules, allowed):
    verdict = await check(rules)
    assert verdict == (0.0 if allowed else Failure(FailureKind.ROBOTS, "robots.txt says no"))


@pytest.mark.parametrize(
    ("failure", "verdict"),
    [
        (Failure(FailureKind.STATUS, "HTTP 404", 404), 0.0),
        (Failure(FailureKind.STATUS, "HTTP 403", 403), 0.0),
        (Failure(FailureKind.REDIRECTS, "more than 5"), 0.0),
        (Failure(FailureKind.STATUS, "HTTP 500", 500), Failure(FailureKind.STATUS, "robots.txt: HTTP 500", 500)),
        (Failure(FailureKind.CONNECTION, "x"), Failure(FailureKind.CONNECTION, "robots.txt: x")),
        (Failure(FailureKind.NO_SUCH_HOST), Failure(FailureKind.NO_SUCH_HOST, "robots.txt: ")),
        (Failure(FailureKind.RATE_LIMITED, "x", 429), Failure(FailureKind.RATE_LIMITED, "robots.txt: x", 429)),
    ],
)
async def test_no_rules_means_welcome_and_rules_out_of_reach_mean_not_welcome(failure, verdict):
    assert await check(failure) == verdict


@pytest.mark.parametrize(
    ("value", "delay_s"), [("2.5", 2.5), ("86400", 86400), ("-1", 0), ("soon", 0), ("nan", 0), ("inf", 0), ("", 0)]
)
async def test_crawl_delay(value, delay_s):
    assert await check(f"User-agent: *\nCrawl-delay: {value}\nDisallow: /x".encode()) == delay_s


async def test_one_question_per_origin_however_many_ask():
    robots, site = Robots(), Site(NO)
    verdicts = await asyncio.gather(*(robots.check(PAGE.with_query(i=i), site) for i in range(20)))
    assert {verdict.kind for verdict in verdicts} == {FailureKind.ROBOTS}
    await robots.check(PAGE.with_scheme("http"), site)
    await robots.check(PAGE.with_port(8443), site)
    assert site.asked == [f"{origin}/robots.txt" for origin in ("https://site.test", "http://site.test")] + [
        "https://site.test:8443/robots.txt"
    ]


@pytest.mark.parametrize(
    ("answer", "ttl_s"),
    [
        (NO, TTL_S),
        (Failure(FailureKind.STATUS, "", 404), TTL_S),
        (Failure(FailureKind.STATUS, "", 503), FAILURE_TTL_S),
        (Failure(FailureKind.TIMEOUT), OURS_TTL_S),
    ],
)
async def test_how_long_an_answer_is_kept(answer, ttl_s):
    times = [0.0]
    robots, site = Robots(clock=lambda: times[-1]), Site(answer)
    for now_s, asked in ((0.0, 1), (ttl_s - 1, 1), (ttl_s, 2), (ttl_s + 1, 2)):
        times.append(now_s)
        await robots.check(PAGE, site)
        assert len(site.asked) == asked


async def test_who_asked_may_leave_without_harm_to_the_others():
    robots, never = Robots(), asyncio.Event()
    first = asyncio.create_task(robots.check(PAGE, lambda url: never.wait()))
    await asyncio.sleep(0)
    second = asyncio.create_task(robots.check(PAGE, Site(NO)))
    first.cancel()
    assert (await second).kind is FailureKind.ROBOTS


async def test_what_is_kept_is_bounded_and_the_least_used_goes_first():
    robots, site = Robots(), Site(b"User-agent: *\n" + b"# padding\n" * 40_000)
    for i in range(40):
        await robots.check(URL(f"http://{i}.test/"), site)
        await robots.check(URL("http://0.test/"), site)
    assert len(site.asked) == 40
    await robots.check(URL("http://1.test/"), site)
    assert len(site.asked) == 41


def test_a_long_file_is_cut_at_a_line():
    body = b"User-agent: *\n" + b"Disallow: /aaaa\n" * 40_000
    text = ours(body[:MAX_BYTES])
    assert text.splitlines()[-1] == "Disallow: /aaaa"
    assert MAX_BYTES - 100 < len(text) < MAX_BYTES


def test_many_agents_with_many_rules_cost_no_more_than_few():
    """Without `ours`, the parser would keep a rule per agent and line: 10^8 of them here."""
    agents = "".join(f"User-Agent: robot-{i}\nuser agent robot{i}\n" for i in range(5000))
    rules = Protego.parse(ours((agents + "User-agent: *\n" + "Disallow: /a\n" * 20_000).encode()))
    assert set(rules._user_agents) == {"somebody-else", "*"}
    assert not rules.can_fetch("/a", AGENT)


LINES = st.sampled_from(["User-agent: ", "Disallow: ", "Allow: ", "Crawl-delay: ", "Sitemap: ", "Host: ", ""])
BODIES = st.lists(st.tuples(LINES, st.text(max_size=12)).map("".join), max_size=12).map(
    lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")
)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=200), BODIES), st.text(max_size=20))
def test_no_file_makes_check_raise(body, path):
    url = URL("http://site.test/") / path.replace("/", "") if path.strip("./") else PAGE
    verdict = asyncio.run(check(body, url))
    assert verdict == Failure(FailureKind.ROBOTS, "robots.txt says no") or verdict >= 0
