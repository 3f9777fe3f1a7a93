"""Tables, ratios, the Markdown section and the plot of `benchmark.py`, made of its results alone."""

from __future__ import annotations

import os
import statistics
from datetime import date
from pathlib import Path

STAGES = ("load", "mask", "invert", "edit")
WHENS = ("cold", "warm", "second process")


def median(values):
    """The median; None where no value is known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def total(seconds: dict):
    """Seconds of a whole edit, loading left out; None where a stage is missing."""
    parts = [seconds.get(name) for name in ("mask", "invert", "edit")]
    return None if None in parts else sum(parts)


def share_of_rate(operations, samples, seconds, rate):
    """Part of the machine's matrix-product rate that `samples` UNet evaluations in `seconds` reach, 0 to 1.

    Args:
        operations: floating-point operations of one evaluation of one sample.
        rate: operations a second.

    Returns:
        The share; None where one of the four is not known.
    """
    if None in (operations, samples, seconds, rate) or not seconds or not rate:
        return None
    return operations * samples / seconds / rate


def ratio(ours, theirs):
    """How many times as long we take; None where one is not known."""
    return None if ours is None or not theirs else ours / theirs


def rows_of(run: dict, operations, rate) -> list[dict]:
    """The table's rows of one run of one party: one for each edit, or one for its steps."""
    head = {"party": run["party"], "maps": run["maps"], "run": run["run"]}
    if run["status"] != "done":
        return [{**head, "what": run["status"], "reason": run["reason"]}]
    result = run["result"]
    if "step_seconds" in result:
        share = share_of_rate(operations, result["samples"], result["step_seconds"], rate)
        return [
            {
                **head,
                "what": "step",
                "seconds": {
                    "load": result["load_seconds"],
                    "first": result["first_seconds"],
                    "step": result["step_seconds"],
                },
                "peak": result["peak"],
                "graphs": result["compilations"],
                "share": share,
            }
        ]
    rows = []
    for what, edit in result["edits"].items():
        seconds = dict(edit["seconds"])
        whole = total(seconds)
        counts = edit["counts"]
        if what != "warm":
            seconds["load"] = result["load_seconds"]
        rows.append(
            {
                **head,
                "what": "second process" if run.get("filled_cache") else what,
                "seconds": {**seconds, "total": whole},
                "peak": result["peak"],
                "peak_stages": highest(edit["peaks"].values()),
                "unet_calls": counts["unet"]["calls"],
                "unet_samples": counts["unet"]["samples"],
                "encodes": counts["encode"]["samples"],
                "decodes": counts["decode"]["samples"],
                "graphs": edit["compilations"],
                "share": share_of_rate(operations, counts["unet"]["samples"], whole, rate),
            }
        )
    return rows


def highest(values):
    values = list(values)
    return None if not values or None in values else max(values)


def ratios_of(rows: list[dict]) -> list[dict]:
    """Ours over each other party, stage by stage: the median over the runs of the ratios within a run.

    Runs of one number are next to each other in time, so what slows the machine down slows both sides.
    """
    found = []
    timed = [row for row in rows if "seconds" in row]
    for other in ("torch", "mindone"):
        for maps in sorted({row["maps"] for row in timed}):
            # The other parties keep nothing between processes: their first edit stands against both of ours.
            for what, theirs in (
                ("cold", "cold"),
                ("warm", "warm"),
                ("second process", "cold"),
                ("step", "step"),
            ):
                pairs = [
                    (a["seconds"], b["seconds"])
                    for a in timed
                    for b in timed
                    if a["party"] == "ours" and b["party"] == other and a["run"] == b["run"]
                    if a["maps"] == b["maps"] == maps and a["what"] == what and b["what"] == theirs
                ]
                names = ("load", "mask", "invert", "edit", "total", "first", "step")
                values = {n: median(ratio(a.get(n), b.get(n)) for a, b in pairs) for n in names}
                if pairs:
                    seconds = {name: value for name, value in values.items() if value is not None}
                    entry = {"party": f"ours / {other}", "maps": maps, "run": f"{len(pairs)}"}
                    found.append({**entry, "what": what, "ratios": seconds})
    return found


# --- the table ------------------------------------------------------------------------------------


def show(value, pattern: str = "{:.2f}") -> str:
    return "-" if value is None else pattern.format(value)


def table_cells(rows: list[dict], ratios: list[dict]) -> list[list[str]]:
    """Header and cells of the one table, as text; where only steps were run, the shorter one."""
    steps = any(row["what"] == "step" for row in rows)
    stages = ("load", "first", "step") if steps else (*STAGES, "total")
    counted = [] if steps else ["UNet calls", "samples", "encoded", "decoded"]
    header = ["party", "maps", "run", "what", *(f"{s} s" for s in stages)]
    header += ["peak GB", *([] if steps else ["stages GB"]), *counted, "graphs", "of matmul rate"]
    cells = [header]
    for row in rows:
        line = [row["party"], "-" if steps else str(row["maps"]), str(row["run"]), row["what"]]
        if "seconds" in row:
            line += [show(row["seconds"].get(stage)) for stage in stages]
            line.append(show(gigabytes(row["peak"])))
            if not steps:
                line.append(show(gigabytes(row["peak_stages"])))
                line += [show(row[k], "{}") for k in ("unet_calls", "unet_samples", "encodes", "decodes")]
            line += [
                show(row["graphs"], "{}"),
                show(row["share"], "{:.3%}" if (row["share"] or 1) < 0.001 else "{:.1%}"),
            ]
        cells.append(line + ["-"] * (len(header) - len(line)))
    for row in ratios:
        line = [row["party"], "-" if steps else str(row["maps"]), f"of {row['run']}", row["what"]]
        line += [show(row["ratios"].get(stage), "{:.2f} x") for stage in stages]
        cells.append(line + ["-"] * (len(header) - len(line)))
    return cells


