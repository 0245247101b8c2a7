// Causal grouped-query attention after FlashAttention (Dao et al., 2022): tiles of scores that never leave L1, an
// online softmax, and a backward pass that recomputes the probabilities from the saved log-sum-exp.
//
// Everything is transposed: a vector holds the same thing for consecutive query positions of one head ("lanes"), so
// that maximum, sum and rescaling of the softmax need no operation across a vector, K and V are read where they lie
// whatever their strides, and a head dimension of 16 wastes nothing. The scale and log2(e) are folded into q, so
// that the softmax is a power of two.
#include <math.h>

#include <initializer_list>
#include <type_traits>

#include "memory.h"
#include "ops.h"
#include "parallel.h"
#include "gemm.h"

namespace ant5m::ANT5M_ISA {
namespace {

// Keys a tile: whole tiles of the microkernel, and 128 x 32 scores are 16 KiB.
constexpr int64_t kForwardKeys = kRows == 6 ? 96 : 128;
constexpr int64_t kBackwardKeys = 64;
constexpr int64_t kFewestPositions = 64;  // of a range of queries
constexpr int64_t kKeysATask = 64;        // where little is done to each
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kInfinity = __builtin_inff();
constexpr float kLowest = -3.4e38f;  // m before the first key: not -inf, whose difference to itself is NaN

int64_t panels_of(int64_t length) { return divide_up(length, kLanes); }
int64_t round_up(int64_t n) { return divide_up(n, kWidth) * kWidth; }

// The rows [dim] of one head from one position on.
struct Rows {
    const float* data;
    int64_t row;
    Rows from(int64_t position) const { return {data + position * row, row}; }
};

Rows rows_of(const Heads& x, int64_t batch, int64_t head) {
    return {x.data + batch * x.batch + head * x.head, x.time};
}

// K or V as products read it, keys first or dimensions first: for fp32 where it lies, else packed along the other of
// the two, of every head [batch, kv_heads, ..].
template <typename Format>
class PackedKeys {
  public:
    enum Order { kKeysFirst, kDimensionsFirst };

    PackedKeys(const AttentionShape& shape, const Heads& x, Order order, int threads)
        : shape_(shape),
          x_(x),
          order_(order),
          row_(order == kKeysFirst ? Format::count(shape.dim) : shape.dim),
          size_((order == kKeysFirst ? shape.length : Format::count(shape.length)) * row_),
          memory_(Format::kVnni == 1 ? 0 : shape.batch * shape.kv_heads * size_) {
        if (Format::kVnni == 1) return;
        const int64_t chunks = divide_up(shape.length, kKeysATask);
        parallel(threads, shape.batch * shape.kv_heads * chunks, [&](int64_t task) {
            const int64_t head = task / chunks;
            const int64_t first = task % chunks * kKeysATask;
            const int64_t n = smaller(kKeysATask, shape.length - first);
            const Rows rows = rows_of(x, head / shape.kv_heads, head % shape.kv_heads).from(first);
            float* to = memory_.data() + head * size_;
            if (order == kKeysFirst)
                Format::pack_columns(n, shape.dim, rows.data, rows.row, to + first * row_, row_);
            else
                Format::pack_rows(n, shape.dim, rows.data, rows.row, to + first / Format::kVnni * row_, row_);
        });
    }

    // From key `start` on, which is even.
    Operand from(int64_t start, int64_t batch, int64_t head) const {
        Rows rows = rows_of(x_, batch, head);
        if (Format::kVnni > 1) rows = {memory_.data() + (batch * shape_.kv_heads + head) * size_, row_};
        if (order_ == kKeysFirst) return {rows.from(start).data, rows.row, 1};
        return {rows.from(start / Format::kVnni).data, 1, rows.row};
    }

