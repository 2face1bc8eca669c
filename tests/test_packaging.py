"""The wheel: one package with its compiled kernel, which works in an empty environment. Needs a package index."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
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
    pytest.mark.timeout(900),  # what it downloads and compiles
    pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs a git checkout"),
]


def run(command: Sequence[str | Path], directory: Path, **variables: str) -> str:
    """Run a command that must succeed, away from this environment's variables for Python; return its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COFFRET"))}
    environment |= variables
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tracked() -> set[str]:
    """What git has, or would have; not what was removed and that is not committed yet."""
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT)
    return {name for name in listed.split("\0") if name and os.path.lexists(ROOT / name)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout as git would have it: nothing that was built, links as links."""
    target = tmp_path_factory.mktemp("sources")
    for name in tracked():
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy, follow_symlinks=False)
    return target


@pytest.fixture(scope="module")
def tools(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """PYTHONPATH to what the project says it is built with, installed once for all builds here."""
    target = tmp_path_factory.mktemp("tools")
    requires = tomllib.loads((sources / "pyproject.toml").read_text())["build-system"]["requires"]
    run([*PIP, "install", "--target", target, *requires], target)
    return str(target)


@pytest.fixture(scope="module")
def wheel(sources: Path, tools: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of `pip wheel .`."""
    return wheel_of(sources, tmp_path_factory.mktemp("wheel"), tools)


def wheel_of(source: Path, target: Path, tools: str) -> Path:
    run([*PIP, "wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", target], target, PYTHONPATH=tools)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def sdist(sources: Path, tools: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is published as the source of a version."""
    target = tmp_path_factory.mktemp("sdist")
    run([sys.executable, "-m", "build", "--sdist", "-n", "--outdir", target, sources], target, PYTHONPATH=tools)
    (archive,) = target.glob("coffret-*.tar.gz")
    return archive


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
    venv.create(tmp_path / "venv")
    binaries = tmp_path / "venv" / "bin"
    run([*PIP, "--python", binaries / "python", "install", wheel], tmp_path)
    assert run([binaries / "coffret", "version"], tmp_path).startswith("coffret ")
    imported = "import coffret.engine._gear, importlib.util as u; print(coffret.__file__, u.find_spec('engine'))"
    location, engine = run([binaries / "python", "-c", imported], tmp_path).split()
    assert Path(location).is_relative_to(tmp_path / "venv")
    assert engine == "None"


def test_the_sdist_builds_the_same_wheel(wheel: Path, sdist: Path, tools: str, tmp_path: Path) -> None:
    rebuilt = wheel_of(sdist, tmp_path, tools)
    assert sorted(zipfile.ZipFile(rebuilt).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_the_sdist_holds_what_git_has(sdist: Path) -> None:
    """Documents, tests and benchmarks too, the package where `.pkg/` links to it; nothing that was built."""
    with tarfile.open(sdist) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    kept = tracked() - {".gitignore"}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "docs/format.md", "tests/conftest.py", "bench/run.py"} <= kept
    kept = {name for name in kept if not (ROOT / name).is_symlink()}
    assert not [name for name in kept if not {name, f".pkg/coffret/{name}"} & held]
    assert not [name for name in held if name.endswith((".so", ".c", ".pyc"))]
