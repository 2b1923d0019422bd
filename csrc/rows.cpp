// Row kernels of the language-model head on CPU: one row of logits -> statistics, and its gradient in place.
// The maths and the meaning of each number stand in kernels/fastalign_kernels/head/rows.py; fp32 inside, sums of
// blocks in double. A row is handled by one thread, so results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu.hpp"
#include "native.hpp"
#include "rows_lanes.hpp"

namespace py = pybind11;

namespace rows {

constexpr int64_t BLOCK = 2048;                  // fp32 numbers of a row held in L1 between the passes
constexpr int64_t AHEAD = 2048;                  // bytes; prefetchers of the hardware stop at each page
constexpr float LOWEST = -104.0f;                // e^x is 0 in fp32 from here down
constexpr int64_t WORK_PER_THREAD = 128 * 1024;  // logits; less is not worth starting a thread

// The logits that both kernels read, and how they are formed: z = softcap * tanh(scale * m / softcap) / temperature.
struct Logits {
    void* data = nullptr;
    bool is_bfloat16 = false;
    int64_t num_rows = 0, vocabulary = 0, stride = 0;  // stride in elements
    const int64_t* targets = nullptr;     // -1: the target's column is not here
    const float* temperatures = nullptr;  // one per row, or null: `temperature`
    float scale = 1, softcap = 0, temperature = 1;

