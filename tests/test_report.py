"""report.py: the numbers on the page, what it finds, what it refuses, how it looks in a browser."""

import base64
import importlib
import json
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import logs
import pytest
import torch
from PIL import Image

from utils.evaluation import result_files
from utils.reporting import run_log
from utils.runtime import files

SCRIPT = importlib.import_module("eval.report")
# With what must not run on the page.
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="1600" height="9"><script>x()</script></svg>'
CHROMIUM = shutil.which("chromium")
KNN = {
    "1": {"accuracy": 81.6, "top5": None, "purity": 81.6},
    "20": {"accuracy": 78.90625, "top5": 99.6, "purity": 67.85},
}
LINEAR = {"0.01": {"top1": 68.5, "loss": 0.771}, "0.1": {"top1": 77.25, "loss": 0.52}}


class Page(HTMLParser):
    """Tables as lists of rows, all text, tags and attributes of a page."""

    VOID = ("meta", "img", "br", "path", "circle")

    def __init__(self, path):
        super().__init__()
        self.tables, self.texts, self.attributes, self.open = [], [], [], []
        self.feed(Path(path).read_text())
        self.close()

    def handle_starttag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def folder(tmp_path):
    """A finished run with a checkpoint, results and a picture."""
    folder = logs.write(tmp_path / "runs" / "run", logs.records(), starts=[logs.start()])
    for epoch in (2, 3):
        files.save(folder / f"ckpt_epoch_{epoch}.pth", {"weight": torch.zeros(epoch)})
    last = files.sha256(folder / "ckpt_epoch_3.pth")
    origin = {"checkpoint": "ckpt_epoch_3.pth", "sha256": last, "epoch": 3}
    (folder / "knn.json").write_text(json.dumps({"k": KNN} | origin))
    (folder.parent / "finetune").mkdir()
    (folder.parent / "finetune" / "linear.json").write_text(json.dumps({"lr": LINEAR} | origin))
    Image.new("RGB", (1600, 400), "teal").save(folder / "neighbors_val.png")
    (folder / "features.svg").write_text(SVG)
    for name in ("neighbors_val.json", "features.json"):
        (folder / name).write_text(json.dumps(origin))
    return folder


def report(call_script, folder, *flags):
    code, out, err = call_script(SCRIPT, folder, *flags)
    assert (code, err) == (0, "")
    return out, Page(out.splitlines()[-1])


def numbers(table):
    """Row -> column -> text of a parsed table."""
    (_, *columns), *rows = table
    return {name: dict(zip(columns, cells, strict=True)) for name, *cells in rows}


def test_numbers_on_the_page_are_those_of_the_files(call_script, folder):
    last = files.sha256(folder / "ckpt_epoch_3.pth")
    rows = {"a <row>": {"1-NN": 29.3, "x": None, "of": {"sha256": last}, "left_out": {}}}
    rows["a <row>"]["more"] = {"lr": {"0.1": {"top1": 1.0}}, "command": "x"}
    rows["random"] = {"1-NN": 8.125, "of": {"checkpoint": "random", "seed": 5}}
    (folder.parent / "results.json").write_text(json.dumps(rows))
    _, page = report(call_script, folder)
    during, knn, finetune, compared = map(numbers, page.tables)
    assert during == {"1-NN": {"accuracy": "47.25"}, "20-NN": {"accuracy": "48.50"}}
    assert knn["1-NN"] == {"accuracy": "81.60", "top-5": "–", "purity": "81.60"}
    assert knn["20-NN"] == {"accuracy": "78.91", "top-5": "99.60", "purity": "67.85"}
    assert finetune == {
        "learning rate 0.01": {"top-1": "68.50", "loss": "0.77"},
        "learning rate 0.1": {"top-1": "77.25", "loss": "0.52"},
    }
    random = {"1-NN": "8.12", "x": "–"}
    assert compared == {"a <row>": {"1-NN": "29.30", "x": "–"}, "random": random}
    assert last in page.text and "random: random (seed 5)" in page.text
    assert "of this run's last checkpoint: ckpt_epoch_3.pth" in page.text
    assert "fine-tuned encoder" in page.text and "Left out" not in page.text


