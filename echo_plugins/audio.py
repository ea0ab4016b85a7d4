"""Audio in: decode, mix to mono, resample to 16 kHz, crop; and log-mel features without the padding nobody hears.

SFT, RL rollout and inference all read sound through here, so that a segment is the same samples in all three.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import soundfile
import soxr

from .model import SAMPLING_RATE, OmniFamily

_BLOCK_FRAMES = 1 << 20  # decoded at once: hours of sound cost no more memory than a minute
_UNKNOWN_FRAMES = 1 << 40  # what libsndfile says of a FLAC that was written to a pipe is about 2^63
_UNKNOWN_WAV_BYTES = 0x7FFF_0000  # from here on a WAV's length is what a program that streams puts there

# An MP3 decoder drops its delay and padding, at most this many frames. More missing than that is a cut file.
_TOLERATED_MISSING_FRAMES = 4 * 1152
# What may follow the last frame of an MP3 besides its tags. More than that is sound that was not read.
_MAX_MP3_TAIL_BYTES = 8_192
_ID3V1_BYTES = 128
_APE_FOOTER = struct.Struct("<8sIIII8x")  # APETAGEX, version, size with this footer, items, flags
_APE_HAS_HEADER = 1 << 31
# Below this share of the loudest channel's energy the mean of the channels has cancelled (antiphase stereo).
_CANCELLED_ENERGY = 1e-4

# The matrix product of a dozen frames or fewer takes another kernel, which rounds the last bit otherwise (measured).
_MIN_PADDED_FRAMES = 32

_MAX_OGG_PAGE_BYTES = 27 + 255 + 255 * 255  # header, lacing values, payload (RFC 3533)

_FRAGMENT = re.compile(r"(.+)#t=([0-9]+(?:\.[0-9]+)?),([0-9]+(?:\.[0-9]+)?)", re.DOTALL)

AudioSource = str | os.PathLike[str] | bytes | BinaryIO


class AudioError(ValueError):
    """This audio cannot be used; the message names the file, what was wrong, and the cure."""


class OutsideRootError(AudioError):
    """The path that a row names leaves the audio root."""


class TooLongError(AudioError):
    """More seconds than the caller takes."""


@dataclass(frozen=True)
class AudioInfo:
    """Counted by decoding the whole file, since headers of cut files lie. `num_frames` at the file's own rate."""

    duration_seconds: float
    num_frames: int
    sampling_rate: int
    num_channels: int

    @property
    def num_samples(self) -> int:
        """Length of what `load` returns: soxr rounds half up to whole samples at 16 kHz."""
        return (2 * self.num_frames * SAMPLING_RATE + self.sampling_rate) // (2 * self.sampling_rate)


def load(source: AudioSource, *, start_seconds: float | None = None, end_seconds: float | None = None) -> np.ndarray:
    """Decode `source` (a path, encoded bytes or a binary file) to mono float32 at 16 kHz, shape (num_samples,).

    With start and end in seconds the crop [start, end) of that waveform, equal bit for bit to cropping the whole.
    Raises AudioError for what is not audio, cut off, empty, or holds NaN or infinity.
    """
    if (start_seconds is None) != (end_seconds is None):
        raise ValueError("start_seconds and end_seconds go together")
    frames, rate = _decode(source)
    waveform = _mono(frames)
    if rate != SAMPLING_RATE:
        waveform = soxr.resample(waveform, rate, SAMPLING_RATE, quality="HQ").astype(np.float32, copy=False)
    if start_seconds is None or end_seconds is None:
        return np.ascontiguousarray(waveform)
    piece = crop(waveform, round(start_seconds * SAMPLING_RATE), round(end_seconds * SAMPLING_RATE))
    if not len(piece):
        raise AudioError(
            f"{_name(source)}: [{start_seconds}, {end_seconds}) s is outside its {len(waveform) / SAMPLING_RATE:.2f} s"
        )
    return piece


