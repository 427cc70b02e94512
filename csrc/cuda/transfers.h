// Small tables on their way to a device and back, without memory that has to be pinned first.
#pragma once

#include <cstddef>

#include "launchers.h"

namespace gmp::cuda {

// Words of eight bytes that `store` takes; a copy of more from pinned memory takes less time.
int64_t most_stored();

// Both throw as launches do. `from` has been read when store returns: it travels in the launches themselves, so no copy
// is under way that its owner would have to wait for.
void store(const Launch& launch, const uint64_t* from, int64_t count, uint64_t* to);
// Waits until everything before it on the stream is done.
void fetch(const Launch& launch, const void* from, size_t bytes, void* to);

void load_transfers(const Launch& launch);  // as load_kernels does

}  // namespace gmp::cuda
