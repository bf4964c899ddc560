// bfloat16 in and out, float32 between: the batch is cut in pieces that stay in the L2 cache, a piece is widened, runs through
// the float32 plan, and what comes out is rounded. How it is cut doesn't depend on the threads, so the results don't either.
#include "plan.h"
#include <algorithm>

namespace fastsparse {
namespace {

constexpr i64 run_floats = 64 * 1024;   // converted by a thread at a time
constexpr i64 l2_floats = 256 * 1024;   // of a piece's input and output together; 64 K to 1 M are within 5 %

template <class F> void each_run(i64 n, int threads, F&& f) {
    parallel_for(ceil_div(n, run_floats), threads, [&](i64 t, int) { f(t * run_floats, std::min(run_floats, n - t * run_floats)); });
}

void widen(const Isa& isa, const bf16* src, i64 n, float* dst, int threads) {
    each_run(n, threads, [&](i64 i, i64 m) { isa.widen(src + i, m, dst + i); });
}

void narrow(const Isa& isa, const float* src, i64 n, bf16* dst, int threads) {
    each_run(n, threads, [&](i64 i, i64 m) { isa.narrow(src + i, m, dst + i); });
}

// Values in float32, wherever they come from.
class Floats {
public:
    Floats(const Isa& isa, Reals v, i64 n, int threads) : own_(v.h ? n : 0), p_(v.h ? own_.data() : v.f) {
        if (v.h) widen(isa, v.h, n, own_.data(), threads);
    }
    const float* data() const { return p_; }
private:
    Scratch own_;
    const float* p_;
};

// Items (rows of the batch, images) of `in` inputs and `out` outputs, in pieces as even as they come. `unit` items share vectors,
// `tile` items fill the kernels' registers.
struct Pieces {
    i64 items, in, out, unit, units, n;
    Pieces(i64 items, i64 in, i64 out, i64 unit, i64 tile) : items(items), in(in), out(out), unit(unit), units(ceil_div(items, unit)) {
        const i64 fit = std::max<i64>(1, l2_floats / std::max<i64>(1, in + out) / tile) * tile;
        n = ceil_div(items, fit);
    }
    i64 start(i64 p) const { return std::min(items, units * p / n * unit); }
    i64 count(i64 p) const { return start(p + 1) - start(p); }
    i64 most() const { return n ? ceil_div(units, n) * unit : 0; }
};

// f(task, slot, threads within): the threads share the tasks if they come out even, and each task otherwise.
template <class F> void share(i64 tasks, int threads, F&& f) {
    if (tasks < 4 * threads && tasks % threads) {
        for (i64 t = 0; t < tasks; ++t) f(t, 0, threads);
        return;
    }
    parallel_for(tasks, threads, [&](i64 t, int slot) { f(t, slot, 1); });
}

// product(x, items, out, threads) for every piece.
template <class F> void forward(const Isa& isa, const Pieces& ps, const bf16* x, bf16* out, int threads, F&& product) {
    const i64 room = round_up(ps.most() * ps.in, 16), scratch = room + round_up(ps.most() * ps.out, 16);
    Scratch space(scratch * threads);
    share(ps.n, threads, [&](i64 p, int slot, int inner) {
        float *xf = space.data() + slot * scratch, *yf = xf + room;
        const i64 i = ps.start(p), n = ps.count(p);
        widen(isa, x + i * ps.in, n * ps.in, xf, inner);
        product(xf, n, yf, inner);
        narrow(isa, yf, n * ps.out, out + i * ps.out, inner);
    });
}

// total += the other parts, in their order; then rounded, if that is wanted.
void finish(const Isa& isa, float* total, const float* others, i64 n, i64 nnz, bf16* rounded, int threads) {
    if (!n && !rounded) return;
    each_run(nnz, threads, [&](i64 i, i64 m) {
        for (i64 p = 0; p < n; ++p) isa.accumulate(others + p * nnz + i, m, total + i);
        if (rounded) isa.narrow(total + i, m, rounded + i);
    });
}

// product(x, dy, items, dx, dvalues, threads) for every piece. Weight gradients are summed over runs of pieces, then over the runs.
template <class F> void backward(const Isa& isa, const Pieces& ps, i64 nnz, const bf16* x, const bf16* dy, bf16* dx, Sums dvalues,
                                 int threads, F&& product) {
    constexpr i64 most_runs = 8, sum_floats = 4 * 1024 * 1024;
    const bool dv = dvalues.f || dvalues.h;
    const i64 runs = dv ? std::clamp<i64>(sum_floats / std::max<i64>(1, nnz), 1, std::max<i64>(1, std::min(most_runs, ps.n))) : ps.n;
    const i64 ins = round_up(ps.most() * ps.in, 16), outs = round_up(ps.most() * ps.out, 16);
    const i64 scratch = outs + ins * (int(dv) + int(dx != nullptr)) + (dv && runs < ps.n ? round_up(nnz, 16) : 0);
    Scratch space(scratch * threads), sums(dv ? nnz * (runs - (dvalues.f != nullptr)) : 0);
    float *total = dvalues.f ? dvalues.f : sums.data(), *others = dvalues.f ? sums.data() : sums.data() + nnz;
    if (dv && !ps.n) std::fill(total, total + nnz, 0.f);
    share(ps.n ? runs : 0, threads, [&](i64 run, int slot, int inner) {
        float *gf = space.data() + slot * scratch, *xf = gf + outs, *dxf = xf + (dv ? ins : 0), *again = dxf + (dx ? ins : 0);
        float* sum = run ? others + (run - 1) * nnz : total;
        const i64 first = ps.n * run / runs, end = ps.n * (run + 1) / runs;
        for (i64 p = first; p < end; ++p) {
            const i64 i = ps.start(p), n = ps.count(p);
            widen(isa, dy + i * ps.out, n * ps.out, gf, inner);
            if (dv) widen(isa, x + i * ps.in, n * ps.in, xf, inner);
            product(dv ? xf : nullptr, gf, n, dx ? dxf : nullptr, dv ? p > first ? again : sum : nullptr, inner);
            if (dv && p > first) isa.accumulate(again, nnz, sum);
            if (dx) narrow(isa, dxf, n * ps.in, dx + i * ps.in, inner);
        }
    });
    if (dv) finish(isa, total, others, runs - 1, nnz, dvalues.h, threads);
}

Pieces pieces(const Isa& isa, const LinearPlan& p, i64 batch) { return {batch, p.cols(), p.rows(), isa.width, 8 * isa.width}; }

Pieces pieces(const Isa& isa, const Conv2dPlan& p, i64 n, i64 h, i64 w) {
    const ConvShape& s = p.shape();
    const i64 unit = p.planes(n, h, w) ? 1 : isa.width;
    return {n, s.ic() * h * w, s.oc * s.out_h(h) * s.out_w(w), unit, unit};
}

}  // namespace

void forward_bf16(const LinearPlan& p, const bf16* x, i64 batch, Reals values, Reals bias, bf16* out, int threads) {
    const Isa& isa = current_isa();
    const Floats v(isa, values, p.nnz(), threads), b(isa, bias, p.rows(), 1);
    forward(isa, pieces(isa, p, batch), x, out, threads,
            [&](const float* xf, i64 n, float* y, int inner) { p.forward(xf, n, v.data(), b.data(), y, inner); });
}

void backward_bf16(const LinearPlan& p, const bf16* x, const bf16* dy, i64 batch, Reals values, bf16* dx, Sums dvalues, int threads) {
    const Isa& isa = current_isa();
    const Floats v(isa, values, p.nnz(), threads);
    backward(isa, pieces(isa, p, batch), p.nnz(), x, dy, dx, dvalues, threads,
             [&](const float* xf, const float* g, i64 n, float* dxf, float* dv, int inner) { p.backward(xf, g, n, v.data(), dxf, dv, nullptr, inner); });
}

void forward_bf16(const Conv2dPlan& p, const bf16* x, i64 n, i64 h, i64 w, Reals values, Reals bias, bf16* out, int threads) {
    const Isa& isa = current_isa();
    const Floats v(isa, values, p.nnz(), threads), b(isa, bias, p.shape().oc, 1);
    forward(isa, pieces(isa, p, n, h, w), x, out, threads,
            [&](const float* xf, i64 m, float* y, int inner) { p.forward(xf, m, h, w, v.data(), b.data(), y, inner); });
}

void backward_bf16(const Conv2dPlan& p, const bf16* x, const bf16* dy, i64 n, i64 h, i64 w, Reals values, bf16* dx, Sums dvalues, int threads) {
    const Isa& isa = current_isa();
    const Floats v(isa, values, p.nnz(), threads);
    backward(isa, pieces(isa, p, n, h, w), p.nnz(), x, dy, dx, dvalues, threads,
             [&](const float* xf, const float* g, i64 m, float* dxf, float* dv, int inner) {
                 if (dxf && dv) p.backward(xf, g, m, h, w, v.data(), dxf, dv, inner);
                 else if (dxf) p.backward_input(g, m, h, w, v.data(), dxf, inner);
                 else if (dv) p.backward_weight(xf, g, m, h, w, dv, inner);
             });
}

}  // namespace fastsparse
