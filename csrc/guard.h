// The guard of captured plans: whether Python containers still hold the very objects that they held.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace maml_fast {

class Guard {
  public:
    // Of (container, keys, values, some): dicts, lists, classes, closure cells, functions, and any other objects.
    explicit Guard(const pybind11::list& shelves);
    bool check() const;

  private:
    enum class Kind { dict, entries, list, cell, function, instance };

    // A key and the object that belongs there. An Ellipsis stands for anything, among named entries for nothing.
    struct Item {
        PyObject *key, *value;
    };

    // What one container must hold; of an instance, its class.
    struct Shelf {
        Kind kind;
        PyObject* container;
        std::size_t begin, end;  // of its items
    };

    void add(const pybind11::tuple& shelf);
    bool holds(const Shelf& shelf) const;

    pybind11::list alive_;          // all that the addresses below point to
    std::vector<PyObject*> empty_;  // dicts, most of those that modules have, which one loop asks for their size
    std::vector<Shelf> shelves_;
    std::vector<Item> items_;
};

}  // namespace maml_fast
