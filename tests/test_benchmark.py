"""scripts/benchmark.py and profile_step.py: the whole command on a tiny checkpoint, and their parts on made-up numbers."""

import json
import os
import select
import signal
import subprocess
import sys
import textwrap
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import UNET

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

import benchmark  # noqa: E402
import benchmark_checkpoint as checkpoint  # noqa: E402
import benchmark_report as report  # noqa: E402
import benchmark_worker as worker  # noqa: E402
import profile_step  # noqa: E402

pytestmark = pytest.mark.tools

TINY = dict(
    unet=UNET,
    vae=dict(sample_size=64, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4),
    text=dict(vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint of the benchmark's own making, small."""
    return checkpoint.ensure(tmp_path_factory.mktemp("benchmark") / "tiny", **TINY)


@pytest.fixture
def fake_worker(monkeypatch, tmp_path):
    """Gives a function that puts a small script in the worker's place; `job` is there, `time` and `os` too."""

    def put(body):
        script = tmp_path / "worker.py"
        head = "import json, os, signal, sys\njob = json.loads(sys.stdin.read())\n"
        script.write_text(head + textwrap.dedent(body), encoding="utf-8")
        monkeypatch.setattr(benchmark, "WORKER", script)

    return put


def edit_result(seconds=1.0, samples=8):
    """What a worker answers to an edit, every stage taking `seconds`."""
    counts = {name: {"calls": 4, "samples": samples} for name in ("unet", "encode", "decode")}
    one = {
        "seconds": {name: seconds for name in ("mask", "invert", "edit")},
        "peaks": {name: 2 * 10**9 for name in ("mask", "invert", "edit")},
        "counts": counts,
        "compilations": 5,
    }
    return {
        "import_seconds": 1.0,
        "load_seconds": 2.0,
        "edits": {"cold": one, "warm": one},
        "peak": 3 * 10**9,
        "peak_stages": 2 * 10**9,
        "versions": {"library": "1.0"},
    }


ANSWER = """
result = {"machine": {"rate": 1e9, "operations": 10**6}, "edit": EDIT}[job["kind"]]
print("libraries say things")
print(json.dumps(result))
"""


def answer(seconds="1.0"):
    return ANSWER.replace("EDIT", repr(edit_result()).replace("1.0,", f"{seconds},"))


# --- the whole command -----------------------------------------------------------------------------


def test_whole_command(tiny, tmp_path):
    """Both libraries load what the maker made, and every field is there."""
    words = "--size 64 --steps 2 --maps 2 --strength 0.5 --parties torch,ours --threads 1 --matrix-side 256".split()
    files = ["--json", str(tmp_path / "all.json"), "--markdown", str(tmp_path / "page.md")]
    # Measurements run one after the other, each with its own import of the libraries.
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "benchmark.py"), "--model", str(tiny), *words, *files],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "all.json").read_text())
    assert results["failed"] == 0 and results["rate"] > 0 and results["operations"] > 0
    assert [(row["party"], row["what"]) for row in results["rows"]] == [
        ("torch", "cold"),
        ("torch", "warm"),
        ("ours", "cold"),
        ("ours", "warm"),
    ]
    for row in results["rows"]:
        assert all(row["seconds"][name] > 0 for name in ("mask", "invert", "edit", "total"))
        assert row["peak"] > 10**7 and row["share"] > 0
        assert row["peak_stages"] is None or 0 < row["peak_stages"] <= row["peak"]
        assert row["unet_calls"] >= 3 and row["unet_samples"] > row["unet_calls"]
        assert row["encodes"] >= 1 and row["decodes"] == 1
    torch_warm, ours_cold, ours_warm = results["rows"][1:]
    assert torch_warm["unet_samples"] == 4 * 2 + 2 + 2 and torch_warm["graphs"] is None
    assert ours_cold["graphs"] > 0 and ours_warm["graphs"] == 0, "a second edit of the same sizes compiles nothing"
    assert {row["what"] for row in results["ratios"]} == {"cold", "warm"}
    assert set(results["ratios"][1]["ratios"]) == {"mask", "invert", "edit", "total"}
    (same,) = results["agreement"]
    assert same["of"] == 2 * 8 * 8 and same["mask_pixels"] <= 2 and same["levels"] <= 2
    assert "torch" in results["versions"] and "mindspore" in results["versions"]
    assert "ours / torch" in done.stdout and "cold" in done.stdout and "another picture" in done.stdout
    page = (tmp_path / "page.md").read_text()
    assert "| ours / torch | 2 |" in page and "--model FOLDER" in page
    assert str(tmp_path) not in page and str(tiny) not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.json", "page.md"], "nothing else is left"


