"""Every constant that was chosen, with the measurement or reason that chose it. Sizes in bytes, times in seconds."""

MIB = 1 << 20

# Storage format (these go into config; changing them here changes new repositories only) -----------------------------
PACK_BYTES = 32 * MIB
# Small chunks are gathered into blocks of about this size: on a source tree of 75k files the repository became 11 %
# smaller than with one frame a file, and AEAD and zstd calls far fewer.
BLOCK_BYTES = MIB
# Entries of a catalog page: on average, at most. 256 entries are about 25 KiB.
PAGE_AVG_ENTRIES, PAGE_MAX_ENTRIES, PAGE_MAX_WEIGHT = 256, 1024, MIB
NODE_AVG_ENTRIES, NODE_MAX_ENTRIES = 64, 1024
# A file's list of refs is kept in its entry up to this many chunks, else in list chunks cut by the ids themselves.
INLINE_REFS, LIST_AVG_REFS, LIST_MAX_REFS = 64, 256, 1024
INLINE_XATTR_BYTES, INLINE_EXTENTS = 512, 32

# Backup pipeline ------------------------------------------------------------------------------------------------------
# Four workers on two cores cost nothing warm and save 20 % on small files that are not cached: the disk answers
# several at once.
WORKERS = 4
SLAB_BYTES, SLABS_PER_WORKER = 8 * MIB, 4
BATCH_BYTES, BATCH_FILES = 4 * MIB, 512
# A change within this time before the file was read may be followed by another in the same tick of the file system's
# clock: FAT keeps 2 s.
RACY_NS = 2_000_000_000
# An index object is put at least this often, so that a killed run is taken up; and so that the ids not yet in the
# mirror fit in memory (about 110 bytes each).
INDEX_EVERY_S, INDEX_EVERY_BYTES, INDEX_EVERY_CHUNKS = 300.0, 4 << 30, 100_000
LEASE_REFRESH_S = 300.0

# Restore and check ----------------------------------------------------------------------------------------------------
# Workers that open blocks, and slabs of stored bytes being fetched or opened; files above the stream size are written
# in pieces of a slab.
OPEN_WORKERS, OPEN_SLABS = 3, 8
# The same where each answer takes as long as FAR_S (s): at 50 ms over SFTP 8 slabs were all waited for, and 16 brought
# 7.4 s instead of 8.6; near by they cost 20 % of the speed, since less stays in the processor's caches.
FAR_SLABS, FAR_S = 16, 0.01
# A check holds whole packs.
CHECK_SLABS = 5
RESTORE_SLAB_BYTES, RESTORE_STREAM_BYTES = 8 * MIB, 4 * MIB

# What a restore may do about entries that are there already.
OVERWRITE = ("refuse", "always", "if-changed", "never")

# Key derivation: RFC 9106's second recommended option, 64 MiB, three passes, four lanes: 0.2 s here. The ceilings keep
# a hostile key slot from exhausting memory or time.
ARGON2_MEMORY_KIB, ARGON2_PASSES, ARGON2_LANES = 64 << 10, 3, 4
ARGON2_MAX_MEMORY_KIB, ARGON2_MAX_PASSES, ARGON2_MAX_LANES = 1 << 20, 16, 16

# zstd levels behind --compression; "default" costs 4 % more bytes than level 3 and 25 % less time on real data.
COMPRESSION_LEVELS: dict[str, int | None] = {"off": None, "fast": -3, "default": 1, "max": 12}
