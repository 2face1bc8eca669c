"""Worker processes: what they import and may know, how they fail, and what is left when they have ended."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from tests.fault_harness import make_source
from tests.harness import Program, repository
from tests.processes import left_behind

from coffret.connectors.errors import StorageFull
from coffret.connectors.local import LocalConnector
from coffret.engine import workerpool
from coffret.engine.errors import OutOfSpace, WorkerDied, reported
from coffret.engine.processes import all_ended, environment, exit_of, how_ended
from coffret.engine.workerpool import WorkerPool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.connectors.base import Buffer

pytestmark = pytest.mark.anyio

# Loaded by a worker, or by Python as it starts, if they are found.
PLANTED = ("__init__", "blake3", "struct", "marshal", "zstandard", "chunkworker", "openworker", "sitecustomize")
HELLO = ("keys", bytes(32), ("fastcdc-gear64", 1 << 12, 1 << 14, 1 << 16), bytes(32))


def pool(module: str = "coffret.engine.chunkworker") -> WorkerPool:
    async def never(worker: object, message: tuple[Any, ...]) -> None:
        raise AssertionError(message)

    return WorkerPool(module, workers=2, slabs=2, slab_bytes=1 << 20, handle=never)


async def failure_of(workers: WorkerPool) -> WorkerDied:
    """What is reported of workers that fail."""
    with pytest.raises(BaseException) as raised:
        async with workers:
            workers.start(("keys", b"no keys at all"))
            await anyio.sleep_forever()
    known = reported(raised.value)
    assert isinstance(known, WorkerDied), raised.value
    assert not left_behind()
    return known


def in_memory(name: str) -> int:
    """Bytes of mappings of a name that lie in memory of this process; anonymous memory has no name."""
    found = 0
    current = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            current = words[5] if len(words) > 5 else ""
        elif words[0] == "Rss:" and name in current:
            found += int(words[1]) << 10
    return found


def blocked_in(process: int) -> int:
    """The signals a process has blocked, a bit each."""
    [mask] = re.findall(r"^SigBlk:\s+(\w+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return int(mask, 16)


@pytest.mark.parametrize("inherited", [None, "", ".", "lib:", ":lib"])
async def test_nothing_of_the_source_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inherited: str | None
) -> None:
    """What lies in the current directory is data, whatever its name is."""
    source, imported = tmp_path / "source", tmp_path / "imported"
    for folder in (source, source / "coffret", source / "coffret" / "engine", source / "lib"):
        folder.mkdir()
        for name in PLANTED:
            (folder / f"{name}.py").write_text(f"open({str(imported)!r}, 'a').write(__name__ + ' ')\n")
    monkeypatch.chdir(source)
    if inherited is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", inherited)
        monkeypatch.setattr(sys, "path", [*sys.path, "", "lib"])
    async with repository(tmp_path) as opened:
        made = await opened.backup([b"."])
        assert made.counts.files == 4 * len(PLANTED)
        assert (await opened.check()).clean
        assert not (await opened.restore(made.snapshot, b"../target")).errors
    assert len(list((tmp_path / "target" / "lib").iterdir())) == len(PLANTED)
    assert not imported.exists(), imported.read_text()


def test_the_search_path_is_absolute_and_no_longer_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["", "relative", *sys.path, "/elsewhere"])
    monkeypatch.setenv("PYTHONPATH", ":relative:/elsewhere")
    folders = workerpool._search_path().split(os.pathsep)
    assert all(Path(folder).is_absolute() for folder in folders if folder)
    assert "/elsewhere" not in folders
    code = "import coffret.engine.openworker, coffret.engine.chunkworker"
    variables = {"PYTHONPATH": os.pathsep.join(folders)}
    subprocess.run([sys.executable, "-P", "-S", "-c", code], cwd="/", env=variables, check=True)


def test_a_worker_is_told_of_every_package_it_imports() -> None:
    """Each may lie in a folder of its own: what is missing would be found in this environment and in no other."""
    code = """if True:
        import sys
        import coffret.engine.openworker, coffret.engine.chunkworker
        print(*{name.partition(".")[0] for name, module in sys.modules.items() if getattr(module, "__file__", None)})
    """
    variables = {"PYTHONPATH": workerpool._search_path()}
    command = [sys.executable, "-P", "-S", "-c", code]
    found = subprocess.run(command, cwd="/", env=variables, check=True, capture_output=True, text=True).stdout.split()
    optional = {"typing_extensions"}  # of msgspec, which does without
    assert {*found} - sys.stdlib_module_names - optional <= {*workerpool._PACKAGES}
    assert "_cffi_backend" in found


@pytest.mark.parametrize("name", ["mmap", "struct", "_struct", "marshal", "typing"])
def test_nothing_takes_the_place_of_the_standard_library(tmp_path: Path, name: str) -> None:
    """What pip has put beside the packages may have any name."""
    (tmp_path / f"{name}.py").write_text("raise SystemError('not what was meant')\n")
    library, compiled, *packages = workerpool._search_path().split(os.pathsep)
    variables = {"PYTHONPATH": os.pathsep.join([library, compiled, str(tmp_path), *packages])}
    code = "import coffret.engine.openworker, coffret.engine.chunkworker"
    subprocess.run([sys.executable, "-P", "-S", "-c", code], cwd="/", env=variables, check=True)


def test_a_child_gets_no_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COFFRET_PASSPHRASE", "COFFRET_NEW_PASSPHRASE_FILE", "COFFRET_PEER_PASSPHRASE_COMMAND"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("COFFRET_REPOSITORY", "place")
    found = environment()
    assert "secret" not in found.values()
    assert found["COFFRET_REPOSITORY"] == "place"
    assert found["PATH"] == os.environ["PATH"]


def test_a_command_whose_output_is_backed_up_gets_no_passphrase(tmp_path: Path) -> None:
    program = Program(tmp_path, environment={"COFFRET_PASSPHRASE": "what nobody else may know"})
    program("create")
    program.backup("--stdin-command", "env", "--stdin-name", "env")
    program("restore", "latest", "--to", "target")
    told = (tmp_path / "target" / "env").read_text()
    assert "COFFRET_REPOSITORY=" in told
    assert "what nobody else may know" not in told


async def test_what_ends_a_program_is_not_for_its_workers() -> None:
    """They are there until the parent has ended them, from their first instruction on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    async with pool() as workers:
        workers.start(HELLO)
        for worker in workers.workers:
            blocked = blocked_in(worker.process.pid)
            assert all(blocked & 1 << number - 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
            assert not blocked & 1 << signal.SIGUSR1 - 1
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


async def test_a_worker_that_fails_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    known = await failure_of(pool())
    assert str(known).startswith("a worker process failed: ")
    assert "ValueError" in str(known)
    assert capfd.readouterr().err == ""


async def test_a_worker_that_can_not_begin(capfd: pytest.CaptureFixture[str]) -> None:
    assert "exit code 1" in str(await failure_of(pool("coffret.engine.no_such_worker")))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("call", ["os.memfd_create", "mmap.mmap", "socket.socketpair", "subprocess.Popen"])
async def test_no_worker_can_be_started(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few descriptors, processes or memory: said in words, and nothing is left open."""

    def refused(*arguments: object, **options: object) -> None:
        raise OSError(24, "Too many open files")

    owner, name = call.split(".")
    monkeypatch.setattr(getattr(workerpool, owner), name, refused)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    known = await failure_of(pool())
    assert "can't be started: Too many open files" in str(known)
    assert "ulimit" in known.remedy
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_no_memory_is_kept_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error itself may be kept for long: its traceback holds all that the stages held."""
    source = make_source(tmp_path / "source", large_bytes=40 << 20)
    put = LocalConnector.put

    async def full(self: LocalConnector, name: str, body: Sequence[Buffer], *, if_absent: bool = False) -> None:
        if name.startswith("packs/"):
            raise StorageFull("no space left")
        await put(self, name, body, if_absent=if_absent)

    monkeypatch.setattr(LocalConnector, "put", full)
    async with repository(tmp_path) as opened:
        with pytest.raises(BaseException) as raised:
            await opened.backup([bytes(source)])
    assert isinstance(reported(raised.value), OutOfSpace)
    assert in_memory("coffret-slabs") == 0


async def test_slabs_go_when_a_view_stays() -> None:
    async with pool() as workers:
        workers.start(HELLO)
        view = workers.slab(1)
        view[:] = random.Random(0).randbytes(len(view))
        assert in_memory("coffret-slabs") >= len(view)
    assert in_memory("coffret-slabs") == 0
    view.release()
    with pytest.raises(AttributeError):
        workers._handle  # noqa: B018 - it would keep the pool that uses this one


@pytest.mark.parametrize("pidfd", [True, False])
async def test_waiting_for_a_process_holds_up_nobody(pidfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not pidfd:

        def refused(pid: int) -> int:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(os, "pidfd_open", refused)
    process = subprocess.Popen(["sleep", "1000"])  # noqa: ASYNC220
    async with anyio.create_task_group() as group:
        codes: list[int] = []

        async def wait() -> None:
            codes.append(await exit_of(process))

        group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        process.kill()
    assert codes == [await exit_of(process)] == [-signal.SIGKILL]


@pytest.mark.parametrize("amid", ["work", "the end"])
async def test_each_process_is_reaped_however_often_the_task_is_cancelled(amid: str) -> None:
    """By asyncio's own means, which no shield keeps off: amid work, and when the processes were told to end."""
    workers, started = pool(), list[subprocess.Popen[bytes]]()

    async def use() -> None:
        async with workers:
            workers.start(HELLO)
            started.extend(worker.process for worker in workers.workers)
            for process in started:
                process.send_signal(signal.SIGSTOP)  # so none ends by itself
            if amid == "work":
                await asyncio.sleep(1000)

    task = asyncio.ensure_future(use())
    while not (started if amid == "work" else workers.closed):  # noqa: ASYNC110
        await asyncio.sleep(0)
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)
    assert task.cancelled()
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2
    assert not workers.workers


def test_processes_are_reaped_when_nothing_can_be_awaited_any_more() -> None:
    """The loop was stopped amid the wait, and its tasks are closed."""
    processes = [subprocess.Popen(["sleep", "1000"]) for _ in range(2)]

    async def nothing_more() -> None:
        raise KeyboardInterrupt

    async def wait(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("coffret.engine.processes.exit_of", lambda process: nothing_more())
        await all_ended(processes, 60)

    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyboardInterrupt):
        anyio.run(wait, monkeypatch)
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


def test_how_a_process_ended() -> None:
    assert how_ended(7) == "exit code 7"
    assert how_ended(-9) == "killed by SIGKILL"
    assert how_ended(-(signal.SIGRTMIN + 3)) == f"killed by signal {signal.SIGRTMIN + 3}"


def test_a_passphrase_command_gets_no_passphrase(tmp_path: Path) -> None:
    """What changes a passphrase has two: the command that gives one is not told the other."""
    program = Program(tmp_path, environment={"COFFRET_PASSPHRASE": "the old one"})
    program("create")
    told = f"sh -c 'env > {tmp_path}/told; echo another'"
    program.with_environment(COFFRET_NEW_PASSPHRASE_COMMAND=told)("passphrase", "add")
    assert "HOME=" in (tmp_path / "told").read_text()
    assert "the old one" not in (tmp_path / "told").read_text()
