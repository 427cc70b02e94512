// operator new that fails once when asked to, among the allocations that one library makes itself: torch, Python and
// whatever else is in the process are left alone. Preloaded by test_failing_allocations.py.
#include <link.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

struct Library {
  const char* path;
  uintptr_t begin, end;
};

std::atomic<uintptr_t> begin{0}, end{0};  // of the library's memory; empty: nothing fails
std::atomic<long> left{0};                // allocations until the one that fails

int find(dl_phdr_info* info, size_t, void* wanted) {
  Library& library = *static_cast<Library*>(wanted);
  if (std::strcmp(info->dlpi_name, library.path) != 0) return 0;
  library.begin = info->dlpi_addr;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type == PT_LOAD)
      library.end = std::max(library.end, library.begin + segment.p_vaddr + segment.p_memsz);
  }
  return 1;
}

void* allocate(std::size_t size, const void* caller) {
  const auto address = reinterpret_cast<uintptr_t>(caller);
  const bool fails = address >= begin.load() && address < end.load() && left.fetch_sub(1) == 0;
  void* const memory = fails ? nullptr : std::malloc(size == 0 ? 1 : size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(std::size_t size) { return allocate(size, __builtin_return_address(0)); }
void* operator new[](std::size_t size) { return allocate(size, __builtin_return_address(0)); }

// Allocation number `number`, from 0 on, of the library loaded from `path` fails. Returns whether it is loaded.
extern "C" bool fail_allocation(const char* path, long number) {
  Library library{path, 0, 0};
  dl_iterate_phdr(find, &library);
  left.store(number);
  begin.store(library.begin);
  end.store(library.end);
  return library.end != 0;
}

// Returns whether that one came.
extern "C" bool stop_failing() {
  end.store(0);
  return left.load() < 0;
}
