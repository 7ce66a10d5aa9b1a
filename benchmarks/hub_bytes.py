"""Bytes, time and peak memory of cutting a checkpoint straight from the Hub, compared with downloading all of it.

    python benchmarks/hub_bytes.py
    python benchmarks/hub_bytes.py --gb 2

Makes a bf16 Llama of random bytes (32 layers, shards of about 100 MB), serves it from the tests' stand-in Hub over
HTTP on loopback, drops 8 layers from it by its id, downloads all of it with `snapshot_download`, and prints a Markdown
table. Bytes are counted on the server. Each way runs in its own process; everything is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.checkpoint import DROP, make_llama  # noqa: E402
from tests.hub_server import HubServer, client_env  # noqa: E402

TIMED = """
import json, resource, sys, time
{imports}
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
{work}
seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps(dict(kept=kept, seconds=seconds, peak=peak / 1000, before=before / 1000)))
"""
OURS = TIMED.format(
    imports="from tests.cutting import cut_checkpoint",
    work="kept = cut_checkpoint('org/llama', sys.argv[1], json.loads(sys.argv[2])).weight_bytes",
)
SNAPSHOT = TIMED.format(
    imports="from huggingface_hub import snapshot_download",
    work="snapshot_download('org/llama', local_dir=sys.argv[1]); kept = 0",
)


def run(script: str, server: HubServer, folder: Path) -> dict:
    """Run one way, and count the bytes that it was sent."""
    server.reset()
    command = [sys.executable, "-c", script, str(folder / "out"), json.dumps(DROP)]
    env = client_env(server, folder / "home") | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1]) | {"served": server.bytes_served(".safetensors")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.5, help="size of the base in billions of bytes (0.5)")
    parser.add_argument("--folder", type=Path, help="where to work; needs three times the base's size")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        make_llama(work / "base", args.gb, shard_bytes=100_000_000)
        size = sum(path.stat().st_size for path in (work / "base").glob("*.safetensors"))
        with HubServer({"org/llama": work / "base"}) as server:
            server.repos["org/llama"].at("main")  # hashes the files once, for both ways
            ours = run(OURS, server, work / "ours")
            every = run(SNAPSHOT, server, work / "every")
    print(f"{size / 1e6:.0f} MB, {os.cpu_count()} cores; 8 of 32 layers dropped: {ours['kept'] / 1e6:.0f} MB stay\n")
    print("| way | bytes served | ratio to kept bytes | seconds | peak MB | above start |")
    print("|---|---|---|---|---|---|")
    for label, row in (("cut from the Hub", ours), ("snapshot_download of everything", every)):
        print(
            f"| {label} | {row['served']} | {row['served'] / ours['kept']:.4f} | {row['seconds']:.2f} "
            f"| {row['peak']:.0f} | {row['peak'] - row['before']:.0f} |"
        )


if __name__ == "__main__":
    main()
