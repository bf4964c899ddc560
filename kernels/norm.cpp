// Batch normalisation of (images, channels, pixels). Neighbouring channels go together, so that memory is read in runs of
// kilobytes however small the planes, and a group stays in the L2 cache from its sums to its results.
#include "neighbours.h"
#include <algorithm>
#include <cmath>

namespace fastsparse {
namespace {

constexpr i64 run_floats = 1024, group_floats = 256 * 1024;

// How one task's channels lie in memory: `n` floats at a time, `runs` of them in an image's part of the group.
struct Group {
    i64 c0, channels, pixels, n, runs;
    Group(const Images& s, i64 per, i64 task) : c0(task * per), channels(std::min(per, s.channels - c0)), pixels(s.pixels) {
        n = channels > 1 ? channels * pixels : std::min(pixels, run_floats);
        runs = channels > 1 ? 1 : ceil_div(pixels, n);
    }
    i64 length(i64 run) const { return channels > 1 ? n : std::min(n, pixels - run * n); }
    // f(offset of a run, its length) over all images
    template <class F> void each(const Images& s, i64 images, F&& f) const {
        for (i64 i = 0; i < images; ++i)
            for (i64 r = 0; r < runs; ++r) f((i * s.channels + c0) * pixels + r * n, length(r));
    }
    // A channel's number, repeated for each of its floats in a run.
    template <class F> void spread(float* dst, F&& f) const {
        if (channels == 1) std::fill(dst, dst + n, f(c0));
        else for (i64 c = 0; c < channels; ++c) std::fill(dst + c * pixels, dst + (c + 1) * pixels, f(c0 + c));
    }
    double sum(const float* run, i64 c) const {
        const float* p = channels > 1 ? run + (c - c0) * pixels : run;
        double s = 0;
        for (i64 i = 0, m = channels > 1 ? pixels : n; i < m; ++i) s += p[i];
        return s;
    }
};

i64 channels_together(const Images& s) {
    const i64 fits = group_floats / std::max<i64>(1, 2 * s.n * s.pixels), wide = run_floats / std::max<i64>(1, s.pixels);
    return std::max<i64>(1, std::min({fits, wide, ceil_div(s.channels, 8)}));
}

// f(group, its rows of scratch) for every group of channels.
template <class F> void each_group(const Images& s, int rows, int threads, F&& f) {
    const i64 per = channels_together(s), pitch = round_up(std::max(run_floats, per * s.pixels), 16);
    Scratch space(pitch * rows * threads);
    parallel_for(ceil_div(s.channels, per), threads, [&](i64 task, int slot) {
        float* row[6];
        for (int i = 0; i < rows; ++i) row[i] = space.data() + (slot * rows + i) * pitch;
        f(Group(s, per, task), row);
    });
}

}  // namespace

void batch_norm_forward(const Images& s, const float* x, const float* weight, const float* bias, double eps, float* mean, float* var,
                        float* out, int threads) {
    const Isa& isa = current_isa();
    const double count = double(s.n) * double(s.pixels);
    each_group(s, 4, threads, [&](const Group& g, float** row) {
        float *shift = row[0], *s1 = row[1], *s2 = row[2], *b = row[3];
        // Sums of differences from the first image's mean: one pass, and nothing cancels.
        std::fill(s1, s1 + g.n, 0.f);
        g.each(s, 1, [&](i64 at, i64 n) { isa.accumulate(x + at, n, s1); });
        g.spread(shift, [&](i64 c) { return float(-g.sum(s1, c) / double(s.pixels)); });
        std::fill(s1, s1 + g.n, 0.f);
        std::fill(s2, s2 + g.n, 0.f);
        g.each(s, s.n, [&](i64 at, i64 n) { isa.moments(x + at, n, shift, s1, s2); });
        for (i64 c = g.c0; c < g.c0 + g.channels; ++c) {
            const double d = g.sum(s1, c) / count, k = shift[g.channels > 1 ? (c - g.c0) * g.pixels : 0];
            mean[c] = float(d - k);
            const double v = g.sum(s2, c) / count - d * d;
            var[c] = float(v < 0 ? 0 : v);   // a NaN stays one
        }
        float *nmean = s1, *a = s2;
        g.spread(nmean, [&](i64 c) { return -mean[c]; });
        g.spread(a, [&](i64 c) { return float((weight ? weight[c] : 1.) / std::sqrt(var[c] + eps)); });
        g.spread(b, [&](i64 c) { return bias ? bias[c] : 0.f; });
        g.each(s, s.n, [&](i64 at, i64 n) { isa.normalise(x + at, n, nmean, a, b, out + at); });
    });
}

void batch_norm_backward(const Images& s, const float* x, const float* dy, const float* mean, const float* var, const float* weight,
                         double eps, float* dx, float* dweight, float* dbias, int threads) {
    const Isa& isa = current_isa();
    const double count = double(s.n) * double(s.pixels);
    each_group(s, 6, threads, [&](const Group& g, float** row) {
        float *nmean = row[0], *s1 = row[1], *s2 = row[2], *a = row[3], *b = row[4], *c0 = row[5];
        g.spread(nmean, [&](i64 c) { return -mean[c]; });
        std::fill(s1, s1 + g.n, 0.f);
        std::fill(s2, s2 + g.n, 0.f);
        g.each(s, s.n, [&](i64 at, i64 n) { isa.grad_moments(x + at, dy + at, n, nmean, s1, s2); });
        for (i64 c = g.c0; c < g.c0 + g.channels; ++c) {
            dbias[c] = float(g.sum(s1, c));
            dweight[c] = float(g.sum(s2, c) / std::sqrt(var[c] + eps));
        }
        if (!dx) return;
        const auto scale = [&](i64 c) { return (weight ? weight[c] : 1.) / std::sqrt(var[c] + eps); };
        g.spread(a, [&](i64 c) { return float(scale(c)); });
        g.spread(b, [&](i64 c) { return float(-scale(c) * dweight[c] / std::sqrt(var[c] + eps) / count); });
        g.spread(c0, [&](i64 c) { return float(-scale(c) * dbias[c] / count); });
        g.each(s, s.n, [&](i64 at, i64 n) { isa.norm_grad(x + at, dy + at, n, nmean, a, b, c0, dx + at); });
    });
}

}  // namespace fastsparse
