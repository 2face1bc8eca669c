"""The rules of the lock-free protocol, by name, so that each can be left out and its loss be seen."""

from __future__ import annotations

from enum import Enum


class Rule(Enum):
    """One rule; its value is the sentence it stands for. `README.md` says where each matters."""

    # Any attempt
    LEASE_FIRST = "a writer puts the lease, then lists"
    SWEEP_LEASE = "a sweep is an attempt of its own, with a lease"
    MERGE_LEASE = "merging is an attempt of its own, with a lease"
    TRASH_FIRST = "list trash before index and snapshots"
    REMOVED_AFTER_TRASH = "list removed after trash, too"
    LEASE_LAST = "the lease goes only after the commit"
    PUT_IF_ABSENT = "commits and tombstones are put if absent: exactly one of owner and maintenance wins"
    COMPARE_BYTES = "a lost answer is decided by comparing bytes"
    NAMES_STAY_TAKEN = "a name in snapshots/ once taken is never free again"
    # Writers
    PACKS_FIRST = "packs are durable before the index that names them"
    INDEX_FIRST = "the index is durable before the snapshot"
    MARKED_IS_ABSENT = "a chunk that lies only in marked packs is absent and is stored again"
    FENCE = "index objects of a tombstoned attempt are ignored"
    ADOPT = "locations found with an attempt that has not ended are named again in the writer's own index"
    PARENT_AFTER_LEASE = "a parent must be listed and not removed after the lease is durable"
    PARENT_LOOK_UP = "while a mark is open, chunk ids of the parent are looked up like any others"
    RECHECK = "a revoked writer re-checks each chunk it relied on: not marked, and its pack is still there"
    # Marks
    SINGLE_MARK = "one mark at a time"
    SEEN_AFTER_MARK = "the attempts at work are listed after the mark is durable"
    RECORDED = "the attempts seen are recorded, for every sweep to wait for"
    # Sweeps
    WAIT = "a sweep waits until each attempt seen has ended"
    TOMBSTONE = "an attempt taken for dead is ended by a tombstone"
    GRACE = "a sweep waits longer than a request can be late, after the last attempt seen has ended"
    LIST_ANEW = "a sweep lists index and snapshots after it has waited"
    COPY = "what a snapshot needs and only marked packs hold is copied"
    WITHOUT_MARKED = "the index object that replaces others names no marked pack"
    REPLACE_ALL = "every index object that names a marked pack is replaced"
    COMMIT_FIRST = "replaced index objects are deleted after the commit"
    INDEX_DELETED_FIRST = "replaced index objects are deleted before the packs"
    DONE_LAST = "the mark ends after everything is deleted"
    SWEPT_IS_NO_TOMBSTONE = "the end marker of a swept snapshot is no tombstone: its index objects stay good"
    # Merging
    MERGE_SPARES_MARKED = "merging without a sweep leaves index objects that name marked packs alone"
    MERGE_FENCE = "what an index object of a tombstoned attempt names is not merged"
    # Readers
    RELIST = "a missing index or pack is looked for again after a re-listing"
    RELIST_ON = "it is damage only when a listing begun after the miss names no other place"
    WHOLE_LISTING = "and when no maintenance ended during that listing"
    REMOVED_IS_NOT_DAMAGE = "a snapshot removed while it is read is not damaged"
