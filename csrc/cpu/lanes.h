// A register of keys in plain C++: of every key that an instruction set has no lanes of its own for. Compilers turn the
// small inner loops into whatever vectors there are.
template <typename Key>
struct Lanes {
  static constexpr int kCount = 8;
  static constexpr uint64_t kAll = 0xff;
  struct Reg {
    Key lane[kCount];
  };

  static Reg broadcast(Key key) {
    Reg r;
    for (Key& lane : r.lane) lane = key;
    return r;
  }
  static Reg load(const Key* p) {
    Reg r;
    __builtin_memcpy(&r, p, sizeof(Reg));
    return r;
  }
  static void store(Key* p, Reg r) { __builtin_memcpy(p, &r, sizeof(Reg)); }
  static Reg magnitude(Reg r) {
    for (Key& lane : r.lane) lane = static_cast<Key>(lane & static_cast<Key>(~kSignBit<Key>));
    return r;
  }
  static Reg min(Reg a, Reg b) {
    for (int j = 0; j < kCount; ++j) a.lane[j] = a.lane[j] < b.lane[j] ? a.lane[j] : b.lane[j];
    return a;
  }
  static Reg max(Reg a, Reg b) {
    for (int j = 0; j < kCount; ++j) a.lane[j] = a.lane[j] > b.lane[j] ? a.lane[j] : b.lane[j];
    return a;
  }
  static Reg zero_unless(uint64_t bits, Reg r) {
    for (int j = 0; j < kCount; ++j) r.lane[j] = bits >> j & 1 ? r.lane[j] : Key{0};
    return r;
  }
  static uint64_t less(Reg a, Reg b) {
    uint64_t bits = 0;
    for (int j = 0; j < kCount; ++j) bits |= static_cast<uint64_t>(a.lane[j] < b.lane[j]) << j;
    return bits;
  }
  static bool any_set(Reg r, uint64_t where) {
    Key any = 0;
    for (int j = 0; j < kCount; ++j) any = static_cast<Key>(any | (where >> j & 1 ? r.lane[j] : Key{0}));
    return any != 0;
  }
  static void compress(Key* out, Reg r, uint64_t bits) {
    for (int j = 0; j < kCount; ++j) {
      __builtin_memcpy(out, &r.lane[j], sizeof(Key));
      out += bits >> j & 1;
    }
  }
  static Reg expand(const Key* src, uint64_t bits) {
    Reg r;
    for (int j = 0; j < kCount; ++j) r.lane[j] = bits >> j & 1 ? *src++ : Key{0};
    return r;
  }
};