def gigabytes(number):
    return None if number is None else number / 1e9


def text_table(cells: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    lines.insert(1, "-" * len(max(lines, key=len)))
    return "\n".join(lines)


def markdown_table(cells: list[list[str]]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    lines.insert(1, "|" + "---|" * len(cells[0]))
    return "\n".join(lines)


# --- the section ----------------------------------------------------------------------------------


def markdown_section(results: dict, day: date | None = None) -> str:
    """A dated section for a page: machine, versions, command, table. It names no folder of this machine."""
    settings, machine = results["settings"], results["machine"]
    what = "guided UNet steps" if settings["only_step"] else "whole edits"
    when = (day or date.today()).isoformat()
    lines = [
        f"### {when}: {what}, {settings['size']} x {settings['size']} pixels",
        "",
        f"{machine['cpu']}, {machine['cores']} cores ({settings['threads']} used), "
        f"{machine['memory_gb']:.0f} GB of memory. "
        + ", ".join(f"{name} {version}" for name, version in sorted(results["versions"].items()))
        + ".",
        "",
        "```bash",
        results["command"],
        "```",
        "",
        markdown_table(table_cells(results["rows"], results["ratios"])),
        "",
        *notes(results),
        "",
    ]
    return "\n".join(lines)


def notes(results: dict) -> list[str]:
    """What has to be said below the table, one sentence to a line."""
    said = []
    operations, rate = results["operations"], results["rate"]
    if rate is not None:
        said.append(f"Rate of matrix products here: {rate / 1e9:.1f} GFLOP/s in float32.")
    if operations is not None:
        said.append(
            f"One UNet evaluation of one sample: {operations / 1e9:.4g} GFLOP, counted; the share of the rate counts "
            "the UNet's operations only."
        )
    if not results["settings"]["only_step"]:
        said.append(
            "Cold: the first edit of a process. Warm: a second edit in the same process, of another picture with "
            "other prompts of the same sizes, so that no stored result serves it."
        )
        if results["settings"].get("cold"):
            said.append(
                "Cold edits of ours begin with an empty compile cache; 'second process' is the first edit of another "
                "process that finds it filled."
            )
    for pair in results.get("agreement", []):
        said.append(
            f"Same work, run {pair['run']}, {pair['maps']} maps: {pair['mask_pixels']} of {pair['of']} mask values "
            f"differ between ours and torch, pictures by at most {pair['levels']} of 255 levels."
        )
    for row in results["rows"]:
        if row["what"] in ("failed", "skipped"):
            said.append(f"{row['party']}, run {row['run']}, {row['what']}: {row['reason']}")
    return said


def append(path: Path, text: str) -> None:
    """Add a section at the end of a page, which is written whole or stays as it was."""
    path = Path(path)
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if before and not before.endswith("\n"):
        before += "\n"
    write_whole(path, (before + ("\n" if before else "") + text).encode("utf-8"))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


# --- the plot -------------------------------------------------------------------------------------


def load_matplotlib():
    """matplotlib's pyplot; ImportError with what to do where it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "--scaling draws with matplotlib, which is not installed; pip install '.[benchmark]' does that."
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_scaling(points: list[dict], path: Path) -> None:
    """Seconds and peak memory against size, maps and batch, as a PNG.

    Args:
        points: {"axis", "value", "party", "seconds", "peak"}; seconds or peak None where a run died.
    """
    import io

    pyplot = load_matplotlib()
    titles = {"size": "pixels on a side", "maps": "maps per mask", "batch": "pictures in a batch"}
    axes_here = [axis for axis in titles if any(p["axis"] == axis for p in points)]
    figure, panels = pyplot.subplots(
        2, len(axes_here), figsize=(4 * len(axes_here), 6), squeeze=False, constrained_layout=True
    )
    for column, axis in enumerate(axes_here):
        for line, (key, label) in enumerate(
            (
                ("seconds", "seconds, second edit" if axis != "maps" else "seconds, second mask"),
                ("peak", "peak memory, GB"),
            )
        ):
            panel = panels[line][column]
            for party in sorted({p["party"] for p in points}):
                here = sorted(
                    (p["value"], p[key] if key == "seconds" else p[key] / 1e9)
                    for p in points
                    if p["axis"] == axis and p["party"] == party and p[key] is not None
                )
                if here:
                    panel.plot(*zip(*here), marker="o", label=party)
            panel.set_xlabel(titles[axis])
            panel.set_ylabel(label)
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
            if panel.get_legend_handles_labels()[0]:
                panel.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    write_whole(path, buffer.getvalue())
