// Layer kernels on CPU: RMSNorm with a residual, SwiGLU and rotary embedding, forward and backward; fp32 inside.
// The maths stands in kernels/fastalign_kernels/layers. Widths are multiples of 16, so that no row has a ragged end.
// Each row is computed by one thread and sums over rows go by blocks of fixed size: the number of threads changes no bit.
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu.hpp"
#include "native.hpp"
#include "rows_lanes.hpp"

namespace py = pybind11;

namespace layers {

using rows::BFloat16;
using rows::Float32;
using rows::Lanes;
using rows::splat;

constexpr int64_t ROWS_OF_A_SUM = 64;           // rows whose share of a weight's gradient is added up in one place
constexpr int64_t WORK_PER_THREAD = 64 * 1024;  // numbers; less is not worth starting a thread

int64_t norm_blocks(int64_t num_rows) { return (num_rows + ROWS_OF_A_SUM - 1) / ROWS_OF_A_SUM; }

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <int W>
ROWS_INLINE float sum_lanes(const typename Lanes<W>::F& x) {
    float total = 0;
    for (int i = 0; i < W; ++i) total += x[i];
    return total;
}

template <int W>
ROWS_INLINE typename Lanes<W>::F sigmoid(const typename Lanes<W>::F& x) {
    using F = typename Lanes<W>::F;
    const F e = rows::exponential<W>(x < F{} ? x : -x), share = 1.0f / (1.0f + e);
    return x < F{} ? e * share : share;
}

struct NormForward {  // strides in elements; residual null: none, and nothing is summed
    const float *x, *residual, *weight;
    float *out, *summed, *rstd;
    int64_t width, x_stride, residual_stride;
    float eps, offset;

    template <int W>
    __attribute__((always_inline)) inline void rows(int64_t begin, int64_t end) const {
        using F = typename Lanes<W>::F;
        for (int64_t row = begin; row < end; ++row) {
            const float* from = x + row * x_stride;
            F squares{};
            if (residual) {
                float* sum = summed + row * width;
                for (int64_t i = 0; i < width; i += W) {
                    const F s = Float32::load<W>(from + i) + Float32::load<W>(residual + row * residual_stride + i);
                    Float32::store<W>(sum + i, s);
                    squares += s * s;
                }
                from = sum;
            } else {
                for (int64_t i = 0; i < width; i += W) {
                    const F s = Float32::load<W>(from + i);
                    squares += s * s;
                }
            }
            const float r = 1.0f / std::sqrt(sum_lanes<W>(squares) / static_cast<float>(width) + eps);
            rstd[row] = r;
            for (int64_t i = 0; i < width; i += W) {
                const F scale = Float32::load<W>(weight + i) + offset;
                Float32::store<W>(out + row * width + i, Float32::load<W>(from + i) * r * scale);
            }
        }
    }
};

struct NormBackward {  // one "row" is a block of ROWS_OF_A_SUM rows; partial (blocks, width) null: frozen weight
    const float *grad, *grad_sum, *x, *weight, *rstd;
    float *grad_x, *partial;
    int64_t num_rows, width, grad_stride, grad_sum_stride, x_stride;
    float offset;

    template <int W>
    __attribute__((always_inline)) inline void rows(int64_t begin, int64_t end) const {
        using F = typename Lanes<W>::F;
        for (int64_t block = begin; block < end; ++block) {
            float* part = partial ? partial + block * width : nullptr;
            if (part) std::fill(part, part + width, 0.0f);
            const int64_t stop = std::min((block + 1) * ROWS_OF_A_SUM, num_rows);
            for (int64_t row = block * ROWS_OF_A_SUM; row < stop; ++row) {
                const float *g = grad + row * grad_stride, *from = x + row * x_stride;
                const float r = rstd[row];
                F along{};
                for (int64_t i = 0; i < width; i += W) {
                    const F normed = Float32::load<W>(from + i) * r, given = Float32::load<W>(g + i);
                    along += given * (Float32::load<W>(weight + i) + offset) * normed;
                    if (part) Float32::store<W>(part + i, Float32::load<W>(part + i) + given * normed);
                }
                const float mean = sum_lanes<W>(along) / static_cast<float>(width);
                for (int64_t i = 0; i < width; i += W) {
                    const F normed = Float32::load<W>(from + i) * r;
                    const F given = Float32::load<W>(g + i) * (Float32::load<W>(weight + i) + offset);
                    F result = (given - normed * mean) * r;
                    if (grad_sum) result += Float32::load<W>(grad_sum + row * grad_sum_stride + i);
                    Float32::store<W>(grad_x + row * width + i, result);
                }
            }
        }
    }
};

template <class S>
struct Glu {  // grad null: forward, to `first`; else the gradients of gate and up, to `first` and `second`
    using E = typename S::Element;
    const E *grad, *gate, *up;
    E *first, *second;
    int64_t width, grad_stride, gate_stride, up_stride, first_stride, second_stride;

