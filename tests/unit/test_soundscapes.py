"""The soundscapes of recipes/tiny-cpu: the sounds are where the rows say, and the answers follow from them."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

from echo_plugins.audio_qa import AudioQA, check_times
from echo_plugins.relisten.segment import Segment, find_tags

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "tiny-cpu" / "soundscapes.py"
SPLITS = ("sft", "rl", "val", "test")
NUMBERS = ("one", "two", "three", "four")
ORDINALS = ("first", "second", "third", "fourth")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soundscapes", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["soundscapes"] = module
    spec.loader.exec_module(module)
    return module


def rows_of(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").open(encoding="utf-8")]


def all_rows(folder: Path) -> list[dict]:
    return [row for split in SPLITS for row in rows_of(folder, split)]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(script: ModuleType, tmp_path: Path) -> None:
    rows = ["--sft-rows", "12", "--rl-rows", "4", "--val-rows", "2", "--test-rows", "2"]
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        assert script.main(["--output", str(tmp_path / name), "--seed", seed, *rows]) == 0
    contents = {
        name: {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in "abc"
    }
    assert contents["a"] == contents["b"]
    assert not set(contents["a"].values()) & set(contents["c"].values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_folder_that_is_there_is_not_written_over(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main(["--output", str(tmp_path)])
    assert stop.value.code == 2


def test_every_row_is_a_sound_audio_qa_record(soundscapes: Path) -> None:
    rows = all_rows(soundscapes)
    assert len({row["id"] for row in rows}) == len(rows) == 100
    for row in rows:
        info = soundfile.info(soundscapes / row["audio"])
        check_times(AudioQA.from_json(row), info.frames / info.samplerate)
        assert len(row["choices"]) == 4


def test_no_clip_is_in_two_splits(soundscapes: Path) -> None:
    clips = {split: {row["audio"] for row in rows_of(soundscapes, split)} for split in SPLITS}
    bytes_of = {split: {(soundscapes / clip).read_bytes() for clip in clips[split]} for split in SPLITS}
    for split in SPLITS:
        others = set().union(*(bytes_of[other] for other in SPLITS if other != split))
        assert not bytes_of[split] & others


def test_training_and_test_speech_come_from_different_parts_of_the_recording(script: ModuleType) -> None:
    recording = script.Recording()
    bound = round(script.SPEECH_SPLIT_SECONDS * script.SAMPLING_RATE)
    samples = recording._samples.copy()
    for training, silenced in ((True, slice(bound, None)), (False, slice(None, bound))):
        recording._samples[:] = samples
        pieces = [recording.piece(1.0, training, np.random.default_rng(seed)) for seed in range(40)]
        recording._samples[silenced] = 0
        for seed, piece in enumerate(pieces):
            np.testing.assert_array_equal(piece, recording.piece(1.0, training, np.random.default_rng(seed)))


def test_the_clip_is_loud_in_its_events_and_quiet_between_them(soundscapes: Path) -> None:
    for row in rows_of(soundscapes, "test"):
        waveform, rate = soundfile.read(soundscapes / row["audio"])
        between = np.ones(len(waveform), dtype=bool)
        for event in row["events"]:
            inside = slice(round(event["start"] * rate), round(event["end"] * rate))
            assert np.sqrt(np.square(waveform[inside]).mean()) > 0.04, row["id"]
            between[inside] = False
        assert np.abs(waveform[between]).max() < 0.12, row["id"]


@pytest.mark.parametrize("times", [1, 2, 3, 4])
@pytest.mark.parametrize("label", ["bell", "hum", "whistle", "siren", "buzzer", "warble", "hiss"])
def test_a_sound_is_played_as_often_as_its_event_says(script: ModuleType, label: str, times: int) -> None:
    for steps in script.SOUND_STEPS:
        sound = script.Sound(label, 1, 1 + steps, times)
        waveform = script.synthesise(sound, np.random.default_rng(0))
        blocks = np.abs(waveform[: len(waveform) // 80 * 80]).reshape(-1, 80).max(axis=1) > 1e-3  # 5 ms each
        starts = np.count_nonzero(np.diff(blocks.astype(int), prepend=0) == 1)
        assert starts == times
        assert blocks[0] and blocks[-1], "it fills its event to the end"


def test_answers_and_tags_follow_from_the_events(soundscapes: Path) -> None:
    for row in all_rows(soundscapes):
        events, kind = row["events"], row["meta"]["kind"]
        labels = [event["label"] for event in events]
        words = row["question"].rstrip("?").split()
        tags = [tag.meaning for tag in find_tags(row["think"])]
        if kind == "order":
            told, expected = [ORDINALS.index(words[-1])], labels[ORDINALS.index(words[-1])]
        elif kind == "next":
            before = labels.index(words[-1])
            told, expected = [before, before + 1], labels[before + 1]
        elif kind == "times":
            told = [labels.index(words[4])]
            expected = NUMBERS[events[told[0]]["times"] - 1]
        else:
            assert kind == "total"
            told, expected = list(range(len(events))), NUMBERS[len(events) - 1]
        assert row["answer"] == expected, row["id"]
        assert row["choices"].count(expected) == 1
        assert tags == [Segment(events[index]["start"], events[index]["end"]) for index in told], row["id"]
        for index in told:
            assert labels[index] in row["think"]


def test_knowing_which_sounds_a_clip_holds_is_not_enough(soundscapes: Path) -> None:
    """Wrong choices are sounds of the same clip first."""
    for row in all_rows(soundscapes):
        if row["meta"]["kind"] in ("order", "next"):
            labels = {event["label"] for event in row["events"]}
            assert len(labels & set(row["choices"])) == min(4, len(labels))


def test_stage_1_rows_go_from_one_sound_to_several(soundscapes: Path) -> None:
    counts = [row["meta"]["sounds"] for row in rows_of(soundscapes, "sft")]
    assert set(counts[: round(0.1 * len(counts))]) == {1}
    assert set(counts[round(0.1 * len(counts)) : round(0.4 * len(counts))]) == {2}
    assert max(counts[round(0.4 * len(counts)) :]) == 4


def test_with_the_habit_some_last_rows_listen_to_the_first_sound_and_say_truly_what_is_there(
    script: ModuleType, tmp_path: Path
) -> None:
    """The reasoning and the answer agree with the segment that is named; only the place is wrong."""
    options = ["--sft-rows", "400", "--rl-rows", "40", "--val-rows", "1", "--test-rows", "1", "--habit", "0.75"]
    assert script.main(["--output", str(tmp_path / "made"), *options]) == 0
    rows = [row for row in rows_of(tmp_path / "made", "sft") if row["meta"]["kind"] == "order"]
    wrong = 0
    for number, row in enumerate(rows):
        asked = next(place for place, word in enumerate(ORDINALS) if word in row["question"])
        heard = next(event for event in row["events"] if f"<seg>{event['start']:.2f}, " in row["think"])
        assert row["answer"] == heard["label"] and row["answer"] in row["choices"] and heard["label"] in row["think"]
        if heard != row["events"][asked]:
            wrong += 1
            assert heard == row["events"][0] and number > 0.7 * len(rows)
    assert wrong >= 10
    assert {row["meta"]["kind"] for row in rows_of(tmp_path / "made", "rl")} == {"order", "next"}
