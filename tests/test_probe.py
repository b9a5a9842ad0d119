"""Does the probe read what is in the tokens, and nothing where nothing is? On caches with known tokens."""

from pathlib import Path

import numpy as np
import pytest

from vlmx.cache_specs.geometry import Geometry
from vlmx.cache_specs.ids import ImageEntry, ImageTable, image_id
from vlmx.cache_specs.reader import TokenReader, open_cache
from vlmx.cache_specs.spec import CacheSpec, TokenShape
from vlmx.cache_specs.writer import CacheWriter
from vlmx.data.mini.scenes import SIGN_WH_PX, Scene, SceneObject, scene_of
from vlmx.data.mini.study import scene_keys
from vlmx.errors import CacheError
from vlmx.evaluate import probe
from vlmx.evaluate.probe import area_under_roc, cell_truth, probe_cache, read_probe, write_probe


def cache_of(root: Path, backbone: str, tokens_SND: np.ndarray, keys: list[str]) -> TokenReader:
    spec = CacheSpec(
        backbone=backbone,
        weights_sha256="random:0",
        forward_version=1,
        feature="truth",
        out_norm="none",
        geometry=Geometry(mode="letterbox", height=64, width=64, fill=(0, 0, 0)),
        mean=(0, 0, 0),
        std=(1, 1, 1),
        dtype="float32",
    )
    ids = [image_id(key.encode()) for key in keys]
    table = [ImageEntry(key=key, id=id_, width=64, height=64) for key, id_ in zip(keys, ids, strict=True)]
    ImageTable.merge(root, "mini", table)
    with CacheWriter(root, spec, TokenShape(grid=(8, 8), dim=tokens_SND.shape[-1])) as writer:
        row = {id_: number for number, id_ in enumerate(ids)}
        for plan in writer.plan(ids):
            writer.commit(plan, tokens_SND[[row[id_] for id_ in plan.ids]], {})
        writer.seal()
    return open_cache(spec.name, root)


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(probe, "TRAIN_SCENES", 80)
    monkeypatch.setattr(probe, "TEST_SCENES", 40)
    return [*scene_keys("train")[:80], *scene_keys("test")[:40]]


def test_reads_tokens_that_hold_the_truth(tmp_path: Path, few_scenes: list[str]) -> None:
    cells = np.arange(64)
    place = np.stack([cells // 8, cells % 8], axis=1)
    truths = [cell_truth(scene_of(key), 8, 8) for key in few_scenes]
    tokens = np.stack([np.concatenate([edges, covered[:, None], place], axis=1) for covered, edges in truths])
    result = probe_cache(cache_of(tmp_path, "oracle", tokens.astype(np.float32), few_scenes), tmp_path)
    assert result.position_r2 > 0.999
    assert result.objectness_auc > 0.999
    assert result.box_hit > 99
    assert result.box_hit_position < 50
    assert 0.5 < result.objectness_auc_position < 0.9
    assert (result.train_scenes, result.test_scenes) == (80, 40)
    write_probe(tmp_path, result)
    assert read_probe(tmp_path, result.cache) == result
    assert read_probe(tmp_path, "another") is None


def test_noise_is_not_better_than_position(tmp_path: Path, few_scenes: list[str]) -> None:
    tokens = np.random.default_rng(0).standard_normal((len(few_scenes), 64, 4), dtype=np.float32)
    reader = cache_of(tmp_path, "noise", tokens, few_scenes)
    result = probe_cache(reader, tmp_path)
    assert abs(result.position_r2) < 0.01
    assert result.box_hit == pytest.approx(result.box_hit_position, abs=3)
    assert result == probe_cache(reader, tmp_path)


def test_missing_scenes_are_counted(tmp_path: Path, few_scenes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reader = cache_of(tmp_path, "some", np.ones((len(few_scenes), 64, 2), dtype=np.float32), few_scenes)
    more = [*scene_keys("train")[:82]]
    extra = [ImageEntry(key=key, id=image_id(key.encode()), width=64, height=64) for key in more]
    ImageTable.merge(tmp_path, "mini", extra)
    monkeypatch.setattr(probe, "TRAIN_SCENES", 82)
    with pytest.raises(CacheError, match=r"2 of 82 images.*vlmx extract --backbone some .*--data mini"):
        probe_cache(reader, tmp_path)


def test_truth_of_one_sign() -> None:
    width, height = SIGN_WH_PX
    box = (8, 16, 8 + width, 16 + height)
    sign = SceneObject(shape="sign", color="white", size="large", drawn_box=box, box=box, letter="A")
    covered, edges = cell_truth(Scene(key="x/0", objects=(sign,), cluttered=False), 8, 8)
    assert np.flatnonzero(covered).tolist() == [17, 18, 25, 26]  # rows 2, 3; columns 1, 2 (6 of 8 pixels)
    assert edges[18].tolist() == [12, 4, 2, 14]  # from the middle (20, 20) to left 8, top 16, right 22, bottom 34
    assert not edges[0].any()


def test_area_under_roc() -> None:
    positive = np.array([True, True, False, False])
    assert area_under_roc(np.array([3.0, 4.0, 1.0, 2.0]), positive) == 1.0
    assert area_under_roc(np.array([1.0, 4.0, 3.0, 2.0]), positive) == 0.5
    assert area_under_roc(np.zeros(4), positive) == 0.5
