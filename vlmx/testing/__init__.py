"""What must every registered component keep? Suites for authors of plug-ins; our own components pass them too."""

from vlmx.testing.backbones import BackboneSuite

__all__ = ["BackboneSuite"]
