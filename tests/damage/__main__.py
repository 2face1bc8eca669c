"""The long campaign: `python -m tests.damage [SECONDS [SEED]]`, or `make damage`.

Every object in turn, in more and more places in which a bit is flipped, until the time is over. Prints what was tried.
"""

from __future__ import annotations

import sys
import tempfile
import time
from itertools import count
from pathlib import Path

from tests.damage.campaign import KINDS, Campaign


def main() -> None:
    """Run until the time is over, or the first damage that is not met as it should be."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 600.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() & 0xFFFFFF
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="coffret-damage-") as folder:
        campaign = Campaign(Path(folder), density=4, seed=seed)
        print(f"seed {seed}", flush=True)
        for turn in count():
            campaign.density = 4 << turn
            for kind in KINDS:
                for path in campaign.of_kind(kind):
                    for how, body in campaign.damages(kind, path):
                        if turn and how != "a bit":
                            continue
                        if time.monotonic() > end:
                            print(campaign.tally)
                            return
                        try:
                            campaign.one(kind, path, how, body)
                        except BaseException:
                            print(campaign.tally, flush=True)
                            raise


if __name__ == "__main__":
    main()
