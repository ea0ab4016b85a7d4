"""Stage 1's plug-ins in real ms-swift with the tiny model: what is trained on, what tight padding changes."""

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from swift.dataset import load_dataset
from swift.model import get_model_processor
from swift.template import MaxLengthError, get_template
from swift.template.register import TEMPLATE_MAPPING
from swift.template.templates.qwen import Qwen2_5OmniTemplate, Qwen3OmniTemplate

from converters.sft_jsonl import main as sft_jsonl
from echo_plugins import audio
from echo_plugins.for_swift import dataset, template

STOCK = TEMPLATE_MAPPING["qwen2_5_omni"]
assert STOCK.template_cls is Qwen2_5OmniTemplate, "ms-swift registers another template for Qwen2.5-Omni"
template.register()


@pytest.fixture(scope="module")
def rows_file(soundscapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    sft_jsonl(soundscapes / "sft.jsonl", target, audio_root=soundscapes, mode="interleaved", workers=1)
    return target


@pytest.fixture(scope="module")
def rows(rows_file: Path) -> list[dict[str, Any]]:
    """Of several sounds first: rows with one to four clips besides the whole."""
    return [json.loads(line) for line in rows_file.open()][::-1]


@pytest.fixture(scope="module")
def model_and_processor(tiny_model: Path) -> tuple[Any, Any]:
    return get_model_processor(str(tiny_model), torch_dtype=torch.float32, device_map="cpu")


def new_template(model_and_processor: tuple[Any, Any], **options: Any) -> Any:
    model, processor = model_and_processor
    made = get_template(processor, template_type="qwen2_5_omni", **options)
    made.set_mode("train")
    made.model = model
    return made


def crops_in_files(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The row for stock ms-swift, which reads whole files only."""
    paths = []
    for number, reference in enumerate(row["audios"]):
        path = folder / f"{Path(row['audios'][0]).stem}-{number}.wav"
        soundfile.write(path, audio.load_fragment(reference), audio.SAMPLING_RATE, subtype="FLOAT")
        paths.append(str(path))
    return {**row, "audios": paths}


def test_a_batch_is_that_of_stock_ms_swift_but_for_the_padding(
    model_and_processor: tuple[Any, Any], rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_and_processor[0].eval()
    ours = new_template(model_and_processor)
    tight = ours.data_collator([ours.encode(row) for row in rows[:3]])

    monkeypatch.setitem(TEMPLATE_MAPPING, "qwen2_5_omni", STOCK)
    extractor = model_and_processor[1].feature_extractor
    monkeypatch.setattr(extractor, "__class__", type(extractor).__mro__[1])
    stock = new_template(model_and_processor)
    assert type(stock) is Qwen2_5OmniTemplate
    padded = stock.data_collator([stock.encode(crops_in_files(row, tmp_path)) for row in rows[:3]])

    assert torch.equal(tight["input_ids"], padded["input_ids"])
    assert torch.equal(tight["labels"], padded["labels"])
    longest = int(padded["feature_attention_mask"].sum(-1).max())
    assert tight["input_features"].shape[-1] == longest < padded["input_features"].shape[-1] == 1500
    names = ("input_ids", "attention_mask", "input_features", "feature_attention_mask")
    with torch.no_grad():
        logits = [model.thinker(**{name: batch[name] for name in names}).logits for batch in (tight, padded)]
    assert torch.equal(*logits)


def test_only_what_the_model_has_to_say_is_trained(
    model_and_processor: tuple[Any, Any], rows: list[dict[str, Any]]
) -> None:
    tokenizer = model_and_processor[1].tokenizer
    ours = new_template(model_and_processor)
    for row in rows[:10]:
        encoded = ours.encode(row)
        trained = [label for label in encoded["labels"] if label != -100]
        spoken = row["messages"][1]["content"].replace("<audio>", "")
        assert tokenizer.decode(trained) == spoken + "<|im_end|>\n"
        counts = [
            encoded["input_ids"].count(tokenizer.convert_tokens_to_ids(text))
            for text in ("<|audio_bos|>", "<|audio_eos|>")
        ]
        assert counts == [len(row["audios"])] * 2


def test_a_fragment_is_that_piece_of_the_file_decoded_once(
    rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    references = rows[0]["audios"]
    expected = [audio.load_fragment(reference) for reference in references]
    loads: list[str] = []
    load = audio.load
    monkeypatch.setattr(audio, "load", lambda path: loads.append(path) or load(path))
    clips = template.waveforms(list(references))
    assert len(references) > 1 and loads == references[:1]
    for clip, whole in zip(clips, expected, strict=True):
        assert (clip == whole).all()


def test_what_cannot_be_heard_is_named(model_and_processor: tuple[Any, Any], rows: list[dict[str, Any]]) -> None:
    path = rows[0]["audios"][0]
    with pytest.raises(audio.AudioError, match="no sound there"):
        template.waveforms([f"{path}#t=900.00,901.00"])
    ours = new_template(model_and_processor)
    with pytest.raises(audio.AudioError, match="-gone"):
        ours.encode({**rows[0], "audios": [path.replace(".wav", "-gone.wav"), *rows[0]["audios"][1:]]})


def test_an_overlong_row_is_named_when_it_is_read(
    model_and_processor: tuple[Any, Any], rows: list[dict[str, Any]]
) -> None:
    with pytest.raises(MaxLengthError, match=Path(rows[0]["audios"][0]).name):
        new_template(model_and_processor, max_length=64).encode(rows[0])


def test_the_lengths_that_rows_are_sorted_by_are_those_of_training(
    model_and_processor: tuple[Any, Any], rows: list[dict[str, Any]], tiny_model: Path
) -> None:
    lengths = dataset.Lengths.of_model(str(tiny_model))
    ours = new_template(model_and_processor)
    for row in rows[:10]:
        excess = lengths.num_tokens(row) - len(ours.encode(row)["input_ids"])
        assert 0 <= excess <= dataset.TEMPLATE_TOKENS


def test_overlong_rows_are_left_out_and_named(
    rows_file: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = rows_file.read_bytes().splitlines(keepends=True)
    counts = [dataset.Lengths.of_model(str(tiny_model)).num_tokens(json.loads(line)) for line in lines]
    limit = sorted(counts)[len(counts) // 2]
    fit, overlong = tmp_path / "fit.jsonl", tmp_path / "overlong.jsonl"
    options = ["--model", str(tiny_model), "--max-length", str(limit), "--overlong", str(overlong)]
    assert dataset.main([str(rows_file), str(fit), *options]) == 0
    assert fit.read_bytes() == b"".join(line for line, count in zip(lines, counts, strict=True) if count <= limit)
    named = [json.loads(line) for line in overlong.open()]
    said = f"== {len(named)} of {len(lines)} rows are left out: over {limit} tokens"
    assert said in capsys.readouterr().err, "a recipe shows it on the terminal"
    assert [(name["line"], name["tokens"]) for name in named] == [
        (number, count) for number, count in enumerate(counts, start=1) if count > limit
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row["audios"].append(row["audios"][0]), "tags for"),
        (lambda row: row["audios"].__setitem__(0, "/nowhere/x.wav"), "no file /nowhere/x.wav"),
        (lambda row: row["messages"].reverse(), "one of the user and one of the assistant"),
        (lambda row: row["audios"].__setitem__(-1, row["audios"][0] + "#t=500.00,501.00"), "names no sound"),
    ],
)
def test_a_row_that_ms_swift_would_mend_in_silence_ends_the_run(
    change: Any,
    message: str,
    rows: list[dict[str, Any]],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = json.loads(json.dumps(rows[0]))
    change(bad)
    source, fit = tmp_path / "rows.jsonl", tmp_path / "fit.jsonl"
    source.write_text(json.dumps(rows[1]) + "\n" + json.dumps(bad) + "\n")
    options = ["--model", str(tiny_model), "--max-length", "4096", "--overlong", str(tmp_path / "overlong.jsonl")]
    assert dataset.main([str(source), str(fit), *options]) == 1
    error = capsys.readouterr().err
    assert "line 2" in error and message in error
    assert not fit.exists()


def test_ms_swift_reads_the_rows_in_their_order_and_as_they_are(rows_file: Path) -> None:
    read: Any = load_dataset(str(rows_file), strict=True, shuffle=False, load_from_cache_file=False)[0]
    expected = [json.loads(line) for line in rows_file.open()]
    assert [row["audios"] for row in read] == [row["audios"] for row in expected]
    for got, row in zip(read, expected, strict=True):
        assert [{key: m[key] for key in ("role", "content")} for m in got["messages"]] == row["messages"]


def test_both_families_have_our_template() -> None:
    assert TEMPLATE_MAPPING["qwen2_5_omni"].template_cls is template.RelistenQwen2_5OmniTemplate
    qwen3 = TEMPLATE_MAPPING["qwen3_omni"]
    assert qwen3.template_cls is template.RelistenQwen3OmniTemplate
    assert issubclass(qwen3.template_cls, Qwen3OmniTemplate) and qwen3.thinking_prefix == "<think>\n"
