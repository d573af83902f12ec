"""When the figures of a run are bad, and what they were in runs that went well."""

import math
from typing import NamedTuple

from utils.method import collapse
from utils.reporting.run_log import RunLog

# Of the last log line of runs by tests/benchmarks/methods.py (CPU, --demo, seeds 0 to 2): lowest
# and highest. What those runs reached stands in docs/results.md.
DEMO_RUNS = "demo runs of this repository (60 epochs, seeds 0 to 2) at their end"
DEMO_RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "MSF": {
        "effective_rank": (17.1, 21.2),
        "spread": (0.991, 0.995),
        "purity_plain": (69.8, 73.8),
    },
    "CMSFKM": {
        "effective_rank": (18.4, 20.9),
        "spread": (0.991, 0.997),
        "purity_plain": (70.2, 73.9),
    },
    "CMSF2Q": {
        "effective_rank": (16.6, 22.0),
        "spread": (0.985, 0.997),
        "purity_plain": (66.8, 71.0),
    },
    "SupervisedCMSF": {
        "effective_rank": (22.4, 23.9),
        "spread": (0.988, 0.992),
        "purity_plain": (79.2, 85.4),
    },
    "PseudoCMSF": {
        "effective_rank": (22.4, 24.9),
        "spread": (0.991, 0.997),
        "purity_plain": (50.4, 54.5),
        "confident": (48.9, 53.3),
        "accuracy_confident": (92.8, 93.7),
    },
}
# Share of the lowest of those figures from which another run's is no reason to look.
_SHARE = 0.5
_TIMES_CHANCE = 1.5
_EARLY = 0.1  # share of a run's epochs in which purity may yet fall
_MOSTLY_RIGHT, _OFTEN_WRONG = 80, 50  # percent
# Up to this purity of the neighbors beside the target itself MSF, KM and 2Q learned less than the
# target alone, on all small data sets that were tried (docs/results.md); ImageNet is larger.
NEAREST_COST_UP_TO = 65.0
_SMALL = 100_000
_MOST_NEIGHBORS = 10**6
_WITH_NEAREST = ("MSF", "CMSFKM", "CMSF2Q")


class Verdict(NamedTuple):
    """One question of a run's health: what was asked, a sign and a word, and why."""

    question: str
    sign: str
    word: str
    reason: str


_WORDS = {"healthy": "✓", "look": "!", "unhealthy": "✗", "no figure": "–"}


def verdicts(run: RunLog) -> list[Verdict]:
    """Whether a run is healthy as of its last lines, question by question."""
    found = [
        _loss(run),
        _embeddings(run, "effective_rank", "effective rank", low=collapse.LOW_RANK),
        _embeddings(run, "spread", "spread", low=collapse.LOW_SPREAD),
        _purity(run),
    ]
    if (pays := _neighbors_pay(run)) is not None:
        found.append(pays)
    if run.method == "PseudoCMSF" or run.curve("confident"):
        found += [_coverage(run), _labels(run)]
    return found


def demo_range(run: RunLog, name: str) -> tuple[float, float]:
    """Lowest and highest of a figure in the demo runs of the run's method, or of all methods."""
    own = DEMO_RANGES.get(run.method, {})
    methods = [own] if name in own else DEMO_RANGES.values()
    ranges = [figures[name] for figures in methods if name in figures]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _verdict(question: str, word: str, reason: str) -> Verdict:
    return Verdict(question, _WORDS[word], word, reason)


def _text(value: float) -> str:
    return f"{value:.3g}"


def _range_text(run: RunLog, name: str, unit: str = "") -> str:
    low, high = map(_text, demo_range(run, name))
    return f"demo runs ended at {low if low == high else f'{low} to {high}'}{unit}"


def _loss(run: RunLog) -> Verdict:
    """Every logged loss is a number, and the last is below the first."""
    question = "loss"
    if errors := [record for record in run.records if "error" in record]:
        last = errors[-1]
        place = f"epoch {last['epoch']}, step {last['step']}"
        return _verdict(question, "unhealthy", f"the run ended with {last['error']} in {place}")
    values = list(run.curve("loss").values())
    if not values:
        return _verdict(question, "no figure", "no loss is logged yet")
    if bad := sum(not math.isfinite(value) for value in values):
        return _verdict(question, "unhealthy", f"not finite in {bad} of {len(values)} lines")
    text = (
        f"finite in all {len(values)} lines, {_text(values[0])} at first, {_text(values[-1])} now"
    )
    return _verdict(
        question, "look" if len(values) > 1 and values[-1] > values[0] else "healthy", text
    )


def _embeddings(run: RunLog, name: str, question: str, *, low: float) -> Verdict:
    """A figure of the embeddings' health: `low` is where training warns."""
    last = run.last(name)
    if last is None:
        return _verdict(question, "no figure", "nothing is logged yet")
    enough = _SHARE * demo_range(run, name)[0]
    word = "unhealthy" if last < low else "look" if last < enough else "healthy"
    limits = f"look below {_text(enough)}, unhealthy below {low:g}"
    return _verdict(question, word, f"{_text(last)} now; {_range_text(run, name)}; {limits}")


