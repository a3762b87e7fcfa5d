"""Download once per node: the first rank of each node fetches a file into a cache, and all ranks of the node read it there.

Here the "download" copies a local file, which stands for anything slow that must happen once: fetching weights, unpacking an
archive, building an extension.

Run it: zspmd-run -n 4 docs/examples/download_once.py SOURCE CACHE_DIRECTORY
"""

import argparse
import os
import shutil
from pathlib import Path

import zspmd


def download(source: Path, cache: Path) -> Path:
    """Copy ``source`` into the cache, unless it is there; a copy that is cut short is never taken for the file."""
    target = cache / source.name
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        shutil.copyfile(source, partial)
        partial.rename(target)  # atomic within a file system
    return target


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("cache", type=Path)
    arguments = parser.parse_args()

    with zspmd.Coordinator.from_env(timeout_s=600.0) as coordinator:
        if coordinator.is_local_master:
            download(arguments.source, arguments.cache)
            print(f"rank {coordinator.rank} downloads {arguments.source.name}", flush=True)
        coordinator.local_barrier()  # the ranks of this node wait for its first; barrier() would wait for all nodes

        size = (arguments.cache / arguments.source.name).stat().st_size
        sizes = coordinator.all_gather(str(size).encode())  # every rank's answer, in rank order
        if coordinator.is_master:
            print(f"bytes read by each rank: {[int(text) for text in sizes]}", flush=True)


if __name__ == "__main__":
    main()
