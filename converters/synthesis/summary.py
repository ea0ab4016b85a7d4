"""What came of a run, in numbers: rows through every stage, tokens, seconds, and the shape of the written rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel

from converters.atomic import StagedFile
from converters.synthesis.config import ConfigError, Limits
from converters.synthesis.filters import COMPARED, even_choice_p, segments_of
from converters.synthesis.sample import Sample

SCREEN_NAME = "screen"
SELECT_NAME = "select"
_PLACES = 10  # parts of a clip that segments are counted in
_SECONDS_STEP, _WORDS_STEP, _TOKENS_STEP, _SEGMENT_STEP = 5, 20, 100, 1


class StageSummary(BaseModel):
    """A stage: rows and tokens. `seconds` is of its tasks that ended, run `workers` at once; what was answered from the
    journal took none and is not in `timed_tokens`. `compared`: of the stage that screens for benchmarks, how many clips
    could be compared with one by which key."""

    name: str
    models: list[str]
    rows_in: int
    rows_out: int
    dropped: dict[str, int]
    think_lost: dict[str, int] = {}
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    statuses: dict[str, int] = {}
    retries: dict[str, int] = {}
    seconds: float = 0.0
    timed_tokens: int = 0
    tokens_a_request: dict[int, int] = {}
    compared: dict[str, int] | None = None


class Summary(BaseModel):
    """A run. Histograms are {lower bound: rows}."""

    pipeline: str
    written: dict[str, int]
    stages: list[StageSummary]
    histograms: dict[str, dict[int, int]]
    domains: dict[str, int]
    models: list[str]
    answer_places: dict[int, int]
    answer_places_p: float
    drafted_places: dict[int, int]
    drafted_places_p: float
    answer_length_ranks: dict[int, int]
    answer_length_p: float
    warnings: list[str]


class Shape:
    """Collects the distributions over the rows that are written."""

    def __init__(self, num_choices: int) -> None:
        self.num_choices = num_choices
        self.histograms: dict[str, Counter[int]] = {
            name: Counter()
            for name in ("clip seconds", "segments a row", "segment seconds", "place of segments", "words of reasoning")
        }
        self.domains: Counter[str] = Counter()
        self.places: Counter[int] = Counter()
        self.drafted: Counter[int] = Counter()
        self.length_ranks: Counter[int] = Counter()

    def add(self, sample: Sample) -> None:
        self.domains[sample.domain] += 1
        self.histograms["clip seconds"][int(sample.duration) // _SECONDS_STEP * _SECONDS_STEP] += 1
        if sample.answer in sample.choices:
            self.places[sample.choices.index(sample.answer)] += 1
        if sample.drafted_place is not None:
            self.drafted[sample.drafted_place] += 1
        lengths = [len(choice) for choice in sample.choices]
        if sample.answer and len(set(lengths)) == len(lengths):  # a tie tells nothing
            self.length_ranks[sum(length < len(sample.answer) for length in lengths)] += 1
        if sample.think:
            segments = segments_of(sample.think)
            self.histograms["segments a row"][len(segments)] += 1
            self.histograms["words of reasoning"][len(sample.think.split()) // _WORDS_STEP * _WORDS_STEP] += 1
            for segment in segments:
                self.histograms["segment seconds"][int(segment.duration_seconds) // _SEGMENT_STEP] += 1
                middle = (segment.start_seconds + segment.end_seconds) / 2 / sample.duration
                self.histograms["place of segments"][min(_PLACES - 1, int(middle * _PLACES))] += 1


def summarise(
    folder: Path, dropped: Mapping[str, int], written: Mapping[str, int], shape: Shape, limits: Limits
) -> Summary:
    """Read the stages' files of a run; `folder`, `dropped`, `written` and `shape` are of the last stage."""
    record = json.loads((folder / "inputs" / "run.json").read_text(encoding="utf-8"))
    stages: list[StageSummary] = []
    for entry in record["stages"]:
        if entry["stage"] == SELECT_NAME:
            kept = sum(written.values())
            rows_in = stages[-1].rows_out if stages else 0
            stages.append(
                StageSummary(name=SELECT_NAME, models=[], rows_in=rows_in, rows_out=kept, dropped=dict(dropped))
            )
        else:
            before = stages[-1].rows_out if stages else None
            stages.append(_stage(folder.parent / entry["folder"], entry["stage"], entry["models"], before))
    places_p = even_choice_p(shape.places, shape.num_choices)
    length_p = even_choice_p(shape.length_ranks, shape.num_choices)
    warnings = []
    if places_p < limits.min_position_p:
        warnings.append(f"the answer's place among the choices is uneven (p = {places_p:.2g})")
    if length_p < limits.min_position_p:
        warnings.append(f"the answer can be told by its length: {_ranks(shape.length_ranks)} (p = {length_p:.2g})")
    warnings += [
        f"contamination: none of the clips could be compared with a benchmark by {key}"
        for stage in stages
        for key, count in (stage.compared or {}).items()
        if not count
    ]
    return Summary(
        pipeline=record["pipeline"].rpartition(".")[2],
        written=dict(written),
        stages=stages,
        histograms={name: dict(sorted(counts.items())) for name, counts in shape.histograms.items()},
        domains=dict(shape.domains.most_common()),
        models=sorted({model for stage in stages for model in stage.models}),
        answer_places=dict(sorted(shape.places.items())),
        answer_places_p=places_p,
        drafted_places=dict(sorted(shape.drafted.items())),
        drafted_places_p=even_choice_p(shape.drafted, shape.num_choices),
        answer_length_ranks=dict(sorted(shape.length_ranks.items())),
        answer_length_p=length_p,
        warnings=warnings,
    )


