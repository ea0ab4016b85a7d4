"""Every preset on a small file in its documented layout, beside clips that cannot be used; and the other formats."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import typer
import yaml
from typer.testing import CliRunner, Result

from converters.importers import delimited, hf, jsonl, lhotse, mapping, rttm, textgrid
from converters.importers.mapping import Preset, preset_names
from converters.synthesis.sample import Sample
from converters.synthesis.stages import evidence
from converters.synthesis.templates import Prompts
from echo_plugins.audio_qa import AudioQA, LabelledAudio

GOOD, OTHER = "100001", "100002"
TRAPS = {
    "100003": "nan",
    "100004": "half a wav",
    "100005": "half a flac",
    "100006": "half an mp3",
    "100007": "nothing",
    "100008": "text",
    "100009": None,
}
STEMS = (GOOD, OTHER, *TRAPS)


def encoded(sound: np.ndarray, format: str, subtype: str | None = None) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, sound, 16_000, format=format, subtype=subtype)
    return stream.getvalue()


@pytest.fixture(scope="session")
def sounds() -> dict[str, bytes | None]:
    """What lies under the name of each clip: 2 s of sound, or a trap."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 32_000)
    long = np.random.default_rng(0).uniform(-0.5, 0.5, 160_000)
    whole = encoded(noise, format="WAV")
    flac, mp3 = encoded(long, format="FLAC"), encoded(long, format="MP3")
    made: dict[str | None, bytes | None] = {
        "nan": encoded(np.full(8_000, np.nan), format="WAV", subtype="FLOAT"),
        "half a wav": whole[: len(whole) // 2],
        "half a flac": flac[: len(flac) // 2],
        "half an mp3": mp3[: len(mp3) // 2],
        "nothing": encoded(np.zeros(0), format="WAV"),
        "text": b"no audio at all",
        None: None,
    }
    return {GOOD: whole, OTHER: whole} | {stem: made[trap] for stem, trap in TRAPS.items()}


@dataclass(frozen=True)
class Layout:
    """A preset's file: `row(stem)` is its text for a clip, which lies at `audio(stem)`; `bad` rows have reasons."""

    app: typer.Typer
    file: str
    row: Callable[[str], str]
    audio: Callable[[str], str]
    record: dict[str, Any]
    header: str = ""
    bad: tuple[tuple[str, str], ...] = ()
    words: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)


def tsv(*cells: object) -> str:
    return "\t".join(map(str, cells)) + "\n"


def wav(stem: str) -> str:
    return f"{stem}.wav"


AVQA = {"id": 7, "video_name": "v", "question_text": "What is it?", "multi_choice": ["a dog", "a cat"], "answer": 1}
MUSIC = {
    "main_caption": "A slow song.",
    "beats": [[0.5, 1.0], [1, 2]],
    "chords": ["Am", "C"],
    "chords_time": [0.25, 1.25],
    "key": ["A", "minor"],
    "prompt_bpm": "This song goes at 92.0 beats per minute.",
    "is_audioset_eval_mcaps": False,
}
MELD = "1,hello <there>,Joey,joy,positive,{0},3,8,21"
LAYOUTS: dict[str, Layout] = {
    "audioset-strong": Layout(
        delimited.app,
        "audioset_train_strong.tsv",
        lambda stem: tsv(f"{stem}_30000", "1.000", "2.040", "/m/0bt9lr") + tsv(f"{stem}_30000", 0, 0.5, "/m/other"),
        lambda stem: f"{stem}_30000.wav",
        {
            "id": f"{GOOD}_30000",
            "events": [
                {"label": "/m/other", "start": 0.0, "end": 0.5},
                {"label": "Dog, hound", "start": 1.0, "end": 2.0},
            ],
            "meta": {"recording": GOOD, "source": "AudioSet-Strong", "domain": "sound"},
        },
        tsv("segment_id", "start_time_seconds", "end_time_seconds", "label"),
        (
            (tsv(f"{OTHER}_30000", "0", "1.2.3", "/m/x"), "bad_event"),
            ("", "incomplete_labels"),
        ),
        ("--label-map", "labels.tsv"),
        {"labels.tsv": "/m/0bt9lr\tDog, hound\n/m/1\tx\n"},
    ),
    "desed": Layout(
        delimited.app,
        "validation.tsv",
        lambda stem: tsv(wav(stem), 0.5, 1.25, "Alarm_bell_ringing"),
        wav,
        {
            "id": "100001.wav",
            "events": [{"label": "Alarm bell ringing", "start": 0.5, "end": 1.25}],
            "meta": {"source": "DESED", "domain": "sound"},
        },
        tsv("filename", "onset", "offset", "event_label"),
        (
            (tsv(wav(OTHER), 1.5, 1.0, "Dog"), "bad_event"),
            (tsv("100001.flac", "nan", 1.0, "Dog"), "bad_event"),
            (tsv("none.wav", "", "", ""), "audio_missing"),
            (tsv("a", "b", "c", "d", "e"), "wrong_type"),
        ),
    ),
    "fsd50k": Layout(
        delimited.app,
        "dev.csv",
        lambda stem: f'{stem},"Electric_guitar,Chink_and_clink","/m/1,/m/2",train\n',
        wav,
        {
            "id": GOOD,
            "meta": {
                "labels": ["Electric guitar", "Chink and clink"],
                "mids": ["/m/1", "/m/2"],
                "split": "train",
                "source": "FSD50K",
                "domain": "sound",
            },
        },
        "fname,labels,mids,split\n",
    ),
    "clotho": Layout(
        delimited.app,
        "clotho_captions_development.csv",
        lambda stem: f'{stem}.wav,"A dog, barking",b,c,d,e\n',
        wav,
        {
            "id": "100001.wav",
            "meta": {"captions": ["A dog, barking", "b", "c", "d", "e"], "source": "Clotho", "domain": "sound"},
        },
        "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n",
        (("../secret.wav,a,b,c,d,e\n", "audio_outside_root"),),
    ),
    "audiocaps": Layout(
        delimited.app,
        "val.csv",
        lambda stem: f"1{stem},{stem},30,A dog barks\n2{stem},{stem},30,Barking\n",
        lambda stem: f"{stem}_30.wav",
        {
            "id": f"{GOOD}_30",
            "meta": {
                "captions": ["A dog barks", "Barking"],
                "audiocap_ids": [f"1{GOOD}", f"2{GOOD}"],
                "start_time": "30",
                "recording": GOOD,
                "source": "AudioCaps",
                "domain": "sound",
            },
        },
        "audiocap_id,youtube_id,start_time,caption\n",
    ),
    "meld": Layout(
        delimited.app,
        "train_sent_emo.csv",
        lambda stem: MELD.format(stem) + ',"00:16:16,059","00:16:18,400"\n',
        lambda stem: f"dia{stem}_utt3.wav",
        {
            "id": f"dia{GOOD}_utt3",
            "events": [
                {
                    "label": "speech",
                    "start": 0.0,
                    "end": 2.0,
                    "kind": "speech",
                    "text": "hello <there>",
                    "speaker": "Joey",
                }
            ],
            "meta": {
                "Sr No.": "1",
                "transcript": "hello <there>",
                "speaker": "Joey",
                "emotion": "joy",
                "sentiment": "positive",
                "episode": "s8e21",
                "recording": f"dia{GOOD}",
                "source": "MELD",
                "domain": "speech",
            },
        },
        "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime\n",
        (
            (MELD.format("5").replace(",3,8", ",4,8") + ',"00:16:19,000","00:16:18,400"\n', "bad_event"),
            (MELD.format("6") + ',976,"00:16:18,400"\n', "bad_event"),
        ),
    ),
    "covost2": Layout(
        delimited.app,
        "covost_v2.fr_en.train.tsv",
        lambda stem: tsv("c1", wav(stem), '"Bonjour', "Hello", f"id-{stem}"),
        wav,
        {
            "id": f"id-{GOOD}",
            "meta": {
                "transcript": '"Bonjour',
                "translation": "Hello",
                "speaker": "c1",
                "recording": "c1",
                "source": "CoVoST2",
                "domain": "speech",
            },
        },
        tsv("client_id", "file", "sentence", "translation", "id"),
    ),
    "fma": Layout(
        delimited.app,
        "tracks.csv",
        lambda stem: f"{stem},Blues,training,A song\n",
        lambda stem: f"{stem[:3]}/{stem}.mp3",
        {
            "id": GOOD,
            "meta": {
                "labels": ["Blues"],
                "title": "A song",
                "split": "training",
                "source": "FMA",
                "domain": "music",
            },
        },
        ",track,set,track\n,genre_top,split,title\ntrack_id,,,\n",
        (("x,Blues,training,A song\n", "missing_field"),),
    ),
    "medley-solos-db": Layout(
        delimited.app,
        "Medley-solos-DB_metadata.csv",
        lambda stem: f"training,clarinet,0,7,{stem}\n",
        lambda stem: f"Medley-solos-DB_training-0_{stem}.wav",
        {
            "id": GOOD,
            "meta": {
                "labels": ["clarinet"],
                "recording": "7",
                "split": "training",
                "source": "Medley-solos-DB",
                "domain": "music",
            },
        },
        "subset,instrument,instrument_id,song_id,uuid4\n",
    ),
    "avqa": Layout(
        jsonl.app,
        "train_qa.jsonl",
        lambda stem: json.dumps(AVQA | {"id": stem, "question_relation": "Both", "audio_path": wav(stem)}) + "\n",
        wav,
        {
            "id": GOOD,
            "question": "What is it?",
            "choices": ["a dog", "a cat"],
            "answer": "a cat",
            "meta": {"question_relation": "Both", "recording": "v", "source": "AVQA"},
        },
        bad=(
            (json.dumps(AVQA | {"question_relation": "View", "audio_path": wav(GOOD)}) + "\n", "left_out"),
            (json.dumps(AVQA | {"answer": 2, "audio_path": wav(GOOD)}) + "\n", "answer_not_a_choice"),
            ("{\n", "not_json"),
        ),
    ),
    "eaqa-rl": Layout(
        jsonl.app,
        "EAQA_RL.jsonl",
        lambda stem: (
            json.dumps(
                {"id": stem, "audio_path": wav(stem), "question": "q?", "multi_choice": ["a", "b"], "answer": "b"}
            )
            + "\n"
        ),
        wav,
        {"id": GOOD, "question": "q?", "choices": ["a", "b"], "answer": "b", "meta": {"source": "EAQA"}},
    ),
    "musicbench": Layout(
        jsonl.app,
        "MusicBench_train.json",
        lambda stem: json.dumps(MUSIC | {"location": f"data/{stem}.wav"}) + "\n",
        lambda stem: f"data/{stem}.wav",
        {
            "id": f"data/{GOOD}.wav",
            "events": [
                {"label": "Am", "start": 0.25, "end": 1.25, "kind": "chord"},
                {"label": "C", "start": 1.25, "end": 2.0, "kind": "chord"},
            ],
            "meta": {
                "is_audioset_eval_mcaps": False,
                "captions": ["A slow song."],
                "beats": [0.5, 1.0],
                "beat_positions": [1, 2],
                "key": "A minor",
                "tempo": "92.0",
                "source": "MusicBench",
                "domain": "music",
            },
        },
        bad=(
            (json.dumps(MUSIC | {"location": "x", "is_audioset_eval_mcaps": True}) + "\n", "left_out"),
            (json.dumps(MUSIC | {"location": "x", "chords_time": [1]}) + "\n", "bad_event"),
            (json.dumps(MUSIC | {"location": f"data/{OTHER}.wav", "chords_time": [1, 4]}) + "\n", "bad_event"),
        ),
    ),
    "nemo": Layout(
        jsonl.app,
        "train_manifest.json",
        lambda stem: json.dumps({"audio_filepath": wav(stem), "duration": 2.0, "text": "hello", "lang": "en"}) + "\n",
        wav,
        {
            "id": "train_manifest-0000001",
            "meta": {"transcript": "hello", "language": "en", "domain": "speech"},
        },
        bad=(
            (
                json.dumps({"audio_filepath": wav(GOOD), "duration": 1.0, "offset": 0.5, "text": "x"}) + "\n",
                "not_a_whole_recording",
            ),
            (
                json.dumps({"audio_filepath": wav(GOOD), "duration": None, "offset": 0.5, "text": "x"}) + "\n",
                "not_a_whole_recording",
            ),
        ),
    ),
}


def run(app: typer.Typer, *words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def rows_of(path: Path) -> list[Any]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def place(folder: Path, sounds: dict[str, bytes | None], audio: Callable[[str], str]) -> Path:
    root = folder / "audio"
    for stem, data in sounds.items():
        file = root / audio(stem)
        file.parent.mkdir(parents=True, exist_ok=True)
        if data is not None:
            file.write_bytes(data)
    return root


def shown(record: dict[str, Any]) -> str:
    """What synthesis tells a model of a record."""
    fields = {"id": "", "clip": "", "audio": "", "audio_sha256": "", "recording": "", "domain": ""}
    known = {"duration": 2.0, "events": record.get("events", []), "meta": record.get("meta", {})}
    return Prompts().render("shared/evidence", **evidence(Sample.model_validate(fields | known)))


def judge(result: Result, target: Path, good: dict[str, Any], bad: Counter[str]) -> None:
    """`good` is among the records, the other good clip too; every trap and bad row is named, and the sums are right."""
    assert result.exit_code == 0, result.output
    records, rejected = rows_of(target), rows_of(target.with_name(f"{target.name}.rejected.jsonl"))
    assert next(record for record in records if record["id"] == good["id"]) == good
    kind = AudioQA if "question" in good else LabelledAudio
    assert [kind.from_json(record).to_json() for record in records] == records
    traps = Counter("audio_missing" if trap is None else "audio_unreadable" for trap in TRAPS.values())
    assert Counter(entry["reason"] for entry in rejected) == traps + bad, rejected
    assert all(entry["line"] and entry["detail"] for entry in rejected)
    for record in records:
        assert not (found := re.findall(r"[\[{]['\"\d\]}].*", shown(record))), found
    text = f"{len(records) + len(rejected)} rows read, {len(records)} written to"
    assert text in result.stderr and f"{len(rejected)} rejected" in result.stderr
    assert all(reason in result.stderr for reason in traps + bad)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_preset_reads_its_documented_layout_and_names_what_cannot_be_used(
    name: str, tmp_path: Path, sounds: dict[str, bytes | None]
) -> None:
    layout = LAYOUTS[name]
    root = place(tmp_path, sounds, layout.audio)
    source, target = tmp_path / layout.file, tmp_path / "out.jsonl"
    source.write_text(layout.header + "".join(map(layout.row, STEMS)) + "".join(text for text, _ in layout.bad))
    for file, text in layout.files.items():
        (tmp_path / file).write_text(text)
    words = [tmp_path / word if word in layout.files else word for word in layout.words]
    result = run(layout.app, source, target, "--audio-root", root, "--preset", name, *words)
    good = layout.record | {"audio": layout.audio(GOOD), "duration": 2.0}
    judge(result, target, good, Counter(reason for _, reason in layout.bad) + SPOILT.get(name, Counter()))


# A bad row of a clip takes the clip's other rows with it.
SPOILT = {"desed": Counter(incomplete_labels=1)}


def test_daily_talk_is_read_from_its_nested_metadata(tmp_path: Path, sounds: dict[str, bytes | None]) -> None:
    root = place(tmp_path, sounds, lambda stem: f"data/{stem}/0_1_d{stem}.wav")
    utterance = {"utterance_idx": 0, "speaker": 1, "text": "Hi.", "emotion": "happiness", "topic": "x"}
    source, target = tmp_path / "metadata.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps({stem: {"0": utterance | {"dialog_idx": int(stem)}} for stem in STEMS}))
    result = run(jsonl.app, source, target, "--audio-root", root, "--preset", "dailytalk")
    meta = {"topic": "x", "transcript": "Hi.", "speaker": 1, "emotion": "happiness", "recording": f"d{GOOD}"}
    good = {
        "id": f"d{GOOD}_u0",
        "audio": f"data/{GOOD}/0_1_d{GOOD}.wav",
        "duration": 2.0,
        "meta": meta | {"source": "DailyTalk", "domain": "speech"},
    }
    judge(result, target, good, Counter())


def test_a_folder_of_jams_becomes_a_record_a_file(tmp_path: Path, sounds: dict[str, bytes | None]) -> None:
    root, folder = place(tmp_path, sounds, wav), tmp_path / "jams"
    folder.mkdir()
    for stem in STEMS:
        observations = [
            {"time": 0.5, "duration": 1.0, "value": {"label": "siren", "snr": 3}, "confidence": 1.0},
            {"time": 0.0, "duration": 0.25, "value": "dog", "confidence": None},
        ]
        jam = {
            "file_metadata": {"duration": 2.0, "title": "t"},
            "annotations": [{"namespace": "n", "data": observations}],
        }
        (folder / f"{stem}.jams").write_text(json.dumps(jam))
    (folder / "broken.jams").write_text("{")
    late = {"annotations": [{"data": [{"time": 1.5, "duration": 1.0, "value": "dog"}]}]}
    (folder / "late.jams").write_text(json.dumps(late))
    (root / "late.wav").write_bytes((root / wav(GOOD)).read_bytes())
    target = tmp_path / "out.jsonl"
    result = run(jsonl.app, folder, target, "--audio-root", root, "--preset", "jams")
    events = [
        {"label": "dog", "start": 0.0, "end": 0.25},
        {"label": "siren", "start": 0.5, "end": 1.5, "confidence": 1.0},
    ]
    records = rows_of(target)
    good = {"id": GOOD, "audio": wav(GOOD), "events": events, "duration": 2.0, "meta": records[0]["meta"]}
    assert (records[0]["meta"]["title"], records[0]["meta"]["namespace"]) == ("t", "n")
    judge(result, target, good, Counter(not_json=1, bad_event=1))


def test_speaker_turns_are_gathered_by_file(tmp_path: Path, sounds: dict[str, bytes | None]) -> None:
    root = place(tmp_path, sounds, wav)
    lines = [";; a comment", f"SPKR-INFO {GOOD} 1 <NA> <NA> <NA> unknown s1 <NA>"]
    lines += [
        f"SPEAKER {stem} 1 {at} 0.500 <NA> <NA> {who} <NA> <NA>" for at, who in ((1, "s2"), (0, "s1")) for stem in STEMS
    ]
    lines += [f"SPEAKER {OTHER} 1 1.5", "SPEAKER x 1 -1 0.5 <NA> <NA> s <NA>"]
    source, target = tmp_path / "in.rttm", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines) + "\n")
    result = run(rttm.app, source, target, "--audio-root", root)
    turns = [{"label": who, "start": at, "end": at + 0.5, "kind": "speech"} for at, who in ((0.0, "s1"), (1.0, "s2"))]
    good = {"id": GOOD, "audio": wav(GOOD), "events": turns, "duration": 2.0, "meta": {"domain": "speech"}}
    judge(result, target, good, Counter(bad_event=1, not_a_table=1, incomplete_labels=1))
    assert [record["id"] for record in rows_of(target)] == [GOOD]  # the other clip has a line that stops short


def test_timed_words_become_events_and_a_transcript(tmp_path: Path, sounds: dict[str, bytes | None]) -> None:
    root = place(tmp_path, sounds, wav)
    lines = [f"{stem} 1 {at} 0.25 {word} 0.9" for stem in STEMS for at, word in ((0.5, "good"), (1.0, "day"))]
    source, target = tmp_path / "in.ctm", tmp_path / "out.jsonl"
    source.write_text("\n".join([*reversed(lines), f"{OTHER} A 0.1 1.2.3 x", "y A 0.1 1", ""]))
    result = run(rttm.app, source, target, "--audio-root", root)
    words = [
        {"label": word, "start": at, "end": at + 0.25, "kind": "speech"} for at, word in ((0.5, "good"), (1.0, "day"))
    ]
    meta = {"domain": "speech", "transcript": "good day"}
    good = {"id": GOOD, "audio": wav(GOOD), "events": words, "duration": 2.0, "meta": meta}
    judge(result, target, good, Counter(bad_event=1, not_a_table=1, incomplete_labels=1))


TEXT_GRID = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 2
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 2
        intervals: size = 2
        intervals [1]:
            xmin = 0
            xmax = 0.5
            text = ""
        intervals [2]:
            xmin = 0.5
            xmax = END
            text = "hello"
    item [2]:
        class = "TextTier"
        name = "claps"
        xmin = 0
        xmax = 2
        points: size = 1
        points [1]:
            number = 1.5
            mark = "x"
"""


def test_text_grids_become_events_by_tier(tmp_path: Path, sounds: dict[str, bytes | None]) -> None:
    root, folder = place(tmp_path, sounds, lambda stem: f"sub/{stem}.wav"), tmp_path / "grids"
    (folder / "sub").mkdir(parents=True)
    for stem in STEMS:
        (folder / "sub" / f"{stem}.TextGrid").write_text(TEXT_GRID.replace("END", "1.25"))
    for name, text in {"a": "garbage", "b": TEXT_GRID.replace("END", "1.2.3"), "c": TEXT_GRID[:300]}.items():
        (folder / f"{name}.TextGrid").write_text(text)
    (folder / "z.TextGrid").write_text(TEXT_GRID.replace("words", "phones").replace("END", "1"))
    target = tmp_path / "out.jsonl"
    result = run(textgrid.app, folder, target, "--audio-root", root, "--tier", "words")
    event = {"label": "hello", "start": 0.5, "end": 1.25, "tier": "words"}
    good = {
        "id": f"sub/{GOOD}",
        "audio": f"sub/{GOOD}.wav",
        "events": [event],
        "duration": 2.0,
    }
    judge(result, target, good, Counter(not_a_textgrid=3, missing_field=1))


def cut(stem: str, **changes: Any) -> dict[str, Any]:
    recording = {
        "id": f"rec-{stem}",
        "duration": 2.0,
        "sources": [{"type": "file", "channels": [0], "source": wav(stem)}],
    }
    turn = {"id": "s", "recording_id": f"rec-{stem}", "start": 0.5, "duration": 1.0, "text": "hello", "speaker": "Ann"}
    whole = {"id": stem, "start": 0, "duration": 2.0, "channel": 0, "type": "MonoCut"}
    return whole | {"supervisions": [turn], "recording": recording, "custom": {"snr": 3}} | changes


@pytest.mark.parametrize("zipped", [False, True])
def test_lhotse_cuts_of_whole_recordings_are_taken(
    tmp_path: Path, sounds: dict[str, bytes | None], zipped: bool
) -> None:
    root = place(tmp_path, sounds, wav)
    cuts = [cut(stem) for stem in STEMS]
    cuts += [
        cut(OTHER, id="a", start=0.5),
        cut(OTHER, id="b", duration=1.0),
        {"id": "c", "type": "MixedCut", "tracks": []},
    ]
    cuts += [cut(OTHER, id="d", supervisions=[{"start": "x", "duration": 1}])]
    text = b"".join(orjson.dumps(value) + b"\n" for value in cuts)
    source, target = tmp_path / "cuts.jsonl.gz", tmp_path / "out.jsonl"
    source.write_bytes(gzip.compress(text) if zipped else text)
    result = run(lhotse.app, source, target, "--audio-root", root)
    event = {"label": "Ann", "start": 0.5, "end": 1.5, "kind": "speech", "text": "hello", "speaker": "Ann"}
    meta = {"recording": f"rec-{GOOD}", "domain": "speech", "snr": 3, "transcript": "hello"}
    good = {"id": GOOD, "audio": wav(GOOD), "events": [event], "duration": 2.0, "meta": meta}
    judge(result, target, good, Counter(not_a_whole_recording=2, missing_field=1, bad_event=1))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_hugging_face_audio_is_written_out_undecoded(
    tmp_path: Path, sounds: dict[str, bytes | None], kind: str
) -> None:
    root = place(tmp_path, {}, wav)
    root.mkdir()
    rows = [
        {
            "picture": {"bytes": b"x"},
            "sound": {"bytes": sounds[stem], "path": wav(stem)},
            "query": "q?",
            "options": ["a", "b"],
            "answer": "B",
        }
        for stem in STEMS
    ]
    folder, target = tmp_path / "set", tmp_path / "mine.jsonl"
    folder.mkdir()
    table = pa.Table.from_pylist(rows)
    if kind == "parquet":
        pq.write_table(table, folder / "train-0.parquet")
    else:
        with pa.OSFile(str(folder / "data.arrow"), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)
        stale = table.slice(0, 1)  # what `map` of the datasets library leaves beside the data
        with pa.OSFile(str(folder / "cache-1f.arrow"), "wb") as out, pa.ipc.new_stream(out, stale.schema) as writer:
            writer.write_table(stale)
    words = ["--audio-column", "sound", "--map", "question=query", "--map", "choices=options"]
    result = run(hf.app, folder, target, "--audio-root", root, *words)
    good = {
        "id": "set-0000001",
        "audio": f"mine/{hashlib.sha256(sounds[GOOD] or b'').hexdigest()[:24]}.wav",
        "question": "q?",
        "choices": ["a", "b"],
        "answer": "b",
    }
    judge(result, target, good | {"duration": 2.0}, Counter())
    assert (root / good["audio"]).read_bytes() == sounds[GOOD]
    result = run(hf.app, folder, target, "--audio-root", root)
    assert result.exit_code == 2 and "sound" in result.output


def test_every_preset_is_tried_and_has_a_word_about_itself() -> None:
    shipped = [*preset_names("delimited"), *preset_names("jsonl")]
    assert sorted(shipped) == sorted([*LAYOUTS, "dailytalk", "jams"])
    for name in shipped:
        assert yaml.safe_load((mapping._PRESETS / f"{name}.yaml").read_text())["about"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("format: jsonl\n", "importers.jsonl"),
        ("format: delimited\nfields: {sound: x}\n", "sound"),
        ("x: [", "x"),
        ("y: 1", "y"),
    ],
)
def test_a_preset_of_ones_own_is_checked(tmp_path: Path, text: str, said: str) -> None:
    preset, source = tmp_path / "my.yaml", tmp_path / "in.csv"
    preset.write_text(text)
    source.write_text("a,b\n")
    result = run(delimited.app, source, tmp_path / "o", "--audio-root", tmp_path, "--preset", preset)
    assert result.exit_code == 2 and said in result.output, result.output
    assert run(delimited.app, source, tmp_path / "o", "--audio-root", tmp_path, "--preset", "none").exit_code == 2


@pytest.mark.parametrize("value", ["1.2.3", "nan", "inf", "1_0", "", "\u0661", True, None, float("nan"), [1]])
def test_what_is_no_number_of_seconds_is_refused_by_name(value: Any) -> None:
    with pytest.raises(mapping.RowError, match="start"):
        mapping.seconds(value, "start")


def test_columns_can_be_mapped_by_hand(tmp_path: Path, sounds: dict[str, bytes | None]) -> None:
    root, source, target = place(tmp_path, sounds, wav), tmp_path / "in.csv", tmp_path / "out.jsonl"
    source.write_text(f"clip;what;from;long\n{GOOD};dog;0,5;1\n{GOOD};cat;0.5;1\n{OTHER};dog;0.5;1e-1\n")
    words = ["event.label=what", "event.start=from", "event.duration=long", "audio={clip}.wav", "id=clip"]
    mapped = [part for word in words for part in ("--map", word)]
    result = run(delimited.app, source, target, "--audio-root", root, "--delimiter", ";", *mapped)
    assert result.exit_code == 0, result.output
    (record,) = rows_of(target)
    assert record == {
        "id": OTHER,
        "audio": wav(OTHER),
        "events": [{"label": "dog", "start": 0.5, "end": 0.6}],
        "duration": 2.0,
    }
    sides = rows_of(tmp_path / "out.jsonl.rejected.jsonl")
    assert [(entry["line"], entry["reason"]) for entry in sides] == [(2, "bad_event"), (3, "incomplete_labels")]


def test_a_map_over_a_preset_replaces_its_field() -> None:
    preset = Preset(fields={"audio": "a", "id": "b"}).with_map(["audio={a}.flac"])
    assert preset.fields == {"audio": "{a}.flac", "id": "b"}
