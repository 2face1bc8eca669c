"""Every parser of stored bytes returns or raises the engine's own errors, in little memory, whatever it is given.

Seconds as a rule, minutes in CI and by `make fuzz`: COFFRET_FUZZ_EXAMPLES is the number of inputs a target.
"""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.fuzz.targets import Target, targets

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = int(os.environ.get("COFFRET_FUZZ_EXAMPLES", "40"))
# Far more than any of these inputs is worth, and far less than what they may claim to need (MiB).
MOST_MIB = 200
TARGETS = targets()
_INTERESTING = [0, 1, 0x7F, 0x80, 0xC0, 0xC1, 0xC4, 0xC6, 0xDB, 0xDD, 0xDF, 0xFF]
executions = {"inputs": 0, "taken": 0}


@st.composite
def mutated(draw: st.DrawFn, target: Target) -> bytes:
    """An input near a good one, or, one time in eight, anything."""
    good = target.corpus()
    if not good or not draw(st.integers(0, 7)):
        return draw(st.binary(max_size=300))
    data = bytearray(draw(st.sampled_from(good)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 6)):
            case 0 if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 1 if at < len(data):
                data[at] = draw(st.sampled_from(_INTERESTING))
            case 2:
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case 3:
                del data[at : at + draw(st.integers(1, 16))]
            case 4:  # the same once more, or a thousand times
                part = bytes(data[at : at + draw(st.integers(1, 64))])
                data[at:at] = part * draw(st.sampled_from([1, 2, 1000]))
            case 5:  # an absurd number
                data[at : at + 9] = b"\xcf" + draw(st.sampled_from([2**63, 2**64 - 1, 2**32, 2**31])).to_bytes(8, "big")
            case 6:
                data[at:] = draw(st.sampled_from(good))[at:]
    return bytes(data)


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


@pytest.fixture(scope="module", autouse=True)
def _told() -> Iterator[None]:
    yield
    print(f"\nfuzzed {len(TARGETS)} parsers: {executions['inputs']:,} inputs, {executions['taken']:,} of them taken")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_good_inputs_are_taken(target: Target) -> None:
    for data in target.good if target.name not in ("manifest", "lists") else ():
        assert target(data)
    for data in target.corpus():
        target(data)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.timeout(3600)
def test_mutations(target: Target) -> None:
    before = peak_mib()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(data=mutated(target))
    def run(data: bytes) -> None:
        executions["inputs"] += 1
        executions["taken"] += target(data)

    run()
    assert peak_mib() - before < MOST_MIB
