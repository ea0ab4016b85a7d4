"""Synthesis without a server: configs, prompts, seeds, what models write, folders of a run, the plan, the page."""

import json
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import soundfile
import yaml
from typer.testing import CliRunner

from converters.synthesis import cogito, eaqa, filters, plan, runner, selection, vet
from converters.synthesis.asker import json_object
from converters.synthesis.config import (
    DEFAULT_FILTERS,
    DEFAULT_SEEDS,
    Benchmark,
    Config,
    ConfigError,
    Price,
    read_config,
)
from converters.synthesis.report import write_report
from converters.synthesis.runner import Context, choose, describe, place
from converters.synthesis.sample import Sample
from converters.synthesis.stages import Draft, chosen, domain_of, evidence, take_clips
from converters.synthesis.summary import Shape, StageSummary, Summary, summarise
from converters.synthesis.templates import PROMPTS, Prompts

EXAMPLES = Path(cogito.__file__).with_name("examples")
ENDPOINT = {"url": "http://localhost:1/v1", "model": "m"}


def write_run(folder: Path, **changes: Any) -> Path:
    """A config for EAQA, and the clips that it names: two good ones, a broken row, one clip again, one id again."""
    (folder / "clips").mkdir()
    for number, name in enumerate(("a", "b")):
        soundfile.write(folder / f"clips/{name}.wav", np.full(16_000, 0.1 * number), 16_000)
    rows = [
        {"id": "1", "audio": "a.wav", "events": [{"label": "dog", "start": 0.0, "end": 0.5}], "duration": 1.0},
        {"id": "2", "audio": "b.wav", "duration": 1.0, "meta": {"recording": "tape 7", "tempo": 90}},
        {"id": "3", "audio": "b.wav", "duration": 1.0},
        {"id": "4", "audio": "none.wav", "duration": 1.0},
        {"id": "1", "audio": "c.wav", "duration": 1.0},
    ]
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "no json\n")
    values = {"input": "clips.jsonl", "audio_root": "clips", "output": "run"}
    stages = dict.fromkeys(("caption", "question", "judge"), ENDPOINT)
    file = folder / "eaqa.yaml"
    file.write_text(yaml.safe_dump({**values, "stages": stages, **changes}))
    return file


def context_of(file: Path) -> Context:
    config = read_config(file)
    return Context(config, config.limits(), config.output)


@pytest.mark.parametrize(("pipeline", "asks"), [(eaqa, "judge"), (cogito, "judge"), (vet, "vet")])
def test_the_examples_run_as_they_stand_once_there_is_data(pipeline: ModuleType, asks: str, tmp_path: Path) -> None:
    name = f"{pipeline.__name__.rpartition('.')[2]}.yaml"
    for part in ("clips", "avqa", "benchmarks/mmar", "benchmarks/mmau-mini"):
        (tmp_path / part).mkdir(parents=True)
    benchmarks = ("benchmarks/mmar/MMAR-meta.json", "benchmarks/mmau-mini/mmau-test-mini.json")
    for file in ("clips.jsonl", "avqa-rows.jsonl", *benchmarks):
        (tmp_path / file).write_text("[]")
    (tmp_path / name).write_text((EXAMPLES / name).read_text())
    done = CliRunner().invoke(pipeline.app, [str(tmp_path / name), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert f"{asks}: 64 of 64 tasks to do" in done.output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taks": 3}, "taks"),
        ({"stages": {"caption": {**ENDPOINT, "modell": "m"}}}, "stages.caption.0.modell"),
        ({"stages": {"caption": ENDPOINT}}, "question asks a model and none is given"),
        ({"stages": {"capture": ENDPOINT}}, "capture: no such stage"),
        ({"stages": {"caption": [ENDPOINT, ENDPOINT]}}, "caption takes one model"),
        ({"filters": {"max_overlapp": 1}}, "max_overlapp"),
        ({"input": "none.jsonl"}, "none.jsonl is no file"),
        ({"prompts": "nowhere"}, "nowhere is no folder"),
    ],
)
def test_what_is_wrong_with_a_config_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(eaqa.app, [str(write_run(tmp_path, **changes)), "--dry-run"])
    assert done.exit_code == 2
    assert message in done.output


