"""Makes the table of docs/parity.md from what tests/test_parity.py wrote down; `scripts/run_parity.sh` calls it.

    python scripts/parity_table.py [--write docs/parity.md] RESULTS.jsonl...

Stages that share a row of `mindiffedit.parity.tolerances.TABLE` share a row here. Floors and differences are the
largest of all cases, seeds and modes; "of its tolerance" is the largest share of the tolerance of its own case that
any comparison took, so 100 % would be the limit.
"""

import argparse
import collections
import json
import sys
from pathlib import Path

import numpy as np

from mindiffedit.images import writing
from mindiffedit.parity import tolerances

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
CHECKPOINTS = {"sd1": "random, SD-1-like", "sd2": "random, SD-2-like", "demo": "demo"}
KINDS = {
    False: "Chained: each stage takes what the stage before it made",
    True: "Isolated: each stage takes the reference's input",
}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", help="files of one JSON object per line")
    parser.add_argument("--write", metavar="FILE", help="replace the table in this page")
    args = parser.parse_args(argv)
    lines = [json.loads(line) for path in args.results for line in Path(path).read_text().splitlines()]
    if not lines:
        print("there are no results: did the tests run?", file=sys.stderr)
        return 1
    text = render(lines)
    print(text)
    if args.write:
        page = Path(args.write)
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        if not rest or not after:
            print(f"{page} has no lines {BEGIN} and {END} to write between.", file=sys.stderr)
            return 1
        with writing.atomic_path(page) as draft:
            draft.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")
    return 0


def render(lines) -> str:
    """Markdown: a summary, then a table for each way of feeding the stages."""
    runs = {(line["case"], line["seed"], line["mode"]) for line in lines}
    modes = collections.Counter(mode for _, _, mode in runs)
    bad = [line for line in lines if not all(stage["ok"] for stage in line["stages"])]
    cases, seeds = len({case for case, _, _ in runs}), len({seed for _, seed, _ in runs})
    counted = ", ".join(f"{count} in {mode} mode" for mode, count in sorted(modes.items()))
    text = [
        f"{cases} cases, up to {seeds} seeds each: {len(runs)} runs ({counted}),"
        f" {sum(len(line['stages']) for line in lines)} comparisons; {len(bad)} runs out of tolerance.",
        "",
    ]
    for line in bad:
        text += [f"- out of tolerance: {line['case']}, seed {line['seed']}, {line['mode']}"]
    for isolated, title in KINDS.items():
        chosen = [line for line in lines if line["isolated"] == isolated]
        if chosen:
            text += ["", f"### {title}", "", *_table(chosen)]
    return "\n".join(text).strip() + "\n"


def _table(lines):
    measured = collections.defaultdict(lambda: dict(floor=0.0, ours=0.0, share=0.0, counts=collections.Counter()))
    for line in lines:
        checkpoint = line["case"].partition(":")[0]
        for stage in line["stages"]:
            row = tolerances.for_stage(stage["name"])
            cell = measured[row.pattern, checkpoint]
            cell["counts"].update(stage["counts"] or {})
            found = [float(value) for value in stage["by_step"]] or [float(stage["measure"])]
            floor = line["floors"].get(tolerances.floor_of(stage["name"]))
            allowed = np.broadcast_to(tolerances.limit(stage["name"], floor), len(found))
            cell["ours"] = max([cell["ours"], *found])
            if floor is not None:
                cell["floor"] = max(cell["floor"], float(np.max(floor)))
            if row.kind != "mask" and np.all(allowed > 0):
                cell["share"] = max(cell["share"], *(np.asarray(found) / allowed))
    known = [name for name in CHECKPOINTS if any(checkpoint == name for _, checkpoint in measured)]
    head = ["stage"] + [f"{CHECKPOINTS[name]}: {what}" for name in known for what in ("floor", "ours")]
    yield "| " + " | ".join([*head, "of its tolerance"]) + " |"
    yield "|" + "---|" * (len(head) + 1)
    for row in tolerances.TABLE:
        cells = [measured.get((row.pattern, name)) for name in known]
        if any(cells):
            shown = [text for cell in cells for text in _pair(row, cell)]
            shares = [cell["share"] for cell in cells if cell]
            share = f"{max(shares):.0%}" if max(shares) > 0 else ("all equal" if row.kind == "exact" else "–")
            yield "| " + " | ".join([f"`{row.pattern}`", *shown, share]) + " |"


def _pair(row, cell):
    """Floor and difference of one checkpoint."""
    if cell is None:
        return "–", "–"
    counts = cell["counts"]
    if row.kind == "mask":
        differing, excepted = counts["differing"], counts["excepted"]
        return "–", f"{differing} of {counts['total']} pixels differ, {excepted} on the threshold"
    if row.kind == "exact":
        return "–", f"{counts['differing']} of {counts['total']} differ"
    floor = "–" if cell["floor"] == 0 else f"{cell['floor']:.1e}"
    if row.kind == "levels":
        return "–", f"{cell['ours']:.0f} level"
    return floor, "0" if cell["ours"] == 0 else f"{cell['ours']:.1e}"


if __name__ == "__main__":
    sys.exit(main())
