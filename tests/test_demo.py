"""The demo: photos of every kind, the encoder, what is drawn, and a table that checks before it compares."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageColor

from hvprune import demo, ops, reference
from hvprune.demo import DemoError, encoder, picture

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.jpg"))
GRID = (6, 6)


@pytest.fixture
def ramp() -> Image.Image:
    """Dark at the left, bright at the right."""
    return Image.linear_gradient("L").rotate(90).resize((64, 48))


@pytest.fixture
def odd_one_out() -> Image.Image:
    """Grey everywhere but for the patch in row 2, column 4 of a 6 x 6 grid."""
    photo = Image.new("RGB", (60, 60), (120, 120, 120))
    photo.paste((220, 30, 30), (40, 20, 50, 30))
    return photo


@pytest.fixture
def no_timing(monkeypatch):
    monkeypatch.setattr(demo, "_median_ms", lambda calls, device: [0.5, 2.0][: len(calls)])


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def write_bomb(path: Path, side: int) -> None:
    """A PNG of a few hundred bytes that claims to be side x side pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("L", "png"), ("1", "png"), ("P", "png"), ("LA", "png"), ("RGBA", "png"), ("RGB", "webp"), ("CMYK", "jpg"),
        ("CMYK", "tif"), ("YCbCr", "jpg"), ("LAB", "tif"), ("I", "tif"), ("F", "tif"),
    ],
)  # fmt: skip
def test_load_photo_takes_every_mode(ramp, tmp_path, mode, suffix):
    image = ramp.convert("RGB").convert(mode) if mode not in ("I", "F", "LA") else ramp.convert(mode)
    image.save(tmp_path / f"photo.{suffix}")
    photo = encoder.load_photo(tmp_path / f"photo.{suffix}", GRID)
    assert (photo.mode, photo.size) == ("RGB", ramp.size)
    left, right = (sum(photo.resize((2, 1), Image.Resampling.BOX).getpixel((x, 0))) for x in (0, 1))
    assert right > left + 200


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_load_photo_scales_16_bits(ramp, tmp_path, suffix):
    deep = struct.pack(f"<{64 * 48}H", *(40 * value for value in ramp.tobytes()))
    Image.frombytes("I;16", ramp.size, deep).save(tmp_path / f"photo.{suffix}")
    photo = encoder.load_photo(tmp_path / f"photo.{suffix}", GRID)
    assert photo.getextrema() == ((0, 255),) * 3


def test_load_photo_puts_transparency_over_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "photo.png")
    assert encoder.load_photo(tmp_path / "photo.png", GRID).getpixel((3, 3)) == (255, 255, 255)


def test_load_photo_turns_by_exif(ramp, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise
    ramp.save(tmp_path / "photo.jpg", exif=exif)
    photo = encoder.load_photo(tmp_path / "photo.jpg", GRID)
    assert photo.size == (48, 64)
    assert photo.getpixel((24, 0))[0] < 20 < 230 < photo.getpixel((24, 63))[0]


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_load_photo_takes_the_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"photo.{suffix}", save_all=True, append_images=frames[1:])
    red, _, blue = encoder.load_photo(tmp_path / f"photo.{suffix}", GRID).getpixel((8, 8))
    assert red > 200 > 50 > blue


def test_load_photo_says_what_is_wrong(ramp, tmp_path):
    whole = tmp_path / "whole.jpg"
    ramp.save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    ramp.resize((6, 5)).save(tmp_path / "tiny.png")
    write_bomb(tmp_path / "large.png", 10_000)  # Pillow itself only warns of this one
    write_bomb(tmp_path / "huge.png", 60_000)
    for name, message in {
        "missing.png": r"photo must be a readable image file, got '.*missing\.png' \(No such file or directory\)$",
        "": r"photo must be a readable image file, got .*\(Is a directory\)$",
        "cut.jpg": r"photo must be a readable image file, got '.*cut\.jpg' \(.*(?i:truncated)",
        "empty.png": r"photo must be a readable image file, got '.*empty\.png' \(cannot identify",
        "text.png": r"photo must be a readable image file, got '.*text\.png' \(cannot identify",
        "tiny.png": r"photo must be at least 6 x 6 pixels for a grid of 6x6 patches, got 6 x 5$",
        "large.png": r"photo must be of at most \d+ pixels, got more in '.*large\.png'$",
        "huge.png": r"photo must be of at most \d+ pixels, got more in '.*huge\.png'$",
    }.items():
        with pytest.raises(DemoError, match=message):
            encoder.load_photo(tmp_path / name, GRID)


