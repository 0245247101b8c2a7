// Llama's MLP, down (silu(gate x) * (up x)), for a block of tokens at a time, so that what lies between the three
// products never leaves L2. Forward keeps gate x and up x; backward makes from them, tile by tile, everything else.
#include <initializer_list>

#include "block.h"
#include "memory.h"
#include "parallel.h"

namespace ant5m::ANT5M_ISA {
namespace {

// Rows of a tile are this far apart, so that they do not all fall into the same sets of L1.
constexpr int64_t kStride = kTokens + kWidth;
constexpr int64_t kPartialFloats = 8 << 20;  // 32 MiB for the chunks' gradients of the weights, if that is 4 chunks
constexpr int64_t kMostChunks = 16;

// x [tokens, dim] of a block to [panels * kLanes, padded], zero behind dim and the last token; packed along the tokens.
template <typename Format>
void load_rows(const Block& block, const float* x, int64_t row, int64_t dim, float* to, int64_t padded) {
    std::memset(to, 0, sizeof(float) * block.panels * kLanes / Format::kVnni * padded);
    Format::pack_rows(block.tokens, dim, x + block.first * row, row, to, padded);
}

// Calls body(first, count) for parts of the rows of a matrix.
template <typename Body>
void for_parts(int threads, int64_t rows, const Body& body) {
    const int64_t part = part_of(rows, kTasks);
    parallel(threads, divide_up(rows, part), [&](int64_t task) {
        body(task * part, smaller(part, rows - task * part));
    });
}

// The rows of a contiguous matrix packed; for fp32 where they lie.
template <typename Format>
class Packed {
  public:
    Packed(int64_t rows, int64_t columns, const float* from, int threads)
        : memory_(Format::kVnni == 1 ? 0 : rows * Format::count(columns)),
          data_(Format::kVnni == 1 ? from : memory_.data()) {
        if (data_ == from) return;
        const int64_t row = Format::count(columns);
        for_parts(threads_for(rows * columns, threads), rows, [&](int64_t i, int64_t n) {
            Format::pack_columns(n, columns, from + i * columns, columns, memory_.data() + i * row, row);
        });
    }
    const float* data() const { return data_; }

  private:
    Memory memory_;
    const float* data_;
};

template <typename Format>
void forward_block(const MlpShape& shape, const Block& block, const float* x, int64_t x_row, const float* gate,
                   const float* up, const float* down, float* out) {
    const int64_t dim = shape.dim;
    float* memory = scratch(kMlpScratch + 2 * kTokens * dim);
    float* x_lanes = memory + kMlpScratch;
    float* out_lanes = x_lanes + kTokens * dim;
    load_lanes<Format>(block, x, x_row, dim, x_lanes);
    std::memset(out_lanes, 0, sizeof(float) * block.panels * dim * kLanes);
    add_mlp<Format>(shape, block, x_lanes, gate, up, down, out_lanes, memory);
    store_lanes(block, out_lanes, dim, out, dim);
}

// The weights as the backward pass reads them, gate and up [width, padded] packed along width, down transposed
// [width, padded] packed along dim. The odd stride keeps the elements of a column out of one another's sets in L1.
template <typename Format>
struct Weights {
    float *gate, *up, *down;

    Weights(const MlpShape& shape, const float* from_gate, const float* from_up, const float* from_down,
            int64_t padded, float* memory, int threads)
        : gate(memory), up(gate + shape.width * padded), down(up + shape.width * padded) {
        for_parts(threads_for(shape.width * shape.dim, threads), shape.width, [&](int64_t i, int64_t n) {
            const int64_t from = i * shape.dim;
            const int64_t to = i / Format::kVnni * padded;
            Format::pack_rows(n, shape.dim, from_gate + from, shape.dim, gate + to, padded);
            Format::pack_rows(n, shape.dim, from_up + from, shape.dim, up + to, padded);
            float* rows = down + i * padded;
            transpose(shape.dim, n, from_down + i, shape.width, rows, padded);
            Format::pack_columns(n, shape.dim, rows, padded, rows, padded);
        });
    }
};

// How the backward pass is cut: into chunks of blocks, each of which sums the gradients of the weights for itself, and
// parts of the width, each of which does so with the gradient of x. It depends on the shape alone, and so do the
// results.
struct Cut {
    int64_t blocks, chunks;
    Tiles tiles;
    int64_t parts;

