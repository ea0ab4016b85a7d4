"""Presets: a YAML of weighted terms, checked when it is loaded, and the scoring of one record with it.

    terms:
      accuracy: 0.5                                       # a weight
      consistency: {weight: 1.0, per_tag: 0.1}            # a weight and the term's parameters
      my_terms.py:brevity: {weight: 0.2, most_words: 80}  # a term of your own

A term of your own is FILE.py:FUNCTION or package.module.function; a file is looked up beside the preset. The score is
the sum of weight x term. `python -m echo_plugins.rewards.explain` shows a preset on recorded outputs.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

import yaml

from ..relisten.segment import Segment
from ..relisten.trajectory import Attempt
from .terms import TERMS, Event, MissingInformation, Record, Term

PRESETS = Path(__file__).with_name("presets")

# Everything that a term may ask for is there: what a shipped term makes of it is known when a preset is loaded.
EXAMPLE = Record(
    text="<think>At <seg>1.00, 2.00</seg> there is a bell.</think><answer>a bell</answer>",
    ground_truth="a bell",
    choices=("a dog", "a bell"),
    duration_seconds=4.0,
    attempts=(Attempt("<seg>1.00, 2.00</seg>", Segment(1.0, 2.0), None, straddled=False, inserted=True),),
    answer_logprobs=(-0.5, -0.1),
    question="What is heard?",
    events=(Event(1.0, 2.0, "bell"),),
)

_log = logging.getLogger(__name__)


class PresetError(ValueError):
    """A preset that cannot be used: what is wrong, where, and what would be right."""


@dataclass(frozen=True)
class Scored:
    """`components`: the weighted value of every term of the preset, which add up to `score`. `errors`: the terms that
    raised or gave no finite number for this record, `missing`: those that the record lacks something for; both 0."""

    score: float
    components: dict[str, float]
    errors: dict[str, str]
    missing: dict[str, str]


@dataclass(frozen=True)
class WeightedTerm:
    """`parameters`: those that the preset sets; `function` has them already."""

    name: str
    weight: float
    parameters: Mapping[str, Any]
    function: Term


@dataclass(frozen=True)
class Preset:
    name: str
    terms: tuple[WeightedTerm, ...]
    _warned: set[str] = field(default_factory=set, repr=False, compare=False)  # a term that raises does so in every row

    def score(self, record: Record) -> Scored:
        """A failed rollout scores 0 in every term; so does a term that raises or returns no finite number."""
        components = {weighted.name: 0.0 for weighted in self.terms}
        errors: dict[str, str] = {}
        missing: dict[str, str] = {}
        for weighted in () if record.failed else self.terms:
            try:
                value = float(weighted.function(record))
            except MissingInformation as error:
                missing[weighted.name] = str(error)
            except Exception as error:  # noqa: BLE001 - a term is the user's code: one bad row must not end a run
                errors[weighted.name] = f"{type(error).__name__}: {error}"
            else:
                if math.isfinite(value):
                    components[weighted.name] = weighted.weight * value
                else:
                    errors[weighted.name] = f"returned {value}"
        for name, what in errors.items():
            if name not in self._warned:
                self._warned.add(name)
                _log.warning("== reward term %s of preset %s counts as 0 (said once): %s", name, self.name, what)
        return Scored(math.fsum(components.values()), components, errors, missing)

    def needs_logprobs(self) -> bool:
        """Whether some term cannot do without the engine's log-probabilities of the answer."""
        return bool(self.score(replace(EXAMPLE, answer_logprobs=None)).missing)


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_preset(name_or_path: str | Path) -> Preset:
    """A preset by name (`paper`) or by path (`my.yaml`, `dir/my.yaml`).

    Raises PresetError for an unknown name, term or parameter, a weight that is no finite number, or a file that is no
    such YAML.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = PRESETS / f"{name_or_path}.yaml"
        if path.parent != PRESETS or not path.is_file():
            raise PresetError(
                f"no reward preset is called {str(name_or_path)!r}: there are {', '.join(preset_names())}, "
                "or give the path of a .yaml file"
            )
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PresetError(f"cannot read the reward preset {path}: {error}") from error
    if not isinstance(document, Mapping) or set(document) != {"terms"} or not isinstance(document["terms"], Mapping):
        raise PresetError(f"{path}: a preset is a mapping with the one key `terms`, itself a mapping of term: weight")
    if not document["terms"]:
        raise PresetError(f"{path}: the preset names no term")
    terms = tuple(_weighted(str(spec), entry, path) for spec, entry in document["terms"].items())
    names = [weighted.name for weighted in terms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PresetError(f"{path}: two terms are called {', '.join(twice)}; components are logged by this name")
    return Preset(path.stem, terms)


def _weighted(spec: str, entry: Any, path: Path) -> WeightedTerm:
    if isinstance(entry, Mapping):
        parameters = {str(key): value for key, value in entry.items() if key != "weight"}
        weight = entry.get("weight")
    else:
        parameters, weight = {}, entry
    if not _is_number(weight):
        raise PresetError(f"{path}: the weight of {spec} is {weight!r}, which is not a finite number")
    name, function = _find(spec, path)
    signature = inspect.signature(function)
    try:
        signature.bind(None, **parameters)
    except TypeError as error:
        raise PresetError(f"{path}: {spec} cannot be called so: {error}; its signature is {signature}") from error
    for key, value in parameters.items():
        if key in signature.parameters and _is_number(signature.parameters[key].default) and not _is_number(value):
            raise PresetError(f"{path}: {key} of {spec} is {value!r}, which is not a finite number")
    bound = partial(function, **parameters)
    if spec in TERMS:
        try:
            bound(EXAMPLE)
        except (ValueError, TypeError) as error:
            raise PresetError(f"{path}: {spec}: {error}") from error
    return WeightedTerm(name, float(weight), parameters, bound)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _find(spec: str, preset: Path) -> tuple[str, Term]:
    """The name to log a term by, and its function."""
    if spec in TERMS:
        return spec, TERMS[spec]
    module_name, _, attribute = spec.rpartition(":" if ":" in spec else ".")
    if not module_name:
        raise PresetError(
            f"{preset}: no reward term is called {spec!r}: there are {', '.join(sorted(TERMS))}, "
            "or write FILE.py:FUNCTION or package.module.function"
        )
    try:
        module = _load_file(preset.parent / module_name) if ":" in spec else importlib.import_module(module_name)
    except (ImportError, OSError, SyntaxError) as error:
        raise PresetError(f"{preset}: cannot load the reward term {spec}: {error}") from error
    function: Term | None = getattr(module, attribute, None)
    if not callable(function):
        raise PresetError(f"{preset}: {module_name} has no function {attribute}")
    if inspect.iscoroutinefunction(function):
        raise PresetError(f"{preset}: {spec} is async; a term is a plain function")
    return attribute, function


def _load_file(path: Path) -> ModuleType:
    if path.suffix != ".py" or not path.is_file():
        raise FileNotFoundError(f"there is no Python file {path}")
    spec = importlib.util.spec_from_file_location(f"echo_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not an importable Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up by name
    spec.loader.exec_module(module)
    return module
