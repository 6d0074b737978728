"""Releases: a folder with a network's weights, its description and a model card, written and loaded."""

from rsnet.release.package import load

__all__ = ["load"]