def test_every_row_of_the_input_becomes_a_clip_or_a_reason(tmp_path: Path) -> None:
    context = context_of(write_run(tmp_path))
    samples = list(take_clips(context, 0, 1))
    assert [sample.dropped.reason if sample.dropped else None for sample in samples] == [
        None,
        None,
        "repeated_clip",
        "audio_missing",
        "duplicate_id",
        "not_json",
    ]
    assert samples[1].recording == "tape 7" and domain_of(samples[1]) == "music"
    parts = [sample for rank in range(3) for sample in take_clips(context, rank, 3)]
    assert sorted(sample.id for sample in parts) == sorted(sample.id for sample in samples)
    assert len({sample.id for sample in parts}) == len(parts)


def test_a_stage_writes_to_a_folder_named_by_what_decides_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_run(tmp_path)

    def folders(**changes: Any) -> dict[str, str]:
        config = read_config(file).model_copy(update=changes)
        return {placed.stage.name: placed.folder.name for placed in place(eaqa.STAGES, config, Prompts(config.prompts))}

    first = folders()
    config = read_config(file)
    elsewhere = {
        name: [endpoints[0].model_copy(update={"url": "http://other:2/v1", "concurrency": 2})]
        for name, endpoints in config.stages.items()
    }
    assert folders(stages=elsewhere) == first
    (tmp_path / "other").mkdir()
    assert not set(folders(audio_root=tmp_path / "other").values()) & set(first.values())
    source = tmp_path / "filters.py"
    source.write_text(Path(str(filters.__file__)).read_text() + "# edited\n")
    with monkeypatch.context() as edited:
        edited.setattr(filters, "__file__", str(source))
        assert not set(folders().values()) & set(first.values())
    source.write_text(Path(str(selection.__file__)).read_text() + "# edited\n")
    with monkeypatch.context() as edited:
        edited.setattr(selection, "__file__", str(source))
        assert {name for name, folder in folders().items() if folder != first[name]} == {"select"}
    thresholds = folders(filters={"max_overlap": 0.1})
    assert {name for name in first if thresholds[name] != first[name]} == {"check", "judge", "select"}
    rows = tmp_path / "mmar.jsonl"
    held = []
    for text in ("{}\n", '{"id": "BV1xw411A7gP_00"}\n'):
        rows.write_text(text)
        held.append(folders(benchmarks=[Benchmark(file=rows)]))
    assert held[0]["clips"] == held[1]["clips"] and held[0]["screen"] != held[1]["screen"]
    (tmp_path / "mine/eaqa").mkdir(parents=True)
    (tmp_path / "mine/eaqa/music.md").write_text("What music is there? Reply with exactly: NONE if there is none.")
    prompted = folders(prompts=tmp_path / "mine")
    assert prompted["clips"] == first["clips"] and prompted["caption"] != first["caption"]


class Queue:
    """Stands in for Slurm's executor: what is handed to it waits in `steps`."""

    steps: ClassVar[list[runner.StageStep]] = []

    def __init__(self, pipeline: list[runner.StageStep], **_: Any) -> None:
        self.steps.extend(pipeline)

    def run(self) -> None:
        pass


def test_a_queued_task_works_with_what_was_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SlurmPipelineExecutor", Queue)
    monkeypatch.setattr(Queue, "steps", [])
    file = write_run(tmp_path, executor={"kind": "slurm"}, stages={"vet": ENDPOINT}, filters_file="filters.yaml")
    row = {"id": "1", "audio": "a.wav", "question": "Which is heard?", "choices": ["dog", "cat"], "answer": "dog"}
    (tmp_path / "clips.jsonl").write_text(json.dumps(row) + "\n")
    thresholds = yaml.safe_load(DEFAULT_FILTERS.read_text()) | {"num_choices": 2, "max_length_ratio": 9.0}
    (tmp_path / "filters.yaml").write_text(yaml.safe_dump(thresholds))
    rows, screen, check, *_ = runner.run("converters.synthesis.vet", file, [])
    steps = Queue.steps
    (tmp_path / "filters.yaml").write_text(yaml.safe_dump(thresholds | {"num_choices": 3}))
    for step in steps[:3]:
        step.run(rank=0, world_size=1)
    for placed in (rows, screen, check):
        (made,) = runner.read_samples(placed.rows_file(0))
        assert made.dropped is None
    (tmp_path / "clips.jsonl").write_text("")
    with pytest.raises(runner.StageError, match=r"clips\.jsonl changed since the run was planned"):
        steps[0].run(rank=0, world_size=1)


