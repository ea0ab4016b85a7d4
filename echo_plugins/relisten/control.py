"""Other sounds in the place of a clip, to find out whether what is heard matters. Pure functions of a waveform."""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

import numpy as np

ClipSound = Literal["own", "random", "silent", "shuffled"]
"""What stands behind a tag: the piece that the tag names; a piece of the same length from a random place of the same
sound; silence; or the piece itself in parts of PART_SECONDS in random order: its timbre is kept, its course is not."""

CLIP_SOUNDS: tuple[ClipSound, ...] = get_args(ClipSound)
PART_SECONDS = 0.05


def clip_sound(
    waveform: np.ndarray, start_sample: int, end_sample: int, sampling_rate: int, sound: ClipSound, name: str
) -> np.ndarray:
    """The samples of `waveform` (samples,) that are put behind a tag, as many as it names.

    `name` identifies the row: the same name, place and sound give the same samples.
    """
    own = waveform[start_sample:end_sample]
    if sound == "own":
        return own
    if sound == "silent":
        return np.zeros_like(own)
    seed = hashlib.sha256(f"{name}\0{start_sample}\0{end_sample}".encode()).digest()[:8]
    rng = np.random.default_rng(int.from_bytes(seed, "big"))
    if sound == "random":
        start = int(rng.integers(len(waveform) - len(own) + 1))
        return waveform[start : start + len(own)]
    parts = np.array_split(own, max(1, round(len(own) / (PART_SECONDS * sampling_rate))))
    return np.concatenate([parts[place] for place in rng.permutation(len(parts))])
