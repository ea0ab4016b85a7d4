"""Which rows are asked, in which order of choices; and engines side by side, with engines that die (made up here)."""

import asyncio
import base64
import contextlib
import io
import itertools
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from misbehaving_server import Answer, Failure, Request, misbehaving_server, refusal
from typer.testing import CliRunner

from echo_plugins.audio import AudioError
from echo_plugins.relisten.trajectory import StopReason
from eval import infer
from eval.benchmarks import AUDIO_QA, BenchmarkError, Item, audio_problem, load_questions
from eval.engine import EngineDied, Outcome, Question, Sampling, load_sound
from eval.fleet import MAX_DEATHS, Start, Task, answer_all
from eval.infer import Selection, prediction, question_of, read_ids, shuffled
from eval.predictions import read_rows, run_path
from eval.score import grade_all, load, totals


def write_manifest(folder: Path, num_rows: int) -> Path:
    rows = ({"id": f"r{n}", "audio": "a.wav", "question": "?", "choices": list("wxyz")} for n in range(num_rows))
    file = folder / "m.jsonl"
    file.write_text("".join(json.dumps(row | {"answer": "w"}) + "\n" for row in rows))
    return file


def test_rows_are_selected_by_id_and_then_by_number(tmp_path: Path) -> None:
    questions = load_questions(AUDIO_QA, write_manifest(tmp_path, 9))
    some = Selection(questions, frozenset({"r7", "r2", "r5"}), 2)
    assert [item.id for item in some] == [item.id for item in some] == ["r2", "r5"]  # read anew each time
    with pytest.raises(BenchmarkError, match=r"1 of the ids are not in .*m\.jsonl: \['r9'\]"):
        Selection(questions, frozenset({"r1", "r9"}), None)


def test_ids_come_from_the_command_line_from_lines_or_from_rows(tmp_path: Path) -> None:
    assert read_ids(" a, b ,") == {"a", "b"}
    (tmp_path / "ids.txt").write_text("a\n\n b\n")
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "strict": null}\n{"id": 7}\n')
    assert read_ids(str(tmp_path / "ids.txt")) == {"a", "b"}
    assert read_ids(str(tmp_path / "rows.jsonl")) == {"a", "7"}


def test_shuffled_choices_depend_on_the_seed_and_the_row_and_can_be_traced_back(tmp_path: Path) -> None:
    item, other = list(load_questions(AUDIO_QA, write_manifest(tmp_path, 2)))
    assert shuffled(item, None) is item
    orders = Counter(shuffled(item, seed).choices for seed in range(200))
    assert len(orders) == 24 and shuffled(item, 3) == shuffled(item, 3)
    assert [shuffled(item, seed).choices for seed in range(9)] != [shuffled(other, seed).choices for seed in range(9)]
    shown = shuffled(item, 3)
    assert shown.row["choices"] == list(shown.choices) and item.row["choices"] == list("wxyz")
    assert tuple(item.choices[place] for place in shown.row["choices_order"]) == shown.choices


def test_a_question_of_several_clips_names_them_all() -> None:
    item = Item("a", ("x.wav", "y.wav", "z.wav"), "?", ("b",), "b", {"id": "a"})
    question = question_of(item, Path("/data"))
    assert (question.audio, question.more_audio) == ("x.wav", ("y.wav", "z.wav"))


