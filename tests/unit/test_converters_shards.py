"""Exports of many rows: worker processes, shards, and a run that is killed and goes on, all to the same bytes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
import soundfile
import typer
from typer.testing import CliRunner, Result

from converters import conversion, hf_parquet, parquet, rl_parquet, sft_jsonl, shards
from converters.atomic import StagedFile
from converters.check import app as check_app
from converters.throughput import Measured, missed_bounds
from echo_plugins.audio import load

ROOT = Path(__file__).parents[2]
APPS = {"sft_jsonl": sft_jsonl.app, "rl_parquet": rl_parquet.app, "hf_parquet": hf_parquet.app}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """audio/a.wav of 2 s, and in.jsonl: 1,000 rows, some of which are bad, twins of earlier ones, or no JSON."""
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio/a.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 32_000), 16_000)
    rows = [row(index) for index in range(1_000)]
    rows[7] |= {"audio": "none.wav"}
    rows[450] |= {"id": "row-3"}
    rows[999] |= {"id": "row-7"}  # the first row of that id was rejected, so it is no twin
    lines = [orjson.dumps(value) for value in rows]
    lines[500] = b"{"
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return tmp_path


def row(index: int) -> dict[str, Any]:
    return {
        "id": f"row-{index}",
        "audio": "a.wav",
        "question": f"What is heard {index}?",
        "choices": ["a dog", "a cat"],
        "answer": "a cat",
        "think": "In <seg>0.50, 1.50</seg>, a cat meows.",
        "events": [{"label": "meow", "start": 0.5, "end": 1.5}],
        "meta": {"index": index},
    }


def run(app: typer.Typer, folder: Path, out: str, *words: object) -> Result:
    paths = [str(folder / "in.jsonl"), str(folder / out), "--audio-root", str(folder / "audio")]
    return CliRunner().invoke(app, [*paths, *map(str, words)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", APPS)
def test_shards_hold_the_rows_of_one_file_and_a_manifest_with_their_sums(folder: Path, name: str) -> None:
    assert run(APPS[name], folder, "one").exit_code == 0
    result = run(APPS[name], folder, "many", "--shard-rows", 300)
    assert result.exit_code == 0, result.output
    manifest = orjson.loads((folder / "many" / shards.MANIFEST).read_bytes())
    suffix = ".jsonl" if name == "sft_jsonl" else ".parquet"
    names = [f"part-0000{number}{suffix}" for number in range(4)]
    assert sorted(contents(folder / "many")) == sorted([*names, "manifest.json", "rejected.jsonl"])
    assert [shard["file"] for shard in manifest["shards"]] == names
    assert [shard["rows"] for shard in manifest["shards"]] == [299, 298, 300, 100]
    assert [shard["source_rows"] for shard in manifest["shards"]] == [300, 300, 300, 100]
    assert (manifest["source_rows"], manifest["rows"]) == (1_000, 997)
    assert manifest["rejected"] == {"audio_missing": 1, "duplicate_id": 1, "not_json": 1}
    assert manifest["settings"]["format"] == name and manifest["settings"]["shard_rows"] == 300
    for shard in manifest["shards"]:
        data = (folder / "many" / shard["file"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert (folder / "many/rejected.jsonl").read_bytes() == (folder / "one.rejected.jsonl").read_bytes()
    if suffix == ".jsonl":
        assert b"".join((folder / "many" / file).read_bytes() for file in names) == (folder / "one").read_bytes()
    else:
        rows = [value for file in names for value in pq.read_table(folder / "many" / file).to_pylist()]
        assert rows == pq.read_table(folder / "one").to_pylist()


@pytest.mark.parametrize("name", ["sft_jsonl", "rl_parquet"])
def test_worker_processes_write_what_threads_write(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_GROUP_ROWS", 70)
    assert run(APPS[name], folder, "threads", "--shard-rows", 400, "--workers", 2).exit_code == 0
    monkeypatch.setattr(conversion, "_PROCESSES_FROM_BYTES", 0)  # and chunks of another size: the groups stay
    started: list[int] = []
    real = conversion.in_processes
    monkeypatch.setattr(conversion, "in_processes", lambda job, count: started.append(count) or real(job, count))
    result = run(APPS[name], folder, "processes", "--shard-rows", 400, "--workers", 2)
    assert result.exit_code == 0, result.output
    assert started == [2]
    assert contents(folder / "processes") == contents(folder / "threads")


def test_a_killed_run_goes_on_to_the_same_bytes(folder: Path) -> None:
    """SIGKILL once two shards are there: the second run keeps them and writes the rest."""
    whole = folder / "in.jsonl"
    lines = whole.read_bytes().splitlines(keepends=True)
    assert run(rl_parquet.app, folder, "whole", "--shard-rows", 250).exit_code == 0
    expected = contents(folder / "whole")

    # The first run reads its source from a pipe that dries up in the third shard.
    rows = folder / "in.rows"
    whole.rename(rows)
    os.mkfifo(whole)
    command = [
        sys.executable,
        "-m",
        "converters.rl_parquet",
        whole,
        folder / "killed",
        "--audio-root",
        folder / "audio",
    ]
    process = subprocess.Popen([*command, "--shard-rows", "250"], cwd=ROOT, stderr=subprocess.DEVNULL)
    with whole.open("wb") as pipe:
        pipe.write(b"".join(lines[:700]))
        pipe.flush()
        wait_for(folder / "killed/.resume/part-00001.json")
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert not (folder / "killed/manifest.json").exists()
    kept = {
        name: (folder / "killed" / name).stat().st_mtime_ns for name in ("part-00000.parquet", "part-00001.parquet")
    }
    whole.unlink()
    rows.rename(whole)

    result = run(rl_parquet.app, folder, "killed", "--shard-rows", 250)
    assert result.exit_code == 0, result.output
    assert contents(folder / "killed") == expected
    assert {name: (folder / "killed" / name).stat().st_mtime_ns for name in kept} == kept
    assert "1000 rows read, 997 written" in result.stderr


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} has not come"
        time.sleep(0.01)


@pytest.mark.parametrize("change", ["source", "settings", "shard", "record"])
def test_a_shard_is_made_again_when_anything_about_it_has_changed(
    folder: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(sft_jsonl.app, folder, "fresh", "--shard-rows", 250).exit_code == 0
    monkeypatch.setattr(shards._Folder, "finish", lambda *_: (_ for _ in ()).throw(OSError("killed here")))
    result = run(sft_jsonl.app, folder, "out", "--shard-rows", 250)
    assert result.exit_code == 1 and "goes on with the shards" in result.stderr
    monkeypatch.undo()
    words: tuple[object, ...] = ()
    if change == "source":
        lines = (folder / "in.jsonl").read_bytes().splitlines(keepends=True)
        lines[260] = lines[260].replace(b"heard 260", b"heard now")
        (folder / "in.jsonl").write_bytes(b"".join(lines))
    elif change == "settings":
        words = ("--mode", "plain")
    elif change == "shard":
        (folder / "out/part-00001.jsonl").write_bytes(b"{}\n")
    else:
        (folder / "out/.resume/part-00001.json").unlink()
    written: list[str] = []
    real = StagedFile.commit
    monkeypatch.setattr(StagedFile, "commit", lambda self: written.append(self.target.name) or real(self))
    assert run(sft_jsonl.app, folder, "out", "--shard-rows", 250, *words).exit_code == 0
    first = 0 if change == "settings" else 1
    assert [name for name in written if name.endswith(f"{'0' * 4}{first}.jsonl")] == [f"part-0000{first}.jsonl"]
    assert "part-00000.jsonl" not in written or change == "settings"
    monkeypatch.undo()
    assert run(sft_jsonl.app, folder, "fresh", "--shard-rows", 250, *words).exit_code == 0
    assert contents(folder / "out") == contents(folder / "fresh")


def test_a_twin_in_a_later_shard_is_refused_after_a_resume_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 450 is a twin of row 3, whose shard the second run does not convert again."""
    lines = (folder / "in.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "in.jsonl").write_bytes(b"".join(lines[:250]))
    monkeypatch.setattr(shards._Folder, "finish", lambda *_: (_ for _ in ()).throw(OSError("killed here")))
    assert run(sft_jsonl.app, folder, "out", "--shard-rows", 250).exit_code == 1
    monkeypatch.undo()
    (folder / "in.jsonl").write_bytes(b"".join(lines))
    assert run(sft_jsonl.app, folder, "out", "--shard-rows", 250).exit_code == 0
    rejected = [orjson.loads(line) for line in (folder / "out/rejected.jsonl").open("rb")]
    assert [(entry["line"], entry["reason"]) for entry in rejected] == [
        (8, "audio_missing"),
        (451, "duplicate_id"),
        (501, "not_json"),
    ]


def test_a_shorter_source_leaves_no_shard_of_the_longer_one(folder: Path) -> None:
    assert run(sft_jsonl.app, folder, "out", "--shard-rows", 250).exit_code == 0
    lines = (folder / "in.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "in.jsonl").write_bytes(b"".join(lines[:300]))
    assert run(sft_jsonl.app, folder, "out", "--shard-rows", 250).exit_code == 0
    assert sorted(contents(folder / "out")) == [
        "manifest.json",
        "part-00000.jsonl",
        "part-00001.jsonl",
        "rejected.jsonl",
    ]


def test_a_shard_that_is_not_as_it_was_written_is_found_by_its_sum(folder: Path) -> None:
    def check() -> Result:
        return CliRunner().invoke(check_app, [str(folder / "out")])

    assert check().exit_code == 2
    (folder / "out").mkdir()
    assert check().exit_code == 1
    assert run(sft_jsonl.app, folder, "out", "--shard-rows", 250).exit_code == 0
    result = check()
    assert result.exit_code == 0 and "4 shards, 997 rows, 0 with problems" in result.output
    part = folder / "out/part-00001.jsonl"
    part.write_bytes(part.read_bytes().replace(b"meows", b"barks", 1))
    (folder / "out/part-00002.jsonl").unlink()
    result = check()
    assert result.exit_code == 1 and "2 with problems" in result.output
    assert "part-00001.jsonl has" in result.output and "part-00002.jsonl is missing" in result.output


def test_a_file_in_the_way_of_the_shards_is_wrong_usage(folder: Path) -> None:
    (folder / "out").write_text("mine")
    assert run(sft_jsonl.app, folder, "out", "--shard-rows", 250).exit_code == 2
    assert (folder / "out").read_text() == "mine"


def test_an_export_deletes_and_mixes_with_nothing_that_it_did_not_write(folder: Path) -> None:
    assert run(sft_jsonl.app, folder, "out", "--shard-rows", 250).exit_code == 0
    (folder / "out" / "part-thesis.docx").write_text("mine")
    before = contents(folder / "out")
    result = run(rl_parquet.app, folder, "out", "--shard-rows", 250)
    assert result.exit_code == 2 and "sft_jsonl" in result.output and contents(folder / "out") == before
    assert run(sft_jsonl.app, folder, "out", "--shard-rows", 500).exit_code == 0
    assert (folder / "out" / "part-thesis.docx").read_text() == "mine"
    assert len(list((folder / "out").glob("part-0*"))) == 2
    (folder / "papers").mkdir()
    (folder / "papers" / "part-00000.jsonl").write_text("mine")
    result = run(sft_jsonl.app, folder, "papers", "--shard-rows", 250)
    assert result.exit_code == 2 and (folder / "papers" / "part-00000.jsonl").read_text() == "mine"


def test_a_worker_that_dies_ends_the_command_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "_PROCESSES_FROM_BYTES", 0)
    monkeypatch.setattr(sft_jsonl, "from_manifest", _die)
    result = run(sft_jsonl.app, folder, "out", "--workers", 2)
    assert result.exit_code == 1 and "worker process has died" in result.stderr
    assert not (folder / "out").exists()


def _die(line: int, row: object) -> None:
    os._exit(9)


@pytest.mark.parametrize("words", [(), ("--embed-audio",)])
def test_datasets_loads_what_is_written_with_an_audio_column(folder: Path, words: tuple[str, ...]) -> None:
    datasets = pytest.importorskip("datasets")
    assert run(hf_parquet.app, folder, "out.parquet", *words).exit_code == 0
    schema = pq.read_schema(folder / "out.parquet")
    features = datasets.Features.from_arrow_schema(schema)
    assert isinstance(features["audio"], datasets.Audio) and features.arrow_schema == schema.remove_metadata()
    assert features["choices"] == datasets.List(datasets.Value("string"))
    out = pq.read_table(folder / "out.parquet").slice(0, 1).to_pylist()[0]
    audio, path = out.pop("audio"), folder / "audio/a.wav"
    assert np.array_equal(load(audio["bytes"] or audio["path"]), load(path))
    assert (audio["bytes"] is None) == (not words)
    assert out | {"audio": "a.wav"} == row(0) | {"duration": 2.0, "meta": '{"index":0}'}


def test_a_bound_that_is_missed_is_named() -> None:
    good = Measured("a", 100, 1.0, 1.0, 100.0, 0.25, 300.0)
    assert missed_bounds([good, Measured("a", 1_000, 1.0, 1.0, 100.0, 0.3, 330.0)]) == []
    slow, large = Measured("a", 1_000, 1.0, 1.0, 100.0, 0.24, 331.0), Measured("b", 1_000, 1.0, 1.0, 1.0, 1.0, 401.0)
    other = Measured("c", 100, 1.0, 1.0, 100.0, 0.25, 300.0, same_after_kills=False)
    assert [text.partition(":")[0] for text in missed_bounds([good, slow, large, other])] == [
        "a, 1000 rows",
        "b, 1000 rows",
        "c, 100 rows",
        "a",
    ]
