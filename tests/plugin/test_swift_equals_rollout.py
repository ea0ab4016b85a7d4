"""A row of stage 1 is, to the token and to the feature, what a rollout of stage 2 makes of the same text.

Both sides are real: the row goes through converters.sft_jsonl and ms-swift's template, the rollout through the agent
loop of verl with a scripted engine.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from swift.model import get_processor
from swift.template import get_template
from test_verl_agent_loop import ScriptedServer
from verl.utils.tokenizer import hf_processor
from verl_rollout import messages_of, relisten_loop

from converters.sft_jsonl import main as sft_jsonl
from echo_plugins.audio import SAMPLING_RATE
from echo_plugins.for_swift import template
from echo_plugins.for_verl.omni import pack_clips
from echo_plugins.model import family_of
from echo_plugins.relisten.control import CLIP_SOUNDS, ClipSound

template.register()

QUESTION, CHOICES, ANSWER = "Which sound?", ("bell", "dog"), "dog"
NUM_SAMPLES = 3 * SAMPLING_RATE + 2_077  # whole frames and a part of one
# What the policy says from clip to clip. The second tag ends past the sound: its clip has a part of a frame too.
TURNS = ("<think>First <seg>0.50, 1.50</seg>", ", then <seg>2.00, 3.13</seg>", ". No more.</think>")
LAST = f"<answer>{ANSWER}</answer>"


@dataclass(frozen=True)
class Side:
    """Ids of prompt and response, 1 where a token of the response is learned, and the frames that the tower hears."""

    ids: list[int]
    learned: list[int]
    features: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def audio_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audio") / "noise.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, NUM_SAMPLES), SAMPLING_RATE)
    return path


@pytest.fixture(scope="module")
def row(audio_file: Path) -> dict[str, Any]:
    source, target = audio_file.with_name("in.jsonl"), audio_file.with_name("rows.jsonl")
    think = "".join(TURNS).removeprefix("<think>").removesuffix("</think>")
    fields = {"id": "a", "audio": audio_file.name, "question": QUESTION, "choices": CHOICES, "answer": ANSWER}
    source.write_text(json.dumps(fields | {"think": think}) + "\n")
    sft_jsonl(source, target, audio_root=audio_file.parent, mode="interleaved", workers=1)
    return json.loads(target.read_text())


def in_training(model: Path, row: dict[str, Any]) -> Side:
    """As ms-swift gives the row to the model, without the line end after its last token."""
    processor = get_processor(str(model))
    made: Any = get_template(processor)
    made.set_mode("train")
    encoded = made.encode(row)
    batch = made.data_collator([encoded])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert processor.tokenizer.decode(ids[-1:]) == "\n"
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    learned = [int(label != -100) for label in labels]
    return Side(ids[:-1], learned[:-1], pack_clips(batch["input_features"], batch["feature_attention_mask"]))


def in_rollout(model: Path, audio_file: Path, script: Sequence[str]) -> Side:
    processor: Any = hf_processor(str(model))
    server = ScriptedServer(processor.tokenizer, list(script))
    loop = relisten_loop(model, processor, server, {"prompt_length": 400, "response_length": 300}, {})
    messages = messages_of(QUESTION, CHOICES, str(audio_file))
    output: Any = asyncio.run(
        loop.run({"temperature": 1.0, "logprobs": True}, raw_prompt=messages, global_steps=1, index=0)
    )
    assert output.extra_fields["error"] is None
    learned = [0] * len(output.prompt_ids) + list(output.response_mask)
    return Side([*output.prompt_ids, *output.response_ids], learned, dict(output.multi_modal_data["audios"]))


def places_of_audio(model: Path, side: Side) -> list[int]:
    processor: Any = hf_processor(str(model))
    family, tokenizer = family_of(model), processor.tokenizer
    texts = (family.audio_token, family.audio_bos_token, family.audio_eos_token)
    audio = tokenizer.convert_tokens_to_ids(list(texts))
    return [place for place, token in enumerate(side.ids) if token in audio]


def test_a_row_is_what_a_rollout_makes_of_the_same_text(
    omni_model: Path, row: dict[str, Any], audio_file: Path
) -> None:
    assert len(row["audios"]) == len(TURNS)
    ours = in_training(omni_model, row)
    rollout = in_rollout(omni_model, audio_file, [*TURNS[:2], TURNS[2] + LAST + "<|im_end|>"])
    assert ours.ids == rollout.ids
    assert ours.learned == rollout.learned
    response = range(ours.learned.index(1), len(ours.ids))
    audio = [place for place in places_of_audio(omni_model, ours) if place in response]
    assert audio == [place for place in response if not ours.learned[place]], "all of the clips and nothing else"
    for name, features in rollout.features.items():
        assert torch.equal(ours.features[name], features), name


def test_a_token_that_holds_more_than_the_end_of_a_tag_leaves_the_ids_of_a_row(
    omni_model: Path, row: dict[str, Any], audio_file: Path
) -> None:
    """The policy samples `>,` and `>.`; the clip follows the plain `>`, which it has not sampled."""
    processor: Any = hf_processor(str(omni_model))
    tokenizer = processor.tokenizer
    script = [TURNS[0] + ",", TURNS[1] + ".", TURNS[2] + LAST + "<|im_end|>"]
    ends = [tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)[-1:]) for text in script[:2]]
    assert ends == [">,", ">."]
    ours, rollout = in_training(omni_model, row), in_rollout(omni_model, audio_file, script)
    assert ours.ids == rollout.ids
    other = [place for place, pair in enumerate(zip(ours.learned, rollout.learned, strict=True)) if pair[0] != pair[1]]
    assert [tokenizer.decode(ours.ids[place]) for place in other] == [">", ">"]
    assert all(ours.learned[place] and place + 1 in places_of_audio(omni_model, ours) for place in other)
    for name, features in rollout.features.items():
        assert torch.equal(ours.features[name], features), name


def test_another_sound_behind_the_tags_changes_the_features_alone(
    omni_model: Path, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SFT_CLIP", raising=False)
    default = in_training(omni_model, row)
    for sound in CLIP_SOUNDS:
        monkeypatch.setenv("SFT_CLIP", sound)
        side = in_training(omni_model, row)
        assert (side.ids, side.learned) == (default.ids, default.learned)
        counts = side.features["audio_num_frames"]
        assert torch.equal(counts, default.features["audio_num_frames"])
        same = [
            torch.equal(*clips)
            for clips in zip(
                side.features["audio_frames"].split(counts.tolist()),
                default.features["audio_frames"].split(counts.tolist()),
                strict=True,
            )
        ]
        assert same == [True] + [sound == "own"] * 2, sound
    monkeypatch.setenv("SFT_CLIP", "silence")
    with pytest.raises(ValueError, match="own, random, silent, shuffled"):
        in_training(omni_model, row)


def test_the_sound_behind_a_tag_is_drawn_by_row_and_place_in_it(row: dict[str, Any], audio_file: Path) -> None:
    waveform = template.waveforms([str(audio_file)])[0]
    references = [*row["audios"], row["audios"][1]]
    draws: list[tuple[ClipSound, str]] = [
        ("own", "a"),
        ("silent", "a"),
        ("random", "a"),
        ("random", "a"),
        ("random", "b"),
    ]
    own, silent, random, again, other = (template.waveforms(references, *options) for options in draws)
    assert all(np.array_equal(clips[0], waveform) for clips in (own, silent, random)), "the question keeps its sound"
    assert np.array_equal(own[1], waveform[8_000:24_000]) and not any(clip.any() for clip in silent[1:])
    assert [len(clip) for clip in random] == [len(clip) for clip in silent] == [len(clip) for clip in own]
    for clip in random[1:]:
        places = np.flatnonzero(waveform == clip[0])
        assert any(np.array_equal(waveform[place : place + len(clip)], clip) for place in places)
    assert all(np.array_equal(*clips) for clips in zip(random, again, strict=True)), "after a resume too"
    assert not np.array_equal(random[1], own[1]) and not np.array_equal(random[1], other[1])
    assert not np.array_equal(random[1], random[3]), "the same tag twice in a row"
