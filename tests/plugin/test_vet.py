"""Questions that are there already, vetted for RL by a model that hears the clip."""

import json
from pathlib import Path

import synthesis_run
from misbehaving_server import misbehaving_server
from rule_models import RuleModels
from synthesis_run import rows, write_config, written


def test_what_takes_listening_goes_to_rl_and_the_rest_says_why_not(soundscapes: Path, tmp_path: Path) -> None:
    given = rows(soundscapes / "sft.jsonl")[:40]
    lettered, wordy, *others = given
    lettered |= {"answer": "A"}
    wordy |= {"choices": [wordy["answer"], "a", "b"]}
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [lettered, wordy, *others]))
    models = RuleModels()
    with misbehaving_server(models) as server:
        config = write_config(tmp_path, "vet", server.url, soundscapes)
        done = synthesis_run.run("vet", config)
    assert done.returncode == 0, done.stderr

    made = written(tmp_path / "run")
    assert made["sft"] == made["validation"] == []
    reasons = {row["id"]: row["reason"] for row in made["dropped"]}
    assert reasons[lettered["id"]] == "answer_not_a_choice"
    assert reasons[wordy["id"]] == "number_of_choices"
    assert {"not_audible", "not_unambiguous", "not_nontrivial"} <= set(reasons.values())
    assert sorted([*reasons, *(row["id"] for row in made["rl"])]) == sorted(row["id"] for row in given)
    assert models.kinds == {"vet": len(others)}
    assert len({row["audio"] for row in made["rl"]}) < len(made["rl"])  # a clip may have several questions

    source = {row["id"]: row for row in given}
    for row in made["rl"]:
        old = source[row["id"]]
        assert (row["question"], row["answer"], set(row["choices"])) == (
            old["question"],
            old["answer"],
            set(old["choices"]),
        )
        assert "think" not in row
        (step,) = row["meta"]["provenance"]
        assert step["prompt"].startswith("vet/question@")
