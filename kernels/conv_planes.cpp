// Planes layout: one image at a time, its lanes neighbouring pixels. Each channel is copied once with its padding (and, for a
// stride, split in phases first); a nonzero is then one flat offset, and the inner loop runs over contiguous pixels, across
// the ends of rows. What is computed between the rows is dropped. With AVX-512, where few lanes are lost by it, rows are whole
// vectors ("shifted"): a load that straddles two cache lines costs two there, and all are aligned then.
#include "conv.h"
#include <algorithm>
#include <limits>

namespace fastsparse {
namespace {

constexpr i64 l2_floats = 256 * 1024, most_packed = 160 * 1024, in_place = 64 * 1024;
constexpr i64 tile = 16, tile_both = 8, tile_usual = 14;   // vectors of a tile of whole rows, at most; for both gradients at once; what blocks and panels are made for

// Pixels from the first to the last of n rows, in the pitch of the packed block; to the last one's end if shifted.
i64 flat(const Gather& g, i64 rows, i64 cols) { return g.shifted ? rows * g.pw : (rows - 1) * g.pw + cols; }

// A channel's phases of the stride, those of one row phase after each other.
void pack_strided(const Isa& isa, const Gather& g, const float* src, i64 t0, float* dst) {
    for (i64 py = 0; py < g.istep_y; ++py, dst += g.istep_x * g.step_plane) {
        // Input row of packed row r: step*r + y0.
        const i64 y0 = g.istep_y * t0 + g.dy_min + py, pitch = g.istep_y * g.in_w;
        const i64 lo = std::clamp<i64>(y0 < 0 ? ceil_div(-y0, g.istep_y) : 0, 0, g.ph);
        const i64 hi = std::clamp<i64>(y0 >= g.in_h ? 0 : ceil_div(g.in_h - y0, g.istep_y), lo, g.ph);
        const float* from = src + (y0 + g.istep_y * lo) * g.in_w;
        const char* used = &g.used_step[py * g.istep_x];
        const bool both = g.istep_x == 2 && used[0] && used[1];
        if (both) isa.unzip(from, pitch, hi - lo, g.in_w, g.dx_min, dst + lo * g.pw, dst + lo * g.pw + g.step_plane, g.pw);
        for (i64 px = 0; px < g.istep_x; ++px) {
            if (!used[px]) continue;
            float* phase = dst + px * g.step_plane;
            if (!both) isa.pad_every(from, pitch, hi - lo, g.in_w, g.dx_min + px, g.istep_x, phase + lo * g.pw, g.pw);
            std::fill(phase, phase + lo * g.pw, 0.f);
            std::fill(phase + hi * g.pw, phase + g.step_plane, 0.f);
        }
    }
}

void pack_plain(const Isa& isa, const Gather& g, const float* src, i64 t0, float* dst) {
    const i64 first = t0 + g.dy_min, lo = std::clamp<i64>(first, 0, g.in_h), hi = std::clamp<i64>(first + g.ph, lo, g.in_h);
    const i64 top = std::clamp<i64>(lo - first, 0, g.ph), bottom = top + hi - lo;
    std::fill(dst, dst + top * g.pw, 0.f);
    if (hi > lo) isa.pad(src + lo * g.in_w, g.in_w, hi - lo, std::min(g.in_w, g.pw + g.dx_min), dst + top * g.pw, g.pw, -g.dx_min);
    std::fill(dst + bottom * g.pw, dst + g.plane, 0.f);
}

i64 tasks(const Gather& g, i64 n) { return ceil_div(n, g.side) * g.blocks(); }

Task task_of(const Gather& g, i64 task, i64 n) {
    const i64 n0 = task / g.blocks() * g.side, t0 = task % g.blocks() * g.block;
    return {n0, std::min(g.side, n - n0), t0, std::min(g.block, g.t_rows - t0)};
}

// Channels of images side by side, by the part of the tables that is this block's.
void pack_images(const Isa& isa, const Gather& g, const float* in, const Task& k, float* block) {
    const i64 all = i64(g.keep.size()) / g.side, first = k.t0 * g.pw / g.width, n = std::min(g.plane / g.width, all - first), plane = g.in_h * g.in_w;
    const int most = plane < 2048 ? 1 : 4;   // large planes come faster four at a time
    for (i64 c = 0; c < g.channels;) {
        const float* src[4]; float* dst[4];
        int m = 0;
        for (; c < g.channels && m < most; ++c)
            if (g.used[c]) { src[m] = in + c * plane; dst[m++] = block + c * g.plane; }
        for (i64 i = 0; i < k.images; ++i) {
            isa.expand(src, m, g.from.data() + i * all + first, g.keep.data() + i * all + first, n, g.in_runs, i > 0, dst);
            for (int j = 0; j < m; ++j) src[j] += g.channels * plane;
        }
    }
}

// in[channel, y, x] -> block[channel, phase, row, column], for the rows that outputs t0.. need.
void pack_block(const Isa& isa, const Gather& g, const float* in, const Task& k, float* block) {
    if (isa.expand && !g.keep.empty()) return pack_images(isa, g, in, k, block);
    for (i64 c = 0; c < g.channels; ++c)
        if (g.used[c]) (g.steps() == 1 && g.pw + g.dx_min > 0 ? pack_plain : pack_strided)(isa, g, in + c * g.in_h * g.in_w, k.t0, block + c * g.plane);
}

// f(first vector, vectors) for every tile of n vectors.
template <class F> void each_tile(i64 n, int most, F&& f) {
    i64 v = 0;
    for (int m : split_tiles(n, most)) { f(v, m); v += m; }
}

// f(first row, vectors) for tiles of whole rows
template <class F> void each_rows(const Gather& g, i64 rows, i64 most, F&& f) {
    const i64 row = g.pw / g.width, tiles = ceil_div(rows, most / row);
    for (i64 t = 0, r = 0; t < tiles; ++t) {
        const i64 n = (rows - r) / (tiles - t);
        f(r, int(n * row));
        r += n;
    }
}

// The results of a chunk of rows: y[phase, row, position], position in the block's pitch.
struct Result {
    const Isa& isa; const Gather& g;
    float* y; i64 ypitch;              // from row to row
    float* planes;                     // room for `together` planes
    i64 together;                      // planes that are whole cache lines
    bool far;                          // too large for the caches

