"""Directory trees to back up, and what tells whether they came back.

* `make_hostile_tree` makes one tree of everything; `trees()` and `build` random small ones for hypothesis;
* `describe` reads all that is to be restored, `differences` says where two descriptions differ;
* `remove_tree` removes what shutil can't.
"""

from tests.hostile_tree import make_hostile_tree
from tests.tree_specs import Directory, File, Link, Special, Symlink, build, entries, trees
from tests.tree_state import Node, describe, differences, remove_tree, walk

__all__ = [
    "Directory",
    "File",
    "Link",
    "Node",
    "Special",
    "Symlink",
    "build",
    "describe",
    "differences",
    "entries",
    "make_hostile_tree",
    "remove_tree",
    "trees",
    "walk",
]
