"""Compiles the Hopper kernels for a device that need not be there; run by `test_hopper.py`."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from kinora.kernels.hopper_kernels import forward
from kinora.kernels.hopper_pieces_kernels import swizzle


def compiled(
    dim: int, tile_k: int, *, capability: int = 90, step: int = 128, stages: int = 3,
    groups: int = 2, tail: bool = False, biased: bool = False, masked: bool = False,
    int8: bool = False, fp8: bool = False, part: int = 0, registers: int = 240, **options: int,
) -> Any:  # fmt: skip
    """`forward` compiled for a device that need not be there; what Triton returns."""
    constants = {
        "DIM": dim, "TILE_K": tile_k, "STEP": step, "STAGES": stages, "GROUPS": groups,
        "SPLIT": 1, "TAIL": tail, "BIASED": biased, "MASKED": masked, "INT8": int8, "FP8": fp8,
        "PASS": part, "REGISTERS": registers,
    }  # fmt: skip

    def block(tokens: int, last: int, itemsize: int, kind: str) -> str:
        bytes_ = swizzle(last, itemsize)
        layout = gl.NVMMASharedLayout(bytes_, 8 * itemsize, rank=4)
        return f"tensordesc<{kind}[1, 1, {tokens}, {bytes_ // itemsize}],{layout!r}>"

    qk, size = ("i8", 1) if int8 else ("bf16", 2)
    types = {
        "q_desc": block(64, dim, size, qk),
        "k_desc": block(tile_k, dim, size, qk),
        "tail_k_desc": block(step, dim, size, qk),
        "v_desc": block(dim, tile_k, 1, "fp8e4nv") if fp8 else block(tile_k, dim, 2, "bf16"),
        "tail_v_desc": block(dim, tile_k, 1, "fp8e4nv") if fp8 else block(step, dim, 2, "bf16"),
        "out_ptr": "*bf16", "indices_ptr": "*i32", "counts_ptr": "*i32", "left_out_ptr": "*i32",
        "within_ptr": "*i32", "again_ptr": "*i32",
        "factor": "fp32", "one": "fp32", "last": "fp32",
    }  # fmt: skip
    names: list[str] = forward.arg_names

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        return types.get(name, "*fp32" if name.endswith("_ptr") else "i32")

    source = GluonASTSource(
        forward,
        {it: kind(it) for it in names},
        {(names.index(it),): value for it, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i, it in enumerate(names) if it.endswith("_ptr")},
    )
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, **options}
    )


def steps(sass: str) -> list[list[str]]:
    """Instructions of the innermost loops that multiply."""
    lines = sass.split("\n")
    labels = {line.rstrip(":"): at for at, line in enumerate(lines) if line.startswith("LBB")}
    ends = ((line.split()[-1].rstrip(";"), at) for at, line in enumerate(lines) if " BRA " in line)
    loops = [(labels[to], at) for to, at in ends if labels.get(to, at) < at]
    found = [loop for loop in loops if any("GMMA" in it for it in lines[slice(*loop)])]
    inner = [
        (start, end)
        for start, end in found
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in found)
    ]
    return [lines[start:end] for start, end in inner]


EIGHT = {"int8": True, "fp8": True}
HALF = {"step": 64, "groups": 1, "maxnreg": 128}
VARIANTS: list[tuple[int, int, dict[str, Any]]] = [
    (128, 64, {}),
    (128, 64, {"part": 1}),
    (128, 64, {"part": 2, "int8": True}),
    (64, 32, {"biased": True, "part": 1}),
    (128, 64, {"tail": True, **EIGHT}),
    (64, 128, {"int8": True, "part": 1}),
    (128, 128, {"fp8": True}),
    (128, 64, {"part": 1, **HALF}),
    (128, 64, {"masked": True, "part": 1}),
    (128, 64, {"masked": True, "part": 2}),
    (128, 32, {"masked": True, "int8": True}),
    (64, 64, {"masked": True, **HALF}),
]

if __name__ == "__main__":
    for dim, key, more in VARIANTS:
        kernel = compiled(dim, key, **more)
        # Of a processor; and no register spilled into memory at each step, which only the assembler
        # does. A few that a query tile needs once may be.
        assert kernel.metadata.shared <= 227 * 1024, (dim, key, more)
        found = steps(kernel.asm["sass"])
        assert found, (dim, key, more)
        for step in found:
            assert not any("STL" in line or "LDL" in line for line in step), (dim, key, more)
        assert "wgmma" in kernel.asm["ptx"], (dim, key, more)