def test_links_out_of_the_root_are_heard_when_told_so(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    soundfile.write(tmp_path / "1f.wav", np.zeros(16_000), 16_000)
    (root / "a.wav").symlink_to("../1f.wav")
    item = Item("a", ("a.wav", "a.wav"), "?", ("b",), "b", {"id": "a"})
    assert "--follow-links" in str(audio_problem(item, root)) and audio_problem(item, root, follow_links=True) is None
    with pytest.raises(AudioError, match="leaves the audio root"):
        load_sound(question_of(item, root))
    waveform, _ = load_sound(question_of(item, root, follow_links=True))
    assert len(waveform) > 32_000


def test_a_forced_answer_is_marked_in_its_row() -> None:
    item = Item("a", ("x.wav",), "?", ("b", "c"), "b", {"id": "a"})
    outcome = Outcome("<think>so</think><answer>b</answer>", (), StopReason.LENGTH, None, 9, 1, 0.1, forced_answer=True)
    assert prediction(item, outcome)["forced_answer"] is True
    assert "forced_answer" not in prediction(item, Outcome("", (), StopReason.LENGTH, None, 9, 1, 0.1))


def test_runs_can_be_added_later() -> None:
    files = [run_path(Path("d/out.jsonl"), 7 + number, number).as_posix() for number in range(3)]
    assert files == ["d/out.jsonl", "d/out.seed8.jsonl", "d/out.seed9.jsonl"]


class Answering:
    """eval.infer as a user calls it, with a scripted engine in the place of vLLM."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, num_rows: int = 10) -> None:
        self.folder, self.asked = folder, []
        self.output = folder / "out" / "p.jsonl"
        self.manifest = write_manifest(folder, num_rows)
        (folder / "a.wav").write_bytes(b"")
        self.model = folder / "model"
        self.model.mkdir()
        for name in ("config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json"):
            (self.model / name).write_text(json.dumps({"of": name, "_name_or_path": "/here"}))
        (self.model / "chat_template.jinja").write_text("{{ messages }}")
        (self.model / "model.safetensors").write_bytes(bytes(range(256)) * 900)

        @contextlib.asynccontextmanager
        async def start(_: Any) -> AsyncIterator[Any]:
            yield self

        monkeypatch.setattr(infer, "running_engine", start)

    async def answer(self, question: Question, sampling: Sampling) -> Outcome:
        self.asked.append(question.id)
        if question.id == "r3" and self.asked.count("r3") == 1:
            return Outcome("", (), StopReason.ERROR, "a hiccup", 0, 0, 0.0)
        return Outcome(
            f"<think>x</think><answer>{'wx'[len(question.id) > 2]}</answer>", (), StopReason.ANSWERED, None, 1, 0, 0.1
        )

    def run(self, *words: str) -> Any:
        self.asked.clear()
        options = ["--model", str(self.model), "--output", str(self.output), "--audio-qa", str(self.manifest)]
        options += ["--audio-root", str(self.folder), "--device", "cpu", "--max-num-seqs", "1"]
        return CliRunner().invoke(infer.app, [*options, *words])

    def total(self) -> int:
        return totals(predicted := load(self.output), grade_all(predicted))["total"]


def test_another_selection_never_makes_the_denominator_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering = Answering(tmp_path, monkeypatch)
    assert answering.run("--ids", "r1,r2").exit_code == 0 and answering.total() == 2
    assert answering.run("--max-rows", "4").exit_code == 0 and answering.total() == 4
    assert answering.asked == ["r0", "r3"]
    assert answering.run().exit_code == 0 and answering.total() == 10
    for words in (["--ids", "r1"], ["--max-rows", "3"], ["--ids", "r3", "--retry-errors"]):
        result = answering.run(*words)
        assert result.exit_code == 0 and "10 rows were asked of it in all" in result.output
        assert answering.total() == 10
    assert answering.run("--ids", "r1,r2", "--overwrite").exit_code == 0 and answering.total() == 2


@pytest.mark.parametrize(
    "file",
    [
        *("config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json"),
        *("chat_template.jinja", "model.safetensors", "additional_chat_templates/tools.jinja", "merges.txt"),
    ],
)
def test_rows_of_a_model_that_was_changed_are_not_mixed_with_the_earlier_ones(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering = Answering(tmp_path, monkeypatch)
    assert answering.run("--max-rows", "2").exit_code == 0
    changed = answering.model / file
    changed.parent.mkdir(exist_ok=True)
    changed.write_bytes((changed.read_bytes() if changed.exists() else b"") + b" 1")
    result = answering.run()
    assert result.exit_code == 1 and "was made by another run (model_fingerprint" in result.output
    assert answering.asked == []


def test_a_run_goes_on_where_it_was_moved_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it: model, questions, sound and predictions, as when a disk is mounted elsewhere."""
    (tmp_path / "old").mkdir()
    answering = Answering(tmp_path / "old", monkeypatch)
    assert answering.run("--max-rows", "2").exit_code == 0
    (tmp_path / "old").rename(tmp_path / "new")
    for name in ("folder", "output", "manifest", "model"):
        setattr(answering, name, tmp_path / "new" / getattr(answering, name).relative_to(tmp_path / "old"))
    config = answering.model / "config.json"
    config.write_text(config.read_text().replace("/here", "/there"))  # where transformers loaded it from
    (answering.model / "trainer_state.json").write_text("{}")
    assert answering.total() == 2, "the questions are found beside the predictions"
    result = answering.run()
    assert result.exit_code == 0, result.output
    assert len(answering.asked) == 8 and answering.total() == 10


def write_sound(file: Path, seconds: float = 1.0) -> None:
    soundfile.write(file, np.linspace(-0.5, 0.5, round(seconds * 16_000)), 16_000, subtype="PCM_16")


class Hosted:
    """eval.infer against a real HTTP server that answers as a script says."""

    def __init__(self, folder: Path, url: str, num_rows: int = 6) -> None:
        self.manifest, self.output, self.url = write_manifest(folder, num_rows), folder / "p.jsonl", url
        self.folder = folder
        write_sound(folder / "a.wav")

    def run(self, *words: str) -> Any:
        options = ["--api-url", self.url, "--api-model", "m", "--output", str(self.output)]
        options += ["--audio-qa", str(self.manifest), "--audio-root", str(self.folder), "--api-concurrency", "2"]
        return CliRunner().invoke(infer.app, [*options, *words])

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for _, row in read_rows(self.output)}


