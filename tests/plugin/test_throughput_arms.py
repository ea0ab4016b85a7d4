"""eval.throughput on real vLLM: each arm samples what it should, and the engine does no work twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BATCH, CLIPS, TOKENS = 4, 2, 60


def test_resumed_trajectories_encode_each_clip_once_and_find_their_past_in_the_cache(
    tiny_model: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "eval.throughput", "--model", str(tiny_model), "--repeats", "1"]
    command += ["--batches", str(BATCH), "--segments", f"0,{CLIPS}", "--tokens", str(TOKENS)]
    command += ["--json", str(tmp_path / "t.json"), "--png", str(tmp_path / "t.png")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    document = json.loads((tmp_path / "t.json").read_text())
    counts = {(one["segments"], one["arm"]): one["counts"] for one in document["measurements"]}
    # 0 clips: the source alone in every arm. With clips: each of them once, however often a trajectory was resumed.
    assert counts[0, "ours"]["encoded_clips"] == BATCH
    assert (
        counts[CLIPS, "ours"]["encoded_clips"] == counts[CLIPS, "clips first"]["encoded_clips"] == BATCH * (1 + CLIPS)
    )
    assert counts[CLIPS, "limit"]["encoded_clips"] == BATCH
    assert counts[CLIPS, "limit"]["cached_tokens"] == 0
    # A resumed trajectory computes its clip and less than a block of what it had said before.
    resumed = counts[CLIPS, "ours"]["prefilled_tokens"] - counts[CLIPS, "limit"]["prefilled_tokens"]
    assert 0 < resumed < BATCH * CLIPS * (2 + 13 + 1 + 32)
    assert counts[CLIPS, "ours"]["cached_tokens"] > 3 * resumed
    assert all(count["engine_steps"] >= TOKENS and count["peak_memory_mib"] > 100 for count in counts.values())
    assert (tmp_path / "t.png").stat().st_size > 10_000
