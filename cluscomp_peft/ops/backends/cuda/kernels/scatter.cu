// Gradients of codebook and scales from a strip of G = dL/dW, [rows, out] fp32: row r is input channel first_row + r.
//
// Macros beside those of table.cuh (TABLE = FP32, COPIES = 1, CPL = 1, ALIGNED = 0): THREADS, SCALED whether scales
// want a gradient or change the terms.
//
// A block of threads has THREADS groups of outputs and some rows of one codebook. A thread keeps its group and walks
// down the rows: it reads its code and G numbers of a row, and adds them to sums[number][code] in shared memory. Numbers
// of a group lie in arrays of their own, so that neighbouring codes use different banks.
//
// Sums are 32-bit integers: shared memory adds those natively, and in any order to the same result. A term becomes
// round(term · q). No sum of a block can exceed √(vectors) · ‖its terms‖ (Cauchy-Schwarz), which a first walk finds:
// q = 2^30 / bound. A block of 30,000 vectors rounds its terms to 2^-14 of their root mean square, and without bias.
// A block that holds an infinite or undefined number writes NaN, which loss scaling looks for.
__device__ __forceinline__ u32 read_code(const u8* row, int group, int width, int clusters) {
    const int bit = group * B, first = bit >> 3;
    u32 word = row[first];
    if (first + 1 < width) word |= (u32)row[first + 1] << 8;
    if (B > 8 || B % 8) {
        if (first + 2 < width && (bit & 7) + B > 16) word |= (u32)row[first + 2] << 16;
    }
    const u32 code = word >> (bit & 7) & MASK;
    return CLAMP ? min(code, (u32)clusters - 1) : code;
}

// Of all threads, in a fixed order; every thread gets it.
__device__ float sum_of(float value, float* scratch) {
    #pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    float total = 0.f;
    for (int k = 0; k < THREADS / 32; k++) total += scratch[k];
    return total;
}

// partial [pieces, column tiles, G, clusters] fp32, written or, if `add`, added to; sums_in [in, warps of the grid's x];
// sums_out [pieces, out], likewise.
// Grid: column tiles, pieces. Piece p has rows [p · share, …) of its strip, inside one codebook.
extern "C" __global__ void __launch_bounds__(THREADS)
scatter(const float* gradient, const u8* packed, const void* codebook, const void* scale_in, const void* scale_out, float* partial,
        float* sums_in, float* sums_out, int first_row, int rows, int share, int pieces, int first_block, int in_features,
        int out_features, int groups, int width, int clusters, int codebook_dtype, int scale_in_dtype, int scale_out_dtype, int blocks, int add) {
    extern __shared__ __align__(16) u32 shared[];
    float* scratch = (float*)shared;      // [32]
    int* sums = (int*)shared + 32;        // [G, clusters]
    u32* table = shared + (32 + G * clusters + 3) / 4 * 4;  // only if SCALED
    // Rows of a codebook: its input channels, as far as the strip has them. The last pieces may be empty.
    const int block = first_block + blockIdx.y / pieces;
    const int from = max((int)(((long long)block * in_features + blocks - 1) / blocks), first_row) - first_row;
    const int to = min((int)(((long long)(block + 1) * in_features + blocks - 1) / blocks) - first_row, rows);
    const int start = from + blockIdx.y % pieces * share, stop = min(start + share, to);
    const int group = blockIdx.x * THREADS + threadIdx.x, output = group * G;
    const bool inside = group < groups;

    for (int at = threadIdx.x; at < G * clusters; at += THREADS) sums[at] = 0;
    if (SCALED) fill_table(table, codebook, (size_t)block * clusters * G, clusters, codebook_dtype, threadIdx.x, THREADS);
    float row_scale[G], of_outputs[G];
    #pragma unroll
    for (int j = 0; j < G; j++) {
        of_outputs[j] = 0.f;
        row_scale[j] = SCALED && scale_out && inside && output + j < out_features ? number(scale_out, output + j, scale_out_dtype) : 1.f;
    }
    auto read = [&](int r, float* values) {
        const float* there = gradient + (size_t)r * out_features + output;
        if (G % 4 == 0 && inside && output + G <= out_features && ((size_t)there & 15) == 0) {
            #pragma unroll
            for (int j = 0; j < G / 4; j++) *(float4*)(values + 4 * j) = __ldg((const float4*)there + j);
        } else {
            #pragma unroll
            for (int j = 0; j < G; j++) values[j] = inside && output + j < out_features ? there[j] : 0.f;
        }
    };

    // -- the first walk: the norm of the terms
    float squares = 0.f;
    #pragma unroll 4
    for (int r = start; r < stop; r++) {
        float values[G];
        read(r, values);
        const float column = SCALED && scale_in ? number(scale_in, first_row + r, scale_in_dtype) : 1.f;
        #pragma unroll
        for (int j = 0; j < G; j++) {
            const float term = SCALED ? values[j] * row_scale[j] * column : values[j];
            squares += term * term;
        }
    }
    const float norm = sqrtf(sum_of(squares, scratch));
    const float vectors = (float)THREADS * max(stop - start, 1);
    const float bound = norm * sqrtf(vectors) + vectors * 1e-22f;  // squares below 1e-44 are lost in the norm
    const bool finite = bound < 3e38f;                               // false for NaN as well
    const float q = finite ? 1073741824.f / bound : 0.f;             // half of what fits, for what rounding adds

    // -- the second: terms to their codes' sums
    #pragma unroll 2
    for (int r = start; r < stop; r++) {
        float values[G];
        read(r, values);
        const u32 code = inside ? read_code(packed + (size_t)(first_row + r) * width, group, width, clusters) : 0;
        const float column = SCALED && scale_in ? number(scale_in, first_row + r, scale_in_dtype) : 1.f;
        float of_input = 0.f;
        u32 entry[WORDS];
        if (SCALED) gather(entry, table, code, 0, clusters);
        #pragma unroll
        for (int j = 0; j < G; j++) {
            if (SCALED) {
                const float product = values[j] * __uint_as_float(entry[j]);
                of_outputs[j] += product * column;
                of_input += product * row_scale[j];
            }
            const float term = SCALED ? values[j] * column * row_scale[j] : values[j];
            if (inside) atomicAdd(sums + j * clusters + code, __float2int_rn(term * q));
        }
        if (SCALED && scale_in) {
            #pragma unroll
            for (int step = 16; step > 0; step /= 2) of_input += __shfl_xor_sync(0xffffffff, of_input, step);
            if (threadIdx.x % 32 == 0)
                sums_in[(size_t)(first_row + r) * (gridDim.x * (THREADS / 32)) + blockIdx.x * (THREADS / 32) + threadIdx.x / 32] = of_input;
        }
    }
    __syncthreads();
    const float back = finite ? bound / 1073741824.f : __int_as_float(0x7fc00000);
    float* target = partial + ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * clusters * G;
    for (int at = threadIdx.x; at < clusters * G; at += THREADS)
        target[at] = (add ? target[at] : 0.f) + (float)sums[at / clusters * clusters + at % clusters] * back;
    if (SCALED && scale_out) {
        #pragma unroll
        for (int j = 0; j < G; j++)
            if (inside && output + j < out_features) {
                float* there = sums_out + (size_t)blockIdx.y * out_features + output + j;
                *there = (add ? *there : 0.f) + of_outputs[j];
            }
    }
}
