"""How were the mini study's encoders made? By classifying one-object renders; the tapped part is kept.

    python scripts/mini_pretrain_encoder.py --backbone vit-mini-scenes --seed 0 \
        --out vlmx/data/mini/encoders/vit-mini-scenes.safetensors

The labels are what the object is (shape, colour, size, letter of a sign), never where it is. All encoders see the same
images in the same order, each image once. Written beside the weights: a card with seed, cost and held-out accuracies.

Legend: B images of a batch, C H W channels and pixels, F logits of all heads together, K heads.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

import vlmx  # noqa: F401  (lets timm be imported where torchvision has no CPU build)
from vlmx.data.mini.render import render
from vlmx.data.mini.scenes import COLORS, IMAGE_PX, LETTERS, SHAPES, Scene, sample_scene
from vlmx.extract.backbones import catalogue, mambavision, timm_models, vmamba
from vlmx.extract.backbones.base import build_backbone

HEADS: dict[str, tuple[str, ...]] = {
    "shape": (*SHAPES, "sign"),
    "color": (*COLORS, "white"),
    "size": ("small", "large"),
    "letter": LETTERS,
}
NO_LABEL = -100
HELD_OUT = 2000
RES = (IMAGE_PX, IMAGE_PX)


def labels_of(scene: Scene) -> list[int]:
    """One class index a head, in the order of HEADS; NO_LABEL for the letter of an object that has none."""
    (thing,) = scene.objects
    values = (thing.shape, thing.color, thing.size, thing.letter)
    return [
        NO_LABEL if value is None else names.index(value) for names, value in zip(HEADS.values(), values, strict=True)
    ]


def load_renders(folder: Path, count: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images uint8 [count, 64, 64, 3] and labels int64 [count, 4], drawn once into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    images_path, labels_path = folder / f"images_{count}.npy", folder / f"labels_{count}.npy"
    if not labels_path.exists():
        unfinished = folder / f"images_{count}.{os.getpid()}.tmp"
        images = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=(count, *RES, 3))
        labels = np.empty((count, len(HEADS)), dtype=np.int64)
        for index in range(count):
            scene = sample_scene("pretrain", index)
            images[index] = render(scene)
            labels[index] = labels_of(scene)
        images.flush()
        unfinished.rename(images_path)
        np.save(labels_path, labels)
    return np.load(images_path, mmap_mode="r"), np.load(labels_path)


def to_input(images: npt.NDArray[np.uint8], row: catalogue.BackboneRow) -> Tensor:
    """uint8 [B, H, W, 3] -> normalised float32 (B, 3, H, W)."""
    pixels_BCHW = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
    return (pixels_BCHW - torch.tensor(row.mean).view(3, 1, 1)) / torch.tensor(row.std).view(3, 1, 1)


def learning_rate(step: int, steps: int, *, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def parameter_groups(net: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices and kernels, not biases, norms, position embeddings or the scan's own parameters."""
    named = list(net.named_parameters())
    spared = ("pos_embed", "cls_token", "relative_position_bias_table", "A_log", "A_logs")
    decayed = [p for name, p in named if p.ndim > 1 and not name.endswith(spared)]
    plain = [p for name, p in named if p.ndim <= 1 or name.endswith(spared)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def build_classifier(row: catalogue.BackboneRow) -> nn.Module:
    """The row's whole network: images (B, 3, H, W) -> logits of all heads side by side (B, F)."""
    classes = sum(len(names) for names in HEADS.values())
    if row.family == "vmamba":
        sizes = {key: row.arch[key] for key in ("depths", "dims", "ssm_ratio")}
        return vmamba.VMambaClassifier(**sizes, num_classes=classes)
    if row.family == "mambavision":
        return mambavision.build_classifier(row, RES, classes)
    net: nn.Module = timm_models.build_classifier(row, RES, classes)
    return net


def split_heads(logits_BF: Tensor) -> tuple[Tensor, ...]:
    """Logits of each head, in the order of HEADS."""
    return torch.split(logits_BF, [len(names) for names in HEADS.values()], dim=1)


@torch.no_grad()
def accuracies(
    net: nn.Module, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], row: catalogue.BackboneRow
) -> dict[str, float]:
    """Share of right classes per head over the given images, letters over signs only."""
    net.eval()
    logits_BF = torch.cat([net(to_input(images[at : at + 200], row)) for at in range(0, len(images), 200)])
    net.train()
    result = {}
    for name, logits, truth in zip(HEADS, split_heads(logits_BF), torch.from_numpy(labels).unbind(1), strict=True):
        known = truth != NO_LABEL
        result[name] = round((logits.argmax(dim=1)[known] == truth[known]).float().mean().item(), 4)
    return result


