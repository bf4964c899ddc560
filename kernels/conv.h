// What both layouts of a convolution share.
#pragma once
#include "plan.h"

namespace fastsparse {

// The rows of one phase, a chunk of channels and a panel of them at a time.
struct Phase {
    Panels panels;
    std::vector<i32> off;              // per entry, in pixels or floats of the packed block
    // shifted: a segment's nonzeros run class by class of the lane from which they read a row, the last lane first.
    std::vector<i32> runs, down;       // entries of each segment in each class; lanes by which the sums move after it
    i32 lane = 0;                      // of the first class
    std::vector<uint32_t> order;       // where the values are, in the order in which they run
    i64 begin = 0;                     // of this phase among all values in that order
    Classes classes_of(const Seg* s) const { return {i64(down.size()), runs.data() + (s - panels.segs.data()) * i64(down.size()), down.data()}; }
    const uint32_t* perm() const { return panels.perm.empty() ? nullptr : panels.perm.data(); }
};

constexpr i64 most_side = 4;           // images side by side

// One direction for one image size: out[row, p] = sum over nonzeros val * in[channel, p*step + d].
// Output row = ostep*t + phase, input row = istep*t + d(tap); columns alike.
struct Gather {
    bool backward, planes;
    int width;                         // floats in a vector
    i64 h, w;                          // the convolution's input size, the key of the cache
    const Csr* csr;                    // rows: (phase, output channel of this direction)
    i64 rows, channels, taps;
    i64 in_h, in_w, out_h, out_w;
    i64 istep_y, istep_x, ostep_y, ostep_x;
    std::vector<i64> dy, dx;           // per tap
    i64 dy_min, dy_max, dx_min, dx_max;
    i64 t_rows, t_cols, block;         // rows and columns t in all, rows in one block
    i64 ph, pw;                        // rows and columns of the packed block
    i64 plane;                         // from channel to channel: in pixels (batch) or floats (planes)
    i64 step_plane;                    // planes: floats of one phase of a stride
    std::vector<char> used_step;       // planes: the phases of the stride that a tap reads
    std::vector<i32> from;             // planes, shifted or of whole images, without stride: where in its image each vector of a channel starts,
    std::vector<uint16_t> keep;        // and which of its lanes are pixels; one image after the other, if several lie side by side
    bool in_runs = false;              // these lanes are neighbours in every vector, which starts where its lane 0 would be
    bool direct;                       // planes: the image itself serves as the packed block
    bool shifted = false;              // planes: rows are whole vectors, so that all loads are aligned
    i64 images;                        // planes: how many there are, up to most_side
    i64 side = 1, slot = 0;            // planes: so many images lie side by side, each in a slot of a row
    std::vector<Phase> phase;
    bool whole = false;                // batch: blocks are whole images of few enough channels
    std::vector<i32> pixel;            // batch: where a pixel goes, in floats: of one channel, of all channels if whole
    std::vector<char> used;            // channels with a nonzero
    i64 phases() const { return ostep_y * ostep_x; }
    i64 steps() const { return istep_y * istep_x; }
    i64 row_chunk() const { return rows < 1 ? 1 : rows < 64 ? rows : 64; }
    i64 blocks() const { return ceil_div(t_rows, block); }
};

// Rows t0.. of images n0..
struct Task { i64 n0, images, t0, t_rows; };

// n vectors in tiles of at most `most` for which there is a kernel, as few and as even as possible.
std::vector<int> split_tiles(i64 n, int most);

void set_batch_block(Gather& g);
void set_planes_block(Gather& g);
void set_expansion(Gather& g);
i64 batch_panel(const Gather& g);      // channels whose part of a tile fits the L1 cache
i64 planes_panel(const Gather& g);
i64 batch_offset(const Gather& g, i64 dy, i64 dx);
i64 planes_offset(const Gather& g, i64 dy, i64 dx);

void gather_batch(const Isa& isa, const Gather& g, const float* in, i64 n, const float* values, const float* bias, float* out, int threads);
void gather_planes(const Isa& isa, const Gather& g, const float* in, i64 n, const float* values, const float* bias, float* out, int threads);
void sample_batch(const Isa& isa, const Gather& g, const float* x, const float* dy, i64 n, float* dvalues, int threads);
void sample_planes(const Isa& isa, const Gather& g, const float* x, const float* dy, i64 n, float* dvalues, int threads);

bool shares_gradient_batch(const Gather& f, const Gather& b);
void backward_batch(const Isa& isa, const Gather& f, const Gather& b, const float* x, const float* dy, i64 n, const float* values,
                    float* dx, float* dvalues, int threads);
bool shares_gradient(const Gather& f, const Gather& b);
void backward_planes(const Isa& isa, const Gather& f, const Gather& b, const float* x, const float* dy, i64 n, const float* values,
                     float* dx, float* dvalues, int threads);

// Sums over tasks, cut in parts that don't depend on the number of threads: part(first task, end, slot, sums).
template <class F> void sum_in_parts(const Isa& isa, i64 tasks, i64 nnz, float* dvalues, int threads, F&& part) {
    constexpr i64 most = 8;
    const i64 parts = tasks < most ? tasks : most;
    Scratch sums(nnz * (parts - 1));
    parallel_for(parts, threads, [&](i64 p, int slot) {
        part(tasks * p / parts, tasks * (p + 1) / parts, slot, p ? sums.data() + (p - 1) * nnz : dvalues);
    });
    for (i64 p = 1; p < parts; ++p) isa.accumulate(sums.data() + (p - 1) * nnz, nnz, dvalues);
}

}  // namespace fastsparse
