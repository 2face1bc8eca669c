"""Repair: have the index say again where everything lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from coffret.engine.errors import LeaseLost, reported
from coffret.engine.repair_index import IndexRepair, IndexRepairOptions, IndexRepairSummary

if TYPE_CHECKING:
    from coffret.engine.progress import Progress
    from coffret.engine.repository import Repository

__all__ = ["IndexRepairOptions", "IndexRepairSummary", "repair_index"]

# As a backup that is taken for dead, a repair tries again.
_ATTEMPTS = 3


async def repair_index(repository: Repository, options: IndexRepairOptions, progress: Progress) -> IndexRepairSummary:
    """Name every pack that no index object names, going by what the packs say.

    :raises LeaseLost: if maintenance ended the attempt again and again
    :raises Damaged: if an open mark can't be read: then it is not known which packs are to be left alone
    """
    for tries_left in reversed(range(_ATTEMPTS)):
        work = IndexRepair(repository, options, progress)
        try:
            await _try(work, options, progress)
        except Exception as error:
            if not tries_left or not isinstance(reported(error), LeaseLost):
                raise
            progress.note("another process ended this attempt; trying again")
            progress.files = progress.errors = 0
        else:
            return work.summary
        finally:
            repository.forget_commits()
    raise AssertionError("the last try returns or raises")


async def _try(work: IndexRepair, options: IndexRepairOptions, progress: Progress) -> None:
    async with anyio.create_task_group() as group:
        try:
            if not options.dry_run:
                await work.attempt.announce()
                group.start_soon(work.attempt.keep)
            await work.run(group)
            if not options.dry_run:
                await work.commit()
            await work.drop()
        finally:
            group.cancel_scope.cancel()
            if note := await work.attempt.end():
                progress.note(note)
