"""Rewards as plug-ins: terms.py holds one function a term, compose.py weighs them, presets/ has the YAML files.

`load_preset("paper").score(record)` is all that a caller needs.
"""

from .compose import Preset, PresetError, Scored, load_preset
from .terms import Record, term

__all__ = ["Preset", "PresetError", "Record", "Scored", "load_preset", "term"]
