// Rows of tokens copied to the places of their slots and summed back, with probabilities, on fp32 or bf16 memory.
// `place[tokens, slots]` names the row of each slot, or -1 where it has none; no two slots share a row.
#include "simd.h"

#define EACH(j, n) for (long j = 0; j < (n); j += LANES)

// Slots sorted by expert, each expert's filled up to a multiple of `pad_to`: offsets[experts + 1], and each slot's place.
void moe_places(
    int threads, long slots, long experts, long pad_to, const int64_t *expert, int32_t *offsets, int32_t *place) {
    int32_t *next = calloc(experts + 1, sizeof(int32_t));
    for (long s = 0; s < slots; s++)
        if (expert[s] >= 0 && expert[s] < experts) next[expert[s] + 1]++;
    for (long e = 0; e <= experts; e++) {
        next[e] = (next[e] + pad_to - 1) / pad_to * pad_to + (e ? next[e - 1] : 0);
        offsets[e] = next[e];
    }
    for (long s = 0; s < slots; s++) place[s] = expert[s] >= 0 && expert[s] < experts ? next[expert[s]]++ : -1;
    free(next);
}

// rows[place] = x of the slot's token
void moe_spread(
    int threads, int bf16, long tokens, long slots, long width, const void *x, const int32_t *place, void *rows) {
    long bytes = width * (bf16 ? 2 : 4);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < tokens; n++)
        for (long j = 0; j < slots; j++) {
            long row = place[n * slots + j];
            if (row >= 0) memcpy((char *)rows + row * bytes, (const char *)x + n * bytes, bytes);
        }
}

// y = the sum over a token's slots, in their order, of rows[place] · prob; without `probs` of rows[place].
void moe_sum(
    int threads, int bf16, long tokens, long slots, long width, const void *rows, const int32_t *place,
    const float *probs, void *y) {
#pragma omp parallel num_threads(threads)
    {
        float *room = scratch(width), *y_room = scratch(width);
#pragma omp for schedule(static)
        for (long n = 0; n < tokens; n++) {
            float *out = row_out(y, n * width, bf16, y_room);
            memset(out, 0, width * sizeof(float));
            for (long j = 0; j < slots; j++) {
                long slot = n * slots + j;
                if (place[slot] < 0) continue;
                const float *row = row_in(rows, place[slot] * width, width, bf16, room);
                float prob = probs ? probs[slot] : 1.0f;
                EACH(i, width) store_part(out + i, load_part(out + i, width - i) + load_part(row + i, width - i) * prob, width - i);
            }
            row_done(y, n * width, width, bf16, out);
        }
        free(room), free(y_room);
    }
}

// Of moe_sum with probabilities: drows[place] = dy · prob, dprob = dy · rows[place] (0 where there is no row).
void moe_sum_backward(
    int threads, int bf16, long tokens, long slots, long width, const void *dy, const int32_t *place, const float *probs,
    const void *rows, void *drows, float *dprobs) {
#pragma omp parallel num_threads(threads)
    {
        float *dy_room = scratch(width), *room = scratch(width), *out_room = scratch(width);
#pragma omp for schedule(static)
        for (long n = 0; n < tokens; n++) {
            const float *upstream = row_in(dy, n * width, width, bf16, dy_room);
            for (long j = 0; j < slots; j++) {
                long slot = n * slots + j, at = place[slot] * width;
                dprobs[slot] = 0;
                if (place[slot] < 0) continue;
                const float *row = row_in(rows, at, width, bf16, room);
                float *out = row_out(drows, at, bf16, out_room);
                vf dots = {0};
                EACH(i, width) {
                    vf g = load_part(upstream + i, width - i);
                    dots += g * load_part(row + i, width - i);
                    store_part(out + i, g * probs[slot], width - i);
                }
                dprobs[slot] = sum_lanes(dots);
                row_done(drows, at, width, bf16, out);
            }
        }
        free(dy_room), free(room), free(out_room);
    }
}
