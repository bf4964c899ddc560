// Linear: the batch is cut in tiles of a few vectors, the input of a tile is transposed once to (column, item),
// and every row of the weight then runs through its nonzeros with the tile of outputs in registers.
#include "plan.h"
#include <algorithm>

namespace fastsparse {
namespace {

// Rows in a chunk; panels are half a chunk or whole chunks, so that blocks of rows end where both do.
constexpr i64 row_chunk = 192;

// The batch in tiles of at most max_vectors vectors, as even as they come.
struct Batch {
    i64 items, width, vectors, tiles;
    Batch(i64 b, int w, i64 max_vectors) : items(b), width(w), vectors(ceil_div(b, w)), tiles(ceil_div(vectors, max_vectors)) {}
    i64 start(i64 t) const { return vectors * t / tiles * width; }
    i64 lanes(i64 t) const { return start(t + 1) - start(t); }
    i64 most() const { return ceil_div(vectors, tiles) * width; }
    i64 floats(i64 dim) const { return vectors * width * dim; }
};

// Whether equal tasks keep the threads busy but for a ninth of the time.
bool shared_evenly(i64 tasks, int threads) { return threads == 1 || ceil_div(tasks, threads) * threads * 8 <= tasks * 9; }

// A batch that comes in: rows, or packed already. Rows count as zero where `by` is not positive.
struct Source { const float* data; i64 dim; bool packed = false; const float* by = nullptr; };
// A batch that goes out: as rows or packed, with a ReLU or zero where `by`, which lies as the result does, is not positive.
struct Target { float* data; i64 dim; bool packed = false, relu = false; const float* by = nullptr; };

// One tile of one product, or a part of its lanes: what both the serial and the threaded order are made of.
struct Work {
    const Isa& isa; const Batch& b; i64 t, lanes, item, used;
    bool half;
    Work(const Isa& isa, const Batch& b, i64 t, i64 p = 0, i64 parts = 1)
        : isa(isa), b(b), t(t), lanes(b.lanes(t) / parts), item(b.start(t) + p * lanes), used(std::min(lanes, b.items - item)), half(parts > 1) {}

    // s[item, c0..c1] -> dst[column - c0, lane]
    void pack(const Source& s, i64 c0, i64 c1, float* dst) const {
        const float* from = s.data + item * s.dim + c0;
        if (s.by) isa.pack_gated(from, s.by + item * s.dim + c0, s.dim, used, c1 - c0, dst, lanes);
        else isa.pack(from, s.dim, used, c1 - c0, dst, lanes, nullptr);
    }
    // Where column 0 of the packed s is, or would be if not only c0..c1 were packed.
    const float* packed(const Source& s, i64 c0, i64 c1, float* scratch) const {
        if (s.packed) return s.data + item * s.dim;
        pack(s, c0, c1, scratch);
        return scratch - c0 * lanes;
    }
    // Where row 0 of a result is, or would be if `scratch`, for rows from r0 on, held all.
    float* place(const Target& to, i64 r0, float* scratch) const { return to.packed ? to.data + item * to.dim : scratch - r0 * lanes; }
    // Rows r0..r1 of a packed result, from y on, to where they go.
    void unpack(const Target& to, const float* y, i64 r0, i64 r1) const {
        isa.unpack(y, lanes, r1 - r0, used, to.data + item * to.dim + r0, to.dim, past_caches(to.data, b.items * to.dim, to.dim));
    }
    // Rows r0..r1 are complete.
    void finish(const Target& to, float* y, i64 r0, i64 r1) const {
        y += r0 * lanes;
        const i64 n = (r1 - r0) * lanes;
        if (to.relu || to.by) isa.gate(to.relu ? y : to.by + item * to.dim + r0 * lanes, n, y);
        if (!to.packed) unpack(to, y, r0, r1);
        else if (used < lanes)
            for (float* end = y + n; y != end; y += lanes) std::fill(y + used, y + lanes, 0.f);
    }
    // y[row, lane] (+)= chunk c, panel p, of the weight or its transpose, times x[column, lane]
    void multiply(const Panels& ps, i64 c, i64 p, const float* values, const float* bias, const float* x, float* y) const {
        isa.find(op_spmm, 1, int(lanes / b.width), Lay::packed).spmm({x + p * ps.width * lanes, lanes, 0, b.width, ps.entries(c, p), values,
            ps.begin(c, p), ps.count(c, p), y, lanes, 0, b.width, bias, p == 0, ps.perm.empty() ? nullptr : ps.perm.data(), half});
    }
    void sample(const Csr& a, const Panels& ps, i64 c, i64 p, const float* x, const float* dy, float* dvalues, bool add) const {
        if (!a.nnz()) return;
        const int parts = int(b.lanes(t) / lanes);   // of which this is the first
        isa.find(op_sddmm, parts, int(lanes / b.width), Lay::packed).sddmm({x + p * ps.width * lanes, lanes, lanes * a.cols, b.width, ps.entries(c, p),
            ps.begin(c, p), ps.count(c, p), dy, lanes, lanes * a.rows, dvalues, add});
    }
    // Both gradients at once: chunk c, panel p, of the transposed weight. dx's parts, if there are two, are `apart` floats from each other;
    // sums: the weight gradient's, in the order of pt.
    void both(const Csr& a, const Panels& pt, i64 c, i64 p, const float* values, const float* x, const float* dy, float* dx, i64 apart, float* sums, bool add) const {
        if (!pt.count(c, p)) return;
        const Seg* segs = pt.begin(c, p);
        SddmmArgs k{dy + p * pt.width * lanes, lanes, lanes * a.rows, b.width, pt.near.data(), segs, pt.count(c, p), x, lanes, lanes * a.cols, sums + segs->start, add};
        k.val = values; k.perm = pt.perm.data(); k.out = dx; k.orow = apart; k.first = p == 0;
        isa.find(op_both, int(b.lanes(t) / lanes), int(lanes / b.width), Lay::packed).sddmm(k);
    }
};

struct Backward {
    Source x, dy;
    const float* values;
    Target dx;
    float *dvalues, *dbias;        // null where not wanted, as dx.data may be
    bool add;                      // to what earlier tiles left in dvalues and dbias
    bool swept(const Panels& pt) const { return dvalues && dx.data && !pt.from.empty(); }   // both gradients at once
};

// One tile from input to output, the longer side of the weight a block at a time, so that what was packed is still in
// the L2 cache when it is used.
struct Tiles {
    const Isa& isa; const Batch& b;
    const Csr& a;
    const Panels &ps, &pt;

