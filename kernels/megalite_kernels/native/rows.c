// Row-wise ops, forward and backward, on fp32 or bf16 memory with fp32 arithmetic: norm, gated activations, rotary
// positions, and the softmax of a block of logits (or of one shard of them) turned in place into its own gradient.
// Sums over rows go through a fixed number of partial sums, so the result does not depend on threads.
#include "simd.h"

#define EACH(j, n) for (long j = 0; j < (n); j += LANES)

// y = x · r · w with r = 1 / sqrt(mean(x²) + eps) a row; `offset` is added to w (1 for zero-centred weights).
void rms_norm_forward(
    int threads, int bf16, long rows, long width, float eps, float offset, const void *x, const void *w, void *y, float *r) {
#pragma omp parallel num_threads(threads)
    {
        float *x_room = scratch(width), *y_room = scratch(width), *w_room = scratch(width);
        const float *weight = row_in(w, 0, width, bf16, w_room);
#pragma omp for schedule(static)
        for (long i = 0; i < rows; i++) {
            const float *xi = row_in(x, i * width, width, bf16, x_room);
            float *yi = row_out(y, i * width, bf16, y_room);
            vf squares = {0};
            EACH(j, width) {
                vf a = load_part(xi + j, width - j);
                squares += a * a;
            }
            r[i] = 1.0f / sqrtf(sum_lanes(squares) / width + eps);
            EACH(j, width) {
                vf a = load_part(xi + j, width - j) * r[i] * (load_part(weight + j, width - j) + offset);
                store_part(yi + j, a, width - j);
            }
            row_done(y, i * width, width, bf16, yi);
        }
        free(x_room), free(y_room), free(w_room);
    }
}

// dw_parts[parts, width] receives sums of dy · x · r over equal runs of rows; dx = r (dy w - x r² mean(dy w x)).
void rms_norm_backward(
    int threads, int bf16, long rows, long width, long parts, float offset, const void *x, const void *w, const float *r,
    const void *dy, void *dx, float *dw_parts) {
#pragma omp parallel num_threads(threads)
    {
        float *x_room = scratch(width), *dy_room = scratch(width), *dx_room = scratch(width), *w_room = scratch(width);
        const float *weight = row_in(w, 0, width, bf16, w_room);
#pragma omp for schedule(static)
        for (long part = 0; part < parts; part++) {
            float *dw = dw_parts + part * width;
            memset(dw, 0, width * sizeof(float));
            for (long i = part * rows / parts; i < (part + 1) * rows / parts; i++) {
                const float *xi = row_in(x, i * width, width, bf16, x_room);
                const float *dyi = row_in(dy, i * width, width, bf16, dy_room);
                float *dxi = row_out(dx, i * width, bf16, dx_room);
                vf dots = {0};
                EACH(j, width) {
                    vf a = load_part(xi + j, width - j), g = load_part(dyi + j, width - j);
                    dots += a * g * (load_part(weight + j, width - j) + offset);
                    store_part(dw + j, load_part(dw + j, width - j) + a * r[i] * g, width - j);
                }
                float pull = sum_lanes(dots) / width * r[i] * r[i];
                EACH(j, width) {
                    vf a = load_part(xi + j, width - j), g = load_part(dyi + j, width - j);
                    vf wide = load_part(weight + j, width - j) + offset;
                    store_part(dxi + j, r[i] * (g * wide - a * pull), width - j);
                }
                row_done(dx, i * width, width, bf16, dxi);
            }
        }
        free(x_room), free(dy_room), free(dx_room), free(w_room);
    }
}

#define BLOCK 1024

// The activation and its slope: silu, or the tanh form of gelu.
static inline vf activate(int tanh_gelu, vf x, vf *slope) {
    if (!tanh_gelu) {
        vf s = sigmoid(x);
        *slope = s * (1.0f + x * (1.0f - s));
        return x * s;
    }
    vf inner = 0.7978845608f * (x + 0.044715f * x * x * x);
    vf t = hyperbolic_tangent(inner);
    *slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.7978845608f * (1.0f + 0.134145f * x * x);
    return 0.5f * x * (1.0f + t);
}

