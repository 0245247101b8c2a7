// Which instruction set runs: the best that this processor has, unless `use` chose another.
#include <cstring>

#include "ops.h"

namespace ant5m {
namespace {

struct Entry {
    const char* name;
    bool (*supported)();
    Ops ops;
};

#define ANT5M_OPS(isa)                                                                        \
    {isa::gather, isa::attention_forward, isa::attention_backward, isa::linear_cross_entropy, \
     isa::logsumexp_argmax, isa::rms_norm_forward, isa::rms_norm_backward, isa::rope,         \
     isa::swiglu_forward, isa::swiglu_backward, isa::mlp_forward, isa::mlp_backward,          \
     isa::rms_norm_linear, isa::fused_post_attention, isa::product, isa::product_over_tokens}

#if defined(__x86_64__)
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
#endif

const Entry kEntries[] = {
#if defined(__x86_64__)
#ifdef ANT5M_AVX512_BF16
    {"avx512_bf16", [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }, ANT5M_OPS(avx512_bf16)},
#endif
    {"avx512", has_avx512, ANT5M_OPS(avx512)},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, ANT5M_OPS(avx2)},
#endif
    {"portable", [] { return true; }, ANT5M_OPS(portable)},
};

const Entry* best() {
    for (const Entry& entry : kEntries)
        if (entry.supported()) return &entry;
    return nullptr;  // not reached: portable runs everywhere
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

}  // namespace ant5m
