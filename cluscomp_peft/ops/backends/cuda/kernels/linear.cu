// y = x Wᵀ for up to 64 tokens: weights are made in registers, in the layout that tensor cores want, and never stored.
//
// Macros beside those of table.cuh: NT tiles of 8 tokens, WK warps that share outputs, STAGES units that are on their
// way at once, SCALED whether inputs have scales, ONE whether there is one token. TABLE is the dtype of x and y.
//
// A warp multiplies 8 · CPL groups of outputs (G · CPL / 2 tiles of 16) with 16 channels in a step of mma.m16n8k16:
//
//        lane = 4 n + q        channels  2q 2q+1 2q+8 2q+9         A fragment of pair p, number j of a group:
//                      group n·CPL + 2p    c    c    c    c    ──►   row n     (group 2p)    k: 2q 2q+1 | 2q+8 2q+9
//                      group n·CPL + 2p+1  c    c    c    c          row n + 8 (group 2p+1)
//
// Rows of a product may stand in any order, so each lane needs its own codes and centroids alone.
//
// Units of UNIT channels × TILE groups stand in a line, codebook by codebook, tile by tile. Each block of threads takes
// an equal, connected part of it; what it has of a tile it writes as a sum of its own, and `finish` adds those up in
// order. So a shape and a device always give the same bytes, and all processors are busy.
//
// A unit has UNIT channels, 16 for each warp. A warp brings its own codes, x and scales to shared memory some units
// ahead, in pieces of 16 bytes, and waits for no other: the warps drift apart, so that while some compute addresses
// others read tables. A row of codes starts anywhere: its pieces are those that it touches, and ROW_WORDS, an odd
// multiple of four, spreads the rows over the banks.
constexpr int PAIRS = CPL / 2;
constexpr int TILE = 8 * CPL;           // groups
constexpr int UNIT = WK * 16;           // channels
constexpr int THREADS = WK * 32;
constexpr int PIECES = ALIGNED ? (CPL * B + 15) / 16 : (CPL * B + 30) / 16;  // of a row of codes, CPL · B bytes
constexpr int ROW_WORDS = PIECES % 2 ? 4 * PIECES : 4 * PIECES + 4;
constexpr int ROW = 24;                 // numbers of a token of x, of which 16 count; 48 bytes: no two banks collide
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

// Where a unit is: channels [channel, limit) of its codebook.
struct Unit {
    int virtual_tile, tile, k, block, from, limit;
};

__device__ __forceinline__ void set_block(Unit& unit, int block, int blocks, int in_features) {
    unit.block = block;
    unit.from = (int)(((long long)block * in_features + blocks - 1) / blocks);
    unit.limit = (int)(((long long)(block + 1) * in_features + blocks - 1) / blocks);
}
__device__ __forceinline__ void advance(Unit& unit, int units, int tiles, int blocks, int in_features) {
    if (++unit.k < units) return;
    unit.k = 0, unit.virtual_tile++;
    if (++unit.tile < tiles) return;
    unit.tile = 0;
    set_block(unit, unit.block + 1, blocks, in_features);
}
__device__ __forceinline__ void copy_piece(void* target, const void* source, int size) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(target)), "l"(source), "r"(size)
                 : "memory");
}