def train(args: argparse.Namespace, row: catalogue.BackboneRow) -> tuple[nn.Module, dict[str, Any]]:
    """Train the classifier; returns it and the card's measured part."""
    images, labels = load_renders(args.renders, args.samples + HELD_OUT)
    torch.manual_seed(args.seed)
    net = build_classifier(row)
    optimizer = torch.optim.AdamW(parameter_groups(net, args.weight_decay), betas=(0.9, 0.98))
    order = np.random.Generator(np.random.PCG64(args.seed)).permutation(args.samples)
    steps = args.samples // args.batch
    cpu_began = time.process_time()
    net.train()
    running = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak=args.lr, warmup=steps // 20)
        picked = np.sort(order[step * args.batch : (step + 1) * args.batch])
        labels_BK = torch.from_numpy(labels[picked])
        losses = [
            F.cross_entropy(logits, labels_BK[:, k], ignore_index=NO_LABEL, reduction="sum")
            for k, logits in enumerate(split_heads(net(to_input(images[picked], row))))
        ]
        loss = torch.stack(losses).sum() / args.batch
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        running += loss.item()
        if (step + 1) % 100 == 0:
            cost = f"{time.process_time() - cpu_began:.0f} CPU-s"
            print(f"{row.name} step {step + 1}/{steps} loss {running / 100:.3f} {cost}", flush=True)
            running = 0.0
        if (step + 1) % 500 == 0:
            few = slice(args.samples, args.samples + 500)
            print("held out:", accuracies(net, images[few], labels[few], row), flush=True)
    measured = {
        "held_out_accuracy": accuracies(net, images[args.samples :], labels[args.samples :], row),
        "held_out_images": HELD_OUT,
        "cpu_seconds": round(time.process_time() - cpu_began),
        "parameters_trained": sum(p.numel() for p in net.parameters()),
    }
    return net.eval(), measured


def kept_weights(net: nn.Module, row: catalogue.BackboneRow) -> dict[str, Tensor]:
    """The entries of the net's state dict that the tapped network needs: published names, floats as fp16."""
    family = {"vmamba": vmamba, "mambavision": mambavision}.get(row.family, timm_models)
    state = net.state_dict()
    used = {value.data_ptr() for value in family.build(row, RES).adapt_state_dict(dict(state)).values()}
    kept = {name: value for name, value in state.items() if value.data_ptr() in used}
    return {name: (v.half() if v.is_floating_point() else v).contiguous() for name, v in kept.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain one mini encoder by classification of rendered pictures.")
    parser.add_argument("--backbone", required=True, help="a mini row of the catalogue, e.g. vit-mini-scenes")
    parser.add_argument(
        "--out", type=Path, required=True, help="the .safetensors file to write; its card goes beside it"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=80_000, help="training images, each seen once")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument(
        "--renders",
        type=Path,
        default=Path(tempfile.gettempdir()) / "vlmx-mini-renders",
        help="folder that keeps the drawn images, about 12 KB each, for the next encoder",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    row = catalogue.row(args.backbone)
    net, measured = train(args, row)
    weights = kept_weights(net, row)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(save(weights))
    backbone = build_backbone(row.name, res=RES, weights=args.out)
    card = {
        "backbone": row.name,
        "task": "classification of one object: shape, colour, size, letter of a sign; no positions",
        "seed": args.seed,
        "samples": args.samples,
        "batch": args.batch,
        "peak_learning_rate": args.lr,
        "weight_decay": args.weight_decay,
        **measured,
        "parameters_kept": sum(p.numel() for p in backbone.parameters()),
        "file_bytes": args.out.stat().st_size,
        "torch": torch.__version__,
    }
    args.out.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card))


if __name__ == "__main__":
    main()
