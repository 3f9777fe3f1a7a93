"""Measures what a second worker of a batch brings: rows a minute of one worker on one core, and of two on one each.

    python scripts/benchmark_batch.py
    python scripts/benchmark_batch.py --rows 60 --repeats 3 --json batch.json

The demo model edits its sample, with a seed for each row. Runs take turns, one worker and two, so that a slow minute of
the machine meets both; each is a process of its own on as many cores as it has workers. The rate is that of the rows
after each worker's first three, which meet graphs that are not there yet: a long batch is made of such rows. What
the whole command takes, with the start of Ray and the model, is shown beside it. Pictures of all runs have to be equal.

The machine should do nothing else: a third process on two cores takes from two workers, and not from one. Exit code: 0
when the goal of 1.6 is reached, 1 when it is not or a run fails.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mindiffedit import demo  # noqa: E402

GOAL = 1.6
WARM_UP = 3  # rows of each worker that are not counted


def write_jobs(path: Path, rows: int, steps: int) -> None:
    """A jobs file of edits of the sample."""
    row = {"picture": str(demo.sample_picture()), **demo.SAMPLE_PROMPTS, "steps": steps}
    path.write_text("".join(json.dumps({**row, "seed": seed}) + "\n" for seed in range(rows)))


def run(jobs: Path, output: Path, workers: int, cores: list[int]) -> dict:
    """One run of the command: rows a minute once it goes, seconds in all, and the pictures' SHA-256."""
    command = [sys.executable, "-m", "mindiffedit", "batch", str(jobs), "-o", str(output), "--device", "CPU", "--quiet"]
    begun = time.perf_counter()
    done = subprocess.run(
        [*command, "--workers", str(workers)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        preexec_fn=lambda: os.sched_setaffinity(0, cores[:workers]),
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise SystemExit(f"a run with {workers} workers ended with {done.returncode}:\n{done.stderr[-2000:]}")
    records = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    ends = sorted(datetime.datetime.fromisoformat(record["finished"]).timestamp() for record in records)
    first = WARM_UP * workers
    return {
        "workers": workers,
        "rows": len(records),
        "rows_per_minute": 60 * (len(ends) - first) / (ends[-1] - ends[first - 1]),
        "seconds": seconds,
        "pictures": {record["id"]: record["output"]["sha256"] for record in records},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=40, help="rows of each run (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of an edit (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write all runs")
    args = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2 or args.rows <= 2 * WARM_UP or args.repeats < 1:
        parser.error(f"this takes 2 cores, {2 * WARM_UP + 1} rows and 1 repeat at least")
    runs = []
    with tempfile.TemporaryDirectory(prefix="mindiffedit-batch-") as folder:
        os.environ["MINDIFFEDIT_CACHE"] = f"{folder}/cache"  # of the graphs that the first run compiles
        for number, workers in enumerate([1, *[1, 2] * args.repeats]):
            jobs = Path(folder, f"{number}.jsonl")
            write_jobs(jobs, args.rows if number else WARM_UP + 1, args.steps)
            result = run(jobs, Path(folder, str(number)), workers, cores)
            if number:
                runs.append(result)
                print("{workers} workers: {rows_per_minute:.1f} rows / min, {seconds:.1f} s in all".format(**result))
    rates = {n: [one["rows_per_minute"] for one in runs if one["workers"] == n] for n in (1, 2)}
    ratio = statistics.median(two / one for one, two in zip(rates[1], rates[2]))
    equal = all(one["pictures"] == runs[0]["pictures"] for one in runs)
    print(f"two workers / one: {ratio:.2f} (goal: {GOAL}); pictures {'equal' if equal else 'DIFFERENT'}")
    if args.json:
        Path(args.json).write_text(json.dumps({"ratio": ratio, "equal": equal, "runs": runs}, indent=1) + "\n")
    return 0 if equal and ratio >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