def load_fragment(reference: str) -> np.ndarray:
    """`load` of a path that may end in a media fragment, `clip.wav#t=1.00,2.50`."""
    path, bounds = parse_fragment(reference)
    return load(path) if bounds is None else load(path, start_seconds=bounds[0], end_seconds=bounds[1])


def probe(source: AudioSource, max_seconds: float = math.inf) -> AudioInfo:
    """Decode the whole of `source`, block by block, and say how long it is. Raises AudioError as `load` does, and
    TooLongError for more than `max_seconds`: at once where the header says so, else when so much is decoded."""
    num_frames, num_channels, rate = 0, 1, SAMPLING_RATE
    for block, block_rate in _blocks(source, max_seconds):
        num_frames, num_channels, rate = num_frames + len(block), block.shape[1], block_rate
    return AudioInfo(num_frames / rate, num_frames, rate, num_channels)


def too_long(name: str, seconds: float, max_seconds: float) -> str:
    """The words of a TooLongError."""
    return f"{name}: {seconds:.1f} s; the model hears the first {max_seconds:g} s, so cut it up"


def crop(waveform: np.ndarray, start_sample: int, end_sample: int) -> np.ndarray:
    """Samples [start_sample, end_sample), cut to the waveform: a view, nothing is copied."""
    return waveform[max(0, start_sample) : max(0, end_sample)]


def parse_fragment(reference: str) -> tuple[str, tuple[float, float] | None]:
    """`path#t=START,END` to (path, (start, end) in seconds); any other string to (itself, None)."""
    match = _FRAGMENT.fullmatch(reference)
    return (match[1], (float(match[2]), float(match[3]))) if match else (reference, None)


def format_fragment(path: str, start_seconds: float, end_seconds: float) -> str:
    """The reverse of `parse_fragment`, exact: rounded times would crop other samples than the rollout does."""
    return f"{path}#t={_exact(start_seconds)},{_exact(end_seconds)}"


def _exact(seconds: float) -> str:
    text = f"{seconds:.2f}"  # as most tags are written; numpy's search for the fewest digits takes ten times as long
    return text if float(text) == seconds else np.format_float_positional(seconds, min_digits=2)


def resolve_path(audio_root: str | os.PathLike[str], relative: str, follow_links: bool = False) -> Path:
    """The file that a row names, under `audio_root`. With `follow_links` it may be a link to a file elsewhere.

    Raises OutsideRootError when it leaves that root (`..`, an absolute path, a symbolic link), AudioError when it is
    not a file or cannot be a path at all.
    """
    root = Path(audio_root).resolve()
    try:
        named = Path(os.path.normpath(root / relative))
        path = named if follow_links else (root / relative).resolve()
        is_file = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, a loop of links, a NUL character
        raise AudioError(f"{relative[:80]!r} is no usable path: {error}") from error
    if not path.is_relative_to(root):
        cure = "give a path relative to --audio-root"
        if named.is_relative_to(root) and is_file:
            cure = f"it is a link to {path}. Give --follow-links, or a folder above both as --audio-root"
        raise OutsideRootError(f"{relative!r} leaves the audio root {root}: {cure}")
    if not is_file:
        hint = ""
        if "\\" in relative and (root / relative.replace("\\", "/")).is_file():
            hint = "; with / in the place of \\ there is one"
        elif named.is_symlink():
            hint = f"; it is a link to {named.readlink()}, which is not there"
        raise AudioError(f"{relative!r}: no such file under the audio root {root}{hint}")
    return path


