"""Fingerprints of sound that survive re-encoding, resampling, gain and cutting: are two clips of the same recording?

Haitsma and Kalker, "A highly robust audio fingerprinting system" (2002): 32 bits a frame, each the sign of an energy
difference along frequency and time. Changes of speed or pitch are not survived. Chromaprint does the same job, but
needs a shared library that no Python package brings.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence

import numpy as np
import soxr

from echo_plugins.audio import SAMPLING_RATE

RATE = 5_000  # hertz; the bands end at 2,000
WINDOW = 1_856  # samples: 0.37 s
HOP = 58  # samples between the frames of an index: 11.6 ms
SPARSE = 8  # a query has every 8th of them, and a bit compares frames this far apart
MIN_FRAMES = 16  # of a query, 1.5 s: fewer say too little
MAX_BIT_ERRORS = 0.25  # of the bits in common; two other sounds differ in half of them
CANDIDATES = 20  # places that are looked at, those with the most equal frames first
_SILENT = 1e-8  # of a frame's mean square: below it the signs are rounding
_EDGES = np.geomspace(300.0, 2_000.0, 34)  # hertz
_FFT = 2_048


def dense(waveform: np.ndarray) -> np.ndarray:
    """A fingerprint with a word a frame, for an index; 0 is a silent frame."""
    return _words(waveform, HOP, SPARSE)


def sparse(waveform: np.ndarray) -> str:
    """A fingerprint to look for, as text: 43 bytes a second before base64."""
    return base64.b64encode(_words(waveform, HOP * SPARSE, 1).astype("<u4").tobytes()).decode()


def _words(waveform: np.ndarray, hop: int, lag: int) -> np.ndarray:
    """The words of frames `hop` samples apart; each compares a frame with the one `lag` frames before it."""
    waveform = soxr.resample(waveform, SAMPLING_RATE, RATE, quality="HQ")
    if len(waveform) < WINDOW + hop * lag:
        return np.zeros(0, np.uint32)
    taper = np.hanning(WINDOW).astype(np.float32)
    edges = np.searchsorted(np.fft.rfftfreq(_FFT, 1 / RATE), _EDGES)
    frames = np.lib.stride_tricks.sliding_window_view(waveform, WINDOW)[::hop]
    bands = np.empty((len(frames), len(edges) - 1), np.float32)
    for place in range(0, len(frames), 256):  # a clip of 300 s has 26,000 frames
        power = np.abs(np.fft.rfft(frames[place : place + 256] * taper, _FFT)) ** 2
        bands[place : place + 256] = np.add.reduceat(power, edges, axis=1)[:, :-1]
    loudness = np.array([np.mean(np.square(frame)) for frame in frames])
    slopes = bands[:, :-1] - bands[:, 1:]
    bits = (slopes[lag:] - slopes[:-lag]) > 0
    words = np.packbits(bits, axis=1).view(">u4").astype(np.uint32)[:, 0]
    words[loudness[lag:] < _SILENT] = 0
    return words


class SoundIndex:
    """Sounds by their fingerprints. `find` names the one that a clip is a part of, or that is a part of the clip."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._prints: list[np.ndarray] = []
        self._sorted: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: str, waveform: np.ndarray) -> None:
        self._names.append(name)
        self._prints.append(dense(waveform))
        self._sorted = None

    def find(self, text: str) -> str | None:
        """`text`: what `sparse` gives. None where nothing matches, and for a clip too short or silent to tell."""
        words = np.frombuffer(base64.b64decode(text), "<u4")
        if np.count_nonzero(words) < MIN_FRAMES or not self._names:
            return None
        for number, start in self._candidates(words):
            if self._bit_errors(words, self._prints[number], start) <= MAX_BIT_ERRORS:
                return self._names[number]
        return None

    def _candidates(self, words: np.ndarray) -> Sequence[tuple[int, int]]:
        """(sound, frame of it where the query would start), those that most words agree on first."""
        if self._sorted is None:
            values = np.concatenate(self._prints)
            owners = np.repeat(np.arange(len(self._prints)), [len(each) for each in self._prints])
            places = np.concatenate([np.arange(len(each)) for each in self._prints])
            order = np.argsort(values, kind="stable")
            self._sorted = values[order], owners[order], places[order]
        values, owners, places = self._sorted
        votes: Counter[tuple[int, int]] = Counter()
        first, last = np.searchsorted(values, words, "left"), np.searchsorted(values, words, "right")
        for frame, (low, high) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            if words[frame] and high - low <= 1_000:  # a word of more frames tells nothing
                starts = places[low:high] - SPARSE * frame
                votes.update(zip(owners[low:high].tolist(), starts.tolist(), strict=True))
        return [place for place, _ in votes.most_common(CANDIDATES)]

    @staticmethod
    def _bit_errors(words: np.ndarray, other: np.ndarray, start: int) -> float:
        """The share of bits that differ in the frames that both have and that are not silent; 1 where they are few."""
        frames = start + SPARSE * np.arange(len(words))
        inside = (frames >= 0) & (frames < len(other))
        mine, theirs = words[inside], other[frames[inside]]
        heard = (mine != 0) & (theirs != 0)
        if np.count_nonzero(heard) < MIN_FRAMES:
            return 1.0
        return float(np.bitwise_count(mine[heard] ^ theirs[heard]).mean()) / 32
