"""Every command in the README runs as it stands there, made small by flags added at its end."""

import importlib
import itertools
import os
import re
import shlex
import subprocess
import sys

import pytest
import stand_ins
import tiny
from conftest import ROOT, start_method

# A later flag overrides an earlier one, so these make any of the commands a matter of seconds.
SMALL_RUN = (
    "--debug --batch_size 8 --mem_bank_size 64 --image_size 32 --num_workers 0 --knn_freq -1 "
    "--arch conv4"
)
EVALUATION = "--num_workers 0 --batch_size 16 --arch conv4"
# Instead of these, for scripts that have other flags.
OTHERS = {
    "eval/eval_linear.py": f"{EVALUATION} --epochs 2",
    "eval/eval_transfer.py": f"{EVALUATION} --l2 1",
    "eval/report.py": "",
    "eval/plot_training.py": "",
    "eval/export_backbone.py": "--arch conv4",
    "eval/show_neighbors.py": "--num_workers 0 --batch_size 16",
    "eval/extract_features.py": "--num_workers 0 --batch_size 16",
    "supervised/train_sup_xent.py": SMALL_RUN.replace("--mem_bank_size 64 ", ""),  # it has no bank
}


def commands(**places: object) -> list[list[str]]:
    """The words of each command of the README's bash blocks, split at && as well.

    places: what stands for <DATASET PATH> and the like, by dataset_path and the like.
    """
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").replace("&&", "\n")
    for name, place in places.items():
        lines = lines.replace(f"<{name.upper().replace('_', ' ')}>", shlex.quote(str(place)))
    return [shlex.split(line, comments=True) for line in lines.splitlines() if line.strip()]


def test_installation_and_tests_are_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    listed = [" ".join(command) for command in commands()]
    assert "pip install -r requirements.txt" in listed
    assert "pip install -r requirements-dev.txt" in listed and "requirements-dev.txt" in ci
    assert "python -m pytest" in listed and "python -m pytest" in ci


def test_every_file_the_readme_names_is_there():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"`([\w/]+\.(?:py|sh|txt))`|\]\(([\w/]+\.py)\)", text)
    for path in filter(None, (name for pair in named for name in pair)):
        folders = ("", "eval", "utils", "semi_supervised")
        assert any((ROOT / folder / path).exists() for folder in folders), path


def test_scripts_of_the_readme_run(call_script, run_script, image_tree, tmp_path, monkeypatch):
    """In the order of the text: what is evaluated is what the training command before wrote.

    The first command is a process; the others are calls, which import torch only once.
    """
    stand_ins.write_dtd(tmp_path / "sets")
    places = {
        "dataset_path": image_tree,
        "checkpoint_path": tmp_path / "first",
        "checkpoint": tmp_path / "first" / "ckpt_epoch_2.pth",
        "folder": tmp_path / "sets",
    }
    scripts = [words[1:] for words in commands(**places) if words[1].endswith(".py")]
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
    for name in ("report.html", "curves.png", "neighbors.png", "backbone.pth", "features.npz"):
        assert (tmp_path / "first" / name).stat().st_size > 1000


def test_the_method_that_the_readme_adds_trains(image_tree, tmp_path):
    """In a folder of its own beside utils; its workers start as of Python 3.14."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(code.splitlines()) <= 45
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
    (text,) = re.findall(r"```slurm\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
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
    assert not re.search(r"[A-Z]+_(TABLE|FIGURES)", (ROOT / "README.md").read_text())


@pytest.mark.slow
def test_the_demo_ends_in_a_table_where_learning_shows(run_script, tmp_path):
    """The README's first command at its full length."""
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