def _purity(run: RunLog) -> Verdict:
    """Plain neighbors are of one class more often than by chance, and than at the start."""
    question, name = "purity of plain neighbors", "purity_plain"
    last = run.last(name)
    if last is None:
        return _verdict(
            question, "no figure", "the images have no classes, or nothing is logged yet"
        )
    if run.method in _WITH_NEAREST and run.settings.get("topk") == 1:
        return _verdict(question, "no figure", "with --topk 1 the target is its only neighbor")
    first = next(value for value in run.curve(name).values() if math.isfinite(value))
    classes = run.about.get("counts", {}).get("classes") or 0
    chance = 100 / classes if classes else 0
    passed = max(run.curve(name))
    if last < _TIMES_CHANCE * chance:
        word = "unhealthy"
    elif last < first and passed > _EARLY * (run.epochs or passed):
        word = "look"
    else:
        word = "healthy"
    texts = [f"{_text(first)}% at first, {_text(last)}% now"]
    if classes:
        least = _text(_TIMES_CHANCE * chance)
        texts.append(f"by chance {_text(chance)}%, unhealthy below {least}%")
    texts += [_range_text(run, name, "%"), "look if it falls below its start"]
    return _verdict(question, word, "; ".join(texts))


def beside_target(purity: float, k: float) -> float:
    """The purity of the other neighbors of k, of which the target itself is one; in percent."""
    return max(0.0, (k * purity - 100) / (k - 1))


def _neighbors_pay(run: RunLog) -> Verdict | None:
    """Whether the k nearest rows cost accuracy at such a purity; None for a method without them."""
    question, k = "whether neighbors pay", run.settings.get("topk")
    if run.method not in _WITH_NEAREST or not isinstance(k, int) or k < 2:
        return None
    # Of CMSF-KM the plain ones: a small cluster has fewer than k, and the target counts for more.
    purity = run.last("purity_constrained" if run.method == "CMSF2Q" else "purity_plain")
    if purity is None or k > _MOST_NEIGHBORS:
        return _verdict(question, "no figure", "their purity is not known")
    images = run.about.get("counts", {}).get("train") or 0
    if images >= _SMALL:
        reason = f"known for small data sets only, not for {images} images; in the paper they do"
        return _verdict(question, "no figure", reason)
    bank = run.settings.get("mem_bank_size")
    if run.settings.get("symmetric") or (isinstance(bank, int) and 0 < images < bank):
        reason = "purity beside the image itself is not known: the bank holds several rows of it"
        return _verdict(question, "no figure", reason)
    others = min(beside_target(purity, k), 100.0)
    text = f"beside the target itself {_text(others)}% of the neighbors are of its class"
    limit = f"up to {_text(NEAREST_COST_UP_TO)}% the target alone learned more on small data sets"
    if others > NEAREST_COST_UP_TO:
        return _verdict(question, "no figure", f"{text}; {limit}, above that nothing is known")
    advice = "compare with train_msf.py --topk 1 (docs/results.md)"
    return _verdict(question, "look", f"{text}; {limit}: {advice}")


def _coverage(run: RunLog) -> Verdict:
    """Unlabeled images have a confident pseudo-label; the share grows over the epochs."""
    question, last = "coverage of pseudo-labels", run.last("confident")
    start = run.settings.get("constraint_start") or 1
    if last is None or run.place[0] < start:
        return _verdict(question, "no figure", f"pseudo-labels count from epoch {start} on")
    enough = _SHARE * demo_range(run, "confident")[0]
    until = start + (run.epochs - start) / 2 if run.epochs else 0  # too early until then
    word = "healthy" if last >= enough else "look" if run.place[0] > until else "no figure"
    text = f"{_text(last)}% of the unlabeled images now; {_range_text(run, 'confident', '%')}"
    limit = f"look below {_text(enough)}% in the second half of its epochs"
    return _verdict(question, word, f"{text}; {limit}")


def _labels(run: RunLog) -> Verdict:
    """Confident pseudo-labels are right; the training does not know it, the log does."""
    question, last = "accuracy of confident pseudo-labels", run.last("accuracy_confident")
    if last is None:
        return _verdict(question, "no figure", "no pseudo-label is confident yet")
    wrong = last < _OFTEN_WRONG
    word = "unhealthy" if wrong else "look" if last < _MOSTLY_RIGHT else "healthy"
    limits = f"look below {_MOSTLY_RIGHT}%, unhealthy below {_OFTEN_WRONG}%"
    text = f"{_text(last)}% now; {_range_text(run, 'accuracy_confident', '%')}; {limits}"
    return _verdict(question, word, text)
