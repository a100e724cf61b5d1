// source: csrc/common/cpu/capability.cpp
// The CPU's global_topk, free of torch, against std::sort on hard inputs; built with
// the address and undefined-behaviour sanitizers (see run.sh).
#include "global_topk/cpu/select.h"

#include <limits>

#include "driver.h"

namespace topk = fisherprune::cpu::global_topk;

namespace {

std::mt19937_64 rng(7);

float from_bits(uint64_t bits) {
  const uint32_t low = static_cast<uint32_t>(bits);
  float value;
  memcpy(&value, &low, sizeof value);
  return std::isfinite(value) ? value : 0.f;
}

// Entry j of a list of n, for each family of hard lists.
float value_at(int family, int64_t j, int64_t n) {
  std::normal_distribution<float> normal;
  switch (family) {
    case 0:
      return normal(rng);
    case 1:
      return 0.5f;
    case 2:
      return static_cast<float>(rng() % 5) - 2;
    case 3:
      return from_bits(rng());
    case 4:
      return from_bits((rng() & 0x80000fff));  // denormals, zeros
    case 5:
      return from_bits(0x3f800000u - (j * 2654435761u) % (2 * n));  // near one
    case 6:
      return rng() % 1000 ? 0.f : normal(rng);
    case 7:
      return rng() % 2 ? 0.f : -0.f;
    case 8:
      return rng() % 2 ? std::numeric_limits<float>::max() : -1.f;
    default:
      return j % 41 ? normal(rng) : 1000.f + j;  // a period
  }
}
constexpr int kFamilies = 10;

// Places of the scores from the largest down, of equal ones the first first.
std::vector<int64_t> order_of(const std::vector<float>& values) {
  std::vector<int64_t> order(values.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return values[a] > values[b]; });
  return order;
}

// One list of scores cut into tensors, some empty. Each is an exact copy on the heap,
// so that the sanitizer sees a step over any end.
struct Case {
  int family;
  std::vector<float> values;
  std::vector<std::vector<float>> tensors;
  std::vector<int64_t> order;

  Case(int f, int64_t n) : family(f), values(n) {
    for (int64_t j = 0; j < n; ++j) values[j] = value_at(family, j, n);
    int64_t first = 0;
    for (const int64_t last : {n / 3, n / 3, n / 3 + n / 7, n}) {
      tensors.emplace_back(values.begin() + first, values.begin() + last);
      first = last;
    }
    order = order_of(values);
  }

  int64_t size() const { return values.size(); }

  void require(bool holds, const char* what) const {
    if (!holds)
      fail("topk: wrong %s, family %d, %zu scores", what, family, values.size());
  }
};

topk::Task task_of(const Case& c, int number) {
  std::vector<Scores> scores;
  for (const auto& t : c.tensors)
    scores.push_back({t.data(), static_cast<int64_t>(t.size())});
  return topk::Task(scores, on_threads(number));
}

using Masks = std::vector<std::vector<uint8_t>>;

std::vector<uint8_t*> bytes_of(const Case& c, Masks& masks) {
  std::vector<uint8_t*> bytes;
  for (const auto& t : c.tensors) masks.emplace_back(t.size(), uint8_t{7});
  for (auto& m : masks) bytes.push_back(m.data());
  return bytes;
}

void require_kept(const Case& c, const Masks& masks, int64_t keep) {
  std::vector<uint8_t> kept(c.size()), got;
  for (int64_t i = 0; i < keep; ++i) kept[c.order[i]] = 1;
  for (const auto& m : masks) got.insert(got.end(), m.begin(), m.end());
  c.require(got == kept, "masks");
}

