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
constexpr int64_t kEntries = 120;  // of the vocabulary in a tile, at most
constexpr int64_t kUnit = 24;      // and a multiple of this: whole tiles of the microkernel
constexpr int64_t kChunks = 16;    // partial gradients of hidden
constexpr int64_t kLoaded = kTasks * kLanes;  // tokens that are laid out for products at a time
constexpr int64_t kPart = 16;      // dimensions that a task sums over the chunks, at most
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
    float z_loss = 0;
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
        parallel(threads_for(vocab * dim, threads), divide_up(vocab, kUnit), [&](int64_t part) {
            const int64_t first = part * kUnit;
            const int64_t n = smaller(kUnit, vocab - first);
            const float* from = weight + first * weight_row;
            Format::pack_columns(n, dim, from, weight_row, rows + first * by_dim_row, by_dim_row);
            if (!wants_gradient()) return;
            Format::pack_rows(n, dim, from, weight_row, pairs + first / Format::kVnni * dim, dim);
        });
        by_dim = rows, by_entry = pairs;
    }
};

// How the vocabulary is cut: into tiles, and these into chunks, whose gradients of hidden are summed apart. It depends on
// the shape alone, so the results do not depend on the number of threads.
struct Cut {
    int64_t vocab, entries, tiles, chunks;

    explicit Cut(int64_t vocab_)
        : vocab(vocab_),
          entries(smaller(kEntries, larger(1, vocab / kChunks / kUnit) * kUnit)),
          tiles(divide_up(vocab, entries)),
          chunks(smaller(kChunks, tiles)) {}
    int64_t first(int64_t tile) const { return tile * entries; }
    int64_t size(int64_t tile) const { return smaller(entries, vocab - first(tile)); }
    int64_t first_tile(int64_t chunk) const { return chunk * tiles / chunks; }
};

// One block of tokens and where its intermediate results live.
template <typename Format>
struct Block {
    const Head& head;
    const Cut cut;
    int64_t dim, row;  // row: stride of hidden_rows
    int64_t loaded;    // tokens that hidden_lanes and hidden_rows have room for
    int64_t first = 0, tokens = 0, panels = 0;
    float inverse_count;
    float* hidden_lanes;  // [loaded / kLanes, dim, kLanes], times log2(e), each panel packed in place along dim
    float* hidden_rows;   // [loaded, row], zero behind dim and behind the last token; packed along the tokens
    float* m;             // [tiles, kTokens], the tile's largest logit
    float* l;             // [tiles, kTokens], the sum of its exponentials, relative to m
    float* argmax = nullptr;  // [tiles, kTokens], row of the tile's first largest logit; null when not wanted
    float* exponentials = nullptr;  // [tiles, kTokens / kLanes, entries, kLanes]; null when no gradient is wanted
    float* shift;         // [kTokens], the softmax's maximum
    float* scale;         // [kTokens], 1 / (denominator * count); 0 where nothing counts
    float* target_logit;  // [kTokens]
    float* grad_lanes = nullptr;    // [chunks, panels, dim, kLanes]

    static int64_t row_of(int64_t dim) { return divide_up(dim, kWidth) * kWidth + kWidth; }
    static int64_t loaded_of(const Head& head) {
        return larger(kTokens, smaller(kLoaded, divide_up(head.tokens, kTokens) * kTokens));
    }
    static int64_t size(const Head& head) {
        const Cut cut(head.vocab);
        const int64_t gradient = cut.entries * cut.tiles + cut.chunks * head.dim;
        return loaded_of(head) * (head.dim + row_of(head.dim)) +
               kTokens * (2 * cut.tiles + 3 + (head.wants_gradient() ? gradient : 0));
    }

    Block(const Head& head_, int64_t count, float* memory)
        : head(head_),
          cut(head.vocab),
          dim(head.dim),
          row(row_of(dim)),
          loaded(loaded_of(head)),
          inverse_count(1.0f / static_cast<float>(count > 0 ? count : 1)) {
        const auto take = [&](int64_t floats) {
            float* taken = memory;
            memory += floats;
            return taken;
        };
        hidden_lanes = take(loaded * dim);
        hidden_rows = take(loaded * row);
        m = take(cut.tiles * kTokens);
        l = take(cut.tiles * kTokens);
        shift = take(kTokens);
        scale = take(kTokens);
        target_logit = take(kTokens);
        if (!head.wants_gradient()) return;
        exponentials = take(cut.tiles * cut.entries * kTokens);
        grad_lanes = take(cut.chunks * kTokens * dim);
    }

