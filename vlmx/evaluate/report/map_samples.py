"""Which similarity maps does the page show? Those of a few box samples, for the caches that are at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlmx.cache_specs.catalog import stem
from vlmx.cache_specs.geometry import Box
from vlmx.cache_specs.token_source import TokenSource
from vlmx.console import note
from vlmx.errors import CacheError, DataError, UnknownNameError, UsageError
from vlmx.evaluate.maps import RegionMap, region_map
from vlmx.evaluate.maps_plot import COLORS, scale_of
from vlmx.evaluate.report.collect import Report
from vlmx.evaluate.report.pictures import data_uri, png_of
from vlmx.evaluate.report.samples import Sample

MOST_MAPS = 6  # samples


@dataclass(frozen=True, kw_only=True)
class MapCell:
    """The map of one cache.

    Attributes:
        title: the cache's name without its fingerprint.
        uri: an image with a pixel a token.
        extent: where it lies, x1 y1 x2 y2 in pixels of the photo.
        inside, outside: mean similarity within the box and elsewhere in the photo.
        area: area under the ROC curve of "in the box"; None where all cells are alike.
    """

    title: str
    uri: str
    extent: Box
    inside: float
    outside: float
    area: float | None


@dataclass(frozen=True, kw_only=True)
class MapSample:
    """One box question and the maps of its region.

    Attributes:
        sample: the question.
        cells: one a cache.
        low, high: the similarities that the colour scale ends at, for all of its maps.
    """

    sample: Sample
    cells: Sequence[MapCell]
    low: float
    high: float


def map_samples(report: Report, samples: Sequence[Sample]) -> list[MapSample]:
    """Maps for the first samples of each box benchmark, benchmark by benchmark, MOST_MAPS at most."""
    boxes = [sample for sample in samples if sample.box is not None]
    by_benchmark: dict[str, list[Sample]] = {}
    for sample in boxes:
        by_benchmark.setdefault(sample.benchmark, []).append(sample)
    depth = max((len(members) for members in by_benchmark.values()), default=0)
    in_turn = [members[at] for at in range(depth) for members in by_benchmark.values() if at < len(members)]
    readers = _readers(report)
    found: list[MapSample] = []
    for sample in in_turn:
        if len(found) == MOST_MAPS:
            break
        regions = _regions(report, sample, readers)
        if regions:
            low, high = scale_of(regions)
            cells = [_cell(region, low, high) for region in regions]
            found.append(MapSample(sample=sample, cells=cells, low=low, high=high))
    return found


def _readers(report: Report) -> dict[str, TokenSource]:
    from vlmx.cache_specs.reader import open_cache

    readers = {}
    for cache in dict.fromkeys(run.cache for run in report.runs):
        try:
            readers[cache] = open_cache(cache, report.caches, allow_partial=True)
        except UnknownNameError:
            continue  # noted when the run was read
    return readers


def _regions(report: Report, sample: Sample, readers: Mapping[str, TokenSource]) -> list[RegionMap]:
    """The maps of a sample, from those caches that have its image."""
    from vlmx.cache_specs.ids import ImageTable
    from vlmx.data.benchmarks import BENCHMARKS

    if not readers:
        return []
    box, source_wh = sample.asked.region
    try:
        table = ImageTable.open(report.caches, BENCHMARKS.get(sample.benchmark).table)
        image = table.id_of(sample.asked.image)
    except DataError as error:
        note(f"no similarity maps of {sample.benchmark}: {error.what}")
        return []
    regions = []
    for cache, reader in readers.items():
        try:
            regions.append(region_map(reader, image, box, source_wh))
        except (CacheError, UsageError) as error:
            note(f"no similarity map of {sample.asked.id} from {cache}: {error.what}")
    return regions


def _cell(region: RegionMap, low: float, high: float) -> MapCell:
    from matplotlib import colormaps

    share_RC = np.clip((region.similarity_RC - low) / (high - low), 0, 1)  # padding may lie beyond the scale
    pixels_RC3 = np.round(255 * colormaps[COLORS](share_RC)[:, :, :3]).astype(np.uint8)
    return MapCell(
        title=stem(region.cache),
        uri=data_uri(png_of(pixels_RC3)),
        extent=region.extent,
        inside=region.inside,
        outside=region.outside,
        area=region.area_under_roc,
    )
