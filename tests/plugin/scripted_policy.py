"""A vLLM logits processor that makes any model say what a script says, over any number of turns.

    with scripts_in_force({"first": [ids...]}, tokenizer):
        EngineSettings(..., extra={"logits_processors": ["scripted_policy:ScriptedPolicy"]})

A prompt that holds the words `script first` is answered with that script, then with eos. All other prompts are the
model's own business. What was sampled in earlier turns is found in the prompt, so nothing is kept between turns.

Only the choice of the token is scripted. Its log-probability is the model's own, as if it had been sampled.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor
from vllm.v1.sample.sampler import Sampler

from echo_plugins.model import family_of

VARIABLE = "ECHO_TEST_SCRIPTS"
ASSISTANT = "<|im_start|>assistant\n"


@contextlib.contextmanager
def scripts_in_force(folder: Path, tokenizer: Any, scripts: Mapping[str, list[int]]) -> Iterator[None]:
    """Have the engines that start inside follow `scripts`, name to token ids."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    family = family_of(tokenizer.name_or_path)
    file = folder / "scripts.json"
    content = {
        "assistant": encode(ASSISTANT),
        "bos": tokenizer.convert_tokens_to_ids(family.audio_bos_token),
        "eos": tokenizer.convert_tokens_to_ids(family.audio_eos_token),
        "end": tokenizer.eos_token_id,
        "scripts": [[encode(f" script {name}"), ids] for name, ids in scripts.items()],
    }
    file.write_text(json.dumps(content))
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(file)
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def find(needle: list[int], ids: list[int], last: bool = False) -> int:
    """Where `needle` begins in `ids`, -1 when it is not there."""
    places = [at for at in range(len(ids) - len(needle) + 1) if ids[at : at + len(needle)] == needle]
    return -1 if not places else places[-1] if last else places[0]


class ScriptedPolicy(AdapterLogitsProcessor):
    """See the module."""

    wanted: ClassVar[dict[int, int]] = {}  # row of the engine's step -> the token that its script says next

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.content = json.loads(Path(os.environ[VARIABLE]).read_text())

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        return self.look_up

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        ScriptedPolicy.wanted = {}
        for row, look_up in self.req_info.items():
            look_up(row)
        return logits

    def look_up(self, prompt_ids: list[int], output_ids: list[int], row: int) -> None:
        for name, script in self.content["scripts"]:
            if find(name, prompt_ids) >= 0:
                said = self.said(prompt_ids) + len(output_ids)
                ScriptedPolicy.wanted[row] = script[said] if said < len(script) else self.content["end"]
                return

    def said(self, prompt_ids: list[int]) -> int:
        """Tokens of the response in the prompt, without what was inserted."""
        header = self.content["assistant"]
        response = prompt_ids[find(header, prompt_ids, last=True) + len(header) :]
        count, inside = 0, False
        for token in response:
            inside = inside or token == self.content["bos"]
            count += not inside
            inside = inside and token != self.content["eos"]
        return count


_sample = Sampler.sample


def sample(self: Sampler, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    sampled, logprobs = _sample(self, *args, **kwargs)
    for row, token in ScriptedPolicy.wanted.items():
        sampled[row] = token
    return sampled, logprobs


Sampler.sample = sample  # type: ignore[method-assign] - in the engine's process, which imports this module