    bool tall() const { return a.rows >= a.cols; }
    i64 block() const { return round_up(tall() ? pt.width : ps.width, row_chunk); }
    // Floats that a tile's sums of the weight gradient take where both gradients come from one sweep: a panel's of rows, or all.
    i64 sums() const {
        i64 n = 0;
        if (pt.from.empty()) return n;
        for (size_t p = 1; p < pt.starts.size(); ++p) n = std::max(n, pt.starts[p] - (tall() ? pt.starts[p - 1] : 0));
        return n;
    }
    // Floats of scratch for one tile, by inputs and by outputs.
    i64 x_floats() const { return b.most() * (tall() ? a.cols : block()); }
    i64 y_floats() const { return b.most() * (tall() ? block() : a.rows); }
    template <class F> void each_block(i64 n, F&& f) const {
        for (i64 i = 0; i < n; i += block()) f(i, std::min(n, i + block()));
    }
    template <class F> static void each(i64 lo, i64 hi, i64 width, F&& f) {
        for (i64 i = lo / width; i * width < hi; ++i) f(i);
    }

    void forward(i64 t, const Source& x, const float* values, const float* bias, const Target& out, float* xp, float* y) const {
        const Work w(isa, b, t);
        if (tall()) forward_rows(w, x, values, bias, out, xp, y);
        else forward_cols(w, x, values, bias, out, xp, y);
    }

    void forward_rows(const Work& w, const Source& x, const float* values, const float* bias, const Target& out, float* xp, float* scratch) const {
        const float* in = w.packed(x, 0, a.cols, xp);
        for (i64 c = 0; c < ps.n_chunks; ++c) {
            const i64 r0 = c * ps.chunk, r1 = std::min(a.rows, r0 + ps.chunk);
            float* y = w.place(out, r0, scratch);
            for (i64 p = 0; p < ps.n_panels; ++p) w.multiply(ps, c, p, values, bias, in, y);
            w.finish(out, y, r0, r1);
        }
    }

    void forward_cols(const Work& w, const Source& x, const float* values, const float* bias, const Target& out, float* xp, float* scratch) const {
        float* y = w.place(out, 0, scratch);
        each_block(a.cols, [&](i64 c0, i64 c1) {
            const float* in = w.packed(x, c0, c1, xp);
            each(c0, c1, ps.width, [&](i64 p) {
                for (i64 c = 0; c < ps.n_chunks; ++c) w.multiply(ps, c, p, values, bias, in, y);
            });
        });
        w.finish(out, y, 0, a.rows);
    }

    void backward(i64 t, const Backward& k, float* xp, float* dxp, float* g, float* sums) const {
        const Work w(isa, b, t);
        if (k.swept(pt)) tall() ? sweep_rows(w, k, xp, dxp, g, sums) : sweep_cols(w, k, xp, dxp, g, sums);
        else tall() ? backward_rows(w, k, xp, dxp, g) : backward_cols(w, k, xp, dxp, g);
    }

