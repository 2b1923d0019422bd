// What the CPU kernels share: the instruction set of this machine, and rows spread over threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define CPU_X86 1
#define CPU_AVX2 __attribute__((target("avx2,fma")))
#define CPU_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#endif

namespace cpu {

// Instruction set in use: "avx512", "avx2" or "plain" (SSE2 or NEON); `wanted` chooses a lower one for tests.
inline std::string instruction_set(const std::string& wanted) {
#ifdef CPU_X86
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (wide && (wanted.empty() || wanted == "avx512")) return "avx512";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && wanted != "plain") return "avx2";
#endif
    (void)wanted;
    return "plain";
}

// part(begin, end) for rows [0, num_rows) cut into `num_parts` pieces, each but the first in a thread of its own.
template <class Part>
void over_rows(int64_t num_rows, int64_t num_parts, const Part& part) {
    const int64_t parts = std::max<int64_t>(1, std::min(num_parts, num_rows));
    std::vector<std::thread> threads;
    threads.reserve(static_cast<size_t>(parts));
    for (int64_t i = 1; i < parts; ++i) {
        const int64_t begin = num_rows * i / parts, end = num_rows * (i + 1) / parts;
        try {
            threads.emplace_back([&part, begin, end] { part(begin, end); });
        } catch (const std::system_error&) {  // no more threads allowed: do the part here
            part(begin, end);
        }
    }
    part(0, num_rows / parts);
    for (auto& thread : threads) thread.join();
}

}  // namespace cpu
