// Places of lanes for a shuffle, by the bits of the lanes that are chosen. `compress` moves those to the front;
// `expand` is its inverse, and gives the bytes of unchosen 16-bit lanes 0x80, which the byte shuffle turns into zeros.
template <typename Index, int kLanes, int kIndicesPerLane>
struct Shuffles {
  alignas(32) Index compress[1 << kLanes][kLanes * kIndicesPerLane];
  alignas(32) Index expand[1 << kLanes][kLanes * kIndicesPerLane];

  constexpr Shuffles() : compress(), expand() {
    for (int bits = 0; bits < 1 << kLanes; ++bits) {
      int rank = 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        const bool chosen = bits >> lane & 1;
        for (int part = 0; part < kIndicesPerLane; ++part) {
          const int own = lane * kIndicesPerLane + part, moved = rank * kIndicesPerLane + part;
          if (chosen) compress[bits][moved] = static_cast<Index>(own);
          expand[bits][own] = chosen ? static_cast<Index>(moved) : static_cast<Index>(0x80);
        }
        rank += chosen;
      }
    }
  }
};
