"""Do other libraries, and other versions of zarr, read what vlmx stores, and write the same bytes?

$VLMX_OTHER_PYTHON names a Python with another zarr; `make test-newest-zarr` makes one.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from cache_samples import GOOD, SCALES, tokens_of, write

from vlmx.cache_specs.reader import open_cache
from vlmx.cache_specs.spec import Codec, DType

PROFILES: list[tuple[DType, Codec]] = [
    ("float16", "crc32c"),
    ("bfloat16", "crc32c"),
    ("float32", "crc32c"),
    ("int8", "crc32c"),
    ("bfloat16", "blosc"),
    ("int8", "blosc"),
]
OTHER = os.environ.get("VLMX_OTHER_PYTHON", "")


@pytest.mark.parametrize(("dtype", "codec"), PROFILES)
def test_tensorstore_reads_the_same_numbers(tmp_path: Path, dtype: DType, codec: Codec) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    cache = write(tmp_path, GOOD, dtype, codec=codec)
    expected_BND = np.stack([tokens_of(image, dtype) for image in GOOD])

    def opened(name: str) -> np.ndarray:
        store = {"driver": "file", "path": str(cache / "tokens.zarr" / name)}
        return np.asarray(tensorstore.open({"driver": "zarr3", "kvstore": store}).result().read().result())

    np.testing.assert_array_equal(opened("tokens"), expected_BND)
    np.testing.assert_array_equal(open_cache(cache).read(GOOD), expected_BND)
    if dtype == "int8":
        np.testing.assert_array_equal(opened("scale"), SCALES.scale_D)
        np.testing.assert_array_equal(opened("offset"), SCALES.offset_D)


@pytest.mark.skipif(not OTHER, reason="no other zarr: see `make test-newest-zarr`")
@pytest.mark.parametrize(("dtype", "codec"), PROFILES)
def test_another_zarr_reads_and_writes_the_same(tmp_path: Path, dtype: DType, codec: Codec) -> None:
    cache = write(tmp_path, GOOD, dtype, codec=codec)
    script = Path(__file__).with_name("zarr_main.py")
    command = [OTHER, "-W", "error", str(script), str(cache), codec, str(tmp_path / "theirs.zarr")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    tokens_BND = np.stack([tokens_of(image, dtype) for image in GOOD])
    assert said["tokens"] == hashlib.sha256(tokens_BND.tobytes()).hexdigest()
    assert said["shards"] > 2
    assert said["other_shards"] == [], said["zarr"]
