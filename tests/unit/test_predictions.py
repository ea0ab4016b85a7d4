"""The predictions file: nothing lost, nothing twice, never two runs in one file."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eval.predictions import Predictions, PredictionsError, read_rows, sidecar_path

RUN = {"identity": {"mode": "interleaved", "sampling": {"seed": 1}}, "num_rows": 9, "started": "then"}


def ids(file: Path) -> list[Any]:
    return [row["id"] for _, row in read_rows(file)]


def test_a_run_goes_on_after_a_torn_last_line(tmp_path: Path) -> None:
    file = tmp_path / "out" / "p.jsonl"
    with Predictions(file, RUN) as predictions:
        predictions.append({"id": "a", "text": "caf\u00e9"})
        predictions.append({"id": 2})
    with file.open("ab") as stream:
        stream.write(b'{"id": "c", "tex')
    with Predictions(file, RUN | {"started": "now"}) as predictions:
        assert predictions.done == {"a", "2"}
        predictions.append({"id": "c"})
    assert ids(file) == ["a", 2, "c"]
    assert json.loads(sidecar_path(file).read_text())["started"] == "now"


def test_a_whole_last_line_without_its_newline_is_answered_again(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    with Predictions(file, RUN):
        pass
    file.write_bytes(b'{"id": "a"}\n{"id": "b"}')
    with Predictions(file, RUN) as predictions:
        assert predictions.done == {"a"}
    assert file.read_bytes() == b'{"id": "a"}\n'


def test_every_row_is_in_the_file_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    with Predictions(tmp_path / "p.jsonl", RUN) as predictions:
        for number in range(3):
            predictions.append({"id": number})
            assert ids(tmp_path / "p.jsonl") == list(range(number + 1))


def test_another_run_is_refused_and_the_difference_is_named(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    with Predictions(file, RUN) as predictions:
        predictions.append({"id": "a"})
    other = {"identity": {"mode": "plain", "sampling": {"seed": 2}}}
    with pytest.raises(PredictionsError, match=r"mode: interleaved -> plain; sampling\.seed: 1 -> 2"):
        Predictions(file, other)
    assert ids(file) == ["a"]
    with Predictions(file, other, overwrite=True) as predictions:
        assert predictions.done == set()
    assert file.read_bytes() == b""


def test_rows_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(PredictionsError, match=r"has rows but no p\.run\.json"):
        Predictions(tmp_path / "p.jsonl", RUN)


def test_an_empty_file_can_be_taken_by_any_run(tmp_path: Path) -> None:
    with Predictions(tmp_path / "p.jsonl", RUN):
        pass
    with Predictions(tmp_path / "p.jsonl", {"identity": {}, "num_rows": 1}) as predictions:
        predictions.append({"id": 1})


def test_a_row_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with Predictions(tmp_path / "p.jsonl", RUN) as predictions:
        predictions.append({"id": "a"})
        predictions.append({"id": "a"})
    with pytest.raises(PredictionsError, match="line 2: row 'a' is there twice"):
        Predictions(tmp_path / "p.jsonl", RUN)


def test_two_processes_cannot_write_to_one_file(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    code = f"""
from pathlib import Path
from eval.predictions import Predictions, PredictionsError
try:
    Predictions(Path({str(file)!r}), {RUN!r})
except PredictionsError as error:
    print(error)
"""

    def other_process() -> str:
        root = Path(__file__).resolve().parents[2]
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True).stdout

    with Predictions(file, RUN) as predictions:
        assert "another process is writing to it" in other_process()
        predictions.append({"id": 1})
        assert "another process is writing to it" in other_process()
    assert other_process() == ""


def is_error(row: Any) -> bool:
    return row["stop_reason"] == "error"


def test_rows_can_be_taken_out_to_be_answered_again(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    with Predictions(file, RUN) as predictions:
        for number in range(4):
            predictions.append({"id": number, "stop_reason": "error" if number % 2 else "answered"})
    with Predictions(file, RUN, unwanted=is_error) as predictions:
        assert predictions.done == {"0", "2"}
        predictions.append({"id": 1, "stop_reason": "answered"})
        assert ids(file) == [0, 2, 1]
        with file.open("ab") as stream:
            stream.write(b"x")  # a torn line, in the file that was renamed to this name
    with Predictions(file, RUN) as predictions:
        assert predictions.done == {"0", "2", "1"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_rows_are_taken_out_by_the_process_alone_that_has_the_lock(tmp_path: Path) -> None:
    """A second command with --retry-errors used to replace the file that the first was still writing to."""
    file = tmp_path / "p.jsonl"
    code = f"""
from pathlib import Path
from eval.predictions import Predictions, PredictionsError
try:
    Predictions(Path({str(file)!r}), {RUN!r}, unwanted=lambda row: row["stop_reason"] == "error")
except PredictionsError as error:
    print(error)
"""

    def retry_elsewhere() -> str:
        root = Path(__file__).resolve().parents[2]
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True).stdout

    with Predictions(file, RUN) as predictions:
        predictions.append({"id": 1, "stop_reason": "error"})
        assert "another process is writing to it" in retry_elsewhere()
        predictions.append({"id": 2, "stop_reason": "answered"})
    assert ids(file) == [1, 2]
    with Predictions(file, RUN, unwanted=is_error) as predictions:
        assert "another process is writing to it" in retry_elsewhere(), "the lock goes with the name"
        predictions.append({"id": 1, "stop_reason": "answered"})
    assert retry_elsewhere() == "" and ids(file) == [2, 1]


def asked(file: Path) -> Any:
    sidecar = json.loads(sidecar_path(file).read_text())
    return sidecar["num_rows"], sidecar.get("ids")


def test_the_sidecar_holds_all_that_was_ever_asked(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    some = {**RUN, "num_rows": 2, "ids": ["a", "b"]}
    for run, expected in (
        (some, (2, ["a", "b"])),
        ({**some, "ids": ["b", "c"]}, (3, ["a", "b", "c"])),
        (RUN, (9, None)),
        ({**some, "ids": ["a"], "num_rows": 1}, (9, None)),
    ):
        with Predictions(file, run) as predictions:
            predictions.append({"id": f"row {expected}{run}"})
        assert asked(file) == expected
    with Predictions(file, some, overwrite=True):
        pass
    assert asked(file) == (2, ["a", "b"])
    with Predictions(file, {**some, "ids": ["z"], "num_rows": 1}):
        pass
    assert asked(file) == (3, ["a", "b", "z"]), "also where the first run was stopped before its first row"


def test_a_row_that_utf8_cannot_hold_does_not_end_a_run(tmp_path: Path) -> None:
    with Predictions(tmp_path / "p.jsonl", RUN) as predictions:
        predictions.append({"id": "a", "question": "lone \ud800"})
        predictions.append({"id": "b", "question": "caf\u00e9"})
    assert [row["question"] for _, row in read_rows(tmp_path / "p.jsonl")] == ["lone \ud800", "caf\u00e9"]
