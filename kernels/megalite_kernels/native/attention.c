// Exact attention in blocks that stay in cache, forward and backward, fp32 arithmetic on fp32 or bf16 memory.
// Query i sees the keys [low[i], high[i]), both non-decreasing in i: causal, windowed and packed documents alike.
// Work is one (batch, query head) at a time; nothing is shared between them, so the result does not depend on threads.
#include "simd.h"

#define QUERIES 64                // rows of a block
#define KEYS 256                  // columns of a block; a multiple of PANEL
#define STRIDE (KEYS + 16)        // a block's row stride, off powers of two so that columns do not collide in the cache
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define ROUND_UP(n, to) (((n) + (to)-1) / (to) * (to))

typedef struct {
    long batch, queries, keys, heads, key_heads, dim;
    float scale, softcap;  // softcap 0: none
    int bf16;
    const int32_t *low, *high;  // [batch, queries]
    const float *grad_lse;      // [batch, heads, queries]; NULL: none
} Shape;

// Head `h` of x[batch, n, heads, dim] as n rows of `width` floats, zero beyond dim.
static void pack_rows(const Shape *s, const void *x, long b, long n, long heads, long h, long first, long count, long width, float *to) {
    for (long i = 0; i < count; i++) {
        long offset = ((b * n + first + i) * heads + h) * s->dim;
        float *row = to + i * width;
        if (s->bf16) widen(row, (const uint16_t *)x + offset, s->dim);
        else memcpy(row, (const float *)x + offset, s->dim * sizeof(float));
        memset(row + s->dim, 0, (width - s->dim) * sizeof(float));
    }
}

// rows[n, width] -> panels[n / PANEL][width][PANEL]: the right-hand side of a product with rowsᵀ, read in order.
static void pack_panels(const float *rows, long n, long width, float *to) {
    for (long j = 0; j < n; j += PANEL, to += width * PANEL)
        for (long l = 0; l < width; l++)
            for (long c = 0; c < PANEL; c++) to[l * PANEL + c] = j + c < n ? rows[(j + c) * width + l] : 0.0f;
}

// block[rows, KEYS] = a[rows, width] · panelsᵀ for keys [first, last), skipping tiles that no row of theirs sees.
static void products(
    const float *a, long width, const float *panels, long rows, const int32_t *low, const int32_t *high,
    long first, long last, float *block) {
    long from = 0, to = 0;
    for (long j = first / PANEL * PANEL; j < last; j += PANEL) {
        while (from < rows && high[from] <= j) from++;
        while (to < rows && low[to] < j + PANEL) to++;
        for (long i = from; i < to; i += TILE_ROWS)
            tile_rows(MIN(TILE_ROWS, to - i), width, a + i * width, width, 1, panels + j * width, PANEL,
                      block + i * STRIDE + (j - first / PANEL * PANEL), STRIDE, 0);
    }
}

// out[rows, width] += block[rows, keys] · values[keys, width], each tile of rows over the keys it sees.
static void gather(
    const float *block, long rows, const int32_t *low, const int32_t *high, long first, long last,
    const float *values, long width, float *out) {
    for (long i = 0; i < rows; i += TILE_ROWS) {
        long n = MIN(TILE_ROWS, rows - i);
        long start = MAX(first, low[i]), stop = MIN(last, high[i + n - 1]);
        if (start >= stop) continue;
        const float *a = block + i * STRIDE + (start - first / PANEL * PANEL);
        for (long c = 0; c < width; c += PANEL)
            tile_rows(n, stop - start, a, STRIDE, 1, values + start * width + c, width, out + i * width + c, width, 1);
    }
}

