"""Where do the images of an extraction come from?"""

from __future__ import annotations

from vlmx.extract.sources.opening import open_source, open_sources
from vlmx.extract.sources.source import ImageRecord, ImageSource

__all__ = ["ImageRecord", "ImageSource", "open_source", "open_sources"]