OTHERS = {
    "another checkpoint": {"checkpoint": "<i>other.pth", "sha256": "b" * 64, "epoch": 2},
    "random weights": {"checkpoint": "random", "sha256": None, "seed": 5},
    "an early version's, of which nothing is known": {},
}


@pytest.mark.parametrize("whose", OTHERS.values(), ids=OTHERS)
def test_what_is_not_of_the_last_checkpoint_is_left_out_and_named(call_script, folder, whose):
    """Of every kind of file, a picture too; the run's own k-NN stays."""
    (folder.parent / "results.json").write_text(json.dumps({"a row": {"1-NN": 29.3, "of": whose}}))
    others = ["results.json", "finetune/linear.json"]
    (folder.parent / others[1]).write_text(json.dumps({"lr": LINEAR} | whose))
    for name in ("neighbors_val.json", "features.json"):
        (folder / name).write_text(json.dumps(whose))
    out, page = report(call_script, folder)
    assert [list(numbers(t)) for t in page.tables] == [["1-NN", "20-NN"]] * 2
    words = whose.get("checkpoint", "an encoder that it does not name")
    for name in [*others, "run/neighbors_val.png", "run/features.svg"]:
        (line,) = [line for line in out.splitlines() if f"{name} left out: of {words}" in line]
        assert line in page.text.replace("Left out: ", "").replace(" , of", " left out: of")
    assert "img" not in [tag for tag, _ in page.attributes]
    for path in folder.glob("ckpt_*"):
        path.unlink()
    _, page = report(call_script, folder)  # there is nothing that they could be of
    assert len(page.tables) == 1 and "the run has no checkpoint yet" in page.text


def test_the_page_says_what_was_run(call_script, folder):
    out, page = report(call_script, folder)
    assert out.startswith("finished: epoch 3 of 3, step 4 of 4\n✓ loss: healthy")
    for words in (
        *("CMSF2Q: run", "finished: epoch 3 of 3, step 4 of 4", "30 train, 3 classes, 12 val"),
        *("python 3.11, torch 2.11", "ckpt_epoch_3.pth", "2026-01-02T03:04:05+00:00"),
        *(
            "python self_supervised/train_msf_2q.py <b>images</b>",
            "--topk 5",
            "0:01:39 of training",
        ),
        *("✓ healthy : effective rank", "These are rules of thumb"),
    ):
        assert words in page.text, words


def test_the_page_needs_no_network_and_is_well_formed(call_script, folder):
    _, page = report(call_script, folder)
    assert not page.open
    tags = [tag for tag, _ in page.attributes]
    assert tags.count("svg") == 7 and not {"script", "link", "iframe"} & set(tags)
    sources = [a["src"] for _, a in page.attributes if "src" in a]
    kinds = [re.match("data:(.*?);base64,", source)[1] for source in sources]
    assert kinds == ["image/png", "image/svg+xml"]
    assert base64.b64decode(sources[1].partition(",")[2]).decode() == SVG
    headings = [page.text.index(words) for words in ("Neighbors neighbors_val", "The encoder's f")]
    assert headings == sorted(headings)
    text = (folder / "report.html").read_text().replace("http://www.w3.org/2000/svg", "")
    assert "http" not in text and "url(" not in text and "@import" not in text


EVIL = "<script>alert(1)</script>"


def evil(value):
    """A record of which every text, also that of keys, becomes a script."""
    if isinstance(value, dict):
        fixed = ("method", "settings", "k", "lr", "of", "sha256", "accuracy", "resumed_from")
        return {
            key if key in fixed or key in FIELDS else f"{EVIL}{key}": evil(part)
            for key, part in value.items()
        }
    if isinstance(value, list):
        return [evil(part) for part in value]
    return EVIL if isinstance(value, str) and len(value) != 64 else value


