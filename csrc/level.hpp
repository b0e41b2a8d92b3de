// Which generation of vector instructions a kernel runs with, decided when it runs.
#pragma once

#include <string>

namespace protnest {

// Of x86-64: v4 has AVX-512, v3 AVX2 and FMA. Other processors have `portable` alone, the compiler's default for them.
enum class Level { portable, v3, v4, v4_bf16 };

// The best level of this processor.
Level best_level();

// By name: "portable", "v3", "v4" or "v4_bf16". Throws std::invalid_argument for another name or a level that this
// processor lacks.
Level level_named(const std::string& name);

std::string name_of(Level level);

}  // namespace protnest

// Vectors of GNU C, and functions compiled for several generations side by side.
#if defined(__GNUC__)
#define PROTNEST_INLINE inline __attribute__((always_inline))
#else
#define PROTNEST_INLINE inline
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#define PROTNEST_X86_LEVELS 1
#define PROTNEST_V3 __attribute__((target("avx2,fma")))
#define PROTNEST_V4 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#define PROTNEST_V4_BF16 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#endif
