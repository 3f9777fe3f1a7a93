"""How long a large batch takes on many devices, and where it bends: a simulation of the batch's own queue.

    python scripts/simulate_batch.py
    python scripts/simulate_batch.py --rows 100000 --devices 8 --seconds 3

Nothing of it is measured on such devices: the inputs are assumptions, stated in the table that is printed. Rows are
given out by the class that `mindiffedit batch --workers` gives them out by, or in equal shares, as under msrun.
"""

from __future__ import annotations

import argparse
import heapq
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mindiffedit.service.batch_queue import Queue  # noqa: E402

# What a row asks of the storage: a picture is looked for, opened twice (its SHA-256, its pixels); its result is a
# draft that is tried, made, renamed and read once more; a line goes to the table.
OPERATIONS = 15
READ_MB, WRITTEN_MB = 0.15, 0.6  # a JPEG and a PNG of 512 x 512, and a line of 2 kB


@dataclass(frozen=True)
class Plan:
    """Assumptions of one simulation.

    Attributes:
        rows: pictures.
        devices: each has a worker.
        seconds: of a row on a device, by itself.
        spread: of these seconds, the sigma of a logarithmic normal distribution.
        load: seconds from a worker's start to its first graph.
        compiling: seconds for the graphs of one size.
        sizes: that the model works at; the n-th has a share of the rows that is proportional to 1 / n.
        slow: share of its speed that the slowest device has.
        deaths: of workers, in a thousand hours of a device.
        shares: equal shares by rank, in place of a queue.
    """

    rows: int = 1_000_000
    devices: int = 64
    seconds: float = 3.0
    spread: float = 0.1
    load: float = 60.0
    compiling: float = 120.0
    sizes: int = 1
    slow: float = 1.0
    deaths: float = 0.0
    shares: bool = False


class _Row:
    __slots__ = ("number",)

    def __init__(self, number: int):
        self.number = number


def simulate(plan: Plan, seed: int = 0) -> dict[str, float]:
    """Hours that a plan takes, its device hours over those of the rows alone, and the most sizes of one worker."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, plan.sizes + 1)
    sizes = rng.choice(plan.sizes, plan.rows, p=weights / weights.sum())
    seconds = plan.seconds * rng.lognormal(-(plan.spread**2) / 2, plan.spread, plan.rows)
    rows = [(_Row(number), size) for number, size in enumerate(sizes.tolist())]
    if plan.shares:
        queues = [Queue(rows[i :: plan.devices]) for i in range(plan.devices)]
    else:
        queues = [Queue(rows)] * plan.devices
    speeds = [plan.slow] + [1.0] * (plan.devices - 1)
    compiled: list[set[int]] = [set() for _ in range(plan.devices)]
    ready = [(plan.load, i) for i in range(plan.devices)]
    end = lost = 0.0
    while ready:
        now, i = heapq.heappop(ready)
        if not queues[i]:
            continue
        number = queues[i].take(i).number
        size = sizes[number]
        needed = seconds[number] / speeds[i]
        if size not in compiled[i]:
            compiled[i].add(size)
            needed += plan.compiling
        while plan.deaths and (after := rng.exponential(3600_000 / plan.deaths)) < needed:
            again = after + plan.load + plan.compiling  # the row's time is lost; a new worker begins
            now, lost, compiled[i] = now + again, lost + again, {size}
        end = max(end, now + needed)
        heapq.heappush(ready, (now + needed, i))
    return {
        "hours": end / 3600,
        "overhead": end * plan.devices / seconds.sum() - 1,
        "sizes": max(map(len, compiled)),
    }


def scenarios(base: Plan) -> list[tuple[str, Plan]]:
    """What is varied, one thing at a time."""
    ranks = replace(base, shares=True)
    return [
        ("as assumed", base),
        ("half the seconds", replace(base, seconds=base.seconds / 2)),
        ("twice the seconds", replace(base, seconds=base.seconds * 2)),
        ("equal shares, by rank", ranks),
        ("20 sizes", replace(base, sizes=20)),
        ("20 sizes, by rank", replace(ranks, sizes=20)),
        ("200 sizes", replace(base, sizes=200)),
        ("200 sizes, by rank", replace(ranks, sizes=200)),
        ("200 sizes, by rank, graphs from the cache", replace(ranks, sizes=200, compiling=base.compiling / 10)),
        ("one device at 0.8 of its speed", replace(base, slow=0.8)),
        ("one device at 0.8 of its speed, by rank", replace(ranks, slow=0.8)),
        ("a worker dies every 100 hours", replace(base, deaths=10)),
    ]


def tables(base: Plan) -> str:
    """Both tables, in Markdown."""
    lines = ["| assumption | hours | over the rows' own device time | sizes of one worker |", "|---|---|---|---|"]
    for name, plan in scenarios(base):
        result = simulate(plan)
        lines.append(f"| {name} | {result['hours']:.2f} | {result['overhead']:+.1%} | {result['sizes']:g} |")
    lines += [
        "",
        "| seconds of a row | rows / s | MB / s read | MB / s written | operations / s |",
        "|---|---|---|---|---|",
    ]
    for seconds in (base.seconds / 6, base.seconds / 2, base.seconds, base.seconds * 2):
        rate = base.devices / seconds
        amounts = rate, rate * READ_MB, rate * WRITTEN_MB, rate * OPERATIONS
        lines.append(f"| {seconds:g} | " + " | ".join(f"{amount:.3g}" for amount in amounts) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    for name, what in (
        ("rows", "pictures"),
        ("devices", "devices, each with a worker"),
        ("seconds", "seconds of a row on a device"),
        ("load", "seconds until a worker has its model"),
        ("compiling", "seconds for the graphs of a size"),
    ):
        default = getattr(Plan, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{what} (default: %(default)s)")
    print(tables(Plan(**vars(parser.parse_args(argv)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
