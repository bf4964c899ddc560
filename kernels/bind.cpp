// Python's side: every array is checked here, so that nothing below can be reached with a wrong one.
#include "array.h"
#include "neighbours.h"
#include "plan.h"
#include "update.h"
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <algorithm>
#include <initializer_list>
#include <limits>

using namespace fastsparse;

namespace {

template <class S> std::string text(const S& s) {
    std::string t = "(";
    for (i64 n : s) t += (t.size() > 1 ? ", " : "") + std::to_string(n);
    return t + (s.size() == 1 ? ",)" : ")");
}

struct Dtype { Type type; const char* name; size_t bytes; };
constexpr Dtype boolean{Type::boolean, "bool", 1}, u8{Type::u8, "uint8", 1}, i32s{Type::i32, "int32", 4}, i64s{Type::i64, "int64", 8}, f32{Type::f32, "float32", 4};

void wrong_type(const Array& a, const char* name, const char* expected) {
    throw py::type_error(std::string(name) + " is " + a.dtype() + ", expected " + expected);
}

void check_memory(const Array& a, const char* name, size_t bytes) {
    if (!a.contiguous) throw py::value_error(std::string(name) + " must be C-contiguous");
    if (a.size() && reinterpret_cast<uintptr_t>(a.data) % bytes) throw py::value_error(std::string(name) + " must be aligned");
}

void check(const Array& a, const char* name, Dtype d) {
    if (a.type != d.type) wrong_type(a, name, d.name);
    check_memory(a, name, d.bytes);
}

using Want = std::initializer_list<i64>;

void check_shape(const Array& a, const char* name, Want want) {
    if (!std::equal(want.begin(), want.end(), a.shape.begin(), a.shape.end()))
        throw py::value_error(std::string(name) + " has shape " + text(a.shape) + ", expected " + text(want));
}

template <class T> T* writeable(const Array& a, const char* name, const T* data) {
    if (!a.writeable) throw py::value_error(std::string(name) + " is read-only");
    return const_cast<T*>(data);
}

const float* input(const Array& a, const char* name, Want want) {
    check(a, name, f32);
    check_shape(a, name, want);
    return static_cast<const float*>(a.data);
}

float* output(const Array& a, const char* name, Want want) { return writeable(a, name, input(a, name, want)); }

const float* input(const py::object& o, const char* name, Want want) { return input(array_of(o, name), name, want); }
float* output(const py::object& o, const char* name, Want want) { return output(array_of(o, name), name, want); }
const float* optional_input(const py::object& o, const char* name, Want want) { return o.is_none() ? nullptr : input(o, name, want); }
float* optional_output(const py::object& o, const char* name, Want want) { return o.is_none() ? nullptr : output(o, name, want); }

// numpy has no bfloat16: its bits come as 16-bit integers, and only to functions that are named for it.
bool is_bits(const Array& a) { return a.type == Type::bf16 || a.type == Type::u16 || a.type == Type::i16; }

const bf16* bits_input(const Array& a, const char* name, Want want) {
    if (!is_bits(a)) wrong_type(a, name, "bfloat16 as uint16 or int16");
    check_memory(a, name, sizeof(bf16));
    check_shape(a, name, want);
    return static_cast<const bf16*>(a.data);
}

bf16* bits_output(const Array& a, const char* name, Want want) { return writeable(a, name, bits_input(a, name, want)); }

bf16* optional_bits(const py::object& o, const char* name, Want want) { return o.is_none() ? nullptr : bits_output(array_of(o, name), name, want); }

// float32 or bfloat16.
Reals reals(const Array& a, const char* name, Want want) {
    if (is_bits(a)) return {nullptr, bits_input(a, name, want)};
    return {input(a, name, want), nullptr};
}

Reals optional_reals(const py::object& o, const char* name, Want want) { return o.is_none() ? Reals{} : reals(array_of(o, name), name, want); }

Sums optional_sums(const py::object& o, const char* name, Want want) {
    if (o.is_none()) return {};
    const Array a = array_of(o, name);
    if (is_bits(a)) return {nullptr, bits_output(a, name, want)};
    return {output(a, name, want), nullptr};
}

// PyTorch tells OpenMP its number of threads in each thread of Python's, but only once something there asks for it.
int torch_threads() {
    thread_local bool told = false;
    if (!told && tensor_type()) {
        py::module_::import("torch").attr("get_num_threads")();
        told = true;
    }
    return max_threads();
}

int threads_of(const py::object& t) {
    if (t.is_none()) return torch_threads();
    const i64 n = t.cast<i64>();
    if (n < 1 || n > 4096) throw py::value_error("threads is " + std::to_string(n) + ", expected 1 or more");
    return int(n);
}

template <class T> const T* vector_of(const Array& a, const char* name, Dtype dtype) {
    check(a, name, dtype);
    if (a.ndim() != 1) throw py::value_error(std::string(name) + " has " + std::to_string(a.ndim()) + " dimensions, expected 1");
    return static_cast<const T*>(a.data);
}

i64 batch_of(const Array& a, const char* name, i64 ndim) {
    if (a.ndim() != ndim) throw py::value_error(std::string(name) + " has " + std::to_string(a.ndim()) + " dimensions, expected " + std::to_string(ndim));
    return a.shape[0];
}

std::unique_ptr<LinearPlan> make_linear(const Array& indptr, const Array& indices, i64 rows, i64 cols) {
    const i64* p = vector_of<i64>(indptr, "indptr", i64s);
    const i32* i = vector_of<i32>(indices, "indices", i32s);
    py::gil_scoped_release nogil;
    return std::make_unique<LinearPlan>(p, indptr.size(), i, indices.size(), rows, cols);
}

void linear_forward(const LinearPlan& p, const Array& x, const Array& values, const py::object& bias, const Array& out, const py::object& threads) {
    const i64 b = batch_of(x, "x", 2);
    const float* xp = input(x, "x", {b, p.cols()});
    const float* vp = input(values, "values", {p.nnz()});
    const float* bp = optional_input(bias, "bias", {p.rows()});
    float* op = output(out, "out", {b, p.rows()});
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    p.forward(xp, b, vp, bp, op, t);
}

void linear_backward(const LinearPlan& p, const py::object& x, const Array& dy, const py::object& values, const py::object& dx,
                     const py::object& dvalues, const py::object& threads, const py::object& dbias) {
    const i64 b = batch_of(dy, "dy", 2);
    const float* gp = input(dy, "dy", {b, p.rows()});
    float* dxp = optional_output(dx, "dx", {b, p.cols()});
    float* dvp = optional_output(dvalues, "dvalues", {p.nnz()});
    float* dbp = optional_output(dbias, "dbias", {p.rows()});
    const float* vp = dxp ? input(values, "values", {p.nnz()}) : nullptr;
    const float* xp = dvp ? input(x, "x", {b, p.cols()}) : nullptr;
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    p.backward(xp, gp, b, vp, dxp, dvp, dbp, t);
}

// The shape of a batch that may be packed.
struct Batched {
    i64 batch, lanes;
    explicit Batched(i64 batch) : batch(batch), lanes(LinearPlan::packed_lanes(batch)) {
        if (batch < 0 || batch > std::numeric_limits<i32>::max()) throw py::value_error("batch is " + std::to_string(batch) + ", expected 0 to 2^31-1");
    }
    const float* in(const py::object& o, const char* name, bool packed, i64 dim) const {
        return packed ? input(o, name, {dim * lanes}) : input(o, name, {batch, dim});
    }
    float* out(const py::object& o, const char* name, bool packed, i64 dim) const {
        return o.is_none() ? nullptr : packed ? output(o, name, {dim * lanes}) : output(o, name, {batch, dim});
    }
};

void linear_pack(const LinearPlan& p, const Array& rows, const Array& packed, const py::object& threads) {
    const i64 b = batch_of(rows, "rows", 2), dim = rows.shape[1];
    const float* from = input(rows, "rows", {b, dim});
    float* to = output(packed, "packed", {dim * LinearPlan::packed_lanes(b)});
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    p.pack(from, b, dim, to, t);
}

void linear_unpack(const LinearPlan& p, const Array& packed, const Array& rows, const py::object& threads) {
    const i64 b = batch_of(rows, "rows", 2), dim = rows.shape[1];
    const float* from = input(packed, "packed", {dim * LinearPlan::packed_lanes(b)});
    float* to = output(rows, "rows", {b, dim});
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    p.unpack(from, b, dim, to, t);
}

void linear_forward_linked(const LinearPlan& p, const py::object& x, const Array& values, const py::object& bias, const py::object& out, i64 batch,
                           bool x_packed, bool y_packed, bool relu, const py::object& threads) {
    const Batched b(batch);
    const float* xp = b.in(x, "x", x_packed, p.cols());
    const float* vp = input(values, "values", {p.nnz()});
    const float* bp = optional_input(bias, "bias", {p.rows()});
    float* op = b.out(out, "out", y_packed, p.rows());
    if (!op) throw py::type_error("out is None, expected an array or a tensor");
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    p.forward(xp, batch, vp, bp, op, t, {x_packed, y_packed, relu});
}

void linear_backward_linked(const LinearPlan& p, const py::object& x, const py::object& dy, const py::object& values, const py::object& dx,
                            const py::object& dvalues, const py::object& dbias, const py::object& out, i64 batch, bool x_packed, bool y_packed,
                            bool relu, bool gated, const py::object& threads) {
    const Batched b(batch);
    const float* gp = b.in(dy, "dy", y_packed, p.rows());
    float* dxp = b.out(dx, "dx", x_packed, p.cols());
    float* dvp = optional_output(dvalues, "dvalues", {p.nnz()});
    float* dbp = optional_output(dbias, "dbias", {p.rows()});
    const float* vp = dxp ? input(values, "values", {p.nnz()}) : nullptr;
    const float* xp = dvp || (dxp && gated) ? b.in(x, "x", x_packed, p.cols()) : nullptr;
    const float* op = relu && !y_packed ? b.in(out, "out", false, p.rows()) : nullptr;
    if (gated && !x_packed) throw py::value_error("only a packed input is gated");
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    p.backward(xp, gp, batch, vp, dxp, dvp, dbp, t, {x_packed, y_packed, relu, gated}, op);
}

// The layers of a row: plans, values, biases, ReLUs of each, and what is kept between them. `idle`: nobody reads the first values.
std::vector<RowLayer> row_of(const py::sequence& plans, const py::sequence& values, const py::sequence& biases, const py::sequence& relus, const py::sequence& kept, i64 batch,
                             bool idle = false) {
    const size_t n = plans.size();
    if (!n || values.size() != n || biases.size() != n || relus.size() != n) throw py::value_error("a row needs plan, values, bias and ReLU of each layer");
    if (kept.size() && kept.size() != n - 1) throw py::value_error("a row keeps what is between its layers, or nothing");
    std::vector<RowLayer> row;
    for (size_t i = 0; i < n; ++i) {
        const LinearPlan& p = plans[i].cast<const LinearPlan&>();
        const bool unread = idle && !i && py::object(values[i]).is_none();
        row.push_back({&p, unread ? nullptr : input(values[i], "values", {p.nnz()}), optional_input(biases[i], "bias", {p.rows()}), relus[i].cast<bool>()});
        if (i < kept.size()) row.back().kept = output(kept[i], "kept", {p.rows() * LinearPlan::packed_lanes(batch)});
    }
    return row;
}

void row_forward(const py::sequence& plans, const Array& x, const py::sequence& values, const py::sequence& biases, const py::sequence& relus,
                 const py::sequence& kept, const py::object& out, const py::object& threads) {
    const i64 b = batch_of(x, "x", 2);
    const auto row = row_of(plans, values, biases, relus, kept, b);
    const float* xp = input(x, "x", {b, row.front().plan->cols()});
    float* op = output(out, "out", {b, row.back().plan->rows()});
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    LinearPlan::forward(row, xp, b, op, t);
}

void row_backward(const py::sequence& plans, const Array& x, const Array& dy, const py::sequence& values, const py::sequence& biases,
                  const py::sequence& relus, const py::sequence& kept, const py::object& out, const py::object& dx, const py::sequence& dvalues, const py::sequence& dbiases,
                  const py::object& threads) {
    const i64 b = batch_of(x, "x", 2);
    auto row = row_of(plans, values, biases, relus, kept, b, dx.is_none() && kept.size());
    if (dvalues.size() != row.size() || dbiases.size() != row.size()) throw py::value_error("a row needs places for the gradients of each layer, or None");
    const LinearPlan &first = *row.front().plan, &last = *row.back().plan;
    const float *xp = input(x, "x", {b, first.cols()}), *gp = input(dy, "dy", {b, last.rows()});
    const float* op = row.back().relu ? input(out, "out", {b, last.rows()}) : nullptr;
    float* dxp = optional_output(dx, "dx", {b, first.cols()});
    for (size_t i = 0; i < row.size(); ++i) {
        row[i].dvalues = optional_output(dvalues[i], "dvalues", {row[i].plan->nnz()});
        row[i].dbias = optional_output(dbiases[i], "dbias", {row[i].plan->rows()});
    }
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    LinearPlan::backward(row, xp, gp, op, b, dxp, t);
}

void linear_forward_bf16(const LinearPlan& p, const Array& x, const Array& values, const py::object& bias, const Array& out, const py::object& threads) {
    const i64 b = batch_of(x, "x", 2);
    const bf16* xp = bits_input(x, "x", {b, p.cols()});
    const Reals v = reals(values, "values", {p.nnz()}), bp = optional_reals(bias, "bias", {p.rows()});
    bf16* op = bits_output(out, "out", {b, p.rows()});
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    forward_bf16(p, xp, b, v, bp, op, t);
}

void linear_backward_bf16(const LinearPlan& p, const py::object& x, const Array& dy, const py::object& values, const py::object& dx,
                          const py::object& dvalues, const py::object& threads) {
    const i64 b = batch_of(dy, "dy", 2);
    const bf16* gp = bits_input(dy, "dy", {b, p.rows()});
    bf16* dxp = optional_bits(dx, "dx", {b, p.cols()});
    const Sums dv = optional_sums(dvalues, "dvalues", {p.nnz()});
    const Reals v = dxp ? reals(array_of(values, "values"), "values", {p.nnz()}) : Reals{};
    const bf16* xp = dvalues.is_none() ? nullptr : bits_input(array_of(x, "x"), "x", {b, p.cols()});
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    backward_bf16(p, xp, gp, b, v, dxp, dv, t);
}

Layout layout_of(const py::object& o) {
    if (o.is_none()) return Layout::automatic;
    const std::string s = o.cast<std::string>();
    if (s == "planes") return Layout::planes;
    if (s == "batch") return Layout::batch;
    throw py::value_error("layout is '" + s + "', expected None, 'planes' or 'batch'");
}

using Pair = std::pair<i64, i64>;
using Quad = std::tuple<i64, i64, i64, i64>;

std::unique_ptr<Conv2dPlan> make_conv(const Array& indptr, const Array& indices, i64 oc, i64 icg, i64 kh, i64 kw, Pair stride,
                                      Quad padding, Pair dilation, i64 groups, const py::object& layout) {
    const i64* p = vector_of<i64>(indptr, "indptr", i64s);
    const i32* i = vector_of<i32>(indices, "indices", i32s);
    const ConvShape s{oc, icg, kh, kw, stride.first, stride.second, std::get<0>(padding), std::get<1>(padding), std::get<2>(padding),
                      std::get<3>(padding), dilation.first, dilation.second, groups};
    const Layout l = layout_of(layout);
    py::gil_scoped_release nogil;
    return std::make_unique<Conv2dPlan>(p, indptr.size(), i, indices.size(), s, l);
}

struct Image { i64 n, h, w; };

Image image_of(const Array& x, const char* name) {
    const i64 n = batch_of(x, name, 4);
    constexpr i64 most = std::numeric_limits<i32>::max() / 4;
    if (x.shape[2] > most || x.shape[3] > most) throw std::overflow_error("an image side does not fit 32 bits");
    return {n, x.shape[2], x.shape[3]};
}

void conv_forward(const Conv2dPlan& p, const Array& x, const Array& values, const py::object& bias, const Array& out, const py::object& threads) {
    const Image i = image_of(x, "x");
    const float* xp = input(x, "x", {i.n, p.shape().ic(), i.h, i.w});
    const float* vp = input(values, "values", {p.nnz()});
    const float* bp = optional_input(bias, "bias", {p.shape().oc});
    float* op = output(out, "out", {i.n, p.shape().oc, p.shape().out_h(i.h), p.shape().out_w(i.w)});
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    p.forward(xp, i.n, i.h, i.w, vp, bp, op, t);
}

void conv_backward_input(const Conv2dPlan& p, const Array& dy, const Array& values, const Array& dx, const py::object& threads) {
    const Image i = image_of(dx, "dx");
    float* xp = output(dx, "dx", {i.n, p.shape().ic(), i.h, i.w});
    const float* vp = input(values, "values", {p.nnz()});
    const float* gp = input(dy, "dy", {i.n, p.shape().oc, p.shape().out_h(i.h), p.shape().out_w(i.w)});
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    p.backward_input(gp, i.n, i.h, i.w, vp, xp, t);
}

void conv_backward_weight(const Conv2dPlan& p, const Array& x, const Array& dy, const Array& dvalues, const py::object& threads) {
    const Image i = image_of(x, "x");
    const float* xp = input(x, "x", {i.n, p.shape().ic(), i.h, i.w});
    const float* gp = input(dy, "dy", {i.n, p.shape().oc, p.shape().out_h(i.h), p.shape().out_w(i.w)});
    float* dvp = output(dvalues, "dvalues", {p.nnz()});
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    p.backward_weight(xp, gp, i.n, i.h, i.w, dvp, t);
}

void conv_backward(const Conv2dPlan& p, const Array& x, const Array& dy, const Array& values, const Array& dx, const Array& dvalues,
                   const py::object& threads) {
    const Image i = image_of(x, "x");
    const float* xp = input(x, "x", {i.n, p.shape().ic(), i.h, i.w});
    const float* gp = input(dy, "dy", {i.n, p.shape().oc, p.shape().out_h(i.h), p.shape().out_w(i.w)});
    const float* vp = input(values, "values", {p.nnz()});
    float* dxp = output(dx, "dx", {i.n, p.shape().ic(), i.h, i.w});
    float* dvp = output(dvalues, "dvalues", {p.nnz()});
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    p.backward(xp, gp, i.n, i.h, i.w, vp, dxp, dvp, t);
}

Images images_of(const Array& x) {
    if (x.ndim() < 2) throw py::value_error("x has " + std::to_string(x.ndim()) + " dimensions, expected (images, channels, ...)");
    const i64 n = x.shape[0], c = x.shape[1];
    return {n, c, n * c > 0 ? x.size() / (n * c) : 0};
}

// Any shape, as long as it is x's.
const float* like(const Array& a, const char* name, const Array& x) {
    check(a, name, f32);
    if (a.shape != x.shape) throw py::value_error(std::string(name) + " has shape " + text(a.shape) + ", expected " + text(x.shape));
    return static_cast<const float*>(a.data);
}

float* out_like(const Array& a, const char* name, const Array& x) { return writeable(a, name, like(a, name, x)); }

void norm_forward(const Array& x, const py::object& weight, const py::object& bias, double eps, const Array& mean, const Array& var,
                  const Array& out, const py::object& threads) {
    const float* xp = like(x, "x", x);
    const Images s = images_of(x);
    if (s.n * s.pixels == 0) throw py::value_error("x has no values in a channel");
    const float *wp = optional_input(weight, "weight", {s.channels}), *bp = optional_input(bias, "bias", {s.channels});
    float *mp = output(mean, "mean", {s.channels}), *vp = output(var, "var", {s.channels}), *op = out_like(out, "out", x);
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    batch_norm_forward(s, xp, wp, bp, eps, mp, vp, op, t);
}

void norm_backward(const Array& x, const Array& dy, const Array& mean, const Array& var, const py::object& weight, double eps,
                   const py::object& dx, const Array& dweight, const Array& dbias, const py::object& threads) {
    const float *xp = like(x, "x", x), *gp = like(dy, "dy", x);
    const Images s = images_of(x);
    const float *mp = input(mean, "mean", {s.channels}), *vp = input(var, "var", {s.channels}), *wp = optional_input(weight, "weight", {s.channels});
    float *dwp = output(dweight, "dweight", {s.channels}), *dbp = output(dbias, "dbias", {s.channels}), *dxp = nullptr;
    if (!dx.is_none()) dxp = out_like(array_of(dx, "dx"), "dx", x);
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    batch_norm_backward(s, xp, gp, mp, vp, wp, eps, dxp, dwp, dbp, t);
}

Pool pool_of(Pair kernel, Pair stride, Pair padding, i64 h, i64 w) {
    const Pool p{kernel.first, kernel.second, stride.first, stride.second, padding.first, padding.second};
    for (i64 side : {p.kh, p.kw, p.sh, p.sw, p.ph + 1, p.pw + 1, h, w})
        if (side < 1 || side > std::numeric_limits<i32>::max() / 4) throw py::value_error("a pooling window of this size, stride or padding is not possible");
    if (p.kh > 255 || p.kw > 255 || p.kh * p.kw > 255) throw py::value_error("windows of more than 255 pixels are not supported");
    if (2 * p.ph > p.kh || 2 * p.pw > p.kw) throw py::value_error("padding must be at most half the window");
    if (h + 2 * p.ph < p.kh || w + 2 * p.pw < p.kw) throw py::value_error("the image is smaller than the window");
    return p;
}

const uint8_t* bytes_of(const Array& a, const char* name, Want want) {
    check(a, name, u8);
    check_shape(a, name, want);
    return static_cast<const uint8_t*>(a.data);
}

void pool_forward(const Array& x, Pair kernel, Pair stride, Pair padding, const Array& out, const Array& index, const py::object& threads) {
    const Image i = image_of(x, "x");
    const i64 c = x.shape[1];
    const Pool p = pool_of(kernel, stride, padding, i.h, i.w);
    const float* xp = like(x, "x", x);
    float* op = output(out, "out", {i.n, c, p.out_h(i.h), p.out_w(i.w)});
    uint8_t* ip = writeable(index, "index", bytes_of(index, "index", {i.n, c, p.out_h(i.h), p.out_w(i.w)}));
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    max_pool_forward(p, xp, i.n * c, i.h, i.w, op, ip, t);
}

void pool_backward(const Array& dy, const Array& index, Pair kernel, Pair stride, Pair padding, const Array& dx, const py::object& threads) {
    const Image i = image_of(dx, "dx");
    const i64 c = dx.shape[1];
    const Pool p = pool_of(kernel, stride, padding, i.h, i.w);
    const float* gp = input(dy, "dy", {i.n, c, p.out_h(i.h), p.out_w(i.w)});
    const uint8_t* ip = bytes_of(index, "index", {i.n, c, p.out_h(i.h), p.out_w(i.w)});
    if (std::any_of(ip, ip + index.size(), [&](uint8_t t) { return t >= p.kh * p.kw; })) throw py::value_error("index points out of the window");
    float* dxp = out_like(dx, "dx", dx);
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    max_pool_backward(p, gp, ip, i.n * c, i.h, i.w, dxp, t);
}

void conv_forward_bf16(const Conv2dPlan& p, const Array& x, const Array& values, const py::object& bias, const Array& out, const py::object& threads) {
    const Image i = image_of(x, "x");
    const bf16* xp = bits_input(x, "x", {i.n, p.shape().ic(), i.h, i.w});
    const Reals v = reals(values, "values", {p.nnz()}), bp = optional_reals(bias, "bias", {p.shape().oc});
    bf16* op = bits_output(out, "out", {i.n, p.shape().oc, p.shape().out_h(i.h), p.shape().out_w(i.w)});
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    forward_bf16(p, xp, i.n, i.h, i.w, v, bp, op, t);
}

// The image's size comes from dx or x, whichever is there.
void conv_backward_bf16(const Conv2dPlan& p, const py::object& x, const Array& dy, const py::object& values, const py::object& dx,
                        const py::object& dvalues, const py::object& threads) {
    if (dx.is_none() && dvalues.is_none()) return;
    const Image i = dx.is_none() ? image_of(array_of(x, "x"), "x") : image_of(array_of(dx, "dx"), "dx");
    const bf16* gp = bits_input(dy, "dy", {i.n, p.shape().oc, p.shape().out_h(i.h), p.shape().out_w(i.w)});
    bf16* dxp = optional_bits(dx, "dx", {i.n, p.shape().ic(), i.h, i.w});
    const Sums dv = optional_sums(dvalues, "dvalues", {p.nnz()});
    const Reals v = dxp ? reals(array_of(values, "values"), "values", {p.nnz()}) : Reals{};
    const bf16* xp = dvalues.is_none() ? nullptr : bits_input(array_of(x, "x"), "x", {i.n, p.shape().ic(), i.h, i.w});
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    backward_bf16(p, xp, gp, i.n, i.h, i.w, v, dxp, dv, t);
}

void widen(const Array& src, const Array& dst) {
    const bf16* s = bits_input(src, "src", {src.size()});
    float* d = output(dst, "dst", {src.size()});
    current_isa().widen(s, src.size(), d);
}

void narrow(const Array& src, const Array& dst) {
    const float* s = input(src, "src", {src.size()});
    bf16* d = bits_output(dst, "dst", {src.size()});
    current_isa().narrow(s, src.size(), d);
}

// A vector that numpy owns from now on.
template <class T> py::array_t<T> given_away(std::vector<T>&& v) {
    auto* own = new std::vector<T>(std::move(v));
    return py::array_t<T>(py::ssize_t(own->size()), own->data(), py::capsule(own, [](void* p) { delete static_cast<std::vector<T>*>(p); }));
}

// What both ways to collect take: a mask of what is taken, and places for n positions.
i32* collect_into(const Array& taken, const Array& pos, i64 n) {
    check(taken, "taken", boolean);
    check_shape(taken, "taken", {n});
    if (n > std::numeric_limits<i32>::max()) throw std::overflow_error("a block of more than 2^31-1 entries");
    check(pos, "pos", i32s);
    check_shape(pos, "pos", {n});
    return writeable(pos, "pos", static_cast<const i32*>(pos.data));
}

py::tuple collect_above(const Array& g, const Array& taken, float floor, const Array& pos, const py::object& val, const py::object& threads) {
    const i64 n = batch_of(g, "g", 1);
    i32* pp = collect_into(taken, pos, n);
    const bool half = val.is_none();
    const bf16* hp = half ? bits_input(g, "g", {n}) : nullptr;
    const float* gp = half ? nullptr : input(g, "g", {n});
    float* vp = optional_output(val, "val", {n});
    const uint8_t* tp = static_cast<const uint8_t*>(taken.data);
    const int t = threads_of(threads);
    bool finite = true;
    i64 found;
    {
        py::gil_scoped_release nogil;
        found = half ? collect(hp, tp, n, floor, pp, finite, t) : collect(gp, tp, n, floor, pp, vp, finite, t);
    }
    return py::make_tuple(found, finite);
}

void pick_active(const Array& g, const Array& indptr, const Array& indices, const Array& out) {
    const i64 rows = indptr.size() - 1, cols = g.ndim() == 2 ? g.shape[1] : 0, nnz = indices.size();
    const float* gp = input(g, "g", {rows, cols});
    const i64* ptr = vector_of<i64>(indptr, "indptr", i64s);
    const i32* idx = vector_of<i32>(indices, "indices", i32s);
    float* op = output(out, "out", {nnz});
    if (rows < 0 || ptr[0] < 0 || ptr[rows] > nnz || !std::is_sorted(ptr, ptr + rows + 1)) throw py::value_error("indptr must rise within the indices");
    for (i64 k = ptr[0]; k < ptr[rows]; ++k)
        if (idx[k] < 0 || idx[k] >= cols) throw py::index_error("an index is outside the columns");
    py::gil_scoped_release nogil;
    pick(gp, ptr, rows, cols, idx, op);
}

py::array_t<i64> ranks_of(const Array& sorted, const Array& queries, const py::object& threads) {
    const i64 *a = vector_of<i64>(sorted, "sorted", i64s), *q = vector_of<i64>(queries, "queries", i64s);
    py::array_t<i64> out(queries.size());
    i64* o = out.mutable_data();
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    ranks(a, sorted.size(), q, queries.size(), o, t);
    return out;
}

py::tuple regrown(const Array& indptr, const Array& indices, i64 cols, const Array& kept, const Array& fresh) {
    const i64 *ptr = vector_of<i64>(indptr, "indptr", i64s), *fp = vector_of<i64>(fresh, "fresh", i64s);
    const i32* idx = vector_of<i32>(indices, "indices", i32s);
    const i64 rows = indptr.size() - 1, nnz = indices.size(), n = fresh.size();
    check(kept, "kept", boolean);
    check_shape(kept, "kept", {nnz});
    if (rows < 0 || cols < 0 || ptr[0] != 0 || ptr[rows] != nnz || !std::is_sorted(ptr, ptr + rows + 1)) throw py::value_error("indptr must rise from 0 to the number of indices");
    for (i64 r = 0; r < rows; ++r)
        for (i64 k = ptr[r]; k < ptr[r + 1]; ++k)
            if (idx[k] < (k > ptr[r] ? idx[k - 1] + i64(1) : 0) || idx[k] >= cols) throw py::index_error("indices must be columns, ascending in each row");
    for (i64 i = 0; i < n; ++i)
        if (fp[i] < (i ? fp[i - 1] + 1 : 0) || fp[i] >= rows * cols) throw py::value_error("fresh must be positions of the weight, ascending");
    Regrown r;
    {
        py::gil_scoped_release nogil;
        r = regrow(ptr, idx, rows, cols, static_cast<const uint8_t*>(kept.data), fp, n);
    }
    return py::make_tuple(given_away(std::move(r.indptr)), given_away(std::move(r.indices)), given_away(std::move(r.source)), given_away(std::move(r.dropped)));
}

py::list kernel_table() {
    py::list out;
    for (const Isa* i : available_isas())
        for (int k = 0; k < i->n_kernels; ++k) {
            const Kernel& n = i->kernels[k];
            py::dict d;
            d["op"] = n.op; d["dtype"] = n.dtype; d["isa"] = i->name; d["tile"] = py::make_tuple(n.rows, n.cols);
            d["lay"] = n.lay == Lay::packed ? "packed" : n.lay == Lay::unit ? "unit" : n.lay == Lay::strided ? "strided" : "shifted"; d["width"] = i->width;
            out.append(d);
        }
    return out;
}

std::vector<std::string> isa_names() {
    std::vector<std::string> out;
    for (const Isa* i : available_isas()) out.push_back(i->name);
    return out;
}

}  // namespace

