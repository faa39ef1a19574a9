"""Chooses the settings of one method on dev: Optuna asks, runs answer, a journal remembers.

Trial 0 is the file's own settings. A study asks for one trial after the other, and every trial
has a sampler seeded by its number: what is asked for depends on the results so far alone, so a
study that was interrupted goes on as if it had not been. Test is not read.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from ispen_dist.data.output_file import replacing
from ispen_dist.exits import Exit
from ispen_dist.tables.definition import Range, Space, TableDefinition, TableError
from ispen_dist.tables.runs import Run, RunFailed

Execute = Callable[[Run], dict[str, Any]]


class Tuning:
    """The tuning runs of one method.

    Args:
        table: which table.
        method: one of its methods.
        folder: of this method's runs.
        budget: number of trials.
        execute: trains unless done, and returns the summary.
    """

    def __init__(
        self, table: TableDefinition, method: str, folder: Path, budget: int, execute: Execute
    ) -> None:
        self.table, self.method, self.folder, self.budget = table, method, folder, budget
        self.execute = execute
        self.files = (*table.configs, table.method_files[method])
        self.space = _distributions(table.spaces[method])

    @property
    def chosen(self) -> Path:
        """The file of the chosen settings, to be given to launcher/train.py after the others."""
        return self.folder / "chosen.yaml"

    def run(self) -> dict[str, Any]:
        """Go through the trials that are missing; write and return the chosen settings.

        Raises:
            RunFailed: for a run that failed for another reason than its settings, or if no trial
                succeeded.
            TableError: where the folder has trials of another search.
        """
        study = self._study()
        for number in range(self.budget):
            self._trial(study, number)
        if self.budget == 0:
            return self._choose({}, "the files' own settings; nothing was tuned")
        done = [t for t in study.trials if t.state == TrialState.COMPLETE]
        if not done:
            raise RunFailed(self._run(0, {}), Exit.NOT_FINITE, self._run(0, {}).log)
        best = max(done, key=lambda trial: (_value(trial), -trial.number))
        settings = {} if best.number == 0 else best.params
        metric = f"dev {self.table.metric} {_value(best):.4f}"
        return self._choose(settings, f"trial {best.number} of {self.budget}: {metric}")

    def num_told(self) -> int:
        """Return how many of the trials an earlier command has run."""
        return sum(trial.state.is_finished() for trial in self._study().trials)

    def _study(self) -> optuna.Study:
        self.folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        journal = JournalStorage(JournalFileBackend(str(self.folder / "study.journal")))
        study = optuna.create_study(
            storage=journal, study_name=self.method, direction="maximize", load_if_exists=True
        )
        basis = self._basis()
        for key, found in study.user_attrs.items():
            if basis[key] != found:
                raise TableError(
                    f"{self.folder}: expected runs of {key} {basis[key]}, found {found}; go on as "
                    "it was begun, or choose another folder with --runs"
                )
        for key in basis.keys() - study.user_attrs.keys():
            study.set_user_attr(key, basis[key])
        return study

    def _basis(self) -> dict[str, Any]:
        """Return what must not change while a folder is used, or methods would not be equal."""
        settings = self.table.settings_sum(self.method, self.budget)
        return {"budget": self.budget, "settings": settings}

    def _trial(self, study: optuna.Study, number: int) -> None:
        """Run one trial unless it is told; one that was asked for but not told runs again."""
        trials = study.trials
        if number < len(trials) and trials[number].state.is_finished():
            return
        if number == 0:
            self._first(study)
            return
        study.sampler = optuna.samplers.TPESampler(seed=number)
        if number < len(trials):
            trial = optuna.Trial(study, trials[number]._trial_id)
        else:
            trial = study.ask()
        params = {name: _suggest(trial, name, d) for name, d in self.space.items()}
        value = self._dev(self._run(number, params))
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        study.tell(number, value, state=state)

    def _first(self, study: optuna.Study) -> None:
        """Run the file's own settings, and tell them as a trial where the search has them."""
        run = self._run(0, {})
        value = self._dev(run)
        if value is None:
            study.add_trial(create_trial(state=TrialState.FAIL))
            return
        resolved = yaml.safe_load((run.folder / "config.yaml").read_text("utf-8"))
        own = {name: _setting(resolved, name) for name in self.space}
        inside = all(_holds(self.space[name], value) for name, value in own.items())
        known: Mapping[str, Any] = {"params": own, "distributions": self.space} if inside else {}
        study.add_trial(create_trial(value=value, **known))

    def _run(self, number: int, params: Mapping[str, Any]) -> Run:
        settings = {**params, "train.seed": 0, "train.read_test": False}
        return Run(self.files, settings, self.folder / "tuning" / f"trial-{number:03d}")

    def _dev(self, run: Run) -> float | None:
        """Return the dev metric of a run, or None where its settings made it diverge."""
        try:
            dev = self.execute(run)["dev"]
        except RunFailed as error:
            if error.code == Exit.NOT_FINITE:
                return None
            raise
        if self.table.metric not in dev:
            raise TableError(
                f"table {self.table.name}: metric: expected one of {', '.join(dev)}, found "
                f"{self.table.metric!r}"
            )
        return dev[self.table.metric]

    def _choose(self, settings: Mapping[str, Any], why: str) -> dict[str, Any]:
        nested: dict[str, Any] = {}
        for name, value in settings.items():
            *sections, key = name.split(".")
            place = nested
            for section in sections:
                place = place.setdefault(section, {})
            place[key] = value
        with replacing(self.chosen) as partial:
            partial.write_text(f"# {why}\n{yaml.safe_dump(nested)}", "utf-8")
        return dict(settings)


def _distributions(space: Space) -> dict[str, BaseDistribution]:
    return {name: _distribution(values) for name, values in space.items()}


def _distribution(values: Range | tuple[Any, ...]) -> BaseDistribution:
    if not isinstance(values, Range):
        return CategoricalDistribution(values)
    if isinstance(values.low, int):
        return IntDistribution(values.low, int(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def _suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    """Return a trial's value of a setting: the one it has, otherwise a new one."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(name, distribution.low, distribution.high, log=distribution.log)
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)


def _holds(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    return isinstance(value, int | float) and distribution.low <= value <= distribution.high


def _setting(values: Mapping[str, Any], name: str) -> Any:
    for key in name.split("."):
        values = values[key]
    return values


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value