def test_encode_states_what_it_returns(odd_one_out):
    queries, keys, features = encoder.encode(odd_one_out, (4, 5))
    assert queries.shape == keys.shape == (1, 4, 20, 16)
    assert torch.equal(queries, -keys)
    torch.testing.assert_close(features.mean(1), torch.zeros(1, 14), atol=1e-5, rtol=0)
    for head, width in enumerate((3, 3, 8, 14)):
        assert not keys[0, head, :, width:].any()
    assert torch.equal(keys[0, 3, :, :14], features[0])


def test_encode_finds_the_odd_one_out(odd_one_out):
    queries, keys, _ = encoder.encode(odd_one_out, GRID)
    importance = reference.attention_importance(queries, keys, num_prefix_tokens=0)
    assert importance.argmax().item() == 2 * 6 + 4


def test_encode_takes_a_photo_without_contrast():
    queries, keys, features = encoder.encode(Image.new("RGB", (60, 60), "teal"), GRID)
    assert not features.any()
    importance = reference.attention_importance(queries, keys, num_prefix_tokens=0)
    torch.testing.assert_close(importance, torch.full((1, 36), 1 / 36))


def test_encode_sees_the_orientation_of_an_edge():
    stripes = Image.new("RGB", (84, 84), "black")
    for x in range(0, 42, 7):
        stripes.paste("white", (x, 0, x + 3, 84))  # upright at the left
        stripes.paste("white", (42, 2 * x, 84, 2 * x + 6))  # lying at the right
    _, keys, _ = encoder.encode(stripes, GRID)
    orientation = keys[0, 2, :, :8].view(6, 6, 8)[1:-1, [1, 4]].mean(0)
    assert orientation.argmax(-1).tolist() == [0, 4]


def test_encode_crops_about_the_centre(odd_one_out):
    encoded = []
    for side in ("yellow", "blue"):
        wide = Image.new("RGB", (160, 60), side)
        wide.paste((120, 120, 120), (40, 0, 120, 60))  # interpolation reads a little beyond the crop
        wide.paste(odd_one_out, (50, 0))
        encoded.append(encoder.encode(wide, GRID))
    assert all(map(torch.equal, *encoded))
    assert encoded[0][2].any()


@pytest.mark.parametrize("budget", [0, 5, 9, 20, 36])
def test_stages_of_hivtp_are_told_apart(odd_one_out, budget):
    inputs = encoder.encode(odd_one_out.rotate(20), GRID)
    importance = ops.attention_importance(*inputs[:2], num_prefix_tokens=0)
    _, (fixed, natural) = demo._hivtp(*inputs, importance, GRID, [budget], 0.25, "auto")
    # Each 3 x 3 region keeps floor(0.25 * 9) = 2 tokens, then one of each of its four windows.
    assert natural.masks[picture.IMPORTANT].sum() == 4 * 2
    assert fixed.masks[picture.IMPORTANT].sum() == min(budget, 8)
    assert natural.masks[picture.COVERING].sum() <= 16
    assert not natural.masks[picture.FILLING].any()
    for panel, num_tokens in ((fixed, budget), (natural, None)):
        selection = ops.hierarchical_select(importance, GRID, num_tokens=num_tokens)
        assert torch.equal(sum(mask.int() for mask in panel.masks.values()), selection.mask[0].int())


def test_stages_of_vispruner_are_told_apart(odd_one_out):
    inputs = encoder.encode(odd_one_out.rotate(20), GRID)
    importance = ops.attention_importance(*inputs[:2], num_prefix_tokens=0)
    _, (panel,) = demo._vispruner(*inputs, importance, GRID, [9], 0.25, "auto")
    best = importance[0].argsort(descending=True, stable=True)[:4]
    assert panel.masks[picture.IMPORTANT].nonzero().flatten().tolist() == sorted(best.tolist())
    selection = ops.vispruner_select(inputs[2], importance, 9)
    assert torch.equal(sum(mask.int() for mask in panel.masks.values()), selection.mask[0].int())


