// Llama's MLP, down (silu(gate x) * (up x)), for a block of tokens at a time, so that what lies between the three
// products never leaves L2. Forward keeps gate x and up x; backward makes from them, tile by tile, everything else.
#include "block.h"
#include "memory.h"
#include "parallel.h"

namespace ant5m::ANT5M_ISA {
namespace {

// Rows of a tile are this far apart, so that they do not all fall into the same sets of L1.
constexpr int64_t kStride = kTokens + kWidth;
constexpr int64_t kPartialFloats = 8 << 20;  // 32 MiB for the chunks' gradients of the weights, if that is 4 chunks

// x [tokens, dim] of a block to [panels * kLanes, padded], zero behind dim and the last token.
void load_rows(const Block& block, const float* x, int64_t row, int64_t dim, float* to, int64_t padded) {
    std::memset(to, 0, sizeof(float) * block.panels * kLanes * padded);
    for (int64_t i = 0; i < block.tokens; ++i)
        std::memcpy(to + i * padded, x + (block.first + i) * row, sizeof(float) * dim);
}

void forward_block(const MlpShape& shape, const Block& block, const float* x, int64_t x_row, const float* gate,
                   const float* up, const float* down, float* out) {
    const int64_t dim = shape.dim;
    float* memory = scratch(kMlpScratch + 2 * kTokens * dim);
    float* x_lanes = memory + kMlpScratch;
    float* out_lanes = x_lanes + kTokens * dim;
    load_lanes(block, x, x_row, dim, x_lanes);
    std::memset(out_lanes, 0, sizeof(float) * block.panels * dim * kLanes);
    add_mlp(shape, block, x_lanes, gate, up, down, out_lanes, memory);
    store_lanes(block, out_lanes, dim, out);
}

// The weights as the backward pass reads them, each [width, padded], down transposed. The odd stride keeps the elements
// of a column out of one another's sets in L1.
struct Weights {
    float *gate, *up, *down;

    Weights(const MlpShape& shape, const float* from_gate, const float* from_up, const float* from_down,
            int64_t padded, float* memory, int threads)
        : gate(memory), up(gate + shape.width * padded), down(up + shape.width * padded) {
        parallel(threads, divide_up(shape.width, kTile), [&](int64_t tile) {
            const int64_t start = tile * kTile;
            const int64_t n = smaller(kTile, shape.width - start);
            for (int64_t i = start; i < start + n; ++i) {
                std::memcpy(gate + i * padded, from_gate + i * shape.dim, sizeof(float) * shape.dim);
                std::memcpy(up + i * padded, from_up + i * shape.dim, sizeof(float) * shape.dim);
            }
            transpose(shape.dim, n, from_down + start, shape.width, down + start * padded, padded);
        });
    }
};

// A fixed number of blocks, whose gradients of the weights are summed apart: [3, width, padded] for gate, up and
// (transposed) down.
struct Chunk {
    const MlpShape& shape;
    const Weights& weights;
    const float *x, *grad;
    int64_t x_row, grad_row;
    float* grad_x;
    float* grad_weights;

    int64_t dim = shape.dim;
    int64_t padded = padded_of(shape);
    float* memory = scratch(kTile * kStride * 3 + kTokens * (2 * dim + 2 * padded));
    float* grad_gates = memory;                       // [kTile, kStride]
    float* grad_ups = grad_gates + kTile * kStride;   // [kTile, kStride]
    float* hidden = grad_ups + kTile * kStride;       // [kTile, kStride]
    float* grad_lanes = hidden + kTile * kStride;     // [panels, dim, kLanes]
    float* grad_x_lanes = grad_lanes + kTokens * dim;  // [panels, dim, kLanes]
    float* grad_rows = grad_x_lanes + kTokens * dim;  // [kTokens, padded]
    float* x_rows = grad_rows + kTokens * padded;     // [kTokens, padded]

    static int64_t padded_of(const MlpShape& shape) { return divide_up(shape.dim, kWidth) * kWidth + kWidth; }
    static int64_t size(const MlpShape& shape) { return 3 * shape.width * padded_of(shape); }

