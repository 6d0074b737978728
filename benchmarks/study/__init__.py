"""What private BatchNorm, distillation and the rest do: the paper's comparison, under one budget."""

from benchmarks.study.rows import Options

__all__ = ["Options"]
