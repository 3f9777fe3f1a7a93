"""Measures what an edit costs: diffusers on PyTorch, mindone's own pipeline, and ours, on one checkpoint.

    python scripts/benchmark.py --size 256 --steps 10 --maps 4
    python scripts/benchmark.py --only-step --parties torch,ours
    python scripts/benchmark.py --cold --parties torch,ours
    python scripts/benchmark.py --scaling scaling.png --parties ours

Without `--model` a random checkpoint in the sizes of Stable Diffusion 1.5 is made once, from a seed, in the
user's cache folder (5 GB). Every measurement is a process of its own. They are interleaved: each party once,
then each once more, so that a slow hour of the machine meets all of them. Only ratios within one command mean
anything; seconds of two machines, or of one on two days, do not compare.

Progress goes to stderr, the table to stdout. Exit code: 0 all done, 1 a measurement died, 2 bad options, 130
interrupted. See docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
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
import benchmark_report as report  # noqa: E402
import benchmark_worker as worker  # noqa: E402  (imports nothing heavy)

PARTIES = ("torch", "mindone", "ours")
WORKER = HERE / "benchmark_worker.py"
MATRIX_SIDE = 4096
"""Rows of the matrices whose product gives the machine's rate: large enough that nothing but the sum counts."""

LAST_LINES = 8
"""So many lines of a dead process's stderr are shown."""


# --- processes ------------------------------------------------------------------------------------


class Died(Exception):
    """A measurement ended without a result. Its text: why. `lines`: the last that it wrote to stderr."""

    def __init__(self, why: str, lines: list[str] = ()):
        super().__init__(why)
        self.lines = list(lines)


def run_job(job: dict, timeout: float, environment: dict | None = None) -> dict:
    """Run one job in a process of its own and return its result.

    Args:
        job: what the worker reads, with `threads`.
        timeout: seconds. The process, and all that it started, are killed after that, and when we are interrupted.
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
    with tempfile.TemporaryDirectory(prefix="mindiffedit-job-") as place:
        out, err = Path(place) / "stdout", Path(place) / "stderr"
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            # Files, not pipes: nothing waits for a reader. A group of its own, so that all of it can be killed; a
            # folder of its own, because MindSpore leaves files where it runs.
            process = subprocess.Popen(
                [sys.executable, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                env=surroundings,
                cwd=place,
                start_new_session=True,
            )
            try:
                process.communicate(json.dumps(job).encode(), timeout=timeout)
            except subprocess.TimeoutExpired:
                kill_group(process)
                raise Died(f"not done after {timeout:g} s, killed", last_lines(err)) from None
            finally:
                kill_group(process)
        if process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            memory = ", as the system does when memory runs out" if name == "SIGKILL" else ""
            raise Died(f"killed by {name}{memory}", last_lines(err))
        if process.returncode:
            raise Died(f"ended with exit code {process.returncode}", last_lines(err))
        lines = out.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        try:
            result = json.loads(lines[-1])
            if not isinstance(result, dict):
                raise ValueError
        except (IndexError, ValueError):
            raise Died("ended without a result", last_lines(err)) from None
        return result


def kill_group(process: subprocess.Popen) -> None:
    """Kill a process and all that it started, if there is any of it left, and wait for its end."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()][-LAST_LINES:]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- the machine ----------------------------------------------------------------------------------


