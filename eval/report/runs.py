"""A run on disk to rows of the page: predictions of eval.infer, and the trajectory logs of RL.

A run is a predictions file, the folder of a recipe's run (eval/*/*.jsonl and rl/), or an rl/ folder (trajectories/,
validation/). Verdicts are eval.score's and the reward's own: nothing is scored here.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echo_plugins.audio import AudioError, resolve_path
from echo_plugins.relisten.segment import Refusal, Segment, find_tags
from echo_plugins.relisten.transcript import parse

from ..benchmarks import BENCHMARKS, guess_breakdowns, labels
from ..curves import Curve, RunError, curves_of, metrics_files, read_lines, read_metrics
from ..predictions import read_sidecar, recorded_paths
from ..score import answer_of, grade_all, load, totals
from ..stats import wilson

MODES = ("interleaved", "grounded", "plain")  # the order of the sets of a run
AUDIO_KEYS = ("audio", "audio_path", "audio_id")  # of rows that do not say which benchmark they are of
MAX_RESPONSE_CHARS = 20_000  # of one response on the page; what a policy can ramble on for has no bound
REFUSALS: dict[str, str] = {
    Refusal.MALFORMED: "not two times in seconds",
    Refusal.REVERSED: "ends before it starts",
    Refusal.PAST_END: "starts after the audio ends",
    Refusal.TOO_SHORT: "too short to be heard",
    Refusal.TOO_MANY: "more clips than allowed",
    Refusal.NO_BUDGET: "no tokens left for its sound",
    Refusal.NOT_PAUSED: "the engine ran past it",
}


@dataclass(frozen=True)
class Named:
    """A segment as the model named it. `inserted` is None where the log does not say; `refusal` is a reason to read."""

    text: str
    start: float | None
    end: float | None
    inserted: bool | None
    refusal: str | None


@dataclass(frozen=True)
class Row:
    """One trajectory. `parts` is the response: text, and in the place of a tag the index of its segment."""

    key: str
    id: str
    question: str
    choices: list[str]
    answer: str
    prediction: str
    verdict: str  # right, wrong, unanswered, failed, unscored
    strict: bool | None
    parts: list[str | int]
    segments: list[Named]
    terms: dict[str, float]
    notes: dict[str, str]
    labels: dict[str, list[str]]
    events: list[dict[str, Any]]
    duration: float | None
    audio: Path | None
    audio_problem: str | None


@dataclass(frozen=True)
class Score:
    """A share of right answers with its 95% interval; None where the answers are withheld."""

    rule: str
    share: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Tally:
    """A line of a table of scores."""

    label: str
    total: int
    scores: list[Score]
    unanswered: int


@dataclass(frozen=True)
class RowSet:
    """Rows that were made together, such as one mode on one benchmark, and the scores of all of them.

    `num_rows` counts those that are not in `rows` too. `refused`: how many segments, by reason.
    """

    name: str
    rows: list[Row]
    num_rows: int
    overall: Tally
    breakdowns: dict[str, list[Tally]]
    named: int
    inserted: int | None
    refused: dict[str, int]
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    label: str
    path: Path
    facts: dict[str, str]
    sets: list[RowSet]
    curves: list[Curve]


@dataclass(frozen=True)
class Questions:
    """What an AudioQA manifest says of a row beside what the log says: by id, with the folder of its audio."""

    rows: Mapping[str, Mapping[str, Any]]
    audio_root: Path

    @classmethod
    def read(cls, files: Iterable[Path], audio_root: Path | None) -> Questions:
        rows: dict[str, Mapping[str, Any]] = {}
        root = audio_root
        for file in files:
            root = root or file.parent
            rows |= {str(row["id"]): row for row in read_lines(file) if "id" in row}
        return cls(rows, root or Path())


def read_run(
    run: Path,
    label: str,
    limit: int,
    audio_root: Path | None = None,
    audio_qa: Sequence[Path] = (),
    wanted: Collection[str] = (),
) -> Run:
    """Read `run`, at most `limit` rows of each of its sets: of long predictions those with a key in `wanted`, so that
    two runs show the same. Raises RunError, PredictionsError or BenchmarkError."""
    if not run.exists():
        raise RunError(f"{run}: no such file or folder")
    if run.is_file():
        return Run(
            label, run, _facts(read_sidecar(run)), [_prediction_set(run, run.stem, limit, audio_root, wanted)], []
        )
    files = [file for file in sorted(run.glob("eval/*/*.jsonl")) if file.with_suffix(".run.json").is_file()]
    files.sort(key=lambda file: (file.parent.name, MODES.index(file.stem) if file.stem in MODES else len(MODES)))
    several = len({file.parent for file in files}) > 1
    sets = [
        _prediction_set(file, f"{file.parent.name} {file.stem}" if several else file.stem, limit, audio_root, wanted)
        for file in files
    ]
    rl = next((at for at in (run, run / "rl") if (at / "trajectories").is_dir() or (at / "validation").is_dir()), None)
    if rl:
        recorded, recorded_root = _recorded_questions(rl.parent)
        questions = Questions.read(audio_qa or recorded, audio_root or recorded_root)
        for folder, name in (("validation", "RL validation"), ("trajectories", "RL training")):
            steps = {int(file.stem): file for file in (rl / folder).glob("*.jsonl") if file.stem.isdigit()}
            if steps:
                sets.append(_trajectory_set(steps, name, limit, questions))
    if not sets:
        raise RunError(
            f"{run}: nothing to listen to in it. Looked for eval/*/*.jsonl of eval.infer (with its .run.json), and for "
            "trajectories/ and validation/ of RL, here and in rl/"
        )
    facts = _facts(read_sidecar(files[0])) if files else {}
    return Run(label, run, facts, sets, curves_of(read_metrics(metrics_files(run))))


def _recorded_questions(run: Path) -> tuple[list[Path], Path | None]:
    """The AudioQA manifests that a recipe trained on, as its data stage's manifest says, where they are still there."""
    manifest = run / "manifests" / "data.json"
    if not manifest.is_file():
        return [], None
    data = json.loads(manifest.read_text(encoding="utf-8"))
    files = [run / file for file in data.get("questions", [])]
    root = data.get("more", {}).get("AUDIO_ROOT")
    return [file for file in files if file.is_file()], Path(root) if root else None


