// The micro-kernels, written once over a vector type V and included in one namespace per ISA.
// Nothing from the standard library is called here: an inline function compiled for a wide ISA must not
// become the copy that the linker keeps for everybody.

// Kernel on one row's nonzeros, tile in registers. Narrow tiles keep several partial tiles, to hide the latency of the fma.
template <Lay LAY> struct Indices { using type = i32; };
template <> struct Indices<Lay::packed> { using type = uint16_t; };

template <int N> struct Count { static constexpr int value = N; };

template <int TR, int TC, Lay LAY> struct Tile {
    static constexpr int N = TR * TC, W = V::W;
    static constexpr int U = N >= 8 ? 1 : N >= 4 ? 2 : 4;
    using Index = typename Indices<LAY>::type;
    static constexpr bool in_turn = LAY == Lay::packed;   // indices lie in the order in which they run
    static inline i64 at(const i64 row, const i64 col, int r, int c) { return r * row + c * (LAY == Lay::strided ? col : (i64)W); }
    static inline i64 step(i64 given) { return LAY == Lay::packed ? TC * W : given; }   // from index to index, from row to row
};

static inline void prefetch(const void* p) { __builtin_prefetch(p); }
constexpr int ahead = 2;  // segments whose entries are fetched in advance

// The address in one register: the multiply-adds that read from it then stay one micro-operation each, base + constant.
static inline const float* address(const float* p) {
#ifdef __x86_64__
    asm("" : "+r"(p));
#endif
    return p;
}

// y is read when a row's sum is complete, not before: then nothing waits for it.
template <int TR, int TC, Lay LAY, bool PERM, bool FIRST, int U> static void spmm_rows(const SpmmArgs& a) {
    using T = Tile<TR, TC, LAY>;
    using Index = typename T::Index;
    constexpr int N = T::N;
    const i64 scale = T::step(a.scale), xrow = a.xrow, xcol = a.xcol, ypitch = T::step(a.ypitch), yrow = a.yrow, ycol = a.ycol;
    const float *x = a.x, *bias = a.bias, *values = a.val;
    const Index* indices = static_cast<const Index*>(a.idx);
    const bool stream = a.stream;
    float* out = a.y;
    for (const Seg *s = a.segs, *e = s + a.nseg; s != e; ++s) {
        const i64 start = s->start, row = s->row, n = s->n;
        const Index* idx = indices + (T::in_turn && !PERM ? 0 : start);
        if (T::in_turn && !PERM) indices += n;
        const float* val = PERM ? values : values + start;
        const uint32_t* perm = PERM ? a.perm + start : nullptr;
        if (!PERM && s + ahead < e) {
            if (!T::in_turn) prefetch(indices + s[ahead].start);
            prefetch(values + s[ahead].start);
        }
        V acc[U][N];
        const V init = FIRST && bias ? V::set1(bias[row]) : V::zero();
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u)
#pragma GCC unroll 16
            for (int i = 0; i < N; ++i) acc[u][i] = u ? V::zero() : init;
        i64 k = 0;
        for (; k + U <= n; k += U)
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u) {
                const V b = V::set1(val[PERM ? perm[k + u] : k + u]);
                const float* p = address(x + idx[k + u] * scale);
#pragma GCC unroll 16
                for (int i = 0; i < N; ++i) acc[u][i] = V::fma(b, V::load(p + T::at(xrow, xcol, i / TC, i % TC)), acc[u][i]);
            }
        if (U > 1)
            for (; k < n; ++k) {
                const V b = V::set1(val[PERM ? perm[k] : k]);
                const float* p = address(x + idx[k] * scale);
#pragma GCC unroll 16
                for (int i = 0; i < N; ++i) acc[0][i] = V::fma(b, V::load(p + T::at(xrow, xcol, i / TC, i % TC)), acc[0][i]);
            }
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
            for (int u = 1; u < U; ++u) acc[0][i] = V::add(acc[0][i], acc[u][i]);
        float* y = const_cast<float*>(address(out + row * ypitch));
        const auto at = [&](int i) { return y + T::at(yrow, ycol, i / TC, i % TC); };
        if (!FIRST)
#pragma GCC unroll 16
            for (int i = 0; i < N; ++i) acc[0][i] = V::add(acc[0][i], V::load(at(i)));
        if (stream)
#pragma GCC unroll 16
            for (int i = 0; i < N; ++i) V::stream(at(i), acc[0][i]);
        else
#pragma GCC unroll 16
            for (int i = 0; i < N; ++i) V::store(at(i), acc[0][i]);
    }
}

template <int TR, int TC, Lay LAY, bool PERM, int U> static void spmm_panel(const SpmmArgs& a) {
    a.first ? spmm_rows<TR, TC, LAY, PERM, true, U>(a) : spmm_rows<TR, TC, LAY, PERM, false, U>(a);
}

template <int TR, int TC, Lay LAY> static void spmm(const SpmmArgs& a) {
    constexpr int U = Tile<TR, TC, LAY>::U, H = LAY == Lay::packed ? Tile<TR, 2 * TC, LAY>::U : U;
    if (H != U && a.half) a.perm ? spmm_panel<TR, TC, LAY, true, H>(a) : spmm_panel<TR, TC, LAY, false, H>(a);
    else a.perm ? spmm_panel<TR, TC, LAY, true, U>(a) : spmm_panel<TR, TC, LAY, false, U>(a);
}

