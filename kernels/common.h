// What every source file here shares: argument blocks of the micro-kernels, the table of one ISA, memory, threads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastsparse {

using i32 = int32_t;
using i64 = int64_t;
using bf16 = uint16_t;  // the upper half of a float

// A run of nonzeros that belong to one output row: entries start .. start+n of the values, and of the indices if these aren't in turn.
struct Seg { uint32_t start; i32 row, n; };

// How tiles lie in memory. packed: as Linear packs a batch, tile after tile without a gap, indices having 16 bits; unit: neighbouring tile
// columns are neighbours in input and output; strided: their distances are arguments; shifted: as unit, a segment's nonzeros being sorted
// into classes, after each of which the sums move some lanes down.
enum class Lay { packed, unit, strided, shifted };

// For shifted: how many classes there are, each segment's entries in each of them, and the lanes by which sums move down after it, at most a vector.
struct Classes { i64 n = 0; const i32 *runs = nullptr, *down = nullptr; };

// y[row, tile] (+)= sum_k val[k] * x[idx[k]*scale + tile], a tile being TR x TC vectors kept in registers.
struct SpmmArgs {
    const float* x; i64 scale;        // packed input; one index unit is `scale` floats
    i64 xrow, xcol;                   // distance in floats between tile rows and between tile columns in x
    const void* idx; const float* val; // nonzeros; idx: i32, or uint16_t for packed
    const Seg* segs; i64 nseg;
    float* y; i64 ypitch, yrow, ycol; // output scratch: distance between matrix rows, tile rows, tile columns
    const float* bias;                // one per matrix row, or null
    bool first;                       // y = bias (or 0) + the sum; otherwise y += the sum
    const uint32_t* perm = nullptr;   // where the values are in val, unless at k itself
    bool half = false;                // sum in the order of a tile twice as wide, of which this is one half
    bool stream = false;              // results go past the caches, y being aligned to vectors; a fence is the caller's business
    Classes classes{};
};

// dv[k] (+)= sum over the tile of y[row, tile] * x[idx[k]*scale + tile].
struct SddmmArgs {
    const float* x; i64 scale;
    i64 xrow, xcol;
    const void* idx;
    const Seg* segs; i64 nseg;
    const float* y; i64 ypitch, yrow;  // neighbouring tile columns are neighbours
    float* dv; bool add;
    Classes classes{};                 // y is where the first class reads it, and then moves down
    // For both: out[row, tile] (+)= sum_k val[perm[k]] * x[idx[k]*scale + tile] as well, and dv[0] is the sum for the first segment's
    // first entry; each segment's sums begin at a multiple of four, and dv has room for a whole vector at the end.
    const float* val = nullptr;
    const uint32_t* perm = nullptr;
    float* out = nullptr;
    i64 orow = 0;                      // distance between tile rows in out; shifted: between matrix rows
    bool first = false;
};

using SpmmFn = void (*)(const SpmmArgs&);
using SddmmFn = void (*)(const SddmmArgs&);

enum Op { op_spmm, op_sddmm, op_both };

// One line of kernels.inc, compiled for one ISA.
struct Kernel {
    const char* op; const char* dtype; int rows, cols; Lay lay;
    SpmmFn spmm; SddmmFn sddmm;
};

