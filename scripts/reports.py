"""Measured runs as data, and the tables that the scripts print and the documentation shows. Imports no other script.

    python scripts/reports.py

`docs/benchmarks.json` is a list of runs, oldest first; `--write` of `benchmark.py` and of `evaluate_editing.py` adds
one at its end. Every run has "kind", "date", "machine" and "versions", and "commit" and "command" where they are
known. Kinds: "edit" and "step" (`benchmark.py`), "comparison" and "pareto" (`evaluate_editing.py`), and "table" for
what was measured by hand. The pages show the newest run of each scope, between two comments; this program writes those
tables anew from the data.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

DOCS = ROOT / "docs"
DATA = "benchmarks.json"
PAGES = ("performance.md", "quality.md")

MAX_LINE = 300
"""Characters of a line of the data; a row of a run has about 250."""

ONE_CALL = ("edit-exact", "edit-balanced", "edit-fast")
"""Parties that are `edit()` at a preset. Their rows have no number of maps, which the preset decides."""

PAIRS = (
    ("ours", "torch"),
    ("ours", "torch-bfloat16"),
    ("ours", "mindone"),
    *((party, "torch") for party in ("torch-bfloat16", *ONE_CALL)),
)
"""Whose seconds are divided by whose."""

STAGES = ("load", "mask", "invert", "edit", "total", "first", "step")

EXACT = 100.0
"""PSNR in dB that stands for equal pictures, whose own is infinite; a 128 x 128 picture with one wrong bit has 95."""


# --- runs -----------------------------------------------------------------------------------------


def usable_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def heading(kind: str, command: str, versions: dict) -> dict:
    """What every run says of itself; no names of machine, user or folders."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as info:
        models = (line.partition(":")[2].strip() for line in info if line.startswith("model name"))
        cpu = next(models, cpu)
    memory = None
    with contextlib.suppress(ValueError, OSError, AttributeError):
        memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9)
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "kind": kind,
        "date": date.today().isoformat(),
        "commit": commit,
        "machine": {"cpu": cpu, "cores": usable_cores(), "memory_gb": memory},
        "versions": versions,
        "command": command,
    }


def load_runs(folder: Path = DOCS) -> list[dict]:
    return json.loads((folder / DATA).read_text(encoding="utf-8"))


def add_run(run: dict, folder: Path = DOCS) -> None:
    """Put a run at the end of the data, and the pages' tables in accord with it."""
    write_whole(folder / DATA, data_text([*load_runs(folder), run]) + "\n")
    write_pages(folder)


