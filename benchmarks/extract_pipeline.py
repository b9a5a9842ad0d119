"""Does extraction keep the encoder busy, and how does the cost of an image grow with its size?

    python benchmarks/extract_pipeline.py --images photos/ --plot growth.png

The first figure is images per second of whole extractions of JPEG files (read, hash, decode, letterbox, encode, store
with fsync, seal) / of the same passes of the same pixels alone, in turn in one process, the encoder on one thread. The
second is ViT-S beside VMamba-T through the same pipeline at growing sizes, in processor time, which other programs do
not disturb. Weights are random, which changes no time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vlmx.extract.backbones.base import Backbone, build_backbone
from vlmx.extract.batches import block_size
from vlmx.extract.plan import spec_of
from vlmx.extract.preprocess import prepare
from vlmx.extract.runner import ExtractSummary, extract
from vlmx.extract.scans import scan_choice
from vlmx.extract.sources import ImageSource, open_source

BESIDE = ("vit-s-in21k", "vmamba-t-in1k")
GROWTH = {224: 16, 512: 8, 1024: 2}  # pixels, images


def make_photos(folder: Path, count: int) -> Path:
    """JPEG files of the size and about the detail of photos: smooth shapes under noise, 640 x 480."""
    folder.mkdir()
    for number in range(count):
        rng = np.random.default_rng(number)
        smooth = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((640, 480))
        noisy = np.asarray(smooth, dtype=np.int16) + rng.integers(-12, 12, (480, 640, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:04}.jpg", quality=90)
    return folder


def part(source: ImageSource, first: int, count: int) -> ImageSource:
    """`count` images from the one with index `first` on; from the beginning again at the end."""
    images = [source.images[(first + index) % len(source.images)] for index in range(count)]
    return ImageSource(name="part", describe=f"{count} of them", images=tuple(images))


def pixels_of(backbone: Backbone, source: ImageSource) -> torch.Tensor:
    spec = spec_of(backbone, "float16")
    return torch.stack(
        [torch.from_numpy(prepare(image.load(), spec.geometry, spec.mean, spec.std)) for image in source.images]
    )


def extract_whole(backbone: Backbone, source: ImageSource, threads: int) -> tuple[float, ExtractSummary]:
    """Seconds of one extraction into an empty folder."""
    with tempfile.TemporaryDirectory() as root:
        started = time.perf_counter()
        summary = extract(backbone, [source], root=Path(root), threads=threads)
        return time.perf_counter() - started, summary


def pass_alone(backbone: Backbone, images_BCHW: torch.Tensor) -> float:
    """Seconds of the passes of these images."""
    block = block_size(backbone, "auto", most=len(images_BCHW))
    started = time.perf_counter()
    with torch.inference_mode():
        for block_BCHW in images_BCHW.split(block):
            backbone(block_BCHW)
    return time.perf_counter() - started


def busy(source: ImageSource, name: str, res: int, count: int, rounds: int, threads: int) -> None:
    """Print whole extraction / forward alone."""
    backbone = build_backbone(name, res=(res, res), weights="random:0")
    scan = scan_choice(backbone)
    print(f"{name} at {res}x{res}, {count} images a round, scan engine {scan.engine if scan else 'none'}")
    pass_alone(backbone, pixels_of(backbone, part(source, 0, 1)))
    ratios = []
    for number in range(rounds):
        images = part(source, number * count, count)
        pixels_BCHW = pixels_of(backbone, images)
        alone_s = pass_alone(backbone, pixels_BCHW)
        whole_s, summary = extract_whole(backbone, images, threads)
        alone_s = (alone_s + pass_alone(backbone, pixels_BCHW)) / 2  # before and after: other programs come and go
        ratios.append(alone_s / whole_s)
        print(f"  {count / whole_s:.3f} images/s, forward alone {count / alone_s:.3f}: {ratios[-1]:.3f}", flush=True)
        print(f"  {summary.seconds.describe(summary.new)}")
    print(f"whole extraction / forward alone: {statistics.median(ratios):.3f} (median of {rounds})")


def growth(source: ImageSource, threads: int, plot: Path | None) -> None:
    """Print, and plot, processor seconds an image, decoding and writing included, of both encoders at growing sizes."""
    seconds: dict[str, list[float]] = {name: [] for name in BESIDE}
    for res, count in GROWTH.items():
        for name in BESIDE:
            backbone = build_backbone(name, res=(res, res), weights="random:0")
            pass_alone(backbone, pixels_of(backbone, part(source, 0, 1)))
            before_s = time.process_time()
            extract_whole(backbone, part(source, 0, count), threads)
            seconds[name].append((time.process_time() - before_s) / count)
        each = "  ".join(f"{name} {1000 * seconds[name][-1]:,.0f} ms" for name in BESIDE)
        print(f"{res}x{res}, processor time of an image extracted: {each}", flush=True)
    if plot is not None:
        draw(seconds, plot)


def draw(seconds: dict[str, list[float]], plot: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
    for name, values in seconds.items():
        axes.plot(list(GROWTH), values, marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="image side, pixels", ylabel="processor seconds an image")
    axes.set_xticks(list(GROWTH), [str(res) for res in GROWTH])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(plot, dpi=150)
    print(f"plotted: {plot}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of JPEG files; default: some that are made here")
    parser.add_argument("--backbone", default="vmamba-t-in1k")
    parser.add_argument("--res", type=int, default=512)
    parser.add_argument("--count", type=int, default=16, help="images of one extraction")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="threads that decode beside the encoder's one thread")
    parser.add_argument("--plot", type=Path, help="where the figure of the growth goes")
    parser.add_argument("--only", choices=("busy", "growth"), help="one of the two figures")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(str(given.images or make_photos(Path(folder) / "photos", given.count * given.rounds)))
        if given.only != "growth":
            busy(source, given.backbone, given.res, given.count, given.rounds, given.threads)
        if given.only != "busy":
            growth(source, given.threads, given.plot)


if __name__ == "__main__":
    main()