def says(content: str, **message: Any) -> Answer:
    return Answer(content, message=message)


def test_a_hosted_model_answers_into_the_same_files(tmp_path: Path) -> None:
    contents = iter(["<think>a</think><answer>w</answer>", "w", "<think>so</think>\n(A) w", "x", ""])

    def script(request: Request) -> Any:
        if request.number == 3:
            return refusal("no")
        return says(next(contents, ""), reasoning_content="hm" if request.number == 2 else None)

    with misbehaving_server(script) as server:
        hosted = Hosted(tmp_path, server.url)
        result = hosted.run("--api-concurrency", "1", "--api-arg", "max_tokens=null", "--api-arg", "top_k=1")
        assert result.exit_code == 0, result.output
        [first, *_] = server.requests
    [message] = first.body["messages"]
    clip, text = message["content"]
    assert first.body["top_k"] == 1 and "max_tokens" not in first.body and first.body["temperature"] == 0.7
    assert text["text"].startswith("?\n(A) w\n(B) x") and "<seg>" not in text["text"]
    content = base64.b64decode(clip["input_audio"]["data"])
    heard, rate = soundfile.read(io.BytesIO(content), dtype="float32")
    assert clip["input_audio"]["format"] == "wav" and rate == 16_000 and len(heard) == 16_000
    rows = hosted.rows()
    assert [rows[f"r{n}"]["answer_prediction"] for n in range(6)] == ["w", "w", "", "(A) w", "x", ""]
    assert rows["r1"]["thinking_prediction"] == "hm" and rows["r3"]["thinking_prediction"] == "so"
    assert [rows[f"r{n}"]["stop_reason"] for n in (0, 2, 5)] == ["answered", "answered", "length"]
    assert "refused" in rows["r2"]["error"] and rows["r0"]["num_tokens"] == 5
    summary = totals(predicted := load(hosted.output), grade_all(predicted))
    assert (summary["total"], summary["unanswered"], summary["strict_accuracy"]) == (6, 2, 0.5)
    sidecar = json.loads((tmp_path / "p.run.json").read_text())
    assert sidecar["identity"]["api"]["model"] == "m" and sidecar["identity"]["sampling"]["mode"] == "plain"


def test_a_hosted_model_that_was_stopped_is_paid_for_once(tmp_path: Path) -> None:
    with misbehaving_server(lambda request: says("w") if request.number < 4 else Failure(401)) as server:
        hosted = Hosted(tmp_path, server.url)
        result = hosted.run("--api-concurrency", "1")
        assert result.exit_code == 1 and "401" in result.output and len(hosted.rows()) == 3
    with misbehaving_server(lambda request: says("w")) as server:
        hosted.url = server.url
        assert "was made by another run (api.url" in hosted.run().output
        sidecar = tmp_path / "p.run.json"
        first = json.loads(sidecar.read_text())["identity"]["api"]["url"]
        sidecar.write_text(sidecar.read_text().replace(first, server.url))
        kept = hosted.output.read_bytes().splitlines(keepends=True)
        hosted.output.write_bytes(b"".join(kept[:2]))  # killed between the journal and the row
        assert hosted.run().exit_code == 0
        assert len(server.requests) == 3 and len(hosted.rows()) == 6
        assert hosted.run("--overwrite").exit_code == 0 and len(server.requests) == 9


