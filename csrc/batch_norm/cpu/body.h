// The kernels of batch_norm in one set of vector instructions; no guard, because
// kernels.cpp includes it once for each, with the macros of vector_body.h.
//
// A step says what is done with one vector of entries: those from element `at` of every
// operand, column j. `n` of its lanes count: all but at the end of a row. `i` tells
// chains of additions apart, which overlap. A block is walked along its rows where one
// sum or coefficient is for all, and down its columns where each has its own.

#include "common/cpu/vector_body.h"
//
#include "common/cpu/entries_body.h"

template <class Step>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void along_rows(const Block& block, Step& step) {
  for (int64_t row = 0; row < block.rows; ++row) {
    const int64_t first = row * block.stride;
    int64_t j = 0;
    for (; j + 4 * kLanes <= block.width; j += 4 * kLanes) {
      step(first + j, j, 0, kLanes);
      step(first + j + kLanes, j + kLanes, 1, kLanes);
      step(first + j + 2 * kLanes, j + 2 * kLanes, 2, kLanes);
      step(first + j + 3 * kLanes, j + 3 * kLanes, 3, kLanes);
    }
    for (; j + kLanes <= block.width; j += kLanes) step(first + j, j, 0, kLanes);
    if (j < block.width) step(first + j, j, 1, block.width - j);
  }
}

template <class Step>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void down_columns(const Block& block, int64_t j,
                                                        int64_t n, Step& step) {
  int64_t row = 0;
  for (; row + 4 <= block.rows; row += 4) {
    step(row * block.stride + j, j, 0, n);
    step((row + 1) * block.stride + j, j, 1, n);
    step((row + 2) * block.stride + j, j, 2, n);
    step((row + 3) * block.stride + j, j, 3, n);
  }
  for (; row < block.rows; ++row) step(row * block.stride + j, j, 0, n);
}

// A coefficient that all entries share, and one that each column has.
struct Shared {
  Vec value;
  FISHERPRUNE_TARGET explicit Shared(const float* from) : value(all_lanes(*from)) {}
  FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec at(int64_t) const { return value; }
};

struct Own {
  const float* from;
  explicit Own(const float* all) : from(all) {}
  FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec at(int64_t j) const {
    return load(from + j);
  }
};

template <bool kColumns>
using Coefficient = std::conditional_t<kColumns, Own, Shared>;

struct Chains {
  Vec of[4] = {};
  FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec sum() const {
    return (of[0] + of[1]) + (of[2] + of[3]);
  }
};

template <class T>
struct Add {
  const T* x;
  Chains sum;

  FISHERPRUNE_TARGET FISHERPRUNE_INLINE void operator()(int64_t at, int64_t, int i,
                                                        int64_t n) {
    sum.of[i] += load_some(x + at, n);
  }
};

template <class T>
struct Deviate {
  const T* x;
  Vec shift;
  Chains sum, squares;

  FISHERPRUNE_TARGET FISHERPRUNE_INLINE void operator()(int64_t at, int64_t, int i,
                                                        int64_t n) {
    const Vec d = first_lanes(load_some(x + at, n) - shift, n);
    sum.of[i] += d;
    squares.of[i] += d * d;
  }
};

template <bool kColumns, class T>
FISHERPRUNE_TARGET void measure(const Operands& o, const Block& block,
                                const Sums& sums) {
  const T* const x = static_cast<const T*>(o.input);
  if constexpr (kColumns) {
    for (int64_t j = 0; j < block.width; j += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, block.width - j);
      Add<T> add{x, {}};
      down_columns(block, j, n, add);
      const Vec shift = add.sum.sum() / static_cast<float>(block.rows);
      Deviate<T> about{x, shift, {}, {}};
      down_columns(block, j, n, about);
      store_some(sums.of[0] + j, shift, n);
      store_some(sums.of[1] + j, about.sum.sum(), n);
      store_some(sums.of[2] + j, about.squares.sum(), n);
    }
  } else {
    Add<T> add{x, {}};
    along_rows(block, add);
    const float shift =
        sum_of_lanes(add.sum.sum()) / static_cast<float>(block.rows * block.width);
    Deviate<T> about{x, all_lanes(shift), {}, {}};
    along_rows(block, about);
    *sums.of[0] = shift;
    *sums.of[1] = sum_of_lanes(about.sum.sum());
    *sums.of[2] = sum_of_lanes(about.squares.sum());
  }
}

template <bool kColumns, class T, bool kResidual, bool kRelu>
struct Normalize {
  const T *x, *residual;
  T* y;
  Coefficient<kColumns> c0, c1, c2;

  FISHERPRUNE_TARGET FISHERPRUNE_INLINE void operator()(int64_t at, int64_t j, int,
                                                        int64_t n) {
    Vec value = (load_some(x + at, n) - c0.at(j)) * c1.at(j) + c2.at(j);
    if constexpr (kResidual) value += load_some(residual + at, n);
    if constexpr (kRelu) value = value < 0 ? Vec{} : value;  // NaN stays
    store_some(y + at, value, n);
  }
};

template <bool kColumns, class T, bool kResidual, bool kRelu>
FISHERPRUNE_TARGET void normalize_with(const Operands& o, const Block& block,
                                       const Coefficients& c) {
  using Own = Coefficient<kColumns>;
  Normalize<kColumns, T, kResidual, kRelu> step{static_cast<const T*>(o.input),
                                                static_cast<const T*>(o.second),
                                                static_cast<T*>(o.result),
                                                Own(c.of[0]),
                                                Own(c.of[1]),
                                                Own(c.of[2])};
  along_rows(block, step);
}