// Vectors become their sums, four at a time. The memory belongs to the caller, so that the rest can stay in registers.
struct Reducer {
    static constexpr int W = V::W, floats = W * W / 4;
    float *buf, *out;
    bool add;       // to what is there
    i64 fill = 0;   // floats in buf
    Reducer(float* buf, float* out, bool add = false) : buf(buf), out(out), add(add) {}

    inline void put(V a, V b, V c, V d) {
        V::store(buf + fill, V::quad(a, b, c, d));
        fill += W;
        if (fill == floats) flush();
    }
    inline void flush() {
        const V sums = V::reduce_quads(buf);
        V::store(out, add ? V::add(V::load(out), sums) : sums);
        out += W;
        fill = 0;
    }
    inline void finish() { if (fill) flush(); }   // sums of what an earlier round left in buf go where nobody looks
};

// dst[i] (+)= src[i]; src is readable up to a whole vector
static inline void copy_run(const float* src, i64 n, float* dst, bool add) {
    constexpr int W = V::W;
    i64 i = 0;
    for (; i + W <= n; i += W) {
        float* d = const_cast<float*>(address(dst + i));   // or the compiler would call memcpy for some dozens of floats
        V::store(d, add ? V::add(V::load(d), V::load(src + i)) : V::load(src + i));
    }
    if (i < n) V::store_first(dst + i, add ? V::add(V::load_first(dst + i, n - i), V::load(src + i)) : V::load(src + i), n - i);
}

// The gradient's tile stays in registers while the row's nonzeros run, four at a time. Their sums are collected, each row's from a
// multiple of four on, and then copied row by row to where they belong.
template <int TR, int TC, Lay LAY> static void sddmm(const SddmmArgs& a) {
    using T = Tile<TR, TC, LAY>;
    using Index = typename T::Index;
    constexpr int N = T::N, W = V::W;
    constexpr i64 room = 512;              // sums that are collected before they are copied
    const i64 scale = T::step(a.scale), xrow = a.xrow, xcol = a.xcol, ypitch = T::step(a.ypitch), yrow = a.yrow;
    const float *x = a.x, *dy = a.y;
    const Index* indices = static_cast<const Index*>(a.idx);
    float* dv = a.dv;
    const bool add = a.add;
    const auto padded = [](i64 n) { return (n + 3) & ~i64(3); };
    alignas(64) float collected[room + W], buf[Reducer::floats];
    const Seg *s = a.segs, *e = s + a.nseg;
    for (i64 done = 0; s != e;) {          // entries of s that are done: not 0 only for a row with more entries than there is room
        const Seg* first = s;
        const i64 skip = done;
        i64 left = room;
        Reducer sums(buf, collected);
        while (s != e) {
            i64 n = s->n - done;
            if (padded(n) > left) {
                if (left < room) break;
                n = room;
            }
            left -= padded(n);
            const float* y = address(dy + s->row * ypitch);
            if (s + 2 * ahead < e) {
                if (!T::in_turn) prefetch(indices + s[2 * ahead].start);
                __builtin_prefetch(dv + s[2 * ahead].start, 1);
            }
            V g[N];
#pragma GCC unroll 16
            for (int i = 0; i < N; ++i) g[i] = V::load(y + (i / TC) * yrow + (i % TC) * W);
            const Index *k = indices + (T::in_turn ? 0 : s->start + done), *end = k + n;
            if (T::in_turn) indices += n;
            const auto product = [&](const Index* at) {
                const float* p = address(x + *at * scale);
                V acc = V::mul(g[0], V::load(p));
#pragma GCC unroll 16
                for (int i = 1; i < N; ++i) acc = V::fma(g[i], V::load(p + T::at(xrow, xcol, i / TC, i % TC)), acc);
                return acc;
            };
            for (; k + 4 <= end; k += 4) sums.put(product(k), product(k + 1), product(k + 2), product(k + 3));
            if (k < end) {
                const V zero = V::zero();
                sums.put(product(k), k + 1 < end ? product(k + 1) : zero, k + 2 < end ? product(k + 2) : zero, zero);
            }
            done += n;
            if (done < s->n) break;
            ++s;
            done = 0;
        }
        sums.finish();
        const float* from = collected;
        for (i64 off = skip; first != s || off < done; ++first, off = 0) {
            const i64 n = (first == s ? done : first->n) - off;
            copy_run(from, n, dv + first->start + off, add);
            from += padded(n);
            if (first == s) break;
        }
    }
}