def test_a_party_that_dies_is_a_line_of_the_table(fake_worker, tiny, tmp_path, capsys):
    fake_worker(
        """
        if job.get("party") == "ours":
            print("it was too much", file=sys.stderr)
            os.kill(os.getpid(), signal.SIGKILL)
        """
        + textwrap.indent(answer(), "        ")
    )
    file = tmp_path / "all.json"
    assert benchmark.main(["--model", str(tiny), "--parties", "ours,torch", "--json", str(file)]) == 1
    shown = capsys.readouterr()
    assert "failed" in shown.out and "SIGKILL" in shown.out and "it was too much" in shown.err
    results = json.loads(file.read_text())
    assert results["failed"] == 1
    assert [row["what"] for row in results["rows"]] == ["failed", "cold", "warm"], "the others go on"
    assert results["runs"][0]["stderr"] == ["it was too much"]


def test_a_worker_without_a_result_or_without_an_end(fake_worker):
    job = {"threads": 1}
    fake_worker("print('no result')")
    with pytest.raises(benchmark.Died, match="without a result"):
        benchmark.run_job(job, 60)
    fake_worker("raise SystemExit('unhappy')")
    with pytest.raises(benchmark.Died, match="exit code 1") as death:
        benchmark.run_job(job, 60)
    assert death.value.lines == ["unhappy"]
    # It never ends by itself, and neither does its child: both have to go.
    fake_worker("""
        print(os.fork() or os.getpid(), file=sys.stderr, flush=True)
        signal.pause()
        """)
    with pytest.raises(benchmark.Died, match="not done after 0.5 s") as death:
        benchmark.run_job(job, 0.5)
    assert all(is_gone(int(line)) for line in death.value.lines)


def is_gone(process):
    """Whether a process ends; it was sent a signal that it cannot refuse, which takes a moment to arrive."""
    try:
        handle = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], 60)[0])
    finally:
        os.close(handle)


def test_an_interruption_kills_the_workers(fake_worker, tmp_path, tiny):
    fake_worker("os.kill(os.getppid(), signal.SIGTERM)\nsignal.pause()\n")
    handler = signal.getsignal(signal.SIGTERM)
    assert benchmark.main(["--model", str(tiny), "--parties", "torch"]) == 130
    assert signal.getsignal(signal.SIGTERM) is handler
    with pytest.raises(ChildProcessError):  # none is left to wait for
        os.waitpid(-1, os.WNOHANG)


def test_runs_are_interleaved_and_caches_fresh(fake_worker, tiny, tmp_path, capsys):
    log = tmp_path / "log"
    fake_worker(
        f"""
        with open({str(log)!r}, "a") as out:
            cache = os.environ.get("MINDIFFEDIT_CACHE")
            left = os.listdir(cache) if cache else None
            if cache:
                open(os.path.join(cache, "graph"), "w").close()
            line = [job["kind"], job.get("party"), job.get("maps"), left, os.environ.get("MINDIFFEDIT_NATIVE")]
            out.write(json.dumps(line) + "\\n")
        """
        + textwrap.indent(answer(), "        ")
    )
    common = ["--model", str(tiny), "--maps", "3"]
    assert benchmark.main([*common, "--repeats", "2", "--mindone-maps", "1"]) == 0
    once = [
        ["edit", "torch", 3, None, None],
        ["edit", "mindone", 1, None, "0"],
        ["edit", "ours", 3, [], None],
        ["edit", "ours", 1, [], None],
    ]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[0][0] == "machine" and lines[1:] == once * 2
    assert "ours / mindone" in capsys.readouterr().out
    log.unlink()
    assert benchmark.main([*common, "--cold", "--parties", "ours,mindone"]) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line[3] for line in lines[1:]] == [[], ["graph"]], "the second process finds the cache filled"
    shown = capsys.readouterr().out
    assert "second process" in shown and "skipped" in shown and "--mindone-maps 1" in shown


