"""Measures what an edit costs: diffusers on PyTorch, mindone's own pipeline, and ours, on one checkpoint.

Parties: diffusers' three calls in float32 (torch) and under autocast (torch-bfloat16), mindone's three (mindone) and
ours (ours), and our edit() at each preset (edit-exact, edit-balanced, edit-fast).

    python scripts/benchmark.py --size 256 --steps 10 --maps 4
    python scripts/benchmark.py --only-step --parties torch,ours
    python scripts/benchmark.py --cold --parties torch,ours
    python scripts/benchmark.py --load --parties torch,ours --repeats 3
    python scripts/benchmark.py --quick balanced

Without `--model` a random checkpoint in the sizes of Stable Diffusion 1.5 is made once, from a seed, in the
user's cache folder (5 GB). Every measurement is a process of its own. They are interleaved: each party once,
then each once more, so that a slow hour of the machine meets all of them. Only ratios within one command mean
anything; seconds of two machines, or of one on two days, do not compare.

Progress goes to stderr, the table to stdout. Exit code: 0 all done, 1 a measurement died, 2 bad options, 130
interrupted. See docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import benchmark_checkpoint as checkpoint  # noqa: E402
import reports  # noqa: E402

PARTIES = ("torch", "torch-bfloat16", "mindone", "ours", *reports.ONE_CALL)
DEFAULT_PARTIES = ["torch", "mindone", "ours"]
WARM_UP_STEPS = 4
"""The fewest that run all graphs of every preset."""

WORKER = HERE / "benchmark_worker.py"

LAST_LINES = 8
"""So many lines of a dead process's stderr are shown."""


# --- processes ------------------------------------------------------------------------------------


class Died(Exception):
    """A measurement ended without a result. Its text: why. `lines`: the last that it wrote to stderr."""

    def __init__(self, why: str, stderr: bytes | None):
        super().__init__(why)
        text = (stderr or b"").decode(errors="replace")
        self.lines = [line.rstrip() for line in text.splitlines() if line.strip()][-LAST_LINES:]

    def tell(self) -> None:
        say("\n".join(f"    {line}" for line in [str(self), *self.lines]))


