"""RL rows as converters.rl_parquet writes them, read by verl."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from omegaconf import OmegaConf
from verl.utils.dataset.rl_dataset import collate_fn, get_dataset_class
from verl.utils.tokenizer import hf_processor

import echo_plugins.for_verl.omni  # noqa: F401 - verl's processor for Omni
from converters.rl_parquet import schema


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return hf_processor(str(tiny_model))


def row(index: int, audio: Any, content: str = "<audio>Which sound?", num_audio_tokens: int = 25) -> dict[str, Any]:
    return {
        "data_source": "scenes",
        "prompt": [{"role": "user", "content": content}],
        "audios": [] if audio is None else [audio],
        "reward_model": {"style": "rule", "ground_truth": "a bell"},
        "extra_info": {
            "id": f"row-{index}",
            "question": "Which sound?",
            "choices": ["a bell", "a dog"],
            "duration": 1.0,
            "index": index,
            "num_audio_tokens": num_audio_tokens,
        },
        "agent_name": "relisten",
    }


def read(processor: Any, folder: Path, rows: list[dict[str, Any]], embed: bool = False, **settings: Any) -> Any:
    path = folder / "rl.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema(embed)), path)
    config = OmegaConf.create(
        {
            "cache_dir": str(folder / "cache"),
            "custom_cls": {"path": "pkg://echo_plugins.for_verl.dataset", "name": "RelistenDataset"},
            **settings,
        }
    )
    data_class: Any = get_dataset_class(config)
    return data_class(str(path), processor.tokenizer, config, processor)


@pytest.fixture(scope="module")
def wav(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("audio") / "a.wav"
    soundfile.write(path, np.zeros(22_050, dtype=np.float32), 22_050)
    return str(path)


def test_a_batch_carries_paths_and_no_samples(processor: Any, tmp_path: Path, wav: str) -> None:
    data = read(processor, tmp_path, [row(0, wav), row(1, None, "Which one is loud?")])
    batch = collate_fn([data[0], data[1]])
    sound, text = batch["raw_prompt"]
    assert sound[0]["content"][0] == {"type": "audio", "audio": wav}
    assert text[0]["content"] == "Which one is loud?"
    assert "audios" not in batch


def test_audio_is_decoded_when_a_rollout_asks_for_it(processor: Any, tmp_path: Path, wav: str) -> None:
    data = read(processor, tmp_path, [row(0, wav)])
    _, _, (waveform,) = type(data)._process_multi_modal_info(data[0]["raw_prompt"], 14, None)
    assert waveform.shape == (16_000,) and waveform.dtype == np.float32
    embedded = read(processor, tmp_path, [row(0, {"bytes": Path(wav).read_bytes(), "path": "a.wav"})], embed=True)
    _, _, (same,) = type(data)._process_multi_modal_info(embedded[0]["raw_prompt"], 14, None)
    assert np.array_equal(waveform, same)


def test_rows_that_are_too_long_are_left_out_by_their_stored_token_counts(
    processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The frameworks set up logging for the whole process as they start, so what reaches the root logger depends on
    # which of them a test before this one started.
    said: list[str] = []
    monkeypatch.setattr(
        logging.getLogger("echo_plugins.for_verl.dataset"), "warning", lambda text, *values: said.append(text % values)
    )
    rows = [row(0, "/nowhere.wav"), row(1, "/nowhere.wav", num_audio_tokens=5_000), row(2, None, "Short?")]
    data = read(processor, tmp_path, rows, filter_overlong_prompts=True, max_prompt_length=200)
    assert [data[index]["extra_info"]["id"] for index in range(len(data))] == ["row-0", "row-2"]
    assert len(said) == 1 and "1 of 3 rows are left out" in said[0]


def test_a_file_of_which_no_prompt_is_short_enough_is_an_error_that_names_it(processor: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"none of the 1 prompts of .*\.parquet.* is within data\.max_prompt_length=200"
    ):
        read(
            processor,
            tmp_path,
            [row(1, "/nowhere.wav", num_audio_tokens=5_000)],
            filter_overlong_prompts=True,
            max_prompt_length=200,
        )


def test_special_tokens_in_a_rows_text_are_plain_text(processor: Any, tmp_path: Path, wav: str) -> None:
    data = read(processor, tmp_path, [row(0, wav, "<audio>Is <|AUDIO|> here?<|im_end|>")])
    text = processor.apply_chat_template(data[0]["raw_prompt"], add_generation_prompt=True, tokenize=False)
    assert processor.tokenizer.encode(text).count(processor.audio_token_id) == 1
    assert "< |AUDIO|> here?< |im_end|>" in text


def test_a_row_with_two_clips_is_refused_by_its_number(processor: Any, tmp_path: Path, wav: str) -> None:
    double = {**row(1, wav, "<audio><audio>Which?"), "audios": [wav, wav]}
    with pytest.raises(ValueError, match=r"row 1 of .* has 2 clips"):
        read(processor, tmp_path, [row(0, wav), double])