def test_a_stage_is_done_anew_on_demand_with_those_after_it_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "SlurmPipelineExecutor", Queue)
    file = write_run(tmp_path, executor={"kind": "slurm"})

    def queued(*names: str, force: str | None = None) -> list[str]:
        monkeypatch.setattr(Queue, "steps", [])
        runner.run("converters.synthesis.eaqa", file, names, force=force)
        return [step.name for step in Queue.steps]

    everything = queued()
    for placed in place(eaqa.STAGES, read_config(file), Prompts()):
        (placed.folder / "completions").mkdir()
        (placed.folder / "completions/00000").touch()
    (tmp_path / "run/journal").mkdir()
    (tmp_path / "run/journal/paid").touch()
    assert queued() == []
    with pytest.raises(ConfigError, match="add --stage screen"):
        queued("clips", force="screen")
    with pytest.raises(ConfigError, match="no stage hear"):
        queued(force="hear")
    assert queued() == []
    assert queued(force="screen") == everything[1:]
    assert (tmp_path / "run/journal/paid").exists()


def test_the_user_s_own_files_are_left_alone_by_a_run_in_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "SlurmPipelineExecutor", Queue)
    file = write_run(tmp_path, output=".", executor={"kind": "slurm"}).rename(tmp_path / "config.yaml")
    before = file.read_bytes()
    runner.run("converters.synthesis.eaqa", file, ["clips"])
    assert file.read_bytes() == before and read_config(tmp_path / "run.yaml").output == tmp_path
    runner.run("converters.synthesis.eaqa", tmp_path / "run.yaml", ["clips"])  # as good as the user's own
    assert len(list(tmp_path.glob("clips-*"))) == 1
    (tmp_path / "run.yaml").unlink()
    file.rename(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="give yours another name"):
        runner.run("converters.synthesis.eaqa", tmp_path / "run.yaml", ["clips"])
    assert (tmp_path / "run.yaml").read_bytes() == before


def test_a_stage_waits_for_the_one_before_it(tmp_path: Path) -> None:
    config = read_config(write_run(tmp_path))
    placed = place(eaqa.STAGES, config, Prompts())
    with pytest.raises(ConfigError, match="judge starts from check-"):
        choose(placed, ["judge"])
    with pytest.raises(ConfigError, match="no stage hear"):
        choose(placed, ["hear"])
    assert [p.stage.name for p in choose(placed, ["clips", "screen"])] == ["clips", "screen"]
    assert "prompt eaqa/speech@" in describe(placed, config, Prompts())


