"""A campaign of any length: python -m tests.model RUNS [FIRST_SEED] [RULE_TO_LEAVE_OUT ...]"""

from __future__ import annotations

import sys
import time

from tests.model.rules import Rule
from tests.model.scheduler import Play, campaign

runs, *rest = sys.argv[1:]
first = int(rest.pop(0)) if rest and rest[0].isdecimal() else 0
began = time.perf_counter()
tally = campaign(range(first, first + int(runs)), frozenset(Rule[name] for name in rest), Play(), losses=3)
print(f"{tally.runs} runs, {tally.calls} storage calls, {tally.sweeps} sweeps in {time.perf_counter() - began:.0f} s")
for seed, violation in tally.violations.items():
    print(f"seed {seed}: {violation}")
