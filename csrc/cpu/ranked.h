// What is ranked of a layer with a ranking of its own, piece by piece: never all of it is in memory.
#pragma once

#include <numeric>

#include "kernels.h"

namespace gmp::cpu {

// A part of what is ranked, as a plain layer: bits of its mask are 0 for what is pruned or protected.
struct Piece {
  LayerView layer;
  int64_t first;   // of what is ranked
  bool nonfinite;  // whether an unpruned weight is known to be NaN or Inf; that of a block shows in its sum
};

// The weights of one of what is ranked.
inline int64_t weights_per_unit(const LayerView& layer) {
  const Pattern& pattern = layer.ranking.pattern;
  return pattern.kind == kBlocks ? pattern.rows() * pattern.cols() : 1;
}

// A piece of so many begins and ends with a group or band, and with a byte of the mask.
inline int64_t alignment(const LayerView& layer) {
  const Pattern& pattern = layer.ranking.pattern;
  if (pattern.kind == kGroups) return std::lcm(pattern.of() * pattern.stride(), int64_t{8});
  if (pattern.kind == kBlocks) {
    return pattern.across() * (8 / std::gcd(pattern.rows() * pattern.width(), int64_t{8}));
  }
  return 8;
}

// Whether the loops over weights look at the groups of a layer themselves: those that hardware takes, in a row in
// memory.
inline bool are_groups_in_loop(const LayerView& layer) {
  return layer.ranking.pattern.of() == 4 && layer.ranking.pattern.is_within_eight(layer.filter);
}

// How much of what is ranked a thread takes at a time: the weights of a chunk, or more if a band or group has more.
inline int64_t chunk_of(const LayerView& layer) {
  const int64_t align = alignment(layer);
  return std::max(align, kChunk / weights_per_unit(layer) / align * align);
}

// Bytes of memory that a piece of so many takes at most.
inline int64_t piece_bytes(const LayerView& layer, int64_t n) {
  if (layer.is_plain()) return 0;
  const bool has_sums = layer.ranking.pattern.kind == kBlocks;
  return (has_sums ? n * bytes_of(layer.dtype) : 2 * alignment(layer) / 8) + n / 8 + 2 * kGatherSlackBytes;
}

// What ranks a layer, by the weight and with its mask, as a plain layer.
inline LayerView source_of(const LayerView& layer) {
  if (layer.is_plain()) return layer;
  const Ranking& ranking = layer.ranking;
  return {ranking.source_dtype, layer.weights, ranking.num_weights, layer.mask, ranking.filter};
}

// Returns the piece of [begin, end), or one that begins before and ends after it, made in `memory`. Unless bits are
// asked for, a piece may have groups_in_loop, whose mask is that of the weights.
inline Piece ranked(const LayerView& layer, int64_t begin, int64_t end, char* memory, bool as_bits = false) {
  const Pattern& pattern = layer.ranking.pattern;
  if (pattern.kind == kBlocks) {
    const int64_t n = end - begin;
    uint8_t* const bits = reinterpret_cast<uint8_t*>(memory + n * bytes_of(layer.dtype));
    kernels_of(layer.ranking.source_dtype).score(layer, begin, end, memory, bits);
    return {{layer.dtype, memory, n, layer.mask == nullptr ? nullptr : bits}, begin, false};
  }
  const int64_t align = alignment(layer), first = begin / align * align;
  const int64_t last = std::min(layer.n, (end + align - 1) / align * align);
  LayerView piece{layer.dtype, static_cast<char*>(layer.weights) + first * bytes_of(layer.dtype), last - first,
                  layer.mask == nullptr ? nullptr : layer.mask + first / 8, layer.filter};
  if (pattern.kind == kNoPattern) return {piece, first, false};
  if (!as_bits && are_groups_in_loop(layer)) {
    piece.ranking.pattern = pattern;
    return {piece, first, false};
  }
  uint8_t* const eligible = reinterpret_cast<uint8_t*>(memory);
  piece.ranking.pattern = pattern;
  const bool nonfinite = kernels_of(layer.dtype).protect(piece, eligible);
  piece.ranking = {};
  piece.mask = eligible;
  return {piece, first, nonfinite};
}

}  // namespace gmp::cpu
