"""How do images become a cache of tokens? Phase one of vlmx.

    image source -> geometry (letterbox) -> normalise -> Backbone (frozen) -> tokens (B, N, D) -> cache writer

`backbones/` holds one file a family and the catalogue of names, `ops/` the numerical kernels they share, `weights`
finds and reads checkpoint files safely. Importing this package imports nothing else.
"""
