"""Reward terms against values worked out by hand, the presets, and what happens when a term or a preset is wrong."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_plugins.relisten.segment import Refusal, Segment
from echo_plugins.relisten.trajectory import Attempt, StopReason
from echo_plugins.rewards import Preset, PresetError, Record, load_preset
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
        ("terms: {acuracy: 0.5}", "acuracy.*accuracy, consistency, format, segment"),
        ("terms: {accuracy: much}", "weight of accuracy is 'much'"),
        ("terms: {accuracy: .nan}", "weight of accuracy is nan"),
        ("terms: {accuracy: true}", "weight of accuracy is True"),
        ("terms: {accuracy: {}}", "weight of accuracy is None"),
        ("terms: {consistency: {weight: 1, per_tags: 2}}", "per_tags"),
        ("terms: {consistency: {weight: 1, per_tag: lots}}", "per_tag of consistency is 'lots'"),
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
    with pytest.raises(PresetError, match="outcome, paper"):
        load_preset(name)


def test_every_shipped_preset_loads_and_scores_within_finite_bounds() -> None:
    for name in preset_names():
        assert math.isfinite(load_preset(name).score(record()).score)


def test_two_terms_cannot_share_a_name() -> None:
    with pytest.raises(ValueError, match="accuracy"):
        term("accuracy")(TERMS["accuracy"])