    template <int W>
    __attribute__((always_inline)) inline void rows(int64_t begin, int64_t end) const {
        using F = typename Lanes<W>::F;
        for (int64_t row = begin; row < end; ++row) {
            for (int64_t i = 0; i < width; i += W) {
                const F x = S::template load<W>(gate + row * gate_stride + i);
                const F u = S::template load<W>(up + row * up_stride + i), share = sigmoid<W>(x);
                if (!grad) {
                    S::template store<W>(first + row * first_stride + i, x * share * u);
                    continue;
                }
                const F g = S::template load<W>(grad + row * grad_stride + i);
                S::template store<W>(first + row * first_stride + i, g * u * share * (1.0f + x * (1.0f - share)));
                S::template store<W>(second + row * second_stride + i, g * x * share);
            }
        }
    }
};

template <class S>
struct Rope {  // tokens (rows of the batch times `length`), each with `heads` heads of `half` angles and `rest` behind
    using E = typename S::Element;
    const E* from;
    E* to;  // dense, or `from` itself with its strides
    const float *cos, *sin;
    int64_t length, heads, half, rest, from_strides[3], to_strides[3], angle_row_stride, angle_stride;
    bool inverse;

    template <int W>
    __attribute__((always_inline)) inline void rows(int64_t begin, int64_t end) const {
        using F = typename Lanes<W>::F;
        for (int64_t token = begin; token < end; ++token) {
            const int64_t row = token / length, place = token % length;
            const float *c = cos + row * angle_row_stride + place * angle_stride,
                        *s = sin + row * angle_row_stride + place * angle_stride;
            for (int64_t head = 0; head < heads; ++head) {
                const E* x = from + row * from_strides[0] + place * from_strides[1] + head * from_strides[2];
                E* y = to + row * to_strides[0] + place * to_strides[1] + head * to_strides[2];
                for (int64_t i = 0; i < half; i += W) {
                    const F a = S::template load<W>(x + i), b = S::template load<W>(x + half + i);
                    const F turn = Float32::load<W>(s + i), by = inverse ? -turn : turn, k = Float32::load<W>(c + i);
                    S::template store<W>(y + i, a * k - b * by);
                    S::template store<W>(y + half + i, b * k + a * by);
                }
                if (x != y) std::copy(x + 2 * half, x + 2 * half + rest, y + 2 * half);
            }
        }
    }
};

template <class Job>
void rows_plain(const Job& job, int64_t begin, int64_t end) {
    job.template rows<4>(begin, end);
}
#ifdef CPU_X86
template <class Job>
CPU_AVX2 void rows_avx2(const Job& job, int64_t begin, int64_t end) {
    job.template rows<8>(begin, end);
}
template <class Job>
CPU_AVX512 void rows_avx512(const Job& job, int64_t begin, int64_t end) {
    job.template rows<16>(begin, end);
}
#endif

template <class Job>
void run(const Job& job, int64_t num_rows, int64_t numbers, int64_t num_threads, const std::string& wanted) {
    void (*rows)(const Job&, int64_t, int64_t) = rows_plain<Job>;
#ifdef CPU_X86
    const std::string chosen = cpu::instruction_set(wanted);
    if (chosen == "avx512") rows = rows_avx512<Job>;
    if (chosen == "avx2") rows = rows_avx2<Job>;
#endif
    py::gil_scoped_release unlocked;
    cpu::over_rows(num_rows, std::min(num_threads, numbers / WORK_PER_THREAD),
                   [&](int64_t begin, int64_t end) { rows(job, begin, end); });
}

template <class S>
void glu(uintptr_t grad, uintptr_t gate, uintptr_t up, uintptr_t first, uintptr_t second, int64_t num_rows,
         int64_t width, const std::vector<int64_t>& strides, int64_t num_threads, const std::string& isa) {
    using E = typename S::Element;
    const Glu<S> job{at<const E>(grad), at<const E>(gate), at<const E>(up), at<E>(first), at<E>(second), width,
                     strides.at(0),     strides.at(1),     strides.at(2),   strides.at(3), strides.at(4)};
    run(job, num_rows, num_rows * width, num_threads, isa);
}

template <class S>
void rope(uintptr_t from, uintptr_t to, uintptr_t cos, uintptr_t sin, const std::vector<int64_t>& shape,
          const std::vector<int64_t>& strides, bool inverse, int64_t num_threads, const std::string& isa) {
    using E = typename S::Element;
    const int64_t length = shape.at(1), heads = shape.at(2), half = shape.at(3), rest = shape.at(4);
    const Rope<S> job{at<const E>(from), at<E>(to), at<const float>(cos), at<const float>(sin), length, heads, half,
                      rest, {strides.at(0), strides.at(1), strides.at(2)}, {strides.at(3), strides.at(4), strides.at(5)},
                      strides.at(6), strides.at(7), inverse};
    const int64_t tokens = shape.at(0) * length;
    run(job, tokens, tokens * heads * (2 * half + rest), num_threads, isa);
}

}  // namespace layers

