"""Shared by the tests: few threads, real image files, scripts as real processes."""

import builtins
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import linear_runs
import numpy as np
import pytest
import torch
from PIL import Image

from utils.evaluation import feature_cache
from utils.runtime import script

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)
try:
    from hypothesis import settings
except ImportError:  # a machine without the packages of requirements-dev.txt
    # The package, and two modules of strategies.
    needed = re.compile(r"^(from|import) (hypothesis|nasty_names|odd_values)", re.MULTILINE)
    collect_ignore = [p.name for p in ROOT.glob("tests/*.py") if needed.search(p.read_text())]
else:
    settings.register_profile("no deadline", deadline=None)  # other processes take turns
    settings.load_profile("no deadline")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process a core for whole folders; none besides this one for single files.

    Each process imports torch first, which takes longer than most files' tests.
    """
    if not all(Path(arg).is_dir() for arg in config.args):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, cores or 1)  # each takes a gigabyte or two


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def signals_as_before():
    """Scripts called in this process leave their handlers, which a process of their own may."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def workers_are_watched(monkeypatch):
    """A script that ends in this process leaves torch's watch over workers, set up once."""
    monkeypatch.setattr(script, "forget_workers", lambda: None)


def write_image(path: Path, *, seed: int, size: tuple[int, int] = (24, 20)) -> None:
    """A small JPEG or PNG of smooth random color."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def temporary(tmp_path_factory, monkeypatch):
    """The temporary folder of processes that a test starts; it must be empty when they ended."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    assert not list(folder.iterdir())


def start_method(folder: Path, method: str) -> dict[str, str]:
    """Environment in which worker processes start by this method, as other Pythons' default."""
    folder.mkdir(exist_ok=True)
    line = f"import multiprocessing\n\nmultiprocessing.set_start_method({method!r}, force=True)\n"
    (folder / "sitecustomize.py").write_text(line)
    return {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory) -> Path:
    """train/ and val/ with classes a, b, c: 10 and 4 images each. Not to be changed by a test."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 10), ("val", 4)):
        for number, name in enumerate("abc"):
            for i in range(count):
                seed = 1000 * (split == "val") + 100 * number + i
                write_image(root / split / name / f"{i}.jpg", seed=seed)
    return root


@pytest.fixture
def run_script():
    """Run a script of the repository as a process: (path, *flags) -> the finished process."""

    def run(script: str, *flags: object, cwd: Path = ROOT, timeout: float = 300):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            [sys.executable, os.path.relpath(ROOT / script, cwd), *map(str, flags)],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def call_script(monkeypatch, capsys):
    """Call a script's main in this process: (module, *flags) -> (exit code, stdout, stderr)."""

    def call(module, *flags: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__.split('.')[-1]}.py", *map(str, flags)])
        with pytest.raises(SystemExit) as exit_code:
            script.run_script(module.main)
        streams = capsys.readouterr()
        return exit_code.value.code, streams.out, streams.err

    return call


@pytest.fixture
def without_package(monkeypatch):
    """Imports of a package, by its name, fail as if it were not installed."""

    def hide(missing: str) -> None:
        real = builtins.__import__

        def find(name, *rest):
            if name.startswith(missing):
                raise ImportError(name)
            return real(name, *rest)

        monkeypatch.setattr(builtins, "__import__", find)

    return hide


BROKEN = ("train/a/3.jpg", "train/b/0.jpg", "train/b/1.jpg", "train/c/9.jpg", "val/b/2.jpg")


@pytest.fixture(scope="session")
def broken_tree(image_tree, tmp_path_factory):
    """The image tree with the files of BROKEN broken. Not to be changed by a test."""
    root = shutil.copytree(image_tree, tmp_path_factory.mktemp("broken") / "tree")
    for name in BROKEN:
        (root / name).write_bytes((root / name).read_bytes()[:200])
    return root


@pytest.fixture(scope="session")
def tree_without(image_tree, tmp_path_factory):
    """The image tree without the files of BROKEN."""
    root = shutil.copytree(image_tree, tmp_path_factory.mktemp("without") / "tree")
    for name in BROKEN:
        (root / name).unlink()
    return root


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A checkpoint for conv4 at 16 pixels. Not to be changed by a test."""
    return linear_runs.write_checkpoint(tmp_path_factory.mktemp("weights") / "ckpt.pth")


@pytest.fixture
def run_linear(call_script, weights, image_tree):
    """Call the script: (folder of --save, *flags) -> (linear.json, console, linear.pth).

    The console without the first lines, which tell what images and which backbone there are.
    """

    module = importlib.import_module("eval.eval_linear")

    def run(folder, *flags, data=image_tree):
        flags = (*linear_runs.QUICK, "--weights", weights, *flags, "--save", folder, data)
        code, stdout, stderr = call_script(module, *flags)
        assert code == 0, stderr
        told = re.sub("^((data .*: [0-9]+ images in|--weights .*: backbone) .*\n)+", "", stdout)
        return json.loads((folder / "linear.json").read_text()), told, linear_runs.load(folder)

    return run


@pytest.fixture
def extractions(monkeypatch):
    """A list that grows by one with every extraction."""
    calls = []

    def counted(*args, original=feature_cache.extract):
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(feature_cache, "extract", counted)
    return calls