template <bool kColumns, class T>
void normalize(const Operands& o, const Block& block, const Coefficients& c) {
  constexpr void (*some[2][2])(const Operands&, const Block&, const Coefficients&) = {
      {normalize_with<kColumns, T, false, false>,
       normalize_with<kColumns, T, false, true>},
      {normalize_with<kColumns, T, true, false>,
       normalize_with<kColumns, T, true, true>}};
  some[o.second != nullptr][o.relu](o, block, c);
}

template <class T>
struct Gradient {
  const T *grad, *output;

  template <bool kRelu>
  FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec at(int64_t at, int64_t n) const {
    const Vec g = load_some(grad + at, n);
    if constexpr (!kRelu) return g;
    return load_some(output + at, n) <= 0 ? Vec{} : g;
  }
};

template <bool kColumns, class T, bool kRelu, bool kKeep>
struct Reduce {
  Gradient<T> g;
  const T* x;
  T* kept;
  Coefficient<kColumns> c0;
  Chains sum, products, deviations;

  FISHERPRUNE_TARGET FISHERPRUNE_INLINE void operator()(int64_t at, int64_t j, int i,
                                                        int64_t n) {
    const Vec gradient = g.template at<kRelu>(at, n);
    if constexpr (kKeep) store_some(kept + at, gradient, n);
    const Vec d = first_lanes(load_some(x + at, n) - c0.at(j), n);
    sum.of[i & 1] += gradient;  // two chains: more have no registers
    products.of[i & 1] += gradient * d;
    deviations.of[i & 1] += d;
  }
};

template <bool kColumns, class T, bool kRelu, bool kKeep>
FISHERPRUNE_TARGET void reduce_with(const Operands& o, const Block& block,
                                    const Coefficients& c, const Sums& sums) {
  using Step = Reduce<kColumns, T, kRelu, kKeep>;
  const Step begin{{static_cast<const T*>(o.grad), static_cast<const T*>(o.second)},
                   static_cast<const T*>(o.input),
                   static_cast<T*>(o.result),
                   Coefficient<kColumns>(c.of[0]),
                   {},
                   {},
                   {}};
  if constexpr (kColumns) {
    for (int64_t j = 0; j < block.width; j += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, block.width - j);
      Step step = begin;
      down_columns(block, j, n, step);
      store_some(sums.of[0] + j, step.sum.sum(), n);
      store_some(sums.of[1] + j, step.products.sum(), n);
      store_some(sums.of[2] + j, step.deviations.sum(), n);
    }
  } else {
    Step step = begin;
    along_rows(block, step);
    *sums.of[0] = sum_of_lanes(step.sum.sum());
    *sums.of[1] = sum_of_lanes(step.products.sum());
    *sums.of[2] = sum_of_lanes(step.deviations.sum());
  }
}

template <bool kColumns, class T>
void reduce(const Operands& o, const Block& block, const Coefficients& c,
            const Sums& sums) {
  constexpr void (*some[2][2])(const Operands&, const Block&, const Coefficients&,
                               const Sums&) = {
      {reduce_with<kColumns, T, false, false>, reduce_with<kColumns, T, false, true>},
      {reduce_with<kColumns, T, true, false>, reduce_with<kColumns, T, true, true>}};
  some[o.second != nullptr][o.result != nullptr](o, block, c, sums);
}

template <bool kColumns, class T, bool kRelu>
struct Differentiate {
  Gradient<T> g;
  const T* x;
  T* result;
  Coefficient<kColumns> c0, c1, c2, c3;

  FISHERPRUNE_TARGET FISHERPRUNE_INLINE void operator()(int64_t at, int64_t j, int,
                                                        int64_t n) {
    const Vec gradient = g.template at<kRelu>(at, n);
    const Vec d = load_some(x + at, n) - c0.at(j);
    store_some(result + at, gradient * c1.at(j) + (d * c2.at(j) + c3.at(j)), n);
  }
};

template <bool kColumns, class T, bool kRelu>
FISHERPRUNE_TARGET void differentiate_with(const Operands& o, const Block& block,
                                           const Coefficients& c) {
  using Own = Coefficient<kColumns>;
  Differentiate<kColumns, T, kRelu> step{
      {static_cast<const T*>(o.grad), static_cast<const T*>(o.second)},
      static_cast<const T*>(o.input),
      static_cast<T*>(o.result),
      Own(c.of[0]),
      Own(c.of[1]),
      Own(c.of[2]),
      Own(c.of[3])};
  along_rows(block, step);
}

template <bool kColumns, class T>
void differentiate(const Operands& o, const Block& block, const Coefficients& c) {
  (o.second ? differentiate_with<kColumns, T, true>
            : differentiate_with<kColumns, T, false>)(o, block, c);
}

#define FISHERPRUNE_EACH(kernel)                       \
  {                                                    \
    {kernel<false, float>, kernel<false, BFloat16>}, { \
      kernel<true, float>, kernel<true, BFloat16>      \
    }                                                  \
  }
constexpr Kernels kTable = {kLanes, FISHERPRUNE_EACH(measure),
                            FISHERPRUNE_EACH(normalize), FISHERPRUNE_EACH(reduce),
                            FISHERPRUNE_EACH(differentiate)};
#undef FISHERPRUNE_EACH
