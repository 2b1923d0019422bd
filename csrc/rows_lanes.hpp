// Arithmetic on W fp32 numbers at once, through the vector extensions of GCC and Clang: the compiler turns the same
// source into AVX-512, AVX2, SSE2 or NEON, whichever the function around it may use.
#pragma once

#include <cstdint>
#include <cstring>

// A C-style cast between vector types keeps the bits. Vectors travel by reference between inlined functions only, so
// their calling convention does not matter.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif
#define ROWS_INLINE static inline __attribute__((always_inline))

namespace rows {

template <int W>
struct Lanes {
    typedef float F __attribute__((vector_size(W * 4)));
    typedef int32_t I __attribute__((vector_size(W * 4)));
    typedef uint32_t U __attribute__((vector_size(W * 4)));
    typedef uint16_t H __attribute__((vector_size(W * 2)));
};

template <int W>
ROWS_INLINE typename Lanes<W>::F splat(float x) {
    typename Lanes<W>::F lanes;
    for (int i = 0; i < W; ++i) lanes[i] = x;  // GCC makes one broadcast of this, of a sum with zeros W inserts
    return lanes;
}

// e^x for x <= about 1: x = n ln 2 + r, |r| <= ln 2 / 2, polynomial of degree 6 (relative error < 1.2e-7); 0 below the
// smallest normal number. NaN stays NaN.
template <int W>
ROWS_INLINE typename Lanes<W>::F exponential(const typename Lanes<W>::F& x) {
    using F = typename Lanes<W>::F;
    using I = typename Lanes<W>::I;
    const F magic = splat<W>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const F shifted = x * 1.44269504088896341f + magic;
    const F n = shifted - magic;
    F r = x - n * 0.693145751953125f;
    r = r - n * 1.42860682030941723e-6f;
    F p = r * 1.38888889e-3f + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    const I exponent = ((I)(shifted) - (I)(magic) + 127) << 23;
    const F result = p * (F)(exponent);
    return x < splat<W>(-87.33f) ? F{} : result;
}

// tanh(x); the odd polynomial near zero keeps the relative error at 2e-7 where 1 - e^(-2|x|) would cancel.
template <int W>
ROWS_INLINE typename Lanes<W>::F tanh(const typename Lanes<W>::F& x) {
    using F = typename Lanes<W>::F;
    const F size = x < F{} ? -x : x;
    F twice = size * -2.0f;
    twice = twice < splat<W>(-80.0f) ? splat<W>(-80.0f) : twice;
    const F u = exponential<W>(twice);
    const F far = (1.0f - u) / (1.0f + u);
    const F s = x * x;
    F near = s * -5.932980144e-3f + 2.088131876e-2f;
    near = near * s + -5.382584835e-2f;
    near = near * s + 1.333260155e-1f;
    near = near * s + -3.333332726e-1f;
    near = near * s * x + x;
    const F signed_far = x < F{} ? -far : far;
    return size < splat<W>(0.625f) ? near : signed_far;
}

// Storage types: a row of the logits is read and written as fp32 whatever it is stored in.
struct Float32 {
    using Element = float;
    template <int W>
    ROWS_INLINE typename Lanes<W>::F load(const float* from) {
        typename Lanes<W>::F x;
        std::memcpy(&x, from, sizeof(x));
        return x;
    }
    template <int W>
    ROWS_INLINE void store(float* to, const typename Lanes<W>::F& x) {
        std::memcpy(to, &x, sizeof(x));
    }
};

struct BFloat16 {
    using Element = uint16_t;
    template <int W>
    ROWS_INLINE typename Lanes<W>::F load(const uint16_t* from) {
        typename Lanes<W>::H x;
        std::memcpy(&x, from, sizeof(x));
        return (typename Lanes<W>::F)(__builtin_convertvector(x, typename Lanes<W>::U) << 16);
    }
    // Rounds to nearest, ties to even; NaN becomes the quiet NaN.
    template <int W>
    ROWS_INLINE void store(uint16_t* to, const typename Lanes<W>::F& x) {
        using U = typename Lanes<W>::U;
        const U raw = (U)(x);
        U rounded = (raw + 0x7fffu + ((raw >> 16) & 1u)) >> 16;
        rounded = x == x ? rounded : (U{} + 0x7fc0u);
        const typename Lanes<W>::H half = __builtin_convertvector(rounded, typename Lanes<W>::H);
        std::memcpy(to, &half, sizeof(half));
    }
};

}  // namespace rows
