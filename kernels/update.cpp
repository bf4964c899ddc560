// Connectivity updates.
#include "update.h"
#include <algorithm>
#include <limits>

namespace fastsparse {
namespace {

constexpr i32 magnitude = 0x7fffffff, infinity = 0x7f800000;  // bits of |g| order like the numbers, NaN above all

i32 bits_of(float v) {
    i32 b;
    std::memcpy(&b, &v, sizeof b);
    return b & magnitude;
}

// find(first, last, pos, val, finite) for every part, which writes from its own start on; what was found moves together afterwards.
template <class F> i64 by_parts(i64 n, i32* pos, float* val, bool& finite, int threads, F&& find) {
    constexpr i64 part = 1 << 15;
    const i64 parts = ceil_div(n, part);
    std::vector<i64> found(static_cast<size_t>(parts));
    std::vector<char> fine(static_cast<size_t>(parts), 1);
    parallel_for(parts, threads, [&](i64 p, int) {
        bool ok = true;
        found[p] = find(p * part, std::min(n, (p + 1) * part), pos + p * part, val ? val + p * part : nullptr, ok);
        fine[p] = ok;
    });
    i64 total = 0;
    for (i64 p = 0; p < parts; total += found[p++]) {
        std::memmove(pos + total, pos + p * part, size_t(found[p]) * sizeof(i32));
        if (val) std::memmove(val + total, val + p * part, size_t(found[p]) * sizeof(float));
        finite = finite && fine[p];
    }
    return total;
}

i32 least_of(float floor) { return floor > 0 && bits_of(floor) < infinity ? bits_of(floor) : 0; }

}  // namespace

i64 collect(const float* g, const uint8_t* taken, i64 n, float floor, i32* pos, float* val, bool& finite, int threads) {
    const Isa& isa = current_isa();
    return by_parts(n, pos, val, finite, threads, [&](i64 first, i64 last, i32* p, float* v, bool& ok) {
        return isa.collect(g, taken, first, last, least_of(floor), p, v, ok);
    });
}

i64 collect(const bf16* g, const uint8_t* taken, i64 n, float floor, i32* pos, bool& finite, int threads) {
    const Isa& isa = current_isa();
    if (!isa.collect_bf16) throw std::invalid_argument("this instruction set has no quick way through bfloat16");
    return by_parts(n, pos, nullptr, finite, threads, [&](i64 first, i64 last, i32* p, float*, bool& ok) {
        return isa.collect_bf16(g, taken, first, last, least_of(floor) >> 16, p, ok);
    });
}

void ranks(const i64* sorted, i64 n, const i64* queries, i64 m, i64* out, int threads) {
    constexpr i64 part = 1 << 16;
    parallel_for(ceil_div(m, part), threads, [&](i64 p, int) {
        i64 at = std::upper_bound(sorted, sorted + n, queries[p * part]) - sorted;
        for (i64 i = p * part; i < std::min(m, (p + 1) * part); ++i) {
            while (at < n && sorted[at] <= queries[i]) ++at;
            out[i] = at;
        }
    });
}

void pick(const float* g, const i64* indptr, i64 rows, i64 cols, const i32* indices, float* out) {
    for (i64 r = 0; r < rows; ++r)
        for (i64 k = indptr[r]; k < indptr[r + 1]; ++k) {
            const i32 b = bits_of(g[r * cols + indices[k]]);
            std::memcpy(out + k, &b, sizeof b);
        }
}

Regrown regrow(const i64* indptr, const i32* indices, i64 rows, i64 cols, const uint8_t* kept, const i64* fresh, i64 n_fresh) {
    const i64 nnz = indptr[rows];
    if (nnz >= std::numeric_limits<i32>::max()) throw std::overflow_error("more than 2^31-1 nonzeros in one layer");
    Regrown r;
    const i64 stay = nnz - std::count(kept, kept + nnz, uint8_t(0));
    r.indptr.assign(size_t(rows) + 1, 0);
    r.indices.resize(size_t(stay + n_fresh));
    r.source.resize(size_t(stay + n_fresh));
    r.dropped.reserve(size_t(nnz - stay));
    i64 to = 0, f = 0;
    const auto grow = [&](i64 base, i64 limit) {  // the new ones before flat position `limit`
        for (; f < n_fresh && fresh[f] < limit; ++f, ++to) {
            r.indices[to] = i32(fresh[f] - base);
            r.source[to] = i32(nnz);
        }
    };
    for (i64 row = 0; row < rows; ++row) {
        const i64 base = row * cols;
        for (i64 k = indptr[row]; k < indptr[row + 1]; ++k) {
            if (!kept[k]) { r.dropped.push_back(base + indices[k]); continue; }
            grow(base, base + indices[k]);
            r.indices[to] = indices[k];
            r.source[to++] = i32(k);
        }
        grow(base, base + cols);
        r.indptr[row + 1] = to;
    }
    return r;
}

}  // namespace fastsparse
