// Checking and transposing index structures.
#include "plan.h"
#include <algorithm>
#include <limits>
#include <utility>

namespace fastsparse {

std::vector<Seg> row_segs(const Csr& a) {
    std::vector<Seg> segs(size_t(a.rows));
    for (i64 r = 0; r < a.rows; ++r) segs[r] = {uint32_t(a.indptr[r]), i32(r), i32(a.indptr[r + 1] - a.indptr[r])};
    return segs;
}

// Segments of one chunk and panel, sorted by length in linear time; only the first panel needs the empty ones.
static void append_sorted(std::vector<Seg>& in, bool keep_empty, std::vector<i32>& count, std::vector<Seg>& out) {
    i32 most = 0;
    for (const Seg& s : in) most = std::max(most, s.n);
    count.assign(size_t(most) + 2, 0);
    for (const Seg& s : in) ++count[s.n + 1];
    const i32 skip = keep_empty ? 0 : count[1];
    for (i32 n = 0; n <= most; ++n) count[n + 1] += count[n];
    const size_t base = out.size();
    out.resize(base + in.size() - skip);
    for (const Seg& s : in)
        if (s.n || keep_empty) out[base + count[s.n]++ - skip] = s;
    in.clear();
}

// The entries themselves in the order in which they run: read as one stream, and the values' positions close to each other.
static void store_in_order(const Csr& a, std::vector<Seg>& segs, std::vector<i32>& idx, std::vector<uint32_t>& perm) {
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

void Panels::join(const std::vector<Chunk>& chunks) {
    size_t n = 0;
    for (const Chunk& c : chunks) n += c.segs.size();
    segs.reserve(n);
    at.reserve(chunks.size() * n_panels + 1);
    for (const Chunk& c : chunks) {
        for (i64 i : c.at) at.push_back(i + i64(segs.size()));
        segs.insert(segs.end(), c.segs.begin(), c.segs.end());
    }
    at.push_back(i64(n));
}

Panels::Panels(const Csr& a, i64 row0, i64 row1, i64 chunk, i64 width, bool reorder, int threads)
    : Panels(a.rows, a.cols, row0, row1, chunk, width) {
    std::vector<Chunk> chunks(n_chunks);
    parallel_for(n_chunks, threads, [&](i64 c, int) {
        std::vector<std::vector<Seg>> panel(n_panels);
        for (i64 r = row0 + c * chunk; r < std::min(row1, row0 + (c + 1) * chunk); ++r) {
            i64 k = a.indptr[r];
            const i64 end = a.indptr[r + 1];
            for (i64 p = 0; p < n_panels; ++p) {
                const i64 start = k, limit = (p + 1) * width;
                if (p == n_panels - 1) k = end;
                else while (k < end && a.idx[k] < limit) ++k;
                panel[p].push_back({uint32_t(start), i32(r), i32(k - start)});
            }
        }
        std::vector<i32> count;
        for (i64 p = 0; p < n_panels; ++p) {
            chunks[c].at.push_back(i64(chunks[c].segs.size()));
            append_sorted(panel[p], p == 0, count, chunks[c].segs);
        }
    });
    join(chunks);
    if (reorder) store_in_order(a, segs, idx, perm);
}

namespace {

// f(row, chunk, first entry, end) for each run of entries of a row within a chunk of columns.
template <class F> void each_run(const Csr& a, i64 row0, i64 row1, i64 chunk, F&& f) {
    for (i64 r = row0; r < row1; ++r)
        for (i64 k = a.indptr[r], end = a.indptr[r + 1]; k < end;) {
            const i64 c = a.idx[k] / chunk, limit = (c + 1) * chunk, first = k;
            while (k < end && a.idx[k] < limit) ++k;
            f(r, c, first, k);
        }
}

// The entries of a, chunk of columns by chunk, those of a chunk in the order of the rows.
struct ByChunk {
    struct Entry { i32 row; uint32_t at; };
    std::vector<i64> start;
    std::unique_ptr<Entry[]> entries;
    std::unique_ptr<uint16_t[]> col;  // within the chunk
    ByChunk(const Csr& a, i64 chunk, int threads) : entries(new Entry[a.idx.size()]), col(new uint16_t[a.idx.size()]) {
        constexpr i64 parts = 8;      // of the rows: a fixed number, as each writes to a place of its own in every chunk
        const i64 n = ceil_div(a.cols, chunk);
        std::vector<i64> to(static_cast<size_t>(parts * n), 0);
        parallel_for(parts, threads, [&](i64 p, int) {
            each_run(a, a.rows * p / parts, a.rows * (p + 1) / parts, chunk, [&](i64, i64 c, i64 first, i64 end) { to[p * n + c] += end - first; });
        });
        i64 used = 0;
        for (i64 c = 0; c < n; ++c) {
            start.push_back(used);
            for (i64 p = 0; p < parts; ++p) used += std::exchange(to[p * n + c], used);
        }
        start.push_back(used);
        parallel_for(parts, threads, [&](i64 p, int) {
            each_run(a, a.rows * p / parts, a.rows * (p + 1) / parts, chunk, [&](i64 r, i64 c, i64 first, i64 end) {
                i64 i = to[p * n + c];
                to[p * n + c] += end - first;
                for (i64 k = first; k < end; ++k, ++i) {
                    entries[i] = {i32(r), uint32_t(k)};
                    col[i] = uint16_t(a.idx[k] - c * chunk);
                }
            });
        });
    }
};

}  // namespace

// Two passes, each of which writes to few places at a time: transposing first would write to all columns at once.
Panels Panels::transposed(const Csr& a, i64 chunk, i64 width, int threads) {
    Panels t(a.cols, a.rows, 0, a.cols, chunk, width);
    const ByChunk by(a, chunk, threads);
    t.idx.resize(a.idx.size());
    t.perm.resize(a.idx.size());
    std::vector<Chunk> chunks(t.n_chunks);
    parallel_for(t.n_chunks, threads, [&](i64 c, int) {
        const i64 c0 = c * chunk, c1 = std::min(a.cols, c0 + chunk);
        std::vector<Seg>& segs = chunks[c].segs;
        std::vector<Seg> panel;
        std::vector<i32> count, n(static_cast<size_t>(chunk));
        std::vector<uint32_t> to(static_cast<size_t>(chunk));
        i64 i = by.start[c];
        uint32_t used = uint32_t(i);
        for (i64 p = 0; p < t.n_panels; ++p) {
            const i64 first = i, limit = p == t.n_panels - 1 ? a.rows : (p + 1) * width, before = i64(segs.size());
            std::fill(n.begin(), n.end(), 0);
            for (; i < by.start[c + 1] && by.entries[i].row < limit; ++i) ++n[by.col[i]];
            for (i64 r = c0; r < c1; ++r) panel.push_back({0, i32(r), n[r - c0]});
            chunks[c].at.push_back(before);
            append_sorted(panel, p == 0, count, segs);
            for (i64 s = before; s < i64(segs.size()); ++s) {
                segs[s].start = to[segs[s].row - c0] = used;
                used += uint32_t(segs[s].n);
            }
            for (i64 k = first; k < i; ++k) {
                const uint32_t at = to[by.col[k]]++;
                t.idx[at] = by.entries[k].row;
                t.perm[at] = by.entries[k].at;
            }
        }
    });
    t.join(chunks);
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
    if (nnz > i64(std::numeric_limits<uint32_t>::max())) throw std::overflow_error("more than 2^32-1 nonzeros in one layer");
    if (n_indptr != rows + 1) bad("indptr has " + std::to_string(n_indptr) + " entries, expected rows+1 = " + std::to_string(rows + 1));
    if (indptr[0] != 0) bad("indptr[0] is " + std::to_string(indptr[0]) + ", expected 0");
    if (indptr[rows] != nnz) bad("indptr ends at " + std::to_string(indptr[rows]) + ", expected nnz = " + std::to_string(nnz));
    for (i64 r = 0; r < rows; ++r)
        if (indptr[r] > indptr[r + 1]) bad("indptr decreases at row " + std::to_string(r));
    if (!in_order(indptr, idx, rows, cols)) bad_index(indptr, idx, rows, cols);
    Csr a;
    a.rows = rows; a.cols = cols;
    a.indptr.assign(indptr, indptr + rows + 1);
    a.idx.assign(idx, idx + nnz);
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
