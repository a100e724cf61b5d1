// Winograd's minimal filtering for the gradient of 3 x 3 kernels, in one set of vector
// instructions; no guard, because microkernel_body.h includes it once for each.
//
// F(3 x 3, 4 x 4): the 3 x 3 sums over a tile of 4 x 4 positions d and the 6 x 6 inputs
// a that they meet are A [(G d G^T) * (B a B^T)] A^T: 36 multiplications instead of
// 144. The products of all tiles of a sample are added up before A is applied, once a
// sample. The method has points that one may choose: 0, 1, -1, 1/2, -2 and infinity
// have the least rounding error, about four times that of plain sums of dense data.
//
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016; Barabasz
// et al., "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep
// Neural Networks", 2020.

constexpr int kEdge = winograd::kEdge, kReach = winograd::kReach;
constexpr int kPlaces = winograd::kPlaces, kTaps = winograd::kTaps;

// u = B a
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void times_b(const Vec* a, Vec* u) {
  const Vec odd = a[3] - a[1], even = a[4] - a[2];
  u[0] = a[0] + 1.5f * odd - a[2] + even;
  u[1] = (a[4] - a[1]) + 0.5f * a[2] + 2.5f * a[3];
  u[2] = (a[4] + a[1]) - 2.5f * a[2] + 0.5f * a[3];
  u[3] = even + 2.f * odd;
  u[4] = even - 0.5f * odd;
  u[5] = a[5] + 1.5f * even - a[3] - odd;
}

// u = G d
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void times_g(const Vec* d, Vec* u) {
  const Vec even = d[0] + d[2], odd = d[1] + d[3];
  u[0] = d[0];
  u[1] = (odd + even) * (1.f / 3);
  u[2] = (odd - even) * (1.f / 3);
  u[3] = (d[0] + 0.25f * d[2] + 0.5f * (d[1] + 0.25f * d[3])) * (-16.f / 15);
  u[4] = (d[0] + 4.f * d[2] - 2.f * (d[1] + 4.f * d[3])) * (1.f / 15);
  u[5] = d[3];
}

// y = A m
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void times_a(const Vec* m, Vec* y) {
  const Vec both = m[1] + m[2];
  y[0] = (m[0] + both) + (m[3] + m[4]);
  y[1] = (m[1] - m[2]) + 0.5f * m[3] - 2.f * m[4];
  y[2] = (both + m[5]) + 0.25f * m[3] + 4.f * m[4];
}

// Transforms one column of a tile.
template <int kSize, void (*kTimes)(const Vec*, Vec*)>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void transform_column(
    const float* from, int64_t row, int x, Vec (&half)[kReach][kSize]) {
  Vec column[kSize], result[kReach];
  FISHERPRUNE_UNROLL
  for (int y = 0; y < kSize; ++y) column[y] = load(from + y * row);
  kTimes(column, result);
  FISHERPRUNE_UNROLL
  for (int y = 0; y < kReach; ++y) half[y][x] = result[y];
}

// Transforms a row of tiles, one vector wide: every tile along its columns, then along
// its rows. The first columns of a tile are the last ones of the tile before.
template <int kSize, void (*kTimes)(const Vec*, Vec*)>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void transform_row(const float* from,
                                                         int64_t width, int64_t row,
                                                         int64_t cols, float* to,
                                                         int64_t place) {
  constexpr int kShared = kSize - kEdge;
  Vec half[kReach][kSize];
  FISHERPRUNE_UNROLL
  for (int x = 0; x < kShared; ++x)
    transform_column<kSize, kTimes>(from + x * width, row, kEdge + x, half);
  from += kShared * width;
  for (int64_t j = 0; j < cols; ++j, from += kEdge * width, to += width) {
    FISHERPRUNE_UNROLL
    for (int y = 0; y < kReach; ++y) FISHERPRUNE_UNROLL
    for (int x = 0; x < kShared; ++x) half[y][x] = half[y][kEdge + x];
    FISHERPRUNE_UNROLL
    for (int x = 0; x < kEdge; ++x)
      transform_column<kSize, kTimes>(from + x * width, row, kShared + x, half);
    FISHERPRUNE_UNROLL
    for (int y = 0; y < kReach; ++y) {
      Vec result[kReach];
      kTimes(half[y], result);
      FISHERPRUNE_UNROLL
      for (int x = 0; x < kReach; ++x) store(to + (y * kReach + x) * place, result[x]);
    }
  }
}

typedef int32_t Bits __attribute__((vector_size(4 * FISHERPRUNE_LANES)));

// The largest magnitude of each lane. Magnitudes have the order of their bits, and the
// maximum of integers is one fast instruction.
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void find_largest(const float* from,
                                                        int64_t width,
                                                        int64_t positions,
                                                        float* largest) {
  Bits most = reinterpret_cast<Bits>(load(largest));
  for (int64_t i = 0; i < positions; ++i, from += width) {
    const Bits size = reinterpret_cast<Bits>(load(from)) & 0x7fffffff;
    most = size > most ? size : most;
  }
  store(largest, reinterpret_cast<Vec>(most));
}