def _facts(sidecar: Mapping[str, Any] | None) -> dict[str, str]:
    if sidecar is None:
        return {}
    sampling = sidecar["identity"].get("sampling", {})
    facts = {
        "model": Path(sidecar.get("model", "")).name,
        "data": Path(sidecar.get("questions", "")).name,
        "temperature": sampling.get("temperature"),
        "seed": sampling.get("seed"),
        "started": str(sidecar.get("started", "")).replace("T", " ").removesuffix("+00:00"),
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def evenly(count: int, limit: int) -> list[int]:
    """`limit` of `count` indices with even gaps, the first and the last among them."""
    if count <= limit:
        return list(range(count))
    if limit == 1:
        return [0]
    return [round(place * (count - 1) / (limit - 1)) for place in range(limit)]


def _chosen(keys: Sequence[str], limit: int, wanted: Collection[str]) -> list[int]:
    shared = [index for index, key in enumerate(keys) if key in wanted] if len(keys) > limit else []
    return shared[:limit] or evenly(len(keys), limit)


def split(text: str, segments: Sequence[Named]) -> list[str | int]:
    """The response as text and, in the place of the k-th tag, k. Where the log's tags are not those of the text (they
    are cut in the log, never in the text), it stays one text."""
    tags = find_tags(text)
    if len(tags) != len(segments):
        return [_shortened(text)]
    parts: list[str | int] = []
    reached = 0
    for number, tag in enumerate(tags):
        if tag.end > MAX_RESPONSE_CHARS:
            break
        parts += [text[reached : tag.start], number]
        reached = tag.end
    parts.append(_shortened(text[reached:], MAX_RESPONSE_CHARS - reached))
    return [part for part in parts if part != ""]


def _shortened(text: str, limit: int = MAX_RESPONSE_CHARS) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} characters more)"


def _named(row: Mapping[str, Any], text: str) -> list[Named]:
    """The segments that the log has, else those of the text, of which it is not known what became."""
    logged = row.get("segments")
    if not isinstance(logged, list):
        return [
            Named(text[tag.start : tag.end], tag.meaning.start_seconds, tag.meaning.end_seconds, None, None)
            if isinstance(tag.meaning, Segment)
            else Named(text[tag.start : tag.end][:96], None, None, False, REFUSALS[tag.meaning])
            for tag in find_tags(text)
        ]
    named = []
    for each in logged:
        times, refusal = _numbers(each), each.get("refusal")
        start, end = times.get("start"), times.get("end")
        said = _text(each.get("text")) or (f"{start:.2f}, {end:.2f}" if start is not None and end is not None else "")
        reason = None if refusal is None else _reason(refusal)
        named.append(Named(said, start, end, bool(each.get("inserted")), reason))
    return named


