"""The engine: what a repository is, and every operation on one. Start at `open_repository`.

Names are loaded when they are first used, so that a pool worker, which needs none of them, starts in milliseconds.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as type checkers know it: importing `typing` takes as long as starting the interpreter
if TYPE_CHECKING:
    from typing import Any

    from coffret.engine.creation import create_repository
    from coffret.engine.opening import open_repository
    from coffret.engine.repository import Repository

__all__ = ["Repository", "create_repository", "open_repository"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from coffret.engine import creation, opening

        return getattr(creation if name == "create_repository" else opening, name)
    raise AttributeError(name)
