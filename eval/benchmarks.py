"""Benchmarks: where their rows, audio, choices and keys are. A user's AudioQA manifest is one of them, without code.

    python -m eval.benchmarks list
    python -m eval.benchmarks check mmar --benchmark-root benchmarks/mmar
    python -m eval.benchmarks check mine.yaml --benchmark-root benchmarks/mine

A benchmark of your own in any layout is a YAML file, see `own_benchmark`.

The official layouts are read as they are published, nothing is renamed or moved. Metadata is JSONL, a JSON list or
Parquet. Rows are read one at a time; a JSON list is the exception, its text (not its objects) is held whole.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_args

import typer
import yaml
from rich.console import Console

from echo_plugins.audio import AudioError, resolve_path

AUDIO_QA = "audio-qa"

# A meta field of a manifest with more labels than this is a name or a note, not something to break scores down by.
MAX_LABELS = 64
NO_LABEL = "(none)"
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")
_BRACED = re.compile(r"\{([^{}]+)\}")
MAX_CHOICES = 26  # the prompt letters them A to Z
SHOWN = 3  # examples of what is missing

Rule = Literal["string_match", "letter", "first_letter", "nv_embed"]
"""Official rules, see eval.score. nv_embed is an embedding model and two judges of its own: not computed here."""

LinksOption = Annotated[
    bool,
    typer.Option("--follow-links", help="Take audio that is a link which leads out of its root, as in a hub's cache."),
]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


class BenchmarkError(ValueError):
    """The rows cannot be used; the message names the file, the row and the cure."""


@dataclass(frozen=True)
class Fields:
    """A row's own values of what every question has. Nothing is checked yet."""

    id: Any
    audio: Any
    question: Any
    choices: Any
    answer: Any


def _keyed(audio_key: str) -> Callable[[Mapping[str, Any]], Fields]:
    """Rows with the keys of an AudioQA manifest, but for the audio."""
    return lambda row: Fields(*(row.get(key) for key in ("id", audio_key, "question", "choices", "answer")))


def _mmau_pro(row: Mapping[str, Any]) -> Fields:
    """`audio_path` is a list, of several clips in 456 rows; open questions have no choices, instructions no answer."""
    return Fields(
        row.get("id"), row.get("audio_path"), row.get("question"), row.get("choices") or [], row.get("answer")
    )


def _mmsu(row: Mapping[str, Any]) -> Fields:
    """Whatever folder `audio_path` names, the file is in audio/ under the root."""
    audio = row.get("audio_path")
    return _lettered(row, row.get("id"), f"audio/{PurePosixPath(audio).name}" if isinstance(audio, str) else audio)


def _air_bench(row: Mapping[str, Any]) -> Fields:
    """A folder for each task and data set. Audio_Grounding is in FLAC whatever its `path` says
    (Inference_Foundation.py)."""
    task, dataset, path = row.get("task_name"), row.get("dataset_name"), row.get("path")
    if task == "Audio_Grounding" and isinstance(path, str):
        path = f"{path[:-3]}flac"
    audio = f"{task}_{dataset}/{path}" if isinstance(path, str) else path
    unique = row.get("uniq_id")
    return _lettered(row, None if unique is None else f"{task}/{dataset}/{unique}", audio)


def _lettered(row: Mapping[str, Any], row_id: Any, audio: Any) -> Fields:
    """choice_a to choice_d, the last of which may be absent or None; numbers are choices too."""
    choices = [row.get(f"choice_{letter}") for letter in "abcd"]
    while choices and choices[-1] is None:
        choices.pop()
    texts = [_text(choice) for choice in choices]
    return Fields(row_id, audio, row.get("question"), texts, _answer_text(_text(row.get("answer_gt")), texts))


def _answer_text(answer: Any, choices: Sequence[Any]) -> Any:
    """The choice that an answer names by its letter; any other answer as it is. Some copies of a set have letters."""
    if answer in choices or not isinstance(answer, str) or not (letter := _LETTER.fullmatch(answer.strip())):
        return answer
    place = ord(letter[1].upper()) - ord("A")
    return choices[place] if place < len(choices) else answer


def _text(value: Any) -> Any:
    return "" if value is None else str(value) if type(value) in (int, float) else value