    // out[row, t*ostep + py, x*ostep + px] = y[py, px, row, t, x] for a chunk of so many rows
    void copy(const float* from, i64 rows, const Task& k, float* out) const {
        const i64 height = std::min(k.t_rows * g.ostep_y, g.out_h - k.t0 * g.ostep_y), floats = height * g.out_w, plane = g.out_h * g.out_w;
        out += k.t0 * g.ostep_y * g.out_w;
        if (far && g.phases() == 1 && isa.crop_stream && g.out_w >= g.width && floats % g.width == 0 && k.t0 * g.out_w % g.width == 0) {
            for (i64 r = 0; r < rows; ++r) isa.crop_stream(from + r * ypitch, g.pw, height, g.out_w, out + r * plane);
            return;
        }
        for (i64 r = 0; r < rows; r += together) {
            const i64 n = std::min(together, rows - r);
            for (i64 i = 0; i < n; ++i)
                for (i64 py = 0; py < g.ostep_y; ++py)
                    merge(from + (r + i) * ypitch, py, ceil_div(height - py, g.ostep_y), far ? planes + i * floats : out + (r + i) * plane);
            if (far) isa.stream(planes, n * floats, out + r * plane);
        }
    }

    // The columns of one row phase.
    void merge(const float* src, i64 py, i64 rows, float* dst) const {
        const i64 pitch = g.ostep_y * g.out_w, next = g.row_chunk() * ypitch;
        src += py * g.ostep_x * next;
        dst += py * g.out_w;
        if (!has_products(py)) {
            for (i64 t = 0; t < rows; ++t) std::fill_n(dst + t * pitch, g.out_w, 0.f);
            return;
        }
        if (g.ostep_x == 1) return isa.crop(src, g.pw, rows, g.out_w, dst, pitch);
        if (g.ostep_x == 2) return isa.zip(src, src + next, g.pw, rows, g.out_w, dst, pitch);
        for (i64 t = 0; t < rows; ++t, src += g.pw, dst += pitch)
            for (i64 px = 0; px < g.ostep_x; ++px) isa.spread(src + px * next, ceil_div(g.out_w - px, g.ostep_x), g.ostep_x, dst + px);
    }

