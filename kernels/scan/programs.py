"""The selective scan in Triton. A program takes a block of channels of one sequence, all states in registers, one step after the
other: no associative scan, B and C read once per program, orders followed at load and store.

Long sequences of small batches are cut into segments: a first pass (`carry`) finds what each segment adds to the state and how
much it forgets, a second (`chain`) chains them. Forward keeps the state every KEEP steps; backward recomputes KEEP steps from it,
a few states at a time, so that each exponential is taken once. Sums over channels (B, C) and sequences (A, D, bias) are partial
sums, added in a fixed order. Tiles are (states, channels), laid out so that a thread holds the states of its channel.
"""

# pyright: reportGeneralTypeIssues=false
# what Triton compiles is not quite Python
import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _softplus(x):
    # log1p where exp(x) is small, as torch's; linear above 20
    grown = tl.exp(tl.minimum(x, 20.0))
    one = 1.0 + grown
    small = tl.where(one == 1.0, grown, tl.log(one) * grown / tl.where(one == 1.0, 1.0, one - 1.0))
    return tl.where(x > 20.0, x, small)


@triton.jit
def _visit(
    t, count, first, end, length, order, mask,
    HAS_ORDER: tl.constexpr, HAS_MASK: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(place of step t, whether there is such a step, whether a token is present there); never out of range.

    WIDE: offsets within one row of the batch may pass 2^31.
    """
    place = end - 1 - t if REVERSE else first + t
    inside = t < count
    if HAS_ORDER:
        place = tl.load(order + place, mask=inside, other=0)
        inside = inside & (place >= 0) & (place < length)
    if WIDE:
        place = place.to(tl.int64)
    present = inside
    if HAS_MASK:
        present = inside & (tl.load(mask + place, mask=inside, other=0) != 0)
    return place, inside, present


@triton.jit
def _bounds(s, length, cu, PACKED: tl.constexpr):
    """(first step, end) of a sequence, clamped so that a bad packing reads nothing out of bounds."""
    if PACKED:
        first = tl.minimum(tl.maximum(tl.load(cu + s).to(tl.int32), 0), length)
        end = tl.minimum(tl.maximum(tl.load(cu + s + 1).to(tl.int32), first), length)
    else:
        first = 0 * length
        end = length
    return first, end


@triton.jit
def _step(delta, offset, bias_d, here, SOFTPLUS: tl.constexpr):
    """(dt, delta with its bias) of a token; dt is 0 where none is present."""
    raw = tl.load(delta + offset, mask=here, other=0.0).to(tl.float32) + bias_d
    dt = _softplus(raw) if SOFTPLUS else raw
    return tl.where(here, dt, 0.0), raw


@triton.jit
def _tile(some, d, live_d, states, NB: tl.constexpr):
    """(state, whether it exists, its offset in (D, N)) of a tile (NB, D) of states from `some` on.

    B and C are loaded as such tiles too, each thread its own copy: no exchange between threads.
    """
    n_n = some + tl.arange(0, NB)
    n_nd = n_n[:, None] + tl.zeros_like(d)[None, :]
    return n_nd, (n_nd < states) & live_d[None, :], d[None, :] * states + n_nd


@triton.jit
def forward(
    u, delta, a, b, c, skip, z, bias, order, mask, cu, start, y, last, kept,
    length, width, states, per_group, blocks, segment, segments, sequences, directions, kept_rows,
    u_k, u_b, u_l, delta_k, delta_b, delta_l, b_k, b_b, b_l, b_g, c_k, c_b, c_l, c_g, z_b, z_l, skip_k, bias_k, order_k, order_b,
    y_k, HAS_SKIP: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr, HAS_START: tl.constexpr, SAVE: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    WIDE: tl.constexpr, N: tl.constexpr, NB: tl.constexpr, BD: tl.constexpr, KEEP: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """y and the last state; TOGETHER directions one after the other in one program, added up in y."""
    block = tl.program_id(1)
    s = tl.program_id(0) // segments
    piece = tl.program_id(0) % segments
    group = block // blocks
    within = (block % blocks) * BD + tl.arange(0, BD)
    live_d = within < per_group
    d = group * per_group + within
    first, end = _bounds(s, length, cu, PACKED)
    row = 0 if PACKED else s.to(tl.int64)  # of the batch
    count = end - first
    begin = piece * segment
    stop = tl.minimum(begin + segment, count)
    slot = row * length // KEEP + s if not PACKED else (first // KEEP + s).to(tl.int64)
    if (piece == 0) | (begin < count):
        for turn in range(TOGETHER):
            k = (tl.program_id(2) * TOGETHER + turn).to(tl.int64)
            skip_d = tl.zeros((BD,), tl.float32)
            if HAS_SKIP:
                skip_d = tl.load(skip + k * skip_k + d, mask=live_d, other=0.0).to(tl.float32)
            bias_d = tl.zeros((BD,), tl.float32)
            if HAS_BIAS:
                bias_d = tl.load(bias + k * bias_k + d, mask=live_d, other=0.0).to(tl.float32)
            order_at = order + k * order_k + row * order_b
            mask_at = mask + row * length
            u_at = u + k * u_k + row * u_b + d
            delta_at = delta + k * delta_k + row * delta_b + d
            b_at = b + k * b_k + row * b_b + group * b_g
            c_at = c + k * c_k + row * c_b + group * c_g
            y_at = y + tl.program_id(2).to(tl.int64) * y_k + row * length * width + d
            a_at = a + k * width * states
            from_ = start + ((k * sequences + s) * segments + piece) * states * width
            h = ()
            decay = ()
            for some in tl.static_range(0, N, NB):
                n_nd, live_nd, at_nd = _tile(some, d, live_d, states, NB)
                decay = decay + (tl.load(a_at + at_nd, mask=live_nd, other=0.0).to(tl.float32) * _LOG2E,)
                if HAS_START:
                    h = h + (tl.load(from_ + at_nd, mask=live_nd, other=0.0),)
                else:
                    h = h + (tl.zeros((NB, BD), tl.float32),)
            for t in range(begin, stop):
                if SAVE:
                    if t % KEEP == 0:
                        kept_at = kept + (k * kept_rows + slot + t // KEEP) * states * width
                        for some in tl.static_range(0, N, NB):
                            n_nd, live_nd, at_nd = _tile(some, d, live_d, states, NB)
                            tl.store(kept_at + at_nd, h[some // NB], mask=live_nd)
                place, inside, present = _visit(
                    t, count, first, end, length, order_at, mask_at, HAS_ORDER, HAS_MASK, REVERSE, WIDE
                )
                here = live_d & present
                u_d = tl.load(u_at + place * u_l, mask=here, other=0.0).to(tl.float32)
                dt_d, _ = _step(delta_at, place * delta_l, bias_d, here, SOFTPLUS)
                y_d = skip_d * u_d
                after = ()
                for some in tl.static_range(0, N, NB):
                    n_nd, live_nd, at_nd = _tile(some, d, live_d, states, NB)
                    b_nd = tl.load(b_at + place * b_l + n_nd, mask=live_nd & present, other=0.0).to(tl.float32)
                    c_nd = tl.load(c_at + place * c_l + n_nd, mask=live_nd & present, other=0.0).to(tl.float32)
                    now = tl.exp2(dt_d[None, :] * decay[some // NB]) * h[some // NB] + (dt_d * u_d)[None, :] * b_nd
                    y_d += tl.sum(now * c_nd, axis=0)
                    after = after + (now,)
                h = after
                if HAS_Z:
                    z_d = tl.load(z + row * z_b + place * z_l + d, mask=here, other=0.0).to(tl.float32)
                    y_d *= z_d / (1.0 + tl.exp(-z_d))
                to_y = y_at + place * width
                if TOGETHER > 1:
                    y_d += tl.load(to_y, mask=live_d & inside & (turn > 0), other=0.0)
                tl.store(to_y, y_d.to(y.dtype.element_ty), mask=live_d & inside)
            if stop >= count:
                for some in tl.static_range(0, N, NB):
                    n_nd, live_nd, at_nd = _tile(some, d, live_d, states, NB)
                    tl.store(last + (k * sequences + s) * states * width + at_nd, h[some // NB], mask=live_nd)
            if TOGETHER > 1:
                tl.debug_barrier()  # the next direction adds to what this one stored


@triton.jit
def carry(
    delta, a, v, x, z, bias, order, mask, cu, added, passed,
    length, width, states, per_group, blocks, segment, segments, sequences,
    delta_k, delta_b, delta_l, v_k, v_b, v_l, v_g, x_k, x_b, x_l, z_b, z_l, bias_k, order_k, order_b,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr, BACK: tl.constexpr, N: tl.constexpr, NB: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """What a segment hands on when nothing comes in (`added`), and the sum of its dt (`passed`).

    Forward: h = a h + dt x v with x = u and v = B. BACK, from its end: q = a (q + x v) with x = the gradient of y and v = C.
    """
    block = tl.program_id(1)
    s = tl.program_id(0) // segments
    piece = tl.program_id(0) % segments
    k = tl.program_id(2).to(tl.int64)
    group = block // blocks
    within = (block % blocks) * BD + tl.arange(0, BD)
    live_d = within < per_group
    d = group * per_group + within
    first, end = _bounds(s, length, cu, PACKED)
    row = 0 if PACKED else s.to(tl.int64)
    count = end - first
    begin = piece * segment
    stop = tl.minimum(begin + segment, count)
    bias_d = tl.zeros((BD,), tl.float32)
    if HAS_BIAS:
        bias_d = tl.load(bias + k * bias_k + d, mask=live_d, other=0.0).to(tl.float32)
    order_at = order + k * order_k + row * order_b
    mask_at = mask + row * length
    delta_at = delta + k * delta_k + row * delta_b + d
    v_at = v + k * v_k + row * v_b + group * v_g
    x_at = x + k * x_k + row * x_b + d
    h = ()
    decay = ()
    for some in tl.static_range(0, N, NB):
        n_nd, live_nd, at_nd = _tile(some, d, live_d, states, NB)
        decay = decay + (tl.load(a + k * width * states + at_nd, mask=live_nd, other=0.0).to(tl.float32) * _LOG2E,)
        h = h + (tl.zeros((NB, BD), tl.float32),)
    total_d = tl.zeros((BD,), tl.float32)
    for index in range(begin, stop):
        t = stop - 1 - (index - begin) if BACK else index
        place, inside, present = _visit(t, count, first, end, length, order_at, mask_at, HAS_ORDER, HAS_MASK, REVERSE, WIDE)
        here = live_d & present
        x_d = tl.load(x_at + place * x_l, mask=here, other=0.0).to(tl.float32)
        dt_d, _ = _step(delta_at, place * delta_l, bias_d, here, SOFTPLUS)
        if BACK and HAS_Z:
            z_d = tl.load(z + row * z_b + place * z_l + d, mask=here, other=0.0).to(tl.float32)
            x_d *= z_d / (1.0 + tl.exp(-z_d))
        after = ()
        for some in tl.static_range(0, N, NB):
            n_nd, live_nd, at_nd = _tile(some, d, live_d, states, NB)
            v_nd = tl.load(v_at + place * v_l + n_nd, mask=live_nd & present, other=0.0).to(tl.float32)
            kept = tl.exp2(dt_d[None, :] * decay[some // NB])
            if BACK:
                after = after + (kept * (h[some // NB] + x_d[None, :] * v_nd),)
            else:
                after = after + (kept * h[some // NB] + (dt_d * x_d)[None, :] * v_nd,)
        h = after
        total_d += dt_d
    number = (k * sequences + s) * segments + piece
    for some in tl.static_range(0, N, NB):
        n_nd, live_nd, at_nd = _tile(some, d, live_d, states, NB)
        tl.store(added + number * states * width + at_nd, h[some // NB], mask=live_nd)
    tl.store(passed + number * width + d, total_d, mask=live_d)


@triton.jit
def chain(
    a, added, passed, start, length, width, states, segment, segments, sequences, cu,
    PACKED: tl.constexpr, BACK: tl.constexpr, N: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """`start`, which holds what comes into the first segment (BACK: the last one that has steps), gets what comes into each."""
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    s = tl.program_id(0)
    k = tl.program_id(2).to(tl.int64)
    n = tl.arange(0, N)
    live_d = d < width
    live_nd = (n < states)[:, None] & live_d[None, :]
    decay_nd = tl.load(a + (k * width + d[None, :]) * states + n[:, None], mask=live_nd, other=0.0).to(tl.float32) * _LOG2E
    first, end = _bounds(s, length, cu, PACKED)
    used = tl.maximum((end - first + segment - 1) // segment, 1)
    at = d[None, :] * states + n[:, None]
    base = (k * sequences + s) * segments
    h = tl.load(start + (base + (used - 1 if BACK else 0)) * states * width + at, mask=live_nd, other=0.0)
    for index in range(1, used):
        before = used - index if BACK else index - 1
        total_d = tl.load(passed + (base + before) * width + d, mask=live_d, other=0.0)
        h = tl.exp2(total_d[None, :] * decay_nd) * h
        h += tl.load(added + (base + before) * states * width + at, mask=live_nd, other=0.0)
        after = used - 1 - index if BACK else index
        tl.store(start + (base + after) * states * width + at, h, mask=live_nd)


@triton.jit
def backward(
    dy, u, delta, a, b, c, skip, z, bias, order, mask, cu, kept, carry, du, ddelta, da, db, dc, dskip, dz, dbias,
    length, width, states, per_group, blocks, segment, segments, sequences, kept_rows, groups, batch,
    u_k, u_b, u_l, delta_k, delta_b, delta_l, b_k, b_b, b_l, b_g, c_k, c_b, c_l, c_g, z_b, z_l, skip_k, bias_k, order_k, order_b,
    dy_k, HAS_SKIP: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr, N: tl.constexpr, NB: tl.constexpr,
    BD: tl.constexpr, KEEP: tl.constexpr, TOGETHER: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Every gradient. `carry` holds the gradient that comes into a segment from the steps behind it, and gets what it hands on.

    du (if SHARED) and dz add up TOGETHER directions; da, dskip, dbias are per (direction, sequence, segment), db and dc per
    block of channels. What the last pass over a chunk needs it loads again: registers are what is short.
    """
    block = tl.program_id(1)
    s = tl.program_id(0) // segments
    piece = tl.program_id(0) % segments
    group = block // blocks
    within = (block % blocks) * BD + tl.arange(0, BD)
    live_d = within < per_group
    d = group * per_group + within
    first, end = _bounds(s, length, cu, PACKED)
    row = 0 if PACKED else s.to(tl.int64)
    count = end - first
    begin = piece * segment
    stop = tl.minimum(begin + segment, count)
    slot = row * length // KEEP + s if not PACKED else (first // KEEP + s).to(tl.int64)
    chunks = tl.maximum(stop - begin + KEEP - 1, 0) // KEEP
    turns = tl.program_id(2).to(tl.int64)
    mask_at = mask + row * length
    for turn in range(TOGETHER):
        k = turns * TOGETHER + turn
        skip_d = tl.zeros((BD,), tl.float32)
        if HAS_SKIP:
            skip_d = tl.load(skip + k * skip_k + d, mask=live_d, other=0.0).to(tl.float32)
        bias_d = tl.zeros((BD,), tl.float32)
        if HAS_BIAS:
            bias_d = tl.load(bias + k * bias_k + d, mask=live_d, other=0.0).to(tl.float32)
        order_at = order + k * order_k + row * order_b
        u_at = u + k * u_k + row * u_b
        delta_at = delta + k * delta_k + row * delta_b
        z_at = z + row * z_b
        dy_at = dy + turns * dy_k + row * length * width
        ddelta_at = ddelta + k * batch * length * width + row * length * width
        du_at = du + (turns if SHARED else k) * batch * length * width + row * length * width
        dz_at = dz + turns * batch * length * width + row * length * width
        b_at = b + k * b_k + row * b_b + group * b_g
        c_at = c + k * c_k + row * c_b + group * c_g
        number = (k * sequences + s) * segments + piece
        partial = ((block % blocks).to(tl.int64) * tl.num_programs(2) * TOGETHER + k) * batch + row  # of db and dc
        db_at = db + (partial * length * groups + group) * states
        dc_at = dc + (partial * length * groups + group) * states
        dskip_d = tl.zeros((BD,), tl.float32)
        dbias_d = tl.zeros((BD,), tl.float32)
        for index in range(chunks):
            t0 = begin + (chunks - 1 - index) * KEEP
            u_td = ()
            dt_td = ()
            dy_td = ()
            through_td = ()  # of dt u
            exponent_td = ()  # of dt A
            y_td = ()
            for i in tl.static_range(KEEP):
                place, inside, present = _visit(
                    t0 + i, stop, first, end, length, order_at, mask_at, HAS_ORDER, HAS_MASK, REVERSE, WIDE
                )
                here = live_d & present
                u_d = tl.load(u_at + place * u_l + d, mask=here, other=0.0).to(tl.float32)
                dt_d, _ = _step(delta_at + d, place * delta_l, bias_d, here, SOFTPLUS)
                dy_d = tl.load(dy_at + place * width + d, mask=here, other=0.0).to(tl.float32)
                if HAS_Z:
                    z_d = tl.load(z_at + place * z_l + d, mask=here, other=0.0).to(tl.float32)
                    dy_d *= z_d / (1.0 + tl.exp(-z_d))
                u_td = u_td + (u_d,)
                dt_td = dt_td + (dt_d,)
                dy_td = dy_td + (dy_d,)
                through_td = through_td + (tl.zeros((BD,), tl.float32),)
                exponent_td = exponent_td + (tl.zeros((BD,), tl.float32),)
                y_td = y_td + (tl.zeros((BD,), tl.float32),)
            for some in range(0, N, NB):
                n_nd, live_nd, state_at = _tile(some, d, live_d, states, NB)
                n = some + tl.arange(0, NB)
                live_n = n < states
                a_nd = tl.load(a + k * width * states + state_at, mask=live_nd, other=0.0).to(tl.float32)
                log2_nd = a_nd * _LOG2E
                from_ = kept + (k * kept_rows + slot + t0 // KEEP) * states * width
                h = tl.load(from_ + state_at, mask=live_nd, other=0.0)
                h_t = (h,)
                decay_t = ()
                for i in tl.static_range(KEEP):
                    place, inside, present = _visit(
                        t0 + i, stop, first, end, length, order_at, mask_at, HAS_ORDER, HAS_MASK, REVERSE, WIDE
                    )
                    b_nd = tl.load(b_at + place * b_l + n_nd, mask=live_nd & present, other=0.0).to(tl.float32)
                    decay = tl.exp2(dt_td[i][None, :] * log2_nd)
                    h = decay * h + (dt_td[i] * u_td[i])[None, :] * b_nd
                    h_t = h_t + (h,)
                    decay_t = decay_t + (decay,)
                dh = tl.load(carry + number * states * width + state_at, mask=live_nd, other=0.0)
                da_nd = tl.zeros((NB, BD), tl.float32)
                through_new = ()
                exponent_new = ()
                y_new = ()
                for i in tl.static_range(KEEP - 1, -1, -1):
                    place, inside, present = _visit(
                        t0 + i, stop, first, end, length, order_at, mask_at, HAS_ORDER, HAS_MASK, REVERSE, WIDE
                    )
                    b_nd = tl.load(b_at + place * b_l + n_nd, mask=live_nd & present, other=0.0).to(tl.float32)
                    c_nd = tl.load(c_at + place * c_l + n_nd, mask=live_nd & present, other=0.0).to(tl.float32)
                    if HAS_Z:
                        y_new = (y_td[i] + tl.sum(c_nd * h_t[i + 1], axis=0),) + y_new
                    out = place * (groups * states) + n
                    tl.store(dc_at + out, tl.sum(dy_td[i][None, :] * h_t[i + 1], axis=1), mask=live_n & inside)
                    dh += dy_td[i][None, :] * c_nd
                    tl.store(db_at + out, tl.sum((dt_td[i] * u_td[i])[None, :] * dh, axis=1), mask=live_n & inside)
                    through_new = (through_td[i] + tl.sum(dh * b_nd, axis=0),) + through_new
                    dh *= decay_t[i]
                    exponent = dh * h_t[i]
                    da_nd += exponent * dt_td[i][None, :]
                    exponent_new = (exponent_td[i] + tl.sum(exponent * a_nd, axis=0),) + exponent_new
                through_td = through_new
                exponent_td = exponent_new
                if HAS_Z:
                    y_td = y_new
                tl.store(carry + number * states * width + state_at, dh, mask=live_nd)
                da_at = da + number * states * width + state_at
                da_nd += tl.load(da_at, mask=live_nd & (index > 0), other=0.0)
                tl.store(da_at, da_nd, mask=live_nd)
            for i in tl.static_range(KEEP):
                place, inside, present = _visit(
                    t0 + i, stop, first, end, length, order_at, mask_at, HAS_ORDER, HAS_MASK, REVERSE, WIDE
                )
                here = live_d & present
                write = live_d & inside
                at = place * width + d
                ddelta_d = exponent_td[i] + through_td[i] * u_td[i]
                if SOFTPLUS:
                    _, raw_d = _step(delta_at + d, place * delta_l, bias_d, here, False)
                    ddelta_d *= tl.where(raw_d > 20.0, 1.0, 1.0 / (1.0 + tl.exp(-raw_d)))
                ddelta_d = tl.where(here, ddelta_d, 0.0)
                dbias_d += ddelta_d
                dskip_d += dy_td[i] * u_td[i]
                tl.store(ddelta_at + at, ddelta_d.to(ddelta.dtype.element_ty), mask=write)
                du_d = through_td[i] * dt_td[i] + skip_d * dy_td[i]
                if SHARED and TOGETHER > 1:
                    du_d += tl.load(du_at + at, mask=write & (turn > 0), other=0.0)
                tl.store(du_at + at, du_d.to(du.dtype.element_ty), mask=write)
                if HAS_Z:
                    z_d = tl.load(z_at + place * z_l + d, mask=here, other=0.0).to(tl.float32)
                    dy_d = tl.load(dy_at + at, mask=here, other=0.0).to(tl.float32)
                    gate_d = 1.0 / (1.0 + tl.exp(-z_d))
                    dz_d = dy_d * gate_d * (1.0 + z_d * (1.0 - gate_d)) * (y_td[i] + skip_d * u_td[i])
                    if TOGETHER > 1:
                        dz_d += tl.load(dz_at + at, mask=write & (turn > 0), other=0.0)
                    tl.store(dz_at + at, dz_d.to(dz.dtype.element_ty), mask=write)
        tl.store(dskip + number * width + d, dskip_d, mask=live_d)
        tl.store(dbias + number * width + d, dbias_d, mask=live_d)
        if TOGETHER > 1:
            tl.debug_barrier()
