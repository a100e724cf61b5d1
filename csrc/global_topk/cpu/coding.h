// Which queries share a coding, in which keys are compared as bytes. Brackets are
// widened to whole codes, so that the comparison of bytes is exact.
#pragma once

#include "global_topk/cpu/task.h"

namespace fisherprune::cpu::global_topk {

inline CodeRange codes_of(Coding coding, Bracket b) {
  return {code_of(coding, b.low), code_of(coding, b.high)};
}

// The first key of a code other than 0.
inline uint64_t first_key(Coding coding, uint64_t code) {
  const uint64_t step = ((code << 16) + coding.scale - 1) / coding.scale;
  return coding.base + (step << coding.shift);
}

// All keys that have these codes.
inline Bracket keys_of(Coding coding, CodeRange range) {
  constexpr uint64_t last = 0xffffffffu;
  const uint64_t high = first_key(coding, uint64_t{range.high} + 1) - 1;
  return {
      range.low ? static_cast<uint32_t>(first_key(coding, range.low)) : 0,
      static_cast<uint32_t>(range.high < Coding::kLast ? std::min(high, last) : last)};
}

// About the finest coding that has codes below and above a bracket, too. The bracket's
// low end begins a code.
inline Coding coding_for(Bracket b) {
  constexpr uint32_t kMostSteps = 64000;
  static_assert(kMostSteps + 2 * (kMostSteps / (Coding::kLast - 2) + 2) <= 0xffff,
                "16 bits have room for a code below and one above the bracket, too");
  Coding coding{b.low, 0, 0xffff};
  while ((b.high - b.low) >> coding.shift > kMostSteps) ++coding.shift;
  const uint32_t steps = ((b.high - b.low) >> coding.shift) + 1;
  coding.scale = std::min(coding.scale, ((Coding::kLast - 2) << 16) / steps);
  const uint64_t before = first_key(coding, 1) - coding.base;
  coding.base -= static_cast<uint32_t>(std::min<uint64_t>(before, b.low));
  return coding;
}

// Queries whose keys are compared in one coding.
struct CodedQueries {
  Coding coding;
  Queries queries;
};

inline Queries queries_of(const std::vector<CodedQueries>& coded) {
  Queries all;
  for (const CodedQueries& some : coded)
    all.insert(all.end(), some.queries.begin(), some.queries.end());
  return all;
}

// Whether all brackets stay narrow in their coding.
inline bool suits(const Sample& sample, const CodedQueries& coded) {
  const auto stays_narrow = [&](const Query* q) {
    const Bracket own = q->next.bracket;
    const Bracket wide = keys_of(coded.coding, codes_of(coded.coding, own));
    if (own.single()) return wide.single();
    const int64_t more = sample.estimate(wide) - sample.estimate(own);
    return more <= sample.total / tuning::kCodingShare;
  };
  return std::all_of(coded.queries.begin(), coded.queries.end(), stays_narrow);
}

// Neighbouring brackets share a coding where that leaves all of them narrow. There is
// at least one coding: the first pass over the scores also counts what is not finite.
inline std::vector<CodedQueries> share_codings(const Sample& sample, Queries queries) {
  std::sort(queries.begin(), queries.end(), [](const Query* a, const Query* b) {
    return a->next.bracket.low < b->next.bracket.low;
  });
  std::vector<CodedQueries> shared;
  Bracket span{};
  for (Query* q : queries) {
    const Bracket own = q->next.bracket;
    if (!shared.empty()) {
      const Bracket both{span.low, std::max(span.high, own.high)};
      CodedQueries wider{coding_for(both), shared.back().queries};
      wider.queries.push_back(q);
      if (suits(sample, wider)) {
        shared.back() = wider;
        span = both;
        continue;
      }
    }
    shared.push_back({coding_for(own), {q}});
    span = own;
  }
  for (const CodedQueries& some : shared)
    for (Query* q : some.queries)
      q->next.bracket = keys_of(some.coding, codes_of(some.coding, q->next.bracket));
  if (shared.empty()) shared.emplace_back();
  return shared;
}

}  // namespace fisherprune::cpu::global_topk