def run_job(job: dict, timeout: float, environment: dict | None = None) -> dict:
    """Run one job in a process of its own and return its result.

    Args:
        job: what the worker reads, with `threads`.
        timeout: seconds. The process is killed after that, and when we end.
        environment: variables set for the process beside ours, or None.

    Raises:
        Died: no result, for whatever reason.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    surroundings = {**os.environ, **{name: str(job["threads"]) for name in names}}
    surroundings.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    # A setting of the shell's must not decide what is measured.
    for name in ("MINDIFFEDIT_NATIVE", "MINDIFFEDIT_CACHE"):
        surroundings.pop(name, None)
    surroundings.update(environment or {})
    # A folder of its own, because MindSpore leaves files where it runs.
    with tempfile.TemporaryDirectory(prefix="mindiffedit-job-") as place:
        try:
            done = subprocess.run(
                [sys.executable, str(WORKER)],
                input=json.dumps(job).encode(),
                capture_output=True,
                timeout=timeout,
                env=surroundings,
                cwd=place,
            )
        except subprocess.TimeoutExpired as late:
            raise Died(f"not done after {timeout:g} s, killed", late.stderr) from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        memory = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        raise Died(f"killed by {name}{memory}", done.stderr)
    if done.returncode:
        raise Died(f"ended with exit code {done.returncode}", done.stderr)
    try:
        result = json.loads(done.stdout.strip().splitlines()[-1])
        if not isinstance(result, dict):
            raise ValueError
    except (IndexError, ValueError):
        raise Died("ended without a result", done.stderr) from None
    return result


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- the plan -------------------------------------------------------------------------------------


def kind_of(args) -> str:
    """The kind of its jobs, as the worker calls it."""
    return "load" if args.load else "step" if args.only_step else "edit"


def plan_runs(args) -> list[dict]:
    """What is run, in order: {"party", "maps", "run"}."""
    theirs = min(args.maps, args.mindone_maps)
    plan = []
    for number in range(1, args.repeats + 1):
        for party in args.parties:
            maps = theirs if party == "mindone" and kind_of(args) == "edit" else args.maps
            if party in reports.ONE_CALL:
                maps = None  # its preset says how many
            plan.append({"party": party, "maps": maps, "run": number})
        if {"mindone", "ours"} <= set(args.parties) and theirs < args.maps and kind_of(args) == "edit":
            # The ratio to mindone needs ours at its number of maps.
            plan.append({"party": "ours", "maps": theirs, "run": number})
    return plan


def measure(args, model: Path) -> tuple[list[dict], list[dict], dict]:
    """Rows of the plan's runs, the agreement of ours with torch, and versions; a run that dies is a row, too."""
    rows, arrays, versions = [], {}, {}
    with tempfile.TemporaryDirectory(prefix="mindiffedit-benchmark-") as place:
        for number, entry in enumerate(plan_runs(args)):
            party = entry["party"]
            job = {"model": str(model), "party": party, "maps": entry["maps"]}
            job |= {name: getattr(args, name) for name in ("threads", "size", "steps", "batch", "strength", "guidance")}
            job |= {"kind": kind_of(args), "warm_up": args.warm_up}
            job["edits"] = ["cold"] if args.cold else ["warm"] if args.warm_up else ["cold", "warm"]
            environment = {}
            ours = party == "ours" or party in reports.ONE_CALL
            if ours:
                # An empty store of compiled graphs each time: what an earlier command left would not be seen.
                cache = Path(place) / f"compile-cache-{number}"
                cache.mkdir()
                environment["MINDIFFEDIT_CACHE"] = str(cache)
            if party == "mindone":
                environment["MINDIFFEDIT_NATIVE"] = "0"  # on plain operators, which is what it would have without us
            maps = "" if entry["maps"] is None else f" {entry['maps']} maps,"
            say(f"{party},{maps} run {entry['run']} of {args.repeats} ...")
            for again in range(2 if args.cold and ours else 1):
                job["results"] = str(Path(place) / f"{number}-{again}.npz")
                start = time.monotonic()
                try:
                    result = run_job(job, args.timeout, environment)
                except Died as death:
                    death.tell()
                    rows.append({**entry, "what": "failed", "reason": str(death)})
                    continue
                say(f"    {time.monotonic() - start:.0f} s")
                rows += rows_of(entry, result, "second process" if again else None)
                versions |= {name: version for name, version in result["versions"].items() if version}
                if Path(job["results"]).exists() and not again:
                    arrays[party, entry["maps"], entry["run"]] = Path(job["results"])
        return rows, agreement(arrays), versions


def rows_of(entry: dict, result: dict, what: str | None = None) -> list[dict]:
    """Rows of one run of one party: one for each edit, or one for its steps; see `reports`."""
    shared = {"peak_gb": gigabytes(result["peak"])}
    if "edits" not in result and "step_seconds" not in result:
        return [{**entry, "what": "load", "seconds": {"load": round(result["load_seconds"], 3)}, **shared}]
    if "step_seconds" in result:
        seconds = {name: round(result[f"{name}_seconds"], 3) for name in ("load", "first", "step")}
        return [{**entry, "what": "step", "seconds": seconds, **shared, "graphs": result["graphs"]}]
    rows = []
    for edit, cost in result["edits"].items():
        seconds = {} if rows else {"load": result["load_seconds"]}
        seconds |= {"total": sum(cost["seconds"].values()), **cost["seconds"]}
        rows.append(
            {
                **entry,
                "what": what or edit,
                "seconds": {name: round(value, 3) for name, value in seconds.items()},
                **shared,
                "stages_gb": gigabytes(cost["stages_peak"]),
                **{name: cost[name] for name in ("unet_calls", "samples", "shallow_rows", "graphs")},
            }
        )
    return rows


def gigabytes(number: int | None) -> float | None:
    return None if number is None else round(number / 1e9, 3)


def agreement(arrays: dict) -> list[dict]:
    """Whether ours and torch computed the same: differing mask values, and the pictures' largest difference."""
    import numpy as np

    pairs = []
    for (party, maps, run), path in arrays.items():
        other = arrays.get(("torch", maps, run))
        if party != "ours" or other is None:
            continue
        with np.load(path) as ours, np.load(other) as theirs:
            masks = [name for name in ours.files if name.endswith("_mask")]
            pictures = [name for name in ours.files if name.endswith("_pictures")]
            pairs.append(
                {
                    "run": run,
                    "maps": maps,
                    "mask_pixels": sum(int(np.count_nonzero(ours[name] != theirs[name])) for name in masks),
                    "of": sum(ours[name].size for name in masks),
                    "levels": max(
                        int(np.abs(ours[name].astype(int) - theirs[name].astype(int)).max()) for name in pictures
                    ),
                }
            )
    return pairs


