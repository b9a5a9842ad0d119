"""How do the GPU kernels of the selective scan work, tile by tile? Written in Triton; only `triton_scan` launches them.

Legend: T steps of a tile, D channels of a tile, N states a channel, R numbers that give a step size.

One program owns a block of channels of one segment of one path. It walks the segment a tile of T steps at a time: all
decays and drives of the tile are computed at once, `tl.associative_scan` turns them into what the tile does to any
state that enters it (two numbers a step: a factor and an addend), and the state that the last tile left is folded in.
States are float32 and only ever multiplied by numbers of at most 1.

A path that is cut in several segments is walked twice. The first walk (`FINISH` false) starts every segment from zero
and stores only what the segment does to a state; the second (`FINISH` true) composes what the segments before it do,
in order, and computes the outputs. With one segment the first walk is not needed.

A path is walked backwards by index arithmetic (step t is element L - 1 - t), never by the `reverse` argument of
`associative_scan`, which older releases of Triton got wrong for pairs (triton issue 4362). Steps past the end of a row
or column have step size 0, factor 1 and addend 0; what a tile computes past the end of a path is not used.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found, import-untyped]
import triton.language as tl  # type: ignore[import-not-found, import-untyped]

INTERPRETED: bool = triton.knobs.runtime.interpret


@triton.jit
def _then(factor, addend, next_factor, next_addend):  # type: ignore[no-untyped-def]
    """Two steps in a row as one: first h -> factor h + addend, then the next."""
    return next_factor * factor, next_factor * addend + next_addend


@triton.jit
def _softplus(x):  # type: ignore[no-untyped-def]
    """log(1 + exp(x)) to 2e-7 of its value for any x.

    max(x, 0) + log1p(z) with z = exp(-|x|) in 0..1. log1p(z) / z is a polynomial fitted at Chebyshev nodes (its own
    error is 4e-8), since log(1 + z) loses small z, and since a GPU does eight multiply-adds in the time of a logarithm.
    """
    z = tl.exp(-tl.abs(x))
    p = 0.0051058258 * z - 0.0289919564
    p = p * z + 0.0773807384
    p = p * z - 0.135906002
    p = p * z + 0.190713096
    p = p * z - 0.248339455
    p = p * z + 0.333179343
    p = p * z - 0.499994357
    p = p * z + 0.999999965
    return p * z + tl.maximum(x, 0.0)


@triton.jit(do_not_specialize=["length", "states", "segments", "b_step", "c_step"])  # type: ignore[untyped-decorator]
def tokens_kernel(  # type: ignore[no-untyped-def]
    u_ptr,
    dt_ptr,
    rates_ptr,
    b_ptr,
    c_ptr,
    skip_ptr,
    bias_ptr,
    gate_ptr,
    y_ptr,
    factor_ptr,
    addend_ptr,
    length,
    channels,
    group_channels,
    states,
    segments,
    u_batch,
    u_step,
    u_channel,
    dt_batch,
    dt_step,
    dt_channel,
    b_batch,
    b_step,
    b_group,
    b_state,
    c_batch,
    c_step,
    c_group,
    c_state,
    gate_batch,
    gate_step,
    gate_channel,
    HAS_SKIP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    FINISH: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
):
    """Scan of sequences with N states a channel. Launch grid: (groups * blocks of their channels, segments, images).

    `rates` is (channels, states), contiguous, as are `skip` and `bias`; `y` is (images, length, channels), contiguous;
    `factor` and `addend`, (images, segments, channels, states), are what a segment does to a state.
    """
    blocks = tl.cdiv(group_channels, D)
    group = tl.program_id(0) // blocks
    segment = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    in_group = (tl.program_id(0) % blocks) * D + tl.arange(0, D)
    has_d = in_group < group_channels
    d = group * group_channels + in_group
    n = tl.arange(0, N)
    has_n = n < states
    has_dn = has_d[:, None] & has_n[None, :]
    dn = d[:, None] * states + n[None, :]

    rates_DN = tl.load(rates_ptr + dn, mask=has_dn, other=0.0)
    if HAS_BIAS:
        bias_D = tl.load(bias_ptr + d, mask=has_d, other=0.0)
    if HAS_SKIP:
        skip_D = tl.load(skip_ptr + d, mask=has_d, other=0.0)

    h_DN = tl.zeros([D, N], tl.float32)
    faded_DN = tl.full([D, N], 1.0, tl.float32)
    ends = image * segments * channels * states
    if FINISH:
        for before in range(segment):
            at = ends + before * channels * states + dn
            h_DN = tl.load(factor_ptr + at, mask=has_dn, other=1.0) * h_DN
            h_DN += tl.load(addend_ptr + at, mask=has_dn, other=0.0)

    steps = tl.arange(0, T)
    is_last_T = steps == T - 1
    tiles = tl.cdiv(length, T)
    segment_tiles = tl.cdiv(tiles, segments)
    first_tile = segment * segment_tiles
    for tile in range(first_tile, tl.minimum(first_tile + segment_tiles, tiles)):
        t = tile * T + steps
        has_t = t < length
        step = length - 1 - t if REVERSE else t
        has_td = has_t[:, None] & has_d[None, :]
        has_tn = has_t[:, None] & has_n[None, :]
        u_TD = tl.load(
            u_ptr + image * u_batch + step[:, None] * u_step + d[None, :] * u_channel, mask=has_td, other=0.0
        ).to(tl.float32)
        dt_TD = tl.load(
            dt_ptr + image * dt_batch + step[:, None] * dt_step + d[None, :] * dt_channel, mask=has_td, other=0.0
        ).to(tl.float32)
        b_TN = tl.load(
            b_ptr + image * b_batch + group * b_group + step[:, None] * b_step + n[None, :] * b_state,
            mask=has_tn,
            other=0.0,
        ).to(tl.float32)
        if HAS_BIAS:
            dt_TD += bias_D[None, :]
        if SOFTPLUS:
            dt_TD = _softplus(dt_TD)
        factor_TDN = tl.exp(dt_TD[:, :, None] * rates_DN[None, :, :])
        addend_TDN = (dt_TD * u_TD)[:, :, None] * b_TN[:, None, :]
        factor_TDN, addend_TDN = tl.associative_scan((factor_TDN, addend_TDN), 0, _then)
        states_TDN = factor_TDN * h_DN[None, :, :] + addend_TDN
        h_DN = tl.sum(tl.where(is_last_T[:, None, None], states_TDN, 0.0), axis=0)
        if FINISH:
            c_TN = tl.load(
                c_ptr + image * c_batch + group * c_group + step[:, None] * c_step + n[None, :] * c_state,
                mask=has_tn,
                other=0.0,
            ).to(tl.float32)
            y_TD = tl.sum(states_TDN * c_TN[:, None, :], axis=2)
            if HAS_SKIP:
                y_TD += skip_D[None, :] * u_TD
            if HAS_GATE:
                gate_TD = tl.load(
                    gate_ptr + image * gate_batch + step[:, None] * gate_step + d[None, :] * gate_channel,
                    mask=has_td,
                    other=0.0,
                ).to(tl.float32)
                y_TD *= gate_TD / (1.0 + tl.exp(-gate_TD))
            at = (image * length + step[:, None]) * channels + d[None, :]
            tl.store(y_ptr + at, y_TD.to(y_ptr.dtype.element_ty), mask=has_td)
        else:
            faded_DN *= tl.sum(tl.where(is_last_T[:, None, None], factor_TDN, 0.0), axis=0)
    if not FINISH:
        at = ends + segment * channels * states + dn
        tl.store(factor_ptr + at, faded_DN, mask=has_dn)
        tl.store(addend_ptr + at, h_DN, mask=has_dn)


@triton.jit(do_not_specialize=["rows", "columns", "rank", "segments"])  # type: ignore[untyped-decorator]
def four_ways_kernel(  # type: ignore[no-untyped-def]
    u_ptr,
    low_ptr,
    weight_ptr,
    bias_ptr,
    rates_ptr,
    skip_ptr,
    y_ptr,
    factor_ptr,
    addend_ptr,
    images,
    rows,
    columns,
    channels,
    rank,
    segments,
    FINISH: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
):
    """VMamba's scans of a grid. Launch grid: (blocks of channels, segments, images * 4 directions).

    Direction k walks rows (k even) or columns (k odd), from the last cell to the first if k >= 2. A tile lies in one
    row or column, so that its addresses are one sum and one product. All tensors are contiguous: `u` (images, rows,
    columns, channels), `low` (images, rows, columns, 4, rank + 2), `weight` (4, channels, rank), `bias` and `rates`
    (4, channels), `skip` (channels). Every direction has its own `y`, (4, images, rows, columns, channels), the first
    with the skip, so that their sum is taken in a fixed order and without atomics. `factor` and `addend`, (images, 4,
    segments, channels), are what a segment does to a state.
    """
    segment = tl.program_id(1)
    image = (tl.program_id(2) // 4).to(tl.int64)
    k = tl.program_id(2) % 4
    by_column = k % 2 == 1
    lines = tl.where(by_column, columns, rows)  # a line is a row or a column
    run = tl.where(by_column, rows, columns)
    line_step = tl.where(by_column, 1, columns)  # to the next line and to the next cell of a line, in cells
    cell_step = tl.where(by_column, columns, 1)
    backwards = k >= 2
    first = tl.where(backwards, rows * columns - 1, 0)
    line_step = tl.where(backwards, -line_step, line_step)
    cell_step = tl.where(backwards, -cell_step, cell_step)

    d = tl.program_id(0) * D + tl.arange(0, D)
    has_d = d < channels
    r = tl.arange(0, R)
    has_r = r < rank
    numbers = rank + 2
    u_ptr += image * rows * columns * channels
    low_ptr += image * rows * columns * 4 * numbers + k * numbers
    y_ptr += (k * images + image) * rows * columns * channels

    of_k = k * channels + d
    weight_DR = tl.load(weight_ptr + of_k[:, None] * rank + r[None, :], mask=has_d[:, None] & has_r[None, :], other=0.0)
    bias_D = tl.load(bias_ptr + of_k, mask=has_d, other=0.0)
    rates_D = tl.load(rates_ptr + of_k, mask=has_d, other=0.0)
    skip_D = tl.load(skip_ptr + d, mask=has_d, other=0.0) * tl.where(k == 0, 1.0, 0.0)

    h_D = tl.zeros([D], tl.float32)
    faded_D = tl.full([D], 1.0, tl.float32)
    ends = (image * 4 + k) * segments * channels
    if FINISH:
        for before in range(segment):
            at = ends + before * channels + d
            h_D = tl.load(factor_ptr + at, mask=has_d, other=1.0) * h_D
            h_D += tl.load(addend_ptr + at, mask=has_d, other=0.0)

    steps = tl.arange(0, T)
    is_last_T = steps == T - 1
    line_tiles = tl.cdiv(run, T)
    tiles = lines * line_tiles
    segment_tiles = tl.cdiv(tiles, segments)
    first_tile = segment * segment_tiles
    for tile in range(first_tile, tl.minimum(first_tile + segment_tiles, tiles)):
        on_line = (tile % line_tiles) * T + steps
        has_t = on_line < run
        has_dt = has_d[:, None] & has_t[None, :]
        cell = first + (tile // line_tiles) * line_step + on_line * cell_step
        at = cell[None, :] * channels + d[:, None]
        u_DT = tl.load(u_ptr + at, mask=has_dt, other=0.0).to(tl.float32)
        low_T = low_ptr + cell * (4 * numbers)
        low_RT = tl.load(low_T[None, :] + r[:, None], mask=has_r[:, None] & has_t[None, :], other=0.0)
        b_T = tl.load(low_T + rank, mask=has_t, other=0.0).to(tl.float32)

        # products of two half-precision numbers are exact in float32; float32 itself must not become tf32
        dt_DT = tl.dot(weight_DR, low_RT, input_precision="ieee") + bias_D[:, None]
        dt_DT = tl.where(has_t[None, :], _softplus(dt_DT), 0.0)
        factor_DT = tl.exp(dt_DT * rates_D[:, None])
        addend_DT = dt_DT * b_T[None, :] * u_DT
        factor_DT, addend_DT = tl.associative_scan((factor_DT, addend_DT), 1, _then)
        states_DT = factor_DT * h_D[:, None] + addend_DT
        h_D = tl.sum(tl.where(is_last_T[None, :], states_DT, 0.0), axis=1)
        if FINISH:
            c_T = tl.load(low_T + rank + 1, mask=has_t, other=0.0).to(tl.float32)
            tl.store(y_ptr + at, states_DT * c_T[None, :] + skip_D[:, None] * u_DT, mask=has_dt)
        else:
            faded_D *= tl.sum(tl.where(is_last_T[None, :], factor_DT, 0.0), axis=1)
    if not FINISH:
        at = ends + segment * channels + d
        tl.store(factor_ptr + at, faded_D, mask=has_d)
        tl.store(addend_ptr + at, h_D, mask=has_d)
