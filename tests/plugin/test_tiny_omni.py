"""The tiny checkpoint's tokenizer: the protocol's words are one token each, whatever the manifests say."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoProcessor,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3OmniMoeForConditionalGeneration,
)

from echo_plugins.model import family_of
from echo_plugins.relisten.prompt import MODES, question_text
from echo_plugins.relisten.segment import Segment, format_tag

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "tiny-cpu" / "tiny_omni.py"
TAGS = "<think>In <seg>0.50, 9.95</seg>, <seg>1.00, 2.05</seg>. <seg>3.00, 4.00</seg></think><answer>two</answer>"


def build(output: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--output", str(output), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def prose(num_rows: int) -> list[dict]:
    """Rows of long questions with thousands of different words, common and rare as in a language."""
    rng = np.random.default_rng(0)
    syllables = [a + b + c for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "ea") for c in ("", "n", "rs")]
    words = ["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(20_000)]

    def sentence(num_words: int) -> str:
        places = (len(words) ** rng.random(num_words)).astype(int)  # Zipf's law: the n-th word is 1/n as frequent
        return " ".join(words[place] for place in places)

    rows = []
    for number in range(num_rows):
        choices = [f"{sentence(3)} {letter}" for letter in "abcd"]
        row = {"id": str(number), "audio": f"{number}.wav", "question": sentence(60).capitalize() + "?"}
        rows.append(row | {"choices": choices, "answer": choices[number % 4]})
    return rows


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    lines = [json.dumps(row) for row in prose(160)]
    lines[7] = '{"id": "bad", "question": null}'  # the exporters name it; the tokenizer does without
    lines[8] = "no JSON"
    (folder / "own.jsonl").write_text("\n".join(lines))
    done = build(folder / "model", "--text", str(folder / "own.jsonl"))
    assert done.returncode == 0, done.stderr
    return folder / "model"


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(checkpoint)


def test_rich_prose_fills_the_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 1024, "otherwise the tests below prove nothing"


def test_every_word_of_the_protocol_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = tokenizer.get_vocab()
    for word in ("user", "assistant", "system", "think", "answer", "seg", "</", ">,", ">.", "></", "><"):
        assert word in vocabulary, word
    for hundredths in range(0, 1000, 5):
        assert f"{hundredths / 100:.2f}" in vocabulary
    for mode in MODES:
        text = question_text("", ("", ""), mode)
        assert len(tokenizer.tokenize(text)) <= len(text.split()) * 3


def test_tags_are_cut_as_the_rollout_expects(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize(format_tag(Segment(0.5, 9.95))) == [
        *("<", "seg", ">", "0.50", ",Ġ", "9.95", "</", "seg", ">"),
    ]
    tokens = tokenizer.tokenize(TAGS)
    assert {">,", ">.", "></", "><"} <= set(tokens)
    assert tokenizer.decode(tokenizer(TAGS)["input_ids"]) == TAGS


def test_frequent_words_of_the_manifest_get_the_rest(tokenizer: PreTrainedTokenizerFast) -> None:
    counts: dict[str, int] = {}
    for row in prose(160):
        for word in row["question"].rstrip("?").split()[1:]:
            counts[word] = counts.get(word, 0) + 1
    frequent = sorted(counts, key=lambda word: -counts[word])[:40]
    assert len(counts) > 2000
    assert all(f"Ġ{word}" in tokenizer.get_vocab() for word in frequent)


def test_the_configuration_names_the_tokens_that_frameworks_look_for(
    checkpoint: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    config, generation = AutoConfig.from_pretrained(checkpoint), GenerationConfig.from_pretrained(checkpoint)
    assert config.thinker_config.user_token_id == tokenizer.convert_tokens_to_ids("user")
    for place in (config, config.thinker_config.text_config, generation):
        assert (place.eos_token_id, place.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


@pytest.mark.parametrize("words", [(), ("--thinking", "--opens-thinking")], ids=["instruct", "thinking"])
def test_qwen3_has_the_layout_of_its_public_checkpoints(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert build(tmp_path / "model", "--family", "qwen3_omni_moe", *words).returncode == 0
    family = family_of(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    loaded: Any = Qwen3OmniMoeForConditionalGeneration.from_pretrained(tmp_path / "model", output_loading_info=True)
    model, loading = loaded
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.has_talker == (not words) == ("talker_config" in config)
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    content = [{"type": "audio"}, {"type": "text", "text": "Which?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    asked = f"<|im_start|>user\n{family.audio_placeholder}Which?<|im_end|>\n<|im_start|>assistant\n"
    assert text == asked + ("<think>\n" if words else "")
    assert family.prompt(text) == asked, "the answer opens its own <think>"
    assert family.special_ids(processor.tokenizer, tmp_path / "model").audio != processor.tokenizer.unk_token_id
    assert processor.tokenizer.tokenize("</seg></think>")[-1] == "</think>", "one token, as in Qwen3"
    assert "<think>" in processor.tokenizer.decode(processor.tokenizer.encode("<think>"), skip_special_tokens=True)
    names = load_file(tmp_path / "model" / "model.safetensors")
    assert "thinker.model.layers.0.mlp.experts.3.gate_proj.weight" in names, "on disk the experts are one by one"
    for name, weights in names.items():  # transformers leaves the talker's experts as whatever was in memory
        assert weights.abs().max() < 10, name


def test_words_of_reasoning_built_from_events_are_learned_too(tmp_path: Path) -> None:
    events = [{"label": "glockenspiel", "start": 0.5, "end": 1.0}]
    row = {"id": "1", "audio": "a.wav", "question": "What?", "choices": ["a", "b"], "answer": "a", "events": events}
    (tmp_path / "own.jsonl").write_text(json.dumps(row))
    assert build(tmp_path / "model", "--text", str(tmp_path / "own.jsonl")).returncode == 0
    vocabulary = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model").get_vocab()
    assert "glockenspiel" in vocabulary and "Ġhear" in vocabulary


def test_a_vocabulary_that_is_too_small_is_one_clear_error(tmp_path: Path) -> None:
    done = build(tmp_path / "model", "--vocab-size", "400")
    assert done.returncode == 1 and not (tmp_path / "model").exists()
    assert "--vocab-size 400 leaves" in done.stderr and "Traceback" not in done.stderr
