// Checking and transposing index structures.
#include "plan.h"
#include <limits>

namespace fastsparse {

void Csr::make_segs() {
    segs.resize(size_t(rows));
    for (i64 r = 0; r < rows; ++r) segs[r] = {indptr[r], i32(r), i32(indptr[r + 1] - indptr[r])};
}

static void bad(const std::string& what) { throw std::invalid_argument(what); }

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
    for (i64 r = 0; r < rows; ++r)
        for (i64 k = indptr[r]; k < indptr[r + 1]; ++k) {
            if (idx[k] < 0 || idx[k] >= cols)
                throw std::out_of_range("index " + std::to_string(idx[k]) + " in row " + std::to_string(r) + " is outside 0.." + std::to_string(cols - 1));
            if (k > indptr[r] && idx[k] <= idx[k - 1])
                bad("row " + std::to_string(r) + " has index " + std::to_string(idx[k]) + " after " + std::to_string(idx[k - 1]) +
                    "; indices must ascend within a row, without duplicates");
        }
    Csr a;
    a.rows = rows; a.cols = cols;
    a.indptr.assign(indptr, indptr + rows + 1);
    a.idx.assign(idx, idx + nnz);
    a.make_segs();
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
    t.make_segs();
    return t;
}

}  // namespace fastsparse