    const float* packed_dy(const Work& w, const Backward& k, i64 r0, i64 r1, float* scratch) const {
        const float* dy = w.packed(k.dy, r0, r1, scratch);
        if (k.dbias) isa.row_sums(dy + r0 * w.lanes, r1 - r0, w.lanes, 1, 0, k.dbias + r0, k.add);
        return dy;
    }

    void sweep_rows(const Work& w, const Backward& k, float* xp, float* dxp, float* g, float* sums) const {
        const float* x = w.packed(k.x, 0, a.cols, xp);
        float* dx = w.place(k.dx, 0, dxp);
        each_block(a.rows, [&](i64 r0, i64 r1) {
            const float* dy = packed_dy(w, k, r0, r1, g);
            each(r0, r1, pt.width, [&](i64 p) {
                for (i64 c = 0; c < pt.n_chunks; ++c) w.both(a, pt, c, p, k.values, x, dy, dx, 0, sums - pt.starts[p], false);
                const i64 from = a.indptr[p * pt.width], to = a.indptr[std::min(a.rows, (p + 1) * pt.width)];
                isa.gather(sums - pt.starts[p], pt.from.data() + from, to - from, k.dvalues + from, k.add);
            });
        });
        w.finish(k.dx, dx, 0, a.cols);
    }

    void sweep_cols(const Work& w, const Backward& k, float* xp, float* dxp, float* g, float* sums) const {
        const float* dy = packed_dy(w, k, 0, a.rows, g);
        each_block(a.cols, [&](i64 c0, i64 c1) {
            const float* x = w.packed(k.x, c0, c1, xp);
            each(c0, c1, pt.chunk, [&](i64 c) {
                const i64 d0 = c * pt.chunk, d1 = std::min(c1, d0 + pt.chunk);
                float* dx = w.place(k.dx, d0, dxp);
                for (i64 p = 0; p < pt.n_panels; ++p) w.both(a, pt, c, p, k.values, x, dy, dx, 0, sums, false);
                w.finish(k.dx, dx, d0, d1);
            });
        });
        isa.gather(sums, pt.from.data(), a.nnz(), k.dvalues, k.add);
    }

    void backward_rows(const Work& w, const Backward& k, float* xp, float* dxp, float* g) const {
        const float* x = k.dvalues ? w.packed(k.x, 0, a.cols, xp) : nullptr;
        float* dx = k.dx.data ? w.place(k.dx, 0, dxp) : nullptr;
        each_block(a.rows, [&](i64 r0, i64 r1) {
            const float* dy = packed_dy(w, k, r0, r1, g);
            if (k.dvalues)
                each(r0, r1, ps.chunk, [&](i64 c) {
                    for (i64 p = 0; p < ps.n_panels; ++p) w.sample(a, ps, c, p, x, dy, k.dvalues, k.add);
                });
            if (dx)
                each(r0, r1, pt.width, [&](i64 p) {
                    for (i64 c = 0; c < pt.n_chunks; ++c) w.multiply(pt, c, p, k.values, nullptr, dy, dx);
                });
        });
        if (dx) w.finish(k.dx, dx, 0, a.cols);
    }

    void backward_cols(const Work& w, const Backward& k, float* xp, float* dxp, float* g) const {
        const float* dy = packed_dy(w, k, 0, a.rows, g);
        each_block(a.cols, [&](i64 c0, i64 c1) {
            if (k.dvalues) {
                const float* x = w.packed(k.x, c0, c1, xp);
                each(c0, c1, ps.width, [&](i64 p) {
                    for (i64 c = 0; c < ps.n_chunks; ++c) w.sample(a, ps, c, p, x, dy, k.dvalues, k.add);
                });
            }
            if (!k.dx.data) return;
            each(c0, c1, pt.chunk, [&](i64 c) {
                const i64 d0 = c * pt.chunk, d1 = std::min(c1, d0 + pt.chunk);
                float* dx = w.place(k.dx, d0, dxp);
                for (i64 p = 0; p < pt.n_panels; ++p) w.multiply(pt, c, p, k.values, nullptr, dy, dx);
                w.finish(k.dx, dx, d0, d1);
            });
        });
    }
};

// dst[k] = src[at[k]]
void gather(const Isa& isa, const float* src, const Raw<uint32_t>& at, float* dst, int threads) {
    constexpr i64 part = 1 << 16;
    const i64 n = i64(at.size());
    parallel_for(ceil_div(n, part), threads, [&](i64 t, int) { isa.gather(src, at.data() + t * part, std::min(part, n - t * part), dst + t * part, false); });
}

// A layer of a row.
struct Layer {
    Tiles tiles;
    const float *values, *bias;
    bool relu;                     // of the output
    float* kept;                   // what goes to the next layer, packed, if it is kept from forward to backward
    float *dvalues, *dbias;        // null where not wanted
    i64 rows() const { return tiles.a.rows; }
    i64 cols() const { return tiles.a.cols; }
    bool wanted() const { return dvalues || dbias; }
    // Floats of a tile's share of its gradients.
    i64 share() const { return wanted() ? round_up(tiles.a.nnz(), tiles.b.width) + rows() : 0; }
};

// Each thread takes whole tiles, and takes them through all layers of a row while what is between layers is in its cache. What
// is not kept, backward computes again. The tiles' shares of the gradients by weights and biases are kept apart and added in their order,
// as one thread adds them, a group of tiles at a time.
struct ByTile {
    const Batch& b; int threads;
    std::vector<Layer> row;

