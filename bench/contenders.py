"""The programs that are compared, as command lines: what each is asked to do, and nothing else.

Each is used as its manual says, with encryption where it has any, and with a home, cache and state of its own in every
round. In the templates `{repository}`, `{home}`, `{source}`, `{target}` and `{serial}` (how many backups came before)
are filled in.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench.measure import Command, run

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

PASSPHRASE = "Lanterns-over-quiet-Harbours-47-benchmark"

Arguments = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a contender works: its repository, and a home for its caches, in one folder."""

    folder: Path

    @property
    def repository(self) -> Path:
        """The repository; it is the contender's to make."""
        return self.folder / "repository"

    @property
    def home(self) -> Path:
        """Home, with cache, configuration and state below."""
        return self.folder / "home"

    def make(self) -> None:
        """Empty the place, or make it."""
        self.remove()
        self.home.mkdir(parents=True)

    def remove(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Contender:
    """A program with its options. An empty `check` or `again=False` says that it has no such thing.

    `again`: it can back up into a repository that has a backup.
    """

    name: str
    program: str
    backup: Arguments
    restore: Arguments = ()
    check: Arguments = ()
    create: tuple[Arguments, ...] = ()
    version: Arguments = ("--version",)
    environment: Mapping[str, str] = field(default_factory=dict)
    restore_from: str = "{target}"  # working directory of restore
    again: bool = True

    def make(self, place: Place) -> None:
        """Empty the place and make a repository in it.

        :raises CommandFailed: if the program can't
        """
        place.make()
        for template in self.create:
            run(self.command(template, place), place.folder / "create.log", sample=False)

    def command(self, template: Arguments, place: Place, *, folder: str = "{home}", **values: object) -> Command:
        """Fill in a template of this contender's."""
        known = {"repository": place.repository, "home": place.home, **values}
        base = {
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "HOME": "{home}",
            "XDG_CACHE_HOME": "{home}/cache",
            "XDG_CONFIG_HOME": "{home}/config",
            "XDG_DATA_HOME": "{home}/data",
            "XDG_STATE_HOME": "{home}/state",
        }
        environment = {name: value.format(**known) for name, value in {**base, **self.environment}.items()}
        arguments = [argument.format(**known) for argument in template]
        return Command((self.program, *arguments), environment, Path(folder.format(**known)))


def _shell(script: str, *arguments: str) -> Arguments:
    return ("-o", "pipefail", "-c", script, "bash", *arguments)


_TAR = Contender(
    name="tar",
    program="bash",
    create=(("-c", 'mkdir "$1"', "bash", "{repository}"),),
    backup=_shell('tar c -C "$1" . | zstd -q -1 -T2 > "$2"', "{source}", "{repository}/archive{serial}.tar.zst"),
    restore=_shell('zstd -q -dc "$1" | tar x -C "$2"', "{repository}/archive0.tar.zst", "{target}"),
    version=("-c", "tar --version | head -n 1; zstd --version"),
    again=False,
)
_COFFRET = Contender(
    name="coffret",
    program="coffret",
    create=(("at", "{repository}", "create"),),
    backup=("at", "{repository}", "backup", "--json", "{source}"),
    restore=("at", "{repository}", "restore", "--to", "{target}", "latest"),
    check=("at", "{repository}", "check"),
    version=("version",),
    environment={"COFFRET_PASSPHRASE": PASSPHRASE},
)
_RESTIC = Contender(
    name="restic",
    program="restic",
    create=(("init",),),
    backup=("backup", "{source}"),
    restore=("restore", "latest", "--target", "{target}"),
    check=("check", "--read-data"),
    version=("version",),
    environment={"RESTIC_PASSWORD": PASSPHRASE, "RESTIC_REPOSITORY": "{repository}"},
)
_RUSTIC = Contender(
    name="rustic",
    program="rustic",
    create=(("init",),),
    backup=("backup", "{source}"),
    restore=("restore", "latest", "{target}"),
    check=("check", "--read-data"),
    environment={"RUSTIC_PASSWORD": PASSPHRASE, "RUSTIC_REPOSITORY": "{repository}", "RUSTIC_NO_PROGRESS": "true"},
)
_KOPIA = Contender(
    name="kopia",
    program="kopia",
    create=(("repository", "create", "filesystem", "--path", "{repository}"),),
    backup=("snapshot", "create", "--no-progress", "{source}"),
    restore=("restore", "--no-progress", "{source}", "{target}"),
    check=("snapshot", "verify", "--verify-files-percent=100"),
    environment={
        "KOPIA_PASSWORD": PASSPHRASE,
        "KOPIA_CONFIG_PATH": "{home}/kopia.config",
        "KOPIA_CACHE_DIRECTORY": "{home}/cache/kopia",
        "KOPIA_LOG_DIR": "{home}/logs",
        "KOPIA_CHECK_FOR_UPDATES": "false",
    },
)
_BORG = Contender(
    name="borg",
    program="borg",
    create=(("init", "--encryption", "repokey-blake2", "{repository}"),),
    backup=("create", "{repository}::backup{serial}", "{source}"),
    restore=("extract", "{repository}::backup0"),
    check=("check", "--verify-data", "{repository}"),
    environment={"BORG_PASSPHRASE": PASSPHRASE, "BORG_BASE_DIR": "{home}"},
)
_PLAKAR = Contender(
    name="plakar",
    program="plakar",
    create=(("at", "{repository}", "create"),),
    backup=("-quiet", "at", "{repository}", "backup", "{source}"),
    # Without a snapshot's id it restores the last snapshot of the working directory.
    restore=("-quiet", "at", "{repository}", "restore", "-to", "{target}"),
    check=("-quiet", "at", "{repository}", "check"),
    version=("version",),
    environment={"PLAKAR_PASSPHRASE": PASSPHRASE},
    restore_from="{source}",
)

# Each with its own default, then with what comes nearest to zstd level 1.
_KNOWN = (
    _COFFRET,
    _TAR,
    _RUSTIC,
    replace(_RUSTIC, name="rustic-zstd1", create=(("init", "--set-compression", "1"),)),
    _RESTIC,
    replace(_RESTIC, name="restic-fastest", backup=("backup", "--compression", "fastest", "{source}")),
    _KOPIA,
    replace(
        _KOPIA,
        name="kopia-zstd",
        create=(*_KOPIA.create, ("policy", "set", "--global", "--compression=zstd-fastest")),
    ),
    _BORG,
    replace(
        _BORG,
        name="borg-zstd1",
        backup=("create", "--compression", "zstd,1", "{repository}::backup{serial}", "{source}"),
    ),
    _PLAKAR,
)


def prototype(command: str) -> Contender:
    """A program that takes SOURCE and TARGET and makes a first backup only: a measurement of what can be done."""
    program, *rest = shlex.split(command)
    return Contender("prototype", program, backup=(*rest, "{source}", "{repository}"), version=(), again=False)


def available(names: Iterable[str] | None = None) -> list[Contender]:
    """The contenders whose programs are here; only those named, if any are.

    :raises LookupError: if one that is named is not known or its program is not found
    """
    contenders = []
    wanted = list(names) if names is not None else None
    for contender in _KNOWN:
        program = _find(contender)
        if (wanted is None or contender.name in wanted) and program is not None:
            contenders.append(replace(contender, program=program))
    missing = set(wanted or ()) - {contender.name for contender in contenders}
    if missing:
        raise LookupError(f"not found: {', '.join(sorted(missing))}; known are {', '.join(c.name for c in _KNOWN)}")
    return contenders


def _find(contender: Contender) -> str | None:
    """Where its program is; Coffret's beside the interpreter goes before another one on PATH."""
    if contender is _COFFRET:
        beside = Path(sys.executable).parent / "coffret"
        if beside.exists():
            return str(beside)
    found = shutil.which(contender.program)
    if found is None or (contender is _TAR and shutil.which("zstd") is None):
        return None
    if contender.name == "restic-fastest" and "fastest" not in _text(found, ("help",)):
        return None  # before 0.17 its default is the nearest
    return found


def version_of(contender: Contender) -> str:
    """What the program says of itself, in one line."""
    lines = _text(contender.program, contender.version).splitlines() if contender.version else []
    return ", ".join(line.strip("* ") for line in lines if line)


def _text(program: str, arguments: Sequence[str]) -> str:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=60)
    return done.stdout + done.stderr
