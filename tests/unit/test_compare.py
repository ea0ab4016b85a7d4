"""Two models on the same rows, and several runs of one."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from eval import compare, runs, stats
from eval.predictions import write_whole

CHOICES = ["rain", "wind", "a dog", "thunder"]


def write_run(file: Path, answers: list[str], **identity: Any) -> Path:
    """Predictions on rows that all have the key "rain"."""
    rows = [
        {"id": str(n), "choices": CHOICES, "answer": "rain", "modality": "sound" if n % 2 else "music"}
        | {"question": f"{n}?", "answer_prediction": answer}
        for n, answer in enumerate(answers)
    ]
    write_whole(file, (json.dumps(row) + "\n" for row in rows))
    if identity:
        about = {"benchmark": "audio-qa", "questions_sha256": "0"} | identity
        sidecar = {"identity": about, "questions": "gone", "num_rows": len(answers)}
        write_whole(file.with_suffix(".run.json"), json.dumps(sidecar))
    return file


def run_compare(folder: Path, first: Path, second: Path) -> tuple[Any, dict[str, Any], list[dict[str, Any]]]:
    words = [
        "--json",
        str(folder / "c.json"),
        "--rows",
        str(folder / "changed.jsonl"),
        "--markdown",
        str(folder / "c.md"),
    ]
    result = CliRunner().invoke(compare.app, [str(first), str(second), *words])
    if result.exit_code:
        return result, {}, []
    changed = [json.loads(line) for line in (folder / "changed.jsonl").read_text().splitlines()]
    return result, json.loads((folder / "c.json").read_text()), changed


def test_a_comparison_pairs_the_rows_and_names_those_that_changed(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a.jsonl", ["rain"] * 6 + ["wind"] * 8 + [""] * 6)
    second = write_run(tmp_path / "b.jsonl", ["rain"] * 5 + ["wind"] + ["rain"] * 8 + [""] * 6)
    result, summary, changed = run_compare(tmp_path, first, second)
    assert result.exit_code == 0, result.output
    strict = summary["strict"]
    assert (strict["before"], strict["after"], strict["only_before"], strict["only_after"]) == (0.3, 0.65, 1, 8)
    assert strict["difference"] == pytest.approx(0.35)
    assert strict["p"] == pytest.approx(2 * (1 + 9) / 2**9)
    assert strict["interval"][0] < 0.35 < strict["interval"][1]
    assert [group["total"] for group in strict["by"]["modality"].values()] == [10, 10]
    assert summary["changed"] == 9 and [row["id"] for row in changed] == [str(n) for n in range(5, 14)]
    assert changed[0]["before"] == "rain" and changed[0]["after"] == "wind"
    assert changed[0]["strict"] == {"before": True, "after": False}
    assert "| strict | 20 | 30.0 | 65.0 | 1 | 8 | +35.0" in (tmp_path / "c.md").read_text()
    assert "5: 'rain' -> 'wind', key 'rain'" in result.output
    narrow = CliRunner().invoke(compare.app, [str(first), str(second)], env={"COLUMNS": "80"}).output
    assert "…" not in narrow
    assert re.search(r"official +20 +30\.0 +65\.0 +1 +8 +\+35\.0 \(\S+ to \S+\) 0\.039", narrow), narrow


def test_equal_predictions_are_no_difference(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a.jsonl", ["rain", "wind", ""])
    _, summary, changed = run_compare(tmp_path, first, write_run(tmp_path / "b.jsonl", ["rain", "wind", ""]))
    assert summary["official"]["p"] == 1.0 and changed == []
    low, high = summary["official"]["interval"]
    assert low == pytest.approx(-high) and 0.5 < high < 0.6, "three rows say little: the interval has a width"


def test_rows_of_one_recording_change_together_and_count_as_one(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a.jsonl", ["wind"] * 24)
    second = write_run(tmp_path / "b.jsonl", ["rain"] * 12 + ["wind"] * 12)
    _, alone, _ = run_compare(tmp_path, first, second)
    for file in (first, second):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        write_whole(file, (json.dumps(row | {"audio": f"clip{n // 6}.wav"}) + "\n" for n, row in enumerate(rows)))
    _, shared, _ = run_compare(tmp_path, first, second)
    assert alone["strict"]["p"] == pytest.approx(2 / 2**12)
    assert shared["strict"]["p"] == pytest.approx(2 / 2**2), "two recordings changed, not twelve rows"
    width = {
        name: high - low
        for name, (low, high) in ((n, s["strict"]["interval"]) for n, s in (("alone", alone), ("shared", shared)))
    }
    assert width["shared"] > 1.8 * width["alone"] and shared["strict"]["difference"] == 0.5


def test_rows_of_one_file_only_are_left_out_and_counted(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a.jsonl", ["rain"] * 3), write_run(tmp_path / "b.jsonl", ["rain"] * 5)
    result, summary, _ = run_compare(tmp_path, first, second)
    assert summary["rows"] == 3 and "2 rows are in one of the files only" in result.stderr


def test_other_questions_are_refused(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a.jsonl", ["rain"], questions_sha256="1")
    second = write_run(tmp_path / "b.jsonl", ["rain"], questions_sha256="2")
    result, _, _ = run_compare(tmp_path, first, second)
    assert result.exit_code == 1 and "they answer other questions" in result.stderr
    write_whole(second.with_suffix(".run.json"), first.with_suffix(".run.json").read_text())
    write_whole(second, second.read_text().replace('"answer": "rain"', '"answer": "wind"'))
    result, _, _ = run_compare(tmp_path, first, second)
    assert result.exit_code == 1 and "have another answer key" in result.stderr


def summarise(folder: Path, *answers: list[str], **identity: Any) -> dict[str, Any]:
    files = [
        write_run(folder / f"{n}.jsonl", row, **({"shuffle_choices": n} if identity else {}))
        for n, row in enumerate(answers)
    ]
    result = CliRunner().invoke(runs.app, [*map(str, files), "--json", str(folder / "r.json")])
    assert result.exit_code == 0, result.output
    return json.loads((folder / "r.json").read_text())


def test_several_runs_have_a_mean_a_spread_and_pass_at_k(tmp_path: Path) -> None:
    summary = summarise(tmp_path, ["rain", "wind"], ["rain", "rain"], ["rain", "wind"], ["rain", "wind"])
    assert summary["strict"]["accuracies"] == [0.5, 1.0, 0.5, 0.5]
    assert summary["strict"]["mean_accuracy"] == 0.625 and summary["strict"]["standard_deviation"] == 0.25
    assert summary["strict"]["pass_at_k"] == pytest.approx({"1": 0.625, "2": 0.75, "4": 1.0})
    assert summary["majority_accuracy"] == 0.5


def test_a_tie_and_silence_elect_nobody(tmp_path: Path) -> None:
    summary = summarise(tmp_path, ["rain", "", "A", "dunno"], ["wind", "", "rain", "rain"])
    assert summary["majority_accuracy"] == 0.5 and summary["without_majority"] == 2
    assert summary["consistency"]["pairwise"] == 0.25 and not summary["consistency"]["choices_shuffled"]


def test_agreement_over_shuffled_choices_is_by_text_and_not_by_letter(tmp_path: Path) -> None:
    chance = random.Random(5)
    files = []
    for number in range(3):
        rows = []
        for n in range(20):
            order = chance.sample(CHOICES, 4)
            letter = "ABCD"[order.index("rain") if n < 15 else 0]
            rows.append({"id": str(n), "choices": order, "answer": "rain", "answer_prediction": letter})
        files.append(tmp_path / f"{number}.jsonl")
        write_whole(files[-1], (json.dumps(row) + "\n" for row in rows))
        about = {"benchmark": "audio-qa", "questions_sha256": "0", "shuffle_choices": number}
        sidecar = {"identity": about, "questions": "gone", "num_rows": 20}
        write_whole(files[-1].with_suffix(".run.json"), json.dumps(sidecar))
    summary = runs.summarise([runs.load(file) for file in files])
    assert summary["consistency"]["choices_shuffled"]
    assert 0.75 <= summary["consistency"]["unanimous"] < 1.0  # the five that say A whatever A is agree by chance
    assert summary["strict"]["pass_at_k"]["1"] >= 0.75


def test_runs_on_other_rows_are_refused(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a.jsonl", ["rain"]), write_run(tmp_path / "b.jsonl", ["rain", "rain"])
    result = CliRunner().invoke(runs.app, [str(first), str(second)])
    assert result.exit_code == 1 and "not runs on the same rows" in result.stderr
    assert CliRunner().invoke(runs.app, [str(first)]).exit_code == 1


def test_arms_are_each_compared_with_the_first_and_their_ps_corrected(tmp_path: Path) -> None:
    base = write_run(tmp_path / "a.jsonl", ["rain"] * 16 + ["wind"] * 4)
    silent = write_run(tmp_path / "a.silent.jsonl", ["rain"] * 7 + ["wind"] * 13)
    same = write_run(tmp_path / "a.random.jsonl", ["rain"] * 15 + ["wind"] * 5)
    words = ["--json", str(tmp_path / "c.json"), "--markdown", str(tmp_path / "c.md")]
    result = CliRunner().invoke(compare.app, [str(base), str(silent), str(same), *words])
    assert result.exit_code == 0, result.output
    arms = json.loads((tmp_path / "c.json").read_text())["arms"]
    assert arms["a.silent"]["p"] == pytest.approx(2 / 2**9) and arms["a.silent"]["p_holm"] == pytest.approx(4 / 2**9)
    assert arms["a.random"]["p_holm"] == arms["a.random"]["p"] == 1.0
    assert "| a.silent | 20 | 35.0 [18, 57] | -45.0 (" in (tmp_path / "c.md").read_text()


def test_holms_correction() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and stats.holm([]) == []
