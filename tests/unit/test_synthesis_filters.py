"""The filters of data synthesis: what each objects to, and what it lets pass."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given
from hypothesis import strategies as st

from converters.synthesis import filters
from converters.synthesis.config import DEFAULT_FILTERS, Benchmark, Config, Limits, NearDuplicate
from converters.synthesis.sample import Sample
from converters.synthesis.soundprint import SoundIndex, sparse
from echo_plugins.audio import load


def limits(**changes: Any) -> Limits:
    config = Config(input=Path(), audio_root=Path(), output=Path(), stages={}, filters=changes)
    return config.limits()


def sample(think: str | None = None, **changes: Any) -> Sample:
    fields: dict[str, Any] = {
        "id": "a",
        "clip": "a",
        "audio": "a.wav",
        "audio_sha256": "s",
        "recording": "a.wav",
        "duration": 10.0,
        "domain": "sound",
        "events": [{"label": "dog", "start": 1.0, "end": 4.0}, {"label": "bell", "start": 6.0, "end": 7.0}],
        "question": "Which sound comes first?",
        "choices": ["dog", "bell", "car", "rain"],
        "answer": "dog",
        "think": think,
    }
    return Sample(**fields | changes)


def objections(row: Sample, rules: tuple[filters.RowFilter, ...], **changes: Any) -> set[str]:
    return {rule.__name__ for rule in rules if rule(row, limits(**changes)) is not None}


GOOD = (
    "I listen for what comes first. In <seg>1.00, 4.00</seg> a dog barks twice, near and clear, and only in "
    "<seg>6.00, 7.00</seg> a bell is struck, so the dog comes first."
)


def test_a_sound_chain_of_thought_and_question_pass_all_filters() -> None:
    row = sample(GOOD)
    assert objections(row, filters.THINK_FILTERS) == set()
    assert objections(row, filters.QUESTION_FILTERS + filters.ANSWER_FILTERS) == set()


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("6.00, 7.00", "9.80, 10.20", "segment_validity"),
        ("6.00, 7.00", "6.00, 6.10", "segment_validity"),
        ("6.00, 7.00", "7.00, 6.00", "segment_validity"),
        ("6.00, 7.00", "6.0.0, 7", "segment_validity"),
        ("6.00, 7.00", "1.50, 4.00", "segment_overlap"),
        ("1.00, 4.00", "0.00, 9.50", "clip_share"),
        ("1.00, 4.00", "7.50, 9.50", "event_coverage"),
        ("</seg> a dog", "</seg> A dog", "think_format"),
        ("</seg> a dog", "</seg><seg>2.00, 3.00</seg> a dog", "think_format"),
        ("a dog barks", "<answer>dog</answer> barks", "think_format"),
    ],
)
def test_each_defect_of_a_chain_of_thought_is_named_by_its_filter(old: str, new: str, name: str) -> None:
    assert name in objections(sample(GOOD.replace(old, new)), filters.THINK_FILTERS)


def test_a_draft_that_names_choices_by_letter_is_refused_since_they_are_shuffled() -> None:
    for ending in ("so option B is right.", "which leaves (C).", "so the answer is choice 2."):
        assert objections(sample(f"{GOOD} {ending}"), filters.DRAFT_FILTERS) == {"choice_by_letter"}
    assert objections(sample(f"{GOOD} The answer a listener gives is dog."), filters.DRAFT_FILTERS) == set()


def test_length_and_number_of_segments_have_bounds_on_both_sides() -> None:
    assert objections(sample("It is the dog."), filters.THINK_FILTERS) == {"think_length", "segment_count"}
    many = " then ".join(f"in <seg>{1 + i * 0.3:.2f}, {1.25 + i * 0.3:.2f}</seg> a bark is heard" for i in range(8))
    assert "segment_count" in objections(sample(many), filters.THINK_FILTERS)
    assert "think_length" in objections(sample(GOOD * 20), filters.THINK_FILTERS)


def test_free_form_reasoning_needs_no_tag_where_the_config_says_so() -> None:
    free = " ".join(["Only the dog can be the first, since the bell rings late."] * 3)
    assert objections(sample(free), filters.THINK_FILTERS) == {"segment_count"}
    assert objections(sample(free), filters.THINK_FILTERS, min_segments=0) == set()


def test_a_clip_that_is_labelled_from_end_to_end_needs_no_tag() -> None:
    free = " ".join(["The rain never stops, so nothing can be told apart by time."] * 3)
    row = sample(free, events=[{"label": "rain", "start": 0.0, "end": 10.0}])
    assert objections(row, filters.THINK_FILTERS) == set()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"choices": ["dog", "Dog.", "car", "rain"]}, "row_format"),
        ({"question": "What is <|AUDIO|>?"}, "row_format"),
        ({"choices": ["dog", "bell", "car"]}, "number_of_choices"),
        ({"answer": "cat"}, "answer_among_choices"),
        (
            {
                "choices": ["a large dog that barks twice", "bell", "car", "rain"],
                "answer": "a large dog that barks twice",
            },
            "answer_length",
        ),
    ],
)
def test_each_defect_of_a_question_is_named_by_its_filter(changes: dict[str, Any], name: str) -> None:
    assert name in objections(sample(**changes), filters.QUESTION_FILTERS)


@pytest.mark.parametrize(
    ("accuracy", "rate", "expected"),
    [
        (None, None, set()),
        (0.25, 0.5, set()),
        (0.5, 0.125, {"audio_contribution"}),
        (0.0, 0.0, {"difficulty"}),
        (0.0, 1.0, {"difficulty"}),
        (0.0, 0.875, set()),
    ],
)
def test_what_silence_answers_and_what_is_too_easy_or_too_hard_is_out(
    accuracy: float | None, rate: float | None, expected: set[str]
) -> None:
    assert objections(sample(silence_accuracy=accuracy, pass_rate=rate), filters.ANSWER_FILTERS) == expected


@given(st.lists(st.integers(0, 3), max_size=60), st.integers())
def test_shuffling_keeps_the_choices_and_depends_on_id_and_seed_alone(numbers: list[int], seed: int) -> None:
    row = sample(id=str(numbers))
    once = filters.shuffled(row, seed)
    assert sorted(once.choices) == sorted(row.choices) and once.answer == row.answer
    assert filters.shuffled(row, seed) == once


def test_shuffled_answers_stand_at_every_place_alike() -> None:
    rows = [filters.shuffled(sample(id=str(number)), seed=0) for number in range(2_000)]
    places = {place: sum(row.choices[place] == "dog" for row in rows) for place in range(4)}
    assert filters.even_choice_p(places, 4) > 0.01
    assert filters.even_choice_p({0: 2_000}, 4) < 1e-9
    assert filters.even_choice_p({}, 4) == 1.0


QUESTION = "After the second of the two short bell strokes near the end of the recording, which animal answers first?"


def test_exact_duplicates_are_of_one_sound_and_near_ones_of_almost_the_same_words() -> None:
    found = filters.Duplicates(NearDuplicate())
    assert found.find(sample(id="1", question=QUESTION)) is None
    assert found.find(sample(id="2", question=QUESTION.upper())) == ("exact_duplicate", "1")
    nearly = QUESTION.replace("Which", "what")
    assert found.find(sample(id="3", audio_sha256="t", question=nearly)) == ("near_duplicate", "1")
    assert found.find(sample(id="4", question="How often does the bell ring while the dog is barking outside?")) is None


def test_near_duplicates_can_be_looked_for_in_one_recording_only() -> None:
    found = filters.Duplicates(NearDuplicate(scope="recording"))
    assert found.find(sample(id="1", question=QUESTION)) is None
    assert found.find(sample(id="2", audio_sha256="t", recording="b.wav", question=QUESTION)) is None
    again = sample(
        id="3", audio_sha256="t", recording="b.wav", question=QUESTION, choices=["cat", "dog", "bell", "car"]
    )
    assert found.find(again) == ("near_duplicate", "2")


@pytest.fixture
def benchmark(tmp_path: Path) -> Benchmark:
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "held.wav", rng.uniform(-0.5, 0.5, 16_000), 16_000, subtype="PCM_16")
    rows = [
        {
            "id": "BV1xw411A7gP_00",
            "audio_path": "held.wav",
            "question": "How many seconds pass between the first knock and the last of the church bells?",
            "url": "https://www.youtube.com/watch?v=abcdefghijk",
            "timestamp": "00:10,00:20",
        }
    ]
    (tmp_path / "MMAR.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Benchmark(file=tmp_path / "MMAR.jsonl", audio_root=tmp_path)


def test_a_row_that_a_benchmark_holds_is_found_by_name_place_sound_and_question(
    benchmark: Benchmark, tmp_path: Path
) -> None:
    assert benchmark.audio_root is not None
    found = filters.HeldClips([benchmark])
    assert found.find(sample()) is None
    assert "name" in (found.find(sample(audio="x/BV1xw411A7gP_00.flac")) or "")
    spot = {"url": "https://youtu.be/abcdefghijk?t=3", "timestamp": "00:10,00:20"}
    assert "abcdefghijk" in (found.find(sample(meta=spot)) or "")
    assert found.find(sample(meta=spot | {"timestamp": "01:10,01:20"})) is None
    soundfile.write(tmp_path / "copy.flac", soundfile.read(tmp_path / "held.wav")[0], 16_000, subtype="PCM_16")
    assert "sound" in (found.find(sample(audio_sha256=filters.sound_hash(load(tmp_path / "copy.flac")))) or "")
    asked = "How many seconds pass between the very first knock and the last of the church bells?"
    asking = filters.HeldQuestions([benchmark], jaccard=0.8)
    assert "nearly the same" in (asking.find(asked) or "")
    assert asking.find("Which of the sounds is heard first?") is None


MMAR_URL = "https://www.youtube.com/watch?v=dQw4w9WgXcQ"


def of_video(times: str | list[float], **more: Any) -> dict[str, Any]:
    """A row as MMAR has it."""
    return {"id": "row one", "audio_path": "none.wav", "question": "?", "url": MMAR_URL, "timestamp": times} | more


def held(folder: Path, *rows: dict[str, Any]) -> filters.HeldClips:
    (folder / "MMAR.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return filters.HeldClips([Benchmark(file=folder / "MMAR.jsonl")])


ID = "dQw4w9WgXcQ"
WATCH = f"https://m.youtube.com/watch?app=desktop&v={ID}&t=3s"


def audiocaps(start: str) -> dict[str, Any]:
    """A clip of 10 s as the preset makes it of AudioCaps' columns."""
    return {"audio": "c7.wav", "recording": ID, "meta": {"recording": ID, "start_time": start}}


