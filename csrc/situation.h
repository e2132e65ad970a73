// What a call's plan depends on beside settings, in one look.
#pragma once

#include "guard.h"
#include "tensors.h"

namespace maml_fast {

// The Python state of model and loss, the kinds of the parameters, which the guards hold, and of the batch.
class Situation {
  public:
    Situation(const pybind11::object& model, const pybind11::object& loss, const pybind11::list& parameters,
              const pybind11::list& batch)
        : guards_{model, loss},
          model_(model.cast<const Guard&>()),
          loss_(loss.cast<const Guard&>()),
          parameters_(parameters),
          kinds_(parameters),
          batch_(batch, false) {}

    // Whether the situation is this one again for a batch.
    bool holds(pybind11::handle x_s, pybind11::handle y_s, pybind11::handle x_q, pybind11::handle y_q) const {
        return batch_.same({x_s, y_s, x_q, y_q}) && model_.check() && loss_.check() && kinds_.same(parameters_);
    }

  private:
    pybind11::object guards_[2];  // own the two
    const Guard &model_, &loss_;
    pybind11::list parameters_;
    Kinds kinds_, batch_;
};

}  // namespace maml_fast
