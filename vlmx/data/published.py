"""Which published data sets are there, which of their files name their images, and which images do these name?

Everything lies below one folder, the data root, so that data sets share photos: VQA-v2 and POPE both read
coco/val2014. The key of an image is its path below the data root; LLaVA's training list names its images so, too.
Splits are the ones that the paper's evaluation uses. Annotations only: no pixel is read here. What is asked about the
images: see published_benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmx.data import downloads
from vlmx.data.annotation_files import parse_rows, read_json, rows_of
from vlmx.data.choice_files import pope_images, tallyqa_images
from vlmx.data.downloads import Download
from vlmx.data.region_files import ocid_ref_images, refcoco_images
from vlmx.data.vqa_files import gqa_images, textvqa_images, vizwiz_images, vqav2_images
from vlmx.errors import DataError

DATA_ROOT = "data"


@dataclass(frozen=True, kw_only=True)
class PublishedData:
    """A published data set.

    Attributes:
        name: what --data takes.
        title: its name in the literature, and the split.
        table: name of its image table.
        examples: how many of its examples have an image.
        annotations: the files that name the images.
        images: the folders of the images.
        image_keys: from the annotation files, in the order of `annotations`, to one image key for each example.
    """

    name: str
    title: str
    table: str
    examples: int
    annotations: tuple[Download, ...]
    images: tuple[Download, ...]
    image_keys: Callable[[Sequence[Path]], list[str]]

    def missing(self, root: Path) -> list[Download]:
        """What is not below the data root."""
        files = [each for each in self.annotations if not (root / each.path).is_file()]
        return files + [each for each in self.images if not (root / each.path).is_dir()]

    def keys(self, root: Path) -> list[str]:
        """One image key for each example, in the order of the annotations.

        Raises:
            DataError: an annotation file is missing, damaged, or another one than the published.
        """
        return self.image_keys([root / each.path for each in self.annotations])


def require(data: Iterable[PublishedData], root: Path) -> None:
    """Make sure that all files of these data sets are there.

    Raises:
        DataError: some are not; it names each of them, where it comes from, and where it must lie.
    """
    refuse_missing([each for published in data for each in published.missing(root)], root)


def refuse_missing(missing: Iterable[Download], root: Path) -> None:
    """Say what is missing, if anything is.

    Raises:
        DataError: something is; it names each file and folder, where it comes from, and where it must lie.
    """
    different = list({each.path: each for each in missing}.values())
    if different:
        raise DataError(
            f"{len(different)} files or folders of published data are missing below {root}",
            why="\n       ".join(f"{root / each.path}  {each.source}" for each in different),
            fix="fetch them and put them there, or give the folder that has them with --data-root",
        )


def _llava_images(paths: Sequence[Path]) -> list[str]:
    (path,) = paths
    return [key for key in parse_rows(path, rows_of(read_json(path)), lambda row: row.get("image") or "") if key]


def _referit(name: str, title: str, examples: int, files: Sequence[Download]) -> PublishedData:
    return PublishedData(
        name=name,
        title=f"{title} val",
        table=name,
        examples=examples,
        annotations=(files[0],),
        images=(downloads.TRAIN2014,),
        image_keys=refcoco_images,
    )


_TABLE = (
    PublishedData(
        name="vqav2",
        title="VQA-v2 val",
        table="vqav2",
        examples=214_354,
        annotations=(downloads.VQAV2_QUESTIONS,),
        images=(downloads.VAL2014,),
        image_keys=vqav2_images,
    ),
    PublishedData(
        name="gqa",
        title="GQA testdev balanced",
        table="gqa",
        examples=12_578,
        annotations=(downloads.GQA_QUESTIONS,),
        images=(downloads.GQA_IMAGES,),
        image_keys=gqa_images,
    ),
    PublishedData(
        name="vizwiz",
        title="VizWiz val",
        table="vizwiz",
        examples=4_319,
        annotations=(downloads.VIZWIZ_VAL,),
        images=(downloads.VIZWIZ_IMAGES,),
        image_keys=vizwiz_images,
    ),
    PublishedData(
        name="textvqa",
        title="TextVQA val",
        table="textvqa",
        examples=5_000,
        annotations=(downloads.TEXTVQA_VAL,),
        images=(downloads.TEXTVQA_IMAGES,),
        image_keys=textvqa_images,
    ),
    PublishedData(
        name="pope",
        title="POPE on COCO val2014: random, popular, adversarial",
        table="pope",
        examples=8_910,
        annotations=downloads.POPE_QUESTIONS,
        images=(downloads.VAL2014,),
        image_keys=pope_images,
    ),
    PublishedData(
        name="tallyqa",
        title="TallyQA test",
        table="tallyqa",
        examples=38_589,
        annotations=(downloads.TALLYQA_TEST,),
        images=downloads.GENOME_IMAGES,
        image_keys=tallyqa_images,
    ),
    _referit("refcoco", "RefCOCO", 10_834, downloads.REFCOCO),
    _referit("refcoco+", "RefCOCO+", 10_758, downloads.REFCOCO_PLUS),
    _referit("refcocog", "RefCOCOg", 4_896, downloads.REFCOCOG),
    PublishedData(
        name="ocid-ref",
        title="OCID-Ref val",
        table="ocid-ref",
        examples=18_342,
        annotations=(downloads.OCID_REF_VAL,),
        images=(downloads.OCID_IMAGES,),
        image_keys=ocid_ref_images,
    ),
    PublishedData(
        name="llava-665k",
        title="LLaVA-1.5's training mixture",
        table="llava_v1_5_mix665k",  # the name under which a training with this file looks
        examples=624_610,
        annotations=(downloads.LLAVA_665K,),
        images=(
            downloads.TRAIN2017,
            downloads.GQA_IMAGES,
            downloads.OCR_VQA_IMAGES,
            downloads.TEXTVQA_IMAGES,
            *downloads.GENOME_IMAGES,
        ),
        image_keys=_llava_images,
    ),
)

PUBLISHED: dict[str, PublishedData] = {published.name: published for published in _TABLE}