FIELDS = {*logs.start(), *logs.record(1, 1), "warning", "error", "knn", "epoch", "step"}
FIELDS |= {*result_files.Encoder._fields, result_files.OF, result_files.LEFT_OUT}


@pytest.mark.parametrize("left_out", [False, True])
def test_everything_from_files_is_escaped(call_script, tmp_path, left_out):
    """Names of files and folders too; with results that are shown, and that are left out."""
    name = EVIL.replace("/", "\u2215")  # no file can have a slash
    start = logs.start(resumed_from={"checkpoint": "x", "epoch": 1, "step": 1})
    lines = [logs.record(1, 4, warning="x", constrained_ranks=["x", 3.0])]
    lines += logs.records()[-1:] + [{"epoch": 3, "step": 4, "error": "x"}]
    folder = logs.write(tmp_path / name / name, evil(lines), starts=[evil(start)])
    files.save(folder / "ckpt_epoch_3.pth", {"weight": torch.zeros(1)})
    Image.new("RGB", (8, 8)).save(folder / f"neighbors{name}.png")
    (folder / f"features{name}.svg").write_text(SVG)
    last = "b" * 64 if left_out else files.sha256(folder / "ckpt_epoch_3.pth")
    whose = {"checkpoint": "x", "sha256": last, "encoder": "x", "arch": "x"}
    for path, record in (
        (folder / "knn.json", {"k": KNN} | whose),
        (folder / "linear.json", {"lr": LINEAR} | whose),
        (folder.parent / "results.json", {"x": {"y": 1.0, "of": whose, "left_out": {"x": "y"}}}),
        (folder / f"neighbors{name}.json", whose),
        (folder / f"features{name}.json", whose),
    ):
        path.write_text(json.dumps(evil(record)))
    _, page = report(call_script, folder)
    assert not {"script", "i"} & {tag for tag, _ in page.attributes}
    assert page.text.count(EVIL) > 20 and not page.open
    for words in (
        f"--{EVIL}topk",
        f"1 of 3 log lines warn, the last in epoch 1, step 4: {EVIL}",
        f"stopped in epoch 3 of 3, step 4 of 4: {EVIL}",
        name,
    ):
        assert words in page.text


def test_a_run_that_goes_on(call_script, tmp_path):
    """Each page takes the place of the one before it."""
    start = logs.start(epochs=60)
    folder = logs.write(tmp_path / "run", logs.records(2), starts=[start], tail='{"epoch": 3')
    out, page = report(call_script, folder)
    last = "still going on, or broken off: epoch 2 of 60, step 4 of 4; the last line was written"
    assert out.startswith(f"{last} 0:00:0")
    assert "the last line of the log is half written and left out" in page.text
    assert "none yet" in page.text
    os.utime(folder / "log.jsonl", (time.time() - 7200,) * 2)
    out, _ = report(call_script, folder)
    assert out.startswith(f"{last} 2:00:0")
    (folder / "requeue").touch()
    assert report(call_script, folder)[0].startswith("stopped by a signal, to be resumed")


def test_a_run_that_broke(call_script, tmp_path):
    end = {"epoch": 1, "step": 3, "error": "loss nan", "lr": 0.1, "images": [1]}
    folder = logs.write(tmp_path / "run", [logs.record(1, 2, warning="low <rank>"), end])
    out, page = report(call_script, folder)
    assert out.startswith("stopped in epoch 1, step 3 of 3: loss nan\n✗ loss: unhealthy")
    assert "1 of 2 log lines warn, the last in epoch 1, step 2: low <rank>" in page.text
    assert "There is no run.json" in page.text