template <int kSize, void (*kTimes)(const Vec*, Vec*)>
FISHERPRUNE_TARGET void transform(const float* from, int64_t width,
                                  const winograd::Grid& grid, float* to,
                                  float* largest) {
  constexpr int kShared = kSize - kEdge;
  const int64_t cols = grid.cols * kEdge + kShared, row = cols * width;
  for (int64_t v = 0; v < width; v += kLanes)
    find_largest(from + v, width, (grid.rows * kEdge + kShared) * cols, largest + v);
  for (int64_t i = 0; i < grid.rows; ++i)
    for (int64_t v = 0; v < width; v += kLanes)
      transform_row<kSize, kTimes>(from + i * kEdge * row + v, width, row, grid.cols,
                                   to + i * grid.cols * width + v, grid.stride * width);
}

FISHERPRUNE_TARGET bool any_small(const float* squares, int64_t width, float share,
                                  const float* size) {
  const Vec most = share * load(size);
  Vec least = load(squares);
  FISHERPRUNE_UNROLL
  for (int i = 1; i < kTaps; ++i) {
    const Vec square = load(squares + i * width);
    least = square < least ? square : least;
  }
  const auto below = least <= most * most;
  int any = 0;
  FISHERPRUNE_UNROLL
  for (int i = 0; i < kLanes; ++i) any |= below[i];
  return any;
}

// The products of R channels and V vectors of outputs at one place, over all tiles.
template <int R, int V>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void sum_tiles(const float* input,
                                                     const float* grad, int64_t tiles,
                                                     float* to) {
  Vec acc[R * V];
  FISHERPRUNE_UNROLL
  for (int i = 0; i < R * V; ++i) acc[i] = Vec{};
  for (int64_t t = 0; t < tiles; ++t, input += kLanes, grad += V * kLanes) {
    Vec d[V];
    FISHERPRUNE_UNROLL
    for (int v = 0; v < V; ++v) d[v] = load(grad + v * kLanes);
    FISHERPRUNE_UNROLL
    for (int r = 0; r < R; ++r) multiply_add<V, false>(input + r, d, acc + r * V);
  }
  FISHERPRUNE_UNROLL
  for (int i = 0; i < R * V; ++i) store(to + i * kLanes, acc[i]);
}

// g = A m A^T. A tap whose inputs never meet a gradient is zero. Computed from the 36
// products it is zero up to rounding: 2^-21 of their norm, seldom 2^-19. So a tap below
// 2^-18 is taken for zero, and weights without a gradient have no moments, unless much
// larger products cancelled.
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void taps_of(const float* products, int64_t place,
                                                   Vec* g, Vec* power) {
  Vec half[3][kReach], squares[3] = {};
  FISHERPRUNE_UNROLL
  for (int x = 0; x < kReach; ++x) {
    Vec m[kReach], y[3];
    FISHERPRUNE_UNROLL
    for (int i = 0; i < kReach; ++i) {
      m[i] = load(products + (i * kReach + x) * place);
      squares[i % 3] += m[i] * m[i];
    }
    times_a(m, y);
    FISHERPRUNE_UNROLL
    for (int i = 0; i < 3; ++i) half[i][x] = y[i];
  }
  const Vec all = squares[0] + squares[1] + squares[2], least = all * 0x1p-36f;
  power[0] += all;
  FISHERPRUNE_UNROLL
  for (int i = 0; i < 3; ++i) {
    times_a(half[i], g + i * 3);
    Vec taps{}, zeros{};
    FISHERPRUNE_UNROLL
    for (int j = i * 3; j < i * 3 + 3; ++j) {
      const Vec square = g[j] * g[j];
      taps += square;
      zeros += square < least ? square : Vec{};
      g[j] = square < least ? Vec{} : g[j];
    }
    power[1] += taps;
    power[2] += zeros;
  }
}

// One call runs over some units of a block, for R channels and V vectors of outputs.
// The sums over a unit's tiles, at all places, wait in the first-level cache; then they
// become the 9 taps of a gradient, which are added like the sums of any run.
template <int R, int V>
FISHERPRUNE_TARGET void winograd_tile(const winograd::Operands& operands,
                                      const Run* runs, int64_t run_count, float* sum,
                                      float* sum_sq, float* carry, float* power) {
  constexpr int64_t place = R * V * kLanes;
  Vec powers[3 * V] = {};
  alignas(64) float products[kPlaces * place];
  const float *input = operands.input, *grad = operands.grad;
  for (const Run* run = runs; run < runs + run_count; ++run) {
    for (int f = 0; f < kPlaces; ++f) {
      sum_tiles<R, V>(input, grad, run->end - run->begin, products + f * place);
      input += operands.stride * kLanes;
      grad += operands.stride * V * kLanes;
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) {
        Vec taps[kTaps];
        taps_of(products + (r * V + v) * kLanes, place, taps, powers + 3 * v);
        const int64_t at = (r * kTaps * V + v) * kLanes;
        end_run<kTaps, 1>(*run, taps, V * kLanes, sum + at, sum_sq + at,
                          carry + (r * V + v) * kTaps * kLanes);
      }
  }
  for (int i = 0; i < 3 * V; ++i)
    store(power + i * kLanes, load(power + i * kLanes) + powers[i]);
}
