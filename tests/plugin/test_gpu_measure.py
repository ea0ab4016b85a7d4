"""What the GPU tests measure with, at a size that a CPU takes."""

from pathlib import Path

from gpu_measure import as_table, training_step
from transformers import Qwen2_5OmniConfig


def test_a_step_is_measured_and_trains_the_text_model_alone(tiny_model: Path) -> None:
    config = Qwen2_5OmniConfig.from_pretrained(tiny_model).thinker_config
    measured = training_step(config, "cpu", 400)
    assert 0 < measured.trained < measured.parameters and measured.seconds > 0 and 0 < measured.loss < 20
    assert as_table("a card", "2026-01-01", {"tiny": measured}).count("\n") == 4
