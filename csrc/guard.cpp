#include "guard.h"

#include <tuple>

namespace py = pybind11;

namespace maml_fast {

namespace {

PyObject* or_none(PyObject* object) { return object ? object : Py_None; }

}  // namespace

Guard::Guard(const py::list& shelves) {
    for (auto shelf : shelves) add(shelf.cast<py::tuple>());
}

// A list or dict is compared whole and in order; with `some`, as of a class, only the named entries.
void Guard::add(const py::tuple& shelf) {
    auto [container, keys, values, some] = shelf.cast<std::tuple<py::object, py::tuple, py::tuple, bool>>();
    PyObject* c = container.ptr();
    const bool dict = PyDict_Check(c), type = PyType_Check(c), keyed = keys.size() == values.size();
    const bool single = keys.empty() && values.size() == 1;
    Kind kind;
    if (PyList_Check(c))
        kind = Kind::list;
    else if (PyFunction_Check(c) && values.size() == 3)
        kind = Kind::function;
    else if (PyCell_Check(c) && values.size() == 1)
        kind = Kind::cell;
    else if ((dict || type) && keyed)
        kind = type || some ? Kind::entries : Kind::dict;
    else if (!dict && !type && single)
        kind = Kind::instance;
    else
        throw py::type_error("guard: expected dicts, lists, classes, cells, functions or other objects");
    alive_.append(py::make_tuple(container, keys, values));
    if (kind == Kind::dict && keys.empty()) {
        empty_.push_back(c);
        return;
    }
    const std::size_t begin = items_.size();
    for (std::size_t i = 0; i < values.size(); ++i)
        items_.push_back({keyed ? PyTuple_GET_ITEM(keys.ptr(), Py_ssize_t(i)) : nullptr,
                          PyTuple_GET_ITEM(values.ptr(), Py_ssize_t(i))});
    shelves_.push_back({kind, c, begin, items_.size()});
}

bool Guard::holds(const Shelf& shelf) const {
    PyObject* c = shelf.container;
    const Item *item = items_.data() + shelf.begin, *end = items_.data() + shelf.end;
    switch (shelf.kind) {
        case Kind::dict: {
            if (PyDict_GET_SIZE(c) != end - item) return false;
            PyObject *key, *value;
            for (Py_ssize_t at = 0; PyDict_Next(c, &at, &key, &value); ++item)
                if (key != item->key || (item->value != Py_Ellipsis && value != item->value)) return false;
            return true;
        }
        case Kind::entries:
            if (PyType_Check(c)) c = reinterpret_cast<PyTypeObject*>(c)->tp_dict;
            for (; item != end; ++item)
                if (PyDict_GetItem(c, item->key) != (item->value == Py_Ellipsis ? nullptr : item->value)) return false;
            return true;
        case Kind::list:
            if (PyList_GET_SIZE(c) != end - item) return false;
            for (Py_ssize_t i = 0; i < end - item; ++i)
                if (PyList_GET_ITEM(c, i) != item[i].value) return false;
            return true;
        case Kind::cell:
            return PyCell_GET(c) == item->value;
        case Kind::function:
            return or_none(PyFunction_GET_CODE(c)) == item[0].value &&
                   or_none(PyFunction_GET_DEFAULTS(c)) == item[1].value &&
                   or_none(PyFunction_GET_KW_DEFAULTS(c)) == item[2].value;
        case Kind::instance:
            return reinterpret_cast<PyObject*>(Py_TYPE(c)) == item->value;
    }
    return false;
}

bool Guard::check() const {
    for (PyObject* dict : empty_)
        if (PyDict_GET_SIZE(dict) != 0) return false;
    for (const Shelf& shelf : shelves_)
        if (!holds(shelf)) return false;
    return true;
}

}  // namespace maml_fast
