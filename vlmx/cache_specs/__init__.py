"""What both phases agree on: which tokens these are, where they lie, and how to get them back.

    spec, geometry ─ fingerprint ─▶ name of a cache
                                        │
    phase one:  tokens ─ writer ─▶ [ tokens.zarr + manifest.jsonl + SEALED.json ] ─ reader ─▶ phase two
                                        │
                       sizing, audit, catalog, command; ids: data set key ─▶ image id

`fused` lets several caches be read as one; `presets` are the rows of the paper's tables.

Only numpy, and crc32c from a wheel: no torch, no image library, and zarr-python is not needed to write or to read.
"""
