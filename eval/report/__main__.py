"""python -m eval.report RUN [RUN_B] -o report.html"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..curves import labels_for
from ..predictions import write_whole
from ..progress import progress
from .page import pair_sets, read_sounds, render, sounds_of
from .runs import read_run

_console = Console(stderr=True, highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN [RUN_B]", help="Predictions of eval.infer, a recipe's run, or its rl/. Or two."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page.")] = Path("report.html"),
    embed: Annotated[
        int,
        typer.Option(min=0, help="Carry the sound of the first N rows of each set in the page; link that of the rest."),
    ] = 24,
    rows: Annotated[int, typer.Option(min=1, help="At most so many rows of each set.")] = 1000,
    audio_root: Annotated[
        Path | None, typer.Option(help="The folder that audio paths start from, where it is not the recorded one.")
    ] = None,
    audio_qa: Annotated[
        list[Path] | None,
        typer.Option(
            help="An AudioQA manifest with more about the rows of RL: choices, events, meta. Can be repeated."
        ),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
) -> None:
    """Make one page to look at and listen to what a model did: every trajectory with its waveform, the segments that it
    named, what it heard again, and what it said. With two runs, side by side, joined by id.

    The page works from a disk, without network. Half a minute of embedded sound takes about 1 MB.
    """
    if len(runs) > 2:
        raise typer.BadParameter(f"one run, or two to compare, not {len(runs)}", param_hint="RUN")
    try:
        found = []
        for run, label in zip(runs, labels_for(runs), strict=True):
            wanted = frozenset(row.key for each in found for rows_of in each.sets for row in rows_of.rows)
            found.append(read_run(run, label, rows, audio_root, audio_qa or [], wanted))
        pairs = pair_sets(found)
        files = sounds_of(pairs, embed)
        with progress(_console, "reading audio", "files", len(files)) as advance:
            sounds = read_sounds(files, advance)
        page = render(found, sounds, pairs, title or " against ".join(run.label for run in found), output.parent)
        write_whole(output, page)
    except (ValueError, OSError) as error:
        _console.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from None
    shown = [row for each in found for rows_of in each.sets for row in rows_of.rows]
    silent = [row for row in shown if row.audio is None or sounds[row.audio].problem]
    if silent:
        problem = silent[0].audio_problem or (silent[0].audio and sounds[silent[0].audio].problem)
        _console.print(f"== {len(silent)} of {len(shown)} rows are without sound. The first: {problem}", markup=False)
    carried = sum(sound.flac is not None for sound in sounds.values())
    _console.print(
        f"{output}: {len(shown)} rows, {carried} of {len(sounds)} sounds in the page, "
        f"{output.stat().st_size / 1e6:.1f} MB. Open it in a browser",
        markup=False,
    )


if __name__ == "__main__":
    app()
