"""Both pipelines as a user runs them, against a real server that misbehaves, killed in every stage."""

import json
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import synthesis_run
from misbehaving_server import Behaviour, Failure, Request, misbehaving_server
from rule_models import RuleModels, text_of
from synthesis_run import ASKING, CONCURRENCY, clips_of, kill_when, rows, timeless, two_nodes, write_config, written

NUM_CLIPS = 8
TIMEOUT_SECONDS = 2.0  # of a server that hangs; an answer that comes later, on a busy machine, is paid for twice


def is_in(stage: str, run: Path) -> bool:
    """Whether a stage is in the middle: some of its answers are paid for; of one that asks nothing, it has begun."""
    if any((run / "journal" / stage).glob("*.jsonl")):
        lines = sum(file.read_bytes().count(b"\n") for file in (run / "journal" / stage).glob("*.jsonl"))
        return lines >= CONCURRENCY
    return stage in ("clips", "screen", "check", "select") and any(run.glob(f"{stage}-*/executor.json"))


def test_killed_in_every_stage_no_row_is_lost_or_twice_and_only_what_was_in_flight_is_paid_again(
    soundscapes: Path, tmp_path: Path
) -> None:
    stages = ("clips", "screen", "caption", "question", "check", "judge", "silence", "difficulty", "select")
    clips_of(soundscapes, tmp_path / "clips.jsonl", NUM_CLIPS)
    models = RuleModels(trouble_each=7, half_each=9, refuse_each=40, delay_seconds=0.03)
    with misbehaving_server(models) as server:
        whole = tmp_path / "whole"
        whole.mkdir()
        clips_of(soundscapes, whole / "clips.jsonl", NUM_CLIPS)
        config = write_config(whole, "eaqa", server.url, soundscapes, tasks=2, timeout_seconds=TIMEOUT_SECONDS)
        done = synthesis_run.run("eaqa", config)
        assert done.returncode == 0, done.stderr
        unpaid_twice = sum(count - 1 for count in models.paid.values())
        models.paid.clear()

        config = write_config(tmp_path, "eaqa", server.url, soundscapes, tasks=2, timeout_seconds=TIMEOUT_SECONDS)
        killed = [stage for stage in stages if kill_when(lambda s=stage: is_in(s, tmp_path / "run"), "eaqa", config)]
        assert set(killed) >= set(stages) & set(ASKING["eaqa"]), f"only {killed} could be killed"
        done = synthesis_run.run("eaqa", config)
        assert done.returncode == 0, done.stderr
    paid_again = sum(count - 1 for count in models.paid.values())
    assert unpaid_twice <= 2  # a connection that was reset in the middle of an answer
    assert paid_again <= CONCURRENCY * len(killed) + unpaid_twice

    before, after = written(whole / "run"), written(tmp_path / "run")
    ids = [row["id"] for name in after for row in after[name]]
    assert len(ids) == len(set(ids))
    assert {row["meta"]["clip"] for name in ("sft", "rl") for row in after[name]} | {
        row["audio"].split("/")[1].removesuffix(".wav") for row in after["dropped"]
    } == {row["id"] for row in rows(tmp_path / "clips.jsonl")}
    for name in before:
        assert [timeless(row) for row in after[name]] == [timeless(row) for row in before[name]], name
    assert after["sft"] and after["rl"]
    assert all("think" in row for row in after["sft"]) and not any("think" in row for row in after["rl"])


