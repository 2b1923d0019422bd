// Rows of token ids, as one run of values with segment bounds, turned into the arrays of a TokenBatch.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include <pybind11/stl.h>

#include "native.hpp"

namespace py = pybind11;

namespace {

constexpr int64_t kIgnored = -100;  // label of a token that is not scored

template <typename T>
using Values = py::array_t<T, py::array::c_style>;

// Calls `visit` with a typed pointer to the values of `array`, which must be int32 or int64.
template <typename Visit>
auto with_integers(const py::array& array, Visit&& visit) {
    if (array.ndim() != 1 || (array.size() > 1 && array.strides(0) != array.itemsize()))
        throw std::invalid_argument("token values must be one contiguous run");
    if (array.dtype().is(py::dtype::of<int32_t>())) return visit(static_cast<const int32_t*>(array.data()));
    if (array.dtype().is(py::dtype::of<int64_t>())) return visit(static_cast<const int64_t*>(array.data()));
    throw std::invalid_argument("token values must be int32 or int64");
}

// Index of the first value outside [0, limit) (and, where `ignored_allowed`, other than -100), or -1.
int64_t first_invalid(const py::array& values, int64_t limit, bool ignored_allowed) {
    const int64_t size = values.size();
    return with_integers(values, [&](const auto* value) -> int64_t {
        py::gil_scoped_release unlocked;
        constexpr int64_t kBlock = 4096;  // tested as a whole, so that the loop vectorises
        for (int64_t from = 0; from < size; from += kBlock) {
            const int64_t to = std::min(size, from + kBlock);
            bool invalid = false;
            for (int64_t i = from; i < to; ++i)
                invalid |= (value[i] < 0 || value[i] >= limit) && !(ignored_allowed && value[i] == kIgnored);
            if (!invalid) continue;
            for (int64_t i = from; i < to; ++i)
                if ((value[i] < 0 || value[i] >= limit) && !(ignored_allowed && value[i] == kIgnored)) return i;
        }
        return -1;
    });
}

struct Shape {
    int64_t num_segments;
    int64_t num_tokens;
    int64_t width;   // 0: flat, else length of a padded row
    int64_t padded;  // elements of input_ids
};

// The token that segment s starts at in the output: back to back, or at the start of its padded row.
int64_t first_element(const Shape& shape, const int64_t* bounds, int64_t s) {
    return shape.width ? s * shape.width : bounds[s];
}

template <typename Label>
int64_t count_scored(const Shape& shape, const int64_t* bounds, const Label* labels) {
    int64_t count = 0;
    for (int64_t s = 0; s < shape.num_segments; ++s) {
        if (!labels) count += std::max<int64_t>(0, bounds[s + 1] - bounds[s] - 1);
        else
            for (int64_t j = bounds[s] + 1; j < bounds[s + 1]; ++j) count += labels[j] != kIgnored;
    }
    return count;
}

struct Outputs {
    int64_t *input_ids, *position_ids, *mask, *source, *targets, *row;
    int32_t* cu_seqlens;
    float* weight;
};

template <typename Id, typename Label>
void fill_segments(const Shape& shape, const int64_t* bounds, const Id* ids, const Label* labels, const float* weights,
                   int64_t pad_id, const Outputs& out) {
    int64_t n = 0;
    for (int64_t s = 0; s < shape.num_segments; ++s) {
        const int64_t from = bounds[s], length = bounds[s + 1] - from, to = first_element(shape, bounds, s);
        out.cu_seqlens[s] = static_cast<int32_t>(from);
        for (int64_t j = 0; j < length; ++j) out.input_ids[to + j] = ids[from + j];
        for (int64_t j = 0; j < length; ++j) out.position_ids[to + j] = j;
        for (int64_t j = 1; j < length; ++j) {
            const int64_t target = labels ? static_cast<int64_t>(labels[from + j]) : static_cast<int64_t>(ids[from + j]);
            if (labels && target == kIgnored) continue;
            out.source[n] = to + j - 1;
            out.targets[n] = target;
            out.row[n] = s;
            out.weight[n++] = weights ? weights[from + j] : 1.0f;
        }
        if (!shape.width) continue;
        std::fill_n(out.mask + to, length, 1);
        std::fill_n(out.mask + to + length, shape.width - length, 0);
        std::fill_n(out.input_ids + to + length, shape.width - length, pad_id);
        std::fill_n(out.position_ids + to + length, shape.width - length, std::max<int64_t>(0, length - 1));
    }
    out.cu_seqlens[shape.num_segments] = static_cast<int32_t>(shape.num_tokens);
    if (shape.width) return;
    for (int64_t j = shape.num_tokens; j < shape.padded; ++j) {  // the tail of a flat batch: segments of one pad token
        out.input_ids[j] = pad_id;
        out.position_ids[j] = 0;
        out.cu_seqlens[shape.num_segments + 1 + j - shape.num_tokens] = static_cast<int32_t>(j + 1);
    }
}

template <typename T>
T* data_or_null(std::optional<Values<T>>& array) {
    return array ? array->mutable_data() : nullptr;
}

// The arrays of a TokenBatch: (input_ids, position_ids, cu_seqlens, source, targets, row, weight, mask or None).
// `width` 0 asks for a flat batch of `padded` tokens, another value for padded rows of that length.
py::tuple collate(const py::array& ids, const Values<int64_t>& bounds, const std::optional<py::array>& labels,
                  const std::optional<Values<float>>& weights, int64_t width, int64_t padded, int64_t pad_id) {
    const Shape shape{bounds.size() - 1, ids.size(), width, width ? (bounds.size() - 1) * width : padded};
    if (shape.num_segments < 0 || bounds.data()[shape.num_segments] != shape.num_tokens || bounds.data()[0] != 0)
        throw std::invalid_argument("segment bounds must run from 0 to the number of tokens");
    for (int64_t s = 0; s < shape.num_segments; ++s)
        if (bounds.data()[s + 1] < bounds.data()[s] || (width && bounds.data()[s + 1] - bounds.data()[s] > width))
            throw std::invalid_argument("segment bounds must not decrease, nor a segment exceed its padded row");
    if ((labels && labels->size() != ids.size()) || (weights && weights->size() != ids.size()))
        throw std::invalid_argument("labels and weights must be as many as the tokens");
    if (!width && padded < shape.num_tokens) throw std::invalid_argument("fewer padded than real tokens");
    if (shape.padded > std::numeric_limits<int32_t>::max())
        throw std::invalid_argument("a batch of " + std::to_string(shape.padded) + " tokens is too large: cu_seqlens is int32");

    auto run = [&](const auto* id, const auto* label) -> py::tuple {
        int64_t scored = 0;
        {
            py::gil_scoped_release unlocked;
            scored = count_scored(shape, bounds.data(), label);
        }
        Values<int64_t> input_ids(shape.padded), positions(shape.padded), source(scored), targets(scored), row(scored);
        Values<int32_t> cu_seqlens(shape.num_segments + 1 + (width ? 0 : padded - shape.num_tokens));
        Values<float> weight(scored);
        std::optional<Values<int64_t>> mask;
        if (width) mask.emplace(shape.padded);
        const Outputs out{input_ids.mutable_data(), positions.mutable_data(), data_or_null(mask),
                          source.mutable_data(),    targets.mutable_data(),   row.mutable_data(),
                          cu_seqlens.mutable_data(), weight.mutable_data()};
        const float* given = weights ? weights->data() : nullptr;
        {
            py::gil_scoped_release unlocked;
            fill_segments(shape, bounds.data(), id, label, given, pad_id, out);
        }
        return py::make_tuple(input_ids, positions, cu_seqlens, source, targets, row, weight, mask);
    };
    return with_integers(ids, [&](const auto* id) {
        if (!labels) return run(id, static_cast<const int64_t*>(nullptr));
        return with_integers(*labels, [&](const auto* label) { return run(id, label); });
    });
}

}  // namespace

void bind_collation(py::module_& module) {
    module.def("first_invalid", &first_invalid, py::arg("values"), py::arg("limit"), py::arg("ignored_allowed"));
    module.def("collate", &collate, py::arg("ids"), py::arg("bounds"), py::arg("labels"), py::arg("weights"),
               py::arg("width"), py::arg("padded"), py::arg("pad_id"));
}
