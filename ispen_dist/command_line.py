"""Settings from a YAML file and the command line, checked against the sections of `config.py`.

jsonargparse knows the types, the help texts and the conversion of values; this file adds the
order of precedence, the names of unknown keys' nearest relatives, and one-line errors.
"""

import dataclasses
import difflib
import re
import sys
import typing
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from ispen_dist.config import Config, ConfigError

set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass(frozen=True)
class TrainCommand:
    """What `launcher/train.py` was asked to do.

    Attributes:
        config: all settings.
        name: of the configuration file, for the default run folder.
        output: run folder, or None for a new one under runs/.
        resume: `auto`, `none`, or a checkpoint folder.
        print_config: print the settings and their cost, and exit.
    """

    config: Config
    name: str
    output: Path | None
    resume: str
    print_config: bool


def parse_train(argv: Sequence[str] | None = None) -> TrainCommand:
    """Parse the command line of `launcher/train.py`.

    An error is printed as one line and ends the program with exit code 2.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(with_settings="--help" in arguments or "-h" in arguments)
    known, flags = _split_flags(parser, arguments)
    try:
        path = Path(known.config)
        values = _merged(_read_yaml(path), _flag_values(flags))
        config = config_from_dict(values)
    except ConfigError as error:
        print(f"error: {known.config}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    output = Path(known.output) if known.output else None
    return TrainCommand(config, path.stem, output, known.resume, known.print_config)


def _parser(with_settings: bool) -> ArgumentParser:
    parser = ArgumentParser(
        prog="launcher/train.py",
        usage="launcher/train.py --config FILE [--output DIR] [--resume auto|none|PATH] "
        "[--print-config] [--SECTION.FIELD=VALUE ...]",
        description="Train an energy network and its inference network. Every setting below "
        "stands in the YAML file and can be given as a flag, which wins.",
    )
    parser.add_argument("--config", required=True, help="YAML file of settings")
    parser.add_argument("--output", default="", help="run folder (default: runs/NAME-DATE-TIME)")
    parser.add_argument(
        "--resume", default="auto",
        help="auto: from the newest intact checkpoint of --output, if any; none; or a checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--print-config", action="store_true", help="print all settings and their cost, and exit"
    )
    if with_settings:
        parser.add_class_arguments(Config, as_group=True)
    return parser


def _split_flags(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Any, list[str]]:
    """Return the run's own arguments parsed, and the `--section.field` flags as they are."""
    flags: list[str] = []
    others: list[str] = []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if not re.match(r"--[A-Za-z_]\w*\.", argument):
            others.append(argument)
        elif "=" in argument or not pending:
            flags.append(argument)
        else:
            flags.append(f"{argument}={pending.pop(0)}")
    return parser.parse_args(others), flags


def _flag_values(flags: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for flag in flags:
        key, has_value, text = flag.removeprefix("--").partition("=")
        if not has_value:
            raise ConfigError(f"--{key}: expected a value, got none; write --{key}=VALUE")
        try:
            value = yaml.safe_load(text) if text else ""
        except yaml.YAMLError:
            value = text
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        values = _merged(values, nested)
    return values


class _UniqueKeys(yaml.SafeLoader):
    """YAML without duplicate keys, of which the last would silently win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise ConfigError(f"{key}: expected once, got twice below line {line}; join them")
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text("utf-8"), Loader=_UniqueKeys)  # a SafeLoader
    except OSError as error:
        raise ConfigError(f"expected a readable YAML file, got: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"expected UTF-8 text, got: {error.reason}; save it as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}expected YAML, got: {problem}") from error
    if not isinstance(values, dict):
        found = "an empty file" if values is None else type(values).__name__
        raise ConfigError(f"expected a mapping of sections, got {found}")
    return values


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if both else value
    return result


def _sections(kind: type, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Yield every dotted name below a section, and whether it is a section itself."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        is_section = dataclasses.is_dataclass(hint)
        yield name, is_section
        if is_section:
            yield from _sections(hint, f"{name}.")


_NAMES = dict(_sections(Config))


def _check_names(values: Mapping[str, Any], prefix: str = "") -> None:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name not in _NAMES:
            raise ConfigError(f"{name}: no such setting; the nearest is {_nearest(name, prefix)}")
        if _NAMES[name]:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{name}: expected a section with settings, got {value!r}")
            _check_names(value, f"{name}.")


def _nearest(name: str, prefix: str) -> str:
    """Return the known name most like an unknown one, of its own section if any is alike."""
    siblings = [n for n in _NAMES if n.startswith(prefix) and "." not in n[len(prefix) :]]
    keys = {n[len(prefix) :]: n for n in siblings}
    near = difflib.get_close_matches(name[len(prefix) :], keys, 1, 0.25)
    return keys[near[0]] if near else difflib.get_close_matches(name, _NAMES, 1, 0.0)[0]


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """Build and check the settings from nested plain values.

    Raises:
        ConfigError: for an unknown key, a wrong type, or settings that cannot work together.
    """
    _check_names(values)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config, as_group=True)
    try:
        return Config(**vars(parser.instantiate(parser.parse_object(dict(values)))))
    except ArgumentError as error:
        raise ConfigError(_one_line(str(error))) from None


def _one_line(message: str) -> str:
    """Return jsonargparse's account of a wrong type in the words of this project."""
    match = re.search(r'Parser key "([\w.]+)":\s*(.*)', message, re.DOTALL)
    if match is None:
        return " ".join(message.split())
    name, rest = match.groups()
    rest = re.sub(r"<class '(\w+)'>", r"\1", " ".join(rest.split()))
    rest = re.sub(r"Expected an? (?:typing\.)?", "expected ", rest, count=1)
    return f"{name}: " + rest.replace(". Got value: ", ", got ")


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return the settings as nested plain values, which `config_from_dict` reads back."""
    return dataclasses.asdict(config)


def dump_config(config: Config) -> str:
    """Return the settings as YAML, which `load_config` reads back as equal."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True, width=100)


def load_config(path: str | Path) -> Config:
    """Read settings from a YAML file.

    Raises:
        ConfigError: with the file, for whatever is wrong with it.
    """
    try:
        return config_from_dict(_read_yaml(Path(path)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