def pad_to_longest(feature_extractor: Any, family: OmniFamily) -> Any:
    """Make a Whisper feature extractor pad to the longest clip of a call and not to its window (300 s in the public
    checkpoints: 15 MB and up to 2 s a clip). Valid frames are bit for bit those that the family's own processor makes
    of each clip by itself. A clip over the family's window raises AudioError, where stock code cuts it off without a
    word. Returns the same object, changed.
    """
    base = type(feature_extractor)
    if getattr(base, "pads_to_longest", False):
        return feature_extractor
    extract = _followed_by_silence if family.clip_end == "silence" else _each_by_itself

    def __call__(self: Any, raw_speech: Any, *args: Any, **kwargs: Any) -> Any:
        clips = raw_speech if isinstance(raw_speech, (list, tuple)) and np.ndim(raw_speech[0]) else [raw_speech]
        window, longest = family.window_samples(self), max(len(clip) for clip in clips)
        if longest > window:
            raise AudioError(
                f"a clip of {longest / SAMPLING_RATE:.1f} s: the model hears {window / SAMPLING_RATE:g} s at most and "
                "would not hear the rest. Cut it up."
            )
        return extract(partial(base.__call__, self), self, clips, *args, **kwargs)

    # The name is kept: save_pretrained writes it to the processor's configuration.
    members = {"__call__": __call__, "__module__": base.__module__, "pads_to_longest": True}
    feature_extractor.__class__ = type(base.__name__, (base,), members)
    return feature_extractor


def _followed_by_silence(stock: Callable[..., Any], extractor: Any, clips: Any, *args: Any, **kwargs: Any) -> Any:
    """All clips at once. The zeros after the longest are the half STFT window that its last frame still sees."""
    needed = max(len(clip) for clip in clips) + extractor.n_fft // 2
    needed = max(needed, _MIN_PADDED_FRAMES * extractor.hop_length)
    needed = math.ceil(needed / extractor.hop_length) * extractor.hop_length
    if kwargs.get("max_length") is None and needed < extractor.n_samples:
        kwargs["max_length"] = needed
    kwargs["return_attention_mask"] = True
    features = stock(clips, *args, **kwargs)
    valid = int(features["attention_mask"].sum(-1).max())
    features["attention_mask"] = features["attention_mask"][:, :valid]
    features["input_features"] = features["input_features"][..., :valid]
    return features


def _each_by_itself(
    stock: Callable[..., Any], extractor: Any, clips: Any, *args: Any, return_tensors: Any = None, **kwargs: Any
) -> Any:
    """One clip after the other, so that its end is mirrored whatever its neighbours are; the engine too is given clips
    one by one. Frames past a clip's end are 0."""
    kwargs |= {"padding": "longest", "truncation": False, "max_length": None, "return_attention_mask": True}
    made = [stock([clip], *args, return_tensors="np", **kwargs) for clip in clips]
    counts = [one["input_features"].shape[-1] for one in made]
    features = np.zeros((len(made), extractor.feature_size, max(counts)), np.float32)
    mask = np.zeros((len(made), max(counts)), np.int32)
    for row, (one, count) in enumerate(zip(made, counts, strict=True)):
        features[row, :, :count] = one["input_features"][0]
        mask[row, :count] = one["attention_mask"][0]
    batch = made[0]
    batch["input_features"], batch["attention_mask"] = features, mask
    return batch.convert_to_tensors(return_tensors)


def _name(source: AudioSource) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return getattr(source, "name", None) or "audio bytes"


def _decode(source: AudioSource) -> tuple[np.ndarray, int]:
    """All frames, float32 of shape (num_frames, channels), and the rate in hertz."""
    try:
        pairs = list(_blocks(source))
        blocks = [block for block, _ in pairs]
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks), pairs[0][1]
    except MemoryError as error:
        raise AudioError(f"{_name(source)}: too long to be held in memory as a whole") from error


