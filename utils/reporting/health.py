"""When the figures of a run are bad: rules that hold for any data and network.

What is asked of a run follows from the figures that its log has, not from its method's name.
"""

import math
from typing import NamedTuple

from utils.method import collapse
from utils.reporting.run_log import RunLog

RULES = (
    "These are rules of thumb: the limits of the training's own warnings, chance, and what was "
    "measured on small data sets (docs/results.md)."
)
_LOW_SPREAD = 0.5  # three quarters of the embeddings' squared length the same
_TIMES_CHANCE = 1.5
_EARLY = 0.1  # share of a run's epochs in which purity may yet fall
_ACCURACY, _FEW_CONFIDENT = {"bad": 50, "low": 80}, 25  # percent of the pseudo-labels
# Up to this purity of the neighbors beside the target itself MSF, KM and 2Q learned less than the
# target alone, on all small data sets that were tried (docs/results.md); ImageNet is larger.
NEAREST_COST_UP_TO = 65.0
_SMALL = 100_000
SIGNS = {"healthy": "✓", "look": "!", "unhealthy": "✗", "no figure": "–"}


class Verdict(NamedTuple):
    """One question of a run's health, the answer in a word of `SIGNS`, and why."""

    question: str
    word: str
    reason: str


def verdicts(run: RunLog) -> list[Verdict]:
    """Whether a run is healthy as of its last lines, question by question."""
    flags = (run.settings.get(name) for name in ("proj_dim", "mem_bank_size"))
    most = min((n for n in flags if type(n) is int), default=math.inf)  # that the rank can be
    rank = {"bad": collapse.LOW_RANK, "low": min(2 * collapse.LOW_RANK, most / 2)}
    found = [
        Verdict("loss", *_loss(run)),
        Verdict("effective rank", *_limited(run, "effective_rank", **rank)),
        Verdict("spread", *_limited(run, "spread", bad=collapse.LOW_SPREAD, low=_LOW_SPREAD)),
        Verdict("purity of plain neighbors", *_purity(run)),
    ]
    if pays := _neighbors_pay(run):
        found.append(Verdict("whether neighbors pay", *pays))
    if run.curve("confident"):
        right = _limited(run, "accuracy_confident", "%", **_ACCURACY)
        found.append(Verdict("coverage of pseudo-labels", *_coverage(run)))
        found.append(Verdict("accuracy of confident pseudo-labels", *right))
    return found


def _text(value: float) -> str:
    return f"{value:.3g}"


def _limited(run: RunLog, name: str, unit: str = "", *, bad: float, low: float) -> tuple[str, str]:
    """Whether a figure is as high as it should be."""
    if (last := run.last(name)) is None:
        return "no figure", "nothing is logged yet"
    word = "unhealthy" if last < bad else "look" if last < low else "healthy"
    limits = f"look below {_text(low)}{unit}, unhealthy below {_text(bad)}{unit}"
    return word, f"{_text(last)}{unit} now; {limits}"


def _loss(run: RunLog) -> tuple[str, str]:
    """Every logged loss is a number, and the last is below the first."""
    if errors := [record for record in run.records if "error" in record]:
        place = f"epoch {errors[-1]['epoch']}, step {errors[-1]['step']}"
        return "unhealthy", f"the run ended with {errors[-1]['error']} in {place}"
    values = list(run.curve("loss").values())
    if not values:
        return "no figure", "no loss is logged yet"
    if bad := sum(not math.isfinite(value) for value in values):
        return "unhealthy", f"not finite in {bad} of {len(values)} lines"
    first, last = _text(values[0]), _text(values[-1])
    text = f"finite in all {len(values)} lines, {first} at first, {last} now"
    return "look" if values[-1] > values[0] else "healthy", text


def _purity(run: RunLog) -> tuple[str, str]:
    """Plain neighbors are of one class more often than by chance, and than at the start."""
    curve, last = run.curve("purity_plain"), run.last("purity_plain")
    if last is None or run.settings.get("topk") == 1:
        return "no figure", "not known, or with --topk 1 of the target alone"
    first, passed = next(filter(math.isfinite, curve.values())), max(curve)
    late = passed > _EARLY * (run.epochs or passed)
    word = "look" if last < first and late else "healthy"
    text = f"{_text(first)}% at first, {_text(last)}% now; look if it falls below its start"
    if classes := run.counts.get("classes"):
        limit = _TIMES_CHANCE * 100 / classes
        word = "unhealthy" if last < limit else word
        text += f"; by chance {_text(100 / classes)}%, unhealthy below {_text(limit)}%"
    return word, text


def beside_target(purity: float, k: float) -> float:
    """The purity of the other neighbors of k, of which the target itself is one; in percent."""
    return max(0.0, (k * purity - 100) / (k - 1))


def _neighbors_pay(run: RunLog) -> tuple[str, str] | None:
    """Whether the k nearest rows cost accuracy at such a purity; None where labels choose them."""
    k, bank = run.settings.get("topk"), run.settings.get("mem_bank_size")
    images = run.counts.get("train", 0)
    by_visit, by_cluster = run.curve("no_previous_visit"), run.curve("no_cluster")
    by_label = run.curve("purity_constrained") and not by_visit and not by_cluster
    if by_label or not run.curve("purity_plain") or type(k) is not int or not 2 <= k <= 10**6:
        return None
    # Of clusters the plain ones: a small one has fewer than k, and the target counts for more.
    purity = run.last("purity_constrained" if by_visit else "purity_plain")
    several = run.settings.get("symmetric") or (type(bank) is int and 0 < images < bank)
    if purity is None or several or images >= _SMALL:
        reason = f"known where classes are, of less than {_SMALL:,} images (in the paper they do)"
        return "no figure", f"{reason}, each in the bank once at most"
    others = min(beside_target(purity, k), 100.0)
    text = f"beside the target itself {_text(others)}% of the neighbors are of its class"
    text += f"; up to {_text(NEAREST_COST_UP_TO)}% the target alone learned more on small data sets"
    if others > NEAREST_COST_UP_TO:
        return "no figure", f"{text}, above that nothing is known"
    return "look", f"{text}: compare with train_msf.py --topk 1 (docs/results.md)"


def _coverage(run: RunLog) -> tuple[str, str]:
    """Unlabeled images have a confident pseudo-label, in the second half of the epochs."""
    last, start = run.last("confident"), run.settings.get("constraint_start")
    start = start if type(start) is int else 1
    if last is None or run.place[0] < start:
        return "no figure", f"pseudo-labels count from epoch {start} on"
    late = not run.epochs or run.place[0] > (start + run.epochs) / 2
    word = "healthy" if last >= _FEW_CONFIDENT else "look" if late else "no figure"
    limit = f"look below {_FEW_CONFIDENT}% in the second half of its epochs"
    return word, f"{_text(last)}% of the unlabeled images now; {limit}"