def test_other_folders_and_pictures_that_are_named(call_script, folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "linear").mkdir(parents=True)
    last = files.sha256(folder / "ckpt_epoch_3.pth")
    own = {"lr": LINEAR, "sha256": last}
    (elsewhere / "linear" / "linear.json").write_text(json.dumps(own))
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    output = tmp_path / "pages" / "page.html"
    flags = ("--results", elsewhere, folder, "--neighbors", picture, "--output", output)
    out, page = report(call_script, folder / "log.jsonl", *flags)
    assert out.splitlines()[-1] == str(output) and not (folder / "report.html").exists()
    assert len(page.tables) == 4  # the run's own folder once
    assert str(elsewhere / "linear" / "linear.json") in page.text and "a.png" in page.text


@pytest.mark.parametrize(
    ("flag", "name"), [("--neighbors", "neighbors_val.png"), ("--features", "features.svg")]
)
@pytest.mark.parametrize(
    ("about", "note"),
    [
        ("own", ""),
        (None, "of an encoder that it does not name, not of the run's last checkpoint"),
        ("{", ".json: no result file"),
        ('{"sha256": 3}', ".json: sha256 is 3"),
        (json.dumps({"checkpoint": "x.pth", "sha256": "b" * 64}), "of x.pth (sha256 bbbbbbbbbbbb)"),
    ],
)
def test_a_picture_is_of_the_last_checkpoint(call_script, folder, flag, name, about, note):
    """One found is left out otherwise; one that is named is shown with a note."""
    picture = folder / name
    if about is None:
        picture.with_suffix(".json").unlink()
    elif about != "own":
        picture.with_suffix(".json").write_text(about)
    for flags, between in ((), " left out: "), ((flag, picture), ": "):
        out, page = report(call_script, folder, *flags)
        shown = [tag for tag, _ in page.attributes].count("img") == 2
        assert shown == (bool(flags) or not note)
        lines = [line for line in out.splitlines() if line.startswith(f"{picture}{between}")]
        assert len(lines) == bool(note) and all(note in line for line in lines)
        assert note in page.text


BROKEN = {"{": "no result file", "[1]": "it holds no object", '{"a": 3}': "a is 3, not a table"}


@pytest.mark.parametrize(("text", "reason"), BROKEN.items())
def test_what_nobody_named_cannot_end_the_page(call_script, folder, text, reason):
    path = folder.parent / "results.json"
    path.write_text(text)
    out, page = report(call_script, folder)
    (line,) = [line for line in out.splitlines() if line.startswith(f"{path} left out: ")]
    assert reason in line and str(path) in page.text and len(page.tables) == 3
    code, _, err = call_script(SCRIPT, folder, "--results", folder.parent)
    assert code == 2 and reason in err and str(path) in err


def test_results_are_on_the_same_val_images(call_script, folder):
    """Those of the first; a fine-tuned encoder is told by its file, not by the folder."""
    last = {"sha256": files.sha256(folder / "ckpt_epoch_3.pth"), "counts": {"val": 12}}
    tuned = {"lr": LINEAR, "settings": {"fine_tune": True}} | last
    (folder / "knn.json").write_text(json.dumps({"k": KNN} | last))
    (folder / "linear.json").write_text(json.dumps(tuned))
    path = folder.parent / "finetune" / "linear.json"
    path.write_text(json.dumps(tuned | {"counts": {"val": 13}}))
    out, page = report(call_script, folder)
    where = f"on 13 val images, not on 12 val images as {folder / 'knn.json'}"
    assert f"{path} left out: {where}" in out.splitlines() and len(page.tables) == 3
    assert "fine-tuned encoder" in page.text and "linear classifier" not in page.text


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["missing"], "missing: no run, there is no log.jsonl"),
        (["."], "no run, there is no log.jsonl"),
        (["empty"], "empty, the run has not logged anything yet"),
        (["run", "--results", "missing"], "--results missing: no such folder"),
        (["run", "--neighbors", "missing"], "--neighbors missing: no PNG file"),
        (["run", "--neighbors", "run/log.jsonl"], "--neighbors run/log.jsonl: no PNG file"),
        (["run", "--features", "missing"], "--features missing: no SVG file"),
        (["run", "--features", "run/log.jsonl"], "--features run/log.jsonl: no SVG file"),
        (["run", "--output", "run"], "--output run: ends in none of .html, .htm"),
        (["run", "--output", "run/run.json"], "--output run/run.json: ends in none of"),
        (["run", "--output", "folder.html"], "--output folder.html: not a regular file"),
        (["run", "--output", "other.html"], "other.html: is there already and no page on a run"),
        (["run", "--output", "run/log.jsonl/a.html"], "--output run/log.jsonl: "),
        (["run", "--output", "/proc/self/a.html"], "--output /proc/self: "),
        (["run", "--results", "broken"], "knn.json: no result file"),
        (["run", "--results", "other"], "linear.json: lr is 3, not a table of rows of figures"),
    ],
)
def test_what_it_refuses(call_script, tmp_path, monkeypatch, flags, reason):
    monkeypatch.chdir(tmp_path)
    logs.write(Path("run"), logs.records())
    logs.write(Path("empty"), [])
    Path("folder.html").mkdir()
    Path("other.html").write_text("<!doctype html><title>CMSF2Q: run</title>")
    for name, text in (("broken/knn.json", "{"), ("other/linear.json", '{"lr": 3}')):
        Path(name).parent.mkdir()
        Path(name).write_text(text)
    code, out, err = call_script(SCRIPT, *flags)
    assert code == 2 and out == "" and reason in err and err.count("\n") == 1
    assert not Path("run/report.html").exists()
    assert Path("other.html").read_text() == "<!doctype html><title>CMSF2Q: run</title>"