    // For weights whose gradients take `size` floats.
    Cut(const MlpShape& shape, int64_t size)
        : blocks(divide_up(shape.tokens, kTokens)),
          chunks(smaller(divide_up(blocks, 2), larger(4, smaller(kMostChunks, kPartialFloats / size)))),
          tiles(shape.width, kTasks / kMostChunks),  // no more where tokens are few, because small tiles are slow
          parts(smaller(tiles.count, divide_up(kTasks, larger(1, chunks)))) {}
    int64_t first_block(int64_t chunk) const { return chunk * blocks / chunks; }
    int64_t first_tile(int64_t part) const { return part * tiles.count / parts; }
};

// Of one chunk: grad_weights [3, width, padded] for gate, up and (transposed) down.
template <typename Format>
struct Chunk {
    const MlpShape& shape;
    const Weights<Format>& weights;
    const Cut& cut;
    const float *x, *grad;
    int64_t x_row, grad_row;
    float* grad_weights;

    int64_t dim = shape.dim;
    int64_t padded = padded_of(shape);
    float* memory = scratch(kTile * (3 * kStride + 2 * kLanes) + kTokens * (3 * dim + 2 * padded));
    float* grad_gates = memory;                       // [kTile, kStride]
    float* grad_ups = grad_gates + kTile * kStride;   // [kTile, kStride]
    float* hidden = grad_ups + kTile * kStride;       // [kTile, kStride]
    float* packed_gates = hidden + kTile * kStride;   // [kTile, kLanes]
    float* packed_ups = packed_gates + kTile * kLanes;  // [kTile, kLanes]
    float* grad_lanes = packed_ups + kTile * kLanes;  // [panels, dim, kLanes]
    float* sum_lanes = grad_lanes + kTokens * dim;    // [panels, dim, kLanes]
    float* part_lanes = sum_lanes + kTokens * dim;    // [panels, dim, kLanes]
    float* grad_rows = part_lanes + kTokens * dim;    // [kTokens, padded]
    float* x_rows = grad_rows + kTokens * padded;     // [kTokens, padded]

    static int64_t padded_of(const MlpShape& shape) { return divide_up(shape.dim, kWidth) * kWidth + kWidth; }
    static int64_t size(const MlpShape& shape) { return 3 * shape.width * padded_of(shape); }

    void load_block(const Block& block) const {
        load_lanes<Format>(block, grad, grad_row, dim, grad_lanes);
        load_rows<Format>(block, grad, grad_row, dim, grad_rows, padded);
        load_rows<Format>(block, x, x_row, dim, x_rows, padded);
    }

    // What a part of the width gives of a block that was loaded: the gradient of x to grad_x [panels, dim, kLanes], and
    // those of the weights, which are added to what is there unless the block is the chunk's first.
    void differentiate(const Block& block, bool first, int64_t part, float* grad_x) const {
        std::memset(grad_x, 0, sizeof(float) * block.panels * dim * kLanes);
        for (int64_t tile = cut.first_tile(part); tile < cut.first_tile(part + 1); ++tile)
            first ? add_tile<false>(block, tile, grad_x) : add_tile<true>(block, tile, grad_x);
    }