    float inverse_temperature(int64_t row) const { return 1.0f / (temperatures ? temperatures[row] : temperature); }
};

struct Statistics {
    float *logp, *lse, *entropy, *mean_logit, *log_sum_p2;  // null where not wanted
    bool* top1;
};

struct Coefficients {  // dL/d(statistic) per row; null is zero
    const float *logp, *entropy, *mean_logp, *mean_logit, *log_sum_p2;
    const float *lse_value, *entropy_value, *log_sum_p2_value;
};

template <int W>
ROWS_INLINE float sum_lanes(const typename Lanes<W>::F& x) {
    float total = 0;
    for (int i = 0; i < W; ++i) total += x[i];
    return total;
}

ROWS_INLINE void fetch_ahead(const void* from) { __builtin_prefetch(static_cast<const char*>(from) + AHEAD); }

template <class S, int W>
ROWS_INLINE typename Lanes<W>::F load_tail(const typename S::Element* from, int64_t count) {
    typename S::Element padded[W] = {};
    std::copy(from, from + count, padded);
    return S::template load<W>(padded);
}

template <int W, bool CAP>
ROWS_INLINE typename Lanes<W>::F form(const typename Lanes<W>::F& m, float inner, float outer) {
    if constexpr (CAP) return tanh<W>(m * inner) * outer;
    return m * inner;
}

// sums of e = exp(d), e * d and e * e over a block of d = z - shift
template <int W, bool EXTRA>
ROWS_INLINE void add_block(const float* z, int64_t padded, float shift, double& s, double& t, double& q) {
    using F = typename Lanes<W>::F;
    F vs{}, vt{}, vq{};
    const F vshift = splat<W>(shift), lowest = splat<W>(LOWEST);
    for (int64_t i = 0; i < padded; i += W) {
        F d = Float32::load<W>(z + i) - vshift;
        d = d < lowest ? lowest : d;  // keeps NaN, and -inf out of e * d
        const F e = exponential<W>(d);
        vs += e;
        if constexpr (EXTRA) {
            vt += e * d;
            vq += e * e;
        }
    }
    s += sum_lanes<W>(vs);
    if constexpr (EXTRA) {
        t += sum_lanes<W>(vt);
        q += sum_lanes<W>(vq);
    }
}

// One pass over the row in blocks: sums relative to the largest logit so far, rescaled when a larger one comes.
template <class S, int W, bool CAP, bool EXTRA>
ROWS_INLINE void forward_row(const Logits& logits, const Statistics& out, int64_t row) {
    using F = typename Lanes<W>::F;
    constexpr float infinity = std::numeric_limits<float>::infinity();
    const auto* data = static_cast<const typename S::Element*>(logits.data) + row * logits.stride;
    const int64_t vocabulary = logits.vocabulary, target = logits.targets[row];
    const float inverse = logits.inverse_temperature(row);
    const float inner = CAP ? logits.scale / logits.softcap : logits.scale * inverse, outer = logits.softcap * inverse;
    alignas(64) float z[BLOCK];
    float top = -infinity, target_logit = -infinity;  // without a target here (-1) it stays so
    bool is_best = false;
    double s = 0, t = 0, q = 0, total = 0;
    for (int64_t begin = 0; begin < vocabulary; begin += BLOCK) {
        const int64_t count = std::min(BLOCK, vocabulary - begin), whole = count - count % W;
        F vmax = splat<W>(-infinity), vsum{};
        for (int64_t i = 0; i < whole; i += W) {
            fetch_ahead(data + begin + i);
            const F x = form<W, CAP>(S::template load<W>(data + begin + i), inner, outer);
            vmax = x > vmax ? x : vmax;
            vsum += x;
            Float32::store<W>(z + i, x);
        }
        if (whole < count) {
            const F tail = load_tail<S, W>(data + begin + whole, count - whole);
            Float32::store<W>(z + whole, form<W, CAP>(tail, inner, outer));
            for (int64_t i = whole; i < count; ++i) total += z[i];
            for (int64_t i = count; i < whole + W; ++i) z[i] = -infinity;
            const F x = Float32::load<W>(z + whole);
            vmax = x > vmax ? x : vmax;
        }
        total += sum_lanes<W>(vsum);
        float block_top = vmax[0];
        for (int i = 1; i < W; ++i) block_top = std::max(block_top, vmax[i]);
        const bool is_higher = block_top > top;
        if (is_higher) {
            if (begin > 0 && top > -infinity) {
                const double delta = static_cast<double>(block_top) - top, factor = std::exp(-delta);
                t = factor * (t - delta * s);
                s *= factor;
                q *= factor * factor;
            }
            top = block_top;
            is_best = false;
        }
        if (target >= begin && target < begin + count) {
            target_logit = z[target - begin];
            is_best = is_higher && std::find(z, z + count, top) == z + (target - begin);
        }
        add_block<W, EXTRA>(z, whole + (whole < count ? W : 0), top == -infinity ? 0.0f : top, s, t, q);
    }
    const double log_s = std::log(s);
    if (out.logp) out.logp[row] = static_cast<float>(target_logit - static_cast<double>(top) - log_s);
    if (out.lse) out.lse[row] = static_cast<float>(top + log_s);
    if (out.top1) out.top1[row] = is_best;
    if (out.mean_logit) out.mean_logit[row] = static_cast<float>(total / static_cast<double>(vocabulary));
    if (EXTRA && out.entropy) out.entropy[row] = static_cast<float>(log_s - t / s);
    if (EXTRA && out.log_sum_p2) out.log_sum_p2[row] = static_cast<float>(std::log(q) - 2 * log_s);
}

// g = -p (k0 + k1 log p) + k2 p^2 + k3, then the derivative of the logit's form.
template <int W, bool CAP, bool EXTRA>
ROWS_INLINE typename Lanes<W>::F gradient(
    const typename Lanes<W>::F& m, const float* k, float lse, float inner, float outer, float slope) {
    using F = typename Lanes<W>::F;
    F t{}, g;
    if constexpr (CAP) t = tanh<W>(m * inner);
    F logp = (CAP ? t * outer : m * inner) - lse;
    logp = logp < splat<W>(LOWEST) ? splat<W>(LOWEST) : logp;
    const F p = exponential<W>(logp);
    if constexpr (EXTRA) {
        g = p * (p * k[2] - (logp * k[1] + k[0])) + k[3];
    } else {
        g = k[3] - p * k[0];
    }
    if constexpr (CAP) return g * slope * (1.0f - t * t);
    return g * slope;
}

template <class S, int W, bool CAP, bool EXTRA>
ROWS_INLINE void backward_row(const Logits& logits, const Coefficients& c, int64_t row) {
    auto* data = static_cast<typename S::Element*>(logits.data) + row * logits.stride;
    const int64_t vocabulary = logits.vocabulary, target = logits.targets[row];
    const float inverse = logits.inverse_temperature(row), lse = c.lse_value[row];
    const float inner = CAP ? logits.scale / logits.softcap : logits.scale * inverse, outer = logits.softcap * inverse;
    const float slope = logits.scale * inverse;  // of z in m, without the soft-cap's 1 - t^2
    const auto of = [row](const float* coefficient) { return coefficient ? coefficient[row] : 0.0f; };
    const float a = of(c.logp), b = of(c.entropy), e = of(c.log_sum_p2), on_mean_logp = of(c.mean_logp);
    const float k[4] = {a + on_mean_logp + 2 * e + (b != 0 ? b * c.entropy_value[row] : 0), b,
                        e != 0 ? 2 * e * std::exp(-c.log_sum_p2_value[row]) : 0,
                        (on_mean_logp + of(c.mean_logit)) / static_cast<float>(vocabulary)};
    // the target's 1 is added in fp32 before anything is rounded to the storage type
    typename S::Element at_target[W] = {};
    if (target >= 0) {
        const auto m = load_tail<S, W>(data + target, 1);
        auto one = splat<W>(a * slope);
        if constexpr (CAP) {
            const auto t = tanh<W>(m * inner);
            one *= 1.0f - t * t;
        }
        S::template store<W>(at_target, gradient<W, CAP, EXTRA>(m, k, lse, inner, outer, slope) + one);
    }
    const int64_t whole = vocabulary - vocabulary % W;
    for (int64_t i = 0; i < whole; i += W) {
        fetch_ahead(data + i);
        S::template store<W>(
            data + i, gradient<W, CAP, EXTRA>(S::template load<W>(data + i), k, lse, inner, outer, slope));
    }
    if (whole < vocabulary) {
        typename S::Element tail[W];
        const auto m = load_tail<S, W>(data + whole, vocabulary - whole);
        S::template store<W>(tail, gradient<W, CAP, EXTRA>(m, k, lse, inner, outer, slope));
        std::copy(tail, tail + (vocabulary - whole), data + whole);
    }
    if (target >= 0) data[target] = at_target[0];
}

template <class S, int W, bool CAP, class Job>
ROWS_INLINE void rows_of(const Logits& logits, const Job& job, bool extra, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        if constexpr (std::is_same_v<Job, Statistics>) {
            extra ? forward_row<S, W, CAP, true>(logits, job, row) : forward_row<S, W, CAP, false>(logits, job, row);
        } else {
            extra ? backward_row<S, W, CAP, true>(logits, job, row) : backward_row<S, W, CAP, false>(logits, job, row);
        }
    }
}

