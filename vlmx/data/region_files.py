"""Which phrases, boxes and images do the files of RefCOCO, RefCOCO+, RefCOCOg and OCID-Ref name?

Boxes are x1 y1 x2 y2 in pixels of the source image.

| file | form |
| --- | --- |
| refs(...).p | pickle of [{"split", "image_id", "ann_id", "sentences": [{"sent_id", "sent", ...}], ...}] |
| instances.json | {"images": [{"id", "width", "height"}], "annotations": [{"id", "image_id", "bbox": [x, y, w, h]}]} |
| val_expressions.json | {id: {"scene_path", "sentence", "take_id", "bbox": "[x1, y1, x2, y2]", ...}} |

OCID-Ref's own description calls its boxes x, y, width and height; in the files they are two corners.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmx.data.annotation_files import (
    id_of,
    items_of,
    parse_rows,
    read_json,
    read_plain_pickle,
    refuse_unanswered,
    rows_of,
    text_of,
    wrong_split,
)
from vlmx.data.records import Box, Question
from vlmx.data.vqa_files import ONE_TYPE, coco_key
from vlmx.data.wording import Wording, region

OCID_IMAGE_WH = (640, 480)  # of every image of OCID
CLUTTER = ("free", "touching", "stacked")  # OCID's three degrees, by how many objects have been put on the table
_LAST_TAKES = (9, 16, 20)
_OCID_WANTED = "OCID-Ref val, val_expressions.json"


def refcoco_images(paths: Sequence[Path]) -> list[str]:
    """An image key for each expression of the val split."""
    (path,) = paths

    def keys_of(ref: Any) -> list[str]:
        key, expressions = _ref_key(ref), list(ref["sentences"])
        return [key] * len(expressions) if ref["split"] == "val" else []

    return [key for keys in parse_rows(path, rows_of(read_plain_pickle(path)), keys_of) for key in keys]


def _ref_key(ref: Any) -> str:
    return coco_key("train2014", ref["image_id"])


def refcoco_questions(name: str, paths: Sequence[Path], wording: Wording) -> list[Question]:
    """The expressions of the val split, in the order of the file; an id is the expression's `sent_id`."""
    path, instances = paths
    refs = rows_of(read_plain_pickle(path))
    splits = {str(ref["split"]) for ref in refs if isinstance(ref, dict) and "split" in ref}
    if splits and "val" not in splits:
        raise wrong_split(path, f"it has only {', '.join(sorted(splits))}", f"the val split of {name}")
    sizes, boxes, of_image = _instances(instances)

    def questions_of(ref: Any) -> list[Question]:
        if ref["split"] != "val":
            return []
        image, annotation = id_of(ref, "image_id"), id_of(ref, "ann_id")
        of, box = boxes.get(annotation, ("", None))
        if of != image or image not in sizes:
            raise ValueError(f"{instances.name} has no box {annotation} in image {image}")
        return [
            Question(
                id=id_of(expression, "sent_id"),
                benchmark=name,
                image=_ref_key(ref),
                prompt=region(text_of(expression, "sent"), wording),
                kind="box",
                question_type=ONE_TYPE,
                box=box,
                image_wh=sizes[image],
                object_boxes=of_image[image],
            )
            for expression in ref["sentences"]
        ]

    return [question for some in parse_rows(path, refs, questions_of) for question in some]


def _instances(
    path: Path,
) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[str, Box]], dict[str, tuple[Box, ...]]]:
    """Sizes of images, images and boxes of annotations, and all boxes of each image, each by its id."""
    content = read_json(path, object_hook=_without_outline)
    sizes = dict(parse_rows(path, rows_of(content, "images"), _size))
    found = parse_rows(path, rows_of(content, "annotations"), _annotation)
    of_image: defaultdict[str, list[Box]] = defaultdict(list)
    for _, image, box in found:
        of_image[image].append(box)
    boxes = {annotation: (image, box) for annotation, image, box in found}
    return sizes, boxes, {image: tuple(members) for image, members in of_image.items()}


def _without_outline(item: dict[str, Any]) -> dict[str, Any]:
    """Outlines are nine tenths of the file, and nobody asks for them."""
    item.pop("segmentation", None)
    return item


def _size(row: Any) -> tuple[str, tuple[int, int]]:
    width, height = int(row["width"]), int(row["height"])
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels")
    return id_of(row, "id"), (width, height)


def _annotation(row: Any) -> tuple[str, str, Box]:
    """Its id, that of its image, and its box."""
    x, y, width, height = _four_numbers(row["bbox"])
    return id_of(row, "id"), id_of(row, "image_id"), (x, y, x + width, y + height)


def _four_numbers(box: Any) -> Box:
    """A box as it stands in a file.

    Raises:
        TypeError, ValueError: it is something else.
    """
    first, second, third, fourth = map(float, box)
    if not all(map(math.isfinite, (first, second, third, fourth))):
        raise ValueError(f"a box of {box}")
    return first, second, third, fourth


def ocid_ref_images(paths: Sequence[Path]) -> list[str]:
    """An image key for each expression."""
    (path,) = paths
    return parse_rows(path, items_of(read_json(path)), lambda item: _ocid_key(item[1]))


def _ocid_key(row: Any) -> str:
    return f"ocid-ref/OCID-dataset/{row['scene_path']}"


def ocid_ref_questions(name: str, paths: Sequence[Path], wording: Wording) -> list[Question]:
    """In the order of the file; `question_type` is the clutter. Which objects an image has is not published."""
    (path,) = paths
    items = items_of(read_json(path))
    refuse_unanswered(path, [row for _, row in items], "bbox", _OCID_WANTED)

    def question_of(item: tuple[str, Any]) -> Question:
        key, row = item
        take = int(row["take_id"])
        if not 0 <= take <= _LAST_TAKES[-1]:
            raise ValueError(f"'take_id' is {take}, not 0 to {_LAST_TAKES[-1]}")
        listed = row["bbox"]
        return Question(
            id=key,
            benchmark=name,
            image=_ocid_key(row),
            prompt=region(text_of(row, "sentence"), wording),
            kind="box",
            question_type=CLUTTER[bisect_left(_LAST_TAKES, take)],
            box=_four_numbers(json.loads(listed) if isinstance(listed, str) else listed),
            image_wh=OCID_IMAGE_WH,
        )

    return parse_rows(path, items, question_of)
