"""Phase two: cached tokens and conversations -> a trained connector and LLM. Needs no image and no encoder.

    conversations ─▶ sampler ─▶ collate ─▶ VLM ─▶ loss ─▶ optimiser step ─▶ checkpoints/ ─▶ model/
    cache ─▶ reader ────────────┘           (parallel: one process, or FSDP2 on many)

`loop.train` is the spine, `settings.TrainConfig` all that can be set, `command` the command line.
"""
