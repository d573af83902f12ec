"""plot_training.py: what is a group, that its picture is one, what it refuses and replaces."""

import importlib
import xml.etree.ElementTree as ElementTree

import logs
import pytest

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


def test_runs_that_differ_by_seed_are_one_group(tmp_path):
    (group,) = SCRIPT.build_groups(seeds(tmp_path))
    assert (group.name, group.label) == ("CMSF2Q", "CMSF2Q (3 runs)")


def test_runs_that_differ_otherwise_are_groups_named_by_it(tmp_path):
    runs = seeds(tmp_path, count=2)
    other = logs.start(settings={"topk": 10, "seed": 5})
    runs.append(str(logs.write(tmp_path / "other", logs.records(), starts=[other])))
    groups = SCRIPT.build_groups(runs)
    assert [group.label for group in groups] == ["CMSF2Q --topk 5 (2 runs)", "CMSF2Q --topk 10"]
    flags = {f"flag_{i}": "a value" for i in range(20)}  # too long for a legend
    logs.write(tmp_path / "other", logs.records(), starts=[logs.start(settings=flags)])
    assert [group.name for group in SCRIPT.build_groups(runs)] == [runs[0], runs[2]]


def test_without_run_json_each_run_is_alone(tmp_path):
    runs = [str(logs.write(tmp_path / name / "run", logs.records())) for name in "ab"]
    assert [group.name for group in SCRIPT.build_groups(runs)] == runs
    assert [group.name for group in SCRIPT.build_groups([f"x={r}" for r in runs])] == ["x"]


def test_a_run_that_goes_on_is_drawn_as_far_as_it_is(tmp_path, capsys):
    one = logs.write(tmp_path / "1", logs.records(3))
    two = logs.write(tmp_path / "2", logs.records(2), tail='{"epoch": 3,')
    (group,) = SCRIPT.build_groups([f"a={one}", f"a={two}"])
    assert group.curve("loss").x == [0.5, 1, 1.5, 2]
    assert capsys.readouterr().out == "a: runs up to epoch 3, 2: drawn as far as the shortest\n"


def test_no_run_counts_twice(tmp_path):
    """By whatever path, with a name or without; under two names it may be."""
    run = logs.write(tmp_path / "run", logs.records(), starts=[logs.start()])
    (tmp_path / "link").symlink_to("run")
    for texts in ([run, f"{run}/log.jsonl"], [f"a={run}", f"a={tmp_path / 'link'}"]):
        with pytest.raises(InputError, match="a run that is there already, under the same name"):
            SCRIPT.build_groups([str(text) for text in texts])
    assert len(SCRIPT.build_groups([f"a={run}", f"b={run}"])) == 2


def test_methods_do_not_mix_in_a_group(tmp_path):
    logs.write(tmp_path / "1", logs.records(), starts=[logs.start()])
    logs.write(tmp_path / "2", logs.records(), starts=[logs.start(method="PseudoCMSF")])
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


@pytest.mark.parametrize(
    ("run", "output", "reason"),
    [
        ("missing", "a.svg", "missing: no run, there is no log.jsonl"),
        ("=run", "a.svg", "=run: not NAME=RUN, the name is empty"),
        ("run", "a.png", "--output a.png: a name that ends in .svg"),
        ("run", "/proc/self/a.svg", "--output /proc/self: "),
    ],
)
def test_what_it_refuses(call_script, tmp_path, monkeypatch, run, output, reason):
    monkeypatch.chdir(tmp_path)
    logs.write(tmp_path / "run", logs.records())
    code, _, err = call_script(SCRIPT, run, "--output", output)
    assert code == 2 and reason in err and err.count("\n") == 1


def test_the_picture(call_script, tmp_path):
    """One replaces another; it is well-formed and shows all groups."""
    runs = seeds(tmp_path, count=2)
    output = tmp_path / "new" / "a.svg"
    for texts, panels, labels in (
        ([f"first={run}" for run in runs], 7, ["first (2 runs)"]),
        ([f"{name}={run}" for name, run in zip("ab", runs, strict=True)], 9, ["a", "b"]),
    ):
        code, out, err = call_script(SCRIPT, *texts, "--output", output)
        assert (code, err) == (0, "")
        assert out.endswith(f"a.svg: {panels} panels, {', '.join(labels)}\n")
        words = {part.text for part in ElementTree.parse(output).getroot().iter()}
        assert {*labels, "loss", "epochs"} <= words


def test_it_runs_as_a_script(run_script, tmp_path):
    logs.write(tmp_path / "run", logs.records(), starts=[logs.start()])
    done = run_script("eval/plot_training.py", "run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "training.svg: 7 panels, CMSF2Q\n"
    assert (tmp_path / "training.svg").exists()


def test_it_replaces_no_other_file(call_script, tmp_path):
    run = logs.write(tmp_path / "run", logs.records(), starts=[logs.start()])
    image = tmp_path / "image.svg"
    image.write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    code, _, err = call_script(SCRIPT, run, "--output", image)
    assert code == 2 and err.count("\n") == 1 and image.read_text().endswith('svg"/>')
    assert f"--output {image}: is there already and no picture of curves" in err
