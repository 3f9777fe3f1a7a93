"""scripts/benchmark.py and reports.py: the whole command on a tiny checkpoint, and their parts on made-up numbers."""

import json
import os
import shutil
import signal
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

import benchmark  # noqa: E402
import benchmark_checkpoint as checkpoint  # noqa: E402
import benchmark_worker as worker  # noqa: E402
import reports  # noqa: E402

pytestmark = pytest.mark.tools

TINY = dict(
    unet=dict(
        sample_size=32,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=32,
    ),
    vae=dict(
        sample_size=64,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
    ),
    text=dict(vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint of the benchmark's own making, small."""
    return checkpoint.ensure(tmp_path_factory.mktemp("benchmark") / "tiny", **TINY)


@pytest.fixture
def fake_worker(monkeypatch, tmp_path):
    """Gives a function that puts a small script in the worker's place; `job` is there, `result` an answer to it."""

    def put(body):
        script = tmp_path / "worker.py"
        head = f"import json, os, signal, sys\njob = json.loads(sys.stdin.read())\nresult = {RESULT!r}\n"
        script.write_text(head + textwrap.dedent(body) + "\nprint('said')\nprint(json.dumps(result))\n")
        monkeypatch.setattr(benchmark, "WORKER", script)

    return put


COST = {
    "seconds": {"mask": 1.0, "invert": 1.0, "edit": 1.0},
    "stages_peak": 2 * 10**9,
    "unet_calls": 4,
    "samples": 8,
    "shallow_rows": 0,
    "graphs": 5,
}
RESULT = {"load_seconds": 2.0, "edits": {"cold": COST, "warm": COST}, "peak": 3 * 10**9, "versions": {"library": "1.0"}}


@pytest.fixture
def torch_here(monkeypatch):
    """Runs torch, which is imported here already, in this process, which saves half of the time."""
    run_job = benchmark.run_job

    def here_or_there(job, *arguments):
        return worker.edit_job(job) if job["party"].startswith("torch") else run_job(job, *arguments)

    monkeypatch.setattr(benchmark, "run_job", here_or_there)


def test_whole_command(tiny, tmp_path, capsys, torch_here):
    """Both libraries load what the maker made, and every field is there."""
    words = "--size 64 --steps 2 --maps 2 --strength 0.5 --parties torch,ours --threads 1".split()
    assert benchmark.main(["--model", str(tiny), *words, "--json", str(tmp_path / "all.json")]) == 0
    run = json.loads((tmp_path / "all.json").read_text())
    wanted = [(party, what) for party in ("torch", "ours") for what in ("cold", "warm")]
    assert [(row["party"], row["what"]) for row in run["rows"]] == wanted
    for row in run["rows"]:
        assert all(row["seconds"][name] > 0 for name in ("mask", "invert", "edit", "total"))
        assert row["peak_gb"] > 0.01 and 0 < (row["stages_gb"] or 0.01) <= row["peak_gb"]
        assert row["unet_calls"] >= 3 and row["samples"] > row["unet_calls"]
    torch_warm, ours_cold, ours_warm = run["rows"][1:]
    assert torch_warm["samples"] == 4 * 2 + 2 + 2 and torch_warm["graphs"] is None
    assert ours_cold["graphs"] > 0 and ours_warm["graphs"] == 0, "a second edit of the same sizes compiles nothing"
    (same,) = run["agreement"]
    assert same["of"] == 2 * 32 * 32 and same["mask_pixels"] <= 2 and same["levels"] <= 2
    assert "torch" in run["versions"] and "mindspore" in run["versions"]
    assert str(tiny) not in json.dumps(run) and "--model FOLDER" in run["command"]
    assert "ours / torch" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["all.json"], "nothing else is left"


def test_loading_alone(fake_worker, tiny, capsys):
    fake_worker(
        """
        assert job["kind"] == "load"
        result = {"load_seconds": 1.5 if job["party"] == "ours" else 2.0, "peak": 3 * 10**9, "versions": {}}
        """
    )
    assert benchmark.main(["--model", str(tiny), "--load", "--parties", "torch,ours"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "party maps run what load s peak GB graphs".split()
    assert lines[2:5] == [
        "torch - 1 load 2.00 3.00 -".split(),
        "ours - 1 load 1.50 3.00 -".split(),
        "ours / torch - of 1 load 0.75 x 1.00 x -".split(),
    ]


def test_a_preset_after_a_short_warm_up(tiny, tmp_path, capsys, torch_here):
    file = tmp_path / "all.json"
    words = "--size 64 --steps 6 --maps 3 --strength 1 --warm-up --threads 1".split()
    parties = ["torch", "torch-bfloat16", "edit-fast"]
    assert benchmark.main(["--model", str(tiny), *words, "--parties", ",".join(parties), "--json", str(file)]) == 0
    run = json.loads(file.read_text())
    assert [(row["party"], row["what"]) for row in run["rows"]] == [(party, "warm") for party in parties]
    torch, bfloat16, fast = run["rows"]
    assert torch["samples"] == bfloat16["samples"] == 4 * 3 + 2 * 6 + 2 * 6 and torch["shallow_rows"] == 0
    assert fast["graphs"] == 0, "the short edit has run all graphs of the longer one"
    assert fast["maps"] is None and 0 < fast["samples"] < torch["samples"] and fast["shallow_rows"] > 0
    stages = [fast["seconds"][name] for name in ("mask", "invert", "edit")]
    assert min(stages) > 0 and fast["seconds"]["load"] > 0 and fast["seconds"]["total"] > sum(stages) - 0.01
    assert run["agreement"] == [] and "--warm-up 4" in run["command"]
    shown = capsys.readouterr().out
    assert "edit-fast / torch" in shown and "torch-bfloat16 / torch" in shown


def test_quick_is_one_preset_on_the_demo_unless_more_is_said(fake_worker, tiny, tmp_path, capsys):
    log = tmp_path / "log"
    fake_worker(
        f"""
        names = ("party", "size", "steps", "maps", "warm_up", "edits")
        with open({str(log)!r}, "a") as out:
            out.write(json.dumps([job[name] for name in names]) + "\\n")
        """
    )
    assert benchmark.main(["--quick", "balanced"]) == 0
    assert benchmark.main(["--quick", "fast", "--model", str(tiny), "--size", "64", "--maps", "2"]) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines == [
        ["torch", 128, 10, 10, 4, ["warm"]],
        ["edit-balanced", 128, 10, None, 4, ["warm"]],
        ["torch", 64, 10, 2, 4, ["warm"]],
        ["edit-fast", 64, 10, None, 4, ["warm"]],
    ]
    assert "edit-balanced / torch" in capsys.readouterr().out


def test_a_party_that_dies_is_a_line_of_the_table(fake_worker, tiny, tmp_path, capsys):
    fake_worker(
        """
        if job["party"] == "ours":
            print("it was too much", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    file = tmp_path / "all.json"
    assert benchmark.main(["--model", str(tiny), "--parties", "ours,torch", "--json", str(file)]) == 1
    shown = capsys.readouterr()
    assert "failed" in shown.out and "SIGKILL" in shown.out and "it was too much" in shown.err
    rows = json.loads(file.read_text())["rows"]
    assert [row["what"] for row in rows] == ["failed", "cold", "warm"], "the others go on"


def test_a_worker_without_a_result_or_without_an_end(fake_worker):
    for body, words in (
        ("sys.exit()", "without a result"),
        ("raise SystemExit('unhappy')", "exit code 1"),
        ("print(os.getpid(), file=sys.stderr, flush=True)\nsignal.pause()", "not done after 3 s"),
    ):
        fake_worker(body)
        with pytest.raises(benchmark.Died, match=words) as death:
            benchmark.run_job({"threads": 1}, 3)
        if "exit code" in words:
            assert death.value.lines == ["unhappy"]
    with pytest.raises(ProcessLookupError):  # it was killed, and waited for
        os.kill(int(death.value.lines[0]), 0)


def test_an_interruption_kills_the_workers(fake_worker, tiny, tmp_path):
    number = tmp_path / "number"
    fake_worker(
        f"open({str(number)!r}, 'w').write(str(os.getpid()))\nos.kill(os.getppid(), signal.SIGTERM)\nsignal.pause()"
    )
    handler = signal.getsignal(signal.SIGTERM)
    assert benchmark.main(["--model", str(tiny), "--parties", "torch"]) == 130
    assert signal.getsignal(signal.SIGTERM) is handler
    with pytest.raises(ProcessLookupError):  # it was killed, and waited for
        os.kill(int(number.read_text()), 0)


def test_runs_are_interleaved_and_caches_fresh(fake_worker, tiny, tmp_path, capsys):
    log = tmp_path / "log"
    fake_worker(
        f"""
        cache = os.environ.get("MINDIFFEDIT_CACHE")
        left = os.listdir(cache) if cache else None
        if cache:
            open(os.path.join(cache, "graph"), "w").close()
        with open({str(log)!r}, "a") as out:
            line = [job["party"], job["maps"], left, os.environ.get("MINDIFFEDIT_NATIVE")]
            out.write(json.dumps(line) + "\\n")
        """
    )
    common = ["--model", str(tiny), "--maps", "3"]
    assert benchmark.main([*common, "--repeats", "2"]) == 0
    once = [["torch", 3, None, None], ["mindone", 1, None, "0"], ["ours", 3, [], None], ["ours", 1, [], None]]
    assert [json.loads(line) for line in log.read_text().splitlines()] == once * 2
    assert "ours / mindone" in capsys.readouterr().out
    log.unlink()
    assert benchmark.main([*common, "--cold", "--parties", "ours"]) == 0
    lines = [json.loads(line)[2] for line in log.read_text().splitlines()]
    assert lines == [[], ["graph"]], "the second process finds the cache filled"
    assert "second process" in capsys.readouterr().out


def test_bad_options_give_one_sentence(capsys):
    for words, sentence in (
        ("--size 100", "multiple of 64"),
        ("--size big", "whole number"),
        ("--steps 0", "at least 1"),
        ("--strength 1.5", "at most 1"),
        ("--guidance 1", "above 1"),
        ("--parties torch,jax", "'jax' is none of"),
        ("--parties torch,torch", "twice"),
        ("--steps 1 --strength 0.5", "leaves no step"),
        ("--cold --only-step", "exclude each other"),
        ("--load --write", "stands alone"),
        ("--cold --warm-up", "second edits"),
        ("--warm-up 2", "at least 4"),
        ("--only-step --parties edit-fast", "name that"),
        ("--quick slow", "invalid choice"),
        ("--threads 100000", "more than"),
        ("--model /nowhere", "model_index.json"),
        ("--model demo --checkpoint-folder x", "one of them"),
        ("--json /nowhere/x.json --model demo", "cannot be written"),
        (f"--checkpoint-folder {SCRIPTS}", "inside the repository"),
    ):
        with pytest.raises(SystemExit) as stop:
            benchmark.main(words.split())
        assert stop.value.code == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("benchmark.py: error:") and sentence in last


# --- the checkpoint --------------------------------------------------------------------------------


def test_the_sizes_are_those_of_stable_diffusion():
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        parameters = [
            sum(p.numel() for p in model.parameters())
            for model in (UNet2DConditionModel(**checkpoint.UNET), AutoencoderKL(**checkpoint.VAE))
        ]
    assert parameters == [859_520_964, 83_653_863]  # those of runwayml/stable-diffusion-v1-5


def test_a_seed_makes_the_weights(tiny, tmp_path):
    weights = Path("unet") / "diffusion_pytorch_model.safetensors"
    (tmp_path / "again.partial" / "unet").mkdir(parents=True)  # what a killed maker left
    again = checkpoint.ensure(tmp_path / "again", **TINY)
    other = checkpoint.ensure(tmp_path / "other", **TINY, seed=1)
    assert (again / weights).read_bytes() == (tiny / weights).read_bytes()
    assert (other / weights).read_bytes() != (tiny / weights).read_bytes()
    changed = (tiny / weights).stat().st_mtime_ns
    assert checkpoint.ensure(tiny) == tiny and (tiny / weights).stat().st_mtime_ns == changed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]


def test_a_checkpoint_is_made_whole_or_not_at_all(tmp_path, monkeypatch):
    def breaks(folder, *_):
        folder.mkdir()
        (folder / "half").touch()
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "_write", breaks)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.ensure(tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "letter.txt").touch()
    with pytest.raises(ValueError, match="is no checkpoint"):
        checkpoint.ensure(tmp_path)


def test_the_tokenizer_reads_anything_and_ends_as_clip_does(tmp_path):
    tokenizer = checkpoint.make_tokenizer(tmp_path, 49408, 77)
    assert len(tokenizer) == 49408
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (49406, 49407)
    ids = tokenizer("a bowl of pears, für 3", padding="max_length").input_ids
    assert len(ids) == 77 and max(ids[1:10]) < 512
    with pytest.raises(ValueError, match="too small"):
        checkpoint.make_tokenizer(tmp_path, 100, 77)


# --- pictures and memory ---------------------------------------------------------------------------


def test_the_second_edit_shares_nothing_with_the_first():
    first, second = worker.EDITS["cold"], worker.EDITS["warm"]
    assert not set(first) & set(second)
    a, b = (np.asarray(worker.make_pictures(64, 2, e[0])) for e in (first, second))
    assert a.shape == (2, 64, 64, 3) and not np.array_equal(a, b) and not np.array_equal(a[0], a[1])
    assert np.array_equal(a, np.asarray(worker.make_pictures(64, 2, first[0])))


def test_a_peak_is_seen_and_begins_anew():
    if not worker.restart_peak():
        pytest.skip("this system cannot start a peak anew")
    clock = worker.Clock()
    with clock.stage("much"):
        np.ones(2**25)  # 256 MiB, given back at once
    with clock.stage("little"):
        pass
    assert clock.peaks["much"] - clock.peaks["little"] > 2**27
    assert clock.peak >= clock.peaks["much"] == clock.stages_peak(["much", "little"])


# --- ratios, data and pages ------------------------------------------------------------------------


def row(party, number, seconds, maps=4, what="warm"):
    stages = {"mask": seconds, "invert": 2 * seconds, "edit": 3 * seconds, "total": 6 * seconds}
    costs = {"peak_gb": seconds, "samples": 8, "shallow_rows": 0}
    return {"party": party, "maps": maps, "run": number, "what": what, "seconds": stages, **costs}


def test_ratios_are_medians_over_neighbouring_runs():
    # The machine is three times as slow in the second run: that does not show in a ratio.
    rows = [row("torch", 1, 1.0), row("ours", 1, 2.0), row("torch", 2, 3.0)]
    rows += [row("ours", 2, 6.0), row("torch", 3, 1.0), row("ours", 3, 5.0)]
    (entry,) = reports.ratios_of(rows)
    assert (entry["party"], entry["what"], entry["run"], entry["maps"]) == ("ours / torch", "warm", 3, 4)
    assert entry["ratios"] == {"mask": 2.0, "invert": 2.0, "edit": 2.0, "total": 2.0}
    assert entry["peak_gb"] == 2.0, "the highest peaks of both, 6 and 3"


def test_ratios_compare_equal_numbers_of_maps_and_first_edits():
    rows = [row("mindone", 1, 4.0, maps=1), row("ours", 1, 8.0), row("ours", 1, 1.0, maps=1)]
    (entry,) = reports.ratios_of(rows)
    assert entry["party"] == "ours / mindone" and entry["maps"] == 1 and entry["ratios"]["total"] == 0.25
    assert reports.ratios_of(rows[:2]) == []
    rows = [
        row("torch", 1, 1.0, what="cold"),
        row("ours", 1, 9.0, what="cold"),
        row("ours", 1, 3.0, what="second process"),
    ]
    ratios = {entry["what"]: entry["ratios"]["total"] for entry in reports.ratios_of(rows)}
    assert ratios == {"cold": 9.0, "second process": 3.0}, "a filled cache stands against the others' first edit"


def test_a_preset_is_compared_whatever_the_maps():
    rows = [row("torch", 1, 4.0, maps=10), row("edit-fast", 1, 1.0, maps=None), row("ours", 1, 2.0, maps=4)]
    (entry,) = reports.ratios_of(rows)
    assert (entry["party"], entry["maps"], entry["ratios"]["total"]) == ("edit-fast / torch", 10, 0.25)


def run_of(rows, **settings):
    settings = {"size": 256, "steps": 10, "strength": 0.8, "batch": 1, "model": None} | settings
    heading = reports.heading("edit", "python scripts/benchmark.py", {"torch": "2.0", "mindspore": "2.8"})
    return heading | {"settings": settings, "rows": rows, "agreement": []}


def test_the_table_has_the_newest_run_of_each_scope():
    runs = [
        run_of([row("torch", 1, 1.0), row("ours", 1, 5.0)]),
        run_of([row("torch", 1, 1.0), row("ours", 1, 0.75)]),
        run_of([row("torch", 1, 1.0), row("ours", 1, 3.0)], size=512, batch=2),
    ]
    runs[1]["date"] = "2030-02-01"
    lines = reports.speed_table(runs).splitlines()
    scope = "256 x 256, 10 steps at strength 0.8, 4 maps, second edit"
    assert lines[2] == f"| {scope} | ours / torch | 0.75 | 0.75 | 0.75 | 0.75 | 0.75 / 1.00 | 2030-02-01 |"
    assert "2 pictures | ours / torch | 3.00" in lines[3] and not lines[4]
    assert sum("torch 2.0" in line for line in lines) == 2, "where each of them ran"


def test_the_table_of_peers_has_every_party_of_the_newest_run():
    assert reports.peers_table([run_of([row("torch", 1, 1.0), row("ours", 1, 0.5)])]) == "Not measured yet."
    balanced = row("edit-balanced", 1, 1.0, maps=None) | {"shallow_rows": 3}
    rows = [row("torch", 1, 4.0, maps=10), row("mindone", 1, 5.0, maps=1), balanced]
    old, new = run_of([*rows, row("edit-fast", 1, 0.1, maps=None)]), run_of(rows)
    text = reports.peers_table([old, run_of(rows, size=512), new])
    assert text.count("**256 x 256, 10 steps at strength 0.8, second edit**") == 1 and "edit-fast" not in text
    assert "| torch | 10 | 4.0 | 8.0 | 12.0 | 24.0 | 1.00 | 8 | 4.00 | 1.00 |" in text
    assert "| edit-balanced | - | 1.0 | 2.0 | 3.0 | 6.0 | 0.25 | 8 + 3 shallow | 1.00 | 0.25 |" in text
    assert "edit-balanced" not in reports.speed_table([new])


def test_pages_show_the_data():
    """What `python scripts/reports.py` would write is there, and the data is what the program would write."""
    runs = reports.load_runs()
    assert (reports.DOCS / reports.DATA).read_text(encoding="utf-8") == reports.data_text(runs) + "\n"
    contents = reports.blocks(runs)
    names = []
    for page in reports.PAGES:
        text = (reports.DOCS / page).read_text(encoding="utf-8")
        assert reports.page_with(text, contents) == text, f"{page} is not in accord with {reports.DATA}"
        names += [part.partition(" ")[0] for part in text.split("<!-- data: ")[1:]]
    assert sorted(names) == sorted(contents)


def test_a_written_run_is_in_the_data_and_on_the_page(tmp_path):
    for name in (reports.DATA, *reports.PAGES):
        shutil.copy(reports.DOCS / name, tmp_path)
    quality = (tmp_path / "quality.md").read_bytes()
    run = run_of([row("torch", 1, 1.0), row("ours", 1, 0.123)])
    reports.add_run(run, tmp_path)
    assert reports.load_runs(tmp_path)[-1] == run and len(reports.load_runs(tmp_path)) == len(reports.load_runs()) + 1
    assert "| ours / torch | 0.12 |" in (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert (tmp_path / "quality.md").read_bytes() == quality
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([reports.DATA, *reports.PAGES, "pareto.svg"])
    assert (tmp_path / "pareto.svg").read_bytes() == (reports.DOCS / "pareto.svg").read_bytes()


def test_the_page_names_options_that_there_are():
    page = (reports.DOCS / "performance.md").read_text(encoding="utf-8")
    options = {word for action in benchmark.build_parser()._actions for word in action.option_strings}
    names = {word.rstrip("`,;)") for word in page.replace("`", " ").split() if word.startswith("--")}
    assert names - {"-->"} <= options
