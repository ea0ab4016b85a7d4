"""The whole recipe on this machine, killed once in each of its stages and given the same command again.

One run serves all tests here: it is the slowest thing in the repository.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGE_SECONDS = 900  # minutes more than QUICK=1 takes from one kill to the next; a hang must end
RUN_SECONDS = 900
pytestmark = pytest.mark.timeout(3600)


@dataclass
class Chain:
    """A run of recipes/tiny-cpu, and what was seen at each kill."""

    run_dir: Path
    output: str = ""
    logs: dict[str, str] = field(default_factory=dict)  # stage that was killed -> what that start had printed
    steps: dict[str, int] = field(default_factory=dict)  # stage -> step of the checkpoint that was there at the kill
    predictions: dict[Path, bytes] = field(default_factory=dict)  # whole rows that were there at the kill

    def manifest(self, stage: str) -> dict:
        return json.loads((self.run_dir / "manifests" / f"{stage}.json").read_text())


def is_under_way(chain: Chain, stage: str) -> bool:
    path = chain.run_dir / "manifests" / f"{stage}.json"
    return path.exists() and not json.loads(path.read_text())["finished"]


def data_is_being_made(chain: Chain) -> bool:
    return is_under_way(chain, "data") and any((chain.run_dir / "data").glob("*"))


def sft_has_a_checkpoint(chain: Chain) -> bool:
    states = list((chain.run_dir / "sft").glob("checkpoint-*/trainer_state.json"))
    if states and is_under_way(chain, "sft"):
        chain.steps["sft"] = max(int(state.parent.name.removeprefix("checkpoint-")) for state in states)
        return True
    return False


def rl_has_a_checkpoint(chain: Chain) -> bool:
    tracker = chain.run_dir / "rl" / "latest_checkpointed_iteration.txt"
    if tracker.exists() and is_under_way(chain, "rl"):
        chain.steps["rl"] = int(tracker.read_text())
        return True
    return False


def merge_is_at_work(chain: Chain) -> bool:
    return is_under_way(chain, "merge") and not (chain.run_dir / "merged").exists()


def inference_has_rows(chain: Chain) -> bool:
    if not is_under_way(chain, "infer"):
        return False
    chain.predictions = {
        path: path.read_bytes().rpartition(b"\n")[0] for path in (chain.run_dir / "eval").glob("*/*.jsonl")
    }
    return any(chain.predictions.values())


KILL_WHEN: dict[str, Callable[[Chain], bool]] = {
    "data": data_is_being_made,
    "sft": sft_has_a_checkpoint,
    "rl": rl_has_a_checkpoint,
    "merge": merge_is_at_work,
    "infer": inference_has_rows,
}


def environment_of(chain: Chain) -> dict[str, str]:
    settings = {"QUICK": "1", "RL_STEPS": "3", "RL_WORKERS": "1", "RL_BYPASS": "False", "DATA_TEST_ROWS": "48"}
    return {**os.environ, **settings, "PYTHON": sys.executable, "RUN_DIR": str(chain.run_dir)}


def start(chain: Chain, log: Path) -> subprocess.Popen[bytes]:
    command = ["bash", str(ROOT / "recipes" / "tiny-cpu" / "run.sh")]
    environment = environment_of(chain)
    with log.open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)


def processes_of(run_dir: Path) -> list[str]:
    """Command lines of live processes that were started for this run, whoever their parent is now."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
            if f"RUN_DIR={run_dir}\0".encode() in environment:
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:120])
        except OSError:
            continue
    return found