    static constexpr i64 apart_by = 1040;  // floats: a page and a line, lest blocks of scratch fall into the same sets of the cache
    bool even() const { return shared_evenly(b.tiles, threads); }
    int slots() const { return int(std::min<i64>(threads, b.tiles)); }
    template <class F> i64 most(F&& floats) const {
        i64 n = 0;
        for (const Layer& l : row) n = std::max(n, floats(l.tiles));
        return n;
    }
    i64 x_floats() const { return most([](const Tiles& t) { return t.x_floats(); }); }
    i64 y_floats() const { return most([](const Tiles& t) { return t.y_floats(); }); }
    // Where the inputs of layer i > 0 are, or would be if `space`, which has a tile's of all layers, were for the whole batch.
    float* between(i64 t, size_t i, float* space) const {
        for (size_t j = 1; j < i; ++j) space += b.most() * row[j].cols();
        return space - b.start(t) * row[i].cols();
    }
    i64 between_floats() const {
        i64 n = 0;
        for (size_t i = 1; i < row.size(); ++i) n += b.most() * row[i].cols();
        return n;
    }

    float* input(i64 t, size_t i, float* space) const { return row[i - 1].kept ? row[i - 1].kept : between(t, i, space); }
    bool kept() const { return row.size() < 2 || row[0].kept; }   // for all layers or none

    // The first n layers, of which the last one of the row writes to `out`.
    void forward(i64 t, size_t n, Source x, const Target& out, float* xp, float* y, float* h) const {
        for (size_t i = 0; i < n; ++i) {
            const Layer& l = row[i];
            const Target to = i + 1 < row.size() ? Target{input(t, i + 1, h), l.rows(), true, l.relu} : out;
            l.tiles.forward(t, x, l.values, l.bias, to, xp, y);
            x = {to.data, l.rows(), true};
        }
    }

    void forward(const Source& x, const Target& out) const {
        const i64 nx = x_floats() + apart_by, ny = y_floats() + apart_by, n = nx + ny + (kept() ? 0 : between_floats());
        Scratch space(n * slots());
        parallel_for(b.tiles, threads, [&](i64 t, int slot) {
            float* p = space.data() + slot * n;
            forward(t, row.size(), x, out, p, p + nx, p + nx + ny);
        });
    }

    i64 share() const {
        i64 n = 0;
        for (const Layer& l : row) n += l.share();
        return n;
    }
    // Tiles whose shares of the gradients are kept at a time: a multiple of the threads, in 16 MB where that is possible.
    i64 group() const {
        constexpr i64 most = i64(4) << 20;  // floats
        return std::min(b.tiles, std::max<i64>(most / share() / threads * threads, threads));
    }
    // The first layer of which something is wanted.
    size_t first(const Target& dx) const {
        size_t i = 0;
        while (!dx.data && i + 1 < row.size() && !row[i].wanted()) ++i;
        return i;
    }

    // One thread's memory: x and its gradient packed, a block of outputs, what is between layers and its gradients, sums of the weight gradient.
    struct Room { float *x, *dx, *y, *h, *dh, *sums; };

    // `shares`: where to put the tile's share of the gradients; null: to them.
    void backward(i64 t, const Source& x, Source dy, const Target& dx, float* shares, bool add, const Room& r) const {
        if (!kept()) forward(t, row.size() - 1, x, {nullptr, 0}, r.x, r.y, r.h);
        for (size_t i = row.size(), from = first(dx); i-- > from;) {
            const Layer& l = row[i];
            const Source in = i ? Source{input(t, i, r.h), l.cols(), true} : x;
            const Target to = i > from ? Target{between(t, i, r.dh), l.cols(), true, false, row[i - 1].relu ? in.data : nullptr} : i ? Target{nullptr, 0} : dx;
            Backward k{in, dy, l.values, to, l.dvalues, l.dbias, add};
            if (shares) {
                if (k.dvalues) k.dvalues = shares;
                if (k.dbias) k.dbias = shares + l.share() - l.rows();
                shares += l.share();
            }
            l.tiles.backward(t, k, r.x, r.dx, r.y, r.sums);
            dy = {to.data, l.cols(), true};
        }
    }

