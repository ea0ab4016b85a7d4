"""The exporters as commands: rows as ms-swift and verl take them, rejected rows apart, files whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
import soundfile
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from converters import conversion, hf_parquet, rl_parquet, sft_jsonl
from converters.atomic import StagedFile
from converters.check import app as check_app
from converters.conversion import AudioFile
from converters.sft_jsonl import interleave, without_tags
from echo_plugins.audio import load, load_fragment, parse_fragment
from echo_plugins.model import QWEN2_5_OMNI
from echo_plugins.relisten.prompt import AUDIO_TAG, user_message
from echo_plugins.relisten.segment import MAX_SEGMENTS
from echo_plugins.relisten.trajectory import Settings, SpecialIds, Trajectory
from echo_plugins.relisten.transcript import parse

THINK = "In <seg>0.50, 1.50</seg>, a cat meows; then <seg>1.90, 9</seg> and <seg>1, 1.1</seg>. So it is the cat."


def row(index: int = 0, **changes: Any) -> dict[str, Any]:
    good = {
        "id": f"row-{index}",
        "audio": "a.wav",
        "question": "What is heard?",
        "choices": ["a dog", "a cat"],
        "answer": "a cat",
        "think": "In <seg>0.50, 1.50</seg>, a cat meows.",
    }
    return {key: value for key, value in (good | changes).items() if value is not None}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An audio root: a.wav of 2 s at 16 kHz, b.flac of 3 s at 44.1 kHz, and files that cannot be used."""
    folder = tmp_path / "audio"
    folder.mkdir()
    noise = np.random.default_rng(0)
    soundfile.write(folder / "a.wav", noise.uniform(-0.5, 0.5, 32_000), 16_000)
    soundfile.write(folder / "b.flac", noise.uniform(-0.5, 0.5, (132_300, 2)), 44_100)
    soundfile.write(folder / "nan.wav", np.full(1_000, np.nan), 16_000, subtype="FLOAT")
    soundfile.write(folder / "blink.wav", np.zeros(300), 16_000)
    soundfile.write(folder / "long.wav", np.zeros(301 * 8_000), 8_000, subtype="PCM_U8")
    soundfile.write(folder / "x.wav#t=1,2", np.zeros(16_000), 16_000, format="WAV")
    (folder / "text.wav").write_text("no audio")
    return folder


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_bytes(b"".join(orjson.dumps(value) + b"\n" for value in rows))
    return path