void bind_layers(py::module_& module) {
    using namespace layers;
    module.def(
        "norm_forward",
        [](uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t out, uintptr_t summed, uintptr_t rstd,
           int64_t num_rows, int64_t width, int64_t x_stride, int64_t residual_stride, float eps, float offset,
           int64_t num_threads, const std::string& isa) {
            using C = const float;
            run(NormForward{at<C>(x), at<C>(residual), at<C>(weight), at<float>(out), at<float>(summed),
                            at<float>(rstd), width, x_stride, residual_stride, eps, offset},
                num_rows, num_rows * width, num_threads, isa);
        },
        "RMSNorm of fp32 rows, behind the addition of a residual where there is one.");
    module.def(
        "norm_backward",
        [](uintptr_t grad, uintptr_t grad_sum, uintptr_t x, uintptr_t weight, uintptr_t rstd, uintptr_t grad_x,
           uintptr_t partial, int64_t num_rows, int64_t width, int64_t grad_stride, int64_t grad_sum_stride,
           int64_t x_stride, float offset, int64_t num_threads, const std::string& isa) {
            using C = const float;
            const NormBackward job{at<C>(grad), at<C>(grad_sum), at<C>(x), at<C>(weight), at<C>(rstd),
                                   at<float>(grad_x), at<float>(partial), num_rows, width, grad_stride,
                                   grad_sum_stride, x_stride, offset};
            run(job, norm_blocks(num_rows), num_rows * width, num_threads, isa);
        },
        "Gradients of RMSNorm's rows, and of its weight in parts to be added up.");
    module.def(
        "glu",
        [](bool is_bfloat16, uintptr_t grad, uintptr_t gate, uintptr_t up, uintptr_t first, uintptr_t second,
           int64_t num_rows, int64_t width, const std::vector<int64_t>& strides, int64_t num_threads,
           const std::string& isa) {
            (is_bfloat16 ? glu<BFloat16> : glu<Float32>)(grad, gate, up, first, second, num_rows, width, strides,
                                                         num_threads, isa);
        },
        "silu(gate) * up, or with `grad` the gradients of both; strides of grad, gate, up, first, second.");
    module.def(
        "rope",
        [](bool is_bfloat16, uintptr_t from, uintptr_t to, uintptr_t cos, uintptr_t sin,
           const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, bool inverse, int64_t num_threads,
           const std::string& isa) {
            (is_bfloat16 ? rope<BFloat16> : rope<Float32>)(from, to, cos, sin, shape, strides, inverse, num_threads,
                                                           isa);
        },
        "Heads (B, L, H, K) rotated; shape B, L, H, half, rest, strides of from, to (three each), and of the angles.");
    module.def("norm_blocks", &norm_blocks, "How many parts a weight's gradient has of so many rows.");
}