    void backward(const Source& x, const Source& dy, const Target& dx) const {
        const i64 nx = x_floats() + apart_by, ny = y_floats() + apart_by, ng = between_floats(), nh = kept() ? 0 : ng + apart_by, ns = most([](const Tiles& t) { return t.sums(); }),
                  nr = 2 * nx + ny + nh + ng + ns + 2 * apart_by;
        const bool apart = share() && threads > 1;
        const i64 n = apart ? group() : b.tiles;
        Scratch space(nr * slots()), shares(apart ? n * share() : 0);
        for (i64 t0 = 0; t0 < b.tiles; t0 += n) {
            const i64 count = std::min(n, b.tiles - t0);
            parallel_for(count, threads, [&](i64 i, int slot) {
                float* p = space.data() + slot * nr;
                const bool own = apart && t0 + i;
                backward(t0 + i, x, dy, dx, own ? shares.data() + i * share() : nullptr, !own && t0 + i, {p, p + nx, p + 2 * nx, p + 2 * nx + ny, p + 2 * nx + ny + nh, p + 2 * nx + ny + nh + ng + apart_by});
            });
            if (!apart) continue;
            const float* from = shares.data();
            for (size_t i = row.size(); i-- > 0; from += row[i].share()) {
                if (!row[i].wanted()) continue;
                add(from, t0 ? 0 : 1, count, row[i].tiles.a.nnz(), row[i].dvalues);
                add(from + row[i].share() - row[i].rows(), t0 ? 0 : 1, count, row[i].rows(), row[i].dbias);
            }
        }
    }

    void add(const float* shares, i64 first, i64 count, i64 floats, float* dst) const {
        constexpr i64 part = 1 << 12;
        if (!dst) return;
        parallel_for(ceil_div(floats, part), threads, [&](i64 k, int) {
            const i64 from = k * part, n = std::min(part, floats - from);
            for (i64 i = first; i < count; ++i) row[0].tiles.isa.accumulate(shares + i * share() + from, n, dst + from);
        });
    }
};

// Few tiles: two threads share the lanes of each, or any number its rows. The order of every sum is that of one thread.
struct Shared {
    const Isa& isa; const Batch& b; int threads;
    const i64 parts;   // 2 if each tile is packed as two halves, one after the other, 1 if whole; what reads packed data goes by it
    Shared(const Isa& isa, const Batch& b, int threads) : isa(isa), b(b), threads(threads), parts(parts_of(b, threads)) {}

    static i64 parts_of(const Batch& b, int threads) {
        for (i64 t = 0; t < b.tiles; ++t)
            if (b.lanes(t) / b.width % 2) return 1;
        return shared_evenly(2 * b.tiles, threads) ? 2 : 1;
    }

    void pack(const Source& src, float* dst) const {
        const i64 pieces = ceil_div(src.dim, row_chunk);
        parallel_for(b.tiles * pieces, threads, [&](i64 task, int) {
            const Work w(isa, b, task / pieces);
            const i64 c0 = task % pieces * row_chunk;
            w.pack(src, c0, std::min(src.dim, c0 + row_chunk), dst + w.item * src.dim + c0 * w.lanes);
        });
    }

    void chunk(const Work& w, const Panels& ps, i64 c, const float* values, const float* bias, const float* in, float* scratch, const Target& out) const {
        const i64 r0 = c * ps.chunk, r1 = std::min(ps.rows, r0 + ps.chunk);
        float* y = w.place(out, r0, scratch);
        for (i64 p = 0; p < ps.n_panels; ++p) w.multiply(ps, c, p, values, bias, in + w.item * ps.cols, y);
        w.finish(out, y, r0, r1);
    }

    // A source and memory for its packed form, unused if it comes packed; empty if there is no source.
    struct Packing {
        Source src; Scratch space;
        Packing(const Source& src, const Batch& b) : src(src), space(needed() ? b.floats(src.dim) : 0) {}
        bool needed() const { return src.data && !src.packed; }
        const float* data() const { return needed() ? space.data() : src.data; }
    };

