"""Promises about the tree itself: one direction of imports, safe loading, a README that is true."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = [
    path
    for folder in ("self_supervised", "supervised", "semi_supervised", "eval")
    for path in sorted((ROOT / folder).glob("*.py"))
]
HUB = ROOT / "hubconf.py"
UTILS = sorted(path for path in (ROOT / "utils").glob("*.py") if path.stem != "__init__")

# What each part of utils may import of the others; an order without circles.
MAY_IMPORT = {
    "errors": set(),
    "checked": {"errors"},
    "plain_json": {"errors"},
    "neighbors": set(),
    "distributed": {"errors", "streams"},
    "memory_bank": {"distributed", "streams"},
    "faiss_library": {"errors"},
    "kmeans": {"faiss_library"},
    "schedule": set(),
    "streams": set(),
    "random_draws": set(),
    "cropping": {"random_draws"},
    "augment": {"random_draws", "streams"},
    "demo_data": set(),
    "meters": {"checked", "checkpoint", "distributed", "errors", "plain_json"},
    "batch_norm": {"distributed"},
    "encoders": {"distributed", "errors"},
    "archives": {"errors"},
    "listing": {"errors"},
    "data": {"archives", "cropping", "errors", "listing"},
    "bad_images": {"errors"},
    "workers": set(),
    "reading": {"bad_images", "data", "distributed", "errors", "workers"},
    "two_views": {
        *("augment", "bad_images", "cropping", "data", "device_crops", "distributed", "errors"),
        *("random_draws", "reading", "streams"),
    },
    "device_crops": {"cropping", "data", "random_draws", "reading", "streams"},
    "image_cache": {"bad_images", "data", "distributed", "errors", "reading"},
    "one_view": {
        *("augment", "bad_images", "cropping", "data", "distributed", "errors", "random_draws"),
        *("reading", "streams"),
    },
    "loaders": {"one_view", "reading", "two_views"},
    "safetensors_file": {"errors", "plain_json"},
    "torch_file": {"checked", "errors"},
    "checkpoint_fields": {"checked", "errors", "torch_file"},
    "checkpoint": {
        *("checked", "checkpoint_fields", "encoders", "errors", "safetensors_file", "torch_file"),
    },
    "features": {"distributed", "errors"},
    "feature_cache": {
        *("bad_images", "checked", "checkpoint", "data", "distributed", "errors", "features"),
        *("loaders", "torch_file"),
    },
    "linear": {"errors"},
    "logistic": {"errors"},
    "image_names": {"data", "errors", "plain_json"},
    "splits": {"checkpoint", "data", "errors", "image_names"},
    "transfer_data": {"data", "errors", "splits"},
    "transfer": {"distributed", "errors", "logistic", "splits"},
    "label_noise": {"checkpoint", "data", "errors", "image_names", "loaders", "streams"},
    "knn": {
        *("checked", "distributed", "errors", "faiss_library", "features", "loaders", "splits"),
    },
    "pictures": set(),
    "shown_neighbors": {
        *("bad_images", "checked", "checkpoint", "data", "errors", "memory_bank", "neighbors"),
        *("pictures", "torch_file"),
    },
    "labeled_features": {"distributed", "feature_cache", "features", "loaders", "streams"},
    "arguments": {"cropping", "errors"},
    "options": {"archives", "arguments", "augment", "demo_data", "distributed", "workers"},
    "running": {"distributed", "errors", "launcher", "stop_signals", "workers"},
    "launcher": {"workers"},
    "result_files": {"checked", "checkpoint", "errors", "plain_json"},
    "experiment": {"checkpoint", "errors", "torch_file"},
    "board": {"augment", "distributed", "errors", "loaders", "meters"},
    "health": {"run_log"},
    "origin": {"distributed", "faiss_library", "options"},
    "run_log": {"checked", "errors", "meters", "plain_json", "result_files", "run_folder"},
    "svg": set(),
    "run_folder": {
        *("checked", "checkpoint", "distributed", "errors", "memory_bank", "plain_json"),
        "torch_file",
    },
    "stop_signals": set(),
    "loss_watch": {"errors", "meters", "streams"},
    "engine": {
        *("board", "checked", "checkpoint", "checkpoint_fields", "distributed", "errors"),
        *("experiment", "health", "knn", "loaders", "loss_watch", "memory_bank", "meters"),
        *("run_folder", "stop_signals", "torch_file", "workers"),
    },
    "evaluation": {
        *("bad_images", "checked", "checkpoint", "data", "distributed", "encoders", "errors"),
        *("feature_cache", "image_cache", "loaders", "origin", "plain_json", "result_files"),
    },
    "setup": {
        *("archives", "batch_norm", "board", "checkpoint", "data", "distributed", "encoders"),
        *(
            "engine",
            "errors",
            "evaluation",
            "faiss_library",
            "image_cache",
            "knn",
            "label_noise",
            "listing",
        ),
        *("loaders", "memory_bank", "options", "origin", "run_folder", "schedule", "splits"),
    },
}


def imported(path: Path) -> set[str]:
    """Every module a file imports, dotted; `from utils import a` counts as utils.a."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", UTILS, ids=lambda path: path.stem)
def test_utils_import_downwards_only(path):
    own = {name.split(".")[1] for name in imported(path) if name.startswith("utils.")}
    assert own <= MAY_IMPORT[path.stem]
    folders = {script.parent.name for script in SCRIPTS}
    assert not [name for name in imported(path) if name.split(".")[0] in folders]


@pytest.mark.parametrize("path", [*SCRIPTS, HUB], ids=lambda path: path.stem)
def test_no_script_imports_another(path):
    folders = {script.parent.name for script in SCRIPTS} - {"semi_supervised"}
    assert not [name for name in imported(path) if name.split(".")[0] in folders]


@pytest.mark.parametrize("path", [*UTILS, *SCRIPTS, HUB], ids=lambda path: path.stem)
def test_every_load_is_weights_only_and_none_is_lax(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        keywords = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        if ast.unparse(node.func) == "torch.load":
            assert keywords.get("weights_only") is True
        assert not ("load" in ast.unparse(node.func) and keywords.get("strict") is False)
