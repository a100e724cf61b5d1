// Small kernels, right and wrong: what the emulator must notice. Argument: which one.
#include <algorithm>
#include <cstdio>
#include <string>

#include "common/cuda/ptx.cuh"

namespace {

using namespace fisherprune::cuda;

constexpr int THREADS = 64;

float* shared_floats() { return reinterpret_cast<float*>(dynamic_shared()); }

enum class Meet { block, warp, nobody };

// Each thread gives its number to the one opposite, in another warp.
void reverse(int* out, Meet meet) {
  int* shared = reinterpret_cast<int*>(dynamic_shared());
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (meet == Meet::block) __syncthreads();
  if (meet == Meet::warp) __syncwarp();
  out[threadIdx.x] = shared[THREADS - 1 - threadIdx.x];
}

void write_past_shared(int beyond) { shared_floats()[threadIdx.x + beyond] = 1.f; }

void read_past_shared(float* out) {
  out[threadIdx.x] = load_shared(shared_address(shared_floats() + threadIdx.x + 1));
}

void write_past_global(int* out) { out[threadIdx.x + 1] = 1; }

void wait_without_one() {
  if (threadIdx.x != 5) __syncthreads();
}

void meet_in_different_places() {
  if (threadIdx.x % 2)
    __syncwarp();
  else
    __ballot_sync(0xffffffffu, true);
}

// Copies a word; without the wait it is still NaN.
void copy(const float* in, float* out, bool wait) {
  copy4_async(shared_floats() + threadIdx.x, in + threadIdx.x, true);
  commit_copies();
  if (wait) await_copies<0>();
  out[threadIdx.x] = shared_floats()[threadIdx.x];
  await_copies<0>();
}

void copy_and_leave(const float* in) {
  copy4_async(shared_floats() + threadIdx.x, in + threadIdx.x, true);
  commit_copies();
}

// Every block adds one; the one that draws the last ticket reads the sum, or the one of
// the highest number, which need not be the last to come.
void add_and_read(int* sum, unsigned* ticket, int* out, bool by_ticket) {
  if (threadIdx.x == 0) atomicAdd(sum, 1);
  __threadfence();
  __syncthreads();
  if (threadIdx.x != 0) return;
  const bool last = atomicAdd(ticket, 1u) + 1 == gridDim.x;
  if (by_ticket ? last : blockIdx.x + 1 == gridDim.x) *out = __ldcg(sum);
}

bool reads_all(bool by_ticket) {
  constexpr int blocks = 5;
  int sum = 0, out = 0;
  unsigned ticket = 0;
  launch(add_and_read, dim3(blocks), THREADS, 0, nullptr, &sum, &ticket, &out,
         by_ticket);
  return out == blocks && sum == blocks;
}

bool reverses(Meet meet) {
  std::vector<int> out(THREADS);
  launch(reverse, dim3(1), THREADS, THREADS * 4, nullptr, out.data(), meet);
  for (int i = 0; i < THREADS; ++i)
    if (out[i] != THREADS - 1 - i) return false;
  return true;
}

bool copies(bool wait) {
  const std::vector<float> in(THREADS, 2.f);
  std::vector<float> out(THREADS);
  launch(copy, dim3(1), THREADS, THREADS * 4, nullptr, in.data(), out.data(), wait);
  return in == out;
}

}  // namespace

int main(int, char** argv) {
  const std::string which = argv[1];
  const std::vector<float> in(THREADS);
  std::vector<float> results(THREADS);
  std::unique_ptr<int[]> out(new int[THREADS]);
  bool right = true;
  if (which == "barrier") right = reverses(Meet::block);
  if (which == "warp_barrier") right = reverses(Meet::warp);
  if (which == "no_barrier") right = reverses(Meet::nobody);
  if (which == "wait") right = copies(true);
  if (which == "no_wait") right = copies(false);
  if (which == "last_block") right = reads_all(true);
  if (which == "highest_block") right = reads_all(false);
  if (which == "within_shared")
    launch(write_past_shared, dim3(1), THREADS, THREADS * 4, nullptr, 0);
  if (which == "past_shared")
    launch(write_past_shared, dim3(1), THREADS, THREADS * 4, nullptr, 1);
  if (which == "read_past_shared")
    launch(read_past_shared, dim3(1), THREADS, THREADS * 4, nullptr, results.data());
  if (which == "past_global")
    launch(write_past_global, dim3(1), THREADS, 0, nullptr, out.get());
  if (which == "lonely_barrier") launch(wait_without_one, dim3(1), THREADS, 0, nullptr);
  if (which == "diverged")
    launch(meet_in_different_places, dim3(1), THREADS, 0, nullptr);
  if (which == "copies_left")
    launch(copy_and_leave, dim3(1), THREADS, THREADS * 4, nullptr, in.data());
  std::puts(right ? "right" : "wrong");
  return 0;
}
