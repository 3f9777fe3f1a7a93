// softmax(scale * query key^T) value, without ever storing more than a tile of scores.
//
// Keys and values are first copied into panels, in the order in which the products read them: as much memory
// as the two tensors. Then each task takes 64 queries of one head through all tiles of keys, with the running
// maximum and sum of each query. The tiles depend on the shapes only, so the number of threads does not
// change the result.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace {

const int64_t QUERIES = 64;               // queries of a task
const int64_t KEYS = 288;                 // keys of a tile: whole panels of every instruction set
const int64_t SCORES_STRIDE = KEYS + 16;  // not a power of two: rows would share cache sets
static_assert(KEYS % (3 * WIDTH) == 0, "a tile is made of whole panels");

// One head's keys from `first`, transposed: for each panel of 1 to 3 vectors of keys, `size` rows. Columns
// beyond the last key are zero.
INLINE void pack_keys(const float *key, int64_t stride, int64_t count, int64_t size, float *packed) {
    for (int64_t left = parts(count, WIDTH), start = 0; left > 0;) {
        const int64_t vectors = panel(left), columns = vectors * WIDTH;
        for (int64_t j = 0; j < columns; ++j) {
            const float *from = key + (start + j) * stride;
            if (start + j < count)
                for (int64_t k = 0; k < size; ++k) packed[k * columns + j] = from[k];
            else
                for (int64_t k = 0; k < size; ++k) packed[k * columns + j] = 0;
        }
        packed += size * columns;
        start += columns;
        left -= vectors;
    }
}

// The same of values, which have their rows already: for each panel of columns, `count` rows.
INLINE void pack_values(const float *value, int64_t stride, int64_t count, int64_t size, float *packed) {
    for (int64_t left = parts(size, WIDTH), start = 0; left > 0;) {
        const int64_t vectors = panel(left), columns = vectors * WIDTH;
        const int64_t here = least(columns, size - start);
        for (int64_t k = 0; k < count; ++k) {
            const float *from = value + k * stride + start;
            for (int64_t j = 0; j < here; ++j) packed[j] = from[j];
            for (int64_t j = here; j < columns; ++j) packed[j] = 0;
            packed += columns;
        }
        start += columns;
        left -= vectors;
    }
}

template <int VECTORS>
INLINE void score_panel(const float *query, int64_t stride, int64_t rows, int64_t size, const float *packed,
                        float *scores) {
    for (int64_t row = 0; row < rows; row += BLOCK_ROWS) {
        vfloat sum[BLOCK_ROWS][VECTORS];
        multiply<Single>(sum, size, query + row * stride, stride,
                         [=](int64_t k) { return packed + k * VECTORS * WIDTH; });
#pragma GCC unroll 8
        for (int r = 0; r < BLOCK_ROWS; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) store(scores + (row + r) * SCORES_STRIDE + v * WIDTH, sum[r][v]);
    }
}

// output = output * decay + weights * values. The sum over one tile is complete before it is added: sums of
// sums lose less than one long sum.
template <int VECTORS>
INLINE void value_panel(const float *weights, const float *decay, int64_t rows, int64_t count,
                        const float *packed, float *output, int64_t stride) {
    for (int64_t row = 0; row < rows; row += BLOCK_ROWS) {
        vfloat sum[BLOCK_ROWS][VECTORS];
        multiply<Single>(sum, count, weights + row * SCORES_STRIDE, SCORES_STRIDE,
                         [=](int64_t k) { return packed + k * VECTORS * WIDTH; });
#pragma GCC unroll 8
        for (int r = 0; r < BLOCK_ROWS; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) {
                float *to = output + (row + r) * stride + v * WIDTH;
                store(to, load(to) * decay[row + r] + sum[r][v]);
            }
    }
}

// Scores to weights, for one query and one tile: exp(scale * (score - maximum)), with the running maximum and
// sum brought up to date. Returns the factor for what has been summed before.
INLINE float soften(float *scores, int64_t count, float scale, float *maximum, float *sum) {
    const int64_t columns = round_up(count, WIDTH);
    for (int64_t j = count; j < columns; ++j) scores[j] = -INFINITY;
    // Two maxima, so that one does not wait for the other. A NaN is not seen here, but by the exponential.
    vfloat largest = spread(*maximum), other = largest;
    int64_t j = 0;
    for (; j + 2 * WIDTH <= columns; j += 2 * WIDTH) {
        vfloat a = load(scores + j), b = load(scores + j + WIDTH);
        largest = select(a > largest, a, largest);
        other = select(b > other, b, other);
    }
    if (j < columns) {
        vfloat a = load(scores + j);
        largest = select(a > largest, a, largest);
    }
    largest = select(other > largest, other, largest);
    float now = largest[0];
    for (int64_t i = 1; i < WIDTH; ++i) now = largest[i] > now ? largest[i] : now;

    vfloat total = {};
    for (j = 0; j < columns; j += WIDTH) {
        // The difference first: it is nearly exact, and the scale's rounding then touches small numbers only.
        vfloat weight = exp2_small((load(scores + j) - now) * scale);
        store(scores + j, weight);
        total += weight;
    }
    const float decay = exp2_small(spread((*maximum - now) * scale))[0];
    *maximum = now;
    *sum = *sum * decay + sum_of(total);
    return decay;
}

