"""Shipped fakes, for tests of this library and of what is built on it: no network, accelerator, model or waiting."""

from __future__ import annotations

import asyncio
import itertools
import selectors
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from dr_jax.records import Failure, FailureKind, Finish, Hit, Page, Sampled, Sampling

QWEN_CONTROL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip


def byte_tokenizer() -> Any:
    """A `tokenizers.Tokenizer` with one token a byte and Qwen2.5's control tokens after them: ids 0 to 277."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: id for id, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    calls = ("<tool_call>", "</tool_call>")  # which Qwen does not flag as special
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=t not in calls) for t in QWEN_CONTROL_TOKENS])
    return tokenizer


Script = Callable[[np.ndarray, Sampling], "Sequence[int] | Sampled"]


class ScriptedSampler:
    """A `Sampler` that plays a script: given outputs in turn, or a function of (prompt, sampling).

    Log-probabilities are those of a uniform choice among `vocab_size` tokens. An output longer than `max_new_tokens` is
    cut and finishes as LENGTH, as an engine would do it. `prompts` and `samplings` hold what was asked, in that order.
    """

    def __init__(
        self,
        script: Iterable[Sequence[int] | Sampled] | Script,
        *,
        delay_s: float | Callable[[int], float] = 0.0,
        version: int = 0,
        vocab_size: int = 1000,
    ) -> None:
        outputs = None if callable(script) else iter(script)
        self._script: Script = script if callable(script) else lambda prompt, sampling: next(outputs)
        self._delay_s = delay_s if callable(delay_s) else lambda call: delay_s
        self._logp = -float(np.log(vocab_size))
        self.version = version
        self.prompts: list[np.ndarray] = []
        self.samplings: list[Sampling] = []

    async def generate(self, prompt: Sequence[int] | np.ndarray, sampling: Sampling) -> Sampled:
        call = len(self.prompts)
        self.prompts.append(np.asarray(prompt, np.int32))
        self.samplings.append(sampling)
        if delay_s := self._delay_s(call):
            await asyncio.sleep(delay_s)
        try:
            output = self._script(self.prompts[call], sampling)
        except StopIteration:
            return self._sampled([], Finish.ERROR, f"the script has no output for call {call}")
        if isinstance(output, Sampled):
            return output
        cut = len(output) > sampling.max_new_tokens
        return self._sampled(output[: sampling.max_new_tokens], Finish.LENGTH if cut else Finish.STOP)

    async def score(self, prompt: Sequence[int] | np.ndarray, continuation: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.full(len(continuation), self._logp, np.float32)

    def _sampled(self, tokens: Sequence[int], finish: Finish, detail: str = "") -> Sampled:
        logps = np.full(len(tokens), self._logp, np.float32)
        return Sampled(np.asarray(tokens, np.int32), logps, finish, self.version, detail)


Result = TypeVar("Result")


def run_in_no_time(main: Coroutine[Any, Any, Result]) -> Result:
    """What `main` returns, run on an event loop whose clock jumps from timer to timer: an hour's wait takes no time.

    Time is that of the loop (`loop.time()`, `asyncio.sleep`, `asyncio.timeout`). There are no sockets and no threads,
    so everything happens at the same moments in every run. Raises `RuntimeError` where all wait, and for no timer.
    """
    with asyncio.Runner(loop_factory=_JumpingLoop) as runner:
        return runner.run(main)


class _JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _JumpingClock()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s


class _JumpingClock(selectors.SelectSelector):
    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("everything waits, and for no timer: a deadlock")
        self.now_s += max(timeout, 0.0)
        return []


class TinyWeb:
    """A `Searcher` and a `Browser` over pages given as URL -> Page, or URL -> Failure.

    A search returns the pages whose title or text holds every word of the query, in the order of the URLs given.
    `requests` holds every query and URL asked for, in order.
    """

    def __init__(self, pages: Mapping[str, Page | Failure], *, search_failure: Failure | None = None) -> None:
        self._pages = pages
        self._search_failure = search_failure
        self.requests: list[str] = []

    async def search(self, query: str, *, top_k: int) -> tuple[Hit, ...] | Failure:
        self.requests.append(query)
        if self._search_failure:
            return self._search_failure
        words = query.lower().split()
        hits = (_hit(url, page) for url, page in self._pages.items())
        return tuple(itertools.islice((hit for hit, text in hits if all(word in text for word in words)), top_k))

    async def browse(self, url: str) -> Page | Failure:
        self.requests.append(url)
        return self._pages.get(url, Failure(FailureKind.STATUS, "no such page", status=404))


def _hit(url: str, page: Page | Failure) -> tuple[Hit, str]:
    if isinstance(page, Failure):
        return Hit(url, url, ""), url.lower()
    text = " ".join(page.segments)
    return Hit(page.title, url, text[:80]), f"{page.title} {text}".lower()
