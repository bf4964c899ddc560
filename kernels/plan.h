// A plan is what one mask costs once: both orientations of its structure, ready for the kernels.
#pragma once
#include "common.h"

namespace fastsparse {

// For vectors that are resized without being cleared, as each element is written before it is read.
template <class T> struct Uncleared : std::allocator<T> {
    Uncleared() = default;
    template <class U> Uncleared(const Uncleared<U>&) {}
    template <class U> struct rebind { using other = Uncleared<U>; };
    template <class U> void construct(U* p) { ::new (static_cast<void*>(p)) U; }
};
template <class T> using Raw = std::vector<T, Uncleared<T>>;

// Compressed rows. Entry k of row r is indptr[r] <= k < indptr[r+1]; columns ascend within a row.
struct Csr {
    i64 rows = 0, cols = 0;
    std::vector<i64> indptr;
    Raw<i32> idx;
    Raw<uint32_t> perm;           // entry -> canonical position; empty means the identity
    i64 nnz() const { return i64(idx.size()); }
};

// The order in which the nonzeros run: rows in chunks, within a chunk the columns in panels that stay in the L1 cache, and
// within a panel the rows by their number of nonzeros there, so that the branch at a row's end is predicted.
struct Panels {
    i64 rows, cols;
    i64 width;                    // columns in a panel
    i64 row0, chunk;              // the first row, rows in a chunk
    i64 n_chunks, n_panels;
    struct Range { i64 from, to; };
    Raw<Seg> segs;
    std::vector<Range> at;        // the segments of (chunk, panel)
    Raw<i32> idx;                 // the entries in this order, if asked for
    Raw<uint32_t> perm;           // and where they are in a; with `near` for a's columns
    Raw<uint16_t> near;           // each entry's column less its panel's first one, in this order, for Linear
    std::vector<i64> starts;      // where in it each (chunk, panel) begins; of a transposed one, where each panel does
    Raw<uint32_t> from;           // of a transposed one: where each entry of a is here. Empty unless both gradients are to come from one sweep, which needs it
    enum Entries { none, reordered, nearby };   // only segs; idx and perm; near and starts
    Panels(const Csr& a, i64 row0, i64 row1, i64 chunk, i64 width, Entries entries, int threads = 1);
    // Of a's columns: near, perm and, if `back`, from, in this order, each segment from a multiple of `apart` on, and each panel's part of a chunk from one of `block_apart`.
    static Panels transposed(const Csr& a, i64 chunk, i64 width, bool back, int threads);
    static constexpr i64 apart = 4, block_apart = 16;
    const Seg* begin(i64 c, i64 p) const { return segs.data() + at[c * n_panels + p].from; }
    const uint16_t* entries(i64 c, i64 p) const { return near.data() + (perm.empty() ? starts[c * n_panels + p] : 0); }
    i64 count(i64 c, i64 p) const { return at[c * n_panels + p].to - at[c * n_panels + p].from; }
private:
    // The segments of a chunk, panel by panel, or of a panel, chunk by chunk: what one task makes.
    struct Part {
        Raw<Seg> segs;
        std::vector<i64> at{0};
        std::vector<Seg> in;
        std::vector<i32> place;
        void append(bool keep_empty);   // in
        i64 append_columns(i64 c0, i64 c1, bool keep_empty, i64 used, std::vector<uint32_t>& to);
    };
    Panels(i64 rows, i64 cols, i64 row0, i64 row1, i64 chunk, i64 width);
    i64 room(const Csr& a, i64 p) const;
    void transpose(const Csr& a, i64 p, Part& part);
    void join(const std::vector<Part>& parts, i64 between, i64 within);
};

Csr checked_csr(const i64* indptr, i64 n_indptr, const i32* idx, i64 nnz, i64 rows, i64 cols);
Csr transposed(const Csr& a);    // perm: where its entries are in a
std::vector<Seg> row_segs(const Csr& a);

// How a layer takes from and hands on to layers beside it. Packed is how the kernels keep a batch of two or more: as the next
// layer reads it, for the same instruction set, number of threads and `LinearPlan::tile_vectors`.
struct Link {
    bool x_packed = false;   // the input and its gradient
    bool y_packed = false;   // the output and its gradient
    bool relu = false;       // of the output. The gradient of a packed one has passed the ReLU when it comes, by `gated` there
    bool gated = false;      // the input is a ReLU's output: its gradient is zero where that is
    bool any() const { return x_packed || y_packed || relu || gated; }
};

class LinearPlan;

// A layer of a row that is computed tile by tile.
struct RowLayer {
    const LinearPlan* plan;
    const float *values, *bias;
    bool relu;                 // of its output
    float* kept = nullptr;     // memory for the packed output, but the last one's, kept from forward to backward; for all layers or none
    float *dvalues = nullptr, *dbias = nullptr;   // wanted gradients
};

class LinearPlan {
public:
    LinearPlan(const i64* indptr, i64 n_indptr, const i32* idx, i64 nnz, i64 rows, i64 cols);
    i64 rows() const { return w_.rows; }
    i64 cols() const { return w_.cols; }
    i64 nnz() const { return w_.nnz(); }
    void forward(const float* x, i64 batch, const float* values, const float* bias, float* out, int threads, Link link = {}) const;
    // Any gradient may be null; computed together they share one packed copy of dy. `out`, for a ReLU whose output is not packed, is that.
    void backward(const float* x, const float* dy, i64 batch, const float* values, float* dx, float* dvalues, float* dbias, int threads,
                  Link link = {}, const float* out = nullptr) const;
    // Do the threads share a batch by whole tiles? Layers of which they do, with the same `tile_vectors`, can be computed in a row:
    // what is between them goes on from a core's cache, and if it isn't kept backward computes it again; `out` is needed after a last ReLU.
    bool whole_tiles(i64 batch, int threads) const;
    static void forward(const std::vector<RowLayer>& row, const float* x, i64 batch, float* out, int threads);
    static void backward(const std::vector<RowLayer>& row, const float* x, const float* dy, const float* out, i64 batch, float* dx, int threads);
    // Between rows of `dim` and the packed form in which this layer would read or write them.
    void pack(const float* rows, i64 batch, i64 dim, float* packed, int threads) const;
    void unpack(const float* packed, i64 batch, i64 dim, float* rows, int threads) const;
    i64 tile_vectors(const Isa& isa) const;
    static i64 packed_lanes(i64 batch) { return round_up(batch, current_isa().width); }  // floats for each feature
private:
    struct Cached { bool transposed; std::shared_ptr<const Panels> panels; };
    std::shared_ptr<const Panels> panels(bool transposed, i64 lanes, int threads) const;
    struct Columns { Csr csr; std::vector<Seg> segs; };
    template <class F> static void with_row(const std::vector<RowLayer>& row, i64 batch, bool backward, int threads, F&& f);
    const Columns& columns() const;   // for a single item, made when it is first needed
    Csr w_;
    std::vector<Seg> rows_;
    mutable std::mutex lock_;
    mutable std::vector<Cached> cache_;
    mutable std::unique_ptr<const Columns> columns_;
};

struct ConvShape {
    i64 oc, icg, kh, kw, sh, sw, pt, pb, pl, pr, dh, dw, groups;
    i64 ic() const { return icg * groups; }
    i64 taps() const { return kh * kw; }
    i64 out_h(i64 h) const { return span(h + pt + pb, (kh - 1) * dh + 1, sh); }
    i64 out_w(i64 w) const { return span(w + pl + pr, (kw - 1) * dw + 1, sw); }
private:
    static i64 span(i64 n, i64 k, i64 s) { return n < k ? 0 : (n - k) / s + 1; }
};

enum class Layout { automatic, planes, batch };

struct Gather;  // one direction of a convolution for one image size

class Conv2dPlan {
public:
    Conv2dPlan(const i64* indptr, i64 n_indptr, const i32* idx, i64 nnz, const ConvShape& s, Layout layout);
    ~Conv2dPlan();
    const ConvShape& shape() const { return s_; }
    i64 nnz() const { return w_.nnz(); }
    bool planes(i64 n, i64 h, i64 w) const;   // the layout taken for such an input
    void forward(const float* x, i64 n, i64 h, i64 w, const float* values, const float* bias, float* out, int threads) const;
    void backward_input(const float* dy, i64 n, i64 h, i64 w, const float* values, float* dx, int threads) const;
    void backward_weight(const float* x, const float* dy, i64 n, i64 h, i64 w, float* dvalues, int threads) const;
    void backward(const float* x, const float* dy, i64 n, i64 h, i64 w, const float* values, float* dx, float* dvalues, int threads) const;
private:
    std::shared_ptr<const Gather> gather(bool backward, i64 n, i64 h, i64 w, int width, bool planes) const;
    ConvShape s_;
    Layout layout_;
    Csr w_, wt_;                      // wt_ rows are (phase, input channel)
    mutable std::mutex lock_;
    mutable std::vector<std::shared_ptr<const Gather>> cache_;
};

// The same products with bfloat16 input and output: see bf16.cpp. Values, bias and their gradient are float32 or bfloat16,
// one of the two pointers being null.
struct Reals { const float* f; const bf16* h; };
struct Sums { float* f; bf16* h; };

void forward_bf16(const LinearPlan& p, const bf16* x, i64 batch, Reals values, Reals bias, bf16* out, int threads);
void forward_bf16(const Conv2dPlan& p, const bf16* x, i64 n, i64 h, i64 w, Reals values, Reals bias, bf16* out, int threads);
// Either gradient may be null.
void backward_bf16(const LinearPlan& p, const bf16* x, const bf16* dy, i64 batch, Reals values, bf16* dx, Sums dvalues, int threads);
void backward_bf16(const Conv2dPlan& p, const bf16* x, const bf16* dy, i64 n, i64 h, i64 w, Reals values, bf16* dx, Sums dvalues, int threads);

}  // namespace fastsparse
