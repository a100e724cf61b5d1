// Reads a file of cases, runs the CUDA kernels on them in emulation, writes the
// results.
//
// A file holds little-endian 64-bit words: a case is its op's number and the arguments,
// arrays as their number of bytes and the bytes. Results are arrays in the same form.
#include <algorithm>
#include <cstdio>
#include <string>

#include "global_topk/cuda/launch.cuh"
#include "grad_moments/cuda/launch.cuh"
#include "grad_moments/cuda/wgmma_switch.h"

namespace {

using namespace fisherprune;
using namespace fisherprune::cuda;
using namespace fisherprune::cuda::global_topk;
using namespace fisherprune::cuda::grad_moments;

// An allocation of its own size, so that the address sanitizer knows its end.
struct Array {
  std::unique_ptr<char[]> bytes;
  size_t size;

  explicit Array(size_t size_, int fill = 0xff) : bytes(new char[size_]), size(size_) {
    std::memset(bytes.get(), fill, size);
  }
  template <class Value>
  Value* as() {
    return reinterpret_cast<Value*>(bytes.get());
  }
};

struct Files {
  std::FILE *in, *out;

  bool word(int64_t& value) { return std::fread(&value, 8, 1, in) == 1; }
  int64_t number() {
    int64_t value;
    if (!word(value)) emulator::fail("the file of cases ends early");
    return value;
  }
  // `shift` bytes more at the front put the data at an odd place.
  Array array(size_t shift = 0) {
    const int64_t size = number();
    Array read(size + shift);
    if (std::fread(read.bytes.get() + shift, 1, size, in) != static_cast<size_t>(size))
      emulator::fail("the file of cases ends early");
    return read;
  }
  std::vector<int64_t> numbers() {
    Array read = array();
    return {read.as<int64_t>(), read.as<int64_t>() + read.size / 8};
  }
  void write(const Array& data) {
    const int64_t size = static_cast<int64_t>(data.size);
    std::fwrite(&size, 8, 1, out);
    std::fwrite(data.bytes.get(), 1, data.size, out);
  }
};

View4 read_view(Files& files, Array& data) {
  View4 view{data.bytes.get(), static_cast<Dtype>(files.number()), {}};
  const int64_t first = files.number();
  view.data = data.bytes.get() + first;
  for (int64_t& stride : view.stride) stride = files.number();
  return view;
}

ConvShape read_shape(Files& files) {
  const std::vector<int64_t> v = files.numbers();
  return {v[0], v[1],  v[2],  v[3],  v[4],  v[5],  v[6],  v[7], v[8],
          v[9], v[10], v[11], v[12], v[13], v[14], v[15], v[16]};
}

GradMomentsPlan wished_plan(const GradMoments& m, bool allow_tf32, TileKind tile) {
  const bool window = tile == TileKind::window || tile == TileKind::slim_window;
  if (window && !find_window<WindowTile>(m))
    emulator::fail("the images do not suit a window");
  if ((tile == TileKind::taps && !taps_suit<TapsTile>(m)) ||
      (tile == TileKind::slim_taps && !taps_suit<SlimTapsTile>(m)))
    emulator::fail("the convolution does not suit the tiles of taps");
  if ((tile == TileKind::wgmma || tile == TileKind::slim_wgmma) && !wgmma_suits(m))
    emulator::fail("the convolution does not suit products of warpgroups");
  if ((tile == TileKind::lanes && !lanes_suit<LanesTile>(m)) ||
      (tile == TileKind::slim_lanes && !lanes_suit<SlimLanesTile>(m)))
    emulator::fail("the convolution does not suit the tiles of lanes");
  if (tile == TileKind::dense && !may_be_dense(m, !allow_tf32, false))
    emulator::fail("the operands do not suit the dense kernel");
  return allow_tf32 ? plan_with_tile<false>(m.shape, tile, multiprocessors())
                    : plan_with_tile<true>(m.shape, tile, multiprocessors());
}

// The same for copies of the operands.
GradMomentsPlan wished_copies(const GradMoments& m, bool allow_tf32, TileKind tile) {
  if (!may_become_pixels(m)) emulator::fail("the operands are not copied");
  const GradMoments copied = as_pixels(m, nullptr);
  GradMomentsPlan plan = wished_plan(copied, allow_tf32, tile);
  plan.pixels = true;
  plan.workspace += pixel_floats(m.shape);
  return plan;
}

void moments_case(Files& files) {
  const ConvShape shape = read_shape(files);
  const bool allow_tf32 = files.number();
  const int64_t wish = files.number();  // a tile, or -1 for the planned one
  const bool copies = files.number();
  Array input = files.array(), grad = files.array();
  const View4 a = read_view(files, input), d = read_view(files, grad);
  Array sum = files.array(), sum_sq = files.array();
  const GradMoments m{shape, a, d, sum.as<float>(), sum_sq.as<float>()};
  if (has_work(shape)) {
    check_extents(shape);
    GradMomentsPlan plan = plan_grad_moments(m, allow_tf32, multiprocessors());
    if (wish >= 0)
      plan = (copies ? wished_copies : wished_plan)(m, allow_tf32,
                                                    static_cast<TileKind>(wish));
    Array workspace(plan.workspace * sizeof(float));
    run_grad_moments(m, plan, allow_tf32, workspace.as<float>(), nullptr);
  }
  files.write(sum);
  files.write(sum_sq);
}

// The same, and the cycles that the kernels' accesses to shared memory take, and the
// bytes of boxes that are copied there.
void cycles_case(Files& files) {
  emulator::counts_cycles = true;
  emulator::shared_cycles = emulator::box_bytes = 0;
  moments_case(files);
  emulator::counts_cycles = false;
  Array counts(2 * sizeof(uint64_t));
  counts.as<uint64_t>()[0] = emulator::shared_cycles;
  counts.as<uint64_t>()[1] = emulator::box_bytes;
  files.write(counts);
}

struct ScoreArrays {
  std::vector<Array> arrays;
  std::vector<Scores> scores;