def usable_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def describe_machine() -> dict:
    """{"cpu": model, "cores": usable ones, "memory_gb", "system", "python"}; no names of machine or user."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as info:
        named = (line.partition(":")[2].strip() for line in info if line.startswith("model name"))
        cpu = next(named, cpu)
    memory = 0.0
    with contextlib.suppress(ValueError, OSError, AttributeError):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return {
        "cpu": cpu,
        "cores": usable_cores(),
        "memory_gb": memory,
        "system": platform.system(),
        "python": platform.python_version(),
    }


def measure_machine(args, model: Path, stored: Path | None) -> tuple:
    """(rate of matrix products, operations of one UNet evaluation); None for what could not be had.

    Args:
        stored: file in which counted operations are kept, or None.
    """
    sizes = {}
    if stored is not None and stored.exists():
        with contextlib.suppress(ValueError, OSError):
            sizes = json.loads(stored.read_text(encoding="utf-8"))
    known = sizes.get(str(args.size))
    job = {
        "kind": "machine",
        "threads": args.threads,
        "side": args.matrix_side,
        "size": args.size,
        "model": None if known else str(model),
    }
    try:
        result = run_job(job, args.timeout)
    except Died as death:
        say(f"the machine's rate is not known: {death}")
        say("\n".join(f"    {line}" for line in death.lines))
        return None, known
    if not known and stored is not None:
        sizes[str(args.size)] = result["operations"]
        with contextlib.suppress(OSError):
            report.write_whole(stored, (json.dumps(sizes, indent=1) + "\n").encode())
    return result["rate"], known or result["operations"]


# --- the plan -------------------------------------------------------------------------------------


def plan_runs(args) -> list[dict]:
    """What is run, in order: {"party", "maps", "run", and "skip": why not}."""
    plan = []
    for number in range(1, args.repeats + 1):
        for party in args.parties:
            entry = {"party": party, "maps": args.maps, "run": number}
            if party != "mindone" or args.maps == 1 or args.only_step:
                plan.append(entry)
            elif args.mindone_maps is None:
                why = (
                    f"its mask takes all of 4 x {args.maps} samples at once, which does not fit in memory; "
                    "--mindone-maps 1 measures it with one map"
                )
                plan.append({**entry, "skip": why})
            else:
                plan.append({**entry, "maps": args.mindone_maps})
        if (
            "mindone" in args.parties
            and "ours" in args.parties
            and not args.only_step
            and args.mindone_maps not in (None, args.maps)
        ):
            # The ratio to mindone needs ours at its number of maps.
            plan.append({"party": "ours", "maps": args.mindone_maps, "run": number})
    return plan


def make_job(args, model: Path, entry: dict) -> dict:
    return {
        "kind": "step" if args.only_step else "edit",
        "party": entry["party"],
        "model": str(model),
        "threads": args.threads,
        "size": args.size,
        "steps": args.steps,
        "maps": entry["maps"],
        "batch": args.batch,
        "strength": args.strength,
        "guidance": args.guidance,
        "vae_tiling": args.vae_tiling,
        "edits": ["cold"] if args.cold else ["cold", "warm"],
    }


def measure(args, model: Path) -> tuple[list[dict], list[dict]]:
    """Every run of the plan and the agreement of ours with torch; a run that dies is one of the results."""
    runs, kept = [], {}
    with tempfile.TemporaryDirectory(prefix="mindiffedit-benchmark-") as place:
        for number, entry in enumerate(plan_runs(args)):
            head = {key: entry[key] for key in ("party", "maps", "run")}
            if "skip" in entry:
                runs.append({**head, "status": "skipped", "reason": entry["skip"]})
                continue
            cache = Path(place) / f"compile-cache-{number}"
            cache.mkdir()
            processes = 2 if args.cold and entry["party"] == "ours" else 1
            for process in range(processes):
                run = {**head, "filled_cache": bool(process)}
                arrays = Path(place) / f"{number}-{process}.npz"
                runs.append({**run, **one_run(args, model, entry, cache, arrays)})
                if runs[-1]["status"] == "done" and arrays.exists() and not process:
                    kept[(entry["party"], entry["maps"], entry["run"])] = arrays
            shutil.rmtree(cache, ignore_errors=True)
        return runs, agreement(kept)


def one_run(args, model: Path, entry: dict, cache: Path, arrays: Path) -> dict:
    job = {**make_job(args, model, entry), "results": str(arrays)}
    # Ours starts with an empty store of compiled graphs each time: what an earlier command left would not be seen.
    environment = {"MINDIFFEDIT_CACHE": str(cache)} if entry["party"] == "ours" else {}
    if entry["party"] == "mindone":
        environment["MINDIFFEDIT_NATIVE"] = "0"  # on plain operators, which is what it would have without us
    maps = "" if args.only_step else f" {entry['maps']} maps,"
    say(f"{entry['party']},{maps} run {entry['run']} of {args.repeats} ...")
    begun = time.monotonic()
    try:
        result = run_job(job, args.timeout, environment)
    except Died as death:
        say(f"    {death}")
        say("\n".join(f"    {line}" for line in death.lines))
        return {"status": "failed", "reason": str(death), "stderr": death.lines}
    say(f"    {time.monotonic() - begun:.0f} s")
    return {"status": "done", "reason": None, "result": result}


def agreement(kept: dict) -> list[dict]:
    """Whether ours and torch computed the same: differing mask values, and the pictures' largest difference."""
    import numpy as np

    found = []
    for (party, maps, run), path in kept.items():
        other = kept.get(("torch", maps, run))
        if party != "ours" or other is None:
            continue
        with np.load(path) as ours, np.load(other) as theirs:
            names = [name for name in ours.files if name in theirs.files]
            masks = [name for name in names if name.endswith("_mask")]
            differ = sum(int(np.count_nonzero(ours[name] != theirs[name])) for name in masks)
            levels = [
                int(np.abs(ours[name].astype(int) - theirs[name].astype(int)).max())
                for name in names
                if name.endswith("_pictures")
            ]
            values = sum(ours[name].size for name in masks)
        found.append(
            {
                "run": run,
                "maps": maps,
                "mask_pixels": differ,
                "of": values,
                "levels": max(levels, default=None),
            }
        )
    return found


