"""The listening report: what is read of a run, what of it is on the page, and that nothing on the page can do harm."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image
from typer.testing import CliRunner

from echo_plugins.audio import SAMPLING_RATE, load
from eval.curves import RunError
from eval.predictions import PredictionsError
from eval.report.__main__ import app
from eval.report.page import link, pair_sets
from eval.report.runs import MAX_RESPONSE_CHARS, Named, Row, evenly, read_run, split
from eval.report.sound import NUM_MELS, NUM_PEAKS, encode, mel_picture, peaks

NASTY = (
    '</script><script>window.harm=1</script><!-- <script> --><img src=x onerror="window.harm=1">&lt;\'"]]>'
    "\u2028\u2029\ud83d javascript:alert(1) {{ 7*7 }} {% raw %}"
)


def tone(seconds: float, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * SAMPLING_RATE)) / SAMPLING_RATE)).astype("f4")


def wav(path: Path, seconds: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds), SAMPLING_RATE)
    return path


def prediction(row_id: str, **changes: Any) -> dict[str, Any]:
    response = "<think>In <seg>0.10, 0.50</seg> a bell.</think><answer>one</answer>"
    row = {
        "id": row_id,
        "audio": "a.wav",
        "question": "How often?",
        "choices": ["one", "two"],
        "answer": "one",
        "model_response": response,
        "segments": [{"start": 0.1, "end": 0.5, "inserted": True}],
        "answer_prediction": "one",
        "stop_reason": "answered",
        "meta": {"kind": "times"},
    }
    return {**row, **changes}


def trajectory(row_id: str, step: int, **changes: Any) -> dict[str, Any]:
    row = {
        "step": step,
        "id": row_id,
        "question": "How often?",
        "ground_truth": "one",
        "text": "<think>In <seg>0.10, 0.50</seg> a bell.</think><answer>one</answer>",
        "segments": [{"text": "<seg>0.10, 0.50</seg>", "start": 0.1, "end": 0.5, "refusal": None, "inserted": True}],
        "stop_reason": "answered",
        "error": None,
        "score": 1.5,
        "components": {"acc": 1.0, "failed": 0.0, "reward_format": 0.5, "reward_accuracy": 1.0},
        "duration": 1.0,
    }
    return {**row, **changes}


def write_rows(file: Path, *rows: dict[str, Any], mode: str | None = None) -> Path:
    """Rows as JSON lines; with a mode also what eval.infer writes beside them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if mode:
        identity = {"benchmark": "audio-qa", "questions_sha256": "", "sampling": {"mode": mode, "temperature": 0.0}}
        sidecar = {"identity": identity, "questions": "gone.jsonl", "num_rows": len(rows), "model": "/models/tiny"}
        file.with_suffix(".run.json").write_text(json.dumps({**sidecar, "audio_root": str(file.parent)}))
    return file


