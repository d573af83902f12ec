"""Verdicts on a run: each word at figures on both sides of its limit."""

import logs
import pytest

from utils.reporting import health, run_log


def verdicts(folder, lines, **start):
    run = run_log.read(logs.write(folder, lines, starts=[logs.start(**start)]))
    return {verdict.question: verdict for verdict in health.verdicts(run)}


def words(folder, lines, **start):
    return {
        question: verdict.word for question, verdict in verdicts(folder, lines, **start).items()
    }


def test_a_healthy_run(tmp_path):
    assert words(tmp_path, logs.records()) == {
        "loss": "healthy",
        "effective rank": "healthy",
        "spread": "healthy",
        "purity of plain neighbors": "healthy",
        "whether neighbors pay": "no figure",
    }


def test_each_word_has_a_sign_of_its_own(tmp_path):
    ranks = (3.0, 7.0, 30.0, None)
    found = [verdicts(tmp_path, [logs.record(1, 4, effective_rank=r)]) for r in ranks]
    found = [one["effective rank"] for one in found]
    assert [one.word for one in found] == ["unhealthy", "look", "healthy", "no figure"]
    assert [health.SIGNS[one.word] for one in found] == ["✗", "!", "✓", "–"]


@pytest.mark.parametrize(
    ("spread", "word"), [(0.09, "unhealthy"), (0.11, "look"), (0.45, "look"), (0.55, "healthy")]
)
def test_spread(tmp_path, spread, word):
    assert words(tmp_path, [logs.record(1, 4, spread=spread)])["spread"] == word


def test_loss(tmp_path):
    good, bad = logs.record(1, 4, loss=1.0), logs.record(2, 4, loss=None)
    rising = [good, logs.record(2, 4, loss=1.5)]
    assert words(tmp_path, rising)["loss"] == "look"
    one = verdicts(tmp_path, [good, bad, logs.record(3, 4)])["loss"]
    assert (one.word, one.reason) == ("unhealthy", "not finite in 1 of 3 lines")
    end = {"epoch": 2, "step": 1, "error": "loss nan", "lr": 0.1, "images": [1]}
    one = verdicts(tmp_path, [good, end])["loss"]
    assert one.word == "unhealthy" and one.reason.endswith("loss nan in epoch 2, step 1")


def test_purity_against_chance_and_its_start(tmp_path):
    """Three classes: 33.3% by chance, so 50% is the limit."""

    def of(*purities, **start):
        lines = [logs.record(e, 4, purity_plain=p) for e, p in enumerate(purities, 1)]
        return words(tmp_path, lines, **start)["purity of plain neighbors"]

    assert of(51.0) == of(51.0, 60.0) == "healthy"
    assert of(49.0, 49.9) == "unhealthy"
    assert of(60.0, 55.0) == "look"
    assert of(60.0, 55.0, epochs=30) == "healthy"  # early yet
    assert of(49.0, counts={}) == "healthy"  # chance is not known
    assert of(None) == "no figure"
    assert of(100.0, settings={"topk": 1}) == "no figure"  # the target itself


# What the log has of a method beside the purity that counts, which is the last.
FIGURES = {
    "MSF": ["purity_plain"],
    "2Q": ["no_previous_visit", "purity_plain", "purity_constrained"],
    "KM": ["no_cluster", "purity_constrained", "purity_plain"],
    "supervised": ["purity_constrained", "purity_plain"],
    "semi": ["confident", "purity_constrained", "purity_plain"],
}


def test_whether_neighbors_pay(tmp_path):
    """By the constrained neighbors of 2Q, else by the plain ones; not of neighbors by label."""

    def of(purity, method="2Q", train=1000, **flags):
        line = {"epoch": 1, "step": 4, **dict.fromkeys(FIGURES[method], 50.0)}
        line[FIGURES[method][-1]] = purity
        settings = {"topk": 5, "mem_bank_size": 512} | flags
        start = {"method": None, "settings": settings, "counts": {"train": train}}
        return words(tmp_path, [line], **start).get("whether neighbors pay")

    limit = (100 + 4 * health.NEAREST_COST_UP_TO) / 5  # with the target itself, one of 5
    assert of(limit - 1) == of(limit - 1, "KM") == of(0.0) == "look"
    assert of(limit + 1) == of(limit + 1, "KM") == "no figure"
    assert of(limit - 1, mem_bank_size=1001) == of(limit - 1, symmetric=True) == "no figure"
    assert of(limit - 1, "MSF") == "look"
    assert of(limit - 1, train=1_281_167) == of(None) == "no figure"
    assert of(100.0, "MSF", topk=1) is None  # the target alone
    assert of(limit - 1, "MSF", topk="all") is of(limit - 1, topk=10**400) is None
    assert of(limit - 1, "supervised") is of(limit - 1, "semi") is None


@pytest.mark.parametrize(
    ("flags", "low"), [({}, 10), ({"proj_dim": 16}, 8), ({"mem_bank_size": 12}, 6)]
)
def test_effective_rank_against_the_most_it_can_be(tmp_path, flags, low):
    settings = {"proj_dim": None, "mem_bank_size": 512} | flags
    for rank, word in ((low - 0.1, "look"), (low + 0.1, "healthy")):
        lines = [logs.record(1, 4, effective_rank=rank)]
        assert words(tmp_path, lines, settings=settings)["effective rank"] == word


def test_pseudo_labels(tmp_path):
    def of(confident, accuracy, epoch=3):
        lines = [logs.record(epoch, 4, confident=confident, accuracy_confident=accuracy)]
        found = words(tmp_path, lines, settings={"constraint_start": 2})
        return found["coverage of pseudo-labels"], found["accuracy of confident pseudo-labels"]

    assert of(90.0, 95.0) == ("healthy", "healthy")
    assert of(10.0, 79.0) == ("look", "look")
    assert of(90.0, 49.0) == ("healthy", "unhealthy")
    assert of(0.0, None) == ("look", "no figure")
    assert (of(24.0, 81.0), of(26.0, 81.0)) == (("look", "healthy"), ("healthy", "healthy"))
    assert of(10.0, 95.0, epoch=2) == ("no figure", "healthy")  # half of the epochs is to come
    assert of(90.0, 95.0, epoch=2) == ("healthy", "healthy")
    assert of(0.0, None, epoch=1) == ("no figure", "no figure")
