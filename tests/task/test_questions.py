from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from dr_jax.errors import ConfigError
from dr_jax.records import Question
from dr_jax.task.questions import QuestionOrder, load

GOOD = {"id": "a", "text": "Who?", "answers": ["Ann", "Anna"]}


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_jsonl_keeps_order_and_fields(tmp_path):
    full = {
        "id": 7,
        "text": "Où?",
        "answers": ["là"],
        "source": "world",
        "hops": 2,
        "evidence": ["http://a", "http://b"],
    }
    path = write(tmp_path / "q.jsonl", GOOD, "", full)
    assert load(path) == (
        Question("a", "Who?", ("Ann", "Anna")),
        Question("7", "Où?", ("là",), "world", 2, ("http://a", "http://b")),
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not a line of JSON"),
        ("[" * 100_000, "not a line of JSON"),
        ("[1]", "got list"),
        ('{"id": "b", "text": "Who?"}', "answers is None"),
        ('{"id": "b", "text": "Who?", "answers": "Ann"}', "answers is 'Ann'"),
        ('{"id": "b", "text": "Who?", "answers": []}', "answers is []"),
        ('{"id": "b", "text": "Who?", "answers": ["Ann", ""]}', "answers is"),
        ('{"id": "b", "text": " ", "answers": ["Ann"]}', "text is ' '"),
        ('{"id": "b", "text": "%s", "answers": ["Ann"]}' % ("x" * 10_001), "need text of 1 to 10000"),
        ('{"id": true, "text": "Who?", "answers": ["Ann"]}', "id is True"),
        ('{"id": "a", "text": "Who?", "answers": ["Ann"]}', "'a' stands there twice"),
        ('{"id": "b", "text": "Who?", "answers": ["Ann"], "hops": -1}', "hops is -1"),
        ('{"id": "b", "text": "Who?", "answers": ["Ann"], "evidence": "http://a"}', "evidence is 'http://a'"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, words):
    path = write(tmp_path / "q.jsonl", GOOD, line)
    with pytest.raises(ConfigError) as error:
        load(path)
    assert f"{path}:2: " in str(error.value)
    assert words in str(error.value)
    assert len(str(error.value)) < 400


def test_a_bad_byte_is_named_by_file_and_number(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(ConfigError, match=r"q\.jsonl:2: not a line of JSON"):
        load(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("q.csv", "id,text", "Allowed: .jsonl, .parquet"),
        ("q.jsonl", "", "holds no question"),
        ("q.parquet", "not parquet", "not a Parquet file"),
        ("missing.jsonl", None, "does not exist"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        load(path)


def reference_row(**changes):
    return {
        "data_source": "tq",
        "prompt": [{"content": "Who?", "role": "user"}],
        "ability": "search & question answering",
        "reward_model": {"ground_truth": "Ann<|answer_split|>Anna", "style": "unknown"},
        "extra_info": {"index": "tq_qg_3477", "split": "dev"},
        **changes,
    }


def test_parquet_of_the_reference(tmp_path):
    path = tmp_path / "dev.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([reference_row()]), path)
    assert load(path) == (Question("tq_qg_3477", "Who?", ("Ann", "Anna"), "tq"),)


def test_parquet_with_our_columns(tmp_path):
    path = tmp_path / "q.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD]), path)
    assert load(path) == (Question("a", "Who?", ("Ann", "Anna")),)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": [{"content": "Who?", "role": "system"}]}, "text is None"),
        ({"reward_model": {"ground_truth": "", "style": "unknown"}}, "answers is"),
        ({"reward_model": None}, "answers is None"),
        ({"extra_info": None}, "id is None"),
        ({"extra_info": "tq"}, "id is None"),
        ({"prompt": "Who?"}, "text is None"),
    ],
)
def test_a_bad_parquet_row_is_named(tmp_path, change, words):
    path = tmp_path / "dev.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([reference_row(**change)]), path)
    with pytest.raises(ConfigError, match="row 1: ") as error:
        load(path)
    assert words in str(error.value)


QUESTIONS = tuple(Question(str(i), "Who?", ("Ann",)) for i in range(7))


def ids(questions):
    return [question.id for question in questions]


def test_order_is_pure_in_seed_and_cursor():
    order = QuestionOrder(QUESTIONS, seed=3)
    whole = ids(order.take(0, 21))
    assert ids(order.take(5, 9)) == whole[5:14]
    assert ids(QuestionOrder(QUESTIONS, seed=3).take(0, 21)) == whole
    assert ids(QuestionOrder(QUESTIONS, seed=4).take(0, 21)) != whole
    # Literal, so that a resumed run of an older version sees the questions it would have seen.
    assert whole[:7] == FIRST_EPOCH


FIRST_EPOCH = ["4", "1", "6", "3", "2", "5", "0"]


def test_each_epoch_is_another_permutation():
    epochs = [ids(QuestionOrder(QUESTIONS, seed=0).take(7 * epoch, 7)) for epoch in range(4)]
    assert all(sorted(epoch) == ids(QUESTIONS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_no_questions_is_an_error():
    with pytest.raises(ConfigError, match="none to train on"):
        QuestionOrder((), seed=0)
