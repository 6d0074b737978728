"""A profile as a table, with what it means and which option would move it."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from pipelines.utils.tables import text_table
from rsnet.config.resolve import ResolvedConfig
from rsnet.profiler.step_profiler import Profile

# Share of time that loader and network lose together, from which it is worth a line.
LOST = 0.1


def table(p: Profile) -> str:
    """Return images/s and milliseconds of the three measurements, and the parts of a step."""
    measured = {"loader": p.loader, "computation": p.compute, "together": p.end_to_end}
    speeds = text_table(
        ["", "img/s", "ms/step", "+-"],
        [
            [name, f"{p.images_per_s(t):.0f}", f"{t.mean:.1f}", f"{t.spread:.1f}"]
            for name, t in measured.items()
        ],
        left=(0,),
    )
    parts = text_table(
        ["part, ms/step", "alone", "together"],
        [
            [part, f"{p.compute.parts.get(part, 0.0):.1f}", f"{ms:.1f}"]
            for part, ms in p.end_to_end.parts.items()
        ],
        left=(0,),
    )
    memory = f", peak memory {p.peak_memory_gb:.1f} GB" if p.peak_memory_gb is not None else ""
    if p.teacher_mb is not None:
        memory += f"; the teacher's weights {p.teacher_mb:.0f} MB"
    efficiency = (
        f"{p.tflops:.2f} TFLOP/s, {100 * p.mfu:.0f} % of a large matrix product's {p.peak_tflops:.2f}; "
        f"idle {100 * p.idle:.0f} %{memory}"
    )
    return "\n".join((speeds, parts, efficiency))


def advice(p: Profile, config: ResolvedConfig, options: Any) -> str:
    """Return the bottleneck, and the options that would move it."""
    flags = _for_network(p, config) if p.bottleneck == "network" else _for_loader(p, options)
    alone = f"{p.loader.mean:.1f} against {p.compute.mean:.1f} ms"
    line = f"bottleneck: the {p.bottleneck} ({alone}): {', or '.join(flags)}"
    lost = p.end_to_end.mean / max(p.loader.mean, p.compute.mean) - 1
    if lost < LOST:
        return line
    why = "they share the cores" if p.peak_memory_gb is None else "a larger --prefetch"
    return f"{line}\ntogether they take {100 * lost:.0f} % longer than the slower one alone: {why}"


def _for_network(p: Profile, config: ResolvedConfig) -> list[str]:
    flags = [] if config.amp != "off" else ["--amp bf16"]
    on_gpu = p.peak_memory_gb is not None
    flags += ["--compile"] if on_gpu and not config.compile else []
    flags += ["a larger --batch-size"] if p.mfu < 0.3 else []
    return [*flags, "--sizes-per-step, or a smaller --arch"]


def _for_loader(p: Profile, options: Any) -> list[str]:
    cores = len(os.sched_getaffinity(0))
    flags = [f"--workers up to {cores}"] if getattr(options, "workers", 0) < cores else []
    if p.peak_memory_gb is not None and hasattr(options, "decoder_hw_load"):
        flags.append("--decoder-hw-load")
    return [
        *flags,
        "smaller images (rsnet convert --max-resolution), or rsnet train --pipeline ffcv",
    ]


def images_per_s(p: Profile) -> dict[str, float]:
    """Return the speeds of the three measurements."""
    return {
        "loader": p.images_per_s(p.loader),
        "compute": p.images_per_s(p.compute),
        "end_to_end": p.images_per_s(p.end_to_end),
    }


def figures(p: Profile) -> dict[str, float]:
    """Return the figures that are a single number, under the names that W&B gets."""
    found = as_json(p)
    single = {
        **{f"images_per_s/{name}": speed for name, speed in found["images_per_s"].items()},
        **{f"ms/{part}": ms for part, ms in p.end_to_end.parts.items()},
        **{name: found[name] for name in ("tflops", "mfu", "idle", "peak_memory_gb", "teacher_mb")},
    }
    return {f"profile/{name}": value for name, value in single.items() if value is not None}


def as_json(p: Profile) -> dict[str, Any]:
    """Return all figures."""
    return {
        **asdict(p),
        "images_per_s": images_per_s(p),
        "mfu": p.mfu,
        "idle": p.idle,
        "bottleneck": p.bottleneck,
    }