def data_text(value, indent: int = 0) -> str:
    """JSON in which everything that is short stands on one line."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, (dict, list)) or len(line) <= MAX_LINE:
        return line
    if isinstance(value, dict):
        items = [f"{json.dumps(name)}: {data_text(item, indent + 1)}" for name, item in value.items()]
    else:
        items = [data_text(item, indent + 1) for item in value]
    first, last = "{}" if isinstance(value, dict) else "[]"
    inner = ",\n".join(" " * (indent + 1) + item for item in items)
    return f"{first}\n{inner}\n{' ' * indent}{last}"


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    from mindiffedit.images.writing import atomic_path

    with atomic_path(path) as draft:
        Path(draft).write_text(text, encoding="utf-8")


# --- ratios ---------------------------------------------------------------------------------------


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """How many times as long we take; None where one is not known."""
    return None if ours is None or not theirs else ours / theirs


def ratios_of(rows: list[dict]) -> list[dict]:
    """One party over another, stage by stage, for `PAIRS`: the median over the runs of the ratios within a run.

    Runs of one number are next to each other in time, so what slows the machine down slows both sides. Other parties
    keep nothing between processes: their first edit stands against both of ours. Both have the same number of maps,
    unless a preset decides it.
    """
    ratios = []
    timed = [row for row in rows if "seconds" in row]
    for party, peer in PAIRS:
        for maps in sorted({row["maps"] for row in timed if row["party"] == peer}):
            for what in ("cold", "warm", "second process", "step", "load"):
                counterpart = "cold" if what == "second process" else what
                pairs = [
                    (ours, theirs)
                    for ours in timed
                    for theirs in timed
                    if (ours["party"], ours["what"]) == (party, what) and ours["maps"] in (maps, None)
                    if (theirs["party"], theirs["what"], theirs["maps"]) == (peer, counterpart, maps)
                    if ours["run"] == theirs["run"]
                ]
                if not pairs:
                    continue
                medians = {}
                for stage in STAGES:
                    known = [ratio(a["seconds"].get(stage), b["seconds"].get(stage)) for a, b in pairs]
                    if None not in known:
                        medians[stage] = statistics.median(known)
                entry = {"party": f"{party} / {peer}", "maps": maps, "run": len(pairs), "what": what}
                peaks = [max(row["peak_gb"] or 0 for row in side) for side in zip(*pairs)]
                ratios.append({**entry, "ratios": medians, "peak_gb": ratio(*peaks)})
    return ratios


# --- tables ---------------------------------------------------------------------------------------


def show(value, pattern: str = "{:.2f}") -> str:
    return "-" if value is None else pattern.format(value)


def markdown_table(cells: list[list[str]]) -> str:
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in cells]
    lines.insert(1, "|" + "---|" * len(cells[0]))
    return "\n".join(lines)


def text_table(cells: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    lines.insert(1, "-" * len(max(lines, key=len)))
    return "\n".join(lines)


def benchmark_cells(rows: list[dict]) -> list[list[str]]:
    """Header and cells of what `benchmark.py` prints: its rows, then their ratios."""
    parts = {"step": ("load", "first", "step"), "load": ("load",)}
    stages = next((parts[row["what"]] for row in rows if row["what"] in parts), STAGES[:5])
    edits = stages == STAGES[:5]
    costs = {"peak_gb": "{:.2f}", "graphs": "{}"}
    if edits:
        costs = {"peak_gb": "{:.2f}", "stages_gb": "{:.2f}", "unet_calls": "{}", "samples": "{}"}
        costs |= {"shallow_rows": "{}", "graphs": "{}"}
    names = {"peak_gb": "peak GB", "stages_gb": "stages GB", "unet_calls": "UNet calls", "shallow_rows": "shallow"}
    header = ["party", "maps", "run", "what", *(f"{stage} s" for stage in stages), *(names.get(c, c) for c in costs)]
    cells = [header]
    for row in [*rows, *ratios_of(rows)]:
        times, pattern = ("ratios", "{:.2f} x") if "ratios" in row else ("seconds", "{:.2f}")
        run = f"of {row['run']}" if "ratios" in row else str(row["run"])
        line = [row["party"], show(row["maps"], "{}") if edits else "-", run, row["what"]]
        line += [show(row.get(times, {}).get(stage), pattern) for stage in stages]
        cells.append(line + [show(row.get(name), pattern if "ratios" in row else costs[name]) for name in costs])
    return cells


def benchmark_notes(run: dict) -> list[str]:
    """What has to be said below that table, one sentence to a line."""
    notes = []
    if run["kind"] == "edit":
        notes.append(
            "Cold: the first edit of a process. Warm: a second edit in the same process, of another picture with "
            "other prompts of the same sizes, so that no stored result serves it."
        )
    if any(row["what"] == "second process" for row in run["rows"]):
        notes.append(
            "Cold edits of ours begin with an empty compile cache; 'second process' is the first edit of another "
            "process that finds it filled."
        )
    for pair in run["agreement"]:
        notes.append(
            f"Same work, run {pair['run']}, {pair['maps']} maps: {pair['mask_pixels']} of {pair['of']} mask values "
            f"differ between ours and torch, pictures by at most {pair['levels']} of 255 levels."
        )
    notes += [f"{row['party']}, run {row['run']}, failed: {row['reason']}" for row in run["rows"] if "reason" in row]
    return notes


WHEN = {"cold": "first edit", "warm": "second edit", "second process": "first edit, compiled before"}


def scope_of(run: dict, entry: dict) -> str:
    """What a ratio is about, in words: runs of one scope replace each other."""
    settings = run["settings"]
    words = [f"{settings['size']} x {settings['size']}"]
    if run["kind"] == "step":
        words.append("one guided step")
    else:
        words.append(f"{settings['steps']} steps at strength {settings['strength']:g}")
        words += [f"{entry['maps']} map{'s' if entry['maps'] > 1 else ''}"] if "maps" in entry else []
        words.append(WHEN[entry["what"]])
    if settings["batch"] > 1:
        words.append(f"{settings['batch']} pictures")
    if settings["model"]:
        words.append(f"{settings['model']} model")
    return ", ".join(words)


def speed_table(runs: list[dict]) -> str:
    """Ours against the other parties: the newest run of each scope, one line for each; below it, where they ran."""
    newest: dict[tuple, tuple] = {}
    for run in runs:
        if run["kind"] in ("edit", "step"):
            for entry in ratios_of(run["rows"]):
                if entry["party"] in ("ours / torch", "ours / mindone"):  # `peers_table` has the others
                    newest[scope_of(run, entry), entry["party"]] = (run, entry)
    cells = [["scope", "ratio", "whole", "mask", "inversion", "edit", "peak GB of the two", "date"]]
    places: dict[tuple, set] = {}
    for (scope, party), (run, entry) in newest.items():
        counterpart = "cold" if entry["what"] == "second process" else entry["what"]
        sides = (("ours", entry["what"]), (party.removeprefix("ours / "), counterpart))
        peaks = [peak_of(run["rows"], side, entry["maps"], what) for side, what in sides]
        times = {"total": entry["ratios"].get("step"), **entry["ratios"]}
        line = [scope, party, *(show(times.get(stage)) for stage in ("total", "mask", "invert", "edit"))]
        cells.append([*line, " / ".join(map(show, peaks)), run["date"]])
        places.setdefault((run["date"], machine_of(run)), set()).update(run["versions"].items())
    where = [f"{day}: {machine}; {versions_text(versions)}." for (day, machine), versions in places.items()]
    return "\n\n".join([markdown_table(cells), *where])


def peers_table(runs: list[dict]) -> str:
    """What a user could pick instead: all parties of the newest run of each scope in which torch and `edit()` are."""
    newest = {}
    for run in runs:
        edits = [row for row in run["rows"] if row["what"] == "warm"] if run["kind"] == "edit" else []
        if {"torch", "edit-balanced"} <= {row["party"] for row in edits}:
            newest[scope_of(run, {"what": "warm"})] = (run, edits)
    parts = []
    for scope, (run, edits) in newest.items():
        where = f"{run['date']}: {machine_of(run)}; {versions_text(run['versions'].items())}."
        parts += [f"**{scope}**", markdown_table(peers_cells(edits)), where, f"```bash\n{run['command']}\n```"]
    return "\n\n".join(parts) or "Not measured yet."


def peers_cells(edits: list[dict]) -> list[list[str]]:
    """Header and cells of one of these tables: medians of a party's warm edits, and what they are of torch's."""
    parties: dict[tuple, list[dict]] = {}
    for row in edits:
        parties.setdefault((row["party"], row["maps"]), []).append(row)

    def costs(rows):
        return [*(median_of(rows, stage) for stage in ("mask", "invert", "edit", "total")), rows[0]["peak_gb"]]

    *_, torch_seconds, torch_peak = costs([row for row in edits if row["party"] == "torch"])
    cells = [["party", "maps", "mask s", "inversion s", "edit s", "whole s", "/ torch", "rows", "peak GB", "/ torch"]]
    for (party, maps), rows in parties.items():
        *seconds, peak = costs(rows)
        shallow = f" + {rows[0]['shallow_rows']} shallow" if rows[0]["shallow_rows"] else ""
        line = [party, show(maps, "{}"), *(show(value, "{:.1f}") for value in seconds)]
        line += [show(ratio(seconds[-1], torch_seconds)), f"{rows[0]['samples']}{shallow}"]
        cells.append([*line, show(peak), show(ratio(peak, torch_peak))])
    return cells


def median_of(rows: list[dict], stage: str) -> float:
    return statistics.median(row["seconds"][stage] for row in rows)


def peak_of(rows: list[dict], party: str, maps: int, what: str) -> float | None:
    """The highest peak of a party's runs."""
    peaks = [row["peak_gb"] for row in rows if (row["party"], row["maps"], row["what"]) == (party, maps, what)]
    return max(peaks, default=None)


