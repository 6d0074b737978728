"""Triton's compiler without a GPU."""

from __future__ import annotations


def compile_for_h100(kernel, types, constants, cache, monkeypatch):
    """Compile a kernel, whose arguments are *fp32 if `types` has no other, and return its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values)
    options = {"enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