@pytest.mark.parametrize(
    ("row", "is_held"),
    [
        (audiocaps("30"), True),
        (audiocaps("39"), True),  # 1 s in common
        (audiocaps("40"), False),
        (audiocaps("20"), False),
        ({"recording": ID, "audio": f"{ID}_30000.wav"}, True),  # AudioSet-strong: milliseconds, so not known
        ({"recording": f"{ID}_000030"}, True),  # AVQA's video_name
        ({"recording": f"{ID}_000130"}, False),
        ({"meta": {"url": f"https://youtu.be/{ID}?t=3", "timestamp": "30,40"}}, True),
        (
            {"meta": {"url": f"https://m.youtube.com/watch?app=desktop&v={ID}&t=3s", "timestamp": "00:00:31,00:00:41"}},
            True,
        ),
        ({"meta": {"source_url": f"https://www.youtube.com/shorts/{ID}", "start": 50.0, "end": 60.0}}, False),
        ({"meta": {"ytid": ID, "start_s": 35, "end_s": 45}}, True),  # MusicCaps
        ({"meta": {"YTID": ID}}, True),
        ({"audio": f"wavs/Y{ID}.wav"}, True),
        ({"audio": f"wavs/[{ID}]-[30-40].wav"}, True),
        ({"audio": f"{ID}_30.000_40.000.flac"}, True),
        ({"audio": f"{ID}_00-01-30_00-01-40.wav"}, False),
        ({"meta": {"ytid": "another_one"}}, False),
    ],
)
def test_the_same_seconds_of_a_video_are_found_however_a_set_spells_it(
    row: dict[str, Any], is_held: bool, tmp_path: Path
) -> None:
    found = held(tmp_path, of_video("00:00:30,00:00:40"))
    assert (found.find(sample(**row)) is not None) == is_held
    assert "source" in (found.compared(sample(**row)) or [])
    if is_held:
        assert "row one" in str(found.find(sample(**row)))


