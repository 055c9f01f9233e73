#include "choices.h"

#include "parallel.h"

namespace torchwrap {
namespace {

// Best first, as `at` has them.
const Choice choices[] = {
#if defined(WITH_AVX512_BF16)
    {"avx512_bf16", &kernel_avx512_bf16, &prefill_avx512_bf16, &gradients_avx512_bf16, &few_avx512_bf16,
     [] { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"); }},
#endif
#if defined(WITH_AVX512)
    {"avx512", &kernel_avx512, &prefill_avx512, &gradients_avx512, &few_avx512,
     [] { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"); }},
#endif
#if defined(WITH_AVX2)
    {"avx2", &kernel_avx2, &prefill_avx2, &gradients_avx2, &few_avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
    {"baseline", &kernel_baseline, &prefill_baseline, &gradients_baseline, &few_baseline, [] { return true; }},
};
constexpr int CHOICES = sizeof choices / sizeof choices[0];

// Intel's processors make two products of bfloat16 in each lane in the time of four of float32 (Sapphire and Emerald Rapids: one such instruction in
// two cycles), so there what widens comes first: it takes 0.6 of the time for many queries, 0.55 to 1 for one.
const Choice &at(int number) {
#if defined(WITH_AVX512_BF16) && defined(WITH_AVX512)
    if (number < 2 && __builtin_cpu_is("intel")) return choices[1 - number];
#endif
    return choices[number];
}

}  // namespace

const Choice *choice(int number) {
    if (number < 0)
        for (number = 0; !at(number).runs();) number++;
    return number < CHOICES && at(number).runs() ? &at(number) : nullptr;
}

}  // namespace torchwrap

EXPORT int torchwrap_interface() { return TORCHWRAP_INTERFACE; }
EXPORT const char *torchwrap_compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#else
    return "gcc " __VERSION__;
#endif
}
EXPORT int64_t torchwrap_memory() { return torchwrap::most_bytes(); }
EXPORT const char *torchwrap_threads() { return torchwrap::thread_source(); }
EXPORT int torchwrap_instruction_sets() { return torchwrap::CHOICES; }
EXPORT const char *torchwrap_instruction_set(int index) {
    const torchwrap::Choice *found = index < 0 ? nullptr : torchwrap::choice(index);
    return found ? found->name : nullptr;
}
