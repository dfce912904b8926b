// y = x Wᵀ for up to 64 tokens: weights are made in registers, in the layout that tensor cores want, and never stored.
//
// Macros beside those of table.cuh: NT tiles of 8 tokens, WK warps that share outputs, KS steps of 16 channels of a
// warp in a unit, SCALED whether inputs have scales, ONE whether there is one token. TABLE is the dtype of x and y.
//
// A warp multiplies 8 · CPL groups of outputs (G · CPL / 2 tiles of 16) with 16 channels in a step of mma.m16n8k16:
//
//        lane = 4 n + q        channels  4q 4q+1 4q+2 4q+3         A fragment of pair p, number j of a group:
//                      group n·CPL + 2p    c    c    c    c    ──►   row n     (group 2p)    k: 4q 4q+1 | 4q+2 4q+3
//                      group n·CPL + 2p+1  c    c    c    c          row n + 8 (group 2p+1)
//
// Rows and channels of a product may stand in any order, so each lane needs its own codes and centroids alone.
//
// Units of UNIT channels × TILE groups stand in a line, codebook by codebook, tile by tile. Each block of threads takes
// an equal, connected part of it; what it has of a tile it writes as a sum of its own, and `finish` adds those up in
// order. So a shape and a device always give the same bytes, and all processors are busy.
constexpr int PAIRS = CPL / 2;
constexpr int TILE = 8 * CPL;           // groups
constexpr int UNIT = WK * KS * 16;      // channels
constexpr int THREADS = WK * 32;
constexpr int ROW = UNIT + 16;          // numbers of a token of x in shared memory; 32 bytes more: no two banks collide
constexpr int KEPT = CPL * G;           // outputs of a lane's row of 8
constexpr int LINE = KEPT * 8 + 4;      // numbers of a token in the sums of a warp