// All queries but the last two have masks.
void test_select(const Case& c, int threads, const topk::Sample& sample) {
  const int64_t n = c.size();
  const std::vector<int64_t> keep{n / 10, 1, n, n / 2, n / 10, n - n / 3, n / 2 + 1, 1};
  const size_t masked = keep.size() - 2;
  std::vector<Masks> masks(masked);
  std::vector<topk::Query> queries;
  for (size_t q = 0; q < keep.size(); ++q) {
    const auto bytes = q < masked ? bytes_of(c, masks[q]) : std::vector<uint8_t*>();
    queries.push_back(keep[q] ? topk::Query(keep[q], bytes)
                              : topk::fixed_query(bytes, INFINITY));
  }
  for (const int64_t bad : topk::select(task_of(c, threads), queries, sample))
    c.require(bad == 0, "nonfinite counts");
  for (size_t q = 0; q < keep.size(); ++q) {
    if (q < masked) require_kept(c, masks[q], keep[q]);
    if (keep[q])
      c.require(value_of(queries[q].threshold) == c.values[c.order[keep[q] - 1]],
                "threshold");
  }
}

void test_mask_at(const Case& c, int threads) {
  const float threshold = c.values[c.order[c.size() / 2]];
  Masks masks;
  std::vector<int64_t> ties(c.tensors.size());
  int64_t keep = c.size() / 2 + 1;  // those above, and ties up to here
  for (const float v : c.values) keep -= v > threshold;
  for (size_t t = 0; t < ties.size(); ++t) {
    const auto& tensor = c.tensors[t];
    ties[t] =
        std::min<int64_t>(keep, std::count(tensor.begin(), tensor.end(), threshold));
    keep -= ties[t];
  }
  auto query = topk::fixed_query(bytes_of(c, masks), threshold);
  topk::mask_at(task_of(c, threads), std::move(query), ties);
  require_kept(c, masks, c.size() / 2 + 1);
}

// Samples that have nothing to do with the scores: they must cost time only.
std::vector<topk::Sample> lies(int64_t total) {
  std::vector<topk::Sample> samples;
  for (const int64_t size : {1, 1000, 20000}) {
    topk::Sample low, high, any, few;
    for (int64_t i = 0; i < size; ++i) {
      low.keys.push_back(static_cast<uint32_t>(i));
      high.keys.push_back(~static_cast<uint32_t>(i));
      any.keys.push_back(static_cast<uint32_t>(rng()));
      few.keys.push_back(key_of(value_at(2, i, size)));
    }
    for (topk::Sample* s : {&low, &high, &any, &few}) {
      s->total = total;
      topk::radix_sort(s->keys.data(), s->keys.size());
      if (!std::is_sorted(s->keys.begin(), s->keys.end())) std::abort();
      samples.push_back(*s);
    }
  }
  return samples;
}

// Codes are in the order of the keys, and those of a bracket are told from all others.
void test_coding(const Case& c, topk::Bracket b) {
  const topk::Coding coding = topk::coding_for(b);
  const topk::CodeRange codes = topk::codes_of(coding, b);
  const topk::Bracket wide = topk::keys_of(coding, codes);
  c.require(wide.low <= b.low && b.high <= wide.high, "widened bracket");
  if (b.high - b.low < 250 && b.low > 1)  // no float has the keys 0 and 1
    c.require(wide.low == b.low && wide.high == b.high, "widened bracket of few keys");
  if (wide.low > 0)
    c.require(topk::code_of(coding, wide.low - 1) + 1 == codes.low, "code below");
  if (wide.high < ~0u)
    c.require(topk::code_of(coding, wide.high + 1) == codes.high + 1, "code above");
  for (uint64_t code = 1; code <= topk::Coding::kLast; ++code) {
    const uint64_t first = topk::first_key(coding, code);
    if (first > ~0u) break;
    const uint32_t key = static_cast<uint32_t>(first);
    c.require(topk::code_of(coding, key) == code, "code of its first key");
    c.require(topk::code_of(coding, key - 1) + uint64_t{1} == code, "code before");
  }
}

