// Conv2d: forward and input gradient are the same gather, in one of two layouts.
#include "conv.h"
#include <algorithm>
#include <limits>

namespace fastsparse {

namespace {

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
    g.t_rows = ceil_div(g.out_h, g.ostep_y);
    g.t_cols = ceil_div(g.out_w, g.ostep_x);
}

// Channels in a panel: those that fit the L1 cache, or more if a row would have too few nonzeros in them, then up to a third more. Panels are even.
i64 panel_channels(const Gather& g) {
    const double few = g.shifted ? 20 : 12;
    const double per_channel = double(g.csr->nnz()) / std::max(1., double(g.rows) * double(g.channels));
    const i64 channels = std::max<i64>(1, g.channels), fits = std::clamp<i64>(g.planes ? planes_panel(g) : batch_panel(g), 1, channels);
    const i64 wanted = i64(std::min(few / std::max(per_channel, 1e-9), double(channels)));
    return ceil_div(channels, wanted > fits ? ceil_div(3 * channels, 4 * wanted) : ceil_div(channels, fits));
}

// The classes of a phase's taps, by the lane from which they read a row, the last one first; and the class of each tap.
std::vector<i32> set_classes(const Gather& g, Phase& ph) {
    std::vector<i32> column(size_t(g.taps)), of(size_t(g.taps));
    for (i64 t = 0; t < g.taps; ++t) column[t] = i32((g.dx[t] - g.dx_min) / g.istep_x);
    std::vector<char> there(size_t(g.taps));
    for (const Seg& s : ph.panels.segs)
        for (i64 k = s.start; k < i64(s.start) + s.n; ++k) there[g.csr->idx[k] % g.taps] = 1;
    std::vector<i32> lanes;
    for (i64 t = 0; t < g.taps; ++t)
        if (there[t]) lanes.push_back(column[t]);
    std::sort(lanes.begin(), lanes.end(), std::greater<>());
    lanes.erase(std::unique(lanes.begin(), lanes.end()), lanes.end());
    for (size_t c = 0; c < lanes.size(); ++c) ph.down.push_back(lanes[c] - (c + 1 < lanes.size() ? lanes[c + 1] : 0));
    for (i64 t = 0; t < g.taps; ++t) of[t] = i32(std::find(lanes.begin(), lanes.end(), column[t]) - lanes.begin());
    ph.lane = lanes.empty() ? 0 : lanes[0];
    return of;
}

// Segments of a panel with the same numbers of entries in each class next to each other, and each segment's entries by their class.
template <class F> void sort_by_class(Gather& g, Phase& ph, F&& offset) {
    const Csr& a = *g.csr;
    const std::vector<i32> of = set_classes(g, ph);
    const size_t n = ph.down.size();
    struct Row { Seg seg; std::vector<i32> runs; };
    std::vector<Row> rows;
    for (const Panels::Range& range : ph.panels.at) {
        rows.clear();
        for (i64 i = range.from; i < range.to; ++i) {
            rows.push_back({ph.panels.segs[i], std::vector<i32>(n)});
            for (i64 k = rows.back().seg.start, end = k + rows.back().seg.n; k < end; ++k) ++rows.back().runs[of[a.idx[k] % g.taps]];
        }
        std::stable_sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.runs < b.runs; });
        for (i64 i = range.from; i < range.to; ++i) {
            const Row& row = rows[i - range.from];
            const uint32_t start = uint32_t(ph.off.size());
            ph.panels.segs[i] = {start, row.seg.row, row.seg.n};
            ph.runs.insert(ph.runs.end(), row.runs.begin(), row.runs.end());
            ph.off.resize(start + row.seg.n);
            ph.order.resize(start + row.seg.n);
            std::vector<uint32_t> to(n, start);
            for (size_t c = 1; c < n; ++c) to[c] = to[c - 1] + row.runs[c - 1];
            for (i64 k = row.seg.start; k < i64(row.seg.start) + row.seg.n; ++k) {
                const uint32_t at = to[of[a.idx[k] % g.taps]]++;
                ph.off[at] = offset(row.seg.row, a.idx[k]);
                ph.order[at] = a.perm.empty() ? uint32_t(k) : a.perm[k];
            }
        }
    }
}

void set_phases(Gather& g, const ConvShape& s) {
    std::vector<i64> tap(g.taps);
    for (i64 t = 0; t < g.taps; ++t) tap[t] = g.planes ? planes_offset(g, g.dy[t], g.dx[t]) : batch_offset(g, g.dy[t], g.dx[t]);
    constexpr i64 most = std::numeric_limits<i32>::max();
    if (g.plane > most / g.width || g.plane > most / std::max<i64>(1, g.channels))
        throw std::overflow_error("an image row of all channels does not fit 32-bit offsets");
    g.used.assign(size_t(g.channels), 0);
    const i64 ocg = s.oc / s.groups, width = panel_channels(g) * g.taps;
    const auto offset = [&](i64 row, i32 idx) {
        const i64 c = (g.backward ? 0 : row / ocg * s.icg) + idx / g.taps;
        g.used[c] = 1;
        return i32(c * g.plane + tap[idx % g.taps]);
    };
    i64 begin = 0;
    for (i64 p = 0; p < g.phases(); ++p) {
        Phase ph{Panels(*g.csr, p * g.rows, (p + 1) * g.rows, g.row_chunk(), width, g.backward && !g.shifted ? Panels::reordered : Panels::none)};
        ph.begin = begin;
        if (g.shifted) {
            sort_by_class(g, ph, offset);
            begin += i64(ph.order.size());
        } else {
            const auto& idx = g.backward ? ph.panels.idx : g.csr->idx;
            ph.off.resize(idx.size());
            for (const Seg& seg : ph.panels.segs)
                for (i64 k = seg.start; k < i64(seg.start) + seg.n; ++k) ph.off[k] = offset(seg.row, idx[k]);
        }
        g.phase.push_back(std::move(ph));
    }
}

}  // namespace

