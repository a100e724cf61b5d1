// Operands of grad_moments on their way to shared memory: implicit im2col.
//
// Both are matrices "rows x positions" of one sample: the output gradient has a row for
// each output channel, the patches have a row for each weight (c, y, x) of a filter. A
// row is an offset into the image and a shift (dy, dx), which decides where it falls
// outside of the image. A block keeps the rows of its tile in shared memory and walks
// over slabs of 16 positions.
#pragma once

#include "common/cuda/ptx.cuh"
#include "common/integers.h"
#include "grad_moments/contract.h"

namespace fisherprune::cuda::grad_moments {

constexpr int SLAB = 16;
// A shift or position that stays outside of every image, whatever is added to it.
constexpr int OUTSIDE = -(1 << 30);

// Divides numbers in [0, 2^31) exactly by a fixed d: t / d = (2 t * magic) >> 32 >>
// shift.
struct Divider {
  uint32_t magic;
  int shift;

  Divider() : Divider(1) {}
  explicit Divider(uint32_t divisor) : shift(0) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    magic =
        static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + divisor - 1) / divisor);
  }
  __host__ __device__ int operator()(int t) const {
    const uint64_t twice = 2u * static_cast<uint32_t>(t);  // 32 bits: one product
    return static_cast<int>(static_cast<uint32_t>(twice * magic >> 32) >> shift);
  }
};

// Which elements neighbouring threads fetch.
enum class Order {
  vectors,    // four positions of a row by one thread, 16 bytes
  positions,  // neighbouring positions of a row
  rows        // the same position of neighbouring rows (channels-last data)
};

struct Operand {
  const char* data;
  Dtype dtype;
  Order order;
  int64_t sample_stride, stride_h, stride_w;  // in bytes
  int height, width;                          // of the image
  int step_h, step_w, pad_h, pad_w;           // from position (p, q) to image (h, w)
};

struct alignas(16) Row {
  int64_t offset;  // in bytes, from the image's element at the position's (h, w)
  int dy, dx;
};

// A position's corner in the image, and where it lies in memory.
struct Corner {
  int h, w;
  int64_t offset;  // in bytes
};

// Where the next slab (or unit) begins.
struct Cursor {
  int sample, at;

  __device__ void advance(int positions, int step = SLAB) {
    at += step;
    if (at < positions) return;
    at = 0;
    ++sample;
  }
};

// A slab in shared memory has rows of 16 positions. The quads of a row are placed so
// that 16-byte reads of 8 neighbouring rows, and all ways of writing, have no bank
// conflicts.
__device__ inline int place(int row, int position) {
  return row * SLAB + (((position >> 2) ^ (row >> 1)) & 3) * 4 + (position & 3);
}

// Two samples of at most 8 positions share a slab. One of the slab's two products reads
// the first halves of all quads, the other one the second halves: each sample has one
// half.
__host__ __device__ inline bool are_short(int positions) {
  return positions <= SLAB / 2;
}

// Where position t of the slab's first sample goes; from t = 8 on, t - 8 of its second.
__device__ inline int short_position(int t) {
  return (t >> 1 & 3) * 4 + (t >> 3) * 2 + (t & 1);
}

__device__ inline Corner corner_of(const Operand& op, Divider out_width, int columns,
                                   int t, int positions) {
  if (t >= positions) return {OUTSIDE, OUTSIDE, 0};
  const int p = out_width(t), q = t - p * columns;
  const int h = p * op.step_h - op.pad_h, w = q * op.step_w - op.pad_w;
  return {h, w, h * op.stride_h + w * op.stride_w};
}

// Reads a row of the shared table, in one read of 16 bytes.
__device__ inline Row read_row(const Row* row) {
  const int4 words = *reinterpret_cast<const int4*>(row);
  const uint64_t high = static_cast<uint32_t>(words.y);
  return {static_cast<int64_t>(high << 32 | static_cast<uint32_t>(words.x)), words.z,
          words.w};
}

__device__ inline bool falls_inside(const Operand& op, const Corner& at,
                                    const Row& row) {
  const bool h =
      static_cast<unsigned>(at.h + row.dy) < static_cast<unsigned>(op.height);
  const bool w = static_cast<unsigned>(at.w + row.dx) < static_cast<unsigned>(op.width);
  return h & w;
}

template <Dtype dtype>
__device__ inline float to_float(uint32_t bits) {
  if constexpr (dtype == Dtype::float16)
    return half_to_float(static_cast<uint16_t>(bits));
  else
    return __uint_as_float(dtype == Dtype::float32 ? bits : bits << 16);
}

