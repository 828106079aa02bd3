"""Publish and fetch a checkpoint side by side with plain boto3: `python benchmarks/transfer.py --mib 1024`.

Starts its own SeaweedFS in a temporary folder. Every measurement is a process of its own, the contestants take turns,
and medians are printed. `publish` and `fetch` also hash every byte.
"""

import argparse
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ptl.local import servers
from ptl.storage import store
from ptl.storage.manifest import digest_of

MIB = 1 << 20


def boto3_up(folder, place, scratch):
    client = plain_client()
    for path in sorted(folder.iterdir()):
        client.upload_file(str(path), servers.BUCKET, f"{place}/{path.name}", Config=classic())


def boto3_down(folder, place, scratch):
    client, target = plain_client(), scratch / "boto3"
    target.mkdir()
    for path in sorted(folder.iterdir()):
        client.download_file(
            servers.BUCKET, f"{place}/{path.name}", str(target / path.name), Config=classic()
        )


def fetch(folder, place, scratch):
    store.fetch(store.Pointer.load((scratch / "pointer.json").read_text()), scratch / "cache")


def publish(folder, place, scratch):
    location = f"s3://{servers.BUCKET}/{place}"
    files = store.publish(folder, location)
    (scratch / "pointer.json").write_text(store.Pointer(location, digest_of(files)).dump())


CONTESTANTS = {"plain boto3": (boto3_up, boto3_down), "ptl": (publish, fetch)}
WAYS = ("up", "down")


def plain_client():
    import boto3

    return boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])


def classic():
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(preferred_transfer_client="classic")


def peak_mib():
    """Peak resident memory of this process; ru_maxrss would be that of the parent, which is inherited."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024


def measure(name, way, folder, place, scratch):
    """One operation in this process: seconds without imports and set-up of the interpreter, and peak memory."""
    import boto3  # noqa: F401
    import s3transfer.manager  # noqa: F401

    start = time.perf_counter()
    CONTESTANTS[name][WAYS.index(way)](folder, place, scratch)
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak_mib()}))


def child(name, way, folder, place, scratch):
    command = [sys.executable, __file__, "--one", name, way, str(folder), place, str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, {way}: {done.stderr}")
    return json.loads(done.stdout)


def run(mib, repeats, work):
    folder = work / "checkpoint"
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        for _ in range(mib):
            file.write(random.randbytes(MIB))
    (folder / "config.json").write_text("{}")
    results = {(name, way): [] for name in CONTESTANTS for way in WAYS}
    for number in range(repeats):
        # Whoever goes first in one round goes last in the next.
        for name in CONTESTANTS if number % 2 == 0 else reversed(CONTESTANTS):
            scratch = work / f"{name}-{number}"
            scratch.mkdir()
            for way in WAYS:
                os.sync()  # nobody pays for the dirty pages of the one before
                results[name, way].append(
                    child(name, way, folder, f"bench/{name}-{number}", scratch)
                )
            shutil.rmtree(scratch)
    return results


def table(results, mib):
    def rate(name, way):
        return mib / statistics.median(item["seconds"] for item in results[name, way])

    def peak(name, way):
        return max(item["peak"] for item in results[name, way])

    lines = [
        "| 1 checkpoint | publish MiB/s | fetch MiB/s | against boto3 up / down | peak memory up / down, MiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in CONTESTANTS:
        rates = " | ".join(f"{rate(name, way):.0f}" for way in WAYS)
        ratio = " / ".join(f"{rate(name, way) / rate('plain boto3', way):.2f}" for way in WAYS)
        memory = " / ".join(f"{peak(name, way):.0f}" for way in WAYS)
        lines.append(f"| {name} | {rates} | {ratio} | {memory} |")
    return "\n".join(lines)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return min(probe.getsockname()[1], 50000)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the checkpoint")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; needs about ten times the size")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, way, folder, place, scratch = options.one
        measure(name, way, Path(folder), place, Path(scratch))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        os.environ.update(servers.s3_up(work / "server", free_port()))
        try:
            results = run(options.mib, options.repeats, work)
        finally:
            servers.down(work / "server")
    print(
        f"{options.mib} MiB, median of {options.repeats}, {os.cpu_count()} cores, SeaweedFS on the same machine\n"
    )
    print(table(results, options.mib))


if __name__ == "__main__":
    main()
