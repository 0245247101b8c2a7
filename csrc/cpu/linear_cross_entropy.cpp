// The head: logits = hidden weight^T, softmax, mean loss and both gradients, without the matrix of logits.
//
// For each block of tokens three steps, each spread over the vocabulary in fixed tiles:
//   1. a tile of logits, its maximum and exponentials, and the sum of these (as in an online softmax);
//   2. the tiles' maxima and sums together give each token's softmax denominator, and the loss;
//   3. the exponentials, still in the cache, become the gradient of the logits, and it both gradients: that of
//      `weight` belongs to the tile alone, that of `hidden` is summed over chunks of tiles in their order.
// A vector holds consecutive tokens, so that `weight` is read as it lies and nothing is summed across a vector.
#include <math.h>

#include "memory.h"
#include "ops.h"
#include "parallel.h"
#include "gemm.h"

namespace ant5m::ANT5M_ISA {
namespace {

constexpr int64_t kTokens = 256;  // of a block: the exponentials take 1 KiB for each vocabulary entry
constexpr int64_t kEntries = 128;  // of the vocabulary in a tile
constexpr int64_t kChunks = 16;    // partial gradients of hidden
// Rows of a tile of gradients are this far apart, so that they do not all fall into the same sets of L1.
constexpr int64_t kStride = kTokens + kWidth;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLog2e = 1.4426950408889634f;

// The operands; see ops.h. by_dim [vocab, by_dim_row] is the weight packed along dim, by_entry [.., by_entry_row]
// those along the vocabulary: for fp32 both are the weight itself.
struct Head {
    const float* hidden;
    const float* weight;
    const int64_t* targets;
    float* grad_hidden;
    float* grad_weight;
    int64_t tokens, dim, vocab, hidden_row, weight_row, grad_weight_row, ignore_index;
    const float* by_dim = weight;
    const float* by_entry = weight;
    int64_t by_dim_row = weight_row, by_entry_row = weight_row;

    bool wants_gradient() const { return grad_hidden || grad_weight; }

    template <typename Format>
    int64_t packed_size() const {
        if (Format::kVnni == 1) return 0;
        return vocab * Format::count(dim) + (wants_gradient() ? Format::count(vocab) * dim : 0);
    }

    // Packs the weight into `memory`, if it is not read where it lies.
    template <typename Format>
    void pack(float* memory, int threads) {
        if (Format::kVnni == 1) return;
        by_dim_row = Format::count(dim), by_entry_row = dim;
        float* rows = memory;
        float* pairs = memory + vocab * by_dim_row;
        parallel(threads, divide_up(vocab, kEntries), [&](int64_t tile) {
            const int64_t first = tile * kEntries;
            const int64_t n = smaller(kEntries, vocab - first);
            const float* from = weight + first * weight_row;
            Format::pack_columns(n, dim, from, weight_row, rows + first * by_dim_row, by_dim_row);
            if (!wants_gradient()) return;
            Format::pack_rows(n, dim, from, weight_row, pairs + first / Format::kVnni * dim, dim);
        });
        by_dim = rows, by_entry = pairs;
    }
};

// One block of tokens and where its intermediate results live.
template <typename Format>
struct Block {
    const Head& head;
    int64_t dim, row, tiles, chunks;  // row: stride of hidden_rows
    int64_t first = 0, tokens = 0, panels = 0;
    float inverse_count;
    float* hidden_lanes;  // [panels, dim, kLanes], times log2(e), each panel packed in place along dim
    float* hidden_rows;   // [kTokens, row], zero behind dim and behind the last token; packed along the tokens
    float* highest;       // [tiles, kTokens]
    float* total;         // [tiles, kTokens]
    float* argmax = nullptr;  // [tiles, kTokens], row of the tile's first largest logit; null when not wanted
    float* exponentials = nullptr;  // [tiles, kTokens / kLanes, kEntries, kLanes]; null when no gradient is wanted
    float* shift;         // [kTokens], the softmax's maximum
    float* scale;         // [kTokens], 1 / (denominator * count); 0 where nothing counts
    float* target_logit;  // [kTokens]
    float* grad_lanes = nullptr;    // [chunks, panels, dim, kLanes]

