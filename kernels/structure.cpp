// Checking and transposing index structures.
#include "plan.h"
#include <algorithm>
#include <limits>

namespace fastsparse {

static constexpr i64 most_positions = std::numeric_limits<uint32_t>::max();

std::vector<Seg> row_segs(const Csr& a) {
    std::vector<Seg> segs(size_t(a.rows));
    for (i64 r = 0; r < a.rows; ++r) segs[r] = {uint32_t(a.indptr[r]), i32(r), i32(a.indptr[r + 1] - a.indptr[r])};
    return segs;
}

// Sorted by length, in linear time; only the first panel needs the empty ones.
void Panels::Part::append(bool keep_empty) {
    i32 most = 0;
    for (const Seg& s : in) most = std::max(most, s.n);
    place.assign(size_t(most) + 2, 0);
    for (const Seg& s : in) ++place[s.n + 1];
    const i32 empty = keep_empty ? 0 : place[1];
    place[0] = -empty;
    for (i32 n = 0; n <= most; ++n) place[n + 1] += place[n];
    Seg* out = segs.data() + at.back();
    for (const Seg& s : in)
        if (s.n || keep_empty) out[place[s.n]++] = s;
    at.push_back(at.back() + i64(in.size()) - empty);
}

// The entries themselves in the order in which they run: read as one stream, and the values' positions close to each other.
static void store_in_order(const Csr& a, Raw<Seg>& segs, Raw<i32>& idx, Raw<uint32_t>& perm) {
    size_t nnz = 0;
    for (const Seg& s : segs) nnz += s.n;
    idx.resize(nnz);
    perm.resize(nnz);
    uint32_t to = 0;
    for (Seg& s : segs) {
        for (i32 i = 0; i < s.n; ++i) {
            idx[to + i] = a.idx[s.start + i];
            perm[to + i] = a.perm.empty() ? s.start + i : a.perm[s.start + i];
        }
        s.start = to;
        to += uint32_t(s.n);
    }
}

Panels::Panels(i64 rows, i64 cols, i64 row0, i64 row1, i64 chunk, i64 width)
    : rows(rows), cols(cols), width(width), row0(row0), chunk(chunk), n_chunks(ceil_div(row1 - row0, chunk)), n_panels(std::max<i64>(1, ceil_div(cols, width))) {}

void Panels::join(const std::vector<Part>& parts, i64 between, i64 within) {
    i64 n = 0, base = 0;
    for (const Part& p : parts) n += p.at.back();
    segs.resize(size_t(n));
    at.resize(size_t(n_chunks * n_panels));
    for (size_t i = 0; i < parts.size(); ++i) {
        const Part& p = parts[i];
        for (size_t j = 0; j + 1 < p.at.size(); ++j) at[i * between + j * within] = {base + p.at[j], base + p.at[j + 1]};
        std::copy_n(p.segs.data(), p.at.back(), segs.data() + base);
        base += p.at.back();
    }
}

// How many of n ascending numbers are below limit. Tested one by one, the last would be a mispredicted branch in each run.
static i64 below(const i32* idx, i64 n, i32 limit) {
    constexpr i64 step = 16;
    i64 k = 0;
    for (; k + step <= n; k += step) {
        i32 count = 0;
        for (i64 i = 0; i < step; ++i) count += idx[k + i] < limit;
        if (count < step) return k + count;
    }
    while (k < n && idx[k] < limit) ++k;
    return k;
}

// Columns of a panel, counted from its first.
static void check_near(i64 width) {
    if (width > i64(std::numeric_limits<uint16_t>::max()) + 1) throw std::logic_error("a panel is too wide for 16 bits");
}

// The columns of a block's segments, counted from the panel's first, one after the other from `to` on. 16 at a time where what is written
// and read over a segment's end is another's; what is written there is written again.
static void store_near(const Csr& a, const Seg* s, const Seg* end, i64 first, i64 to, i64 limit, uint16_t* near) {
    constexpr i64 step = 16;
    for (; s < end; to += s->n, ++s) {
        const i32* idx = a.idx.data() + s->start;
        const i64 over = std::min(a.nnz() - s->start, limit - to), whole = over >= s->n + step ? s->n : s->n - step + 1;
        i64 k = 0;
        for (; k < whole; k += step)
            for (i64 i = 0; i < step; ++i) near[to + k + i] = uint16_t(idx[k + i] - first);
        for (; k < s->n; ++k) near[to + k] = uint16_t(idx[k] - first);
    }
}

Panels::Panels(const Csr& a, i64 row0, i64 row1, i64 chunk, i64 width, Entries entries, int threads)
    : Panels(a.rows, a.cols, row0, row1, chunk, width) {
    std::vector<Part> parts(n_chunks);
    if (entries == nearby) { check_near(width); near.resize(a.idx.size()); starts.resize(size_t(n_chunks * n_panels)); }
    parallel_for(n_chunks, threads, [&](i64 c, int) {
        const i64 r0 = row0 + c * chunk, r1 = std::min(row1, r0 + chunk), rows = r1 - r0;
        std::vector<i32> count(size_t(rows * n_panels));
        for (i64 r = 0; r < rows; ++r)
            for (i64 p = 0, k = a.indptr[r0 + r], end = a.indptr[r0 + r + 1]; p < n_panels; ++p) {
                const i64 n = p == n_panels - 1 ? end - k : below(a.idx.data() + k, end - k, i32((p + 1) * width));
                count[p * rows + r] = i32(n);
                k += n;
            }
        std::vector<i64> next(&a.indptr[r0], &a.indptr[r1]);
        Part& part = parts[c];
        part.in.resize(size_t(rows));
        part.segs.resize(size_t(rows + std::min(rows * (n_panels - 1), a.indptr[r1] - a.indptr[r0])));
        for (i64 p = 0, used = a.indptr[r0]; p < n_panels; ++p) {
            const i64 start = used;
            for (i64 r = 0; r < rows; ++r) {
                const i32 n = count[p * rows + r];
                part.in[r] = {uint32_t(next[r]), i32(r0 + r), n};
                next[r] += n;
                used += n;
            }
            part.append(p == 0);
            if (entries != nearby) continue;
            starts[c * n_panels + p] = start;
            store_near(a, part.segs.data() + part.at[p], part.segs.data() + part.at[p + 1], p * width, start, a.indptr[r1], near.data());
        }
    });
    join(parts, n_panels, 1);
    if (entries == reordered) store_in_order(a, segs, idx, perm);
}

namespace {

// A panel of rows that is to be stored by column.
struct Block {
    const Csr& a;
    const i64 r0, r1;
    std::vector<i64> next;      // of each row, the first entry that is not stored yet
    std::vector<uint32_t> to;   // of each column, the number of its entries, later where its next one goes

