"""Settings from YAML files and the command line, checked against the sections of `config/`.

jsonargparse checks and converts values by the fields' types, docstring_parser reads the help out
of their docstrings; this file adds the order of precedence and errors of one line.
"""

import argparse
import dataclasses
import difflib
import functools
import os
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import docstring_parser
import yaml
from jsonargparse import ArgumentParser

from ispen_dist import exits
from ispen_dist.config import Config, ConfigError
from ispen_dist.exits import Exit


@dataclass(frozen=True)
class TrainCommand:
    """What `launcher/train.py` was asked to do.

    Attributes:
        config: all settings.
        name: of the configuration files, for the default run folder.
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
    try:
        known = _Flags().parse_args(argv)
        paths = [Path(path) for path in known.config]
        config = _config_from(paths, {n: text for n, text in vars(known).items() if n in _HINTS})
    except ConfigError as error:
        print_error(error)
        raise SystemExit(Exit.CONFIGURATION) from None
    output = Path(known.output) if known.output else None
    name = "-".join(path.stem for path in paths)
    return TrainCommand(config, name, output, known.resume, known.print_config)


def print_error(error: ConfigError) -> None:
    """Print an error as one line, from one process per machine; for before processes have met."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("error:", *str(error).split(), file=sys.stderr)


class _HelpFormatter(argparse.HelpFormatter):
    """Wraps the help of every setting, but leaves the lines of the exit codes as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("Exit codes:"):
            return text
        return super()._fill_text(text, width, indent)


class _Flags(argparse.ArgumentParser):
    """The run's own flags, and one flag for every setting, whose value stays text here."""

    def __init__(self) -> None:
        super().__init__(
            prog="launcher/train.py",
            usage="%(prog)s --config FILE [--config FILE ...] [--output DIR] "
            "[--resume auto|none|PATH]\n       [--print-config] [--SECTION.FIELD=VALUE ...]",
            description="Train an energy network and its inference network. Every setting below "
            "stands in a YAML file and can be given as a flag, which wins.",
            epilog=f"Exit codes:\n{exits.table()}",
            formatter_class=_HelpFormatter,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        resume = "auto (default): from the newest intact checkpoint in DIR; none; or from PATH"
        files = "YAML file of settings; of several, each wins over those before it"
        output = "run folder (default: runs/FILE-DATE-TIME)"
        show = "print all settings and their cost, and exit"
        self.add_argument("--config", metavar="FILE", action="append", required=True, help=files)
        self.add_argument("--output", metavar="DIR", default="", help=output)
        self.add_argument("--resume", metavar="auto|none|PATH", default="auto", help=resume)
        self.add_argument("--print-config", action="store_true", default=False, help=show)
        self._add_settings(self, Config, _checker().get_defaults())

    def _add_settings(self, group: Any, kind: Any, defaults: Any, prefix: str = "") -> None:
        for field in docstring_parser.parse_from_object(kind).params:
            name, doc = prefix + field.arg_name, (field.description or "").replace("%", "%%")
            hint = _HINTS[name]
            if dataclasses.is_dataclass(hint):
                section = self.add_argument_group(f"{name}: {doc.rstrip('.')}")
                self._add_settings(section, hint, defaults, f"{name}.")
            else:
                doc += ' (default: "")' if defaults[name] == "" else f" (default: {defaults[name]})"
                group.add_argument(f"--{name}", metavar=_words(hint), help=doc)

    def error(self, message: str) -> NoReturn:
        match = re.match("unrecognized arguments: --([^= ]+)", message)
        if match is None:
            raise ConfigError(message.removeprefix("argument "))
        name = match[1]
        near = _nearest(name, [flag.removeprefix("--") for flag in self._option_string_actions])
        raise ConfigError(f"--{name}: no such setting; the nearest is --{near}")


def _config_from(paths: Sequence[Path], flags: Mapping[str, str]) -> Config:
    """Build the settings from files, then flags; an error starts with the one at fault."""
    files = {path: _read_file(path) for path in paths}
    values = _joined(files.values())
    for name, text in flags.items():
        values = _replaced(values, name.split("."), _flag_value(_HINTS[name], text))
    try:
        return config_from_dict(values)
    except ConfigError as error:
        name = str(error).partition(":")[0]
        if name in flags:
            raise ConfigError(f"--{error}") from None
        setting = [path for path, own in files.items() if _sets(own, name.split("."))]
        at_fault = setting[-1:] or paths  # a default that does not fit them
        raise ConfigError(f"{', '.join(map(str, at_fault))}: {error}") from None


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        values = _parse_yaml(path)
        _check_names(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return values


def _joined(files: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the values of several files, of which each wins over those before it."""
    values: dict[str, Any] = {}
    for own in files:
        values = _merged(values, own)
    return values


def _merged(values: Mapping[str, Any], over: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return values with others over them: sections are merged, settings are replaced."""
    result = dict(values)
    for key, value in over.items():
        name = prefix + key
        if dataclasses.is_dataclass(_HINTS[name]):
            value = _merged(result.get(key, {}), value, f"{name}.")
        result[key] = value
    return result


def _sets(values: Any, keys: Sequence[str]) -> bool:
    """Whether nested values have a value of this name."""
    for key in keys:
        if not isinstance(values, Mapping) or key not in values:
            return False
        values = values[key]
    return True


def _flag_value(hint: Any, text: str) -> Any:
    """Return a flag's text as a value; text stays text where the setting is one."""
    if hint is str or typing.get_origin(hint) is typing.Literal:
        return text
    try:
        return _parse_yaml(text)
    except ConfigError:
        return text  # config_from_dict names it as a wrong type


def _replaced(values: Mapping[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    """Return a copy with one value replaced; YAML aliases share dictionaries, so no writing."""
    first, *rest = keys
    return {**values, first: _replaced(values.get(first, {}), rest, value) if rest else value}


class _Loader(yaml.SafeLoader):
    """YAML whose keys are names, none of them twice: the last would silently win."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            is_name = key.tag.endswith((":str", ":merge"))
            if not is_name or key.value in seen:
                wrong = f"key {key.value} twice; join them" if is_name else "a key that is no name"
                raise yaml.MarkedYAMLError(problem=wrong, problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def _parse_yaml(source: str | Path) -> Any:
    try:
        text = source.read_text("utf-8") if isinstance(source, Path) else source
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        accounts = (getattr(error, name, None) for name in ("problem", "reason", "strerror"))
        account = next(filter(None, accounts), error)
        raise ConfigError(f"{where}expected readable YAML, got: {account}") from error


def _hints(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted name below a section and its type."""
    for key, hint in typing.get_type_hints(kind).items():
        yield prefix + key, hint
        if dataclasses.is_dataclass(hint):
            yield from _hints(hint, f"{prefix}{key}.")


_HINTS = dict(_hints(Config))


def check_setting(name: str) -> None:
    """Check that a dotted name is a setting.

    Raises:
        ConfigError: with the nearest name, for another name and for a whole section.
    """
    if name not in _HINTS or dataclasses.is_dataclass(_HINTS[name]):
        raise ConfigError(f"{name}: no such setting; the nearest is {_nearest(name, _HINTS)}")


def setting_type(name: str) -> Any:
    """Return the type of a setting, whose name `check_setting` takes."""
    return _HINTS[name]


def check_value(name: str, value: Any) -> None:
    """Check that a setting can be read from a value of a file, by its type alone.

    Raises:
        ConfigError: with the name.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=_HINTS[name])
    try:
        parser.parse_object({"value": value})
    except (argparse.ArgumentError, OverflowError):
        raise _wrong_type(f"{name}: ", _words(_HINTS[name]), value) from None


def read_yaml(path: Path) -> Any:
    """Read a YAML file whose keys are names, none of them twice.

    Raises:
        ConfigError: with the file.
    """
    try:
        return _parse_yaml(path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_settings(*paths: Path) -> dict[str, Any]:
    """Read the settings that YAML files name; of several, each wins over those before it.

    Returns:
        Nested plain values, without defaults; their names are checked, not yet the values.

    Raises:
        ConfigError: with the file.
    """
    return _joined(map(_read_file, paths))


def _words(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(typing.get_args(hint)) + "}"
    return str(hint) if typing.get_origin(hint) else hint.__name__


def _check_names(values: Any, section: str = "") -> None:
    """Check that every key is a setting; wrong values of known settings are found later."""
    if not isinstance(values, Mapping):
        raise _wrong_type(f"{section}: " if section else "", "a mapping of settings", values)
    for key, value in values.items():
        name = f"{section}.{key}" if section else str(key)
        if "." in str(key):
            raise ConfigError(f"{name}: expected one name, got a dotted one; nest the sections")
        if name not in _HINTS:
            raise ConfigError(f"{name}: no such setting; the nearest is {_nearest(name, _HINTS)}")
        if dataclasses.is_dataclass(_HINTS[name]):
            _check_names(value, name)
        elif value is None:
            raise _wrong_type(f"{name}: ", _words(_HINTS[name]), value)


def _nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name most like an unknown one, of its own section if any is alike."""
    section, _, key = name.rpartition(".")
    known = list(known)
    if inside := [n for n in known if n.startswith(f"{name}.")]:
        return inside[0]
    leaves = {n.rpartition(".")[2]: n for n in known}
    siblings = {n.rpartition(".")[2]: n for n in known if n.rpartition(".")[0] == section}
    if worded := [n for leaf, n in siblings.items() if key in leaf.split("_")]:
        return worded[0]
    for names, cutoff in ((siblings, 0.6), (leaves, 0.8), (siblings if section else {}, 0.25)):
        if near := difflib.get_close_matches(key, names, 1, cutoff):
            alike = [n for n in known if n.rpartition(".")[2] == near[0]]
            return names[near[0]] if names is siblings else _most_alike(name, alike)
    return _most_alike(name, known)


def _most_alike(name: str, known: Sequence[str]) -> str:
    return difflib.get_close_matches(name, known, 1, 0.0)[0]


def _wrong_type(setting: str, expected: str, value: Any) -> ConfigError:
    got = "nothing; leave it out for its default" if value is None else f"{value!r:.80}"
    return ConfigError(f"{setting}expected {expected}, got {got}")


def _checker() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config, as_group=True)
    return parser


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """Build and check the settings from nested plain values.

    Raises:
        ConfigError: for an unknown key, a wrong type, or settings that cannot work together.
    """
    _check_names(values)
    parser = _checker()
    try:
        return Config(**vars(parser.instantiate(parser.parse_object(dict(values)))))
    except (argparse.ArgumentError, OverflowError) as error:
        name = re.search(r'Parser key "([\w.]+)"', str(error))
        if name is None or name[1] not in _HINTS:
            raise ConfigError(" ".join(str(error).split())) from None
        got: Any = functools.reduce(lambda section, key: section[key], name[1].split("."), values)
        raise _wrong_type(f"{name[1]}: ", _words(_HINTS[name[1]]), got) from None


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return the settings as nested plain values, which `config_from_dict` reads back."""
    return dataclasses.asdict(config)


def dump_config(config: Config) -> str:
    """Return the settings as YAML, which `load_config` reads back as equal."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True, width=100)


def load_config(*paths: str | Path) -> Config:
    """Read settings from YAML files; of several, each wins over those before it.

    Raises:
        ConfigError: with the file, for whatever is wrong with it.
    """
    return _config_from([Path(path) for path in paths], {})
