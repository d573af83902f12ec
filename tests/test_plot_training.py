"""plot_training.py: what is a group, what its band is, which panels there are, what it refuses."""

import importlib

import logs
import numpy as np
import pytest
from PIL import Image

from utils.reporting import run_log
from utils.runtime.errors import InputError

SCRIPT = importlib.import_module("eval.plot_training")


def seeds(folder, count=3, **figures):
    """Runs that differ by their seed."""
    return [
        str(
            logs.write(
                folder / f"seed_{seed}",
                logs.records(loss=float(seed**2), **figures),
                starts=[logs.start(settings={"seed": seed, "num_workers": seed})],
            )
        )
        for seed in range(count)
    ]


def titles(groups):
    return [panel.title for panel in SCRIPT.build_panels(groups)]


def test_runs_that_differ_by_seed_are_one_group_with_mean_and_band(tmp_path):
    (group,) = SCRIPT.build_groups(seeds(tmp_path))
    assert (group.name, group.label) == ("CMSF2Q", "CMSF2Q (3 runs)")
    x, low, mean, high = group.band("loss")
    assert x.tolist() == [0.5, 1, 1.5, 2, 2.5, 3]
    assert (set(low), set(high)) == ({0.0}, {4.0})  # seeds 0, 1, 2 have losses 0, 1, 4
    assert mean == pytest.approx(5 / 3)


def test_runs_that_differ_otherwise_are_groups_named_by_it(tmp_path):
    runs = seeds(tmp_path, count=2)
    other = logs.start(settings={"topk": 10, "seed": 5})
    runs.append(str(logs.write(tmp_path / "other", logs.records(), starts=[other])))
    groups = SCRIPT.build_groups(runs)
    assert [group.label for group in groups] == ["CMSF2Q --topk 5 (2 runs)", "CMSF2Q --topk 10"]
    flags = {f"flag_{i}": "a value" for i in range(20)}  # too long for a legend
    logs.write(tmp_path / "other", logs.records(), starts=[logs.start(settings=flags)])
    assert [group.name for group in SCRIPT.build_groups(runs)] == ["seed_0", "other"]


def test_without_run_json_each_run_is_alone(tmp_path):
    runs = [str(logs.write(tmp_path / name / "run", logs.records())) for name in "ab"]
    assert [group.name for group in SCRIPT.build_groups(runs)] == runs
    assert [group.name for group in SCRIPT.build_groups([f"x={r}" for r in runs])] == ["x"]


def test_a_run_that_goes_on_is_drawn_as_far_as_it_is(tmp_path, capsys):
    one = logs.write(tmp_path / "1", logs.records(3))
    two = logs.write(tmp_path / "2", logs.records(2), tail='{"epoch": 3,')
    (group,) = SCRIPT.build_groups([f"a={one}", f"a={two}"])
    assert group.band("loss")[0].tolist() == [0.5, 1, 1.5, 2]
    assert capsys.readouterr().out == "a: runs up to epoch 3, 2: drawn as far as the shortest\n"


def test_no_run_counts_twice(tmp_path):
    """By whatever path, with a name or without; under two names it may be."""
    run = logs.write(tmp_path / "run", logs.records(), starts=[logs.start()])
    (tmp_path / "link").symlink_to("run")
    for texts in ([run, f"{run}/log.jsonl"], [f"a={run}", f"a={tmp_path / 'link'}"]):
        with pytest.raises(InputError, match="a run that is there already, under the same name"):
            SCRIPT.build_groups([str(text) for text in texts])
    assert len(SCRIPT.build_groups([f"a={run}", f"b={run}"])) == 2


def test_a_figure_that_one_run_lacks_is_no_figure_of_the_group(tmp_path):
    """A band of some of the runs would be taken for one of all."""
    one = logs.write(tmp_path / "1", logs.records(loss=None))
    two = logs.write(tmp_path / "2", logs.records())
    (group,) = SCRIPT.build_groups([f"a={one}", f"a={two}"])
    assert not group.has("loss") and group.has("spread")
    gap = [*logs.records()[:-2], logs.record(3, 4, loss=None)]
    (group,) = SCRIPT.build_groups([f"a={logs.write(tmp_path / '1', gap)}", f"a={two}"])
    assert (
        np.isnan(group.band("loss")[1:, -1]).all() and np.isfinite(group.band("loss")[:, 0]).all()
    )


def test_panels_of_one_and_of_several_groups(tmp_path):
    alone = SCRIPT.build_groups([str(logs.write(tmp_path / "1", logs.records()))])
    first = ["loss", "purity of neighbors", "k-NN accuracy"]
    rest = ["effective rank", "spread", "learning rate", "speed"]
    assert titles(alone) == first + rest
    assert SCRIPT.build_panels(alone)[2].figures == {"knn_1": "1-NN", "knn_20": "20-NN"}
    semi = [logs.record(e, 4, confident=50.0, accuracy_confident=90.0) for e in (1, 2)]
    both = SCRIPT.build_groups([str(tmp_path / "1"), str(logs.write(tmp_path / "2", semi))])
    purity = [f"purity of neighbors: {which}" for which in ("constrained", "plain")]
    knn = [f"k-NN accuracy: {k}-NN" for k in (1, 20)]
    pseudo = [f"pseudo-labels: {which}" for which in ("coverage", "their accuracy")]
    assert titles(both) == ["loss", *purity, *knn, *pseudo, *rest]