def test_a_prompt_s_version_changes_with_what_it_includes(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    evidence_text = (PROMPTS / "shared/evidence.md").read_text()
    (tmp_path / "shared/evidence.md").write_text(evidence_text + "Nothing else is known.\n")
    ours, theirs = Prompts(), Prompts(tmp_path)
    assert theirs.version("shared/judge") != ours.version("shared/judge")
    assert theirs.version("eaqa/speech") == ours.version("eaqa/speech")


def sample(**changes: Any) -> Sample:
    fields: dict[str, Any] = {"id": "x", "clip": "x", "audio": "a.wav", "audio_sha256": "", "recording": "a.wav"}
    return Sample(**{**fields, "duration": 8.0, "domain": "sound", **changes})


def test_the_writing_model_is_shown_labels_and_times_and_the_answering_ones_are_not() -> None:
    row = sample(
        events=[
            {"label": "dog", "start": 1.0, "end": 2.5},
            {"label": "speaker 1", "start": 3.0, "end": 4.5, "kind": "speech", "text": "Sit!"},
            {"label": "Am", "start": 0.0, "end": 4.0, "kind": "chord"},
        ],
        meta={"tempo": 92, "key": "A minor", "beats": [0.5, 1.15], "captions": ["A {{ dog }} and a guitar"]},
    )
    written = Prompts().render("eaqa/question_music", level="basic", **evidence(row))
    for shown in (
        "- dog: 1.00, 2.50",
        "Am 0.00",
        "92 beats",
        "A minor",
        "0.50 1.15",
        "A {{ dog }} and a guitar",
        "8.00",
    ):
        assert shown in written
    assert "- Am" not in written
    for name in ("shared/answer", "cogito/think"):
        assert "evidence" not in (PROMPTS / f"{name}.md").read_text()


def test_a_judge_is_asked_about_reasoning_only_where_there_is_some() -> None:
    shown = {"question": "q", "choices": ["a", "b"], "answer": "a", **evidence(sample())}
    assert '"reasoning"' not in Prompts().render("shared/judge", think=None, **shown)
    assert '"reasoning"' in Prompts().render("shared/judge", think="because", **shown)


def test_the_seed_pool_is_large_even_and_without_twins() -> None:
    seeds = cogito.read_seeds(DEFAULT_SEEDS)
    assert len(seeds) >= 60 and len({seed.question for seed in seeds}) == len(seeds)
    domains = Counter(seed.domain for seed in seeds)
    assert set(domains) == {"sound", "speech", "music", "mixed"} and min(domains.values()) >= 15
    assert {seed.difficulty for seed in seeds} == {"easy", "medium", "hard"}
    drawn = cogito.draw_seeds(seeds, 20, seed=1)
    assert len({seed.question for seed in drawn}) == 20
    assert drawn == cogito.draw_seeds(seeds, 20, seed=1) != cogito.draw_seeds(seeds, 20, seed=2)


GOOD = {"question": "q", "choices": ["dog", "cat"], "answer": "cat"}


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(GOOD),
        f"<think>{{maybe}} so</think>\n```json\n{json.dumps(GOOD, indent=2)}\n```\nDone.",
        f"{json.dumps({'draft': 1})} no, better: {json.dumps(GOOD)}",
    ],
)
def test_the_last_object_of_an_answer_is_read_whatever_stands_around_it(content: str) -> None:
    assert json_object(content, Draft).answer == "cat"


@pytest.mark.parametrize("content", ["", "none", json.dumps(GOOD)[:-5], "[1]", '{"question": "q"}', "{" * 5_000])
def test_what_holds_no_whole_object_is_refused(content: str) -> None:
    with pytest.raises(ValueError, match="JSON object"):
        json_object(content, Draft)


def test_letters_before_the_choices_are_taken_off_and_a_lettered_answer_is_resolved() -> None:
    draft = Draft(question=" q ", choices=["A. dog", "B. cat"], answer="B")
    assert draft.fields()["choices"] == ["dog", "cat"] and draft.fields()["answer"] == "cat"
    assert Draft(question="q", choices=["A major", "B major"], answer="B major").fields()["answer"] == "B major"
    for keys in (["A minor", "B major", "C diminished"], ["A flat", "B flat", "C sharp"]):
        assert Draft(question="q", choices=keys, answer="B").fields()["choices"] == keys
    assert chosen("<answer>(B)</answer>", ["dog", "cat"]) == 1
    assert chosen("I cannot hear anything.", ["dog", "cat"]) is None


def summary_of(sft: int, rl: int) -> Summary:
    stages = [
        StageSummary(name="clips", models=[], rows_in=120, rows_out=100, dropped={"audio_missing": 20}),
        StageSummary(
            name="caption",
            models=["m"],
            rows_in=100,
            rows_out=100,
            dropped={},
            requests=300,
            prompt_tokens=100_000,
            completion_tokens=20_000,
            seconds=60.0,
            timed_tokens=120_000,
        ),
    ]
    shape = Shape(4)
    return Summary(
        pipeline="eaqa",
        written={"sft": sft, "rl": rl, "validation": 0},
        stages=stages,
        histograms={},
        domains={},
        models=["m"],
        answer_places=dict(shape.places),
        answer_places_p=1.0,
        drafted_places={},
        drafted_places_p=1.0,
        answer_length_ranks={},
        answer_length_p=1.0,
        warnings=[],
    )