    int64_t lanes_of(int64_t panel) const { return smaller(kLanes, tokens - panel * kLanes); }
    float* exponentials_of(int64_t tile, int64_t panel) const {
        return exponentials + (tile * kTokens + panel * kLanes) * cut.entries;
    }
    bool counts(int64_t token) const { return head.targets[first + token] != head.ignore_index; }

    // Calls visit(token, row) for the panel's targets that lie in the tile.
    template <typename Visit>
    void for_targets(int64_t tile, int64_t panel, const Visit& visit) const {
        for (int64_t token = panel * kLanes; token < panel * kLanes + lanes_of(panel); ++token) {
            const int64_t row_in_tile = head.targets[first + token] - cut.first(tile);
            if (counts(token) && row_in_tile >= 0 && row_in_tile < cut.size(tile)) visit(token, row_in_tile);
        }
    }

    // Where the block's tokens begin in hidden_lanes and hidden_rows.
    const float* lanes() const { return hidden_lanes + first % loaded * dim; }
    const float* rows() const { return hidden_rows + first % loaded / Format::kVnni * row; }

    // The panel of tokens from `from` on.
    void load(int64_t from) const {
        const float* hidden = head.hidden + from * head.hidden_row;
        const int64_t lanes = smaller(kLanes, head.tokens - from);
        float* to = hidden_lanes + from % loaded * dim;
        if (lanes < kLanes) std::memset(to, 0, sizeof(float) * dim * kLanes);
        transpose(lanes, dim, hidden, head.hidden_row, to, kLanes, kLog2e);
        Format::pack_rows(dim, kLanes, to, kLanes, to, kLanes);
        float* rows = hidden_rows + from % loaded / Format::kVnni * row;
        std::memset(rows, 0, sizeof(float) * kLanes / Format::kVnni * row);
        Format::pack_rows(lanes, dim, hidden, head.hidden_row, rows, row);
    }

    // The block that begins with token `first`.
    void begin(int threads) {
        tokens = smaller(kTokens, head.tokens - first);
        panels = divide_up(tokens, kLanes);
        if (first % loaded > 0) return;
        parallel(threads, divide_up(smaller(loaded, head.tokens - first), kLanes),
                 [&](int64_t panel) { load(first + panel * kLanes); });
    }

    // Calls body(index, begin, end) for each index of [0, count) and for ranges of panels, so many that there are kTasks.
    template <typename Body>
    void for_ranges(int threads, int64_t count, const Body& body) const {
        const int64_t ranges = smaller(panels, divide_up(kTasks, count));
        parallel(threads, count * ranges, [&](int64_t task) {
            const int64_t range = task % ranges;
            body(task / ranges, range * panels / ranges, (range + 1) * panels / ranges);
        });
    }

    // Step 1 for one tile of the vocabulary and the panels [begin, end).
    template <bool kLikeliest = false>
    void exponentiate(int64_t tile, int64_t begin, int64_t end) const {
        const int64_t n = cut.size(tile);
        const Operand weight{head.by_dim + cut.first(tile) * head.by_dim_row, head.by_dim_row, 1};
        for (int64_t panel = begin; panel < end; ++panel) {
            float* logits = exponentials ? exponentials_of(tile, panel) : scratch(kEntries * kLanes);
            Vec most[kVecs];
            Vec where[kVecs] = {};
            ANT5M_UNROLL for (int j = 0; j < kVecs; ++j) most[j] = broadcast(-__builtin_inff());
            multiply_panel<Format, kVecs, false>(
                n, dim, weight, lanes() + panel * dim * kLanes, kLanes, logits, kLanes,
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
                store(m + tile * kTokens + panel * kLanes + j * kWidth, most[j]);
                store(l + tile * kTokens + panel * kLanes + j * kWidth, sum[j]);
            }
        }
    }

    // Step 2: each token's maximum and denominator, these in `shift` and `scale`.
    void sum_up() const {
        for (int64_t panel = 0; panel < panels; ++panel)
            for (int j = 0; j < kVecs; ++j) {
                const int64_t at = panel * kLanes + j * kWidth;
                Vec most = ANT5M_ISA::load(m + at);
                for (int64_t tile = 1; tile < cut.tiles; ++tile)
                    most = max(most, ANT5M_ISA::load(m + tile * kTokens + at));
                Vec sum = {};
                for (int64_t tile = 0; tile < cut.tiles; ++tile)
                    sum += ANT5M_ISA::load(l + tile * kTokens + at) *
                           exp2(ANT5M_ISA::load(m + tile * kTokens + at) - most);
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
            if (counted && head.z_loss != 0) scale[token] *= 1 + 2 * head.z_loss * (shift[token] + log2f(sum)) * kLn2;
            if (counted) losses += static_cast<double>(shift[token] - target_logit[token] + log2f(sum)) * kLn2;
        }
        return losses;
    }