#ifdef FS_MASKS
// spmm and sddmm of the same structure at once, to the same bits: each vector of x is loaded once for both. Four nonzeros run side by side,
// vector by vector, or else the chains of sums would wait for each other.
template <int TR, int TC, Lay LAY> static void both(const SddmmArgs& a) {
    using T = Tile<TR, TC, LAY>;
    using Index = typename T::Index;
    constexpr int N = T::N, W = V::W, U = T::U;
    const i64 scale = T::step(a.scale), pitch = T::step(a.ypitch), xrow = a.xrow, xcol = a.xcol, yrow = a.yrow, orow = a.orow;
    const float *x = a.x, *dy = a.y, *values = a.val;
    const Index* idx = static_cast<const Index*>(a.idx);
    const uint32_t* perm = a.perm;
    float* out = a.out;
    const bool first = a.first;
    alignas(64) float buf[Reducer::floats];
    Reducer sums(buf, a.dv, a.add);
    for (const Seg *s = a.segs, *e = s + a.nseg; s != e; ++s) {
        const float* y = address(dy + s->row * pitch);
        V g[N], acc[U][N];
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) {
            g[i] = V::load(y + (i / TC) * yrow + (i % TC) * W);
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u) acc[u][i] = V::zero();
        }
        // Q nonzeros from k on, of which `paired` take the partial sums in turns, as in spmm
        const auto group = [&](i64 k, auto count) __attribute__((always_inline)) {
            constexpr int Q = decltype(count)::value, paired = Q / U * U;
            const float* p[Q];
            V b[Q], product[4];
#pragma GCC unroll 4
            for (int q = 0; q < 4; ++q) product[q] = V::zero();
#pragma GCC unroll 4
            for (int q = 0; q < Q; ++q) {
                p[q] = address(x + idx[k + q] * scale);
                b[q] = V::set1(values[perm[k + q]]);
            }
#pragma GCC unroll 16
            for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
                for (int q = 0; q < Q; ++q) {
                    V v = V::load(p[q] + T::at(xrow, xcol, i / TC, i % TC));
                    if (N > 4) V::keep(v);
                    product[q] = i ? V::fma(g[i], v, product[q]) : V::mul(g[i], v);
                    V& sum = acc[q < paired ? q % U : 0][i];
                    sum = V::fma(b[q], v, sum);
                }
            sums.put(product[0], product[1], product[2], product[3]);
        };
        i64 k = s->start;
        const i64 end = k + s->n;
        for (; k + 4 <= end; k += 4) group(k, Count<4>());
        if (end - k == 1) group(k, Count<1>());
        else if (end - k == 2) group(k, Count<2>());
        else if (end - k == 3) group(k, Count<3>());
        float* to = const_cast<float*>(address(out + s->row * pitch));
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
            for (int u = 1; u < U; ++u) acc[0][i] = V::add(acc[0][i], acc[u][i]);
            float* p = to + (i / TC) * orow + (i % TC) * W;
            V::store(p, first ? acc[0][i] : V::add(acc[0][i], V::load(p)));
        }
    }
    sums.finish();
}

// Convolutions whose rows are whole vectors. A nonzero's distance is seldom one of whole vectors, but its load is aligned all the same:
// those that read the farthest lane come first, and what they sum up to moves down as a whole before those of the next lane are added.
// Only lanes that nobody wants miss what would have moved in at the tile's end.
template <int N> static void spmm_shifted(const SpmmArgs& a) {
    constexpr int W = V::W;
    const float *x = a.x, *bias = a.first ? a.bias : nullptr, *values = a.val;
    const i32 *indices = static_cast<const i32*>(a.idx), *runs = a.classes.runs, *down = a.classes.down;
    const i64 ypitch = a.ypitch, classes = a.classes.n;
    const bool first = a.first;
    float* out = a.y;
    for (const Seg *s = a.segs, *e = s + a.nseg; s != e; ++s, runs += classes) {
        const i32* idx = indices + s->start;
        const float* val = values + s->start;
        V acc[N];
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) acc[i] = V::zero();
        i64 k = 0;
        for (i64 c = 0; c < classes; ++c) {
            for (const i64 end = k + runs[c]; k < end; ++k) {
                const V b = V::set1(val[k]);
                const float* p = address(x + idx[k]);
#pragma GCC unroll 16
                for (int i = 0; i < N; ++i) acc[i] = V::fma(b, V::load(p + i * W), acc[i]);
            }
            if (k && down[c])
#pragma GCC unroll 16
                for (int i = 0; i < N; ++i) acc[i] = V::from(acc[i], i + 1 < N ? acc[i + 1] : V::zero(), down[c]);
        }
        float* y = const_cast<float*>(address(out + s->row * ypitch));
        const V init = bias ? V::set1(bias[s->row]) : V::zero();
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) V::store(y + i * W, V::add(acc[i], first ? init : V::load(y + i * W)));
    }
}

// Vectors whose sums belong one after the other.
struct InTurn {
    static constexpr int W = V::W, floats = W * W;
    float *products, *dv;
    bool add;
    int fill = 0;
    InTurn(float* products, float* dv, bool add) : products(products), dv(dv), add(add) {}

    inline void put(V v) {
        V::store(products + fill * W, v);
        if (++fill == W) finish();
    }
    inline void finish() {
        if (!fill) return;
        alignas(64) float buf[Reducer::floats], sums[W];
        Reducer reducer(buf, sums);
        for (const float* p = products; p < products + floats; p += 4 * W)
            reducer.put(V::load(p), V::load(p + W), V::load(p + 2 * W), V::load(p + 3 * W));
        copy_run(sums, fill, dv, add);
        dv += fill;
        fill = 0;
    }
};

