// Max pooling, plane by plane, and for each output which pixel of its window won.
#include "neighbours.h"
#include <algorithm>
#include <limits>

namespace fastsparse {

namespace {

constexpr float lowest = -std::numeric_limits<float>::infinity();

// A padded plane with its columns split by their place within a step, so that neighbouring outputs read neighbouring floats.
struct Block {
    const Pool& p; i64 h, w, wide, pitch, rows, lanes;
    std::vector<i64> tap;              // from an output's first pixel to each of its window
    Block(const Pool& p, i64 h, i64 w)
        : p(p), h(h), w(w), wide(round_up(p.out_w(w), 16)), pitch(wide + (p.kw - 1) / p.sw), rows(h + 2 * p.ph), lanes(std::min(p.kw, p.sw)) {
        for (i64 t = 0; t < p.kh * p.kw; ++t) tap.push_back((t / p.kw * lanes + t % p.kw % p.sw) * pitch + t % p.kw / p.sw);
    }
    i64 floats() const { return round_up(rows * lanes * pitch, 16); }

    void fill(const Isa& isa, const float* x, float* block) const {
        std::fill(block, block + floats(), lowest);
        for (i64 l = 0; l < lanes; ++l) {
            const i64 skip = l < p.pw ? ceil_div(p.pw - l, p.sw) : 0, first = skip * p.sw + l - p.pw;  // of the row's pixels
            const i64 n = first < w ? std::min(ceil_div(w - first, p.sw), pitch - skip) : 0;
            for (i64 y = 0; y < h && n > 0; ++y)
                isa.pad_every(x + y * w + first, 0, 1, w - first, 0, p.sw, block + ((y + p.ph) * lanes + l) * pitch + skip, n);
        }
    }
};

}  // namespace

void max_pool_forward(const Pool& p, const float* x, i64 planes, i64 h, i64 w, float* out, uint8_t* index, int threads) {
    const Isa& isa = current_isa();
    const Block b(p, h, w);
    const i64 oh = p.out_h(h), ow = p.out_w(w), scratch = b.floats() + 2 * b.wide;
    Scratch space(scratch * threads);
    parallel_for(planes, threads, [&](i64 plane, int slot) {
        float *block = space.data() + slot * scratch, *best = block + b.floats(), *tap = best + b.wide;
        b.fill(isa, x + plane * h * w, block);
        for (i64 y = 0; y < oh; ++y) {
            isa.pool_row(block + y * p.sh * b.lanes * b.pitch, b.tap.data(), i64(b.tap.size()), b.wide, best, tap);
            const i64 at = (plane * oh + y) * ow;
            std::copy_n(best, ow, out + at);
            for (i64 i = 0; i < ow; ++i) index[at + i] = uint8_t(tap[i]);
            // Nothing but minus infinity: the first pixel within the image, not one of the padding.
            for (i64 i = 0; i < ow; ++i)
                if (best[i] == lowest) index[at + i] = uint8_t(std::max<i64>(0, p.ph - y * p.sh) * p.kw + std::max<i64>(0, p.pw - i * p.sw));
        }
    });
}

void max_pool_backward(const Pool& p, const float* dy, const uint8_t* index, i64 planes, i64 h, i64 w, float* dx, int threads) {
    const i64 oh = p.out_h(h), ow = p.out_w(w);
    i64 down[256], right[256];
    for (i64 t = 0; t < p.kh * p.kw; ++t) { down[t] = t / p.kw - p.ph; right[t] = t % p.kw - p.pw; }
    parallel_for(planes, threads, [&](i64 plane, int) {
        float* d = dx + plane * h * w;
        std::fill(d, d + h * w, 0.f);
        for (i64 y = 0; y < oh; ++y) {
            const i64 at = (plane * oh + y) * ow;
            for (i64 i = 0; i < ow; ++i) {
                const i64 row = y * p.sh + down[index[at + i]], col = i * p.sw + right[index[at + i]];
                if (row >= 0 && row < h && col >= 0 && col < w) d[row * w + col] += dy[at + i];
            }
        }
    });
}

}  // namespace fastsparse