class Page(HTMLParser):
    """The elements of a page as a browser's parser finds them, and the text of its data blocks."""

    def __init__(self, file: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.blocks: dict[str, str] = {}
        self.text = ""
        self._within: str | None = None
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.data = json.loads(self.blocks["data"])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._within = dict(attrs).get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._within = None

    def handle_data(self, data: str) -> None:
        if self._within:
            self.blocks[self._within] = self.blocks.get(self._within, "") + data
        else:
            self.text += data


def report(tmp_path: Path, *arguments: Any) -> Page:
    output = tmp_path / "page/report.html"
    done = CliRunner().invoke(app, [*map(str, arguments), "-o", str(output)])
    assert done.exit_code == 0, done.output
    return Page(output)


def one_row(run: Path, **options: Any) -> Row:
    return read_run(run, "run", 10, **options).sets[0].rows[0]


# ---------------------------------------------------------------------------------------------------- escaping


def test_markup_in_whatever_a_model_or_a_data_set_wrote_stays_text(tmp_path: Path) -> None:
    clean = {"id": "1", "meta": {"kind": "harmless"}}
    odd = {
        "id": NASTY,
        "question": NASTY,
        "choices": [NASTY, "two"],
        "answer": NASTY,
        "model_response": NASTY + "<seg>0.1, 0.5</seg>" + NASTY,
        "answer_prediction": NASTY,
        "error": NASTY,
        "stop_reason": NASTY,
        "meta": {NASTY: NASTY},
        "events": [{"label": NASTY, "start": 0, "end": 1}],
        "segments": [{"start": 0.1, "end": 0.5, "inserted": False, "refusal": NASTY, "text": NASTY}],
        "audio": "../" + NASTY.replace("/", "|"),
    }
    harmless = report(tmp_path, write_rows(tmp_path / "x.jsonl", prediction("1", **clean), mode="plain"))
    rows = [prediction("2", **odd), prediction("3", meta={NASTY: "harmless"})]
    folder = tmp_path / "<img src=x onerror=harm()>"
    page = report(tmp_path, write_rows(folder / "x.jsonl", *rows, mode="plain"), "--title", "<b onclick=harm()>")

    plain_tags, tags = ({tag for tag, _ in each.elements} for each in (harmless, page))
    assert tags == plain_tags
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert [dict(attributes).get("type") for tag, attributes in page.elements if tag == "script"] == [
        "application/json",
        None,
    ]
    row = page.data["sets"][0]["sides"][0][0]
    assert row["question"] == NASTY and row["parts"] == [NASTY, 0, NASTY] and row["labels"][NASTY] == [NASTY]
    assert not set(page.blocks["data"]) & set("<>&'\u2028\u2029")
    assert "<b onclick=harm()>" in page.text


def test_numbers_that_json_does_not_have_do_not_break_the_page(tmp_path: Path) -> None:
    log = tmp_path / "rl/trajectories/1.jsonl"
    log.parent.mkdir(parents=True)
    broken = trajectory("1", 1, components={"acc": 1.0, "reward_format": float("nan")}, score=float("inf"))
    log.write_text(json.dumps(broken) + "\n")
    row = report(tmp_path, tmp_path).data["sets"][0]["sides"][0][0]
    assert row["terms"] == {}


def test_the_policy_of_the_page_allows_its_own_script_and_style_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = report(tmp_path, write_rows(tmp_path / "x.jsonl", prediction("1")))
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a) or ""
    for name in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.blocks[name].encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", page.source)
    assert "style" not in {name for _, attributes in page.elements for name in attributes}


# ---------------------------------------------------------------------------------------------------- rows


def named(start: float | None = 0.0, refusal: str | None = None) -> Named:
    return Named("", start, start, refusal is None, refusal)


def test_each_tag_of_a_response_stands_where_its_segment_was_heard() -> None:
    text = "a <seg>0, 1</seg>, <seg>x</seg> b</seg>"
    assert split(text, [named(), named(None, "no"), named(None, "no")]) == ["a ", 0, ", ", 1, " b</seg>"[:2], 2]


def test_a_response_whose_tags_are_not_those_of_the_log_stays_text() -> None:
    assert split("a <seg>0, 1</seg> b", []) == ["a <seg>0, 1</seg> b"]


def test_an_endless_response_is_shortened_and_says_by_how_much() -> None:
    (text,) = split("x" * (MAX_RESPONSE_CHARS + 1234), [])
    assert isinstance(text, str) and text.endswith("(1,234 characters more)")
    parts = split("<seg>0, 1</seg>" + "y" * MAX_RESPONSE_CHARS + "<seg>1, 2</seg>", [named(), named()])
    assert parts[0] == 0 and 1 not in parts


def test_a_response_cut_within_a_tag_keeps_the_tag_whole_or_leaves_it_out() -> None:
    text = "z" * (MAX_RESPONSE_CHARS - 5) + "<seg>1, 2</seg> end"
    parts = split(text, [named()])
    assert 0 not in parts and sum(len(part) for part in parts if isinstance(part, str)) < MAX_RESPONSE_CHARS + 40