// y = activation(gate) · up
void gated_forward(int threads, int bf16, int tanh_gelu, long n, const void *gate, const void *up, void *y) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long start = 0; start < n; start += BLOCK) {
        float g_room[BLOCK], u_room[BLOCK], y_room[BLOCK];
        long count = n - start < BLOCK ? n - start : BLOCK;
        const float *g = row_in(gate, start, count, bf16, g_room), *u = row_in(up, start, count, bf16, u_room);
        float *out = row_out(y, start, bf16, y_room);
        EACH(j, count) {
            vf slope;
            vf a = activate(tanh_gelu, load_part(g + j, count - j), &slope);
            store_part(out + j, a * load_part(u + j, count - j), count - j);
        }
        row_done(y, start, count, bf16, out);
    }
}

void gated_backward(
    int threads, int bf16, int tanh_gelu, long n, const void *gate, const void *up, const void *dy, void *dgate, void *dup) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long start = 0; start < n; start += BLOCK) {
        float g_room[BLOCK], u_room[BLOCK], dy_room[BLOCK], dg_room[BLOCK], du_room[BLOCK];
        long count = n - start < BLOCK ? n - start : BLOCK;
        const float *g = row_in(gate, start, count, bf16, g_room), *u = row_in(up, start, count, bf16, u_room);
        const float *d = row_in(dy, start, count, bf16, dy_room);
        float *dg = row_out(dgate, start, bf16, dg_room), *du = row_out(dup, start, bf16, du_room);
        EACH(j, count) {
            vf slope, out = load_part(d + j, count - j);
            vf a = activate(tanh_gelu, load_part(g + j, count - j), &slope);
            store_part(dg + j, out * load_part(u + j, count - j) * slope, count - j);
            store_part(du + j, out * a, count - j);
        }
        row_done(dgate, start, count, bf16, dg);
        row_done(dup, start, count, bf16, du);
    }
}

// x[positions, heads, dim] turned by cos, sin[positions, rotated] (halves); `back`: the transpose, for the gradient.
void rope(
    int threads, int bf16, int back, long positions, long heads, long dim, long rotated, const float *cos_, const float *sin_,
    const void *x, void *y) {
    long half = rotated / 2;
#pragma omp parallel num_threads(threads)
    {
        float *x_room = scratch(dim), *y_room = scratch(dim);
#pragma omp for schedule(static)
        for (long i = 0; i < positions * heads; i++) {
            const float *c = cos_ + i / heads * rotated, *s = sin_ + i / heads * rotated;
            const float *a = row_in(x, i * dim, dim, bf16, x_room);
            float *out = row_out(y, i * dim, bf16, y_room);
            EACH(j, half) {
                long left = half - j;
                vf a0 = load_part(a + j, left), a1 = load_part(a + half + j, left);
                vf c0 = load_part(c + j, left), c1 = load_part(c + half + j, left);
                vf s0 = load_part(s + j, left), s1 = load_part(s + half + j, left);
                store_part(out + j, back ? a0 * c0 + a1 * s1 : a0 * c0 - a1 * s0, left);
                store_part(out + half + j, back ? a1 * c1 - a0 * s0 : a1 * c1 + a0 * s1, left);
            }
            memcpy(out + rotated, a + rotated, (dim - rotated) * sizeof(float));
            row_done(y, i * dim, dim, bf16, out);
        }
        free(x_room), free(y_room);
    }
}

// The largest value of a row, which becomes cap · tanh(row / cap); `slope`, if any, receives the derivative of that.
static inline float cap_and_peak(float *row, long width, float softcap, float *slope) {
    vf peak = splat(-INFINITY);
    EACH(j, width) {
        long left = width - j;
        vf x = load_part(row + j, left);
        if (softcap > 0) {
            vf t = hyperbolic_tangent(x / softcap);
            x = t * softcap;
            store_part(row + j, x, left);
            if (slope) store_part(slope + j, 1.0f - t * t, left);
        }
        peak = larger(keep(x, left, -INFINITY), peak);
    }
    return max_lanes(peak);
}

