"""What do the published files of the eleven benchmarks have in them? A few rows of each, in their real schemas.

What is here never changes: tests name its questions and images. Use benchmark_files to write it to a folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHORT = "\nAnswer the question using a single word or phrase."
BEACH = "coco/val2014/COCO_val2014_000000262148.jpg"
SNOW = "coco/val2014/COCO_val2014_000000310196.jpg"
TABLE = "ocid-ref/OCID-dataset/ARID20/floor/left/seq01/rgb/result_2018-08-20-11-45-11.png"
PILE = "ocid-ref/OCID-dataset/YCB10/table/top/curved/seq30/rgb/result_2018-08-24-16-01-02.png"

IMAGES: Mapping[str, tuple[int, int]] = {  # key -> width and height in pixels
    BEACH: (64, 48),
    SNOW: (48, 64),
    "coco/train2014/COCO_train2014_000000098304.jpg": (64, 42),
    "coco/train2014/COCO_train2014_000000581857.jpg": (60, 80),
    "gqa/images/n161313.jpg": (50, 40),
    "gqa/images/n235859.jpg": (40, 40),
    "vizwiz/val/VizWiz_val_00000000.jpg": (36, 48),
    "vizwiz/val/VizWiz_val_00000001.jpg": (36, 48),
    "vizwiz/val/VizWiz_val_00000002.jpg": (48, 36),
    "textvqa/train_images/003a8ae2ef43b901.jpg": (64, 44),
    "textvqa/train_images/00a9f1b8b4e4b4e7.jpg": (64, 64),
    "vg/VG_100K/2.jpg": (60, 40),
    "vg/VG_100K_2/2410408.jpg": (40, 30),
    TABLE: (640, 480),
    PILE: (640, 480),
}


def _annotators(*answers: str, numbered: bool) -> list[dict[str, Any]]:
    """Ten annotators; the last of `answers` is what all the others say."""
    said = [*answers, *[answers[-1]] * (10 - len(answers))]
    return [
        {"answer": answer, "answer_confidence": "yes", **({"answer_id": number} if numbered else {})}
        for number, answer in enumerate(said, start=1)
    ]


def _vqav2_annotation(question_id: int, question_type: str, answer_type: str, *answers: str) -> dict[str, Any]:
    return {
        "question_type": question_type,
        "multiple_choice_answer": answers[-1],
        "answers": _annotators(*answers, numbered=True),
        "image_id": question_id // 1000,
        "answer_type": answer_type,
        "question_id": question_id,
    }


_VQAV2_HEAD = {
    "info": {"year": 2017, "version": "2.0", "description": "This is v2.0 of the VQA dataset."},
    "data_type": "mscoco",
    "data_subtype": "val2014",
    "license": {"name": "Creative Commons Attribution 4.0 International License"},
}
_VQAV2 = {
    "vqav2/v2_OpenEnded_mscoco_val2014_questions.json": {
        **_VQAV2_HEAD,
        "task_type": "Open-Ended",
        "questions": [
            {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
            {"image_id": 262148, "question": "What are the people in the background doing?", "question_id": 262148001},
            {"image_id": 262148, "question": "How many surfboards are there?", "question_id": 262148002},
            {"image_id": 310196, "question": "Is it cold?", "question_id": 310196000},
        ],
    },
    "vqav2/v2_mscoco_val2014_annotations.json": {  # in another order than the questions
        **_VQAV2_HEAD,
        "annotations": [
            _vqav2_annotation(310196000, "is it", "yes/no", "no", "yes"),
            _vqav2_annotation(262148000, "where is the", "other", "at table", "skateboard", "down"),
            _vqav2_annotation(262148001, "what are the", "other", "spectating", "watching"),
            _vqav2_annotation(262148002, "how many", "number", "3", "2"),
        ],
    },
}


def _gqa_row(image: str, question: str, answer: str, structural: str, semantic: str) -> dict[str, Any]:
    return {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "scene"}],
        "entailed": [],
        "equivalent": [],
        "question": question,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": None, "local": "06-person_who"},
        "answer": answer,
        "semanticStr": "select: scene",
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": {"detailed": structural + "Detail", "semantic": semantic, "structural": structural},
        "fullAnswer": f"{answer.capitalize()}.",
    }


_GQA = {
    "gqa/testdev_balanced_questions.json": {
        "201307251": _gqa_row("n161313", "Is it overcast?", "no", "verify", "global"),
        "201640614": _gqa_row("n235859", "Who is wearing the dress?", "women", "query", "rel"),
        "202225914": _gqa_row("n161313", "Is the fence blue or brown?", "brown", "choose", "attr"),
    }
}
_VIZWIZ = {
    "vizwiz/val.json": [
        {
            "image": "VizWiz_val_00000000.jpg",
            "question": "Ok. There is another picture I hope it is a better one.",
            "answers": _annotators("poor image", "unanswerable", numbered=False),
            "answer_type": "unanswerable",
            "answerable": 0,
        },
        {
            "image": "VizWiz_val_00000001.jpg",
            "question": "Can you tell me what is in the can please?",
            "answers": _annotators("soda", "coca cola", numbered=False),
            "answer_type": "other",
            "answerable": 1,
        },
        {
            "image": "VizWiz_val_00000002.jpg",
            "question": "Is this enough light for a photo?",
            "answers": _annotators("yes", numbered=False),
            "answer_type": "yes/no",
            "answerable": 1,
        },
    ]
}


def _textvqa_row(question_id: int, image: str, question: str, *answers: str) -> dict[str, Any]:
    width, height = IMAGES[f"textvqa/train_images/{image}.jpg"]
    return {
        "question": question,
        "image_id": image,
        "image_classes": ["Camera"],
        "flickr_original_url": "https://farm2.staticflickr.com/4/0_o.jpg",
        "flickr_300k_url": "https://c4.staticflickr.com/4/0_z.jpg",
        "image_width": width,
        "image_height": height,
        "answers": [*answers, *[answers[-1]] * (10 - len(answers))],
        "question_tokens": question.rstrip("?").split(),
        "question_id": question_id,
        "set_name": "val",
    }


def _ocr_row(image: str, question: str, tokens: str) -> dict[str, Any]:
    return {
        "question_id": image,
        "image": f"{image}.jpg",
        "text": f"{question}\nReference OCR token: {tokens}{SHORT}",
        "category": "default",
    }


_TEXTVQA = {
    "textvqa/TextVQA_0.5.1_val.json": {
        "dataset_type": "val",
        "dataset_name": "textvqa",
        "dataset_version": "0.5.1",
        "data": [
            _textvqa_row(34602, "003a8ae2ef43b901", "what is the brand of this camera?", "nous les gosses", "dakota"),
            _textvqa_row(34603, "003a8ae2ef43b901", "is this camera digital?", "yes"),
            _textvqa_row(34604, "00a9f1b8b4e4b4e7", "what does the small white text spell?", "copenhagen"),
        ],
    },
    "textvqa/llava_textvqa_val_v051_ocr.jsonl": [  # the same questions in the same order; its ids are those of images
        _ocr_row("003a8ae2ef43b901", "What is the brand of this camera?", "DAKOTA, DIGITAL, Single-Use"),
        _ocr_row("003a8ae2ef43b901", "Is this camera digital?", "DAKOTA, DIGITAL, Single-Use"),
        _ocr_row("00a9f1b8b4e4b4e7", "What does the small white text spell?", "COPENHAGEN"),
    ],
}


def _pope_rows(*negatives: str) -> list[dict[str, Any]]:
    snow, beach = Path(SNOW).name, Path(BEACH).name
    asked = [
        (snow, "snowboard", "yes"),
        (snow, negatives[0], "no"),
        (beach, "person", "yes"),
        (beach, negatives[1], "no"),
    ]
    return [
        {"question_id": number, "image": image, "text": f"Is there a {thing} in the image?", "label": label}
        for number, (image, thing, label) in enumerate(asked, start=1)
    ]


_POPE = {
    "pope/coco_pope_random.json": _pope_rows("car", "vase"),
    "pope/coco_pope_popular.json": _pope_rows("dining table", "chair"),
    "pope/coco_pope_adversarial.json": _pope_rows("backpack", "handbag"),
}
_TALLYQA = {
    "tallyqa/test.json": [
        {
            "answer": 2,
            "data_source": "imported_genome",
            "image": "VG_100K_2/2410408.jpg",
            "image_id": 92410408,
            "question": "How many headlights does the bus have?",
            "question_id": 30095774,
            "issimple": True,
        },
        {
            "answer": 0,
            "data_source": "amt",
            "image": "VG_100K_2/2410408.jpg",
            "image_id": 92410408,
            "question": "How many people on the bus wear a hat?",
            "question_id": 40000012,
            "issimple": False,
        },
        {
            "answer": 15,
            "data_source": "imported_genome",
            "image": "VG_100K/2.jpg",
            "image_id": 90000002,
            "question": "How many windows?",
            "question_id": 30000041,
            "issimple": True,
        },
    ]
}


def _ref(ref_id: int, split: str, annotation: int, image: int, sentences: Mapping[int, str]) -> dict[str, Any]:
    return {
        "sent_ids": list(sentences),
        "file_name": f"COCO_train2014_{image:012d}_{ref_id}.jpg",
        "ann_id": annotation,
        "ref_id": ref_id,
        "image_id": image,
        "split": split,
        "sentences": [
            {"tokens": text.split(), "raw": text.upper(), "sent_id": sent_id, "sent": text}
            for sent_id, text in sentences.items()
        ],
        "category_id": 1,
    }


REFS = [
    _ref(0, "train", 3007, 98304, {0: "the lady with the blue shirt"}),
    _ref(1, "val", 1719310, 581857, {3: "left man", 4: "man in a red hat"}),
    _ref(2, "testA", 3008, 98304, {5: "dog"}),
    _ref(3, "val", 1719311, 581857, {6: "right one"}),
]


def _instance(annotation: int, image: int, box_xywh: list[float]) -> dict[str, Any]:
    x, y, width, height = box_xywh
    return {
        "segmentation": [[x, y, x + width, y, x + width, y + height, x, y + height]],
        "area": width * height,
        "iscrowd": 0,
        "image_id": image,
        "bbox": box_xywh,
        "category_id": 1,
        "id": annotation,
    }


def _coco_image(image: int) -> dict[str, Any]:
    name = f"COCO_train2014_{image:012d}.jpg"
    width, height = IMAGES[f"coco/train2014/{name}"]
    return {
        "license": 1,
        "file_name": name,
        "coco_url": f"http://mscoco.org/images/{image}",
        "height": height,
        "width": width,
        "date_captured": "2013-11-21 23:06:41",
        "flickr_url": "http://farm6.staticflickr.com/0/0_z.jpg",
        "id": image,
    }


INSTANCES = {
    "info": {"description": "This is stable 1.0 version of the 2014 MS COCO dataset."},
    "images": [_coco_image(98304), _coco_image(581857)],
    "licenses": [{"id": 1, "name": "Attribution-NonCommercial-ShareAlike License"}],
    "annotations": [
        _instance(3007, 98304, [26.5, 21.75, 20.0, 15.25]),
        _instance(3008, 98304, [2.0, 4.0, 10.0, 10.0]),
        _instance(1719310, 581857, [6.0, 10.5, 18.0, 60.0]),
        _instance(1719311, 581857, [36.0, 12.0, 20.25, 56.0]),
        _instance(1719312, 581857, [0.0, 70.0, 60.0, 10.0]),
    ],
    "categories": [{"supercategory": "person", "id": 1, "name": "person"}],
}
_REFCOCO = {
    "refcoco/refs(unc).p": REFS,
    "refcoco/instances.json": INSTANCES,
    "refcoco+/refs(unc).p": REFS,
    "refcoco+/instances.json": INSTANCES,
    "refcocog/refs(umd).p": REFS,
    "refcocog/instances.json": INSTANCES,
}


def _ocid_row(take_id: int, key: str, sentence: str, box_xyxy: list[int]) -> dict[str, Any]:
    scene = key.removeprefix("ocid-ref/OCID-dataset/")
    return {
        "seq_id": 3,
        "scene_id": 30 + take_id,
        "take_id": take_id,
        "scene_path": scene,
        "sequence_path": scene.partition("/rgb/")[0],
        "sub_dataset": scene.partition("/")[0],
        "instance_id": 5527,
        "scene_instance_id": 1,
        "class": "apple",
        "class_instance": "apple_1",
        "sentence": sentence,
        "tokens": sentence.lower().rstrip(".").split(),
        "bbox": json.dumps(box_xyxy),  # a text in the published file, too
        "sentence_type": "relation",
    }


_OCID_REF = {
    "ocid-ref/val_expressions.json": {
        "17": _ocid_row(3, TABLE, "The apple on the left.", [112, 130, 160, 180]),
        "83": _ocid_row(12, PILE, "The red box touching the mug", [250, 200, 340, 290]),
        "91": _ocid_row(20, PILE, "The mug on top of the box", [300, 120, 380, 210]),
    }
}

FILES: Mapping[str, Any] = {  # path below the data root -> content
    **_VQAV2,
    **_GQA,
    **_VIZWIZ,
    **_TEXTVQA,
    **_POPE,
    **_TALLYQA,
    **_REFCOCO,
    **_OCID_REF,
}
QUESTIONS: Mapping[str, tuple[str, ...]] = {  # benchmark -> ids of its questions in this data root
    "vqav2": ("262148000", "262148001", "262148002", "310196000"),
    "gqa": ("201307251", "201640614", "202225914"),
    "vizwiz": ("VizWiz_val_00000000.jpg", "VizWiz_val_00000001.jpg", "VizWiz_val_00000002.jpg"),
    "textvqa_ocr": ("34602", "34603", "34604"),
    "textvqa": ("34602", "34603", "34604"),
    "pope": tuple(f"{split}/{number}" for split in ("random", "popular", "adversarial") for number in range(1, 5)),
    "tallyqa": ("30095774", "40000012", "30000041"),
    "refcoco": ("3", "4", "6"),
    "refcoco+": ("3", "4", "6"),
    "refcocog": ("3", "4", "6"),
    "ocid_ref": ("17", "83", "91"),
}