def kill_half_way(chain: Chain, stage: str, log: Path) -> None:
    process = start(chain, log)
    deadline = time.monotonic() + STAGE_SECONDS
    try:
        while not KILL_WHEN[stage](chain):
            assert process.poll() is None, f"the run ended before {stage} could be killed:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"{stage} did not get half-way in time:\n{log.read_text()[-3000:]}"
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    chain.logs[stage] = log.read_text()


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    folder = tmp_path_factory.mktemp("chain")
    chain = Chain(folder / "run")
    for stage in KILL_WHEN:
        kill_half_way(chain, stage, folder / f"{stage}.log")
    process = start(chain, folder / "last.log")
    try:
        process.wait(RUN_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    chain.output = (folder / "last.log").read_text()
    assert process.returncode == 0, chain.output[-5000:]
    yield chain


def test_every_stage_finishes_after_one_kill_and_none_is_done_twice(chain: Chain) -> None:
    starts = {stage: chain.manifest(stage)["starts"] for stage in KILL_WHEN}
    assert starts == dict.fromkeys(KILL_WHEN, 2)
    assert not list(chain.run_dir.glob("*.old-*"))
    assert all(chain.manifest(stage)["finished"] for stage in starts)
    for stage in ("data", "sft", "rl", "merge"):
        assert f"== {stage}: finished before" in chain.output


def test_sft_goes_on_from_its_checkpoint(chain: Chain) -> None:
    lines = [json.loads(line) for line in (chain.run_dir / "sft" / "logging.jsonl").open()]
    steps = [int(line["global_step/max_steps"].partition("/")[0]) for line in lines if "loss" in line]
    again = [step for step, count in Counter(steps).items() if count > 1]
    assert steps[-1] > chain.steps["sft"]
    assert all(step > chain.steps["sft"] for step in again), "a step before the checkpoint was trained twice"


def test_rl_goes_on_from_its_checkpoint(chain: Chain) -> None:
    files = sorted((chain.run_dir / "rl").glob("metrics*.jsonl"))
    before, after = ([json.loads(line)["step"] for line in path.open()] for path in files)
    assert max(before) >= chain.steps["rl"] > 0
    assert min(step for step in after if step > 0) in (chain.steps["rl"], chain.steps["rl"] + 1)
    assert max(after) > chain.steps["rl"]


def test_rollouts_and_actor_give_sampled_tokens_the_same_probability(chain: Chain) -> None:
    """Clips are rare here, since QUICK=1 trains too little to name segments: test_verl_run.py has a model that does."""
    rows = [json.loads(line)["data"] for path in (chain.run_dir / "rl").glob("metrics*.jsonl") for line in path.open()]
    steps = [row for row in rows if "segments/inserted" in row]
    assert steps
    assert max(step["training/rollout_probs_diff_max"] for step in steps) < 1e-4


def test_inference_repeats_and_loses_no_row(chain: Chain) -> None:
    expected = [json.loads(line)["id"] for line in (chain.run_dir / "data" / "soundscapes" / "test.jsonl").open()]
    for folder in ("gate", "eval"):
        path = chain.run_dir / folder / "test" / "interleaved.jsonl"
        assert Counter(json.loads(line)["id"] for line in path.open()) == Counter(expected), folder
    for path, before in chain.predictions.items():
        assert path.read_bytes().startswith(before), f"{path.name}: rows from before the kill were written again"


def test_the_closing_table_says_what_was_run_and_what_it_scores(chain: Chain) -> None:
    summary = json.loads((chain.run_dir / "summary.json").read_text())
    assert [stage["stage"] for stage in summary["stages"]] == ["data", "sft", "gate", "rl", "merge", "infer"]
    assert [score["name"] for score in summary["scores"]] == ["test, SFT", "test"], "before RL, and after it"
    for score in summary["scores"]:
        low, high = score["official_interval"]
        assert 0 <= low <= score["official_accuracy"] <= high <= 1
    assert "hits (95%)" in (chain.run_dir / "gate" / "grounding.txt").read_text()
    assert "Scores" in chain.output and str(chain.run_dir) in chain.output


def test_the_terminal_shows_little_and_the_logs_all(chain: Chain) -> None:
    assert sum(len(log.splitlines()) for log in (*chain.logs.values(), chain.output)) < 80 + 12 * len(KILL_WHEN)
    for stage in KILL_WHEN:
        assert (chain.run_dir / "logs" / f"{stage}.log").stat().st_size > 0
    assert "global_step/max_steps" in (chain.run_dir / "logs" / "sft.log").read_text()


def test_a_run_that_moved_has_its_rows_written_again_and_nothing_else(chain: Chain) -> None:
    moved = chain.run_dir.with_name("moved")
    chain.run_dir.rename(moved)
    try:
        again = run_again(chain, RUN_DIR=str(moved))
        assert again.returncode == 0, again.stderr
        assert "data: makes what is missing" in again.stderr and again.stderr.count("skipped") == 5
        assert str(moved) in (moved / "data" / "sft-rows.jsonl").read_text()
    finally:
        moved.rename(chain.run_dir)
    assert "data: makes what is missing" in run_again(chain).stderr


def run_again(chain: Chain, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "recipes" / "tiny-cpu" / "run.sh")],
        capture_output=True,
        text=True,
        env=environment_of(chain) | settings,
        check=False,
    )


def test_a_finished_run_has_nothing_left_to_do_and_leaves_no_process(chain: Chain) -> None:
    before = {path: path.stat().st_mtime_ns for path in chain.run_dir.glob("manifests/*.json")}
    again = run_again(chain)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("skipped") == 6
    assert before == {path: path.stat().st_mtime_ns for path in chain.run_dir.glob("manifests/*.json")}
    assert not processes_of(chain.run_dir)
