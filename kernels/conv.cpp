// Conv2d: forward and input gradient are the same gather, out[row, p] = sum over nonzeros val * in[channel, p*step + d].
// Images are taken a vector at a time (one image per lane) and a block of rows at a time; the block is packed to
// (channel, row, column, image) with its padding, and a nonzero is then one fixed offset into it.
#include "plan.h"
#include <algorithm>
#include <limits>

namespace fastsparse {

// One direction for one image size. Output row = ostep*t + phase, input row = istep*t + d(tap); columns alike.
struct Gather {
    bool backward, planes;
    int width;
    i64 h, w;                          // the convolution's input size, the key of the cache
    const Csr* csr;                    // rows: (phase, output channel of this direction)
    i64 rows, channels, taps;
    i64 in_h, in_w, out_h, out_w;
    i64 istep_y, istep_x, ostep_y, ostep_x;
    std::vector<i64> dy, dx;           // per tap
    i64 dy_min, dy_max, dx_min, dx_max;
    i64 t_rows, block;                 // rows t in all and in one block
    i64 ph, pw;                        // the packed block
    std::vector<i32> off;              // per entry, in pixels of the packed block
    std::vector<i32> pixel;            // where a pixel of the block's rows goes, in floats
    std::vector<char> used;            // channels with a nonzero
    i64 phases() const { return ostep_y * ostep_x; }
    i64 packed_floats() const { return channels * ph * pw * width; }
    i64 blocks() const { return ceil_div(t_rows, block); }
    i64 out_block() const { return block * ostep_y * out_w; }
};

namespace {

constexpr i64 row_chunk = 64, l2_floats = 256 * 1024;

i64 mod(i64 a, i64 b) { return (a % b + b) % b; }

ConvShape checked_shape(const ConvShape& s) {
    const auto need = [](bool ok, const char* what) { if (!ok) throw std::invalid_argument(what); };
    need(s.oc >= 0 && s.icg >= 0, "channels must not be negative");
    need(s.groups >= 1 && s.oc % s.groups == 0, "groups must be positive and divide out_channels");
    need(s.kh >= 1 && s.kw >= 1, "the kernel must be at least 1 x 1");
    need(s.sh >= 1 && s.sw >= 1 && s.dh >= 1 && s.dw >= 1, "stride and dilation must be positive");
    need(s.pt >= 0 && s.pb >= 0 && s.pl >= 0 && s.pr >= 0, "padding must not be negative");
    constexpr i64 most = std::numeric_limits<i32>::max();
    for (i64 v : {s.oc, s.icg, s.kh, s.kw, s.sh, s.sw, s.pt, s.pb, s.pl, s.pr, s.dh, s.dw, s.groups})
        if (v > most) throw std::overflow_error("a convolution argument does not fit 32 bits");
    if (s.kh * s.kw > most || s.icg > most / (s.kh * s.kw) || s.ic() > most / (s.kh * s.kw) || s.oc > most / (s.kh * s.kw) ||
        s.ic() > most / s.sh / s.sw)
        throw std::overflow_error("the weight does not fit 32-bit indices");
    return s;
}

// Which rows of the input gradient a tap reaches: those congruent to this.
i64 phase_of(i64 tap, const ConvShape& s) {
    const i64 ky = tap / s.kw, kx = tap % s.kw;
    return mod(ky * s.dh - s.pt, s.sh) * s.sw + mod(kx * s.dw - s.pl, s.sw);
}

// Rows (phase, input channel), entries (output channel, tap).
Csr transposed(const Csr& a, const ConvShape& s) {
    const i64 taps = s.taps(), ocg = s.oc / s.groups;
    std::vector<i64> phase(taps);
    for (i64 t = 0; t < taps; ++t) phase[t] = phase_of(t, s) * s.ic();
    Csr b;
    b.rows = s.ic() * s.sh * s.sw; b.cols = s.oc * taps;
    b.indptr.assign(size_t(b.rows) + 1, 0);
    b.idx.resize(a.idx.size());
    b.perm.resize(a.idx.size());
    const auto each = [&](auto&& f) {
        for (i64 r = 0; r < a.rows; ++r)
            for (i64 k = a.indptr[r], g = r / ocg * s.icg; k < a.indptr[r + 1]; ++k) {
                const i64 tap = a.idx[k] % taps;
                f(phase[tap] + g + a.idx[k] / taps, r * taps + tap, k);
            }
    };
    each([&](i64 row, i64, i64) { ++b.indptr[row + 1]; });
    for (i64 r = 0; r < b.rows; ++r) b.indptr[r + 1] += b.indptr[r];
    std::vector<i64> at(b.indptr.begin(), b.indptr.end() - 1);
    each([&](i64 row, i64 col, i64 k) {
        const i64 to = at[row]++;
        b.idx[to] = i32(col);
        b.perm[to] = uint32_t(k);
    });
    b.make_segs();
    return b;
}

void set_direction(Gather& g, const ConvShape& s) {
    const i64 oh = s.out_h(g.h), ow = s.out_w(g.w);
    g.taps = s.taps();
    g.rows = g.backward ? s.ic() : s.oc;
    g.channels = g.backward ? s.oc : s.ic();
    g.in_h = g.backward ? oh : g.h; g.in_w = g.backward ? ow : g.w;
    g.out_h = g.backward ? g.h : oh; g.out_w = g.backward ? g.w : ow;
    g.istep_y = g.backward ? 1 : s.sh; g.istep_x = g.backward ? 1 : s.sw;
    g.ostep_y = g.backward ? s.sh : 1; g.ostep_x = g.backward ? s.sw : 1;
    for (i64 t = 0; t < g.taps; ++t) {
        const i64 y = t / s.kw * s.dh - s.pt, x = t % s.kw * s.dw - s.pl;
        g.dy.push_back(g.backward ? (mod(y, s.sh) - y) / s.sh : y);
        g.dx.push_back(g.backward ? (mod(x, s.sw) - x) / s.sw : x);
    }
    g.dy_min = *std::min_element(g.dy.begin(), g.dy.end());
    g.dy_max = *std::max_element(g.dy.begin(), g.dy.end());
    g.dx_min = std::min<i64>(0, *std::min_element(g.dx.begin(), g.dx.end()));
    g.dx_max = *std::max_element(g.dx.begin(), g.dx.end());
}

// As many output rows at a time as keep the packed block within the L2 cache.
void set_block(Gather& g) {
    g.t_rows = ceil_div(g.out_h, g.ostep_y);
    const i64 t_cols = ceil_div(g.out_w, g.ostep_x);
    g.pw = std::max(g.istep_x * (t_cols - 1) + g.dx_max + 1, g.in_w) - g.dx_min;
    const i64 span = g.dy_max - g.dy_min + 1, row = std::max<i64>(1, g.channels * g.pw * g.width);
    g.block = std::clamp<i64>((l2_floats / row - span) / g.istep_y + 1, 1, std::max<i64>(1, g.t_rows));
    g.ph = g.istep_y * (g.block - 1) + span;
    if (g.ph > std::numeric_limits<i32>::max() / g.pw / std::max<i64>(1, g.channels) || g.ph * g.pw > std::numeric_limits<i32>::max() / g.width)
        throw std::overflow_error("an image row of all channels does not fit 32-bit offsets");
}

void set_offsets(Gather& g, const ConvShape& s) {
    std::vector<i64> tap(g.taps);
    for (i64 t = 0; t < g.taps; ++t) tap[t] = (g.dy[t] - g.dy_min) * g.pw + g.dx[t] - g.dx_min;
    g.used.assign(size_t(g.channels), 0);
    g.off.resize(g.csr->idx.size());
    const i64 ocg = s.oc / s.groups;
    for (i64 r = 0; r < g.csr->rows; ++r) {
        const i64 base = g.backward ? 0 : r / ocg * s.icg;
        for (i64 k = g.csr->indptr[r]; k < g.csr->indptr[r + 1]; ++k) {
            const i64 c = base + g.csr->idx[k] / g.taps;
            g.used[c] = 1;
            g.off[k] = i32(c * g.ph * g.pw + tap[g.csr->idx[k] % g.taps]);
        }
    }
    for (i64 y = 0; y < g.ph; ++y)
        for (i64 x = 0; x < g.in_w; ++x) g.pixel.push_back(i32((y * g.pw + x - g.dx_min) * g.width));
}

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

// in[image, channel, y, x] -> block[channel, y, x, image], for the rows that outputs t0.. need.
void pack_block(const Isa& isa, const Gather& g, const float* in, i64 images, i64 t0, float* block) {
    const i64 first = g.istep_y * t0 + g.dy_min, plane = g.in_h * g.in_w;
    const i64 lo = std::clamp<i64>(first, 0, g.in_h), hi = std::clamp<i64>(first + g.ph, lo, g.in_h);
    const i64 top = std::clamp<i64>(lo - first, 0, g.ph), bottom = top + (hi - lo);
    for (i64 c = 0; c < g.channels; ++c) {
        if (!g.used[c]) continue;
        float* dst = block + c * g.ph * g.pw * g.width;
        clear_margins(g, dst, top, bottom);
        if (hi > lo)
            isa.pack(in + c * plane + lo * g.in_w, g.channels * plane, images, (hi - lo) * g.in_w, dst + top * g.pw * g.width, 0, g.pixel.data());
    }
}

struct TilePos { i64 t, x; int rows, cols; };

// A row of n pixels in tiles for which there is a kernel, with as few and as even tiles as possible.
std::vector<int> split(i64 n, int most) {
    static const int sizes[] = {14, 12, 10, 8, 7, 6, 5, 4, 3, 2, 1};
    std::vector<int> out;
    while (n > 0) {
        const i64 even = ceil_div(n, ceil_div(n, most));
        int best = 1;
        for (int s : sizes)
            if (s <= most && s <= n && (s <= even || n == s)) { best = s; break; }
        out.push_back(best);
        n -= best;
    }
    return out;
}

std::vector<TilePos> tiles_of(i64 rows, i64 cols, int most) {
    std::vector<TilePos> out;
    const int two = std::min(7, most / 2);
    for (i64 t = 0; t < rows;) {
        const bool pair = t + 2 <= rows && cols <= two;
        i64 x = 0;
        for (int n : split(cols, pair ? two : most)) { out.push_back({t, x, pair ? 2 : 1, n}); x += n; }
        t += pair ? 2 : 1;
    }
    return out;
}

struct Task { i64 n0, images, t0, t_rows; };

Task task_of(const Gather& g, i64 task, i64 n) {
    const i64 n0 = task / g.blocks() * g.width, t0 = task % g.blocks() * g.block;
    return {n0, std::min<i64>(g.width, n - n0), t0, std::min(g.block, g.t_rows - t0)};
}

// All tiles of one phase of the block, for rows r0..r1.
void run_phase(const Isa& isa, const Gather& g, const Task& k, i64 phase, i64 r0, i64 r1, const float* block,
               const float* values, const float* bias, float* y, i64 ypitch) {
    const i64 py = phase / g.ostep_x, px = phase % g.ostep_x, base = phase * g.rows;
    const i64 rows = std::min(k.t_rows, ceil_div(g.out_h - g.ostep_y * k.t0 - py, g.ostep_y));
    const i64 cols = ceil_div(g.out_w - px, g.ostep_x), W = g.width;
    if (rows <= 0 || cols <= 0) return;
    for (const TilePos& p : tiles_of(rows, cols, isa.max_spmm)) {
        SpmmArgs a{block + (g.istep_y * p.t * g.pw + g.istep_x * p.x) * W, W, g.istep_y * g.pw * W, g.istep_x * W,
                   g.off.data(), values, g.csr->segs.data() + base + r0, r1 - r0,
                   y + ((p.t * g.ostep_y + py) * g.out_w + p.x * g.ostep_x + px) * W - (base + r0) * ypitch,
                   ypitch, g.ostep_y * g.out_w * W, g.ostep_x * W, bias, true};
        isa.find(op_spmm, p.rows, p.cols, g.istep_x == 1).spmm(a);
    }
}

void run_gather(const Isa& isa, const Gather& g, const float* in, i64 n, const float* values, const float* bias, float* out, int threads) {
    const i64 W = g.width, chunk = std::min(row_chunk, g.rows), ypitch = g.out_block() * W;
    const i64 packed = round_up(g.packed_floats(), 1024), scratch = packed + chunk * ypitch;
    Scratch space(scratch * threads);
    parallel_for(ceil_div(n, W) * g.blocks(), threads, [&](i64 task, int slot) {
        const Task k = task_of(g, task, n);
        float *block = space.data() + slot * scratch, *y = block + packed;
        pack_block(isa, g, in + k.n0 * g.channels * g.in_h * g.in_w, k.images, k.t0, block);
        const i64 o0 = k.t0 * g.ostep_y, pixels = std::min(k.t_rows * g.ostep_y, g.out_h - o0) * g.out_w, plane = g.out_h * g.out_w;
        for (i64 r0 = 0; r0 < g.rows; r0 += chunk) {
            const i64 r1 = std::min(g.rows, r0 + chunk);
            for (i64 p = 0; p < g.phases(); ++p) run_phase(isa, g, k, p, r0, r1, block, values, bias, y, ypitch);
            for (i64 r = r0; r < r1; ++r)
                isa.unpack(y + (r - r0) * ypitch, W, pixels, k.images, out + (k.n0 * g.rows + r) * plane + o0 * g.out_w, g.rows * plane);
        }
    });
}

void sample_block(const Isa& isa, const Gather& g, const Task& k, const float* block, const float* dy, float* dv, bool& add) {
    const i64 W = g.width, ypitch = g.out_block() * W;
    for (const TilePos& p : tiles_of(k.t_rows, g.out_w, isa.max_sddmm)) {
        SddmmArgs a{block + (g.istep_y * p.t * g.pw + g.istep_x * p.x) * W, W, g.istep_y * g.pw * W, g.istep_x * W,
                    g.off.data(), g.csr->segs.data(), g.rows, dy + (p.t * g.out_w + p.x) * W, ypitch, g.out_w * W, W, dv, add};
        isa.find(op_sddmm, p.rows, p.cols, g.istep_x == 1).sddmm(a);
        add = true;
    }
}

// The sum over images and blocks is cut in parts that don't depend on the number of threads.
void run_sample(const Isa& isa, const Gather& g, const float* x, const float* dy, i64 n, float* dvalues, int threads) {
    constexpr i64 most_parts = 8;
    const i64 W = g.width, tasks = ceil_div(n, W) * g.blocks(), parts = std::min(most_parts, tasks), nnz = g.csr->nnz();
    const i64 packed = round_up(g.packed_floats(), 1024), ypitch = g.out_block() * W, scratch = packed + g.rows * ypitch;
    const i64 plane = g.out_h * g.out_w;
    Scratch space(scratch * threads), sums(nnz * (parts - 1));
    parallel_for(parts, threads, [&](i64 part, int slot) {
        float *block = space.data() + slot * scratch, *dyp = block + packed;
        float* dv = part ? sums.data() + (part - 1) * nnz : dvalues;
        bool add = false;
        for (i64 task = tasks * part / parts; task < tasks * (part + 1) / parts; ++task) {
            const Task k = task_of(g, task, n);
            pack_block(isa, g, x + k.n0 * g.channels * g.in_h * g.in_w, k.images, k.t0, block);
            for (i64 r = 0; r < g.rows; ++r)
                isa.pack(dy + (k.n0 * g.rows + r) * plane + k.t0 * g.out_w, g.rows * plane, k.images, k.t_rows * g.out_w, dyp + r * ypitch, W, nullptr);
            sample_block(isa, g, k, block, dyp, dv, add);
        }
    });
    for (i64 part = 1; part < parts; ++part) isa.accumulate(sums.data() + (part - 1) * nnz, nnz, dvalues);
}

}  // namespace

Conv2dPlan::Conv2dPlan(const i64* indptr, i64 n_indptr, const i32* idx, i64 nnz, const ConvShape& s, Layout layout)
    : s_(checked_shape(s)), layout_(layout), w_(checked_csr(indptr, n_indptr, idx, nnz, s.oc, s.icg * s.taps())), wt_(transposed(w_, s_)) {}

Conv2dPlan::~Conv2dPlan() = default;

Layout Conv2dPlan::layout(i64, i64, i64) const { return layout_ == Layout::automatic ? Layout::batch : layout_; }

std::shared_ptr<const Gather> Conv2dPlan::gather(bool backward, i64 h, i64 w, int width, bool planes) const {
    std::lock_guard<std::mutex> guard(lock_);
    for (const auto& g : cache_)
        if (g->backward == backward && g->h == h && g->w == w && g->width == width && g->planes == planes) return g;
    auto g = std::make_shared<Gather>();
    g->backward = backward; g->planes = planes; g->width = width; g->h = h; g->w = w;
    g->csr = backward ? &wt_ : &w_;
    set_direction(*g, s_);
    set_block(*g);
    set_offsets(*g, s_);
    if (cache_.size() >= 8) cache_.erase(cache_.begin());
    cache_.push_back(g);
    return g;
}

void Conv2dPlan::forward(const float* x, i64 n, i64 h, i64 w, const float* values, const float* bias, float* out, int threads) const {
    const Isa& isa = current_isa();
    if (!n || !s_.oc || !s_.out_h(h) || !s_.out_w(w)) return;
    run_gather(isa, *gather(false, h, w, isa.width, false), x, n, values, bias, out, threads);
}

void Conv2dPlan::backward_input(const float* dy, i64 n, i64 h, i64 w, const float* values, float* dx, int threads) const {
    const Isa& isa = current_isa();
    if (!n || !s_.ic() || !h || !w) return;
    Scratch vt(nnz());
    isa.gather(values, wt_.perm.data(), nnz(), vt.data());
    run_gather(isa, *gather(true, h, w, isa.width, false), dy, n, vt.data(), nullptr, dx, threads);
}

void Conv2dPlan::backward_weight(const float* x, const float* dy, i64 n, i64 h, i64 w, float* dvalues, int threads) const {
    const Isa& isa = current_isa();
    if (!n || !s_.out_h(h) || !s_.out_w(w)) { std::fill(dvalues, dvalues + nnz(), 0.f); return; }
    run_sample(isa, *gather(false, h, w, isa.width, false), x, dy, n, dvalues, threads);
}

}  // namespace fastsparse