@dataclass(frozen=True)
class Benchmark:
    """One published benchmark.

    `files`: names that its metadata has under the root, the first that exists is read. `read` finds a row's fields.
    `breakdowns`: the fields that the official report breaks down by; the macro mean is over the first. `num_rows`:
    None where what is published differs. `revisions`: sha256 of the metadata files that published numbers belong to,
    with their name; empty where we have seen none: numbers then name the sha256 they belong to, and count as unpinned.
    """

    name: str
    title: str
    files: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Fields]
    rule: Rule
    breakdowns: tuple[str, ...]
    num_rows: int | None
    get_it: str
    revisions: Mapping[str, str]
    may_be_open: bool = False  # rows without choices
    definition: Mapping[str, Any] | None = None  # of a benchmark of the user's own


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "mmar",
            "MMAR",
            ("MMAR-meta.jsonl", "MMAR-meta.json"),
            _keyed("audio_path"),
            "string_match",
            ("modality", "category", "sub-category"),
            1000,
            "MMAR-meta.jsonl from github.com/ddlBoJack/MMAR; audio/ from huggingface.co/datasets/BoJack/MMAR",
            {"1c9a343e7bebf1037482b935c54eacd43cc63df7b2c668724b5560caf1f84fad": "February 2026, with rubrics"},
        ),
        Benchmark(
            "mmau-mini",
            "MMAU test-mini",
            ("mmau-test-mini.json",),
            _keyed("audio_id"),
            "string_match",
            ("task", "difficulty", "category", "sub-category"),
            1000,
            "mmau-test-mini.json from github.com/Sakshi113/MMAU; test-mini-audios/ from "
            "huggingface.co/datasets/gamma-lab-umd/MMAU-test-mini",
            {"9f18fda99f8dbc2bc5ecd6323fb5063309f54969810b5c6f1caeb3b8d904cf1c": "v05.15.25"},
        ),
        Benchmark(
            "mmau",
            "MMAU test",
            ("mmau-test.json",),
            _keyed("audio_id"),
            "string_match",
            ("task", "difficulty", "category", "sub-category"),
            9000,
            "mmau-test.json from github.com/Sakshi113/MMAU; test-audios/ from "
            "huggingface.co/datasets/gamma-lab-umd/MMAU-test. Its answers are withheld: upload the --official file",
            {},
        ),
        Benchmark(
            "mmau-pro",
            "MMAU-Pro",
            ("test.parquet", "mmau-pro.json", "mmau-pro.jsonl"),
            _mmau_pro,
            "nv_embed",
            ("category", "sub-cat", "length_type", "perceptual_skills", "reasoning_skills"),
            5305,
            "test.parquet and data/ (data.zip) from huggingface.co/datasets/gamma-lab-umd/MMAU-Pro. For the official "
            "scores give the --official file to evaluate_mmau_pro_comprehensive.py of github.com/sonalkum/MMAUPro",
            {},
            may_be_open=True,
        ),
        Benchmark(
            "mmsu",
            "MMSU",
            ("question/mmsu.jsonl", "mmsu.jsonl"),
            _mmsu,
            "letter",
            ("category", "sub-category", "sub-sub-category", "task_name"),
            5000,
            "question/mmsu.jsonl and audio/ from huggingface.co/datasets/ddwang2000/MMSU",
            {},
        ),
        Benchmark(
            "air-bench-foundation",
            "AIR-Bench Foundation",
            ("Foundation_meta.json",),
            _air_bench,
            "first_letter",
            ("task_name", "dataset_name"),
            None,  # the paper says 19k
            "the folder Foundation from huggingface.co/datasets/qyang1021/AIR-Bench-Dataset",
            {},
        ),
    )
}


AnswerIs = Literal["text", "letter", "index0", "index1"]


def benchmark_name(name_or_file: str) -> str:
    """The name of a benchmark in BENCHMARKS, where one that a YAML file describes is put. Raises BenchmarkError."""
    if name_or_file in BENCHMARKS:
        return name_or_file
    if not name_or_file.endswith((".yaml", ".yml")):
        raise BenchmarkError(
            f"no benchmark {name_or_file!r}; there are {', '.join(BENCHMARKS)}, or the path of a .yaml file, or a "
            "manifest with --audio-qa"
        )
    file = Path(name_or_file)
    try:
        definition = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BenchmarkError(f"{file}: cannot be read ({error})") from error
    if not isinstance(definition, dict):
        raise BenchmarkError(f"{file}: not a mapping of keys")
    try:
        return own_benchmark({"name": file.stem, **definition})
    except BenchmarkError as error:
        raise BenchmarkError(f"{file}: {error}") from error


