"""What the README shows can be pasted: its files and modules exist, its rows are rows, its reward is a reward."""

import importlib.util
import json
import re
from pathlib import Path

from echo_plugins.audio_qa import AudioQA
from echo_plugins.rewards import Record, load_preset

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_every_path_and_module_it_names_exists() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    scripts = re.findall(r"\bbash ((?:script|recipes)/\S+\.sh)", README)
    modules = re.findall(r"python -m ([\w.]+)", README)
    assert links and scripts and modules
    assert [path for path in (*links, *scripts) if not (ROOT / path).exists()] == []
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


def test_its_first_row_is_an_audio_qa_row_and_the_others_fit_it() -> None:
    audio_qa, sft, rl = (json.loads(line) for block in blocks("json") for line in block.splitlines())
    record = AudioQA.from_json(audio_qa)
    assert sft["messages"][1]["content"].replace("<audio>", "") == (
        f"<think>{record.think}</think><answer>{record.answer}</answer>"
    )
    assert rl["reward_model"]["ground_truth"] == record.answer
    assert tuple(rl["extra_info"]["choices"]) == record.choices


def test_its_reward_works_as_it_stands(tmp_path: Path) -> None:
    for block in (*blocks("python"), *blocks("yaml")):
        name = re.match(r"# (\S+)\n", block)
        assert name
        path = tmp_path / name[1]
        path.parent.mkdir(exist_ok=True)
        path.write_text(block)
    preset = load_preset(tmp_path / "my_reward" / "short.yaml")
    brief = Record(text="<think>a bell</think><answer>two</answer>", ground_truth="two", choices=("one", "two"))
    wordy = Record(text=f"<think>{'so ' * 300}</think><answer>two</answer>", ground_truth="two", choices=("one", "two"))
    assert preset.score(brief).components["brevity"] == 0.2 > preset.score(wordy).components["brevity"] > 0
    assert not preset.score(brief).errors