// The gradient's tile, as the first class wants it, moves down from class to class. Sums come in the order in which they belong.
template <int N> static void sddmm_shifted(const SddmmArgs& a) {
    constexpr int W = V::W;
    if (!a.nseg) return;
    const float *x = a.x, *dy = a.y;
    const i32 *idx = static_cast<const i32*>(a.idx) + a.segs->start, *runs = a.classes.runs, *down = a.classes.down;
    const i64 ypitch = a.ypitch, classes = a.classes.n;
    alignas(64) float products[InTurn::floats];
    InTurn sums(products, a.dv + a.segs->start, a.add);
    for (const Seg *s = a.segs, *e = s + a.nseg; s != e; ++s, runs += classes) {
        const float* y = address(dy + s->row * ypitch);
        V g[N + 1];
#pragma GCC unroll 17
        for (int i = 0; i <= N; ++i) g[i] = V::load(y + i * W);
        for (i64 c = 0; c < classes; ++c) {
            if (c)
#pragma GCC unroll 17
                for (int i = 0; i <= N; ++i) g[i] = V::from(g[i], i < N ? g[i + 1] : V::zero(), down[c - 1]);
            for (const i32* end = idx + runs[c]; idx < end; ++idx) {
                const float* p = address(x + *idx);
                V acc = V::mul(g[0], V::load(p));
#pragma GCC unroll 16
                for (int i = 1; i < N; ++i) acc = V::fma(g[i], V::load(p + i * W), acc);
                sums.put(acc);
            }
        }
    }
    sums.finish();
}

// spmm_shifted and sddmm_shifted of the same structure at once: the sums of one and the tile of the other move down together.
template <int N> static void both_shifted(const SddmmArgs& a) {
    constexpr int W = V::W;
    if (!a.nseg) return;
    const float *x = a.x, *other = a.y, *val = a.val + a.segs->start;
    const i32 *idx = static_cast<const i32*>(a.idx) + a.segs->start, *runs = a.classes.runs, *down = a.classes.down;
    const i64 pitch = a.ypitch, out_pitch = a.orow, classes = a.classes.n;
    const bool first = a.first;
    float* out = a.out;
    alignas(64) float products[InTurn::floats];
    InTurn sums(products, a.dv + a.segs->start, a.add);
    for (const Seg *s = a.segs, *e = s + a.nseg; s != e; ++s, runs += classes) {
        const float* y = address(other + s->row * pitch);
        V g[N + 1], acc[N];
#pragma GCC unroll 17
        for (int i = 0; i <= N; ++i) g[i] = V::load(y + i * W);
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) acc[i] = V::zero();
        const auto group = [&](auto count) __attribute__((always_inline)) {
            constexpr int Q = decltype(count)::value;
            const float* p[Q];
            V b[Q], product[Q];
#pragma GCC unroll 4
            for (int q = 0; q < Q; ++q) {
                p[q] = address(x + *idx++);
                b[q] = V::set1(*val++);
            }
#pragma GCC unroll 16
            for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
                for (int q = 0; q < Q; ++q) {
                    V v = V::load(p[q] + i * W);
                    V::keep(v);
                    product[q] = i ? V::fma(g[i], v, product[q]) : V::mul(g[i], v);
                    acc[i] = V::fma(b[q], v, acc[i]);
                }
#pragma GCC unroll 4
            for (int q = 0; q < Q; ++q) sums.put(product[q]);
        };
        const i32* begin = idx;
        for (i64 c = 0; c < classes; ++c) {
            i32 left = runs[c];
            for (; left >= 4; left -= 4) group(Count<4>());
            if (left & 2) group(Count<2>());
            if (left & 1) group(Count<1>());
            if (!down[c]) continue;
            if (idx != begin)
#pragma GCC unroll 16
                for (int i = 0; i < N; ++i) acc[i] = V::from(acc[i], i + 1 < N ? acc[i + 1] : V::zero(), down[c]);
            if (c + 1 < classes)
#pragma GCC unroll 17
                for (int i = 0; i <= N; ++i) g[i] = V::from(g[i], i < N ? g[i + 1] : V::zero(), down[c]);
        }
        float* to = const_cast<float*>(address(out + s->row * out_pitch));
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) V::store(to + i * W, V::add(acc[i], first ? V::zero() : V::load(to + i * W)));
    }
    sums.finish();
}
#endif

// The blocks of n rows and m columns, so many side by side at a time. whole(row, col) for those of W x W, part(row, col, rows, cols) at the ends.
template <class Whole, class Part> static inline void each_block(i64 n, i64 m, int side, Whole&& whole, Part&& part) {
    constexpr i64 W = V::W;
    for (i64 r0 = 0; r0 < n; r0 += side * W)
        for (i64 c = 0; c < m; c += W)
            for (i64 r = r0; r < n && r < r0 + side * W; r += W) {
                if (n - r >= W && m - c >= W) whole(r, c);
                else part(r, c, n - r < W ? n - r : W, m - c < W ? m - c : W);
            }
}

// n columns of a block to their places.
static inline __attribute__((always_inline)) void put_columns(const V* t, i64 n, float* dst, i64 dst_pitch, const i32* off) {
    if (off)
#pragma GCC unroll 16
        for (i64 j = 0; j < n; ++j) V::store(dst + off[j], t[j]);
    else
#pragma GCC unroll 16
        for (i64 j = 0; j < n; ++j) V::store(dst + j * dst_pitch, t[j]);
}