def test_a_row_that_a_hosted_model_cannot_be_asked_is_one_row(tmp_path: Path) -> None:
    with misbehaving_server(lambda request: says("w")) as server:
        hosted = Hosted(tmp_path, server.url)
        lines = hosted.manifest.read_text().splitlines()
        lines[1] = lines[1].replace('"?"', '"lone \\ud800"')
        lines[2] = lines[2].replace("a.wav", "none.wav")
        hosted.manifest.write_text("\n".join(lines) + "\n")
        result = hosted.run()
        assert result.exit_code == 0, result.output
    errors = {row_id: row["error"] for row_id, row in hosted.rows().items() if row["stop_reason"] == "error"}
    assert errors.keys() == {"r1", "r2"} and "lone surrogate" in errors["r1"] and "no such file" in errors["r2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mode", "interleaved"], "an API cannot listen again"),
        (["--model", "x"], "give --model, or --api-url and --api-model"),
        (["--api-arg", "top_k"], "is not KEY=JSON"),
    ],
)
def test_wrong_usage_of_an_api_is_said(tmp_path: Path, words: list[str], message: str) -> None:
    result = Hosted(tmp_path, "http://127.0.0.1:1/v1").run(*words)
    assert result.exit_code == 2 and message in " ".join(result.output.replace("\u2502", " ").split())


class Fleet:
    """Rows that are counted as they are taken and finished, and engines that die when `dies` says so."""

    def __init__(self, num_rows: int, dies: Callable[[Question], bool] = lambda _: False) -> None:
        self.num_rows, self.dies = num_rows, dies
        self.outcomes: list[tuple[str, Outcome]] = []
        self.said: list[str] = []
        self.num_taken = self.most_in_flight = self.num_deaths = 0

    def tasks(self) -> Iterator[Task]:
        for number in range(self.num_rows):
            self.num_taken += 1
            self.most_in_flight = max(self.most_in_flight, self.num_taken - len(self.outcomes))
            question = Question(f"r{number}", "/", "a.wav", "?", ("b", "c"))
            yield Task(0, Item(question.id, ("a.wav",), "?", ("b", "c"), "b", {}), question, Sampling())

    def engine(self, seconds: float = 0.0) -> Start:
        fleet = self

        class Engine:
            alive, num_answered = True, 0

            async def answer(self, question: Question, sampling: Sampling) -> Outcome:
                await asyncio.sleep(seconds)
                if self.alive and fleet.dies(question):
                    self.alive = False
                    fleet.num_deaths += 1
                if not self.alive:
                    raise EngineDied("killed")
                return Outcome(str(seconds), (), StopReason.ANSWERED, None, 1, 0, seconds)

        @contextlib.asynccontextmanager
        async def start() -> AsyncIterator[Engine]:
            yield Engine()

        return start

    def run(self, *starts: Start, num_lanes: int = 4, can_restart: bool = True) -> Counter[str]:
        """Answer every row, and say how often each was finished."""

        def finish(task: Task, outcome: Outcome) -> None:
            self.outcomes.append((task.item.id, outcome))

        async def answer() -> None:
            running = answer_all(self.tasks(), starts, num_lanes, finish, self.said.append, can_restart=can_restart)
            await asyncio.wait_for(running, timeout=20)

        asyncio.run(answer())
        return Counter(row_id for row_id, _ in self.outcomes)

    def all_once(self) -> dict[str, int]:
        return {f"r{number}": 1 for number in range(self.num_rows)}


def test_a_slow_engine_holds_nobody_back() -> None:
    fleet = Fleet(60)
    assert fleet.run(fleet.engine(0.001), fleet.engine(0.05), num_lanes=2) == fleet.all_once()
    by_engine = Counter(outcome.response for _, outcome in fleet.outcomes)
    assert by_engine["0.001"] > 3 * by_engine["0.05"] > 0


