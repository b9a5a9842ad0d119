"""Is this LLaVA-1.5's training mixture as published, and are its image files there?

llava_v1_5_mix665k.json has 665,298 conversations from ten data sets; which one a conversation is from shows in the
folder of its image. Counts: haotian-liu/LLaVA, issues 702 (by data set, from the author) and 657 (by folder); the table
of the LLaVA-1.5 paper has older ones for RefCOCO and A-OKVQA.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vlmx.data.records import Conversation

TEXT_ONLY = "text only"
PARTS = (  # data set, folder of its images, conversations
    ("LLaVA-Instruct", "coco/train2017", 157_712),
    ("VQA-v2", "coco/train2017", 82_783),
    ("A-OKVQA", "coco/train2017", 66_160),
    ("RefCOCO", "coco/train2017", 48_447),
    ("OKVQA", "coco/train2017", 8_998),
    ("GQA", "gqa/images", 72_140),
    ("OCR-VQA", "ocr_vqa/images", 80_000),
    ("TextCaps", "textvqa/train_images", 21_953),
    ("Visual Genome", "vg", 86_417),
    ("ShareGPT", TEXT_ONLY, 40_688),
)
_FOLDERS = tuple(dict.fromkeys(folder for _, folder, _ in PARTS))
_COCO = "coco/train2017"
_OCR_VQA = "ocr_vqa/images/"
_OTHER_SUFFIXES = (".gif", ".png")  # of OCR-VQA's covers, all of which the mixture calls .jpg
_LEAK = (
    "its VQA-v2 rows use every photo of COCO train2014, from which RefCOCO, RefCOCO+ and RefCOCOg val are drawn, and"
    " COCO train2017 has most of val2014, the photos of VQA-v2 val and POPE: new questions there, not always new photos"
)


@dataclass(frozen=True, kw_only=True)
class SourceCount:
    """How much of one image folder there is.

    Attributes:
        data_sets: the data sets whose images lie in it.
        folder: the folder, or "text only".
        found: conversations there are.
        published: conversations the published mixture has.
    """

    data_sets: tuple[str, ...]
    folder: str
    found: int
    published: int


@dataclass(frozen=True, kw_only=True)
class MixtureReport:
    """How a mixture compares with the published one.

    Attributes:
        sources: one a folder, and one for text only.
        notes: for the user: what is missing or too much, and which benchmarks share its photos.
    """

    sources: tuple[SourceCount, ...]
    notes: tuple[str, ...]


def check_mixture(conversations: Iterable[Conversation]) -> MixtureReport | None:
    """Count conversations by source.

    Returns:
        None if it is another mixture: an image lies in none of the published folders, or one of these has no image.
    """
    counts: Counter[str] = Counter()
    for conversation in conversations:
        folder = TEXT_ONLY if conversation.image is None else _folder_of(conversation.image)
        if folder is None:
            return None
        counts[folder] += 1
    if any(not counts[folder] for folder in _FOLDERS if folder != TEXT_ONLY):
        return None
    sources = tuple(
        SourceCount(
            data_sets=tuple(name for name, place, _ in PARTS if place == folder),
            folder=folder,
            found=counts[folder],
            published=sum(count for _, place, count in PARTS if place == folder),
        )
        for folder in _FOLDERS
    )
    different = [
        f"{source.folder} {source.found:,} of {source.published:,}"
        for source in sources
        if source.found != source.published
    ]
    notes = [f"this is not the whole published LLaVA-1.5 mixture: {', '.join(different)}"] if different else []
    return MixtureReport(sources=sources, notes=(*notes, f"the LLaVA-1.5 mixture: {_LEAK}"))


def _folder_of(image: str) -> str | None:
    return next((folder for folder in _FOLDERS if image.startswith(f"{folder}/")), None)


@dataclass(frozen=True, kw_only=True)
class MissingImages:
    """Images that are not where the data name them.

    Attributes:
        missing: keys of those that are nowhere, in the given order.
        renamed: keys of OCR-VQA covers that are there as .gif or .png, and their paths below the root. The reference
            makes JPEGs of them (of the first frame); decoding these files as they are gives the same pictures without
            the loss of a second compression.
    """

    missing: tuple[str, ...]
    renamed: Mapping[str, str]


def missing_images(keys: Iterable[str], image_root: Path) -> MissingImages:
    """Look which images lie below a folder. Each folder is listed once, which is quicker than asking for each file.

    Args:
        keys: paths relative to `image_root`.
        image_root: the folder that holds coco/, gqa/, ocr_vqa/, textvqa/ and vg/.
    """
    listed: dict[str, set[str]] = {}
    missing: list[str] = []
    renamed: dict[str, str] = {}
    for key in keys:
        folder, _, name = key.rpartition("/")
        if folder not in listed:
            listed[folder] = _file_names(image_root / folder)
        if name in listed[folder]:
            continue
        stem, suffix = os.path.splitext(name)
        others = [stem + other for other in _OTHER_SUFFIXES if stem + other in listed[folder]]
        if others and suffix == ".jpg" and key.startswith(_OCR_VQA):
            renamed[key] = f"{folder}/{others[0]}"
        else:
            missing.append(key)
    return MissingImages(missing=tuple(missing), renamed=renamed)


def _file_names(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return set()