    static int64_t row_of(int64_t dim) { return divide_up(dim, kWidth) * kWidth + kWidth; }
    static int64_t chunks_of(int64_t vocab) { return smaller(kChunks, divide_up(vocab, kEntries)); }
    static int64_t size(const Head& head) {
        const int64_t tiles = divide_up(head.vocab, kEntries);
        const int64_t gradient = kEntries * tiles + chunks_of(head.vocab) * head.dim;
        return kTokens * (head.dim + row_of(head.dim) + 2 * tiles + 3 + (head.wants_gradient() ? gradient : 0));
    }

    Block(const Head& head_, int64_t count, float* memory)
        : head(head_),
          dim(head.dim),
          row(row_of(dim)),
          tiles(divide_up(head.vocab, kEntries)),
          chunks(chunks_of(head.vocab)),
          inverse_count(1.0f / static_cast<float>(count > 0 ? count : 1)) {
        const auto take = [&](int64_t floats) {
            float* taken = memory;
            memory += floats;
            return taken;
        };
        hidden_lanes = take(kTokens * dim);
        hidden_rows = take(kTokens * row);
        highest = take(tiles * kTokens);
        total = take(tiles * kTokens);
        shift = take(kTokens);
        scale = take(kTokens);
        target_logit = take(kTokens);
        if (!head.wants_gradient()) return;
        exponentials = take(tiles * kEntries * kTokens);
        grad_lanes = take(chunks * kTokens * dim);
    }

    int64_t lanes_of(int64_t panel) const { return smaller(kLanes, tokens - panel * kLanes); }
    int64_t entries_of(int64_t tile) const { return smaller(kEntries, head.vocab - tile * kEntries); }
    float* exponentials_of(int64_t tile, int64_t panel) const {
        return exponentials + (tile * kTokens + panel * kLanes) * kEntries;
    }
    bool counts(int64_t token) const { return head.targets[first + token] != head.ignore_index; }

    // Calls visit(token, row) for the panel's targets that lie in the tile.
    template <typename Visit>
    void for_targets(int64_t tile, int64_t panel, const Visit& visit) const {
        for (int64_t token = panel * kLanes; token < panel * kLanes + lanes_of(panel); ++token) {
            const int64_t row_in_tile = head.targets[first + token] - tile * kEntries;
            if (counts(token) && row_in_tile >= 0 && row_in_tile < entries_of(tile)) visit(token, row_in_tile);
        }
    }

    void load(int64_t panel) const {
        const float* hidden = head.hidden + (first + panel * kLanes) * head.hidden_row;
        const int64_t lanes = lanes_of(panel);
        float* to = hidden_lanes + panel * dim * kLanes;
        if (lanes < kLanes) std::memset(to, 0, sizeof(float) * dim * kLanes);
        transpose(lanes, dim, hidden, head.hidden_row, to, kLanes, kLog2e);
        Format::pack_rows(dim, kLanes, to, kLanes, to, kLanes);
        constexpr int64_t kPackedRows = kLanes / Format::kVnni;
        float* rows = hidden_rows + panel * kPackedRows * row;
        std::memset(rows, 0, sizeof(float) * kPackedRows * row);
        Format::pack_rows(lanes, dim, hidden, head.hidden_row, rows, row);
    }

    // The block that begins with token `first`.
    void begin(int threads) {
        tokens = smaller(kTokens, head.tokens - first);
        panels = divide_up(tokens, kLanes);
        parallel(threads, panels, [&](int64_t panel) { load(panel); });
    }

    // Step 1 for one tile of the vocabulary.
    template <bool kLikeliest = false>
    void exponentiate(int64_t tile) const {
        const int64_t n = entries_of(tile);
        const Operand weight{head.by_dim + tile * kEntries * head.by_dim_row, head.by_dim_row, 1};
        for (int64_t panel = 0; panel < panels; ++panel) {
            float* logits = exponentials ? exponentials_of(tile, panel) : scratch(kEntries * kLanes);
            Vec most[kVecs];
            Vec where[kVecs] = {};
            ANT5M_UNROLL for (int j = 0; j < kVecs; ++j) most[j] = broadcast(-__builtin_inff());
            multiply_panel<Format, kVecs, false>(
                n, dim, weight, hidden_lanes + panel * dim * kLanes, kLanes, logits, kLanes,
                [&](Vec logit, int64_t i, int j) {
                    if constexpr (kLikeliest)
                        where[j] = logit > most[j] ? broadcast(static_cast<float>(i)) : where[j];
                    most[j] = max(most[j], logit);
                    return logit;
                });
            if constexpr (kLikeliest)
                ANT5M_UNROLL for (int j = 0; j < kVecs; ++j)
                    store(argmax + tile * kTokens + panel * kLanes + j * kWidth, where[j]);
            if (head.targets) for_targets(tile, panel, [&](int64_t token, int64_t i) {
                target_logit[token] = logits[i * kLanes + token - panel * kLanes];
            });
            Vec sum[kVecs] = {};
            for (int64_t i = 0; i < n; ++i)
                ANT5M_UNROLL for (int j = 0; j < kVecs; ++j) {
                    float* at = logits + i * kLanes + j * kWidth;
                    const Vec e = exp2(ANT5M_ISA::load(at) - most[j]);
                    sum[j] += e;
                    store(at, e);
                }
            ANT5M_UNROLL for (int j = 0; j < kVecs; ++j) {
                store(highest + tile * kTokens + panel * kLanes + j * kWidth, most[j]);
                store(total + tile * kTokens + panel * kLanes + j * kWidth, sum[j]);
            }
        }
    }