template <int W, class Job>
ROWS_INLINE void rows_between(const Logits& logits, const Job& job, bool extra, int64_t begin, int64_t end) {
    const bool cap = logits.softcap != 0;
    if (logits.is_bfloat16) {
        cap ? rows_of<BFloat16, W, true>(logits, job, extra, begin, end)
            : rows_of<BFloat16, W, false>(logits, job, extra, begin, end);
    } else {
        cap ? rows_of<Float32, W, true>(logits, job, extra, begin, end)
            : rows_of<Float32, W, false>(logits, job, extra, begin, end);
    }
}

// The same source compiled for each instruction set; the choice is made at run time, so a wheel runs everywhere.
#define ROWS_FOR(name, width, attribute)                                                                            \
    attribute void name(const Logits& l, const Statistics& j, bool x, int64_t b, int64_t e) {                       \
        rows_between<width>(l, j, x, b, e);                                                                         \
    }                                                                                                               \
    attribute void name(const Logits& l, const Coefficients& j, bool x, int64_t b, int64_t e) {                     \
        rows_between<width>(l, j, x, b, e);                                                                         \
    }

ROWS_FOR(rows_plain, 4, )
#ifdef CPU_X86
ROWS_FOR(rows_avx2, 8, CPU_AVX2)
ROWS_FOR(rows_avx512, 16, CPU_AVX512)
#endif

