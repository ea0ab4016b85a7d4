"""The `<seg>` grammar and resolving: what the policy writes is data, whatever it is."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_plugins.relisten.segment import (
    CLOSE_TAG,
    MIN_SEGMENT_SECONDS,
    OPEN_TAG,
    Refusal,
    Segment,
    find_tags,
    format_tag,
    overlap_ratio,
    parse_body,
    resolve,
    union_seconds,
)

SECONDS = st.floats(0, 1_000, allow_nan=False)
SEGMENTS = st.lists(
    st.tuples(SECONDS, st.floats(0.001, 100)).map(lambda pair: Segment(pair[0], pair[0] + pair[1])), max_size=12
)


@pytest.mark.parametrize(
    ("body", "segment"),
    [
        ("1.0, 2.5", Segment(1.0, 2.5)),
        ("0,1", Segment(0.0, 1.0)),
        ("  0.00 ,\n 12.345\t", Segment(0.0, 12.345)),
        ("007, 8.", Segment(7.0, 8.0)),
        ("0, 999999999", Segment(0.0, 999_999_999.0)),
    ],
)
def test_two_decimals_in_order_are_a_segment(body: str, segment: Segment) -> None:
    assert parse_body(body) == segment


@pytest.mark.parametrize(
    "body",
    [
        "",
        ",",
        "1",
        "1,",
        ",1",
        "1.2.3, 4",
        "1, 2, 3",
        "1 2",
        "1;2",
        "-1, 2",
        "+1, 2",
        ".5, 2",
        "1e0, 2",
        "1_0, 20",
        "0x1, 2",
        "nan, 2",
        "0, inf",
        "1s, 2s",
        "one, two",
        "\u0661, \u0662",  # Arabic-Indic digits, which float() takes
        "\uff11, \uff12",  # full-width digits
        "1\u00a0, 2",  # a no-break space
        "1.0, 2.0\x00",
        "1, " + "9" * 400,  # overflows to infinity in float()
        "0, 1" + " " * 10_000_000,
        "0" * 10_000_000 + ", 1",
    ],
)
def test_any_other_body_is_malformed(body: str) -> None:
    assert parse_body(body) is Refusal.MALFORMED


@pytest.mark.parametrize("body", ["2, 1", "1, 1", "0, 0", "0.0, 0"])
def test_reversed_and_empty_are_told_from_malformed(body: str) -> None:
    assert parse_body(body) is Refusal.REVERSED


@given(st.text(alphabet="0123456789., \n<seg>/naif+-e\u0661", max_size=30))
def test_whatever_parses_is_two_finite_ordered_times(body: str) -> None:
    meaning = parse_body(body)
    if isinstance(meaning, Segment):
        assert 0 <= meaning.start_seconds < meaning.end_seconds < math.inf
        assert [float(part) for part in body.split(",")] == [meaning.start_seconds, meaning.end_seconds]


@given(st.integers(0, 100_000), st.integers(1, 100_000))
def test_a_formatted_tag_reads_back(start: int, length: int) -> None:
    segment = Segment(start / 100, (start + length) / 100)
    text = f"in {format_tag(segment)}, a dog"
    (tag,) = find_tags(text)
    assert tag.meaning == segment
    assert text[tag.start : tag.end] == format_tag(segment)


def test_the_tag_is_written_with_two_decimals_and_a_blank() -> None:
    assert format_tag(Segment(2, 4.5)) == "<seg>2.00, 4.50</seg>"


@pytest.mark.parametrize(
    ("text", "meanings"),
    [
        ("no tag", []),
        ("<seg>1, 2", []),
        ("<seg>1, 2</seg><seg>3, 4</seg>", [Segment(1, 2), Segment(3, 4)]),
        ("1, 2</seg>", [Refusal.MALFORMED]),
        ("<seg>1, 2</seg> 3</seg>", [Segment(1, 2), Refusal.MALFORMED]),
        ("<seg>0, 9 <seg>1, 2</seg>", [Segment(1, 2)]),
        ("<seg>1, 2</ seg> <seg>3, 4</seg>", [Segment(3, 4)]),
        ("<SEG>1, 2</SEG>", []),
    ],
)
def test_every_closing_tag_is_read_with_the_nearest_opening_one(text: str, meanings: list[Segment | Refusal]) -> None:
    assert [tag.meaning for tag in find_tags(text)] == meanings


@given(st.lists(st.sampled_from(["<seg>", "</seg>", "1, 2", "<", "seg>", "</", "x", "2,1"]), max_size=30).map("".join))
def test_tags_are_disjoint_in_order_and_one_for_each_close(text: str) -> None:
    tags = find_tags(text)
    assert len(tags) == text.count(CLOSE_TAG)
    assert all(first.end <= second.start for first, second in pairwise(tags))
    for tag in tags:
        written = text[tag.start : tag.end]
        assert written.endswith(CLOSE_TAG)
        assert written == CLOSE_TAG or parse_body(written[len(OPEN_TAG) : -len(CLOSE_TAG)]) == tag.meaning


@pytest.mark.parametrize(
    "text",
    [
        "<seg>" * 2_000_000,
        "</seg>" * 300_000,  # each is a tag of its own
        "<seg>" + "1" * 10_000_000 + "</seg>",
        "<seg>" + " " * 10_000_000 + "</seg>",
        "<seg>1," + "\n" * 10_000_000 + "</seg>",
        "<seg" * 2_500_000 + "</seg>",
        "</seg" * 2_000_000,
    ],
    ids=["opens", "closes", "digits", "blanks", "newlines", "halves", "unfinished"],
)
def test_megabytes_of_anything_do_not_stall(text: str) -> None:
    started = time.perf_counter()
    find_tags(text)
    assert time.perf_counter() - started < 10  # a quadratic search takes days


def test_end_is_cut_to_the_duration() -> None:
    assert resolve(Segment(1, 99), 10.0) == Segment(1, 10.0)
    assert resolve(Segment(1, 2), 10.0) == Segment(1, 2)


@pytest.mark.parametrize(
    ("segment", "refusal"),
    [
        (Segment(10, 11), Refusal.PAST_END),
        (Segment(10.5, 11), Refusal.PAST_END),
        (Segment(3, 3), Refusal.REVERSED),
        (Segment(3, 2), Refusal.REVERSED),
        (Segment(20, 12), Refusal.REVERSED),
        (Segment(1, 1.19), Refusal.TOO_SHORT),
        (Segment(9.9, 12), Refusal.TOO_SHORT),
    ],
)
def test_what_cannot_be_heard_is_refused_with_its_reason(segment: Segment, refusal: Refusal) -> None:
    assert resolve(segment, 10.0) is refusal


@given(st.integers(0, 3_000))
def test_exactly_the_minimum_passes_whatever_its_decimals(hundredths: int) -> None:
    start = hundredths / 100
    assert isinstance(resolve(Segment(start, (hundredths + 20) / 100), 40.0), Segment)


@given(SECONDS, SECONDS, st.floats(0.001, 600), st.floats(0.01, 5))
def test_what_resolves_lies_inside_the_clip_and_is_long_enough(
    start: float, end: float, duration: float, minimum: float
) -> None:
    resolved = resolve(Segment(start, end), duration, minimum)
    if isinstance(resolved, Segment):
        assert 0 <= resolved.start_seconds < resolved.end_seconds <= duration
        assert resolved.duration_seconds >= minimum - 1e-6
        assert resolve(resolved, duration, minimum) == resolved


def test_the_minimum_is_3200_samples() -> None:
    first, last = Segment(1.0, 1.0 + MIN_SEGMENT_SECONDS).sample_bounds(16_000)
    assert (first, last) == (16_000, 19_200)


@given(SEGMENTS)
def test_union_is_what_a_fine_grid_counts(segments: list[Segment]) -> None:
    whole = union_seconds(segments)
    assert whole <= sum(segment.duration_seconds for segment in segments) + 1e-6
    assert whole >= max((segment.duration_seconds for segment in segments), default=0.0) - 1e-6
    edges = sorted({time for segment in segments for time in (segment.start_seconds, segment.end_seconds)})
    counted = sum(
        right - left
        for left, right in pairwise(edges)
        if any(s.start_seconds <= left and right <= s.end_seconds for s in segments)
    )
    assert whole == pytest.approx(counted, abs=1e-6)


@given(SEGMENTS)
def test_overlap_is_a_share(segments: list[Segment]) -> None:
    assert 0.0 <= overlap_ratio(segments) < 1.0


def test_overlap_counts_what_is_heard_again() -> None:
    assert overlap_ratio([]) == 0.0
    assert overlap_ratio([Segment(0, 2), Segment(2, 4)]) == 0.0
    assert overlap_ratio([Segment(0, 2), Segment(0, 2)]) == 0.5
    assert overlap_ratio([Segment(0, 4), Segment(1, 2)]) == pytest.approx(0.2)
