"""The prompt files under prompts/, filled in with jinja2, and their versions.

A version is a hash of a file's text and of all that it includes: it stands in the provenance of every row, and a
changed prompt makes its stage run again. Files of the same name in the config's `prompts` folder stand in for ours.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError, meta

from converters.synthesis.config import ConfigError

PROMPTS = Path(__file__).with_name("prompts")
_VERSION_CHARS = 12


class Prompts:
    """Prompt files by name, such as `eaqa/speech`."""

    def __init__(self, folder: Path | None = None) -> None:
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"prompts: {folder} is no folder")
        self._folders = [*([folder] if folder else []), PROMPTS]
        self._versions: dict[str, str] = {}

    @cached_property
    def _environment(self) -> Environment:
        # Plain text for a model, not a page: nothing is escaped. What rows hold is filled in, never run as a template.
        loader = FileSystemLoader(self._folders)
        return Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)

    def render(self, name: str, **values: Any) -> str:
        """Raises ConfigError where the file asks for something that the stage does not know."""
        try:
            return self._environment.get_template(f"{name}.md").render(**values).strip()
        except TemplateError as error:
            raise ConfigError(f"prompt {name}: {error}") from error

    def version(self, name: str) -> str:
        """The hash of the prompt with all that it includes. Raises ConfigError."""
        if name not in self._versions:
            self._versions[name] = self._hash(name)
        return self._versions[name]

    def _hash(self, name: str) -> str:
        texts: dict[str, str] = {}
        waiting = [f"{name}.md"]
        while waiting:
            file = waiting.pop()
            if file not in texts:
                try:
                    source, _, _ = FileSystemLoader(self._folders).get_source(self._environment, file)
                    parsed = self._environment.parse(source)
                except TemplateError as error:
                    raise ConfigError(f"prompt {name}: {error}") from error
                texts[file] = source
                waiting += [found for found in meta.find_referenced_templates(parsed) if found]
        whole = "\0".join(f"{file}\0{text}" for file, text in sorted(texts.items()))
        return hashlib.sha256(whole.encode()).hexdigest()[:_VERSION_CHARS]
