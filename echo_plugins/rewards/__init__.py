"""Rewards as plug-ins: terms.py holds one function a term, compose.py weighs them, presets/ has the YAML files.

`load_preset("paper").score(record)` is all that a caller needs. explain.py shows presets on recorded outputs.
"""

from .compose import Preset, PresetError, Scored, load_preset
from .terms import Event, MissingInformation, Record, term

__all__ = ["Event", "MissingInformation", "Preset", "PresetError", "Record", "Scored", "load_preset", "term"]
