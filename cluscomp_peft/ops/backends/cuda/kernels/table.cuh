// A table of centroids in shared memory, and packed codes in registers. Shared by linear.cu and scatter.cu.
//
// Macros: G group size, B bits of a code, TABLE dtype of the table's numbers, COPIES of it, CLAMP whether a code can
// exceed the codebook, CPL codes of a lane in a row, ALIGNED whether a lane's start and end at whole words and a tile's
// at multiples of 16 bytes.
//
// Random reads of shared memory collide in its 32 banks. Where there is room the table is stored COPIES times, entry
// e of copy c at e · COPIES + c, and a lane reads copy lane % COPIES: with as many copies as lanes that are served
// together (16 of 8 bytes, 32 of 4) nothing collides any more.
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define FP32 0
#define FP16 1
#define BF16 2

constexpr int WORDS = TABLE == FP32 ? G : (G + 1) / 2;  // of an entry
constexpr bool SPLIT = WORDS == 3;                      // two words in a first array, the third in a second one
constexpr int STRIDE = WORDS <= 2 || WORDS == 4 ? WORDS : SPLIT ? 2 : WORDS <= 6 ? 6 : (WORDS + 3) / 4 * 4;
constexpr u32 MASK = (1u << B) - 1;
constexpr int NEEDED = (CPL * B + 31) / 32;  // words that hold a lane's codes of a row
constexpr int LOADED = ALIGNED ? NEEDED : (CPL * B + 62) / 32;

__device__ __forceinline__ float half_to_float(u16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
    return result;
}
__device__ __forceinline__ float bf16_to_float(u16 value) { return __uint_as_float((u32)value << 16); }

// Number `at` of an array of a dtype that is known at run time.
__device__ __forceinline__ float number(const void* array, size_t at, int dtype) {
    if (dtype == FP32) return ((const float*)array)[at];
    const u16 value = ((const u16*)array)[at];
    return dtype == FP16 ? half_to_float(value) : bf16_to_float(value);
}

// Two numbers rounded to a 16-bit dtype, the first in the low half.
template <int DTYPE>
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 result;
    if (DTYPE == BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}
template <int DTYPE>
__device__ __forceinline__ float unpack(u32 word, int half) {
    const u16 value = half ? word >> 16 : word & 0xffff;
    return DTYPE == BF16 ? bf16_to_float(value) : half_to_float(value);
}

// Bytes: clusters · COPIES · (SPLIT ? 12 : 4 · STRIDE).
__device__ __forceinline__ int table_words(int clusters) { return clusters * COPIES * (SPLIT ? 3 : STRIDE); }

// Words of entry `e` of copy `copy`, all at once.
__device__ __forceinline__ void put(u32* table, const u32* words, int e, int copy, int clusters) {
    const int at = e * COPIES + copy;
    if (WORDS == 1) {
        table[at] = words[0];
    } else if (WORDS == 2 || SPLIT) {
        ((uint2*)table)[at] = make_uint2(words[0], words[WORDS > 1 ? 1 : 0]);
        if (SPLIT) table[clusters * COPIES * 2 + at] = words[WORDS - 1];
    } else if (STRIDE == 6) {
        #pragma unroll
        for (int k = 0; k < 3; k++)
            ((uint2*)table)[at * 3 + k] = make_uint2(words[2 * k < WORDS ? 2 * k : 0], words[2 * k + 1 < WORDS ? 2 * k + 1 : 0]);
    } else {
        #pragma unroll
        for (int k = 0; k < STRIDE / 4; k++)
            ((uint4*)table)[at * (STRIDE / 4) + k] =
                make_uint4(words[4 * k < WORDS ? 4 * k : 0], words[4 * k + 1 < WORDS ? 4 * k + 1 : 0],
                           words[4 * k + 2 < WORDS ? 4 * k + 2 : 0], words[4 * k + 3 < WORDS ? 4 * k + 3 : 0]);
    }
}