def own_benchmark(definition: Mapping[str, Any]) -> str:
    """Put a benchmark of the user's own into BENCHMARKS, and return its name there, which its content is a part of.

        rows: questions.jsonl              # under --benchmark-root: JSONL, a JSON list or Parquet; of several the first
        id: qid                            # the key of a row; a.b is b within a
        audio: "clips/{file}"              # a key, or a path with keys in braces, under --benchmark-root
        question: prompt
        choices: [a, b, c, d]              # the key of a list or of an object by letters; or the keys of the choices
        answer: gold
        answer_is: text                    # text, letter, index0 or index1
        rule: string_match                 # string_match, letter or first_letter
        breakdowns: [category, meta.kind]  # the macro mean is over the first; default: every field that holds labels
        num_rows: 500                      # for `check`; with sha256: {HASH: "version 1"} and get_it: where it is got

    Only `rows`, `audio`, `question`, `choices` and `answer` are needed. Raises BenchmarkError.
    """
    kinds: dict[str, tuple[type, ...]] = {
        **{"name": (str,), "title": (str,), "rows": (str, list), "id": (str,), "audio": (str,), "question": (str,)},
        **{"choices": (str, list), "answer": (str,), "answer_is": (str,), "rule": (str,), "breakdowns": (list,)},
        **{"num_rows": (int,), "sha256": (dict,), "get_it": (str,)},
    }
    if unknown := [str(key) for key in definition if key not in kinds]:
        close = difflib.get_close_matches(unknown[0], kinds, n=1)
        meant = f": is {close[0]!r} meant?" if close else f"; there are {', '.join(kinds)}"
        raise BenchmarkError(f"no key {unknown[0]!r}{meant}")
    if missing := [key for key in ("rows", "audio", "question", "choices", "answer") if key not in definition]:
        raise BenchmarkError(f"the key {missing[0]!r} is missing")
    for key, value in definition.items():
        texts = value if isinstance(value, list) else [value] if isinstance(value, str) else []
        if type(value) not in kinds[key] or not all(isinstance(text, str) and text for text in texts):
            raise BenchmarkError(f"{key!r} cannot be {value!r}")
    answer_is, rule = definition.get("answer_is", "text"), definition.get("rule", "string_match")
    for key, value, allowed in (
        ("answer_is", answer_is, get_args(AnswerIs)),
        ("rule", rule, ("string_match", "letter", "first_letter")),
    ):
        if value not in allowed:
            raise BenchmarkError(f"{key!r} is one of {', '.join(allowed)}, not {value!r}")
    digest = hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{definition.get('name', 'own')}@{digest}"
    files = definition["rows"] if isinstance(definition["rows"], list) else [definition["rows"]]
    BENCHMARKS[name] = Benchmark(
        name,
        definition.get("title", definition.get("name", "own")),
        tuple(files),
        lambda row: _own_fields(row, definition, answer_is),
        rule,
        tuple(definition.get("breakdowns", ())),
        definition.get("num_rows"),
        definition.get("get_it", "described by your own YAML file"),
        definition.get("sha256", {}),
        may_be_open=True,
        definition=dict(definition),
    )
    return name


def definition_of(name: str) -> dict[str, Any]:
    """What a sidecar has to keep of a benchmark, so that its rows can be scored without the YAML file."""
    definition = BENCHMARKS[name].definition if name in BENCHMARKS else None
    return {} if definition is None else {"definition": dict(definition)}


