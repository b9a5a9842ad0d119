"""Which files do users fetch for the published data sets: from where, under which licence, and does the host work?

All paths are below one folder, the data root, so that data sets share photos. That a host is dead or moves is what its
users reported (lichengunc/refer, issues 14, 23 and 26; lluma/OCID-Ref, issue 2; awesome-public-datasets, issue 526).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Host = Literal["works", "moves", "dead"]
_HOST_TEXT = {"works": "", "moves": "links to it change", "dead": "dead host"}

_CC_BY = "CC BY 4.0"
_COCO_PHOTOS = "each photo under its own Flickr licence"


@dataclass(frozen=True, kw_only=True)
class Download:
    """A file or a folder that users fetch.

    Attributes:
        path: where it must lie below the data root.
        url: where it comes from; an archive holds it under its own name.
        licence: as its publishers state it.
        host: "dead" if its users cannot reach it, "moves" if links to it change.
        mirror: another place to get it, where there is one.
        remark: what else users must know; mostly empty.
    """

    path: str
    url: str
    licence: str
    host: Host = "works"
    mirror: str = ""
    remark: str = ""

    @property
    def remarks(self) -> str:
        """State of the host, mirror and remark in one text, e.g. "dead host; a copy: https://..."; mostly empty."""
        mirror = f"a copy: {self.mirror}" if self.mirror else ""
        return "; ".join(part for part in (_HOST_TEXT[self.host], mirror, self.remark) if part)

    @property
    def source(self) -> str:
        """Where it comes from, in one line."""
        return f"from {self.url}" + (f" ({self.remarks})" if self.remarks else "")


def _coco(folder: str) -> Download:
    return Download(path=f"coco/{folder}", url=f"http://images.cocodataset.org/zips/{folder}.zip", licence=_COCO_PHOTOS)


VAL2014 = _coco("val2014")
TRAIN2014 = _coco("train2014")
TRAIN2017 = _coco("train2017")

_VQA = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"
VQAV2_QUESTIONS = Download(
    path="vqav2/v2_OpenEnded_mscoco_val2014_questions.json", url=f"{_VQA}/v2_Questions_Val_mscoco.zip", licence=_CC_BY
)
VQAV2_ANNOTATIONS = Download(
    path="vqav2/v2_mscoco_val2014_annotations.json", url=f"{_VQA}/v2_Annotations_Val_mscoco.zip", licence=_CC_BY
)

_GQA = "https://downloads.cs.stanford.edu/nlp/data/gqa"
GQA_QUESTIONS = Download(path="gqa/testdev_balanced_questions.json", url=f"{_GQA}/questions1.2.zip", licence=_CC_BY)
GQA_IMAGES = Download(path="gqa/images", url=f"{_GQA}/images.zip", licence=f"{_CC_BY}; {_COCO_PHOTOS}")

_VIZWIZ = "https://vizwiz.cs.colorado.edu/VizWiz_final"
VIZWIZ_VAL = Download(path="vizwiz/val.json", url=f"{_VIZWIZ}/vqa_data/Annotations.zip", licence=_CC_BY)
VIZWIZ_IMAGES = Download(path="vizwiz/val", url=f"{_VIZWIZ}/images/val.zip", licence=_CC_BY)

_TEXTVQA = "https://dl.fbaipublicfiles.com/textvqa"
TEXTVQA_VAL = Download(
    path="textvqa/TextVQA_0.5.1_val.json", url=f"{_TEXTVQA}/data/TextVQA_0.5.1_val.json", licence=_CC_BY
)
TEXTVQA_OCR = Download(
    path="textvqa/llava_textvqa_val_v051_ocr.jsonl",
    url="https://gist.githubusercontent.com/siddk/74a709cb5e292099bae3cbcec1d0ce8a/raw/"
    "74e367e79a23b1043eb469b36168945fbac01601/textvqa_val_v051_ocr.jsonl",
    licence=f"not stated; its questions are TextVQA's, {_CC_BY}",
    mirror="textvqa/ in https://drive.google.com/file/d/1atZSBBrAX54yYpxtVVW33zFvcnaHeFPy (LLaVA's eval.zip)",
)
TEXTVQA_IMAGES = Download(
    path="textvqa/train_images",
    url=f"{_TEXTVQA}/images/train_val_images.zip",
    licence="of Open Images, listed there as CC BY 2.0",
)

_POPE = "https://raw.githubusercontent.com/AoiDragon/POPE/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"
POPE_SPLITS = ("random", "popular", "adversarial")
POPE_QUESTIONS = tuple(
    Download(
        path=f"pope/coco_pope_{split}.json",
        url=f"{_POPE}/coco_pope_{split}.json",
        licence="MIT",
        remark="this version has 2,910 questions, later ones have 3,000" if split == "random" else "",
    )
    for split in POPE_SPLITS
)

TALLYQA_TEST = Download(
    path="tallyqa/test.json",
    url="https://github.com/manoja328/tallyqa/blob/master/tallyqa.zip?raw=true",
    licence="not stated; partly from VQA-v2 and Visual Genome, both CC BY 4.0",
)
_GENOME = "https://cs.stanford.edu/people/rak248/VG_100K_2"
_GENOME_PAGE = "https://homes.cs.washington.edu/~ranjay/visualgenome"
GENOME_IMAGES = tuple(
    Download(
        path=f"vg/{folder}",
        url=f"{_GENOME}/{archive}",
        licence=f"{_CC_BY}; {_COCO_PHOTOS}",
        remark=f"project: {_GENOME_PAGE}",
    )
    for folder, archive in (("VG_100K", "images.zip"), ("VG_100K_2", "images2.zip"))
)


def referit(name: str, archived: str, *files: str) -> tuple[Download, ...]:
    """Files of one of the three archives of referring expressions.

    Args:
        name: of the archive, and of the folder in it.
        archived: when the Internet Archive copied it.
    """
    url = f"https://bvisionweb1.cs.unc.edu/licheng/referit/data/{name}.zip"
    return tuple(
        Download(
            path=f"{name}/{file}",
            url=url,
            licence="Apache-2.0; boxes are COCO's, CC BY 4.0",
            host="dead",
            mirror=f"https://web.archive.org/web/{archived}/{url}",
        )
        for file in files
    )


REFCOCO = referit("refcoco", "20220413011718", "refs(unc).p", "instances.json")
REFCOCO_PLUS = referit("refcoco+", "20220413011656", "refs(unc).p", "instances.json")
REFCOCOG = referit("refcocog", "20220413012904", "refs(umd).p", "instances.json")

OCID_REF_VAL = Download(
    path="ocid-ref/val_expressions.json",
    url="https://drive.google.com/uc?export=download&id=19dD65ABxWiOLrpNea7mUW1RjJDBLo3Yp",
    licence="MIT",
    host="moves",
    mirror="https://drive.google.com/drive/folders/1dUKpfRiSQD7bWXtpbd9aVzgquYHtWfZv",
    remark="project: https://github.com/lluma/OCID-Ref",
)
OCID_IMAGES = Download(
    path="ocid-ref/OCID-dataset",
    url="https://data.acin.tuwien.ac.at/index.php/s/g3EkcgcPioolQmJ/download",
    licence="stated on its page",
    host="dead",
    mirror="https://researchdata.tuwien.at/records/pcbjd-4wa12",
    remark="project: https://www.acin.tuwien.ac.at/en/vision-for-robotics/software-tools/"
    "object-clutter-indoor-dataset/",
)

_HUB = "https://huggingface.co/datasets"
LLAVA_665K = Download(
    path="llava-665k/llava_v1_5_mix665k.json",
    url=f"{_HUB}/liuhaotian/LLaVA-Instruct-150K/resolve/main/llava_v1_5_mix665k.json",
    licence=f"{_CC_BY}; its use must also follow OpenAI's terms",
)
OCR_VQA_IMAGES = Download(
    path="ocr_vqa/images",
    url=f"{_HUB}/qnguyen3/ocr_vqa/resolve/main/ocr_vqa.zip",
    licence="not stated; covers of books",
    remark="all files must end in .jpg, as the list names them",
)