  private:
    const AttentionShape& shape_;
    const Heads& x_;
    Order order_;
    int64_t row_, size_;
    Memory memory_;
};

// Vectors of `lanes` positions from `rows` on: to [dim, kLanes], zero behind the last position.
void load_lanes(const Rows& rows, int64_t lanes, int64_t dim, float scale, float* to) {
    if (lanes < kLanes) std::memset(to, 0, sizeof(float) * dim * kLanes);
    transpose(lanes, dim, rows.data, rows.row, to, kLanes, scale);
}

// Keys behind a lane's position are masked: row i is key `offset` + i, lane 0 position 0.
struct CausalMask {
    int32_t offset;
    Vec operator()(Vec score, int64_t i, int j) const {
        return iota() + j * kWidth >= static_cast<int32_t>(i) + offset ? score : broadcast(-kInfinity);
    }
};

// So are those that end before it: lane 0 is position `first`, and ends[i] belongs to row i.
struct TreeMask {
    int32_t offset, first;
    const int32_t* ends;
    Vec operator()(Vec score, int64_t i, int j) const {
        const IntVec position = iota() + j * kWidth;
        const IntVec seen = (position >= static_cast<int32_t>(i) + offset) & (position < ends[i] - first);
        return seen ? score : broadcast(-kInfinity);
    }
};

struct NoMask {
    Vec operator()(Vec score, int64_t, int) const { return score; }
};

// What the positions of one sequence see: all keys up to their own, or with `ends` those of them that reach that far.
struct BlockMask {
    const int32_t* ends;
    const int32_t* latest;    // the largest end of each kLanes keys
    const int32_t* earliest;  // the smallest

    bool any(int64_t start, int64_t first) const { return !ends || latest[start / kLanes] > first; }
    bool all(int64_t start, int64_t stop, int64_t behind) const {
        for (; ends && start < stop; start += kLanes)
            if (earliest[start / kLanes] < behind) return false;
        return true;
    }

    // Calls add(start, n, mask) for tiles of up to `most` keys with all that the `lanes` positions from `first` on see.
    template <typename Add>
    void for_tiles(int64_t first, int64_t lanes, int64_t most, const Add& add) const {
        const int64_t behind = first + lanes;
        for (int64_t start = 0, stop; start < behind; start = stop) {
            stop = start + kLanes;
            if (!any(start, first)) continue;
            while (stop < behind && stop - start < most && any(stop, first)) stop += kLanes;
            const int64_t n = (stop < behind ? stop : behind) - start;
            const auto offset = static_cast<int32_t>(start - first);
            if (!all(start, start + n, behind))
                add(start, n, TreeMask{offset, static_cast<int32_t>(first), ends + start});
            else if (start + n - 1 > first)
                add(start, n, CausalMask{offset});
            else
                add(start, n, NoMask{});
        }
    }
};

// The `BlockMask` of every sequence.
class BlockMasks {
  public:
    BlockMasks(const AttentionShape& shape, const int32_t* ends)
        : ends_(ends), length_(shape.length), blocks_(panels_of(length_)), memory_(2 * shape.batch * blocks_ * !!ends) {
        if (!ends) return;
        for (int64_t i = 0; i < shape.batch * blocks_; ++i) {
            const int64_t first = i % blocks_ * kLanes;
            const int32_t* at = ends + i / blocks_ * length_ + first;
            int32_t latest = at[0], earliest = at[0];
            for (int64_t j = 1; j < kLanes && first + j < length_; ++j) {
                latest = at[j] > latest ? at[j] : latest;
                earliest = at[j] < earliest ? at[j] : earliest;
            }
            of_blocks()[2 * (i / blocks_) * blocks_ + i % blocks_] = latest;
            of_blocks()[(2 * (i / blocks_) + 1) * blocks_ + i % blocks_] = earliest;
        }
    }
    BlockMask of(int64_t batch) const {
        if (!ends_) return {};
        const int32_t* latest = of_blocks() + 2 * batch * blocks_;
        return {ends_ + batch * length_, latest, latest + blocks_};
    }

  private:
    int32_t* of_blocks() const { return reinterpret_cast<int32_t*>(memory_.data()); }

