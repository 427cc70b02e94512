// A register of keys in plain C++: compilers turn the small inner loops into vectors of the machine. Instruction sets
// also use it for keys for which they have no lanes of their own.
template <typename Key>
struct PlainLanes {
  Key lane[8];
};

template <typename Key>
PlainLanes<Key> broadcast(Key key) {
  PlainLanes<Key> r;
  for (Key& lane : r.lane) lane = key;
  return r;
}
template <typename Key>
PlainLanes<Key> operator+(PlainLanes<Key> a, PlainLanes<Key> b) {
  for (int j = 0; j < 8; ++j) a.lane[j] = static_cast<Key>(a.lane[j] + b.lane[j]);
  return a;
}
template <typename Key>
PlainLanes<Key> load_lanes(const Key* p) {
  PlainLanes<Key> r;
  __builtin_memcpy(&r, p, sizeof(r));
  return r;
}
template <typename Key>
void store_lanes(Key* p, PlainLanes<Key> r) {
  __builtin_memcpy(p, &r, sizeof(r));
}
template <typename Key>
PlainLanes<Key> magnitude(PlainLanes<Key> r) {
  for (Key& lane : r.lane) lane = static_cast<Key>(lane & static_cast<Key>(~kSignBit<Key>));
  return r;
}
template <typename Key>
PlainLanes<Key> min(PlainLanes<Key> a, PlainLanes<Key> b) {
  for (int j = 0; j < 8; ++j) a.lane[j] = a.lane[j] < b.lane[j] ? a.lane[j] : b.lane[j];
  return a;
}
template <typename Key>
PlainLanes<Key> max(PlainLanes<Key> a, PlainLanes<Key> b) {
  for (int j = 0; j < 8; ++j) a.lane[j] = a.lane[j] > b.lane[j] ? a.lane[j] : b.lane[j];
  return a;
}
template <typename Key>
PlainLanes<Key> zero_unless(uint64_t bits, PlainLanes<Key> r) {
  for (int j = 0; j < 8; ++j) r.lane[j] = bits >> j & 1 ? r.lane[j] : Key{0};
  return r;
}
template <typename Key>
uint64_t less(PlainLanes<Key> a, PlainLanes<Key> b) {
  uint64_t bits = 0;
  for (int j = 0; j < 8; ++j) bits |= static_cast<uint64_t>(a.lane[j] < b.lane[j]) << j;
  return bits;
}
template <typename Key>
bool any_set(PlainLanes<Key> r, uint64_t where) {
  Key any = 0;
  for (int j = 0; j < 8; ++j) any = static_cast<Key>(any | (where >> j & 1 ? r.lane[j] : Key{0}));
  return any != 0;
}
template <typename Key>
void compress(Key* out, PlainLanes<Key> r, uint64_t bits) {
  for (int j = 0; j < 8; ++j) {
    __builtin_memcpy(out, &r.lane[j], sizeof(Key));
    out += bits >> j & 1;
  }
}
template <typename Key>
PlainLanes<Key> expand(const Key* src, uint64_t bits) {
  PlainLanes<Key> r;
  for (int j = 0; j < 8; ++j) r.lane[j] = bits >> j & 1 ? *src++ : Key{0};
  return r;
}

// Whether compressing a register of this type takes longer than noting that it is to be compressed.
template <typename Register>
inline constexpr bool kIsCompressSlow = false;
template <typename Key>
inline constexpr bool kIsCompressSlow<PlainLanes<Key>> = true;
