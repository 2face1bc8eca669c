"""The wheel: one package with its compiled kernel, which works in an empty environment. Needs a package index."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs a git checkout"),
]


def run(command: Sequence[str | Path], directory: Path) -> str:
    """Run a command that must succeed, away from this environment's variables for Python; return its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COFFRET"))}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout as git would have it: nothing that was built, links as links."""
    target = tmp_path_factory.mktemp("sources")
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT)
    for name in filter(None, listed.split("\0")):
        source, copy = ROOT / name, target / name
        if os.path.lexists(source):  # not if it was removed and that is not committed yet
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)
    return target


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of `pip wheel .`."""
    target = tmp_path_factory.mktemp("wheel")
    run([*PIP, "wheel", ".", "--no-deps", "--wheel-dir", target], sources)
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_holds_one_package(wheel: Path, sources: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"coffret"}
    expected = {f"coffret/{name}" for name in ("__init__.py", "__main__.py", "cli.py", "display.py", "py.typed")}
    for folder in ("engine", "connectors", "commands"):
        modules = {path.relative_to(sources).as_posix() for path in (sources / folder).rglob("*.py")}
        assert modules
        expected |= {f"coffret/{name}" for name in modules}
    assert expected <= set(names)
    compiled = {name.partition(".")[0] for name in names if name.endswith(".so")}
    assert compiled == {f"coffret/engine/{path.stem}" for path in (sources / "engine").glob("*.pyx")}
    assert not [name for name in names if name.endswith((".c", ".pyx"))]


def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / "bin"
    run([binaries / "python", "-m", "pip", "install", "--quiet", wheel], tmp_path)
    assert run([binaries / "coffret", "version"], tmp_path).startswith("coffret ")
    imported = "import coffret.engine._gear, importlib.util as u; print(coffret.__file__, u.find_spec('engine'))"
    location, engine = run([binaries / "python", "-c", imported], tmp_path).split()
    assert Path(location).is_relative_to(tmp_path / "venv")
    assert engine == "None"


def test_the_sdist_builds_the_same_wheel(wheel: Path, sources: Path, tmp_path: Path) -> None:
    run([sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, sources], tmp_path)
    (archive,) = tmp_path.glob("coffret-*.tar.gz")
    with tarfile.open(archive) as opened:
        assert not [name for name in opened.getnames() if name.endswith((".so", ".c")) or "/tests" in name]
    run([*PIP, "wheel", archive, "--no-deps", "--wheel-dir", tmp_path], tmp_path)
    (rebuilt,) = tmp_path.glob("*.whl")
    assert sorted(zipfile.ZipFile(rebuilt).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())