def read_rows(path: Path) -> list[Any]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def run(app: typer.Typer, *words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def export(app: typer.Typer, rows: list[Any], root: Path, *words: object) -> tuple[Result, Path]:
    source, target = write_rows(root.parent / "in.jsonl", rows), root.parent / "out.bin"
    return run(app, source, target, "--audio-root", root, *words), target


def test_grounded_rows_keep_the_tags_as_text_and_one_clip(root: Path) -> None:
    result, target = export(sft_jsonl.app, [row(think=THINK)], root)
    assert result.exit_code == 1  # the second tag ends 7 s after the clip
    result, target = export(sft_jsonl.app, [row()], root)
    assert result.exit_code == 0, result.output
    (out,) = read_rows(target)
    assert set(out) == {"messages", "audios"}
    assert out["audios"] == [str(root / "a.wav")]
    user, assistant = out["messages"]
    assert user == user_message("What is heard?", ["a dog", "a cat"], "grounded")
    assert assistant["role"] == "assistant"
    transcript = parse(assistant["content"])
    assert (transcript.think, transcript.answer, transcript.well_formed) == (row()["think"], "a cat", True)


def test_interleaved_rows_insert_after_each_tag(root: Path) -> None:
    think = "In <seg>0.50, 1.50</seg>, a cat; <seg>1.5, 2.03</seg> to the end."
    result, target = export(sft_jsonl.app, [row(think=think)], root, "--mode", "interleaved")
    assert result.exit_code == 0, result.output
    (out,) = read_rows(target)
    path = str(root / "a.wav")
    assert out["audios"] == [path, f"{path}#t=0.50,1.50", f"{path}#t=1.50,2.00"]
    content = out["messages"][1]["content"]
    assert content.count(AUDIO_TAG) == 2
    assert "</seg><audio>, a cat; <seg>1.5" in content and "2.03</seg><audio> to" in content
    assert content.replace(AUDIO_TAG, "") == f"<think>{think}</think><answer>a cat</answer>"
    assert [len(load_fragment(audio)) for audio in out["audios"]] == [32_000, 16_000, 8_000]


def test_plain_rows_have_no_tags_and_a_prompt_that_asks_for_none(root: Path) -> None:
    result, target = export(sft_jsonl.app, [row()], root, "--mode", "plain")
    assert result.exit_code == 0, result.output
    (out,) = read_rows(target)
    assert out["messages"][1]["content"] == "<think>A cat meows.</think><answer>a cat</answer>"
    assert out["messages"][0] == user_message("What is heard?", ["a dog", "a cat"], "plain")


def test_a_mix_gives_each_row_a_mode_by_its_id_and_the_prompt_of_that_mode(root: Path) -> None:
    mix = ("--mode", "interleaved=50,grounded=30,plain=20", "--seed", 7)
    rows = [row(index) for index in range(1_000)]

    def modes(rows: list[Any], *words: object) -> dict[str, str]:
        source_ids = iter([value["id"] for value in rows])
        result, target = export(sft_jsonl.app, rows, root, *words)
        assert result.exit_code == 0, result.output
        return {next(source_ids): _mode_of_row(value) for value in read_rows(target)}

    drawn = modes(rows, *mix)
    counts = Counter(drawn.values())
    assert abs(counts["interleaved"] - 500) < 80 and abs(counts["grounded"] - 300) < 80
    assert counts["plain"] == 1_000 - counts["interleaved"] - counts["grounded"]
    assert modes(rows[:300:-1], *mix) == {value["id"]: drawn[value["id"]] for value in rows[:300:-1]}
    assert modes(rows, *mix[:-1], 8) != drawn
    assert set(modes(rows, "--mode", "plain=1,grounded=0").values()) == {"plain"}


def _mode_of_row(out: dict[str, Any]) -> str:
    user, assistant = out["messages"]
    if user == user_message("What is heard?", ["a dog", "a cat"], "plain"):
        assert "seg>" not in assistant["content"] and len(out["audios"]) == 1
        return "plain"
    assert user == user_message("What is heard?", ["a dog", "a cat"], "grounded") and "<seg>" in assistant["content"]
    assert assistant["content"].count(AUDIO_TAG) == len(out["audios"]) - 1
    return "interleaved" if AUDIO_TAG in assistant["content"] else "grounded"


@pytest.mark.parametrize("mix", ["", "loud=1", "plain=-1", "plain=nan", "plain=1,plain=2", "plain=0", "plain="])
def test_a_mix_that_means_nothing_is_wrong_usage(root: Path, mix: str) -> None:
    result, _ = export(sft_jsonl.app, [row()], root, "--mode", mix)
    assert result.exit_code == 2 and repr(mix) in result.output


TAGS = st.one_of(
    st.tuples(st.floats(0, 12), st.floats(0.01, 8)).map(lambda at: f"<seg>{at[0]:.2f}, {at[0] + at[1]:.2f}</seg>"),
    st.tuples(st.floats(0, 12), st.floats(0.01, 8)).map(lambda at: f"<seg>{at[0]:.9f},{at[0] + at[1]:.5f}</seg>"),
    st.sampled_from(["<seg>2, 1</seg>", "<seg>x</seg>", "</seg>", "<seg>", " and ", ", ", "a dog. "]),
)


@settings(max_examples=200)
@given(st.lists(TAGS, max_size=24).map("".join), st.integers(3_200, 200_000))
def test_interleaved_training_text_is_what_the_rollout_inserts(think: str, num_samples: int) -> None:
    audio, bos, eos, end = range(256, 260)
    trajectory = Trajectory(
        [bos, audio, eos],
        num_samples,
        16_000,
        SpecialIds(audio, bos, eos, frozenset({end})),
        Settings(1_000_000),
        lambda ids: bytes(token for token in ids if token < 256).decode(),
        lambda text: list(text.encode()),
        QWEN2_5_OMNI.num_audio_tokens,
    )
    script = [*think.encode(), end]
    while (turn := trajectory.next_turn()) is not None:
        close = bytes(token % 256 for token in script).find(b"</seg>") if turn.stop else -1
        until = close + len("</seg>") if close >= 0 else len(script)
        trajectory.absorb(script[:until], None)
        script = script[until:]

    text, fragments = interleave(think, AudioFile("/a.wav", num_samples))
    engine = trajectory.engine_response_ids[:-1]
    rollout = "".join(AUDIO_TAG if token == audio else chr(token) for token in engine if token not in (bos, eos))
    assert text == rollout
    bounds = [parse_fragment(fragment)[1] for fragment in fragments]
    assert bounds == [(clip.segment.start_seconds, clip.segment.end_seconds) for clip in trajectory.clips]
    crops = [(round(start * 16_000), min(num_samples, round(end * 16_000))) for start, end in filter(None, bounds)]
    assert crops == [(clip.start_sample, clip.end_sample) for clip in trajectory.clips]
    assert len(fragments) <= MAX_SEGMENTS


def test_a_crop_of_a_resampled_file_is_what_the_rollout_crops(root: Path) -> None:
    result, target = export(
        sft_jsonl.app, [row(audio="b.flac", think="<seg>0.12345, 2.00001</seg>")], root, "--mode", "interleaved"
    )
    assert result.exit_code == 0, result.output
    whole = load(root / "b.flac")
    assert np.array_equal(load_fragment(read_rows(target)[0]["audios"][1]), whole[round(0.12345 * 16_000) : 32_000])


@pytest.mark.parametrize(
    ("think", "plain"),
    [
        ("In <seg>1, 2</seg>, a dog barks; then at <seg>3, 4</seg> a door.", "A dog barks; then a door."),
        ("<seg>1,2</seg> there is a dog. <seg>2,3</seg>: a cat.", "There is a dog. A cat."),
        ("Between <seg>1,2</seg> and <seg>3,4</seg>, the pitch rises.", "The pitch rises."),
        ("A dog barks (<seg>1,2</seg>).", "A dog barks."),
        ("the sound (see <seg>1,2</seg>) is loud", "the sound is loud"),
        ("the sound (a dog, <seg>1,2</seg>) is loud", "the sound (a dog) is loud"),
        ("A dog <seg>1,2</seg>, <seg>3,4</seg>, and a cat", "A dog, and a cat"),
        ("The segment <seg>1,2</seg> has a dog.", "The segment has a dog."),
        ("During the segment <seg>1,2</seg> a dog", "A dog"),
        ("First,\n<seg>1,2</seg> a dog\n<seg>2,3</seg> a cat", "First,\nA dog\nA cat"),
        ("x <seg>1,2</seg><seg>1,2</seg> y", "x y"),
        ("a dog barks; <seg>1,2</seg>, a cat", "a dog barks; a cat"),
        ("no  tags , here", "no  tags , here"),
        ("<seg>1,2</seg>", ""),
    ],
)
def test_text_without_its_tags_still_reads(think: str, plain: str) -> None:
    assert without_tags(think) == plain


@given(
    st.lists(st.sampled_from(["<seg>1, 2</seg>", "in", " ", ",", ".", "(", ")", "a dog", "\n", "see the"]), max_size=20)
)
def test_no_tag_and_no_word_of_content_changes_without_tags(parts: list[str]) -> None:
    plain = without_tags("".join(parts))
    assert "seg>" not in plain
    assert plain.casefold().count("a dog") == "".join(part for part in parts if "seg" not in part).count("a dog")


BAD_ROWS: list[tuple[Any, str]] = [
    (row(1, audio="none.wav"), "audio_missing"),
    (row(2, audio="../in.jsonl"), "audio_outside_root"),
    (row(3, audio="/etc/passwd"), "audio_outside_root"),
    (row(4, audio="text.wav"), "audio_unreadable"),
    (row(5, audio="nan.wav"), "audio_unreadable"),
    (row(6, audio="blink.wav"), "audio_too_short"),
    (row(7, audio="long.wav"), "audio_too_long"),
    (row(8, audio="x.wav#t=1,2"), "reserved_text"),
    (row(9, audio="a\0.wav"), "audio_missing"),
    (row(0), "duplicate_id"),
    (row(11, duration=2.2), "bad_duration"),
    (row(12, think="<seg>3, 4</seg>"), "segment_outside_audio"),
    (row(13, think=None), "no_think"),
    (row(14, events=[{"label": "x", "start": 0, "end": 3}]), "bad_event"),
    (row(15, answer=None), "missing_field"),
    ("text", "not_an_object"),
]


def test_bad_rows_go_to_the_side_file_with_file_line_id_and_reason(root: Path) -> None:
    rows = [row(0), *(bad for bad, _ in BAD_ROWS), row(99)]
    result, target = export(sft_jsonl.app, rows, root)
    assert result.exit_code == 0, result.output
    assert len(read_rows(target)) == 2
    rejected = read_rows(target.with_name("out.bin.rejected.jsonl"))
    assert [entry["reason"] for entry in rejected] == [reason for _, reason in BAD_ROWS]
    assert [entry["line"] for entry in rejected] == list(range(2, len(rows)))
    assert {entry["file"] for entry in rejected} == {str(root.parent / "in.jsonl")}
    assert [entry["id"] for entry in rejected[:9]] == [f"row-{index}" for index in range(1, 10)]
    assert all(entry["detail"] for entry in rejected)
    assert f"{len(rows)} rows read, 2 written to" in result.stderr
    assert "duplicate_id" in result.stderr


def test_rows_keep_their_order_over_many_threads(root: Path) -> None:
    rows = [row(index, audio=("a.wav", "b.flac")[index % 2]) for index in range(1_000)]
    result, target = export(rl_parquet.app, rows, root, "--workers", 8)
    assert result.exit_code == 0, result.output
    infos = [value["extra_info"] for value in pq.read_table(target).to_pylist()]
    assert [info["id"] for info in infos] == [value["id"] for value in rows]
    assert [info["index"] for info in infos] == list(range(1_000))


def test_rl_rows_are_what_verl_reads(root: Path) -> None:
    events = [{"label": "meow", "start": 0.5, "end": 1.0, "confidence": 0.9}]
    rows = [row(think=None, audio="b.flac", events=events)]
    result, target = export(rl_parquet.app, rows, root, "--data-source", "mine")
    assert result.exit_code == 0, result.output
    (out,) = pq.read_table(target).to_pylist()
    assert out == {
        "data_source": "mine",
        "prompt": [user_message("What is heard?", ["a dog", "a cat"], "interleaved")],
        "audios": [str(root / "b.flac")],
        "reward_model": {"style": "rule", "ground_truth": "a cat"},
        "extra_info": {
            "id": "row-0",
            "question": "What is heard?",
            "choices": ["a dog", "a cat"],
            "events": [{"label": "meow", "start": 0.5, "end": 1.0}],
            "duration": 3.0,
            "mode": "interleaved",
            "index": 0,
            "num_audio_tokens": QWEN2_5_OMNI.num_audio_tokens(len(load(root / "b.flac"))),
        },
        "agent_name": "relisten",
    }
    assert pq.ParquetFile(target).schema_arrow.metadata is None


def test_embedded_audio_is_the_files_own_bytes_in_small_row_groups(root: Path) -> None:
    rows = [row(index, audio="b.flac") for index in range(250)]
    result, target = export(rl_parquet.app, rows, root, "--embed-audio")
    assert result.exit_code == 0, result.output
    parquet = pq.ParquetFile(target)
    assert [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)] == [100, 100, 50]
    out = next(parquet.iter_batches(batch_size=1)).to_pylist()[0]
    assert out["audios"] == [{"bytes": (root / "b.flac").read_bytes(), "path": "b.flac"}]


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "FLOAT"])
def test_an_embedded_wav_of_whole_numbers_is_flac_with_the_same_samples(root: Path, subtype: str) -> None:
    sound = np.sin(np.arange(32_000) / 20) * np.linspace(0.1, 0.9, 32_000)
    soundfile.write(root / "s.wav", np.stack([sound, sound / 3], axis=1), 16_000, subtype=subtype)
    result, target = export(rl_parquet.app, [row(audio="s.wav")], root, "--embed-audio")
    assert result.exit_code == 0, result.output
    ((embedded,),) = pq.read_table(target).column("audios").to_pylist()
    assert embedded["path"] == ("s.wav" if subtype == "FLOAT" else "s.flac")
    assert subtype == "FLOAT" or len(embedded["bytes"]) < 0.8 * (root / "s.wav").stat().st_size
    assert np.array_equal(load(embedded["bytes"]), load(root / "s.wav"))