def browse(page, width, tmp_path):
    """The page in a browser: the window's width, and by how much the content is wider.

    Chromium's window has at least 500 pixels, a frame in it any width.
    """
    probe = (
        "<script>addEventListener('load', () => parent.postMessage("
        "[innerWidth, document.documentElement.scrollWidth - document.documentElement.clientWidth],"
        " '*'))</script></body>"
    )
    (tmp_path / "copy.html").write_text(page.read_text().replace("</body>", probe))
    (tmp_path / "frame.html").write_text(
        "<body style='margin:0'><output></output><script>onmessage = event => "
        "document.querySelector('output').textContent = 'widths ' + event.data</script>"
        f"<iframe src='copy.html' style='width:{width}px;height:900px;border:0'></iframe></body>"
    )
    quiet = (
        *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update"),
    )
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", *quiet, f"--user-data-dir={tmp_path / 'profile'}"),
            *("--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom"),
            (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return [int(number) for number in re.search(r"widths (\d+),(\d+)", done.stdout).groups()]


@pytest.mark.skipif(CHROMIUM is None, reason="needs the browser chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_no_wider_than_the_window(call_script, folder, tmp_path, width):
    """With a command without a place to break, wide tables and a wide picture."""
    start = logs.start(command="python " + "x" * 400, versions={"torch": "9" * 200})
    logs.write(folder, logs.records(), starts=[start])
    wide = {"row " * 30: {f"a column {i}": float(i) for i in range(40)}, "x" * 90: {}}
    (folder / "results.json").write_text(json.dumps(wide))
    report(call_script, folder)
    page = folder / "report.html"
    assert browse(page, width, tmp_path) == [width, 0]


def test_it_runs_as_a_script(run_script, folder, tmp_path):
    done = run_script("eval/report.py", "runs/run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "runs/run/report.html"
    assert len(Page(folder / "report.html").tables) == 3


def test_a_folder_whose_name_is_no_text(folder, call_script):
    odd = folder.with_name("run\udce9")
    try:
        folder.rename(odd)
    except OSError:
        pytest.skip("this file system has no such names")
    out, page = report(call_script, odd, "--output", odd.with_name("page.html"))
    assert r"run\udce9" in page.text


def test_status_without_run_json(tmp_path):
    run = run_log.read(logs.write(tmp_path, logs.records()))
    assert SCRIPT.status(run, now=time.time()).startswith(
        "of how many epochs is not known (no run.json): epoch 3, step 4 of 4; the last line"
    )
