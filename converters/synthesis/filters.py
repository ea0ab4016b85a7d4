"""The filters: each a function with its threshold in filters.yaml and its count in the report.

A filter of a row returns what is wrong with it, None where nothing is. Those of THINK_FILTERS judge the chain of
thought: where one objects, the row goes on without it, to RL. Those of QUESTION_FILTERS judge the question: where one
objects, the row is out. What concerns the whole set, duplicates, contamination and bias, stands below them.

Tags are read by `relisten.segment`, responses by `relisten.transcript`, as the reward reads them.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from converters.synthesis.config import Benchmark, ConfigError, Limits, NearDuplicate
from converters.synthesis.sample import Sample, seed_of
from converters.synthesis.soundprint import SoundIndex
from echo_plugins.audio import AudioError, load, resolve_path
from echo_plugins.audio_qa import RowError, read_rows
from echo_plugins.recording import Seconds, overlap, sources_of
from echo_plugins.relisten.segment import CLOSE_TAG, Refusal, Segment, find_tags, overlap_ratio, union_seconds
from echo_plugins.relisten.transcript import parse

RowFilter = Callable[[Sample, Limits], str | None]

_WORD = re.compile(r"[^\W_]+")
_LETTERED = re.compile(r"\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer)s?\s+\(?(?:[A-D]|[1-4])\b|\([A-D]\)")
_ROUNDING = 1e-9  # 1.2 - 1.0 is 0.19999999999999996


def segments_of(think: str) -> list[Segment]:
    """The segments that are well formed, as they were written."""
    return [tag.meaning for tag in find_tags(think) if isinstance(tag.meaning, Segment)]


def words_of(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


# ---- the chain of thought


def segment_validity(sample: Sample, limits: Limits) -> str | None:
    """Every tag is well formed, inside the clip and long enough to be heard again."""
    think = sample.think or ""
    for tag in find_tags(think):
        shown = think[tag.start : tag.end][:80]
        if isinstance(tag.meaning, Refusal):
            return f"{tag.meaning} tag {shown}"
        if tag.meaning.end_seconds > sample.duration + limits.end_tolerance_seconds:
            return f"{shown} in a clip of {sample.duration:g} s"
        heard = min(tag.meaning.end_seconds, sample.duration) - tag.meaning.start_seconds
        if heard < limits.min_segment_seconds - _ROUNDING:
            return f"{shown} is shorter than {limits.min_segment_seconds:g} s"
    return None


def segment_count(sample: Sample, limits: Limits) -> str | None:
    """As many tags as are asked for; none is needed where every label spans the whole clip."""
    count = len(segments_of(sample.think or ""))
    least = limits.min_segments if tags_needed(sample) else 0
    return (
        None if least <= count <= limits.max_segments else f"{count} tags; {least} to {limits.max_segments} are allowed"
    )


def tags_needed(sample: Sample) -> bool:
    """Whether a part of the clip can be told apart at all."""
    return not sample.events or any(e["end"] - e["start"] < sample.duration - 0.1 for e in sample.events)


def segment_overlap(sample: Sample, limits: Limits) -> str | None:
    """The tags do not name the same seconds again and again."""
    ratio = overlap_ratio(segments_of(sample.think or ""))
    return None if ratio <= limits.max_overlap + _ROUNDING else f"{ratio:.2f} of the segments' seconds are repeated"


def clip_share(sample: Sample, limits: Limits) -> str | None:
    """The tags pick parts of the clip; where the whole clip is labelled through, they may name it all."""
    share = union_seconds(segments_of(sample.think or "")) / sample.duration
    allowed = limits.max_clip_share if tags_needed(sample) else 1.0 + limits.end_tolerance_seconds
    return None if share <= allowed + _ROUNDING else f"the segments cover {share:.2f} of the clip"


def event_coverage(sample: Sample, limits: Limits) -> str | None:
    """The tags point at what is labelled; judged only where the clip has labelled times."""
    segments = segments_of(sample.think or "")
    if not segments or not sample.events:
        return None
    labelled = [Segment(e["start"], e["end"]) for e in sample.events]
    named, both = union_seconds(segments), union_seconds([*segments, *labelled])
    inside = (named + union_seconds(labelled) - both) / named
    return None if inside >= limits.min_event_coverage - _ROUNDING else f"{inside:.2f} of the segments lies in events"


def think_format(sample: Sample, limits: Limits) -> str | None:
    """One think and one answer block, and after a tag the sentence goes on (the reward's consistency term)."""
    think = sample.think or ""
    transcript = parse(f"<think>{think}</think><answer>{sample.answer}</answer>")
    if not transcript.well_formed:
        return "it holds a think or answer block of its own"
    for piece in think.split(CLOSE_TAG)[1:]:
        after = piece.lstrip()[:1]
        if after == "<" or (after.isalpha() and after.isupper()):
            return f"a tag is followed by {piece.lstrip()[:12]!r}, not by what is heard in it"
    return None


def think_length(sample: Sample, limits: Limits) -> str | None:
    """Neither a bare answer nor a rumination."""
    count = len((sample.think or "").split())
    if limits.min_think_words <= count <= limits.max_think_words:
        return None
    return f"{count} words; {limits.min_think_words} to {limits.max_think_words} are allowed"


def choice_by_letter(sample: Sample, limits: Limits) -> str | None:
    """It names no choice by its letter. Judged before the choices are shuffled, after which it would name another."""
    found = _LETTERED.search(sample.think or "")
    return None if found is None else f"{found[0]!r} names a choice by its place"


# ---- the question


def row_format(sample: Sample, limits: Limits) -> str | None:
    """What no exporter would take: empty or reserved text, choices that read the same."""
    try:
        sample.model_copy(update={"think": None, "answer": sample.choices[0] if sample.choices else None}).to_record()
    except RowError as error:
        return str(error)
    return None


def number_of_choices(sample: Sample, limits: Limits) -> str | None:
    count = len(sample.choices)
    return None if count == limits.num_choices else f"{count} choices; {limits.num_choices} are asked for"


def answer_among_choices(sample: Sample, limits: Limits) -> str | None:
    return None if sample.answer in sample.choices else f"answer {sample.answer!r} is not among {sample.choices}"[:300]


def answer_length(sample: Sample, limits: Limits) -> str | None:
    """The answer does not stand out by its length."""
    others = [len(choice) for choice in sample.choices if choice != sample.answer]
    if not others or not sample.answer:
        return None
    ratio = len(sample.answer) / (sum(others) / len(others))
    if max(ratio, 1 / ratio) <= limits.max_length_ratio or abs(len(sample.answer) - sum(others) / len(others)) < 8:
        return None
    return f"the answer is {ratio:.1f} times as long as the other choices"


def audio_contribution(sample: Sample, limits: Limits) -> str | None:
    """It cannot be answered from silence. Judged where the `silence` stage asked."""
    if sample.silence_accuracy is None or sample.silence_accuracy < limits.max_silence_accuracy:
        return None
    return f"answered from silence in {sample.silence_accuracy:.0%} of the tries"


def difficulty(sample: Sample, limits: Limits) -> str | None:
    """RL learns from what a policy gets right sometimes. Judged where the `difficulty` stage asked."""
    if sample.pass_rate is None or limits.min_pass_rate <= sample.pass_rate <= limits.max_pass_rate:
        return None
    return f"right in {sample.pass_rate:.0%} of the samples"


THINK_FILTERS: tuple[RowFilter, ...] = (
    think_format,
    think_length,
    segment_validity,
    segment_count,
    segment_overlap,
    clip_share,
    event_coverage,
)
DRAFT_FILTERS: tuple[RowFilter, ...] = (choice_by_letter, *THINK_FILTERS)
QUESTION_FILTERS: tuple[RowFilter, ...] = (row_format, number_of_choices, answer_among_choices, answer_length)
ANSWER_FILTERS: tuple[RowFilter, ...] = (audio_contribution, difficulty)


# ---- the set


def sound_hash(waveform: np.ndarray) -> str:
    """The decoded sound at 16 kHz, so that a copy in another container is the same."""
    return hashlib.sha256((waveform * 32_767).astype(np.int16).tobytes()).hexdigest()


def shuffled(sample: Sample, seed: int) -> Sample:
    """The choices in an order that only the seed and the id decide: models like to put the answer first."""
    order = np.random.default_rng(seed_of(seed, "choices", sample.id)).permutation(len(sample.choices))
    return sample.model_copy(update={"choices": [sample.choices[index] for index in order]})


class Duplicates:
    """`find(sample)` names the earlier row that a row repeats, exactly or nearly. Rows of one sound are compared as one
    recording's, whatever their files are called."""

    def __init__(self, limits: NearDuplicate) -> None:
        config = MinhashConfig(
            n_grams=limits.n_grams,
            num_buckets=limits.num_buckets,
            hashes_per_bucket=limits.hashes_per_bucket,
            hash_config=HashConfig(hash_fc="sha1"),  # its xxhash hands over text, and xxhash 4 takes bytes only
        )
        # The signatures of datatrove's MinHash, looked up in memory: a million rows take 14 million short keys.
        self._signatures = MinhashDedupSignature(".", config, _Words())  # type: ignore[arg-type]
        self._scope = limits.scope
        self._exact: dict[tuple[str, ...], str] = {}
        self._near: dict[tuple[int, bytes], str] = {}

    def find(self, sample: Sample) -> tuple[str, str] | None:
        """(exact_duplicate or near_duplicate, the earlier row's id), None for a new row, which is remembered."""
        words = words_of(f"{sample.question} {' '.join(sorted(sample.choices))}")
        exact = (sample.audio_sha256, *words)
        if exact in self._exact:
            return "exact_duplicate", self._exact[exact]
        keys = list(self._keys(words, "" if self._scope == "all" else sample.recording))
        twin = next((self._near[key] for key in keys if key in self._near), None)
        if twin is not None:
            return "near_duplicate", twin
        self._exact[exact] = sample.id
        for key in keys:
            self._near[key] = sample.id
        return None

    def _keys(self, words: Sequence[str], scope: str) -> Iterator[tuple[int, bytes]]:
        shingles = self._signatures.get_shingles(" ".join(words))
        if not shingles.size:  # shorter than one n-gram: only exact duplicates can be told
            return
        for bucket, hashes in enumerate(self._signatures.get_signature(shingles)):
            yield bucket, hashlib.blake2b(f"{scope}\0{hashes}".encode(), digest_size=8).digest()


class _Words(WordTokenizer):
    """Words between blanks; datatrove's own tokenizers load models."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


# Names of clips; where a clip is from is told by echo_plugins/recording.py.
_ID_KEYS = ("id", "audio_id", "audio_path", "audio", "youtube_id", "ytid", "video_name")


class HeldClips:
    """`find(sample)` says which benchmark holds a clip: by id or file name; by the same seconds of the same video or
    URL, where times that are not known may be the same; by sound, of which a part is enough."""

    def __init__(self, benchmarks: Sequence[Benchmark]) -> None:
        self._any = bool(benchmarks)
        self._ids: dict[str, str] = {}
        self._sources: dict[str, list[tuple[Seconds | None, str]]] = defaultdict(list)
        self._hashes: dict[str, str] = {}
        self._sounds = SoundIndex()
        for benchmark in benchmarks:
            for line, row, where in _benchmark_rows(benchmark):
                self._read(benchmark, line, row, where)

    def compared(self, sample: Sample) -> list[str] | None:
        """By what `sample` can be compared: both it and a benchmark have it. None without a benchmark."""
        if not self._any:
            return None
        row = _source_row(sample)
        found = {
            "name": bool(self._ids) and any(True for _ in _names(row, (*_ID_KEYS, "recording"))),
            "source": bool(self._sources) and bool(sources_of(row)),
            "sound": len(self._sounds) > 0 and bool(sample.sound_print),
        }
        return [key for key in COMPARED if found[key]]

    def find(self, sample: Sample) -> str | None:
        """None where no benchmark holds it."""
        row = _source_row(sample)
        for name in _names(row, (*_ID_KEYS, "recording")):
            if name in self._ids:
                return f"{self._ids[name]} has a clip of the name {name!r}"
        for source, seconds in sources_of(row).items():
            for other, where in self._sources.get(source, ()):
                if overlap(seconds, other):
                    return f"{where} is of {source}, {_shown_seconds(other)}"
        if sample.audio_sha256 in self._hashes:
            return f"{self._hashes[sample.audio_sha256]} has the same sound"
        if (heard := self._sounds.find(sample.sound_print)) is not None:
            return f"{heard} has the same sound, encoded or cut otherwise"
        return None

    def _read(self, benchmark: Benchmark, line: int, row: Mapping[str, Any], where: str) -> None:
        for found in _names(row, _ID_KEYS):
            self._ids.setdefault(found, where)
        for source, seconds in sources_of(row).items():
            self._sources[source].append((seconds, where))
        path = row.get("audio") or row.get("audio_path") or row.get("audio_id")
        if benchmark.audio_root and isinstance(path, str):
            try:
                waveform = load(resolve_path(benchmark.audio_root, path))
            except AudioError as error:
                raise ConfigError(f"benchmarks: {benchmark.file}, line {line}: {error}") from error
            self._hashes.setdefault(sound_hash(waveform), where)
            self._sounds.add(where, waveform)


COMPARED = ("name", "source", "sound")


def _source_row(sample: Sample) -> dict[str, Any]:
    """What a row says of where its clip is from. Its own duration is the clip's, and not the recording's."""
    return {
        **{"audio": sample.audio, "id": sample.clip, "duration": sample.duration},
        **sample.meta,
        "recording": sample.recording,
    }


def _shown_seconds(seconds: Seconds | None) -> str:
    return "at times that are not known" if seconds is None else f"{seconds[0]:g} to {seconds[1]:g} s"


class HeldQuestions:
    """`find(question)` says which benchmark asks nearly the same: by the share of words in common (Jaccard)."""

    def __init__(self, benchmarks: Sequence[Benchmark], jaccard: float) -> None:
        self._jaccard = jaccard
        self._questions: list[tuple[frozenset[str], str]] = []
        self._by_word: dict[str, list[int]] = defaultdict(list)
        for benchmark in benchmarks:
            for _, row, where in _benchmark_rows(benchmark):
                self.add(frozenset(words_of(str(row.get("question") or ""))), where)

    def find(self, question: str) -> str | None:
        """None where no benchmark does."""
        return self.alike(frozenset(words_of(question)))

    def add(self, words: frozenset[str], where: str) -> None:
        for word in words:
            self._by_word[word].append(len(self._questions))
        self._questions.append((words, where))

    def alike(self, words: frozenset[str]) -> str | None:
        """Sets this alike have most words in common, so one of a few of them: the rarest, which few questions have."""
        rarest = sorted(words, key=lambda word: (len(self._by_word.get(word, ())), word))
        prefix = rarest[: len(words) - math.ceil(self._jaccard * len(words)) + 1]
        for row in dict.fromkeys(row for word in prefix for row in self._by_word.get(word, ())):
            other, where = self._questions[row]
            alike = len(words & other) / len(words | other)
            if alike >= self._jaccard:
                return f"{where} asks nearly the same ({alike:.2f} of the words)"
        return None


@lru_cache(1)
def held_questions(benchmarks: tuple[Benchmark, ...], jaccard: float) -> HeldQuestions:
    return HeldQuestions(benchmarks, jaccard)


def _benchmark_rows(benchmark: Benchmark) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Line, row with what stands under its `meta`, and its name in messages. Raises ConfigError."""
    for line, row in read_rows(benchmark.file, lambda _: None):
        if not isinstance(row, dict):
            raise ConfigError(f"benchmarks: {benchmark.file}, line {line}: a row is a JSON object")
        meta = row.get("meta")
        where = f"{benchmark.file.stem} ({row.get('id', line)})"
        yield line, {**(meta if isinstance(meta, dict) else {}), **row}, where


def _names(row: Mapping[str, Any], keys: Iterable[str]) -> Iterator[str]:
    """Ids, and file names without folder and suffix. Plain numbers are nobody's name: every set counts from 1."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, str):
            for name in {value, Path(value).stem}:
                if len(name) >= 6 and not name.isdigit():
                    yield name


def even_choice_p(counts: Mapping[int, int], num_choices: int) -> float:
    """p of a chi-square test that all places (0 to num_choices - 1) are equally likely; 1 without rows."""
    from scipy.special import chdtrc  # here, since the import takes half a second and every task is a process

    total = sum(counts.values())
    if not total or num_choices < 2:
        return 1.0
    expected = total / num_choices
    statistic = sum((counts.get(place, 0) - expected) ** 2 / expected for place in range(num_choices))
    return float(chdtrc(num_choices - 1, statistic))
