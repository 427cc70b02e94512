// A register of keys in plain C++: compilers turn the small inner loops into whatever vectors there are.
template <typename Key>
struct Lanes {
  Key lane[8];
};

template <typename Key>
Lanes<Key> broadcast(Key key) {
  Lanes<Key> r;
  for (Key& lane : r.lane) lane = key;
  return r;
}
template <typename Key>
Lanes<Key> load_lanes(const Key* p) {
  Lanes<Key> r;
  __builtin_memcpy(&r, p, sizeof(r));
  return r;
}
template <typename Key>
void store_lanes(Key* p, Lanes<Key> r) {
  __builtin_memcpy(p, &r, sizeof(r));
}
template <typename Key>
Lanes<Key> magnitude(Lanes<Key> r) {
  for (Key& lane : r.lane) lane = static_cast<Key>(lane & static_cast<Key>(~kSignBit<Key>));
  return r;
}
template <typename Key>
Lanes<Key> min(Lanes<Key> a, Lanes<Key> b) {
  for (int j = 0; j < 8; ++j) a.lane[j] = a.lane[j] < b.lane[j] ? a.lane[j] : b.lane[j];
  return a;
}
template <typename Key>
Lanes<Key> max(Lanes<Key> a, Lanes<Key> b) {
  for (int j = 0; j < 8; ++j) a.lane[j] = a.lane[j] > b.lane[j] ? a.lane[j] : b.lane[j];
  return a;
}
template <typename Key>
Lanes<Key> zero_unless(uint64_t bits, Lanes<Key> r) {
  for (int j = 0; j < 8; ++j) r.lane[j] = bits >> j & 1 ? r.lane[j] : Key{0};
  return r;
}
template <typename Key>
uint64_t less(Lanes<Key> a, Lanes<Key> b) {
  uint64_t bits = 0;
  for (int j = 0; j < 8; ++j) bits |= static_cast<uint64_t>(a.lane[j] < b.lane[j]) << j;
  return bits;
}
template <typename Key>
bool any_set(Lanes<Key> r, uint64_t where) {
  Key any = 0;
  for (int j = 0; j < 8; ++j) any = static_cast<Key>(any | (where >> j & 1 ? r.lane[j] : Key{0}));
  return any != 0;
}
template <typename Key>
void compress(Key* out, Lanes<Key> r, uint64_t bits) {
  for (int j = 0; j < 8; ++j) {
    __builtin_memcpy(out, &r.lane[j], sizeof(Key));
    out += bits >> j & 1;
  }
}
template <typename Key>
Lanes<Key> expand(const Key* src, uint64_t bits) {
  Lanes<Key> r;
  for (int j = 0; j < 8; ++j) r.lane[j] = bits >> j & 1 ? *src++ : Key{0};
  return r;
}
