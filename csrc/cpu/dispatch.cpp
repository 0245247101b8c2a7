// Which instruction set runs: the best that this processor has, unless `use` chose another.
#include <cstring>

#include "ops.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace ant5m {
namespace {

struct Entry {
    const char* name;
    bool (*supported)();
    Ops ops;
};

#define ANT5M_OPS(isa)                                                                 \
    {isa::attention_forward, isa::attention_backward, isa::attention_tiles,            \
     isa::linear_cross_entropy, isa::logsumexp_argmax, isa::rms_norm_forward,          \
     isa::rms_norm_backward, isa::rope, isa::qk_norm_rope, isa::qk_norm_rope_backward, \
     isa::swiglu_forward, isa::swiglu_backward, isa::mlp_forward, isa::mlp_backward,   \
     isa::rms_norm_linear, isa::fused_post_attention, isa::product, isa::product_over_tokens}

// has_NAME: whether the processor has what setup.py compiled NAME for.
[[maybe_unused]] bool has_portable() { return true; }
[[maybe_unused]] bool has_bf16_emulated() { return true; }

#if defined(__x86_64__)
[[maybe_unused]] bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
[[maybe_unused]] bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
[[maybe_unused]] bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#elif defined(__aarch64__)
[[maybe_unused]] bool has_neon() { return true; }
[[maybe_unused]] bool has_neon_bf16() {
#if defined(__linux__)
    constexpr unsigned long kBf16 = 1 << 14;  // HWCAP2_BF16, which older headers lack
    return getauxval(AT_HWCAP2) & kBf16;
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has;
#else
    return false;
#endif
}
#endif

#define ANT5M_ENTRY(isa) {#isa, has_##isa, ANT5M_OPS(isa)},
const Entry kEntries[] = {ANT5M_FOR_EACH_SET(ANT5M_ENTRY)};
#undef ANT5M_ENTRY

const Entry* best() {
    for (const Entry& entry : kEntries)
        if (entry.supported()) return &entry;
    return nullptr;  // not reached: one of them runs everywhere
}

const Entry*& current() {
    static const Entry* entry = best();
    return entry;
}

}  // namespace

const Ops& ops() { return current()->ops; }
const char* instruction_set() { return current()->name; }

bool use(const char* name) {
    for (const Entry& entry : kEntries) {
        if (std::strcmp(entry.name, name) != 0 || !entry.supported()) continue;
        current() = &entry;
        return true;
    }
    return false;
}

std::vector<const char*> instruction_sets() {
    std::vector<const char*> names;
    for (const Entry& entry : kEntries)
        if (entry.supported()) names.push_back(entry.name);
    return names;
}

}  // namespace ant5m
