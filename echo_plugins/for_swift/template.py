"""Templates of Qwen2.5-Omni and Qwen3-Omni for ms-swift that read clips as Echo does.

They take the place of ms-swift's own under the same names, and differ in four ways:
- `path#t=START,END` in `audios` is that piece of the file, decoded when the row is read: nothing is cut beforehand;
- all sound is decoded by `echo_plugins.audio`, as in rollout and inference, and what it refuses names the file;
- a clip of Qwen3-Omni keeps its last samples that fill no frame, as in rollout and inference;
- features are padded to the longest clip of a row and of a batch, not to the extractor's window (300 s, 15 MB a clip).

SFT_CLIP in the environment puts another sound behind the tags: a word of `relisten.control`.

ms-swift itself takes an `<audio>` in the assistant's turn, and trains neither on its tokens nor on those around it.
"""

from __future__ import annotations

import os
from copy import copy
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch.nn.functional as F
from swift.template import MaxLengthError
from swift.template.register import TEMPLATE_MAPPING, register_template
from swift.template.template_inputs import StdTemplateInputs
from swift.template.templates.qwen import Qwen2_5OmniTemplate, Qwen3OmniTemplate
from swift.template.utils import Context

from echo_plugins import audio
from echo_plugins.model import QWEN2_5_OMNI, QWEN3_OMNI, OmniFamily
from echo_plugins.relisten.control import CLIP_SOUNDS, ClipSound, clip_sound
from echo_plugins.relisten.segment import Segment

if TYPE_CHECKING:
    _Base = Qwen2_5OmniTemplate
else:
    _Base = object


class RelistenMixin(_Base):
    """Goes before one of ms-swift's Omni templates."""

    name: str  # of the template, as ms-swift registers it
    family: OmniFamily
    clip_sound: ClipSound  # kept here, so that it reaches the processes that read rows and ms-swift's cache keys

    def init_processor(self, processor: Any) -> None:
        self.clip_sound = clip_sound_of(os.environ.get("SFT_CLIP", "own"))
        super().init_processor(processor)
        if processor is not None:
            audio.pad_to_longest(self.processor.feature_extractor, self.family)

    def _preprocess_inputs(self, inputs: StdTemplateInputs) -> None:
        if self.mode != "vllm":  # there ms-swift hands paths on to the engine
            # No path: a moved data set would train on other sounds.
            name = "\n".join(str(message["content"]) for message in inputs.messages)
            inputs.audios = waveforms(inputs.audios, self.clip_sound, name)
        super()._preprocess_inputs(inputs)

    def _trim_omni_v3_audios(self, audios: Any) -> Any:
        # ms-swift cuts a clip of Qwen3-Omni to whole frames. Its last frames would then differ from those of a rollout.
        return super()._trim_omni_v3_audios(audios) if self.mode == "vllm" else audios

    def replace_tag(
        self, media_type: Literal["image", "video", "audio"], index: int, inputs: StdTemplateInputs
    ) -> list[Context]:
        if media_type == "audio" and isinstance(inputs.audios[index], np.ndarray):
            return [self.family.audio_placeholder]
        return super().replace_tag(media_type, index, inputs)

    def _encode_truncated(self, inputs: StdTemplateInputs) -> Any:
        name = inputs.audios[0] if inputs.audios else inputs.messages[0]["content"]
        try:
            return super()._encode_truncated(inputs)
        except MaxLengthError as error:
            raise MaxLengthError(f"the row of {name}: {error} Raise SFT_MAX_LENGTH or leave the row out.") from error

    def _data_collator_mm_data(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [row for row in batch if row.get("input_features") is not None]
        longest = max((row["input_features"].shape[-1] for row in rows), default=0)
        for row in rows:
            for key in ("input_features", "feature_attention_mask"):
                row[key] = F.pad(row[key], (0, longest - row[key].shape[-1]))
        return super()._data_collator_mm_data(batch)


class RelistenQwen2_5OmniTemplate(RelistenMixin, Qwen2_5OmniTemplate):
    name = "qwen2_5_omni"
    family = QWEN2_5_OMNI


class RelistenQwen3OmniTemplate(RelistenMixin, Qwen3OmniTemplate):
    name = "qwen3_omni"
    family = QWEN3_OMNI


def clip_sound_of(word: str) -> ClipSound:
    """The value of SFT_CLIP. Raises ValueError for any other word."""
    for sound in CLIP_SOUNDS:
        if word == sound:
            return sound
    raise ValueError(f"SFT_CLIP is '{word}'; it is one of {', '.join(CLIP_SOUNDS)}")


def waveforms(references: list[Any], sound: ClipSound = "own", name: str = "") -> list[Any]:
    """Decode each `path` or `path#t=START,END`, a file once however many pieces of it are named.

    `sound` is what a piece is replaced by. It is drawn by `name`, which identifies the row, the number of the piece in
    `references` and its place, so that a row always sounds the same. What is no string (a waveform already, a file
    object) stays as it is. Raises AudioError.
    """
    decoded: dict[str, np.ndarray] = {}
    clips = []
    for number, reference in enumerate(references):
        if isinstance(reference, str):
            path, bounds = audio.parse_fragment(reference)
            if path not in decoded:
                decoded[path] = audio.load(path)
            clip = decoded[path]
            if bounds is not None:
                place = Segment(*bounds).sample_bounds(audio.SAMPLING_RATE)
                clip = clip_sound(clip, *place, audio.SAMPLING_RATE, sound, f"{name}\0{number}")
            if not len(clip):
                raise audio.AudioError(f"{reference}: no sound there, the file is {len(decoded[path])} samples long")
            clips.append(clip)
        else:
            clips.append(reference)
    return clips


def register() -> None:
    """Put our templates in the place of ms-swift's, with all else as registered there."""
    for template_class in (RelistenQwen2_5OmniTemplate, RelistenQwen3OmniTemplate):
        meta = copy(TEMPLATE_MAPPING[template_class.name])
        meta.template_cls = template_class
        register_template(meta, exist_ok=True)
