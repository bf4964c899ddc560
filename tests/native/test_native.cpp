// The kernels without Python: drawn shapes against a plain double-precision reference, on every ISA of the machine.
// Built with sanitizers, and for ARM under qemu, by the targets of kernels/targets.mk. Arguments: rounds, seed.
#include "../../kernels/plan.h"
#include "../../kernels/update.h"
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

using namespace fastsparse;

namespace {

std::mt19937 rng;
i64 draw(i64 lo, i64 hi) { return std::uniform_int_distribution<i64>(lo, hi)(rng); }
double unit() { return std::uniform_real_distribution<double>()(rng); }

struct Buffer {  // exactly as long as asked for, so that a sanitizer sees every step beyond
    std::unique_ptr<float[]> p; i64 n;
    explicit Buffer(i64 n, bool fill = true) : p(new float[size_t(n)]), n(n) {
        for (i64 i = 0; i < n; ++i) p[i] = fill ? float(unit() * 2 - 1) : std::nanf("");
    }
    float& operator[](i64 i) { return p[size_t(i)]; }
    float* data() { return p.get(); }
};

// The same numbers in bfloat16, of which the float buffer keeps no more than that.
struct Half {
    std::unique_ptr<bf16[]> p; i64 n;
    explicit Half(i64 n) : p(new bf16[size_t(n)]), n(n) { std::fill(p.get(), p.get() + n, bf16(0x7fc0)); }
    explicit Half(Buffer& b) : Half(b.n) {
        current_isa().narrow(b.data(), n, data());
        current_isa().widen(data(), n, b.data());
    }
    bf16* data() { return p.get(); }
    Buffer floats() {
        Buffer b(n, false);
        current_isa().widen(data(), n, b.data());
        return b;
    }
};

struct Mask {
    i64 rows, cols;
    std::vector<i64> indptr{0};
    std::vector<i32> idx;
    Mask(i64 rows, i64 cols, double density) : rows(rows), cols(cols) {
        for (i64 r = 0; r < rows; ++r) {
            for (i64 c = 0; c < cols; ++c)
                if (unit() < density) idx.push_back(i32(c));
            indptr.push_back(i64(idx.size()));
        }
    }
    i64 nnz() const { return i64(idx.size()); }
};

int failures = 0;
constexpr double rounding = 1. / 256;  // of bfloat16

void compare(const char* what, Buffer&& got, const std::vector<double>& want, i64 terms, double rounding = 0) {
    const double eps = 1e-5 + 2e-7 * std::sqrt(double(terms)) * 8 + rounding;
    for (i64 i = 0; i < got.n; ++i)
        if (!(std::fabs(got[i] - want[size_t(i)]) <= eps * (1 + std::fabs(want[size_t(i)])))) {
            std::printf("%s[%lld]: %g, expected %g (%s)\n", what, (long long)i, double(got[i]), want[size_t(i)], current_isa().name);
            ++failures;
            return;
        }
}

double density() { static const double d[] = {0, .02, .1, .3, 1}; return d[draw(0, 4)]; }

using Doubles = std::vector<double>;

// The same layer, with a ReLU, after another one with a ReLU: tile by tile, against one layer after the other.
void in_row(const LinearPlan& plan, i64 b, int threads, Buffer& x, Buffer& v, Buffer& bias, Buffer& dy) {
    const i64 rows = plan.rows(), cols = plan.cols();
    const Mask m(cols, cols, draw(0, 1) ? .01 : .3);
    const LinearPlan before(m.indptr.data(), cols + 1, m.idx.data(), m.nnz(), cols, cols);
    const Isa& isa = current_isa();
    if (!plan.whole_tiles(b, threads) || plan.tile_vectors(isa) != before.tile_vectors(isa)) return;
    Buffer v0(m.nnz()), bias0(cols), h(b * cols, false), y(b * rows, false), g(b * rows, false), dh(b * cols, false), dx(b * cols, false);
    Buffer dv(plan.nnz(), false), db(rows, false), dv0(m.nnz(), false), db0(cols, false);
    before.forward(x.data(), b, v0.data(), bias0.data(), h.data(), threads, {false, false, true});
    plan.forward(h.data(), b, v.data(), bias.data(), y.data(), threads, {false, false, true});
    plan.backward(h.data(), dy.data(), b, v.data(), dh.data(), dv.data(), db.data(), threads, {false, false, true}, y.data());
    before.backward(x.data(), dh.data(), b, v0.data(), dx.data(), dv0.data(), db0.data(), threads, {false, false, true}, h.data());
    const auto same = [](const char* what, Buffer&& got, Buffer& want) { compare(what, std::move(got), {want.data(), want.data() + want.n}, 1); };
    Buffer kept(cols * LinearPlan::packed_lanes(b), false);
    for (float* keep : {static_cast<float*>(nullptr), kept.data()}) {
        Buffer y1(b * rows, false), dx1(b * cols, false), dv1(plan.nnz(), false), db1(rows, false), dv2(m.nnz(), false), db2(cols, false);
        const std::vector<RowLayer> row{{&before, v0.data(), bias0.data(), true, keep, dv2.data(), db2.data()}, {&plan, v.data(), bias.data(), true, nullptr, dv1.data(), db1.data()}};
        LinearPlan::forward(row, x.data(), b, y1.data(), threads);
        LinearPlan::backward(row, x.data(), dy.data(), y1.data(), b, dx1.data(), threads);
        same("row out", std::move(y1), y);
        same("row dx", std::move(dx1), dx);
        same("row dvalues", std::move(dv1), dv);
        same("row dbias", std::move(db1), db);
        same("row first dvalues", std::move(dv2), dv0);
        same("row first dbias", std::move(db2), db0);
    }
}

// The same layer with packed neighbours behind and before it, both with a ReLU between, and with a ReLU after it.
void linked(const LinearPlan& plan, i64 b, int threads, Buffer& x, Buffer& v, Buffer& bias, Buffer& dy, Doubles out, Doubles dx, const Doubles& dv, const Doubles& db) {
    const i64 rows = plan.rows(), cols = plan.cols(), lanes = LinearPlan::packed_lanes(b);
    Buffer xp(cols * lanes, false), yp(rows * lanes, false), gp(rows * lanes, false), dxp(cols * lanes, false);
    Buffer got(b * rows, false), got_dx(b * cols, false), got_dv(plan.nnz(), false), got_db(rows, false);
    plan.pack(x.data(), b, cols, xp.data(), threads);
    plan.pack(dy.data(), b, rows, gp.data(), threads);
    plan.forward(xp.data(), b, v.data(), bias.data(), yp.data(), threads, {true, true, true});
    plan.backward(xp.data(), gp.data(), b, v.data(), dxp.data(), got_dv.data(), got_db.data(), threads, {true, true, true, true});
    plan.unpack(yp.data(), b, rows, got.data(), threads);
    plan.unpack(dxp.data(), b, cols, got_dx.data(), threads);
    for (double& o : out) o = std::max(o, 0.);
    for (i64 i = 0; i < x.n; ++i) if (x[i] <= 0) dx[size_t(i)] = 0;
    compare("linked out", std::move(got), out, cols);
    compare("linked dx", std::move(got_dx), dx, rows);
    compare("linked dvalues", std::move(got_dv), dv, b);
    compare("linked dbias", std::move(got_db), db, b);

    Buffer y(b * rows, false), g(b * rows, false), dv1(plan.nnz(), false), dv2(plan.nnz(), false), dx1(b * cols, false), dx2(b * cols, false);
    plan.forward(x.data(), b, v.data(), bias.data(), y.data(), threads, {false, false, true});
    for (i64 i = 0; i < y.n; ++i) g[i] = y[i] > 0 ? dy[i] : 0;
    plan.backward(x.data(), dy.data(), b, v.data(), dx1.data(), dv1.data(), nullptr, threads, {false, false, true}, y.data());
    plan.backward(x.data(), g.data(), b, v.data(), dx2.data(), dv2.data(), nullptr, threads);
    in_row(plan, b, threads, x, v, bias, dy);
    compare("relu out", std::move(y), out, cols);
    compare("relu dx", std::move(dx1), {dx2.data(), dx2.data() + dx2.n}, rows);
    compare("relu dvalues", std::move(dv1), {dv2.data(), dv2.data() + dv2.n}, b);
}

void linear(int threads) {
    const i64 b = draw(0, 150) * (threads == 2 ? 8 : 1), rows = draw(1, 260), cols = draw(1, 260);
    const Mask m(rows, cols, density());
    const LinearPlan plan(m.indptr.data(), rows + 1, m.idx.data(), m.nnz(), rows, cols);
    Buffer x(b * cols), v(m.nnz()), bias(rows), dy(b * rows), out(b * rows, false), dx(b * cols, false), dv(m.nnz(), false), db(rows, false);
    Half x16(x), v16(v), dy16(dy);
    std::vector<double> ro(size_t(out.n)), rx(size_t(dx.n)), rv(size_t(dv.n)), rb(size_t(db.n));
    for (i64 n = 0; n < b; ++n)
        for (i64 r = 0; r < rows; ++r) {
            ro[size_t(n * rows + r)] = bias[r];
            rb[size_t(r)] += dy[n * rows + r];
            for (i64 k = m.indptr[size_t(r)]; k < m.indptr[size_t(r) + 1]; ++k) {
                const i64 c = m.idx[size_t(k)];
                ro[size_t(n * rows + r)] += double(v[k]) * x[n * cols + c];
                rx[size_t(n * cols + c)] += double(v[k]) * dy[n * rows + r];
                rv[size_t(k)] += double(dy[n * rows + r]) * x[n * cols + c];
            }
        }
    plan.forward(x.data(), b, v.data(), bias.data(), out.data(), threads);
    plan.backward(x.data(), dy.data(), b, v.data(), dx.data(), dv.data(), db.data(), threads);
    compare("linear out", std::move(out), ro, cols);
    compare("linear dx", std::move(dx), rx, rows);
    compare("linear dvalues", std::move(dv), rv, b);
    compare("linear dbias", std::move(db), rb, b);
    if (b > 1) linked(plan, b, threads, x, v, bias, dy, ro, rx, rv, rb);
    Half out16(b * rows), dx16(b * cols), dv16(m.nnz());
    forward_bf16(plan, x16.data(), b, {nullptr, v16.data()}, {bias.data(), nullptr}, out16.data(), threads);
    backward_bf16(plan, x16.data(), dy16.data(), b, {v.data(), nullptr}, dx16.data(), {nullptr, dv16.data()}, threads);
    compare("linear out bf16", out16.floats(), ro, cols, rounding);
    compare("linear dx bf16", dx16.floats(), rx, rows, rounding);
    compare("linear dvalues bf16", dv16.floats(), rv, b, rounding);
}

void conv(int threads) {
    const i64 g = draw(1, 3);
    ConvShape s{g * draw(1, 12), draw(1, 12), draw(1, 4), draw(1, 4), draw(1, 3), draw(1, 3), draw(0, 3), draw(0, 3), draw(0, 3), draw(0, 3), draw(1, 3), draw(1, 3), g};
    const i64 n = draw(0, 36), taps = s.taps(), wide = 16 * draw(0, 2);   // or rows of outputs that nearly are whole vectors
    if (wide) { s.sw = draw(1, 2); s.dw = 1; }
    const i64 h = std::max<i64>(1, s.dh * (s.kh - 1) + 1 - s.pt - s.pb) + draw(0, 9);
    const i64 w = wide ? s.sw * wide - draw(0, 4) : std::max<i64>(1, s.dw * (s.kw - 1) + 1 - s.pl - s.pr) + draw(0, 33);
    const i64 oh = s.out_h(h), ow = s.out_w(w), ocg = s.oc / g;
    const Mask m(s.oc, s.icg * taps, density());
    const Layout layouts[] = {Layout::automatic, Layout::planes, Layout::batch};
    const Conv2dPlan plan(m.indptr.data(), s.oc + 1, m.idx.data(), m.nnz(), s, layouts[draw(0, 2)]);
    Buffer x(n * s.ic() * h * w), v(m.nnz()), bias(s.oc), dy(n * s.oc * oh * ow), out(dy.n, false), dx(x.n, false), dv(m.nnz(), false);
    Half x16(x), v16(v), dy16(dy), bias16(bias);
    std::vector<double> ro(size_t(out.n)), rx(size_t(dx.n)), rv(size_t(dv.n));
    for (i64 i = 0; i < n; ++i)
        for (i64 o = 0; o < s.oc; ++o)
            for (i64 p = 0; p < oh * ow; ++p) {
                const i64 at = (i * s.oc + o) * oh * ow + p, py = p / ow, px = p % ow;
                ro[size_t(at)] = bias[o];
                for (i64 k = m.indptr[size_t(o)]; k < m.indptr[size_t(o) + 1]; ++k) {
                    const i64 col = m.idx[size_t(k)], tap = col % taps;
                    const i64 y = py * s.sh - s.pt + tap / s.kw * s.dh, xx = px * s.sw - s.pl + tap % s.kw * s.dw;
                    if (y < 0 || y >= h || xx < 0 || xx >= w) continue;
                    const i64 from = ((i * s.ic() + o / ocg * s.icg + col / taps) * h + y) * w + xx;
                    ro[size_t(at)] += double(v[k]) * x[from];
                    rx[size_t(from)] += double(v[k]) * dy[at];
                    rv[size_t(k)] += double(dy[at]) * x[from];
                }
            }
    plan.forward(x.data(), n, h, w, v.data(), bias.data(), out.data(), threads);
    const bool both = draw(0, 1);
    if (both) plan.backward(x.data(), dy.data(), n, h, w, v.data(), dx.data(), dv.data(), threads);
    else {
        plan.backward_input(dy.data(), n, h, w, v.data(), dx.data(), threads);
        plan.backward_weight(x.data(), dy.data(), n, h, w, dv.data(), threads);
    }
    compare("conv out", std::move(out), ro, s.icg * taps);
    compare("conv dx", std::move(dx), rx, s.oc * taps);
    compare("conv dvalues", std::move(dv), rv, n * oh * ow);
    Half out16(n * s.oc * oh * ow), dx16(n * s.ic() * h * w);
    Buffer dv32(m.nnz(), false);
    forward_bf16(plan, x16.data(), n, h, w, {v.data(), nullptr}, {nullptr, bias16.data()}, out16.data(), threads);
    backward_bf16(plan, x16.data(), dy16.data(), n, h, w, {nullptr, v16.data()}, dx16.data(), both ? Sums{dv32.data(), nullptr} : Sums{}, threads);
    if (!both) backward_bf16(plan, x16.data(), dy16.data(), n, h, w, {}, nullptr, {dv32.data(), nullptr}, threads);
    compare("conv out bf16", out16.floats(), ro, s.icg * taps, rounding);
    compare("conv dx bf16", dx16.floats(), rx, s.oc * taps, rounding);
    compare("conv dvalues bf16", std::move(dv32), rv, n * oh * ow);
}

// What reaches a floor, in float32 and, where that is quick, in bfloat16.
void collecting(int threads) {
    const i64 n = draw(0, 1) ? draw(0, 70) : draw(30000, 70000), share = draw(1, 4);
    Buffer g(n), val(n, false);
    std::vector<uint8_t> taken(static_cast<size_t>(n));
    std::vector<i32> pos(static_cast<size_t>(n)), want;
    for (uint8_t& t : taken) t = draw(0, 4) == 0;
    const Half h(g);   // both hold the same numbers now
    const float floor = float(draw(0, 5)) / float(4 * share);
    for (i64 i = 0; i < n; ++i) if (std::fabs(g[i]) >= floor && !taken[size_t(i)]) want.push_back(i32(i));
    for (bool bad : {false, true}) {
        if (bad && n) g[n / 2] = draw(0, 1) ? INFINITY : std::nanf("");
        bool finite = true;
        const i64 found = collect(g.data(), taken.data(), n, floor, pos.data(), val.data(), finite, threads);
        bool ok = finite == !(bad && n);
        if (!bad) ok = ok && found == i64(want.size()) && std::equal(want.begin(), want.end(), pos.begin());
        for (i64 i = 0; i < found && !bad; ++i) ok = ok && val[i] == std::fabs(g[want[size_t(i)]]);
        if (!ok) { std::printf("collect (%s)\n", current_isa().name); ++failures; }
    }
    if (!current_isa().collect_bf16) return;
    bool finite = true;
    const i64 found = collect(h.p.get(), taken.data(), n, floor, pos.data(), finite, threads);
    if (!finite || found < i64(want.size()) || !std::includes(pos.begin(), pos.begin() + found, want.begin(), want.end())) { std::printf("collect bf16\n"); ++failures; }
}

template <class E, class F> void must_throw(const char* what, F&& f) {
    try { f(); } catch (const E&) { return; }
    std::printf("%s: no exception\n", what);
    ++failures;
}

void wrong_structures() {
    const i64 p[] = {0, 2, 3}, falling[] = {0, 4, 3};
    const i32 i[] = {0, 2, 1}, outside[] = {0, 3, 1}, twice[] = {2, 2, 1};
    must_throw<std::invalid_argument>("falling indptr", [&] { LinearPlan(falling, 3, i, 3, 2, 3); });
    must_throw<std::out_of_range>("index outside", [&] { LinearPlan(p, 3, outside, 3, 2, 3); });
    must_throw<std::invalid_argument>("duplicate", [&] { LinearPlan(p, 3, twice, 3, 2, 3); });
    must_throw<std::invalid_argument>("short indptr", [&] { LinearPlan(p, 2, i, 3, 2, 3); });
    must_throw<std::overflow_error>("too wide", [&] { LinearPlan(p, 3, i, 3, 2, i64(1) << 40); });
}

void tasks_that_throw() {
    for (int threads : {1, 2, 3})
        must_throw<std::runtime_error>("task", [&] { parallel_for(40, threads, [](i64 t, int) { if (t == 7) throw std::runtime_error("seven"); }); });
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 40, seed = argc > 2 ? std::atoi(argv[2]) : 0;
    wrong_structures();
    tasks_that_throw();
    for (const Isa* isa : available_isas()) {
        set_isa(isa->name);
        rng.seed(unsigned(seed));
        for (int r = 0; r < rounds && !failures; ++r) { linear(1 + r % 3); conv(1 + r % 3); collecting(1 + r % 3); }
        std::printf("%s: %d rounds, %s\n", isa->name, rounds, failures ? "FAILED" : "ok");
    }
    return failures != 0;
}
