// The path that whole tiles take through an optimizer step, as kernels of their own, so that cuda_static.py can count
// its instructions; never launched.
#include "../csrc/cuda/update.cuh"

namespace gmp::cuda::kernels {

template <Rule kRule, DType kDType, DType kState>
__global__ void __launch_bounds__(kThreads, kUpdaters<kDType>)
    whole_tiles(const TensorRow* rows, const UpdateConstants<ComputeOf<kDType>>* constants) {
  __shared__ UpdateConstants<ComputeOf<kDType>> c;
  if (threadIdx.x == 0) c = *constants;
  __syncthreads();
  for (int64_t begin = 0; begin < rows->n; begin += kChunk)
    update_tiles<kRule, kDType, kState>(*rows, c, begin, kChunk / kTile);
}

template __global__ void whole_tiles<Rule::sgd, DType::float32, DType::float32>(const TensorRow*,
                                                                                const UpdateConstants<float>*);
template __global__ void whole_tiles<Rule::adam, DType::float32, DType::float32>(const TensorRow*,
                                                                                 const UpdateConstants<float>*);
template __global__ void whole_tiles<Rule::adam, DType::bfloat16, DType::float32>(const TensorRow*,
                                                                                  const UpdateConstants<float>*);

}  // namespace gmp::cuda::kernels