def test_the_plan_scales_what_was_measured_to_the_paper_s_size(tmp_path: Path) -> None:
    config = read_config(write_run(tmp_path))
    made = plan.make_plan(
        summary_of(50, 10), config, 75_862, 21_900, {"caption": Price(prompt=1.0, completion=2.0)}, {}
    )
    # 97,762 rows of either kind at 60 of 100 clips; SFT alone would need 151,724.
    assert made.clips == 162_937
    (stage,) = made.stages
    assert stage.requests == pytest.approx(3 * made.clips, abs=1)
    assert stage.prompt_tokens == pytest.approx(1_000 * made.clips, abs=1)
    assert made.cost == pytest.approx((1_000 + 2 * 200) * made.clips / 1e6, rel=1e-6)
    assert made.hours == pytest.approx(1_200 * made.clips / 2_000 / 3_600, rel=1e-6)
    faster = plan.make_plan(summary_of(50, 10), config, 75_862, 21_900, {}, {"caption": 20_000.0})
    assert faster.hours == pytest.approx(made.hours / 10)
    with pytest.raises(ConfigError, match="nothing to reckon from"):
        plan.make_plan(summary_of(0, 10), config, 1, 0, {}, {})


def test_the_page_is_one_file_that_fetches_nothing_and_escapes_what_models_wrote(tmp_path: Path) -> None:
    config = read_config(write_run(tmp_path, report_rows=3))
    row = {
        "id": "1",
        "audio": "b.wav",
        "question": "Is <script>alert(1)</script> heard?",
        "choices": ["yes", "no"],
        "answer": "no",
        "think": "First <seg>0.10, 0.60</seg> & then <b>nothing</b>.",
        "events": [{"label": '"><img src=x>', "start": 0.0, "end": 0.5}],
        "meta": {"domain": "sound", "provenance": []},
    }
    (tmp_path / "sft.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "rl.jsonl").write_text("")
    write_report(summary_of(1, 0), tmp_path, config, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "alert(1)" in page and "<script>alert" not in page and "<b>nothing" not in page and "<img" not in page
    assert 'data-start="0.1" data-end="0.6">0.10 to 0.60 s</button>' in page
    assert page.count("data:audio/wav;base64,") == 1
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "http" not in page.replace("charset", "")


def test_the_summary_counts_a_request_once_however_many_rows_came_of_it(tmp_path: Path) -> None:
    step = {"stage": "question", "model": "m", "prompt": "p@1", "seed": 7, "time": "", "attempts": 1, "status": "ok"}
    step |= {"prompt_tokens": 100, "completion_tokens": 10, "reasoning_tokens": 0}
    rows = [sample(id=f"x-{number}", provenance=[step]) for number in range(3)]
    rows[2] = rows[2].drop("question", "refused", "")
    (tmp_path / "question-1/rows").mkdir(parents=True)
    lines = "".join(row.model_dump_json(exclude_defaults=True) + "\n" for row in rows)
    (tmp_path / "question-1/rows/00000.jsonl").write_text(lines)
    stages = [
        {"stage": "question", "folder": "question-1", "models": ["m"]},
        {"stage": "select", "folder": "", "models": []},
    ]
    (tmp_path / "select-1/inputs").mkdir(parents=True)
    (tmp_path / "select-1/inputs/run.json").write_text(
        json.dumps({"pipeline": "converters.synthesis.eaqa", "stages": stages})
    )
    limits = Config(input=Path(), audio_root=Path(), output=Path(), stages={}).limits()
    made = summarise(
        tmp_path / "select-1", {"near_duplicate": 1}, {"sft": 1, "rl": 0, "validation": 0}, Shape(4), limits
    )
    question, select = made.stages
    assert (question.requests, question.prompt_tokens, question.rows_out) == (1, 100, 2)
    assert question.dropped == {"refused": 1} and (select.rows_in, select.rows_out) == (2, 1)
