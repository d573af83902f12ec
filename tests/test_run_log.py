"""Reading a run's log: places, null, half-written lines, files that are none."""

import json
import math

import logs
import pytest

from utils.reporting import run_log
from utils.runtime.errors import InputError


def test_epochs_that_have_passed_and_the_figures_there(tmp_path):
    lines = [logs.record(1, 2, loss=3.0), logs.record(1, 4, loss=2.0), logs.record(2, 1, loss=1.0)]
    run = run_log.read(logs.write(tmp_path / "run", lines))
    assert run.curve("loss") == {0.5: 3.0, 1.0: 2.0, 1.25: 1.0}
    assert (run.steps, run.place, run.name) == (4, (2, 1), "run")
    assert run.last("loss") == 1.0
    assert run.epochs is run.method is None  # there is no run.json


def test_run_json_tells_how_long_an_epoch_is(tmp_path):
    """Within the first epoch the log alone cannot tell."""
    run = run_log.read(logs.write(tmp_path, [logs.record(1, 1)], starts=[logs.start()]))
    assert list(run.curve("loss")) == [0.25]
    assert (run.method, run.epochs) == ("CMSF2Q", 3)


def test_the_newest_start_counts(tmp_path):
    starts = [logs.start(), logs.start(epochs=9, settings={"epochs": 9})]
    run = run_log.read(logs.write(tmp_path, logs.records(), starts=starts))
    assert run.epochs == run.settings["epochs"] == 9


def test_null_is_nan_and_no_figure(tmp_path):
    lines = [logs.record(1, 4, confident=None), logs.record(2, 4, confident=7.0, loss=None)]
    run = run_log.read(logs.write(tmp_path, [*lines, logs.record(3, 4)]))
    one, two = run.curve("confident").values()
    assert math.isnan(one) and two == 7
    assert run.last("confident") == 7 and run.last("accuracy_confident") is None
    assert run.last("loss") == pytest.approx(2 / 3.04)
    only_null = run_log.read(logs.write(tmp_path, [logs.record(1, 4, loss=None)]))
    assert only_null.last("loss") is None


def test_knn_figures(tmp_path):
    run = run_log.read(logs.write(tmp_path, logs.records()))
    assert run.curve("knn_1") == {3.0: 47.25} and run.curve("knn_20") == {3.0: 48.5}
    assert run.curve("knn_5") == {}


@pytest.mark.parametrize("tail", ['{"epoch": 3, "st', '{"epoch": 3}', "3", "\x00\x00", '{"epo\xff'])
def test_a_half_written_last_line_is_left_out(tmp_path, tail):
    run = run_log.read(logs.write(tmp_path, logs.records(), tail=tail))
    assert run.cut and len(run.records) == 7
    assert not run_log.read(logs.write(tmp_path, logs.records())).cut


def test_the_log_itself_can_be_named(tmp_path):
    folder = logs.write(tmp_path, logs.records(), starts=[logs.start()])
    assert vars(run_log.read(folder / "log.jsonl")) == vars(run_log.read(folder))


def test_rank_histograms_early_to_late(tmp_path):
    lines = [logs.record(e, 4, constrained_ranks=[e, 100 - e]) for e in range(1, 11)]
    run = run_log.read(logs.write(tmp_path, lines))
    assert run.rank_histograms() == {e: [e, 100 - e] for e in (1.0, 4.0, 7.0, 10.0)}
    two = run_log.read(logs.write(tmp_path, [*lines[:2], logs.record(3, 4, constrained_ranks=[])]))
    assert two.rank_histograms() == {1.0: [1, 99], 2.0: [2, 98]}
    assert run_log.read(logs.write(tmp_path, logs.records())).rank_histograms() == {}
    # While nothing is constrained there is none, and bins that all leave empty are not drawn.
    shares = [[None] * 5, [50.0, 50.0, 0.0, 0.0, 0.0], [0.0, 20.0, 80.0, 0.0, 0.0]]
    lines = [logs.record(e, 4, constrained_ranks=own) for e, own in enumerate(shares, 1)]
    three = run_log.read(logs.write(tmp_path, lines))
    assert three.rank_histograms() == {2.0: [50, 50, 0], 3.0: [0, 20, 80]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no run, there is no log.jsonl"),
        ("", "empty, the run has not logged anything yet"),
        ('{"epoch": 1, "st', "empty, the run has not logged anything yet"),
        ('{"epoch": 1, "step": 2}\nnonsense\n{"epoch": 1, "step": 4}\n', "damaged, line 2"),
    ],
)
def test_what_is_no_log_is_refused_by_name(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(InputError, match=reason) as error:
        run_log.read(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(InputError, match="run: no run, there is no log.jsonl"):
        run_log.read(tmp_path / "run")


@pytest.mark.parametrize("text", ["", "{}", '{"starts": [3]}', json.dumps([])])
def test_a_damaged_run_json_is_refused_by_name(tmp_path, text):
    (logs.write(tmp_path, logs.records()) / "run.json").write_text(text)
    with pytest.raises(InputError, match="run.json: (no result file|starts is)"):
        run_log.read(tmp_path)
