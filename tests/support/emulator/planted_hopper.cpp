// The stand-ins of hopper.h by themselves, used rightly and wrongly. Arguments: which
// use, and the bytes of a row.
#include <cstdio>
#include <string>

#include "common/cuda/hopper.cuh"

namespace {

using namespace fisherprune::cuda;

constexpr int THREADS = 128;
constexpr int BARRIER = 64 << 10;  // behind all matrices
constexpr int SHARED = BARRIER + 8;

// Where piece `piece` of row `row` lies, in bytes: 128 bytes hold one to eight rows,
// and within eight of these the pieces change places by the number of the 128 bytes.
int place_of(int row, int piece, int row_bytes) {
  const int swapped = row * row_bytes / 128 % 8 % (row_bytes / 16);
  return row * row_bytes + (piece ^ swapped) * 16;
}

float drawn(std::mt19937& random) { return std::normal_distribution<float>()(random); }

// ---- copies ----

constexpr int SAMPLES = 2, LINES = 3, CHANNELS = 5, BOX_CHANNELS = 8;

struct Use {
  bool publishes = true, waits = true;
  int too_many = 0;  // bytes
  unsigned parity = 0;
};

// One thread copies a box that begins outside of the tensor; all read it.
void copy(const Boxes boxes, const Use use, float* out) {
  const SharedAddress shared = shared_address(dynamic_shared());
  const SharedAddress barrier = shared + BARRIER;
  const int size = boxes.box[0] * boxes.box[1] * boxes.box[2];
  if (threadIdx.x == 0) {
    init_barrier(barrier, 1);
    if (use.publishes) publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive_expecting(barrier, size * 4 + use.too_many);
    copy_box(shared, boxes, barrier, -1, 0, 2, 1);
  }
  if (use.waits) await_phase(barrier, use.parity);
  for (int i = threadIdx.x; i < size; i += THREADS)
    out[i] = load_shared(shared + i * 4);
  await_phase(barrier, 0);
}

void copy_and_leave(const Boxes boxes) {
  const SharedAddress shared = shared_address(dynamic_shared());
  if (threadIdx.x != 0) return;
  init_barrier(shared + BARRIER, 1);
  publish_barriers();
  copy_box(shared, boxes, shared + BARRIER, 0, 0, 0, 0);
}

// Each of two blocks copies the box of a sample for both.
void share(const Boxes boxes, bool for_both, float* out) {
  const SharedAddress shared = shared_address(dynamic_shared());
  const SharedAddress barrier = shared + BARRIER;
  const int size = boxes.box[0] * boxes.box[1] * boxes.box[2], rank = cluster_rank();
  if (threadIdx.x == 0) {
    init_barrier(barrier, 1);
    publish_barriers();
  }
  meet_cluster();
  if (threadIdx.x == 0) {
    arrive_expecting(barrier, SAMPLES * size * 4);
    const SharedAddress to = shared + rank * size * 4;
    if (for_both)
      copy_box_to_all(to, boxes, barrier, -1, 0, 2, rank);
    else
      copy_box(to, boxes, barrier, -1, 0, 2, rank);
  }
  await_phase(barrier, 0);
  for (int i = threadIdx.x; i < SAMPLES * size; i += THREADS)
    out[rank * SAMPLES * size + i] = load_shared(shared + i * 4);
}

// The second block arrives at the first one's barrier, which may have ended.
void arrive_late(bool meets) {
  const SharedAddress barrier = shared_address(dynamic_shared());
  if (threadIdx.x == 0) init_barrier(barrier, 1);
  meet_cluster();
  if (cluster_rank() == 1) {
    for (int i = 0; i < 1000; ++i) __syncwarp();
    if (threadIdx.x == 0) arrive_in(0, barrier);
  }
  if (meets) meet_cluster();
}

struct Images {
  int width;
  std::vector<float> data;
  Boxes boxes;

