"""Rows held out for evaluation: divided by recording, always in the same way, nothing lost."""

import subprocess
import sys
from pathlib import Path

import orjson
import pytest

ROOT = Path(__file__).resolve().parents[2]


def hold(source: Path, rows: int) -> tuple[subprocess.CompletedProcess[str], list[dict], list[dict]]:
    held, rest = source.with_name("held.jsonl"), source.with_name("rest.jsonl")
    command = [sys.executable, "-m", "converters.holdout", str(source), "--rows", str(rows)]
    done = subprocess.run(
        [*command, "--held", str(held), "--rest", str(rest)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return done, rows_of(held), rows_of(rest)


def rows_of(file: Path) -> list[dict]:
    return [orjson.loads(line) for line in file.open("rb")] if file.exists() else []


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Sixty rows about twenty recordings; the last line has no newline."""
    rows = [orjson.dumps({"id": str(number), "audio": f"{number % 20}.wav"}) for number in range(60)]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(rows))
    return tmp_path / "in.jsonl"


def test_no_recording_is_on_both_sides_and_no_row_is_lost(source: Path) -> None:
    done, held, rest = hold(source, 10)
    assert done.returncode == 0, done.stderr
    assert 10 <= len(held) < 13, "whole recordings of three rows each, as few as needed"
    assert not {row["audio"] for row in held} & {row["audio"] for row in rest}
    assert sorted(int(row["id"]) for row in [*held, *rest]) == list(range(60))


def test_the_order_of_the_rows_does_not_matter(source: Path) -> None:
    _, held, _ = hold(source, 10)
    source.write_bytes(b"\n".join(reversed(source.read_bytes().split(b"\n"))))
    assert {row["id"] for row in hold(source, 10)[1]} == {row["id"] for row in held}


def test_holding_everything_is_refused_and_writes_nothing(source: Path) -> None:
    done, held, rest = hold(source, 60)
    assert done.returncode == 1 and "would leave none" in done.stderr
    assert not held and not rest


def test_rows_of_one_named_recording_stay_together(tmp_path: Path) -> None:
    rows = [{"id": str(n), "audio": f"{n}.wav", "meta": {"recording": f"r{n // 5}"}} for n in range(20)]
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    _, held, rest = hold(source, 4)
    assert (len(held), len(rest)) == (5, 15)
    assert not {row["meta"]["recording"] for row in held} & {row["meta"]["recording"] for row in rest}


def test_of_a_small_set_no_more_than_a_share_is_held(source: Path) -> None:
    held, rest = source.with_name("held.jsonl"), source.with_name("rest.jsonl")
    command = [sys.executable, "-m", "converters.holdout", str(source), "--rows", "100", "--most-share", "0.25"]
    subprocess.run([*command, "--held", str(held), "--rest", str(rest)], check=True, cwd=ROOT)
    assert (len(rows_of(held)), len(rows_of(rest))) == (15, 45)


def test_a_json_list_is_divided_like_lines(source: Path) -> None:
    hold(source, 10)
    lines = source.with_name("held.jsonl").read_bytes()
    source.write_bytes(orjson.dumps(rows_of(source), option=orjson.OPT_INDENT_2))
    done, held, rest = hold(source, 10)
    assert done.returncode == 0 and source.with_name("held.jsonl").read_bytes() == lines
    assert len(held) + len(rest) == 60


def test_blank_lines_do_not_count_as_a_recording(source: Path) -> None:
    source.write_bytes(b'{"id": "1", "audio": "a.wav"}\n\nno json\n')
    done, held, _ = hold(source, 1)
    assert done.returncode == 1 and "would leave none" in done.stderr and not held


def test_a_file_cut_in_the_middle_is_refused(source: Path) -> None:
    source.write_bytes(orjson.dumps(rows_of(source))[:400])
    done, held, rest = hold(source, 10)
    assert done.returncode == 1 and "not read" in done.stderr and not held and not rest


@pytest.mark.parametrize("name", ["in.jsonl", "rest.jsonl"])
def test_no_two_of_the_files_may_be_one(source: Path, name: str) -> None:
    before = source.read_bytes()
    command = [sys.executable, "-m", "converters.holdout", str(source), "--rows", "10"]
    words = ["--held", str(source.with_name(name)), "--rest", str(source.with_name("rest.jsonl"))]
    done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2 and source.read_bytes() == before