// out[keys, width] += blockᵀ · x[rows, width], each tile of keys over the rows that see it.
static void scatter(
    const float *block, long rows, const int32_t *low, const int32_t *high, long first, long last,
    const float *x, long width, float *out) {
    long from = 0, to = 0;
    for (long j = first; j < last; j += TILE_ROWS) {
        long n = MIN(TILE_ROWS, last - j);
        while (from < rows && high[from] <= j) from++;
        while (to < rows && low[to] < j + n) to++;
        if (from >= to) continue;
        const float *a = block + from * STRIDE + (j - first / PANEL * PANEL);
        for (long c = 0; c < width; c += PANEL)
            tile_rows(n, to - from, a, 1, STRIDE, x + from * width + c, width, out + j * width + c, width, 1);
    }
}

// Scores as the softmax sees them: scaled, and capped when asked.
static inline vf score(const Shape *s, vf product) {
    vf x = product * s->scale;
    return s->softcap > 0 ? s->softcap * hyperbolic_tangent(x / s->softcap) : x;
}

typedef struct { long start, stop; } Span;

// The columns of a block that a row sees, counted from the block's first column; start == stop when none.
static Span span(long low, long high, long first, long last) {
    long base = first / PANEL * PANEL;
    Span seen = {MAX(low, first) - base, MIN(high, last) - base};
    return seen.start < seen.stop ? seen : (Span){0, 0};
}

// Zeros in a block's row outside its span: the products that follow read whole tiles.
static void clear_outside(float *row, Span seen, long first, long last) {
    memset(row, 0, seen.start * sizeof(float));
    memset(row + seen.stop, 0, (ROUND_UP(last - first / PANEL * PANEL, PANEL) - seen.stop) * sizeof(float));
}

static void forward_head(
    const Shape *s, const void *q, long b, long h, const float *key_panels, const float *values, long width,
    float *block, float *q_block, float *out, void *o, float *lse) {
    for (long i0 = 0; i0 < s->queries; i0 += QUERIES) {
        long rows = MIN(QUERIES, s->queries - i0);
        const int32_t *low = s->low + b * s->queries + i0, *high = s->high + b * s->queries + i0;
        float top[QUERIES], total[QUERIES];
        for (long i = 0; i < rows; i++) top[i] = -INFINITY, total[i] = 0;
        memset(out, 0, QUERIES * width * sizeof(float));
        pack_rows(s, q, b, s->queries, s->heads, h, i0, rows, width, q_block);
        for (long first = low[0]; first < high[rows - 1]; first = first / KEYS * KEYS + KEYS) {
            long last = MIN(first / KEYS * KEYS + KEYS, high[rows - 1]);
            products(q_block, width, key_panels, rows, low, high, first, last, block);
            for (long i = 0; i < rows; i++) {
                float *row = block + i * STRIDE;
                Span seen = span(low[i], high[i], first, last);
                vf peak = splat(-INFINITY), sum = {0};
                for (long j = seen.start; j < seen.stop; j += LANES) {
                    vf x = score(s, load(row + j));
                    store(row + j, x);
                    peak = larger(keep(x, seen.stop - j, -INFINITY), peak);
                }
                float new_top = MAX(top[i], max_lanes(peak));
                float shrink = top[i] == -INFINITY ? 0.0f : expf(top[i] - new_top);
                for (long j = seen.start; j < seen.stop; j += LANES) {
                    vf p = keep(exponential(load(row + j) - new_top), seen.stop - j, 0);
                    store(row + j, p);
                    sum += p;
                }
                clear_outside(row, seen, first, last);
                if (seen.start == seen.stop) continue;
                if (total[i] > 0 && shrink != 1.0f)
                    for (long c = 0; c < width; c += LANES) store(out + i * width + c, load(out + i * width + c) * shrink);
                total[i] = total[i] * shrink + sum_lanes(sum);
                top[i] = new_top;
            }
            gather(block, rows, low, high, first, last, values, width, out);
        }
        for (long i = 0; i < rows; i++) {
            long offset = ((b * s->queries + i0 + i) * s->heads + h) * s->dim;
            float inverse = total[i] == 0 ? 0.0f : 1.0f / total[i];
            for (long c = 0; c < width; c += LANES) store(out + i * width + c, load(out + i * width + c) * inverse);
            if (!s->bf16) memcpy((float *)o + offset, out + i * width, s->dim * sizeof(float));
            else row_done(o, offset, s->dim, 1, out + i * width);
            lse[(b * s->heads + h) * s->queries + i0 + i] = total[i] == 0 ? -INFINITY : top[i] + logf(total[i]);
        }
    }
}

