"""Rows and sounds to one HTML file that needs nothing else: no network, no server, no other file but linked audio.

Whatever a model or a data set wrote reaches the page in two ways only: through Jinja's autoescape, or as JSON (escaped
by Jinja's `tojson`) that page.js puts in place with textContent. The policy of the page allows no script but page.js.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .runs import Row, RowSet, Run, Tally
from .sound import Sound, read_sound

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Pair:
    """A set of rows of the first run, and the same of the second where there are two: None where one has none."""

    name: str
    sides: list[RowSet | None]

    @property
    def breakdowns(self) -> dict[str, list[tuple[str, list[Tally | None]]]]:
        """field -> (label, a tally a run)."""
        found: dict[str, dict[str, list[Tally | None]]] = {}
        for place, side in enumerate(self.sides):
            for field, tallies in (side.breakdowns if side else {}).items():
                for each in tallies:
                    empty: list[Tally | None] = [None] * len(self.sides)
                    found.setdefault(field, {}).setdefault(each.label, empty)[place] = each
        return {field: list(groups.items()) for field, groups in found.items()}


def pair_sets(runs: Sequence[Run]) -> list[Pair]:
    """The sets of the runs side by side, by name; of two runs with one set each, those two."""
    if len(runs) == 2 and all(len(run.sets) == 1 for run in runs):
        sets = [run.sets[0] for run in runs]
        return [Pair(sets[0].name if sets[0].name == sets[1].name else "predictions", list(sets))]
    names = dict.fromkeys(each.name for run in runs for each in run.sets)
    return [Pair(name, [next((s for s in run.sets if s.name == name), None) for run in runs]) for name in names]


def sounds_of(pairs: Sequence[Pair], embed: int) -> dict[Path, bool]:
    """Every audio file that a row names, and whether the page carries it: where one of the first `embed` rows of a set
    names it."""
    sides = [side for pair in pairs for side in pair.sides if side]
    carried = {row.audio for side in sides for row in side.rows[:embed]}
    return {row.audio: row.audio in carried for side in sides for row in side.rows if row.audio}


def read_sounds(files: Mapping[Path, bool], advance: Callable[[], None]) -> dict[Path, Sound]:
    """Decode what `sounds_of` found; `advance` is called after each."""
    sounds: dict[Path, Sound] = {}
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for path, sound in zip(files, threads.map(read_sound, files, files.values()), strict=True):
            sounds[path] = sound
            advance()
    return sounds


def link(audio: Path, folder: Path) -> str:
    """What the page in `folder` plays `audio` by: a relative path where it is below, which moves with the folder."""
    if audio.is_relative_to(folder):
        return "./" + quote(os.fsencode(audio.relative_to(folder)))
    return audio.as_uri()


def render(runs: Sequence[Run], sounds: Mapping[Path, Sound], pairs: Sequence[Pair], title: str, folder: Path) -> str:
    """The page, to be written in `folder`."""
    places = {path: place for place, path in enumerate(sounds)}
    data = {
        "runs": [run.label for run in runs],
        "sets": [
            {"name": pair.name, "sides": [side and [_row(row, places) for row in side.rows] for side in pair.sides]}
            for pair in pairs
        ],
        "sounds": [
            {
                "seconds": sound.seconds,
                "peaks": _base64(sound.peaks),
                "embedded": sound.flac is not None,
                "href": link(path.resolve(), folder.resolve()),
                "problem": sound.problem,
            }
            for path, sound in sounds.items()
        ],
        "curves": [[asdict(curve) for curve in run.curves] for run in runs],
    }
    script, style = ((HERE / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    page = environment.get_template("page.html").render(
        title=title,
        runs=runs,
        pairs=pairs,
        data=data,
        embedded=[
            (place, _base64(sound.flac), _base64(sound.mel))
            for place, sound in enumerate(sounds.values())
            if sound.flac and sound.mel
        ],
        script=script,
        style=style,
        script_hash=_hash(script),
        style_hash=_hash(style),
        percent=lambda share: math.floor(1000 * share + 0.5) / 10,
    )
    # A model can sample half of a surrogate pair, and no file can hold it as text. In the data it is an escape.
    return page.encode("utf-8", "replace").decode("utf-8")


def _row(row: Row, places: Mapping[Path, int]) -> dict[str, Any]:
    """A row as page.js reads it."""
    plain = asdict(row)
    audio = plain.pop("audio")
    return plain | {"sound": None if audio is None else places[audio]}


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _hash(content: str) -> str:
    """As the page's Content-Security-Policy names an inline script or style."""
    return "sha256-" + _base64(hashlib.sha256(content.encode()).digest())
