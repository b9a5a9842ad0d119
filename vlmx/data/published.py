"""Which files do users download for each published data set, where do they put them, and which images do these name?

Everything lies below one folder, the data root, so that data sets share photos: VQA-v2 and POPE both read
coco/val2014. The key of an image is its path below the data root; LLaVA's training list names its images so, too.
Splits are the ones that the paper's evaluation uses. Annotations only: no pixel is read here.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vlmx.errors import DataError

T = TypeVar("T")
DATA_ROOT = "data"
SHOWN = 3
_COCO = "http://images.cocodataset.org/zips"
_GENOME = "https://cs.stanford.edu/people/rak248/VG_100K_2"
_POPE = "https://raw.githubusercontent.com/AoiDragon/POPE/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"


@dataclass(frozen=True, kw_only=True)
class Download:
    """A file or a folder that users fetch.

    Attributes:
        path: where it must lie below the data root.
        url: where it comes from; an archive holds it under its own name.
        remark: what else users must know; mostly empty.
    """

    path: str
    url: str
    remark: str = ""


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
    missing = {each.path: each for published in data for each in published.missing(root)}
    if missing:
        lines = [
            f"{root / each.path}  from {each.url}" + (f" ({each.remark})" if each.remark else "")
            for each in missing.values()
        ]
        raise DataError(
            f"{len(missing)} files or folders of published data are missing below {root}",
            why="\n       ".join(lines),
            fix="fetch them and put them there, or give the folder that has them with --data-root",
        )


def _each(path: Path, rows: Iterable[Any], parse: Callable[[Any], T]) -> list[T]:
    """`parse` of each row.

    Raises:
        DataError: it fails for some, or there is no row; says for how many, and what is wrong with the first few.
    """
    parsed, problems = [], []
    for number, row in enumerate(rows, start=1):
        try:
            parsed.append(parse(row))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problems.append(f"row {number}: " + (f"no {error}" if isinstance(error, KeyError) else str(error)))
    if problems or not parsed:
        count = len(parsed) + len(problems)
        raise DataError(
            f"{path} is not the published file",
            why=f"{len(problems):,} of {count:,} rows have another form: " + "; ".join(problems[:SHOWN])
            if problems
            else "the rows are not where they are in the published one",
            fix="fetch it again, and check that it is the file of this split",
        )
    return parsed


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"cannot read {path}", why=str(error) or repr(error), fix="it is damaged: fetch it again")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _json_lines(path: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


class _PlainPickle(pickle.Unpickler):
    """Reads numbers, texts, lists and dictionaries; whatever would run code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}; a list of expressions has no need to")


def _plain_pickle(path: Path) -> Any:
    """What a pickle of Python 2 holds.

    Raises:
        DataError: it is damaged, or more than plain data.
    """
    try:
        return _PlainPickle(io.BytesIO(path.read_bytes()), encoding="latin-1").load()
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from error


def _list(value: Any, name: str = "") -> list[Any]:
    """A file's list, or the one under `name`; an empty one when the file is built otherwise, which `_each` refuses."""
    if name:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, list) else []


def _values(value: Any) -> list[Any]:
    """What a file has under its ids; nothing when it is built otherwise."""
    return list(value.values()) if isinstance(value, dict) else []


def _coco(split: str, image_id: Any) -> str:
    return f"coco/{split}/COCO_{split}_{int(image_id):012d}.jpg"


def _vqav2(paths: Sequence[Path]) -> list[str]:
    (path,) = paths
    return _each(path, _list(_json(path), "questions"), lambda row: _coco("val2014", row["image_id"]))


def _gqa(paths: Sequence[Path]) -> list[str]:
    (path,) = paths
    return _each(path, _values(_json(path)), lambda row: f"gqa/images/{row['imageId']}.jpg")


def _vizwiz(paths: Sequence[Path]) -> list[str]:
    (path,) = paths
    return _each(path, _list(_json(path)), lambda row: f"vizwiz/val/{row['image']}")


def _textvqa(paths: Sequence[Path]) -> list[str]:
    (path,) = paths
    return _each(path, _list(_json(path), "data"), lambda row: f"textvqa/train_images/{row['image_id']}.jpg")


def _pope(paths: Sequence[Path]) -> list[str]:
    return [key for path in paths for key in _each(path, _json_lines(path), lambda row: f"coco/val2014/{row['image']}")]


def _tallyqa(paths: Sequence[Path]) -> list[str]:
    (path,) = paths
    return _each(path, _list(_json(path)), lambda row: f"vg/{row['image']}")


def _refcoco(paths: Sequence[Path]) -> list[str]:
    (path,) = paths

    def keys_of(ref: Any) -> list[str]:
        key, expressions = _coco("train2014", ref["image_id"]), list(ref["sentences"])
        return [key] * len(expressions) if ref["split"] == "val" else []

    return [key for keys in _each(path, _list(_plain_pickle(path)), keys_of) for key in keys]


def _ocid_ref(paths: Sequence[Path]) -> list[str]:
    (path,) = paths
    return _each(path, _values(_json(path)), lambda row: f"ocid-ref/OCID-dataset/{row['scene_path']}")


def _llava(paths: Sequence[Path]) -> list[str]:
    (path,) = paths
    return [key for key in _each(path, _list(_json(path)), lambda row: row.get("image") or "") if key]