void attention_forward(
    int threads, const Shape *s, const void *q, const void *k, const void *v, void *o, float *lse) {
    long width = ROUND_UP(s->dim, PANEL), padded = ROUND_UP(s->keys, PANEL);
#pragma omp parallel num_threads(threads)
    {
        float *values = scratch(padded * width), *panels = scratch(padded * width);
        float *block = scratch(QUERIES * STRIDE), *q_block = scratch(QUERIES * width), *out = scratch(QUERIES * width);
        long packed = -1;
#pragma omp for schedule(static)
        for (long task = 0; task < s->batch * s->heads; task++) {
            long b = task / s->heads, h = task % s->heads, kh = h / (s->heads / s->key_heads);
            if (packed != b * s->key_heads + kh) {
                pack_rows(s, k, b, s->keys, s->key_heads, kh, 0, s->keys, width, values);
                pack_panels(values, s->keys, width, panels);
                pack_rows(s, v, b, s->keys, s->key_heads, kh, 0, s->keys, width, values);
                packed = b * s->key_heads + kh;
            }
            forward_head(s, q, b, h, panels, values, width, block, q_block, out, o, lse);
        }
        free(values), free(panels), free(block), free(q_block), free(out);
    }
}

// What one head's backward pass reads (k, v as rows and panels) and its working room.
typedef struct {
    float *keys, *key_panels, *value_panels, *p, *ds, *q, *o, *go, *dq;
} Room;

static void backward_head(
    const Shape *s, const Room *r, const void *q, const void *o, const void *go, const float *lse, long b, long h,
    long width, void *dq, float *dk, float *dv) {
    for (long i0 = 0; i0 < s->queries; i0 += QUERIES) {
        long rows = MIN(QUERIES, s->queries - i0);
        const int32_t *low = s->low + b * s->queries + i0, *high = s->high + b * s->queries + i0;
        const float *row_lse = lse + (b * s->heads + h) * s->queries + i0;
        const float *grad_lse = s->grad_lse ? s->grad_lse + (b * s->heads + h) * s->queries + i0 : NULL;
        float delta[QUERIES];
        pack_rows(s, q, b, s->queries, s->heads, h, i0, rows, width, r->q);
        pack_rows(s, o, b, s->queries, s->heads, h, i0, rows, width, r->o);
        pack_rows(s, go, b, s->queries, s->heads, h, i0, rows, width, r->go);
        for (long i = 0; i < rows; i++) {
            vf sum = {0};
            for (long c = 0; c < width; c += LANES) sum += load(r->o + i * width + c) * load(r->go + i * width + c);
            delta[i] = sum_lanes(sum) - (grad_lse ? grad_lse[i] : 0.0f);
        }
        memset(r->dq, 0, QUERIES * width * sizeof(float));
        for (long first = low[0]; first < high[rows - 1]; first = first / KEYS * KEYS + KEYS) {
            long last = MIN(first / KEYS * KEYS + KEYS, high[rows - 1]);
            products(r->q, width, r->key_panels, rows, low, high, first, last, r->p);
            products(r->go, width, r->value_panels, rows, low, high, first, last, r->ds);
            for (long i = 0; i < rows; i++) {
                float *p = r->p + i * STRIDE, *ds = r->ds + i * STRIDE;
                Span seen = span(low[i], high[i], first, last);
                for (long j = seen.start; j < seen.stop; j += LANES) {
                    vf x = score(s, load(p + j));
                    vf probability = exponential(x - row_lse[i]);
                    vf slope = probability * (load(ds + j) - delta[i]) * s->scale;
                    if (s->softcap > 0) slope *= 1.0f - (x / s->softcap) * (x / s->softcap);
                    store(p + j, probability);
                    store(ds + j, slope);
                }
                clear_outside(p, seen, first, last);
                clear_outside(ds, seen, first, last);
            }
            gather(r->ds, rows, low, high, first, last, r->keys, width, r->dq);
            scatter(r->p, rows, low, high, first, last, r->go, width, dv);
            scatter(r->ds, rows, low, high, first, last, r->q, width, dk);
        }
        for (long i = 0; i < rows; i++) {
            long offset = ((b * s->queries + i0 + i) * s->heads + h) * s->dim;
            if (!s->bf16) memcpy((float *)dq + offset, r->dq + i * width, s->dim * sizeof(float));
            else row_done(dq, offset, s->dim, 1, r->dq + i * width);
        }
    }
}