SETTINGS = "size steps maps batch strength guidance parties repeats threads cold warm_up".split()


def shown_command(args) -> str:
    """The command that was run, without the folders of this machine."""
    words = ["python scripts/benchmark.py", f"--size {args.size}", f"--steps {args.steps}"]
    if kind_of(args) == "edit":
        words += [f"--maps {args.maps}", f"--strength {args.strength:g}"]
    words += [f"--batch {args.batch}", f"--guidance {args.guidance:g}", f"--parties {','.join(args.parties)}"]
    words += [f"--repeats {args.repeats}", f"--threads {args.threads}"]
    words += [f"--warm-up {args.warm_up}"] if args.warm_up else []
    words += [f"--{name.replace('_', '-')}" for name in ("cold", "only_step", "load") if getattr(args, name)]
    if args.model:
        words.append("--model demo" if args.model == "demo" else "--model FOLDER")
    return " ".join(words)


def benchmark(args, model: Path) -> dict:
    """A run as `reports` has it."""
    rows, pairs, versions = measure(args, model)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["model"] = None if not args.model else "demo" if args.model == "demo" else "other"
    heading = reports.heading(kind_of(args), shown_command(args), versions)
    return {**heading, "settings": settings, "rows": rows, "agreement": pairs}


# --- the command ----------------------------------------------------------------------------------


def number(kind, low, high=None, open_low=False):
    """An argparse type with bounds and a sentence for what is out of them."""

    def read(text: str):
        try:
            value = kind(text)
            fits = low < value if open_low else low <= value
            if not (fits and (high is None or value <= high)):
                raise ValueError
        except ValueError:
            what = "whole number" if kind is int else "number"
            above = f"above {low}" if open_low else f"of at least {low}"
            limit = "" if high is None else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"expected a {what} {above}{limit}, got {text!r}") from None
        return value

    return read


def pixels(text: str) -> int:
    value = number(int, 64)(text)
    if value % 64:
        raise argparse.ArgumentTypeError(f"expected a multiple of 64, which every UNet takes, got {text!r}")
    return value


def party_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PARTIES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PARTIES)}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"a party is named twice in {text!r}")
    return names


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count = number(int, 1)
    add = parser.add_argument
    add("--size", type=pixels, default=256, help="pixels on each side of the picture (256)")
    add("--steps", type=count, default=10, help="steps of the schedule, or guided steps with --only-step (10)")
    add("--maps", type=count, default=4, help="noise maps per mask (4)")
    add("--batch", type=count, default=1, help="pictures edited together (1)")
    add("--strength", type=number(float, 0, 1, True), default=0.8, help="share of the steps that is run (0.8)")
    add("--guidance", type=number(float, 1, None, True), default=7.5, help="guidance scale, above 1 (7.5)")
    add("--parties", type=party_names, default=DEFAULT_PARTIES, help=f"of {','.join(PARTIES)} (torch,mindone,ours)")
    add(
        "--mindone-maps",
        type=count,
        default=1,
        metavar="N",
        help="maps per mask for mindone, whose mask takes 4 samples for each map at once (1)",
    )
    add("--repeats", type=count, default=1, help="how often each party is run (1)")
    add("--threads", type=count, default=reports.usable_cores(), help="cores to use (all)")
    add("--model", metavar="FOLDER", help="measure with this checkpoint, or 'demo', instead")
    add("--checkpoint-folder", type=Path, metavar="FOLDER", help="where the random checkpoint is made and kept")
    add("--cold", action="store_true", help="first edits only; ours with an empty and with a filled compile cache")
    add(
        "--warm-up",
        type=number(int, WARM_UP_STEPS),
        nargs="?",
        const=WARM_UP_STEPS,
        metavar="STEPS",
        help=f"measure second edits only, after a first one of so many steps and one map ({WARM_UP_STEPS})",
    )
    add("--only-step", action="store_true", help="guided UNet steps only, the median time of one")
    add("--load", action="store_true", help="loading only, and the memory that is used after it")
    add(
        "--quick",
        choices=[name.removeprefix("edit-") for name in reports.ONE_CALL],
        metavar="PRESET",
        help="edit() at a preset against diffusers' three calls with their 10 maps, in a minute: "
        "--model demo --size 128 --maps 10 --warm-up --parties torch,edit-PRESET, unless other values are given",
    )
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    add("--write", action="store_true", help="add the run to docs/benchmarks.json, and to the page's table")
    add("--timeout", type=number(float, 0, None, True), default=7200, help="seconds for one process (7200)")
    return parser