// Each thread copies one quad of a row at a time; positions past the end become zeros.
template <int threads, int count>
__device__ inline void load_vectors(const Operand& op, const Row* rows, float* slab,
                                    Cursor cursor, int positions) {
  constexpr int quads = SLAB / 4, step = threads / quads;
  static_assert(step % 8 == 0, "all rows of a thread have their quads in one order");
  const int first = threadIdx.x / quads, quad = threadIdx.x % quads * 4;
  const int at = cursor.at + quad;
  const int left = positions - at < 0 ? 0 : positions - at < 4 ? positions - at : 4;
  const char* from = op.data + cursor.sample * op.sample_stride + at * sizeof(float);
  const SharedAddress to = shared_address(slab + place(first, quad));
#pragma unroll
  for (int row = 0; row < count; row += step) {
    if (count % step != 0 && first + row >= count) return;
    const Row r = read_row(rows + first + row);
    // Without a byte to read the address need not exist.
    copy16_async(to + row * SLAB * static_cast<int>(sizeof(float)), from + r.offset,
                 r.dy < 0 ? 0 : left * static_cast<int>(sizeof(float)));
  }
}

// Copies a thread's position in every step-th row from `first` on, asynchronously.
template <int step, int count>
__device__ inline void copy_column(const Operand& op, const Row* rows, float* to,
                                   int first, const Corner& at, const char* base) {
#pragma unroll 4
  for (int row = 0; row < count; row += step) {
    if (count % step != 0 && first + row >= count) return;
    const Row r = read_row(rows + first + row);
    copy4_async(to + row * SLAB, reinterpret_cast<const float*>(base + r.offset),
                falls_inside(op, at, r));
  }
}

// The same by way of registers, to float32: all loads start before one is waited for.
template <Dtype dtype, int step, int count>
__device__ inline void widen_column(const Operand& op, const Row* rows, float* to,
                                    int first, const Corner& at, const char* base) {
  constexpr int loads = ceil_div(count, step);
  uint32_t bits[loads];
#pragma unroll
  for (int i = 0; i < loads; ++i) {
    const int row = first + i * step;
    const Row r = read_row(rows + (count % step == 0 || row < count ? row : first));
    bits[i] = load_if<dtype == Dtype::float32 ? 4 : 2>(base + r.offset,
                                                       falls_inside(op, at, r));
  }
#pragma unroll
  for (int i = 0; i < loads; ++i)
    if (count % step == 0 || first + i * step < count)
      to[i * step * SLAB] = to_float<dtype>(bits[i]);
}

// Each thread keeps its position and walks over rows. Its warp covers two rows of 16
// positions, or eight rows of 4 positions where rows are neighbours in memory.
template <int threads, int count, bool async>
__device__ inline void gather(const Operand& op, const Row* rows, float* slab,
                              Cursor cursor, int end, Divider out_width,
                              int out_columns, int positions) {
  constexpr int step = threads / SLAB;
  static_assert(step % 8 == 0, "all rows of a thread have their quads in one order");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool by_rows = op.order == Order::rows;
  const int t = by_rows ? lane / 8 + warp % 4 * 4 : threadIdx.x % SLAB;
  const int first = by_rows ? lane % 8 + warp / 4 * 8 : threadIdx.x / SLAB;
  const bool is_short = are_short(positions);
  const int sample = cursor.sample + (is_short ? t / (SLAB / 2) : 0);
  const int position = is_short ? t % (SLAB / 2) : cursor.at + t;
  const Corner at =
      corner_of(op, out_width, out_columns, position, sample < end ? positions : 0);
  const char* base = op.data + sample * op.sample_stride + at.offset;
  float* to = slab + place(first, is_short ? short_position(t) : t);
  if constexpr (async)
    copy_column<step, count>(op, rows, to, first, at, base);
  else if (op.dtype == Dtype::float16)
    widen_column<Dtype::float16, step, count>(op, rows, to, first, at, base);
  else if (op.dtype == Dtype::bfloat16)
    widen_column<Dtype::bfloat16, step, count>(op, rows, to, first, at, base);
  else
    widen_column<Dtype::float32, step, count>(op, rows, to, first, at, base);
}

template <int threads, int count, bool async>
__device__ inline void load_slab(const Operand& op, const Row* rows, float* slab,
                                 Cursor cursor, int end, Divider out_width,
                                 int out_columns, int positions) {
  if (async && op.order == Order::vectors)
    load_vectors<threads, count>(op, rows, slab, cursor, positions);
  else
    gather<threads, count, async>(op, rows, slab, cursor, end, out_width, out_columns,
                                  positions);
}

}  // namespace fisherprune::cuda::grad_moments