struct Isa {
    const char* name;
    int width;                 // floats in a vector
    int max_spmm, max_sddmm;   // vectors in the largest tile that stays in registers
    bool both;                 // are there kernels for both gradients at once?
    const Kernel* kernels; int n_kernels;
    // dst[c*dst_pitch + r] = src[r*src_pitch + c], rows padded with zeros up to a whole vector; off, if given, replaces c*dst_pitch
    void (*pack)(const float* src, i64 src_pitch, i64 rows, i64 cols, float* dst, i64 dst_pitch, const i32* off);
    // The same where by[r*src_pitch + c] > 0 or NaN, zero elsewhere
    void (*pack_gated)(const float* src, const float* by, i64 src_pitch, i64 rows, i64 cols, float* dst, i64 dst_pitch);
    // dst[c*dst_pitch + r] = src[r*src_pitch + c], cols read up to a whole vector, nothing written beyond rows and cols; far: past the caches
    // where a vector is a line, as dst and its pitch then are
    void (*unpack)(const float* src, i64 src_pitch, i64 rows, i64 cols, float* dst, i64 dst_pitch, bool far);
    // y[row] = bias[row] + sum_k val[k]*x[idx[k]]: one item, vectorised along the nonzeros
    void (*spmv)(const float* x, const i32* idx, const float* val, const Seg* segs, i64 nseg, const float* bias, float* y);
    // dv[k] (+)= g[row]*x[idx[k]]
    void (*outer)(const float* x, const i32* idx, const Seg* segs, i64 nseg, const float* g, float* dv, bool add);
    // dst[k] (+)= src[perm[k]]
    void (*gather)(const float* src, const uint32_t* perm, i64 n, float* dst, bool add);
    // dst[r] (+)= sum of the cols floats (whole vectors) of row r in each of the parts, which are `apart` floats from each other
    void (*row_sums)(const float* src, i64 rows, i64 cols, i64 parts, i64 apart, float* dst, bool add);
    // dst[i] += src[i]
    void (*accumulate)(const float* src, i64 n, float* dst);
    // dst[i] = 0 unless by[i] > 0 or NaN: a ReLU if the two are the same
    void (*gate)(const float* by, i64 n, float* dst);
    // dst[r, left + c] = src[r, c], zeros around it: rows of dst_pitch floats
    void (*pad)(const float* src, i64 src_pitch, i64 rows, i64 cols, float* dst, i64 dst_pitch, i64 left);
    // dst[r, c] = src[r, c]
    void (*crop)(const float* src, i64 src_pitch, i64 rows, i64 cols, float* dst, i64 dst_pitch);
    // dst[r, j] = src[r, first + j*step], zero outside the row: rows of dst_pitch floats
    void (*pad_every)(const float* src, i64 src_pitch, i64 rows, i64 cols, i64 first, i64 step, float* dst, i64 dst_pitch);
    // The same for first and first+1 with step 2; each row is written up to whole vectors, in order
    void (*unzip)(const float* src, i64 src_pitch, i64 rows, i64 cols, i64 first, float* even, float* odd, i64 dst_pitch);
    void (*spread)(const float* src, i64 n, i64 step, float* dst);             // dst[j*step] = src[j]
    // dst[r, 2j] = a[r, j], dst[r, 2j+1] = b[r, j]: rows of n floats. Sources are readable up to a whole vector
    void (*zip)(const float* a, const float* b, i64 src_pitch, i64 rows, i64 n, float* dst, i64 dst_pitch);
    void (*stream)(const float* src, i64 n, float* dst);                       // a copy past the caches
    void (*fence)();                                                           // after all that went past them
    // For each of the planes dst[i*W + lane] = the next float from src + at[i] for each lane in keep[i]; the others are zero, or stay as they
    // are if `more`. `runs`: keep's lanes are neighbours, and lane 0 would be src[at[i]]. Null where slow
    void (*expand)(const float* const* src, int planes, const i32* at, const uint16_t* keep, i64 n, bool runs, bool more, float* const* dst);
    // crop to rows that follow each other, past the caches, for at least a vector of columns; null where slow
    void (*crop_stream)(const float* src, i64 src_pitch, i64 rows, i64 cols, float* dst);
    // Batch normalisation, float by float; s1 and s2 collect, all others hold a channel's number for each of its floats.
    void (*moments)(const float* x, i64 n, const float* shift, float* s1, float* s2);                       // x + shift and its square
    void (*normalise)(const float* x, i64 n, const float* shift, const float* a, const float* b, float* y);  // y = a*(x + shift) + b
    void (*grad_moments)(const float* x, const float* dy, i64 n, const float* shift, float* s1, float* s2);  // dy and dy*(x + shift)
    void (*norm_grad)(const float* x, const float* dy, i64 n, const float* shift, const float* a, const float* b, const float* c,
                      float* dx);                                              // dx = a*dy + b*(x + shift) + c
    // out[i], tap[i] = the largest src[offset[t] + i] and its t; n is a multiple of 16
    void (*pool_row)(const float* src, const i64* offset, i64 taps, i64 n, float* out, float* tap);
    // Positions i of first..last with |g[i]| >= the float of these bits that are not taken, and their |g[i]|: how many. `finite` becomes
    // false if any g[i] is not.
    i64 (*collect)(const float* g, const uint8_t* taken, i64 first, i64 last, i32 least, i32* pos, float* val, bool& finite);
    // The same positions in bfloat16, `least` being bits of that; null where slow
    i64 (*collect_bf16)(const bf16* g, const uint8_t* taken, i64 first, i64 last, i32 least, i32* pos, bool& finite);
    void (*widen)(const bf16* src, i64 n, float* dst);
    void (*narrow)(const float* src, i64 n, bf16* dst);  // to the nearest, ties to even; a NaN stays one

    const Kernel& find(Op op, int rows, int cols, Lay lay) const;
};

const Isa* isa_scalar();
const Isa* isa_avx2();     // null where the compiler or the machine cannot
const Isa* isa_avx512();
const Isa* isa_neon();
std::vector<const Isa*> available_isas();  // best first
const Isa& current_isa();
void set_isa(const std::string& name);

// Scratch memory: 64-byte aligned, in huge pages where the system grants them, and kept for the next call.
class Scratch {
public:
    explicit Scratch(i64 floats);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    float* data() const { return p_; }
private:
    void take(i64 floats);
    float* p_; size_t bytes_;
};

// Let the process keep what tensors free, or no longer; false where that can't be chosen.
bool keep_freed_memory(bool on);

// Runs body(ctx, task, slot) for every task on the OpenMP threads that the process already has; slot < threads.
using TaskFn = void (*)(void* ctx, i64 task, int slot);
void run_tasks(i64 n, int threads, TaskFn body, void* ctx);
int max_threads();
std::string threading();

template <class F> void parallel_for(i64 n, int threads, F&& f) {
    run_tasks(n, threads, [](void* c, i64 t, int s) { (*static_cast<std::remove_reference_t<F>*>(c))(t, s); }, &f);
}

inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
inline i64 round_up(i64 a, i64 b) { return ceil_div(a, b) * b; }
// Whether results of so many floats, of which `run` are written together, had better go past the caches: they don't fit, and no line is written in parts.
inline bool past_caches(const float* out, i64 floats, i64 run) {
    constexpr i64 large = 2 * 1024 * 1024, line = 16;
    return floats > large && run % line == 0 && reinterpret_cast<uintptr_t>(out) % (line * sizeof(float)) == 0;
}

}  // namespace fastsparse