def test_verdicts_are_those_of_the_scorer_and_of_the_reward(tmp_path: Path) -> None:
    answers = {"right": "one", "wrong": "two", "unanswered": ""}
    rows = [prediction(verdict, answer_prediction=answer) for verdict, answer in answers.items()]
    rows.append(prediction("failed", answer_prediction="", stop_reason="error", error="no audio"))
    rows.append(prediction("unscored", answer=None))
    found = read_run(write_rows(tmp_path / "x.jsonl", *rows), "x", 10).sets[0].rows
    assert [row.verdict for row in found] == [row.id for row in found]

    log = write_rows(
        tmp_path / "rl/trajectories/1.jsonl",
        trajectory("right", 1),
        trajectory("wrong", 1, components={"acc": 0.0}),
        trajectory("unanswered", 1, components={"acc": 0.0}, text="<think>hm"),
        trajectory("failed", 1, components={"acc": 0.0, "failed": 1.0}, stop_reason="error"),
        trajectory("unscored", 1, components={}),
    )
    found = read_run(log.parents[1], "rl", 10).sets[0].rows
    assert [row.verdict for row in found] == [row.id for row in found]


def test_scores_and_breakdowns_are_the_scorer_s_with_intervals(tmp_path: Path) -> None:
    rows = [
        prediction(str(n), answer_prediction="one" if n < 3 else "two", meta={"kind": "ab"[n % 2]}) for n in range(4)
    ]
    found = read_run(write_rows(tmp_path / "x.jsonl", *rows), "x", 10).sets[0]
    official = found.overall.scores[0]
    assert (official.rule, official.share) == ("official", 0.75)
    assert official.interval is not None and official.interval[0] < 0.75 < official.interval[1]
    assert [(tally.label, tally.scores[0].share) for tally in found.breakdowns["kind"]] == [("a", 1.0), ("b", 0.5)]


def test_refused_segments_carry_their_reason_and_named_ones_are_not_said_to_be_heard(tmp_path: Path) -> None:
    segments = [
        {"start": 9.0, "end": 9.5, "inserted": False, "refusal": "past_end", "text": "<seg>9, 9.5</seg>"},
        {"start": 0.1, "end": 0.5, "inserted": False},
    ]
    row = one_row(write_rows(tmp_path / "x.jsonl", prediction("1", segments=segments)))
    assert [(each.refusal, each.inserted) for each in row.segments] == [
        ("starts after the audio ends", False),
        (None, False),
    ]


def test_predictions_without_segments_get_those_of_their_text(tmp_path: Path) -> None:
    row = prediction("1", model_response="<seg>0.1, 0.5</seg> <seg>3, 1</seg>")
    del row["segments"]
    first, second = one_row(write_rows(tmp_path / "x.jsonl", row)).segments
    assert (first.start, first.end, first.inserted) == (0.1, 0.5, None)
    assert second.refusal == "ends before it starts"


def test_a_recipe_s_run_has_its_modes_in_order_and_then_rl(tmp_path: Path) -> None:
    for mode in ("plain", "grounded", "interleaved"):
        write_rows(tmp_path / f"eval/test/{mode}.jsonl", prediction("1"), mode=mode)
    write_rows(tmp_path / "eval/test/plain.verdicts.jsonl", {"id": "1", "official": True})
    write_rows(tmp_path / "rl/trajectories/1.jsonl", trajectory("1", 1))
    write_rows(tmp_path / "rl/validation/0.jsonl", trajectory("2", 0))
    (tmp_path / "rl/metrics.jsonl").write_text('{"step":1,"data":{"critic/score/mean":0.5}}\n')
    run = read_run(tmp_path, "run", 10)
    assert [rows.name for rows in run.sets] == ["interleaved", "grounded", "plain", "RL validation", "RL training"]
    assert [curve.name for curve in run.curves] == ["reward"] and run.facts["model"] == "tiny"