    // What `LogitSummary` asks for.
    void summarize(float* log_sum, int64_t* most_likely) const {
        sum_up();
        for (int64_t token = 0; token < tokens; ++token) {
            int64_t tile = 0;
            while (tile + 1 < cut.tiles && m[tile * kTokens + token] != shift[token]) ++tile;
            most_likely[first + token] = cut.first(tile) + static_cast<int64_t>(argmax[tile * kTokens + token]);
            log_sum[first + token] = (shift[token] + log2f(scale[token])) * kLn2;
        }
    }

    float* sum_lanes(int64_t chunk, int64_t panel) const { return grad_lanes + (chunk * panels + panel) * dim * kLanes; }

    // Step 3 for one tile and one panel: from exponentials to gradients of the logits, in `columns` [entries, row], and
    // what these add to the gradient of hidden. They are left in `to` (which may be `columns`), packed along the tokens.
    void differentiate(int64_t tile, int64_t panel, float* columns, int64_t columns_row, float* packed, float* to,
                       int64_t to_row, float* grad_hidden_lanes) const {
        const int64_t n = cut.size(tile);
        const float* from = exponentials_of(tile, panel);
        Vec factor[kVecs];
        ANT5M_UNROLL for (int j = 0; j < kVecs; ++j) {
            const int64_t at = panel * kLanes + j * kWidth;
            factor[j] = exp2(ANT5M_ISA::load(m + tile * kTokens + at) - ANT5M_ISA::load(shift + at)) *
                        ANT5M_ISA::load(scale + at);
        }
        for (int64_t i = 0; i < n; ++i)
            ANT5M_UNROLL for (int j = 0; j < kVecs; ++j)
                store(columns + i * columns_row + j * kWidth,
                      ANT5M_ISA::load(from + i * kLanes + j * kWidth) * factor[j]);
        for_targets(tile, panel, [&](int64_t token, int64_t i) {
            columns[i * columns_row + token - panel * kLanes] -= inverse_count;
        });
        if (head.grad_hidden) {
            const Operand weight{head.by_entry + cut.first(tile) / Format::kVnni * head.by_entry_row, 1,
                                 head.by_entry_row};
            const auto [data, row] = panel_of<Format>(n, columns, columns_row, packed);
            multiply_panel<Format, kVecs, true>(dim, n, weight, data, row, grad_hidden_lanes, kLanes);
        }
        Format::pack_columns(n, kLanes, columns, columns_row, to, to_row);
    }

    // The gradient of n rows of the weight from `entry` on, from the gradients of their logits [n, kStride].
    void add_grad_weight(int64_t entry, int64_t n, const float* grad) const {
        float* to = head.grad_weight + entry * head.grad_weight_row;
        if (first == 0) std::memset(to, 0, sizeof(float) * n * head.grad_weight_row);
        multiply<Format, true>(n, divide_up(dim, kWidth) * kWidth, panels * kLanes, {grad, kStride, 1}, rows(), row, to,
                               head.grad_weight_row);
    }

    // Step 3 with chunks as tasks.
    void differentiate_chunk(int64_t chunk) const {
        float* grad = scratch(kEntries * (kStride + kLanes));
        float* packed = grad + kEntries * kStride;
        if (head.grad_hidden) std::memset(sum_lanes(chunk, 0), 0, sizeof(float) * panels * dim * kLanes);
        for (int64_t tile = cut.first_tile(chunk); tile < cut.first_tile(chunk + 1); ++tile) {
            for (int64_t panel = 0; panel < panels; ++panel)
                differentiate(tile, panel, grad + panel * kLanes, kStride, packed,
                              grad + panel * kLanes / Format::kVnni, kStride, sum_lanes(chunk, panel));
            if (head.grad_weight) add_grad_weight(cut.first(tile), cut.size(tile), grad);
        }
    }

