#include "tensors.h"

#include <algorithm>

#include "dlpack.h"

namespace py = pybind11;

namespace maml_fast {

namespace {

// Filled once by find_torch, and never freed: calls may come while the interpreter ends.
struct Torch {
    const dlpack::ExchangeApi* api;
    PyTypeObject* tensor;
    // methods of the classes Tensor and UntypedStorage
    PyObject *untyped_storage, *nbytes, *storage_offset, *contiguous, *is_neg, *resolve_neg;
    PyObject *requires_grad, *grad;  // names
} torch;

[[noreturn]] void refuse(const Expected& e, const std::string& what) { throw py::value_error(e.name + ": " + what); }

py::object call(py::handle object, PyObject* method) {
    PyObject* const arguments[] = {object.ptr()};
    PyObject* result = PyObject_Vectorcall(method, arguments, 1, nullptr);
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
}

long call_long(py::handle object, PyObject* method) {
    long value = PyLong_AsLong(call(object, method).ptr());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

struct Type {
    dlpack::Kind kind;
    int bytes;
    const char* name;
};

Type type_of(Scalar scalar) {
    switch (scalar) {
        case Scalar::float32:
            return {dlpack::Kind::real, 4, "torch.float32"};
        case Scalar::float64:
            return {dlpack::Kind::real, 8, "torch.float64"};
        case Scalar::int64:
            return {dlpack::Kind::signed_integer, 8, "torch.int64"};
    }
    throw std::logic_error("a scalar type without a name");
}

long elements_of(const dlpack::Tensor& t) {
    long elements = 1;
    for (int i = 0; i < t.dimensions; ++i) elements *= t.shape[i];
    return elements;
}

bool is_contiguous(const dlpack::Tensor& t) {
    long step = 1;
    for (int i = t.dimensions - 1; i >= 0; --i) {
        if (t.shape[i] != 1 && t.strides[i] != step) return false;
        step *= t.shape[i];
    }
    return true;
}

// The tensor as it is, with type and length checked.
dlpack::Tensor view(py::handle tensor, const Expected& e) {
    if (!PyObject_TypeCheck(tensor.ptr(), torch.tensor))
        throw py::type_error(e.name + ": expected a torch.Tensor, got " + Py_TYPE(tensor.ptr())->tp_name);
    dlpack::Tensor t;
    if (torch.api->view(tensor.ptr(), &t) != 0) {
        py::error_already_set cause;
        py::raise_from(cause, PyExc_ValueError, (e.name + ": expected a tensor with memory of its own").c_str());
        throw py::error_already_set();
    }
    const Type type = type_of(e.scalar);
    if (t.device != int(dlpack::Device::cpu)) refuse(e, "expected a tensor on the CPU");
    if (t.type.kind != std::uint8_t(type.kind) || t.type.bits != 8 * type.bytes || t.type.lanes != 1)
        throw py::type_error(e.name + ": expected " + type.name + ", got " +
                             std::string(py::str(tensor.attr("dtype"))));
    const long elements = elements_of(t);
    if (elements != e.elements)
        refuse(e, "expected " + std::to_string(e.elements) + " elements, got " + std::to_string(elements));
    t.data = static_cast<char*>(t.data) + t.byte_offset;
    return t;
}

// From the first element to behind the last, in elements: an expanded tensor has fewer than it shows.
long span_of(const dlpack::Tensor& t) {
    long span = 1;
    for (int i = 0; i < t.dimensions; ++i) span += (t.shape[i] - 1) * t.strides[i];
    return span;
}

// Storages can be shrunk and freed under the tensors that lie in them.
void check_memory(py::handle tensor, const dlpack::Tensor& t, const Expected& e) {
    if (e.elements == 0) return;
    const long bytes = type_of(e.scalar).bytes, end = call_long(tensor, torch.storage_offset) + span_of(t);
    const long held = call_long(call(tensor, torch.untyped_storage), torch.nbytes);
    if (t.data && end * bytes <= held) return;
    refuse(e, "expected a storage of at least " + std::to_string(end * bytes) + " bytes, got " + std::to_string(held) +
                  ": it was freed, or made smaller");
}

bool is_absent(py::handle tensor, const Expected& e) {
    if (!tensor.is_none()) return false;
    if (e.required) refuse(e, "expected " + std::to_string(e.elements) + " elements, got None");
    return true;
}

}  // namespace

py::handle Tensors::keep(py::object tensor) {
    copies_.push_back(std::move(tensor));
    return copies_.back();
}

void* Tensors::read(py::handle tensor, const Expected& e) {
    if (is_absent(tensor, e)) return nullptr;
    dlpack::Tensor t = view(tensor, e);
    check_memory(tensor, t, e);
    return is_contiguous(t) ? t.data : view(keep(call(tensor, torch.contiguous)), e).data;
}

void* Tensors::read_batch(py::handle tensor, const Expected& e) {
    if (is_absent(tensor, e)) return nullptr;
    void* data = read(tensor, e);
    if (call(tensor, torch.is_neg).ptr() == Py_False) return data;
    return view(keep(call(call(tensor, torch.resolve_neg), torch.contiguous)), e).data;
}

void* Tensors::written(py::handle tensor, const Expected& e) const {
    if (is_absent(tensor, e)) return nullptr;
    const dlpack::Tensor t = view(tensor, e);
    if (!is_contiguous(t)) refuse(e, "expected a contiguous tensor");
    check_memory(tensor, t, e);
    return t.data;
}

void* Tensors::made(py::handle tensor, const Expected& e) const {
    if (is_absent(tensor, e)) return nullptr;
    const dlpack::Tensor t = view(tensor, e);
    if (!is_contiguous(t) || (!t.data && e.elements > 0)) refuse(e, "expected contiguous memory");
    return t.data;
}

namespace {

std::uint32_t number_of(dlpack::Type t) { return std::uint32_t(t.kind) << 24 | std::uint32_t(t.bits) << 16 | t.lanes; }

bool is_true(PyObject* value) {
    if (!value) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value).ptr() == Py_True;
}

bool is_followed(py::handle tensor) { return is_true(PyObject_GetAttr(tensor.ptr(), torch.requires_grad)); }
bool is_negated(py::handle tensor) { return call(tensor, torch.is_neg).ptr() == Py_True; }

}  // namespace

Kinds::Kinds(const py::list& tensors, bool negation) : negation_(negation) {
    for (py::handle tensor : tensors) {
        if (tensor.is_none()) {
            kinds_.push_back({true, 0, 0, 0, false, false, {}});
            continue;
        }
        dlpack::Tensor t;
        if (!PyObject_TypeCheck(tensor.ptr(), torch.tensor)) throw py::type_error("expected tensors");
        if (torch.api->view(tensor.ptr(), &t) != 0) throw py::error_already_set();
        kinds_.push_back({false,
                          t.device,
                          t.device_index,
                          number_of(t.type),
                          is_followed(tensor),
                          negation_ && is_negated(tensor),
                          {t.shape, t.shape + t.dimensions}});
    }
}

bool Kinds::is_same(const Kind& kind, py::handle tensor) const {
    if (kind.absent || tensor.is_none()) return kind.absent && tensor.is_none();
    dlpack::Tensor t;
    if (!PyObject_TypeCheck(tensor.ptr(), torch.tensor)) return false;
    if (torch.api->view(tensor.ptr(), &t) != 0) {
        PyErr_Clear();
        return false;
    }
    return t.device == kind.device && t.device_index == kind.device_index && number_of(t.type) == kind.type &&
           std::equal(t.shape, t.shape + t.dimensions, kind.shape.begin(), kind.shape.end()) &&
           is_followed(tensor) == kind.follows && (!negation_ || is_negated(tensor) == kind.negated);
}

bool Kinds::same(const py::list& tensors) const {
    if (tensors.size() != kinds_.size()) return false;
    for (std::size_t i = 0; i < kinds_.size(); ++i)
        if (!is_same(kinds_[i], PyList_GET_ITEM(tensors.ptr(), Py_ssize_t(i)))) return false;
    return true;
}

bool Kinds::same(std::initializer_list<py::handle> tensors) const {
    return tensors.size() == kinds_.size() &&
           std::equal(tensors.begin(), tensors.end(), kinds_.begin(),
                      [&](py::handle tensor, const Kind& kind) { return is_same(kind, tensor); });
}

py::list existing_gradients(const py::list& parameters) {
    py::list found;
    for (py::handle parameter : parameters) {
        py::object gradient = py::reinterpret_steal<py::object>(PyObject_GetAttr(parameter.ptr(), torch.grad));
        dlpack::Tensor p, g;
        if (!gradient) throw py::error_already_set();
        if (gradient.is_none()) return py::list();
        if (torch.api->view(parameter.ptr(), &p) != 0 || torch.api->view(gradient.ptr(), &g) != 0) {
            PyErr_Clear();
            return py::list();
        }
        if (number_of(g.type) != number_of(p.type) || g.device != p.device || !is_contiguous(g) ||
            !std::equal(g.shape, g.shape + g.dimensions, p.shape, p.shape + p.dimensions) || is_negated(gradient))
            return py::list();
        found.append(std::move(gradient));
    }
    return found;
}

void find_torch() {
    py::object tensor = py::module_::import("torch").attr("Tensor");
    py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
    auto api = PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsule)
                   ? static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule))
                   : nullptr;
    if (!api || api->version.major != dlpack::kMajorVersion || !api->view)
        throw py::import_error("this PyTorch does not offer its tensors to C as version 1 of DLPack does");
    py::object storage = py::module_::import("torch").attr("UntypedStorage");
    auto method = [](const py::object& type, const char* name) { return py::object(type.attr(name)).release().ptr(); };
    torch = {api,
             reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr()),
             method(tensor, "untyped_storage"),
             method(storage, "nbytes"),
             method(tensor, "storage_offset"),
             method(tensor, "contiguous"),
             method(tensor, "is_neg"),
             method(tensor, "resolve_neg"),
             PyUnicode_InternFromString("requires_grad"),
             PyUnicode_InternFromString("grad")};
}

void check_labels(const Expected& e, const void* labels, long classes) {
    const auto* y = static_cast<const std::int64_t*>(labels);
    std::uint64_t outside = 0;  // the sign bit: of y, or of classes − 1 − y
    for (long i = 0; i < e.elements; ++i)
        outside |= std::uint64_t(y[i]) | (std::uint64_t(classes - 1) - std::uint64_t(y[i]));
    if (outside >> 63 == 0) return;
    const auto [low, high] = std::minmax_element(y, y + e.elements);
    refuse(e, "expected labels in [0, " + std::to_string(classes) + "), got " + std::to_string(*low) + ".." +
                  std::to_string(*high));
}

}  // namespace maml_fast