def shown_command(args) -> str:
    """The command that was run, without the folders of this machine."""
    words = ["python scripts/benchmark.py", f"--size {args.size}", f"--steps {args.steps}"]
    if not args.only_step:
        words += [f"--maps {args.maps}", f"--strength {args.strength:g}"]
    words += [f"--batch {args.batch}", f"--guidance {args.guidance:g}", f"--parties {','.join(args.parties)}"]
    words += [f"--repeats {args.repeats}", f"--threads {args.threads}"]
    if args.mindone_maps is not None and not args.only_step:
        words.append(f"--mindone-maps {args.mindone_maps}")
    words += [f"--{name.replace('_', '-')}" for name in ("cold", "only_step", "vae_tiling") if getattr(args, name)]
    if args.model:
        words.append("--model demo" if args.model == "demo" else "--model FOLDER")
    return " ".join(words)


def versions_of(runs: list[dict]) -> dict:
    found = {}
    for run in runs:
        if run["status"] == "done":
            found.update(run["result"]["versions"])
    return {name: version for name, version in found.items() if version}


SETTINGS = (
    "size", "steps", "maps", "batch", "strength", "guidance", "parties", "repeats", "threads", "cold",
    "only_step", "vae_tiling", "mindone_maps",
)  # fmt: skip


def benchmark(args, model: Path, stored: Path | None) -> dict:
    """Everything that is measured and made of it; see `report` for the rows."""
    rate, operations = measure_machine(args, model, stored)
    runs, agreeing = measure(args, model)
    rows = [row for run in runs for row in report.rows_of(run, operations, rate)]
    return {
        "command": shown_command(args),
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "machine": describe_machine(),
        "versions": versions_of(runs),
        "rate": rate,
        "operations": operations,
        "runs": runs,
        "rows": rows,
        "ratios": report.ratios_of(rows),
        "agreement": agreeing,
        "failed": sum(run["status"] == "failed" for run in runs),
    }


# --- scaling --------------------------------------------------------------------------------------


def scaling(args, model: Path) -> tuple[list[dict], int]:
    """Points of the plot, and how many measurements died. One thing is varied, the others are as given."""
    points, failed, known = [], 0, {}
    args.repeats = 1
    for axis, values in (
        ("size", args.scaling_sizes),
        ("maps", args.scaling_maps),
        ("batch", args.scaling_batches),
    ):
        for value in values:
            for party in args.parties:
                varied = argparse.Namespace(**vars(args))
                varied.size, varied.maps, varied.batch = args.size, args.scaling_base_maps, 1
                setattr(varied, axis, value)
                varied.steps, varied.cold, varied.only_step = args.scaling_steps, False, False
                job = make_job(varied, model, {"party": party, "maps": varied.maps})
                job["only_mask"] = axis == "maps"  # nothing else depends on them
                key = json.dumps(job, sort_keys=True)
                if key not in known:
                    say(f"{party}, {axis} {value} ...")
                    known[key] = point_of(job, args.timeout)
                    failed += known[key]["reason"] is not None
                points.append({"axis": axis, "value": value, "party": party, **known[key]})
    return points, failed