PYBIND11_MODULE(_kernels, m) {
    using namespace py::literals;
    m.doc() = "Compiled sparse kernels; use fastsparse.kernels";
    m.def("available_isas", isa_names);
    m.def("isa", [] { return std::string(current_isa().name); });
    m.def("set_isa", set_isa, "name"_a);
    m.def("kernel_table", kernel_table);
    m.def("threading", threading);
    m.def("max_threads", torch_threads);
    m.def("keep_freed_memory", keep_freed_memory, "on"_a);
    m.def("batch_norm_forward", &norm_forward, "x"_a, "weight"_a.none(true), "bias"_a.none(true), "eps"_a, "mean"_a, "var"_a, "out"_a, "threads"_a = py::none());
    m.def("batch_norm_backward", &norm_backward, "x"_a, "dy"_a, "mean"_a, "var"_a, "weight"_a.none(true), "eps"_a, "dx"_a.none(true), "dweight"_a, "dbias"_a,
          "threads"_a = py::none());
    m.def("max_pool_forward", &pool_forward, "x"_a, "kernel"_a, "stride"_a, "padding"_a, "out"_a, "index"_a, "threads"_a = py::none());
    m.def("max_pool_backward", &pool_backward, "dy"_a, "index"_a, "kernel"_a, "stride"_a, "padding"_a, "dx"_a, "threads"_a = py::none());
    m.def("widen", widen, "src"_a, "dst"_a);
    m.def("narrow", narrow, "src"_a, "dst"_a);
    m.def("collect", &collect_above, "g"_a, "taken"_a, "floor"_a, "pos"_a, "val"_a, "threads"_a = py::none());
    m.def("collects_bf16", [] { return current_isa().collect_bf16 != nullptr; });
    m.def("pick", &pick_active, "g"_a, "indptr"_a, "indices"_a, "out"_a);
    m.def("ranks", &ranks_of, "sorted"_a, "queries"_a, "threads"_a = py::none());
    m.def("regrow", &regrown, "indptr"_a, "indices"_a, "cols"_a, "kept"_a, "fresh"_a);
    py::class_<LinearPlan>(m, "LinearPlan")
        .def(py::init(&make_linear), "indptr"_a, "indices"_a, "n_rows"_a, "n_cols"_a)
        .def_property_readonly("n_rows", &LinearPlan::rows)
        .def_property_readonly("n_cols", &LinearPlan::cols)
        .def_property_readonly("nnz", &LinearPlan::nnz)
        .def("forward", &linear_forward, "x"_a, "values"_a, "bias"_a.none(true), "out"_a, "threads"_a = py::none())
        .def("backward", &linear_backward, "x"_a, "dy"_a, "values"_a, "dx"_a, "dvalues"_a, "threads"_a = py::none(), "dbias"_a = py::none())
        .def_property_readonly("tile_vectors", [](const LinearPlan& p) { return p.tile_vectors(current_isa()); })
        .def_static("packed_lanes", &LinearPlan::packed_lanes, "batch"_a)
        .def("pack", &linear_pack, "rows"_a, "packed"_a, "threads"_a = py::none())
        .def("unpack", &linear_unpack, "packed"_a, "rows"_a, "threads"_a = py::none())
        .def("forward_linked", &linear_forward_linked, "x"_a, "values"_a, "bias"_a.none(true), "out"_a, "batch"_a, "x_packed"_a, "y_packed"_a, "relu"_a,
             "threads"_a = py::none())
        .def("backward_linked", &linear_backward_linked, "x"_a, "dy"_a, "values"_a, "dx"_a, "dvalues"_a, "dbias"_a, "out"_a, "batch"_a, "x_packed"_a,
             "y_packed"_a, "relu"_a, "gated"_a, "threads"_a = py::none())
        .def("whole_tiles", [](const LinearPlan& p, i64 batch, const py::object& threads) { return p.whole_tiles(batch, threads_of(threads)); }, "batch"_a, "threads"_a = py::none())
        .def_static("row_forward", &row_forward, "plans"_a, "x"_a, "values"_a, "biases"_a, "relus"_a, "kept"_a, "out"_a, "threads"_a = py::none())
        .def_static("row_backward", &row_backward, "plans"_a, "x"_a, "dy"_a, "values"_a, "biases"_a, "relus"_a, "kept"_a, "out"_a, "dx"_a, "dvalues"_a, "dbiases"_a,
                    "threads"_a = py::none())
        .def("forward_bf16", &linear_forward_bf16, "x"_a, "values"_a, "bias"_a.none(true), "out"_a, "threads"_a = py::none())
        .def("backward_bf16", &linear_backward_bf16, "x"_a, "dy"_a, "values"_a, "dx"_a, "dvalues"_a, "threads"_a = py::none());
    py::class_<Conv2dPlan>(m, "Conv2dPlan")
        .def(py::init(&make_conv), "indptr"_a, "indices"_a, "out_channels"_a, "in_channels_per_group"_a, "kh"_a, "kw"_a, "stride"_a,
             "padding"_a, "dilation"_a, "groups"_a, "layout"_a)
        .def_property_readonly("nnz", &Conv2dPlan::nnz)
        .def("forward", &conv_forward, "x"_a, "values"_a, "bias"_a.none(true), "out"_a, "threads"_a = py::none())
        .def("backward_input", &conv_backward_input, "dy"_a, "values"_a, "dx"_a, "threads"_a = py::none())
        .def("backward_weight", &conv_backward_weight, "x"_a, "dy"_a, "dvalues"_a, "threads"_a = py::none())
        .def("backward", &conv_backward, "x"_a, "dy"_a, "values"_a, "dx"_a, "dvalues"_a, "threads"_a = py::none())
        .def("forward_bf16", &conv_forward_bf16, "x"_a, "values"_a, "bias"_a.none(true), "out"_a, "threads"_a = py::none())
        .def("backward_bf16", &conv_backward_bf16, "x"_a, "dy"_a, "values"_a, "dx"_a, "dvalues"_a, "threads"_a = py::none());
}
