#include "family_tables.h"

#include <algorithm>

namespace maml_fast {

namespace {

// The steps that the wanted outputs depend on.
std::vector<Step> needed_steps(const ExpressionSpec& spec, const bool* wanted, int places) {
    std::vector<bool> needed(static_cast<std::size_t>(places));
    for (std::size_t i = 0; i < spec.outputs.size(); ++i)
        if (!wanted || wanted[i]) needed[std::size_t(spec.outputs[i])] = true;
    std::vector<Step> steps;
    for (auto step = spec.steps.rbegin(); step != spec.steps.rend(); ++step) {
        if (!needed[std::size_t(step->out)]) continue;
        needed[std::size_t(step->out)] = false;
        for (int argument : {step->a, step->b, step->c})
            if (argument >= 0) needed[std::size_t(argument)] = true;
        steps.push_back(*step);
    }
    std::reverse(steps.begin(), steps.end());
    return steps;
}

bool contiguous(const Pointwise& p, int operand) {
    long expected = 1;
    for (int axis = p.axes - 1; axis >= 0; --axis) {
        if (p.sizes[axis] != 1 && p.strides[operand][axis] != expected) return false;
        expected *= p.sizes[axis];
    }
    return true;
}

// Counts how often a box writes each element: at out + Σ i·stride.
void count_writes(const Box& box, long start, const long* strides, std::vector<int>& written) {
    long total = 1;
    for (int axis = 0; axis < box.axes; ++axis) total *= box.sizes[axis];
    for (long i = 0; i < total; ++i) {
        long at = start, rest = i;
        for (int axis = box.axes - 1; axis >= 0; --axis) {
            at += rest % box.sizes[axis] * strides[axis];
            rest /= box.sizes[axis];
        }
        ++written[std::size_t(at)];
    }
}

bool each_once(const std::vector<int>& written) {
    return std::all_of(written.begin(), written.end(), [](int n) { return n == 1; });
}

// Axes along which both sides go in step become one; the innermost is one that is contiguous on both sides.
Box arranged(Box box) {
    int kept = 0;
    for (int axis = 0; axis < box.axes; ++axis) {
        if (box.sizes[axis] == 1) continue;
        box.sizes[kept] = box.sizes[axis];
        box.in_strides[kept] = box.in_strides[axis];
        box.out_strides[kept++] = box.out_strides[axis];
    }
    box.axes = kept;
    auto swap = [&](int a, int b) {
        std::swap(box.sizes[a], box.sizes[b]);
        std::swap(box.in_strides[a], box.in_strides[b]);
        std::swap(box.out_strides[a], box.out_strides[b]);
    };
    for (int axis = box.axes - 1; axis > 0; --axis)
        for (int other = axis - 1; other >= 0; --other)
            if (box.in_strides[other] == box.in_strides[axis] * box.sizes[axis] &&
                box.out_strides[other] == box.out_strides[axis] * box.sizes[axis]) {
                box.sizes[axis] *= box.sizes[other];
                for (int i = other; i + 1 < box.axes; ++i) swap(i, i + 1);
                --box.axes;
                axis = box.axes;
                break;
            }
    for (int axis = 0; axis + 1 < box.axes; ++axis)
        if (box.in_strides[axis] == 1 && box.out_strides[axis] == 1) swap(axis, box.axes - 1);
    return box;
}

}  // namespace

PointwiseTables::PointwiseTables(const OpSpec& op, const std::vector<long>& features, const bool* wanted) {
    const PointwiseSpec& spec = op.pointwise;
    view_.operands = int(op.inputs.size());
    view_.axes = int(spec.sizes.size());
    std::copy(spec.sizes.begin(), spec.sizes.end(), view_.sizes);
    for (int j = 0; j < view_.operands; ++j) {
        std::copy(spec.strides[std::size_t(j)].begin(), spec.strides[std::size_t(j)].end(), view_.strides[j]);
        view_.whole[j] =
            contiguous(view_, j) && features[std::size_t(op.inputs[std::size_t(j)])] == features[std::size_t(op.out)];
    }
    view_.value = expression(spec.value, nullptr);
    view_.backward = expression(spec.backward, wanted);
    view_.tangent = expression(spec.tangent, nullptr);
    view_.backward_tangent = expression(spec.backward_tangent, wanted);
}

Expression PointwiseTables::expression(const ExpressionSpec& spec, const bool* wanted) {
    kept_.push_back(std::make_unique<ExpressionSpec>(spec));
    ExpressionSpec& kept = *kept_.back();
    const int places = first_constant(view_) + int(spec.constants.size()) + spec.registers;
    kept.steps = needed_steps(spec, wanted, places);
    return {kept.constants.data(), int(kept.constants.size()), places, kept.steps.data(), int(kept.steps.size()),
            kept.outputs.data(),   int(kept.outputs.size())};
}

LinearMapTables::LinearMapTables(const OpSpec& op, const std::vector<long>& features) {
    std::vector<int> written(std::size_t(features[std::size_t(op.out)]));
    transposed_ = std::make_unique<bool[]>(op.inputs.size());
    for (const Box& box : op.boxes) {
        count_writes(box, box.out, box.out_strides, written);
        boxes_.push_back(arranged(box));
    }
    for (std::size_t j = 0; j < op.inputs.size(); ++j) {
        std::vector<int> read(std::size_t(features[std::size_t(op.inputs[j])]));
        for (const Box& box : op.boxes)
            if (box.input == int(j)) count_writes(box, box.in, box.in_strides, read);
        transposed_[j] = each_once(read);
    }
    view_ = {boxes_.data(), int(boxes_.size()), each_once(written), transposed_.get(), op.mean};
}

}  // namespace maml_fast