    void pack(const Packing& p) const {
        if (!p.needed()) return;
        if (parts == 1) return pack(p.src, p.space.data());
        parallel_for(b.tiles * parts, threads, [&](i64 task, int) {
            const Work w(isa, b, task / parts, task % parts, parts);
            w.pack(p.src, 0, p.src.dim, p.space.data() + w.item * p.src.dim);
        });
    }

    // Packs both sources and multiplies the second one if a result is wanted.
    void product(const Panels& ps, const float* values, const float* bias, const Packing& also, const Packing& in, const Target& out) const {
        const i64 scratch = ps.chunk * b.most();
        Scratch space(scratch * threads);
        if (parts > 1)
            return parallel_for(b.tiles * parts, threads, [&](i64 task, int slot) {
                const Work w(isa, b, task / parts, task % parts, parts);
                for (const Packing* p : {&also, &in})
                    if (p->needed()) w.pack(p->src, 0, p->src.dim, p->space.data() + w.item * p->src.dim);
                if (out.data) for (i64 c = 0; c < ps.n_chunks; ++c) chunk(w, ps, c, values, bias, in.data(), space.data() + slot * scratch, out);
            });
        for (const Packing* p : {&also, &in}) pack(*p);
        if (out.data)
            parallel_for(b.tiles * ps.n_chunks, threads, [&](i64 task, int slot) {
                chunk(Work(isa, b, task / ps.n_chunks), ps, task % ps.n_chunks, values, bias, in.data(), space.data() + slot * scratch, out);
            });
    }

    void forward(const Panels& ps, const Source& x, const float* values, const float* bias, const Target& out) const {
        product(ps, values, bias, Packing({nullptr, 0}, b), Packing(x, b), out);
    }

    void sample(const Csr& a, const Panels& ps, const float* x, const float* dy, float* dvalues) const {
        parallel_for(ps.n_chunks, threads, [&](i64 c, int) {
            for (i64 t = 0; t < b.tiles; ++t)
                for (i64 p = 0; p < ps.n_panels; ++p)
                    Work(isa, b, t, 0, parts).sample(a, ps, c, p, x + b.start(t) * a.cols, dy + b.start(t) * a.rows, dvalues, t > 0);
        });
    }

    void bias(i64 rows, const float* g, float* dbias) const {
        parallel_for(ceil_div(rows, row_chunk), threads, [&](i64 c, int) {
            const i64 r0 = c * row_chunk, n = std::min(row_chunk, rows - r0);
            for (i64 t = 0; t < b.tiles; ++t) {
                const i64 lanes = b.lanes(t) / parts;
                isa.row_sums(g + b.start(t) * rows + r0 * lanes, n, lanes, parts, lanes * rows, dbias + r0, t > 0);
            }
        });
    }

    // Both gradients at once: threads share the chunks of columns.
    void sweep(const Csr& a, const Panels& pt, const Backward& k) const {
        const Packing x(k.x, b), dy(k.dy, b);
        for (const Packing* p : {&x, &dy}) pack(*p);
        const i64 floats = pt.chunk * b.most();
        Scratch space(floats * threads), sums(pt.starts.back());
        parallel_for(pt.n_chunks, threads, [&](i64 c, int slot) {
            const i64 c0 = c * pt.chunk, c1 = std::min(pt.rows, c0 + pt.chunk);
            for (i64 t = 0; t < b.tiles; ++t) {
                const Work w(isa, b, t, 0, parts);
                const i64 apart = w.lanes * (k.dx.packed ? a.cols : pt.chunk);
                float* dx = w.place(k.dx, c0, space.data() + slot * floats);
                for (i64 p = 0; p < pt.n_panels; ++p)
                    w.both(a, pt, c, p, k.values, x.data() + b.start(t) * a.cols, dy.data() + b.start(t) * a.rows, dx, apart, sums.data(), t > 0);
                for (i64 p = 0; p < parts; ++p) Work(isa, b, t, p, parts).finish(k.dx, dx + p * apart, c0, c1);
            }
        });
        if (k.dbias) bias(a.rows, dy.data(), k.dbias);
        gather(isa, sums.data(), pt.from, k.dvalues, threads);
    }

