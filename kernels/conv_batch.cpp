// Batch layout: images are taken a vector at a time, one per lane, and a block of rows at a time. The block is packed to
// (channel, row, column, image) with its padding, and a nonzero is then one fixed offset into it: every load is aligned,
// any stride is only another distance between pixels, and no output is computed in vain.
#include "conv.h"
#include <algorithm>
#include <limits>

namespace fastsparse {
namespace {

constexpr i64 l1_floats = 10 * 1024, l2_floats = 256 * 1024;

// Zeros where the block reaches beyond the image: whole rows above and below, margins left and right.
void clear_margins(const Gather& g, float* plane, i64 top, i64 bottom) {
    const i64 row = g.pw * g.width, left = -g.dx_min * g.width, right = (g.pw + g.dx_min - g.in_w) * g.width;
    std::fill(plane, plane + top * row, 0.f);
    std::fill(plane + bottom * row, plane + g.ph * row, 0.f);
    for (i64 y = top; y < bottom; ++y) {
        std::fill(plane + y * row, plane + y * row + left, 0.f);
        std::fill(plane + (y + 1) * row - right, plane + (y + 1) * row, 0.f);
    }
}

// Whole images: all pixels of neighbouring channels in one go, through the table of where each of them belongs. Channels without
// a nonzero come along where leaving them out would only cut a vector in two.
void pack_whole(const Isa& isa, const Gather& g, const float* in, i64 images, float* block) {
    const i64 plane = g.in_h * g.in_w, n = g.channels;
    for (i64 c = 0; c < n;) {
        if (!g.used[c]) { ++c; continue; }
        i64 end = c + 1;
        while (end < n && (g.used[end] || plane % g.width)) ++end;
        isa.pack(in + c * plane, n * plane, images, (end - c) * plane, block, 0, g.pixel.data() + c * plane);
        c = end;
    }
}

// in[image, channel, y, x] -> block[channel, y, x, image], for the rows that outputs t0.. need. The margins of whole images are
// always the same: clean says that an earlier call cleared them.
void pack_block(const Isa& isa, const Gather& g, const float* in, i64 images, i64 t0, float* block, bool clean) {
    const i64 first = g.istep_y * t0 + g.dy_min, plane = g.in_h * g.in_w;
    const i64 lo = std::clamp<i64>(first, 0, g.in_h), hi = std::clamp<i64>(first + g.ph, lo, g.in_h);
    const i64 top = std::clamp<i64>(lo - first, 0, g.ph), bottom = top + (hi - lo);
    for (i64 c = 0; c < g.channels; ++c) {
        if (!g.used[c]) continue;
        float* dst = block + c * g.plane * g.width;
        if (!(g.whole && clean)) clear_margins(g, dst, top, bottom);
        if (hi > lo && !g.whole)
            isa.pack(in + c * plane + lo * g.in_w, g.channels * plane, images, (hi - lo) * g.in_w, dst + top * g.pw * g.width, 0, g.pixel.data());
    }
    if (g.whole) pack_whole(isa, g, in, images, block);
}

struct TilePos { i64 t, x; int rows, cols; };

std::vector<TilePos> tiles_of(i64 rows, i64 cols, int most) {
    std::vector<TilePos> out;
    const int two = std::min(7, most / 2);
    for (i64 t = 0; t < rows;) {
        const bool pair = t + 2 <= rows && cols <= two;
        i64 x = 0;
        for (int n : split_tiles(cols, pair ? two : most)) { out.push_back({t, x, pair ? 2 : 1, n}); x += n; }
        t += pair ? 2 : 1;
    }
    return out;
}

Task task_of(const Gather& g, i64 task, i64 n) {
    const i64 n0 = task / g.blocks() * g.width, t0 = task % g.blocks() * g.block;
    return {n0, std::min<i64>(g.width, n - n0), t0, std::min(g.block, g.t_rows - t0)};
}

// All tiles of one phase of the block, for the c-th chunk of rows.
void run_phase(const Isa& isa, const Gather& g, const Task& k, i64 phase, i64 c, const float* block, const float* values,
               const float* bias, float* y, i64 ypitch) {
    const i64 py = phase / g.ostep_x, px = phase % g.ostep_x, W = g.width;
    const i64 rows = std::min(k.t_rows, ceil_div(g.out_h - g.ostep_y * k.t0 - py, g.ostep_y)), cols = ceil_div(g.out_w - px, g.ostep_x);
    if (rows <= 0 || cols <= 0) return;
    const Phase& ph = g.phase[phase];
    const Panels& ps = ph.panels;
    for (const TilePos& t : tiles_of(rows, cols, isa.max_spmm)) {
        const SpmmFn run = isa.find(op_spmm, t.rows, t.cols, g.istep_x == 1 && g.ostep_x == 1 ? Lay::unit : Lay::strided).spmm;
        float* to = y + ((t.t * g.ostep_y + py) * g.out_w + t.x * g.ostep_x + px) * W - (ps.row0 + c * ps.chunk) * ypitch;
        for (i64 p = 0; p < ps.n_panels; ++p)
            run({block + (g.istep_y * t.t * g.pw + g.istep_x * t.x) * W, W, g.istep_y * g.pw * W, g.istep_x * W, ph.off.data(), values,
                 ps.begin(c, p), ps.count(c, p), to, ypitch, g.ostep_y * g.out_w * W, g.ostep_x * W, bias, p == 0, ph.perm()});
    }
}

// The gradient's rows and pixels are ypitch and yrow floats apart from one matrix row and image row to the next.
void sample_block(const Isa& isa, const Gather& g, const Task& k, const float* block, const float* dy, i64 ypitch, i64 yrow, float* dv, bool& add) {
    const i64 W = g.width;
    const Phase& ph = g.phase[0];
    for (const TilePos& t : tiles_of(k.t_rows, g.out_w, isa.max_sddmm)) {
        const SddmmFn run = isa.find(op_sddmm, t.rows, t.cols, g.istep_x == 1 ? Lay::unit : Lay::strided).sddmm;
        for (i64 c = 0; c < ph.panels.n_chunks; ++c)
            for (i64 p = 0; p < ph.panels.n_panels; ++p)
                run({block + (g.istep_y * t.t * g.pw + g.istep_x * t.x) * W, W, g.istep_y * g.pw * W, g.istep_x * W, ph.off.data(),
                     ph.panels.begin(c, p), ph.panels.count(c, p), dy + t.t * yrow + t.x * W, ypitch, yrow, dv, add});
        add = true;
    }
}

}  // namespace

// As many output rows at a time as keep the packed block within the L2 cache. Whole images may be larger: rows of a block cost
// their halo again, and a tile reads only its own part of the block.
void set_batch_block(Gather& g) {
    g.pw = std::max(g.istep_x * (g.t_cols - 1) + g.dx_max + 1, g.in_w) - g.dx_min;
    const i64 span = g.dy_max - g.dy_min + 1, row = std::max<i64>(1, g.channels * g.pw * g.width);
    g.block = std::clamp<i64>((l2_floats / row - span) / g.istep_y + 1, 1, std::max<i64>(1, g.t_rows));
    if (row * (g.istep_y * (g.t_rows - 1) + span) <= 8 * l2_floats) g.block = std::max<i64>(1, g.t_rows);
    g.ph = g.istep_y * (g.block - 1) + span;
    g.plane = g.ph * g.pw;
    g.whole = g.block >= g.t_rows && g.channels * g.plane * g.width <= 8 * l2_floats;
    const auto at = [&](i64 y, i64 x) { return (y * g.pw + x - g.dx_min) * g.width; };
    if (!g.whole) {
        for (i64 y = 0; y < g.ph; ++y)
            for (i64 x = 0; x < g.in_w; ++x) g.pixel.push_back(i32(at(y, x)));
        return;
    }
    // Rows that no output needs go to a vector behind the block.
    const i64 channel = g.plane * g.width;
    for (i64 c = 0; c < g.channels; ++c)
        for (i64 y = -g.dy_min; y < g.in_h - g.dy_min; ++y)
            for (i64 x = 0; x < g.in_w; ++x)
                g.pixel.push_back(i32(y >= 0 && y < g.ph ? c * channel + at(y, x) : g.channels * channel));
}

i64 batch_panel(const Gather& g) { return l1_floats / ((g.dy_max - g.dy_min + 1) * (14 * g.istep_x + g.dx_max - g.dx_min) * g.width); }

i64 batch_offset(const Gather& g, i64 dy, i64 dx) { return (dy - g.dy_min) * g.pw + dx - g.dx_min; }

namespace {

i64 packed_floats(const Gather& g) { return round_up(g.channels * g.plane * g.width + g.width, 1024); }

void store_rows(const Isa& isa, const Gather& g, const Task& k, i64 r0, i64 r1, const float* y, i64 ypitch, float* out) {
    const i64 o0 = k.t0 * g.ostep_y, pixels = std::min(k.t_rows * g.ostep_y, g.out_h - o0) * g.out_w, plane = g.out_h * g.out_w;
    out += (k.n0 * g.rows + r0) * plane + o0 * g.out_w;
    if (pixels == plane && ypitch == plane * g.width) return isa.unpack(y, g.width, (r1 - r0) * plane, k.images, out, g.rows * plane, false);
    for (i64 r = r0; r < r1; ++r) isa.unpack(y + (r - r0) * ypitch, g.width, pixels, k.images, out + (r - r0) * plane, g.rows * plane, false);
}

void gather_block(const Isa& isa, const Gather& g, const Task& k, const float* block, const float* values, const float* bias, float* y, float* out) {
    const i64 chunk = g.row_chunk(), ypitch = g.block * g.ostep_y * g.out_w * g.width;
    for (i64 r0 = 0; r0 < g.rows; r0 += chunk) {
        for (i64 p = 0; p < g.phases(); ++p) run_phase(isa, g, k, p, r0 / chunk, block, values, bias, y, ypitch);
        store_rows(isa, g, k, r0, std::min(g.rows, r0 + chunk), y, ypitch, out);
    }
}

i64 result_floats(const Gather& g) { return g.row_chunk() * g.block * g.ostep_y * g.out_w * g.width; }

}  // namespace

void gather_batch(const Isa& isa, const Gather& g, const float* in, i64 n, const float* values, const float* bias, float* out, int threads) {
    const i64 packed = packed_floats(g), scratch = packed + result_floats(g);
    Scratch space(scratch * threads);
    std::vector<char> clean(size_t(threads), 0);
    parallel_for(ceil_div(n, g.width) * g.blocks(), threads, [&](i64 task, int slot) {
        const Task k = task_of(g, task, n);
        float* block = space.data() + slot * scratch;
        pack_block(isa, g, in + k.n0 * g.channels * g.in_h * g.in_w, k.images, k.t0, block, clean[slot]);
        clean[slot] = 1;
        gather_block(isa, g, k, block, values, bias, block + packed, out);
    });
}

void sample_batch(const Isa& isa, const Gather& g, const float* x, const float* dy, i64 n, float* dvalues, int threads) {
    const i64 W = g.width, packed = packed_floats(g), ypitch = g.block * g.out_w * W, scratch = packed + g.rows * ypitch;
    const i64 plane = g.out_h * g.out_w;
    Scratch space(scratch * threads);
    sum_in_parts(isa, ceil_div(n, W) * g.blocks(), g.csr->nnz(), dvalues, threads, [&](i64 task, i64 end, int slot, float* dv) {
        float *block = space.data() + slot * scratch, *dyp = block + packed;
        for (bool add = false, clean = false; task < end; ++task, clean = true) {
            const Task k = task_of(g, task, n);
            pack_block(isa, g, x + k.n0 * g.channels * g.in_h * g.in_w, k.images, k.t0, block, clean);
            const float* grad = dy + k.n0 * g.rows * plane + k.t0 * g.out_w;
            if (g.block >= g.t_rows) isa.pack(grad, g.rows * plane, k.images, g.rows * plane, dyp, W, nullptr);
            else
                for (i64 r = 0; r < g.rows; ++r)
                    isa.pack(grad + r * plane, g.rows * plane, k.images, k.t_rows * g.out_w, dyp + r * ypitch, W, nullptr);
            sample_block(isa, g, k, block, dyp, ypitch, g.out_w * W, dv, add);
        }
    });
}

// Whether what the input gradient packs of dy holds all of it.
bool shares_gradient_batch(const Gather& f, const Gather& b) {
    return f.whole && b.whole && b.dy_min <= 0 && f.out_h - b.dy_min <= b.ph;
}

// Both gradients of 16 images after each other, so that dy is read and packed once.
void backward_batch(const Isa& isa, const Gather& f, const Gather& b, const float* x, const float* dy, i64 n, const float* values,
                    float* dx, float* dvalues, int threads) {
    const i64 W = f.width, xs = packed_floats(f), gs = packed_floats(b), scratch = xs + gs + result_floats(b);
    Scratch space(scratch * threads);
    sum_in_parts(isa, ceil_div(n, W), f.csr->nnz(), dvalues, threads, [&](i64 task, i64 end, int slot, float* dv) {
        float *xp = space.data() + slot * scratch, *grad = xp + xs;
        for (bool add = false, clean = false; task < end; ++task, clean = true) {
            const Task k = task_of(f, task, n), kb = task_of(b, task, n);
            pack_block(isa, b, dy + k.n0 * b.channels * b.in_h * b.in_w, k.images, 0, grad, clean);
            gather_block(isa, b, kb, grad, values, nullptr, grad + gs, dx);
            pack_block(isa, f, x + k.n0 * f.channels * f.in_h * f.in_w, k.images, 0, xp, clean);
            sample_block(isa, f, k, xp, grad - (b.dy_min * b.pw + b.dx_min) * W, b.plane * W, b.pw * W, dv, add);
        }
    });
}

}  // namespace fastsparse
