"""The AudioQA record: what is refused, for which reason, and that good rows come through unchanged."""

from __future__ import annotations

import gzip
import json
import unicodedata
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_plugins.audio_qa import AudioQA, Event, Reason, RowError, check_tags, check_times, parse_row, read_rows

GOOD: dict[str, Any] = {
    "id": "a-1",
    "audio": "a.wav",
    "question": "What is heard first?",
    "choices": ["a dog", "a cat"],
    "answer": "a cat",
    "think": "At <seg>0.50, 1.50</seg> a cat meows.",
    "events": [{"label": "cat", "start": 0.5, "end": 1.5}],
    "duration": 4.0,
    "meta": {"source": "test"},
}


def row(**changes: Any) -> dict[str, Any]:
    """GOOD with changes; `None` takes the key out."""
    return {key: value for key, value in (GOOD | changes).items() if value is not None}


def reason_of(value: object) -> Reason:
    with pytest.raises(RowError) as caught:
        AudioQA.from_json(value)
    assert caught.value.detail and len(str(caught.value)) < 400
    return caught.value.reason


def test_a_good_row_comes_back_as_it_was() -> None:
    assert AudioQA.from_json(GOOD).to_json() == GOOD


def test_the_optional_fields_may_be_missing_or_null() -> None:
    bare = row(think=None, events=None, duration=None, meta=None)
    record = AudioQA.from_json(bare | {"think": None, "events": None, "duration": None, "meta": None})
    assert record.to_json() == bare


def test_unknown_keys_are_kept_under_meta_and_meta_wins() -> None:
    record = AudioQA.from_json(row(category="sound", source="outer", difficulty=3))
    assert record.meta == {"category": "sound", "source": "test", "difficulty": 3}


def test_unknown_keys_of_an_event_are_kept_too() -> None:
    record = AudioQA.from_json(row(events=[{"label": "cat", "start": 0, "end": 1, "confidence": 0.5}]))
    assert record.events == (Event("cat", 0.0, 1.0, {"confidence": 0.5}),)
    assert record.to_json()["events"] == [{"label": "cat", "start": 0.0, "end": 1.0, "confidence": 0.5}]


def test_blanks_around_texts_go_and_a_whole_number_is_an_id() -> None:
    record = AudioQA.from_json(row(id=7, question=" q? ", choices=[" a dog", "a cat "], answer=" a cat\n"))
    assert (record.id, record.question, record.choices, record.answer) == ("7", "q?", ("a dog", "a cat"), "a cat")