def test_only_the_rows_in_flight_are_held() -> None:
    fleet = Fleet(5000)
    assert fleet.run(fleet.engine(), fleet.engine(), num_lanes=3) == fleet.all_once()
    assert fleet.most_in_flight <= 2 * 3


def test_the_rows_of_a_dead_engine_are_done_and_none_twice() -> None:
    chance = random.Random(1)
    for number in range(30):
        left = [number % 4 + 1]

        def dies(_: Question, left: list[int] = left) -> bool:
            left[0] -= (now := left[0] > 0 and chance.random() < 0.05)
            return now

        fleet = Fleet(50, dies)
        counts = fleet.run(fleet.engine(0.0005), fleet.engine(0.001))
        assert counts == fleet.all_once()


def test_one_death_costs_no_row_its_answer() -> None:
    dead: list[str] = []
    fleet = Fleet(40, lambda question: question.id == "r9" and not dead and not dead.append("r9"))
    assert fleet.run(fleet.engine(0.001)) == fleet.all_once()
    assert fleet.num_deaths == 1 and all(outcome.error is None for _, outcome in fleet.outcomes)
    assert any("another engine is started" in line for line in fleet.said)


def test_a_row_that_kills_engines_is_the_only_one_that_is_lost() -> None:
    fleet = Fleet(40, lambda question: question.id in ("r9", "r11"))
    assert fleet.run(fleet.engine(0.001), fleet.engine(0.001)) == fleet.all_once()
    failed = {row_id: outcome for row_id, outcome in fleet.outcomes if outcome.error is not None}
    assert failed.keys() == {"r9", "r11"} and fleet.num_deaths <= 2 * MAX_DEATHS
    assert all(outcome.stop_reason is StopReason.ERROR for outcome in failed.values())
    assert "3 engines died with this row, the last one with it alone: killed" in (failed["r9"].error or "")


def test_an_engine_that_cannot_be_replaced_leaves_its_rows_to_the_others() -> None:
    dead: list[str] = []
    fleet = Fleet(40, lambda question: question.id == "r9" and not dead and not dead.append("r9"))
    assert fleet.run(fleet.engine(0.001), fleet.engine(0.001), can_restart=False) == fleet.all_once()


def test_the_last_engine_that_dies_ends_the_run_and_what_was_done_is_done() -> None:
    fleet = Fleet(40, lambda question: question.id == "r9")
    with pytest.raises(EngineDied, match="killed"):
        fleet.run(fleet.engine(0.001), can_restart=False)
    assert 0 < len(fleet.outcomes) < 40 and max(Counter(row for row, _ in fleet.outcomes).values()) == 1


def test_an_engine_that_finds_no_place_is_not_waited_for() -> None:
    @contextlib.asynccontextmanager
    async def never() -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield None

    fleet = Fleet(20)
    assert fleet.run(never, fleet.engine(0.001)) == fleet.all_once()


def test_an_engine_that_does_not_start_is_left_out_unless_it_is_the_last() -> None:
    @contextlib.asynccontextmanager
    async def broken() -> AsyncIterator[Any]:
        raise EngineDied("no memory")
        yield None

    fleet = Fleet(20)
    assert fleet.run(broken, fleet.engine(0.001)) == fleet.all_once()
    assert "== engine 0 is given up: no memory" in fleet.said
    with pytest.raises(EngineDied, match="no memory"):
        fleet.run(broken, broken)


def test_an_engine_that_dies_while_it_starts_is_started_again_where_others_run() -> None:
    fleet = Fleet(40)
    attempts = itertools.count()

    @contextlib.asynccontextmanager
    async def second_time() -> AsyncIterator[Any]:
        await asyncio.sleep(0.01)
        if next(attempts) == 0:
            raise EngineDied("the node is gone")
        async with fleet.engine(0.001)() as engine:
            yield engine

    assert fleet.run(fleet.engine(0.01), second_time) == fleet.all_once()
    assert next(attempts) == 2 and any(outcome.response == "0.001" for _, outcome in fleet.outcomes)


def test_a_mistake_of_ours_ends_the_run_as_itself() -> None:
    def mistake(_: Question) -> bool:
        raise TypeError("a mistake")

    fleet = Fleet(20, mistake)
    with pytest.raises(TypeError, match="a mistake"):
        fleet.run(fleet.engine(), fleet.engine())
