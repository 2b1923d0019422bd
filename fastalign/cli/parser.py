"""Command line and YAML file to dataclasses: one parser for every training command and for your own scripts."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import sys
from collections.abc import Iterable
from enum import Enum
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from transformers.hf_argparser import HfArgumentParser, string_to_bool

from .arguments import parse_columns
from .config_file import nearest, read_config, set_environment, split_config_option
from .option_help import OptionHelp, option_group, order_groups, placeholder


class AlignParser(HfArgumentParser):
    """Parser of dataclasses with a YAML file: `--config run.yaml` gives values, the command line overrides them.

    An `env:` block in the file sets environment variables. A name that no dataclass has is an error that tells the
    nearest one. Names may be written with hyphens; `none` unsets a field that may be unset; mappings are JSON or
    `key=value,key=value`. Options are grouped in `--help` by the class (and, for
    `TrainingArguments`, by the section of its documentation) that they come from.
    """

    def __init__(self, dataclass_types=None, **kwargs):
        types = [] if dataclass_types is None else dataclass_types
        types = list(types) if isinstance(types, Iterable) else [types]
        for dataclass_type in types:
            if "config" in dataclass_type.__dataclass_fields__:
                raise ValueError(
                    f"Dataclass {dataclass_type.__name__} has a field named 'config', the name of the option for "
                    "the YAML file. Rename the field."
                )
        self._hints: dict[str, Any] = {}  # option -> type it was declared with
        super().__init__(types, **({"formatter_class": OptionHelp, "allow_abbrev": False} | kwargs))
        self.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file with options.")
        order_groups(self)
        self._unset = {a.dest: self._default_value(a) for a in reversed(self._actions)}  # --no_x comes after --x

    def _default_value(self, action: argparse.Action):
        is_text = isinstance(action.default, str) and action.default != argparse.SUPPRESS
        return self._get_value(action, action.default) if is_text else action.default  # as argparse does

    # Building

    def _add_dataclass_arguments(self, dtype) -> None:
        hints = get_type_hints(dtype)
        for field in dataclasses.fields(dtype):
            if not field.init:
                continue
            field.type = hints[field.name]
            self._hints[field.name] = hints[field.name]
            known = len(self._actions)
            group: Any = option_group(self, dtype, field.name)  # takes options like a parser
            self._parse_dataclass_field(group, field)
            for action in self._actions[known:]:
                _complete(action, hints[field.name])

    def error(self, message: str):
        """Print what is wrong and end with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n`{self.prog} --help` lists the options.\n")

    # Parsing

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """One instance per dataclass, from the command line (`sys.argv` if `args` is None) and the YAML file it names.

        Unknown names raise ValueError; with `return_remaining_strings` they are returned as a last element (as two,
        file and command line, with `separate_remaining_strings`), and `fail_with_unknown_args=False` drops the file's.
        """
        arguments, config_remaining = self.read_config_option(args)
        *parsed, remaining = self.parse_args_into_dataclasses(
            args=arguments, return_remaining_strings=True, look_for_args_file=False
        )
        if return_remaining_strings and separate_remaining_strings:
            return (*parsed, config_remaining, remaining)
        if return_remaining_strings:
            return (*parsed, config_remaining + remaining)
        if remaining or (config_remaining and fail_with_unknown_args):
            raise ValueError(self.unknown_message(config_remaining if fail_with_unknown_args else [], remaining))
        return tuple(parsed)

    def read_config_option(self, args: Iterable[str] | None) -> tuple[list[str], list[str]]:
        """Take in the YAML file that `args` names: (the other arguments, what nobody knows of the file)."""
        arguments, path = split_config_option(list(sys.argv[1:] if args is None else args))
        if path is None:
            return arguments, []
        config = read_config(path)
        set_environment(config)
        return arguments, self.set_defaults_with_config(**config)

    def set_defaults_with_config(self, **kwargs) -> list[str]:
        """Make the given values the defaults (and their options optional); what no option takes returns as strings."""
        used = set()
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    left = parser.set_defaults_with_config(**kwargs)[::2]
                    used.update(kwargs.keys() - {option.removeprefix("--") for option in left})
            elif action.dest in kwargs:
                action.default = self._checked(action, kwargs[action.dest])
                action.required = False
                used.add(action.dest)
        return [text for name, value in kwargs.items() if name not in used for text in (f"--{name}", str(value))]

    def given(self, namespace: argparse.Namespace) -> dict[str, Any]:
        """The options of a parsed namespace that differ from the defaults of their dataclass, as plain values."""
        values = {name: getattr(namespace, name) for name in self._hints if hasattr(namespace, name)}
        for name, value in values.items():
            if isinstance(value, list):
                values[name] = [vars(v) if dataclasses.is_dataclass(v) else v for v in value]
        return {name: value for name, value in values.items() if value != self._unset[name]}

    def unknown_message(self, from_file: list[str], from_command_line: list[str]) -> str:
        """Name each unknown option and the one most like it."""
        parts = []
        for source, strings in (("in the config file", from_file), ("on the command line", from_command_line)):
            names = [text.split("=")[0] for text in strings if text.startswith("--")] or strings[:1]
            parts += [f"unknown option `{n.lstrip('-')}` {source}{nearest(n, self._hints)}" for n in names]
        return "; ".join(parts) + "."

    def _checked(self, action: argparse.Action, value):
        """A YAML value as the field takes it; texts are read as on the command line. ValueError if it does not fit."""
        hint = self._hints.get(action.dest, Any)
        value = _yaml_bool(hint, value)
        if isinstance(action.nargs, str) and action.nargs in "+*" and value is not None:
            value = value if isinstance(value, list) else [value]
            return [self._read(action, item) if isinstance(item, str) else item for item in value]
        if isinstance(value, str):
            return self._read(action, value)
        if not _fits(hint, value):
            if str in _members(hint) and isinstance(value, (int, float)):
                return str(value)
            raise ValueError(
                f"`{action.dest}` in the config file is {value!r}; it must be {placeholder(action, hint)}."
            )
        return value

    def _read(self, action: argparse.Action, text: str):
        try:
            value = self._get_value(action, text)
            self._check_value(action, value)
        except argparse.ArgumentError as error:
            raise ValueError(f"`{action.dest}` in the config file: {error.message}.") from error
        return value