def test_of_a_long_training_whole_steps_are_shown_and_the_last_among_them(tmp_path: Path) -> None:
    for step in range(1, 41):
        write_rows(tmp_path / f"trajectories/{step}.jsonl", *(trajectory(str(n), step) for n in range(8)))
    found = read_run(tmp_path, "rl", limit=40).sets[0]
    steps = [row.labels["step"][0] for row in found.rows]
    assert list(dict.fromkeys(steps)) == ["1", "11", "21", "30", "40"] and len(steps) == 40
    assert found.num_rows == 320 and "40 of 320" in found.remarks[0]
    assert {row.labels["step"][0] for row in read_run(tmp_path, "rl", limit=3).sets[0].rows} == {"40"}


def test_rollouts_of_one_question_are_rows_of_their_own(tmp_path: Path) -> None:
    write_rows(tmp_path / "trajectories/1.jsonl", trajectory("7", 1), trajectory("7", 1), trajectory("8", 1))
    assert [row.key for row in read_run(tmp_path, "rl", 10).sets[0].rows] == ["1/7/1", "1/7/2", "1/8/1"]


def test_a_manifest_tells_what_the_log_leaves_out(tmp_path: Path) -> None:
    wav(tmp_path / "sounds/a.wav")
    known = {"id": "7", "audio": "a.wav", "question": "?", "choices": ["one"], "answer": "one", "meta": {"kind": "k"}}
    known["events"] = [{"label": "bell", "start": 0, "end": 0.5}]
    manifest = write_rows(tmp_path / "rl.jsonl", known, {**known, "id": "8", "meta": {"kind": "other"}})
    log = (trajectory(row_id, 1, audio=None, choices=None) for row_id in "78")
    write_rows(tmp_path / "rl/trajectories/1.jsonl", *log)
    row = one_row(tmp_path / "rl", audio_qa=[manifest], audio_root=tmp_path / "sounds")
    assert row.audio == tmp_path / "sounds/a.wav" and row.events[0]["label"] == "bell"
    assert row.choices == ["one"] and row.labels["kind"] == ["k"]

    data = {"questions": [str(manifest)], "more": {"AUDIO_ROOT": str(tmp_path / "sounds")}}
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests/data.json").write_text(json.dumps(data))
    assert one_row(tmp_path).audio == tmp_path / "sounds/a.wav"


def test_verl_s_own_dump_can_be_read(tmp_path: Path) -> None:
    dump = {
        "input": "user\nHow?",
        "output": "<seg>0, 1</seg><answer>one</answer>",
        "gts": "one",
        "score": 0.5,
        "acc": 1.0,
    }
    row = one_row(write_rows(tmp_path / "rl/validation/3.jsonl", dump).parents[1])
    assert (row.verdict, row.prediction, row.labels["step"], row.terms) == ("right", "one", ["3"], {"score": 0.5})
    assert row.parts == [0, "<answer>one</answer>"] and row.segments[0].inserted is None


@pytest.mark.parametrize(("count", "limit", "chosen"), [(3, 5, [0, 1, 2]), (10, 4, [0, 3, 6, 9]), (10, 1, [0])])
def test_rows_are_left_out_evenly(count: int, limit: int, chosen: list[int]) -> None:
    assert evenly(count, limit) == chosen


# ---------------------------------------------------------------------------------------------------- two runs


def test_two_files_are_joined_and_two_folders_by_the_names_of_their_sets(tmp_path: Path) -> None:
    for run, modes in (("a", ("interleaved", "plain")), ("b", ("interleaved", "grounded"))):
        for mode in modes:
            write_rows(tmp_path / run / f"eval/test/{mode}.jsonl", prediction("1"), mode=mode)
    runs = [read_run(tmp_path / name, name, 10) for name in "ab"]
    names = {pair.name: [side is not None for side in pair.sides] for pair in pair_sets(runs)}
    assert names == {"interleaved": [True, True], "plain": [True, False], "grounded": [False, True]}
    files = [read_run(tmp_path / name, name, 10) for name in ("a/eval/test/plain.jsonl", "b/eval/test/grounded.jsonl")]
    (pair,) = pair_sets(files)
    assert all(pair.sides)


