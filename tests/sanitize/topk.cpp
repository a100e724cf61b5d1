// The CPU's global_topk, free of torch, against std::sort on hard inputs; built with
// the address and undefined-behaviour sanitizers (see run.sh).
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <thread>

#include "cpu/global_topk_core.h"

using namespace fisherprune;

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

void in_threads(int threads, int64_t count, const topk::Body& body) {
  std::vector<std::thread> running;
  for (int t = 0; t < threads; ++t)
    running.emplace_back(body, count * t / threads, count * (t + 1) / threads);
  for (std::thread& t : running) t.join();
}

void require(bool holds, const char* what, int family, int64_t n) {
  if (holds) return;
  std::fprintf(stderr, "topk: %s differ, family %d, %ld scores\n", what, family,
               static_cast<long>(n));
  std::exit(1);
}

// Places of the scores from the largest down, of equal ones the first first.
std::vector<int64_t> order_of(const std::vector<float>& values) {
  std::vector<int64_t> order(values.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return values[a] > values[b]; });
  return order;
}

void test(int family, int64_t n, int threads) {
  std::vector<float> values(n);
  for (int64_t j = 0; j < n; ++j) values[j] = value_at(family, j, n);
  // Exact copies on the heap, so that the sanitizer sees a step over any end.
  const std::vector<int64_t> ends{n / 3, n / 3, n / 3 + n / 7, n};
  std::vector<std::vector<float>> tensors;
  std::vector<Scores> scores;
  for (size_t i = 0; i < ends.size(); ++i)
    tensors.emplace_back(values.begin() + (i ? ends[i - 1] : 0),
                         values.begin() + ends[i]);
  for (const auto& t : tensors) scores.push_back({t.data(), (int64_t)t.size()});
  const std::vector<int64_t> keep{n / 10, 1, n, n / 2, n / 10, n - n / 3};
  std::vector<std::vector<std::vector<uint8_t>>> masks(keep.size());
  std::vector<topk::Query> queries;
  for (size_t q = 0; q < keep.size(); ++q) {
    std::vector<uint8_t*> bytes;
    for (const auto& t : tensors) masks[q].emplace_back(t.size(), uint8_t{7});
    for (auto& m : masks[q]) bytes.push_back(m.data());
    queries.push_back(keep[q] ? topk::Query(keep[q], bytes)
                              : topk::fixed_query(bytes, INFINITY));
  }
  const topk::Task task(scores, [=](int64_t count, const topk::Body& body) {
    in_threads(threads, count, body);
  });
  for (const int64_t bad : topk::select(task, queries))
    require(bad == 0, "nonfinite counts", family, n);
  const std::vector<int64_t> order = order_of(values);
  for (size_t q = 0; q < keep.size(); ++q) {
    std::vector<uint8_t> kept(n), got;
    for (int64_t i = 0; i < keep[q]; ++i) kept[order[i]] = 1;
    for (const auto& m : masks[q]) got.insert(got.end(), m.begin(), m.end());
    require(got == kept, "masks", family, n);
    if (keep[q] == 0) continue;
    require(value_of(queries[q].threshold) == values[order[keep[q] - 1]], "thresholds",
            family, n);
  }
}

}  // namespace

int main() {
  for (int family = 0; family < kFamilies; ++family)
    for (const int64_t n : {1, 2, 7, 1023, 1025, 40000, 300007})
      for (const int threads : {1, 3}) test(family, n, threads);
  std::puts("topk: exact in all cases");
}