// The codebook [clusters, G] of `dtype`, from number `base` on, into the table. A thread takes whole entries, and starts
// with another copy than its neighbours do, so that their stores do not collide either.
template <int DTYPE>
__device__ __forceinline__ void fill_from(u32* table, const void* codebook, size_t base, int clusters, int thread, int threads) {
    const bool paired = DTYPE != FP32 && G % 2 == 0 && ((size_t)codebook & 3) == 0;
    #pragma unroll 8
    for (int e = thread; e < clusters; e += threads) {
        float values[G + 1];
        values[G] = 0.f;
        if (paired) {
            #pragma unroll
            for (int w = 0; w < G / 2; w++) {
                const u32 both = __ldg((const u32*)codebook + base / 2 + (size_t)e * (G / 2) + w);
                values[2 * w] = unpack<DTYPE>(both, 0), values[2 * w + 1] = unpack<DTYPE>(both, 1);
            }
        } else {
            #pragma unroll
            for (int j = 0; j < G; j++) values[j] = number(codebook, base + (size_t)e * G + j, DTYPE);
        }
        u32 words[WORDS];
        #pragma unroll
        for (int w = 0; w < WORDS; w++)
            words[w] = TABLE == FP32 ? __float_as_uint(values[w]) : pack < TABLE == FP32 ? BF16 : TABLE > (values[TABLE == FP32 ? 0 : 2 * w], values[TABLE == FP32 ? 0 : 2 * w + 1]);
        #pragma unroll 4
        for (int c = 0; c < COPIES; c++) put(table, words, e, (c + e) % COPIES, clusters);
    }
}
__device__ __noinline__ void fill_table(u32* table, const void* codebook, size_t base, int clusters, int dtype, int thread, int threads) {
    if (dtype == FP32) fill_from<FP32>(table, codebook, base, clusters, thread, threads);
    else if (dtype == FP16) fill_from<FP16>(table, codebook, base, clusters, thread, threads);
    else fill_from<BF16>(table, codebook, base, clusters, thread, threads);
}

// The words of entry `code`. `offset`: the lane's copy.
__device__ __forceinline__ void gather(u32* values, const u32* table, u32 code, int copy, int clusters) {
    const u32 e = COPIES == 1 ? code : code * COPIES + copy;
    if (WORDS == 1) {
        values[0] = table[e];
    } else if (WORDS == 2 || SPLIT) {
        const uint2 pair = ((const uint2*)table)[e];
        values[0] = pair.x, values[WORDS > 1 ? 1 : 0] = pair.y;
        if (SPLIT) values[WORDS - 1] = table[clusters * COPIES * 2 + e];
    } else if (STRIDE == 6) {
        #pragma unroll
        for (int k = 0; k < 3; k++) {
            const uint2 pair = ((const uint2*)table)[e * 3 + k];
            if (2 * k < WORDS) values[2 * k] = pair.x;
            if (2 * k + 1 < WORDS) values[2 * k + 1] = pair.y;
        }
    } else {
        #pragma unroll
        for (int k = 0; k < STRIDE / 4; k++) {
            const uint4 four = ((const uint4*)table)[e * (STRIDE / 4) + k];
            if (4 * k < WORDS) values[4 * k] = four.x;
            if (4 * k + 1 < WORDS) values[4 * k + 1] = four.y;
            if (4 * k + 2 < WORDS) values[4 * k + 2] = four.z;
            if (4 * k + 3 < WORDS) values[4 * k + 3] = four.w;
        }
    }
}

// A lane's CPL codes in each of four input channels.
struct Codes {
    u32 words[4][LOADED];
    u32 shift[4];
};

// Those from group `first` on, in the four channels from `channel` on (channels and words beyond the end read others).
__device__ __forceinline__ void load_codes(Codes& codes, const u8* packed, int first, int channel, int in_features, int width) {
    const long long bit = (long long)first * B;
    const u8* lane = packed + (bit >> 3);
    const u8* end = packed + (size_t)in_features * width;
    #pragma unroll
    for (int r = 0; r < 4; r++) {
        const u8* at = lane + (size_t)min(channel + r, in_features - 1) * width;
        if (ALIGNED) {
            #pragma unroll
            for (int w = 0; w < LOADED; w++) codes.words[r][w] = at + 4 * w < end ? __ldg((const u32*)at + w) : 0;
            codes.shift[r] = 0;
        } else {
            const u8* whole = (const u8*)((size_t)at & ~(size_t)3);
            codes.shift[r] = ((u32)(size_t)at & 3) * 8 + ((u32)bit & 7);
            #pragma unroll
            for (int w = 0; w < LOADED; w++) codes.words[r][w] = whole + 4 * w < end ? __ldg((const u32*)whole + w) : 0;
        }
    }
}

// Moves the codes to the start of their words.
__device__ __forceinline__ void align_codes(Codes& codes) {
    if (ALIGNED) return;
    #pragma unroll
    for (int r = 0; r < 4; r++)
        #pragma unroll
        for (int w = 0; w < NEEDED; w++)
            codes.words[r][w] = __funnelshift_r(codes.words[r][w], w + 1 < LOADED ? codes.words[r][w + 1] : 0, codes.shift[r]);
}

// Code k of row r, never beyond the codebook.
__device__ __forceinline__ u32 code_of(const Codes& codes, int r, int k, int clusters) {
    const int bit = k * B, w = bit / 32, shift = bit % 32;
    u32 code = shift + B <= 32 ? codes.words[r][w] >> shift
                               : __funnelshift_r(codes.words[r][w], codes.words[r][w + 1 < LOADED ? w + 1 : w], shift);
    code &= MASK;
    return CLAMP ? min(code, (u32)clusters - 1) : code;
}

// Which of `parts` equal parts of `total` units has unit `at`.
__device__ __forceinline__ int owner_of(int at, int total, int parts) { return ((at + 1) * parts - 1) / total; }
