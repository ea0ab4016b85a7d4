"""The rows of stage 1 before training: a clip that the model would hear only the beginning of ends the run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
import pytest
import soundfile

from echo_plugins.for_swift.dataset import BadRowError, Lengths, sort_out
from echo_plugins.model import QWEN2_5_OMNI


def row(*audios: str) -> bytes:
    question, answer = {"role": "user", "content": "<audio>" * len(audios)}, {"role": "assistant", "content": "a"}
    return orjson.dumps({"messages": [question, answer], "audios": audios}, option=orjson.OPT_APPEND_NEWLINE)


def test_a_clip_over_the_window_is_named_with_file_and_line(tmp_path: Path) -> None:
    for seconds in (30, 45):
        soundfile.write(tmp_path / f"{seconds}.flac", np.zeros(seconds * 16_000), 16_000)
    rows = tmp_path / "rows.jsonl"
    lengths = Lengths(QWEN2_5_OMNI, 160, lambda text: [], 30.0)
    rows.write_bytes(row(str(tmp_path / "30.flac"), f"{tmp_path / '45.flac'}#t=40.00,41.00") * 2)
    assert sort_out(rows, tmp_path / "fit", tmp_path / "overlong", lengths, 4_096) == (2, 0)
    rows.write_bytes(row(str(tmp_path / "30.flac")) + row(str(tmp_path / "45.flac")))
    with pytest.raises(BadRowError, match=r"rows\.jsonl, line 2: .*45\.flac: 45\.0 s; the model hears the first 30 s"):
        sort_out(rows, tmp_path / "fit", tmp_path / "overlong", lengths, 4_096)


@pytest.mark.parametrize("clip", ["own", "random", "silent"])
def test_another_sound_behind_the_tags_needs_rows_with_clips(tmp_path: Path, clip: str) -> None:
    whole = tmp_path / "1.flac"
    soundfile.write(whole, np.zeros(16_000), 16_000)
    rows, fit = tmp_path / "rows.jsonl", tmp_path / "fit"
    options = fit, tmp_path / "overlong", Lengths(QWEN2_5_OMNI, 160, lambda text: []), 4_096, clip
    rows.write_bytes(row(str(whole)))
    if clip == "own":
        assert sort_out(rows, *options) == (1, 0)
    else:
        with pytest.raises(BadRowError, match=rf"SFT_CLIP={clip}: no row of .*rows\.jsonl .*SFT_MODE=interleaved"):
            sort_out(rows, *options)
        assert not fit.exists()
    rows.write_bytes(row(str(whole)) + row(str(whole), f"{whole}#t=0.00,0.50"))
    assert sort_out(rows, *options) == (2, 0)