  explicit Images(int row_bytes) : width(row_bytes / 4) {
    std::mt19937 random(row_bytes);
    data.resize(SAMPLES * CHANNELS * LINES * width);
    for (float& value : data) value = drawn(random);
    const int64_t row = row_bytes, channel = LINES * row;
    boxes = {data.data(),
             {width, CHANNELS, LINES, SAMPLES},
             {channel, row, CHANNELS * channel},
             {width, BOX_CHANNELS, 2, 1}};
  }
  // Of lines 2 and 3 of a sample, the second of which does not exist.
  float expected(int sample, int channel, int line, int x) const {
    if (x == 0 || channel >= CHANNELS || line > 0) return 0.f;
    const int nth = (sample * CHANNELS + channel) * LINES + 2;
    const float value = data[nth * width + x - 1];
    const double unit = std::ldexp(1., std::ilogb(value) - 10);  // of a TF32
    return static_cast<float>(std::nearbyint(value / unit) * unit);
  }
};

// Whether a copied box has what it must have.
bool is_right(const Images& images, int sample, const float* box) {
  for (int line = 0; line < 2; ++line)
    for (int channel = 0; channel < BOX_CHANNELS; ++channel)
      for (int x = 0; x < images.width; ++x) {
        const int row = line * BOX_CHANNELS + channel;
        const int at = place_of(row, x / 4, images.width * 4) / 4 + x % 4;
        if (!(box[at] == images.expected(sample, channel, line, x))) return false;
      }
  return true;
}

bool copies(const Images& images, const Use& use) {
  std::vector<float> out(2 * BOX_CHANNELS * images.width);
  launch(copy, dim3(1), THREADS, SHARED, nullptr, images.boxes, use, out.data());
  return is_right(images, 1, out.data());
}

bool shares(const Images& images, bool for_both) {
  const int size = 2 * BOX_CHANNELS * images.width;
  std::vector<float> out(2 * SAMPLES * size);
  launch_clusters(share, 2, dim3(2), THREADS, SHARED, nullptr, images.boxes, for_both,
                  out.data());
  bool right = true;
  for (int i = 0; i < 2 * SAMPLES; ++i)
    right &= is_right(images, i % SAMPLES, out.data() + i * size);
  return right;
}

// ---- products ----

enum class Wrong { nothing, no_fence, no_wait, rows_apart };

struct Matrices {
  int row_bytes, deep;  // depth of both
  std::vector<float> a, b;

