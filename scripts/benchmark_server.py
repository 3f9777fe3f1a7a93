"""How the server holds up: seconds of a request, compilations, memory, and a restart after kill -9; on the demo model.

    python scripts/benchmark_server.py --requests 500 --report server.json

starts `mindiffedit serve` on a free port, warmed up for the sample's size, and sends it edits of the sample
picture, each with a seed of its own, from one client and from several at once. Results of a seed have to be the same
from both. Then the server is killed in the middle of requests by OpenAI's client, which sends them again, and started
again. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import PIL.Image
import requests

from mindiffedit import demo
from mindiffedit.images import writing

READY_SECONDS = 300
SETTLED = 50
"""Requests after which memory should not grow any more."""


class Process:
    """`mindiffedit serve` on a free port."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> float:
        """Starts it; returns the seconds until it is ready."""
        width, height = PIL.Image.open(demo.sample_picture()).size
        begun = time.monotonic()
        argv = [sys.executable, "-m", "mindiffedit", "serve", "--quiet", "--port", str(self.port)]
        self.process = subprocess.Popen([*argv, "--warm-up", f"{width}x{height}"])
        while time.monotonic() - begun < READY_SECONDS:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}")
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{self.address}/readyz", timeout=10).ok:
                    return time.monotonic() - begun
            time.sleep(0.1)
        raise RuntimeError(f"the server was not ready in {READY_SECONDS} s")

    def end(self, sign: int = signal.SIGTERM) -> None:
        self.process.send_signal(sign)
        self.process.wait(READY_SECONDS)

    def number(self, name: str) -> float:
        """One of /metrics."""
        text = requests.get(f"{self.address}/metrics", timeout=60).text
        return float(re.search(rf"^{name} (\S+)", text, re.MULTILINE)[1])


def edit(client: openai.OpenAI, seed: int, steps: int) -> tuple[float, str]:
    """Seconds of an edit, and a digest of its pixels."""
    begun = time.monotonic()
    texts = demo.SAMPLE_PROMPTS
    result = client.images.edit(
        image=demo.sample_picture().read_bytes(),
        prompt=texts["target"],
        extra_body={"source_prompt": texts["source"], "seed": seed, "steps": steps},
    )
    return time.monotonic() - begun, hashlib.sha256(base64.b64decode(result.data[0].b64_json)).hexdigest()


@contextlib.contextmanager
def clients(process: Process, count: int, steps: int, max_retries: int = 0) -> Iterator:
    """A function that sends edits of seeds from so many clients at once and gives their results in order."""
    with openai.OpenAI(base_url=f"{process.address}/v1", api_key="none", max_retries=max_retries) as client:
        with ThreadPoolExecutor(count) as pool:
            yield lambda seeds: pool.map(lambda seed: edit(client, seed, steps), seeds)


def measure(process: Process, count: int, total: int, steps: int) -> tuple[dict, list[str]]:
    """Figures of `total` requests from `count` clients, and the digests of their results."""
    graphs = process.number("mindiffedit_graphs_made")
    begun = time.monotonic()
    seconds, digests, memory = [], [], {}
    with clients(process, count, steps) as send:
        for number, (took, digest) in enumerate(send(range(total)), start=1):
            seconds.append(took)
            digests.append(digest)
            if number % SETTLED == 0 or number == total:
                memory[number] = round(process.number("process_resident_memory_bytes") / 2**20, 1)
    elapsed = time.monotonic() - begun
    figures = {
        "clients": count,
        "requests": total,
        "steps": steps,
        "p50_s": round(statistics.median(seconds), 3),
        "p95_s": round(statistics.quantiles(seconds, n=20)[-1], 3),
        "requests_per_s": round(total / elapsed, 3),
        "graphs_made": process.number("mindiffedit_graphs_made") - graphs,
        "memory_mib": memory,
    }
    if SETTLED in memory and total > SETTLED:
        figures["growth_percent"] = round(100 * (memory[total] / memory[SETTLED] - 1), 2)
    return figures, digests


def killed(process: Process, count: int, steps: int, digests: list[str]) -> dict:
    """kill -9 while `count` clients wait for one edit each; OpenAI's client sends again what was lost."""
    with clients(process, count, steps, max_retries=20) as send:
        results = send(range(2 * count))
        while not process.number("mindiffedit_running"):
            time.sleep(0.01)
        process.end(signal.SIGKILL)
        ready = process.start()
        answered = [digest for _, digest in results]
    return {
        "restart_s": round(ready, 1),
        "requests": len(answered),
        "answered": sum(answer == digest for answer, digest in zip(answered, digests)),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500, metavar="N", help="of each row (default: %(default)s)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4], metavar="N", help="(default: 1 4)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of each edit (default: %(default)s)")
    parser.add_argument("--report", metavar="FILE", help="also write the figures, as JSON")
    args = parser.parse_args(argv)
    process = Process()
    try:
        report, digests = {"rows": []}, []
        for count in args.clients:
            figures, found = measure(process, count, args.requests, args.steps)
            figures["same_pixels"] = found == digests if digests else None
            digests = found
            report["rows"].append(figures)
            print(json.dumps(figures), flush=True)
        report["kill"] = killed(process, args.clients[-1], args.steps, digests)
        print(json.dumps(report["kill"]), flush=True)
    finally:
        process.end()
    if args.report is not None:
        with writing.atomic_path(args.report) as draft:
            Path(draft).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
