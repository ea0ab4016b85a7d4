"""How fast the exporters are beside a plain pyarrow copy of the same rows, and how much memory they take.

    python -m converters.throughput --rows 100000 --rows 1000000 [--work DIR] [--json FILE]

The rows are made up, 1.6 kB each, over five short audio files. The copy reads them as Parquet and writes them again,
before and after each exporter: the mean counts, since a machine is seldom alone. Memory is the proportional set size of
an exporter and all its worker processes together, sampled. With `--kills N` each exporter runs once more, is killed N
times on its way and given the same command again: its files must be those of the run before, to the byte. Exit status 1
when a bound is not met.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import orjson
import pyarrow.json as pj
import pyarrow.parquet as pq
import soundfile
import typer

from converters import conversion, shards

MIN_RATE_OF_COPY = 0.25
MAX_MEGABYTES = 400
MAX_GROWTH = 0.10  # of memory, from the fewest rows to the most
EXPORTERS = {
    "sft_jsonl grounded": ("sft_jsonl", "--mode", "grounded"),
    "sft_jsonl interleaved": ("sft_jsonl", "--mode", "interleaved"),
    "sft_jsonl mix": ("sft_jsonl", "--mode", "interleaved=50,grounded=30,plain=20"),
    "rl_parquet": ("rl_parquet",),
    "hf_parquet": ("hf_parquet",),
}
_SAMPLE_SECONDS = 0.1
_WORDS = (
    "the",
    "a",
    "dog",
    "barks",
    "loudly",
    "while",
    "rain",
    "falls",
    "an",
    "engine",
    "far",
    "music",
    "plays",
    "again",
)

app = conversion.new_command()


@dataclass(frozen=True)
class Measured:
    """One exporter over so many rows; `rate_of_copy` is its rate over that of the plain copy."""

    exporter: str
    rows: int
    seconds: float
    cpu_seconds: float
    rows_per_second: float
    rate_of_copy: float
    megabytes: float
    same_after_kills: bool | None = None  # None: not asked for


@app.command()
def main(
    rows: Annotated[list[int], typer.Option(min=1, help="May be given several times.")] = [100_000, 1_000_000],  # noqa: B006
    exporter: Annotated[list[str], typer.Option(help=f"Of {', '.join(EXPORTERS)}.", show_default="all")] = [],  # noqa: B006
    workers: conversion.WorkersOption = conversion.DEFAULT_WORKERS,
    shard_rows: Annotated[int, typer.Option(min=1, help="As the exporters' own.")] = 100_000,
    kills: Annotated[int, typer.Option(min=0, help="Times to kill each exporter in a run of its own.")] = 0,
    work: Annotated[Path | None, typer.Option(help="Keep the made-up rows here, for another run.")] = None,
    json: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the figures here too.")] = None,
) -> None:
    """Measure the exporters against a plain pyarrow copy. Exit status: 0 all bounds met, 1 not, 2 wrong usage."""
    chosen = exporter or list(EXPORTERS)
    if unknown := set(chosen).difference(EXPORTERS):
        raise typer.BadParameter(f"{sorted(unknown)}: there are {', '.join(EXPORTERS)}", param_hint="--exporter")
    measured: list[Measured] = []
    with nullcontext(str(work)) if work else tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for num_rows in sorted(rows):
            source = made_up_rows(folder, num_rows)
            original = as_parquet(source)
            before = copy_seconds(original)
            typer.echo(f"{num_rows} rows, {source.stat().st_size >> 20} MB")
            for key in chosen:
                out = folder / "out"
                module, *options = EXPORTERS[key]
                options += ["--audio-root", str(folder / "audio")]
                options += ["--workers", str(workers), "--shard-rows", str(shard_rows)]
                command = [sys.executable, "-m", f"converters.{module}", *options, str(source)]
                seconds, cpu_seconds, megabytes = run([*command, str(out)])
                after = copy_seconds(original)
                same = same_after_kills(command, out, folder / "killed", kills, seconds) if kills else None
                rate, copy_rate = num_rows / seconds, 2 * num_rows / (before + after)
                measured.append(Measured(key, num_rows, seconds, cpu_seconds, rate, rate / copy_rate, megabytes, same))
                beside = f"{rate / copy_rate:.2f} of {copy_rate:,.0f} copied rows/s"
                resumed = "" if same is None else f", {'the same' if same else 'OTHER'} bytes after {kills} kills"
                text = f"{rate:>9,.0f} rows/s, {beside}, {megabytes:.0f} MB, {cpu_seconds:.0f} CPU s{resumed}"
                typer.echo(f"  {key:22} {text}")
                before = after
    missed = missed_bounds(measured)
    if json:
        json.write_bytes(orjson.dumps({"measured": [asdict(m) for m in measured], "missed": missed}))
    for text in missed:
        typer.echo(f"missed: {text}", err=True)
    raise typer.Exit(1 if missed else 0)


def missed_bounds(measured: list[Measured]) -> list[str]:
    """What is slower, larger or grows more than it may, in words."""
    missed = [f"{m.exporter}, {m.rows} rows: {m.rate_of_copy:.2f} of the copy" for m in measured if _slow(m)]
    missed += [f"{m.exporter}, {m.rows} rows: {m.megabytes:.0f} MB" for m in measured if m.megabytes > MAX_MEGABYTES]
    missed += [f"{m.exporter}, {m.rows} rows: other bytes after kills" for m in measured if m.same_after_kills is False]
    for key in dict.fromkeys(m.exporter for m in measured):
        first, *_, last = [m for m in measured if m.exporter == key] * 2
        if last.megabytes > first.megabytes * (1 + MAX_GROWTH):
            missed.append(f"{key}: {first.megabytes:.0f} MB at {first.rows} rows, {last.megabytes:.0f} at {last.rows}")
    return missed


def _slow(measured: Measured) -> bool:
    return measured.rate_of_copy < MIN_RATE_OF_COPY


def made_up_rows(folder: Path, num_rows: int) -> Path:
    """A manifest of so many rows over five files under `folder`/audio; one that is there already is taken."""
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    source = folder / f"{num_rows}.jsonl"
    files = [("wav", 16_000), ("flac", 44_100), ("mp3", 44_100), ("ogg", 48_000), ("wav", 8_000)]
    names = [f"{number}.{suffix}" for number, (suffix, _) in enumerate(files)]
    for number, (name, (_, rate)) in enumerate(zip(names, files, strict=True)):
        noise = np.random.default_rng(number).uniform(-0.5, 0.5, rate * 10)
        soundfile.write(folder / "audio" / name, noise, rate)
    if source.exists():
        return source
    rng = random.Random(0)

    def text(num_words: int) -> str:
        return " ".join(rng.choices(_WORDS, k=num_words))

    partial = source.with_suffix(".tmp")
    with partial.open("wb") as out:
        for index in range(num_rows):
            a, b = sorted((rng.uniform(0, 9.8), rng.uniform(0, 9.8)))
            choices = [f"{text(4)} {number}" for number in range(4)]
            events = [{"label": text(2), "start": a, "end": a + 0.1}, {"label": text(2), "start": b, "end": b + 0.1}]
            tags = [f"<seg>{start:.2f}, {start + 0.25:.2f}</seg>" for start in (a, b)]
            row = {
                "id": f"row-{index:07d}",
                "audio": rng.choice(names),
                "question": f"{text(15)}?",
                "choices": choices,
                "answer": rng.choice(choices),
                "think": f"{text(60)} {tags[0]} {text(60)}, then at {tags[1]}, {text(60)}.",
                "events": events,
                "meta": {"source": text(3), "url": text(6), "model": text(3), "seed": index},
            }
            out.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    return partial.rename(source)


def as_parquet(source: Path) -> Path:
    """The rows as pyarrow itself reads and writes them."""
    original = source.with_suffix(".parquet")
    with pj.open_json(source) as reader, pq.ParquetWriter(original, reader.schema, compression="zstd") as writer:
        for batch in reader:
            writer.write_batch(batch)
    return original


def copy_seconds(original: Path) -> float:
    """Seconds that pyarrow takes to read the rows from one Parquet file and write them to another."""
    copy = original.with_suffix(".copy.parquet")
    started = time.perf_counter()
    parquet = pq.ParquetFile(original)
    with pq.ParquetWriter(copy, parquet.schema_arrow, compression="zstd") as writer:
        for batch in parquet.iter_batches(1_000):
            writer.write_batch(batch)
    seconds = time.perf_counter() - started
    copy.unlink()
    return seconds


def same_after_kills(command: list[str], whole: Path, killed: Path, kills: int, seconds: float) -> bool:
    """Whether a run that is killed `kills` times, at even parts of its `seconds`, and given again, leaves what `whole`
    holds."""
    shutil.rmtree(killed, ignore_errors=True)
    for _ in range(kills):
        process = subprocess.Popen([*command, str(killed)], stderr=subprocess.DEVNULL)
        try:
            process.wait(seconds / (kills + 1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if (killed / shards.MANIFEST).exists():
            raise RuntimeError(f"{' '.join(command)}: too few rows to be killed {kills} times")
    run([*command, str(killed)])
    return digests(killed) == digests(whole)


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file under `folder`."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): shards.sha256_of(file) for file in files}


def run(command: list[str]) -> tuple[float, float, float]:
    """Wall and CPU seconds of an exporter, start and imports included, and its peak memory in MB."""
    started, peak, cpu = time.perf_counter(), 0.0, dict[int, float]()
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while process.poll() is None:
        family = _family(process.pid)
        peak = max(peak, sum(map(_megabytes, family)))
        cpu |= {pid: seconds for pid in family if (seconds := _cpu_seconds(pid))}
        time.sleep(_SAMPLE_SECONDS)
    seconds = time.perf_counter() - started
    if process.returncode:
        said = process.stderr.read().decode() if process.stderr else ""
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {said}")
    return seconds, sum(cpu.values()), peak


def _family(pid: int) -> list[int]:
    """The process and all that descend from it."""
    try:
        children = [
            int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()
        ]
    except OSError:
        return []
    return [pid, *(descendant for child in children for descendant in _family(child))]


def _megabytes(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it has just ended
        return 0.0
    return int(text.partition("\nPss:")[2].split()[0]) / 1024 if "\nPss:" in text else 0.0


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system time


if __name__ == "__main__":
    app(prog_name="python -m converters.throughput")
