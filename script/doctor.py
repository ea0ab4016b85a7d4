"""Says whether this machine and its environment can run Echo: versions against the pins, and what a deviation breaks.

    .venv/bin/python script/doctor.py [--json] [--recipe NAME]

With --recipe it also runs `bash recipes/NAME/run.sh check`: what the stages of that recipe need, and what is wrong with
its settings, rows and places on this machine (script/preflight.py). Exit 0 when every pin of setup.cfg is met and the
plug-ins can be imported, 1 when not, 2 when only the recipe's check refuses.
"""

import argparse
import configparser
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "script"))

from preflight import Machine, read_machine, torch_cuda  # noqa: E402
from preflight import installed as installed_version  # noqa: E402

STAMP = ROOT / ".venv" / "echo-setup"  # script/setup.sh writes `cpu ...` or `gpu ...` into it
PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)(\[[\w,]+\])?==(?P<version>\S+)(\s*#\s*(?P<reason>.*))?$")
LOCKED = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>\S+)", re.MULTILINE)
SHM_BYTES = 10**10  # below it Ray may put its object store on the disk, see preflight.shared_memory
FORMATS = {"WAV": "wav", "FLAC": "flac", "MP3": "mp3", "OGG": "ogg"}  # libsndfile's name -> the usual ending


@dataclass(frozen=True)
class Package:
    """A pin of setup.cfg beside what is installed; `installed` is None where nothing is."""

    name: str
    pinned: str
    installed: str | None
    reason: str

    @property
    def as_pinned(self) -> bool:
        return same_version(self.installed, self.pinned)


class State(StrEnum):
    OK = "ok"
    LOW = "low"  # a warning: it may be enough
    OFF = "off"  # something will fail: exit 1
    FACT = ""


@dataclass(frozen=True)
class Check:
    """One fact of the machine or the environment."""

    name: str
    value: str
    state: State = State.FACT


def same_version(installed: str | None, pinned: str) -> bool:
    """A local build such as 2.11.0+cpu counts as 2.11.0."""
    return installed is not None and installed.partition("+")[0] == pinned


def pins(setup_cfg: str, kind: str) -> dict[str, tuple[str, str]]:
    """name -> (version, reason) of the base, of every extra but the other kind's, from the text of setup.cfg."""
    config = configparser.ConfigParser()
    config.read_string(setup_cfg)
    blocks = [config["options"]["install_requires"]]
    blocks += [text for extra, text in config["options.extras_require"].items() if extra not in {"cpu", "gpu"} - {kind}]
    found: dict[str, tuple[str, str]] = {}
    for line in "\n".join(blocks).split("\n"):
        if match := PIN.match(line.strip()):
            found.setdefault(match["name"], (match["version"], match["reason"] or ""))
    return found


def packages(kind: str) -> list[Package]:
    found = pins((ROOT / "setup.cfg").read_text(), kind)
    return [Package(name, version, installed_version(name), reason) for name, (version, reason) in found.items()]


def other_deviations(kind: str) -> list[str]:
    """`name installed (locked version)` for what the lock pins below setup.cfg and the environment has otherwise."""
    chosen = {name.lower() for name in pins((ROOT / "setup.cfg").read_text(), kind)}
    cpu_build = (installed_version("torch") or "").endswith("+cpu")  # it comes without NVIDIA's libraries
    deviations = []
    for match in LOCKED.finditer((ROOT / "requirements" / f"{kind}.lock").read_text()):
        installed = installed_version(match["name"])
        if match["name"] in chosen or (cpu_build and match["name"].startswith(("nvidia-", "cuda-", "triton"))):
            continue
        if not same_version(installed, match["version"]):
            deviations.append(f"{match['name']} {installed or 'missing'} (locked {match['version']})")
    return deviations


def gibibytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.0f} GiB"


def machine_checks(machine: Machine) -> list[Check]:
    names = [name for name, _ in machine.gpus]
    checks = [
        Check("memory", f"{gibibytes(machine.memory)}, {gibibytes(machine.memory_free)} of it free"),
        Check("/dev/shm", f"{gibibytes(machine.shm)} free", State.OK if machine.shm > SHM_BYTES else State.LOW),
        Check("disk", f"{gibibytes(machine.disk_free)} free"),
        Check("GPUs", f"{len(names)} x {names[0]}, {gibibytes(machine.gpus[0][1])} each" if names else "none"),
    ]
    if machine.driver:
        built_for, runs = torch_cuda(), machine.cuda
        old = bool(runs and built_for and runs[0] < built_for[0])
        value = f"{machine.driver}, runs CUDA {version(runs)}; torch is built for CUDA {version(built_for)}"
        checks.append(Check("driver", value, State.OFF if old else State.OK))
    return checks