    const int32_t* ends_;
    int64_t length_, blocks_;
    Memory memory_;
};

// The online softmax of one head's panel of positions, and its output so far.
template <typename Format>
struct Online {
    Vec m[kVecs];  // the largest score so far
    Vec l[kVecs];  // the sum of the exponentials so far, relative to it
    float* queries;  // [dim, kLanes] packed along dim
    float* output;   // [dim, kLanes]

    // One tile of n keys: k with the keys first, v with the dimensions first.
    template <int kDim, typename Mask>
    void add(const Operand& k, const Operand& v, int64_t n, int64_t any_dim, const Mask& mask, float* tile) {
        const int64_t dim = kDim ? kDim : any_dim;
        Vec m_new[kVecs];
        ANT5M_UNROLL for (int j = 0; j < kVecs; ++j) m_new[j] = m[j];
        multiply_panel<Format, kVecs, false>(n, dim, k, queries, kLanes, tile, kLanes,
                                           [&](Vec score, int64_t i, int j) {
                                               score = mask(score, i, j);
                                               m_new[j] = max(m_new[j], score);
                                               return score;
                                           });
        Vec sum[kVecs];
        Vec alpha[kVecs];
        ANT5M_UNROLL for (int j = 0; j < kVecs; ++j) {
            alpha[j] = exp2(m[j] - m_new[j]);
            sum[j] = l[j] * alpha[j];
            m[j] = m_new[j];
        }
        // Two keys at once, behind the last of an odd number one of no weight.
        for (int j = 0; n % 2 && j < kVecs; ++j) store(tile + n * kLanes + j * kWidth, broadcast(-kInfinity));
        for (int64_t i = 0; i < n; i += 2) {
            Vec p[2 * kVecs];
            ANT5M_UNROLL for (int u = 0; u < 2 * kVecs; ++u)
                p[u] = load(tile + i * kLanes + u * kWidth) - m_new[u % kVecs];
            exp2(p);
            ANT5M_UNROLL for (int u = 0; u < 2 * kVecs; ++u) sum[u % kVecs] += p[u];
            ANT5M_UNROLL for (int u = 0; u < 2 * kVecs; u += Format::kVnni) {
                if constexpr (Format::kVnni == 1)
                    store(tile + i * kLanes + u * kWidth, p[u]);
                else
                    store(tile + i / 2 * kLanes + u / 2 * kWidth, Format::of({p[u / 2], p[kVecs + u / 2]}));
            }
        }
        ANT5M_UNROLL for (int j = 0; j < kVecs; ++j) l[j] = sum[j];
        for (int64_t d = 0; d < dim; ++d)
            ANT5M_UNROLL for (int j = 0; j < kVecs; ++j) {
                float* at = output + d * kLanes + j * kWidth;
                store(at, load(at) * alpha[j]);
            }
        multiply_panel<Format, kVecs, true>(dim, n, v, tile, kLanes, output, kLanes);
    }
};

// All heads of key/value head `kv`, for the panel of positions from `first` on.
template <typename Format, int kDim>
void forward_panel(const AttentionShape& shape, const Heads& q, const PackedKeys<Format>& k,
                   const PackedKeys<Format>& v, const BlockMask& mask, int64_t batch, int64_t kv, int64_t first,
                   float* out, float* lse) {
    const int64_t dim = kDim ? kDim : shape.dim;
    const int64_t group = shape.heads / shape.kv_heads;
    const int64_t lanes = shape.length - first < kLanes ? shape.length - first : kLanes;
    float* tile = scratch(kForwardKeys * kLanes + kLanes * 2 + dim * kLanes * 2);
    float* last = tile + kForwardKeys * kLanes;
    float* state = last + kLanes * 2;
    for (int64_t g = 0; g < group; ++g) {
        const int64_t head = kv * group + g;
        Online<Format> online;
        ANT5M_UNROLL for (int j = 0; j < kVecs; ++j) {
            online.m[j] = broadcast(kLowest);
            online.l[j] = Vec{};
        }
        online.queries = state;
        online.output = state + dim * kLanes;
        load_lanes(rows_of(q, batch, head).from(first), lanes, dim, kLog2e / sqrtf(static_cast<float>(dim)),
                   online.queries);
        Format::pack_rows(dim, kLanes, online.queries, kLanes, online.queries, kLanes);
        std::memset(online.output, 0, sizeof(float) * dim * kLanes);
        mask.for_tiles(first, lanes, kForwardKeys, [&](int64_t start, int64_t n, const auto& tile_mask) {
            online.template add<kDim>(k.from(start, batch, kv), v.from(start, batch, kv), n, dim, tile_mask, tile);
        });
        ANT5M_UNROLL for (int j = 0; j < kVecs; ++j) {
            store(last + j * kWidth, online.m[j]);
            store(last + kLanes + j * kWidth, online.l[j]);
            const Vec factor = 1.0f / online.l[j];
            for (int64_t d = 0; d < dim; ++d) {
                float* at = online.output + d * kLanes + j * kWidth;
                store(at, load(at) * factor);
            }
        }
        for (int64_t i = 0; lse && i < lanes; ++i)
            lse[(batch * shape.heads + head) * shape.length + first + i] = last[i] + log2f(last[kLanes + i]);
        transpose(dim, lanes, online.output, kLanes,
                  out + ((batch * shape.length + first) * shape.heads + head) * dim, shape.heads * dim);
    }
}

// What the backward pass keeps of one head's panel of positions.
struct Panel {
    float* queries;    // [dim, kLanes] packed along dim, times scale and log2(e)
    float* grad;       // [dim, kLanes] packed along dim, gradient of the output
    float* grad_q;     // [dim, kLanes]
    float* query_row;  // [kLanes, width] packed along the lanes, as `queries`
    float* grad_row;   // [kLanes, width] packed along the lanes
    float* lse;        // [kLanes], +inf behind the last position, which makes the probabilities 0
    float* delta;      // [kLanes], sum over dim of output * gradient

