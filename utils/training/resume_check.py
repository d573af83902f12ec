"""Whether a run that goes on is still the experiment that it was."""

from collections.abc import Callable

from utils.method import checkpoint
from utils.runtime import torch_file
from utils.runtime.errors import InputError
from utils.training.log import Log

# Flags that a resumed run may have otherwise. The images are compared by what they are, not by
# where they lie; --epochs may grow.
_MAY_DIFFER = {
    *("data", "demo", "download", "device", "deterministic", "num_workers"),
    *("checkpoint_path", "weights", "prefix"),
    # Cached crops are the same, but for a gray level here and there if a device cuts them.
    *("precision", "channels_last", "compile", "cuda_graphs", "tf32", "cache_images"),
    *("resume", "resume_anyway", "print_freq", "save_freq", "save_minutes", "knn_freq"),
    *("bad_images", "max_bad_images", "sup_split_file", "label_file", "tensorboard"),
}


def decisive(settings: dict) -> dict:
    """Those of a run's flags that make it the experiment that it is."""
    return {name: value for name, value in settings.items() if name not in _MAY_DIFFER}


def check(
    state: dict,
    settings: dict,
    data: dict[str, str],
    *,
    method: str,
    what: str,
    fits: Callable[[], bool],
) -> None:
    """InputError for a run of another method, or without --resume_anyway of another experiment.

    state: as `checkpoint.load` gives it. settings: the flags now. data: digests by name of what is
    trained on. what: begins the error. fits: whether the state could be gone on from all the same,
    asked before that is advised.
    """
    if state.get("method") != method:
        found = torch_file.one_line(str(state.get("method")))
        raise InputError(f"{what}: a run of {found}, not of this script")
    before, data_before = checkpoint.settings(state), state.get("data", {})
    before.setdefault("topk_plain", None)  # a flag that older checkpoints do not have
    differing = [
        f"--{name} {torch_file.one_line(str(before[name]))}, not {value}"
        for name, value in decisive(settings).items()
        if name in before and not _may_become(name, before[name], value)
    ]
    names = [name for name in data_before | data if data_before.get(name) != data.get(name)]
    differing += [f"other {torch_file.one_line(name)}" for name in names]
    if differing and not settings["resume_anyway"]:
        advice = " (to go on all the same: --resume_anyway)" if fits() else ""
        raise InputError(f"{what}: a run with {'; '.join(differing)}{advice}")
    if differing:
        Log.say(f"WARNING {what}: a run with {'; '.join(differing)}")
    if settings["cos"] and before.get("epochs") != settings["epochs"]:
        Log.say(f"the cosine falls over --epochs {settings['epochs']} from here on")


def _may_become(name: str, before: object, now: object) -> bool:
    longer = name == "epochs" and isinstance(before, int) and now > before
    return now == before or longer or (name == "topk_plain" and not now and not before)
