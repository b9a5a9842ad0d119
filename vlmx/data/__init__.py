"""Annotations: training mixtures, benchmarks, the embedded mini study. Never pixels or tokens of a cache."""