def machine_of(run: dict) -> str:
    machine = run["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB of memory"


def versions_text(versions) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions))


QUALITY = (
    ("mask IoU", "mask_iou", "{:.3f}"),
    ("target seen", "target_seen", "{:.1%}"),
    ("removed object gone", "removed", "{:.1%}"),
    ("PSNR of vacated ground, dB", "psnr_vacated", "{:.2f}"),
    ("PSNR outside what changes, dB", "psnr_outside", "{:.2f}"),
    ("PSNR outside mask, dB", "psnr_outside_mask", "{:.2f}"),
)


def comparison_tables(results: dict) -> dict[str, str]:
    """The tables of `evaluate_editing.py --compare`, as Markdown, by name."""

    def quality(parties: dict) -> str:
        cells = [["", *(label for label, _, _ in QUALITY)]]
        for party, means in parties.items():
            cells.append([party])
            for _, name, pattern in QUALITY:
                exact = name.startswith("psnr") and means[name] == EXACT
                cells[-1].append("exact" if exact else show(means[name], pattern))
        return markdown_table(cells)

    def two_columns(header: list[str], values: dict, pattern: str) -> str:
        return markdown_table([header, *([name, pattern.format(value)] for name, value in values.items())])

    tables = {"parties": quality(results["parties"])}
    if results["ablation"]:
        tables["ablation"] = quality(results["ablation"])
    if "reconstruction" in results:
        header = ["inversion and denoising of the whole picture", "PSNR, dB"]
        tables["reconstruction"] = two_columns(header, results["reconstruction"], "{:.2f}")
    if "seconds" in results:
        tables["seconds"] = two_columns(["seconds of one edit, median", ""], results["seconds"], "{:.3f}")
    tables["goals"] = goals_table(results["goals"])
    return tables