    static int64_t size(int64_t dim) { return kLanes * (3 * dim + 2 * round_up(dim) + 2); }
    Panel(float* memory, int64_t dim)
        : queries(memory),
          grad(queries + dim * kLanes),
          grad_q(grad + dim * kLanes),
          query_row(grad_q + dim * kLanes),
          grad_row(query_row + kLanes * round_up(dim)),
          lse(grad_row + kLanes * round_up(dim)),
          delta(lse + kLanes) {}
};

void copy_rows(const Rows& rows, int64_t lanes, int64_t dim, float scale, float* to) {
    const int64_t width = round_up(dim);
    if (lanes < kLanes || width > dim) std::memset(to, 0, sizeof(float) * kLanes * width);
    for (int64_t i = 0; i < lanes; ++i)
        for (int64_t d = 0; d < dim; ++d) to[i * width + d] = rows.data[i * rows.row + d] * scale;
}

template <typename Format>
void load_panel(const Rows& q, const Rows& out, const Rows& grad, const float* lse, int64_t lanes, int64_t dim,
                const Panel& panel) {
    const float scale = kLog2e / sqrtf(static_cast<float>(dim));
    load_lanes(q, lanes, dim, scale, panel.queries);
    load_lanes(grad, lanes, dim, 1.0f, panel.grad);
    copy_rows(q, lanes, dim, scale, panel.query_row);
    copy_rows(grad, lanes, dim, 1.0f, panel.grad_row);
    for (int64_t i = 0; i < kLanes; ++i) panel.lse[i] = i < lanes ? lse[i] : kInfinity;
    float* outputs = panel.grad_q;  // until the gradient needs its place
    load_lanes(out, lanes, dim, 1.0f, outputs);
    ANT5M_UNROLL for (int j = 0; j < kVecs; ++j) {
        Vec delta = {};
        // Of the gradient that the scores' is made of, or that of a row would not sum to 0.
        for (int64_t d = 0; d < dim; ++d)
            delta += load(outputs + d * kLanes + j * kWidth) *
                     Format::rounded(load(panel.grad + d * kLanes + j * kWidth));
        store(panel.delta + j * kWidth, delta);
    }
    std::memset(panel.grad_q, 0, sizeof(float) * dim * kLanes);
    for (float* lanes_of_dim : {panel.queries, panel.grad})
        Format::pack_rows(dim, kLanes, lanes_of_dim, kLanes, lanes_of_dim, kLanes);
    const int64_t width = round_up(dim);
    for (float* rows : {panel.query_row, panel.grad_row}) Format::pack_rows(kLanes, width, rows, width, rows, width);
}

// K and V for the backward pass.
template <typename Format>
struct BackwardKeys {
    PackedKeys<Format> k, v, k_by_dimension;
    BackwardKeys(const AttentionShape& shape, const Heads& k_, const Heads& v_, int threads)
        : k(shape, k_, k.kKeysFirst, threads),
          v(shape, v_, v.kKeysFirst, threads),
          k_by_dimension(shape, k_, k.kDimensionsFirst, threads) {}
};

// One tile of n keys by one panel: adds to the panel's grad_q and to grad_k, grad_v [n, width]. k and v with the keys
// first, k_by_dimension with the dimensions first.
template <typename Format, int kDim, typename Mask>
void backward_tile(const Operand& k, const Operand& v, const Operand& k_by_dimension, int64_t n, int64_t any_dim,
                   const Panel& panel, const Mask& mask, float* probabilities, float* grad_k, float* grad_v) {
    const int64_t dim = kDim ? kDim : any_dim;
    const int64_t width = round_up(dim);
    float* grad_scores = probabilities + kBackwardKeys * kLanes;
    float* packed = grad_scores + kBackwardKeys * kLanes;
    Vec lse[kVecs];
    Vec delta[kVecs];
    ANT5M_UNROLL for (int j = 0; j < kVecs; ++j) {
        lse[j] = load(panel.lse + j * kWidth);
        delta[j] = load(panel.delta + j * kWidth);
    }
    multiply_panel<Format, kVecs, false>(
        n, dim, k, panel.queries, kLanes, probabilities, kLanes,
        [&](Vec score, int64_t i, int j) { return exp2(mask(score - lse[j], i, j)); });
    multiply_panel<Format, kVecs, false>(n, dim, v, panel.grad, kLanes, grad_scores, kLanes,
                                       [&](Vec grad, int64_t i, int j) {
                                           return (grad - delta[j]) * load(probabilities + i * kLanes + j * kWidth);
                                       });
    const auto [columns, row] = panel_of<Format>(n, grad_scores, kLanes, packed);
    multiply_panel<Format, kVecs, true>(dim, n, k_by_dimension, columns, row, panel.grad_q, kLanes);
    for (float* rows : {probabilities, grad_scores}) Format::pack_columns(n, kLanes, rows, kLanes, rows, kLanes);
    multiply<Format, true>(n, width, kLanes, {probabilities, kLanes, 1}, panel.grad_row, width, grad_v, width);
    multiply<Format, true>(n, width, kLanes, {grad_scores, kLanes, 1}, panel.query_row, width, grad_k, width);
}

// The backward pass goes by ranges of the queries, whose gradients of K and V are summed apart and then together, in
// their order. How many there are depends on the shape alone, so the results do not depend on the number of threads.
struct Ranges {
    int64_t count, positions, length;

