"""What recipes/cogito-tiny starts from, made of the soundscapes: labelled clips and a config for the synthesis, and a
small benchmark in MMAR's official layout, rubrics included.

    python recipes/cogito-tiny/make_inputs.py --soundscapes DIR --url URL --synthesis DIR --benchmark DIR
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from rule_server import question_about

# One that a listener who reasons would meet each; the judge of rule_server.py reads the words after the colon.
CRITERIA = {
    "Hears": "hear, heard, listen",
    "Goes back": "go back, again, <seg>",
    "Weighs choices": " or the ",
    "Rules out": "others, other place",
    "Concludes": "fits best, so the",
}
STAGES = ("question", "think", "judge", "silence", "difficulty")


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def clips_of(file: Path) -> list[dict[str, Any]]:
    """The clips of a split, each once, with its events."""
    found = {row["audio"]: row for row in rows_of(file)}
    return [
        {"id": Path(audio).stem, **{name: row[name] for name in ("audio", "events", "duration")}}
        for audio, row in found.items()
    ]


def benchmark_rows(clips: list[dict[str, Any]], num_rows: int) -> list[dict[str, Any]]:
    """Items of MMAR-meta.jsonl about unseen clips, asked as the synthesis asks."""
    rubric = [
        {"name": name, "scoring_point": f"The reasoning has one of the words: {words}", "choices": [0, 1]}
        for name, words in CRITERIA.items()
    ]
    rows = []
    for clip in clips:
        events = [(event["label"], event["start"], event["end"]) for event in clip["events"]]
        for place, _ in enumerate(events):
            question = question_about(events, place)
            shift = len(rows) % 4  # the answer stands at each place equally often
            rows.append(
                {
                    "id": f"{clip['id']}-{place}",
                    "audio_path": clip["audio"],
                    "question": question["question"],
                    "choices": [*question["choices"][shift:], *question["choices"][:shift]],
                    "answer": question["answer"],
                    "modality": "sound",
                    "category": "Perception Layer",
                    "sub-category": question["skill"],
                    "thinking": f"The sounds are {', then '.join(label for label, _, _ in events)}.",
                    "rubric": rubric,
                }
            )
    return rows[:num_rows]


def config(url: str, audio_root: Path) -> dict[str, Any]:
    """Thresholds for short clips and questions of one form; a real run takes those of examples/cogito.yaml."""
    endpoint = {"url": url, "model": "rules", "concurrency": 8, "timeout_seconds": 30}
    return {
        "input": "clips.jsonl",
        "audio_root": str(audio_root),
        "output": "run",
        "stages": dict.fromkeys(STAGES, endpoint),
        "filters": {
            "min_segments": 0,
            "near_duplicate": {"scope": "recording"},
            "max_length_ratio": 4.0,
            "max_clip_share": 1.0,
            "max_silence_accuracy": 0.75,
            "min_pass_rate": 0.1,
        },
        "silence_seconds": 0.5,
        "samples_per_question": 4,
        "executor": {"kind": "local", "workers": 2},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the inputs of recipes/cogito-tiny from soundscapes.")
    parser.add_argument("--soundscapes", type=Path, required=True, help="folder that soundscapes.py made")
    parser.add_argument("--url", required=True, help="of the server that plays the models")
    parser.add_argument("--synthesis", type=Path, required=True, help="folder for clips.jsonl and cogito.yaml")
    parser.add_argument("--benchmark", type=Path, required=True, help="folder for MMAR-meta.jsonl and audio/")
    parser.add_argument("--benchmark-rows", type=int, default=100)
    args = parser.parse_args()
    write_rows(args.synthesis / "clips.jsonl", clips_of(args.soundscapes / "sft.jsonl"))
    settings = config(args.url, args.soundscapes.resolve())
    (args.synthesis / "cogito.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    rows = benchmark_rows(clips_of(args.soundscapes / "test.jsonl"), args.benchmark_rows)
    write_rows(args.benchmark / "MMAR-meta.jsonl", rows)
    for audio in sorted({row["audio_path"] for row in rows}):
        (args.benchmark / audio).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(args.soundscapes / audio, args.benchmark / audio)


if __name__ == "__main__":
    main()
