// Layers that stand between sparse ones, and take longer than those once most weights are gone.
#pragma once
#include "common.h"

namespace fastsparse {

struct Images { i64 n, channels, pixels; };

// mean and (biased) var are written, one for each channel.
void batch_norm_forward(const Images& s, const float* x, const float* weight, const float* bias, double eps, float* mean, float* var,
                        float* out, int threads);
// dx may be null.
void batch_norm_backward(const Images& s, const float* x, const float* dy, const float* mean, const float* var, const float* weight,
                         double eps, float* dx, float* dweight, float* dbias, int threads);

struct Pool {
    i64 kh, kw, sh, sw, ph, pw;
    i64 out_h(i64 h) const { return (h + 2 * ph - kh) / sh + 1; }
    i64 out_w(i64 w) const { return (w + 2 * pw - kw) / sw + 1; }
};

// index: for each output which pixel of its window was the largest, row by row; windows of at most 255 pixels.
void max_pool_forward(const Pool& p, const float* x, i64 planes, i64 h, i64 w, float* out, uint8_t* index, int threads);
void max_pool_backward(const Pool& p, const float* dy, const uint8_t* index, i64 planes, i64 h, i64 w, float* dx, int threads);

}  // namespace fastsparse
