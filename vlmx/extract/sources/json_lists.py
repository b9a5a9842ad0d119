"""Which images does a LLaVA-style .json, .jsonl or .parquet name?"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vlmx.cache_specs.ids import list_images, table_name
from vlmx.data.llava665k import missing_images
from vlmx.errors import DataError
from vlmx.extract.sources.folder import file_record
from vlmx.extract.sources.source import ImageSource, describe, first


def open_json(path: Path, root: Path, name: str | None) -> ImageSource:
    """The images that the rows name, each once, in the order of first appearance; keys are as in the rows.

    Args:
        path: the list.
        root: the folder that its image paths start from.
        name: of the image table.

    Raises:
        DataError: the file is damaged, rows break the schema, it names no image, or images are missing.
    """
    rows = _rows(path)
    keys: dict[str, None] = {}
    text_only = 0
    problems: list[str] = []
    for number, row in enumerate(rows, start=1):
        image = row.get("image") if isinstance(row, dict) else None
        if not isinstance(row, dict):
            problems.append(f"row {number} is a {type(row).__name__}, not an object")
        elif image is None:
            text_only += 1
        elif not isinstance(image, str) or not image:
            problems.append(f"row {number}: 'image' is {json.dumps(image)[:60]}, not one path")
        else:
            keys[image] = None
    if problems:
        raise DataError(
            f"{len(problems):,} of {len(rows):,} rows of {path} are not LLaVA-style rows",
            why=first(problems),
            fix='a row is {"id": ..., "image": "path/of/one.jpg", "conversations": [...]}; no "image" means text only',
        )
    if not keys:
        raise DataError(f"{path} names no image", why=f"{text_only:,} rows, all text only")
    found = missing_images(keys, root)
    if found.missing:
        raise DataError(
            f"{len(found.missing):,} of {len(keys):,} images that {path} names are missing",
            why=f"not below {root}: {list_images(found.missing)}",
            fix="give the folder that the paths start from with --image-root, or fetch the missing files",
        )
    left_out = f"{text_only:,} text-only rows" if text_only else ""
    return ImageSource(
        name=name or table_name(path.stem),
        describe=describe(f"{path} ({len(rows):,} rows)", len(keys), left_out),
        images=tuple(file_record(key, os.path.join(root, found.renamed.get(key, key))) for key in keys),
    )


def _rows(path: Path) -> list[Any]:
    """The rows of a .json list, of a .jsonl file with one row a line, or of a .parquet file."""
    if path.suffix.lower() == ".parquet":
        from vlmx.extract.sources.parquet import named_images

        return [{"image": name} for name in named_images(str(path))]
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".jsonl":
            rows: Any = []
            for number, line in enumerate(text.split("\n"), start=1):
                if line.strip():
                    try:
                        rows.append(json.loads(line))
                    except json.JSONDecodeError as error:
                        raise DataError(f"cannot read {path}", why=f"line {number}: {error}") from error
        else:
            rows = json.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"cannot read {path}", why=str(error)) from error
    if not isinstance(rows, list):
        raise DataError(
            f"{path} is not a list of rows",
            why=f"its top level is a {type(rows).__name__}",
            fix="give a LLaVA-style JSON",
        )
    return rows
