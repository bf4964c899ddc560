// Python's side: every array is checked here, so that nothing below can be reached with a wrong one.
#include "plan.h"
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <algorithm>
#include <initializer_list>
#include <limits>

namespace py = pybind11;
using namespace fastsparse;

namespace {

using Shape = std::vector<i64>;

template <class S> std::string text(const S& s) {
    std::string t = "(";
    for (i64 n : s) t += (t.size() > 1 ? ", " : "") + std::to_string(n);
    return t + (s.size() == 1 ? ",)" : ")");
}

Shape shape_of(const py::array& a) { return Shape(a.shape(), a.shape() + a.ndim()); }

template <class T> void check(const py::array& a, const char* name, const char* dtype) {
    static const int number = py::dtype::of<T>().num();
    const py::dtype d = a.dtype();
    if (!(d.num() == number && d.byteorder() == '=') && !py::dtype::of<T>().equal(d))
        throw py::type_error(std::string(name) + " is " + py::str(a.dtype()).cast<std::string>() + ", expected " + dtype);
    if (!(a.flags() & py::array::c_style)) throw py::value_error(std::string(name) + " must be C-contiguous");
    if (a.size() && reinterpret_cast<uintptr_t>(a.data()) % sizeof(T)) throw py::value_error(std::string(name) + " must be aligned");
}

using Want = std::initializer_list<i64>;

void check_shape(const py::array& a, const char* name, Want want) {
    if (a.ndim() != py::ssize_t(want.size()) || !std::equal(want.begin(), want.end(), a.shape())) throw py::value_error(std::string(name) + " has shape " + text(shape_of(a)) + ", expected " + text(want));
}

const float* input(const py::array& a, const char* name, Want want) {
    check<float>(a, name, "float32");
    check_shape(a, name, want);
    return static_cast<const float*>(a.data());
}

float* output(py::array& a, const char* name, Want want) {
    input(a, name, want);
    if (!a.writeable()) throw py::value_error(std::string(name) + " is read-only");
    return static_cast<float*>(a.mutable_data());
}

const float* optional_input(const py::object& a, const char* name, Want want) {
    return a.is_none() ? nullptr : input(py::cast<py::array>(a), name, want);
}

float* optional_output(const py::object& o, const char* name, Want want) {
    if (o.is_none()) return nullptr;
    py::array a = py::cast<py::array>(o);
    return output(a, name, want);
}

int threads_of(const py::object& t) {
    if (t.is_none()) return max_threads();
    const i64 n = t.cast<i64>();
    if (n < 1 || n > 4096) throw py::value_error("threads is " + std::to_string(n) + ", expected 1 or more");
    return int(n);
}

template <class T> const T* vector_of(const py::array& a, const char* name, const char* dtype) {
    check<T>(a, name, dtype);
    if (a.ndim() != 1) throw py::value_error(std::string(name) + " has " + std::to_string(a.ndim()) + " dimensions, expected 1");
    return static_cast<const T*>(a.data());
}

i64 batch_of(const py::array& a, const char* name, py::ssize_t ndim) {
    if (a.ndim() != ndim) throw py::value_error(std::string(name) + " has " + std::to_string(a.ndim()) + " dimensions, expected " + std::to_string(ndim));
    return a.shape(0);
}

std::unique_ptr<LinearPlan> make_linear(const py::array& indptr, const py::array& indices, i64 rows, i64 cols) {
    const i64* p = vector_of<i64>(indptr, "indptr", "int64");
    const i32* i = vector_of<i32>(indices, "indices", "int32");
    py::gil_scoped_release nogil;
    return std::make_unique<LinearPlan>(p, indptr.size(), i, indices.size(), rows, cols);
}

void linear_forward(const LinearPlan& p, const py::array& x, const py::array& values, const py::object& bias, py::array& out, const py::object& threads) {
    const i64 b = batch_of(x, "x", 2);
    const float* xp = input(x, "x", {b, p.cols()});
    const float* vp = input(values, "values", {p.nnz()});
    const float* bp = optional_input(bias, "bias", {p.rows()});
    float* op = output(out, "out", {b, p.rows()});
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    p.forward(xp, b, vp, bp, op, t);
}

void linear_backward(const LinearPlan& p, const py::object& x, const py::array& dy, const py::object& values, const py::object& dx,
                     const py::object& dvalues, const py::object& threads, const py::object& dbias) {
    const i64 b = batch_of(dy, "dy", 2);
    const float* gp = input(dy, "dy", {b, p.rows()});
    float* dxp = optional_output(dx, "dx", {b, p.cols()});
    float* dvp = optional_output(dvalues, "dvalues", {p.nnz()});
    float* dbp = optional_output(dbias, "dbias", {p.rows()});
    const float* vp = dxp ? input(py::cast<py::array>(values), "values", {p.nnz()}) : nullptr;
    const float* xp = dvp ? input(py::cast<py::array>(x), "x", {b, p.cols()}) : nullptr;
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    p.backward(xp, gp, b, vp, dxp, dvp, dbp, t);
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

std::unique_ptr<Conv2dPlan> make_conv(const py::array& indptr, const py::array& indices, i64 oc, i64 icg, i64 kh, i64 kw, Pair stride,
                                      Quad padding, Pair dilation, i64 groups, const py::object& layout) {
    const i64* p = vector_of<i64>(indptr, "indptr", "int64");
    const i32* i = vector_of<i32>(indices, "indices", "int32");
    const ConvShape s{oc, icg, kh, kw, stride.first, stride.second, std::get<0>(padding), std::get<1>(padding), std::get<2>(padding),
                      std::get<3>(padding), dilation.first, dilation.second, groups};
    const Layout l = layout_of(layout);
    py::gil_scoped_release nogil;
    return std::make_unique<Conv2dPlan>(p, indptr.size(), i, indices.size(), s, l);
}

struct Image { i64 n, h, w; };

Image image_of(const py::array& x, const char* name) {
    const i64 n = batch_of(x, name, 4);
    constexpr i64 most = std::numeric_limits<i32>::max() / 4;
    if (x.shape(2) > most || x.shape(3) > most) throw std::overflow_error("an image side does not fit 32 bits");
    return {n, x.shape(2), x.shape(3)};
}


void conv_forward(const Conv2dPlan& p, const py::array& x, const py::array& values, const py::object& bias, py::array& out, const py::object& threads) {
    const Image i = image_of(x, "x");
    const float* xp = input(x, "x", {i.n, p.shape().ic(), i.h, i.w});
    const float* vp = input(values, "values", {p.nnz()});
    const float* bp = optional_input(bias, "bias", {p.shape().oc});
    float* op = output(out, "out", {i.n, p.shape().oc, p.shape().out_h(i.h), p.shape().out_w(i.w)});
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    p.forward(xp, i.n, i.h, i.w, vp, bp, op, t);
}

void conv_backward_input(const Conv2dPlan& p, const py::array& dy, const py::array& values, py::array& dx, const py::object& threads) {
    const Image i = image_of(dx, "dx");
    float* xp = output(dx, "dx", {i.n, p.shape().ic(), i.h, i.w});
    const float* vp = input(values, "values", {p.nnz()});
    const float* gp = input(dy, "dy", {i.n, p.shape().oc, p.shape().out_h(i.h), p.shape().out_w(i.w)});
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    p.backward_input(gp, i.n, i.h, i.w, vp, xp, t);
}

void conv_backward_weight(const Conv2dPlan& p, const py::array& x, const py::array& dy, py::array& dvalues, const py::object& threads) {
    const Image i = image_of(x, "x");
    const float* xp = input(x, "x", {i.n, p.shape().ic(), i.h, i.w});
    const float* gp = input(dy, "dy", {i.n, p.shape().oc, p.shape().out_h(i.h), p.shape().out_w(i.w)});
    float* dvp = output(dvalues, "dvalues", {p.nnz()});
    const int t = threads_of(threads);
    py::gil_scoped_release nogil;
    p.backward_weight(xp, gp, i.n, i.h, i.w, dvp, t);
}

void conv_backward(const Conv2dPlan& p, const py::array& x, const py::array& dy, const py::array& values, py::array& dx, py::array& dvalues,
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

py::list kernel_table() {
    py::list out;
    for (const Isa* i : available_isas())
        for (int k = 0; k < i->n_kernels; ++k) {
            const Kernel& n = i->kernels[k];
            py::dict d;
            d["op"] = n.op; d["dtype"] = n.dtype; d["isa"] = i->name; d["tile"] = py::make_tuple(n.rows, n.cols);
            d["unit"] = n.unit; d["width"] = i->width;
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
    m.def("max_threads", max_threads);
    py::class_<LinearPlan>(m, "LinearPlan")
        .def(py::init(&make_linear), "indptr"_a, "indices"_a, "n_rows"_a, "n_cols"_a)
        .def_property_readonly("n_rows", &LinearPlan::rows)
        .def_property_readonly("n_cols", &LinearPlan::cols)
        .def_property_readonly("nnz", &LinearPlan::nnz)
        .def("forward", &linear_forward, "x"_a, "values"_a, "bias"_a.none(true), "out"_a, "threads"_a = py::none())
        .def("backward", &linear_backward, "x"_a, "dy"_a, "values"_a, "dx"_a, "dvalues"_a, "threads"_a = py::none(),
             "dbias"_a = py::none());
    py::class_<Conv2dPlan>(m, "Conv2dPlan")
        .def(py::init(&make_conv), "indptr"_a, "indices"_a, "out_channels"_a, "in_channels_per_group"_a, "kh"_a, "kw"_a, "stride"_a,
             "padding"_a, "dilation"_a, "groups"_a, "layout"_a)
        .def_property_readonly("nnz", &Conv2dPlan::nnz)
        .def("forward", &conv_forward, "x"_a, "values"_a, "bias"_a.none(true), "out"_a, "threads"_a = py::none())
        .def("backward_input", &conv_backward_input, "dy"_a, "values"_a, "dx"_a, "threads"_a = py::none())
        .def("backward_weight", &conv_backward_weight, "x"_a, "dy"_a, "dvalues"_a, "threads"_a = py::none())
        .def("backward", &conv_backward, "x"_a, "dy"_a, "values"_a, "dx"_a, "dvalues"_a, "threads"_a = py::none());
}