def test_times_that_are_not_known_may_be_the_same(tmp_path: Path) -> None:
    row = sample(meta={"ytid": ID, "start_s": 500, "end_s": 510})
    assert held(tmp_path, of_video("")).find(row) is not None
    assert held(tmp_path, of_video("30,40"), of_video([505.0, 520.0], id="row two")).find(row) is not None
    assert held(tmp_path, of_video("30,40")).find(row) is None


def test_a_page_of_any_site_is_a_source_too(tmp_path: Path) -> None:
    found = held(tmp_path, of_video("", url="https://freesound.org/people/x/sounds/123/"))
    assert found.find(sample(meta={"url": "https://freesound.org/people/x/sounds/123/#c"})) is not None
    assert found.find(sample(meta={"url": "https://freesound.org/people/x/sounds/124/"})) is None
    bilibili = held(tmp_path, of_video("10,20", url="https://www.bilibili.com/video/BV1xw411A7gP/?p=1"))
    assert bilibili.find(sample(audio="BV1xw411A7gP_00-00-15_00-00-25.wav")) is not None
    assert bilibili.find(sample(audio="BV1xw411A7gP_00-00-25_00-00-35.wav")) is None


def test_a_screen_says_by_what_it_could_compare(tmp_path: Path) -> None:
    assert filters.HeldClips([]).compared(sample()) is None
    assert held(tmp_path, {"id": "3", "audio_path": "a.wav", "question": "?"}).compared(sample()) == []
    found = held(tmp_path, of_video("30,40"))
    assert found.compared(sample()) == [] and found.compared(sample(audio="some name.wav")) == ["name"]
    assert found.compared(sample(**audiocaps("1"))) == ["name", "source"]
    assert found.compared(sample(meta={"ytid": ID[:-1]})) == ["name"], "ten characters are no id"