def test_of_two_long_runs_the_same_rows_are_shown(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a.jsonl", *(prediction(str(n)) for n in range(50)))
    second = write_rows(tmp_path / "b.jsonl", *(prediction(str(n)) for n in reversed(range(50))))
    page = report(tmp_path, first, second, "--rows", 7)
    ids = [{row["id"] for row in side} for side in page.data["sets"][0]["sides"]]
    assert ids[0] == ids[1] and len(ids[0]) == 7
    assert page.data["runs"] == ["a", "b"]


# ---------------------------------------------------------------------------------------------------- sound


def test_sound_is_carried_for_so_many_rows_and_linked_for_the_rest(tmp_path: Path) -> None:
    for number in range(5):
        wav(tmp_path / f"{number} #%.wav")
    rows = [prediction(str(number), audio=f"{number} #%.wav") for number in range(5)]
    run = write_rows(tmp_path / "x.jsonl", *rows, mode="plain")
    page = report(tmp_path, run, "--embed", 2)
    assert [sound["embedded"] for sound in page.data["sounds"]] == [True, True, False, False, False]
    assert {name for name in page.blocks if name.startswith(("sound-", "mel-"))} == {
        f"{kind}-{place}" for kind in ("sound", "mel") for place in range(2)
    }
    waveform, rate = soundfile.read(io.BytesIO(base64.b64decode(page.blocks["sound-1"])), dtype="float32")
    assert rate == SAMPLING_RATE and np.abs(waveform - load(tmp_path / "1 #%.wav")).max() < 1e-4
    assert page.data["sounds"][3]["href"] == (tmp_path / "3 #%.wav").as_uri()
    assert "sound-0" not in report(tmp_path, run, "--embed", 0).blocks


def test_a_link_is_relative_below_the_page_and_absolute_elsewhere(tmp_path: Path) -> None:
    assert link(tmp_path / "run/audio/a b#.wav", tmp_path / "run") == "./audio/a%20b%23.wav"
    assert link(tmp_path / "data/a.wav", tmp_path / "run") == (tmp_path / "data/a.wav").as_uri()


def test_rows_that_share_their_sound_share_it_on_the_page(tmp_path: Path) -> None:
    wav(tmp_path / "a.wav")
    run = write_rows(tmp_path / "x.jsonl", *(prediction(str(n)) for n in range(5)), mode="plain")
    page = report(tmp_path, run)
    assert len(page.data["sounds"]) == 1
    assert [row["sound"] for row in page.data["sets"][0]["sides"][0]] == [0] * 5
    assert len(base64.b64decode(page.data["sounds"][0]["peaks"])) == NUM_PEAKS


def test_missing_and_broken_audio_is_said_on_its_row_and_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "noise.wav").write_bytes(b"not audio")
    wav(tmp_path / "a.wav")
    rows = [prediction("gone", audio="gone.wav"), prediction("noise", audio="noise.wav"), prediction("fine")]
    rows += [prediction("out", audio="../a.wav"), prediction("none", audio=None)]
    run = write_rows(tmp_path / "runs/x.jsonl", *rows)
    output = tmp_path / "r.html"
    done = CliRunner().invoke(app, [str(run), "-o", str(output), "--audio-root", str(tmp_path)])
    assert (
        done.exit_code == 0 and "== 4 of 5 rows are without sound. The first: 'gone.wav': no such file" in done.output
    )
    data = Page(output).data
    problems = [row["audio_problem"] or data["sounds"][row["sound"]]["problem"] for row in data["sets"][0]["sides"][0]]
    for problem, said in zip(
        problems, ("no such file", "not readable", None, "leaves the audio root", "does not say"), strict=True
    ):
        assert problem is None if said is None else said in problem


