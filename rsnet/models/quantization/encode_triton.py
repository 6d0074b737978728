"""`encode` on an NVIDIA GPU: one kernel that reads each value once, in place of about ten operations.

Imported where the values are on a GPU; `rsnet.models.quantization.encode` has the same in PyTorch's
operations. Triton's compiler reads the annotations of a kernel, and refuses those that are not its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # values of a program: 4 a thread


@triton.jit
def _encode(  # noqa: PLR0917 - a kernel takes no others
    rows, thresholds, levels, coded, parts, n,
    COUNT: tl.constexpr, COUNTING: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    # 64 bits: activations of a large batch are more than 2^31 values.
    block, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    # What is outside is below all thresholds, and not counted.
    value = tl.load(rows + row * n + at, mask=inside, other=float("-inf")).to(tl.float32)
    chosen = value
    for i in range(COUNT):
        above = value > tl.load(thresholds + row * COUNT + i)
        chosen = tl.where(above, tl.load(levels + row * COUNT + i).to(tl.float32), chosen)
        if COUNTING:
            # Summed block by block, and these in PyTorch: atomic additions would come in any order.
            part = parts + ((row * 2) * COUNT + i) * tl.num_programs(0) + block
            tl.store(part, tl.sum(above.to(tl.float64)))
            total = tl.sum(tl.where(above, value, 0.0).to(tl.float64))
            tl.store(part + COUNT * tl.num_programs(0), total)
    tl.store(coded + row * n + at, chosen.to(coded.dtype.element_ty), mask=inside)


def encode(
    rows: Tensor, thresholds: Tensor, levels: Tensor, coded: Tensor, counting: bool
) -> Tensor | None:
    """Fill `coded`, (C, n), with the levels of `rows`, both dense and of one dtype.

    thresholds, levels: (C, L) float32. Returns, if `counting`, how many of each row lie above each threshold,
    and their sum: (C, 2, L) float64.
    """
    count, n = rows.shape
    number = thresholds.shape[1]
    blocks = triton.cdiv(n, BLOCK)
    shape = (count, 2, number, blocks) if counting else (1,)
    parts = torch.empty(shape, dtype=torch.float64, device=rows.device)
    # Triton launches on the current device.
    with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
        _encode[(blocks, count)](
            rows, thresholds.contiguous(), levels.to(coded.dtype).contiguous(), coded, parts, n,
            COUNT=number, COUNTING=counting, BLOCK=BLOCK, enable_fp_fusion=True,
        )  # fmt: skip
    return parts.sum(3) if counting else None
