"""README and docs: every command runs as it stands there, made small by flags added at its end.

Also what they say of the tree: files, links, and the drawing of imports between rooms.
"""

import ast
import importlib
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import stand_ins
import tiny
from conftest import ROOT, start_method

# In the order in which their commands run: what is evaluated is what a training of README wrote.
NAMES = (
    *("README", "docs/train", "docs/data", "docs/evaluate", "docs/report", "docs/scale"),
    *("docs/reliability", "docs/results", "docs/gpu", "docs/design", "docs/deviations"),
)
PAGES = [ROOT / f"{name}.md" for name in NAMES]
README, SCALE, DESIGN = (ROOT / name for name in ("README.md", "docs/scale.md", "docs/design.md"))
FOLDERS = ("self_supervised", "supervised", "semi_supervised", "eval")

# A later flag overrides an earlier one, so these make any of the commands a matter of seconds.
SMALL_RUN = (
    "--debug --batch_size 8 --mem_bank_size 64 --image_size 32 --num_workers 0 --knn_freq -1 "
    "--arch conv4"
)
EVALUATION = "--num_workers 0 --batch_size 16 --arch conv4"
# Instead of these, for scripts that have other flags.
OTHERS = {
    "eval/eval_linear.py": f"{EVALUATION} --epochs 2",
    "eval/compare.py": f"{EVALUATION} --epochs 2",
    "eval/eval_transfer.py": f"{EVALUATION} --l2 1",
    "eval/report.py": "",
    "eval/plot_training.py": "",
    "eval/export_backbone.py": "--arch conv4",
    "eval/show_neighbors.py": "--num_workers 0 --batch_size 16",
    "eval/show_features.py": "--num_workers 0 --batch_size 16",
    "eval/extract_features.py": "--num_workers 0 --batch_size 16",
    "supervised/train_sup_xent.py": SMALL_RUN.replace("--mem_bank_size 64 ", ""),  # it has no bank
}


def blocks(language: str, *pages: Path) -> list[str]:
    """What stands in the pages' code blocks of a language."""
    text = "\n".join(page.read_text() for page in pages)
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(*pages: Path, **places: object) -> list[list[str]]:
    """The words of each command of the pages' bash blocks, split at && as well; all if none named.

    places: what stands for <DATASET PATH> and the like, by dataset_path and the like.
    """
    lines = "\n".join(blocks("bash", *(pages or PAGES))).replace("\\\n", " ").replace("&&", "\n")
    for name, place in places.items():
        lines = lines.replace(f"<{name.upper().replace('_', ' ')}>", shlex.quote(str(place)))
    return [shlex.split(line, comments=True) for line in lines.splitlines() if line.strip()]


def is_run_here(words: list[str]) -> bool:
    """Whether a command is that of a script, which `test_scripts_of_the_pages_run` runs."""
    return words[0] == "python" and words[1].split("/")[0] in FOLDERS


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def test_all_pages_are_here_and_the_readme_is_short():
    assert sorted(PAGES) == sorted([README, *ROOT.glob("docs/*.md")])
    assert len(README.read_text().splitlines()) <= 200


def test_installation_and_tests_are_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    listed = [" ".join(command) for command in commands()]
    assert "pip install -r requirements.txt" in listed
    assert "pip install -r requirements-dev.txt" in listed and "requirements-dev.txt" in ci
    assert "python -m pytest" in listed and "python -m pytest" in ci


