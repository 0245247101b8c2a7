// silu(x) = x sigmoid(x), and its derivative.
#pragma once
#include "simd.h"

namespace ant5m::ANT5M_ISA {

inline Vec sigmoid(Vec x) {
    const Vec power = x * -1.4426950408889634f;
    const Vec result = 1.0f / (1.0f + exp2(power < 126.0f ? power : broadcast(126.0f)));
    return power < 126.0f ? result : Vec{};
}

struct SiluGradient {
    Vec value, slope;
    explicit SiluGradient(Vec x) {
        const Vec s = sigmoid(x);
        value = x * s;
        slope = s * (1.0f + x * (1.0f - s));
    }
};

}  // namespace ant5m::ANT5M_ISA
