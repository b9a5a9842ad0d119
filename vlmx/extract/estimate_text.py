"""How is an estimate of an extraction printed?"""

from __future__ import annotations

import json
from collections.abc import Sequence

import click

from vlmx.cache_specs.spec import DType
from vlmx.console import format_bytes, format_seconds, table
from vlmx.extract.estimate import TEXT_TOKENS, Estimate, Profile, Share, Weights

FORMAT = 1  # of the JSON
WORTH_CACHING = 0.05  # below this share of a step, an encoder that works on the fly is hardly noticed


def print_json(estimates: Sequence[Estimate]) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps({"format": FORMAT, "encoders": [each.to_dict() for each in estimates]}, indent=1))


def print_text(estimates: Sequence[Estimate]) -> None:
    """Everything for a reader, on stdout."""
    for each in estimates:
        _print_one(each)
    click.echo("dry run: nothing was stored")


def _print_one(each: Estimate) -> None:
    size = f"{each.height}x{each.width}"
    click.echo(f"{each.backbone} at {size}: {each.tokens:,} tokens of {each.dim} {each.dtype} numbers an image")
    click.echo(f"cache    {each.cache or 'depends on the weights, which are missing: taken to be empty'}")
    click.echo(f"weights  {weights_line(each.weights)}")
    engine = f", scan engine {each.engine}" if each.engine else ""
    click.echo(f"runs on  {each.device}{engine}, computing in {each.compute}")
    if each.engine_fallback:
        click.echo(f"         {each.engine_fallback}")
    for count in each.data:
        click.echo(f"data     {count.describe}")
    click.echo(f"space    {space_line(each)}")
    click.echo(f"time     {time_line(each)}")
    click.echo("")
    random_weights = " (random weights: no guide)" if (each.weights.found or "random:").startswith("random:") else ""
    table(
        ["to store the new images", "takes", f"measured on the sample{random_weights}"],
        [[_profile_name(profile), format_bytes(profile.bytes), _measured(profile)] for profile in each.profiles],
    )
    click.echo("")
    for line in pay_lines(each):
        click.echo(line)
    click.echo("")


def weights_line(weights: Weights) -> str:
    """Where they are, or where they would come from."""
    if weights.found is not None:
        untrained = ": untrained, good only for trying things out" if weights.found.startswith("random:") else ""
        return f"{weights.found}{untrained}"
    if weights.download_to is not None:
        return f"missing: {weights.url} would be downloaded to {weights.download_to}"
    published = f" ({weights.url})" if weights.url else ""
    return f"missing: '{weights.file}'{published}; it would not be downloaded: {weights.why_no_download}"


def space_line(each: Estimate) -> str:
    """What is to be encoded, what it takes, and whether there is room."""
    if not each.new:
        return "nothing is new, nothing would be written"
    shards = f"{each.new_shards:,} shard{'s' if each.new_shards > 1 else ''}"
    free = "an object store has no limit" if each.free_bytes is None else f"{format_bytes(each.free_bytes)} are free"
    line = f"{each.new:,} images to encode, {format_bytes(each.new_bytes)} in {shards}; {free}"
    if each.fits:
        return line
    return f"{line}: it does not fit, and would be refused (ways out: --dtype int8, --cache none, or --force)"


def time_line(each: Estimate) -> str:
    """How long it would take, and how that is known."""
    sample = each.sample
    line = f"about {format_seconds(each.seconds)} for {each.new:,} images" if each.new else "none"
    line += (
        f"; {sample.images_per_s:,.1f} images/s, from {sample.images:,} in {sample.seconds:.1f} s on this machine"
        f" ({sample.passes_side_by_side} x {sample.images_per_pass} images at once)"
    )
    if each.weights.found is None:
        line += "; with random weights, which take the same time"
    if each.new:
        line += f"; the disk must take {format_bytes(each.new_bytes / each.seconds)}/s"
    return line


def pay_lines(each: Estimate) -> list[str]:
    """Whether a cache pays, in words."""
    large, small = each.shares
    lines = [
        f"An encoder that works in every step would be {_percent(large)} of the training of a {large.llm} LLM, "
        f"{_percent(small)} with {small.llm} ({each.encoder_flops / 1e9:,.1f} GFLOP an image; {large.tokens:,} tokens "
        f"an example, {TEXT_TOKENS} of them text, activations recomputed)."
    ]
    pays = each.break_even
    stream = f"vlmx train --cache none --backbone {each.backbone} --res {each.height}x{each.width}"
    if each.weights.given:
        stream += f" --weights {each.weights.given}"
    reading = f"reading at an assumed {format_bytes(pays.read_bytes_per_s)}/s"
    if pays.runs is None:
        lines.append(
            f"A cache never pays in time: {reading} takes {_time(pays.read_s)} a run, encoding again "
            f"{_time(pays.on_the_fly_s)}."
        )
    elif each.new == 0:
        lines.append(f"The cache is there: each run reads for {_time(pays.read_s)} ({reading}) instead of encoding.")
    else:
        lines.append(
            f"A cache pays from {pays.runs} run{'s' if pays.runs > 1 else ''} on: {_time(pays.once_s)} once and "
            f"{_time(pays.read_s)} a run ({reading}), against {_time(pays.on_the_fly_s)} of encoding in every run."
        )
    if each.new and (pays.runs is None or pays.runs > 1):
        lines.append(f"For one run it does not pay: `{stream} ...` encodes on the fly.")
    if each.new and large.share < WORTH_CACHING:
        lines.append(
            f"With a {large.llm} LLM it hardly pays for more: what it saves is {_percent(large)} of each run's "
            f"computing, for {format_bytes(each.new_bytes)}."
        )
    return lines


def _percent(share: Share) -> str:
    return f"{100 * share.share:.2g} %"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else format_seconds(seconds)


_DTYPE_NAMES: dict[DType, str] = {"int8": "int8, a fixed scale for each channel"}


def _profile_name(profile: Profile) -> str:
    name = _DTYPE_NAMES.get(profile.dtype, profile.dtype) + (" with blosc" if profile.codec == "blosc" else "")
    return name + (" (chosen)" if profile.chosen else "")


def _measured(profile: Profile) -> str:
    error = "" if profile.relative_error is None else f"relative error {profile.relative_error:.4f}"
    ratio = "" if profile.ratio is None else f"{profile.ratio:.2f} times smaller"
    return ", ".join(filter(None, [ratio, error]))