    // Step 2: each token's maximum and denominator, these in `shift` and `scale`.
    void sum_up() const {
        for (int64_t panel = 0; panel < panels; ++panel)
            for (int j = 0; j < kVecs; ++j) {
                const int64_t at = panel * kLanes + j * kWidth;
                Vec most = ANT5M_ISA::load(highest + at);
                for (int64_t tile = 1; tile < tiles; ++tile)
                    most = max(most, ANT5M_ISA::load(highest + tile * kTokens + at));
                Vec sum = {};
                for (int64_t tile = 0; tile < tiles; ++tile)
                    sum += ANT5M_ISA::load(total + tile * kTokens + at) *
                           exp2(ANT5M_ISA::load(highest + tile * kTokens + at) - most);
                store(shift + at, most);
                store(scale + at, sum);
            }
    }

    // The sum of the block's losses; `scale` gets its final meaning.
    double finish_softmax() const {
        sum_up();
        double losses = 0;
        for (int64_t token = 0; token < panels * kLanes; ++token) {
            const float sum = scale[token];
            const bool counted = token < tokens && counts(token);
            scale[token] = counted ? inverse_count / sum : 0.0f;
            if (counted) losses += static_cast<double>(shift[token] - target_logit[token] + log2f(sum)) * kLn2;
        }
        return losses;
    }

    // What `LogitSummary` asks for.
    void summarize(float* log_sum, int64_t* most_likely) const {
        sum_up();
        for (int64_t token = 0; token < tokens; ++token) {
            int64_t tile = 0;
            while (tile + 1 < tiles && highest[tile * kTokens + token] != shift[token]) ++tile;
            most_likely[first + token] = tile * kEntries + static_cast<int64_t>(argmax[tile * kTokens + token]);
            log_sum[first + token] = (shift[token] + log2f(scale[token])) * kLn2;
        }
    }

    // Step 3 for one tile: exponentials to gradients of the logits, and these to both gradients.
    void differentiate(int64_t tile, float* grad_hidden_lanes) const {
        const int64_t n = entries_of(tile);
        float* grad = scratch(kEntries * (kStride + kLanes));
        float* packed = grad + kEntries * kStride;
        const Operand weight{head.by_entry + tile * kEntries / Format::kVnni * head.by_entry_row, 1,
                             head.by_entry_row};
        for (int64_t panel = 0; panel < panels; ++panel) {
            const float* from = exponentials_of(tile, panel);
            float* columns = grad + panel * kLanes;
            Vec factor[kVecs];
            ANT5M_UNROLL for (int j = 0; j < kVecs; ++j) {
                const int64_t at = panel * kLanes + j * kWidth;
                factor[j] = exp2(ANT5M_ISA::load(highest + tile * kTokens + at) - ANT5M_ISA::load(shift + at)) *
                            ANT5M_ISA::load(scale + at);
            }
            for (int64_t i = 0; i < n; ++i)
                ANT5M_UNROLL for (int j = 0; j < kVecs; ++j)
                    store(columns + i * kStride + j * kWidth,
                          ANT5M_ISA::load(from + i * kLanes + j * kWidth) * factor[j]);
            for_targets(tile, panel, [&](int64_t token, int64_t i) { grad[i * kStride + token] -= inverse_count; });
            if (head.grad_hidden) {
                const auto [data, data_row] = panel_of<Format>(n, columns, kStride, packed);
                multiply_panel<Format, kVecs, true>(dim, n, weight, data, data_row,
                                                  grad_hidden_lanes + panel * dim * kLanes, kLanes);
            }
            Format::pack_columns(n, kLanes, columns, kStride, grad + panel * kLanes / Format::kVnni, kStride);
        }
        if (!head.grad_weight) return;
        float* grad_weight = head.grad_weight + tile * kEntries * head.grad_weight_row;
        if (first == 0) std::memset(grad_weight, 0, sizeof(float) * n * head.grad_weight_row);
        multiply<Format, true>(n, divide_up(dim, kWidth) * kWidth, panels * kLanes, {grad, kStride, 1}, hidden_rows,
                             row, grad_weight, head.grad_weight_row);
    }