def check_options(parser, args) -> None:
    """What single options do not show. Ends the program with one sentence."""
    if int(args.steps * args.strength) < 1 and kind_of(args) == "edit":
        parser.error(f"--steps {args.steps} at --strength {args.strength:g} leaves no step; give more of one.")
    if args.cold and args.only_step:
        parser.error("--cold and --only-step exclude each other: a step alone is measured warm.")
    if args.load and (args.cold or args.only_step or args.write):
        parser.error("--load stands alone: no edit is run, and --cold, --only-step and --write are about edits.")
    if args.warm_up and (args.cold or args.only_step):
        parser.error("--warm-up is for second edits; leave it out, or --cold and --only-step.")
    if args.only_step and set(args.parties) & set(reports.ONE_CALL):
        parser.error("--only-step measures a guided step, which edit() at a preset shares with 'ours'; name that.")
    if args.threads > reports.usable_cores():
        parser.error(f"--threads {args.threads} is more than the {reports.usable_cores()} cores that can be used here.")
    if args.model and args.checkpoint_folder:
        parser.error("--model takes a checkpoint that is there, --checkpoint-folder makes one; give one of them.")
    if args.model and args.model != "demo" and not checkpoint.is_checkpoint(args.model):
        parser.error(f"--model {args.model} is no folder with a model_index.json.")
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        parser.error(f"--json {args.json} cannot be written: it is a folder, or its folder is missing.")


def find_model(args) -> Path:
    """The checkpoint to measure with, made if need be."""
    if args.model:
        from mindiffedit import demo

        return demo.checkpoint_folder() if args.model == "demo" else Path(args.model).resolve()
    folder = (args.checkpoint_folder or checkpoint.default_folder()).expanduser().resolve()
    if HERE.parent in (folder, *folder.parents):
        raise ValueError(f"{folder} is inside the repository; name a --checkpoint-folder outside.")
    if not checkpoint.is_checkpoint(folder):
        there = next(place for place in folder.parents if place.is_dir())
        if shutil.disk_usage(there).free < checkpoint.GIBIBYTES * 2**30:
            raise ValueError(f"{folder} needs {checkpoint.GIBIBYTES} GiB of disk space, and there is less.")
        say("making a random checkpoint in the sizes of Stable Diffusion 1.5, once ...")
        # In a process of its own, which gives its memory back.
        try:
            run_job({"kind": "checkpoint", "folder": str(folder), "threads": args.threads}, args.timeout)
        except Died as death:
            raise ValueError(f"the checkpoint could not be made: {death}\n" + "\n".join(death.lines)) from None
    return folder


class Terminated(BaseException):
    """A plain kill. The worker is killed with us; after a KeyboardInterrupt ``subprocess`` would not wait for it."""


def terminated(*_):
    raise Terminated


def main(arguments=None) -> int:
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.quick:
        parser.set_defaults(size=128, maps=10, warm_up=WARM_UP_STEPS, parties=["torch", f"edit-{args.quick}"])
        parser.set_defaults(model=None if args.checkpoint_folder else "demo")
        args = parser.parse_args(arguments)
    check_options(parser, args)
    before = signal.signal(signal.SIGTERM, terminated)
    try:
        run = benchmark(args, find_model(args))
    except ValueError as error:
        parser.error(str(error))
    except (KeyboardInterrupt, Terminated):
        say("interrupted")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    print(reports.text_table(reports.benchmark_cells(run["rows"])))
    print("\n".join(["", *reports.benchmark_notes(run)]))
    if args.json:
        reports.write_whole(args.json, json.dumps(run, indent=1) + "\n")
    failed = any("reason" in row for row in run["rows"])
    if args.write and not failed:
        reports.add_run(run)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