template <class Job>
void run(const Logits& logits, const Job& job, bool extra, int64_t num_threads, const std::string& wanted) {
    for (int64_t row = 0; row < logits.num_rows; ++row) {
        if (logits.targets[row] < -1 || logits.targets[row] >= logits.vocabulary) {
            throw std::invalid_argument("targets[" + std::to_string(row) + "] of the chunk is " +
                                        std::to_string(logits.targets[row]) + ", allowed are 0 to " +
                                        std::to_string(logits.vocabulary - 1) + ", and -1 for a column elsewhere");
        }
    }
    void (*rows)(const Logits&, const Job&, bool, int64_t, int64_t) = rows_plain;
#ifdef CPU_X86
    const std::string chosen = cpu::instruction_set(wanted);
    if (chosen == "avx512") rows = rows_avx512;
    if (chosen == "avx2") rows = rows_avx2;
#endif
    const int64_t work = logits.num_rows * logits.vocabulary / WORK_PER_THREAD;
    cpu::over_rows(logits.num_rows, std::min(num_threads, work),
                   [&](int64_t begin, int64_t end) { rows(logits, job, extra, begin, end); });
}

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace rows

void bind_rows(py::module_& module) {
    using namespace rows;
    py::class_<Logits>(module, "RowLogits", "A (C, V) block of logits by address, its targets and its logit form.")
        .def(py::init([](uintptr_t data, bool is_bfloat16, int64_t num_rows, int64_t vocabulary, int64_t stride,
                         uintptr_t targets, uintptr_t temperatures, float scale, float softcap, float temperature) {
                 return Logits{at<void>(data), is_bfloat16, num_rows, vocabulary, stride, at<const int64_t>(targets),
                               at<const float>(temperatures), scale, softcap, temperature};
             }),
             py::arg("data"), py::arg("is_bfloat16"), py::arg("num_rows"), py::arg("vocabulary"), py::arg("stride"),
             py::arg("targets"), py::arg("temperatures"), py::arg("scale"), py::arg("softcap"),
             py::arg("temperature"));
    module.def(
        "row_statistics",
        [](const Logits& logits, uintptr_t logp, uintptr_t lse, uintptr_t entropy, uintptr_t top1,
           uintptr_t mean_logit, uintptr_t log_sum_p2, int64_t num_threads, const std::string& isa) {
            py::gil_scoped_release unlocked;
            run(logits, Statistics{at<float>(logp), at<float>(lse), at<float>(entropy), at<float>(mean_logit),
                                   at<float>(log_sum_p2), at<bool>(top1)},
                entropy || log_sum_p2, num_threads, isa);
        },
        "Writes (C,) fp32 statistics to the addresses given (0: not wanted; top1 is bool).", py::arg("logits"),
        py::arg("logp"), py::arg("lse"), py::arg("entropy"), py::arg("top1"), py::arg("mean_logit"),
        py::arg("log_sum_p2"), py::arg("num_threads"), py::arg("isa") = "");
    module.def(
        "row_gradient",
        [](const Logits& logits, uintptr_t on_logp, uintptr_t on_entropy, uintptr_t on_mean_logp,
           uintptr_t on_mean_logit, uintptr_t on_log_sum_p2, uintptr_t lse, uintptr_t entropy, uintptr_t log_sum_p2,
           int64_t num_threads, const std::string& isa) {
            using C = const float;
            py::gil_scoped_release unlocked;
            run(logits, Coefficients{at<C>(on_logp), at<C>(on_entropy), at<C>(on_mean_logp), at<C>(on_mean_logit),
                                     at<C>(on_log_sum_p2), at<C>(lse), at<C>(entropy), at<C>(log_sum_p2)},
                on_entropy || on_log_sum_p2, num_threads, isa);
        },
        "Overwrites the logits with dL/dlogits; coefficients are (C,) fp32 addresses (0: zero).", py::arg("logits"),
        py::arg("on_logp"), py::arg("on_entropy"), py::arg("on_mean_logp"), py::arg("on_mean_logit"),
        py::arg("on_log_sum_p2"), py::arg("lse"), py::arg("entropy"), py::arg("log_sum_p2"), py::arg("num_threads"),
        py::arg("isa") = "");
    module.def("row_instruction_set", &cpu::instruction_set, "Instruction set of the row kernels on this machine.",
               py::arg("wanted") = "");
}