static void pack(const float* src, i64 src_pitch, i64 rows, i64 cols, float* dst, i64 dst_pitch, const i32* off) {
    const auto place = [&](i64 r, i64 c) { return dst + r + (off ? 0 : c * dst_pitch); };
    const auto places = [&](i64 c) { return off ? off + c : nullptr; };
    each_block(rows, cols, 2, [&](i64 r, i64 c) {
        V t[V::W];
        V::load_transposed(src + r * src_pitch + c, src_pitch, t);
        put_columns(t, V::W, place(r, c), dst_pitch, places(c));
    }, [&](i64 r, i64 c, i64 nr, i64 nc) {
        V t[V::W];
        for (int i = 0; i < V::W; ++i) t[i] = i < nr ? V::load_first(src + (r + i) * src_pitch + c, nc) : V::zero();
        V::transpose(t);
        put_columns(t, nc, place(r, c), dst_pitch, places(c));
    });
}

static void pack_gated(const float* src, const float* by, i64 src_pitch, i64 rows, i64 cols, float* dst, i64 dst_pitch) {
    each_block(rows, cols, 2, [&](i64 r, i64 c) {
        V t[V::W];
#pragma GCC unroll 16
        for (int i = 0; i < V::W; ++i) {
            const i64 at = (r + i) * src_pitch + c;
            t[i] = V::gate(V::load(by + at), V::load(src + at));
        }
        V::transpose(t);
        put_columns(t, V::W, dst + c * dst_pitch + r, dst_pitch, nullptr);
    }, [&](i64 r, i64 c, i64 nr, i64 nc) {
        V t[V::W];
        for (int i = 0; i < V::W; ++i) {
            const i64 at = (r + i) * src_pitch + c;
            t[i] = i < nr ? V::gate(V::load_first(by + at, nc), V::load_first(src + at, nc)) : V::zero();
        }
        V::transpose(t);
        put_columns(t, nc, dst + c * dst_pitch + r, dst_pitch, nullptr);
    });
}

// src's rows can be read up to whole vectors.
static void unpack(const float* src, i64 src_pitch, i64 rows, i64 cols, float* dst, i64 dst_pitch, bool far) {
    if (V::W < 16) far = false;   // parts of lines had better stay
    each_block(cols, rows, 1, [&](i64 c, i64 r) {
        V t[V::W];
        if (V::W < 16)   // lines that are written in parts had better be there
            for (int i = 0; i < V::W; ++i) __builtin_prefetch(dst + (c + V::W + i) * dst_pitch + r, 1);
        V::load_transposed(src + r * src_pitch + c, src_pitch, t);
        float* to = dst + c * dst_pitch + r;
        if (!far) put_columns(t, V::W, to, dst_pitch, nullptr);
        else
#pragma GCC unroll 16
            for (int j = 0; j < V::W; ++j) V::stream(to + j * dst_pitch, t[j]);
    }, [&](i64 c, i64 r, i64 nc, i64 nr) {
        V t[V::W];
        for (int i = 0; i < V::W; ++i) t[i] = i < nr ? V::load(src + (r + i) * src_pitch + c) : V::zero();
        V::transpose(t);
        for (i64 j = 0; j < nc; ++j) V::store_first(dst + (c + j) * dst_pitch + r, t[j], nr);
    });
    if (far) V::fence();
}

// dst[r, left + c] = src[r, c], zeros around it. Rows are written in order, so that each may run over into the next.
static void pad(const float* src, i64 src_pitch, i64 rows, i64 cols, float* dst, i64 dst_pitch, i64 left) {
    constexpr int W = V::W;
    const i64 last = dst_pitch - left;  // floats from the row's first pixel to the next row
    for (i64 c = 0; c < left; c += W) V::store_first(dst + c, V::zero(), left - c < W ? left - c : W);
    for (i64 r = 0; r < rows; ++r, src += src_pitch, dst += dst_pitch) {
        i64 c = 0;
        for (; c + W <= cols; c += W) V::store(dst + left + c, V::load(src + c));
        // What follows the row: the rest of it, its right margin and the next row's left one.
        const i64 end = r + 1 < rows ? last + left : last;
        for (i64 n = cols - c; c < end; c += W, n = 0) {
            const V tail = n > 0 ? V::load_first(src + c, n) : V::zero();
            if (end - c >= W) V::store(dst + left + c, tail);
            else V::store_first(dst + left + c, tail, end - c);
        }
    }
}

// dst[r, c] = src[r, c]
static void crop(const float* src, i64 src_pitch, i64 rows, i64 cols, float* dst, i64 dst_pitch) {
    constexpr int W = V::W;
    for (i64 r = 0; r < rows; ++r, src += src_pitch, dst += dst_pitch) {
        i64 c = 0;
        for (; c + W <= cols; c += W) V::store(dst + c, V::load(src + c));
        if (c < cols) V::store_first(dst + c, V::load_first(src + c, cols - c), cols - c);
    }
}

