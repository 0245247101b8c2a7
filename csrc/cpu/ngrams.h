// N-grams of words: ant5m/data/contamination.py says what a word is. Compiled once, not for each instruction set.
#pragma once
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

namespace ant5m {

// What `letters` says of a code point: a letter of a word (the code point to take for it), or one of these.
constexpr uint32_t kSpace = ' ', kLeftOut = 0xFFFFFFFE, kAsk = 0xFFFFFFFF;

// A set of hashes that never lacks one of its own, and seldom has another: two bits in one of 2^k words.
struct Filter {
    const uint64_t* words;
    int64_t count;  // 0: everything is in it
};

// The hashes of each `n` words in a row of a text in UTF-8 that `filter` has; nothing where `letters` says kAsk of a
// character. Code points from `known` on are left out.
std::optional<std::vector<uint64_t>> hash_ngrams(std::string_view text, const uint32_t* letters, int64_t known,
                                                 int64_t n, Filter filter);

}  // namespace ant5m
