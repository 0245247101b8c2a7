// A block of tokens on its way through Llama's MLP: what mlp.cpp and layer.cpp share.
//
// A vector holds consecutive tokens ("lanes"), as in attention: weights are read as they lie.
#pragma once
#include "ops.h"
#include "silu.h"
#include "gemm.h"

namespace ant5m::ANT5M_ISA {
namespace {

constexpr int64_t kTokens = kMlpTokens;  // of a block
constexpr int64_t kTile = 128;           // rows of gate and up

// The tokens from `first` on; `gates` and `ups`, if not null, are [panels, width, kLanes].
struct Block {
    int64_t first, tokens, panels;
    float *gates, *ups;

    Block(int64_t all_tokens, int64_t index, int64_t width = 0, float* all_gates = nullptr, float* all_ups = nullptr)
        : first(index * kTokens),
          tokens(smaller(kTokens, all_tokens - first)),
          panels(divide_up(tokens, kLanes)),
          gates(all_gates ? all_gates + first * width : nullptr),
          ups(all_ups ? all_ups + first * width : nullptr) {}
    int64_t lanes_of(int64_t panel) const { return smaller(kLanes, tokens - panel * kLanes); }
};

// x [tokens, dim] of a block to [panels, dim, kLanes], zero behind the last token; each panel packed in place
// along dim.
template <typename Format>
void load_lanes(const Block& block, const float* x, int64_t row, int64_t dim, float* to) {
    for (int64_t panel = 0; panel < block.panels; ++panel) {
        float* at = to + panel * dim * kLanes;
        if (block.lanes_of(panel) < kLanes) std::memset(at, 0, sizeof(float) * dim * kLanes);
        transpose(block.lanes_of(panel), dim, x + (block.first + panel * kLanes) * row, row, at, kLanes);
        Format::pack_rows(dim, kLanes, at, kLanes, at, kLanes);
    }
}

[[maybe_unused]] void store_lanes(const Block& block, const float* lanes, int64_t dim, float* x, int64_t row) {
    for (int64_t panel = 0; panel < block.panels; ++panel)
        transpose(dim, block.lanes_of(panel), lanes + panel * dim * kLanes, kLanes,
                  x + (block.first + panel * kLanes) * row, row);
}

constexpr int64_t kMlpScratch = 3 * kTile * kLanes;  // floats

// Adds down (silu(gate x) * (up x)) to out; x and out are [panels, dim, kLanes], x and the weights' rows packed.
template <typename Format>
void add_mlp(const MlpShape& shape, const Block& block, const float* x, const float* gate, const float* up,
             const float* down, float* out, float* memory) {
    const int64_t dim = shape.dim;
    const int64_t row = Format::count(dim);
    float* hidden = memory;
    float* spare_gates = hidden + kTile * kLanes;
    float* spare_ups = spare_gates + kTile * kLanes;
    for (int64_t start = 0; start < shape.width; start += kTile) {
        const int64_t n = smaller(kTile, shape.width - start);
        for (int64_t panel = 0; panel < block.panels; ++panel) {
            const float* from = x + panel * dim * kLanes;
            const int64_t at = (panel * shape.width + start) * kLanes;
            float* gates = block.gates ? block.gates + at : spare_gates;
            float* ups = block.ups ? block.ups + at : spare_ups;
            multiply_panel<Format, kVecs, false>(n, dim, {gate + start * row, row, 1}, from, kLanes, gates, kLanes);
            multiply_panel<Format, kVecs, false>(n, dim, {up + start * row, row, 1}, from, kLanes, ups, kLanes,
                                               [&](Vec value, int64_t i, int j) {
                                                   const int64_t to = i * kLanes + j * kWidth;
                                                   const Vec g = load(gates + to);
                                                   store(hidden + to, g * sigmoid(g) * value);
                                                   return value;
                                               });
            Format::pack_rows(n, kLanes, hidden, kLanes, hidden, kLanes);
            multiply_panel<Format, kVecs, true>(dim, n,
                                              {down + start / Format::kVnni, Format::count(shape.width), 1}, hidden,
                                              kLanes, out + panel * dim * kLanes, kLanes);
        }
    }
}

}  // namespace
}  // namespace ant5m::ANT5M_ISA
