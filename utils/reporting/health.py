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
# Twice what training warns of; below this spread three quarters of the squared length of the
# embeddings are the same for all images.
_FEW_DIMENSIONS, _LITTLE_SPREAD = 2 * collapse.LOW_RANK, 0.5
_TIMES_CHANCE = 1.5
_EARLY = 0.1  # share of a run's epochs in which purity may yet fall
_MOSTLY_RIGHT, _OFTEN_WRONG = 80, 50  # percent
_FEW_CONFIDENT = 25  # percent; with 2 and 40 pseudo-labels paid not at all and hardly
# Up to this purity of the neighbors beside the target itself MSF, KM and 2Q learned less than the
# target alone, on all small data sets that were tried (docs/results.md); ImageNet is larger.
NEAREST_COST_UP_TO = 65.0
_SMALL = 100_000
_MOST_NEIGHBORS = 10**6
_SIGNS = {"healthy": "✓", "look": "!", "unhealthy": "✗", "no figure": "–"}


class Verdict(NamedTuple):
    """One question of a run's health, the answer in a word, and why."""

    question: str
    word: str
    reason: str

    @property
    def sign(self) -> str:
        """The word as a sign."""
        return _SIGNS[self.word]


def verdicts(run: RunLog) -> list[Verdict]:
    """Whether a run is healthy as of its last lines, question by question."""
    flags = (run.settings.get(name) for name in ("proj_dim", "mem_bank_size"))
    most = min((n for n in flags if type(n) is int), default=math.inf)  # that the rank can be
    answers = {
        "loss": _loss(run),
        "effective rank": _embeddings(
            run, "effective_rank", collapse.LOW_RANK, min(_FEW_DIMENSIONS, most / 2)
        ),
        "spread": _embeddings(run, "spread", collapse.LOW_SPREAD, _LITTLE_SPREAD),
        "purity of plain neighbors": _purity(run),
        "whether neighbors pay": _neighbors_pay(run),
    }
    if run.curve("confident"):
        answers["coverage of pseudo-labels"] = _coverage(run)
        answers["accuracy of confident pseudo-labels"] = _labels(run)
    return [Verdict(question, *answer) for question, answer in answers.items() if answer]


def _text(value: float) -> str:
    return f"{value:.3g}"


def _by_limits(value: float, *, bad: float, low: float, unit: str = "") -> tuple[str, str]:
    """The word for a figure that should be high, and the limits in words."""
    word = "unhealthy" if value < bad else "look" if value < low else "healthy"
    limits = f"look below {_text(low)}{unit}, unhealthy below {_text(bad)}{unit}"
    return word, f"{_text(value)}{unit} now; {limits}"


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


def _embeddings(run: RunLog, name: str, bad: float, low: float) -> tuple[str, str]:
    """Embeddings tell images apart; `bad` is where training warns."""
    last = run.last(name)
    if last is None:
        return "no figure", "nothing is logged yet"
    return _by_limits(last, bad=bad, low=max(bad, low))


def _purity(run: RunLog) -> tuple[str, str]:
    """Plain neighbors are of one class more often than by chance, and than at the start."""
    curve, last = run.curve("purity_plain"), run.last("purity_plain")
    if last is None:
        return "no figure", "the images have no classes, or nothing is logged yet"
    if run.settings.get("topk") == 1:
        return "no figure", "with --topk 1 the target is its only neighbor"
    first = next(filter(math.isfinite, curve.values()))
    classes, passed = run.about.get("counts", {}).get("classes"), max(curve)
    chance = 100 / classes if classes else 0
    late = passed > _EARLY * (run.epochs or passed)
    word = "look" if last < first and late else "healthy"
    word = "unhealthy" if last < _TIMES_CHANCE * chance else word
    texts = [f"{_text(first)}% at first, {_text(last)}% now"]
    if classes:
        limit = f"unhealthy below {_text(_TIMES_CHANCE * chance)}%"
        texts.append(f"by chance {_text(chance)}%, {limit}")
    return word, "; ".join([*texts, "look if it falls below its start"])


def beside_target(purity: float, k: float) -> float:
    """The purity of the other neighbors of k, of which the target itself is one; in percent."""
    return max(0.0, (k * purity - 100) / (k - 1))


def _neighbors_pay(run: RunLog) -> tuple[str, str] | None:
    """Whether the k nearest rows cost accuracy at such a purity; None where labels choose them."""
    k, images = run.settings.get("topk"), run.about.get("counts", {}).get("train") or 0
    by_visit, by_cluster = run.curve("no_previous_visit"), run.curve("no_cluster")
    by_label = run.curve("purity_constrained") and not by_visit and not by_cluster
    if by_label or not run.curve("purity_plain") or not isinstance(k, int) or k < 2:
        return None
    # Of clusters the plain ones: a small one has fewer than k, and the target counts for more.
    purity = run.last("purity_constrained" if by_visit else "purity_plain")
    if purity is None or k > _MOST_NEIGHBORS:
        return "no figure", "their purity is not known"
    if images >= _SMALL:
        reason = f"known for small data sets only, not for {images} images; in the paper they do"
        return "no figure", reason
    bank = run.settings.get("mem_bank_size")
    if run.settings.get("symmetric") or (isinstance(bank, int) and 0 < images < bank):
        reason = "purity beside the image itself is not known: the bank holds several rows of it"
        return "no figure", reason
    others = min(beside_target(purity, k), 100.0)
    text = f"beside the target itself {_text(others)}% of the neighbors are of its class"
    text += f"; up to {_text(NEAREST_COST_UP_TO)}% the target alone learned more on small data sets"
    if others > NEAREST_COST_UP_TO:
        return "no figure", f"{text}, above that nothing is known"
    return "look", f"{text}: compare with train_msf.py --topk 1 (docs/results.md)"


def _coverage(run: RunLog) -> tuple[str, str]:
    """Unlabeled images have a confident pseudo-label, in the second half of the epochs."""
    last, start = run.last("confident"), run.settings.get("constraint_start") or 1
    if last is None or run.place[0] < start:
        return "no figure", f"pseudo-labels count from epoch {start} on"
    late = not run.epochs or run.place[0] > start + (run.epochs - start) / 2
    word = "healthy" if last >= _FEW_CONFIDENT else "look" if late else "no figure"
    limit = f"look below {_FEW_CONFIDENT}% in the second half of its epochs"
    return word, f"{_text(last)}% of the unlabeled images now; {limit}"


def _labels(run: RunLog) -> tuple[str, str]:
    """Confident pseudo-labels are right; the training does not know it, the log does."""
    last = run.last("accuracy_confident")
    if last is None:
        return "no figure", "no pseudo-label is confident yet"
    return _by_limits(last, bad=_OFTEN_WRONG, low=_MOSTLY_RIGHT, unit="%")
