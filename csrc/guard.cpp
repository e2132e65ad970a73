// Whether Python containers still hold the very objects that they held: the guard of captured plans, at every call.

#include "guard.h"

#include <vector>

namespace py = pybind11;

namespace {

// A dict, list, class or closure cell, and the objects that it must hold; or a function, and its code and defaults; or
// any other object, and its class. A list or dict is compared whole and in order (an Ellipsis stands for anything);
// with `some`, only the named entries of a dict (an Ellipsis: there is none).
struct Shelf {
    py::object container;
    py::tuple keys;
    py::tuple values;
    bool some;
};

bool holds_all(PyObject* dict, PyObject* keys, PyObject* values) {
    if (PyDict_GET_SIZE(dict) != PyTuple_GET_SIZE(values)) return false;
    PyObject *key, *value;
    Py_ssize_t at = 0;
    for (Py_ssize_t i = 0; PyDict_Next(dict, &at, &key, &value); ++i) {
        PyObject* wanted = PyTuple_GET_ITEM(values, i);
        if (key != PyTuple_GET_ITEM(keys, i) || (wanted != Py_Ellipsis && value != wanted)) return false;
    }
    return true;
}

bool holds_some(PyObject* dict, PyObject* keys, PyObject* values) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(values); ++i) {
        PyObject *found = PyDict_GetItem(dict, PyTuple_GET_ITEM(keys, i)), *wanted = PyTuple_GET_ITEM(values, i);
        if (found != (wanted == Py_Ellipsis ? nullptr : wanted)) return false;
    }
    return true;
}

bool holds_items(PyObject* list, PyObject* values) {
    if (PyList_GET_SIZE(list) != PyTuple_GET_SIZE(values)) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(values); ++i)
        if (PyList_GET_ITEM(list, i) != PyTuple_GET_ITEM(values, i)) return false;
    return true;
}

bool holds_function(PyObject* function, PyObject* values) {
    PyObject* found[] = {PyFunction_GET_CODE(function), PyFunction_GET_DEFAULTS(function),
                         PyFunction_GET_KW_DEFAULTS(function)};
    for (Py_ssize_t i = 0; i < 3; ++i)
        if ((found[i] ? found[i] : Py_None) != PyTuple_GET_ITEM(values, i)) return false;
    return true;
}

bool holds(const Shelf& s) {
    PyObject *c = s.container.ptr(), *keys = s.keys.ptr(), *values = s.values.ptr();
    if (PyList_Check(c)) return holds_items(c, values);
    if (PyFunction_Check(c)) return holds_function(c, values);
    if (PyCell_Check(c)) return PyCell_GET(c) == PyTuple_GET_ITEM(values, 0);
    if (!PyDict_Check(c) && !PyType_Check(c))
        return reinterpret_cast<PyObject*>(Py_TYPE(c)) == PyTuple_GET_ITEM(values, 0);
    if (PyType_Check(c)) return holds_some(reinterpret_cast<PyTypeObject*>(c)->tp_dict, keys, values);
    return s.some ? holds_some(c, keys, values) : holds_all(c, keys, values);
}

class Guard {
  public:
    explicit Guard(const py::list& shelves) {
        for (auto item : shelves) {
            auto [container, keys, values, some] = item.cast<std::tuple<py::object, py::tuple, py::tuple, bool>>();
            PyObject* c = container.ptr();
            bool single = PyCell_Check(c) && values.size() == 1;
            bool keyed = (PyDict_Check(c) || PyType_Check(c)) && keys.size() == values.size();
            bool function = PyFunction_Check(c) && values.size() == 3;
            bool other = keys.empty() && values.size() == 1 && !PyDict_Check(c) && !PyType_Check(c);
            if (!PyList_Check(c) && !single && !keyed && !function && !other)
                throw py::type_error("guard: expected dicts, lists, classes, cells, functions or other objects");
            shelves_.push_back({container, keys, values, some});
        }
    }

    bool check() const {
        for (const Shelf& s : shelves_)
            if (!holds(s)) return false;
        return true;
    }

  private:
    std::vector<Shelf> shelves_;
};

}  // namespace

void maml_fast::bind_guard(py::module_& m) {
    py::class_<Guard>(m, "Guard").def(py::init<const py::list&>()).def("check", &Guard::check);
}
