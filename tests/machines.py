"""How state machines are run: so many steps in all, from the environment."""

from __future__ import annotations

import os
import unittest

from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine

STEPS = int(os.environ.get("PYROSOME_FUZZ_STEPS", "10000"))
STEPS_AT_ONCE = 100


def machine_test(machine: type[RuleBasedStateMachine]) -> type[unittest.TestCase]:
    """The test of a machine."""
    machine.TestCase.settings = settings(
        max_examples=max(1, STEPS // STEPS_AT_ONCE),
        stateful_step_count=STEPS_AT_ONCE,
        deadline=None,
        report_multiple_bugs=False,
        phases=(Phase.explicit, Phase.reuse, Phase.generate),  # to shrink a run takes minutes: it is printed whole
    )
    return machine.TestCase