// Brackets of all widths, also around the middle one of the scores.
std::vector<topk::Bracket> brackets(const Case& c) {
  std::vector<topk::Bracket> some{
      {0, ~0u}, {0, 0}, {~0u, ~0u}, {5, 300}, {1u << 31, ~0u}};
  for (int bits = 0; bits < 32; ++bits)
    for (int i = 0; i < 20; ++i) {
      const uint32_t low = static_cast<uint32_t>(rng());
      const uint32_t width = static_cast<uint32_t>(rng() >> 32) >> bits;
      some.push_back({low, low + std::min(width, ~0u - low)});
    }
  const uint32_t middle = key_of(c.values[c.order[c.size() / 2]]);
  for (uint32_t width = 1; width < 1u << 30; width *= 5)
    some.push_back({middle - width, middle + width});
  return some;
}

void test_encode(const Case& c, const topk::BlockLoops& loops, topk::Block& block) {
  for (const topk::Bracket b : brackets(c)) {
    const topk::Coding coding = topk::coding_for(b);
    c.require(loops.encode(block, coding) == 0, "nonfinite");
    for (int64_t i = 0; i < c.size(); ++i)
      c.require(block.code[i] == topk::code_of(coding, key_of(c.values[i])), "code");
  }
  for (const float bad : {NAN, -INFINITY}) {
    std::vector<float> values = c.values;
    values.front() = values.back() = bad;
    topk::Block other;
    other.scores = values.data(), other.size = c.size();
    c.require(loops.encode(other, {}) == 2, "nonfinite");
  }
}

void test_loops(const topk::BlockLoops& loops, int64_t size) {
  const Case c(3, size);
  topk::Block block;
  block.scores = c.values.data(), block.size = c.size();
  test_encode(c, loops, block);
  const topk::Bracket b{key_of(c.values[c.order[99]]), key_of(c.values[c.order[50]])};
  const topk::Coding coding = topk::coding_for(b);
  const topk::CodeRange range = topk::codes_of(coding, b);
  std::vector<uint8_t> mask(c.size());
  topk::Inside inside;
  topk::Candidates candidates;
  loops.encode(block, coding);
  int64_t above = 0;
  std::vector<uint16_t> places;
  for (int64_t i = 0; i < c.size(); ++i) {
    above += block.code[i] > range.high;
    if (block.code[i] >= range.low && block.code[i] <= range.high) places.push_back(i);
  }
  c.require(loops.split(block, range, mask.data(), inside) == above, "count above");
  for (int64_t i = 0; i < c.size(); ++i)
    c.require(mask[i] == (block.code[i] > range.high), "mask");
  const int64_t found = topk::append(block, inside, candidates);
  c.require(found == static_cast<int64_t>(places.size()) && found >= 50,
            "count inside");
  c.require(topk::count_of(inside) == found, "count inside");
  topk::Inside same;
  c.require(loops.split(block, range, nullptr, same) == above &&
                topk::count_of(same) == found,
            "counts without a mask");
  for (int64_t i = 0; i < found; ++i) {
    c.require(*candidates.places.at(i) == places[i], "places");
    c.require(*candidates.keys.at(i) == key_of(c.values[places[i]]), "keys");
  }
  loops.publish();
}

}  // namespace

int main() {
  const Case some(3, topk::tuning::kBlock);
  for (const topk::Bracket b : brackets(some)) test_coding(some, b);
  for (const int64_t size : {topk::tuning::kBlock, topk::tuning::kBlock - 5}) {
    test_loops(topk::loops_portable, size);
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) test_loops(topk::loops_avx2, size);
#endif
    test_loops(topk::block_loops(), size);
  }
  for (int family = 0; family < kFamilies; ++family)
    for (const int64_t n : {1, 2, 7, 1023, 1025, 40000, 150001}) {
      const Case c(family, n);
      for (const int threads : {1, 3}) {
        const topk::Task task = task_of(c, threads);
        test_select(c, threads, topk::draw_sample(task.scores, 1, task.parallel));
        test_mask_at(c, threads);
      }
      if (n > topk::tuning::kSampleFrom)
        for (const topk::Sample& sample : lies(n)) test_select(c, 2, sample);
    }
  std::puts("topk: exact in all cases");
}
