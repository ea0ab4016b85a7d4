"""Curves of RL runs from verl's file logger."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from eval.curves import RunError, app, labels_for, read_curves


def step(number: int, **values: float) -> dict[str, Any]:
    data = {name.replace("__", "/"): value for name, value in values.items()}
    return {"step": number, "data": {"critic/score/mean": 0.5, **data}}


def write_log(file: Path, *lines: dict[str, Any], torn: str = "") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return file


def curve(run: Path, name: str) -> dict[int, float]:
    found = next(curve for curve in read_curves(run).curves if curve.name == name)
    return dict(zip(found.steps, found.values, strict=True))


def test_a_step_that_a_later_start_repeated_counts_as_the_later_start_logged_it(tmp_path: Path) -> None:
    write_log(tmp_path / "rl/metrics.1700000000.jsonl", step(1, segments__named=1), step(2, segments__named=9))
    write_log(tmp_path / "rl/metrics.jsonl", step(2, segments__named=2), step(3, segments__named=3))
    assert curve(tmp_path, "segments_named") == {1: 1, 2: 2, 3: 3}
    assert curve(tmp_path / "rl", "segments_named") == {1: 1, 2: 2, 3: 3}


def test_the_line_that_a_kill_cut_is_left_out(tmp_path: Path) -> None:
    log = write_log(tmp_path / "metrics.jsonl", step(1), torn='{"step":2,"data":{"critic/score/mean":0.9')
    assert curve(log, "reward") == {1: 0.5}


def test_refusals_add_up_and_terms_have_panels_of_their_own(tmp_path: Path) -> None:
    values = {"segments/refused/reversed": 0.25, "segments/refused/malformed": 0.5, "reward/format": 0.4}
    counted = {"reward/acc": 0.7, "reward/failed": 0.0, "reward/term_errors": 0.0}
    log = write_log(tmp_path / "metrics.jsonl", {"step": 4, "data": {"critic/score/mean": 1.0, **values, **counted}})
    assert curve(log, "segments_refused") == {4: 0.75}
    assert curve(log, "accuracy") == {4: 0.7}
    assert [each.name for each in read_curves(log).curves if each.name.startswith("reward")] == [
        "reward",
        "reward/format",
    ]


def test_the_divergence_is_the_loss_term_or_the_penalty_in_the_reward(tmp_path: Path) -> None:
    loss = write_log(tmp_path / "a.jsonl", step(1, actor__kl_loss=0.01))
    penalty = write_log(tmp_path / "b.jsonl", step(1, actor__reward_kl_penalty=0.02))
    assert curve(loss, "reference_kl") == {1: 0.01}
    assert curve(penalty, "reference_kl") == {1: 0.02}


def test_validation_goes_with_accuracy_and_a_validation_alone_is_no_training_step(tmp_path: Path) -> None:
    before = {"step": 0, "data": {"val-core/rl/acc/mean@1": 0.2, "val-core/other/acc/mean@1": 0.4}}
    log = write_log(tmp_path / "metrics.jsonl", before, step(1, reward__acc=0.5))
    accuracy = next(each for each in read_curves(log).curves if each.name == "accuracy")
    assert (accuracy.steps, accuracy.validation_steps) == ([1], [0])
    assert accuracy.validation_values == pytest.approx([0.3])


def test_a_long_run_is_smoothed_and_a_short_one_is_not(tmp_path: Path) -> None:
    steps = [{"step": n, "data": {"critic/score/mean": float(n % 2)}} for n in range(1, 101)]
    long, short = write_log(tmp_path / "long.jsonl", *steps), write_log(tmp_path / "short.jsonl", *steps[:20])
    smooth = read_curves(long).curves[0].smooth
    assert len(smooth) == 100 and all(0.3 < value < 0.7 for value in smooth[10:])
    assert read_curves(short).curves[0].smooth == []


def test_values_that_are_no_numbers_leave_a_gap(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text(
        '{"step":1,"data":{"critic/score/mean":NaN,"segments/named":1}}\n'
        '{"step":2,"data":{"critic/score/mean":0.5,"segments/named":null}}\n'
        '{"step":3,"data":{"critic/score/mean":0.6,"segments/named":2}}\n'
    )
    assert curve(log, "reward") == {2: 0.5, 3: 0.6}
    assert curve(log, "segments_named") == {3: 2}


def test_runs_are_named_by_as_much_of_their_path_as_tells_them_apart() -> None:
    assert labels_for([Path("/x/tiny-cpu")]) == ["tiny-cpu"]
    assert labels_for([Path("/x/paper/rl"), Path("/x/quota/rl")]) == ["paper/rl", "quota/rl"]
    assert len(set(labels_for([Path("/x/rl"), Path("/x/rl")]))) == 2


def test_the_command_overlays_runs_as_a_picture_and_as_json(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_log(tmp_path / name / "rl/metrics.jsonl", step(1, segments__overlap=0.1), step(2, segments__overlap=0.2))
    runs = [str(tmp_path / name) for name in ("first", "second")]
    picture, numbers = tmp_path / "out/curves.png", tmp_path / "out/curves.json"
    done = CliRunner().invoke(app, [*runs, "-o", str(picture), "--json", str(numbers)])
    assert done.exit_code == 0, done.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    written = json.loads(numbers.read_text())["runs"]
    assert [run["label"] for run in written] == ["first", "second"]
    assert {each["name"]: each["values"] for each in written[1]["curves"]}["overlap"] == [0.1, 0.2]
    assert sorted(path.name for path in picture.parent.iterdir()) == ["curves.json", "curves.png"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no metrics.jsonl"),
        ("{}\n", "line 1: not a line of verl's file logger"),
        ("nonsense\n", "line 1: not JSON"),
        ("[1]\n", "not a JSON object but list"),
        ('{"step":0,"data":{"val-core/rl/acc/mean@1":0.2}}\n', "no finished training step"),
    ],
)
def test_a_run_without_curves_says_what_is_wrong(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(RunError, match=said):
        read_curves(tmp_path)
    done = CliRunner().invoke(app, [str(tmp_path), "-o", str(tmp_path / "c.png")])
    assert done.exit_code == 1 and not (tmp_path / "c.png").exists()


def test_wrong_usage_is_refused(tmp_path: Path) -> None:
    log = write_log(tmp_path / "metrics.jsonl", step(1))
    assert CliRunner().invoke(app, [str(log), "-o", "curves.pdf"]).exit_code == 2
    assert CliRunner().invoke(app, []).exit_code == 2
    assert CliRunner().invoke(app, [str(tmp_path / "nowhere")]).exit_code == 1