def goals_table(goals: dict) -> str:
    cells = [["goal", "wanted", "reached", ""]]
    for name, goal in goals.items():
        cells.append([name, goal["wanted"], goal["reached"], "passed" if goal["passed"] else "missed"])
    return markdown_table(cells)


def pareto_tables(results: dict) -> dict[str, str]:
    """The tables of `evaluate_editing.py --pareto`, as Markdown, by name."""
    header = ["", "rows", "shallow", "seconds", "mask IoU", "target seen", "against exact", "removed object gone"]
    cells = [[*header, "PSNR of vacated ground, dB", "PSNR outside what changes, dB"]]
    for name, row in results["settings"].items():
        mean, low, high = row["against_exact"].get("target_seen", [0.0] * 3)
        against = f"{mean:+.1%} ({low:+.1%} to {high:+.1%})" if low != high else "-"
        costs = [f"{row['rows']:.4g}", f"{row['shallow']:.4g}" if row["shallow"] else "-", show(row["seconds"])]
        quality = [f"{row['mask_iou']:.3f}", f"{row['target_seen']:.1%}", against, show(row["removed"], "{:.1%}")]
        cells.append([name, *costs, *quality, *(show(row[f"psnr_{name}"]) for name in ("vacated", "outside"))])
    tables = {"pareto": markdown_table(cells)}
    if "rebuilt" in results:
        steps = list(next(iter(results["rebuilt"].values())))
        cells = [["there and back, dB", *(f"{count} steps" for count in steps)]]
        cells += [[name, *(f"{row[count]:.2f}" for count in steps)] for name, row in results["rebuilt"].items()]
        tables["rebuilt"] = markdown_table(cells)
    tables["pareto_goals"] = goals_table(results["goals"])
    return tables


