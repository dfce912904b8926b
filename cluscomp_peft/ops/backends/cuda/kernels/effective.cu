// What a layer with an adapter computes with, and the way back, each in one launch: see direct.py.
//
// Macro: DTYPE of the codebook and the scales. The numbers of the adapter are fp32.
typedef unsigned int u32;
typedef unsigned short u16;

#define FP32 0
#define FP16 1
#define BF16 2

__device__ __forceinline__ float read(const void* array, size_t at) {
    if (DTYPE == FP32) return ((const float*)array)[at];
    const u16 value = ((const u16*)array)[at];
    if (DTYPE == BF16) return __uint_as_float((u32)value << 16);
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
    return result;
}
__device__ __forceinline__ void write(void* array, size_t at, float value) {
    if (DTYPE == FP32) {
        ((float*)array)[at] = value;
    } else {
        u16 result;
        if (DTYPE == BF16) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
        else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
        ((u16*)array)[at] = result;
    }
}

// A thread for a number: first `size` of the codebooks [m, n · g] (of the base's [k, n · g], block b of the sum takes
// b · k / m), then the scales of inputs and outputs, which are absent where their numbers are.
extern "C" __global__ void __launch_bounds__(256)
effective(const void* codebook, const void* scale_in, const void* scale_out, const float* numbers, const float* numbers_in,
          const float* numbers_out, const float* units, void* result, void* result_in, void* result_out, int size, int block,
          int finer, int inputs, int outputs) {
    int at = blockIdx.x * 256 + threadIdx.x;
    if (at < size) {
        const size_t of_base = (size_t)(at / block / finer) * block + at % block;
        write(result, at, __fadd_rn(read(codebook, of_base), __fmul_rn(numbers[at], units[0])));
        return;
    }
    at -= size;
    const bool first = at < inputs;
    if (!first) at -= inputs;
    if (!first && at >= outputs) return;
    const void* scale = first ? scale_in : scale_out;
    const float factor = __fadd_rn(1.f, __fmul_rn((first ? numbers_in : numbers_out)[at], units[1]));
    write(first ? result_in : result_out, at, scale ? __fmul_rn(read(scale, at), factor) : factor);
}

// Gradients of the numbers from those of the sum, in place.
extern "C" __global__ void __launch_bounds__(256)
effective_backward(float* grad, float* grad_in, float* grad_out, const void* scale_in, const void* scale_out, const float* units,
                   int size, int inputs, int outputs) {
    int at = blockIdx.x * 256 + threadIdx.x;
    if (at < size) {
        grad[at] = __fmul_rn(grad[at], units[0]);
        return;
    }
    at -= size;
    const bool first = at < inputs;
    if (!first) at -= inputs;
    if (!first && at >= outputs) return;
    const void* scale = first ? scale_in : scale_out;
    const float factor = scale ? __fmul_rn(read(scale, at), units[1]) : units[1];
    float* there = (first ? grad_in : grad_out) + at;
    *there = __fmul_rn(*there, factor);
}