def _own_fields(row: Mapping[str, Any], definition: Mapping[str, Any], answer_is: AnswerIs) -> Fields:
    audio, keys = definition["audio"], definition["choices"]
    audio = _BRACED.sub(lambda match: str(_at(row, match[1])), audio) if "{" in audio else _at(row, audio)
    choices = [_at(row, key) for key in keys] if isinstance(keys, list) else _at(row, keys)
    if isinstance(choices, dict) and all(_LETTER.fullmatch(str(key)) for key in choices):
        by_letter = {str(key).strip("().: ").upper(): choice for key, choice in choices.items()}
        choices = [by_letter.get(chr(place)) for place in range(ord("A"), ord(max(by_letter, default="@")) + 1)]
    if isinstance(choices, list):
        while choices and choices[-1] is None:
            choices.pop()
        choices = [_text(choice) for choice in choices]
    answer = _at(row, definition["answer"])
    if answer_is in ("index0", "index1") and isinstance(choices, list) and answer is not None:
        place = int(answer) - (answer_is == "index1") if str(answer).strip().isdecimal() else -1
        answer = choices[place] if 0 <= place < len(choices) else f"no choice {answer}"
    elif answer_is == "letter" and isinstance(choices, list):
        named = _LETTER.fullmatch(str(answer).strip())
        place = ord(named[1].upper()) - ord("A") if named else len(choices)
        answer = answer if answer is None else choices[place] if place < len(choices) else f"no choice {answer}"
    elif answer is not None:
        answer = _text(answer)
    return Fields(_at(row, definition.get("id", "id")), audio, _at(row, definition["question"]), choices or [], answer)


def _at(row: Mapping[str, Any], key: str) -> Any:
    """The value of a key; of `a.b` where there is no such key, b within a."""
    if key in row or "." not in key:
        return row.get(key)
    first, _, rest = key.partition(".")
    inner = row.get(first)
    return _at(inner, rest) if isinstance(inner, Mapping) else None


@dataclass(frozen=True)
class Item:
    """One question. `audios` are relative to the audio root, `answer` is None where withheld. `row` is as published,
    with `id`, `choices` and `answer` added where it has other names for them."""

    id: str
    audios: tuple[str, ...]
    question: str
    choices: tuple[str, ...]
    answer: str | None
    row: dict[str, Any]


@dataclass(frozen=True)
class Questions:
    """The rows of a benchmark, read from their file each time they are asked for, and what identifies them: its name
    and the sha256 of that file."""

    name: str
    file: Path
    sha256: str
    num_rows: int

    def __iter__(self) -> Iterator[Item]:
        return _items(self.name, self.file)

    @property
    def revision(self) -> str | None:
        """The published revision that this file is, None when it is no known one."""
        benchmark = BENCHMARKS.get(self.name)
        return benchmark.revisions.get(self.sha256) if benchmark else None


def load_benchmark(name: str, root: str | Path) -> Questions:
    """The rows of a published benchmark under its root folder. Raises BenchmarkError."""
    name = benchmark_name(name)
    benchmark = BENCHMARKS[name]
    files = [Path(root) / file for file in benchmark.files]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise BenchmarkError(f"{files[0]}: no such file. {benchmark.title} is {benchmark.get_it}")
    return load_questions(name, file)


def load_questions(name: str, file: str | Path) -> Questions:
    """The rows of one metadata file or manifest, by the layout of the benchmark `name` (AUDIO_QA for a manifest).

    Reads them all once, so that a row that cannot be used is an error now and not after an hour. Raises BenchmarkError.
    """
    file = Path(file)
    try:
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise BenchmarkError(f"{file}: {error.strerror}") from error
    num_rows = sum(1 for _ in _items(name, file))
    if not num_rows:
        raise BenchmarkError(f"{file}: no rows in it")
    return Questions(name, file, sha256, num_rows)


def _items(name: str, file: Path) -> Iterator[Item]:
    benchmark = BENCHMARKS.get(name)
    read = benchmark.read if benchmark else _keyed("audio")
    seen: set[str] = set()
    for where, row in _rows(file):
        item = _item(row, read(row), where, may_be_open=benchmark is not None and benchmark.may_be_open)
        if benchmark is not None and benchmark.definition is not None:
            item = replace(item, row=_overridden(item.row, {"question": item.question, "answer": item.answer}))
        if item.id in seen:
            raise BenchmarkError(f"{where}: the id {item.id!r} was there before; ids must be unique to resume by them")
        seen.add(item.id)
        yield item


