"""`serve --plan`: the options of a plan, what was typed besides, and what of it does not hold here."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pyrosome.errors import PlanError, RequestError
from pyrosome.options import EngineOptions, require_integer

if TYPE_CHECKING:
    from pyrosome.plan.inventory import Model
    from pyrosome.plan.plan import Plan

# Flags of `serve` by the option of a plan that they say.
FLAGS = {
    "max_sequences": "sequences", "max_context": "context", "cache_bytes": "cache_gib", "drafter": "drafter",
    "numerics": "numerics", "kv_format": "kv_format", "experts": "experts",
}  # fmt: skip
MAX_FILE_BYTES = 16 << 20
GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Replay:
    """A plan, and the file it is from."""

    plan: Plan
    path: Path

    @classmethod
    def read(cls, path: Path) -> Replay:
        """A plan as `pyrosome plan --out` writes it or `--json` prints it.

        Raises:
            PlanError: it is none, or says itself that it does not fit.
            RequestError: the file cannot be read.
        """
        from pyrosome.plan.plan import Plan

        try:
            with path.open("rb") as file:
                text = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise RequestError(
                f"--plan {path} cannot be read ({error.strerror}); make one: pyrosome plan ... --out {path}"
            ) from None
        if len(text) > MAX_FILE_BYTES:
            raise RequestError(f"--plan {path} has more than {MAX_FILE_BYTES >> 20} MiB, and no plan has")
        try:
            plan = Plan.from_json(text)
        except PlanError as error:
            raise PlanError(f"--plan {path}: {error}") from None
        if not plan.fits:
            raise PlanError(f"--plan {path} does not fit the machine it is for: {plan.why_not}; {plan.change}")
        return cls(plan, path)

    def _asked(self, what: str) -> Mapping[str, Any]:
        """What was asked of the model or the machine.

        Raises:
            PlanError: nothing is there.
        """
        found = self.plan.asked.get(what)
        if not isinstance(found, Mapping):
            raise PlanError(f"--plan {self.path} does not say which {what} it is for; make it again")
        return found

    def model_named(self, named: str | None) -> str:
        """The checkpoint to serve: the one that was named, or the plan's where that is one.

        Raises:
            PlanError: none was named, and the plan is for a model by its configuration alone.
        """
        if named is not None:
            return named
        found = str(self._asked("model").get("name", ""))
        if found.startswith("builtin:") or Path(found).expanduser().exists():
            return found
        raise PlanError(
            f"--plan {self.path} is for {found}, which is no checkpoint of this machine; name one: "
            f"pyrosome serve /path/to/checkpoint --plan {self.path}"
        )

    def check_model(self, model: Model) -> None:
        """See that the checkpoint is what was planned for.

        Raises:
            PlanError: it has other layers, or another number of bytes is stored.
        """
        asked = self._asked("model")
        there = {"layers": model.config.num_hidden_layers, "stored_bytes": model.stored_bytes}
        for name, value in there.items():
            if asked.get(name) != value:
                raise PlanError(
                    f"--plan {self.path} is for {asked.get('name')} with {_amount(asked.get(name))} "
                    f"{name.replace('_', ' ')}, and {model.name} has {value:,}; plan for this one: "
                    f"pyrosome plan {model.name} --out {self.path}"
                )

    def values(self, flags: Mapping[str, Any], given: Collection[str]) -> tuple[dict[str, Any], list[str]]:
        """(values of `flags` as the plan has them, or as they were typed; a line for each that was typed otherwise).

        Args:
            flags: values of the command line by the flag's name, as in FLAGS.
            given: flags that were typed, which win.

        Raises:
            RequestError: a cache of no size; other values are checked where they are used.
        """
        values, said = dict(flags), []
        for option, flag in FLAGS.items():
            if option not in self.plan.options:
                continue
            planned = self.plan.options[option]
            if option == "cache_bytes":
                require_integer(f"--plan {self.path}: cache_bytes", planned, 1)
                planned /= GIB
            if flag not in given:
                values[flag] = planned
            elif flags[flag] != planned:
                name = flag.replace("_", "-")
                said.append(f"--{name} {flags[flag]} replaces the plan's {_amount(planned)}.")
        return values, said

    def engine_options(self, options: EngineOptions) -> EngineOptions:
        """The options with what of the plan has no flag: reserves, steps and drafts.

        Raises:
            RequestError: a value outside its range.
        """
        names = {f.name for f in dataclasses.fields(EngineOptions)} - FLAGS.keys()
        changes = {name: value for name, value in self.plan.options.items() if name in names}
        try:
            return dataclasses.replace(options, **changes)
        except RequestError as error:
            raise RequestError(f"--plan {self.path}: {error}") from None

    def lines(self) -> list[str]:
        """What is said of it at the start."""
        from pyrosome.plan.words import short

        machine = self._asked("machine")
        lines = short(self.plan)
        if machine.get("kind") == "gpu" or machine.get("count", 1) != 1:
            lines.append(
                f"The plan is for {machine.get('count')} x {machine.get('title')}. This version serves on this "
                "machine's processor: the plan's options are taken, and its speeds do not hold."
            )
        return lines


def typed(ctx: typer.Context) -> frozenset[str]:
    """Those of FLAGS that were typed."""
    sources = {flag: ctx.get_parameter_source(flag) for flag in FLAGS.values()}
    return frozenset(flag for flag, source in sources.items() if source is not None and source.name == "COMMANDLINE")


def _amount(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else repr(value)
