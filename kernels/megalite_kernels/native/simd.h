// Vectors as wide as the machine's registers, exp, bf16 rows and one small matrix product; shared by the CPU kernels.
// GCC/Clang vector extensions, so the same text serves AVX2, AVX-512 and NEON. Sums have a fixed order: same bits every run.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <math.h>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define TILE_ROWS 12
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define TILE_ROWS 6
#else
#define VECTOR_BYTES 16
#define TILE_ROWS 6
#endif
#define LANES (VECTOR_BYTES / 4)
#define PANEL (2 * LANES)  // columns of a register tile

typedef float vf __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(VECTOR_BYTES)));
typedef float vf_unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

static inline vf load(const float *p) { return *(const vf_unaligned *)p; }
static inline void store(float *p, vf x) { *(vf_unaligned *)p = x; }
static inline vf splat(float x) { return x - (vf){0}; }
static inline vf choose(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

// The first `left` lanes, the others 0; a whole vector when enough is left.
static inline vf load_part(const float *p, long left) {
    if (left >= LANES) return load(p);
    vf x = {0};
    memcpy(&x, p, left * sizeof(float));
    return x;
}
static inline void store_part(float *p, vf x, long left) {
    if (left >= LANES) store(p, x);
    else memcpy(p, &x, left * sizeof(float));
}

// x with the lanes from `left` on replaced.
static inline vf keep(vf x, long left, float other) {
    vi lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return left >= LANES ? x : choose(lane < (int)left, x, splat(other));
}

static inline float sum_lanes(vf x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}
static inline float max_lanes(vf x) {
    float top = x[0];
    for (int i = 1; i < LANES; i++) top = x[i] > top ? x[i] : top;
    return top;
}
static inline vf larger(vf a, vf b) { return choose(a > b, a, b); }

// e^x to about one unit in the last place; NaN stays NaN, overflow saturates near the largest float.
static inline vf exponential(vf x) {
    x = choose(x < splat(-87.3f), splat(-87.3f), x);
    x = choose(x > splat(88.3f), splat(88.3f), x);
    vf scaled = x * 1.44269504f;
    vi n = __builtin_convertvector(scaled + choose(scaled < splat(0), splat(-0.5f), splat(0.5f)), vi);
    vf whole = __builtin_convertvector(n, vf);
    vf r = x - whole * 0.693359375f;
    r = r + whole * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (vf)((vi)p + (n << 23));
}
static inline vf sigmoid(vf x) { return 1.0f / (1.0f + exponential(-x)); }
static inline vf hyperbolic_tangent(vf x) {  // near 0 a polynomial (Cephes tanhf), since 1 - 2 / (e^2x + 1) cancels there
    vf z = x * x;
    vf p = z * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    return choose(z < splat(0.390625f), p * z * x + x, 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f));
}

// --- rows of float32 or bf16 memory, seen as float32 ---

static inline uint16_t to_bf16(float x) {  // round to nearest even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? (uint16_t)((bits >> 16) | 0x40) : (uint16_t)rounded;
}

static inline void widen(float *to, const uint16_t *from, long n) {
    for (long i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(to + i, &bits, 4);
    }
}

// `n` values at element `offset`: float32 memory as it is, bf16 memory widened into `room`.
static inline const float *row_in(const void *base, long offset, long n, int bf16, float *room) {
    if (!bf16) return (const float *)base + offset;
    widen(room, (const uint16_t *)base + offset, n);
    return room;
}
// Where to compute a row of output, and, once it is there, bringing it into place.
static inline float *row_out(void *base, long offset, int bf16, float *room) {
    return bf16 ? room : (float *)base + offset;
}
static inline void row_done(void *base, long offset, long n, int bf16, const float *room) {
    if (!bf16) return;
    uint16_t *to = (uint16_t *)base + offset;
    for (long i = 0; i < n; i++) to[i] = to_bf16(room[i]);
}

static inline float *scratch(long floats) {
    long bytes = (floats * (long)sizeof(float) + 127) / 64 * 64;
    return (float *)aligned_alloc(64, bytes);
}

// --- C[m, PANEL] (+)= A[m, k] B[k, PANEL]; element (i, l) of A at a[i * a_row + l * a_step] ---

static inline __attribute__((always_inline)) void tile(
    const int rows, long k, const float *a, long a_row, long a_step, const float *b, long b_row, float *c, long c_row, int add) {
    vf left[TILE_ROWS], right[TILE_ROWS];
    for (int i = 0; i < rows; i++) {
        left[i] = add ? load(c + i * c_row) : (vf){0};
        right[i] = add ? load(c + i * c_row + LANES) : (vf){0};
    }
    for (long l = 0; l < k; l++) {
        vf b0 = load(b + l * b_row), b1 = load(b + l * b_row + LANES);
        for (int i = 0; i < rows; i++) {
            float x = a[i * a_row + l * a_step];
            left[i] += x * b0;
            right[i] += x * b1;
        }
    }
    for (int i = 0; i < rows; i++) {
        store(c + i * c_row, left[i]);
        store(c + i * c_row + LANES, right[i]);
    }
}

static inline void tile_rows(
    long m, long k, const float *a, long a_row, long a_step, const float *b, long b_row, float *c, long c_row, int add) {
#define CASE(n) case n: tile(n, k, a, a_row, a_step, b, b_row, c, c_row, add); return;
    switch (m) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if TILE_ROWS == 12
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
#undef CASE
}
