// The names that Python and C++ share, each table written once: an entry is its name and the names of its fields.
// Python looks everything up by name and compares its own tables with these when it imports the core.
#pragma once

// Layers. `activation` is any of the next table.
#define MAML_FAST_OP_KINDS(X) \
    X(linear)                 \
    X(activation)             \
    X(batch_norm)             \
    X(running_norm)           \
    X(layer_norm)             \
    X(affine)                 \
    X(add)                    \
    X(cat)                    \
    X(conv)                   \
    X(group_norm)             \
    X(max_pool)               \
    X(avg_pool)               \
    X(transpose)              \
    X(pad)                    \
    X(upsample)               \
    X(parameter)              \
    X(constant)               \
    X(target)                 \
    X(input)                  \
    X(draw)                   \
    X(lookup)                 \
    X(check)                  \
    X(pointwise)              \
    X(linear_map)             \
    X(matmul)                 \
    X(softmax)                \
    X(log_softmax)            \
    X(max)

// Activations and their attributes, in the order of an operation's f0, f1.
#define MAML_FAST_ACTIVATIONS(X)  \
    X(relu)                       \
    X(leaky_relu, negative_slope) \
    X(elu, alpha, steepness)      \
    X(gelu)                       \
    X(gelu_tanh)                  \
    X(silu)                       \
    X(tanh)                       \
    X(sigmoid)                    \
    X(softplus, beta, threshold)  \
    X(sine, w0)                   \
    X(clamp, low, high)           \
    X(hardswish)                  \
    X(mish)

// Primitives of expressions and their arguments.
#define MAML_FAST_PRIMITIVES(X) \
    X(add, a, b)                \
    X(sub, a, b)                \
    X(mul, a, b)                \
    X(div, a, b)                \
    X(neg, a)                   \
    X(abs, a)                   \
    X(sign, a)                  \
    X(exp, a)                   \
    X(expm1, a)                 \
    X(log, a)                   \
    X(log1p, a)                 \
    X(sqrt, a)                  \
    X(sin, a)                   \
    X(cos, a)                   \
    X(tanh, a)                  \
    X(sigmoid, a)               \
    X(erf, a)                   \
    X(pow, a, b)                \
    X(fmod, a, b)               \
    X(floor, a)                 \
    X(ceil, a)                  \
    X(round, a)                 \
    X(trunc, a)                 \
    X(minimum, a, b)            \
    X(maximum, a, b)            \
    X(lt, a, b)                 \
    X(le, a, b)                 \
    X(eq, a, b)                 \
    X(where, a, b, c)

#define MAML_FAST_LOSSES(X) \
    X(mse)                  \
    X(cross_entropy)        \
    X(bce_with_logits)      \
    X(l1)                   \
    X(huber)                \
    X(value)

// Instructions and their operands: slots, tapes and flags, as in maml_fast/algorithms/program.py.
#define MAML_FAST_INSTRUCTIONS(X)                    \
    X(load, slot, place)                             \
    X(forward, theta, batch, tape, draws)            \
    X(support_loss, tape)                            \
    X(query_loss, tape, seed, weight, add)           \
    X(cotangent, tape)                               \
    X(backward, theta, batch, tape, out, inputs)     \
    X(update, out, theta, gradient, rates)           \
    X(scale, out, vector, rates)                     \
    X(pointwise, function, ins, outs, scalars, sums) \
    X(hvp, theta, tape, vector, out, inputs)         \
    X(add, out, vector)                              \
    X(subtract, out, vector)                         \
    X(rate_gradient, gradient, adjoint, rates)       \
    X(accumulate, vector, weighted)                  \
    X(store_parameters, theta, place)                \
    X(store_gradients, vector)                       \
    X(store_outputs, tape)

namespace maml_fast {

#define MAML_FAST_ENUMERATOR(name, ...) name,
enum class OpKind : int { MAML_FAST_OP_KINDS(MAML_FAST_ENUMERATOR) };
enum class Act : int { MAML_FAST_ACTIVATIONS(MAML_FAST_ENUMERATOR) };
enum class Primitive : int { MAML_FAST_PRIMITIVES(MAML_FAST_ENUMERATOR) };
enum class LossKind : int { MAML_FAST_LOSSES(MAML_FAST_ENUMERATOR) };
enum class Code : int { MAML_FAST_INSTRUCTIONS(MAML_FAST_ENUMERATOR) };
#undef MAML_FAST_ENUMERATOR

}  // namespace maml_fast