def _blocks(source: AudioSource, max_seconds: float = math.inf) -> Iterator[tuple[np.ndarray, int]]:
    """(frames, rate) of one stretch after the other. A block is at least one, and is judged before the next is read."""
    name = _name(source)
    with contextlib.ExitStack() as owned:
        if isinstance(source, (str, os.PathLike)):
            try:
                stream: BinaryIO = owned.enter_context(Path(source).open("rb"))
            except OSError as error:
                raise AudioError(f"{name}: {error.strerror}") from error
        else:
            stream = io.BytesIO(source) if isinstance(source, (bytes, bytearray, memoryview)) else source
        _refuse_cut_wav(stream, name)
        _refuse_cut_container(stream, name)
        _refuse_cut_ogg(stream, name)
        start = stream.tell()
        stream_size = stream.seek(0, io.SEEK_END)
        stream.seek(start)
        try:
            with soundfile.SoundFile(cast(BinaryIO, _Seekable(stream))) as file:
                declared, rate, num_frames = file.frames, file.samplerate, 0
                if max_seconds < declared / rate and declared < _UNKNOWN_FRAMES:
                    raise TooLongError(too_long(name, declared / rate, max_seconds))
                # With a number of frames a file is read that does not say how many it has, or that cannot be sought in.
                while len(block := file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
                    num_frames += len(block)
                    if num_frames > max_seconds * rate:
                        raise TooLongError(too_long(name, num_frames / rate, max_seconds))
                    if not np.isfinite(block).all():
                        raise AudioError(f"{name}: holds NaN or infinite samples, one of which spoils every feature")
                    yield block, rate
                reached, kind = stream.tell(), file.format
                if kind == "MP3":
                    stream_size -= _tag_bytes(stream, stream_size)
        except AudioError:
            raise
        except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:
            text = error.error_string.strip() if isinstance(error, soundfile.LibsndfileError) else str(error)
            raise AudioError(f"{name}: not readable as audio ({text}). Convert it: ffmpeg -i IN OUT.flac") from error
    if not num_frames:
        raise AudioError(f"{name}: no samples in it")
    if num_frames < declared - _TOLERATED_MISSING_FRAMES and declared < _UNKNOWN_FRAMES:
        raise AudioError(
            f"{name}: cut off, {num_frames} of {declared} declared frames can be decoded. Whole? ffmpeg -i IN OUT.flac"
        )
    if kind == "MP3" and stream_size - reached > _MAX_MP3_TAIL_BYTES:
        raise AudioError(
            f"{name}: libsndfile stops {stream_size - reached} bytes before its end: a variable bit rate without the "
            "header that counts its frames. Write it anew: ffmpeg -i IN OUT.flac"
        )


class _Seekable:
    """A stream for libsndfile, which follows the offsets of a damaged header. One that leads nowhere is told as -1, as
    files in C do: an exception would be printed with its traceback and then forgotten."""

    def __init__(self, stream: BinaryIO) -> None:
        self.read = stream.read
        self._stream = stream
        self._lost = False

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._lost = False
        try:
            self._stream.seek(offset, whence)
        except (OSError, ValueError):
            self._lost = True
        return self.tell()

    def tell(self) -> int:
        return -1 if self._lost else self._stream.tell()


def _refuse_cut_wav(stream: BinaryIO, name: str) -> None:
    """libsndfile reads a cut WAV short without a word, so compare the header's byte count with the file's."""
    start = stream.tell()
    header = stream.read(12)
    if header[:4] == b"RIFF" and header[8:12] == b"WAVE":
        size = stream.seek(0, io.SEEK_END)
        position = start + 12
        while position + 8 <= size:
            stream.seek(position)
            chunk, length = struct.unpack("<4sI", stream.read(8))
            if chunk == b"data":
                # Programs that stream do not know the length: 0, 0xFFFFFFFF, sox 0x7FFFF000, arecord about 2^31.
                if 0 < length < _UNKNOWN_WAV_BYTES and position + 8 + length > size:
                    raise AudioError(
                        f"{name}: cut off, {size - position - 8} of {length} declared bytes of samples are there"
                    )
                break
            position += 8 + length + length % 2
    stream.seek(start)


def _refuse_cut_container(stream: BinaryIO, name: str) -> None:
    """libsndfile reads the other uncompressed containers short as well. Their headers say how long the file is."""
    start = stream.tell()
    head = stream.read(1024)
    size = stream.seek(0, io.SEEK_END) - start
    stream.seek(start)
    declared = 0
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        declared = 8 + struct.unpack(">I", head[4:8])[0]
    elif head[:4] == b".snd" and len(head) >= 12:
        offset, length = struct.unpack(">II", head[4:12])
        declared = offset + length if length < _UNKNOWN_WAV_BYTES else 0
    elif head[:4] == b"RF64" and head[12:16] == b"ds64" and len(head) >= 28:
        declared = 8 + struct.unpack("<Q", head[20:28])[0]
    elif head[:4] == b"riff" and len(head) >= 24:  # Sony's W64: a GUID, then the size of the whole
        declared = struct.unpack("<Q", head[16:24])[0]
    elif head[:7] == b"NIST_1A":
        fields = dict(re.findall(rb"(sample_count|sample_n_bytes|channel_count) -i ([0-9]+)", head))
        if len(fields) == 3 and b"shorten" not in head:
            declared = 1024 + math.prod(int(value) for value in fields.values())
    if size < declared < _UNKNOWN_FRAMES:
        raise AudioError(f"{name}: cut off, {size} of {declared} declared bytes are there")


def _refuse_cut_ogg(stream: BinaryIO, name: str) -> None:
    """Ogg declares no length: libsndfile takes the last page it finds for the end. A whole stream marks that page."""
    start = stream.tell()
    if stream.read(4) == b"OggS":
        stream.seek(start)
        ended, tail = False, b""
        while block := stream.read(_MAX_OGG_PAGE_BYTES):
            seen = tail[-5:] + block
            for match in re.finditer(rb"OggS\0([\x02\x04-\x07])", seen):
                begins = match[1] == b"\x02"  # any other of these ends a stream
                if ended and begins:
                    several = "several Ogg streams in a row, and only the first is read"
                    raise AudioError(f"{name}: {several}. ffmpeg -i IN OUT.flac")
                ended |= not begins
            tail = (tail + block)[-_MAX_OGG_PAGE_BYTES:]
        page = tail[max(0, tail.rfind(b"OggS\0")) :]
        lacing = page[27 : 27 + page[26]] if len(page) > 26 else b""
        if not page[5:6] or not page[5] & 4 or len(page) < 27 + len(lacing) + sum(lacing):
            raise AudioError(f"{name}: cut off, its last page does not end the stream. Whole? ffmpeg -i IN OUT.flac")
    stream.seek(start)


def _tag_bytes(stream: BinaryIO, size: int) -> int:
    """Bytes of the APEv2 and ID3v1 tags at the end of an MP3 of `size` bytes. A cover is kept in the former."""
    end = size
    if end >= _ID3V1_BYTES:
        stream.seek(end - _ID3V1_BYTES)
        end -= _ID3V1_BYTES if stream.read(3) == b"TAG" else 0
    if end >= _APE_FOOTER.size:
        stream.seek(end - _APE_FOOTER.size)
        magic, _, length, _, flags = _APE_FOOTER.unpack(stream.read(_APE_FOOTER.size))
        if magic == b"APETAGEX" and length <= end:
            end -= length + (_APE_FOOTER.size if flags & _APE_HAS_HEADER else 0)
    return size - max(0, end)


def _mono(frames: np.ndarray) -> np.ndarray:
    """The mean of the channels, or the loudest channel where they cancel each other."""
    if frames.shape[1] == 1:
        return frames[:, 0]
    mixed = frames.mean(axis=1)
    energies = np.square(frames).sum(axis=0)
    if np.square(mixed).sum() < _CANCELLED_ENERGY * energies.max():
        return frames[:, int(energies.argmax())]
    return mixed
