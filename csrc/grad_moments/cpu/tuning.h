// Tuning constants of grad_moments on the CPU. None of them depends on the number of
// threads, so the order of the additions, and with it every bit of the result, does not
// either. Any values within the bounds that are asserted give right results.
#pragma once

#include <cstdint>

namespace fisherprune::cpu::grad_moments::tuning {

// Rows of the patch and lanes of the outputs that one task keeps in its tile: twice
// 48 x 64 floats are 24 KiB, half of a first-level cache. 48 is a multiple of every
// micro-tile's rows but the 9 of depthwise convolutions. That micro-tiles fit is
// asserted in microkernel.cpp.
constexpr int64_t kTileRows = 48;
constexpr int64_t kTileLanes = 64;

// The packed output gradient of one column of tiles is read once for every few rows of
// the patch: it must stay in the second-level cache.
constexpr int64_t kGradBytes = 1 << 20;

// Positions of a group up to which its micro-tiles are the smaller ones that keep their
// moments in registers; and the packed gradient that must then stay in the first-level
// cache.
constexpr int64_t kShortRunPositions = 32;
constexpr int64_t kShortGradBytes = 16 << 10;

// The tile of such groups: 144 x 32 floats, twice 18 KiB. It has more rows than others,
// because to add the tile to the accumulators is a large part of the work. The rows
// fill whole cache lines of the accumulators, and whole micro-tiles for each of the 9
// taps of a 3x3 kernel.
constexpr int64_t kShortTileRows = 144;
constexpr int64_t kShortTileLanes = 32;

// The most taps of a kernel whose rows of the patch may be multiplied apart, each tap
// at the positions where it is over the image: a tile then has micro-tiles of all taps.
constexpr int64_t kMostPlaces = 9;

// A block is what is packed at a time. Small blocks stay in a cache near the processor,
// which matters most where the patch is one tile and reads them only once. But the
// accumulators are read and written once for each block: the multiplications at
// kBlockPositions positions outweigh that. kMostBlockBytes bounds the memory of a call.
constexpr int64_t kOneTileBlockBytes = 2 << 20;
constexpr int64_t kBlockBytes = 4 << 20;
constexpr int64_t kBlockPositions = 4096;
constexpr int64_t kMostBlockBytes = 16 << 20;
static_assert(kMostBlockBytes / 4 <= INT32_MAX && kGradBytes / 4 <= INT32_MAX,
              "places in a packed block take 32 bits");

// Channels of the input that one task packs, and numbers that one task squares.
constexpr int64_t kPackChannels = 16;
constexpr int64_t kSquarePiece = 1 << 14;
static_assert(kPackChannels >= 1 && kSquarePiece >= 1);

// Positions that are transposed at a time, in the first-level cache.
constexpr int64_t kPackPositions = 128;
static_assert(kPackPositions >= 1);

// Floats of a sample's packed input, and how many times those of the image, above which
// a kernel is taken tap by tap: packed as usual, the padding would fill the memory.
constexpr double kPaddedFloats = 1 << 26;
constexpr double kMostPadding = 16;

// Winograd: tiles that a task transforms at a time, and its panels of channels at most:
// the second-level cache holds what they become.
constexpr int64_t kWinogradTiles = 32;
constexpr int64_t kWinogradPanels = 4;
static_assert(kWinogradPanels >= 1);

// Tasks that there must be for it: with fewer, many threads would have none. What a
// tile and what the end of a sample costs for each channel, in multiplications of a
// vector: the 36 and the share of a transformation, and the way from 36 sums to 9
// moments.
constexpr int64_t kWinogradLeastTasks = 16;
constexpr int64_t kWinogradTileCost = 42;
constexpr int64_t kWinogradSampleCost = 160;

// How much larger than the taps the 36 sums may be from which the taps are computed, in
// squares. The error is about 2e-7 of the taps times the root of this: here 4e-6. Dense
// and sparse random data have 10 to 30, layers of ResNet18 and VGG19 less than 10.
constexpr float kWinogradMostLoss = 400;
static_assert(kWinogradMostLoss <= 2500, "the error must stay below 1e-5");

// The share of the taps that may be taken for zero, in squares: here 4e-6.
constexpr float kWinogradMostZeros = 1.6e-11f;
static_assert(kWinogradMostZeros <= 1e-10f, "the error must stay below 1e-5");

// Rounding of a tap is less than this, times the tiles, the largest input and the
// largest gradient, whatever cancels: the largest seen is 2^-17. Weights whose moments
// are below it are looked at, which takes time.
constexpr float kWinogradMostRounding = 0x1p-14f;

// The narrow way: channels and outputs of a convolution group up to which it is taken,
// and positions from which: at the end of a sample its lanes must be added up;
// channels that a task owns; floats of the planes of groups that are packed together,
// for the first-level cache; floats of packed planes at all, for the second-level
// cache, and those of one row of the output above which it isn't taken.
constexpr int64_t kNarrowMostOutputs = 8;
constexpr int64_t kNarrowLeastPositions = 48;
constexpr int64_t kNarrowChannels = 16;
constexpr int64_t kNarrowGroupFloats = 6 << 10;
constexpr int64_t kNarrowFloats = 1 << 15;
constexpr int64_t kNarrowMostFloats = 1 << 18;

// The linear way: channels from which, and positions of a group up to which it is
// taken; outputs of a task, whole calls of every kernel; positions of a block, whose
// packed panel and gradient stay in the second-level cache, and floats of its packed
// input; floats from one position of the gradient to the next up to which it is read
// where it lies: those of a strip then have enough places in the first-level cache.
constexpr int64_t kLinearLeastChannels = 16;
constexpr int64_t kLinearGroupPositions = 2048;
constexpr int64_t kLinearOutputs = 48;
constexpr int64_t kLinearLeastPositions = 64;
constexpr int64_t kLinearMostPositions = 512;
constexpr int64_t kLinearInputFloats = 1 << 20;
constexpr int64_t kLinearMostDistance = 128;
static_assert(kLinearOutputs % 12 == 0 && kLinearOutputs <= kTileLanes);

// Positions of a group from which more of its sums take the registers, and its moments
// are in a tile; of a strip, for the first-level cache; and the same of a block, whose
// moments are added to the accumulators. Blocks are small where these are: then all
// that a block needs stays in the second-level cache.
constexpr int64_t kLinearLongGroup = 16;
constexpr int64_t kLinearStripPositions = 96;
constexpr int64_t kLinearLongPositions = 2048;
constexpr int64_t kLinearLongInputFloats = 4 << 20;
constexpr int64_t kLinearSmallWeight = 1 << 16;
constexpr int64_t kLinearSmallInputFloats = 1 << 16;
static_assert(kLinearGroupPositions <= kLinearLongPositions);
static_assert(kLinearLongGroup <= kLinearMostPositions);

// Positions added up in one register before they join the others: bounds the rounding
// error of long sums (groups of many samples, large images).
constexpr int64_t kRunPositions = 2048;
static_assert(kRunPositions >= 1, "a run goes on");

// Multiply-adds below which one thread does all the work of a call: to start the others
// and to wait for them would take longer.
constexpr int64_t kSerialWork = 1 << 20;

}  // namespace fisherprune::cpu::grad_moments::tuning
