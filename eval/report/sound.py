"""An audio file as the page needs it: how loud it is when, what it looks like, and a copy small enough to embed."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from echo_plugins.audio import SAMPLING_RATE, AudioError, load

NUM_PEAKS = 600  # columns of the waveform; a wide page has about 800 pixels for it
NUM_MELS = 64
WINDOW_SAMPLES = 400  # 25 ms, as the model's own features
HOP_SAMPLES = 160  # 10 ms, and more in long audio: no more than MAX_FRAMES columns
MAX_FRAMES = 900
DYNAMIC_RANGE = 8.0  # natural logarithms of power, 35 dB; below it the picture is blank


@dataclass(frozen=True)
class Sound:
    """`peaks`: NUM_PEAKS bytes, loudest sample of each column, 255 the loudest of all. `flac` and `mel` (a PNG, low
    pitches at the bottom, bright is loud) only where the sound is embedded. `problem`: why there is nothing."""

    seconds: float = 0.0
    peaks: bytes = b""
    flac: bytes | None = None
    mel: bytes | None = None
    problem: str | None = None


def read_sound(path: Path, embed: bool) -> Sound:
    """Decode `path` as the model heard it: mono, 16 kHz. Never raises for what the file is."""
    try:
        waveform = load(path)
    except AudioError as error:
        return Sound(problem=str(error))
    return Sound(
        len(waveform) / SAMPLING_RATE,
        peaks(waveform),
        encode(waveform) if embed else None,
        mel_picture(waveform) if embed else None,
    )


def peaks(waveform: np.ndarray) -> bytes:
    """The loudest sample in each of NUM_PEAKS equal stretches, of 255."""
    bounds = np.linspace(0, len(waveform), NUM_PEAKS, endpoint=False).astype(int)
    loudest = np.maximum.reduceat(np.abs(waveform), bounds)
    return np.rint(255 * loudest / max(float(loudest.max()), 1e-9)).astype(np.uint8).tobytes()


def encode(waveform: np.ndarray) -> bytes:
    """FLAC: half of a WAV, every browser plays it, and a clip starts at the very sample that the model heard."""
    stream = io.BytesIO()
    soundfile.write(stream, np.clip(waveform, -1, 1), SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return stream.getvalue()


def mel_picture(waveform: np.ndarray) -> bytes:
    """The log-mel spectrogram as a grey PNG, NUM_MELS high."""
    from PIL import Image

    hop = max(HOP_SAMPLES, -(-len(waveform) // MAX_FRAMES))
    padded = np.pad(waveform, WINDOW_SAMPLES // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW_SAMPLES)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(WINDOW_SAMPLES))) ** 2
    mel = np.log(power @ _mel_filters().T + 1e-10)
    level = np.clip((mel - mel.max()) / DYNAMIC_RANGE + 1, 0, 1)
    pixels = np.rint(255 * level.T[::-1]).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _mel_filters() -> np.ndarray:
    """Triangles of equal width on the mel scale (HTK's formula), shape (NUM_MELS, WINDOW_SAMPLES // 2 + 1)."""
    top = 2595 * np.log10(1 + SAMPLING_RATE / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, NUM_MELS + 2) / 2595) - 1)
    hertz = np.linspace(0, SAMPLING_RATE / 2, WINDOW_SAMPLES // 2 + 1)
    below, centre, above = (corners[shift : shift + NUM_MELS, None] for shift in range(3))
    # Low filters are narrower than a bin of the transform: each takes at least its nearest one.
    width = SAMPLING_RATE / WINDOW_SAMPLES
    rising, falling = (
        (hertz - below) / np.maximum(centre - below, width),
        (above - hertz) / np.maximum(above - centre, width),
    )
    return np.clip(np.minimum(rising, falling), 0, None)