    Block(const Csr& a, i64 r0, i64 r1) : a(a), r0(r0), r1(r1), next(&a.indptr[r0], &a.indptr[r1]), to(size_t(a.cols), 0) {
        for (i64 k = a.indptr[r0]; k < a.indptr[r1]; ++k) ++to[a.idx[k]];
    }
    i64 nnz() const { return a.indptr[r1] - a.indptr[r0]; }

    // How many columns to store at a time: all places fit the L1 cache, unless a row would have few entries in them.
    i64 columns(i64 chunk) const {
        constexpr i64 few = 16, fit = 3072;
        const i64 chunks = ceil_div(a.cols, chunk), times = nnz() / std::max(few * (r1 - r0), fit);
        return chunk * ceil_div(chunks, std::max<i64>(1, std::min(times, chunks)));
    }

    // The entries left of column limit.
    void store(i64 limit, uint16_t* near, uint32_t* perm, uint32_t* from) {
        for (i64 r = r0; r < r1; ++r) {
            i64 k = next[r - r0];
            for (const i64 end = a.indptr[r + 1]; k < end && a.idx[k] < limit; ++k) {
                const uint32_t at = to[a.idx[k]]++;
                near[at] = uint16_t(r - r0);
                perm[at] = uint32_t(k);
                if (from) from[k] = at;
            }
            next[r - r0] = k;
        }
    }
};

}  // namespace

// Segments of columns c0 to c1, whose entries are stored from `used` on.
i64 Panels::Part::append_columns(i64 c0, i64 c1, bool keep_empty, i64 used, std::vector<uint32_t>& to) {
    in.resize(size_t(c1 - c0));
    for (i64 c = c0; c < c1; ++c) in[c - c0] = {0, i32(c), i32(to[c])};
    Seg* s = segs.data() + at.back();
    append(keep_empty);
    for (; s < segs.data() + at.back(); ++s) {
        s->start = to[s->row] = uint32_t(used);
        used += round_up(s->n, apart);
    }
    return round_up(used, block_apart);
}

// More than the entries of panel p take with what lies between segments and blocks.
i64 Panels::room(const Csr& a, i64 p) const {
    const i64 nnz = a.indptr[std::min(a.rows, (p + 1) * width)] - a.indptr[std::min(a.rows, p * width)];
    return round_up(nnz + (apart - 1) * std::min(nnz, a.cols), block_apart) + block_apart * n_chunks;
}

// A panel of a's rows at a time, in place of all rows: what is read, and written to column by column, stays in the L2 cache.
void Panels::transpose(const Csr& a, i64 p, Part& part) {
    Block block(a, p * width, p == n_panels - 1 ? a.rows : (p + 1) * width);
    part.segs.resize(size_t(p ? std::min(a.cols, block.nnz()) : a.cols));
    i64 used = starts[p];
    for (i64 c0 = 0, c1, cols = block.columns(chunk); c0 < a.cols; c0 = c1) {
        c1 = std::min(a.cols, c0 + cols);
        const i64 first = used;
        for (i64 c = c0; c < c1; c += chunk) used = part.append_columns(c, std::min(c1, c + chunk), p == 0, used, block.to);
        for (i64 k = first; k < used; k += 16) { __builtin_prefetch(&near[k], 1); __builtin_prefetch(&perm[k], 1); }
        block.store(c1, near.data(), perm.data(), from.empty() ? nullptr : from.data());
    }
}

Panels Panels::transposed(const Csr& a, i64 chunk, i64 width, bool back, int threads) {
    check_near(width);
    Panels t(a.cols, a.rows, 0, a.cols, chunk, width);
    std::vector<Part> parts(t.n_panels);
    t.starts.assign(t.n_panels + 1, 0);
    for (i64 p = 0; p < t.n_panels; ++p) t.starts[p + 1] = t.starts[p] + t.room(a, p);
    if (t.starts.back() > most_positions) throw std::overflow_error("more nonzeros in one layer than positions of 32 bits");
    t.near.resize(t.starts.back());
    t.perm.resize(t.starts.back());
    if (back) t.from.resize(a.idx.size());
    parallel_for(t.n_panels, threads, [&](i64 p, int) { t.transpose(a, p, parts[p]); });
    t.join(parts, 1, t.n_panels);
    return t;
}

static void bad(const std::string& what) { throw std::invalid_argument(what); }

// Whether all indices are columns and ascend within their rows: without branches, as they nearly always do.
static bool in_order(const i64* indptr, const i32* idx, i64 rows, i64 cols) {
    constexpr i64 part = 4096;
    const i64 nnz = indptr[rows];
    i64 falls = 0;
    uint32_t outside = 0;   // its sign
    for (i64 from = 0; from < nnz; from += part) {
        const i64 to = std::min(nnz, from + part);
        i32 n = 0;
        for (i64 k = from; k < to; ++k) outside |= uint32_t(idx[k]) | (uint32_t(cols - 1) - uint32_t(idx[k]));
        for (i64 k = std::max<i64>(from, 1); k < to; ++k) n += idx[k] <= idx[k - 1];
        falls += n;
    }
    for (i64 r = 1; r < rows; ++r) {   // they may fall where a row begins
        const i64 k = indptr[r];
        falls -= k && k < indptr[r + 1] && idx[k] <= idx[k - 1];
    }
    return !falls && !(outside >> 31);
}

// The first index that is not.
static void bad_index(const i64* indptr, const i32* idx, i64 rows, i64 cols) {
    for (i64 r = 0; r < rows; ++r)
        for (i64 k = indptr[r]; k < indptr[r + 1]; ++k) {
            if (idx[k] < 0 || idx[k] >= cols)
                throw std::out_of_range("index " + std::to_string(idx[k]) + " in row " + std::to_string(r) + " is outside 0.." + std::to_string(cols - 1));
            if (k > indptr[r] && idx[k] <= idx[k - 1])
                bad("row " + std::to_string(r) + " has index " + std::to_string(idx[k]) + " after " + std::to_string(idx[k - 1]) +
                    "; indices must ascend within a row, without duplicates");
        }
}

Csr checked_csr(const i64* indptr, i64 n_indptr, const i32* idx, i64 nnz, i64 rows, i64 cols) {
    constexpr i64 most = std::numeric_limits<i32>::max();
    if (rows < 0 || cols < 0 || rows > most || cols > most)
        throw std::overflow_error("a matrix of " + std::to_string(rows) + " x " + std::to_string(cols) + " does not fit 32-bit indices");
    if (nnz > most_positions) throw std::overflow_error("more than 2^32-1 nonzeros in one layer");
    if (n_indptr != rows + 1) bad("indptr has " + std::to_string(n_indptr) + " entries, expected rows+1 = " + std::to_string(rows + 1));
    Csr a;   // copied before it is checked, as other threads may write to what was given
    a.rows = rows; a.cols = cols;
    a.indptr.assign(indptr, indptr + rows + 1);
    a.idx.resize(size_t(nnz));
    std::copy_n(idx, nnz, a.idx.data());
    indptr = a.indptr.data(); idx = a.idx.data();
    if (indptr[0] != 0) bad("indptr[0] is " + std::to_string(indptr[0]) + ", expected 0");
    if (indptr[rows] != nnz) bad("indptr ends at " + std::to_string(indptr[rows]) + ", expected nnz = " + std::to_string(nnz));
    for (i64 r = 0; r < rows; ++r)
        if (indptr[r] > indptr[r + 1]) bad("indptr decreases at row " + std::to_string(r));
    if (!in_order(indptr, idx, rows, cols)) bad_index(indptr, idx, rows, cols);
    return a;
}

Csr transposed(const Csr& a) {
    Csr t;
    t.rows = a.cols; t.cols = a.rows;
    t.indptr.assign(size_t(t.rows) + 1, 0);
    t.idx.resize(a.idx.size());
    t.perm.resize(a.idx.size());
    for (i32 c : a.idx) ++t.indptr[c + 1];
    for (i64 r = 0; r < t.rows; ++r) t.indptr[r + 1] += t.indptr[r];
    std::vector<i64> at(t.indptr.begin(), t.indptr.end() - 1);
    for (i64 r = 0; r < a.rows; ++r)
        for (i64 k = a.indptr[r]; k < a.indptr[r + 1]; ++k) {
            const i64 to = at[a.idx[k]]++;
            t.idx[to] = i32(r);
            t.perm[to] = uint32_t(k);
        }
    return t;
}

}  // namespace fastsparse