  explicit Matrices(int row_bytes_) : row_bytes(row_bytes_), deep(2 * PRODUCT_DEPTH) {
    std::mt19937 random(row_bytes);
    a.resize(PRODUCT_ROWS * deep);
    b.resize(PRODUCT_COLUMNS * deep);
    for (float& value : a) value = drawn(random);
    for (float& value : b) value = drawn(random);
  }
  int rows_apart() const { return 8 * row_bytes + 1024; }  // of eight and eight
  // How far behind all rows' pieces those lie for which rows have no room.
  int pieces_apart(int rows) const { return rows / 8 * rows_apart(); }
  int place(int row, int k, int rows) const {
    const int across = row_bytes / 4;
    return row / 8 * rows_apart() + place_of(row % 8, k % across / 4, row_bytes) +
           k / across * pieces_apart(rows) + k % 4 * 4;
  }
  // Where a product's pieces begin.
  int begin(int k, int rows) const {
    return k * 4 / row_bytes * pieces_apart(rows) + k * 4 % row_bytes;
  }
  int b_at() const {  // behind a
    return (deep * 4 / row_bytes + 1) * pieces_apart(PRODUCT_ROWS) / 1024 * 1024;
  }
  double truth(int row, int column) const {
    double sum = 0;
    for (int k = 0; k < deep; ++k)
      sum += cut(a[row * deep + k]) * cut(b[column * deep + k]);
    return sum;
  }
  static double cut(float value) {  // to the ten bits behind the first one
    const double unit = std::ldexp(1., std::ilogb(value) - 10);
    return std::trunc(value / unit) * unit;
  }
};

// The second product adds to the first one. What was in the results before is lost.
void multiply(const Matrices* of, Wrong wrong, float* out) {
  const SharedAddress a = shared_address(dynamic_shared()), b = a + of->b_at();
  if (threadIdx.x == 0)
    for (int k = 0; k < of->deep; ++k) {
      for (int row = 0; row < PRODUCT_ROWS; ++row)
        std::memcpy(a + of->place(row, k, PRODUCT_ROWS), &of->a[row * of->deep + k], 4);
      for (int row = 0; row < PRODUCT_COLUMNS; ++row)
        std::memcpy(b + of->place(row, k, PRODUCT_COLUMNS), &of->b[row * of->deep + k],
                    4);
    }
  __syncthreads();
  const int apart = of->rows_apart() + (wrong == Wrong::rows_apart ? 16 : 0);
  Results c;
  for (auto& each : c)
    for (float& value : each) value = NAN;
  if (wrong != Wrong::no_fence) begin_products(c);
  for (int k = 0; k < of->deep; k += PRODUCT_DEPTH)
    multiply_matrices(
        c,
        matrix_at(shared_bytes_at(a + of->begin(k, PRODUCT_ROWS)), of->row_bytes, apart,
                  of->pieces_apart(PRODUCT_ROWS)),
        matrix_at(shared_bytes_at(b + of->begin(k, PRODUCT_COLUMNS)), of->row_bytes,
                  apart, of->pieces_apart(PRODUCT_COLUMNS)),
        k > 0);
  if (wrong != Wrong::no_wait) await_products(c);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  for (int j = 0; j < PRODUCT_COLUMNS / 8; ++j)
    for (int e = 0; e < 4; ++e)
      out[(row + e / 2 * 8) * PRODUCT_COLUMNS + j * 8 + lane % 4 * 2 + e % 2] = c[j][e];
  if (wrong == Wrong::no_wait) await_products(c);
}

bool multiplies(int row_bytes, Wrong wrong) {
  const Matrices of(row_bytes);
  std::vector<float> out(PRODUCT_ROWS * PRODUCT_COLUMNS);
  launch(multiply, dim3(1), THREADS, 3 * SHARED, nullptr, &of, wrong, out.data());
  for (int row = 0; row < PRODUCT_ROWS; ++row)
    for (int column = 0; column < PRODUCT_COLUMNS; ++column) {
      const double error = out[row * PRODUCT_COLUMNS + column] - of.truth(row, column);
      if (!(std::fabs(error) < 1e-5)) return false;
    }
  return true;
}

}  // namespace

int main(int, char** argv) {
  const std::string which = argv[1];
  const int row_bytes = std::stoi(argv[2]);
  const Images images(row_bytes);
  Use use;
  bool right = true;
  if (which == "unpublished") use.publishes = false;
  if (which == "no_wait") use.waits = false;
  if (which == "wrong_parity") use.parity = 1;
  if (which == "more_bytes") use.too_many = 16;
  if (which == "fewer_bytes") use.too_many = -16;
  if (which == "box_left")
    launch(copy_and_leave, dim3(1), THREADS, SHARED, nullptr, images.boxes);
  else if (which == "shared" || which == "not_shared")
    right = shares(images, which == "shared");
  else if (which == "late" || which == "too_late")
    launch_clusters(arrive_late, 2, dim3(2), THREADS, SHARED, nullptr, which == "late");
  else if (which == "products")
    right = multiplies(row_bytes, Wrong::nothing);
  else if (which == "no_fence")
    right = multiplies(row_bytes, Wrong::no_fence);
  else if (which == "products_no_wait")
    right = multiplies(row_bytes, Wrong::no_wait);
  else if (which == "rows_apart")
    right = multiplies(row_bytes, Wrong::rows_apart);
  else
    right = copies(images, use);
  std::puts(right ? "right" : "wrong");
  return 0;
}
