"""`converters.check` tells the kind of a file and every problem in it, and finds none in what the exporters write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from typer.testing import CliRunner, Result

from converters import check, rl_parquet, sft_jsonl

ROW = {
    "id": "x",
    "audio": "a.wav",
    "question": "q?",
    "choices": ["a dog", "a cat"],
    "answer": "a cat",
    "think": "In <seg>0.50, 1.50</seg> a cat, and no more.",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "a.wav", np.zeros(32_000), 16_000)
    return tmp_path / "audio"


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(check.app, [str(word) for word in words])


def export(root: Path, kind: str, *words: str) -> Path:
    source, target = write_rows(root.parent / "in.jsonl", [ROW, ROW | {"id": "y"}]), root.parent / f"out.{kind}"
    app = rl_parquet.app if kind == "parquet" else sft_jsonl.app
    result = CliRunner().invoke(app, [str(source), str(target), "--audio-root", str(root), *words])
    assert result.exit_code == 0, result.output
    return target


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        ("jsonl", (), "SFT rows"),
        ("jsonl", ("--mode", "interleaved"), "SFT rows"),
        ("jsonl", ("--mode", "plain"), "SFT rows"),
        ("parquet", (), "RL rows"),
        ("parquet", ("--embed-audio",), "RL rows"),
    ],
)
def test_what_the_exporters_write_is_in_order(root: Path, kind: str, words: tuple[str, ...], said: str) -> None:
    result = run(export(root, kind, *words))
    assert result.exit_code == 0, result.output
    assert said in result.output and "2 rows, 0 with problems" in result.output


def test_a_manifest_is_judged_with_and_without_its_audio(root: Path) -> None:
    file = write_rows(root.parent / "m.jsonl", [ROW, ROW | {"id": "y", "audio": "none.wav"}])
    result = run(file)
    assert result.exit_code == 0 and "audio was not opened" in result.output
    result = run(file, "--audio-root", root)
    assert result.exit_code == 1
    assert f"{file}:2: y: audio_missing" in result.output
    assert "AudioQA manifest, 2 rows, 1 with problems" in result.output


def test_labelled_audio_is_known_and_judged(root: Path) -> None:
    labelled = {"id": "x", "audio": "a.wav", "events": [{"label": "dog", "start": 0.5, "end": 1}]}
    late = labelled | {"id": "y", "events": [{"label": "dog", "start": 0.5, "end": 3}]}
    result = run(write_rows(root.parent / "m.jsonl", [labelled, late]), "--audio-root", root)
    assert result.exit_code == 1
    assert "labelled audio, 2 rows, 1 with problems" in result.output and ":2: y: bad_event" in result.output


def test_problems_are_named_by_line_and_all_counted(root: Path) -> None:
    rows = [ROW, {"question": "q?"}, ROW, 3, *[ROW | {"id": str(index), "answer": "x"} for index in range(30)]]
    result = run(write_rows(root.parent / "m.jsonl", rows), "--limit", 3)
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert [line.split(":")[1] for line in lines[:3]] == ["2", "3", "4"]
    assert "duplicate_id" in lines[1]
    assert "34 rows, 33 with problems" in lines[3]
    assert sum("answer_not_a_choice" in line for line in lines) == 1


def change(row: Any, **changes: Any) -> Any:
    return row | changes


@pytest.mark.parametrize(
    ("breaks", "reason"),
    [
        (lambda row: change(row, audios=[]), "placeholder_mismatch"),
        (lambda row: change(row, audios=row["audios"][:1]), "placeholder_mismatch"),
        (lambda row: change(row, audios=[row["audios"][0], row["audios"][0] + "x"]), "audio_missing"),
        (lambda row: change(row, audios=[row["audios"][0], row["audios"][0] + "#t=0.5,1.4"]), "not_as_rollout"),
        (lambda row: change(row, audios=[row["audios"][0]] * 2), "not_as_rollout"),
        (lambda row: change(row, audios="a.wav"), "wrong_type"),
        (lambda row: change(row, messages=row["messages"][::-1]), "wrong_type"),
        (lambda row: change(row, messages=[]), "wrong_type"),
        (lambda row: say(row, "<think>a</think> b <audio>"), "malformed_response"),
        (lambda row: say(row, "<think><audio>a</think><answer>b</answer>"), "not_as_rollout"),
        (lambda row: say(row, "<think><seg>1, 5</seg><audio></think><answer>b</answer>"), "segment_outside_audio"),
        (lambda row: say(row, "<think><seg>1</seg><audio></think><answer>b</answer>"), "malformed_tag"),
    ],
)
def test_broken_sft_rows_are_found(root: Path, breaks: Any, reason: str) -> None:
    file = export(root, "jsonl", "--mode", "interleaved")
    good = orjson.loads(file.read_bytes().splitlines()[0])
    result = run(write_rows(file, [good, breaks(good)]))
    assert result.exit_code == 1
    assert f"{file}:2: -: {reason}" in result.output, result.output


def say(row: Any, response: str) -> Any:
    return change(row, messages=[row["messages"][0], {"role": "assistant", "content": response}])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"audios": []}, "placeholder_mismatch"),
        ({"audios": ["/none.wav"]}, "audio_missing"),
        ({"reward_model": {"style": "rule", "ground_truth": "B"}}, "answer_not_a_choice"),
        ({"agent_name": None}, "missing_field"),
        ({"extra_info": {"choices": ["a cat"], "duration": 3.0, "id": "y"}}, "bad_duration"),
        ({"prompt": []}, "wrong_type"),
    ],
)
def test_broken_rl_rows_are_found(root: Path, changes: dict[str, Any], reason: str) -> None:
    file = export(root, "parquet")
    rows = pq.read_table(file).to_pylist()
    pq.write_table(pa.Table.from_pylist([rows[0], rows[1] | changes], rl_parquet.schema()), file)
    result = run(file)
    assert result.exit_code == 1
    assert f"{file}:2: " in result.output and reason in result.output, result.output


def test_a_parquet_that_would_decode_all_audio_on_loading_is_refused(root: Path) -> None:
    file = export(root, "parquet")
    pq.write_table(pq.read_table(file).replace_schema_metadata({"huggingface": "{}"}), file)
    result = run(file)
    assert result.exit_code == 1 and "Hugging Face" in result.stderr


def test_predictions_are_known(root: Path) -> None:
    keys = ("model_response", "answer_prediction", "model_prediction", "stop_reason")
    row = {"id": "x", "question": "q?", "choices": [], "answer": "", "segments": [], **dict.fromkeys(keys, "")}
    assert "predictions, 1 rows, 0 with" in run(write_rows(root / "p.jsonl", [row])).output
    assert run(write_rows(root / "p.jsonl", [row, {"id": "y"}])).exit_code == 1


@pytest.mark.parametrize("content", [b"", b"text\n", b'{"a": 1}\n', b"PAR1 and no more", b"[]"])
def test_what_is_no_file_of_ours_is_said_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    result = run(tmp_path / "f")
    assert result.exit_code == 1
    assert "error:" in result.stderr and "Traceback" not in result.output
    assert run(tmp_path / "none").exit_code == 2
