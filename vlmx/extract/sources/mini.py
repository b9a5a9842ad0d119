"""Which images has the embedded mini study?"""

from __future__ import annotations

from functools import cache, partial

from vlmx.extract.sources.source import ImageRecord, ImageSource


def open_mini(name: str | None) -> ImageSource:
    """The scenes of the study, rendered when they are read."""
    from vlmx.data.mini import study

    keys = [key for split in ("train", "test") for key in study.scene_keys(split)]
    render = cache(study.image_bytes_of)  # a scene is read twice, to hash and to decode; all of them are 84 MB
    images = tuple(ImageRecord(key=key, load=partial(render, key)) for key in keys)
    return ImageSource(
        name=name or "mini", describe=f"the embedded mini study: {len(images):,} rendered scenes", images=images
    )