def point_of(job: dict, timeout: float) -> dict:
    with tempfile.TemporaryDirectory(prefix="mindiffedit-benchmark-") as place:
        environment = {"MINDIFFEDIT_CACHE": place} if job["party"] == "ours" else {}
        if job["party"] == "mindone":
            environment["MINDIFFEDIT_NATIVE"] = "0"
        try:
            result = run_job(job, timeout, environment)
        except Died as death:
            say(f"    {death}")
            say("\n".join(f"    {line}" for line in death.lines))
            return {"seconds": None, "cold_seconds": None, "peak": None, "reason": str(death)}
    seconds = {what: sum(edit["seconds"].values()) for what, edit in result["edits"].items()}
    return {
        "seconds": seconds["warm"],
        "cold_seconds": seconds["cold"],
        "stages": {what: edit["seconds"] for what, edit in result["edits"].items()},
        "peak": result["peak"],
        "reason": None,
    }


def scaling_table(points: list[dict]) -> str:
    cells = [["varied", "value", "party", "first s", "second s", "peak GB"]]
    for p in points:
        figures = [p["cold_seconds"], p["seconds"], report.gigabytes(p["peak"])]
        cells.append([p["axis"], str(p["value"]), p["party"], *(report.show(f) for f in figures)])
    return report.text_table(cells)


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


def several(kind):
    """Numbers between commas."""

    def read(text: str) -> list:
        return [kind(part) for part in text.split(",")]

    return read


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
    add("--parties", type=party_names, default=list(PARTIES), help="some of torch,mindone,ours (all)")
    add("--mindone-maps", type=count, metavar="N", help="maps per mask for mindone, where --maps is above 1")
    add("--repeats", type=count, default=1, help="how often each party is run (1)")
    add("--threads", type=count, default=usable_cores(), help="cores to use (all)")
    add("--model", metavar="FOLDER", help="measure with this checkpoint, or 'demo', instead")
    add(
        "--checkpoint-folder",
        type=Path,
        metavar="FOLDER",
        help="where the random checkpoint is made and kept",
    )
    add("--vae-tiling", action="store_true", help="encode and decode in tiles")
    add(
        "--cold",
        action="store_true",
        help="first edits only; ours with an empty and with a filled compile cache",
    )
    add("--only-step", action="store_true", help="guided UNet steps only, the median time of one")
    add(
        "--scaling",
        type=Path,
        metavar="PNG",
        help="draw cost against size, maps and batch, instead of the table",
    )
    add("--scaling-steps", type=count, default=2, help="steps of the schedule there (2)")
    add("--scaling-sizes", type=several(pixels), default=[256, 512, 768], help="(256,512,768)")
    add("--scaling-maps", type=several(count), default=[1, 2, 5, 10, 20], help="(1,2,5,10,20)")
    add("--scaling-batches", type=several(count), default=[1, 2, 4], help="(1,2,4)")
    add("--scaling-base-maps", type=count, default=1, help="maps where something else is varied (1)")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    add("--markdown", type=Path, metavar="FILE", help="append a dated section with the table to this page")
    add("--timeout", type=number(float, 0, None, True), default=7200, help="seconds for one process (7200)")
    add("--matrix-side", type=number(int, 16), default=MATRIX_SIDE, help=argparse.SUPPRESS)
    add("--list-stages", action="store_true", help="say what is in each stage, and end")
    return parser