def played(seed: int, seconds: float = 8.0) -> np.ndarray:
    """Notes, sweeps and bursts of noise."""
    chance = np.random.default_rng(seed)
    sound = np.zeros(round(seconds * 16_000))
    for _ in range(round(4 * seconds)):
        start = chance.integers(0, len(sound) - 1_600)
        times = np.arange(min(len(sound) - start, chance.integers(1_600, 16_000))) / 16_000
        pitch = chance.uniform(200, 2_000) + chance.uniform(-500, 500) * times * chance.integers(2)
        tone = np.sin(2 * np.pi * pitch * times) if chance.random() < 0.7 else chance.normal(size=len(times))
        sound[start : start + len(times)] += tone * np.exp(-times * chance.uniform(1, 10))
    return (0.8 * sound / np.abs(sound).max()).astype(np.float32)


def encoded(sound: np.ndarray, format: str, subtype: str | None = None, rate: int = 16_000) -> np.ndarray:
    stream = io.BytesIO()
    soundfile.write(stream, sound, rate, format=format, subtype=subtype)
    return load(stream.getvalue())


def test_the_same_sound_is_found_however_it_was_encoded_and_cut() -> None:
    index = SoundIndex()
    for seed in range(12):
        index.add(str(seed), played(seed))
    missed = []
    for seed in range(12):
        sound = played(seed)
        for name, other in {
            "mp3": encoded(sound, "MP3"),
            "vorbis": encoded(sound, "OGG", "VORBIS"),
            "quiet and cut": encoded(0.2 * sound[32_777:100_005], "MP3"),
            "telephone": encoded(soxr.resample(sound, 16_000, 8_000), "WAV", rate=8_000),
            "part of a longer one": np.concatenate([played(100 + seed, 3), sound, played(200 + seed, 3)]),
        }.items():
            if index.find(sparse(other)) != str(seed):
                missed.append((seed, name))
    assert len(missed) <= 1, missed
    assert [index.find(sparse(played(1_000 + seed))) for seed in range(40)] == [None] * 40
    for silent in (np.zeros(160_000, np.float32), np.zeros(100, np.float32), played(3)[:8_000]):
        assert index.find(sparse(silent)) is None


def test_a_clip_of_a_benchmark_is_found_by_its_sound_under_another_name(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "none.wav", played(1), 16_000)
    (tmp_path / "b.jsonl").write_text(json.dumps({"id": "1", "audio_path": "none.wav", "question": "?"}) + "\n")
    found = filters.HeldClips([Benchmark(file=tmp_path / "b.jsonl", audio_root=tmp_path)])
    copy = encoded(played(1)[16_000:], "MP3")
    row = sample(audio_sha256=filters.sound_hash(copy), sound_print=sparse(copy))
    assert "b (1) has the same sound" in str(found.find(row)) and found.compared(row) == ["sound"]
    assert found.find(sample(sound_print=sparse(played(2)))) is None


WORDS = st.sets(st.sampled_from("abcdefghijklmnop"), min_size=1, max_size=12)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=8))
def test_the_search_for_alike_questions_misses_none_that_comparing_them_all_finds(
    words: set[str], others: list[set[str]]
) -> None:
    found = filters.HeldQuestions([], jaccard=0.8)
    for number, other in enumerate(others):
        found.add(frozenset(other), str(number))
    alike = any(len(words & other) / len(words | other) >= 0.8 for other in others)
    assert (found.alike(frozenset(words)) is not None) == alike


def test_every_threshold_of_the_file_is_read_and_a_misspelt_one_is_refused() -> None:
    assert limits().model_fields_set == set(Limits.model_fields)
    assert limits(near_duplicate={"scope": "recording"}).near_duplicate.n_grams == 5
    with pytest.raises(ValueError, match="max_overlapp"):
        limits(max_overlapp=0.1)
    assert DEFAULT_FILTERS.is_file()