def test_every_other_command_is_run_by_a_test_of_its_own():
    """The driver, and long measurements: their tests name them, and they know every flag."""
    tests = "\n".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    rest = [words for words in commands() if not is_run_here(words) and words[0] != "torchrun"]
    rest = [" ".join(words) for words in rest]
    driver = [line for line in rest if line.endswith("bash run_semisup_fullprecision.sh")]
    assert len(driver) == 2 and "run_semisup_fullprecision.sh" in tests
    measured = [line.split() for line in rest if line.startswith("python tests/")]
    known = {line for line in rest if line.startswith(("pip install -r ", "python -m pytest"))}
    assert len(rest) == len(driver) + len(measured) + len(known)
    assert measured
    for _, path, *flags in measured:
        assert Path(path).stem in tests, path
        named = {flag for flag in flags if flag.startswith("--")}
        assert not [flag for flag in named if f'"{flag}"' not in (ROOT / path).read_text()], path


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_file_a_page_names_is_there(page):
    """A script by its name alone, any other file and every folder of the code by its whole path."""
    text = page.read_text()
    scripts = {path.name for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}
    scripts |= {path.name for path in (ROOT / "tests" / "benchmarks").glob("*.py")}
    scripts |= {path.name for path in (ROOT / "utils").rglob("*.py")} if page == README else set()
    top = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != ".")
    named = re.findall(r"`([\w./]+\.(?:py|sh))`", text)
    named += re.findall(rf"(?<![\w/<>])((?:{top})/[\w./-]*[\w/])", text)
    made = ("data/", "output/")  # by the scripts
    missing = [name for name in named if name not in scripts and not (ROOT / name).exists()]
    assert not [name for name in missing if not name.startswith(made)]


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_leads_to_every_page():
    linked = re.findall(r"\]\((docs/\w+\.md)\)", README.read_text())
    assert {ROOT / name for name in linked} == {*PAGES} - {README}


def test_the_drawing_of_imports_is_that_of_the_files():
    (drawing,) = (block for block in blocks("text", DESIGN) if "-->" in block)
    drawn = {}
    for line in drawing.splitlines():
        room, _, others = line.partition("-->")
        drawn[room.strip()] = set(others.split())
    found = {
        path.name: set() for path in (ROOT / "utils").iterdir() if (path / "__init__.py").exists()
    }
    for path in (ROOT / "utils").glob("*/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            parts = [name.split(".") for name in names]
            found[path.parent.name] |= {part[1] for part in parts if part[0] == "utils"}
    assert drawn == {room: others - {room} for room, others in found.items()}


def test_what_a_flag_passes_is_there():
    """The functions and classes that the two ways through the code name."""
    section = DESIGN.read_text().split("## How a flag")[1].split("\n## ")[0]
    names = re.findall(r"`([A-Za-z_]\w+)(?:\(.*?\))?`", section)
    code = "\n".join(
        path.read_text()
        for folder in ("utils", "self_supervised")
        for path in (ROOT / folder).rglob("*.py")
    )
    assert len(names) > 10
    for name in names:
        assert re.search(rf"\b(def|class) {name}\b|\b{name}\b *=", code), name


def test_scripts_of_the_pages_run(call_script, run_script, image_tree, tmp_path, monkeypatch):
    """In the order of the text: what is evaluated is what the training command before wrote.

    The first command is a process; the others are calls, which import torch only once.
    """
    monkeypatch.chdir(tmp_path)  # plot_training.py writes into the present folder
    stand_ins.write_dtd(tmp_path / "sets")
    places = {
        "dataset_path": image_tree,
        "checkpoint_path": tmp_path / "first",
        "checkpoint": tmp_path / "first" / "ckpt_epoch_2.pth",
        "folder": tmp_path / "sets",
    }
    scripts = [words[1:] for words in commands(**places) if is_run_here(words)]
    assert len(scripts) >= 18
    folder = itertools.chain(["demo", "first"], (f"later_{n}" for n in itertools.count()))
    started = False
    for script, *flags in scripts:
        is_training = not script.startswith("eval/")
        extra = OTHERS.get(script, SMALL_RUN if is_training else EVALUATION)
        if is_training:
            extra += f" --checkpoint_path {tmp_path / next(folder)}"
        if "--dataset" in flags:
            stand_ins.write_cifar(tmp_path / "cifar")
            stand_ins.without_checksums(monkeypatch)
            flags[-1] = tmp_path / "cifar"
            extra = extra.replace("conv4", "resnet18")  # its stem is a ResNet's
        if started:
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            code, _, stderr = call_script(module, *flags, *extra.split())
        else:
            done = run_script(script, *flags, *extra.split())
            code, stderr = done.returncode, done.stderr
        started = True
        assert code == 0, (script, flags, stderr)
    written = ["report.html", "neighbors.png", "backbone.pth", "features.npz", "features.svg"]
    written = [tmp_path / "first" / name for name in written]
    assert all(path.stat().st_size > 1000 for path in (*written, *tmp_path.glob("training.*")))
    assert len(list(tmp_path.glob("training.*"))) == 1


def test_the_method_that_a_page_adds_trains(image_tree, tmp_path):
    """In a folder of its own beside utils; its workers start as of Python 3.14."""
    (code,) = blocks("python", *PAGES)
    assert len(code.splitlines()) <= 50
    (tmp_path / "mine").mkdir()
    (tmp_path / "utils").symlink_to(ROOT / "utils")
    script = tmp_path / "mine" / "train_others.py"
    script.write_text(code)
    flags = f"{SMALL_RUN} --topk 3 --num_workers 1 --checkpoint_path {tmp_path / 'run'}".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= start_method(tmp_path / "site", "forkserver")
    command = [sys.executable, script, *flags, image_tree]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "ckpt_epoch_2.pth").exists()
    assert tiny.state(tmp_path / "run" / "ckpt_epoch_2.pth")["method"] == "Others"