  explicit ScoreArrays(Files& files) {
    const int64_t tensors = files.number();
    for (int64_t i = 0; i < tensors; ++i) {
      const size_t shift = files.number();
      arrays.push_back(files.array(shift));
      const float* data = reinterpret_cast<float*>(arrays.back().bytes.get() + shift);
      scores.push_back({data, static_cast<int64_t>((arrays.back().size - shift) / 4)});
    }
  }
};

std::vector<Array> mask_arrays(const std::vector<Scores>& scores, size_t n) {
  std::vector<Array> masks;
  for (size_t k = 0; k < n; ++k)
    for (const Scores& s : scores) masks.emplace_back(s.size);
  return masks;
}

std::vector<bool*> pointers(std::vector<Array>& masks) {
  std::vector<bool*> data;
  for (Array& mask : masks) data.push_back(mask.as<bool>());
  return data;
}

void topk_case(Files& files) {
  const ScoreArrays list(files);
  const std::vector<int64_t> keep = files.numbers(), ranks = files.numbers();
  std::vector<int64_t> all = keep;
  all.insert(all.end(), ranks.begin(), ranks.end());
  std::vector<Array> masks = mask_arrays(list.scores, keep.size());
  Array thresholds(all.size() * 4), nonfinite(list.scores.size() * 8);
  Array memory(topk_workspace(list.scores, all.size(), keep.size()).words * 8);
  const TopkCall call = start_topk(list.scores, all, keep.size(),
                                   thresholds.as<float>(), nonfinite.as<int64_t>(),
                                   memory.as<int64_t>(), multiprocessors(), nullptr);
  write_masks(call, pointers(masks), false);
  files.write(thresholds);
  files.write(nonfinite);
  for (const Array& mask : masks) files.write(mask);
}

void histogram_case(Files& files) {
  const ScoreArrays list(files);
  const uint64_t prefix = files.number();
  const int prefix_bits = static_cast<int>(files.number());
  const int bits = static_cast<int>(files.number());
  Array counts(size_t{8} << bits);
  Array memory(histogram_workspace(list.scores).words * 8);
  run_topk_histogram(list.scores, prefix, {prefix_bits, bits}, counts.as<int64_t>(),
                     memory.as<int64_t>(), multiprocessors(), nullptr);
  files.write(counts);
}

void masks_case(Files& files) {
  const ScoreArrays list(files);
  Array threshold = files.array();
  const std::vector<int64_t> ties = files.numbers();
  std::vector<Array> masks = mask_arrays(list.scores, 1);
  Array memory(masks_workspace(list.scores).words * 8);
  run_topk_masks(list.scores, *threshold.as<float>(), ties, pointers(masks),
                 memory.as<int64_t>(), multiprocessors(), nullptr);
  for (const Array& mask : masks) files.write(mask);
}

// A block's searches in counts, one after the other.
void search_kernel(const int64_t* counts, int64_t size, const int64_t* left, int64_t n,
                   int64_t* places) {
  int64_t* shared = reinterpret_cast<int64_t*>(dynamic_shared());
  for (int64_t i = 0; i < n; ++i) {
    const Place place =
        find_place(size, left[i], [&](int64_t at) { return counts[at]; }, shared);
    if (threadIdx.x != 0) continue;
    places[3 * i] = place.at;
    places[3 * i + 1] = place.before;
    places[3 * i + 2] = place.here;
  }
}

void search_case(Files& files) {
  Array counts = files.array(), left = files.array();
  const int64_t size = counts.size / 8, n = left.size / 8;
  Array places(3 * left.size);
  launch(search_kernel, dim3(1), TOPK_THREADS, SEARCH_BYTES, nullptr,
         counts.as<int64_t>(), size, left.as<int64_t>(), n, places.as<int64_t>());
  files.write(places);
}

// The op of contiguous or channels_last images that are nowhere.
GradMoments planned_moments(const ConvShape& s, Dtype dtype, bool pixels) {
  const auto images = [&](int64_t channels, int64_t height, int64_t width) {
    const int64_t size = channels * height * width;
    if (pixels) return View4{nullptr, dtype, {size, 1, width * channels, channels}};
    return View4{nullptr, dtype, {size, height * width, width, 1}};
  };
  return {s, images(s.channels, s.height, s.width),
          images(s.outputs, s.out_height, s.out_width), nullptr, nullptr};
}

// How images in shared memory are planned to lie, or nothing.
void window_case(Files& files) {
  const std::optional<Window> window = find_window<WindowTile>(
      planned_moments(read_shape(files), Dtype::float32, false));
  Array words(window ? 2 * sizeof(int64_t) : 0);
  if (window) {
    words.as<int64_t>()[0] = window->pitch;
    words.as<int64_t>()[1] = window->channel;
  }
  files.write(words);
}

// The plan in TF32: splits, parts of a group, bytes of the workspace, the tile, and
// whether it is for copies of the operands.
void plan_case(Files& files) {
  const ConvShape shape = read_shape(files);
  const Dtype dtype = static_cast<Dtype>(files.number());
  const GradMoments m = planned_moments(shape, dtype, files.number());
  const GradMomentsPlan plan =
      plan_grad_moments(m, true, multiprocessors(), wants_wgmma());
  Array words(5 * sizeof(int64_t));
  words.as<int64_t>()[0] = plan.shares.splits;
  words.as<int64_t>()[1] = plan.shares.parts;
  words.as<int64_t>()[2] = plan.workspace * static_cast<int64_t>(sizeof(float));
  words.as<int64_t>()[3] = static_cast<int64_t>(plan.tile);
  words.as<int64_t>()[4] = plan.pixels;
  files.write(words);
}

// What is wrong with the environment, or products of warpgroups for a build and device.
void switch_case(Files& files) {
  const Array archs = files.array();
  const int major = static_cast<int>(files.number());
  const int minor = static_cast<int>(files.number());
  std::string message;
  try {
    if (wants_wgmma())
      check_wgmma(std::string(archs.bytes.get(), archs.size), major, minor);
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  Array bytes(message.size());
  std::copy(message.begin(), message.end(), bytes.bytes.get());
  files.write(bytes);
}

// Positions divided by widths, as the kernels find a position's row.
void divider_case(Files& files) {
  const std::vector<int64_t> positions = files.numbers(), widths = files.numbers();
  Array rows(positions.size() * sizeof(int64_t));
  for (size_t i = 0; i < positions.size(); ++i)
    rows.as<int64_t>()[i] =
        Divider(static_cast<uint32_t>(widths[i]))(static_cast<int>(positions[i]));
  files.write(rows);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  Files files{std::fopen(argv[1], "rb"), std::fopen(argv[2], "wb")};
  if (!files.in || !files.out) return 2;
  for (int64_t op; files.word(op);) {
    emulator::seed = files.number();
    emulator::multiprocessor_count = static_cast<int>(files.number());
    if (op == 0) moments_case(files);
    if (op == 1) topk_case(files);
    if (op == 2) histogram_case(files);
    if (op == 3) masks_case(files);
    if (op == 4) divider_case(files);
    if (op == 5) search_case(files);
    if (op == 6) window_case(files);
    if (op == 7) plan_case(files);
    if (op == 8) cycles_case(files);
    if (op == 9) switch_case(files);
  }
  std::fclose(files.out);
  return 0;
}
