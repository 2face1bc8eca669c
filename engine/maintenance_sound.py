"""Sound: of packs that were found to be damaged, those of which all that snapshots need can be read.

Their damage lies in what nothing needs. They are swept like garbage, and a check is clean again; of others what is
needed could not be copied, so they are left alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyio import to_thread

from coffret.connectors.errors import ConnectorError
from coffret.engine.errors import Damaged
from coffret.engine.maintenance_copy import COPIES_AT_ONCE, next_wanted, open_wanted

if TYPE_CHECKING:
    from coffret.engine.fetch import Fetcher
    from coffret.engine.maintenance_needs import Needs


async def sound_packs(fetcher: Fetcher, needs: Needs) -> frozenset[bytes]:
    """Those of the doomed packs of `needs` of which something is needed, and all that is can be read."""
    tried, failed = set[bytes](), set[bytes]()
    groups = needs.to_copy(COPIES_AT_ONCE)
    while (found := await to_thread.run_sync(next_wanted, groups, fetcher)) is not None:
        parts, wanted = found
        for part in parts:
            packs = {location.pack for location in part.blocks}
            tried |= packs
            if packs <= failed:
                continue
            try:
                data = await fetcher.read(part)
                for location in part.blocks:
                    each = wanted[location.pack, location.offset]
                    await to_thread.run_sync(open_wanted, fetcher, part, data, each)
            except (Damaged, ConnectorError):
                failed |= packs
    return frozenset(tried - failed)
