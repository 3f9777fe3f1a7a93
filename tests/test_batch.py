"""A batch: every row is done or says why not, once; whatever is killed, a second run makes what is missing.

Most tests run with an editor that paints pictures in one colour; a few with the demo model, two with Ray.
"""

import collections
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

from mindiffedit import demo
from mindiffedit.cli import command as cli
from mindiffedit.errors import InputError
from mindiffedit.service import batch, batch_ray, batch_task, editor
from mindiffedit.service.batch_queue import Queue
from mindiffedit.service.batch_rows import Row, read_rows
from mindiffedit.service.batch_table import Table, latest_records

SOURCE, TARGET = "a red apple on a table", "a yellow pear on a table"


def row(picture="a.png", **options):
    return {"picture": picture, "source": SOURCE, "target": TARGET, **options}


class FakeEditor:
    """Paints a picture in a colour of its options' own; notes what it was asked in `asked`."""

    asked: list = []
    breaks: dict = {}  # by seed: what is raised instead
    loads = 0
    device = "none"

    @classmethod
    def load(cls, args):
        cls.loads += 1
        return cls()

    def edit(self, picture, options, *, mask=None):
        args = editor._parsed("edit", options)
        self.asked.append((picture.size, args, mask))
        if args.seed in self.breaks:
            raise self.breaks[args.seed]
        seed = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).digest()
        image = PIL.Image.new("RGB", picture.size, tuple(seed[:3]))
        settings = {"seed": args.seed, "steps": args.steps, "report": {"mask_coverage": 0.5, "warnings": []}}
        return SimpleNamespace(image=image, settings=settings, seconds={"edit": 0.5})


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with pictures of two sizes, in which an editor paints."""
    monkeypatch.chdir(tmp_path)
    for name in ("MS_ROLE", "MS_NODE_ID", "MS_WORKER_NUM", "RANK_ID", "RANK_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(editor, "Editor", FakeEditor)
    monkeypatch.setattr(FakeEditor, "asked", [])
    monkeypatch.setattr(FakeEditor, "breaks", {})
    monkeypatch.setattr(FakeEditor, "loads", 0)
    for name, size in (("a", (64, 48)), ("b", (48, 64)), ("c", (64, 48))):
        PIL.Image.new("RGB", size, (10, 20, 30)).save(f"{name}.png")
    return tmp_path


def write(rows, name="jobs.jsonl"):
    Path(name).write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in rows))


def ran(capsys, *more, code=0, jobs="jobs.jsonl"):
    """What a run says as an object; `code` is what it has to end with."""
    FakeEditor.asked.clear()
    assert cli.main(["batch", jobs, "-o", "out", "--json", "--quiet", *more]) == code
    return json.loads(capsys.readouterr().out)


def counts(result):
    return [result[name] for name in ("done", "failed", "earlier")]


def table(name="results.jsonl"):
    return [json.loads(line) for line in Path("out", name).read_text().splitlines()]


def pictures():
    return {path.name: path.read_bytes() for path in Path("out").rglob("*.png")}


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# --- reading ------------------------------------------------------------------------------------------------


def read(tmp_path, text, name="jobs.jsonl"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_rows(path)


def test_rows_of_both_kinds_of_files(tmp_path):
    lines = [
        {"id": 7, "picture": "p.png", "mask-level": 0.5, "caption": None},
        {"picture": "q.png", "output": "x/y.jpg"},
    ]
    expected = [
        Row(1, "7", "7.png", "p.png", None, {"mask_level": 0.5}),
        Row(2, "000002", "x/y.jpg", "q.png"),
    ]
    text = "\n\n".join(json.dumps(line) for line in lines)
    assert read(tmp_path, text) == read(tmp_path, "\ufeff" + text + "\r\n", "jobs.txt") == expected
    as_csv = 'picture,source,id,seed,mask\np.png,"a, b\nc",,3,m.png\n\nq.png,,x,,\n'
    assert read(tmp_path, as_csv, "jobs.CSV") == [
        Row(1, "000001", "000001.png", "p.png", "m.png", {"source": "a, b\nc", "seed": "3"}),
        Row(2, "x", "x.png", "q.png"),
    ]


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "not JSON"),
        ("[" * 100000, "not JSON"),
        ('{"picture": "\xff"', "not JSON"),
        ("3", "not a JSON object"),
        ({"source": "a"}, "picture has to be a path, but is None"),
        ({"picture": ""}, "picture has to be"),
        ({"picture": "a\0b"}, "picture has to be"),
        ({"picture": "p", "mask": 3}, "mask has to be"),
        ({"picture": "p", "id": True}, "id has to be"),
        ({"picture": "p", "id": ""}, "id has to be"),
        ({"picture": "p", "id": "x" * 201}, "id has to be"),
        ({"picture": "p", "id": ".."}, "within the folder"),
        ({"picture": "p", "output": "/etc/x.png"}, "within the folder"),
        ({"picture": "p", "output": "a/../../x.png"}, "within the folder"),
        ({"picture": "p", "output": ".x.png"}, "within the folder"),
        ({"picture": "p", "output": "x.gif"}, "has to end in .png"),
        ({"picture": "p", "output": 3}, "name of a file"),
        ({"picture": "p", "id": "first"}, "id first before it"),
        ({"picture": "p", "output": "./first.png"}, "is that of row 1"),
    ],
)
def test_a_bad_row_says_why_and_the_others_are_read(tmp_path, line, words):
    line = line if isinstance(line, str) else json.dumps(line)
    first, bad, last = read(tmp_path, f'{{"picture": "p", "id": "first"}}\n{line}\n{{"picture": "q"}}')
    assert first.error is None and last == Row(3, "000003", "000003.png", "q")
    assert words in bad.error and bad.id == "000002" and bad.number == 2


def test_a_bad_row_has_an_id_of_its_own(tmp_path):
    rows = read(tmp_path, '{"picture": "p", "id": "000002"}\n{')
    assert [row.id for row in rows] == ["000002", "000002-"]


def test_a_csv_row_with_too_many_cells(tmp_path):
    bad, good = read(tmp_path, "picture,source\np,a,b\nq,c\n", "jobs.csv")
    assert "3 cells" in bad.error and good.error is None


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("jobs.jsonl", "", "no rows"),
        ("jobs.csv", "", "begins with nothing"),
        ("jobs.csv", "image,source\n", "begins with image, source"),
        ("jobs.csv", "picture,source,source\n", "two columns"),
    ],
)
def test_files_without_rows(tmp_path, name, text, words):
    with pytest.raises(InputError, match=words):
        read(tmp_path, text, name)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_rows(tmp_path / "missing.jsonl")


def test_the_page_s_jobs():
    docs = Path(__file__).resolve().parents[1] / "docs"
    rows = read_rows(docs / "jobs.jsonl")
    assert len(rows) == 3 and all(row.error is None and (docs / row.picture).is_file() for row in rows)
    for row in rows:
        editor._parsed("edit", row.options)


# --- pictures and table ---------------------------------------------------------------------------------------


def test_pictures_and_their_records(work, capsys):
    PIL.Image.new("L", (64, 48), 255).save("m.png")
    os.mkdir("jobs")
    write([row("../a.png", seed=5, mask="../m.png"), row("../b.png", output="deep/b.jpg", id="b")], "jobs/jobs.jsonl")
    result = ran(capsys, "--steps", "7", jobs="jobs/jobs.jsonl")
    assert counts(result) == [2, 0, 0] and result["rows"] == 2 and result["table"] == "out/results.jsonl"
    (_, args, mask), (_, other, none) = FakeEditor.asked
    assert (args.seed, args.steps, args.source, other.seed, none) == (5, 7, SOURCE, 0, None) and mask.size == (64, 48)
    first, second = table()
    assert [first[name] for name in ("id", "row", "state", "seed", "seconds")] == [
        *("000001", 1, "done", 5),
        {"edit": 0.5},
    ]
    assert first["report"]["mask_coverage"] == 0.5 and first["settings"] == {"seed": 5, "steps": 7}
    assert {"mindiffedit", "mindspore", "mindone"} == first["versions"].keys()
    for name, path, shown in (("picture", "a.png", "../a.png"), ("mask", "m.png", "../m.png")):
        assert (first[name]["path"], first[name]["sha256"]) == (shown, sha256(path))
    assert first["output"]["path"] == "000001.png" and first["output"]["sha256"] == sha256("out/000001.png")
    assert second["id"] == "b" and second["output"]["path"] == "deep/b.jpg"
    assert sorted(os.listdir("out")) == ["000001.png", "deep", "results.jsonl"]


def test_what_a_format_cannot_keep_is_in_the_report(work, capsys, monkeypatch):
    edit = FakeEditor.edit

    def transparent(self, picture, options, *, mask=None):
        done = edit(self, picture, options, mask=mask)
        done.image = done.image.convert("RGBA")
        done.image.putalpha(100)
        return done

    monkeypatch.setattr(FakeEditor, "edit", transparent)
    write([row(output="a.jpg"), row("c.png")])
    ran(capsys)
    lossy, whole = (record["report"]["warnings"] for record in table())
    assert "transparency" in lossy[0] and whole == []


def test_a_failing_row_is_not_the_end(work, capsys, monkeypatch):
    Path("text.png").write_text("no picture")
    breaks = {
        1: MemoryError("too large"),
        2: RuntimeError("the kernel\nfailed."),
        3: InputError("{inpaint_strength}: no.", x=1),
    }
    monkeypatch.setattr(FakeEditor, "breaks", breaks)
    rows = [
        *(row(seed=seed, id=str(seed)) for seed in (1, 2, 3)),
        *("no row", row("missing.png"), row("text.png"), row(colour="red"), row(steps="many"), row(latents="l")),
        row(mask="missing.png"),
        row(target=None),
        row(id="good"),
    ]
    write(rows)
    assert counts(ran(capsys, code=1)) == [1, len(rows) - 1, 0]
    errors = {record["row"]: record.get("error") for record in table()}
    assert [*errors] == [*range(1, len(rows) + 1)], "a line for each row, in their order"
    words = ["MemoryError: too large", "RuntimeError: the kernel failed", "--strength: no", "not JSON", "missing.png"]
    words += ["text.png is not a picture", "colour", "steps", "latents", "missing.png", "target"]
    for number, word in enumerate(words, 1):
        assert word in errors[number], errors[number]
    assert errors[len(rows)] is None and list(pictures()) == ["good.png"]
    assert [record["row"] for record in table() if "traceback" in record] == [1, 2]
    # What failed is tried again.
    breaks.clear()
    assert counts(ran(capsys, code=1)) == [3, len(rows) - 4, 1]


def test_a_disk_that_is_full(work, capsys, monkeypatch):
    def full(image, path):
        raise OSError(28, "No space left on device")

    write([row(id="a")])
    with monkeypatch.context() as patch:
        patch.setattr("mindiffedit.images.writing.save_image_atomically", full)
        ran(capsys, code=1)
    assert "No space left" in table()[0]["error"] and pictures() == {}
    assert counts(ran(capsys)) == [1, 0, 0]


def test_outputs_do_not_overwrite_pictures(work, capsys):
    write([row("out/x.png"), row("a.png", output="x.png")])
    os.mkdir("out")
    shutil.copy("a.png", "out/x.png")
    before = sha256("out/x.png")
    assert counts(ran(capsys, code=1)) == [1, 1, 0]
    assert "would overwrite what row 1 reads" in table()[1]["error"] and sha256("out/x.png") == before


@pytest.mark.parametrize(
    "more, words",
    [
        (["--workers", "0"], "--workers has to be 1"),
        (["--cores", "0"], "--cores has to be 1"),
        (["--shard", "0/2"], "--shard has to be"),
        (["--shard", "3/2"], "--shard has to be"),
        (["--shard", "1/2", "--workers", "2"], "--workers shares the rows"),
        (["--steps", "0"], "--steps"),
        (["--mask-level", "2"], "--mask-level"),
        (["--model", "missing"], "missing"),
    ],
)
def test_what_is_wrong_with_all_rows_ends_the_run(work, capsys, more, words):
    write([row()])
    assert cli.main(["batch", "jobs.jsonl", "-o", "out", *more]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and FakeEditor.loads == 0 and pictures() == {}


def test_a_folder_that_is_a_file(work, capsys):
    write([row()])
    Path("out").write_text("")
    assert cli.main(["batch", "jobs.jsonl", "-o", "out"]) == 2
    assert "the folder cannot be made" in capsys.readouterr().err


def test_progress_and_the_line_for_people(work, capsys):
    write([row(id="a"), row(id="b", colour="red")])
    assert cli.main(["batch", "jobs.jsonl", "-o", "out"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("out/results.jsonl: 2 rows, 1 done, 1 failed, 0 done before")
    assert "2/2" in err and "failed=1" in err and "row/s" in err


# --- order ----------------------------------------------------------------------------------------------------


def test_rows_of_one_size_follow_one_another(work, capsys):
    """The larger group first; a picture that lies on its side is of the size that it is shown at."""
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    PIL.Image.new("RGB", (48, 64)).save("turned.jpg", exif=turned.tobytes())
    names = ["b.png", "a.png", "b.png", "turned.jpg", "c.png", "missing.png", "b.png", "a.png"]
    write([row(name, seed=i) for i, name in enumerate(names)])
    ran(capsys, code=1)
    assert [size for size, _, _ in FakeEditor.asked] == [(64, 48)] * 4 + [(48, 64)] * 3
    assert [record["row"] for record in table()] == [*range(1, 9)]
    # Sizes that the model scales to the same one, by the row's own limit or the model's, are one.
    for size in (2, 4):
        PIL.Image.new("RGB", (640 * size, 480 * size)).save(f"{size}.png")
    write([row("2.png"), row("a.png", size=16), row("4.png"), row("a.png", size="16"), row("2.png", seed=1)], "j.jsonl")
    assert cli.main(["batch", "j.jsonl", "-o", "other", "--quiet"]) == 0
    assert [size[0] for size, _, _ in FakeEditor.asked[7:]] == [1280, 2560, 1280, 64, 64]


def test_workers_go_to_different_sizes():
    rows = [(Row(i, str(i)), size) for i, size in enumerate("aaaabbbc")]
    queue = Queue(rows)

    def sizes(*workers):
        return "".join(rows[queue.take(worker).number][1] for worker in workers)

    assert sizes(1, 2) == "ab" and sizes(1, 1, 2) == "aab"
    row = queue.take(2)
    queue.put_back(row)
    assert sizes(3) == "c" and queue.take(2) is row, "the next of its size"
    assert sizes(3) == "a" and not queue


# --- resuming -------------------------------------------------------------------------------------------------


def test_what_is_done_is_not_done_again(work, capsys):
    write([row("a.png", id="a"), row("b.png", id="b")])
    assert counts(ran(capsys)) == [2, 0, 0]
    before = pictures(), Path("out/results.jsonl").read_text()
    assert counts(ran(capsys)) == [0, 0, 2]
    assert (pictures(), Path("out/results.jsonl").read_text()) == before
    assert FakeEditor.loads == 1, "no model is loaded for nothing"
    # A new row, in whatever place.
    write([row("c.png", id="c"), row("a.png", id="a"), row("b.png", id="b")])
    assert counts(ran(capsys)) == [1, 0, 2]
    assert [record["id"] for record in table()] == ["c", "a", "b"]


def test_what_has_changed_is_done_again(work, capsys, monkeypatch):
    PIL.Image.new("L", (64, 48), 255).save("m.png")
    rows = [row("a.png", id="a"), row("b.png", id="b", mask="m.png")]
    write(rows)
    ran(capsys)

    def again(*more, of=1):
        result = ran(capsys, *more)
        assert counts(result) == [of, 0, 2 - of], result
        assert len(table()) == 2

    again(of=0)
    rows[0]["seed"] = 1
    write(rows)
    again()
    PIL.Image.new("RGB", (64, 48), (1, 1, 1)).save("a.png")
    again()
    PIL.Image.new("L", (64, 48), 100).save("m.png")
    again()
    for path in ("a.png", "out/a.png"):  # the same content is no change
        os.utime(path, ns=(1, 1))
    again(of=0)
    os.remove("out/a.png")
    again()
    Path("out/a.png").write_bytes(b"\0" * os.path.getsize("out/a.png"))
    again()
    again("--steps", "3", of=2)
    again("--steps", "3", of=0)
    again("--steps", "3", "--dtype", "float16", of=2)
    monkeypatch.setattr(batch, "__version__", "0.0.1")
    again("--steps", "3", "--dtype", "float16", of=2)
    rows[0]["output"] = "elsewhere.png"
    write(rows)
    again("--steps", "3", "--dtype", "float16")
    assert "elsewhere.png" in pictures()


def test_another_model_is_another_batch(work, capsys):
    """By what is in its files, not by their names and times."""
    write([row("a.png", id="a")])
    ran(capsys)
    model = shutil.copytree(demo.checkpoint_folder(), "model")
    assert counts(ran(capsys, "--model", "model")) == [0, 0, 1]
    config = Path(model, "unet", "config.json")
    config.write_text(config.read_text() + "\n")
    assert counts(ran(capsys, "--model", "model")) == [1, 0, 0]


def test_a_row_that_was_changed_and_changed_back(work, capsys):
    for seed, done in ((0, 1), (1, 1), (0, 1), (0, 0)):
        write([row("a.png", id="a", seed=seed)])
        assert counts(ran(capsys)) == [done, 0, 1 - done]


def test_a_table_that_was_cut_anywhere(work, capsys):
    """As by a kill in mid-line: what is whole counts, the rest is done again, and every line is whole in the end."""
    write([row("a.png", id="a"), row("c.png", id="c")])
    ran(capsys)
    whole, files = Path("out/results.jsonl").read_bytes(), pictures()
    first = whole.index(b"\n") + 1
    for end in (0, 1, first - 1, first, first + 1, first + 100, len(whole) - 1):
        Path("out/results.jsonl").write_bytes(whole[:end])
        done = 2 - whole[:end].count(b"\n")
        assert counts(ran(capsys)) == [done, 0, 2 - done]
        assert [record["id"] for record in table()] == ["a", "c"] and pictures() == files
    Path("out/results.jsonl").write_bytes(whole[:first] + b"\0" * 100 + b"\n{}\n3\n" + whole[first:])
    assert counts(ran(capsys)) == [0, 0, 2]


def test_long_unfinished_lines_are_cut_off(tmp_path):
    for line in ("x" * 200_000, "x" * 200_000 + "\n" + "y" * 70_000):
        (tmp_path / "results.jsonl").write_text(line)
        with Table(tmp_path) as results:
            results.append({"id": "a", "state": "done", "finished": "2026"})
        assert latest_records(tmp_path, "a").keys() == {"a"} and not latest_records(tmp_path, "b")


def test_drafts_of_killed_runs_are_removed(work, capsys):
    write([row("a.png", id="a" * 150), row("c.png", id="c")])
    os.mkdir("out")
    for name in ("a" * 100, "results", "other"):
        ending = "jsonl" if name == "results" else "png"
        Path("out", f".{name}.0123456789abcdef.{ending}").write_text("half")
    ran(capsys)
    assert sorted(os.listdir("out")) == [".other.0123456789abcdef.png", "a" * 150 + ".png", "c.png", "results.jsonl"]


def test_an_interrupted_run_goes_on(work, capsys, monkeypatch):
    write([row(id=str(seed), seed=seed) for seed in range(3)])
    monkeypatch.setattr(FakeEditor, "breaks", {1: KeyboardInterrupt()})
    assert cli.main(["batch", "jobs.jsonl", "-o", "out", "--quiet"]) == 130
    assert sorted(pictures()) == ["0.png"] and len(table()) == 1
    monkeypatch.setattr(FakeEditor, "breaks", {})
    assert counts(ran(capsys)) == [2, 0, 1]


def test_a_table_has_one_writer(work, capsys):
    write([row()])
    os.mkdir("out")
    with open("out/results.jsonl", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert cli.main(["batch", "jobs.jsonl", "-o", "out"]) == 2
        assert "is being written by another run" in capsys.readouterr().err
        assert counts(ran(capsys, "--shard", "1/1")) == [1, 0, 0], "another share has another table"


# --- shares ---------------------------------------------------------------------------------------------------


def test_shares_make_the_whole(work, capsys, monkeypatch):
    write([row(id=str(seed), seed=seed) for seed in range(5)])
    ran(capsys)
    whole = pictures()
    shutil.rmtree("out")
    assert counts(ran(capsys, "--shard", "2/2")) == [2, 0, 0]
    monkeypatch.setenv("RANK_ID", "0")
    monkeypatch.setenv("RANK_SIZE", "2")
    assert counts(ran(capsys)) == [3, 0, 0]
    assert pictures() == whole
    names = "results-001-of-002.jsonl", "results-002-of-002.jsonl"
    assert [[record["id"] for record in table(name)] for name in names] == [["0", "2", "4"], ["1", "3"]]
    # All tables are read, however the rows are shared.
    monkeypatch.delenv("RANK_SIZE")
    assert counts(ran(capsys)) == [0, 0, 5]
    os.remove("out/1.png")
    assert counts(ran(capsys)) == [1, 0, 4]


MSRUN = {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "4", "RANK_ID": "0", "RANK_SIZE": "4"}


@pytest.mark.parametrize(
    "environment, shard, share",
    [
        ({}, None, None),
        ({}, "2/3", (2, 3)),
        (MSRUN | {"MS_NODE_ID": "2"}, None, (3, 4)),
        (MSRUN | {"MS_NODE_ID": "2"}, "1/2", (1, 2)),
        (MSRUN | {"MS_NODE_ID": "0", "MS_WORKER_NUM": "1"}, None, None),
        ({"RANK_ID": "1", "RANK_SIZE": "8"}, None, (2, 8)),
        ({"RANK_ID": "0"}, None, None),
    ],
)
def test_the_share_of_a_rank(environment, shard, share):
    assert batch.share_of(Namespace(shard=shard), environment) == share


@pytest.mark.parametrize("environment", [MSRUN, MSRUN | {"MS_NODE_ID": "4"}, {"RANK_ID": "x", "RANK_SIZE": "2"}])
def test_an_environment_without_a_rank(environment):
    with pytest.raises(InputError, match="--node_rank"):
        batch.share_of(Namespace(shard=None), environment)


def test_under_msrun(work, capsys, monkeypatch):
    """Its scheduler has nothing to do; a process with a bad row does not end with a code that ends all others."""
    write([row(colour="red")])
    monkeypatch.setenv("MS_ROLE", "MS_SCHED")
    assert ran(capsys)["rows"] == 0 and not os.path.exists("out")
    for name, value in (("MS_ROLE", "MS_WORKER"), ("MS_NODE_ID", "0"), ("MS_WORKER_NUM", "1")):
        monkeypatch.setenv(name, value)
    assert counts(ran(capsys)) == [0, 1, 0]


# --- workers --------------------------------------------------------------------------------------------------


class FakeRay:
    """Calls of actors are done when they are waited for, the oldest first; a worker with a row in `deadly` dies."""

    class exceptions:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            cause: BaseException | None = None

    def __init__(self, deadly=(), broken=()):
        self.deaths = collections.Counter(dict(deadly))  # how often a row, or a load, is deadly
        self.broken = {*broken}  # workers that cannot load the model
        self.started, self.killed, self.done = [], [], []

    def start(self, i):
        actor = SimpleNamespace(
            load=SimpleNamespace(remote=lambda: (object(), "load", i)),
            do=SimpleNamespace(remote=lambda row: (object(), row.id, i)),
        )
        self.started.append(i)
        return actor

    def wait(self, references, num_returns):
        return references[:1], references[1:]

    def get(self, reference):
        _, what, i = reference
        if what == "load" and i in self.broken:
            error = self.exceptions.RayTaskError()
            error.cause = InputError("no such model.")
            raise error
        if self.deaths[what] > 0:
            self.deaths[what] -= 1
            raise self.exceptions.RayError("it died.\nThe process received SIGKILL.\n")
        if what != "load":
            self.done.append((what, i))
            return {"id": what, "state": "done"}

    def kill(self, actor):
        self.killed.append(actor)


def by_fake_ray(ray, count=2, rows="abcd"):
    queue = Queue((Row(i, name), None) for i, name in enumerate(rows))
    task = SimpleNamespace(failed=lambda row, sentence: {"id": row.id, "state": "failed", "error": sentence})
    return [*batch_ray._Run(ray, ray.start, count, task, queue).records()]


def test_workers_share_the_rows():
    ray = FakeRay()
    records = by_fake_ray(ray)
    assert sorted(record["id"] for record in records) == [*"abcd"]
    assert {i for _, i in ray.done} == {0, 1} and ray.killed == []


def test_the_row_of_a_worker_that_died_is_done_by_another():
    ray = FakeRay({"b": 2})
    assert {record["id"]: record["state"] for record in by_fake_ray(ray)} == dict.fromkeys("abcd", "done")
    assert len(ray.killed) == 2 and len(ray.started) == 4


def test_a_row_that_kills_its_workers_is_given_up():
    ray = FakeRay({"b": 9})
    records = {record["id"]: record for record in by_fake_ray(ray)}
    assert records["b"]["error"] == "3 workers have died of it; the last: The process received SIGKILL."
    assert all(records[name]["state"] == "done" for name in "acd")


def test_workers_that_cannot_load_the_model():
    ray = FakeRay(broken=[1])
    assert len(by_fake_ray(ray)) == 4 and {i for _, i in ray.done} == {0}
    with pytest.raises(InputError, match="no such model"):
        by_fake_ray(FakeRay(broken=[0, 1]))
    assert len(by_fake_ray(FakeRay({"load": 2}))) == 4
    with pytest.raises(RuntimeError, match="while they load the model"):
        by_fake_ray(FakeRay({"load": 99}))


def test_workers_and_their_devices(monkeypatch):
    def devices(there, **args):
        ray = SimpleNamespace(cluster_resources=lambda: there)
        return batch_ray._devices(ray, Namespace(**{"workers": None, "device": None, "cores": 1, **args}))

    assert devices({"CPU": 8.0}) == ("CPU", 8) and devices({"CPU": 8.0}, workers=3) == ("CPU", 3)
    assert devices({"CPU": 8.0}, cores=3) == ("CPU", 2)
    both = {"CPU": 8.0, "NPU": 4.0}
    assert devices(both, device="Ascend") == ("NPU", 4) and devices(both, device="CPU") == ("CPU", 8)
    assert devices({"CPU": 8.0, "GPU": 2.0}, device="GPU", workers=2) == ("GPU", 2)
    for there, args, words in (
        (both, {}, "4 NPUs; say by --device"),
        ({"CPU": 8.0}, {"device": "Ascend"}, "of NPU is enough for 0"),
        (both, {"device": "Ascend", "workers": 5}, "of NPU is enough for 4"),
    ):
        with pytest.raises(InputError, match=words):
            devices(there, **args)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 5})
    cores_of = batch_task.cores_of
    assert [cores_of(i, 2) for i in range(3)] == [{0, 1}, {2, 3}, {5, 0}] and cores_of(4, 1) == {5}


def test_a_cluster_that_is_not_there(work, capsys):
    write([row()])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        taken = f"127.0.0.1:{free.getsockname()[1]}"  # and nobody listens
        for address in (taken, "127.0.0.1", "127.0.0.1:x", "127.0.0.1:99999999"):
            assert cli.main(["batch", "jobs.jsonl", "-o", "out", "--ray-address", address]) == 2
            assert "nobody answers there" in capsys.readouterr().err


def test_a_worker_computes_on_cores_of_its_own(monkeypatch):
    """On a CPU, where their number is seen in the results."""
    cores = []
    monkeypatch.setattr(editor, "Editor", SimpleNamespace(load=lambda args: SimpleNamespace(device=args.device)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, chosen: cores.append(chosen))
    batch_task.loaded(Namespace(device="Ascend", cores=9), 0)
    assert cores == []
    batch_task.loaded(Namespace(device="CPU", cores=2), 1)
    assert cores and all(chosen == {2, 3} for chosen in cores)
    with pytest.raises(InputError, match="--cores 5: there are 4"):
        batch_task.loaded(Namespace(device="CPU", cores=5), 0)


def test_without_workers_ray_is_not_imported(work, capsys):
    write([row()])
    program = (
        "import sys; from mindiffedit.cli import command; from mindiffedit.service import editor\n"
        "sys.path.insert(0, sys.argv[1]); import test_batch; editor.Editor = test_batch.FakeEditor\n"
        "code = command.main(['batch', 'jobs.jsonl', '-o', 'out', '--quiet'])\n"
        "assert code == 0 and 'ray' not in sys.modules and 'mindspore' not in sys.modules"
    )
    folder = os.path.dirname(os.path.abspath(__file__))
    subprocess.run([sys.executable, "-c", program, folder], check=True, env=environment())


# --- the demo model -------------------------------------------------------------------------------------------

QUICK = {"steps": 4, "strength": 0.5}


def environment(**more):
    """In which a command of ours runs; Ray leaves no token in the home folder."""
    ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    return {**os.environ, **ray, "PYTHONPATH": os.pathsep.join(sys.path), **more}


@pytest.fixture(scope="module")
def loaded():
    return editor.Editor.load(Namespace(model="demo"))


def demo_rows(count, **options):
    """Rows of the sample."""
    shutil.copy(demo.sample_picture(), "sample.png")
    row = {"picture": "sample.png", **demo.SAMPLE_PROMPTS, **options}
    return [{**row, "id": f"r{i}", "seed": i} for i in range(count)]


def test_the_demo_model(work, capsys, monkeypatch, loaded):
    """The command's own pixels, in whatever order the rows come."""
    monkeypatch.setattr(editor, "Editor", SimpleNamespace(load=lambda args: loaded))
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, cores: None)  # of this process, which goes on
    rows = demo_rows(2, **QUICK)
    write(rows)
    assert counts(ran(capsys)) == [2, 0, 0]
    first = pictures()
    record = table()[0]
    assert record["seed"] == 0 and record["settings"]["steps"] == 4 and 0 < record["report"]["mask_coverage"] < 1
    assert record["seconds"]["edit"] > 0
    edited = loaded.edit(PIL.Image.open("sample.png"), {**demo.SAMPLE_PROMPTS, **QUICK, "seed": 0}).image
    assert np.array_equal(np.asarray(edited), np.asarray(PIL.Image.open("out/r0.png")))
    shutil.rmtree("out")
    write(rows[::-1])
    ran(capsys)
    assert pictures() == first