def test_kept_patches_are_framed_and_dropped_ones_dim():
    mask = torch.zeros(36, dtype=torch.bool)
    mask[[7, 8]] = True  # row 1, columns 1 and 2
    image = picture._kept(Image.new("RGB", (120, 120), "white"), {picture.COVERING: mask}, GRID, 20)
    assert image.getpixel((30, 30)) == image.getpixel((40, 30)) == (255, 255, 255)  # no line between neighbours
    assert image.getpixel((20, 30)) == image.getpixel((59, 39)) == ImageColor.getrgb(picture.COVERING)
    assert max(image.getpixel((19, 30))) < 90


def test_heat_map_spans_its_colours_on_a_log_scale():
    importance = torch.tensor([1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    image = picture._heat_map(importance, (1, 5), (5, 1))
    for x, anchor in enumerate(picture.HEAT):
        actual, expected = image.getpixel((x, 0)), ImageColor.getrgb(anchor)
        assert max(abs(a - b) for a, b in zip(actual, expected, strict=True)) <= 2
    uniform = picture._heat_map(torch.full((4,), 0.25), (2, 2), (2, 2))
    assert uniform.getpixel((0, 0)) == uniform.getpixel((1, 1))


@pytest.mark.parametrize("photo", EXAMPLES, ids=lambda path: path.stem)
def test_run_on_the_examples(photo, tmp_path, capsys, no_timing):
    assert demo.run(photo, tmp_path / "out.png")
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    kept = {
        tuple(line[:-5]): int(line[-5]) for line in table if line and line[0].endswith(("vtp_select", "ner_select"))
    }
    natural = kept.pop(("hivtp_select", "natural"))
    assert 252 <= natural <= 288
    assert kept == {(op, "K", "=", str(k)): k for op in ("hivtp_select", "vispruner_select") for k in (64, 128)}
    with Image.open(tmp_path / "out.png") as image:
        assert image.width > image.height > 2 * picture.SIDE


@pytest.mark.parametrize("method", demo.METHODS)
@pytest.mark.parametrize("grid", [(1, 1), (3, 7), (8, 2)])
def test_run_on_any_grid(odd_one_out, tmp_path, capsys, no_timing, grid, method):
    odd_one_out.save(tmp_path / "photo.png")
    assert demo.run(tmp_path / "photo.png", tmp_path / "out.png", grid=grid, methods=[method])
    assert (tmp_path / "out.png").stat().st_size > 0


def test_run_measures(odd_one_out, tmp_path, capsys):
    odd_one_out.save(tmp_path / "photo.png")
    assert demo.run(tmp_path / "photo.png", tmp_path / "out.png", grid=GRID, num_tokens=[4], methods=["hivtp"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "_select" in line]
    assert lines
    for *_, ms, reference_ms, ratio in lines:
        assert float(ratio.rstrip("x")) == pytest.approx(float(reference_ms) / float(ms), rel=0.2, abs=0.1)


def test_run_prints_no_ratio_for_the_reference(odd_one_out, tmp_path, capsys, no_timing):
    odd_one_out.save(tmp_path / "photo.png")
    assert demo.run(tmp_path / "photo.png", tmp_path / "out.png", grid=GRID, backend="reference")
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "_select" in line]
    assert len(lines) == 7
    assert all(line[-2] == "reference" and float(line[-1]) > 0 for line in lines)


def test_run_prints_no_ratio_for_a_wrong_result(odd_one_out, tmp_path, capsys, no_timing, monkeypatch):
    right = reference.diverse_select

    def wrong(*args, **options):
        selection = right(*args, **options)
        return selection._replace(mask=~selection.mask)

    monkeypatch.setattr(reference, "diverse_select", wrong)
    odd_one_out.save(tmp_path / "photo.png")
    assert not demo.run(tmp_path / "photo.png", tmp_path / "out.png", grid=GRID, num_tokens=[4])
    lines = [line for line in capsys.readouterr().out.splitlines() if "_select" in line]
    assert [line.split()[0] for line in lines if "DIFFERS" in line] == ["diverse_select", "vispruner_select"]
    assert not any("x" in line.split()[-1] for line in lines if "DIFFERS" in line)
