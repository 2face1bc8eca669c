"""Listing folders in turns, each as it is when those before it have been listed, without waiting in between.

OpenSSH's server answers one request after the other. So the next folder is opened by a request right behind those that
read the one before: three listings take four round trips instead of six.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from coffret.connectors.base import NAME, ObjectInfo
from coffret.connectors.sftperrors import Refusal
from coffret.connectors.sftpfiles import FOLDER, REGULAR, at_once
from coffret.connectors.sftpscan import scan_in_order
from coffret.connectors.sftpwalk import info_of, text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.connectors.sftpfiles import Files


async def list_in_turns(files: Files, turns: Sequence[Sequence[str]]) -> dict[str, list[ObjectInfo]]:
    """The objects in folders ("a/") of a server that answers in order; those of later turns may be missing.

    They are where a folder was so large that it took more than one go: what was asked for behind it came too early.
    """
    found: dict[str, list[ObjectInfo]] = {}
    in_one_go: set[str] = set()
    left = [len(turn) for turn in turns]
    asked = [anyio.Event() for _ in turns]

    async def list_one(number: int, prefix: str) -> None:
        told = False

        def tell() -> None:
            nonlocal told
            if not told:
                told = True
                left[number] -= 1
                if not left[number]:
                    asked[number].set()

        try:
            if number:
                await asked[number - 1].wait()
            entries, whole = await scan_in_order(files, prefix.removesuffix("/"), tell)
            named = [(prefix + text(entry.filename), entry.attrs) for entry in entries]
            objects = [(name, attributes) for name, attributes in named if NAME.fullmatch(name)]
            if not any(attributes.type == FOLDER for _, attributes in objects):
                found[prefix] = [info_of(name, each) for name, each in objects if each.type == REGULAR]
                if whole:
                    in_one_go.add(prefix)
        except Refusal:
            return  # it is listed in the usual way, which finds out what is wrong
        finally:
            tell()

    await at_once([list_one(number, prefix) for number, turn in enumerate(turns) for prefix in turn])
    valid: dict[str, list[ObjectInfo]] = {}
    for turn in turns:
        valid.update((prefix, found[prefix]) for prefix in turn if prefix in found)
        if not in_one_go.issuperset(turn):
            break
    return valid
