"""Sets without a chain of thought: built from events where there are any, otherwise as `--without-think` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import soundfile
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from converters import check, sft_jsonl
from converters.events_to_think import think_of_events
from echo_plugins.audio_qa import AudioQA, Event
from echo_plugins.relisten.prompt import AUDIO_TAG, user_message
from echo_plugins.relisten.segment import MAX_SEGMENTS, Segment, find_tags, format_tag, resolve
from echo_plugins.relisten.transcript import parse

CLIP_SECONDS = 3.0
BELLS = [{"label": "bell", "start": 0.5, "end": 1.5}, {"label": "bell", "start": 2.0, "end": 2.75}]


def row(index: int = 0, **changes: Any) -> dict[str, Any]:
    good = {"id": f"row-{index}", "audio": "a.wav", "question": "How often does the bell ring?"}
    return good | {"choices": ["once", "two times."], "answer": "two times."} | changes


def qa(events: list[Event], **changes: Any) -> AudioQA:
    values = {"id": "1", "audio": "a.wav", "question": "What is heard?", "choices": ("yes", "no"), "answer": "yes"}
    return AudioQA(**(values | changes), events=tuple(events))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "audio").mkdir()
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, int(16_000 * CLIP_SECONDS))
    soundfile.write(tmp_path / "audio" / "a.wav", samples, 16_000)
    return tmp_path / "audio"


def export(root: Path, rows: list[dict[str, Any]], *words: object, target: str = "out.jsonl") -> tuple[Result, Path]:
    source = root.parent / "in.jsonl"
    source.write_bytes(b"".join(orjson.dumps(value) + b"\n" for value in rows))
    command = [source, root.parent / target, "--audio-root", root, *words]
    return CliRunner().invoke(sft_jsonl.app, [str(word) for word in command]), root.parent / target


def read_rows(path: Path) -> list[Any]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def response(sft_row: dict[str, Any]) -> str:
    return sft_row["messages"][1]["content"]


# Events -> think


@pytest.mark.parametrize(
    ("events", "changes", "think"),
    [
        (
            [Event("bell", 2.0, 2.75), Event("dog", 0.5, 1.5)],
            {},
            'In <seg>0.50, 1.50</seg> I hear "dog". In <seg>2.00, 2.75</seg> I hear "bell". So the answer is yes.',
        ),
        (
            [Event("Dog_bark", 0.5, 1.5), Event("bell", 0, 1), Event("cat", 2, 3)],
            {"question": "How many dog barks?", "choices": ("a cat", "two."), "answer": "two."},
            'In <seg>0.50, 1.50</seg> I hear "Dog bark". In <seg>2.00, 3.00</seg> I hear "cat". So the answer is two.',
        ),
        # "art" stands in "start", but not as a word: so nothing is named, and all events count.
        (
            [Event("art", 0.5, 1.5)],
            {"question": "At the start?"},
            'In <seg>0.50, 1.50</seg> I hear "art". So the answer is yes.',
        ),
        # Too short: widened around the middle, and at the clip's ends into the clip.
        ([Event("tick", 1.0, 1.1)], {}, 'In <seg>0.95, 1.15</seg> I hear "tick". So the answer is yes.'),
        ([Event("tick", 0.0, 0.05)], {}, 'In <seg>0.00, 0.20</seg> I hear "tick". So the answer is yes.'),
        ([Event("tick", 2.98, 3.04)], {}, 'In <seg>2.80, 3.00</seg> I hear "tick". So the answer is yes.'),
        # Nothing that could read as a tag, nothing that starts at the end.
        ([Event("a </seg> b", 1, 2), Event("x", 3.0, 3.02)], {}, None),
        ([], {}, None),
    ],
)
def test_the_events_of_a_row_become_its_reasoning(events: list[Event], changes: dict, think: str | None) -> None:
    assert think_of_events(qa(events, **changes), CLIP_SECONDS) == think


def test_a_clip_that_is_too_short_to_be_heard_again_has_no_reasoning() -> None:
    assert think_of_events(qa([Event("tick", 0.0, 0.1)]), 0.15) is None


def test_of_too_many_events_each_label_is_named_once_before_any_is_named_again() -> None:
    events = [Event("bell", second, second + 0.5) for second in range(20)] + [Event("dog", 25, 26)]
    tags = find_tags(think := think_of_events(qa(events), 30.0) or "")
    assert len(tags) == MAX_SEGMENTS and think.count("bell") == MAX_SEGMENTS - 1
    assert think.endswith('In <seg>25.00, 26.00</seg> I hear "dog". So the answer is yes.')


TIMES = st.floats(0, 400, allow_nan=False)
EVENTS = st.builds(
    lambda label, start, length: Event(label, start, start + max(length, 1e-3)),
    st.sampled_from(["bell", "yes", "a<b", "_", "Speech, male"]),
    TIMES,
    TIMES,
)


@given(st.lists(EVENTS, max_size=12), st.floats(0.001, 400))
@example([Event("bell", 0.0, 2.0)], 1.9999999999999432)
def test_every_tag_lies_in_the_clip_and_inserts_a_clip(events: list[Event], duration_seconds: float) -> None:
    think = think_of_events(qa(events), duration_seconds)
    if think is None:
        return
    tags = find_tags(think)
    assert 1 <= len(tags) <= MAX_SEGMENTS
    for tag in tags:
        assert isinstance(tag.meaning, Segment) and tag.meaning.end_seconds <= duration_seconds
        assert isinstance(resolve(tag.meaning, duration_seconds), Segment)
        assert think[tag.start : tag.end] == format_tag(tag.meaning)
    starts = [tag.meaning.start_seconds for tag in tags if isinstance(tag.meaning, Segment)]
    assert starts == sorted(starts)


@pytest.mark.parametrize("mode", ["interleaved", "grounded", "plain"])
def test_rows_with_events_train_all_three_modes(root: Path, mode: str) -> None:
    result, target = export(root, [row(events=BELLS), row(1, events=BELLS)], "--mode", mode)
    assert result.exit_code == 0, result.output
    assert "0 of 2 rows have `think`; 2 more get it built from their `events`" in result.stderr
    sft_row, _ = read_rows(target)
    inserted = AUDIO_TAG if mode == "interleaved" else ""
    think = (
        'I hear "bell". I hear "bell". So the answer is two times.'
        if mode == "plain"
        else f'In <seg>0.50, 1.50</seg>{inserted} I hear "bell". In <seg>2.00, 2.75</seg>{inserted} I hear "bell". '
        "So the answer is two times."
    )
    assert response(sft_row) == f"<think>{think}</think><answer>two times.</answer>"
    assert len(sft_row["audios"]) == (3 if inserted else 1)
    assert CliRunner().invoke(check.app, [str(target)]).exit_code == 0


def test_no_from_events_leaves_rows_with_events_without_reasoning(root: Path) -> None:
    result, target = export(root, [row(events=BELLS), row(1, think="A bell.")], "--no-from-events")
    assert result.exit_code == 0 and len(read_rows(target)) == 1
    assert "1 rows have no `think` and are left out of SFT" in result.stderr and "converters.synthesis" in result.stderr
    result, _ = export(root, [row(events=BELLS)], "--no-from-events")
    assert result.exit_code == 1 and "none of the 1 rows has `think`" in result.stderr


# Neither think nor events


def test_a_set_without_reasoning_is_refused_with_the_cures(root: Path) -> None:
    rows = [row(index) for index in range(108)]
    result, target = export(root, rows)
    assert result.exit_code == 1 and not target.exists()
    assert "none of the 108 rows has `think`, which SFT needs" in result.stderr
    for cure in ("--without-think answers", "--without-think skip", "converters.synthesis", "eaqa", "cogito"):
        assert cure in result.stderr


@pytest.mark.parametrize("shard_rows", [None, 2])
def test_answers_trains_on_the_answers_alone(root: Path, shard_rows: int | None) -> None:
    words = ["--without-think", "answers", "--mode", "interleaved"]
    words += ["--shard-rows", shard_rows] if shard_rows else []
    result, target = export(root, [row(index) for index in range(3)], *words)
    assert result.exit_code == 0, result.output
    assert "all 3 become rows of mode plain" in result.stderr and "converters.synthesis" in result.stderr
    files = sorted(target.glob("part-*")) if shard_rows else [target]
    out = [sft_row for file in files for sft_row in read_rows(file)]
    assert len(out) == 3
    for sft_row in out:
        assert sft_row["messages"][0] == user_message(row()["question"], row()["choices"], "plain")
        assert response(sft_row) == "<think></think><answer>two times.</answer>"
        assert parse(response(sft_row)).well_formed
        assert sft_row["audios"] == [str(root / "a.wav")]
    assert CliRunner().invoke(check.app, [str(target)]).exit_code == 0


@pytest.mark.parametrize("words", [(), ("--shard-rows", 1)])
def test_skip_writes_nothing_and_removes_what_an_earlier_run_wrote(root: Path, words: tuple) -> None:
    result, target = export(root, [row(think="A bell."), row(1)], *words)
    assert result.exit_code == 0 and target.exists()
    result, target = export(root, [row(), row(1)], *words, "--without-think", "skip")
    assert result.exit_code == 0, result.output
    assert "no SFT rows are written" in result.stderr and "RL starts from the base model" in result.stderr
    assert sorted(path.name for path in root.parent.iterdir()) == ["audio", "in.jsonl"]


def test_skip_never_removes_its_own_source(root: Path) -> None:
    result, target = export(root, [row()], "--without-think", "skip", target="in.jsonl")
    assert result.exit_code == 2 and read_rows(target) == [row()]


@pytest.mark.parametrize("choice", ["answers", "skip"])
def test_one_row_with_reasoning_is_enough_for_the_usual_way(root: Path, choice: str) -> None:
    result, target = export(root, [row(), row(1, think="A bell."), row(2)], "--without-think", choice)
    assert result.exit_code == 0, result.output
    assert [response(sft_row) for sft_row in read_rows(target)] == ["<think>A bell.</think><answer>two times.</answer>"]
    rejected = read_rows(target.with_name("out.jsonl.rejected.jsonl"))
    assert [entry["reason"] for entry in rejected] == ["no_think", "no_think"]
    assert "2 rows have no `think` and are left out of SFT" in result.stderr
