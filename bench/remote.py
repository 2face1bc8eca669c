"""Run the remote scenarios: backups to servers on this host, and restores from them, also through a line with latency.

python -m bench.remote                              S3 and SFTP, everything, two rounds
python -m bench.remote --rounds 1 sftp              one storage
python -m bench.remote --parts speed,unchanged      the most important ones
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from bench.datasets import default_folder, load
from bench.remote_scenarios import PARTS, RemoteBench
from bench.remote_storages import storages
from bench.remote_table import remote_table
from bench.results import DEFAULT_FILE, append, this_run
from bench.tables import plain

if TYPE_CHECKING:
    from collections.abc import Sequence

_STORAGES = ("s3", "sftp")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = _parser().parse_args(arguments)
    parts = tuple(options.parts.split(",")) if options.parts else PARTS
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"bench.remote: no part {min(unknown)!r}; there are {', '.join(PARTS)}")
    datasets = {name: load(name, options.dir, scale=options.scale) for name in _datasets(parts)}
    run_ = this_run(options.dir)
    work = (options.work or options.dir / "work") / run_.run
    work.mkdir(parents=True)
    _tell(f"run {run_.run}, commit {run_.commit}, load {run_.machine['load']}: {', '.join(parts)}")
    found = storages(work, tuple(options.storages or _STORAGES))
    bench = RemoteBench(run_, datasets, found, work, parts, _tell, each_way=options.each_way)
    try:
        bench.prepare()
        if not options.no_memory:
            bench.memory()
        for number in range(options.rounds):
            bench.round(number)
    finally:
        append(options.results, bench.measurements)
        for storage in found:
            storage.close()
        _tell(remote_table(bench.measurements, plain))
        shutil.rmtree(work, ignore_errors=True)


def _datasets(parts: Sequence[str]) -> list[str]:
    return ["big", "small"] if "unchanged" in parts else ["big"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.remote", description="Run the remote scenarios.")
    parser.add_argument("--dir", type=Path, default=default_folder(), help="where data sets lie")
    parser.add_argument("--work", type=Path, help="where repositories and restored trees lie; default: DIR/work")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size of the data sets")
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds")
    parser.add_argument("--no-memory", action="store_true", help="leave out the round that samples memory")
    parser.add_argument("--each-way", action="store_true", help="latencies are those of each direction, not of both")
    parser.add_argument("--parts", metavar="NAMES", help=f"of {','.join(PARTS)}; default: all")
    parser.add_argument("--results", type=Path, default=DEFAULT_FILE, help="file to append lines to")
    parser.add_argument("storages", nargs="*", metavar="STORAGE", help="of " + ", ".join(_STORAGES))
    return parser


def _tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