    explicit Ranges(const AttentionShape& shape) : length(shape.length) {
        const int64_t heads = shape.batch * shape.kv_heads;
        const int64_t most = divide_up(length, kFewestPositions);
        count = smaller(divide_up(kTasks, heads < 1 ? 1 : heads), most < 1 ? 1 : most);
        positions = divide_up(divide_up(length, count), kLanes) * kLanes;
        count = divide_up(length, positions < 1 ? 1 : positions);
    }
    int64_t first(int64_t range) const { return range * positions; }
    int64_t end(int64_t range) const { return smaller(length, first(range + 1)); }
    // Rows of the ranges before: each has one for each key that it may see.
    int64_t rows_before(int64_t range) const { return positions * range * (range + 1) / 2; }
    int64_t rows() const { return count ? rows_before(count - 1) + length : 0; }
};

// What the queries of one range add to the gradients of one key/value head: sums [2, end of the range, width], of K and
// of V. Panel by panel of the positions of its query heads, while K, V and the sums stay in L2.
template <typename Format, int kDim>
void backward_range(const AttentionShape& shape, const Heads& q, const BackwardKeys<Format>& keys, const Heads& out,
                    const Heads& grad, const BlockMask& mask, const float* lse, int64_t batch, int64_t kv,
                    int64_t begin, int64_t end, float* grad_q, float* sums) {
    const int64_t dim = kDim ? kDim : shape.dim;
    const int64_t width = round_up(dim);
    const int64_t group = shape.heads / shape.kv_heads;
    float* tiles = scratch(3 * kBackwardKeys * kLanes + Panel::size(dim));
    const Panel panel(tiles + 3 * kBackwardKeys * kLanes, dim);
    float* sum_k = sums;
    float* sum_v = sums + end * width;
    std::memset(sums, 0, sizeof(float) * 2 * end * width);
    for (int64_t first = begin; first < end; first += kLanes)
        for (int64_t head = kv * group; head < (kv + 1) * group; ++head) {
            const int64_t lanes = smaller(kLanes, end - first);
            load_panel<Format>(rows_of(q, batch, head).from(first), rows_of(out, batch, head).from(first),
                               rows_of(grad, batch, head).from(first),
                               lse + (batch * shape.heads + head) * shape.length + first, lanes, dim, panel);
            mask.for_tiles(first, lanes, kBackwardKeys, [&](int64_t start, int64_t n, const auto& tile_mask) {
                backward_tile<Format, kDim>(keys.k.from(start, batch, kv), keys.v.from(start, batch, kv),
                                            keys.k_by_dimension.from(start, batch, kv), n, dim, panel, tile_mask,
                                            tiles, sum_k + start * width, sum_v + start * width);
            });
            transpose(dim, lanes, panel.grad_q, kLanes,
                      grad_q + ((batch * shape.length + first) * shape.heads + head) * dim, shape.heads * dim,
                      1.0f / sqrtf(static_cast<float>(dim)));
        }
}

// grad_k and grad_v of the keys [begin, end) of one head: the sums [rows, width] of its ranges.
void add_ranges(const AttentionShape& shape, const Ranges& ranges, const float* sums, int64_t batch, int64_t kv,
                int64_t begin, int64_t end, float* grad_k, float* grad_v) {
    const int64_t width = round_up(shape.dim);
    for (int64_t t = begin; t < end; ++t) {
        const int64_t at = ((batch * shape.length + t) * shape.kv_heads + kv) * shape.dim;
        for_vectors(shape.dim, [&](int64_t d, auto, auto write) {
            Vec sum_k = {}, sum_v = {};
            for (int64_t range = t / ranges.positions; range < ranges.count; ++range) {
                const float* part = sums + (2 * ranges.rows_before(range) + t) * width + d;
                sum_k += load(part);
                sum_v += load(part + ranges.end(range) * width);
            }
            write(grad_k + at + d, sum_k * kLn2);  // the queries carried log2(e)
            write(grad_v + at + d, sum_v);
        });
    }
}

// The head dimensions of common models as constants, which lets the compiler unroll; 0 is any other.
template <typename Body>
void with_dim(int64_t dim, const Body& body) {
    switch (dim) {
        case 16: return body(std::integral_constant<int, 16>());
        case 64: return body(std::integral_constant<int, 64>());
        default: return body(std::integral_constant<int, 0>());
    }
}

template <typename Format>
void forward(const AttentionShape& shape, const Heads& q, const Heads& k, const Heads& v, const int32_t* ends,
             float* out, float* lse, int threads) {
    const int64_t panels = panels_of(shape.length);
    const BlockMasks masks(shape, ends);
    const PackedKeys<Format> keys(shape, k, keys.kKeysFirst, threads);
    const PackedKeys<Format> values(shape, v, keys.kDimensionsFirst, threads);
    with_dim(shape.dim, [&](auto dim) {
        parallel(threads, shape.batch * shape.kv_heads * panels, [&](int64_t task) {
            const int64_t batch = task / panels / shape.kv_heads;
            const int64_t head = task / panels % shape.kv_heads;
            const int64_t panel = panels - 1 - task % panels;  // the longest first
            forward_panel<Format, dim.value>(shape, q, keys, values, masks.of(batch), batch, head, panel * kLanes, out,
                                           lse);
        });
    });
}

template <typename Format>
void backward(const AttentionShape& shape, const Heads& q, const Heads& k, const Heads& v, const Heads& out,
              const Heads& grad, const int32_t* ends, const float* lse, float* grad_q, float* grad_k, float* grad_v,
              int threads) {
    const BlockMasks masks(shape, ends);
    const BackwardKeys<Format> keys(shape, k, v, threads);
    const Ranges ranges(shape);
    const int64_t heads = shape.batch * shape.kv_heads;
    const int64_t width = round_up(shape.dim);
    const int64_t size = 2 * ranges.rows() * width;
    const Memory sums(heads * size);
    with_dim(shape.dim, [&](auto dim) {
        parallel(threads, heads * ranges.count, [&](int64_t task) {
            const int64_t head = task % heads;
            const int64_t batch = head / shape.kv_heads;
            const int64_t range = ranges.count - 1 - task / heads;  // the longest first
            backward_range<Format, dim.value>(shape, q, keys, out, grad, masks.of(batch), lse, batch,
                                              head % shape.kv_heads, ranges.first(range), ranges.end(range), grad_q,
                                              sums.data() + head * size + 2 * ranges.rows_before(range) * width);
        });
    });
    const int64_t chunks = divide_up(shape.length, kKeysATask);
    parallel(threads, heads * chunks, [&](int64_t task) {
        const int64_t head = task / chunks;
        const int64_t begin = task % chunks * kKeysATask;
        add_ranges(shape, ranges, sums.data() + head * size, head / shape.kv_heads, head % shape.kv_heads, begin,
                   smaller(shape.length, begin + kKeysATask), grad_k, grad_v);
    });
}

}  // namespace

void attention_forward(const AttentionShape& shape, const Heads& q, const Heads& k, const Heads& v,
                       const int32_t* ends, float* out, float* lse, bool bf16, int threads) {
    with_format(bf16, [&](auto format) { forward<decltype(format)>(shape, q, k, v, ends, out, lse, threads); });
}

void attention_backward(const AttentionShape& shape, const Heads& q, const Heads& k, const Heads& v, const Heads& out,
                        const Heads& grad, const int32_t* ends, const float* lse, float* grad_q, float* grad_k,
                        float* grad_v, bool bf16, int threads) {
    with_format(bf16, [&](auto format) {
        backward<decltype(format)>(shape, q, k, v, out, grad, ends, lse, grad_q, grad_k, grad_v, threads);
    });
}

void attention_tiles(const AttentionShape& shape, const int32_t* ends, int64_t* counts) {
    const BlockMasks masks(shape, ends);
    counts[0] = counts[1] = counts[2] = 0;
    for (int64_t batch = 0; batch < shape.batch; ++batch)
        for (int64_t first = 0; first < shape.length; first += kLanes)
            masks.of(batch).for_tiles(
                first, smaller(kLanes, shape.length - first), kForwardKeys, [&](int64_t, int64_t, const auto& mask) {
                    using Mask = std::decay_t<decltype(mask)>;
                    ++counts[std::is_same_v<Mask, CausalMask> ? 1 : std::is_same_v<Mask, TreeMask> ? 2 : 0];
                });
}

}  // namespace ant5m::ANT5M_ISA