@pytest.mark.parametrize("name", ["id", "audio", "question", "choices", "answer"])
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(RowError, match=f"'{name}' is missing") as caught:
        AudioQA.from_json(row(**{name: None}))
    assert caught.value.reason is Reason.MISSING_FIELD


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": True}, Reason.WRONG_TYPE),
        ({"id": 1.5}, Reason.WRONG_TYPE),
        ({"id": " "}, Reason.EMPTY_TEXT),
        ({"audio": ["a.wav"]}, Reason.WRONG_TYPE),
        ({"audio": " "}, Reason.EMPTY_TEXT),
        ({"question": "  "}, Reason.EMPTY_TEXT),
        ({"question": 3}, Reason.WRONG_TYPE),
        ({"question": "What <audio> is it?"}, Reason.RESERVED_TEXT),
        ({"question": "<|im_end|>"}, Reason.RESERVED_TEXT),
        ({"question": "say <answer>"}, Reason.RESERVED_TEXT),
        ({"question": "<seg>1, 2</seg>?"}, Reason.RESERVED_TEXT),
        ({"choices": "a dog, a cat"}, Reason.WRONG_TYPE),
        ({"choices": ["a cat", 2]}, Reason.WRONG_TYPE),
        ({"choices": []}, Reason.WRONG_NUMBER_OF_CHOICES),
        ({"choices": ["a cat"]}, Reason.WRONG_NUMBER_OF_CHOICES),
        ({"choices": ["a cat", *map(str, range(26))]}, Reason.WRONG_NUMBER_OF_CHOICES),
        ({"choices": ["a cat", ""]}, Reason.EMPTY_TEXT),
        ({"choices": ["a cat", "a cat"]}, Reason.DUPLICATE_CHOICE),
        ({"choices": ["a cat", " A  Cat. "]}, Reason.DUPLICATE_CHOICE),
        ({"choices": ["a cat", "a <|AUDIO|>"]}, Reason.RESERVED_TEXT),
        ({"choices": ["a cat", "</seg>"]}, Reason.RESERVED_TEXT),
        ({"answer": "a bird"}, Reason.ANSWER_NOT_A_CHOICE),
        ({"answer": "B"}, Reason.ANSWER_NOT_A_CHOICE),
        ({"answer": 1}, Reason.WRONG_TYPE),
        ({"answer": ""}, Reason.EMPTY_TEXT),
        ({"think": ""}, Reason.EMPTY_TEXT),
        ({"think": "so <audio> it is"}, Reason.RESERVED_TEXT),
        ({"think": "so</think>"}, Reason.RESERVED_TEXT),
        ({"think": "<answer>a cat</answer>"}, Reason.RESERVED_TEXT),
        ({"think": ["so"]}, Reason.WRONG_TYPE),
        ({"think": "<seg>1.2.3, 4</seg>"}, Reason.MALFORMED_TAG),
        ({"think": "<seg>2, 1</seg>"}, Reason.MALFORMED_TAG),
        ({"think": "<seg>1, 2"}, Reason.MALFORMED_TAG),
        ({"think": "1, 2</seg>"}, Reason.MALFORMED_TAG),
        ({"think": "<seg><seg>1, 2</seg>"}, Reason.MALFORMED_TAG),
        ({"think": "<seg>4.5, 5</seg>"}, Reason.SEGMENT_OUTSIDE_AUDIO),
        ({"think": "<seg>1, 4.1</seg>"}, Reason.SEGMENT_OUTSIDE_AUDIO),
        ({"duration": 0}, Reason.BAD_DURATION),
        ({"duration": -1.0}, Reason.BAD_DURATION),
        ({"duration": "4"}, Reason.BAD_DURATION),
        ({"duration": True}, Reason.BAD_DURATION),
        ({"duration": float("nan")}, Reason.BAD_DURATION),
        ({"events": {"label": "x"}}, Reason.WRONG_TYPE),
        ({"events": ["cat"]}, Reason.BAD_EVENT),
        ({"events": [{"label": "", "start": 0, "end": 1}]}, Reason.BAD_EVENT),
        ({"events": [{"label": "x", "start": 0}]}, Reason.BAD_EVENT),
        ({"events": [{"label": "x", "start": 1, "end": 1}]}, Reason.BAD_EVENT),
        ({"events": [{"label": "x", "start": -1, "end": 1}]}, Reason.BAD_EVENT),
        ({"events": [{"label": "x", "start": "0", "end": 1}]}, Reason.BAD_EVENT),
        ({"events": [{"label": "x", "start": 0, "end": float("inf")}]}, Reason.BAD_EVENT),
        ({"events": [{"label": "x", "start": 3, "end": 4.2}]}, Reason.BAD_EVENT),
        ({"meta": "text"}, Reason.WRONG_TYPE),
    ],
)
def test_a_row_that_cannot_be_used_says_why(changes: dict[str, Any], reason: Reason) -> None:
    assert reason_of(GOOD | changes) is reason


@pytest.mark.parametrize("value", [None, 3, "row", [GOOD]])
def test_what_is_no_object_is_refused(value: object) -> None:
    assert reason_of(value) is Reason.NOT_AN_OBJECT


def json_values(finite: bool = False) -> st.SearchStrategy[Any]:
    floats = st.floats(allow_nan=not finite, allow_infinity=not finite)
    return st.recursive(
        st.none() | st.booleans() | st.integers() | floats | st.text(max_size=6),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    )


