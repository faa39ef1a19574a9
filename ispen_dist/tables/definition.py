"""What a table compares: a file of `configs/tables/`, read and checked.

base: shared/methods.yaml            # its keys count where this file has none
config: ../bibtex.yaml               # the task, relative to this file; or a list of files
methods: [mle, nce_explicit]         # files of configs/methods/
more_methods: [crf]                  # besides the base's methods
refit: [nce_explicit]                # methods that are fitted on train and dev besides
reference: mle                       # what the others are tested against, seed by seed
metric: example_f1_at_0.5            # of dev; chooses the settings
significance: paired_t               # or wilcoxon
budget: 8                            # tuning runs of every method
seeds: 5                             # final runs of every method
search:                              # setting: values, or a range
  inner.energy_weight: {low: 0.01, high: 10.0, log: true}
  inner.optimizer.learning_rate: [0.001, 0.003]
search_of:                           # which of them a method searches; joined with the base's
  mle: [inner.optimizer.learning_rate]
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ispen_dist.command_line import (
    check_setting,
    check_value,
    read_settings,
    read_yaml,
    setting_type,
)
from ispen_dist.config import ConfigError

SIGNIFICANCE = ("paired_t", "wilcoxon")
_REQUIRED = ("config", "methods", "reference", "metric", "search")
_OPTIONAL = ("base", "more_methods", "refit", "significance", "budget", "seeds", "search_of")
_REFIT = "_refit"


class TableError(ValueError):
    """A table that cannot be made; the message names file and key, and says what to do."""


@dataclass(frozen=True)
class Range:
    """A range of numbers to search, uniformly or in the logarithm.

    Its bounds are whole numbers where the setting is one, and then its values are.
    """

    low: float
    high: float
    log: bool = False


Space = Mapping[str, Range | tuple[Any, ...]]
"""Values to search by dotted setting."""


@dataclass(frozen=True)
class TableDefinition:
    """A table of methods on one task.

    Attributes:
        name: of the file, and of what is written.
        configs: files of the task; of several, each wins over those before it.
        method_files: file of each method, in the order of the table.
        reference: the method that the others are tested against.
        metric: of dev; the largest value chooses the settings.
        significance: `paired_t` or `wilcoxon`.
        budget: tuning runs of every method; 0 takes the files' own settings.
        seeds: final runs of every method.
        spaces: what is searched, by method.
        refit: methods that are fitted once more for every seed, on train and dev, with what was
            chosen on dev; in the table as METHOD_refit.
    """

    name: str
    configs: tuple[Path, ...]
    method_files: Mapping[str, Path]
    reference: str
    metric: str
    significance: str
    budget: int
    seeds: int
    spaces: Mapping[str, Space]
    refit: Sequence[str] = ()

    @property
    def rows(self) -> list[str]:
        """The methods in the order of the table, each before its refit."""
        return [row for method in self.method_files for row in self.rows_of(method)]

    def rows_of(self, method: str) -> list[str]:
        """Return the method, and its refit where it has one."""
        return [method, method + _REFIT] if method in self.refit else [method]

    def method_of(self, row: str) -> str:
        """Return the method of a row."""
        return next(method for method in self.method_files if row in self.rows_of(method))

    def check_files(self) -> None:
        """Check that the files of the task and of all methods are there.

        Raises:
            TableError: for the first that is not.
        """
        for path in (*self.configs, *self.method_files.values()):
            if not path.is_file():
                raise TableError(f"table {self.name}: expected the file {path}, found none")

    def settings_sum(self, row: str, budget: int) -> str:
        """Return 12 hex digits that change with what a row of the table is run with.

        That is the settings of the task and of the method, where it is tuned its search too;
        comments and the order of keys do not count.
        """
        method = self.method_of(row)
        basis: list[Any] = [read_settings(*self.configs), read_settings(self.method_files[method])]
        if budget > 0:
            space = {name: str(values) for name, values in self.spaces[method].items()}
            basis += [space, self.metric]
        if row != method:
            basis.append(_REFIT)
        text = json.dumps(basis, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_table(path: Path, method_folder: Path) -> TableDefinition:
    """Read and check a table; whether the files it names are there is `check_files`.

    Raises:
        TableError: with file, key, what was expected and what was found.
    """
    try:
        own = read_yaml(path)
        reader = _Reader(path, method_folder)
        reader.check_keys(own)
        table = reader.table(reader.joined(own))
    except ConfigError as error:
        raise TableError(str(error)) from None
    # A base may name methods that this table does not have.
    for method in own.get("search_of", {}):
        known = f"one of {', '.join(table.method_files)}"
        reader.check(method in table.method_files, f"search_of.{method}", known, method)
    return table


class _Reader:
    """Checks the values of one file."""

    def __init__(self, path: Path, method_folder: Path) -> None:
        self.path, self.method_folder = path, method_folder

    def check(self, holds: bool, key: str, expected: str, found: object) -> None:
        if not holds:
            raise TableError(f"{self.path}: {key}: expected {expected}, found {found!r:.80}")

    def check_keys(self, values: Any) -> None:
        self.check(isinstance(values, Mapping), "the file", "a mapping", values)
        for key in values:
            known = (*_REQUIRED, *_OPTIONAL)
            self.check(key in known, str(key), f"one of the keys {', '.join(known)}", key)
        search_of = values.get("search_of", {})
        self.check(isinstance(search_of, Mapping), "search_of", "a mapping of methods", search_of)
        if "methods" in values:
            self._names("methods", values["methods"])

    def joined(self, values: Mapping[str, Any], above: tuple[Path, ...] = ()) -> Mapping[str, Any]:
        """Return the keys of the file over those of its base.

        `search_of` joins by method; `more_methods` go to the end of the base's `methods`.
        """
        if "base" not in values:
            self.check("more_methods" not in values, "more_methods", "a base", "none")
            return values
        above = (*above, self.path.resolve())
        path = self.path.parent / self.text(values, "base")
        self.check(path.is_file(), "base", "a file", str(path))
        expected = "another file than those that it is the base of"
        self.check(path.resolve() not in above, "base", expected, str(path))
        reader, base = _Reader(path, self.method_folder), read_yaml(path)
        reader.check_keys(base)
        base = reader.joined(base, above)
        search_of = {**base.get("search_of", {}), **values.get("search_of", {})}
        values = {**base, **values, "search_of": search_of}
        if "more_methods" in values:
            more = self._names("more_methods", values.pop("more_methods"))
            values["methods"] = self._names("methods", [*values.get("methods", []), *more])
        return values

    def table(self, values: Mapping[str, Any]) -> TableDefinition:
        """Return the table of a file whose keys were joined with its base's."""
        for key in _REQUIRED:
            self.check(key in values, key, "a value", "nothing")
        methods = self._names("methods", values["methods"])
        reference = values["reference"]
        self.check(reference in methods, "reference", f"one of {', '.join(methods)}", reference)
        significance = values.get("significance", "paired_t")
        self.check(
            significance in SIGNIFICANCE, "significance", " or ".join(SIGNIFICANCE), significance
        )
        configs = values["config"] if isinstance(values["config"], list) else [values["config"]]
        named = bool(configs) and all(isinstance(name, str) and name for name in configs)
        self.check(named, "config", "a file or a list of files", values["config"])
        refit = values.get("refit", [])
        some = isinstance(refit, list) and all(name in methods for name in refit)
        self.check(some, "refit", f"some of {', '.join(methods)}", refit)
        taken = [name + _REFIT for name in refit if name + _REFIT in methods]
        self.check(not taken, "methods", f"no method with the name of a refit, {taken}", methods)
        return TableDefinition(
            name=self.path.stem,
            configs=tuple((self.path.parent / name).resolve() for name in configs),
            method_files={m: self.method_folder / f"{m}.yaml" for m in methods},
            reference=reference,
            metric=self.text(values, "metric"),
            significance=significance,
            budget=self._count(values, "budget", 8, at_least=0),
            seeds=self._count(values, "seeds", 5, at_least=1),
            spaces=self._spaces(methods, values["search"], values.get("search_of", {})),
            refit=tuple(refit),
        )

    def _names(self, key: str, methods: Any) -> list[str]:
        names = isinstance(methods, list) and all(isinstance(m, str) for m in methods)
        self.check(names and bool(methods), key, "a list of names", methods)
        twice = [m for m in methods if methods.count(m) > 1]
        self.check(not twice, key, "every name once", twice)
        return methods

    def text(self, values: Mapping[str, Any], key: str) -> str:
        text = values[key]
        self.check(isinstance(text, str) and bool(text), key, "a text", text)
        return text

    def _count(self, values: Mapping[str, Any], key: str, default: int, at_least: int) -> int:
        count = values.get(key, default)
        whole = isinstance(count, int) and not isinstance(count, bool)
        self.check(
            whole and count >= at_least, key, f"a whole number of at least {at_least}", count
        )
        return count

    def _spaces(
        self, methods: list[str], search: Any, search_of: Mapping[str, Any]
    ) -> dict[str, Space]:
        ranges = self._space("search", search)
        known = f"some of the settings of search, {', '.join(ranges)}"
        spaces: dict[str, Space] = {}
        for method in methods:
            names = search_of.get(method, list(ranges))
            some = isinstance(names, list) and all(name in list(ranges) for name in names)
            self.check(some and bool(names), f"search_of.{method}", known, names)
            spaces[method] = {name: ranges[name] for name in names}
        return spaces

    def _space(self, key: str, space: Any) -> Space:
        full = isinstance(space, Mapping) and bool(space)
        self.check(full, key, "a mapping of at least one setting", space)
        try:
            for setting in space:
                check_setting(setting)
            return {name: self._values(key, name, values) for name, values in space.items()}
        except ConfigError as error:
            raise TableError(f"{self.path}: {key}: {error}") from None

    def _values(self, key: str, setting: str, values: Any) -> Range | tuple[Any, ...]:
        key, kind = f"{key}.{setting}", setting_type(setting)
        if isinstance(values, list):
            plain = all(isinstance(v, bool | int | float | str) for v in values)
            self.check(plain and bool(values), key, "a list of plain values", values)
            for value in values:
                check_value(setting, value)
            return tuple(values)
        expected = "a list of values, or {low: .., high: .., log: true or false}"
        self.check(isinstance(values, Mapping), key, expected, values)
        self.check(
            {"low", "high"} <= values.keys() <= {"low", "high", "log"}, key, expected, values
        )
        self.check(kind in (int, float), key, "a list of values, as it is no number", values)
        low, high, log = values["low"], values["high"], values.get("log", False)
        self.check(isinstance(log, bool), f"{key}.log", "true or false", log)
        for name, bound in (("low", low), ("high", high)):
            number = isinstance(bound, int | float) and not isinstance(bound, bool)
            self.check(number and math.isfinite(bound), f"{key}.{name}", "a number", bound)
            whole = isinstance(bound, int) or kind is float
            self.check(whole, f"{key}.{name}", "a whole number", bound)
        self.check(low < high, f"{key}.high", f"a number above low={low}", high)
        self.check(low > 0 or not log, f"{key}.low", "a number above 0 with log: true", low)
        return Range(kind(low), kind(high), log)


def table_paths(folder: Path) -> Iterator[Path]:
    """Yield the files of all tables in a folder, by name."""
    yield from sorted(folder.glob("*.yaml"))