    void add(const Block& block) const {
        load_lanes(block, grad, grad_row, dim, grad_lanes);
        load_rows(block, grad, grad_row, dim, grad_rows, padded);
        load_rows(block, x, x_row, dim, x_rows, padded);
        std::memset(grad_x_lanes, 0, sizeof(float) * block.panels * dim * kLanes);
        for (int64_t start = 0; start < shape.width; start += kTile) {
            const int64_t n = smaller(kTile, shape.width - start);
            for (int64_t panel = 0; panel < block.panels; ++panel) differentiate(block, panel, start, n);
            const int64_t depth = block.panels * kLanes;
            const int64_t columns = padded - kWidth;
            float* to = grad_weights + start * padded;
            multiply_add(n, columns, depth, {grad_gates, kStride, 1}, x_rows, padded, to, padded);
            to += shape.width * padded;
            multiply_add(n, columns, depth, {grad_ups, kStride, 1}, x_rows, padded, to, padded);
            to += shape.width * padded;
            multiply_add(n, columns, depth, {hidden, kStride, 1}, grad_rows, padded, to, padded);
        }
        store_lanes(block, grad_x_lanes, dim, grad_x);
    }

    // Fills the panel's columns of grad_gates, grad_ups and hidden and adds to its gradient of x.
    void differentiate(const Block& block, int64_t panel, int64_t start, int64_t n) const {
        const int64_t at = (panel * shape.width + start) * kLanes;
        const float* gates = block.gates + at;
        const float* ups = block.ups + at;
        float* panel_gates = grad_gates + panel * kLanes;
        float* panel_ups = grad_ups + panel * kLanes;
        float* panel_hidden = hidden + panel * kLanes;
        float* grad_x_panel = grad_x_lanes + panel * dim * kLanes;
        const float* grad_panel = grad_lanes + panel * dim * kLanes;
        const int64_t row = start * padded;
        multiply_panel<kVecs, false>(n, dim, {weights.down + row, padded, 1}, grad_panel, kLanes, panel_gates, kStride,
                                     [&](Vec g, int64_t i, int j) {
                                         const int64_t from = i * kLanes + j * kWidth;
                                         const int64_t to = i * kStride + j * kWidth;
                                         const SiluGradient silu(load(gates + from));
                                         const Vec u = load(ups + from);
                                         store(panel_hidden + to, silu.value * u);
                                         store(panel_ups + to, g * silu.value);
                                         return g * u * silu.slope;
                                     });
        multiply_panel<kVecs, true>(dim, n, {weights.gate + row, 1, padded}, panel_gates, kStride, grad_x_panel,
                                    kLanes);
        multiply_panel<kVecs, true>(dim, n, {weights.up + row, 1, padded}, panel_ups, kStride, grad_x_panel, kLanes);
    }
};

}  // namespace

void mlp_forward(const MlpShape& shape, const float* x, int64_t x_row, const float* gate, const float* up,
                 const float* down, float* out, float* gates, float* ups, int threads) {
    parallel(threads, divide_up(shape.tokens, kTokens), [&](int64_t index) {
        forward_block(shape, Block(shape.tokens, index, shape.width, gates, ups), x, x_row, gate, up, down, out);
    });
}

void mlp_backward(const MlpShape& shape, const float* x, int64_t x_row, const float* gate, const float* up,
                  const float* down, float* gates, float* ups, const float* grad, int64_t grad_row, float* grad_x,
                  float* grad_gate, float* grad_up, float* grad_down, int threads) {
    const int64_t blocks = divide_up(shape.tokens, kTokens);
    const int64_t size = Chunk::size(shape);
    int64_t chunks = kPartialFloats / size;
    chunks = smaller(blocks, chunks < 4 ? 4 : chunks > 16 ? 16 : chunks);
    const Memory packed(size);
    const Weights weights(shape, gate, up, down, Chunk::padded_of(shape), packed.data(), threads);
    const Memory partial(chunks * size);
    parallel(threads, chunks, [&](int64_t index) {
        float* sum = partial.data() + index * size;
        std::memset(sum, 0, sizeof(float) * size);
        const Chunk chunk{shape, weights, x, grad, x_row, grad_row, grad_x, sum};
        for (int64_t block = index * blocks / chunks; block < (index + 1) * blocks / chunks; ++block)
            chunk.add(Block(shape.tokens, block, shape.width, gates, ups));
    });
    const int64_t row = Chunk::padded_of(shape);
    parallel_rows(threads, 3 * shape.width, 16, [&](int64_t, int64_t i) {
        float* sum = scratch(row);
        std::memset(sum, 0, sizeof(float) * row);
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
            for (int64_t j = 0; j < row; ++j) sum[j] += partial.data()[chunk * size + i * row + j];
        const int64_t which = i / shape.width;
        const int64_t w = i % shape.width;
        if (which < 2)
            std::memcpy((which ? grad_up : grad_gate) + w * shape.dim, sum, sizeof(float) * shape.dim);
        else
            for (int64_t d = 0; d < shape.dim; ++d) grad_down[d * shape.width + w] = sum[d];
    });
}

}  // namespace ant5m::ANT5M_ISA