// x [tokens, in], y [slots, tokens, TILE · G] fp32. Grid: parts of the line.
extern "C" __global__ void __launch_bounds__(THREADS)
table_linear(const u16* x, const u8* packed, const void* codebook, const void* scale_in, float* y, int tokens, int in_features,
             int width, int clusters, int blocks, int tiles, int units, int codebook_dtype, int scale_dtype) {
    extern __shared__ __align__(16) u32 shared[];
    u32* table = shared;
    u32* stages = shared + (table_words(clusters) + 3) / 4 * 4;
    const int buffer_words = 16 * ROW_WORDS + tokens * (ROW / 2) + (SCALED ? 16 : 0);  // of a warp
    float* sums = (float*)(stages + STAGES * WK * buffer_words);                       // [WK, min(tokens, 8), LINE]
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n = lane >> 2, q = lane & 3, copy = lane % COPIES;
    const int skew = (int)((size_t)packed & 15);
    const u8* codes = packed - skew;
    const u32 codes_end = skew + (u32)in_features * width;  // below 2^31
    const int scale_size = scale_dtype == FP32 ? 4 : 2;
    const bool wide = in_features % 8 == 0 && ((size_t)x & 15) == 0 && ((size_t)scale_in & 15) == 0;

    const int total = blocks * tiles * units;  // times the parts it is below 2^31
    const int begin = blockIdx.x * total / gridDim.x, end = (blockIdx.x + 1) * total / gridDim.x;
    if (begin >= end) return;
    Unit here;
    here.virtual_tile = begin / units, here.k = begin % units, here.tile = here.virtual_tile % tiles;
    set_block(here, here.virtual_tile / tiles, blocks, in_features);
    Unit ahead = here;

    auto buffer_of = [&](int at) { return stages + ((at - begin) % STAGES * WK + warp) * buffer_words; };
    auto stage = [&](int at) {  // the warp's part of unit `ahead`; 0 beyond the codes, and where x's codebook ends
        u32* buffer = buffer_of(at);
        const int channel = ahead.from + ahead.k * UNIT + warp * 16;
        const u32 tile = skew + ahead.tile * (CPL * B);
        #pragma unroll
        for (int index = lane; index < 16 * PIECES; index += 32) {
            const int r = index / PIECES, piece = index % PIECES;
            const u32 row = tile + (u32)(channel + r) * width, source = (ALIGNED ? row : row & ~15u) + 16 * piece;
            const bool there = channel + r < in_features && source < codes_end;
            copy_piece(buffer + r * ROW_WORDS + 4 * piece, codes + (there ? source : 0), there ? 16 : 0);
        }
        u16* numbers = (u16*)(buffer + 16 * ROW_WORDS);
        u32* scales = buffer + 16 * ROW_WORDS + tokens * (ROW / 2);
        if (wide && channel % 8 == 0) {
            for (int index = lane; index < 2 * tokens; index += 32) {
                const int token = index / 2, k = index % 2 * 8, size = max(0, min(8, ahead.limit - channel - k)) * 2;
                copy_piece(numbers + token * ROW + k, size > 0 ? x + (size_t)token * in_features + channel + k : x, size);
            }
            if (SCALED && lane < scale_size) {
                const int k = lane * (16 / scale_size), size = max(0, min(16, (in_features - channel - k) * scale_size));
                copy_piece(scales + lane * 4, size > 0 ? (const u8*)scale_in + (size_t)(channel + k) * scale_size : scale_in, size);
            }
        } else {
            for (int index = lane; index < 16 * tokens; index += 32) {
                const int token = index / 16, k = index % 16;
                numbers[token * ROW + k] = channel + k < ahead.limit ? x[(size_t)token * in_features + channel + k] : 0;
            }
            if (SCALED && lane < 16) {
                const int i = min(channel + lane, in_features - 1);
                if (scale_dtype == FP32) scales[lane] = ((const u32*)scale_in)[i];
                else ((u16*)scales)[lane] = ((const u16*)scale_in)[i];
            }
        }
        advance(ahead, units, tiles, blocks, in_features);
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
    #pragma unroll 1
    for (int at = begin; at < begin + STAGES - 1; at++) {
        if (at < end) stage(at);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    int block = -1;
    #pragma unroll 1
    for (int at = begin; at < end; at++) {
        if (here.block != block) {
            __syncthreads();  // nobody reads the table before
            block = here.block;
            fill_table(table, codebook, (size_t)block * clusters * G, clusters, codebook_dtype, threadIdx.x, THREADS);
            __syncthreads();
        }
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        __syncwarp();  // this unit is there, for all lanes
        const u32* buffer = buffer_of(at);
        const int k = 2 * q;
        Codes now;
        #pragma unroll
        for (int r = 0; r < 4; r++) {
            const int row = k + r % 2 + r / 2 * 8;
            int bit = n * (CPL * B);
            if (!ALIGNED) {
                const u32 channel = here.from + here.k * UNIT + warp * 16 + row;
                bit += ((skew + here.tile * (CPL * B) + channel * width) & 15) * 8;
                now.shift[r] = bit & 31;
            }
            #pragma unroll
            for (int w = 0; w < LOADED; w++) now.words[r][w] = buffer[row * ROW_WORDS + (bit >> 5) + w];
        }
        const u16* numbers = (const u16*)(buffer + 16 * ROW_WORDS) + k;
        uint2 right[NT];
        #pragma unroll
        for (int t = 0; t < NT; t++) {
            const int token = t * 8 + n;
            const bool there = token < tokens;
            right[t].x = there ? *(const u32*)(numbers + token * ROW) : 0;
            right[t].y = there ? *(const u32*)(numbers + token * ROW + 8) : 0;
        }
        if (SCALED) {
            const u32* scales = buffer + 16 * ROW_WORDS + tokens * (ROW / 2);
            float scale[4];
            #pragma unroll
            for (int r = 0; r < 4; r++) scale[r] = number(scales, k + r % 2 + r / 2 * 8, scale_dtype);
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
        __syncwarp();  // all lanes are done with the buffer of this unit, which is filled next
        if (at + STAGES - 1 < end) stage(at + STAGES - 1);
        asm volatile("cp.async.commit_group;" ::: "memory");
        if (at + 1 == end || here.k + 1 == units) {
            // -- the warps' sums of this tile, added in order; LINE keeps them apart in the banks
            const int kept = ONE ? 1 : min(tokens, 8);
            float* target = y + (size_t)(blockIdx.x + here.virtual_tile) * tokens * (KEPT * 8);
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
            __syncthreads();  // the sums' place is free for the next tile
            clear();
        }
        advance(here, units, tiles, blocks, in_features);
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
        #pragma unroll 4
        for (int part = owner_of(first, total, parts); part <= last; part++)
            value += sums[((size_t)(part + virtual_tile) * tokens + token) * KEPT * 8 + place];
    }
    if (scale_out) value *= number(scale_out, o, scale_dtype);
    if (bias) value += number(bias, o, bias_dtype);
    y[index] = pack<TABLE>(value, 0.f) & 0xffff;
}
