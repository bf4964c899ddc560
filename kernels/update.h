// What a connectivity update needs besides products: the best of a gradient that comes block by block, and the new structure.
#pragma once
#include "common.h"

namespace fastsparse {

// Positions i with |g[i]| >= floor that are not taken, ascending, and their |g[i]|; both results have room for n. A floor that is
// no finite number of 0 or more counts as 0. `finite` becomes false if any g[i], taken or not, is infinite or NaN.
i64 collect(const float* g, const uint8_t* taken, i64 n, float floor, i32* pos, float* val, bool& finite, int threads);

// The same positions in bfloat16, in which the floor is rounded down; only where isa.collect_bf16 is.
i64 collect(const bf16* g, const uint8_t* taken, i64 n, float floor, i32* pos, bool& finite, int threads);

// out[k] = |g[row, indices[k]]| for the entries k of some rows; indptr starts at the first of them.
void pick(const float* g, const i64* indptr, i64 rows, i64 cols, const i32* indices, float* out);

// out[i] = how many of `sorted` are at most queries[i]; both ascend.
void ranks(const i64* sorted, i64 n, const i64* queries, i64 m, i64* out, int threads);

// The structure after an update. `kept` says which entries stay; `fresh` are flat positions of new ones, ascending.
struct Regrown {
    std::vector<i64> indptr, dropped;  // dropped: flat positions
    std::vector<i32> indices, source;  // source: where each entry was, nnz for a new one
};
Regrown regrow(const i64* indptr, const i32* indices, i64 rows, i64 cols, const uint8_t* kept, const i64* fresh, i64 n_fresh);

}  // namespace fastsparse