def test_commands_for_several_processes_run(image_tree, tmp_path):
    """With two processes on the CPU."""
    split = tmp_path / "split.txt"
    split.write_text("".join(f"{name}/{i}.jpg\n" for name in "abc" for i in range(3)))
    places = {"dataset_path": image_tree, "checkpoint_path": tmp_path, "split_file": split}
    lines = [words for words in commands(**places) if words[0] == "torchrun"]
    assert len(lines) == 2
    for number, (_, *flags) in enumerate(lines):
        flags = [flag.replace("node=4", "node=2") for flag in flags]
        extra = f"{SMALL_RUN} --checkpoint_path {tmp_path / str(number)}".split()
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *flags, *extra],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / str(number) / "ckpt_epoch_2.pth").exists()


@pytest.mark.parametrize("stopped", [True, False])
def test_the_slurm_file_requeues_what_was_stopped(tmp_path, stopped):
    """With stand-ins for SLURM and torchrun that write down how they are called."""
    (text,) = blocks("slurm", SCALE)
    assert len(text.splitlines()) <= 15
    out, called = tmp_path / "out", tmp_path / "called"
    out.mkdir()
    programs = {
        "scontrol": f'echo "$@" >> {called}; [ "$1" = show ] && printf "host1\\nhost2\\n"; true',
        "srun": '"$@"',
        "torchrun": f'echo "$@" >> {called}; {f"touch {out}/requeue;" * stopped} exit 1',
    }
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    script = text.replace("<CHECKPOINT PATH>", str(out)).replace("<DATASET PATH>", "/data")
    names = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "host[1-2]"}
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env={**os.environ, **names, **paths})
    assert done.returncode == 0
    show, launched, *rest = called.read_text().splitlines()
    assert show == "show hostnames host[1-2]" and "--rdzv_endpoint=host1:29500" in launched
    assert "--nnodes=2" in launched and launched.endswith("--resume auto /data")
    assert rest == (["requeue 7"] if stopped else [])


def test_no_figure_is_left_open():
    assert not [page for page in PAGES if re.search(r"[A-Z]+_(TABLE|FIGURES)", page.read_text())]


@pytest.mark.slow
def test_the_demo_ends_in_a_table_where_learning_shows(run_script, tmp_path):
    """README's command for one method at its full length."""
    done = run_script(
        "self_supervised/train_msf_2q.py",
        *("--demo", "--num_workers", 0, "--checkpoint_path", tmp_path),
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    table = {
        name: float(accuracy)
        for name, accuracy in re.findall(r"^([\w -]+?)  .*?([\d.]+)$", done.stdout, re.MULTILINE)
        if name in ("raw pixels", "random network", "CMSF-2Q")
    }
    assert table["CMSF-2Q"] >= 70
    assert table["CMSF-2Q"] > table["random network"] + 15 > table["raw pixels"] + 15