    template <bool kAdd>
    void add_tile(const Block& block, int64_t tile, float* grad_x) const {
        const int64_t start = cut.tiles.first(tile), n = cut.tiles.size(tile);
        for (int64_t panel = 0; panel < block.panels; ++panel)
            add_panel(block, panel, start, n, grad_x + panel * dim * kLanes);
        const int64_t depth = block.panels * kLanes;
        const int64_t columns = padded - kWidth;
        float* to = grad_weights + start * padded;
        multiply<Format, kAdd>(n, columns, depth, {grad_gates, kStride, 1}, x_rows, padded, to, padded);
        to += shape.width * padded;
        multiply<Format, kAdd>(n, columns, depth, {grad_ups, kStride, 1}, x_rows, padded, to, padded);
        to += shape.width * padded;
        multiply<Format, kAdd>(n, columns, depth, {hidden, kStride, 1}, grad_rows, padded, to, padded);
    }

    // Fills the panel's columns of grad_gates, grad_ups and hidden, packed along the tokens, and adds to its gradient
    // of x [dim, kLanes].
    void add_panel(const Block& block, int64_t panel, int64_t start, int64_t n, float* grad_x) const {
        const int64_t at = (panel * shape.width + start) * kLanes;
        const float* gates = block.gates + at;
        const float* ups = block.ups + at;
        float* panel_gates = grad_gates + panel * kLanes;
        float* panel_ups = grad_ups + panel * kLanes;
        float* panel_hidden = hidden + panel * kLanes;
        multiply_panel<Format, kVecs, false>(n, dim, {weights.down + start * padded, padded, 1},
                                           grad_lanes + panel * dim * kLanes, kLanes, panel_gates, kStride,
                                           [&](Vec g, int64_t i, int j) {
                                               const int64_t from = i * kLanes + j * kWidth;
                                               const int64_t to = i * kStride + j * kWidth;
                                               const SiluGradient silu(load(gates + from));
                                               const Vec u = load(ups + from);
                                               store(panel_hidden + to, silu.value * u);
                                               store(panel_ups + to, g * silu.value);
                                               return g * u * silu.slope;
                                           });
        const int64_t row = start / Format::kVnni * padded;
        add_grad_x(n, weights.gate + row, panel_gates, packed_gates, grad_x);
        add_grad_x(n, weights.up + row, panel_ups, packed_ups, grad_x);
        for (float* columns : {grad_gates, grad_ups, hidden})
            Format::pack_columns(n, kLanes, columns + panel * kLanes, kStride, columns + panel * kLanes / Format::kVnni,
                               kStride);
    }