__device__ __forceinline__ void multiply(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if (TABLE == BF16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

struct Unit {
    int virtual_tile, block, group, channel, limit;  // first group; channels [channel, limit) of its codebook
};

// x [tokens, in], y [slots, tokens, TILE · G] fp32. Grid: parts of the line.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
table_linear(const u16* x, const u8* packed, const void* codebook, const void* scale_in, float* y, int tokens, int in_features,
             int groups, int width, int clusters, int blocks, int tiles, int units, int codebook_dtype, int scale_dtype) {
    extern __shared__ __align__(16) u32 shared[];
    u32* table = shared;
    u16* given = (u16*)(shared + (table_words(clusters) + 3) / 4 * 4);  // two buffers of [tokens, ROW]
    float* sums = (float*)(given + 2 * tokens * ROW);                   // [WK, min(tokens, 8), LINE]
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n = lane >> 2, q = lane & 3, copy = lane % COPIES;

    const int total = blocks * tiles * units;  // times the parts it is below 2^31
    const int begin = blockIdx.x * total / gridDim.x, end = (blockIdx.x + 1) * total / gridDim.x;

    auto unit_at = [&](int at) {
        Unit unit;
        unit.virtual_tile = at / units;
        unit.block = unit.virtual_tile / tiles;
        const int from = (int)(((long long)unit.block * in_features + blocks - 1) / blocks);
        unit.limit = (int)(((long long)(unit.block + 1) * in_features + blocks - 1) / blocks);
        unit.channel = from + at % units * UNIT;
        unit.group = unit.virtual_tile % tiles * TILE;
        return unit;
    };
    auto stage = [&](const Unit& unit, int buffer) {  // x of a unit to shared memory; 0 beyond its codebook's channels
        u16* there = given + buffer * tokens * ROW;
        const bool wide = in_features % 8 == 0 && unit.channel % 8 == 0 && ((size_t)x & 15) == 0;
        if (wide)
            for (int at = threadIdx.x; at < tokens * (UNIT / 8); at += THREADS) {
                const int token = at / (UNIT / 8), k = at % (UNIT / 8) * 8, channel = unit.channel + k;
                const int size = max(0, min(8, unit.limit - channel)) * 2;
                const u16* source = x + (size_t)token * in_features + (size > 0 ? channel : 0);
                const u32 target = (u32)__cvta_generic_to_shared(there + token * ROW + k);
                asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(size) : "memory");
            }
        else
            for (int at = threadIdx.x; at < tokens * UNIT; at += THREADS) {
                const int token = at / UNIT, k = at % UNIT, channel = unit.channel + k;
                there[token * ROW + k] = channel < unit.limit ? x[(size_t)token * in_features + channel] : 0;
            }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };

    float total_of[PAIRS][G][NT][4];
    auto clear = [&]() {
        #pragma unroll
        for (int p = 0; p < PAIRS; p++)
            #pragma unroll
            for (int j = 0; j < G; j++)
                #pragma unroll
                for (int t = 0; t < NT; t++)
                    #pragma unroll
                    for (int k = 0; k < 4; k++) total_of[p][j][t][k] = 0.f;
    };
    clear();
    if (begin >= end) return;

    Unit unit = unit_at(begin);
    Codes next;
    auto fetch = [&](const Unit& from, int step) {
        const int first = from.group + n * CPL;
        load_codes(next, packed, first < groups ? first : 0, from.channel + (step * WK + warp) * 16 + 4 * q, in_features, width);
    };
    fetch(unit, 0);
    stage(unit, 0);
    int block = -1;
    for (int at = begin; at < end; at++) {
        if (unit.block != block) {
            __syncthreads();  // nobody reads the table before
            block = unit.block;
            fill_table(table, codebook, (size_t)block * clusters * G, clusters, codebook_dtype, threadIdx.x, THREADS);
        }
        const int buffer = (at - begin) & 1;
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncthreads();
        const Unit following = unit_at(min(at + 1, end - 1));
        if (at + 1 < end) stage(following, buffer ^ 1);
        const u16* here = given + buffer * tokens * ROW;
        #pragma unroll
        for (int step = 0; step < KS; step++) {
            Codes now = next;
            if (step + 1 < KS) fetch(unit, step + 1);
            else if (at + 1 < end) fetch(following, 0);
            const int k = (step * WK + warp) * 16 + 4 * q;
            uint2 right[NT];
            #pragma unroll
            for (int t = 0; t < NT; t++) {
                const int token = t * 8 + n;
                right[t] = token < tokens ? *(const uint2*)(here + token * ROW + k) : make_uint2(0, 0);
            }
            if (SCALED) {
                float scale[4];
                #pragma unroll
                for (int r = 0; r < 4; r++) scale[r] = number(scale_in, min(unit.channel + k + r, in_features - 1), scale_dtype);
                #pragma unroll
                for (int t = 0; t < NT; t++) {
                    right[t].x = pack<TABLE>(unpack<TABLE>(right[t].x, 0) * scale[0], unpack<TABLE>(right[t].x, 1) * scale[1]);
                    right[t].y = pack<TABLE>(unpack<TABLE>(right[t].y, 0) * scale[2], unpack<TABLE>(right[t].y, 1) * scale[3]);
                }
            }
            align_codes(now);
            #pragma unroll
            for (int p = 0; p < PAIRS; p++) {
                u32 v[2][4][WORDS];
                #pragma unroll
                for (int h = 0; h < 2; h++)
                    #pragma unroll
                    for (int r = 0; r < 4; r++) gather(v[h][r], table, code_of(now, r, 2 * p + h, clusters), copy, clusters);
                #pragma unroll
                for (int j = 0; j < G; j++) {
                    const u32 halves = j % 2 ? 0x7632 : 0x5410;
                    const u32 a0 = __byte_perm(v[0][0][j / 2], v[0][1][j / 2], halves), a2 = __byte_perm(v[0][2][j / 2], v[0][3][j / 2], halves);
                    const u32 a1 = __byte_perm(v[1][0][j / 2], v[1][1][j / 2], halves), a3 = __byte_perm(v[1][2][j / 2], v[1][3][j / 2], halves);
                    #pragma unroll
                    for (int t = 0; t < NT; t++) multiply(total_of[p][j][t], a0, a1, a2, a3, right[t].x, right[t].y);
                }
            }
        }
        if (at + 1 == end || following.virtual_tile != unit.virtual_tile) {
            // -- the warps' sums of this tile, added in order; LINE keeps them apart in the banks
            const int kept = ONE ? 1 : min(tokens, 8);
            float* target = y + (size_t)(blockIdx.x + unit.virtual_tile) * tokens * (KEPT * 8);
            #pragma unroll
            for (int t = 0; t < NT; t++) {
                if (t > 0) __syncthreads();
                #pragma unroll
                for (int h = 0; h < (ONE ? 1 : 2); h++) {
                    if (2 * q + h < kept) {
                        float* there = sums + (warp * kept + 2 * q + h) * LINE + n;
                        #pragma unroll
                        for (int p = 0; p < PAIRS; p++)
                            #pragma unroll
                            for (int c = 0; c < 2; c++)
                                #pragma unroll
                                for (int j = 0; j < G; j++) there[((2 * p + c) * G + j) * 8] = total_of[p][j][t][2 * c + h];
                    }
                }
                __syncthreads();
                const int count = min(kept, tokens - t * 8);
                for (int index = threadIdx.x; index < count * KEPT * 8; index += THREADS) {
                    const int token = index / (KEPT * 8), place = index % (KEPT * 8);
                    float sum = 0.f;
                    #pragma unroll
                    for (int w = 0; w < WK; w++) sum += sums[(w * kept + token) * LINE + place];
                    target[(size_t)(t * 8 + token) * KEPT * 8 + place] = sum;
                }
            }
            clear();
        }
        unit = following;
    }
}

// y [tokens, out] from the parts' sums, times the scales of the outputs, plus bias. A thread for a number.
extern "C" __global__ void __launch_bounds__(256)
finish(const float* sums, const void* scale_out, const void* bias, u16* y, int tokens, int out_features, int blocks, int tiles, int units,
       int parts, int scale_dtype, int bias_dtype) {
    const int index = blockIdx.x * 256 + threadIdx.x;
    if (index >= tokens * out_features) return;
    const int token = index / out_features, o = index % out_features, group = o / G, tile = group / TILE;
    const int place = (group % CPL * G + o % G) * 8 + group % TILE / CPL;
    const int total = blocks * tiles * units;
    float value = 0.f;
    for (int block = 0; block < blocks; block++) {
        const int virtual_tile = block * tiles + tile;
        const int first = virtual_tile * units;
        const int last = owner_of(first + units - 1, total, parts);
        for (int part = owner_of(first, total, parts); part <= last; part++)
            value += sums[((size_t)(part + virtual_tile) * tokens + token) * KEPT * 8 + place];
    }
    if (scale_out) value *= number(scale_out, o, scale_dtype);
    if (bias) value += number(bias, o, bias_dtype);
    y[index] = pack<TABLE>(value, 0.f) & 0xffff;
}
