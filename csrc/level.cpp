#include "level.hpp"

#include <array>
#include <stdexcept>

namespace protnest {

namespace {

constexpr std::array<const char*, 4> kNames{"portable", "v3", "v4", "v4_bf16"};

}  // namespace

Level best_level() {
#ifdef PROTNEST_X86_LEVELS
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Level::portable;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
        return Level::v3;
    }
    return __builtin_cpu_supports("avx512bf16") ? Level::v4_bf16 : Level::v4;
#else
    return Level::portable;
#endif
}

Level level_named(const std::string& name) {
    for (std::size_t index = 0; index < kNames.size(); ++index) {
        if (name != kNames[index]) continue;
        const Level level = static_cast<Level>(index);
        if (level > best_level()) throw std::invalid_argument("this processor lacks level " + name);
        return level;
    }
    throw std::invalid_argument("no level " + name + "; there are portable, v3, v4 and v4_bf16");
}

std::string name_of(Level level) { return kNames[static_cast<std::size_t>(level)]; }

}  // namespace protnest
