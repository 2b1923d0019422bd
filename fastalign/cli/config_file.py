"""Reading a run's YAML file, and its `env:` block early enough to matter; imports nothing heavy."""

from __future__ import annotations

import os
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any


def split_config_option(arguments: list[str]) -> tuple[list[str], str | None]:
    """Take `--config PATH` out of the arguments: (the rest, PATH or None). ValueError if given twice."""
    rest: list[str] = []
    found: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            path = next(remaining, None)
            if path is None:
                raise ValueError("`--config` needs the path of a YAML file.")
            found.append(path)
        elif argument.startswith("--config="):
            found.append(argument.removeprefix("--config="))
        else:
            rest.append(argument)
    if len(found) > 1:
        raise ValueError(f"`--config` is given {len(found)} times ({', '.join(found)}); put the settings in one file.")
    return rest, found[0] if found else None


def read_config(path: str) -> dict[str, Any]:
    """The mapping in the YAML file `path`, its `env` block checked. ValueError for anything else."""
    import yaml

    if not Path(path).is_file():
        raise ValueError(f"The config file {path!r} does not exist.")
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"Config file {path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"Config file {path} must contain a YAML mapping (`name: value` lines).")
    if not isinstance(config.get("env") or {}, dict):
        raise ValueError(f"`env` in {path} must be a mapping of environment variables to values.")
    return config


def set_environment(config: dict[str, Any]) -> None:
    """Remove the `env` block of `config` and set the variables it names."""
    for name, value in (config.pop("env", None) or {}).items():
        os.environ[str(name)] = str(value)


def set_environment_early(arguments: list[str]) -> None:
    """Set the variables of the `env` block before anything that reads them (torch) is imported.

    What is wrong with the file is left for the parser to report.
    """
    with suppress(ValueError):
        _, path = split_config_option(arguments)
        if path is not None:
            set_environment(read_config(path))


def nearest(name: str, known) -> str:
    """`" (did you mean --x?)"` for the known name most like `name`, or an empty string."""
    near = get_close_matches(name.lstrip("-").replace("-", "_"), known, n=1)
    return f" (did you mean `{near[0]}`?)" if near else ""
