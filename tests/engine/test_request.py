"""Requests: what is refused and with which words, and where a stop string ends."""

from __future__ import annotations

import numpy as np
import pytest

from dr_jax.engine.request import as_tokens, complaint, stop_string_end
from dr_jax.records import Sampling


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([], "empty"),
        ([[1, 2]], "flat list"),
        ([1.0, 2.0], "integers"),
        ([1, -1], "-1 is not in the vocabulary of 10"),
        ([1, 10], "10 is not in the vocabulary of 10"),
        ([2**40], f"{2**40} is not in the vocabulary"),
    ],
)
def test_bad_tokens_are_named(tokens, words):
    array, wrong = as_tokens(tokens, 10, "prompt")
    assert array.size == 0
    assert wrong.startswith("prompt: ")
    assert words in wrong


@pytest.mark.parametrize("tokens", [[0, 9], (0, 9), np.array([0, 9], np.int64), np.array([0, 9], np.uint8)])
def test_good_tokens(tokens):
    array, wrong = as_tokens(tokens, 10, "prompt")
    assert array.tolist() == [0, 9]
    assert (array.dtype, wrong) == (np.int32, "")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(temperature=-0.1), "temperature"),
        (dict(temperature=1e-9), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(temperature=float("inf")), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.1), "top_p"),
        (dict(top_k=-1), "top_k"),
        (dict(top_k=2**40), "top_k"),
        (dict(stop_ids=(3, 10)), "stop_ids: [10]"),
        (dict(stop_ids=tuple(range(9))), "stop_ids: got 9"),
        (dict(stop_strings=("",)), "stop_strings: an empty"),
    ],
)
def test_bad_sampling_is_named(changes, field):
    sampling = Sampling(**(dict(max_new_tokens=4) | changes))
    assert complaint(sampling, vocab_size=10, can_decode=True).startswith(field)


def test_stop_strings_need_text():
    sampling = Sampling(max_new_tokens=4, stop_strings=("x",))
    assert "decode_text" in complaint(sampling, vocab_size=10, can_decode=False)
    assert complaint(sampling, vocab_size=10, can_decode=True) == ""


def utf8(tokens) -> str:
    """Token = byte, as in byte-level BPE."""
    return bytes(tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("text", "new", "end"),
    [
        ("hello", 5, 0),
        ("ab</s>cd", 8, 6),
        ("ab</s>cd", 3, 6),  # completed by the first of the new tokens
        ("</s>" + "x" * 40 + "</s>yy", 4, 48),
        ("é</s>", 1, 6),  # 'é' is two tokens
        ("x" * 30 + "é€</s>z", 4, 39),
    ],
)
def test_the_token_that_completes_a_stop_string_is_the_last(text, new, end):
    assert stop_string_end(list(text.encode()), new, ["</s>", "[end]"], utf8) == end


def test_a_stop_string_may_be_cut_anywhere():
    words = ["a", "b</", "s", "> and", " more"]
    decode = lambda ids: "".join(words[i] for i in ids)  # noqa: E731
    assert stop_string_end([0, 1, 2, 3, 4], 5, ["</s>"], decode) == 4