int attention(const float *query, const float *key, const float *value, float *output, int64_t batch,
              int64_t queries, int64_t keys, int64_t heads, int64_t size, double scale) {
    const int64_t width = heads * size;            // of a token, in all three tensors
    const int64_t padded = round_up(size, WIDTH);  // columns of a packed value
    const int64_t padded_keys = round_up(keys, WIDTH);
    const int64_t tiles = parts(keys, KEYS), blocks = parts(queries, QUERIES);
    const int64_t row = round_up(size, 16) + 16;  // floats from one copied query to the next
    // Powers of two: the weights are 2**(binary * score).
    const float binary = (float)(fabs(scale) * 1.4426950408889634);
    const float sign = scale < 0 ? -1.0f : 1.0f;

    float *packed_keys = allocate<float>(batch * heads * padded_keys * size);
    float *packed_values = allocate<float>(batch * heads * keys * padded);
    int failure = packed_keys && packed_values ? 0 : OUT_OF_MEMORY;

    if (!failure) {
        const bool worth = batch * width * (queries + keys) >= PARALLEL_FROM;
        each(batch * heads * tiles, worth, [=](int64_t task) {
            const int64_t head = task / tiles, tile = task % tiles;
            const int64_t first = tile * KEYS, count = least(KEYS, keys - first);
            const int64_t at = ((head / heads) * keys + first) * width + (head % heads) * size;
            pack_keys(key + at, width, count, size, packed_keys + (head * padded_keys + first) * size);
            pack_values(value + at, width, count, size, packed_values + (head * keys + first) * padded);
        });

        const int64_t space = QUERIES * (row + SCORES_STRIDE + padded + 3);
        // Two tasks at a time: the last ones are short enough for the threads to end together.
        stretches(batch * heads * blocks, 2, worth, [&](int64_t begin, int64_t end) {
            float *const scratch = allocate<float>(space);
            if (!scratch) {
                __atomic_store_n(&failure, OUT_OF_MEMORY, __ATOMIC_RELAXED);
                return;
            }
            float *const copied = scratch, *const scores = copied + QUERIES * row;
            float *const sums = scores + QUERIES * SCORES_STRIDE, *const decay = sums + QUERIES * padded;
            float *const maxima = decay + QUERIES, *const totals = maxima + QUERIES;

            for (int64_t task = begin; task < end; ++task) {
                const int64_t head = task / blocks, first = task % blocks * QUERIES;
                const int64_t rows = least(QUERIES, queries - first), all = round_up(rows, BLOCK_ROWS);
                const int64_t at = ((head / heads) * queries + first) * width + (head % heads) * size;
                for (int64_t r = 0; r < all; ++r) {
                    const float *from = query + at + r * width;
                    if (r < rows)
                        for (int64_t k = 0; k < size; ++k) copied[r * row + k] = sign * from[k];
                    else
                        for (int64_t k = 0; k < size; ++k) copied[r * row + k] = 0;
                    maxima[r] = -INFINITY;
                    totals[r] = 0;
                }
                memset(sums, 0, sizeof(float) * all * padded);

                for (int64_t tile = 0; tile < tiles; ++tile) {
                    const int64_t start = tile * KEYS, count = least(KEYS, keys - start);
                    const float *from = packed_keys + (head * padded_keys + start) * size;
                    float *to = scores;
                    for (int64_t left = parts(count, WIDTH); left > 0;) {
                        const int64_t vectors = panel(left);
                        if (vectors == 3)
                            score_panel<3>(copied, row, all, size, from, to);
                        else if (vectors == 2)
                            score_panel<2>(copied, row, all, size, from, to);
                        else
                            score_panel<1>(copied, row, all, size, from, to);
                        from += size * vectors * WIDTH;
                        to += vectors * WIDTH;
                        left -= vectors;
                    }
                    for (int64_t r = 0; r < all; ++r)
                        decay[r] = soften(scores + r * SCORES_STRIDE, count, binary, maxima + r, totals + r);
                    from = packed_values + (head * keys + start) * padded;
                    to = sums;
                    for (int64_t left = parts(size, WIDTH); left > 0;) {
                        const int64_t vectors = panel(left);
                        if (vectors == 3)
                            value_panel<3>(scores, decay, all, count, from, to, padded);
                        else if (vectors == 2)
                            value_panel<2>(scores, decay, all, count, from, to, padded);
                        else
                            value_panel<1>(scores, decay, all, count, from, to, padded);
                        from += count * vectors * WIDTH;
                        to += vectors * WIDTH;
                        left -= vectors;
                    }
                }
                for (int64_t r = 0; r < rows; ++r)
                    for (int64_t k = 0; k < size; ++k)
                        output[at + r * width + k] = sums[r * padded + k] / totals[r];
            }
            free(scratch);
        });
    }
    free(packed_keys);
    free(packed_values);
    return failure;
}

}  // namespace
