// Stand-ins of common/cuda/hopper.cuh: barriers in shared memory, copies of boxes,
// products of a warpgroup. What hardware does at its leisure happens late here: a box
// is NaN from the start of its copy to a moment drawn at random; results are NaN until
// await_products, and the matrices are read either then or when a product starts.
#pragma once

#include "emulator.h"

namespace fisherprune::cuda {

// ---- clusters ----

inline int cluster_size() { return static_cast<int>(emulator::cluster.size()); }

inline int cluster_rank() {
  return static_cast<int>(blockIdx.x % emulator::cluster.size());
}

inline bool is_elected() {
  emulator::show(15, 0);
  return emulator::block->current % 32 == emulator::self().collectives % 32;
}

inline void meet_cluster() { emulator::wait_as(emulator::State::at_cluster); }

// ---- barriers ----

inline uint32_t shared_bytes_at(SharedAddress address) {
  const std::ptrdiff_t at =
      reinterpret_cast<unsigned char*>(address) - emulator::block->shared.get();
  if (at < 0 || at >= static_cast<std::ptrdiff_t>(emulator::block->shared_bytes))
    emulator::fail("an address that is not in shared memory");
  return static_cast<uint32_t>(at);
}

inline emulator::Barrier& barrier_at(uint32_t at, emulator::Block& of) {
  const auto found = of.barriers.find(at);
  if (found == of.barriers.end()) emulator::fail("a barrier that does not exist");
  return found->second;
}

inline emulator::Barrier& barrier_at(SharedAddress address) {
  return barrier_at(shared_bytes_at(address), *emulator::block);
}

inline void init_barrier(SharedAddress barrier, int arrivals) {
  const uint32_t at = shared_bytes_at(barrier);
  if (at % 8 || arrivals < 1) emulator::fail("a barrier at no multiple of 8");
  emulator::block->barriers[at] = {arrivals, arrivals, 0, 0, false};
}

inline void publish_barriers() {
  for (auto& [at, barrier] : emulator::block->barriers) barrier.published = true;
}

inline void arrive_expecting(emulator::Barrier& barrier, int bytes) {
  if (barrier.missing == 0) emulator::fail("more arrivals than a barrier's phase has");
  barrier.bytes += bytes;
  --barrier.missing;
  barrier.end_phase();
}

inline void arrive_expecting(SharedAddress barrier, int bytes) {
  arrive_expecting(barrier_at(barrier), bytes);
}

// At the same place in another block. One that has ended has no shared memory.
inline void arrive_in(int rank, SharedAddress barrier) {
  emulator::Block& other = *emulator::cluster[rank];
  if (std::all_of(other.threads.begin(), other.threads.end(),
                  [](const auto& t) { return t.state == emulator::State::done; }))
    emulator::fail("an arrival in a block that has ended");
  arrive_expecting(barrier_at(shared_bytes_at(barrier), other), 0);
}

inline void await_phase(SharedAddress address, unsigned parity) {
  if (parity > 1) emulator::fail("a parity is 0 or 1");
  const emulator::Barrier& barrier = barrier_at(address);
  const auto has_ended = [&barrier, parity] { return barrier.phases % 2 != parity; };
  if (!has_ended()) emulator::wait_until(has_ended);
}

// ---- copies ----

using TensorMap = Boxes;

// Permutes pieces of 16 bytes, as the bytes of a row decide.
inline uint32_t permuted(uint32_t at, int row_bytes) {
  const uint32_t mask = static_cast<uint32_t>(row_bytes / 16 - 1);
  return at ^ (at >> 7 & mask) << 4;
}

// Checks what cuTensorMapEncodeTiled refuses.
inline TensorMap tensor_map(const Boxes& of) {
  const int row = of.row_bytes();
  bool fits = row == 16 || row == 32 || row == 64 || row == 128;
  fits &= reinterpret_cast<uintptr_t>(of.data) % 16 == 0;
  for (const int64_t stride : of.strides)
    fits &= stride > 0 && stride % 16 == 0 && stride < int64_t{1} << 40;
  for (int i = 0; i < 4; ++i)
    fits &= of.box[i] >= 1 && of.box[i] <= 256 && of.sizes[i] >= 1 &&
            of.sizes[i] <= int64_t{1} << 32;
  if (!fits) emulator::fail("no tensor map has such boxes");
  return of;
}

// To the nearest TF32, ties to even; what is not finite stays.
inline float rounded_by_copy(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return value;
  return __uint_as_float((bits + 0xfffu + (bits >> 13 & 1)) & ~0x1fffu);
}

inline void land_box(unsigned char* shared, uint32_t to, const Boxes& from,
                     const std::array<int, 4>& begin) {
  uint32_t next = to;
  std::array<int, 4> i{};
  for (i[3] = 0; i[3] < from.box[3]; ++i[3])
    for (i[2] = 0; i[2] < from.box[2]; ++i[2])
      for (i[1] = 0; i[1] < from.box[1]; ++i[1])
        for (i[0] = 0; i[0] < from.box[0]; ++i[0], next += 4) {
          bool inside = true;
          int64_t offset = 0;
          for (int d = 0; d < 4; ++d) {
            const int64_t at = int64_t{begin[d]} + i[d];
            inside &= at >= 0 && at < from.sizes[d];
            offset += at * (d ? from.strides[d - 1] : 4);
          }
          float value = 0.f;
          if (inside)
            std::memcpy(&value, static_cast<const char*>(from.data) + offset, 4);
          value = rounded_by_copy(value);
          std::memcpy(shared + permuted(next, from.row_bytes()), &value, 4);
        }
}

// To the same place of one block of the cluster.
inline void copy_box_into(emulator::Block& target, uint32_t to, const TensorMap& from,
                          uint32_t barrier_place, const std::array<int, 4>& begin) {
  const int bytes = from.row_bytes() * from.box[1] * from.box[2] * from.box[3];
  emulator::Barrier& barrier = barrier_at(barrier_place, target);
  if (!barrier.published) emulator::fail("a copy that does not see its barrier");
  // Or the first of eight rows would not be the one that the others are permuted by.
  if (to % 128 || to % (8 * from.row_bytes()))
    emulator::fail("a box must begin where eight of its rows can begin");
  if (to + bytes > target.shared_bytes)
    emulator::fail("a box that ends beyond shared memory");
  unsigned char* shared = target.shared.get();
  std::memset(shared + to, 0xff, bytes);
  if (emulator::counts_cycles) emulator::shared_cycles += bytes / 128;
  emulator::under_way.push_back([=, &barrier] {
    land_box(shared, to, from, begin);
    barrier.bytes -= bytes;
    barrier.end_phase();
  });
}

// What a box has in its tensor, which is read once for all blocks.
inline void note_box(const Boxes& from, const std::array<int, 4>& begin) {
  int64_t inside = 4;
  for (int d = 0; d < 4; ++d) {
    const int64_t first = std::max(begin[d], 0);
    const int64_t end = std::min<int64_t>(begin[d] + from.box[d], from.sizes[d]);
    inside *= std::max<int64_t>(end - first, 0);
  }
  if (emulator::counts_cycles) emulator::box_bytes += inside;
}

inline void copy_box(SharedAddress to, const TensorMap& from, SharedAddress barrier,
                     int x, int y, int z, int w) {
  note_box(from, {x, y, z, w});
  copy_box_into(*emulator::block, shared_bytes_at(to), from, shared_bytes_at(barrier),
                {x, y, z, w});
}

inline void copy_box_to_all(SharedAddress to, const TensorMap& from,
                            SharedAddress barrier, int x, int y, int z, int w) {
  note_box(from, {x, y, z, w});
  for (const auto& each : emulator::cluster)
    copy_box_into(*each, shared_bytes_at(to), from, shared_bytes_at(barrier),
                  {x, y, z, w});
}

// ---- products ----

template <int>
void take_registers() {}
template <int>
void give_registers() {}

// The entry of a matrix in shared memory.
EMULATOR_OWN inline double entry(const unsigned char* shared, size_t size,
                                 uint64_t matrix, unsigned row, unsigned k) {
  const auto field = [matrix](int bit) EMULATOR_OWN {
    return static_cast<uint32_t>(matrix >> bit & 0x3fff) << 4;
  };
  constexpr int row_bytes_of[] = {16, 128, 64, 32};
  const int row_bytes = row_bytes_of[matrix >> 62];
  const uint32_t pieces_apart = row_bytes == 16 ? field(16) : 16;
  uint32_t at = field(0) + row / 8 * field(32) + row % 8 * row_bytes +
                k / 4 * pieces_apart + k % 4 * 4;
  at ^= (at >> 7 & static_cast<uint32_t>(row_bytes / 16 - 1)) << 4;
  if (at + 4 > size || (matrix >> 49 & 7))
    emulator::fail("a matrix that is not in shared memory");
  uint32_t bits;
  __builtin_memcpy(&bits, shared + at, sizeof bits);
  return tf32(bits);
}

// A lane's share, in the layout of multiply_tf32's c.
EMULATOR_OWN inline void multiply_now(Results& c, uint64_t a, uint64_t b) {
  const unsigned char* shared = emulator::block->shared.get();
  const size_t size = emulator::block->shared_bytes;
  const unsigned thread = emulator::block->current, lane = thread % 32;
  const unsigned row = thread / 32 % 4 * 16 + lane / 4;
  double rows[2][PRODUCT_DEPTH], columns[2][PRODUCT_DEPTH];
  for (unsigned half = 0; half < 2; ++half)
    for (unsigned k = 0; k < PRODUCT_DEPTH; ++k)
      rows[half][k] = entry(shared, size, a, row + 8 * half, k);
  for (unsigned j = 0; j < PRODUCT_COLUMNS / 8; ++j) {
    for (unsigned side = 0; side < 2; ++side)
      for (unsigned k = 0; k < PRODUCT_DEPTH; ++k)
        columns[side][k] = entry(shared, size, b, 8 * j + lane % 4 * 2 + side, k);
    add_products(c[j], rows, columns);
  }
}

inline void multiply_now(std::vector<float>& results, const emulator::Product& of) {
  Results& c = *reinterpret_cast<Results*>(results.data());
  if (!of.adds) std::memset(&c, 0, sizeof c);
  multiply_now(c, of.a, of.b);
}

inline void begin_products(Results& c) {
  emulator::show(11, 0);
  emulator::Products& products = emulator::self().products;
  if (products.begun) emulator::fail("products begin while others are under way");
  products.begun = true;
  products.early = (emulator::block->current / 32 + emulator::self().collectives) % 2;
  products.results.assign(&c[0][0], &c[0][0] + sizeof c / sizeof(float));
  std::memset(&c, 0xff, sizeof c);
}

inline void multiply_matrices(Results&, uint64_t a, uint64_t b, bool adds) {
  const uint64_t both = a ^ b << 1;
  emulator::show(12, both);
  for (unsigned lane = 0; lane < 32; ++lane)
    if (emulator::shown<uint64_t>(lane) != both)
      emulator::fail("lanes of a warp multiply different matrices");
  emulator::Products& products = emulator::self().products;
  if (!products.begun) emulator::fail("a product without a fence");
  if (products.early)
    multiply_now(products.results, {a, b, adds});
  else
    products.late.push_back({a, b, adds});
  constexpr int words = PRODUCT_DEPTH * (PRODUCT_ROWS + PRODUCT_COLUMNS);
  if (emulator::counts_cycles && threadIdx.x % 128 == 0)
    emulator::shared_cycles += words / 32;
}

inline void await_products(Results& c) {
  emulator::show(13, 0);
  emulator::Products& products = emulator::self().products;
  if (!products.begun) emulator::fail("products are awaited that did not begin");
  for (const emulator::Product& product : products.late)
    multiply_now(products.results, product);
  std::memcpy(&c, products.results.data(), sizeof c);
  products = {};
  emulator::show(14, 0);  // no lane goes on before all have read
}

}  // namespace fisherprune::cuda