def check_options(parser, args) -> None:
    """What single options do not show. Ends the program with one sentence."""
    if int(args.steps * args.strength) < 1 and not args.only_step:
        parser.error(f"--steps {args.steps} at --strength {args.strength:g} leaves no step; give more of one.")
    if args.scaling and int(args.scaling_steps * args.strength) < 1:
        parser.error(f"--scaling-steps {args.scaling_steps} at --strength {args.strength:g} leaves no step.")
    if args.cold and args.only_step:
        parser.error("--cold and --only-step exclude each other: a step alone is measured warm.")
    if args.scaling and (args.cold or args.only_step or args.markdown):
        parser.error("--scaling draws whole edits; leave out --cold, --only-step and --markdown.")
    if args.mindone_maps is not None and "mindone" not in args.parties:
        parser.error("--mindone-maps is given, but mindone is not among --parties.")
    if args.threads > usable_cores():
        parser.error(f"--threads {args.threads} is more than the {usable_cores()} cores that can be used here.")
    if args.model and args.checkpoint_folder:
        parser.error("--model takes a checkpoint that is there, --checkpoint-folder makes one; give one of them.")
    if args.model and args.model != "demo" and not checkpoint.is_checkpoint(args.model):
        parser.error(f"--model {args.model} is no folder with a model_index.json.")
    for option in ("json", "markdown", "scaling"):
        path = getattr(args, option)
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            parser.error(f"--{option} {path} cannot be written: it is a folder, or its folder is missing.")
    if args.scaling:
        try:
            report.load_matplotlib()
        except ImportError as error:
            parser.error(str(error))


def find_model(args) -> tuple[Path, Path | None]:
    """(the checkpoint to measure with, made if need be; the file that keeps its operations, or None)."""
    if args.model:
        from mindiffedit import demo

        # Nothing is written beside a checkpoint that is not ours.
        return (demo.checkpoint_folder() if args.model == "demo" else Path(args.model).resolve()), None
    folder = (args.checkpoint_folder or checkpoint.default_folder()).expanduser().resolve()
    if HERE.parent in (folder, *folder.parents):
        raise ValueError(f"{folder} is inside the repository; name a --checkpoint-folder outside.")
    if not checkpoint.is_checkpoint(folder):
        there = next(place for place in folder.parents if place.is_dir())
        if shutil.disk_usage(there).free < checkpoint.GIBIBYTES * 2**30:
            raise ValueError(f"{folder} needs {checkpoint.GIBIBYTES} GiB of disk space, and there is less.")
        say("making a random checkpoint in the sizes of Stable Diffusion 1.5, once ...")
        # In a process of its own, which gives its memory back.
        job = {"kind": "checkpoint", "folder": str(folder), "threads": args.threads}
        try:
            run_job(job, args.timeout)
        except Died as death:
            raise ValueError(f"the checkpoint could not be made: {death}\n" + "\n".join(death.lines)) from None
        finally:
            checkpoint.sweep(folder)
    return folder, folder.with_name(f"{folder.name}.operations.json")


def main(arguments=None) -> int:
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.list_stages:
        for name, text in worker.STAGES.items():
            print(f"{name:7} {text}")
        return 0
    check_options(parser, args)
    try:
        with terminated_as_interrupted():
            return measure_and_write(parser, args)
    except KeyboardInterrupt:
        say("interrupted")
        return 130


@contextlib.contextmanager
def terminated_as_interrupted():
    """Have a plain kill raise KeyboardInterrupt, as Ctrl-C does, so that it takes the processes with it."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # only the main thread may
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def measure_and_write(parser, args) -> int:
    try:
        model, stored = find_model(args)
    except ValueError as error:
        parser.error(str(error))
    if args.scaling:
        points, failed = scaling(args, model)
        print(scaling_table(points))
        report.plot_scaling(points, args.scaling)
        results = {"machine": describe_machine(), "points": points, "failed": failed}
    else:
        results = benchmark(args, model, stored)
        print(report.text_table(report.table_cells(results["rows"], results["ratios"])))
        print("\n".join(["", *report.notes(results)]))
        if args.markdown:
            report.append(args.markdown, report.markdown_section(results))
    if args.json:
        report.write_whole(args.json, (json.dumps(results, indent=1) + "\n").encode())
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