TrlParser = AlignParser


def _members(hint) -> tuple:
    """The alternatives of a union, or the type itself."""
    plain = get_origin(hint) in (None, list, dict, Literal)
    return (hint,) if plain else get_args(hint)


def _complete(action: argparse.Action, hint) -> None:
    """Let an option that argparse would read too narrowly take flags, `none` and mappings; give it a placeholder."""
    members = _members(hint)
    if action.type is string_to_bool and action.nargs is None:  # bool | None: `--bf16` alone means true
        action.nargs, action.const = "?", True
    kinds = {get_origin(member) or member for member in members}
    if dict in kinds and str not in kinds:
        action.type = _mapping
    elif action.type is not None and NoneType in members and not kinds & {str, list}:
        action.type = _or_none(action.type)
    action.metavar = placeholder(action, hint)


def _or_none(read):
    def read_or_none(text: str):
        return None if text.lower() in ("none", "null") else read(text)

    read_or_none.__name__ = getattr(read, "__name__", str(read))  # argparse names it in "invalid int value"
    return read_or_none


def _mapping(text: str) -> dict | None:
    if text.lower() in ("none", "null"):
        return None
    try:
        return json.loads(text) if text.lstrip().startswith("{") else parse_columns(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither JSON nor key=value,key=value ({error})") from error


def _yaml_bool(hint, value):
    """YAML reads `no` as false and `yes` as true: give fields of words (`eval_strategy: no`) their word back."""
    members = _members(hint)
    if not isinstance(value, bool) or bool in members or not any(m is str or _is_enum(m) for m in members):
        return value
    return "no" if not value and any(map(_is_enum, members)) else str(value).lower()


def _is_enum(kind) -> bool:
    return inspect.isclass(kind) and issubclass(kind, Enum)


def _fits(hint, value) -> bool:
    """Whether a YAML value that is no text (number, bool, list, mapping, null) is of the declared type."""
    if hint is Any or get_origin(hint) is Literal:
        return hint is Any or value in get_args(hint)
    if len(members := _members(hint)) > 1:
        return any(_fits(member, value) for member in members)
    kind = get_origin(hint) or hint
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return inspect.isclass(kind) and isinstance(value, kind)
