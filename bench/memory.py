"""Memory of a process and all its descendants together, sampled from /proc.

Pss counts a page shared by n processes as 1/n of a page in each, so that the sum over all counts it once. Anonymous and
shared memory is what a program asked for; pages of mapped files are the kernel's to drop and are left out.

Reading it is not free: the kernel walks the page tables of each process, 5 ms per 200 MB here, with the process's
memory map locked. So what is sampled is not timed, and what is timed is not sampled.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

SAMPLE_EVERY_S = 0.05
_PROC = Path("/proc")


@dataclass(slots=True)
class Memory:
    """Bytes: `asked` is Pss_Anon + Pss_Shmem, `resident` the sum of Rss, which counts shared pages repeatedly."""

    asked: int = 0
    resident: int = 0
    processes: int = 0


def descendants(pid: int) -> list[int]:
    """The process and all below it, as far as they are alive."""
    found, at = [pid], 0
    while at < len(found):
        tasks = _PROC / str(found[at]) / "task"
        at += 1
        try:
            threads = list(tasks.iterdir())
        except OSError:
            continue
        for thread in threads:
            try:
                found += map(int, (thread / "children").read_text().split())
            except OSError:
                continue
    return found


def tree_memory(pid: int) -> Memory:
    """What a process and its descendants use now; zero when it is gone."""
    total = Memory()
    for process in descendants(pid):
        try:
            lines = (_PROC / str(process) / "smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue  # it ended meanwhile
        fields = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
        total.asked += fields.get("Pss_Anon", 0) + fields.get("Pss_Shmem", 0)
        total.resident += fields.get("Rss", 0)
        total.processes += 1
    return total


class MemorySampler:
    """Samples a process tree in a thread until stopped and keeps the peak of each figure."""

    def __init__(self, pid: int, every_s: float = SAMPLE_EVERY_S) -> None:
        self.peak = Memory()
        self.samples = 0
        self._pid = pid
        self._every_s = every_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory sampler", daemon=True)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stopped.wait(self._every_s):
            now = tree_memory(self._pid)
            self.samples += 1
            self.peak.asked = max(self.peak.asked, now.asked)
            self.peak.resident = max(self.peak.resident, now.resident)
            self.peak.processes = max(self.peak.processes, now.processes)