def _reason(refusal: Any) -> str:
    return REFUSALS.get(str(refusal), str(refusal))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def _numbers(pairs: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: float(value) for key, value in pairs.items() if isinstance(value, (int, float)) and math.isfinite(value)
    }


def _events(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"label": _text(event.get("label")), "start": event["start"], "end": event["end"]}
        for event in row.get("events") or []
        if isinstance(event, Mapping) and _numbers(event).keys() >= {"start", "end"}
    ]


def _audio(
    row: Mapping[str, Any], root: Path | None, benchmark: str | None = None, follow_links: bool = False
) -> tuple[Path | None, str | None]:
    """The file that a row names, the first where there are several, or why there is none."""
    if benchmark in BENCHMARKS:
        name = BENCHMARKS[benchmark].read(row).audio
    else:
        name = next((row[key] for key in AUDIO_KEYS if row.get(key)), None)
    name = name[0] if isinstance(name, list) and name else name
    if not isinstance(name, str):
        return None, "the log does not say which audio it was"
    if Path(name).is_absolute():
        root = Path("/")
    if root is None:
        return None, f"{name}: give --audio-root, the folder that it starts from"
    try:
        return resolve_path(root, name, follow_links), None
    except AudioError as error:
        return None, str(error)


def _prediction_set(file: Path, name: str, limit: int, audio_root: Path | None, wanted: Collection[str]) -> RowSet:
    sidecar = read_sidecar(file)
    recorded = recorded_paths(sidecar, "audio_root", file) if sidecar and sidecar.get("audio_root") else []
    root = audio_root or next((path for path in recorded if path.is_dir()), None) or next(iter(recorded), None)
    predicted = load(file)
    graded = grade_all(predicted)
    summary = totals(predicted, graded)
    broken_down = {**summary["by"], "clips heard again": summary["by_clips"]}
    rows = []
    for index in _chosen([each.id for each in graded], limit, wanted):
        row, verdict = predicted.rows[index], graded[index]
        text = _text(row.get("model_response"))
        failed = row.get("stop_reason") == "error"
        segments = _named(row, text)
        audio, problem = _audio(row, root, predicted.benchmark, bool(sidecar and sidecar.get("follow_links")))
        rows.append(
            Row(
                key=str(row["id"]),
                id=str(row["id"]),
                question=_text(row.get("question")),
                choices=[_text(choice) for choice in row.get("choices") or []],
                answer=_text(row.get("answer")),
                prediction=answer_of(row),
                verdict=_verdict(verdict.official, verdict.answered, failed),
                strict=verdict.strict,
                parts=split(text, segments),
                segments=segments,
                terms={},
                notes=_notes(row),
                labels={field: labels(row, field) for field in predicted.breakdowns},
                events=_events(row),
                duration=_numbers(row).get("duration"),
                audio=audio,
                audio_problem=problem,
            )
        )
    return RowSet(
        name,
        rows,
        summary["total"],
        _tally("all", summary),
        {by: [_tally(label, group) for label, group in groups.items()] for by, groups in broken_down.items()},
        summary["segments"]["named"],
        summary["segments"]["inserted"],
        {_reason(refusal): count for refusal, count in summary["segments"]["refused"].items()},
        [f"{summary['missing']} rows of the benchmark are missing and count as wrong"] if summary["missing"] else [],
    )


def _tally(label: str, group: Mapping[str, Any]) -> Tally:
    scores = [Score(rule, group[f"{rule}_accuracy"], group[f"{rule}_interval"]) for rule in ("official", "strict")]
    return Tally(label, group["total"], scores, group["unanswered"])


def _verdict(right: bool | None, answered: bool, failed: bool) -> str:
    if failed:
        return "failed"
    if not answered:
        return "unanswered"
    return "unscored" if right is None else "right" if right else "wrong"


NOTES = {
    "stop_reason": ("stopped", "{}"),
    "error": ("error", "{}"),
    "num_tokens": ("sampled tokens", "{}"),
    "sampled_tokens": ("sampled tokens", "{}"),
    "num_inserted_tokens": ("inserted tokens", "{}"),
    "observation_tokens": ("inserted tokens", "{}"),
    "seconds": ("seconds", "{:.2f}"),
    "forced_answer": ("answer", "forced"),
}