    // The same sums with more tasks, which costs another pass over the gradients of the logits: they take the place of
    // the exponentials.
    void differentiate_apart(int threads) const {
        for_ranges(threads, cut.chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
            float* packed = scratch(kEntries * kLanes);
            if (head.grad_hidden)
                std::memset(sum_lanes(chunk, begin), 0, sizeof(float) * (end - begin) * dim * kLanes);
            for (int64_t tile = cut.first_tile(chunk); tile < cut.first_tile(chunk + 1); ++tile)
                for (int64_t panel = begin; panel < end; ++panel) {
                    float* at = exponentials_of(tile, panel);
                    differentiate(tile, panel, at, kLanes, packed, at, kLanes, sum_lanes(chunk, panel));
                }
        });
        if (!head.grad_weight) return;
        const int64_t parts = divide_up(kTasks, cut.tiles);
        const int64_t part = divide_up(cut.entries, parts);
        parallel(threads, cut.tiles * parts, [&](int64_t task) {
            constexpr int64_t kUnits = kLanes / Format::kVnni;
            const int64_t tile = task / parts;
            const int64_t from = task % parts * part;
            const int64_t n = smaller(part, cut.size(tile) - from);
            if (n <= 0) return;
            float* grad = scratch(kEntries * kStride);
            for (int64_t panel = 0; panel < panels; ++panel)
                for (int64_t i = 0; i < n; ++i)
                    std::memcpy(grad + i * kStride + panel * kUnits, exponentials_of(tile, panel) + (from + i) * kLanes,
                                sizeof(float) * kUnits);
            add_grad_weight(cut.first(tile) + from, n, grad);
        });
    }

    // Step 3.
    void differentiate_all(int threads) const {
        if (cut.chunks < 4 * threads) return differentiate_apart(threads);
        parallel(threads, cut.chunks, [&](int64_t chunk) { differentiate_chunk(chunk); });
    }

    void store_grad_hidden(int threads) const {
        const int64_t part = smaller(kPart, part_of(dim, divide_up(kTasks, panels)));
        const int64_t parts = divide_up(dim, part);
        parallel(threads, panels * parts, [&](int64_t task) {
            const int64_t panel = task / parts;
            const int64_t from = task % parts * part;
            const int64_t n = smaller(part, dim - from);
            float* sum = sum_lanes(0, panel) + from * kLanes;
            for (int64_t chunk = 1; chunk < cut.chunks; ++chunk)
                add_floats(n * kLanes, sum_lanes(chunk, panel) + from * kLanes, sum);
            transpose(n, lanes_of(panel), sum, kLanes, head.grad_hidden + (first + panel * kLanes) * dim + from, dim);
        });
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
        block.for_ranges(threads, block.cut.tiles, [&](int64_t tile, int64_t begin, int64_t end) { block.exponentiate(tile, begin, end); });
        losses += block.finish_softmax();
        if (!head.wants_gradient()) continue;
        block.differentiate_all(threads);
        if (head.grad_hidden) block.store_grad_hidden(threads);
    }
    return static_cast<float>(losses / static_cast<double>(count > 0 ? count : 1));
}

}  // namespace

void linear_cross_entropy(int64_t tokens, int64_t dim, int64_t vocab, const float* hidden, int64_t hidden_row,
                          const float* weight, int64_t weight_row, const int64_t* targets, int64_t ignore_index,
                          float z_loss, float* loss, float* grad_hidden, float* grad_weight, int64_t grad_weight_row,
                          bool bf16, int threads) {
    const Head head{hidden, weight, targets, grad_hidden, grad_weight,
                    tokens, dim, vocab, hidden_row, weight_row, grad_weight_row, ignore_index, z_loss};
    with_format(bf16, [&](auto format) { *loss = mean_loss<decltype(format)>(head, threads); });
}

void logsumexp_argmax(int64_t tokens, int64_t dim, int64_t vocab, const float* hidden, int64_t hidden_row,
                      const float* weight, int64_t weight_row, float* logsumexp, int64_t* argmax, int threads) {
    const Head head{hidden, weight, nullptr, nullptr, nullptr, tokens, dim, vocab, hidden_row, weight_row, 0, 0};
    const Memory memory(Block<Fp32>::size(head));
    Block<Fp32> block(head, 0, memory.data());
    const Memory rows(block.cut.tiles * kTokens);
    block.argmax = rows.data();
    for (block.first = 0; block.first < tokens; block.first += kTokens) {
        block.begin(threads);
        block.for_ranges(threads, block.cut.tiles, [&](int64_t tile, int64_t begin, int64_t end) { block.exponentiate<true>(tile, begin, end); });
        block.summarize(logsumexp, argmax);
    }
}

}  // namespace ant5m::ANT5M_ISA
