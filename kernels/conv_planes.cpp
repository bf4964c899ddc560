// Planes layout: one image at a time, its lanes neighbouring pixels. Each channel is copied once with its padding (and, for a
// stride, split in phases first); a nonzero is then one flat offset, and the inner loop runs over contiguous pixels, across
// the ends of rows. What is computed between the rows is dropped.
#include "conv.h"
#include <algorithm>

namespace fastsparse {
namespace {

constexpr i64 row_chunk = 32, l2_floats = 256 * 1024;

// Pixels from the first to the last of n rows, in the pitch of the packed block.
i64 flat(const Gather& g, i64 rows, i64 cols) { return (rows - 1) * g.pw + cols; }

// One row of the image with its margins: dst[j] = src[first + j*step], 0 outside.
void copy_row(const float* src, i64 n, i64 first, i64 step, float* dst, i64 m) {
    const i64 lo = std::clamp<i64>(first < 0 ? ceil_div(-first, step) : 0, 0, m);
    const i64 hi = std::clamp<i64>(first >= n ? 0 : ceil_div(n - first, step), lo, m);
    std::fill(dst, dst + lo, 0.f);
    if (step == 1) std::memcpy(dst + lo, src + first + lo, size_t(hi - lo) * sizeof(float));
    else for (i64 j = lo; j < hi; ++j) dst[j] = src[first + j * step];
    std::fill(dst + hi, dst + m, 0.f);
}

// in[channel, y, x] -> block[channel, phase, row, column], for the rows that outputs t0.. need.
void pack_block(const Gather& g, const float* in, i64 t0, float* block) {
    for (i64 c = 0; c < g.channels; ++c) {
        if (!g.used[c]) continue;
        const float* src = in + c * g.in_h * g.in_w;
        float* dst = block + c * g.plane;
        for (i64 py = 0; py < g.istep_y; ++py)
            for (i64 px = 0; px < g.istep_x; ++px) {
                for (i64 r = 0; r < g.ph; ++r, dst += g.pw) {
                    const i64 y = g.istep_y * (t0 + r) + g.dy_min + py;
                    if (y < 0 || y >= g.in_h) std::fill(dst, dst + g.pw, 0.f);
                    else copy_row(src + y * g.in_w, g.in_w, g.dx_min + px, g.istep_x, dst, g.pw);
                }
                std::fill(dst, dst + g.width, 0.f);
                dst += g.width;
            }
    }
}

// A block of a 1x1 kernel is in the image already.
bool in_place(const Gather& g, const Task& k) {
    return g.taps == 1 && g.steps() == 1 && g.dy[0] == 0 && g.dx[0] == 0 && g.out_w == g.in_w && g.out_h == g.in_h && k.t_rows * g.out_w % g.width == 0;
}

Task task_of(const Gather& g, i64 task) {
    const i64 t0 = task % g.blocks() * g.block;
    return {task / g.blocks(), 1, t0, std::min(g.block, g.t_rows - t0)};
}

// n vectors in tiles as even as they come, of the widths for which there is a kernel.
template <class F> void each_tile(i64 n, int most, F&& f) {
    for (i64 v = 0; v < n;) {
        const i64 even = ceil_div(n - v, ceil_div(n - v, most));
        int best = 1;
        for (int s : {14, 12, 10, 8, 7, 6, 5, 4, 3, 2})
            if (s <= most && s <= n - v && (s <= even || s == n - v)) { best = s; break; }
        f(v, best);
        v += best;
    }
}

// out[row, y, x] = y[row, t, x] for one phase.
void copy_out(const Gather& g, const float* y, i64 t0, i64 rows, i64 py, i64 px, i64 cols, float* out) {
    for (i64 t = 0; t < rows; ++t) {
        const float* src = y + t * g.pw;
        float* dst = out + ((t0 + t) * g.ostep_y + py) * g.out_w + px;
        if (g.ostep_x == 1) std::memcpy(dst, src, size_t(cols) * sizeof(float));
        else for (i64 x = 0; x < cols; ++x) dst[x * g.ostep_x] = src[x];
    }
}

// Rows r0..r1 of one phase of a block.
void run_phase(const Isa& isa, const Gather& g, const Task& k, i64 phase, i64 r0, i64 r1, const float* block, const i32* off,
               const float* values, const float* bias, float* y, i64 ypitch, float* out) {
    const i64 py = phase / g.ostep_x, px = phase % g.ostep_x, base = phase * g.rows;
    const i64 rows = std::min(k.t_rows, ceil_div(g.out_h - g.ostep_y * k.t0 - py, g.ostep_y)), cols = ceil_div(g.out_w - px, g.ostep_x);
    if (rows <= 0 || cols <= 0) return;
    const i64 W = g.width;
    each_tile(ceil_div(flat(g, rows, cols), W), isa.max_spmm, [&](i64 v, int n) {
        isa.find(op_spmm, 1, n, true).spmm({block + v * W, 1, 0, W, off, values, g.segs.data() + base + r0, r1 - r0,
                                           y + v * W - (base + r0) * ypitch, ypitch, 0, W, bias, true});
    });
    for (i64 r = r0; r < r1; ++r) copy_out(g, y + (r - r0) * ypitch, k.t0, rows, py, px, cols, out + r * g.out_h * g.out_w);
}

}  // namespace

void set_planes_block(Gather& g) {
    const i64 span_y = g.dy_max - g.dy_min, span_x = g.dx_max - g.dx_min;
    g.pw = g.t_cols + span_x / g.istep_x;
    const i64 row = std::max<i64>(1, g.channels * g.pw * g.steps());
    g.block = std::clamp<i64>(l2_floats / row - span_y / g.istep_y, 1, std::max<i64>(1, g.t_rows));
    g.ph = g.block + span_y / g.istep_y;
    g.plane = (g.ph * g.pw + g.width) * g.steps();
}

i64 planes_offset(const Gather& g, i64 dy, i64 dx) {
    const i64 y = dy - g.dy_min, x = dx - g.dx_min;
    return (y % g.istep_y * g.istep_x + x % g.istep_x) * (g.ph * g.pw + g.width) + y / g.istep_y * g.pw + x / g.istep_x;
}

void gather_planes(const Isa& isa, const Gather& g, const float* in, i64 n, const float* values, const float* bias, float* out, int threads) {
    const i64 chunk = std::min(row_chunk, g.rows), ypitch = round_up(flat(g, g.block, g.t_cols), g.width) + g.width;
    const i64 packed = round_up(g.channels * g.plane, 1024), scratch = packed + chunk * ypitch;
    Scratch space(scratch * threads);
    parallel_for(n * g.blocks(), threads, [&](i64 task, int slot) {
        const Task k = task_of(g, task);
        const float* image = in + k.n0 * g.channels * g.in_h * g.in_w;
        float* block = space.data() + slot * scratch;
        pack_block(g, image, k.t0, block);
        for (i64 r0 = 0; r0 < g.rows; r0 += chunk)
            for (i64 p = 0; p < g.phases(); ++p)
                run_phase(isa, g, k, p, r0, std::min(g.rows, r0 + chunk), block, g.off.data(), values, bias, block + packed, ypitch,
                          out + k.n0 * g.rows * g.out_h * g.out_w);
    });
}

void sample_planes(const Isa& isa, const Gather& g, const float* x, const float* dy, i64 n, float* dvalues, int threads) {
    const i64 W = g.width, ypitch = round_up(g.block * g.pw, W), packed = round_up(g.channels * g.plane, 1024), scratch = packed + g.rows * ypitch;
    Scratch space(scratch * threads);
    sum_in_parts(isa, n * g.blocks(), g.csr->nnz(), dvalues, threads, [&](i64 task, i64 end, int slot, float* dv) {
        float *block = space.data() + slot * scratch, *dyp = block + packed;
        for (bool add = false; task < end; ++task) {
            const Task k = task_of(g, task);
            pack_block(g, x + k.n0 * g.channels * g.in_h * g.in_w, k.t0, block);
            for (i64 r = 0; r < g.rows; ++r) {
                float* dst = dyp + r * ypitch;
                const float* src = dy + ((k.n0 * g.rows + r) * g.out_h + k.t0) * g.out_w;
                for (i64 t = 0; t < k.t_rows; ++t) copy_row(src + t * g.out_w, g.out_w, 0, 1, dst + t * g.pw, g.pw);
                std::fill(dst + k.t_rows * g.pw, dst + ypitch, 0.f);
            }
            each_tile(ceil_div(flat(g, k.t_rows, g.out_w), W), isa.max_sddmm, [&](i64 v, int m) {
                isa.find(op_sddmm, 1, m, true).sddmm({block + v * W, 1, 0, W, g.off.data(), g.segs.data(), g.rows, dyp + v * W, ypitch, 0, W, dv, add});
                add = true;
            });
        }
    });
}

}  // namespace fastsparse
