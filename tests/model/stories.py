"""For each rule, how a chunk is lost without it: who acts in which order, and where each is stopped.

The rest (which chunks, which packs, which copies) is left to chance, so that a story may take a few runs to come true.
With all rules kept it ends well, whatever the chance.
"""

from __future__ import annotations

from tests.model.rules import Rule
from tests.model.scheduler import Play
from tests.model.stepping import Fate


def _told(*story: str) -> Play:
    return Play(story=story, lost=0)


NEXT_TURN = " until put leases/"  # an attempt begins with this call: it lets all others come to a stop or an end first
SEEN_RECORDED = "sweep until put leases/"  # it has recorded the attempts at work, and is about to begin
COMMITTING = "backup until put snapshots/"
REVOKED = (
    "remove",
    COMMITTING,
    "backup until put index/",  # it relies on the first one's packs, but does not say so yet
    "maintain",
    "maintain",  # between them they end both, and sweep those packs; then the second says so
)

STORIES: dict[Rule, Play] = {
    Rule.LEASE_FIRST: _told("remove", "backup until put leases/", "maintain"),
    Rule.SWEEP_LEASE: _told(
        "backup",
        "remove",
        "merge",
        "mark",
        "sweep until put index/",
        "maintain",  # sweeps that mark and another, which names what the first sweep is about to spare
        "backup" + NEXT_TURN,
    ),
    Rule.MERGE_LEASE: _told("remove", "merge until put index/", "maintain", "backup" + NEXT_TURN),
    Rule.TRASH_FIRST: _told("remove", "mark", SEEN_RECORDED, "backup until list trash/"),
    Rule.REMOVED_AFTER_TRASH: _told("mark", SEEN_RECORDED, "backup until list trash/", "remove"),
    Rule.LEASE_LAST: _told("remove", COMMITTING, "maintain"),
    Rule.PUT_IF_ABSENT: _told("remove", COMMITTING, "maintain"),
    Rule.COMPARE_BYTES: Play(
        story=("mark", COMMITTING, "maintain"), lost=0.5, losing="put snapshots/w", fates=(Fate.NOT_SENT,)
    ),
    Rule.NAMES_STAY_TAKEN: _told("remove", COMMITTING, "maintain"),
    Rule.PACKS_FIRST: _told("backup until put packs/", "backup"),
    Rule.INDEX_FIRST: _told("backup"),
    Rule.MARKED_IS_ABSENT: _told("remove", "mark", SEEN_RECORDED, COMMITTING),
    Rule.FENCE: _told(*REVOKED, "backup" + NEXT_TURN),
    Rule.ADOPT: _told(COMMITTING, "backup"),
    Rule.PARENT_AFTER_LEASE: _told("backup until put leases/", "remove", "maintain"),
    Rule.PARENT_LOOK_UP: _told("mark", SEEN_RECORDED, COMMITTING, "remove"),
    Rule.RECHECK: _told("remove", COMMITTING, "maintain"),
    Rule.SINGLE_MARK: _told(
        "backup",
        "remove",
        "merge",
        "mark",
        "sweep until put leases/ until put index/",  # of the first mark: it spares what the second names
        "mark",
        SEEN_RECORDED,
        "backup" + 2 * NEXT_TURN,
    ),
    Rule.SEEN_AFTER_MARK: _told(
        "remove",
        "mark until put trash/1-seen",
        COMMITTING + " until put snapshots/",
        "maintain until list trash/",
    ),
    Rule.RECORDED: _told("remove", COMMITTING, "maintain"),
    Rule.WAIT: _told("remove", COMMITTING, "maintain"),
    Rule.TOMBSTONE: _told("remove", COMMITTING, "maintain"),
    Rule.GRACE: Play(
        story=("backup", "remove", "remove", "maintain", "backup"),
        lost=0.5,
        losing="put index/w",
        fates=(Fate.LATE,),
        deliver=0.02,
    ),
    Rule.LIST_ANEW: _told(COMMITTING, "remove", "mark", "sweep until list leases/"),
    Rule.COPY: _told("mark", "sweep"),
    Rule.WITHOUT_MARKED: _told("remove", "maintain", "backup"),
    Rule.REPLACE_ALL: _told("remove", "maintain", "backup"),
    Rule.COMMIT_FIRST: _told("mark", "sweep"),
    Rule.INDEX_DELETED_FIRST: _told("remove", "maintain until delete index/", "check"),
    Rule.DONE_LAST: _told("remove", "mark", "sweep until delete index/", "backup"),
    Rule.SWEPT_IS_NO_TOMBSTONE: _told("backup", "remove", "maintain"),
    Rule.MERGE_SPARES_MARKED: _told("remove", "mark", SEEN_RECORDED, "merge until put index/", "backup" + NEXT_TURN),
    Rule.MERGE_FENCE: _told(*REVOKED, "merge" + NEXT_TURN, "check until list snapshots/"),
    Rule.RELIST: _told("restore until get packs/", "maintain"),
    Rule.RELIST_ON: _told(
        "restore until get packs/ until list index/ until get packs/",
        "maintain",
        "maintain until list trash/ until list trash/",
    ),
    Rule.WHOLE_LISTING: _told(
        "restore until get index/ until list index/ until get index/", "merge", "merge" + 2 * NEXT_TURN
    ),
    Rule.REMOVED_IS_NOT_DAMAGE: _told("restore until get packs/", "remove", "maintain"),
}
