// The weight W [out, in] that codes and codebook stand for, in a 16-bit dtype.
//
// Macros beside those of table.cuh: WEIGHT dtype of W, WK warps, STEPS of 16 channels that a warp makes one after the
// other, so that what it writes of a row is 32 · STEPS bytes; SCALED whether there are scales. With them TABLE has the
// numbers as they are stored, and a weight is rounded once, after (C · s_in) · s_out in fp32; without, TABLE is WEIGHT.
//
// A lane makes its CPL groups in four channels, as in linear.cu, and writes 8 bytes of each row: the channels of a
// codebook must be a multiple of four.
constexpr int TILE = 8 * CPL;
constexpr int UNIT = WK * STEPS * 16;
constexpr int THREADS = WK * 32;

extern "C" __global__ void __launch_bounds__(THREADS, 3)
table_decode(const u8* packed, const void* codebook, const void* scale_in, const void* scale_out, u16* weight, int in_features,
             int out_features, int groups, int width, int clusters, int blocks, int tiles, int units, int codebook_dtype,
             int scale_in_dtype, int scale_out_dtype) {
    extern __shared__ __align__(16) u32 table[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n = lane >> 2, q = lane & 3, copy = lane % COPIES;
    const int total = blocks * tiles * units;
    const int begin = blockIdx.x * total / gridDim.x, end = (blockIdx.x + 1) * total / gridDim.x;
    int current = -1;
    for (int at = begin; at < end; at++) {
        const int virtual_tile = at / units, block = virtual_tile / tiles, group = virtual_tile % tiles * TILE + n * CPL;
        const int from = (int)(((long long)block * in_features + blocks - 1) / blocks);
        const int limit = (int)(((long long)(block + 1) * in_features + blocks - 1) / blocks);
        if (block != current) {
            __syncthreads();
            current = block;
            fill_table(table, codebook, (size_t)block * clusters * G, clusters, codebook_dtype, threadIdx.x, THREADS);
            __syncthreads();
        }
        float row[CPL][G];
        if (SCALED) {
            #pragma unroll
            for (int k = 0; k < CPL; k++)
                #pragma unroll
                for (int j = 0; j < G; j++) {
                    const int o = (group + k) * G + j;
                    row[k][j] = scale_out && o < out_features ? number(scale_out, o, scale_out_dtype) : 1.f;
                }
        }
        const int start = from + at % units * UNIT + warp * STEPS * 16 + 4 * q;
        if (group >= groups) continue;
        Codes next;
        load_codes(next, packed, group, start, in_features, width);
        #pragma unroll 1
        for (int step = 0; step < STEPS; step++) {
            const int channel = start + step * 16;
            Codes now = next;
            if (step + 1 < STEPS) load_codes(next, packed, group, channel + 16, in_features, width);
            if (channel >= limit) continue;
            align_codes(now);
            float column[4];
            if (SCALED) {
                #pragma unroll
                for (int r = 0; r < 4; r++)
                    column[r] = scale_in ? number(scale_in, min(channel + r, in_features - 1), scale_in_dtype) : 1.f;
            }
            #pragma unroll
            for (int k = 0; k < CPL; k++) {
                u32 v[4][WORDS];
                #pragma unroll
                for (int r = 0; r < 4; r++) gather(v[r], table, code_of(now, r, k, clusters), copy, clusters);
                #pragma unroll
                for (int j = 0; j < G; j++) {
                    const int o = (group + k) * G + j;
                    if (o >= out_features) continue;
                    uint2 four;
                    if (SCALED) {
                        float value[4];
                        #pragma unroll
                        for (int r = 0; r < 4; r++) {
                            value[r] = TABLE == FP32 ? __uint_as_float(v[r][TABLE == FP32 ? j : 0])
                                                     : unpack < TABLE == FP32 ? BF16 : TABLE > (v[r][TABLE == FP32 ? 0 : j / 2], j % 2);
                            value[r] = __fmul_rn(__fmul_rn(value[r], column[r]), row[k][j]);
                        }
                        four = make_uint2(pack<WEIGHT>(value[0], value[1]), pack<WEIGHT>(value[2], value[3]));
                    } else {
                        const u32 halves = j % 2 ? 0x7632 : 0x5410;
                        four = make_uint2(__byte_perm(v[0][j / 2], v[1][j / 2], halves), __byte_perm(v[2][j / 2], v[3][j / 2], halves));
                    }
                    *(uint2*)(weight + (size_t)o * in_features + channel) = four;
                }
            }
        }
    }
}
