"""Do 8-bit caches serve phase two: joined, refused beside others, and trained on as what their codes stand for?"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from cache_samples import SCALES, SHAPE, commit, spec_of
from tiny_llm import write_tiny_llm

from vlmx.cache_specs.ids import image_id
from vlmx.cache_specs.quantize import Quantization
from vlmx.cache_specs.reader import open_cache
from vlmx.cache_specs.spec import DType
from vlmx.cache_specs.writer import CacheWriter
from vlmx.errors import CacheError

IDS = [image_id(b"%d" % number) for number in (0, 1, 3)]


def make(root: Path, backbone: str, dtype: DType, scales: Quantization) -> None:
    with CacheWriter(root, spec_of(dtype, backbone), SHAPE, slots=4, calibrate=lambda: scales) as writer:
        writer.plan(IDS)
        for plan in writer.next_share():
            commit(writer, plan)
        writer.seal()


def test_joined_caches_keep_the_scales_of_their_channels(tmp_path: Path) -> None:
    finer = Quantization(offset_D=SCALES.offset_D + 1, scale_D=SCALES.scale_D / 2)
    make(tmp_path, "a", "int8", SCALES)
    make(tmp_path, "b", "int8", finer)
    joined = open_cache("b+a", tmp_path)
    np.testing.assert_array_equal(joined.scale, np.concatenate([finer.scale_D, SCALES.scale_D]))
    np.testing.assert_array_equal(joined.offset, np.concatenate([finer.offset_D, SCALES.offset_D]))
    alone = [open_cache(name, tmp_path).read_float32(IDS) for name in "ba"]
    np.testing.assert_array_equal(joined.read_float32(IDS), np.concatenate(alone, axis=2))


def test_eight_bits_are_not_joined_with_others(tmp_path: Path) -> None:
    make(tmp_path, "a", "int8", SCALES)
    make(tmp_path, "b", "float16", SCALES)
    with pytest.raises(CacheError, match="cannot be joined") as caught:
        open_cache("a+b", tmp_path)
    assert caught.value.why == "dtypes: int8, float16"


def test_training_sees_what_the_codes_stand_for(tmp_path: Path) -> None:
    from vlmx.data.mini import study
    from vlmx.extract.backbones.base import build_backbone
    from vlmx.extract.runner import extract
    from vlmx.extract.sources import ImageRecord, ImageSource
    from vlmx.train.command import train

    caches = tmp_path / "caches"
    keys = study.scene_keys("train")[:8]
    images = tuple(ImageRecord(key=key, load=partial(study.image_bytes_of, key)) for key in keys)
    source = ImageSource(name="mini", describe="some scenes", images=images)
    rows = [
        {
            "id": key,
            "image": key,
            "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cube"}],
        }
        for key in keys
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    write_tiny_llm(tmp_path / "llm")
    dtypes: tuple[DType, DType] = ("float16", "int8")
    tokens, losses = [], []
    for dtype in dtypes:
        backbone = build_backbone("vit-mini-scenes", res=(64, 64), weights="random:0")
        cache = extract(backbone, [source], root=caches / dtype, dtype=dtype).cache
        run = tmp_path / f"run-{dtype}"
        options = ["--cache", cache, "--caches", caches / dtype, "--data", tmp_path / "data.json"]
        options += ["--llm", tmp_path / "llm", "--out", run]
        settings = ["images=mini", "prompt=plain", "global_batch=4", "max_steps=3", "precision=fp32"]
        train([*map(str, options), *settings], standalone_mode=False)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
        tokens.append(open_cache(cache).read_float32([image_id(study.image_bytes_of(keys[0]))]))
    assert len(losses[0]) == len(losses[1]) > 0
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-3)
    error = np.linalg.norm(tokens[1] - tokens[0]) / np.linalg.norm(tokens[0])
    assert 0 < error < 0.02
