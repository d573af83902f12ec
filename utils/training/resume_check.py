"""Whether a run that goes on is still the experiment that it was."""

from collections.abc import Callable

from utils.method import checkpoint
from utils.runtime import torch_file
from utils.runtime.errors import InputError

# Flags that a resumed run may have otherwise. The images are compared by what they are, not by
# where they lie; --epochs may grow.
_MAY_DIFFER = {
    *("data", "demo", "download", "device", "deterministic", "num_workers"),
    *("checkpoint_path", "weights"),
    # Cached crops are the same, but for a gray level here and there if a device cuts them.
    *("precision", "channels_last", "compile", "cuda_graphs", "tf32", "cache_images"),
    *("resume", "resume_anyway", "print_freq", "save_freq", "save_minutes", "knn_freq"),
    *("bad_images", "max_bad_images", "sup_split_file", "label_file", "tensorboard"),
}
# Flags that older checkpoints do not have, and the values that change nothing.
_AS_BEFORE = {"topk_plain": (None, 0)}


def decisive(settings: dict) -> dict:
    """Those of a run's flags that make it the experiment that it is."""
    return {name: value for name, value in settings.items() if name not in _MAY_DIFFER}


def check_same(
    state: dict,
    what: str,
    *,
    method: str,
    settings: dict,
    data: dict[str, str],
    anyway: bool,
    fits: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """InputError for a state of another method, or of flags or data that make another experiment.

    state: of a checkpoint, as `checkpoint.load` gives it; `what` names it. settings: the flags now;
    data: digests by name of what is trained on. anyway: other flags and data are a warning, said by
    `say`. fits: whether the state could be gone on from all the same, asked before that is advised.
    """
    if state.get("method") != method:
        raise InputError(f"{what}: a run of {_said(state.get('method'))}, not of this script")
    before, data_before = checkpoint.settings(state), state.get("data", {})
    differing = [
        f"--{name} {_said(before[name])}, not {value}"
        for name, value in settings.items()
        if name in before and not _may_become(name, before[name], value)
    ]
    differing += [
        f"no --{name}, not {settings[name]}"
        for name, values in _AS_BEFORE.items()
        if name not in before and settings.get(name) not in values
    ]
    differing += [
        f"other {_said(name)}"
        for name in data_before | data
        if data_before.get(name) != data.get(name)
    ]
    if differing and not anyway:
        advice = " (to go on all the same: --resume_anyway)" if fits() else ""
        raise InputError(f"{what}: a run with {'; '.join(differing)}{advice}")
    if settings.get("cos") and before.get("epochs") != settings.get("epochs"):
        say(f"the cosine falls over --epochs {settings['epochs']} from here on")
    for difference in differing:
        say(f"WARNING {what}: a run with {difference}")


def _may_become(name: str, before: object, now: object) -> bool:
    longer = name == "epochs" and isinstance(before, int) and now > before
    return name in _MAY_DIFFER or now == before or longer


def _said(value: object) -> str:
    return torch_file.one_line(str(value))
