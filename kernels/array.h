// Arrays of numpy and CPU tensors of PyTorch as arguments. A tensor is read through DLPack's C interface where PyTorch has it,
// which takes a tenth of the time of a detour by numpy; elsewhere it takes that detour.
#pragma once
#include "common.h"
#include <algorithm>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace fastsparse {

namespace py = pybind11;

enum class Type { other, boolean, u8, i16, u16, i32, i64, f32, bf16 };

struct Array {
    py::object owner;          // whose memory it is
    void* data = nullptr;
    std::vector<i64> shape;
    Type type = Type::other;
    bool contiguous = false, writeable = false;

    i64 ndim() const { return i64(shape.size()); }
    i64 size() const { i64 n = 1; for (i64 s : shape) n *= s; return n; }
    std::string dtype() const { return py::str(owner.attr("dtype")); }
};

inline Type type_of(char kind, i64 bytes) {
    switch (kind) {
    case 'b': return bytes == 1 ? Type::boolean : Type::other;
    case 'u': return bytes == 1 ? Type::u8 : bytes == 2 ? Type::u16 : Type::other;
    case 'i': return bytes == 2 ? Type::i16 : bytes == 4 ? Type::i32 : bytes == 8 ? Type::i64 : Type::other;
    case 'f': return bytes == 4 ? Type::f32 : Type::other;
    default: return Type::other;
    }
}

inline Array from_numpy(const py::array& a) {
    const py::dtype d = a.dtype();
    const bool native = d.byteorder() == '=' || d.byteorder() == '|';
    return {a, const_cast<void*>(a.data()), {a.shape(), a.shape() + a.ndim()}, native ? type_of(d.kind(), d.itemsize()) : Type::other,
            bool(a.flags() & py::array::c_style), a.writeable()};
}

// The part of DLPack 1.x (github.com/dmlc/dlpack) that lends a tensor without a copy or a new object.
namespace dlpack {

enum : int32_t { cpu = 1 };
enum : uint8_t { integer = 0, unsigned_integer = 1, real = 2, bfloat = 4, boolean = 6 };

struct Tensor {
    void* data;
    struct { int32_t type, id; } device;
    int32_t ndim;
    struct { uint8_t code, bits; uint16_t lanes; } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct ExchangeApi {
    struct { uint32_t major, minor; } version;
    ExchangeApi* older;
    void *allocate, *managed_from_object, *managed_to_object;
    int (*from_object)(void* object, Tensor* out);
    void* work_stream;
};

inline Type type_of(const Tensor& t) {
    if (t.dtype.lanes != 1) return Type::other;
    switch (t.dtype.code) {
    case integer: return fastsparse::type_of('i', t.dtype.bits / 8);
    case unsigned_integer: return fastsparse::type_of('u', t.dtype.bits / 8);
    case real: return fastsparse::type_of('f', t.dtype.bits / 8);
    case bfloat: return t.dtype.bits == 16 ? Type::bf16 : Type::other;
    case boolean: return Type::boolean;
    default: return Type::other;
    }
}

inline bool is_contiguous(const Tensor& t) {
    if (!t.strides || std::find(t.shape, t.shape + t.ndim, 0) != t.shape + t.ndim) return true;
    i64 step = 1;
    for (int i = t.ndim; i--; step *= t.shape[i])
        if (t.shape[i] != 1 && t.strides[i] != step) return false;
    return true;
}

}  // namespace dlpack

struct TensorType {
    PyTypeObject* type;
    const dlpack::ExchangeApi* api;   // null: this PyTorch has none
};

// torch.Tensor; null as long as nobody has imported it. Called with the GIL held, and kept for good.
inline const TensorType* tensor_type() {
    static const TensorType* found = nullptr;
    if (found) return found;
    const py::object torch = py::reinterpret_steal<py::object>(PyImport_GetModule(py::str("torch").ptr()));
    if (!torch || !py::hasattr(torch, "Tensor")) return nullptr;
    py::object type = torch.attr("Tensor");
    const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
    const auto* api = capsule.is_none() ? nullptr : static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!capsule.is_none() && !api) throw py::error_already_set();
    if (api && (api->version.major != 1 || !api->from_object)) api = nullptr;
    return found = new TensorType{reinterpret_cast<PyTypeObject*>(type.release().ptr()), api};
}

// Raises TypeError, so that no caller takes it for a failure of a kernel.
inline py::array by_numpy(py::object tensor) try {
    tensor = tensor.attr("detach")();
    const py::object torch = py::module_::import("torch");
    if (tensor.attr("dtype").equal(torch.attr("bfloat16"))) tensor = tensor.attr("view")(torch.attr("int16"));
    py::array a = tensor.attr("numpy")();
    if (a.size() && !tensor.attr("data_ptr")().cast<uintptr_t>()) throw py::value_error("a tensor without memory");
    return a;
} catch (py::error_already_set& e) {
    if (!e.matches(PyExc_Exception)) throw;   // an interrupt
    py::raise_from(e, PyExc_TypeError, "the kernels cannot read this tensor");
    throw py::error_already_set();
}

// Is a tensor's memory what its values are? Views that only note a change of sign keep the old values there.
inline bool is_plain(py::handle tensor) {
    static PyObject* const name = PyUnicode_InternFromString("is_neg");
    const py::object neg = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), name));
    PyErr_Clear();
    return neg.ptr() == Py_False;
}

inline Array from_tensor(const py::object& tensor, const dlpack::ExchangeApi* api) {
    dlpack::Tensor t;
    const bool lent = api && is_plain(tensor) && !api->from_object(tensor.ptr(), &t) && t.device.type == dlpack::cpu;
    PyErr_Clear();
    if (!lent) return from_numpy(by_numpy(tensor));
    Array a{tensor, static_cast<char*>(t.data) + t.byte_offset, {t.shape, t.shape + t.ndim}, dlpack::type_of(t), dlpack::is_contiguous(t), true};
    if (a.size() && !t.data) throw py::value_error("a tensor without memory");
    return a;
}

// False if `o` is neither an array nor a tensor.
inline bool to_array(py::handle o, Array& out) {
    if (py::isinstance<py::array>(o)) { out = from_numpy(py::reinterpret_borrow<py::array>(o)); return true; }
    const TensorType* tensor = tensor_type();
    if (!tensor || !PyObject_TypeCheck(o.ptr(), tensor->type)) return false;
    out = from_tensor(py::reinterpret_borrow<py::object>(o), tensor->api);
    return true;
}

inline Array array_of(py::handle o, const char* name) {
    Array a;
    if (!to_array(o, a)) throw py::type_error(std::string(name) + " is " + std::string(py::str(py::type::of(o))) + ", expected an array or a tensor");
    return a;
}

}  // namespace fastsparse

namespace pybind11::detail {

template <> struct type_caster<fastsparse::Array> {
    PYBIND11_TYPE_CASTER(fastsparse::Array, const_name("numpy.ndarray | torch.Tensor"));
    bool load(handle src, bool) { return fastsparse::to_array(src, value); }
};

}  // namespace pybind11::detail
