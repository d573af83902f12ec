"""Decoding and crops against torchvision's functions, and their distributions."""

import struct

import numpy as np
import pytest
import tiny
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from oracles import ks
from PIL import Image

from utils.data.cropping import (
    CropGroup,
    center_crop,
    crop_box,
    decode,
    random_crops,
    resized_crop,
    split_crops,
)
from utils.data.random_draws import CROP_ATTEMPTS, NUM_DRAWS, Draw, uniforms


def test_decode_keeps_rgb_as_it_is(tmp_path):
    Image.fromarray(tiny.photo(33, 50)).save(tmp_path / "a.jpg", quality=90)
    image = decode(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as opened:
        expected = np.array(opened)
    assert image.dtype == torch.uint8 and image.shape == (3, 33, 50)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
    assert image.permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize("mode, suffix", [
    ("L", "jpg"), ("L", "png"), ("CMYK", "jpg"), ("CMYK", "tiff"), ("P", "png"), ("P", "gif"),
    ("1", "png"), ("RGB", "webp"), ("YCbCr", "jpg"),
])  # fmt: skip
def test_decode_makes_rgb_of_other_modes(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(tiny.photo(20, 30)).convert(mode).save(path)
    with Image.open(path) as opened:
        expected = np.array(opened.convert("RGB"))
    assert np.array_equal(decode(path).permute(1, 2, 0).numpy(), expected)
    assert expected.std() > 10


@pytest.mark.parametrize("mode, suffix", [
    ("RGBA", "png"), ("LA", "png"), ("P", "png"), ("P", "gif"), ("RGBA", "webp"), ("L", "png"),
    ("RGB", "png"),
])  # fmt: skip
def test_what_is_transparent_shows_white(tmp_path, mode, suffix):
    """A black drawing: white where nothing is drawn, gray where it is half transparent."""
    path = tmp_path / f"a.{suffix}"
    alpha = np.zeros((16, 24), dtype=np.uint8)
    alpha[4:12, 4:12] = 255
    if mode in ("RGBA", "LA"):
        alpha[4:12, 12:20] = 128
    black = Image.new("RGBA", (24, 16), (0, 0, 0, 0))
    black.putalpha(Image.fromarray(alpha))
    if mode in ("RGBA", "LA"):
        black.convert(mode).save(path, lossless=True)
    else:  # one color or level stands for transparency
        drawing = Image.fromarray(np.where(alpha == 255, 0, 200).astype(np.uint8)).convert(mode)
        drawing.save(path, transparency=drawing.getpixel((0, 0)))
    levels = decode(path)
    expected = 255 - alpha.astype(int)
    assert np.abs(levels.numpy() - expected).max() <= 1


@pytest.mark.parametrize("dtype, tags, low, high", [
    (np.float32, {}, 0, 1),
    (np.float32, {281: 80.0, 280: 20.0}, 20, 80),
    (np.float32, {341: 4.0, 340: -4.0}, -4, 4),
    (np.int32, {281: 255}, 0, 255),
    (np.int32, {341: 3000, 340: -1000}, -1000, 3000),
    (np.uint16, {281: 4095}, 0, 4095),
    (np.int16, {}, -(2**15), 2**15 - 1),
])  # fmt: skip
def test_gray_levels_are_scaled_by_their_range(tmp_path, dtype, tags, low, high):
    levels = np.linspace(low, high, 16 * 20).astype(dtype).reshape(16, 20)
    write_tiff(tmp_path / "a.tif", levels, tags)
    expected = (levels.astype(np.float64) - low) / (high - low) * 255
    assert np.abs(decode(tmp_path / "a.tif").numpy() - expected).max() <= 0.51


@pytest.mark.parametrize("levels, tags, words", [
    (np.array([[0.0, 200.0]], np.float32), {}, "its gray levels are 0 to 200, beyond 0 to 1"),
    (np.array([[0.0, np.nan]], np.float32), {}, "its gray levels are nan to nan"),
    (np.array([[0, 255]], np.int32), {}, "its 32-bit gray levels have no range"),
    (np.array([[0, 256]], np.int32), {281: 255}, "its gray levels are 0 to 256, beyond 0 to 255"),
    (np.array([[0, 1]], np.uint16), {281: 0}, "its tags tell gray levels from 0 to 0"),
    (np.array([[0, 1]], np.float32), {341: np.inf}, "its tags tell gray levels from 0 to inf"),
    (np.array([[0, 1]], np.float32), {341: np.nan}, "its tags tell gray levels from 0 to nan"),
    (np.array([[0, 1]], np.float32), {341: 1.0, 340: -np.inf}, "its tags tell .* from -inf to 1"),
])  # fmt: skip
def test_gray_levels_of_an_unknown_range_are_refused(tmp_path, levels, tags, words):
    write_tiff(tmp_path / "a.tif", levels, tags)
    with pytest.raises(ValueError, match=words):
        decode(tmp_path / "a.tif")


@pytest.mark.parametrize("clear", [0, 7, 40000])
def test_the_transparent_level_of_16_bits_shows_white(tmp_path, clear):
    """Levels whose high byte is the same stay as they are."""
    levels = np.array([[0, 1, 7, 40000, 40001, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png", transparency=clear)
    expected = np.where(levels == clear, 255, levels // 256)
    assert (decode(tmp_path / "a.png").numpy() == expected).all()


def write_tiff(path, levels, tags):
    """A gray TIFF of any kind of numbers, byte by byte: Pillow writes no signed 16 bits."""
    height, width = levels.shape
    kind = {"u": 1, "i": 2, "f": 3}[levels.dtype.kind]
    whole = {256: width, 257: height, 258: 8 * levels.itemsize, 259: 1, 262: 1, 273: 0, 277: 1}
    whole |= {278: height, 279: levels.nbytes, 339: kind} | tags
    data = levels.tobytes()
    whole[273] = 8
    entries = b""
    for number, value in sorted(whole.items()):
        code, form = (11, "f") if isinstance(value, float) else (9, "i")  # FLOAT and SLONG
        code = code if number in tags else 4  # LONG
        entries += struct.pack(f"<HHI{form}", number, code, 1, value)
    end = 8 + len(data)
    header = struct.pack("<2sHI", b"II", 42, end)
    path.write_bytes(header + data + struct.pack("<H", len(whole)) + entries + bytes(4))


def test_the_orientation_of_exif_is_ignored(tmp_path):
    image = Image.fromarray(tiny.photo(20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(decode(tmp_path / "a.png").permute(1, 2, 0), image)


@pytest.mark.parametrize("kind", ["png", "little tiff", "big tiff", "pgm"])
def test_decode_scales_16_bits_to_8(tmp_path, kind):
    gray = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(40, 30)
    path = tmp_path / f"a.{kind.split()[-1]}"
    if kind == "pgm":
        path.write_bytes(b"P5 30 40 65535\n" + gray.astype(">u2").tobytes())
    elif kind == "big tiff":
        Image.frombytes("I;16B", (30, 40), gray.astype(">u2").tobytes()).save(path)
    else:
        Image.fromarray(gray).save(path)
    with Image.open(path) as opened:
        assert opened.mode.startswith("I")
    image = decode(path)
    assert image.shape == (3, 40, 30)
    assert np.abs(image.numpy() - gray / 65535 * 255).max() <= 1
    assert image.min() == 0 and image.max() == 255


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_decode_takes_the_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (30, 20), color) for color in ("red", "lime", "blue")]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    image = decode(path)
    assert image.shape == (3, 20, 30)
    assert image[:, 10, 10].tolist() == [255, 0, 0]


def test_decode_ignores_the_orientation_tag(tmp_path):
    image = Image.fromarray(tiny.photo(20, 30))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert decode(tmp_path / "a.jpg").shape == (3, 20, 30)


def test_decode_lets_errors_pass(tmp_path):
    Image.fromarray(tiny.photo(200, 300)).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("half.jpg", "empty.jpg"):
        with pytest.raises(OSError):
            decode(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "none.jpg")


# Cropping

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


@pytest.mark.parametrize("height, width", [(375, 500), (500, 333), (64, 64), (100, 230), (9, 7)])
def test_crop_boxes_are_distributed_as_torchvisions(height, width):
    count = 3000
    draws = uniforms(3, 0, np.arange(count), views=1)[:, 0]
    ours = np.array([crop_box(d, height, width) for d in draws])
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = [T.RandomResizedCrop.get_params(image, SCALE, RATIO) for _ in range(count)]
    for a, b in zip(measures(ours), measures(np.array(theirs)), strict=True):
        assert ks(a, b) < 2.2
    top, left, h, w = ours.T
    assert (top >= 0).all() and (left >= 0).all() and (h > 0).all() and (w > 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()


def measures(boxes: np.ndarray) -> list[np.ndarray]:
    top, left, h, w = boxes.T.astype(float)
    return [top, left, h, w, h * w, w / h, top + h / 2 + left + w / 2]


@pytest.mark.parametrize(
    "height, width", [(30, 400), (400, 30), (32, 400), (400, 32), (1, 500), (500, 1), (1, 1)]
)
def test_crop_boxes_of_elongated_images_are_the_central_ones(height, width):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    expected = {T.RandomResizedCrop.get_params(image, SCALE, RATIO) for _ in range(100)}
    draws = uniforms(0, 0, np.arange(100), views=1)[:, 0]
    assert {crop_box(d, height, width) for d in draws} == expected


def test_crop_box_tries_ten_times():
    draws = np.full(NUM_DRAWS, 0.999)  # the whole area at ratio 4/3 does not fit a square
    central = crop_box(draws, 100, 100)
    assert central == (0, 0, 100, 100)
    last = 2 * (CROP_ATTEMPTS - 1)
    draws[last : last + 2] = 0.0, 0.5  # 20% of the area, square
    draws[[Draw.TOP, Draw.LEFT]] = 0.0, 0.999
    assert crop_box(draws, 100, 100) == (0, 55, 45, 45)
    assert crop_box(torch.from_numpy(draws), 100, 100) == (0, 55, 45, 45)


def test_crop_box_reaches_both_edges_and_takes_other_limits():
    draws = np.full(NUM_DRAWS, 0.5)
    draws[[Draw.TOP, Draw.LEFT]] = 1 - 2**-53
    top, left, h, w = crop_box(draws, 80, 60, scale=(0.25, 0.25))
    assert (h, w) == (35, 35) and (top + h, left + w) == (80, 60)


@pytest.mark.parametrize("size", [32, 96, 224])
def test_resized_crop_is_torchvisions_within_one_gray_level(size):
    pixels = tiny.photo(150, 200)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    boxes = [crop_box(d, 150, 200) for d in uniforms(0, 0, np.arange(20), views=1)[:, 0]]
    for box in [*boxes, (0, 0, 150, 200), (149, 199, 1, 1), (0, 5, 150, 1), (7, 0, 1, 200)]:
        ours = resized_crop(image, box, size)
        assert ours.dtype == torch.uint8 and ours.shape == (3, size, size)
        as_pil = TF.pil_to_tensor(TF.resized_crop(Image.fromarray(pixels), *box, [size, size]))
        as_tensor = TF.resized_crop(image.contiguous(), *box, [size, size], antialias=True)
        for theirs in (as_pil, as_tensor):
            assert (ours.int() - theirs.int()).abs().max() <= 1


def test_random_crops_are_crops():
    """Each of its own size, from a box of its own share of the area."""
    image = torch.from_numpy(tiny.photo(90, 120)).permute(2, 0, 1)
    draws = uniforms(1, 1, np.array([7]), views=5)[0]
    groups = [CropGroup(2, 48), CropGroup(3, 16, (0.05, 0.2))]
    crops = random_crops(image, draws, groups)
    assert crops.dtype == torch.uint8 and crops.shape == (2 * 3 * 48**2 + 3 * 3 * 16**2,)
    large, small = (part[0] for part in split_crops(crops[None], groups))
    assert large.shape == (2, 3, 48, 48) and small.shape == (3, 3, 16, 16)
    for crop, numbers in zip(large, draws[:2], strict=True):
        assert torch.equal(crop, resized_crop(image, crop_box(numbers, 90, 120), 48))
    for crop, numbers in zip(small, draws[2:], strict=True):
        box = crop_box(numbers, 90, 120, scale=(0.05, 0.2))
        assert 0.04 < box[2] * box[3] / (90 * 120) < 0.21
        assert torch.equal(crop, resized_crop(image, box, 16))
    assert not torch.equal(large[0], large[1])
    assert torch.equal(crops, random_crops(image, torch.from_numpy(draws), groups))
    with pytest.raises(ValueError):
        random_crops(image, draws[:4], groups)


@pytest.mark.parametrize("size", [224, 32, 7])
@pytest.mark.parametrize("height, width", [(150, 200), (201, 150), (64, 64), (33, 150)])
def test_center_crop_is_torchvisions_within_one_gray_level(size, height, width):
    pixels = tiny.photo(height, width)
    reference = T.Compose([T.Resize(round(size * 256 / 224)), T.CenterCrop(size), T.PILToTensor()])
    ours = center_crop(torch.from_numpy(pixels).permute(2, 0, 1), size)
    assert ours.shape == (3, size, size) and ours.dtype == torch.uint8 and ours.is_contiguous()
    assert (ours.int() - reference(Image.fromarray(pixels)).int()).abs().max() <= 1