std::vector<int> split_tiles(i64 n, int most) {
    std::vector<int> out;
    while (n > 0) {
        const i64 even = ceil_div(n, ceil_div(n, most));
        int best = 1;
        for (int s : {14, 12, 10, 8, 7, 6, 5, 4, 3, 2})
            if (s <= most && s <= n && (s <= even || s == n)) { best = s; break; }
        out.push_back(best);
        n -= best;
    }
    return out;
}

Conv2dPlan::Conv2dPlan(const i64* indptr, i64 n_indptr, const i32* idx, i64 nnz, const ConvShape& s, Layout layout)
    : s_(checked_shape(s)), layout_(layout), w_(checked_csr(indptr, n_indptr, idx, nnz, s.oc, s.icg * s.taps())), wt_(transposed(w_, s_)) {}

Conv2dPlan::~Conv2dPlan() = default;

// Measured: planes win wherever a plane fills vectors. On small images much of a plane is margin, and images fill the lanes better;
// a 1x1 kernel has no margin, and without a stride nothing to pack either. With many nonzeros aligned loads pay for the
// transposition of larger images too, if all channels of a vector of images stay near enough.
bool Conv2dPlan::planes(i64 n, i64 h, i64 w) const {
    if (layout_ != Layout::automatic) return layout_ == Layout::planes;
    const i64 pixels = s_.out_h(h) * s_.out_w(w), lanes = current_isa().width;
    if (n < lanes && n <= pixels) return true;
    Gather g;
    g.backward = false; g.width = int(lanes); g.h = h; g.w = w; g.images = std::min(n, most_side);
    set_direction(g, s_);
    set_planes_block(g);
    if (g.shifted) return true;
    if (pixels <= (s_.taps() > 1 ? 64 : lanes)) return false;
    const double density = double(nnz()) / std::max(1., double(w_.rows) * double(w_.cols));
    const i64 packed = std::max(s_.ic(), s_.oc) * (h + s_.kh) * (w + s_.kw) * lanes;
    return s_.taps() == 1 || lanes < 16 || density < .07 || pixels > 28 * 28 || packed > 2 * 1024 * 1024;
}

std::shared_ptr<const Gather> Conv2dPlan::gather(bool backward, i64 n, i64 h, i64 w, int width, bool planes) const {
    const i64 images = planes ? std::min(n, most_side) : 0;
    std::lock_guard<std::mutex> guard(lock_);
    for (const auto& g : cache_)
        if (g->backward == backward && g->h == h && g->w == w && g->width == width && g->planes == planes && g->images == images) return g;
    auto g = std::make_shared<Gather>();
    g->backward = backward; g->planes = planes; g->width = width; g->h = h; g->w = w; g->images = images;
    g->csr = backward ? &wt_ : &w_;
    set_direction(*g, s_);
    if (planes) { set_planes_block(*g); set_expansion(*g); } else set_batch_block(*g);
    set_phases(*g, s_);
    if (cache_.size() >= 8) cache_.erase(cache_.begin());
    cache_.push_back(g);
    return g;
}

void Conv2dPlan::forward(const float* x, i64 n, i64 h, i64 w, const float* values, const float* bias, float* out, int threads) const {
    const Isa& isa = current_isa();
    if (!n || !s_.oc || !s_.out_h(h) || !s_.out_w(w)) return;
    const auto g = gather(false, n, h, w, isa.width, planes(n, h, w));
    (g->planes ? gather_planes : gather_batch)(isa, *g, x, n, values, bias, out, threads);
}

void Conv2dPlan::backward_input(const float* dy, i64 n, i64 h, i64 w, const float* values, float* dx, int threads) const {
    const Isa& isa = current_isa();
    if (!n || !s_.ic() || !h || !w) return;
    const auto g = gather(true, n, h, w, isa.width, planes(n, h, w));
    (g->planes ? gather_planes : gather_batch)(isa, *g, dy, n, values, nullptr, dx, threads);
}

void Conv2dPlan::backward_weight(const float* x, const float* dy, i64 n, i64 h, i64 w, float* dvalues, int threads) const {
    const Isa& isa = current_isa();
    if (!n || !nnz() || !s_.out_h(h) || !s_.out_w(w)) { std::fill(dvalues, dvalues + nnz(), 0.f); return; }
    const auto g = gather(false, n, h, w, isa.width, planes(n, h, w));
    (g->planes ? sample_planes : sample_batch)(isa, *g, x, dy, n, dvalues, threads);
}

void Conv2dPlan::backward(const float* x, const float* dy, i64 n, i64 h, i64 w, const float* values, float* dx, float* dvalues, int threads) const {
    const Isa& isa = current_isa();
    if (n && nnz() && s_.out_h(h) && s_.out_w(w)) {
        const bool flat = planes(n, h, w);
        const auto f = gather(false, n, h, w, isa.width, flat), b = gather(true, n, h, w, isa.width, flat);
        if (!flat && shares_gradient_batch(*f, *b)) return backward_batch(isa, *f, *b, x, dy, n, values, dx, dvalues, threads);
        if (flat && shares_gradient(*f, *b)) return backward_planes(isa, *f, *b, x, dy, n, values, dx, dvalues, threads);
    }
    backward_input(dy, n, h, w, values, dx, threads);
    backward_weight(x, dy, n, h, w, dvalues, threads);
}

}  // namespace fastsparse
