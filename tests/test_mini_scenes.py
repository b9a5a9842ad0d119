"""Are the mini study's scenes the same on every machine, and is what they say about themselves true of their pixels?"""

import hashlib

import numpy as np
import pytest

from vlmx.data.mini.dice import Dice
from vlmx.data.mini.render import image_bytes, render
from vlmx.data.mini.scenes import Scene, owner_map, sample_scene, scene_of, shape_mask
from vlmx.data.mini.study import image_bytes_of


def test_dice_give_the_published_values() -> None:
    dice = Dice("x")
    dice._state = 1234567  # the seed of the reference values that are quoted for SplitMix64
    assert [dice._next() for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_a_grid_is_the_stream_of_single_draws() -> None:
    one, many = Dice("same"), Dice("same")
    singles = [one._next() >> 32 for _ in range(6)]
    assert many.grid((2, 3), 1000).tolist() == np.array([(z * 1000) >> 32 for z in singles]).reshape(2, 3).tolist()
    assert one.below(1 << 40) == many.below(1 << 40)


@pytest.mark.parametrize(
    ("key", "sha256"),
    [
        ("train/000000", "09d9a68ead3a5d601af89c483df4e17d486a6d45df698efcc09494eeab4accb7"),
        ("train/000004", "16afbd861b6f10c40ea4236bff04735c8afac3b5d04f1c133da91f48f2de8697"),
        ("test/000001", "a318bc6e43c67b3ef90363a4bed6220d27f7540bcd8ba8120fade0936a4f49b5"),
        ("pretrain/000002", "e87b58e8010c05675dc27f9cb4caf0df335f8364705b5e5e942a0e4ff8b5c37e"),
    ],
)
def test_an_image_file_has_the_same_bytes_everywhere(key: str, sha256: str) -> None:
    data = image_bytes_of(key)
    assert data[:13] == b"P6\n64 64\n255\n"
    assert len(data) == 13 + 64 * 64 * 3
    assert hashlib.sha256(data).hexdigest() == sha256


def test_a_scene_is_a_function_of_its_key() -> None:
    assert scene_of("test/000017") == sample_scene("test", 17)
    assert image_bytes(scene_of("test/000017")) == image_bytes(sample_scene("test", 17))


@pytest.mark.parametrize("key", ["test/", "nowhere/000001", "test", "test/-00001"])
def test_a_wrong_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="scene"):
        scene_of(key)


def test_splits_share_no_scene() -> None:
    seen = {split: {sample_scene(split, i).objects for i in range(300)} for split in ("train", "test", "language")}
    assert not seen["train"] & seen["test"]
    assert not seen["language"] & (seen["train"] | seen["test"])


def _true_boxes(scene: Scene) -> list[tuple[int, int, int, int]]:
    owner = owner_map(scene.objects)
    boxes = []
    for number in range(len(scene.objects)):
        rows, columns = np.nonzero(owner == number)
        boxes.append((int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1))
    return boxes


@pytest.mark.parametrize("index", range(0, 60))
def test_boxes_enclose_exactly_what_is_seen(index: int) -> None:
    scene = sample_scene("train", index)
    assert [thing.box for thing in scene.objects] == _true_boxes(scene)


def test_worlds_are_as_described() -> None:
    scenes = [sample_scene("train", i) for i in range(500)]
    bins = [scene for scene in scenes if scene.cluttered]
    tables = [scene for scene in scenes if not scene.cluttered]
    assert len(bins) == 100
    assert {len(scene.objects) for scene in bins} == {7, 8, 9}
    assert {len(scene.objects) - (scene.sign_letter is not None) for scene in tables} <= {2, 3, 4, 5}
    assert 0.5 < sum(scene.sign_letter is not None for scene in tables) / len(tables) < 0.7
    for scene in bins:
        owner = owner_map(scene.objects)
        for number, thing in enumerate(scene.objects):
            x1, y1, x2, y2 = thing.drawn_box
            assert 2 * (owner == number).sum() >= shape_mask(thing.shape, x2 - x1, y2 - y1).sum()
    for scene in tables:
        assert all(thing.box == thing.drawn_box for thing in scene.objects)


def test_pretraining_scenes_hold_one_thing() -> None:
    scenes = [sample_scene("pretrain", i) for i in range(200)]
    assert all(len(scene.objects) == 1 for scene in scenes)
    assert {scene.objects[0].shape for scene in scenes} == {"circle", "square", "triangle", "cross", "sign"}


@pytest.mark.parametrize("color", ["red", "green", "blue", "yellow", "purple"])
def test_pixels_have_the_color_that_the_scene_says(color: str) -> None:
    middle = {"red": (205, 45, 45), "green": (50, 165, 65), "blue": (50, 85, 210), "yellow": (228, 205, 50)}
    expected = middle.get(color, (155, 55, 175))
    found = 0
    for index in range(30):
        scene = sample_scene("test", index)
        pixels, owner = render(scene).astype(int), owner_map(scene.objects)
        for number, thing in enumerate(scene.objects):
            if thing.color == color:
                found += 1
                assert np.abs(pixels[owner == number] - expected).max() <= 15 + 8
    assert found > 5