// Rows of logits[rows, width]: lse, and nll = lse - logit[target]; both 0 where the target is `ignore`.
// With `gradient`, the logits become d(nll + z_weight lse²)/d(product), the product being the logit before the cap.
void cross_entropy(
    int threads, long rows, long width, float *logits, const int64_t *targets, int64_t ignore, float softcap, float z_weight,
    int gradient, float *nll, float *lse) {
#pragma omp parallel num_threads(threads)
    {
        float *slope = softcap > 0 && gradient ? scratch(width) : NULL;
#pragma omp for schedule(static)
        for (long i = 0; i < rows; i++) {
            float *row = logits + i * width;
            if (targets[i] == ignore) {
                nll[i] = lse[i] = 0;
                if (gradient) memset(row, 0, width * sizeof(float));
                continue;
            }
            float top = cap_and_peak(row, width, softcap, slope), chosen = row[targets[i]];
            vf sums = {0};
            EACH(j, width) {
                long left = width - j;
                vf e = exponential(load_part(row + j, left) - top);
                if (gradient) store_part(row + j, e, left);
                sums += keep(e, left, 0);
            }
            float total = sum_lanes(sums);
            lse[i] = top + logf(total);
            nll[i] = lse[i] - chosen;
            if (!gradient) continue;
            float factor = (1.0f + 2.0f * z_weight * lse[i]) / total;
            EACH(j, width) store_part(row + j, load_part(row + j, width - j) * factor, width - j);
            row[targets[i]] -= 1.0f;
            if (slope) EACH(j, width) store_part(row + j, load_part(row + j, width - j) * load_part(slope + j, width - j), width - j);
        }
        free(slope);
    }
}

// A shard of the vocabulary, logits[rows, width] of the columns `first` …: lse of the shard's (capped) logits, and the
// target's logit, 0 where another shard has it; both 0 where the target is `ignore`.
void shard_sums(
    int threads, long rows, long width, long first, float *logits, const int64_t *targets, int64_t ignore, float softcap,
    float *lse, float *chosen) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < rows; i++) {
        float *row = logits + i * width;
        long column = targets[i] - first;
        lse[i] = chosen[i] = 0;
        if (targets[i] == ignore) continue;
        float top = cap_and_peak(row, width, softcap, NULL);
        vf sums = {0};
        EACH(j, width) sums += keep(exponential(load_part(row + j, width - j) - top), width - j, 0);
        lse[i] = top + logf(sum_lanes(sums));
        if (column >= 0 && column < width) chosen[i] = row[column];
    }
}

// The logits that `shard_sums` left become d(nll_weight nll + z_weight lse²)/d(product), with lse of all shards.
void shard_gradient(
    int threads, long rows, long width, long first, float *logits, const int64_t *targets, int64_t ignore, float softcap,
    float nll_weight, float z_weight, const float *lse) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < rows; i++) {
        float *row = logits + i * width;
        long column = targets[i] - first;
        if (targets[i] == ignore) {
            memset(row, 0, width * sizeof(float));
            continue;
        }
        float factor = nll_weight + 2.0f * z_weight * lse[i], pull = 0;
        if (column >= 0 && column < width) {
            float t = softcap > 0 ? row[column] / softcap : 0;
            pull = nll_weight * (1.0f - t * t);
        }
        EACH(j, width) {
            vf x = load_part(row + j, width - j), grad = exponential(x - lse[i]) * factor;
            vf t = softcap > 0 ? x / softcap : (vf){0};
            store_part(row + j, grad * (1.0f - t * t), width - j);
        }
        if (pull) row[column] -= pull;
    }
}
