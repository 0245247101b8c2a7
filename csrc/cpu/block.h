// A block of tokens on its way through Llama's MLP: what mlp.cpp and layer.cpp share.
//
// A vector holds consecutive tokens ("lanes"), as in attention: weights are read as they lie.
#pragma once
#include "ops.h"
#include "gemm.h"
#include "parallel.h"
#include "silu.h"

namespace ant5m::ANT5M_ISA {
namespace {

constexpr int64_t kTokens = kMlpTokens;  // of a block, at most
constexpr int64_t kTile = 144;           // rows of gate and up, at most

// Tokens of a block where blocks are the tasks, and no result depends on them: fewer where tasks would be too few.
inline int64_t tokens_of_block(int64_t tokens, int threads) {
    return tokens < 4 * threads * kTokens ? kTokens / 2 : kTokens;
}

// The width in tiles of about as many rows, whole tiles of the microkernel and of pairs; about `least` of them or more.
struct Tiles {
    int64_t width, rows, count;

    explicit Tiles(int64_t width_, int64_t least = 1)
        : width(width_),
          rows(divide_up(divide_up(width, larger(least, divide_up(width, kTile))), 12) * 12),
          count(divide_up(width, rows)) {}
    int64_t first(int64_t tile) const { return tile * rows; }
    int64_t size(int64_t tile) const { return smaller(rows, width - first(tile)); }
};

// `size` tokens from `first` on; `gates` and `ups`, if not null, are [panels, width, kLanes].
struct Block {
    int64_t first, tokens, panels;
    float *gates, *ups;

    Block(int64_t all_tokens, int64_t index, int64_t size, int64_t width = 0, float* all_gates = nullptr,
          float* all_ups = nullptr)
        : first(index * size),
          tokens(smaller(size, all_tokens - first)),
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
    const Tiles tiles(shape.width);
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const int64_t start = tiles.first(tile), n = tiles.size(tile);
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
