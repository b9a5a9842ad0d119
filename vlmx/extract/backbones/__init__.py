"""Which frozen encoders can make tokens?

`catalogue` lists them (pure data), `base` has `build_backbone` and the interface of a family, every other module is one
family. Importing this package imports nothing else.
"""