@pytest.mark.parametrize("kind", ["method", "figures"])
def test_methods_do_not_mix_in_a_group(tmp_path, kind):
    starts = [logs.start()], [logs.start(method="PseudoCMSF")]
    one, two = starts if kind == "method" else (None, None)
    logs.write(tmp_path / "1", logs.records(), starts=one)
    logs.write(tmp_path / "2", logs.records(confident=4.0), starts=two)
    with pytest.raises(InputError, match="a: runs of several methods in one group"):
        SCRIPT.build_groups([f"a={tmp_path / '1'}", f"a={tmp_path / '2'}"])
    assert len(SCRIPT.build_groups([f"a={tmp_path / '1'}", f"b={tmp_path / '2'}"])) == 2


def test_runs_without_a_step_in_common_do_not_mix(tmp_path):
    one = logs.write(tmp_path / "1", [logs.record(1, 4), logs.record(2, 4)])
    two = logs.write(tmp_path / "2", [logs.record(1, 3), logs.record(2, 6)])
    with pytest.raises(InputError, match="a: runs in one group that log no step in common"):
        SCRIPT.build_groups([f"a={one}", f"a={two}"])


def test_named_runs_with_other_flags_are_one_group_with_a_warning(tmp_path, capsys):
    one, two = (
        logs.write(tmp_path / str(k), logs.records(), starts=[logs.start(settings={"topk": k})])
        for k in (5, 10)
    )
    assert len(SCRIPT.build_groups([f"a={one}", f"a={two}"])) == 1
    assert capsys.readouterr().out == "WARNING a: runs that differ in --topk\n"


def drawn(call_script, tmp_path, *runs):
    pytest.importorskip("matplotlib")
    code, out, err = call_script(SCRIPT, *runs, "--output", tmp_path / "new" / "a.png")
    assert (code, err) == (0, "")
    with Image.open(tmp_path / "new" / "a.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    return out, {tuple(pixel) for pixel in np.unique(pixels, axis=0)}


def rgb(color):
    return tuple(bytes.fromhex(color[1:]))


def test_the_picture(call_script, tmp_path):
    """The colors tell that curves were drawn: one for each group."""
    runs = seeds(tmp_path, count=2)
    out, colors = drawn(call_script, tmp_path, *(f"first={run}" for run in runs))
    assert out.endswith("a.png: 7 panels, first (2 runs)\n")
    assert rgb(SCRIPT.COLORS[0]) in colors and rgb(SCRIPT.COLORS[2]) not in colors
    groups = [f"{name}={run}" for name, run in zip("abc", [*runs, runs[0]], strict=True)]
    out, colors = drawn(call_script, tmp_path, *groups)
    assert out.endswith("a.png: 9 panels, a, b, c\n")
    assert rgb(SCRIPT.COLORS[0]) in colors and rgb(SCRIPT.COLORS[2]) in colors


def test_it_runs_as_a_script(run_script, tmp_path):
    pytest.importorskip("matplotlib")
    logs.write(tmp_path / "run", logs.records(), starts=[logs.start()])
    done = run_script("eval/plot_training.py", "run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout == "training.png: 7 panels, CMSF2Q\n" and (tmp_path / "training.png").exists()
    )


def test_the_picture_of_ranks(call_script, tmp_path):
    pytest.importorskip("matplotlib")
    lines = [logs.record(e, 4, constrained_ranks=[50.0, 30.0, e, 20.0 - e]) for e in range(1, 6)]
    out, _ = drawn(call_script, tmp_path, logs.write(tmp_path / "run", lines))
    assert "7 panels" in out  # no k-NN figures, but the ranks
    from matplotlib.figure import Figure

    (group,) = SCRIPT.build_groups([str(tmp_path / "run")])
    axes = Figure().subplots()
    SCRIPT.draw_ranks(axes, group, "ranks")
    assert [line.get_label() for line in axes.lines] == [f"epoch {e}" for e in (1, 2, 4, 5)]
    assert [list(line.get_ydata())[2] for line in axes.lines] == [1, 2, 4, 5]


def test_what_is_drawn_is_what_was_logged(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    groups = SCRIPT.build_groups([f"a={run}" for run in seeds(tmp_path)])
    axes = Figure().subplots()
    SCRIPT.draw_panel(axes, run_log.PANELS[0], groups)
    assert axes.lines[0].get_ydata() == pytest.approx(5 / 3) and len(axes.collections) == 1
    assert axes.lines[0].get_xdata().tolist() == [0.5, 1, 1.5, 2, 2.5, 3]


@pytest.mark.parametrize(
    ("run", "output", "reason"),
    [
        ("missing", "a.png", "missing: no such file or folder"),
        ("=run", "a.png", "=run: not NAME=RUN, the name is empty"),
        ("run", "a.pdf", "a.pdf: a name that ends in .png"),
        ("run", "/proc/self/a.png", "--output /proc/self: "),
    ],
)
def test_what_it_refuses(call_script, tmp_path, monkeypatch, run, output, reason):
    monkeypatch.chdir(tmp_path)
    logs.write(tmp_path / "run", logs.records())
    code, _, err = call_script(SCRIPT, run, "--output", output)
    assert code == 2 and reason in err and err.count("\n") == 1


def test_it_replaces_no_image(call_script, tmp_path):
    """Pictures of its own it does: `test_the_picture` draws one over another."""
    run = logs.write(tmp_path / "run", logs.records(), starts=[logs.start()])
    image = tmp_path / "image.png"
    Image.new("RGB", (8, 8), "teal").save(image)
    before = image.read_bytes()
    code, _, err = call_script(SCRIPT, run, "--output", image)
    assert code == 2 and err.count("\n") == 1 and image.read_bytes() == before
    assert f"--output {image}: is there already and no picture of curves" in err


def test_without_matplotlib(call_script, tmp_path, without_package):
    without_package("matplotlib")
    code, _, err = call_script(SCRIPT, logs.write(tmp_path / "run", logs.records()))
    assert code == 2 and "matplotlib is missing: pip install matplotlib" in err
    assert err.count("\n") == 1