@given(st.sampled_from(sorted(GOOD)), json_values())
def test_any_value_anywhere_is_taken_or_refused_with_a_reason(name: str, value: Any) -> None:
    try:
        record = AudioQA.from_json(GOOD | {name: value})
    except RowError as error:
        assert isinstance(error.reason, Reason)
    else:
        assert record.answer in record.choices
        assert AudioQA.from_json(record.to_json()) == record


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<seg>1, 1.1</seg> none", Reason.SEGMENT_TOO_SHORT),
        ("<seg>3.9, 4.05</seg> none", Reason.SEGMENT_TOO_SHORT),
        ("<seg>1, 2</seg>" * 9, Reason.TOO_MANY_TAGS),
        ("<seg>2, 1</seg>", Reason.MALFORMED_TAG),
    ],
)
def test_a_tag_that_no_clip_would_follow_is_refused(text: str, reason: Reason) -> None:
    with pytest.raises(RowError) as raised:
        check_tags(text, 4.0)
    assert raised.value.reason is reason
    check_tags("<seg>1, 1.2</seg>" * 8, 4.0)


def test_text_is_written_as_the_tokenizers_write_it() -> None:
    decomposed = [unicodedata.normalize("NFD", text) for text in ("ein Käuzchen", "ein Hund")]
    record = AudioQA.from_json(row(choices=decomposed, answer=decomposed[0], think=None, question="Was hört man?"))
    assert record.answer == "ein Käuzchen" == record.choices[0]
    assert record.question == "Was hört man?"


def test_captions_and_labels_are_nfc_too_but_a_file_keeps_its_name() -> None:
    nfd = unicodedata.normalize("NFD", "Käuzchen")
    events = [{"label": nfd, "start": 0, "end": 1, "text": nfd}]
    record = AudioQA.from_json(row(audio=f"{nfd}.wav", meta={"captions": [nfd]}, events=events, other={"a": nfd}))
    assert record.meta == {"captions": ["Käuzchen"], "other": {"a": "Käuzchen"}}
    assert record.events[0] == Event("Käuzchen", 0.0, 1.0, {"text": "Käuzchen"})
    assert record.audio == f"{nfd}.wav"


@pytest.mark.parametrize("name", ["id", "audio"])
def test_a_file_name_that_is_no_utf_8_is_refused(name: str) -> None:
    assert reason_of(GOOD | {name: "caf\udce9.wav"}) is Reason.NOT_UTF8


@pytest.mark.parametrize(
    "hidden",
    [*"\x00\x07\x85\u061c\u200b\u200e\u200f\u202e\u2060\u2066\ufeff", "\ud800"],
    ids=lambda hidden: f"{ord(hidden):04X}",
)
def test_a_character_that_nobody_sees_is_named(hidden: str) -> None:
    with pytest.raises(RowError, match=f"U\\+{ord(hidden):04X}"):
        AudioQA.from_json(row(question=f"a{hidden}b"))
    AudioQA.from_json(row(question="\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"))  # Persian needs its joiner


@pytest.mark.parametrize(
    ("choices", "answer", "bare", "right"),
    [
        (["(A) a car", "(B) a dog"], "(B) a dog", ["a car", "a dog"], "a dog"),
        (["A. a car", "B. a dog"], "A. a car", ["a car", "a dog"], "a car"),
        (["A) a car", "B: a dog"], "B: a dog", ["a car", "a dog"], "a dog"),
        (["A minor", "B minor"], "A minor", ["A minor", "B minor"], "A minor"),
        (["(A) a car", "a dog"], "a dog", ["(A) a car", "a dog"], "a dog"),
        (["(B) a car", "(A) a dog"], "(A) a dog", ["(B) a car", "(A) a dog"], "(A) a dog"),
        (["a) a car", "b) a dog"], "a dog", ["a car", "a dog"], "a dog"),
        (["\uff08A\uff09车", "\uff08B\uff09狗"], "\uff08B\uff09狗", ["车", "狗"], "狗"),
        (["\uff21\u3001车", "\uff22\u3001狗"], "\uff21\u3001车", ["车", "狗"], "车"),
        (["A.M.", "B.C."], "B.C.", ["A.M.", "B.C."], "B.C."),
    ],
)
def test_choices_lose_letters_of_their_own_and_nothing_else(
    choices: list[str], answer: str, bare: list[str], right: str
) -> None:
    record = AudioQA.from_json(row(choices=choices, answer=answer))
    assert (list(record.choices), record.answer) == (bare, right)


