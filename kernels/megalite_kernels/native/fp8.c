// FP8 codes of fp32 or bf16 matrices and back, with a scale for every block of `rows` x `columns`: what
// reference/fp8.py computes, bit for bit. Loops over plain integers, which the compiler turns into vectors.
#include "simd.h"

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
static inline float of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// Largest |x|, as its bits: they rise with it, inf is above every number, and NaN above inf.
static inline uint32_t largest(const float *x, long n) {
    uint32_t top = 0;
    for (long j = 0; j < n; j++) {
        uint32_t bits = bits_of(x[j]) & 0x7fffffff;
        top = bits > top ? bits : top;
    }
    return top;
}

// amax[⌈m / rows⌉, ⌈k / columns⌉], zero before.
void fp8_amax(int threads, int bf16, long m, long k, long rows, long columns, const void *x, uint32_t *amax) {
    long across = (k + columns - 1) / columns, down = (m + rows - 1) / rows;
    uint32_t whole = 0;
#pragma omp parallel num_threads(threads)
    {
        float *room = scratch(k);
        if (down == 1 && across == 1) {
#pragma omp for schedule(static) reduction(max : whole)
            for (long i = 0; i < m; i++) {
                uint32_t top = largest(row_in(x, i * k, k, bf16, room), k);
                whole = top > whole ? top : whole;
            }
        } else {
#pragma omp for schedule(static)
            for (long block = 0; block < down; block++)
                for (long i = block * rows; i < m && i < (block + 1) * rows; i++) {
                    const float *row = row_in(x, i * k, k, bf16, room);
                    for (long b = 0; b < across; b++) {
                        long first = b * columns, left = k - first < columns ? k - first : columns;
                        uint32_t top = largest(row + first, left), *at = amax + block * across + b;
                        *at = top > *at ? top : *at;
                    }
                }
        }
        free(room);
    }
    if (down == 1 && across == 1) amax[0] = whole;
}

// To nearest even, saturating; NaN is 0x7f. `mantissa` bits of it and `bias` of the exponent make the format.
static inline __attribute__((always_inline)) void encode(
    const int mantissa, const int bias, const float top, const float *x, float inverse, uint8_t *codes, long n) {
    const int shift = 23 - mantissa;
    const float unit = of_bits((uint32_t)(127 + 24 - mantissa - bias) << 23);  // its last place is that of the subnormals
    for (long j = 0; j < n; j++) {
        uint32_t bits = bits_of(x[j] * inverse), sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
        uint32_t kept = size < bits_of(top) ? size : bits_of(top);
        uint32_t normal = ((kept + (1u << (shift - 1)) - 1 + (kept >> shift & 1)) >> shift) - ((127 - bias) << mantissa);
        uint32_t small = bits_of(of_bits(kept) + unit) - bits_of(unit);
        uint32_t code = (kept < (uint32_t)(128 - bias) << 23 ? small : normal) | sign;
        codes[j] = (uint8_t)(size > 0x7f800000 ? 0x7f : code);
    }
}

void fp8_encode(
    int threads, int bf16, int e5m2, long m, long k, long rows, long columns, const void *x, const float *inverse,
    uint8_t *codes) {
    long across = (k + columns - 1) / columns;
#pragma omp parallel num_threads(threads)
    {
        float *room = scratch(k);
#pragma omp for schedule(static)
        for (long i = 0; i < m; i++) {
            const float *row = row_in(x, i * k, k, bf16, room);
            for (long b = 0; b < across; b++) {
                long first = b * columns, left = k - first < columns ? k - first : columns;
                float by = inverse[i / rows * across + b];
                if (e5m2) encode(2, 15, 57344.0f, row + first, by, codes + i * k + first, left);
                else encode(3, 7, 448.0f, row + first, by, codes + i * k + first, left);
            }
        }
        free(room);
    }
}

// A code's bits, moved to a float's place, are its value over 2^(127 - bias), for subnormals too.
static inline __attribute__((always_inline)) void decode(
    const int mantissa, const int bias, const uint32_t last, const uint8_t *codes, float scale, float *x, long n) {
    const float lift = of_bits((uint32_t)(254 - bias) << 23);
    for (long j = 0; j < n; j++) {
        uint32_t code = codes[j], size = code & 0x7f;
        uint32_t number = bits_of(of_bits(size << (23 - mantissa)) * lift);
        uint32_t special = mantissa == 2 && size == 0x7c ? 0x7f800000 : 0x7fc00000;
        x[j] = of_bits((size > last ? special : number) | (code & 0x80) << 24) * scale;
    }
}

void fp8_decode(
    int threads, int e5m2, long m, long k, long rows, long columns, const uint8_t *codes, const float *scales, float *x) {
    long across = (k + columns - 1) / columns;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < m; i++)
        for (long b = 0; b < across; b++) {
            long first = b * columns, left = k - first < columns ? k - first : columns, at = i * k + first;
            float scale = scales[i / rows * across + b];
            if (e5m2) decode(2, 15, 0x7b, codes + at, scale, x + at, left);
            else decode(3, 7, 0x7e, codes + at, scale, x + at, left);
        }
}