def breakdowns_of(name: str | None, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The fields to break scores down by: the benchmark's own, guessed where it is none of ours."""
    known = BENCHMARKS[name].breakdowns if name in BENCHMARKS else ()
    is_published = name in BENCHMARKS and BENCHMARKS[name].definition is None
    return known if known or is_published else guess_breakdowns(rows)


def labels(row: Mapping[str, Any], field: str) -> list[str]:
    """The labels of a row under `field`, of the row itself or of its `meta`. A list counts under each of its labels."""
    meta = row.get("meta")
    value = _at(row, field)
    if value is None and field not in row and isinstance(meta, Mapping):
        value = _at(meta, field)
    values = value if isinstance(value, list) else [value]
    return list(dict.fromkeys(str(value) for value in values if value not in (None, ""))) or [NO_LABEL]


def guess_breakdowns(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Fields to break down by where no benchmark says: the official ones that rows have, then every field of `meta`
    that holds between 2 and MAX_LABELS labels."""
    known = dict.fromkeys(field for benchmark in BENCHMARKS.values() for field in benchmark.breakdowns)
    found = [field for field in known if any(field in row for row in rows)]
    metas = [meta for row in rows if isinstance(meta := row.get("meta"), Mapping)]
    for field in dict.fromkeys(field for meta in metas for field in meta):
        if field in found or not all(_is_label(meta.get(field)) for meta in metas):
            continue
        if 2 <= len({label for row in rows for label in labels(row, field)} - {NO_LABEL}) <= MAX_LABELS:
            found.append(field)
    return tuple(found)


def _is_label(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(value is None or isinstance(value, (str, bool, int)) for value in values)


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of Parquet, of a JSON list or of JSONL."""
    unit = "line" if file.suffix == ".jsonl" else "row"
    for number, row in _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file):
        if not isinstance(row, dict):
            raise BenchmarkError(f"{file}, {unit} {number}: not a JSON object but {type(row).__name__}")
        yield f"{file}, {unit} {number}", row


def _parquet_rows(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        batches = parquet.ParquetFile(file).iter_batches(batch_size=256)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except pyarrow.ArrowInvalid as error:
        raise BenchmarkError(f"{file}: not Parquet ({error})") from error


def _json_rows(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        with file.open(encoding="utf-8-sig") as stream:
            is_list = stream.read(1024).lstrip().startswith("[")
            stream.seek(0)
            yield from _list_rows(stream.read(), file) if is_list else _line_rows(stream, file)
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{file}: not UTF-8 ({error})") from error


def _list_rows(text: str, file: Path) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON list, decoded one at a time."""
    decoder, number = json.JSONDecoder(), 0
    place = _skip_blanks(text, text.index("[") + 1)
    while place < len(text) and text[place] != "]":
        number += 1
        try:
            row, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise BenchmarkError(f"{file}, row {number}: not JSON ({error})") from error
        yield number, row
        place = _skip_blanks(text, place)
        if text[place : place + 1] == ",":
            place = _skip_blanks(text, place + 1)
        elif text[place : place + 1] != "]":
            break
    if text[place:].strip() != "]":
        raise BenchmarkError(f"{file}, after row {number}: neither ',' nor the end of the list")


def _skip_blanks(text: str, place: int) -> int:
    while text[place : place + 1].isspace():
        place += 1
    return place


def _line_rows(lines: Iterable[str], file: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BenchmarkError(f"{file}, line {number}: not JSON ({error})") from error


def _item(row: dict[str, Any], fields: Fields, where: str, *, may_be_open: bool) -> Item:
    audios = [fields.audio] if isinstance(fields.audio, str) else fields.audio
    if not isinstance(fields.id, (str, int)):
        raise BenchmarkError(f"{where}: 'id' is {fields.id!r}, which is no text or number")
    if not isinstance(audios, list) or not audios or not all(isinstance(audio, str) for audio in audios):
        raise BenchmarkError(f"{where}: the audio is {fields.audio!r}, which is no path nor list of paths")
    if not isinstance(fields.question, str):
        raise BenchmarkError(f"{where}: 'question' is {fields.question!r}, which is no text")
    choices, answer = fields.choices, fields.answer
    if not isinstance(choices, list):
        raise BenchmarkError(f"{where}: 'choices' is {choices!r}, which is no list")
    if not all(isinstance(choice, str) for choice in choices):
        raise BenchmarkError(f"{where}: every choice must be text: {choices!r}")
    if not 1 <= len(choices) <= MAX_CHOICES and not (may_be_open and not choices):
        raise BenchmarkError(f"{where}: {len(choices)} choices; there may be 1 to {MAX_CHOICES}")
    if not isinstance(answer, (str, type(None))):
        raise BenchmarkError(f"{where}: 'answer' must be the text of a choice, not {answer!r}")
    ours = {"id": fields.id, "choices": choices, "answer": answer}
    row = _overridden(row, {key: value for key, value in ours.items() if value is not None})
    return Item(str(fields.id), tuple(audios), fields.question, tuple(choices), answer or None, row)


def _overridden(row: dict[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """`row` with the values that are asked and scored; what it calls by their names is kept under `as_published`."""
    changed = {key: row[key] for key, value in ours.items() if row.get(key) is not None and row[key] != value}
    before = row.get("as_published")
    published = {**(before if isinstance(before, dict) else {}), **changed}
    return {**row, **ours, **({"as_published": published} if changed else {})}


def audio_problem(item: Item, root: Path, follow_links: bool = False) -> str | None:
    """Why the audio of a question cannot be found, None when all of it is there."""
    try:
        for audio in item.audios:
            resolve_path(root, audio, follow_links)
    except AudioError as error:
        return f"{item.id}: {error}"
    return None


def odd_rows(items: Iterable[Item]) -> Counter[str]:
    """How many rows are out of the ordinary in which way. All of them are asked, and scored."""
    found: Counter[str] = Counter()
    for item in items:
        found["without choices"] += not item.choices
        found["with 2, 3 or more than 4 choices"] += len(item.choices) > 0 and len(item.choices) != 4
        found["with an empty choice"] += any(not choice.strip() for choice in item.choices)
        found["that list a choice twice"] += len(set(item.choices)) < len(item.choices)
        found["of several audio files, heard one after another"] += len(item.audios) > 1
        found["without an answer: withheld, not scored here"] += item.answer is None
        found["whose answer is none of the choices: always wrong by the strict rule"] += bool(
            item.answer and item.choices and item.answer not in item.choices
        )
    return +found


@app.command("list")
def list_benchmarks() -> None:
    """The benchmarks, and where each is got from."""
    console = Console(highlight=False, soft_wrap=True)
    for benchmark in BENCHMARKS.values():
        pinned = ", ".join(benchmark.revisions.values()) or "none known"
        console.print(f"[bold]{benchmark.name}[/bold]  {benchmark.num_rows or 'about 19,000'} rows, {benchmark.rule}")
        console.print(f"  pinned  {pinned}\n  get it  {benchmark.get_it}", markup=False)


@app.command()
def check(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(BENCHMARKS)}; or a YAML file of your own.")],
    benchmark_root: Annotated[Path, typer.Option(help="Its folder, in the official layout.")],
    follow_links: LinksOption = False,
) -> None:
    """What of a benchmark is there, what is missing, and where it is got from.

    Exit status: 0 all is there, 1 something is missing or cannot be used, 2 wrong usage.
    """
    try:
        name = benchmark_name(name)
    except BenchmarkError as error:
        raise typer.BadParameter(str(error)) from None
    benchmark, console = BENCHMARKS[name], Console(highlight=False, soft_wrap=True)
    try:
        questions = load_benchmark(name, benchmark_root)
    except BenchmarkError as error:
        console.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from None
    problems = [problem for item in questions if (problem := audio_problem(item, benchmark_root, follow_links))]
    known = ", ".join(f"{revision} ({sha256[:12]})" for sha256, revision in benchmark.revisions.items()) or "none"
    rows_differ = benchmark.num_rows not in (None, questions.num_rows)
    lines = [
        f"{benchmark.title}: {questions.file}",
        f"rows      {questions.num_rows}" + (f", where {benchmark.num_rows} are published" if rows_differ else ""),
        f"sha256    {questions.sha256}",
        f"revision  {questions.revision or f'unpinned; known here: {known}'}",
        f"audio     {questions.num_rows - len(problems)} rows have theirs, {len(problems)} lack it",
        *(f"          {problem}" for problem in problems[:SHOWN]),
        *(f"odd       {count} rows {what}" for what, count in odd_rows(questions).items()),
    ]
    if problems or rows_differ:
        lines.append(f"get it    {benchmark.get_it}")
    console.print("\n".join(lines), markup=False)
    raise typer.Exit(1 if problems or rows_differ else 0)


if __name__ == "__main__":
    app(prog_name="python -m eval.benchmarks")