_VAL2014 = Download(path="coco/val2014", url=f"{_COCO}/val2014.zip")
_TRAIN2014 = Download(path="coco/train2014", url=f"{_COCO}/train2014.zip")
_GQA_IMAGES = Download(path="gqa/images", url="https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip")
_TEXT_IMAGES = Download(
    path="textvqa/train_images", url="https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"
)
_GENOME_IMAGES = (
    Download(path="vg/VG_100K", url=f"{_GENOME}/images.zip"),
    Download(path="vg/VG_100K_2", url=f"{_GENOME}/images2.zip"),
)


def _referit(name: str, file: str, examples: int, title: str, archived: str) -> PublishedData:
    host = "https://bvisionweb1.cs.unc.edu/licheng/referit/data"
    return PublishedData(
        name=name,
        title=f"{title} val",
        table=name,
        examples=examples,
        annotations=(
            Download(
                path=f"{name}/{file}",
                url=f"{host}/{name}.zip",
                remark=f"the host is often down; a copy: https://web.archive.org/web/{archived}/{host}/{name}.zip",
            ),
        ),
        images=(_TRAIN2014,),
        image_keys=_refcoco,
    )


_TABLE = (
    PublishedData(
        name="vqav2",
        title="VQA-v2 val",
        table="vqav2",
        examples=214_354,
        annotations=(
            Download(
                path="vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
                url="https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/v2_Questions_Val_mscoco.zip",
            ),
        ),
        images=(_VAL2014,),
        image_keys=_vqav2,
    ),
    PublishedData(
        name="gqa",
        title="GQA testdev balanced",
        table="gqa",
        examples=12_578,
        annotations=(
            Download(
                path="gqa/testdev_balanced_questions.json",
                url="https://downloads.cs.stanford.edu/nlp/data/gqa/questions1.2.zip",
            ),
        ),
        images=(_GQA_IMAGES,),
        image_keys=_gqa,
    ),
    PublishedData(
        name="vizwiz",
        title="VizWiz val",
        table="vizwiz",
        examples=4_319,
        annotations=(
            Download(
                path="vizwiz/val.json",
                url="https://vizwiz.cs.colorado.edu/VizWiz_final/vqa_data/Annotations.zip",
            ),
        ),
        images=(Download(path="vizwiz/val", url="https://vizwiz.cs.colorado.edu/VizWiz_final/images/val.zip"),),
        image_keys=_vizwiz,
    ),
    PublishedData(
        name="textvqa",
        title="TextVQA val",
        table="textvqa",
        examples=5_000,
        annotations=(
            Download(
                path="textvqa/TextVQA_0.5.1_val.json",
                url="https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json",
            ),
        ),
        images=(_TEXT_IMAGES,),
        image_keys=_textvqa,
    ),
    PublishedData(
        name="pope",
        title="POPE on COCO val2014: random, popular, adversarial",
        table="pope",
        examples=8_910,
        annotations=tuple(
            Download(path=f"pope/coco_pope_{split}.json", url=f"{_POPE}/coco_pope_{split}.json")
            for split in ("random", "popular", "adversarial")
        ),
        images=(_VAL2014,),
        image_keys=_pope,
    ),
    PublishedData(
        name="tallyqa",
        title="TallyQA test",
        table="tallyqa",
        examples=38_589,
        annotations=(
            Download(
                path="tallyqa/test.json",
                url="https://github.com/manoja328/tallyqa/blob/master/tallyqa.zip?raw=true",
            ),
        ),
        images=_GENOME_IMAGES,
        image_keys=_tallyqa,
    ),
    _referit("refcoco", "refs(unc).p", 10_834, "RefCOCO", "20220413011718"),
    _referit("refcoco+", "refs(unc).p", 10_758, "RefCOCO+", "20220413011656"),
    _referit("refcocog", "refs(umd).p", 4_896, "RefCOCOg", "20220413012904"),
    PublishedData(
        name="ocid-ref",
        title="OCID-Ref val",
        table="ocid-ref",
        examples=18_342,
        annotations=(
            Download(
                path="ocid-ref/val_expressions.json",
                url="https://drive.google.com/uc?export=download&id=19dD65ABxWiOLrpNea7mUW1RjJDBLo3Yp",
                remark="links to it change; the project: https://github.com/lluma/OCID-Ref",
            ),
        ),
        images=(
            Download(
                path="ocid-ref/OCID-dataset",
                url="https://data.acin.tuwien.ac.at/index.php/s/g3EkcgcPioolQmJ/download",
                remark="links to it change; the project: https://www.acin.tuwien.ac.at/en/vision-for-robotics/"
                "software-tools/object-clutter-indoor-dataset/",
            ),
        ),
        image_keys=_ocid_ref,
    ),
    PublishedData(
        name="llava-665k",
        title="LLaVA-1.5's training mixture",
        table="llava_v1_5_mix665k",  # the name under which a training with this file looks
        examples=624_610,
        annotations=(
            Download(
                path="llava-665k/llava_v1_5_mix665k.json",
                url="https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K/resolve/main/llava_v1_5_mix665k.json",
            ),
        ),
        images=(
            Download(path="coco/train2017", url=f"{_COCO}/train2017.zip"),
            _GQA_IMAGES,
            Download(
                path="ocr_vqa/images",
                url="https://huggingface.co/datasets/qnguyen3/ocr_vqa/resolve/main/ocr_vqa.zip",
                remark="all files must end in .jpg, as the list names them",
            ),
            _TEXT_IMAGES,
            *_GENOME_IMAGES,
        ),
        image_keys=_llava,
    ),
)

PUBLISHED: dict[str, PublishedData] = {published.name: published for published in _TABLE}