def version(cuda: tuple[int, int] | None) -> str:
    return f"{cuda[0]}.{cuda[1]}" if cuda else "unknown"


def audio_formats() -> Check:
    try:
        soundfile = importlib.import_module("soundfile")
    except (ImportError, OSError) as error:
        return Check("audio formats", f"soundfile cannot be imported: {error}", State.OFF)
    available = soundfile.available_formats()
    lacking = [ending for name, ending in FORMATS.items() if name not in available]
    version = soundfile.__libsndfile_version__
    if lacking:
        return Check("audio formats", f"libsndfile {version} cannot decode {', '.join(lacking)}", State.OFF)
    return Check("audio formats", f"libsndfile {version}: {', '.join(FORMATS.values())}", State.OK)


def plug_in(module: str) -> Check:
    """Imported in a process of its own, because verl hides the error of a plug-in that cannot be imported."""
    environment = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", f"import {module}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    if done.returncode == 0:
        return Check(module, "can be imported", State.OK)
    return Check(module, (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1], State.OFF)


def entry_point() -> Check:
    """Without it the Ray workers of verl on other nodes do not know the Omni models."""
    name = "verl.plugins entry point"
    if any(point.value.startswith("echo_plugins") for point in metadata.entry_points(group="verl.plugins")):
        return Check(name, "found", State.OK)
    return Check(name, "missing: this project is not installed into this environment", State.OFF)


def checks(machine: Machine) -> list[Check]:
    python_ok = (3, 11) <= sys.version_info[:2] < (3, 13)
    return [
        Check("Python", f"{sys.version.split()[0]} in {sys.prefix}", State.OK if python_ok else State.OFF),
        Check("cores", str(len(os.sched_getaffinity(0)))),
        *machine_checks(machine),
        audio_formats(),
        Check("ffmpeg", shutil.which("ffmpeg") or "none (only needed to convert m4a and video files yourself)"),
        entry_point(),
        plug_in("echo_plugins.for_verl"),
        plug_in("echo_plugins.for_swift"),
    ]


def show(kind: str, found: list[Package], deviations: list[str], machine: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    colours = {State.OK: "green", State.LOW: "yellow", State.OFF: "red", State.FACT: "default"}
    table = Table("", "this machine", "", box=None)  # no frame: it is read in narrow terminals and in logs
    for check in machine:
        table.add_row(f"[{colours[check.state]}]{check.state}[/]", check.name, check.value)
    console.print(table, "")
    table = Table("", f"{kind} set", "pinned", "installed", "what a deviation touches", box=None)
    for package in found:
        state = State.OK if package.as_pinned else State.OFF
        reason = "" if package.as_pinned else package.reason
        mark = f"[{colours[state]}]{state}[/]"
        table.add_row(mark, package.name, package.pinned, package.installed or "missing", reason)
    console.print(table)
    if deviations:
        console.print(f"Below these, {len(deviations)} differ from {kind}.lock: {', '.join(deviations)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.add_argument("--recipe", help="a folder of recipes/, whose check is run too")
    arguments = parser.parse_args()
    recipe = ROOT / "recipes" / arguments.recipe / "run.sh" if arguments.recipe else None
    if recipe and not recipe.is_file():
        names = sorted(path.parent.name for path in ROOT.glob("recipes/*/run.sh"))
        parser.error(f"no recipe '{arguments.recipe}'; they are {', '.join(names)}")
    here = read_machine(ROOT)
    kind = STAMP.read_text().split()[0] if STAMP.exists() else "gpu" if here.gpus else "cpu"
    found, deviations, machine = packages(kind), other_deviations(kind), checks(here)
    off = [package.name for package in found if not package.as_pinned]
    off += [check.name for check in machine if check.state is State.OFF]
    if arguments.json:
        rows = [{**asdict(package), "as_pinned": package.as_pinned} for package in found]
        summary = {
            "kind": kind,
            "off": off,
            "packages": rows,
            "other": deviations,
            "checks": [asdict(check) for check in machine],
        }
        print(json.dumps(summary, indent=1))
    elif installed_version("rich"):
        show(kind, found, deviations, machine)
    if off:
        print(
            f"doctor: off: {', '.join(off)}. 'FORCE=1 bash script/setup.sh {kind}' sets the packages right.",
            file=sys.stderr,
        )
    sys.stdout.flush()
    environment = {"PYTHON": sys.executable, **os.environ}
    refused = subprocess.run(["bash", str(recipe), "check"], env=environment, check=False).returncode if recipe else 0
    return 1 if off else refused


if __name__ == "__main__":
    sys.exit(main())