    // Or no tap reaches these rows of the input gradient, as every other one of a strided 1x1 kernel.
    bool has_products(i64 py) const {
        if (g.ostep_y == 1) return true;
        for (i64 px = 0; px < g.ostep_x; ++px)
            if (!g.phase[py * g.ostep_x + px].off.empty()) return true;
        return false;
    }
};

// The other factor of the weight gradient, if that is to come from the input gradient's sweep.
struct Also {
    const float* x; i64 pitch;         // the first pixel, zeros around the image; from channel to channel
    float* dv; bool add;               // in the order in which the input gradient's values run
};

// The c-th chunk of rows of one phase of a block.
void run_phase(const Isa& isa, const Gather& g, i64 phase, i64 c, i64 rows, const float* block, const float* values,
               const float* bias, float* y, i64 ypitch, bool stream, const Also* also) {
    const i64 cols = ceil_div(g.out_w - phase % g.ostep_x, g.ostep_x), W = g.width;
    if (cols <= 0) return;
    const Phase& ph = g.phase[phase];
    const Panels& ps = ph.panels;
    y -= (ps.row0 + c * ps.chunk) * ypitch;
    if (also) {
        each_rows(g, rows, tile_both, [&](i64 r, int n) {
            const SddmmFn run = isa.find(op_both, 1, n, Lay::shifted).sddmm;
            SddmmArgs k{block + r * g.pw, 1, 0, W, ph.off.data(), nullptr, 0, also->x + r * g.pw - ph.lane, also->pitch, 0, also->dv, also->add || r};
            k.val = values + ph.begin; k.out = y + r * g.pw; k.orow = ypitch;
            for (i64 p = 0; p < ps.n_panels; ++p) {
                k.segs = ps.begin(c, p); k.nseg = ps.count(c, p); k.classes = ph.classes_of(k.segs); k.first = p == 0;
                run(k);
            }
        });
        return;
    }
    if (g.shifted) {
        each_rows(g, rows, tile, [&](i64 r, int n) {
            const SpmmFn run = isa.find(op_spmm, 1, n, Lay::shifted).spmm;
            for (i64 p = 0; p < ps.n_panels; ++p)
                run({block + r * g.pw, 1, 0, W, ph.off.data(), values + ph.begin, ps.begin(c, p), ps.count(c, p), y + r * g.pw, ypitch, 0, W, bias, p == 0,
                     nullptr, false, false, ph.classes_of(ps.begin(c, p))});
        });
        return;
    }
    each_tile(ceil_div(flat(g, rows, cols), W), isa.max_spmm, [&](i64 v, int n) {
        const SpmmFn run = isa.find(op_spmm, 1, n, Lay::unit).spmm;
        for (i64 p = 0; p < ps.n_panels; ++p)
            run({block + v * W, 1, 0, W, ph.off.data(), values, ps.begin(c, p), ps.count(c, p), y + v * W, ypitch, 0, W, bias, p == 0, ph.perm(), false, stream});
    });
}

void run_chunk(const Isa& isa, const Gather& g, const Task& k, i64 c, const float* block, const float* values, const float* bias,
               const Result& to, float* out, const Also* also) {
    const i64 chunk = g.row_chunk(), r0 = c * chunk, r1 = std::min(g.rows, r0 + chunk), plane = g.out_h * g.out_w;
    // Where results lie as in the image they need no scratch; sums of several panels had better not go to memory in between.
    if (g.direct && (!to.far || g.phase[0].panels.n_panels == 1))
        return run_phase(isa, g, 0, c, k.t_rows, block, values, bias, out + r0 * plane + k.t0 * g.out_w, plane, to.far, nullptr);
    for (i64 py = 0; py < g.ostep_y; ++py) {
        const i64 rows = std::min(k.t_rows, ceil_div(g.out_h - g.ostep_y * k.t0 - py, g.ostep_y));
        if (rows <= 0 || !to.has_products(py)) continue;
        for (i64 p = py * g.ostep_x; p < (py + 1) * g.ostep_x; ++p)
            run_phase(isa, g, p, c, rows, block, values, bias, to.y + p * chunk * to.ypitch, to.ypitch, false, also);
    }
    for (i64 i = 0; i < k.images; ++i) to.copy(to.y + i * g.slot, r1 - r0, k, out + (i * g.rows + r0) * plane);
}

// The phase of the input's stride that a tap reads.
i64 step_of(const Gather& g, i64 dy, i64 dx) { return (dy - g.dy_min) % g.istep_y * g.istep_x + (dx - g.dx_min) % g.istep_x; }

i64 gcd(i64 a, i64 b) { return b ? gcd(b, a % b) : a; }

// Rows of whole vectors where little of them is lost: a sixth, or an eighth with several images side by side, whose packing takes longer.
// Those share margins, so that a slot is narrower than a row alone. Tiles of few vectors cost more. Vectors of 16 are AVX-512's, which has the kernels.
void choose_shifted(Gather& g) {
    const i64 reach = (g.dx_max - g.dx_min) / g.istep_x, W = g.width, left = -g.dx_min;
    if (W != 16 || reach >= W || g.taps == 1) return;
    const i64 slot = g.steps() > 1 ? g.pw : std::max({std::min(left + g.in_w, g.pw), g.pw - left, g.t_cols});
    const i64 image = (g.t_rows + g.dy_max - g.dy_min) * std::max(g.rows, g.channels), most = g.steps() * g.phases() > 1 ? 1 : g.images;
    double best = 1e9;
    for (i64 n = 1; n <= most; ++n) {
        const i64 pw = round_up(n * slot, W), row = pw / W;
        const double used = double(n * g.t_cols) / double(pw), cost = (1 + 2. / double(std::min(tile / row, g.t_rows) * row)) / used;
        if (n > 1 ? row > 2 || used < .87 || image * pw > l2_floats : row > tile || used < .83) continue;
        if (cost > .97 * best) continue;
        best = cost;
        g.shifted = true; g.side = n; g.slot = n > 1 ? slot : pw; g.pw = pw;
    }
}

}  // namespace

// As many output rows at a time as keep the packed block within the L2 cache. A 1x1 kernel needs no packing if blocks are whole vectors.
void set_planes_block(Gather& g) {
    const i64 span_y = g.dy_max - g.dy_min, span_x = g.dx_max - g.dx_min, whole = g.width / gcd(g.width, std::max<i64>(1, g.out_w));
    g.pw = g.t_cols + span_x / g.istep_x;
    g.direct = g.taps == 1 && g.steps() == 1 && g.phases() == 1 && !g.dy[0] && !g.dx[0] && !span_x && g.out_w == g.in_w && g.out_h == g.in_h && g.t_rows % whole == 0;
    g.slot = g.pw;
    choose_shifted(g);
    g.block = std::clamp<i64>(l2_floats / std::max<i64>(1, g.channels * g.pw * g.steps()) - span_y / g.istep_y, 1, std::max<i64>(1, g.t_rows));
    if (g.shifted && g.steps() * g.phases() == 1) {
        // Half of the cache is for results, and backward wants the same blocks. Several images have one.
        const i64 rows = std::max<i64>(1, most_packed / std::max<i64>(1, std::max(g.rows, g.channels) * g.pw) - span_y);
        g.block = g.side > 1 ? g.t_rows : ceil_div(g.t_rows, ceil_div(g.t_rows, rows));
    }
    if (g.direct) {
        // Small enough that backward, which has the same blocks, still has dy when it needs it again. A tile at least.
        const i64 rows = std::max(in_place / std::max<i64>(1, std::max(g.rows, g.channels) * g.pw), ceil_div(tile_usual * g.width, std::max<i64>(1, g.out_w)));
        g.block = std::max(whole, std::min(rows, g.t_rows) / whole * whole);
    }
    g.ph = g.block + span_y / g.istep_y;
    g.step_plane = round_up(g.ph * g.pw + g.width, g.width);
    g.plane = g.direct ? g.in_h * g.in_w : g.step_plane * g.steps();
    g.used_step.assign(size_t(g.steps()), 0);
    for (i64 t = 0; t < g.taps; ++t) g.used_step[step_of(g, g.dy[t], g.dx[t])] = 1;
}

// Pixels are taken in the image's own order, so that a vector of the packed channel is a mask and a place to read from.
void set_expansion(Gather& g) {
    if (g.in_h > std::numeric_limits<i32>::max() / std::max<i64>(1, g.in_w)) return;   // more pixels than `from` can tell
    if (g.direct || g.steps() > 1 || g.width > 16 || (!g.shifted && (g.block < g.t_rows || g.in_w > g.pw + g.dx_min))) return;
    const i64 rows = g.blocks() * g.block + g.dy_max - g.dy_min, vectors = g.shifted ? rows * g.pw / g.width : g.plane / g.width;
    g.keep.assign(size_t(g.side * vectors), 0);
    g.from.assign(g.keep.size(), 0);
    g.in_runs = true;
    for (i64 i = 0; i < g.side; ++i)
        for (i64 y = 0; y < rows; ++y) {
            const i64 iy = y + g.dy_min;
            if (iy < 0 || iy >= g.in_h) continue;
            for (i64 x = 0; x < g.slot; ++x) {
                const i64 ix = x + g.dx_min, at = y * g.pw + i * g.slot + x;
                if (ix < 0 || ix >= g.in_w) continue;
                const i64 v = i * vectors + at / g.width, zero = iy * g.in_w + ix - at % g.width;
                if (!g.keep[v]) g.from[v] = i32(zero);
                else if (g.from[v] != zero) g.in_runs = false;
                g.keep[v] = uint16_t(g.keep[v] | 1u << at % g.width);
            }
        }
    if (g.in_runs) return;
    for (size_t v = 0; v < g.keep.size(); ++v)
        for (uint32_t lanes = g.keep[v]; lanes && !(lanes & 1); lanes >>= 1) ++g.from[v];
}

i64 planes_panel(const Gather& g) {
    const i64 vectors = g.shifted && g.backward && g.side == 1 && g.phases() == 1 ? tile_both : tile_usual;
    return (g.shifted ? 11 : 9) * 1024 / (vectors * g.width + (g.dy_max - g.dy_min) / g.istep_y * g.pw + g.width) / g.steps();
}

i64 planes_offset(const Gather& g, i64 dy, i64 dx) {
    if (g.direct) return 0;
    const i64 y = dy - g.dy_min, x = dx - g.dx_min;
    return step_of(g, dy, dx) * g.step_plane + y / g.istep_y * g.pw + (g.shifted ? 0 : x / g.istep_x);
}

namespace {

// Scratch of one task: the packed block, the results of a chunk of rows, planes to straighten them in.
struct Room {
    i64 packed, ypitch, results, together, planes;
    bool far;
    Room(const Gather& g, const float* out, i64 n)
        : packed(g.direct ? 0 : round_up(g.channels * g.plane, 1024)), ypitch(round_up(flat(g, g.block, g.t_cols), g.width)),
          results(g.row_chunk() * g.phases() * ypitch), together(g.blocks() > 1 ? 1 : 16 / gcd(16, g.out_h * g.out_w)), planes(round_up(together * g.block * g.ostep_y * g.out_w, 16)) {
        far = past_caches(out, n * g.rows * g.out_h * g.out_w, together * g.out_h * g.out_w);
    }
    i64 floats() const { return packed + results + planes; }
};

void gather_task(const Isa& isa, const Gather& g, const Room& room, i64 task, const float* in, i64 n, const float* values, const float* bias,
                 float* own, float* out, const Also* also = nullptr) {
    const Task k = task_of(g, task, n);
    const float* image = in + k.n0 * g.channels * g.in_h * g.in_w;
    if (!g.direct) pack_block(isa, g, image, k, own);
    const Result to{isa, g, own + room.packed, room.ypitch, own + room.packed + room.results, room.together, room.far};
    for (i64 c = 0; c < g.phase[0].panels.n_chunks; ++c)
        run_chunk(isa, g, k, c, g.direct ? image + k.t0 * g.in_w : own, values, bias, to, out + k.n0 * g.rows * g.out_h * g.out_w, also);
    if (room.far) isa.fence();
}

// The values in the order in which they run.
class Values {
public:
    Values(const Isa& isa, const Gather& g, const float* values) : own_(g.shifted ? g.csr->nnz() : 0), data_(g.shifted ? own_.data() : values) {
        if (g.shifted)
            for (const Phase& ph : g.phase) isa.gather(values, ph.order.data(), i64(ph.order.size()), own_.data() + ph.begin, false);
    }
    const float* data() const { return data_; }
private:
    Scratch own_;
    const float* data_;
};

// And their gradient back where it belongs.
void put_back(const Phase& ph, const float* sums, float* dvalues) {
    for (size_t k = 0; k < ph.order.size(); ++k) dvalues[ph.order[k]] = sums[k];
}

}  // namespace

void gather_planes(const Isa& isa, const Gather& g, const float* in, i64 n, const float* values, const float* bias, float* out, int threads) {
    const Room room(g, out, n);
    const Values in_order(isa, g, values);
    values = in_order.data();
    Scratch space(room.floats() * threads);
    parallel_for(tasks(g, n), threads, [&](i64 task, int slot) {
        gather_task(isa, g, room, task, in, n, values, bias, space.data() + slot * room.floats(), out);
    });
}

// The gradient's rows in the block's pitch, with zeros wherever the products must not count.
void pack_gradient(const Isa& isa, const Gather& g, const Task& k, const float* dy, float* dst, i64 ypitch) {
    const i64 plane = g.out_h * g.out_w;
    if (g.side > 1) {
        std::fill_n(dst, g.rows * ypitch, 0.f);
        for (i64 i = 0; i < k.images; ++i)
            for (i64 r = 0; r < g.rows; ++r)
                isa.crop(dy + ((k.n0 + i) * g.rows + r) * plane, g.out_w, k.t_rows, g.out_w, dst + r * ypitch + i * g.slot, g.pw);
        return;
    }
    for (i64 r = 0; r < g.rows; ++r, dst += ypitch) {
        isa.pad(dy + (k.n0 * g.rows + r) * plane + k.t0 * g.out_w, g.out_w, k.t_rows, g.out_w, dst, g.pw, 0);
        std::fill(dst + k.t_rows * g.pw, dst + ypitch, 0.f);
    }
}

// The sums of one block's tiles, added to dv.
void sample_tiles(const Isa& isa, const Gather& g, const Task& k, const float* block, const float* grad, i64 ypitch, float* dv, bool& add) {
    const i64 W = g.width;
    const Phase& ph = g.phase[0];
    const Panels& ps = ph.panels;
    if (g.shifted) {
        each_rows(g, k.t_rows, tile, [&](i64 r, int n) {
            const SddmmFn run = isa.find(op_sddmm, 1, n, Lay::shifted).sddmm;
            for (i64 c = 0; c < ps.n_chunks; ++c)
                for (i64 p = 0; p < ps.n_panels; ++p)
                    run({block + r * g.pw, 1, 0, W, ph.off.data(), ps.begin(c, p), ps.count(c, p), grad + r * g.pw - ph.lane, ypitch, 0, dv, add,
                         ph.classes_of(ps.begin(c, p))});
            add = true;
        });
        return;
    }
    each_tile(ceil_div(flat(g, k.t_rows, g.out_w), W), isa.max_sddmm, [&](i64 v, int m) {
        const SddmmFn run = isa.find(op_sddmm, 1, m, Lay::unit).sddmm;
        for (i64 c = 0; c < ps.n_chunks; ++c)
            for (i64 p = 0; p < ps.n_panels; ++p)
                run({block + v * W, 1, 0, W, ph.off.data(), ps.begin(c, p), ps.count(c, p), grad + v * W, ypitch, 0, dv, add});
        add = true;
    });
}

void sample_planes(const Isa& isa, const Gather& g, const float* x, const float* dy, i64 n, float* dvalues, int threads) {
    const i64 plane = g.out_h * g.out_w, own_pitch = round_up(g.block * g.pw, g.width), ypitch = g.direct ? plane : own_pitch;
    const i64 packed = g.direct ? 0 : round_up(g.channels * g.plane, 1024) + g.width, scratch = packed + (g.direct ? 0 : g.rows * own_pitch + g.width);
    Scratch space(scratch * threads), sums(g.shifted ? g.csr->nnz() : 0);
    sum_in_parts(isa, tasks(g, n), g.csr->nnz(), g.shifted ? sums.data() : dvalues, threads, [&](i64 task, i64 end, int slot, float* dv) {
        float* own = space.data() + slot * scratch;
        if (!g.direct) std::fill_n(own + packed - g.width, g.width, 0.f);   // what lies before the first row
        for (bool add = false; task < end; ++task) {
            const Task k = task_of(g, task, n);
            const float *image = x + k.n0 * g.channels * g.in_h * g.in_w, *block = own, *grad = own + packed;
            if (g.direct) { block = image + k.t0 * g.in_w; grad = dy + k.n0 * g.rows * plane + k.t0 * g.out_w; }
            else { pack_block(isa, g, image, k, own); pack_gradient(isa, g, k, dy, own + packed, ypitch); }
            sample_tiles(isa, g, k, block, grad, ypitch, dv, add);
        }
    });
    if (g.shifted) put_back(g.phase[0], sums.data(), dvalues);
}

// Whether the input gradient's packed dy, or the same blocks of it in place, is what the weight gradient needs: same pitch, zeros between the rows, whole images,
// and every pixel of dy (a kernel that no pixel of the input reaches leaves some out).
bool shares_gradient(const Gather& f, const Gather& b) {
    if (!f.planes || !b.planes || f.shifted != b.shifted || f.side != b.side || (f.shifted && f.slot != b.slot)) return false;
    if (f.shifted && f.steps() == 1 && -b.dy_min * b.pw - b.dx_min < f.dx_max - f.dx_min) return false;   // a row of dy and what comes before it
    const bool whole = b.dy_min <= 0 && b.dx_min <= 0 && b.dy_min + b.ph >= f.block && b.dx_min + b.pw >= f.out_w;
    const bool blocks = f.shifted ? f.block == b.block && f.t_rows == b.t_rows : f.blocks() == 1 && b.blocks() == 1;
    return (f.direct && b.direct && f.block == b.block) || (!f.direct && !b.direct && blocks && f.pw == b.pw && whole);
}

// Whether one sweep over the packed dy gives both gradients: what forward packs holds the image where the input gradient's tiles
// want it, with zeros around.
bool swept(const Isa& isa, const Gather& f, const Gather& b) {
    return isa.both && f.shifted && f.side == 1 && f.steps() == 1 && b.pw / b.width <= tile_both && f.dy_min <= 0 && f.dy_max >= 0 && f.in_w - f.dx_min <= f.pw &&
           -f.dy_min * f.pw - f.dx_min >= b.phase[0].lane;
}

// Packing leaves what follows a channel's rows as it is. Tiles reach into it, and what counts for nothing must not be NaN.
void clear_gaps(const Gather& g, float* block) {
    for (i64 c = 0; c < g.channels; ++c) std::fill(block + c * g.plane + g.ph * g.pw, block + (c + 1) * g.plane, 0.f);
}

// Both gradients image by image, so that dy is read and packed once.
void backward_planes(const Isa& isa, const Gather& f, const Gather& b, const float* x, const float* dy, i64 n, const float* values,
                     float* dx, float* dvalues, int threads) {
    const Room room(b, dx, n);
    const i64 packed = f.direct ? 0 : round_up(f.channels * f.plane, 1024) + b.width, scratch = packed + room.floats() + b.width;
    const i64 origin = f.direct ? 0 : -b.dy_min * b.pw - b.dx_min, ypitch = f.direct ? f.out_h * f.out_w : b.plane;
    Scratch space(scratch * threads), sums(f.shifted ? f.csr->nnz() : 0);
    const Values in_order(isa, b, values);
    values = in_order.data();
    const bool at_once = swept(isa, f, b);
    sum_in_parts(isa, ceil_div(n, f.side), f.csr->nnz(), f.shifted ? sums.data() : dvalues, threads, [&](i64 i, i64 end, int slot, float* dv) {
        float *xp = space.data() + slot * scratch, *own = xp + packed;
        if (f.shifted) {
            std::fill_n(own - b.width, b.width, 0.f);   // what lies before the first row of dy
            clear_gaps(f, xp);
            clear_gaps(b, own);
        }
        for (bool add = false; i < end; ++i) {
            const float *image = x + i * f.side * f.channels * f.in_h * f.in_w, *grad = dy + i * f.side * f.rows * f.out_h * f.out_w;
            for (i64 t = 0; t < f.blocks(); ++t) {
                const Task k = task_of(f, i * f.blocks() + t, n);
                if (at_once) {
                    pack_block(isa, f, image, k, xp);
                    const Also also{xp - f.dy_min * f.pw - f.dx_min, f.plane, dv, add};
                    gather_task(isa, b, room, i * b.blocks() + t, dy, n, values, nullptr, own, dx, &also);
                    add = true;
                    continue;
                }
                gather_task(isa, b, room, i * b.blocks() + t, dy, n, values, nullptr, own, dx);
                if (!f.direct) pack_block(isa, f, image, k, xp);
                sample_tiles(isa, f, k, f.direct ? image + k.t0 * f.in_w : xp, f.direct ? grad + k.t0 * f.out_w : own + origin, ypitch, dv, add);
            }
        }
    });
    if (f.shifted) put_back((at_once ? b : f).phase[0], sums.data(), dvalues);
}

}  // namespace fastsparse
