"""verl's data set of RL rows, as converters.rl_parquet writes them:

    data.custom_cls.path=pkg://echo_plugins.for_verl.dataset data.custom_cls.name=RelistenDataset

Audio stays a path (or the embedded bytes) until a rollout asks for it, in a thread. Audio that cannot be used fails
that rollout, not the run: for_verl/agent_loop.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc
from verl.utils.dataset.rl_dataset import RLHFDataset

from ..audio import load
from ..relisten.prompt import escape_reserved

_log = logging.getLogger(__name__)


class RelistenDataset(RLHFDataset):
    """Rows with one clip or none: a segment means seconds of the prompt's clip."""

    processor: Any

    def maybe_filter_out_long_prompts(self, dataframe: Any = None) -> Any:
        """Leave out rows over data.max_prompt_length, as data.filter_overlong_prompts asks, and say how many.

        Counted from the stored `num_audio_tokens`: verl's own filter cannot read audio, and would drop every such row
        (rl_dataset.py:241). Raises ValueError for a row with several clips.
        """
        if self.audio_key in dataframe.column_names:
            column = dataframe.data.column(self.audio_key)
            counts = pc.call_function("list_value_length", [column]).to_pylist()
            several = next((row for row, count in enumerate(counts) if count and count > 1), None)
            if several is not None:
                raise ValueError(
                    f"row {several} of {list(self.data_files)} has {counts[several]} clips: "
                    "segments are seconds of the prompt's one clip"
                )
        if not self.filter_overlong_prompts:
            return dataframe
        kept = dataframe.filter(
            lambda row: self._num_prompt_tokens(row) <= self.max_prompt_length,
            desc="Leaving out prompts that are too long",
        )
        if not len(kept):
            raise ValueError(
                f"none of the {len(dataframe)} prompts of {list(self.data_files)} is within "
                f"data.max_prompt_length={self.max_prompt_length} (RL_MAX_PROMPT)"
            )
        if len(kept) < len(dataframe):
            _log.warning(
                "== %d of %d rows are left out: their prompts are over data.max_prompt_length=%d",
                len(dataframe) - len(kept),
                len(dataframe),
                self.max_prompt_length,
            )
        return kept

    def _num_prompt_tokens(self, row: dict[str, Any]) -> int:
        text = self.processor.apply_chat_template(
            self._build_messages(row, key=self.prompt_key),
            add_generation_prompt=True,
            tokenize=False,
            **self.apply_chat_template_kwargs,
        )
        num_audio_tokens = int((row.get("extra_info") or {}).get("num_audio_tokens") or 0)
        return len(self.tokenizer.encode(text, add_special_tokens=False)) + num_audio_tokens

    def _build_messages(self, example: dict[str, Any], key: str) -> list[dict[str, Any]]:
        """verl's, with special tokens in a row's own text broken up: they would shift the clips."""
        messages = super()._build_messages(example, key)
        for message in messages:
            content = message["content"]
            if isinstance(content, str):
                message["content"] = escape_reserved(content)
                continue
            for part in content:
                if part["type"] == "text":
                    part["text"] = escape_reserved(part["text"])
        return messages

    @classmethod
    def _extract_audio_info(cls, messages: list[dict[str, Any]]) -> list[np.ndarray] | None:
        """Decode the clips of a prompt: mono float32 at 16 kHz. verl's own leaves the paths as they are
        (rl_dataset.py:461). Raises AudioError."""
        sources = super()._extract_audio_info(messages)
        return [load(_source(source)) for source in sources] if sources else None


def _source(audio: Any) -> str | bytes:
    """A path, or what `--embed-audio` put in its place."""
    if isinstance(audio, Mapping):
        return audio["bytes"] or audio["path"]
    return audio
