"""How `--help` looks: options grouped by where they come from, with a placeholder and the default."""

from __future__ import annotations

import argparse
import functools
import inspect
import re
from enum import Enum
from types import NoneType
from typing import get_args, get_origin

from transformers import TrainingArguments

TITLES = {
    "AlignConfig": "training loop",
    "AnswerArgs": "answers",
    "BatchArgs": "batches of completions",
    "CompletionLogArgs": "log of completions",
    "CorrectionArgs": "correction of engines",
    "DatasetMixtureConfig": "data",
    "EngineArgs": "engine",
    "GroupArgs": "batches of completions",
    "LengthArgs": "sequences",
    "LoadArgs": "model loading",
    "ModelArgs": "model loading",
    "MovingReferenceArgs": "reference",
    "RewardArgs": "rewards",
    "RowArgs": "sequences",
    "SamplingArgs": "sampling",
}
SECTIONS = {  # fields that the documentation of `TrainingArguments` has under no heading, or under a misleading one
    "output_dir": "Training Duration and Batch Size",
    "resume_from_checkpoint": "Resuming Training",
    "local_rank": "Hardware Configuration",
}
MOST_CHOICES = 6  # more are listed in the sentence instead of the placeholder


class OptionHelp(argparse.HelpFormatter):
    """One name per option (hyphenated spellings and `--no_x` work, but are not listed), and the default at the end."""

    def __init__(self, prog, indent_increment=2, max_help_position=34, width=None, **kwargs):
        super().__init__(prog, indent_increment, max_help_position, width, **kwargs)

    def _format_action_invocation(self, action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return (
            f"{action.option_strings[0]} {self._format_args(action, self._get_default_metavar_for_optional(action))}"
        )

    def _get_help_string(self, action) -> str:
        text = (action.help or "").strip()
        if len(choices := _choices(action)) > MOST_CHOICES:
            text += f" One of {', '.join(choices)}."
        if action.default in (None, argparse.SUPPRESS, []) or action.required:
            return text
        return f"{text} [default: {str(getattr(action.default, 'value', action.default)).replace('%', '%%')}]"

    def add_argument(self, action) -> None:
        if not any(option.startswith("--no_") and action.nargs == 0 for option in action.option_strings):
            super().add_argument(action)


@functools.cache
def _training_sections() -> dict[str, str]:
    """Field of `TrainingArguments` -> heading (`> Logging`) that its documentation has it under."""
    sections, heading = {}, "Training"
    for title, name in re.findall(
        r"^ *> ([A-Z].{,60})$|^ *(\w+) ?\([^)]*`", inspect.getdoc(TrainingArguments) or "", re.M
    ):
        if title:
            heading = title
        else:
            sections[name] = heading
    return sections | SECTIONS


def option_group(parser: argparse.ArgumentParser, dtype: type, name: str) -> argparse._ArgumentGroup:
    """The group of field `name` of dataclass `dtype`: of the first class in its ancestry that declares the field."""
    owner = next(c for c in reversed(dtype.__mro__) if name in inspect.get_annotations(c))
    if owner is TrainingArguments:
        title = _training_sections().get(name, "Other Training Settings").lower()
    else:
        title = owner.__dict__.get("_argument_group_name") or TITLES.get(owner.__name__)
        title = title or re.sub("(Config|Args|Arguments)$", "", owner.__name__) or owner.__name__
    for group in parser._action_groups:
        if group.title == title:
            return group
    return parser.add_argument_group(title)


def order_groups(parser: argparse.ArgumentParser) -> None:
    """Ours first (model, data, algorithm), then those of `TrainingArguments` in its order."""
    inherited = list(dict.fromkeys(title.lower() for title in _training_sections().values()))
    first = ["positional arguments", "options", "optional arguments", "model", "data"]

    def rank(group) -> tuple[int, int]:
        if group.title in first:
            return 0, first.index(group.title)
        return (2, inherited.index(group.title)) if group.title in inherited else (1, 0)

    parser._action_groups.sort(key=rank)


def placeholder(action: argparse.Action, hint) -> str:
    """What stands for the value in the help: INT, FLOAT, TEXT, BOOL, MAPPING, or the words to choose from."""
    if 0 < len(choices := _choices(action)) <= MOST_CHOICES:
        return "{" + ",".join(choices) + "}"
    members = get_args(hint) if get_origin(hint) not in (None, list, dict) else (hint,)
    kinds = [get_origin(member) or member for member in members if member is not NoneType]
    names = {int: "INT", float: "NUMBER", bool: "BOOL", str: "TEXT", dict: "MAPPING", list: "LIST"}
    if list in kinds and action.nargs == "+":
        return "ITEM"
    words = [names.get(kind, "TEXT" if _is_text(kind) else "VALUE") for kind in kinds]
    return "|".join(dict.fromkeys(words)) or "VALUE"


def _choices(action: argparse.Action) -> list[str]:
    return [str(choice) for choice in action.choices or ()]


def _is_text(kind) -> bool:
    return inspect.isclass(kind) and issubclass(kind, Enum)