# --- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--size 100", "multiple of 64"),
        ("--size big", "whole number"),
        ("--steps 0", "at least 1"),
        ("--strength 1.5", "at most 1"),
        ("--guidance 1", "above 1"),
        ("--parties torch,jax", "'jax' is none of"),
        ("--parties torch,torch", "twice"),
        ("--steps 1 --strength 0.5", "leaves no step"),
        ("--cold --only-step", "exclude each other"),
        ("--scaling plot.png --cold", "leave out"),
        ("--mindone-maps 1 --parties ours", "not among"),
        ("--threads 100000", "more than"),
        ("--model /nowhere", "model_index.json"),
        ("--model demo --checkpoint-folder x", "one of them"),
        ("--json /nowhere/x.json --model demo", "cannot be written"),
        (f"--checkpoint-folder {SCRIPTS}", "inside the repository"),
    ],
)
def test_bad_options_give_one_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(words.split())
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("benchmark.py: error:") and sentence in last


def test_list_stages(capsys):
    assert benchmark.main(["--list-stages"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in report.STAGES) and set(worker.STAGES) == set(report.STAGES)


def test_profile_refuses_bad_options(capsys):
    for words in (["--model", "/nowhere"], ["--size", "1"], ["--model", "demo", "--json", "/nowhere/x"]):
        with pytest.raises(SystemExit) as stop:
            profile_step.main(words)
        assert stop.value.code == 2 and "error:" in capsys.readouterr().err


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
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").touch()
    with pytest.raises(ValueError, match="is no checkpoint"):
        checkpoint.ensure(tmp_path / "other")


def test_what_a_killed_maker_left_is_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    for process in (ended.pid, os.getpid()):
        (tmp_path / f"made.partial-{process}" / "unet").mkdir(parents=True)
    checkpoint.sweep(tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == [f"made.partial-{os.getpid()}"], "one is still at work"


def test_the_tokenizer_reads_anything_and_ends_as_clip_does(tmp_path):
    tokenizer = checkpoint.make_tokenizer(tmp_path, 49408, 77)
    assert len(tokenizer) == 49408
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (49406, 49407)
    ids = tokenizer("a bowl of pears, für 3", padding="max_length").input_ids
    assert len(ids) == 77 and max(ids[1:10]) < 512
    with pytest.raises(ValueError, match="too small"):
        checkpoint.make_tokenizer(tmp_path, 100, 77)


# --- pictures, memory, counts ----------------------------------------------------------------------


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
    assert clock.highest >= clock.peaks["much"] and set(clock.seconds) == {"much", "little"}


def test_calls_of_our_stages_are_counted():
    party = object.__new__(worker.Ours)
    party.pipeline = None
    assert party.counts()["unet"] == {"calls": 0, "samples": 0}
    kept = worker.Counter(unet=7, rows=14, encode=1)
    party.pipeline = SimpleNamespace(_stages=SimpleNamespace(calls=kept))
    assert party.counts()["unet"] == {"calls": 7, "samples": 14}
    assert party.counts()["encode"] == {"calls": 1, "samples": 1}
    assert party.counts()["decode"] == {"calls": 0, "samples": 0}


# --- numbers ---------------------------------------------------------------------------------------


def made_up(party, number, seconds, maps=4, what="warm"):
    stages = {"mask": seconds, "invert": 2 * seconds, "edit": 3 * seconds, "total": 6 * seconds}
    return {"party": party, "maps": maps, "run": number, "what": what, "seconds": stages}


def test_ratios_are_medians_over_neighbouring_runs():
    # The machine is three times as slow in the second run: that does not show in a ratio.
    rows = [made_up("torch", 1, 1.0), made_up("ours", 1, 2.0), made_up("torch", 2, 3.0)]
    rows += [made_up("ours", 2, 6.0), made_up("torch", 3, 1.0), made_up("ours", 3, 5.0)]
    (found,) = report.ratios_of(rows)
    assert (found["party"], found["what"], found["run"], found["maps"]) == ("ours / torch", "warm", "3", 4)
    assert found["ratios"] == {"mask": 2.0, "invert": 2.0, "edit": 2.0, "total": 2.0}


def test_ratios_compare_equal_numbers_of_maps():
    rows = [made_up("mindone", 1, 4.0, maps=1), made_up("ours", 1, 8.0), made_up("ours", 1, 1.0, maps=1)]
    (found,) = report.ratios_of(rows)
    assert found["party"] == "ours / mindone" and found["maps"] == 1 and found["ratios"]["total"] == 0.25
    assert report.ratios_of(rows[:2]) == []


def test_a_filled_cache_stands_against_the_others_first_edit():
    rows = [made_up("torch", 1, 1.0, what="cold"), made_up("ours", 1, 9.0, what="cold")]
    rows.append(made_up("ours", 1, 3.0, what="second process"))
    ratios = {row["what"]: row["ratios"]["total"] for row in report.ratios_of(rows)}
    assert ratios == {"cold": 9.0, "second process": 3.0}


def test_shares_and_ratios_of_unknown_values_are_unknown():
    assert report.share_of_rate(10**9, 4, 2.0, 10**10) == pytest.approx(0.2)
    assert report.share_of_rate(None, 4, 2.0, 1e10) is None and report.share_of_rate(1, 4, 0.0, 1) is None
    assert report.ratio(2.0, 4.0) == 0.5 and report.ratio(None, 1.0) is None and report.ratio(1.0, 0) is None
    assert report.total({"mask": 1.0}) is None and report.highest([1, None]) is None


# --- pages and plots -------------------------------------------------------------------------------


def results_of(rows):
    settings = dict.fromkeys(benchmark.SETTINGS, False) | {"size": 256, "threads": 2}
    return {
        "command": "python scripts/benchmark.py --size 256",
        "settings": settings,
        "machine": {"cpu": "A processor", "cores": 2, "memory_gb": 16.0},
        "versions": {"torch": "2.0", "mindspore": "2.8"},
        "rate": 1e11,
        "operations": 3e11,
        "rows": rows,
        "ratios": [],
    }


def test_the_section_is_dated_and_appended(tmp_path):
    run = {
        "party": "ours",
        "maps": 4,
        "run": 1,
        "status": "done",
        "result": edit_result(),
        "filled_cache": False,
    }
    dead = {"party": "torch", "maps": 4, "run": 1, "status": "failed", "reason": "not done after 5 s, killed"}
    rows = [row for each in (run, dead) for row in report.rows_of(each, 10**9, 1e11)]
    text = report.markdown_section(results_of(rows), date(2030, 2, 1))
    assert text.startswith("### 2030-02-01: whole edits, 256 x 256 pixels\n")
    assert "A processor, 2 cores (2 used), 16 GB of memory. mindspore 2.8, torch 2.0." in text
    assert "| ours | 4 | 1 | cold | 2.00 | 1.00 | 1.00 | 1.00 | 3.00 | 3.00 | 2.00 | 4 | 8 | 8 | 8 | 5 | 2.7% |" in text
    assert "torch, run 1, failed: not done after 5 s, killed" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    page = tmp_path / "page.md"
    page.write_text("# Performance", encoding="utf-8")
    report.append(page, text)
    report.append(page, text)
    assert page.read_text(encoding="utf-8") == f"# Performance\n\n{text}\n{text}"
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


def test_the_page_has_a_place_for_sections():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "\n## Results\n" in page and page.rindex("\n## ") == page.index("\n## Results\n")
    options = {word for action in benchmark.build_parser()._actions for word in action.option_strings}
    named = {word.rstrip("`,;)") for word in page.replace("`", " ").split() if word.startswith("--")}
    assert named - {"--", "-->"} <= options, "the page names an option that there is not"


def test_the_plot_is_written_whole(tmp_path):
    pytest.importorskip("matplotlib")
    points = [
        {"axis": axis, "value": value, "party": "ours", "seconds": seconds, "cold_seconds": 3.0, "peak": peak}
        for axis, value, seconds, peak in [
            ("size", 256, 1.0, 10**9),
            ("size", 512, None, None),
            ("maps", 1, 1.0, 10**9),
        ]
    ]
    report.plot_scaling(points, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
    assert "512" in benchmark.scaling_table(points)


def test_without_matplotlib_scaling_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        benchmark.main(["--scaling", "plot.png"])
    assert "pip install '.[benchmark]'" in capsys.readouterr().err


def test_scaling_runs_each_job_once(fake_worker, tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    fake_worker("if job['size'] == 128: sys.exit('out of memory')\n" + answer())
    words = "--parties ours --scaling-sizes 64,128 --scaling-maps 1,2 --scaling-batches 1,2 --size 64".split()
    assert benchmark.main(["--model", str(tiny), "--scaling", str(tmp_path / "plot.png"), *words]) == 1
    shown = capsys.readouterr()
    assert shown.err.count("ours, ") == 5, "batch 1 is size 64 again"
    assert "out of memory" in shown.err and (tmp_path / "plot.png").exists()


# --- the profile -----------------------------------------------------------------------------------


def test_profiles_are_read_grouped_and_compared(tmp_path):
    (tmp_path / "cpu_framework_0.txt").write_text(
        "Conv2D;Conv2D-op1;77;input_1:[2, 4, 8, 8];input_2:[16, 4, 3, 3];input_3:NoShape;\n"
        "Conv2D;Conv2D-op2;77;input_1:[2, 4, 8, 8];input_2:[16, 4, 3, 3];input_3:NoShape;\n"
        "Add;Add-op3;77;input_1:[2, 16, 8, 8];input_2:[];\n"
    )
    (tmp_path / "cpu_op_execute_timestamp_0.txt").write_text(
        "Default/unet/Conv2D-op1;HostCpuOps;100,2.0,0 200,4.0,0 \n"
        "Default/unet/Conv2D-op2;HostCpuOps;100,3.0,0 200,3.0,0 \n"
        "Default/Add-op3;HostCpuOps;100,0.5,0 200,0.5,0 \n"
    )
    rows = profile_step.grouped(profile_step.read_kernels(tmp_path), evaluations=2)
    assert rows[0]["kernel"] == "Conv2D" and rows[0]["shapes"] == [[2, 4, 8, 8], [16, 4, 3, 3]]
    assert (rows[0]["count"], rows[0]["ms_each"], rows[0]["ms_total"]) == (2, 3.0, 6.0)
    assert rows[1]["shapes"] == [[2, 16, 8, 8], []] and rows[1]["ms_total"] == 0.5
    theirs = [
        {"kernel": "aten::mkldnn_convolution", "ms_total": 2.0},
        {"kernel": "aten::add_", "ms_total": 1.0},
    ]
    families = {row["family"]: row for row in profile_step.family_rows(rows, theirs)}
    assert families["convolution"]["ratio"] == 3.0 and families["arithmetic"]["ratio"] == 0.5
    results = {"ours": {"rows": rows, "ms": 7.0}, "torch": None, "families": list(families.values())}
    assert "2x4x8x8 16x4x3x3" in profile_step.tables(results, 10)


def test_counterparts_in_torch():
    convolution = {"kernel": "Conv2D", "stride": 1, "shapes": [[1, 4, 8, 8], [4, 4, 3, 3]]}
    assert profile_step.counterpart_ms(convolution) > 0
    assert profile_step.counterpart("Conv2D", 2, convolution["shapes"])().shape == (1, 4, 4, 4)
    assert profile_step.counterpart("MatMul", 1, [[6, 4], [5, 4]])().shape == (6, 5)
    assert profile_step.counterpart_ms({"kernel": "Nothing", "stride": 1, "shapes": [[1]]}) is None
    assert profile_step.counterpart_ms({"kernel": "Add", "stride": 1, "shapes": [[2], [3]]}) is None