// dst[r, j] = src[r, first + j*step], zero where that is outside the cols pixels of the row.
static void pad_every(const float* src, i64 src_pitch, i64 rows, i64 cols, i64 first, i64 step, float* dst, i64 dst_pitch) {
    constexpr int W = V::W;
    i64 lo = first < 0 ? (-first + step - 1) / step : 0, hi = first >= cols ? 0 : (cols - first + step - 1) / step;
    if (hi > dst_pitch) hi = dst_pitch;
    if (lo > hi) lo = hi;
    for (i64 r = 0; r < rows; ++r, src += src_pitch, dst += dst_pitch) {
        for (i64 j = 0; j < lo; ++j) dst[j] = 0.f;
        const float* s = src + first + lo * step;
        i64 j = lo;
        if (step == 2)
            for (; j < hi; j += W, s += 2 * W) {
                const i64 n = hi - j, m = 2 * n - 1;  // floats that may be read
                const V a = m >= W ? V::load(s) : V::load_first(s, m);
                const V b = m >= 2 * W ? V::load(s + W) : m > W ? V::load_first(s + W, m - W) : V::zero();
                if (n >= W) V::store(dst + j, V::even(a, b));
                else V::store_first(dst + j, V::even(a, b), n);
            }
        else
            for (; j < hi; ++j, s += step) dst[j] = *s;
        for (j = hi; j < dst_pitch; ++j) dst[j] = 0.f;
    }
}

// The vector from src + at on, zero outside src's n floats.
static inline V window(const float* src, i64 at, i64 n) {
    constexpr i64 W = V::W;
    const i64 from = at < 0 ? (-at < W ? -at : W) : 0, to = n - at < W ? (n > at ? n - at : 0) : W;
    return from || to < W ? V::load_between(src + at, from, to) : V::load(src + at);
}

static void unzip(const float* src, i64 src_pitch, i64 rows, i64 cols, i64 first, float* even, float* odd, i64 dst_pitch) {
    constexpr int W = V::W;
    const auto vector = [&](i64 r, i64 j) {
        const i64 at = first + 2 * j;
        const V a = window(src + r * src_pitch, at, cols), b = window(src + r * src_pitch, at + W, cols);
        V::store(even + r * dst_pitch + j, V::even(a, b));
        V::store(odd + r * dst_pitch + j, V::odd(a, b));
    };
    if (dst_pitch == W)
        for (i64 r = 0; r < rows; ++r) vector(r, 0);
    else
        for (i64 r = 0; r < rows; ++r)
            for (i64 j = 0; j < dst_pitch; j += W) vector(r, j);
}

// dst[j*step] = src[j]
static void spread(const float* src, i64 n, i64 step, float* dst) {
    for (i64 j = 0; j < n; ++j) dst[j * step] = src[j];
}

static void zip(const float* a, const float* b, i64 src_pitch, i64 rows, i64 n, float* dst, i64 dst_pitch) {
    constexpr int W = V::W;
    for (i64 r = 0; r < rows; ++r, a += src_pitch, b += src_pitch, dst += dst_pitch)
        for (i64 j = 0; 2 * j < n; j += W) {
            const V va = V::load(a + j), vb = V::load(b + j);
            const i64 left = n - 2 * j;
            float* d = dst + 2 * j;
            if (left >= W) V::store(d, V::zip_low(va, vb));
            else V::store_first(d, V::zip_low(va, vb), left);
            if (left >= 2 * W) V::store(d + W, V::zip_high(va, vb));
            else if (left > W) V::store_first(d + W, V::zip_high(va, vb), left - W);
        }
}

// A copy that goes past the caches: for results that would only push out what is needed next.
static void stream(const float* src, i64 n, float* dst) {
    constexpr int W = V::W;
    i64 i = 0;
    for (; i < n && (uintptr_t)(dst + i) % (W * sizeof(float)); ++i) dst[i] = src[i];
    for (; i + W <= n; i += W) V::stream(dst + i, V::load(src + i));
    if (i < n) V::store_first(dst + i, V::load_first(src + i, n - i), n - i);
}

static void fence() { V::fence(); }

#ifdef FS_MASKS
// Masked loads are faster than expanding ones, where they will do.
template <bool RUNS> static void expand_planes(const float* const* src, int planes, const i32* at, const uint16_t* keep, i64 n, bool more, float* const* dst) {
    const auto load = [](const float* p, uint16_t lanes) { return RUNS ? V::load_lanes(p, lanes) : V::expand(p, lanes); };
    if (planes == 4 && !more) {
        for (i64 i = 0; i < n; ++i)
#pragma GCC unroll 4
            for (int p = 0; p < 4; ++p) V::store(dst[p] + i * V::W, load(src[p] + at[i], keep[i]));
        return;
    }
    for (int p = 0; p < planes; ++p)
        for (i64 i = 0; i < n; ++i) {
            const V v = load(src[p] + at[i], keep[i]);
            if (more) V::store_lanes(dst[p] + i * V::W, v, keep[i]);
            else V::store(dst[p] + i * V::W, v);
        }
}

static void expand(const float* const* src, int planes, const i32* at, const uint16_t* keep, i64 n, bool runs, bool more, float* const* dst) {
    (runs ? expand_planes<true> : expand_planes<false>)(src, planes, at, keep, n, more, dst);
}

// Every vector of dst lies within two rows of src: lanes past the end of the first come from the second.
static void crop_stream(const float* src, i64 src_pitch, i64 rows, i64 cols, float* dst) {
    constexpr int W = V::W;
    const i64 n = rows * cols, gap = src_pitch - cols;
    i64 i = 0;
    for (i64 c = 0; i + W <= n; i += W, src += W) {
        V v = V::load(src);
        c += W;
        if (c >= cols) {
            c -= cols;
            if (c) v = V::last(v, src + gap, c);
            src += gap;
        }
        V::stream(dst + i, v);
    }
}
#define FS_MASKED &expand, &crop_stream
#define FS_BOTH true
#else
#define FS_MASKED nullptr, nullptr
#define FS_BOTH false
#endif