    void differentiate_chunk(int64_t chunk) const {
        float* grad_hidden_lanes = grad_lanes + chunk * panels * dim * kLanes;
        if (head.grad_hidden) std::memset(grad_hidden_lanes, 0, sizeof(float) * panels * dim * kLanes);
        for (int64_t tile = chunk * tiles / chunks; tile < (chunk + 1) * tiles / chunks; ++tile)
            differentiate(tile, grad_hidden_lanes);
    }

    void store_grad_hidden(int64_t panel) const {
        float* sum = grad_lanes + panel * dim * kLanes;
        for (int64_t chunk = 1; chunk < chunks; ++chunk) {
            const float* part = sum + chunk * panels * dim * kLanes;
            for (int64_t i = 0; i < dim * kLanes; i += kWidth)
                store(sum + i, ANT5M_ISA::load(sum + i) + ANT5M_ISA::load(part + i));
        }
        transpose(dim, lanes_of(panel), sum, kLanes, head.grad_hidden + (first + panel * kLanes) * dim, dim);
    }
};

template <typename Format>
float mean_loss(Head head, int threads) {
    const Memory packed(head.packed_size<Format>());
    head.pack<Format>(packed.data(), threads);
    int64_t count = 0;
    for (int64_t i = 0; i < head.tokens; ++i) count += head.targets[i] != head.ignore_index;
    const Memory memory(Block<Format>::size(head));
    Block<Format> block(head, count, memory.data());
    double losses = 0;
    for (block.first = 0; block.first < head.tokens; block.first += kTokens) {
        block.begin(threads);
        parallel(threads, block.tiles, [&](int64_t tile) { block.exponentiate(tile); });
        losses += block.finish_softmax();
        if (!head.wants_gradient()) continue;
        parallel(threads, block.chunks, [&](int64_t chunk) { block.differentiate_chunk(chunk); });
        if (head.grad_hidden) parallel(threads, block.panels, [&](int64_t panel) { block.store_grad_hidden(panel); });
    }
    return static_cast<float>(losses / static_cast<double>(count > 0 ? count : 1));
}

}  // namespace

void linear_cross_entropy(int64_t tokens, int64_t dim, int64_t vocab, const float* hidden, int64_t hidden_row,
                          const float* weight, int64_t weight_row, const int64_t* targets, int64_t ignore_index,
                          float* loss, float* grad_hidden, float* grad_weight, int64_t grad_weight_row, bool bf16,
                          int threads) {
    const Head head{hidden, weight, targets, grad_hidden, grad_weight,
                    tokens, dim, vocab, hidden_row, weight_row, grad_weight_row, ignore_index};
    with_format(bf16, [&](auto format) { *loss = mean_loss<decltype(format)>(head, threads); });
}

void logsumexp_argmax(int64_t tokens, int64_t dim, int64_t vocab, const float* hidden, int64_t hidden_row,
                      const float* weight, int64_t weight_row, float* logsumexp, int64_t* argmax, int threads) {
    const Head head{hidden, weight, nullptr, nullptr, nullptr, tokens, dim, vocab, hidden_row, weight_row, 0, 0};
    const Memory memory(Block<Fp32>::size(head));
    Block<Fp32> block(head, 0, memory.data());
    const Memory rows(block.tiles * kTokens);
    block.argmax = rows.data();
    for (block.first = 0; block.first < tokens; block.first += kTokens) {
        block.begin(threads);
        parallel(threads, block.tiles, [&](int64_t tile) { block.exponentiate<true>(tile); });
        block.summarize(logsumexp, argmax);
    }
}

}  // namespace ant5m::ANT5M_ISA
