// The path that whole tiles take through an optimizer step, as kernels of their own, so that cuda_static.py can count
// its instructions; never launched.
#include "../csrc/cuda/update.cuh"

namespace gmp::cuda::kernels {

template <Rule kRule, typename Format>
__global__ void __launch_bounds__(kThreads, kUpdaters<Format>)
    whole_tiles(const UpdateRow* rows, const UpdateConstants<typename Format::Compute>* constants) {
  __shared__ UpdateConstants<typename Format::Compute> c;
  if (threadIdx.x == 0) c = *constants;
  __syncthreads();
  for (int64_t begin = 0; begin < rows->n; begin += kChunk)
    update_tiles<kRule, Format>(*rows, c, begin, kChunk / kTile);
}

template __global__ void whole_tiles<Rule::sgd, FormatOf<DType::float32>>(const UpdateRow*,
                                                                          const UpdateConstants<float>*);
template __global__ void whole_tiles<Rule::adam, FormatOf<DType::float32>>(const UpdateRow*,
                                                                           const UpdateConstants<float>*);
template __global__ void whole_tiles<Rule::adam, FormatOf<DType::bfloat16>>(const UpdateRow*,
                                                                            const UpdateConstants<float>*);

}  // namespace gmp::cuda::kernels