// x[batch, keys, key_heads, dim] = sum over each group's heads of parts[batch, heads, keys, width], in order.
static void reduce_groups(const Shape *s, const float *parts, long width, long b, long kh, float *room, void *x) {
    long group = s->heads / s->key_heads;
    for (long t = 0; t < s->keys; t++) {
        const float *part = parts + ((b * s->heads + kh * group) * s->keys + t) * width;
        for (long c = 0; c < width; c += LANES) {
            vf sum = load(part + c);
            for (long g = 1; g < group; g++) sum += load(part + g * s->keys * width + c);
            store(room + c, sum);
        }
        long offset = ((b * s->keys + t) * s->key_heads + kh) * s->dim;
        if (!s->bf16) memcpy((float *)x + offset, room, s->dim * sizeof(float));
        else row_done(x, offset, s->dim, 1, room);
    }
}

// `parts`: room for 2 · batch · heads · keys · width floats (width = dim rounded up to attention_width).
long attention_width(long dim) { return ROUND_UP(dim, PANEL); }

void attention_backward(
    int threads, const Shape *s, const void *q, const void *k, const void *v, const void *o, const void *go, const float *lse,
    float *parts, void *dq, void *dk, void *dv) {
    long width = ROUND_UP(s->dim, PANEL), padded = ROUND_UP(s->keys, PANEL), head = s->keys * width;
    float *dk_parts = parts, *dv_parts = parts + s->batch * s->heads * head;
#pragma omp parallel num_threads(threads)
    {
        Room r = {scratch(padded * width), scratch(padded * width), scratch(padded * width), scratch(QUERIES * STRIDE),
                  scratch(QUERIES * STRIDE), scratch(QUERIES * width), scratch(QUERIES * width), scratch(QUERIES * width),
                  scratch(QUERIES * width)};
        long packed = -1;
#pragma omp for schedule(static)
        for (long task = 0; task < s->batch * s->heads; task++) {
            long b = task / s->heads, h = task % s->heads, kh = h / (s->heads / s->key_heads);
            if (packed != b * s->key_heads + kh) {
                pack_rows(s, v, b, s->keys, s->key_heads, kh, 0, s->keys, width, r.keys);
                pack_panels(r.keys, s->keys, width, r.value_panels);
                pack_rows(s, k, b, s->keys, s->key_heads, kh, 0, s->keys, width, r.keys);
                pack_panels(r.keys, s->keys, width, r.key_panels);
                packed = b * s->key_heads + kh;
            }
            memset(dk_parts + task * head, 0, head * sizeof(float));
            memset(dv_parts + task * head, 0, head * sizeof(float));
            backward_head(s, &r, q, o, go, lse, b, h, width, dq, dk_parts + task * head, dv_parts + task * head);
        }
#pragma omp for schedule(static)
        for (long task = 0; task < s->batch * s->key_heads; task++) {
            reduce_groups(s, dk_parts, width, task / s->key_heads, task % s->key_heads, r.q, dk);
            reduce_groups(s, dv_parts, width, task / s->key_heads, task % s->key_heads, r.q, dv);
        }
        free(r.keys), free(r.key_panels), free(r.value_panels), free(r.p), free(r.ds), free(r.q), free(r.o), free(r.go), free(r.dq);
    }
}
