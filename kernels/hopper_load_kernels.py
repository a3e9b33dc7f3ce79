"""The group of warps that loads in `hopper_kernels`. Importing this needs triton with Gluon."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from . import hopper_pieces_kernels as pieces


@gluon.jit
def load(
    q_desc, k_desc, v_desc, tail_k_desc, tail_v_desc, indices_ptr, counts_ptr,
    again_ptr, q_smem, k_smem, v_smem, ready_q, free_q, ready_k, free_k, ready_v, free_v,
    plan_b, plan_h, heads, rows, columns, width, total,
    DIM: gl.constexpr, TILE_K: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr, SPLIT: gl.constexpr, TAIL: gl.constexpr, INT8: gl.constexpr,
    FP8: gl.constexpr, PASS: gl.constexpr,
):  # fmt: skip
    """Loads what `compute` multiplies, tile of queries by tile of queries."""
    PER: gl.constexpr = STEP // TILE_K
    q_type: gl.constexpr = q_desc.dtype
    v_type: gl.constexpr = v_desc.dtype
    Q_BYTES: gl.constexpr = pieces.itemsize(INT8)
    V_BYTES: gl.constexpr = pieces.itemsize(FP8)
    WIDE: gl.constexpr = q_desc.block_type.shape[3]
    CHUNKS: gl.constexpr = DIM // WIDE
    # Chunk by chunk of channels, and in each tile by tile: what `_compute` reads as one matrix.
    q_parts = q_smem._reinterpret(q_type, [GROUPS * CHUNKS, 1, 1, 64, WIDE], q_desc.layout)
    k_parts = k_smem._reinterpret(
        q_type, [STAGES * CHUNKS * PER, 1, 1, TILE_K, WIDE], k_desc.layout
    )
    if FP8:
        v_parts = v_smem._reinterpret(v_type, [STAGES * PER, 1, 1, DIM, TILE_K], v_desc.layout)
    else:
        v_parts = v_smem._reinterpret(
            v_type, [STAGES * (DIM // 64) * PER, 1, 1, TILE_K, 64], v_desc.layout
        )
    if TAIL:
        tail_k_parts = k_smem._reinterpret(
            q_type, [STAGES * CHUNKS, 1, 1, STEP, WIDE], tail_k_desc.layout
        )
        if FP8:
            tail_v_parts = v_smem._reinterpret(
                v_type, [STAGES * PER, 1, 1, DIM, TILE_K], tail_v_desc.layout
            )
        else:
            tail_v_parts = v_smem._reinterpret(
                v_type, [STAGES * (DIM // 64), 1, 1, STEP, 64], tail_v_desc.layout
            )
    step = 0
    turn = 0
    if PASS == 2:
        total = gl.load(again_ptr)
    for number in range(gl.program_id(0), total, gl.num_programs(0)):
        at = number
        if PASS == 2:
            at = gl.load(again_ptr + 1 + number)
        row = at % rows
        head = (at // rows) % heads
        batch = at // (rows * heads)
        in_plan = batch * plan_b + head * plan_h + row // SPLIT
        count = gl.load(counts_ptr + in_plan)
        mbarrier.wait(free_q, (turn & 1) ^ 1)
        mbarrier.expect(ready_q, GROUPS * 64 * DIM * Q_BYTES)
        for part in gl.static_range(GROUPS):
            for c in gl.static_range(CHUNKS):
                tma.async_copy_global_to_shared(
                    q_desc, [batch, head, (row * GROUPS + part) * 64, c * WIDE], ready_q,
                    q_parts.index(part * CHUNKS + c),
                )  # fmt: skip
        turn += 1
        for place in range(0, count, PER):
            stage = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(free_k.index(stage), phase ^ 1)
            mbarrier.expect(ready_k.index(stage), STEP * DIM * Q_BYTES)
            for i in gl.static_range(PER):
                # Behind the last tile of the list: a tile behind the last key, loaded as zeros.
                tile = gl.load(
                    indices_ptr + in_plan * width + place + i, mask=place + i < count, other=columns
                )
                for c in gl.static_range(CHUNKS):
                    tma.async_copy_global_to_shared(
                        k_desc, [batch, head, tile * TILE_K, c * WIDE], ready_k.index(stage),
                        k_parts.index((stage * CHUNKS + c) * PER + i),
                    )  # fmt: skip
            mbarrier.wait(free_v.index(stage), phase ^ 1)
            mbarrier.expect(ready_v.index(stage), STEP * DIM * V_BYTES)
            for i in gl.static_range(PER):
                tile = gl.load(
                    indices_ptr + in_plan * width + place + i, mask=place + i < count, other=columns
                )
                if FP8:
                    tma.async_copy_global_to_shared(
                        v_desc, [batch, head, 0, tile * TILE_K], ready_v.index(stage),
                        v_parts.index(stage * PER + i),
                    )  # fmt: skip
                else:
                    for c in gl.static_range(DIM // 64):
                        tma.async_copy_global_to_shared(
                            v_desc, [batch, head, tile * TILE_K, c * 64], ready_v.index(stage),
                            v_parts.index((stage * (DIM // 64) + c) * PER + i),
                        )  # fmt: skip
            step += 1
        if TAIL:
            for start in range(0, columns, STEP):
                stage = step % STAGES
                phase = (step // STAGES) & 1
                mbarrier.wait(free_k.index(stage), phase ^ 1)
                mbarrier.expect(ready_k.index(stage), STEP * DIM * Q_BYTES)
                for c in gl.static_range(CHUNKS):
                    tma.async_copy_global_to_shared(
                        tail_k_desc, [batch, head, start, c * WIDE], ready_k.index(stage),
                        tail_k_parts.index(stage * CHUNKS + c),
                    )  # fmt: skip
                mbarrier.wait(free_v.index(stage), phase ^ 1)
                mbarrier.expect(ready_v.index(stage), STEP * DIM * V_BYTES)
                if FP8:
                    for i in gl.static_range(PER):
                        tma.async_copy_global_to_shared(
                            tail_v_desc, [batch, head, 0, start + i * TILE_K],
                            ready_v.index(stage), tail_v_parts.index(stage * PER + i),
                        )  # fmt: skip
                else:
                    for c in gl.static_range(DIM // 64):
                        tma.async_copy_global_to_shared(
                            tail_v_desc, [batch, head, start, c * 64], ready_v.index(stage),
                            tail_v_parts.index(stage * (DIM // 64) + c),
                        )  # fmt: skip
                step += 1