def test_the_audio_of_a_benchmark_s_row_is_where_the_benchmark_has_it(tmp_path: Path) -> None:
    wav(tmp_path / "audio/7.wav")
    row = prediction("7", audio=None, audio_path="/elsewhere/7.wav", answer_gt="one")
    run = write_rows(tmp_path / "x.jsonl", row, mode="plain")
    sidecar = run.with_suffix(".run.json")
    sidecar.write_text(sidecar.read_text().replace("audio-qa", "mmsu"))
    assert one_row(run).audio == tmp_path / "audio/7.wav"


def test_a_segment_whose_times_are_no_numbers_is_shown_without_a_place(tmp_path: Path) -> None:
    row = one_row(write_rows(tmp_path / "x.jsonl", prediction("1", segments=[{"start": "0.1", "end": None}])))
    assert (row.segments[0].start, row.segments[0].inserted) == (None, False) and 0 in row.parts


def test_peaks_are_loud_where_the_sound_is() -> None:
    waveform = np.concatenate([np.zeros(SAMPLING_RATE, "f4"), tone(1.0) / 8])
    columns = np.frombuffer(peaks(waveform), np.uint8)
    assert (
        len(columns) == NUM_PEAKS
        and columns[: NUM_PEAKS // 2 - 1].max() == 0
        and columns[NUM_PEAKS // 2 + 2 :].min() > 200
    )
    assert len(peaks(np.zeros(3, "f4"))) == NUM_PEAKS


def test_what_is_carried_is_the_samples_that_were_heard() -> None:
    waveform = np.random.default_rng(0).uniform(-1, 1, 12_345).astype("f4")
    again, _ = soundfile.read(io.BytesIO(encode(waveform)), dtype="float32")
    assert len(again) == len(waveform) and np.abs(again - waveform).max() < 1e-4


def test_a_higher_pitch_stands_higher_in_the_picture() -> None:
    def brightest(hertz: float) -> int:
        picture = np.asarray(Image.open(io.BytesIO(mel_picture(tone(0.5, hertz)))))
        assert picture.shape[0] == NUM_MELS
        return int(picture.mean(axis=1).argmax())

    assert NUM_MELS > brightest(200) > brightest(800) > brightest(3000) > 0


def test_long_audio_has_no_wider_picture() -> None:
    assert Image.open(io.BytesIO(mel_picture(tone(60)))).width <= 901


# ---------------------------------------------------------------------------------------------------- bad input


def test_what_is_no_run_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such file or folder"):
        read_run(tmp_path / "nowhere", "x", 10)
    with pytest.raises(RunError, match=r"nothing to listen to in it. Looked for eval/\*/\*.jsonl"):
        read_run(tmp_path, "x", 10)
    with pytest.raises(PredictionsError, match="no rows in it"):
        read_run(write_rows(tmp_path / "empty.jsonl"), "x", 10)
    (tmp_path / "torn.jsonl").write_text('{"id": "1"\n')
    with pytest.raises(PredictionsError, match="line 1: not JSON"):
        read_run(tmp_path / "torn.jsonl", "x", 10)
    (tmp_path / "trajectories").mkdir()
    (tmp_path / "trajectories/1.jsonl").write_text("[]\n")
    with pytest.raises(RunError, match=r"1.jsonl, line 1: not a JSON object"):
        read_run(tmp_path, "x", 10)


def test_the_command_fails_in_a_sentence_and_leaves_an_earlier_page_alone(tmp_path: Path) -> None:
    output = tmp_path / "r.html"
    output.write_text("earlier")
    done = CliRunner().invoke(app, [str(tmp_path / "nowhere"), "-o", str(output)])
    assert done.exit_code == 1 and done.output.startswith("error: ") and output.read_text() == "earlier"
    rows = write_rows(tmp_path / "x.jsonl", prediction("1"))
    assert CliRunner().invoke(app, [str(rows)] * 3).exit_code == 2
    assert CliRunner().invoke(app, [str(rows), "--embed", "-1"]).exit_code == 2
    assert CliRunner().invoke(app, []).exit_code == 2