    void backward(const Csr& a, const Panels& ps, const Panels& pt, const Backward& k) const {
        if (k.swept(pt) && shared_evenly(pt.n_chunks, threads)) return sweep(a, pt, k);
        const Packing x(k.dvalues ? k.x : Source{nullptr, 0}, b), dy(k.dy, b);
        product(pt, k.values, nullptr, x, dy, k.dx);
        if (k.dbias) bias(a.rows, dy.data(), k.dbias);
        if (k.dvalues) sample(a, ps, x.data(), dy.data(), k.dvalues);
    }
};

// f(one tile or half tile, where it starts in a packed batch)
template <class F> void each_work(const Isa& isa, i64 batch, i64 dim, i64 vectors, int threads, F&& f) {
    const Batch b(batch, isa.width, vectors);
    const i64 parts = shared_evenly(b.tiles, threads) ? 1 : Shared::parts_of(b, threads);
    parallel_for(b.tiles * parts, threads, [&](i64 task, int) {
        const Work w(isa, b, task / parts, task % parts, parts);
        f(w, w.item * dim);
    });
}

void multiply_one(const Isa& isa, const Csr& a, const std::vector<Seg>& segs, const float* x, const float* values,
                  const float* bias, float* y, int threads) {
    constexpr i64 rows = 256;
    parallel_for(ceil_div(a.rows, rows), threads, [&](i64 t, int) {
        isa.spmv(x, a.idx.data(), values, segs.data() + t * rows, std::min(rows, a.rows - t * rows), bias, y);
    });
}

}  // namespace

LinearPlan::LinearPlan(const i64* indptr, i64 n_indptr, const i32* idx, i64 nnz, i64 rows, i64 cols)
    : w_(checked_csr(indptr, n_indptr, idx, nnz, rows, cols)), rows_(row_segs(w_)) {}

// A panel fits the L1 cache, unless that leaves too few nonzeros in a row of it to be worth loading the outputs again.
std::shared_ptr<const Panels> LinearPlan::panels(bool transposed, i64 lanes, int threads) const {
    const Isa& isa = current_isa();
    constexpr i64 l1_floats = 12 * 1024, l2_floats = 128 * 1024;
    constexpr double few = 12;
    const double density = double(nnz()) / std::max(1., double(rows()) * double(cols()));
    const i64 fits = l1_floats / lanes, most = l2_floats / lanes;
    const i64 want = std::clamp(density * most > few ? i64(few / density) : most, fits, most);
    const i64 width = want < row_chunk ? row_chunk / 2 : round_up(want - row_chunk / 2, row_chunk);
    // Both gradients from one sweep: not for tiles that a small batch leaves narrow, unless nonzeros are few. They gain nothing, and positions take time.
    const bool back = transposed && isa.both && lanes > tile_vectors(isa) / 2 * isa.width;
    std::lock_guard<std::mutex> guard(lock_);
    for (const auto& c : cache_)
        if (c.transposed == transposed && c.panels->width == width && (c.panels->from.empty() != back || !nnz())) return c.panels;
    if (cache_.size() >= 8) cache_.erase(cache_.begin());
    cache_.push_back({transposed, transposed ? std::make_shared<Panels>(Panels::transposed(w_, row_chunk, width, back, threads))
                                             : std::make_shared<Panels>(w_, 0, rows(), row_chunk, width, Panels::nearby, threads)});
    return cache_.back().panels;
}

const LinearPlan::Columns& LinearPlan::columns() const {
    std::lock_guard<std::mutex> guard(lock_);
    if (!columns_) {
        Csr wt = transposed(w_);
        auto segs = row_segs(wt);
        columns_.reset(new Columns{std::move(wt), std::move(segs)});
    }
    return *columns_;
}

// Vectors in a tile: as many sums as 16 registers leave room for. Where vectors are wide and nonzeros few, half of that wins:
// what is packed is then nearer.
i64 LinearPlan::tile_vectors(const Isa& isa) const {
    constexpr double few = 1. / 32;
    return isa.width == 16 && double(nnz()) < few * double(rows()) * double(cols()) ? 4 : 8;
}

static void check(const Link& link, i64 batch, i64 rows, i64 cols) {
    if (link.any() && (batch < 2 || !rows || !cols)) throw std::invalid_argument("only layers and batches of some size can be linked");
}

void LinearPlan::pack(const float* rows, i64 batch, i64 dim, float* packed, int threads) const {
    const Isa& isa = current_isa();
    each_work(isa, batch, dim, tile_vectors(isa), threads, [&](const Work& w, i64 start) { w.pack({rows, dim}, 0, dim, packed + start); });
}

void LinearPlan::unpack(const float* packed, i64 batch, i64 dim, float* rows, int threads) const {
    const Isa& isa = current_isa();
    each_work(isa, batch, dim, tile_vectors(isa), threads, [&](const Work& w, i64 start) {
        w.unpack({rows, dim}, packed + start, 0, dim);
    });
}

void LinearPlan::forward(const float* x, i64 batch, const float* values, const float* bias, float* out, int threads, Link link) const {
    check(link, batch, rows(), cols());
    const Isa& isa = current_isa();
    if (!batch || !rows()) return;
    if (batch == 1) { multiply_one(isa, w_, rows_, x, values, bias, out, threads); return; }
    const Batch b(batch, isa.width, tile_vectors(isa));
    const auto ps = panels(false, b.most(), threads);
    const ByTile by{b, threads, {{{isa, b, w_, *ps, *ps}, values, bias, link.relu, nullptr, nullptr, nullptr}}};
    const Source from{x, cols(), link.x_packed};
    const Target to{out, rows(), link.y_packed, link.relu};
    if (by.even()) by.forward(from, to);
    else Shared(isa, b, threads).forward(*ps, from, values, bias, to);
}

void LinearPlan::backward(const float* x, const float* dy, i64 batch, const float* values, float* dx, float* dvalues, float* dbias,
                          int threads, Link link, const float* out) const {
    check(link, batch, rows(), cols());
    const Isa& isa = current_isa();
    if (!batch) {
        if (dvalues) std::fill(dvalues, dvalues + nnz(), 0.f);
        if (dbias) std::fill(dbias, dbias + rows(), 0.f);
        return;
    }
    if (!rows()) { if (dx) std::fill(dx, dx + batch * cols(), 0.f); return; }
    if (batch == 1) {
        if (dx) {
            const Columns& wt = columns();
            Scratch vt(nnz());
            gather(isa, values, wt.csr.perm, vt.data(), threads);
            multiply_one(isa, wt.csr, wt.segs, dy, vt.data(), nullptr, dx, threads);
        }
        if (dvalues) isa.outer(x, w_.idx.data(), rows_.data(), rows(), dy, dvalues, false);
        if (dbias) std::copy(dy, dy + rows(), dbias);
        return;
    }
    const Batch b(batch, isa.width, tile_vectors(isa));
    const auto ps = panels(false, b.most(), threads), pt = dx ? panels(true, b.most(), threads) : ps;
    const ByTile by{b, threads, {{{isa, b, w_, *ps, *pt}, values, nullptr, link.relu, nullptr, dvalues, dbias}}};
    const Backward k{{x, cols(), link.x_packed}, {dy, rows(), link.y_packed, link.relu && !link.y_packed ? out : nullptr}, values,
                     {dx, cols(), link.x_packed, false, link.gated ? x : nullptr}, dvalues, dbias, false};
    if (by.even()) by.backward(k.x, k.dy, k.dx);
    else Shared(isa, b, threads).backward(w_, *ps, *pt, k);
}

bool LinearPlan::whole_tiles(i64 batch, int threads) const {
    const Isa& isa = current_isa();
    return batch > 1 && shared_evenly(Batch(batch, isa.width, tile_vectors(isa)).tiles, threads);
}

// f(batch, the layers ready for it); `backward`: with their panels of columns as well.
template <class F> void LinearPlan::with_row(const std::vector<RowLayer>& row, i64 batch, bool backward, int threads, F&& f) {
    const Isa& isa = current_isa();
    const LinearPlan *first = row.front().plan, *before = nullptr;
    for (const RowLayer& l : row) {
        if (!l.plan->rows() || !l.plan->cols() || !l.plan->whole_tiles(batch, threads)) throw std::invalid_argument("a row of layers needs features, and a batch whose tiles the threads share evenly");
        if (l.plan->tile_vectors(isa) != first->tile_vectors(isa)) throw std::invalid_argument("the layers of a row have different tiles");
        if (before && before->rows() != l.plan->cols()) throw std::invalid_argument("the layers of a row don't fit together");
        before = l.plan;
    }
    const Batch b(batch, isa.width, first->tile_vectors(isa));
    std::vector<std::shared_ptr<const Panels>> keep;
    ByTile by{b, threads, {}};
    for (const RowLayer& l : row) {
        const auto ps = l.plan->panels(false, b.most(), threads), pt = backward ? l.plan->panels(true, b.most(), threads) : ps;
        by.row.push_back({{isa, b, l.plan->w_, *ps, *pt}, l.values, l.bias, l.relu, l.kept, l.dvalues, l.dbias});
        keep.insert(keep.end(), {ps, pt});
    }
    f(by);
}

void LinearPlan::forward(const std::vector<RowLayer>& row, const float* x, i64 batch, float* out, int threads) {
    with_row(row, batch, false, threads, [&](const ByTile& by) {
        by.forward({x, by.row.front().cols()}, {out, by.row.back().rows(), false, by.row.back().relu});
    });
}

void LinearPlan::backward(const std::vector<RowLayer>& row, const float* x, const float* dy, const float* out, i64 batch, float* dx, int threads) {
    with_row(row, batch, true, threads, [&](const ByTile& by) {
        by.backward({x, by.row.front().cols()}, {dy, by.row.back().rows(), false, by.row.back().relu ? out : nullptr}, {dx, by.row.front().cols()});
    });
}

}  // namespace fastsparse