    // `grads` [n, kLanes] of rows `weight` on.
    void add_grad_x(int64_t n, const float* weight, const float* grads, float* packed, float* grad_x) const {
        const auto [data, row] = panel_of<Format>(n, grads, kStride, packed);
        multiply_panel<Format, kVecs, true>(dim, n, {weight, 1, padded}, data, row, grad_x, kLanes);
    }
};

template <typename Format>
void forward(const MlpShape& shape, const float* x, int64_t x_row, const float* gate, const float* up,
             const float* down, float* out, float* gates, float* ups, int threads) {
    const Packed<Format> gate_rows(shape.width, shape.dim, gate, threads);
    const Packed<Format> up_rows(shape.width, shape.dim, up, threads);
    const Packed<Format> down_rows(shape.dim, shape.width, down, threads);
    const int64_t size = tokens_of_block(shape.tokens, threads);
    parallel(threads, divide_up(shape.tokens, size), [&](int64_t index) {
        forward_block<Format>(shape, Block(shape.tokens, index, size, shape.width, gates, ups), x, x_row, gate_rows.data(),
                            up_rows.data(), down_rows.data(), out);
    });
}

template <typename Format>
void backward(const MlpShape& shape, const float* x, int64_t x_row, const float* gate, const float* up,
              const float* down, float* gates, float* ups, const float* grad, int64_t grad_row, float* grad_x,
              float* grad_gate, float* grad_up, float* grad_down, int threads) {
    const int64_t size = Chunk<Format>::size(shape);
    const Cut cut(shape, size);
    const Memory packed(size);
    const Weights<Format> weights(shape, gate, up, down, Chunk<Format>::padded_of(shape), packed.data(), threads);
    const Memory partial(cut.chunks * size);
    // Calls visit(chunk, block, first) for the blocks of a chunk, loaded.
    const auto for_blocks = [&](int64_t index, const auto& visit) {
        const Chunk<Format> chunk{shape, weights, cut, x, grad, x_row, grad_row, partial.data() + index * size};
        for (int64_t i = cut.first_block(index); i < cut.first_block(index + 1); ++i) {
            const Block block(shape.tokens, i, kTokens, shape.width, gates, ups);
            chunk.load_block(block);
            visit(chunk, block, i == cut.first_block(index));
        }
    };
    if (cut.chunks >= 4 * threads) {
        parallel(threads, cut.chunks, [&](int64_t index) {
            for_blocks(index, [&](const Chunk<Format>& chunk, const Block& block, bool first) {
                chunk.differentiate(block, first, 0, chunk.sum_lanes);
                for (int64_t part = 1; part < cut.parts; ++part) {
                    chunk.differentiate(block, first, part, chunk.part_lanes);
                    add_floats(block.panels * shape.dim * kLanes, chunk.part_lanes, chunk.sum_lanes);
                }
                store_lanes(block, chunk.sum_lanes, shape.dim, grad_x, shape.dim);
            });
        });
    } else {  // the same sums, with more tasks and more memory
        const int64_t of_part = cut.blocks * kTokens * shape.dim;
        const Memory lanes(cut.parts * of_part);
        parallel(threads, cut.chunks * cut.parts, [&](int64_t task) {
            const int64_t part = task % cut.parts;
            for_blocks(task / cut.parts, [&](const Chunk<Format>& chunk, const Block& block, bool first) {
                chunk.differentiate(block, first, part, lanes.data() + part * of_part + block.first * shape.dim);
            });
        });
        parallel(threads, divide_up(shape.tokens, kLanes), [&](int64_t index) {
            const Block panel(shape.tokens, index, kLanes);
            float* sum = lanes.data() + panel.first * shape.dim;
            for (int64_t part = 1; part < cut.parts; ++part)
                add_floats(shape.dim * kLanes, sum + part * of_part, sum);
            store_lanes(panel, sum, shape.dim, grad_x, shape.dim);
        });
    }
    const int64_t row = Chunk<Format>::padded_of(shape);
    parallel_rows(threads, 3 * shape.width, 16, [&](int64_t, int64_t i) {
        float* sum = scratch(shape.dim);
        std::memset(sum, 0, sizeof(float) * shape.dim);
        for (int64_t chunk = 0; chunk < cut.chunks; ++chunk)
            for (int64_t d = 0; d < shape.dim; ++d) sum[d] += partial.data()[chunk * size + i * row + d];
        const int64_t which = i / shape.width;
        const int64_t w = i % shape.width;
        if (which < 2)
            std::memcpy((which ? grad_up : grad_gate) + w * shape.dim, sum, sizeof(float) * shape.dim);
        else
            for (int64_t d = 0; d < shape.dim; ++d) grad_down[d * shape.width + w] = sum[d];
    });
}

}  // namespace

void mlp_forward(const MlpShape& shape, const float* x, int64_t x_row, const float* gate, const float* up,
                 const float* down, float* out, float* gates, float* ups, bool bf16, int threads) {
    with_format(bf16, [&](auto format) {
        forward<decltype(format)>(shape, x, x_row, gate, up, down, out, gates, ups, threads);
    });
}

void mlp_backward(const MlpShape& shape, const float* x, int64_t x_row, const float* gate, const float* up,
                  const float* down, float* gates, float* ups, const float* grad, int64_t grad_row, float* grad_x,
                  float* grad_gate, float* grad_up, float* grad_down, bool bf16, int threads) {
    with_format(bf16, [&](auto format) {
        backward<decltype(format)>(shape, x, x_row, gate, up, down, gates, ups, grad, grad_row, grad_x, grad_gate,
                                 grad_up, grad_down, threads);
    });
}

}  // namespace ant5m::ANT5M_ISA
