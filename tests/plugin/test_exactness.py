"""What the actor trains on is what the engine sampled, to the token and to the log-prob.

Trajectories are rolled out on the shared vLLM by our agent loop, become rows through verl's worker, and are scored and
trained on by verl's actor, configured by script/stage2_multiturn_rl.sh, on one rank and on two.
"""

from __future__ import annotations

import asyncio
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from actor_ranks import Job, Row
from omegaconf import OmegaConf
from test_verl_stage import GIVEN, configuration, stage
from verl.protocol import DataProto
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.utils.tokenizer import hf_processor
from verl_rollout import MAX_RESPONSE_TOKENS, messages_of, roll_out, row_of

from echo_plugins.model import family_of
from echo_plugins.relisten.trajectory import SpecialIds

TEMPERATURE = 0.8  # not 1: a temperature that one side leaves out shows
BABBLE_TOKENS = 48
# Differences up to 2e-6 were measured: other kernels, a mask in the place of packing, all in float32.
TOLERANCE = 1e-5
ACTOR_SECONDS = 400  # an idle machine of two cores needs a tenth of it; ranks that wait for each other wait for ever

# How each row is asked. Those with a script say it; the others are sampled freely. The silent ones have no sound.
CLIPS = {"text": 0, "once": 1, "four": 4, "many": 8, "kept": 4}
QUESTIONS = {
    **{name: f"Answer by script {name}" for name in ("text", "once", "four", "many")},
    "kept": "Answer by script four",
    "babble": "Which sound is it?",
    "silent": "Answer by script clips",
    "silent babble": "Which?",
}
SILENT = ("silent", "silent babble")

PAIR = ("four", "once")
LEARNED = ("once", "four", "many", "silent")
# Rank by rank: rows with and without sound on both, and a rank that has none with sound.
MIXED = (("once", "silent", "text"), ("many", "four", "silent babble"))
APART = (SILENT, ("once", "many"))
# What an update reads of each token, and by how much it is moved there: by different amounts, as differences count.
MOVES = {"log_probs": 0.25, "old_log_probs": 0.5, "ref_log_prob": 1.0, "advantages": 2.0}
SAMPLED, OBSERVED = 1, 0  # the response mask

Results = dict[int, dict[str, list[Any]]]  # number of ranks -> name of a job -> what it gave on each rank
Gradients = dict[str, Any]  # a tensor by the name of its parameter, None where there is no gradient


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return hf_processor(str(tiny_model))


@pytest.fixture(scope="module")
def ids(processor: Any, tiny_model: Path) -> SpecialIds:
    return family_of(tiny_model).special_ids(processor.tokenizer, tiny_model)


@pytest.fixture(scope="module")
def rows(
    engine_session: Any, tiny_model: Path, processor: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Row]:
    """All of QUESTIONS, rolled out at once."""
    folder, random = tmp_path_factory.mktemp("sound"), np.random.default_rng(0)
    # as verl's worker asks, and a seed
    sampling = {"temperature": TEMPERATURE, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}

    async def roll(number: int, name: str) -> Row:
        path = folder / f"{number}.wav"
        soundfile.write(path, random.uniform(-0.5, 0.5, 32_000 + 3_000 * number), 16_000)
        output = await roll_out(
            engine_session.engine.llm,
            tiny_model,
            processor,
            messages_of(QUESTIONS[name], ("A", "B"), None if name in SILENT else str(path)),
            {**sampling, "seed": number},
            max_response_tokens=BABBLE_TOKENS if "babble" in name else MAX_RESPONSE_TOKENS,
            straddle="keep" if name == "kept" else "cut",
        )
        output.reward_score = float(number % 3)
        return await row_of(output, processor, name)

    async def roll_all() -> list[Row]:
        return await asyncio.gather(*(roll(number, name) for number, name in enumerate(QUESTIONS)))

    made = dict(zip(QUESTIONS, engine_session.run(roll_all()), strict=True))
    add_advantages(made)
    return made


def add_advantages(rows: dict[str, Row]) -> None:
    """GRPO's, as the trainer computes them; all rows are one group."""

    def padded(name: str) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([row[name] for row in rows.values()], batch_first=True)

    data = DataProto.from_single_dict(
        {"response_mask": padded("response_mask"), "token_level_rewards": padded("rm_scores")}
    )
    data.non_tensor_batch["uid"] = np.array(["group"] * len(rows), dtype=object)
    data = compute_advantage_for_multi_trajectories(data, [f"{name}_0_0" for name in rows], "grpo", config={})
    for row, advantages in zip(rows.values(), data.batch["advantages"], strict=True):
        row["advantages"] = advantages[: len(row["response_mask"])]


