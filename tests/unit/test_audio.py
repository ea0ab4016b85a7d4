"""Decoding real files of every kind, and every broken one we know of."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_plugins.audio import (
    SAMPLING_RATE,
    AudioError,
    OutsideRootError,
    TooLongError,
    crop,
    format_fragment,
    load,
    load_fragment,
    parse_fragment,
    probe,
    resolve_path,
)
from echo_plugins.relisten.segment import Segment

FORMATS = ["wav", "flac", "mp3", "ogg"]


def tone(seconds: float, rate: int = SAMPLING_RATE, channels: int = 1) -> np.ndarray:
    """A 440 Hz tone of amplitude 0.5, shape (num_frames, channels)."""
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int = SAMPLING_RATE, subtype: str | None = None) -> Path:
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (16_000, 2), (22_050, 1), (44_100, 2), (48_000, 1)])
def test_any_format_rate_and_channels_become_16_khz_mono_float32(
    tmp_path: Path, kind: str, rate: int, channels: int
) -> None:
    path = write(tmp_path / f"a.{kind}", tone(1.0, rate, channels), rate)
    waveform = load(path)
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert abs(len(waveform) - SAMPLING_RATE) <= 2 * 1152  # an MP3 decoder keeps its padding
    middle = waveform[4_000:12_000]
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.05)
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert spectrum.argmax() * SAMPLING_RATE / len(middle) == pytest.approx(440, abs=3)
    info = probe(path)
    assert info.num_samples == len(waveform)
    assert (info.sampling_rate, info.num_channels) == (rate, channels)
    assert info.duration_seconds == pytest.approx(len(waveform) / SAMPLING_RATE, abs=1e-4)


@settings(max_examples=60)
@given(num_frames=st.integers(1, 30_000), rate=st.sampled_from([8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 44_099]))
def test_the_counted_length_is_the_loaded_length(num_frames: int, rate: int) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(num_frames, np.float32), rate, format="WAV")
    encoded = buffer.getvalue()
    assert probe(encoded).num_samples == len(load(encoded))


def test_a_wav_at_16_khz_comes_through_bit_for_bit(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).uniform(-1, 1, 5_000).astype(np.float32)
    assert np.array_equal(load(write(tmp_path / "a.wav", samples, subtype="FLOAT")), samples)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_32", "PCM_U8"])
def test_integer_samples_are_scaled_to_one(tmp_path: Path, subtype: str) -> None:
    samples = np.array([0.0, 0.5, -0.5, 0.25] * 100, np.float32)
    assert load(write(tmp_path / "a.wav", samples, subtype=subtype)) == pytest.approx(samples, abs=0.01)


def test_bytes_and_open_files_decode_like_the_path(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", tone(0.5, 44_100), 44_100)
    expected = load(path)
    assert np.array_equal(load(path.read_bytes()), expected)
    with path.open("rb") as stream:
        assert np.array_equal(load(stream), expected)


def test_stereo_is_mixed_to_its_mean(tmp_path: Path) -> None:
    samples = np.stack([np.full(1_000, 0.5), np.full(1_000, 0.25)], axis=1).astype(np.float32)
    waveform = load(write(tmp_path / "a.wav", samples, subtype="FLOAT"))
    assert waveform.shape == (1_000,)
    assert np.all(waveform == 0.375)


def test_antiphase_stereo_does_not_cancel_into_silence(tmp_path: Path) -> None:
    samples = np.concatenate([tone(0.5), -tone(0.5)], axis=1)
    assert np.abs(load(write(tmp_path / "a.wav", samples))).max() == pytest.approx(0.5, abs=0.01)


def test_two_frames_of_many_channels_are_no_two_clips(tmp_path: Path) -> None:
    assert load(write(tmp_path / "a.wav", np.zeros((2, 8), np.float32))).shape == (2,)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_sample_that_is_no_number_is_refused(tmp_path: Path, bad: float) -> None:
    samples = tone(0.5)
    samples[100] = bad
    with pytest.raises(AudioError, match=r"a\.wav.*NaN or infinite"):
        load(write(tmp_path / "a.wav", samples, subtype="FLOAT"))


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_zero_length_is_refused(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"a.{kind}", np.zeros((0, 1), np.float32))
    for read in (load, probe):
        with pytest.raises(AudioError, match=r"no samples|not readable"):
            read(path)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_truncated_file_is_refused(tmp_path: Path, kind: str, kept: float) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 5 * 44_100).astype(np.float32)
    whole = write(tmp_path / f"whole.{kind}", noise, 44_100).read_bytes()
    load(whole)
    path = tmp_path / f"cut.{kind}"
    path.write_bytes(whole[: int(len(whole) * kept)])
    for read in (load, probe):
        with pytest.raises(AudioError, match=rf"cut\.{kind}"):
            read(path)


@pytest.mark.parametrize("loud_first", [True, False])
def test_an_mp3_whose_length_is_only_guessed_is_refused(tmp_path: Path, loud_first: bool) -> None:
    noise, silence = np.random.default_rng(0).uniform(-0.5, 0.5, 441_000), np.zeros(441_000)
    samples = np.concatenate([noise, silence] if loud_first else [silence, noise])
    soundfile.write(tmp_path / "a.mp3", samples, 44_100, bitrate_mode="VARIABLE", compression_level=0.5)
    whole = (tmp_path / "a.mp3").read_bytes()
    assert probe(whole).num_frames == len(samples)
    assert len(load(whole + b"TAG" + b" " * 125)) == 320_000
    headless = whole[whole.index(b"\xff\xfb", 4) :]  # the first frame holds the count of frames, and no sound
    with pytest.raises(AudioError, match="ffmpeg"):
        load(headless)


@pytest.mark.parametrize("lost", [1, 5, 200])
def test_an_ogg_without_its_last_bytes_is_refused(tmp_path: Path, lost: int) -> None:
    whole = write(tmp_path / "a.ogg", tone(1.0)).read_bytes()
    with pytest.raises(AudioError, match="cut off"):
        load(whole[:-lost])


def test_a_streamed_wav_of_unknown_length_is_read(tmp_path: Path) -> None:
    raw = bytearray(write(tmp_path / "a.wav", tone(0.5), subtype="PCM_16").read_bytes())
    struct.pack_into("<I", raw, raw.index(b"data") + 4, 0xFFFFFFFF)
    assert len(load(bytes(raw))) == 8_000


def test_a_wav_with_chunks_around_its_samples_is_whole(tmp_path: Path) -> None:
    raw = write(tmp_path / "a.wav", tone(0.5), subtype="PCM_16").read_bytes()
    at = raw.index(b"data")
    noted = raw[:at] + b"note" + struct.pack("<I", 3) + b"abc\0" + raw[at:]
    assert len(load(noted + b"tail" + struct.pack("<I", 2) + b"xy")) == 8_000
    with pytest.raises(AudioError, match="cut off"):
        load(noted[:-4_000])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"RIFF",
        b"this is a text file, whatever it is called\n" * 20,
        b"\0" * 5_000,
        b"<html></html>",
        b"RIFF\0\0\0\0WAVE",
    ],
    ids=["empty", "magic", "text", "zeros", "html", "header"],
)
def test_what_is_not_audio_is_refused_with_name_and_cure(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "fake.wav"
    path.write_bytes(content)
    with pytest.raises(AudioError, match=r"fake\.wav"):
        load(path)


def test_an_m4a_is_decoded_or_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    path = tmp_path / "a.m4a"
    path.write_bytes(b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom\0\0\0\0" + b"\0" * 500)
    with pytest.raises(AudioError, match="ffmpeg"):
        load(path)


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="directory"):
        load(tmp_path)
    with pytest.raises(AudioError, match="No such file"):
        load(tmp_path / "none.wav")


def test_a_crop_shares_the_memory_of_the_clip() -> None:
    waveform = np.arange(1_000, dtype=np.float32)
    piece = crop(waveform, 100, 300)
    assert np.shares_memory(piece, waveform)
    assert piece[0] == 100 and len(piece) == 200
    assert len(crop(waveform, 900, 5_000)) == 100
    assert len(crop(waveform, 2_000, 3_000)) == 0
    assert len(crop(waveform, -50, 10)) == 10


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_loading_a_piece_equals_cropping_the_whole(tmp_path: Path, rate: int) -> None:
    path = write(tmp_path / "a.flac", tone(2.0, rate), rate)
    whole = load(path)
    piece = load(path, start_seconds=0.5, end_seconds=1.25)
    assert np.array_equal(piece, whole[8_000:20_000])
    assert np.array_equal(load_fragment(f"{path}#t=0.50,1.25"), piece)
    assert np.array_equal(load_fragment(str(path)), whole)
    with pytest.raises(AudioError, match="outside"):
        load(path, start_seconds=5.0, end_seconds=6.0)
    with pytest.raises(ValueError, match="together"):
        load(path, start_seconds=5.0)


@pytest.mark.parametrize(
    ("reference", "parsed"),
    [
        ("/a/b.wav", ("/a/b.wav", None)),
        ("/a/b.wav#t=1.00,2.50", ("/a/b.wav", (1.0, 2.5))),
        ("b#1.wav#t=1,2", ("b#1.wav", (1.0, 2.0))),
        ("b.wav#t=1.2.3,4", ("b.wav#t=1.2.3,4", None)),
        ("b.wav#t=nan,4", ("b.wav#t=nan,4", None)),
        ("b.wav#t=1,", ("b.wav#t=1,", None)),
        ("#t=1,2", ("#t=1,2", None)),
        ("b.wav#t=\u0661,\u0662", ("b.wav#t=\u0661,\u0662", None)),
        ("", ("", None)),
    ],
)
def test_a_fragment_is_read_or_left_alone(reference: str, parsed: tuple[str, object]) -> None:
    assert parse_fragment(reference) == parsed


@given(st.floats(0, 300), st.floats(1e-9, 300))
def test_a_fragment_crops_the_very_samples_of_its_segment(start: float, length: float) -> None:
    segment = Segment(start, start + length)
    path, bounds = parse_fragment(format_fragment("/a b/c#d.wav", segment.start_seconds, segment.end_seconds))
    assert path == "/a b/c#d.wav"
    assert bounds == (segment.start_seconds, segment.end_seconds)


def test_a_fragment_of_round_times_reads_as_such() -> None:
    assert format_fragment("a.wav", 1.0, 2.5) == "a.wav#t=1.00,2.50"


@pytest.mark.parametrize("inside", ["a.wav", "./a.wav", "sub/../a.wav", "sub/b.wav", "link.wav"])
def test_paths_inside_the_root_are_found(tmp_path: Path, inside: str) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "a.wav").touch()
    (root / "sub" / "b.wav").touch()
    (root / "link.wav").symlink_to(root / "a.wav")
    assert resolve_path(root, inside).is_file()


@pytest.mark.parametrize(
    "escape", ["../secret.wav", "sub/../../secret.wav", "/etc/passwd", "out.wav", "away/secret.wav", "../root2/a.wav"]
)
def test_paths_that_leave_the_root_are_refused(tmp_path: Path, escape: str) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "a.wav").touch()
    (tmp_path / "secret.wav").touch()
    (root / "out.wav").symlink_to(tmp_path / "secret.wav")
    (root / "away").symlink_to(tmp_path)
    with pytest.raises(OutsideRootError, match="leaves the audio root"):
        resolve_path(root, escape)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for relative in ("none.wav", "folder", "", "a\0b.wav", "x" * 5_000, "loop", "pipe"):
        with pytest.raises(AudioError):
            resolve_path(tmp_path, relative)


def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.wav").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert resolve_path(tmp_path / "link", "a.wav") == (tmp_path / "real" / "a.wav").resolve()


def test_resampling_is_soxr_at_high_quality(tmp_path: Path) -> None:
    samples = tone(1.0, 44_100)[:, 0]
    path = write(tmp_path / "a.wav", samples, 44_100, subtype="FLOAT")
    assert np.array_equal(load(path), soxr.resample(samples, 44_100, SAMPLING_RATE, quality="HQ"))


def streamed_flac(folder: Path) -> Path:
    """A FLAC as a program writes it into a pipe: STREAMINFO says 0 samples in all."""
    path = folder / "piped.flac"
    soundfile.write(path, np.sin(np.arange(16_000) / 9) * 0.3, 16_000)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the low 36 bits of bytes 21 to 25 are the number of samples
    content[22:26] = bytes(4)
    path.write_bytes(content)
    return path


def test_a_flac_that_does_not_say_how_long_it_is_is_read_or_refused_by_name(tmp_path: Path) -> None:
    path = streamed_flac(tmp_path)
    try:
        assert probe(path).num_frames == 16_000
    except AudioError as error:
        assert "piped.flac" in str(error)


def test_a_file_that_cannot_be_sought_in_is_read(tmp_path: Path) -> None:
    path = tmp_path / "call.wav"
    soundfile.write(path, np.sin(np.arange(16_000) / 9) * 0.3, 16_000, subtype="GSM610")
    assert abs(probe(path).num_frames - 16_000) <= 320 and len(load(path)) > 15_000


CONTAINERS = [("aiff", "AIFF"), ("au", "AU"), ("w64", "W64"), ("wav", "RF64"), ("sph", "NIST")]


@pytest.mark.parametrize(("suffix", "kind"), CONTAINERS)
def test_a_container_that_declares_more_than_it_holds_is_cut_off(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.sin(np.arange(64_000) / 9) * 0.3, 16_000, format=kind, subtype="PCM_16")
    assert probe(path).num_frames == 64_000
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AudioError, match=r"a\.\w+: cut off"):
        probe(path)


def test_ogg_streams_in_a_row_are_refused_by_name(tmp_path: Path) -> None:
    one = tmp_path / "one.ogg"
    soundfile.write(one, np.sin(np.arange(32_000) / 9) * 0.3, 16_000, format="OGG", subtype="VORBIS")
    assert probe(one).num_frames == 32_000
    both = tmp_path / "both.ogg"
    both.write_bytes(one.read_bytes() * 2)
    with pytest.raises(AudioError, match=r"both\.ogg: several Ogg streams in a row"):
        probe(both)


def test_a_wav_from_a_pipe_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sox.wav"
    soundfile.write(path, np.sin(np.arange(16_000) / 9) * 0.3, 16_000, subtype="PCM_16")
    content = bytearray(path.read_bytes())
    place = content.index(b"data") + 4
    for length in (0x7FFFF000, 0x7FFFFFFF - 36, 0xFFFFFFFF):
        content[place : place + 4] = length.to_bytes(4, "little")
        path.write_bytes(content)
        assert probe(path).num_frames == 16_000
    content[place : place + 4] = (64_000).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(AudioError, match="cut off"):
        probe(path)


def test_long_sound_is_measured_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long.flac"
    sound = np.sin(np.arange(100_000) / 9).astype(np.float32) * 0.3
    soundfile.write(path, sound, 16_000)
    whole = load(path)
    monkeypatch.setattr("echo_plugins.audio._BLOCK_FRAMES", 7_000)
    assert probe(path).num_frames == 100_000
    assert np.array_equal(load(path), whole)


def ape_tag(size: int) -> bytes:
    """An APEv2 tag with a header, an item of `size` bytes and a footer."""
    item = struct.pack("<II", size, 2) + b"Cover Art (Front)\0" + b"\x01" * size
    fields = struct.pack("<III", 2_000, len(item) + 32, 1)
    head, foot = struct.pack("<I8x", 0xA000_0000), struct.pack("<I8x", 0x8000_0000)
    return b"APETAGEX" + fields + head + item + b"APETAGEX" + fields + foot


@pytest.mark.parametrize("tail", [ape_tag(60_000), ape_tag(60_000) + b"TAG" + bytes(125)], ids=["ape", "ape and id3v1"])
def test_an_mp3_with_a_cover_at_its_end_is_read(tmp_path: Path, tail: bytes) -> None:
    file = tmp_path / "a.mp3"
    soundfile.write(file, tone(2.0), 16_000, format="MP3")
    plain = file.read_bytes()
    file.write_bytes(plain + tail)
    assert np.array_equal(load(file), load(plain))
    file.write_bytes(plain + b"\x01" * len(tail))
    with pytest.raises(AudioError, match="before its end"):
        load(file)


def test_what_the_header_calls_too_long_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "long.flac"
    soundfile.write(file, np.zeros(16_000 * 31), 16_000)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *args, **kwargs: pytest.fail("decoded"))
    with pytest.raises(TooLongError, match=r"31\.0 s; the model hears the first 30 s"):
        probe(file, 30)


def test_sound_of_unknown_length_is_decoded_no_further_than_the_window(tmp_path: Path) -> None:
    file = tmp_path / "piped.wav"
    soundfile.write(file, np.zeros(16_000 * 31), 16_000)
    raw = bytearray(file.read_bytes())
    raw[40:44] = b"\xff\xff\xff\xff"
    file.write_bytes(raw)
    with pytest.raises(TooLongError):
        probe(file, 30)
    assert probe(file).duration_seconds == 31


def test_links_that_leave_the_root_are_followed_when_told_so(tmp_path: Path) -> None:
    blob, root = tmp_path / "blobs" / "1f", tmp_path / "snapshots" / "abc"
    blob.parent.mkdir()
    root.mkdir(parents=True)
    soundfile.write(blob, np.zeros(16_000), 16_000, format="WAV")
    (root / "a.wav").symlink_to("../../blobs/1f")
    (root / "gone.wav").symlink_to("../../blobs/2f")
    with pytest.raises(OutsideRootError, match="--follow-links"):
        resolve_path(root, "a.wav")
    assert probe(resolve_path(root, "a.wav", follow_links=True)).num_samples == 16_000
    for follow_links in (False, True):
        with pytest.raises(OutsideRootError, match="relative to"):
            resolve_path(root, "../../blobs/1f", follow_links)
    with pytest.raises(AudioError, match="a link to"):
        resolve_path(root, "gone.wav", follow_links=True)


def test_a_windows_path_is_refused_with_the_one_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.wav").touch()
    with pytest.raises(AudioError, match="with / in the place of"):
        resolve_path(tmp_path, "sub\\a.wav")


SOUNDS = [("WAV", "PCM_16"), ("WAV", "GSM610"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", None), *CONTAINERS]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # what libsndfile's callbacks raise
@pytest.mark.parametrize(("first", "second"), SOUNDS)
def test_a_spoilt_file_is_read_or_refused_by_name(tmp_path: Path, first: str, second: str | None) -> None:
    kind, subtype = (second, "PCM_16") if (first, second) in CONTAINERS else (first, second)
    soundfile.write(tmp_path / "whole", tone(1.0), SAMPLING_RATE, format=kind, subtype=subtype)
    whole, file = (tmp_path / "whole").read_bytes(), tmp_path / "spoilt.sound"
    for seed in range(int(os.environ.get("ECHO_FUZZ_SEEDS", "25"))):
        draw = np.random.default_rng(seed)
        content = bytearray(whole)
        for _ in range(draw.integers(1, 4)):
            place = int(draw.integers(0, 128 if draw.integers(2) else len(content)))
            kept = content[place + int(draw.integers(0, 9)) :] if draw.integers(4) else b""
            content = content[:place] + draw.bytes(int(draw.integers(0, 9))) + kept
        file.write_bytes(content)
        try:
            info = probe(file, 60)
        except AudioError as error:
            assert "spoilt.sound" in str(error), seed
        else:
            assert len(load(file)) == info.num_samples, seed