static void spmv(const float* x, const i32* idx, const float* val, const Seg* segs, i64 nseg, const float* bias, float* y) {
    constexpr int W = V::W;
    alignas(64) float buf[W * W];
    for (i64 s = 0; s < nseg; ++s) {
        const i32* ix = idx + segs[s].start;
        const float* v = val + segs[s].start;
        const i64 n = segs[s].n;
        float sum = 0.f;
        i64 k = 0;
        if (n >= W) {
            V acc = V::zero();
            for (; k + W <= n; k += W) acc = V::fma(V::load(v + k), V::gather(x, ix + k), acc);
            V::store(buf, acc);
            for (int i = 0; i < W; ++i) sum += buf[i];
        }
        for (; k < n; ++k) sum += v[k] * x[ix[k]];
        y[segs[s].row] = sum + (bias ? bias[segs[s].row] : 0.f);
    }
}

static void outer(const float* x, const i32* idx, const Seg* segs, i64 nseg, const float* g, float* dv, bool add) {
    constexpr int W = V::W;
    for (i64 s = 0; s < nseg; ++s) {
        const i32* ix = idx + segs[s].start;
        float* d = dv + segs[s].start;
        const float gs = g[segs[s].row];
        const V gv = V::set1(gs);
        i64 k = 0;
        for (; k + W <= segs[s].n; k += W) {
            const V xs = V::gather(x, ix + k);
            V::store(d + k, add ? V::fma(gv, xs, V::load(d + k)) : V::mul(gv, xs));
        }
        for (; k < segs[s].n; ++k) d[k] = (add ? d[k] : 0.f) + gs * x[ix[k]];
    }
}

static void gather(const float* src, const uint32_t* perm, i64 n, float* dst, bool add) {
    i64 k = 0;
    for (; k + V::W <= n; k += V::W) {
        const V v = V::gather(src, perm + k);
        V::store(dst + k, add ? V::add(V::load(dst + k), v) : v);
    }
    for (; k < n; ++k) dst[k] = add ? dst[k] + src[perm[k]] : src[perm[k]];
}

