"""Other sounds in the place of a clip."""

import numpy as np
import pytest

from echo_plugins.relisten.control import CLIP_SOUNDS, PART_SECONDS, ClipSound, clip_sound

RATE = 16_000
WAVEFORM = np.arange(3 * RATE, dtype=np.float32)


def clip(sound: ClipSound, name: str = "row-1", start: int = RATE, end: int = 2 * RATE) -> np.ndarray:
    return clip_sound(WAVEFORM, start, end, RATE, sound, name)


@pytest.mark.parametrize("sound", CLIP_SOUNDS)
def test_each_sound_has_the_length_of_the_clip_and_is_the_same_for_the_same_row(sound: ClipSound) -> None:
    assert clip(sound).shape == (RATE,) and clip(sound).dtype == WAVEFORM.dtype
    assert np.array_equal(clip(sound), clip(sound))
    assert clip(sound, start=0, end=len(WAVEFORM)).shape == WAVEFORM.shape


def test_each_is_what_its_name_says() -> None:
    own = clip("own")
    assert np.array_equal(own, WAVEFORM[RATE : 2 * RATE]) and not clip("silent").any()
    random = clip("random")
    assert np.array_equal(np.diff(random), np.ones(RATE - 1)), "one piece of the same sound"
    assert random[0] != own[0] and not np.array_equal(random, clip("random", "row-2"))
    shuffled = clip("shuffled")
    assert np.array_equal(np.sort(shuffled), own) and not np.array_equal(shuffled, own)
    assert (np.diff(shuffled) == 1).mean() > 1 - 2 / (PART_SECONDS * RATE), "in whole parts"
