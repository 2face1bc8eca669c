"""The program, with a repository."""

from __future__ import annotations

import pytest
from tests.cli.sources import make_source
from tests.harness import Program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """A repository without encryption, with one snapshot of `source`."""
    program = Program(tmp_path_factory.mktemp("cli"))
    make_source(program.home)
    program("create", "--no-encryption")
    program("backup", program.home / "source")
    return program
