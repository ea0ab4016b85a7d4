"""What the config file of a pipeline may say. One YAML file; a misspelt key is an error that names it.

input: clips.jsonl             # event manifest or AudioQA: one JSON object a clip
audio_root: clips
output: runs/eaqa
stages:
  caption:  {url: http://host:8000/v1, model: Qwen2.5-Omni-7B, sampling: {max_tokens: 400}}
  question: {url: https://api.example.com/v1, model: a-reasoner, key_variable: EXAMPLE_KEY}
  judge:    {url: https://api.example.com/v1, model: a-reasoner, key_variable: EXAMPLE_KEY}
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

DEFAULT_FILTERS = Path(__file__).with_name("filters.yaml")
DEFAULT_SEEDS = Path(__file__).with_name("seeds.yaml")

Model = TypeVar("Model", bound=BaseModel)


class ConfigError(ValueError):
    """The config cannot be used; the message names the file and every key that is wrong."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Price(_Strict):
    """Money for a million tokens, in any currency."""

    prompt: float = 0.0
    completion: float = 0.0


class Endpoint(_Strict):
    """A model behind an OpenAI-compatible server, vLLM's or any other.

    `concurrency` is the number of requests in flight over all tasks of the stage. `audio`: base64 sends the sound in
    the request (`input_audio`, 16 kHz WAV); file sends a file:// address, for a vLLM server on the same file system
    that was started with --allowed-local-media-path, and spares 1.3 MB for each 30 s.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    sampling: dict[str, Any] = {}
    concurrency: Annotated[int, Field(ge=1)] = 16
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    max_attempts: Annotated[int, Field(ge=1)] = 8
    max_unusable: Annotated[int, Field(ge=1)] = 3  # paid answers that cannot be read, each with another seed
    longest_wait_seconds: Annotated[float, Field(gt=0)] = 60.0
    audio: Literal["base64", "file"] = "base64"
    price: Price = Price()

    def identity(self) -> dict[str, Any]:
        """What decides the answers; where the server is and how hard it may be pressed does not."""
        return {"model": self.model, "sampling": self.sampling, "max_unusable": self.max_unusable, "audio": self.audio}


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


Endpoints = Annotated[list[Endpoint], BeforeValidator(_as_list), Field(min_length=1)]


class NearDuplicate(_Strict):
    """MinHash over 5-grams of words. `scope`: rows are compared with all others, or with those of their recording."""

    n_grams: int = 5
    num_buckets: int = 14
    hashes_per_bucket: int = 8
    scope: Literal["all", "recording"] = "all"


class Limits(_Strict):
    """The thresholds of the filters; filters.yaml gives each its value, unit and source."""

    end_tolerance_seconds: float
    min_segment_seconds: float
    min_segments: int
    max_segments: int
    max_overlap: float
    max_clip_share: float
    min_event_coverage: float
    min_think_words: int
    max_think_words: int
    num_choices: int
    max_length_ratio: float
    max_silence_accuracy: float
    min_pass_rate: float
    max_pass_rate: float
    near_duplicate: NearDuplicate
    max_per_recording: int
    contamination_jaccard: float
    min_position_p: float


class Benchmark(_Strict):
    """A benchmark that the rows must not hold: its rows in any layout, and its audio where it is at hand."""

    file: Path
    audio_root: Path | None = None


class ExecutorKind(StrEnum):
    """Where the tasks of a stage run."""

    LOCAL = "local"
    RAY = "ray"
    SLURM = "slurm"


class Executor(_Strict):
    """`workers` tasks of a stage at once. `options` go to datatrove's executor as they are: for Slurm at least `time`
    and `partition`, and `venv_path`; for Ray e.g. `mem_per_cpu_gb`. `address`: the Ray cluster's, "auto" for a running
    one. The output folder must be on a file system that all nodes share.
    """

    kind: ExecutorKind = ExecutorKind.LOCAL
    workers: Annotated[int, Field(ge=1)] = 1
    address: str | None = None
    options: dict[str, Any] = {}


class Config(_Strict):
    """A run of a pipeline. Relative paths start from the config file's folder."""

    input: Path
    audio_root: Path
    output: Path
    stages: dict[str, Endpoints]
    seed: int = 0
    tasks: Annotated[int, Field(ge=1)] = 1  # parts of the input; more of them than workers make a kill cheaper
    executor: Executor = Executor()
    prompts: Path | None = None  # a folder whose files stand in for ours of the same name
    seeds: Path = DEFAULT_SEEDS
    seeds_per_request: Annotated[int, Field(ge=1)] = 20
    silence_seconds: Annotated[float, Field(gt=0)] = 30.0
    samples_per_question: Annotated[int, Field(ge=1)] = 8  # k of pass@k
    filters_file: Path = DEFAULT_FILTERS
    filters: dict[str, Any] = {}
    benchmarks: list[Benchmark] = []
    validation_rows: Annotated[int, Field(ge=0)] = 0
    report_rows: Annotated[int, Field(ge=0)] = 12  # rows whose sound is put into the report

    def limits(self) -> Limits:
        """The thresholds, `filters` over `filters_file`. Raises ConfigError."""
        values = _read_yaml(self.filters_file)
        for key, value in self.filters.items():
            old = values.get(key)
            values[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        return _validated(Limits, values, f"{self.filters_file} with the config's filters")


def read_config(file: Path) -> Config:
    """Raises ConfigError."""
    values = _read_yaml(file)
    config = _validated(Config, values, str(file))
    base = file.resolve().parent

    def placed(path: Path) -> Path:
        return (base / path.expanduser()).resolve()

    config = config.model_copy(
        update={
            **{
                name: placed(getattr(config, name))
                for name in ("input", "audio_root", "output", "seeds", "filters_file")
            },
            "prompts": placed(config.prompts) if config.prompts else None,
            "benchmarks": [
                Benchmark(file=placed(b.file), audio_root=placed(b.audio_root) if b.audio_root else None)
                for b in config.benchmarks
            ],
        }
    )
    for name in ("input", "seeds", "filters_file"):
        if not getattr(config, name).is_file():
            raise ConfigError(f"{file}: {name}: {getattr(config, name)} is no file")
    if not config.audio_root.is_dir():
        raise ConfigError(f"{file}: audio_root: {config.audio_root} is no folder")
    for benchmark in config.benchmarks:
        if not benchmark.file.is_file():
            raise ConfigError(f"{file}: benchmarks: {benchmark.file} is no file")
    config.limits()
    return config


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: a mapping of keys is expected, this is {type(values).__name__}")
    return values


def _validated(model: type[Model], values: dict[str, Any], where: str) -> Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{where}: {wrong}") from error
