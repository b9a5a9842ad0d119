"""Is the encoder's input what the geometry says: decoding, letterbox, normalisation, and where a box lands?"""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vlmx.cache_specs.geometry import Geometry, convert_box
from vlmx.extract.preprocess import UndecodableImage, decode, normalise, place, prepare, source_size

FILL = (123, 116, 103)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def letterbox(height: int, width: int) -> Geometry:
    return Geometry(mode="letterbox", height=height, width=width, fill=FILL)


def test_wide_image_is_padded_above_and_below() -> None:
    placed = place(Image.new("RGB", (4, 2), (10, 20, 30)), letterbox(4, 4))
    rows = np.asarray(placed)[:, 0].tolist()
    assert rows == [[123, 116, 103], [10, 20, 30], [10, 20, 30], [123, 116, 103]]


def test_odd_padding_goes_to_the_right() -> None:
    placed = place(Image.new("RGB", (1, 4), (10, 20, 30)), letterbox(4, 4))
    assert np.asarray(placed)[0].tolist() == [[123, 116, 103], [10, 20, 30], [123, 116, 103], [123, 116, 103]]


def test_image_of_the_target_shape_is_not_resampled() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(place(image, letterbox(8, 12))), np.asarray(image))


def test_normalise_by_hand() -> None:
    pixels = normalise(Image.new("RGB", (2, 1), (255, 0, 51)), (0.5, 0.25, 0.2), (0.5, 0.5, 0.1))
    assert pixels.dtype == np.float32
    assert pixels.flags.c_contiguous
    assert pixels.tolist() == [[[1.0, 1.0]], [[-0.5, -0.5]], [[0.0, 0.0]]]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (80, 132), (96, 48)])
@pytest.mark.parametrize("source_wh", [(300, 200), (201, 333)])
def test_red_rectangle_lands_where_convert_box_says(height: int, width: int, source_wh: tuple[int, int]) -> None:
    photo = Image.new("RGB", source_wh, (0, 0, 255))
    box_source = (50.0, 60.0, 150.0, 140.0)
    ImageDraw.Draw(photo).rectangle((50, 60, 149, 139), fill=(255, 0, 0))
    geometry = letterbox(height, width)
    pixels_CHW = prepare(png(photo), geometry, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert pixels_CHW.shape == (3, height, width)
    red = (pixels_CHW[0] - pixels_CHW[2]) > 0.5  # not the fill, whose channels are nearly equal
    ys, xs = np.nonzero(red)
    found_padded = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    expected_padded = convert_box(box_source, geometry, source_wh, "source", "padded")
    assert np.allclose(found_padded, expected_padded, atol=0.8)


@pytest.mark.parametrize(("mode", "colour"), [("L", 200), ("P", 3), ("RGBA", (1, 2, 3, 0)), ("CMYK", (0, 0, 0, 0))])
def test_every_mode_becomes_rgb(mode: str, colour: int | tuple[int, ...]) -> None:
    file = io.BytesIO()
    Image.new(mode, (3, 2), colour).save(file, "TIFF")
    image = decode(file.getvalue())
    assert (image.mode, image.size) == ("RGB", (3, 2))


def test_exif_rotation_is_not_applied() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees to view
    Image.new("RGB", (4, 2)).save(file, "JPEG", exif=exif)
    assert decode(file.getvalue()).size == source_size(file.getvalue()) == (4, 2)


def test_damaged_files_have_a_reason() -> None:
    jpeg = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(jpeg, "JPEG")
    whole = jpeg.getvalue()
    cases = {
        b"": "the file is empty",
        b"<html>404</html>": "not an image that Pillow knows",
        whole[: len(whole) // 2]: "truncated",
        png(Image.new("RGB", (9, 9)))[:40]: "",
        b"P6\n0 4\n255\n": "",
    }
    for data, words in cases.items():
        with pytest.raises(UndecodableImage) as caught:
            decode(data)
        assert caught.value.reason
        assert words in caught.value.reason
        assert "0x" not in caught.value.reason  # an address would make two runs differ


def test_too_elongated_image_is_refused_instead_of_filling_the_memory() -> None:
    with pytest.raises(UndecodableImage, match="elongated"):
        place(Image.new("RGB", (30_000, 1)), letterbox(64, 64))


def test_the_crop_keeps_the_middle_of_the_resized_photo() -> None:
    photo = Image.effect_noise((124, 124), 80).convert("RGB")
    geometry = Geometry(mode="letterbox", height=56, width=56, fill=(0, 0, 0), crop_pct=0.9)  # 56 / 0.9 = 62.2
    expected = photo.resize((62, 62), Image.Resampling.BICUBIC).crop((3, 3, 59, 59))
    assert place(photo, geometry).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["photo.png", "photo.tif"])
def test_sixteen_bits_become_eight_instead_of_white(tmp_path: Path, name: str) -> None:
    values = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    decoded = np.asarray(decode((tmp_path / name).read_bytes()))
    np.testing.assert_array_equal(decoded, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "floating-point numbers"), (np.int32, "32-bit integers")])
def test_numbers_without_a_white_are_undecodable_instead_of_black(tmp_path: Path, dtype: type, kind: str) -> None:
    Image.fromarray(np.linspace(0, 1, 64).reshape(8, 8).astype(dtype)).save(tmp_path / "photo.tif")
    with pytest.raises(UndecodableImage, match=kind):
        decode((tmp_path / "photo.tif").read_bytes())