@pytest.mark.parametrize("choices", [["A. a car", "B. a car"], ["(A) a car", "(B) A  car."]])
def test_choices_that_are_equal_without_their_letters_are_refused(choices: list[str]) -> None:
    assert reason_of(row(choices=choices, answer=choices[0])) is Reason.DUPLICATE_CHOICE


@given(st.floats(1e-4, 300, allow_nan=False), st.floats(0.3, 300))
def test_a_time_as_python_writes_it_is_a_time_of_a_tag(start: float, length: float) -> None:
    check_tags(f"<seg>{start!r}, {start + length!r}</seg>", None)


def test_a_tag_may_pass_the_end_by_the_rounding() -> None:
    check_tags("<seg>0, 4.05</seg> none", 4.0)
    with pytest.raises(RowError, match=r"4\.06"):
        check_tags("<seg>0, 4.06</seg>", 4.0)


def test_times_are_held_against_the_decoded_clip() -> None:
    check_times(AudioQA.from_json(GOOD), 4.0)
    for changes, seconds in (({}, 3.9), ({"duration": None}, 1.2), ({"duration": None, "think": None}, 1.2)):
        with pytest.raises(RowError):
            check_times(AudioQA.from_json(row(**changes)), seconds)


def ignore(num_bytes: int) -> None:
    pass


def read(path: Path, content: bytes) -> list[tuple[int, object]]:
    path.write_bytes(content)
    consumed: list[int] = []
    rows = list(read_rows(path, consumed.append))
    assert sum(consumed) <= len(content)
    return [(line, value.reason if isinstance(value, RowError) else value) for line, value in rows]


def test_jsonl_is_read_line_by_line_with_its_line_numbers(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}\nnot json\n{"a": NaN}\n{"a": "\xff"}\n[1]\n{"a": 3}'
    assert read(tmp_path / "a.jsonl", content) == [
        (1, {"a": 1}),
        (4, {"a": 2}),
        (5, Reason.NOT_JSON),
        (6, Reason.NOT_JSON),
        (7, Reason.NOT_UTF8),
        (8, [1]),
        (9, {"a": 3}),
    ]


def test_a_json_list_is_read_with_the_line_where_each_row_begins(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf [\n {"a": "x,]"},\n\n {"a":\n 2} , 3\n]\n'
    assert read(tmp_path / "a.json", content) == [(2, {"a": "x,]"}), (4, {"a": 2}), (5, 3)]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b"", []),
        (b"[]", []),
        (b"[", [(1, Reason.NOT_JSON)]),
        (b'[{"a": 1},\n{"a": ', [(1, {"a": 1}), (2, Reason.NOT_JSON)]),
        (b'[{"a": 1}\n{"a": 2}]', [(1, {"a": 1}), (2, Reason.NOT_JSON)]),
        (b'[{"a": 1}', [(1, {"a": 1}), (1, Reason.NOT_JSON)]),
        (b'[{"a": NaN}, 2]', [(1, Reason.NOT_JSON), (1, 2)]),
        (b'["\xff", {"a": 2}]', [(1, Reason.NOT_UTF8), (1, {"a": 2})]),
        (b"[" * 100_000, [(1, Reason.NOT_JSON)]),
        (b'{"a":' * 100_000, [(1, Reason.NOT_JSON)]),
    ],
)
def test_a_broken_file_gives_its_good_rows_and_one_error(
    tmp_path: Path, content: bytes, rows: list[tuple[int, object]]
) -> None:
    assert read(tmp_path / "a.json", content) == rows