def _notes(row: Mapping[str, Any]) -> dict[str, str]:
    """What else is known of a row, as it is to be read."""
    notes = {}
    for key, (name, form) in NOTES.items():
        value = row.get(key)
        if isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
            notes[name] = form.format(value) if not isinstance(value, str) else value
    logprob = row.get("answer_logprob")
    if isinstance(logprob, (int, float)) and math.isfinite(logprob):
        notes["probability of the answer"] = f"{math.exp(min(0.0, logprob)):.3f}"
    return notes


def _trajectory_set(steps: Mapping[int, Path], name: str, limit: int, questions: Questions) -> RowSet:
    """Whole steps, so that groups stay together: as many as `limit` allows, with even gaps, the last among them."""
    numbers = sorted(steps)
    counts = {step: steps[step].read_bytes().count(b"\n") for step in numbers}
    fitting = max(1, limit * len(numbers) // max(1, sum(counts.values())))
    shown = [numbers[-1]] if fitting == 1 else [numbers[index] for index in evenly(len(numbers), fitting)]
    logs: list[dict[str, Any]] = []
    seen: Counter[str] = Counter()
    for step in shown:
        for log in list(read_lines(steps[step]))[: max(1, limit - len(logs))]:
            row_id = _text(log.get("id")) or _text(log.get("uid")).rsplit("_", 2)[0] or "row"
            seen[key := f"{step}/{row_id}"] += 1
            said = {name: value for name, value in log.items() if value is not None}
            known = questions.rows.get(row_id, {})
            logs.append({**known, **said, "id": row_id, "step": step, "key": f"{key}/{seen[key]}"})
    fields = ("step", "data_source", *guess_breakdowns(logs))
    rows = [_trajectory_row(log, fields, questions.audio_root) for log in logs]
    right = sum(row.verdict == "right" for row in rows)
    segments = [segment for row in rows for segment in row.segments]
    unknown = any(segment.inserted is None for segment in segments)
    total = sum(counts.values())
    remarks = [f"{len(rows):,} of {total:,} trajectories are here, of {len(shown)} steps"] if len(rows) < total else []
    scored = [row for row in rows if row.verdict != "unscored"]
    score = Score("reward's accuracy", right / len(scored), wilson(right, len(scored))) if scored else None
    return RowSet(
        name,
        rows,
        total,
        Tally("all", len(rows), [score] if score else [], sum(row.verdict == "unanswered" for row in rows)),
        {"step": [_step_tally(step, [row for row in scored if row.labels["step"] == [str(step)]]) for step in shown]},
        len(segments),
        None if unknown else sum(bool(segment.inserted) for segment in segments),
        dict(Counter(reason for segment in segments if (reason := segment.refusal))),
        remarks,
    )


def _step_tally(step: int, rows: Sequence[Row]) -> Tally:
    right = sum(row.verdict == "right" for row in rows)
    share = right / len(rows) if rows else None
    score = Score("reward's accuracy", share, wilson(right, len(rows)) if rows else None)
    return Tally(str(step), len(rows), [score], sum(row.verdict == "unanswered" for row in rows))


def _trajectory_row(log: Mapping[str, Any], fields: Sequence[str], audio_root: Path) -> Row:
    """A line of our trajectory log, or of verl's own dump of a validation (input, output, gts, score)."""
    text = _text(log.get("text", log.get("output")))
    segments = _named(log, text)
    transcript = parse(text)
    components = log.get("components")
    values = _numbers(components if isinstance(components, Mapping) else log)
    right = values["acc"] > 0 if "acc" in values else None
    failed = log.get("stop_reason") == "error" or values.get("failed", 0) > 0
    audio, problem = _audio(log, audio_root)
    terms = {name.removeprefix("reward_"): value for name, value in values.items() if name.startswith("reward_")}
    return Row(
        key=log["key"],
        id=log["id"],
        question=_text(log.get("question", log.get("input"))),
        choices=[_text(choice) for choice in log.get("choices") or []],
        answer=_text(log.get("ground_truth", log.get("gts"))),
        prediction=transcript.answer or "",
        verdict=_verdict(right, bool(transcript.answer), failed),
        strict=None,
        parts=split(text, segments),
        segments=segments,
        terms=terms | {name: value for name, value in _numbers(log).items() if name == "score"},
        notes=_notes(log) | {f"{term} is 0": _text(why) for term, why in (log.get("problems") or {}).items()},
        labels={field: labels(log, field) for field in fields},
        events=_events(log),
        duration=_numbers(log).get("duration"),
        audio=audio,
        audio_problem=problem,
    )