static void row_sums(const float* src, i64 rows, i64 cols, i64 parts, i64 apart, float* dst, bool add) {
    constexpr int W = V::W;
    alignas(64) float sums[W], buf[Reducer::floats];
    for (i64 r = 0; r < rows; r += W) {
        const i64 n = rows - r < W ? rows - r : W;
        Reducer reducer(buf, sums);
        for (i64 i = 0; i < W; i += 4) {
            V s[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
            for (i64 j = 0; j < 4 && i + j < n; ++j)
                for (i64 p = 0; p < parts; ++p)
                    for (i64 k = 0; k < cols; k += W) s[j] = V::add(s[j], V::load(src + p * apart + (r + i + j) * cols + k));
            reducer.put(s[0], s[1], s[2], s[3]);
        }
        const V s = V::load(sums);
        V::store_first(dst + r, add ? V::add(V::load_first(dst + r, n), s) : s, n);
    }
}

static void accumulate(const float* src, i64 n, float* dst) {
    i64 i = 0;
    for (; i + V::W <= n; i += V::W) V::store(dst + i, V::add(V::load(dst + i), V::load(src + i)));
    for (; i < n; ++i) dst[i] += src[i];
}

// f(position, vector of floats, floats) along n floats.
template <class F> static inline void each_vector(i64 n, F&& f) {
    i64 i = 0;
    for (; i + V::W <= n; i += V::W) f(i, [&](const float* p) { return V::load(p + i); }, [&](float* p, V v) { V::store(p + i, v); });
    const i64 rest = n - i;
    if (rest) f(i, [&](const float* p) { return V::load_first(p + i, rest); }, [&](float* p, V v) { V::store_first(p + i, v, rest); });
}

static void gate(const float* by, i64 n, float* dst) {
    each_vector(n, [&](i64, auto load, auto store) { store(dst, V::gate(load(by), load(dst))); });
}

static void moments(const float* x, i64 n, const float* shift, float* s1, float* s2) {
    each_vector(n, [&](i64, auto load, auto store) {
        const V d = V::add(load(x), load(shift));
        store(s1, V::add(load(s1), d));
        store(s2, V::fma(d, d, load(s2)));
    });
}

static void normalise(const float* x, i64 n, const float* shift, const float* a, const float* b, float* y) {
    each_vector(n, [&](i64, auto load, auto store) { store(y, V::fma(load(a), V::add(load(x), load(shift)), load(b))); });
}

static void grad_moments(const float* x, const float* dy, i64 n, const float* shift, float* s1, float* s2) {
    each_vector(n, [&](i64, auto load, auto store) {
        const V g = load(dy);
        store(s1, V::add(load(s1), g));
        store(s2, V::fma(g, V::add(load(x), load(shift)), load(s2)));
    });
}

static void norm_grad(const float* x, const float* dy, i64 n, const float* shift, const float* a, const float* b, const float* c, float* dx) {
    each_vector(n, [&](i64, auto load, auto store) {
        store(dx, V::fma(load(a), load(dy), V::fma(load(b), V::add(load(x), load(shift)), load(c))));
    });
}

// The last NaN of a window wins, else the first maximum.
static void pool_row(const float* src, const i64* offset, i64 taps, i64 n, float* out, float* tap) {
    for (i64 i = 0; i < n; i += V::W) {
        V best = V::load(src + offset[0] + i), won = V::zero();
        for (i64 t = 1; t < taps; ++t) V::keep_larger(V::load(src + offset[t] + i), V::set1(float(t)), best, won);
        V::store(out + i, best);
        V::store(tap + i, won);
    }
}

// Plain loops over integers, which the compiler turns into vectors: what they cost is memory traffic.
static void widen(const bf16* src, i64 n, float* dst) {
    for (i64 i = 0; i < n; ++i) {
        const uint32_t u = (uint32_t)src[i] << 16;
        __builtin_memcpy(dst + i, &u, 4);
    }
}

// AVX512-BF16 has an instruction for this, but it flushes denormals, and then the result would depend on the machine.
static void narrow(const float* src, i64 n, bf16* dst) {
    for (i64 i = 0; i < n; ++i) {
        uint32_t u;
        __builtin_memcpy(&u, src + i, 4);
        const uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16, quiet = u >> 16 | 0x40;
        dst[i] = (bf16)((u & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
    }
}

static i64 collect(const float* g, const uint8_t* taken, i64 first, i64 last, i32 least, i32* pos, float* val, bool& finite) {
    i64 found = 0;
    const auto hit = [&](i64 i) {
        const float size = __builtin_fabsf(g[i]);
        if (!(size <= 3.4028235e38f)) finite = false;
        if (taken[i]) return;
        pos[found] = (i32)i;
        val[found++] = size;
    };
    i64 i = first;
    for (; i + V::W <= last; i += V::W)
        for (uint32_t lanes = V::reaching(V::load(g + i), least); lanes; lanes &= lanes - 1) hit(i + __builtin_ctz(lanes));
    for (; i < last; ++i) {
        i32 bits;
        __builtin_memcpy(&bits, g + i, sizeof bits);
        if ((bits & 0x7fffffff) >= least) hit(i);
    }
    return found;
}

#ifdef FS_HALVES
static i64 collect_bf16(const bf16* g, const uint8_t* taken, i64 first, i64 last, i32 least, i32* pos, bool& finite) {
    i64 found = 0;
    const auto hit = [&](i64 i) {
        if ((g[i] & 0x7fff) >= 0x7f80) finite = false;
        if (!taken[i]) pos[found++] = (i32)i;
    };
    i64 i = first;
    for (; i + 2 * V::W <= last; i += 2 * V::W)
        for (uint32_t lanes = V::reaching(g + i, least); lanes; lanes &= lanes - 1) hit(i + __builtin_ctz(lanes));
    for (; i < last; ++i)
        if ((g[i] & 0x7fff) >= least) hit(i);
    return found;
}
#define FS_BF16 &collect_bf16
#else
#define FS_BF16 nullptr
#endif

template <int TR, int TC, Lay LAY> struct Make {
#ifdef FS_MASKS
    static constexpr Kernel both(const char* dt) { return {"both", dt, TR, TC, LAY, nullptr, &FS_NS::both<TR, TC, LAY>}; }
#endif
    static constexpr Kernel spmm(const char* dt) { return {"spmm", dt, TR, TC, LAY, &FS_NS::spmm<TR, TC, LAY>, nullptr}; }
    static constexpr Kernel sddmm(const char* dt) { return {"sddmm", dt, TR, TC, LAY, nullptr, &FS_NS::sddmm<TR, TC, LAY>}; }
};

#ifdef FS_MASKS
template <int N> struct Make<1, N, Lay::shifted> {
    static constexpr Kernel spmm(const char* dt) { return {"spmm", dt, 1, N, Lay::shifted, &spmm_shifted<N>, nullptr}; }
    static constexpr Kernel sddmm(const char* dt) { return {"sddmm", dt, 1, N, Lay::shifted, nullptr, &sddmm_shifted<N>}; }
    static constexpr Kernel both(const char* dt) { return {"both", dt, 1, N, Lay::shifted, nullptr, &both_shifted<N>}; }
};
#endif

static constexpr Kernel table[] = {
#define KERNEL(op, dtype, tr, tc, lay) Make<tr, tc, Lay::lay>::op(#dtype),
#include "kernels.inc"
#undef KERNEL
    {"widen", "bf16", 1, 1, Lay::unit, nullptr, nullptr}, {"narrow", "bf16", 1, 1, Lay::unit, nullptr, nullptr},
};

static constexpr Isa isa = {FS_NAME, V::W, V::max_spmm, V::max_sddmm, FS_BOTH, table, sizeof(table) / sizeof(table[0]),
                        &pack, &pack_gated, &unpack, &spmv, &outer, &gather, &row_sums, &accumulate, &gate, &pad, &crop, &pad_every, &unzip, &spread, &zip, &stream, &fence, FS_MASKED,
                        &moments, &normalise, &grad_moments, &norm_grad, &pool_row, &collect, FS_BF16, &widen, &narrow};
#undef FS_MASKED
#undef FS_BOTH
#undef FS_BF16