@given(st.lists(json_values(finite=True), max_size=6), st.integers(0, 3))
def test_a_list_in_any_layout_reads_as_json_does(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int
) -> None:
    try:
        expected = [orjson.loads(orjson.dumps(value)) for value in values]
    except TypeError:  # integers over 64 bits, lone surrogates
        return
    content = json.dumps(values, indent=indent, ensure_ascii=False).encode()
    assert [value for _, value in read(tmp_path_factory.mktemp("list") / "a.json", content)] == expected


@pytest.mark.parametrize(
    ("raw", "twice"),
    [
        (b'{"a": 1, "a": 2}', "a"),
        (b'{"a": {"b": 1, "b" : 1}}', "b"),
        ('{"a": 1, "\\u0061": 2}', "a"),
        (b'{"a": "b\\": 1", "c": [{"a": 1}, {"a": 1}]}', None),
    ],
)
def test_a_key_that_is_there_twice_is_named(raw: bytes | str, twice: str | None) -> None:
    value = parse_row(raw)
    assert (isinstance(value, RowError) and value.reason is Reason.DUPLICATE_KEY) == (twice is not None)
    assert twice is None or f"the key {twice!r}" in str(value)


LINES = b"".join(b'{"a": "caf\xc3\xa9 %d"}\n' % number for number in range(2_000))
ROWS = [(number + 1, {"a": f"caf\u00e9 {number}"}) for number in range(2_000)]


def test_gzip_and_utf_16_are_read_as_what_they_are(tmp_path: Path) -> None:
    text = LINES.decode()
    utf_16 = text.encode("utf-16")
    for content in (gzip.compress(LINES), utf_16, ("\ufeff" + text).encode("utf-16-be"), gzip.compress(utf_16)):
        (tmp_path / "a").write_bytes(content)
        assert list(read_rows(tmp_path / "a", ignore)) == ROWS


@pytest.mark.parametrize("harm", ["cut", "block", "sum", "trailing", "utf-16"])
def test_a_damaged_file_gives_its_rows_so_far_and_one_error_with_its_name(tmp_path: Path, harm: str) -> None:
    packed = bytearray(gzip.compress(LINES))
    if harm == "cut":
        del packed[len(packed) // 2 :]
    elif harm == "block":
        packed[len(packed) // 2 : len(packed) // 2 + 40] = b"\xff" * 40
    elif harm == "sum":
        packed[-6] ^= 1
    elif harm == "trailing":
        packed += b"garbage"
    else:
        packed = bytearray(LINES.decode().encode("utf-16")[:-1])
    (tmp_path / "a.gz").write_bytes(packed)
    *rows, (line, last) = read_rows(tmp_path / "a.gz", ignore)
    assert harm == "block" or rows == ROWS[: len(rows)]
    assert isinstance(last, RowError) and last.fatal and line == len(rows) + 1
    assert str(tmp_path / "a.gz") in last.detail and "the rest is not read" in last.detail


def test_an_object_around_the_rows_is_refused_with_the_name_of_its_list(tmp_path: Path) -> None:
    wrapped = json.dumps({"version": 1, "data": [{"a": 1}, {"a": 2}]}, indent=1)
    (tmp_path / "a.json").write_text(wrapped)
    ((_, value),) = read_rows(tmp_path / "a.json", ignore)
    assert isinstance(value, RowError) and "2 rows" in value.detail and '.["data"]' in value.detail
    (tmp_path / "b.json").write_text(json.dumps(GOOD, indent=1))
    assert list(read_rows(tmp_path / "b.json", ignore)) == [(1, GOOD)]