def replaced(row: Row, audio_id: int) -> Row:
    """Another row in the place of `row`, as long: the words in another order, the sound backwards."""
    ids = row["input_ids"].clone()
    is_word = ids != audio_id
    ids[is_word] = ids[is_word].flip(0)
    inputs = row["multi_modal_inputs"]
    return row | {
        "input_ids": ids,
        "multi_modal_inputs": inputs | {"audio_frames": inputs["audio_frames"].flip(0)},
    }


def only_the_last(row: Row) -> Row:
    """`row` with nothing to learn but its last token."""
    advantages = torch.zeros_like(row["advantages"])
    advantages[-1] = 1.0
    return row | {"advantages": advantages}


def job(method: str, *ranks: Sequence[Row], **options: Any) -> Job:
    return {"method": method, "ranks": [list(rows) for rows in ranks], "options": options}


@pytest.fixture(scope="module")
def actor(rows: dict[str, Row], ids: SpecialIds, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What actor_ranks.py made of the rows."""

    def of(names: Sequence[str]) -> list[Row]:
        return [rows[name] for name in names]

    first, second = of(PAIR)
    learned = of(LEARNED)
    jobs = {
        1: {
            "packed": job("log_probs", of(list(rows))),
            "padded": job("log_probs", of(list(rows)), use_remove_padding=False),
            "alone": job("log_probs", of(list(rows)), use_dynamic_bsz=False, micro_batch_size_per_gpu=1),
            "pair": job("log_probs", [first, second]),
            "another first": job("log_probs", [replaced(first, ids.audio), second]),
            "another second": job("log_probs", [first, replaced(second, ids.audio)]),
            "update": job("gradients", learned),
            "observations moved": job("gradients", learned, moves=MOVES, where=OBSERVED),
            **{f"{name} moved": job("gradients", learned, moves={name: MOVES[name]}, where=SAMPLED) for name in MOVES},
            "mixed update": job("gradients", of([*MIXED[0], *MIXED[1]])),
            "before": job("log_probs", learned),
            "step": job("step", [only_the_last(row) for row in learned], from_reference=0.0),
            "after": job("log_probs", learned),
        },
        2: {
            "mixed": job("log_probs", *map(of, MIXED)),
            "apart": job("log_probs", *map(of, APART)),
            "mixed update": job("gradients", *map(of, MIXED)),
            "step": job("step", *map(of, APART)),
        },
    }
    folder = tmp_path_factory.mktemp("actor")
    # A micro-batch takes all rows of a rank, so that they are packed into one sequence.
    settings = {
        **GIVEN,
        **{"MODEL": str(tiny_model), "DEVICE": "cpu", "RL_TEMPERATURE": str(TEMPERATURE)},
        **{"RL_LR": "1e-3", "RL_TOKENS_PER_GPU": "1000000"},
    }
    OmegaConf.save(configuration(**settings), folder / "config.yaml", resolve=True)
    torch.save(jobs, folder / "jobs.pt")
    words = shlex.split(stage(**settings).stdout.replace("\\\n", " "))
    environment = words[: words.index(sys.executable)]
    files = [str(folder / name) for name in ("config.yaml", "jobs.pt", "results.pt")]
    script = str(Path(__file__).with_name("actor_ranks.py"))
    command = [*environment, sys.executable, script, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ACTOR_SECONDS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return torch.load(folder / "results.pt", weights_only=False)


def test_the_rows_are_what_the_comparison_is_about(rows: dict[str, Row], ids: SpecialIds, processor: Any) -> None:
    """0, 1, 4 and 8 clips, the same tags unheard, a straddling token cut and kept, words sampled freely."""
    for name, row in rows.items():
        observed, clips = row["responses"][row["response_mask"] == 0], CLIPS.get(name, 0)
        assert int((observed == ids.audio_bos).sum()) == clips, name
        features = row["multi_modal_inputs"].get("audio_num_frames", ())
        assert len(features) == (0 if name in SILENT else 1 + clips), name
    plain, straddling = processor.tokenizer.convert_tokens_to_ids([">", ">,"])
    assert plain in rows["four"]["responses"][rows["four"]["response_mask"] == 0]
    assert straddling in rows["kept"]["responses"][rows["kept"]["response_mask"] == 1]
    assert "</seg>" in processor.tokenizer.decode(rows["silent"]["responses"])
    for name in ("babble", "silent babble"):
        assert len(set(rows[name]["responses"].tolist())) > 4, "sampled, and not its end at once"


@pytest.mark.parametrize(("layout", "ranks"), [("packed", 1), ("padded", 1), ("alone", 1), ("mixed", 2), ("apart", 2)])
def test_the_actor_gives_each_sampled_token_the_engines_log_prob(
    rows: dict[str, Row], actor: Results, layout: str, ranks: int
) -> None:
    names = {"mixed": MIXED, "apart": APART}.get(layout, (list(rows),))
    differences = {
        name: float((log_probs - rows[name]["rollout_log_probs"])[rows[name]["response_mask"] == 1].abs().max())
        for rank in range(ranks)
        for name, log_probs in zip(names[rank], actor[ranks][layout][rank], strict=True)
    }
    assert max(differences.values()) < TOLERANCE, differences


def test_packed_rows_do_not_attend_to_each_other(rows: dict[str, Row], actor: Results) -> None:
    """Another row in the place of one moves nothing in the other, before it or after it, not by a bit."""
    first, second = actor[1]["pair"][0]
    other, same = actor[1]["another first"][0]
    assert torch.equal(same, second) and not torch.allclose(other, first, atol=0.1)
    same, other = actor[1]["another second"][0]
    assert torch.equal(same, first) and not torch.allclose(other, second, atol=0.1)


def losses(update: dict[str, Any]) -> dict[str, Any]:
    return {name: update["metrics"][name] for name in ("loss", "actor/pg_loss", "kl_loss")}


def test_loss_and_kl_touch_no_observation(actor: Results) -> None:
    """Moved there: the actor's own log-probs, old and reference ones, advantages. Nothing else moves, not by a bit."""
    update, with_moved = actor[1]["update"][0], actor[1]["observations moved"][0]
    assert losses(with_moved) == losses(update)
    for name, gradient in update["gradients"].items():
        other = with_moved["gradients"][name]
        assert other is None if gradient is None else torch.equal(other, gradient), name


@pytest.mark.parametrize("field", MOVES)
def test_the_same_moved_at_sampled_tokens_moves_the_update(actor: Results, field: str) -> None:
    update, with_moved = actor[1]["update"][0], actor[1][f"{field} moved"][0]
    assert losses(with_moved) != losses(update)
    assert distance(with_moved["gradients"], update["gradients"]) > 1e-3


def distance(one: Gradients, other: Gradients) -> float:
    return max(float((gradient - other[name]).abs().max()) for name, gradient in one.items() if gradient is not None)


def test_two_ranks_learn_what_one_would(actor: Results) -> None:
    (one,), two = actor[1]["mixed update"], actor[2]["mixed update"]
    assert distance(one["gradients"], two[0]["gradients"]) < TOLERANCE
    assert distance(two[0]["gradients"], two[1]["gradients"]) == 0.0
    assert losses(two[0])["loss"] == pytest.approx(losses(one)["loss"], abs=TOLERANCE)


@pytest.mark.parametrize("name", LEARNED)
def test_the_sampled_eos_is_trained(rows: dict[str, Row], actor: Results, ids: SpecialIds, name: str) -> None:
    """A step on what it was worth makes the end more likely, after any number of clips."""
    assert int(rows[name]["responses"][-1]) in ids.stop and int(rows[name]["response_mask"][-1]) == 1
    place = LEARNED.index(name)
    before, after = actor[1]["before"][0][place][-1], actor[1]["after"][0][place][-1]
    assert after > before + 1.0


@pytest.mark.parametrize("ranks", [1, 2])
def test_frozen_towers_have_no_gradient_and_a_step_changes_all_else(actor: Results, ranks: int) -> None:
    for update, step in zip(actor[ranks]["mixed update"], actor[ranks]["step"], strict=True):
        frozen = {name for name in update["gradients"] if ".audio_tower." in name or ".visual." in name}
        assert frozen == {name for name, gradient in update["gradients"].items() if gradient is None}
        assert any(".audio_tower." in name for name in frozen)
        assert step["changed"] == update["gradients"].keys() - frozen
