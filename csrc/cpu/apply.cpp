#include "apply.h"

#include <omp.h>

#include <memory>

#include "chunks.h"
#include "filter.h"
#include "kernels.h"
#include "ranked.h"

namespace gmp::cpu {
namespace {

// Bits as a row of units, each written `times` times over.
class BitWriter {
 public:
  explicit BitWriter(uint8_t* bits) : bits_(bits) {}

  void add(bool value, int64_t times) {
    word_ |= (value ? (uint64_t{1} << times) - 1 : 0) << used_;
    used_ += times;
    for (; used_ >= 8; used_ -= 8, word_ >>= 8) *bits_++ = static_cast<uint8_t>(word_);
  }
  void finish() {
    if (used_ > 0) *bits_ = static_cast<uint8_t>(word_);
  }

 private:
  uint8_t* bits_;
  uint64_t word_ = 0;
  int64_t used_ = 0;  // bits of the word, fewer than 8 between calls
};

// Writes the bits of the weights of whole bands, given those of their blocks.
void spread(const LayerView& layer, const uint8_t* of_blocks, int64_t num_blocks, uint8_t* kept) {
  const Pattern& pattern = layer.ranking.pattern;
  const Filter& filter = layer.ranking.filter;
  const int64_t across = pattern.across(), cols = pattern.cols(), rows = pattern.rows();
  const auto is_kept = [&](int64_t block) { return (of_blocks[block / 8] >> (block % 8) & 1) != 0; };
  const auto add_row = [&](BitWriter& writer, int64_t band) {
    if (filter.size() == 1) {
      for (int64_t b = 0; b < across; ++b) writer.add(is_kept(band + b), cols);
      return;
    }
    for (int64_t p = 0; p < filter.positions; ++p) {
      for (int64_t c = 0; c < filter.channels; ++c) writer.add(is_kept(band + (c * filter.positions + p) / cols), 1);
    }
  };
  const int64_t row_bytes = pattern.width() / 8;
  BitWriter writer(kept);
  for (int64_t band = 0; band < num_blocks; band += across) {
    if (pattern.width() % 8 != 0) {
      for (int64_t row = 0; row < rows; ++row) add_row(writer, band);
      continue;
    }
    uint8_t* const first = kept + band / across * rows * row_bytes;
    BitWriter own(first);
    add_row(own, band);
    for (int64_t row = 1; row < rows; ++row)
      std::memcpy(first + row * row_bytes, first, static_cast<size_t>(row_bytes));
  }
  writer.finish();
}

// Prunes [begin, end) of what is ranked of a layer: writes the new bits of its weights, zeroes those pruned, and
// returns how many are kept. `memory` is for a piece and, after it, two bits for each of what is ranked.
int64_t settle(const LayerView& layer, const Chunk& chunk, uint8_t* out, uint64_t key, int64_t tie_index, char* memory,
               int64_t& kept_before) {
  const Ranking& ranking = layer.ranking;
  const int64_t unit = weights_per_unit(layer), n = chunk.end - chunk.begin;
  const int64_t first = chunk.begin * unit, num_weights = n * unit, num_bytes = (num_weights + 7) / 8;
  const uint8_t* const before = layer.mask == nullptr ? nullptr : layer.mask + first / 8;
  const Piece piece = ranked(layer, chunk.begin, chunk.end, memory, true);
  uint8_t* const stays = reinterpret_cast<uint8_t*>(memory + piece_bytes(layer, n));
  uint8_t* const kept = out + first / 8;
  const int64_t local_tie = std::clamp<int64_t>(tie_index - chunk.begin, 0, n);
  int64_t ignored = 0;
  kernels_of(layer.dtype).cut(piece.layer, 0, n, stays, key, local_tie, ignored);
  kept_before += before == nullptr ? num_weights : active_kernels().front().count_bits(before, num_weights);
  if (unit > 1) {
    spread(layer, stays, n, kept);
  } else if (ranking.pattern.kind == kGroups) {
    const uint8_t* const eligible = piece.layer.mask;
    for (int64_t i = 0; i < num_bytes; ++i) {
      const int all = i + 1 < num_bytes || num_weights % 8 == 0 ? 0xff : (1 << num_weights % 8) - 1;
      kept[i] = static_cast<uint8_t>(((before == nullptr ? all : before[i]) & ~eligible[i]) | stays[i]);
    }
  } else {
    std::memcpy(kept, stays, static_cast<size_t>(num_bytes));
  }
  const DType dtype = ranking.weights_dtype;
  const LayerView weights{dtype, static_cast<char*>(ranking.weights) + first * bytes_of(dtype), num_weights, kept};
  return kernels_of(dtype).apply(weights, 0, num_weights, nullptr, 0, num_weights, ignored);
}

// Zeroes the weights with this key from a row-major index on, up to the end of its filter, and clears their bits.
// Returns how many bits were 1. `memory` is for a piece of the filter.
int64_t prune_to_end_of_filter(const LayerView& layer, uint8_t* kept, uint64_t key, int64_t tie_index, char* memory) {
  const int64_t begin = layer.filter.end_of(tie_index) - layer.filter.size();
  LayerView left = layer;
  left.mask = kept;  // protects the same weights as before, because those pruned since come before them
  const auto [piece, first, nonfinite] = ranked(left, begin, begin + layer.filter.size(), memory, true);
  const DType dtype = layer.is_plain() ? layer.dtype : layer.ranking.weights_dtype;
  char* const weights = static_cast<char*>(layer.is_plain() ? layer.weights : layer.ranking.weights);
  const auto item_size = static_cast<size_t>(bytes_of(dtype));
  return with_matches(piece, piece.mask, {key, key},
                      [&, from = first](auto is_match, int64_t channels, int64_t positions) {
                        int64_t pruned = 0;
                        for (int64_t p = 0, place = begin; p < positions; ++p) {
                          for (int64_t c = 0; c < channels; ++c, ++place) {
                            if (begin + c * positions + p < tie_index || !is_match(place - from)) continue;
                            std::memset(weights + static_cast<size_t>(place) * item_size, 0, item_size);
                            kept[place / 8] = static_cast<uint8_t>(kept[place / 8] & ~(1u << (place % 8)));
                            ++pruned;
                          }
                        }
                        return pruned;
                      });
}

}  // namespace

std::pair<std::vector<int64_t>, std::vector<int64_t>> apply(const std::vector<LayerView>& layers,
                                                            const std::vector<uint64_t>& keys,
                                                            const std::vector<int64_t>& tie_indices,
                                                            const std::vector<uint8_t*>& kept, int num_threads) {
  std::vector<Chunk> chunks;
  chunks.reserve(layers.size());
  int64_t for_pieces = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    const LayerView& layer = layers[l];
    const int64_t size = chunk_of(layer), most = std::max(size, layer.filter.size());
    add_chunks(chunks, l, layer.n, size);
    if (!layer.is_plain()) for_pieces = std::max(for_pieces, piece_bytes(layer, most) + size / 8 + kGatherSlackBytes);
  }
  const int64_t num_chunks = static_cast<int64_t>(chunks.size());
  std::vector<int64_t> before(layers.size()), now(layers.size());
  std::vector<size_t> divided;  // layers with a filter of which only some ties stay
  for (size_t l = 0; l < tie_indices.size(); ++l) {
    if (layers[l].filter.end_of(tie_indices[l]) != tie_indices[l]) divided.push_back(l);
  }
  const int64_t num_divided = static_cast<int64_t>(divided.size());
  const std::unique_ptr<char[]> pieces(new char[static_cast<size_t>(num_threads * for_pieces)]);
  active_kernels();  // may throw at its first call
#pragma omp parallel for schedule(monotonic : dynamic, 4) num_threads(threads_for(num_chunks, 4, num_threads))
  for (int64_t i = 0; i < num_chunks; ++i) {
    const Chunk& c = chunks[static_cast<size_t>(i)];
    const LayerView& layer = layers[c.tensor];
    const Kernels& kernels = kernels_of(layer.dtype);
    int64_t kept_before = 0;
    if (keys.empty()) {
      kernels.apply(layer, c.begin, c.end, nullptr, 0, layer.n, kept_before);
      continue;
    }
    const size_t l = c.tensor;
    char* const memory = pieces.get() + omp_get_thread_num() * for_pieces;
    // A filter in which memory has an order of its own keeps all ties at first.
    const int64_t tie_index = layer.filter.end_of(tie_indices[l]);
    const bool is_direct = layer.is_plain() || (are_groups_in_loop(layer) && layer.ranking.weights == layer.weights);
    const int64_t kept_now = is_direct ? kernels.apply(layer, c.begin, c.end, kept[l], keys[l], tie_index, kept_before)
                                       : settle(layer, c, kept[l], keys[l], tie_index, memory, kept_before);
#pragma omp atomic
    before[l] += kept_before;
#pragma omp atomic
    now[l] += kept_now;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads) if (num_divided > 1)
  for (int64_t i = 0; i < num_divided; ++i) {
    const size_t l = divided[static_cast<size_t>(i)];
    char* const memory = pieces.get() + omp_get_thread_num() * for_pieces;
    now[l] -= prune_to_end_of_filter(layers[l], kept[l], keys[l], tie_indices[l], memory);
  }
  return {std::move(before), std::move(now)};
}

}  // namespace gmp::cpu