def _ranks(ranks: Counter[int]) -> str:
    total = max(1, ranks.total())
    return f"longest in {ranks[max(ranks, default=0)] / total:.0%} of the rows, shortest in {ranks[0] / total:.0%}"


def _stage(folder: Path, name: str, models: list[str], rows_in: int | None) -> StageSummary:
    summary = StageSummary(name=name, models=models, rows_in=0, rows_out=0, dropped={})
    dropped: Counter[str] = Counter()
    think_lost: Counter[str] = Counter()
    statuses: Counter[str] = Counter()
    tokens: Counter[int] = Counter()
    clip: str | None = None
    seen: set[tuple[str, int]] = set()
    for row in _rows(folder):
        drop = row.get("dropped")
        if drop is None:
            summary.rows_out += 1
        elif drop["stage"] == name:
            dropped[drop["reason"]] += 1
        if name == SCREEN_NAME and row.get("compared_by") is not None:
            summary.compared = dict.fromkeys(COMPARED, 0) if summary.compared is None else summary.compared
            for key in row["compared_by"]:
                summary.compared[key] += 1
        lost = row.get("think_lost")
        if lost is not None and lost["stage"] == name and drop is None:
            think_lost[lost["reason"]] += 1
        if row["clip"] != clip:  # the rows of a clip stand together and share the requests of earlier stages
            clip, seen = row["clip"], set()
        for step in row.get("provenance", ()):
            request = (step["prompt"], step["seed"])
            if step["stage"] != name or request in seen:
                continue
            seen.add(request)
            summary.requests += 1
            summary.prompt_tokens += step["prompt_tokens"]
            summary.completion_tokens += step["completion_tokens"]
            summary.reasoning_tokens += step["reasoning_tokens"]
            statuses[step["status"]] += 1
            tokens[step["completion_tokens"] // _TOKENS_STEP * _TOKENS_STEP] += 1
    # What the stage made into several rows went in as one; a first stage takes in all it says anything about.
    summary.rows_in = summary.rows_out + dropped.total() if rows_in is None else rows_in
    summary.dropped, summary.think_lost = dict(dropped.most_common()), dict(think_lost.most_common())
    summary.statuses, summary.tokens_a_request = dict(statuses.most_common()), dict(sorted(tokens.items()))
    retries: Counter[str] = Counter()
    for file in folder.glob("timing/*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            summary.seconds += entry["seconds"] / entry["workers"]
            summary.timed_tokens += entry["prompt_tokens"] + entry["completion_tokens"]
            retries.update(entry["retries"])
    summary.seconds, summary.retries = round(summary.seconds, 3), dict(retries.most_common())
    return summary


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    for file in sorted((folder / "rows").glob("*.jsonl")):
        with file.open("rb") as lines:
            for line in lines:
                yield orjson.loads(line)


def write_summary(summary: Summary, file: Path) -> None:
    with StagedFile(file) as staged:
        staged.path.write_text(summary.model_dump_json(indent=2) + "\n", encoding="utf-8")
        staged.commit()


def read_summary(run: Path) -> Summary:
    """Raises ConfigError where the run has not come to its last stage."""
    file = run / "summary.json"
    if not file.is_file():
        raise ConfigError(f"{file} is not there: the run has not finished its last stage, {SELECT_NAME}")
    return Summary.model_validate_json(file.read_text(encoding="utf-8"))