# --- for real -------------------------------------------------------------------------------------------------


def start(*more, jobs="jobs.jsonl", output="out", **variables):
    command = [sys.executable, "-m", "mindiffedit", "batch", jobs, "-o", output, "--quiet", "--json", *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**variables)
    )


def ended(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return json.loads(out)


def until(condition, process=None, seconds=240):
    """Wait until a condition holds; fails when the process ends before, or the seconds are over."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came to that"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)
    return value


def lines_of(name="out/results.jsonl"):
    with contextlib.suppress(FileNotFoundError):
        return Path(name).read_text().count("\n")
    return 0


def processes(name, parents):
    """Numbers of the processes below some others whose command line begins with a name."""
    found, families = [], {*parents}
    numbers = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    for number in numbers:
        with contextlib.suppress(OSError, IndexError):
            status = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
            if int(status[1]) in families:
                families.add(number)
                if Path(f"/proc/{number}/cmdline").read_bytes().startswith(name.encode()):
                    found.append(number)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of eight rows on the demo model, with what a run without workers makes of them."""
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write(demo_rows(8, **QUICK))
        assert counts(ended(start(output="plain"))) == [8, 0, 0]
    return folder


@pytest.fixture
def plain(work, made):
    """These rows in the test's own folder; the pictures that they make."""
    for name in ("jobs.jsonl", "sample.png"):
        shutil.copy(made / name, name)
    return {path.name: path.read_bytes() for path in (made / "plain").glob("*.png")}


@pytest.mark.tools
def test_two_workers_of_which_one_is_killed(plain):
    pytest.importorskip("ray")
    process = start("--workers", "2")
    until(lambda: lines_of() >= 2, process)
    os.kill(until(lambda: processes("ray::Worker", [process.pid]), process)[0], signal.SIGKILL)
    assert counts(ended(process)) == [8, 0, 0]
    assert pictures() == plain and len(table()) == 8


@pytest.mark.tools
@pytest.mark.parametrize("more", [(), ("--workers", "2")])
def test_a_killed_run_is_resumed(plain, more):
    if more:
        pytest.importorskip("ray")
    process = start(*more)
    until(lambda: lines_of() >= 2, process)
    workers = processes("ray::Worker", [process.pid])
    process.kill()
    process.communicate()
    until(lambda: not any(os.path.exists(f"/proc/{number}") for number in workers))
    there = len(table())
    done, failed, earlier = counts(ended(start(*more)))
    assert (done, failed, earlier) == (8 - there, 0, there) and there >= 2
    assert pictures() == plain and [record["row"] for record in table()] == [*range(1, 9)]
    assert not [name for name in os.listdir("out") if name.startswith(".")]


@pytest.mark.tools
def test_a_cluster_that_is_there(plain):
    pytest.importorskip("ray")
    with contextlib.ExitStack() as stack:
        port = 26379
        words = f"start --head --block --port {port} --num-cpus 2 --include-dashboard false --disable-usage-stats"
        code = "import sys; from ray.scripts.scripts import main; main()"
        head = subprocess.Popen(
            [sys.executable, "-c", code, *words.split()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=environment(), start_new_session=True,
        )  # fmt: skip
        stack.callback(head.wait)
        stack.callback(os.killpg, head.pid, signal.SIGTERM)
        until(lambda: "--block" in head.stdout.readline(), head)
        assert counts(ended(start("--ray-address", f"127.0.0.1:{port}"))) == [8, 0, 0]
    assert pictures() == plain


@pytest.mark.tools
def test_msrun(plain):
    programs = os.path.dirname(sys.executable)
    command = f"{programs}/msrun --worker_num 2 --local_worker_num 2 --join True --log_dir logs --master_port 26380"
    command += " python -m mindiffedit batch jobs.jsonl -o out --quiet"
    path = os.pathsep.join([programs, os.environ["PATH"]])
    done = subprocess.run(command.split(), capture_output=True, text=True, env=environment(PATH=path), timeout=300)
    logs = "\n".join(path.read_text() for path in Path("logs").iterdir())
    assert done.returncode == 0, done.stderr + logs
    assert pictures() == plain
    assert [len(table(f"results-00{i}-of-002.jsonl")) for i in (1, 2)] == [4, 4]