def pareto_curve(results: dict) -> str:
    """Target seen over rows, as an SVG picture; the presets and the reference are joined to a curve and named."""
    width, height, left, bottom, top = 760, 400, 60, 350, 20
    settings = results["settings"]
    most = 10 * -(-max(row["rows"] for row in settings.values()) // 10)
    least = min(9, *(int(10 * row["target_seen"]) for row in settings.values())) / 10

    def place(row):
        x = left + (width - left - 30) * row["rows"] / most
        return x, bottom - (bottom - top) * (row["target_seen"] - least) / (1 - least)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for number in range(0, int(most) + 1, 10):
        x, _ = place({"rows": number, "target_seen": least})
        parts.append(f'<path d="M{x:.1f} {top}V{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" font-size="12" text-anchor="middle">{number}</text>')
    for number in range(round(10 * least), 11):
        _, y = place({"rows": 0, "target_seen": number / 10})
        parts.append(f'<path d="M{left} {y:.1f}H{width - 30}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" font-size="12" text-anchor="end">{number * 10}%</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 12}" font-size="13" text-anchor="middle">rows of an edit</text>')
    parts.append(f'<text x="{left}" y="{top - 6}" font-size="13">target seen</text>')
    named = [name for name in ("fast", "balanced", "exact", "reference") if name in settings]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(settings[name]) for name in named))
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1f77b4"/>')
    for name, row in settings.items():
        x, y = place(row)
        label = f'<text x="{x + 8:.1f}" y="{y - 8:.1f}" font-size="13">{name}</text>' if name in named else ""
        colour, radius = ("#1f77b4", 5) if name in named else ("#999", 3)
        tip = f"{name}: {row['rows']:.4g} rows, {row['target_seen']:.1%}"
        circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"><title>{tip}</title></circle>'
        parts.append(circle + label)
    return "\n".join([*parts, "</svg>"]) + "\n"


# --- pages ----------------------------------------------------------------------------------------


def blocks(runs: list[dict]) -> dict[str, str]:
    """What the pages show of the data, by the name in the comment before it."""
    whole = {"reconstruction", "seconds"}
    comparison = [r for r in runs if r["kind"] == "comparison" and whole <= r.keys() and r["ablation"]][-1]
    tables = comparison_tables(comparison)
    scope = (
        f"Measured on {comparison['date']} with the demo checkpoint, on rendered scenes ({machine_of(comparison)}; "
        f"{versions_text(comparison['versions'].items())}):"
    )
    rebuilt = ", ".join(f"{name} {value:.2f} dB" for name, value in comparison["reconstruction"].items())
    taken = ", ".join(f"{name} {value:.2f} s" for name, value in comparison["seconds"].items())
    reached = [f"{name} ({goal['wanted']})" for name, goal in comparison["goals"].items() if goal["passed"]]
    summary = (
        f"Inversion and denoising of whole pictures, PSNR: {rebuilt}. One edit, median: {taken}. Goals reached: "
        f"{len(reached)} of {len(comparison['goals'])} ({'; '.join(reached)})."
    )
    pareto = newest_pareto(runs)
    where = f"{machine_of(pareto)}; {versions_text(pareto['versions'].items())}"
    return {
        **pareto_tables(pareto),
        "pareto_scope": f"Measured on {pareto['date']} ({where}):\n\n```bash\n{pareto['command']}\n```",
        "speed": speed_table(runs),
        "peers": peers_table(runs),
        "scope": f"{scope}\n\n```bash\n{comparison['command']}\n```",
        "parties": tables["parties"],
        "ablation": tables["ablation"],
        "summary": summary,
    }


def newest_pareto(runs: list[dict]) -> dict:
    return [run for run in runs if run["kind"] == "pareto"][-1]


def page_with(text: str, contents: dict[str, str]) -> str:
    """A page whose blocks, `<!-- data: NAME -->` to `<!-- end -->`, hold what `contents` has for them."""

    def filled(match: re.Match) -> str:
        return f"{match[1]}\n{contents[match[2]]}\n{match[3]}"

    return re.sub(r"(<!-- data: (\w+) -->)\n.*?(<!-- end -->)", filled, text, flags=re.DOTALL)


def write_pages(folder: Path = DOCS) -> None:
    """Every page's blocks anew; pages that are in accord with the data stay untouched."""
    runs = load_runs(folder)
    contents = blocks(runs)
    for page in PAGES:
        before = (folder / page).read_text(encoding="utf-8")
        after = page_with(before, contents)
        if after != before:
            write_whole(folder / page, after)
    write_whole(folder / "pareto.svg", pareto_curve(newest_pareto(runs)))


if __name__ == "__main__":
    write_pages()