def test_audio_tokens_are_counted_for_the_given_checkpoint(root: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "qwen2_5_omni"}')
    (model / "preprocessor_config.json").write_text('{"hop_length": 320}')
    result, target = export(rl_parquet.app, [row()], root, "--model", model)
    assert result.exit_code == 0, result.output
    assert pq.read_table(target).to_pylist()[0]["extra_info"]["num_audio_tokens"] == 25
    (model / "config.json").write_text('{"model_type": "bert"}')
    result, _ = export(rl_parquet.app, [row()], root, "--model", model)
    assert result.exit_code == 2 and "bert" in result.output


def test_a_file_is_decoded_once_however_many_rows_name_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    real = conversion.probe
    monkeypatch.setattr(conversion, "probe", lambda path, most: decoded.append(path) or real(path, most))
    rows = [row(index, audio=("a.wav", "text.wav")[index % 2]) for index in range(200)]
    result, _ = export(sft_jsonl.app, rows, root, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert sorted(decoded) == [str(root / "a.wav"), str(root / "text.wav")]


def test_trusted_durations_spare_the_decoding_but_not_the_look(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "probe", lambda path, most: pytest.fail(f"decoded {path}"))
    rows = [row(0, duration=2.0), row(1, duration=2.0, audio="none.wav")]
    result, target = export(rl_parquet.app, rows, root, "--trust-durations")
    assert result.exit_code == 0, result.output
    (out,) = pq.read_table(target).to_pylist()
    assert out["extra_info"]["duration"] == 2.0
    assert read_rows(target.with_name("out.bin.rejected.jsonl"))[0]["reason"] == "audio_missing"


@pytest.mark.parametrize("words", [(), ("--trust-durations",)])
@pytest.mark.parametrize("app", [sft_jsonl.app, rl_parquet.app], ids=["sft_jsonl", "rl_parquet"])
def test_a_clip_that_the_model_does_not_hear_to_its_end_is_refused(
    root: Path, tmp_path: Path, app: typer.Typer, words: tuple[str, ...]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "qwen2_5_omni"}')
    (model / "preprocessor_config.json").write_text('{"hop_length": 160, "chunk_length": 30}')
    soundfile.write(root / "45.wav", np.zeros(45 * 16_000), 16_000)
    rows = [row(1, audio="45.wav", duration=45.0), row(2, audio="45.wav", duration=45.0), row(3, duration=2.0)]
    result, target = export(app, rows, root, "--model", model, *words)
    assert result.exit_code == 0, result.output
    rejected = read_rows(target.with_name("out.bin.rejected.jsonl"))
    assert [entry["reason"] for entry in rejected] == ["audio_too_long"] * 2
    assert "the model hears the first 30 s" in rejected[0]["detail"]
    result, _ = export(app, rows, root, *words)
    assert "3 written" in result.stderr  # Qwen2.5-Omni as it is published hears 300 s
    result = run(check_app, root.parent / "in.jsonl", "--audio-root", root, "--model", model)
    assert result.exit_code == 1 and "2 with problems" in result.output
    result = run(app, root.parent / "in.jsonl", target, "--audio-root", root, "--model", root)
    assert result.exit_code == 2 and "--model" in result.output


@pytest.mark.parametrize("app", [rl_parquet.app, hf_parquet.app], ids=["rl_parquet", "hf_parquet"])
def test_a_trusted_file_that_cannot_be_embedded_costs_its_own_rows(root: Path, app: typer.Typer) -> None:
    rows = [row(1, audio="text.wav", duration=2.0), row(2, duration=2.0)]
    result, target = export(app, rows, root, "--trust-durations", "--embed-audio")
    assert result.exit_code == 0, result.output
    (rejected,) = read_rows(target.with_name("out.bin.rejected.jsonl"))
    assert rejected["reason"] == "audio_unreadable" and "text.wav" in rejected["detail"]


def test_links_out_of_the_root_are_followed_when_told_so(root: Path) -> None:
    (root / "a.wav").rename(root.parent / "1f")
    (root / "a.wav").symlink_to("../1f")
    for words, status in (((), 1), (("--follow-links",), 0)):
        result, target = export(sft_jsonl.app, [row()], root, *words)
        assert result.exit_code == status, result.output
    assert read_rows(target)[0]["audios"] == [str(root / "a.wav")]


def test_when_no_row_is_good_the_old_file_stays_and_the_command_fails(root: Path) -> None:
    target = root.parent / "out.bin"
    target.write_text("old")
    result, _ = export(sft_jsonl.app, [row(audio="none.wav")], root)
    assert result.exit_code == 1
    assert target.read_text() == "old"
    assert read_rows(root.parent / "out.bin.rejected.jsonl")[0]["reason"] == "audio_missing"
    assert "no row of" in result.stderr


def test_a_rejected_file_of_an_earlier_run_does_not_outlive_a_clean_one(root: Path) -> None:
    export(sft_jsonl.app, [row(think=None)], root)
    result, target = export(sft_jsonl.app, [row()], root, "--rejected", root.parent / "bad.jsonl")
    assert result.exit_code == 0 and (root.parent / "bad.jsonl").read_bytes() == b""
    export(sft_jsonl.app, [row()], root)
    assert target.with_name("out.bin.rejected.jsonl").read_bytes() == b""


@pytest.mark.parametrize("app", [sft_jsonl.app, rl_parquet.app])
def test_wrong_usage_is_status_2(app: typer.Typer, root: Path) -> None:
    source = write_rows(root.parent / "in.jsonl", [row()])
    for words in (
        [source],
        [root.parent / "none.jsonl", root.parent / "o", "--audio-root", root],
        [source, root.parent / "o"],
        [source, root.parent / "o", "--audio-root", root.parent / "none"],
        [source, root.parent / "o", "--audio-root", root, "--mode", "loud"],
        [source, source, "--audio-root", root],
        [source, root.parent / "o", "--audio-root", root, "--rejected", source],
    ):
        assert run(app, *words).exit_code == 2, words
    assert read_rows(source) == [row()]


def test_help_names_every_argument() -> None:
    for app in (sft_jsonl.app, rl_parquet.app):
        result = run(app, "--help")
        assert result.exit_code == 0
        for word in ("IN.jsonl", "--audio-root", "--rejected", "--mode"):
            assert word in result.output


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    result, target = export(sft_jsonl.app, [row()], root)
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr and "Traceback" not in result.output
    assert sorted(path.name for path in root.parent.iterdir()) == ["audio", "in.jsonl"]
    assert not target.exists()


def test_a_kill_in_the_middle_leaves_no_half_written_file(root: Path) -> None:
    source = root.parent / "in.jsonl"
    os.mkfifo(source)
    target = root.parent / "out.jsonl"
    target.write_text("old")
    command = [sys.executable, "-m", "converters.sft_jsonl", source, target, "--audio-root", root]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    with source.open("wb") as pipe:
        for index in range(2_000):
            pipe.write(orjson.dumps(row(index)) + b"\n")
        pipe.flush()
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert target.read_text() == "old"
    assert not (root.parent / "out.jsonl.rejected.jsonl").exists()


def test_an_id_is_known_again_however_long_ago_it_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "_LATEST_IDS", 7)
    seen = conversion.SeenIds()
    assert not any(seen.add(f"row-{index}", index) for index in range(100))
    for index in range(100):
        twin = seen.add(f"row-{index}", 200)
        assert twin and twin.detail == f"id 'row-{index}' stands in line {index} too"
    assert seen.add("", 300) is None


def test_a_staged_file_appears_on_commit_alone(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    with pytest.raises(RuntimeError), StagedFile(target) as staged:
        staged.path.write_text("half")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    with StagedFile(target) as staged:
        staged.path.write_text("whole")
        assert not target.exists()
        staged.commit()
    assert target.read_text() == "whole"
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
