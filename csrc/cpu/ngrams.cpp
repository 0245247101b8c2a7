#include "ngrams.h"

#include <utility>

namespace ant5m {
namespace {

constexpr uint64_t kBase = 0x9E3779B97F4A7C15;  // odd: 2^64 over the golden ratio

// A polynomial of the letters of a word is one of its n-gram, too, where letters change places; so words are mixed
// (the finalizer of MurmurHash3) before they are put together.
uint64_t mix(uint64_t x) {
    x = (x ^ x >> 33) * 0xFF51AFD7ED558CCD;
    x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53;
    return x ^ x >> 33;
}

// The code point at `at`, which then stands behind it. The text is valid UTF-8.
uint32_t next(const unsigned char*& at) {
    const uint32_t first = *at++;
    if (first < 0x80) return first;
    const int rest = first < 0xE0 ? 1 : first < 0xF0 ? 2 : 3;
    uint32_t code = first & (0x3F >> rest);
    for (int i = 0; i < rest; ++i) code = code << 6 | (*at++ & 0x3F);
    return code;
}

// The hashes of the last `n` words in a row: sum_k word_k * base^(n - 1 - k).
class Rolling {
  public:
    explicit Rolling(int64_t n) : words_(n), oldest_(1) {
        for (int64_t i = 0; i < n; ++i) oldest_ *= kBase;
    }
    uint64_t add(uint64_t word) {
        hash_ = hash_ * kBase + word - words_[place_] * oldest_;
        words_[place_] = word;
        place_ = place_ + 1 < static_cast<int64_t>(words_.size()) ? place_ + 1 : 0;
        return hash_;
    }

  private:
    std::vector<uint64_t> words_;
    uint64_t oldest_, hash_ = 0;
    int64_t place_ = 0;
};

// Keeps what the filter has. Its words come from memory, not from the cache, so many are fetched at once.
class Sieve {
  public:
    explicit Sieve(Filter filter) : filter_(filter) {}
    void add(uint64_t hash) {
        if (filter_.count) __builtin_prefetch(word_of(hash));
        waiting_[count_++] = hash;
        if (count_ == kAtOnce) flush();
    }
    std::vector<uint64_t> finish() {
        flush();
        return std::move(kept_);
    }

  private:
    static constexpr int kAtOnce = 64;
    const uint64_t* word_of(uint64_t hash) const { return &filter_.words[hash >> 12 & (filter_.count - 1)]; }
    bool has(uint64_t hash) const {
        if (!filter_.count) return true;
        const uint64_t word = *word_of(hash);
        return word >> (hash & 63) & word >> (hash >> 6 & 63) & 1;
    }
    void flush() {
        for (int i = 0; i < count_; ++i)
            if (has(waiting_[i])) kept_.push_back(waiting_[i]);
        count_ = 0;
    }

    Filter filter_;
    std::vector<uint64_t> kept_;
    uint64_t waiting_[kAtOnce];
    int count_ = 0;
};

}  // namespace

std::optional<std::vector<uint64_t>> hash_ngrams(std::string_view text, const uint32_t* letters, int64_t known,
                                                 int64_t n, Filter filter) {
    const auto* at = reinterpret_cast<const unsigned char*>(text.data());
    const auto* const end = at + text.size();
    Rolling rolling(n);
    Sieve sieve(filter);
    int64_t words = 0;
    uint64_t word = 0;
    bool inside = false;
    const auto end_word = [&] {
        if (!inside) return;
        const uint64_t hash = rolling.add(mix(word));
        if (++words >= n) sieve.add(hash);
        word = 0;
        inside = false;
    };
    while (at < end) {
        const uint32_t code = next(at);
        const uint32_t letter = code < known ? letters[code] : kLeftOut;
        if (letter == kAsk) return std::nullopt;
        if (letter == kLeftOut) continue;
        if (letter == kSpace) {
            end_word();
            continue;
        }
        word = (word + letter + 1) * kBase;
        inside = true;
    }
    end_word();
    return sieve.finish();
}

}  // namespace ant5m