def test_on_two_ray_nodes_a_killed_run_and_a_lost_node_cost_only_what_was_in_flight(
    soundscapes: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    for folder in (whole, tmp_path):
        clips_of(soundscapes, folder / "clips.jsonl", NUM_CLIPS)
    models = RuleModels(trouble_each=7, half_each=9, refuse_each=40, delay_seconds=0.25)
    # silence and difficulty, which can be left out, are run no other way than judge.
    how: dict[str, Any] = {"asking": ("question", "think", "judge"), "timeout_seconds": TIMEOUT_SECONDS, "tasks": 2}
    with misbehaving_server(models) as server:
        local = synthesis_run.start("cogito", write_config(whole, "cogito", server.url, soundscapes, **how))
        with two_nodes() as nodes:
            _, said = local.communicate(timeout=120)
            assert local.returncode == 0, said
            paid_twice = sum(count - 1 for count in models.paid.values())
            models.paid.clear()

            ray = {"kind": "ray", "workers": 2, "options": {"mem_per_cpu_gb": 0.2}}
            config = write_config(tmp_path, "cogito", server.url, soundscapes, executor=ray, **how)
            for stage in ("question", "think"):
                in_the_middle = partial(is_in, stage, tmp_path / "run")
                assert kill_when(in_the_middle, "cogito", config, **nodes.environment), stage
            process = synthesis_run.start("cogito", config, **nodes.environment)
            while not nodes.second_works_on(tmp_path / "run" / "journal" / "judge", answers=1):
                assert process.poll() is None, "the second node was not seen at work on judge"
                time.sleep(0.02)
            nodes.lose_second()
            _, said = process.communicate(timeout=120)
            assert process.returncode == 0, said
    paid_again = sum(count - 1 for count in models.paid.values())
    assert paid_again <= CONCURRENCY * 3 + paid_twice
    before, after = written(whole / "run"), written(tmp_path / "run")
    for name in before:
        assert [timeless(row) for row in after[name]] == [timeless(row) for row in before[name]], name
    assert after["sft"] and after["rl"]


def test_a_server_that_is_down_costs_nothing_and_what_was_paid_is_kept_for_any_number_of_tasks(
    soundscapes: Path, tmp_path: Path
) -> None:
    clips_of(soundscapes, tmp_path / "clips.jsonl", NUM_CLIPS)
    models = RuleModels()
    up = False

    def script(request: Request) -> Behaviour:
        down = not up and "You check material" in text_of(request)
        return Failure(503) if down else models(request)

    with misbehaving_server(script) as server:
        config = write_config(tmp_path, "eaqa", server.url, soundscapes)
        refused = synthesis_run.run("eaqa", config)
        assert refused.returncode == 1
        assert "judge" in refused.stderr and "Give the same command again" in refused.stderr
        assert "Traceback" not in refused.stderr
        up = True
        (journal,) = (tmp_path / "run" / "journal" / "question").iterdir()
        with journal.open("ab") as lines:
            lines.write(b'{"key": "0123')  # what a kill leaves
        made = []
        for tasks in (3, 1):
            done = synthesis_run.run("eaqa", write_config(tmp_path, "eaqa", server.url, soundscapes, tasks=tasks))
            assert done.returncode == 0, done.stderr
            assert max(models.paid.values()) == 1
            found = written(tmp_path / "run")
            made.append({name: sorted(map(json.dumps, map(timeless, found[name]))) for name in found})
    assert made[0] == made[1] and made[0]["sft"]
    assert not [row for row in made[0]["dropped"] if "unanswered" in row]


def test_what_a_benchmark_holds_and_what_is_there_twice_is_out_before_it_is_paid_for(
    soundscapes: Path, tmp_path: Path
) -> None:
    clips_of(soundscapes, tmp_path / "clips.jsonl", NUM_CLIPS)
    clips = rows(tmp_path / "clips.jsonl")
    audio = tmp_path / "audio"
    audio.mkdir()
    for clip in clips:
        shutil.copy(soundscapes / clip["audio"], audio / f"{clip['id']}.wav")
        clip["audio"] = f"{clip['id']}.wav"
    shutil.copy(audio / clips[0]["audio"], audio / "held.wav")
    shutil.copy(audio / clips[2]["audio"], audio / "twin.wav")
    spot = {"url": "https://www.youtube.com/watch?v=abcdefghijk", "timestamp": "00:10,00:20"}
    clips[1]["meta"] = spot
    clips.append(clips[2] | {"id": "twin", "audio": "twin.wav"})
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(clip) + "\n" for clip in clips))
    asked = "Which sound comes first, if each is taken in the order of its start?"  # rule_models.draft
    benchmark = [{"id": "1", "audio": "held.wav", "question": "What is it?"}, {"id": "2", "question": asked, **spot}]
    (tmp_path / "mmar.json").write_text(json.dumps(benchmark))
    models = RuleModels()
    with misbehaving_server(models) as server:
        held = [{"file": "mmar.json", "audio_root": "audio"}]
        config = write_config(tmp_path, "eaqa", server.url, audio, benchmarks=held)
        done = synthesis_run.run("eaqa", config)
    assert done.returncode == 0, done.stderr
    dropped = {(row["id"], row["stage"], row["reason"]) for row in written(tmp_path / "run")["dropped"]}
    screened = {
        (clips[0]["id"], "screen", "contamination"),
        (clips[1]["id"], "screen", "contamination"),
        ("twin", "screen", "repeated_sound"),
    }
    assert {row for row in dropped if row[1] == "screen"} == screened
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    stages = {stage["name"]: stage for stage in summary["stages"]}
    assert stages["screen"]["dropped"] == {"contamination": 2, "repeated_sound": 1}
    assert models.kinds["caption"] == 3 * (NUM_CLIPS - 2)
    of_questions = stages["check"]["dropped"]["contamination"]
    assert of_questions > 0 and models.kinds["judge"] == NUM_CLIPS - 2 - of_questions
    assert not [body for body in models.paid if "You check material" in body and asked in body]


def test_what_the_pipeline_makes_is_taken_by_both_exporters(soundscapes: Path, tmp_path: Path) -> None:
    clips_of(soundscapes, tmp_path / "clips.jsonl", NUM_CLIPS)
    music, *others = rows(tmp_path / "clips.jsonl")
    clips = [music | {"meta": {"tempo": 96, "key": "A minor"}}, *others]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(clip) + "\n" for clip in clips))
    with misbehaving_server(RuleModels()) as server:
        config = write_config(tmp_path, "eaqa", server.url, soundscapes, validation_rows=2)
        done = synthesis_run.run("eaqa", config)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    made = written(run)
    assert {f"{music['id']}-basic", f"{music['id']}-expert"} <= {row["id"] for name in made for row in made[name]}
    assert len(made["validation"]) >= 2
    held = {row["audio"] for row in made["validation"]}
    assert not held & {row["audio"] for row in made["sft"] + made["rl"]}
    for module, target in (("converters.sft_jsonl", "sft-rows.jsonl"), ("converters.rl_parquet", "rl-rows.parquet")):
        command = [module, run / "sft.jsonl", run / target, "--audio-root", soundscapes]
        exported = synthesis_run.module(*map(str, command))
        assert exported.returncode == 0, exported.stderr
        assert "0 rejected" in exported.stderr
    row = json.loads((run / "sft-rows.jsonl").read_text().splitlines()[0])
    assert "<seg>" in row["messages"][1]["content"]
