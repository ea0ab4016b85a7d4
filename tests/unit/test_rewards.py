"""Reward terms against values worked out by hand, the presets, and what happens when a term or a preset is wrong."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_plugins.relisten.segment import Refusal, Segment, format_tag
from echo_plugins.relisten.trajectory import Attempt, StopReason
from echo_plugins.rewards import Event, Preset, PresetError, Record, load_preset
from echo_plugins.rewards.compose import preset_names
from echo_plugins.rewards.terms import TERMS, term

CHOICES = ("a dog barks", "a bell rings", "rain falls", "silence")
HEARD = Attempt("<seg>1.00, 2.00</seg>", Segment(1.0, 2.0), None, straddled=False, inserted=True)
ONLY_READ = Attempt("<seg>1.00, 2.00</seg>", Segment(1.0, 2.0), None, straddled=False, inserted=False)
REFUSED = Attempt("<seg>9.00, 9.50</seg>", None, Refusal.PAST_END, straddled=False, inserted=False)
RIGHT = "<think>At <seg>1.00, 2.00</seg> there is a bell.</think><answer>a bell rings</answer>"


def record(text: str = RIGHT, attempts: tuple[Attempt, ...] = (HEARD,), **other: object) -> Record:
    return Record(text=text, ground_truth=CHOICES[1], choices=CHOICES, attempts=attempts, **other)  # type: ignore[arg-type]


def components(rec: Record, preset: str = "paper") -> dict[str, float]:
    scored = load_preset(preset).score(rec)
    assert scored.errors == {}
    assert scored.score == pytest.approx(sum(scored.components.values()))
    return scored.components


@pytest.mark.parametrize(
    ("text", "attempts", "expected"),
    [
        (RIGHT, (HEARD,), (0.5, 0.5, 0.5, 0.0)),
        (RIGHT, (), (0.5, 0.5, 0.0, 0.0)),
        (RIGHT, (REFUSED,), (0.5, 0.5, 0.0, 0.0)),
        (RIGHT, (ONLY_READ,), (0.5, 0.5, 0.0, 0.0)),
        (RIGHT, (REFUSED, HEARD), (0.5, 0.5, 0.5, 0.0)),
        (RIGHT.replace("a bell rings", "B"), (HEARD,), (0.5, 0.5, 0.5, 0.0)),
        (RIGHT.replace("a bell rings", "\uff22\u3002"), (HEARD,), (0.5, 0.5, 0.5, 0.0)),  # full-width, Chinese stop
        (RIGHT.replace("a bell rings", "\uff08B\uff09"), (HEARD,), (0.5, 0.5, 0.5, 0.0)),
        (RIGHT.replace("a bell rings", "rain falls"), (HEARD,), (0.5, 0.0, 0.0, 0.0)),
        (RIGHT.replace("a bell rings", ", ".join(CHOICES)), (HEARD,), (0.5, 0.0, 0.0, 0.0)),
        ("<answer>a bell rings</answer>", (HEARD,), (0.0, 0.5, 0.5, 0.0)),
        (RIGHT + "<answer>rain falls</answer>", (HEARD,), (0.0, 0.0, 0.0, 0.0)),
        ("<answer>a bell rings</answer><think>so</think>", (), (0.0, 0.5, 0.0, 0.0)),
        (RIGHT.replace("</seg> there", "</seg>There"), (HEARD,), (0.5, 0.5, 0.5, -0.1)),
        (RIGHT.replace("</seg> there", "</seg>\n There"), (HEARD,), (0.5, 0.5, 0.5, -0.1)),
        (RIGHT.replace("</seg> there", "</seg>. There"), (HEARD,), (0.5, 0.5, 0.5, 0.0)),
        ("<think><seg>1, 2</seg></think><answer>silence</answer>", (HEARD,), (0.5, 0.0, 0.0, -0.1)),
        ("<seg>1, 2</seg>" * 4 + " and", (HEARD,) * 4, (0.0, 0.0, 0.0, -0.3)),
        ("<seg>1, 2</seg>" * 40, (HEARD,) * 8, (0.0, 0.0, 0.0, -0.5)),
        ("", (), (0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_paper_preset_gives_the_values_worked_out_by_hand(
    text: str, attempts: tuple[Attempt, ...], expected: tuple[float, ...]
) -> None:
    got = components(record(text, attempts))
    assert list(got) == ["format", "accuracy", "segment", "consistency"]
    assert list(got.values()) == pytest.approx(expected)


def test_outcome_preset_pays_for_the_answer_alone() -> None:
    assert components(record(attempts=()), "outcome") == {"accuracy": 1.0}
    assert components(record("<answer>silence</answer>"), "outcome") == {"accuracy": 0.0}


def test_a_failed_rollout_scores_zero_whatever_it_wrote() -> None:
    scored = load_preset("paper").score(record(stop_reason=StopReason.ERROR))
    assert scored.score == 0.0
    assert set(scored.components.values()) == {0.0}


def logprobs(*probabilities: float) -> tuple[float, ...]:
    return tuple(math.log(probability) for probability in probabilities)


WRONG = RIGHT.replace("a bell rings", "rain falls")
AGAIN = Attempt("<seg>1.00, 2.00</seg>", Segment(1.0, 2.0), None, straddled=False, inserted=True)
ELSEWHERE = Attempt("<seg>4.00, 5.00</seg>", Segment(4.0, 5.0), None, straddled=False, inserted=True)


@pytest.mark.parametrize(
    ("preset_name", "text", "attempts", "probabilities", "expected"),
    [
        # p = 0.5 x 0.8 = 0.4: 1 - 0.6^2 = 0.64 when right, -0.16 when wrong
        ("confidence-quadratic", RIGHT, (HEARD,), (0.5, 0.8), {"accuracy": 0.32, "segment": 0.32}),
        ("confidence-quadratic", RIGHT, (), (0.5, 0.8), {"accuracy": 0.32, "segment": 0.0}),
        ("confidence-quadratic", WRONG, (HEARD,), (0.5, 0.8), {"accuracy": -0.08, "segment": 0.0}),
        ("confidence-quadratic", WRONG, (HEARD,), (1.0, 1.0), {"accuracy": -0.5, "segment": 0.0}),
        ("confidence-quadratic", "<think>a</think>", (HEARD,), None, {"accuracy": 0.0, "segment": 0.0, "format": 0.0}),
        ("confidence-linear", RIGHT, (), (0.5, 0.8), {"format": 0.5, "accuracy": 0.2}),
        ("confidence-linear", WRONG, (HEARD,), (0.5, 0.8), {"format": 0.5, "accuracy": -0.2}),
        ("quota-2", RIGHT, (HEARD,), (1.0,), {"segment": 0.25, "non_overlap": 0.5}),
        ("quota-2", RIGHT, (HEARD, ELSEWHERE), (1.0,), {"segment": 0.5, "non_overlap": 0.5}),
        ("quota-2", RIGHT, (HEARD, AGAIN), (1.0,), {"segment": 0.5, "non_overlap": 0.25}),
        ("quota-2", RIGHT, (HEARD, REFUSED), (1.0,), {"segment": 0.25, "non_overlap": 0.5}),
        ("quota-2", RIGHT, (), (1.0,), {"segment": 0.0, "non_overlap": 0.0}),
        ("quota-3", RIGHT, (HEARD, ELSEWHERE), (0.4,), {"segment": 0.32 * 2 / 3, "non_overlap": 0.5}),
        ("quota-3", RIGHT, (HEARD, ELSEWHERE, AGAIN), (1.0,), {"segment": 0.5, "non_overlap": 0.5 * 2 / 3}),
        ("quota-3", WRONG, (HEARD,), (0.4,), {"accuracy": -0.08, "segment": 0.0, "non_overlap": 0.5}),
    ],
)
def test_confidence_and_quotas_give_the_values_worked_out_by_hand(
    preset_name: str,
    text: str,
    attempts: tuple[Attempt, ...],
    probabilities: tuple[float, ...] | None,
    expected: dict[str, float],
) -> None:
    sampled = None if probabilities is None else logprobs(*probabilities)
    got = components(record(text, attempts, answer_logprobs=sampled), preset_name)
    assert {name: got[name] for name in expected} == pytest.approx(expected)


def test_to_pad_an_answer_with_sure_tokens_does_not_make_it_surer() -> None:
    def accuracy(*probabilities: float) -> float:
        return components(record(answer_logprobs=logprobs(*probabilities)), "confidence-linear")["accuracy"]

    assert accuracy(0.5, 1.0, 1.0, 1.0) == pytest.approx(accuracy(0.5))
    assert accuracy(0.5, 0.9) < accuracy(0.5)


def test_without_log_probs_confidence_is_missing_and_counted_and_the_rest_still_pays() -> None:
    scored = load_preset("confidence-quadratic").score(record())
    assert set(scored.missing) == {"accuracy", "segment"} and not scored.errors
    assert scored.score == scored.components["format"] == 0.5


def test_a_preset_says_whether_it_needs_log_probs() -> None:
    needs = {name for name in preset_names() if load_preset(name).needs_logprobs()}
    assert needs == {"confidence-linear", "confidence-quadratic", "quota-2", "quota-3"}


BELLS = (Event(1.0, 2.0, "bell"), Event(6.0, 7.0, "Bell"))
SCENE = (Event(0.0, 0.5, "dog"), *BELLS, Event(4.0, 5.0, "doorbell"))


@pytest.mark.parametrize(
    ("question", "attempts", "expected"),
    [
        ("How often is the bell heard?", (HEARD,), 1 / 2),  # of two bells one
        ("How often is the BELL heard?", (HEARD, AGAIN, AGAIN), 1 / 2),
        ("How often is the bell heard?", (HEARD, ELSEWHERE), 1 / 3),
        ("How often is the bell heard?", (REFUSED,), 0.0),
        ("How often is the bell heard?", (ONLY_READ,), 1 / 2),  # grounded mode names segments without hearing them
        ("How often is the bell heard?", (), 0.0),
        ("Does the bell ring before the dog barks?", (HEARD,), 1 / 2.5),
        ("What is heard?", (HEARD,), 1 / 2),  # the right answer mentions the bell
    ],
)
def test_grounding_is_the_overlap_with_the_events_that_the_question_is_about(
    question: str, attempts: tuple[Attempt, ...], expected: float
) -> None:
    got = components(record(attempts=attempts, question=question, events=SCENE), "grounding")
    assert got["grounding"] == pytest.approx(0.5 * expected)


def test_a_label_is_mentioned_as_whole_words_and_about_all_means_all() -> None:
    def grounding(question: str, **parameters: str) -> float:
        named = tags((4.0, 5.0))
        rec = Record(RIGHT, "two", ("one", "two"), 8.0, named, question=question, events=(*SCENE, Event(7, 8, "door")))
        return TERMS["grounding"](rec, **parameters)

    assert grounding("How long is the doorbell?") == 1  # neither the bell nor the door
    assert grounding("How long is the doorbell?", about="all") == pytest.approx(1 / 4.5)


def test_a_question_that_mentions_no_event_is_about_all_of_them() -> None:
    rec = Record(RIGHT, "two", ("one", "two"), 8.0, (HEARD,), question="How many sounds?", events=SCENE)
    assert TERMS["grounding"](rec) == pytest.approx(1 / 3.5) == TERMS["grounding"](rec, about="all")


@pytest.mark.parametrize("events", [None, ()])
def test_without_events_grounding_is_missing_and_counted(events: tuple[Event, ...] | None) -> None:
    scored = load_preset("grounding").score(record(events=events))
    assert scored.missing == {"grounding": "the row has no events"} and scored.score == 1.0


TIMES = st.tuples(st.integers(0, 20), st.integers(1, 8)).map(lambda t: (t[0] / 2, (t[0] + t[1]) / 2))


@given(st.lists(TIMES, max_size=5), st.lists(TIMES, min_size=1, max_size=5))
def test_grounding_is_1_for_exactly_the_events_and_never_outside_0_to_1(
    segments: list[tuple[float, float]], events: list[tuple[float, float]]
) -> None:
    def grounding(named: list[tuple[float, float]]) -> float:
        rec = record(attempts=tags(*named), events=tuple(Event(*times, "bell") for times in events))
        return TERMS["grounding"](rec)

    assert 0 <= grounding(segments) <= 1
    assert grounding(events) == pytest.approx(1)
    assert grounding([*events, (15.0, 16.0)]) < 1  # what is named beyond the events costs


def tags(*segments: tuple[float, float], inserted: bool = True) -> tuple[Attempt, ...]:
    return tuple(
        Attempt(format_tag(Segment(*times)), Segment(*times), None, straddled=False, inserted=inserted)
        for times in segments
    )


def written(attempts: tuple[Attempt, ...], between: str = " here, ") -> str:
    return between.join(attempt.text for attempt in attempts)


WHOLE = tags((0.0, 8.0)) * 4
ZERO = (Attempt("<seg>1.00, 1.00</seg>", None, Refusal.REVERSED, straddled=False, inserted=False),) * 4
HACKS = {
    # an honest answer: one clip, the right one
    "honest": (RIGHT, (HEARD,)),
    "zero-length segments": (f"<think>{written(ZERO)} so</think><answer>B</answer>", ZERO),
    "the whole clip again and again": (f"<think>{written(WHOLE)} so</think><answer>B</answer>", WHOLE),
    "tags without thought": (f"<think>{written((HEARD, ELSEWHERE), '')}</think><answer>B</answer>", (HEARD, ELSEWHERE)),
    "the same tag again and again": (f"<think>{written((HEARD,) * 4)} so</think><answer>B</answer>", (HEARD,) * 4),
    "tags after the answer": (f"<think>a guess</think><answer>B</answer>{HEARD.text}", (HEARD,)),
    "tags within the answer": (f"<think>a guess</think><answer>B{HEARD.text}</answer>", (HEARD,)),
    "every choice": (RIGHT.replace("a bell rings", "a dog barks, a bell rings, rain falls, silence"), (HEARD,)),
    "every letter": (RIGHT.replace("a bell rings", "A B C D"), (HEARD,)),
    "an answer for each choice": ("<think>x</think>" + "".join(f"<answer>{c}</answer>" for c in CHOICES), (HEARD,)),
    "no answer": ("<think>I cannot be wrong</think>", (HEARD,)),
}


@pytest.mark.parametrize(
    ("hack", "paper", "quota", "grounded"),
    # An 8 s clip with bells at 1-2 and 6-7 s; the answer is given with probability 1.
    [
        ("honest", 1.5, 1.75, 1.25),
        ("zero-length segments", 1.0, 1.0, 1.0),
        ("the whole clip again and again", 1.5, 2.0 - 0.5 * 3 / 4, 1.0 + 0.5 * 2 / 8),
        ("tags without thought", 1.5 - 0.2, 2.0 - 0.2, 1.0 + 0.5 / 3 - 0.2),
        ("the same tag again and again", 1.5, 2.0 - 0.5 * 3 / 4, 1.25),
        ("tags after the answer", 1.0, 1.0, 1.0),
        ("tags within the answer", 0.4, 0.0 - 0.1, 0.4),
        ("every choice", 0.5, 0.5, 0.75),
        ("every letter", 0.5, 0.5, 0.75),
        ("an answer for each choice", 0.0, 0.5, 0.25),
        ("no answer", 0.0, 0.5, 0.25),
    ],
)
def test_what_a_known_hack_is_paid(hack: str, paper: float, quota: float, grounded: float) -> None:
    text, attempts = HACKS[hack]
    rec = record(
        text, attempts, duration_seconds=8.0, answer_logprobs=(0.0,), question="When is the bell?", events=BELLS
    )
    got = [load_preset(name).score(rec).score for name in ("paper", "quota-2", "grounding")]
    assert got == pytest.approx([paper, quota, grounded])


def test_an_open_question_wants_its_own_words() -> None:
    def correct(answer: str) -> bool:
        return Record(f"<answer>{answer}</answer>", ground_truth="A bell.").correct

    assert correct("a  bell")
    assert not correct("A")
    assert not correct("a bell or a dog")


def test_a_ground_truth_that_is_no_choice_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'thunder'.*a dog barks"):
        Record("", ground_truth="thunder", choices=CHOICES)


PIECES = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "<seg>1, 2</seg>", "</seg>", "The", "a", "B", " ", "<", *CHOICES]
)


@given(
    st.lists(PIECES, max_size=40).map("".join),
    st.lists(st.sampled_from([HEARD, ONLY_READ, REFUSED]), max_size=9).map(tuple),
)
def test_whatever_the_policy_writes_the_terms_keep_their_bounds(text: str, attempts: tuple[Attempt, ...]) -> None:
    rec = record(text, attempts)
    got = components(rec)
    assert got["format"] in (0.0, 0.5)
    assert got["accuracy"] in (0.0, 0.5)
    assert got["segment"] == (got["accuracy"] if HEARD in attempts else 0.0)
    assert -0.5 <= got["consistency"] <= 0.0
    assert -0.5 <= sum(got.values()) <= 1.5


def preset(tmp_path: Path, text: str) -> Preset:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return load_preset(path)


def test_a_term_that_raises_or_gives_no_number_is_zero_and_counted(tmp_path: Path) -> None:
    (tmp_path / "terms.py").write_text(
        "def broken(record): raise KeyError('gone')\n"
        "def nan(record): return float('nan')\n"
        "def none(record): return None\n"
    )
    scored = preset(
        tmp_path, "terms: {accuracy: 0.5, 'terms.py:broken': 1, 'terms.py:nan': 1, 'terms.py:none': 1}"
    ).score(record())
    assert scored.components == {"accuracy": 0.5, "broken": 0.0, "nan": 0.0, "none": 0.0}
    assert scored.score == 0.5
    assert set(scored.errors) == {"broken", "nan", "none"}
    assert "gone" in scored.errors["broken"]


def test_a_term_from_a_file_beside_the_preset_gets_its_parameters(tmp_path: Path) -> None:
    (tmp_path / "my_terms.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from echo_plugins.rewards import Record\n"
        "@dataclass\n"
        "class Limit:\n"
        "    words: int\n"
        "def brevity(record: Record, *, most_words: int = 80) -> float:\n"
        "    return float(len(record.text.split()) <= Limit(most_words).words)\n"
    )
    short = preset(tmp_path, "terms: {'my_terms.py:brevity': {weight: 0.2, most_words: 3}}").score(record("a b c"))
    assert short.components == {"brevity": 0.2}


def test_a_term_may_be_a_dotted_path(tmp_path: Path) -> None:
    mine = preset(tmp_path, "terms: {echo_plugins.rewards.terms.accuracy: 2}")
    assert mine.score(record()).components == {"accuracy": 2.0}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("terms: {acuracy: 0.5}", "acuracy.*accuracy, consistency, format, grounding, non_overlap, segment"),
        ("terms: {accuracy: much}", "weight of accuracy is 'much'"),
        ("terms: {accuracy: .nan}", "weight of accuracy is nan"),
        ("terms: {accuracy: true}", "weight of accuracy is True"),
        ("terms: {accuracy: {}}", "weight of accuracy is None"),
        ("terms: {consistency: {weight: 1, per_tags: 2}}", "per_tags"),
        ("terms: {consistency: {weight: 1, per_tag: lots}}", "per_tag of consistency is 'lots'"),
        ("terms: {accuracy: {weight: 1, confidence: cubic}}", "none, linear or quadratic, not 'cubic'"),
        ("terms: {segment: {weight: 1, quota: 0}}", "quota is 1 or more, not 0"),
        ("terms: {grounding: {weight: 1, about: some}}", "mentioned or all, not 'some'"),
        ("terms: {asyncio.sleep: 1}", "asyncio.sleep is async"),
        ("terms: {'gone.py:f': 1}", r"gone\.py"),
        ("terms: {no_such_package.f: 1}", "no_such_package"),
        ("terms: {math.no_such_function: 1}", "math has no function no_such_function"),
        ("terms: {accuracy: 1, echo_plugins.rewards.terms.accuracy: 1}", "two terms are called accuracy"),
        ("terms: {}", "names no term"),
        ("weights: {accuracy: 1}", "one key `terms`"),
        ("terms: [accuracy", "cannot read"),
    ],
)
def test_a_wrong_preset_is_a_clear_error_when_it_is_loaded(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(PresetError, match=complaint):
        preset(tmp_path, text)


@pytest.mark.parametrize("name", ["papers", "../presets/paper", ""])
def test_an_unknown_preset_names_those_that_there_are(name: str) -> None:
    with pytest.raises(PresetError, match="outcome, paper, quota-2"):
        load_preset(name)


def test_every_shipped_preset_loads_and_scores_within_finite_bounds() -> None:
    for name in preset_names():
        assert math.isfinite(load_preset(name).score(record()).score)


def test_two_terms_cannot_share_a_name() -> None:
    with pytest.raises(ValueError, match="accuracy"):
        term("accuracy")(TERMS["accuracy"])
