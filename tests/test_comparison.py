"""What is measured of an encoder, against plain loops and closed forms; the table's texts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import aligned, uniform
from torch import nn
from torch.nn.functional import normalize

from utils.cli import build_comparison
from utils.data.bad_images import BadImages
from utils.data.datasets import read_split
from utils.data.eval_loader import LabeledLoader
from utils.evaluation import comparison, comparison_table
from utils.evaluation.comparison_table import Row
from utils.evaluation.result_files import Encoder, ValImages
from utils.method.encoders import Backbone, build_backbone
from utils.runtime.errors import InputError, printable


def unit(count, size, *, seed=0):
    rows = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    return normalize(rows, dim=1)


def circle(count, *, turn=0.0):
    angle = 2 * math.pi * torch.arange(count, dtype=torch.float64) / count + turn
    return torch.stack([angle.cos(), angle.sin()], dim=1)


@pytest.mark.parametrize(("count", "size"), [(2, 1), (3, 2), (12, 5), (30, 64)])
def test_alignment_and_uniformity_against_loops(count, size):
    one, two = unit(count, size, seed=1), unit(count, size, seed=2)
    assert comparison.alignment(one, two) == pytest.approx(aligned(one, two))
    assert comparison.uniformity(one) == pytest.approx(uniform(one), abs=1e-12)


def test_closed_forms():
    rows = unit(20, 8)
    assert comparison.alignment(rows, rows) == 0
    assert comparison.alignment(rows, -rows) == pytest.approx(4)
    assert comparison.uniformity(rows[:1].repeat(5, 1)) == 0
    assert comparison.uniformity(circle(2)) == pytest.approx(-8)  # d^2 is 4
    # On a circle of n points each has others at 2 - 2 cos(2 pi k / n).
    ring = [math.exp(-2 * (2 - 2 * math.cos(2 * math.pi * k / 9))) for k in range(1, 9)]
    assert comparison.uniformity(circle(9)) == pytest.approx(math.log(sum(ring) / 8))
    turned = comparison.alignment(circle(9), circle(9, turn=0.5))
    assert turned == pytest.approx(2 - 2 * math.cos(0.5))
    # Axes are as far apart as many points can be on average.
    assert comparison.uniformity(torch.eye(50)) == pytest.approx(-4)


def test_the_uniformity_of_crops_is_the_mean_of_both():
    crops = {"x": (3 * unit(6, 4, seed=1), None), "y": (7 * unit(6, 4, seed=2), None)}
    one, two = (normalize(rows, dim=1) for rows, _ in crops.values())
    figures = comparison.crop_figures(crops)
    assert figures["alignment"] == pytest.approx(aligned(one, two), rel=1e-5)
    assert figures["uniformity"] == pytest.approx((uniform(one) + uniform(two)) / 2, rel=1e-5)
    alone = {name: (rows[:1], None) for name, (rows, _) in crops.items()}
    assert comparison.crop_figures(alone) == {"alignment": None, "uniformity": None}


@pytest.mark.parametrize("batch_size", [5, 12])
def test_crops_are_those_of_two_epochs_in_the_order_of_the_images(broken_tree, batch_size):
    """One of twelve images is broken: it has no row, whatever took its place."""
    images = read_split(broken_tree, "val")
    torch.manual_seed(0)
    backbone = build_backbone("conv4")
    network = backbone.module.eval()
    how = {"batch_size": batch_size, "image_size": 16, "seed": 3}
    found = comparison.extract_crops(
        backbone, LabeledLoader(images, bad_images=BadImages(skip=True), **how), "x"
    )
    readable = [i for i in range(12) if images.name(i) != "b/2.jpg"]
    loader = LabeledLoader(images, bad_images=BadImages(skip=True), **how)
    for epoch, (features, labels) in enumerate(found.values(), 1):
        expected = {}
        for batch in loader.epoch(epoch):
            for number, image in zip(batch.index.tolist(), batch.images, strict=True):
                with torch.no_grad():
                    expected[number] = network(image[None])[0]
        assert sorted(expected) == readable and features.shape == (11, 128)
        for row, number in zip(features, readable, strict=True):
            torch.testing.assert_close(row, expected[number])
        assert labels.tolist() == images.labels[readable].tolist()
    assert not torch.equal(found["first crops"][0], found["second crops"][0])


class RefusesNothing(nn.Flatten):
    """As some networks of timm do."""

    def forward(self, images):
        assert len(images)
        return super().forward(images)


def test_a_share_of_no_images_does_not_pass_the_network(image_tree):
    """Of several processes one may have none of a batch."""
    loader = LabeledLoader(read_split(image_tree, "val"), batch_size=12, image_size=4)
    whole = loader.epoch

    def with_an_empty_batch(epoch):
        for batch in whole(epoch):
            parts = (part[:0] for part in (batch.images, batch.index, batch.label))
            yield from (batch, type(batch)(*parts))

    loader.epoch = with_an_empty_batch
    backbone = Backbone(RefusesNothing(), 48, "")
    found = comparison.extract_crops(backbone, loader, "x")
    assert [features.shape for features, _ in found.values()] == [(12, 48), (12, 48)]


def test_images_are_taken_evenly(image_tree, monkeypatch):
    images = read_split(image_tree, "val")
    assert len(comparison.evenly_taken(images)) == 12
    monkeypatch.setattr(comparison, "MOST", 5)
    taken = comparison.evenly_taken(images)
    assert [taken.name(i) for i in range(4)] == [images.name(i) for i in (0, 3, 6, 9)]


class Sleeps(nn.Module):
    """A network that takes so many seconds an image, by a clock that it moves itself."""

    def __init__(self, clock, each):
        super().__init__()
        self.clock, self.each, self.sizes = clock, each, []

    def forward(self, images):
        self.sizes.append(len(images))
        self.clock[0] += (
            self.each * len(images) * (5 if len(self.sizes) < 3 else 1 + len(self.sizes) % 2)
        )  # cold at first, then disturbed every other time
        return images.flatten(1)


@pytest.mark.parametrize(("each", "largest"), [(0.001, 48), (0.02, 16), (10.0, 1)])
def test_speed_by_a_clock(monkeypatch, each, largest):
    """The batch grows until a pass is long; only the warm passes count, for about a second."""
    clock = [0.0]
    monkeypatch.setattr(comparison.time, "perf_counter", lambda: clock[0])
    network = Sleeps(clock, each)
    device = torch.device("cpu")
    speed, batch = comparison.images_per_second(network, batch_size=48, image_size=4, device=device)
    assert batch == largest and speed == pytest.approx(1 / each)
    passes = network.sizes.count(largest)
    assert passes > 3 and passes * largest * each * 1.5 > 1 and network.sizes[-1] == largest


def test_parameters_are_counted():
    assert comparison.num_parameters(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))) == 24
    assert comparison.num_parameters(nn.Flatten()) == 0


NAMES = [
    "CMSF",
    "cmsf",
    "..",
    ".",
    "a/b",
    "a b",
    "a-b",
    "results.json",
    "",
    "\udcff",
    "é",
    "e\u0301",
]


@given(st.lists(st.text() | st.sampled_from(NAMES), min_size=2, max_size=8, unique=True))
def test_two_names_never_have_one_folder(names):
    folders = [build_comparison.folder_name(name) for name in names]
    assert len({folder.lower() for folder in folders}) == len(names)
    for folder in folders:
        assert folder.isascii() and "/" not in folder and 0 < len(folder) < 100
        assert folder.isprintable() and "." not in folder


def test_a_plain_name_is_its_folder():
    assert build_comparison.folder_name("byol_2") == "byol_2"
    assert build_comparison.folder_name("CMSF 2Q").startswith("cmsf-2q~")
    # A plain name cannot be made to look like the folder of another.
    folder = build_comparison.folder_name("CMSF 2Q")
    assert build_comparison.folder_name(folder) != folder


def cells(line):
    """The cells of a line of a Markdown table, without what escapes."""
    found, escaped = [""], False
    for character in line:
        if character == "|" and not escaped:
            found.append("")
        elif character == "\\" and not escaped:
            escaped = True
            continue
        else:
            found[-1] += character
        escaped = False
    assert found[0] == found[-1] == ""
    return [cell[1:-1] for cell in found[1:-1]]


def row(**figures):
    return Row(figures, Encoder("random"), ValImages(), {})


@given(st.lists(st.text(min_size=1), min_size=1, max_size=4, unique=True))
def test_markdown_has_a_line_a_row_whatever_the_names(names):
    rows = {name: row(**{"1-NN": 50.0, "linear": None}) for name in names}
    head, rule, *lines = comparison_table.as_markdown(rows).splitlines()
    assert cells(head) == ["", "1-NN", "linear"] and cells(rule) == ["---", "---:", "---:"]
    assert [cells(line) for line in lines] == [[printable(name), "50.0", "-"] for name in names]
    assert len(comparison_table.as_text(rows).splitlines()) == 1 + len(names)


def test_markdown_names_cannot_be_markup():
    rows = {"*a*|<b>`_[x](y)": row(linear=1.0)}
    line = comparison_table.as_markdown(rows).splitlines()[2]
    assert line == r"| \*a\*\|\<b\>\`\_\[x\](y) | 1.0 |"


def test_columns_have_their_order_and_notes_are_below():
    one = row(parameters=97680, **{"images/s": 13365.6, "alignment": 0.5, "1-NN": 81.25})
    other = row(**{"fine-tuned": 90.0})._replace(images=ValImages("b" * 64, 5, 2))
    one = one._replace(images=ValImages("a" * 64, 5, 2))
    text = comparison_table.as_text({"x": one, "y": other})
    assert text.split("\n")[0].split() == [
        "1-NN",
        "fine-tuned",
        "alignment",
        "images/s",
        "parameters",
    ]
    assert text.split("\n")[1].split() == ["x", "81.2", "-", "0.500", "13,366", "97,680"]
    markdown = comparison_table.as_markdown({"x": one, "y": other})
    assert "\n\nNote: y: on 5 val images of 2 classes (digest bbb" in markdown


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (None, [None, None]),
        (["7"], [7, 7]),
        (["7", "b=9"], [7, 9]),
        (["a=1", "b=2"], [1, 2]),
        (["b=2"], [None, 2]),
    ],
)
def test_settings_for_all_rows_or_for_one(texts, expected):
    found = build_comparison.row_settings(texts, ["a", "b"], flag="--x", parse=int)
    assert found == dict(zip("ab", expected, strict=True))


@pytest.mark.parametrize("texts", [["c=1"], ["1", "2"], ["a=1", "a=2"], ["=1"]])
def test_settings_of_no_row_or_given_twice(texts):
    with pytest.raises(InputError, match=f"--x {texts[-1]}: "):
        build_comparison.row_settings(texts, ["a", "b"], flag="--x")


def test_rows_by_name():
    assert build_comparison.chosen_rows(None, ["a", "b"], flag="--x") == set()
    assert build_comparison.chosen_rows([], ["a", "b"], flag="--x") == {"a", "b"}
    assert build_comparison.chosen_rows(["b"], ["a", "b"], flag="--x") == {"b"}
    with pytest.raises(InputError, match="--x c: "):
        build_comparison.chosen_rows(["b", "c"], ["a", "b"], flag="--x")
