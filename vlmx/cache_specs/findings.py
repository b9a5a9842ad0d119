"""How are findings about caches shown: as lines for people, and as JSON for scripts?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from vlmx.cache_specs.audit import Report
from vlmx.cache_specs.compare import Difference
from vlmx.cache_specs.survey import CacheInfo
from vlmx.console import format_bytes

SHOWN = 5  # images that a list shows; the JSON has all


def show_report(report: Report) -> None:
    """What a verification found, on stdout."""
    rows = [("cache", report.place.name)]
    for damage in report.damaged.values():
        rows.append(("damaged", f"shard {damage.index} ({damage.key}): {damage.why}"))
        images = list(damage.images.items())
        for image, offset in images[:SHOWN]:
            rows.append(("", f"image {image}" + ("" if offset is None else f" at byte {offset}")))
        if len(images) > SHOWN:
            rows.append(("", f"and {len(images) - SHOWN:,} more images"))
    rows += [("damaged", f"{key}: {why}") for key, why in report.metadata.items()]
    rows += [("problem", problem) for problem in report.problems]
    checked_what = "every byte read" if report.full else "manifest, sizes and indices (--full reads every byte)"
    rows.append(("checked", checked_what))
    rows.append(("images", f"{report.images:,} in {report.shards:,} shards, {report.failed:,} undecodable"))
    rows.append(("intact", f"{report.shards - len(report.damaged):,} shards, {format_bytes(report.bytes)}"))
    rows.append(("sealed", "yes" if report.sealed else "no"))
    show(rows)


def report_json(report: Report) -> dict[str, Any]:
    """What a verification found, for a script."""
    return {
        "cache": report.place.name,
        "url": report.place.url,
        "ok": report.ok,
        "full": report.full,
        "sealed": report.sealed,
        "shards": report.shards,
        "images": report.images,
        "failed": report.failed,
        "intact_bytes": report.bytes,
        "damaged": [
            {
                "shard": damage.index,
                "file": damage.key,
                "why": damage.why,
                "images": [{"id": image, "offset": offset} for image, offset in damage.images.items()],
            }
            for damage in report.damaged.values()
        ],
        "metadata": dict(report.metadata),
        "problems": list(report.problems),
    }


def show(facts: Sequence[tuple[str, str]]) -> None:
    """Names and what they are, below each other, on stdout."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        click.echo(f"{name:<{width}}  {value}")


def info_rows(found: CacheInfo) -> list[tuple[str, str]]:
    """What `vlmx cache info` says of the cache itself."""
    spec, shape, geometry = found.header.spec, found.header.shape, found.header.spec.geometry
    rows = [
        ("place", str(found.place)),
        ("backbone", spec.backbone),
        ("weights", f"{spec.weights_sha256} (untrained)" if spec.random_weights else spec.weights_sha256),
        ("feature", f"{spec.feature}, norm {spec.out_norm}, forward version {spec.forward_version}"),
        ("input", f"{geometry.height} x {geometry.width} {geometry.mode}, fill {geometry.fill}, {geometry.resampling}"),
        ("mean, std", f"{spec.mean}, {spec.std}"),
        (
            "tokens",
            f"{shape.num_tokens} ({shape.grid[0]} x {shape.grid[1]}) x {shape.dim} {spec.dtype}, "
            f"computed in {spec.compute}",
        ),
        ("codec", spec.codec),
        ("images", f"{found.images:,} in {found.shards:,} shards of {found.header.images_per_shard}"),
        ("undecodable", f"{len(found.failed):,}"),
        ("size", format_bytes(found.bytes)),
    ]
    if found.disk_bytes is not None:
        rows.append(("on the disk", format_bytes(found.disk_bytes)))
    if found.error is not None:
        clipped = f"{found.error.clipped:,} of {found.error.values:,} numbers clipped"
        rows.append(("8-bit error", f"{found.error.relative:.4f} relative, {clipped}"))
    for data in found.datasets:
        covered = "all" if data.present == data.images else f"{data.present:,} of"
        rows.append((f"data set {data.dataset}", data.problem or f"{covered} {data.images:,} images"))
    rows.append(("sealed", "yes" if found.sealed else "no: the extraction has not come to its end"))
    rows += [("being written by", writer) for writer in found.writers]
    return [*rows, ("fingerprint", spec.fingerprint)]


def info_json(found: CacheInfo) -> dict[str, Any]:
    """What `vlmx cache info` says, for a script."""
    shape = found.header.shape
    error = found.error
    return {
        "cache": found.place.name,
        "url": found.place.url,
        "fingerprint": found.header.spec.fingerprint,
        "spec": found.header.spec.to_dict(),
        "grid": list(shape.grid),
        "tokens": shape.num_tokens,
        "dim": shape.dim,
        "images_per_shard": found.header.images_per_shard,
        "shards": found.shards,
        "images": found.images,
        "bytes": found.bytes,
        "disk_bytes": found.disk_bytes,
        "error": None if error is None else {**asdict(error), "relative": error.relative},
        "failed": dict(found.failed),
        "sealed": found.sealed,
        "writers": list(found.writers),
        "datasets": [asdict(data) for data in found.datasets],
        "runs": list(found.runs),
    }


def difference_rows(found: Difference) -> list[tuple[str, str]]:
    """What a comparison found."""
    rows = [("first", str(found.first)), ("second", str(found.second))]
    rows += [("spec", line) for line in found.spec] or [("spec", "the same")]
    for label, images in (("only in first", found.only_first), ("only in second", found.only_second)):
        few = ", ".join(image[:12] for image in images[:SHOWN]) + (", ..." if len(images) > SHOWN else "")
        rows.append((label, f"{len(images):,} images" + (f" ({few})" if images else "")))
    rows.append(("in both", f"{found.common:,} images"))
    if found.identical_bytes:
        rows.append(("shards", "identical bytes, by their recorded digests"))
    if found.distance is not None:
        d = found.distance
        rows.append(("compared", f"{d.images:,} images, {d.identical:,} of them with identical tokens"))
        rows.append(("largest difference", f"{d.max_abs:.3g}"))
        rows.append(("relative error", f"{d.relative:.3g} in the worst image (alike up to {found.limit:.3g})"))
        rows.append(("smallest cosine", f"{d.cosine:.6f}"))
    verdict = "the same, to the last byte" if found.identical_bytes and not found.spec else "alike"
    return [*rows, ("verdict", verdict if found.alike else "not the same")]


def difference_json(found: Difference) -> dict[str, Any]:
    """What a comparison found, for a script."""
    return {
        "first": found.first.url,
        "second": found.second.url,
        "alike": found.alike,
        "identical_bytes": found.identical_bytes,
        "spec": list(found.spec),
        "only_first": list(found.only_first),
        "only_second": list(found.only_second),
        "common": found.common,
        "distance": None if found.distance is None else asdict(found.distance),
        "limit": found.limit,
    }


def reasons(found: Difference) -> list[str]:
    """Why two caches are not the same."""
    why = []
    if found.spec:
        why.append(f"{len(found.spec)} differences of their specs")
    if found.only_first or found.only_second:
        why.append(f"{len(found.only_first) + len(found.only_second):,} images are only in one of them")
    if found.distance is not None and found.distance.relative > found.limit:
        why.append(f"tokens differ by {found.distance.relative:.3g}, more than {found.limit:.3g}")
    return why
