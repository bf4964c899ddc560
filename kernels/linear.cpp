// Linear: the batch is cut in tiles of a few vectors, the input of a tile is transposed once to (column, item),
// and every row of the weight then runs through its nonzeros with the tile of outputs in registers.
#include "plan.h"
#include <algorithm>

namespace fastsparse {
namespace {

constexpr i64 row_chunk = 64, max_vectors = 8;

// The batch in tiles of at most max_vectors vectors, as even as they come.
struct Batch {
    i64 items, width, vectors, tiles;
    Batch(i64 b, int w) : items(b), width(w), vectors(ceil_div(b, w)), tiles(ceil_div(vectors, max_vectors)) {}
    i64 start(i64 t) const { return vectors * t / tiles * width; }
    i64 lanes(i64 t) const { return start(t + 1) - start(t); }
    i64 used(i64 t) const { return std::min(items, start(t + 1)) - start(t); }
    i64 floats(i64 dim) const { return vectors * width * dim; }
};

// src[item, dim] -> per tile dst[dim, lane]
void pack_batch(const Isa& isa, const Batch& b, const float* src, i64 dim, float* dst, int threads) {
    constexpr i64 cols = 256;
    const i64 parts = ceil_div(dim, cols);
    parallel_for(b.tiles * parts, threads, [&](i64 task, int) {
        const i64 t = task / parts, c0 = task % parts * cols, lanes = b.lanes(t);
        isa.pack(src + b.start(t) * dim + c0, dim, b.used(t), std::min(cols, dim - c0),
                 dst + b.start(t) * dim + c0 * lanes, lanes, nullptr);
    });
}

void multiply(const Isa& isa, const Csr& a, const float* values, const float* bias, const Batch& b, const float* packed,
              float* out, int threads) {
    const i64 chunks = ceil_div(a.rows, row_chunk), scratch = row_chunk * max_vectors * b.width;
    Scratch space(scratch * threads);
    parallel_for(b.tiles * chunks, threads, [&](i64 task, int slot) {
        const i64 t = task / chunks, r0 = task % chunks * row_chunk, r1 = std::min(a.rows, r0 + row_chunk), lanes = b.lanes(t);
        float* y = space.data() + slot * scratch;
        SpmmArgs s{packed + b.start(t) * a.cols, lanes, 0, b.width, a.idx.data(), values, a.segs.data() + r0, r1 - r0,
                   y - r0 * lanes, lanes, 0, b.width, bias, true};
        isa.find(op_spmm, 1, int(lanes / b.width), true).spmm(s);
        isa.unpack(y, lanes, r1 - r0, b.used(t), out + b.start(t) * a.rows + r0, a.rows);
    });
}

void sample(const Isa& isa, const Csr& a, const Batch& b, const float* x, const float* dy, float* dvalues, int threads) {
    const i64 chunks = ceil_div(a.rows, row_chunk);
    parallel_for(chunks, threads, [&](i64 task, int) {
        const i64 r0 = task * row_chunk, r1 = std::min(a.rows, r0 + row_chunk);
        for (i64 t = 0; t < b.tiles; ++t) {
            const i64 lanes = b.lanes(t);
            SddmmArgs s{x + b.start(t) * a.cols, lanes, 0, b.width, a.idx.data(), a.segs.data() + r0, r1 - r0,
                        dy + b.start(t) * a.rows, lanes, 0, b.width, dvalues, t > 0};
            isa.find(op_sddmm, 1, int(lanes / b.width), true).sddmm(s);
        }
    });
}

void permute(const Isa& isa, const Csr& a, const float* values, float* dst, int threads) {
    constexpr i64 part = 1 << 16;
    parallel_for(ceil_div(a.nnz(), part), threads, [&](i64 t, int) {
        isa.gather(values, a.perm.data() + t * part, std::min(part, a.nnz() - t * part), dst + t * part);
    });
}

void multiply_one(const Isa& isa, const Csr& a, const float* x, const float* values, const float* bias, float* y, int threads) {
    constexpr i64 rows = 256;
    parallel_for(ceil_div(a.rows, rows), threads, [&](i64 t, int) {
        isa.spmv(x, a.idx.data(), values, a.segs.data() + t * rows, std::min(rows, a.rows - t * rows), bias, y);
    });
}

}  // namespace

LinearPlan::LinearPlan(const i64* indptr, i64 n_indptr, const i32* idx, i64 nnz, i64 rows, i64 cols)
    : w_(checked_csr(indptr, n_indptr, idx, nnz, rows, cols)), wt_(transposed(w_)) {}

void LinearPlan::forward(const float* x, i64 batch, const float* values, const float* bias, float* out, int threads) const {
    const Isa& isa = current_isa();
    if (!batch || !rows()) return;
    if (batch == 1) { multiply_one(isa, w_, x, values, bias, out, threads); return; }
    const Batch b(batch, isa.width);
    Scratch xp(b.floats(cols()));
    pack_batch(isa, b, x, cols(), xp.data(), threads);
    multiply(isa, w_, values, bias, b, xp.data(), out, threads);
}

void LinearPlan::backward(const float* x, const float* dy, i64 batch, const float* values, float* dx, float* dvalues, int threads) const {
    const Isa& isa = current_isa();
    if (!batch) { if (dvalues) std::fill(dvalues, dvalues + nnz(), 0.f); return; }
    Scratch vt(dx ? nnz() : 0);
    if (dx) permute(isa, wt_, values, vt.data(), threads);
    if (batch == 1) {
        if (dx) multiply_one(isa, wt_, dy, vt.data(), nullptr, dx, threads);
        if (dvalues) isa.outer(x, w_.idx.data(), w_.segs.data(), rows(), dy, dvalues, false);
        return;
    }
    const Batch b(batch, isa.width);
    Scratch dyp(b.floats(rows()));
    pack_batch(isa, b, dy, rows(), dyp.data(), threads);
    if (dx) multiply(isa, wt_, vt.data(), nullptr, b, dyp.data(), dx, threads);
    if (!dvalues) return;
    Scratch xp(b.floats(cols()));
    pack_batch(isa, b, x, cols(), xp.data(), threads);
    sample(isa, w_, b, xp.data(), dyp.data(), dvalues, threads);
}

}  // namespace fastsparse
