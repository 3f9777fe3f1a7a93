// Group norm and layer norm. Sums, and the product that applies them, are in float64: the loops wait for
// memory anyway, and the result is then the rounded exact one.
#pragma once

#include "parallel.h"
#include "layout.h"
#include "simd.h"

namespace {

struct Moments {
    double sum, squares;  // of the values less `origin`
};

// Measured from one of the values, so that the squares do not cancel where the mean is large.
INLINE void add_moments(const float *input, int64_t count, double origin, Moments *moments) {
    vdouble sum[2] = {}, squares[2] = {};
    int64_t i = 0;
    for (; i + 2 * WIDTH64 <= count; i += 2 * WIDTH64) {
        vdouble a = load_wide(input + i) - origin, b = load_wide(input + i + WIDTH64) - origin;
        sum[0] += a;
        sum[1] += b;
        squares[0] += a * a;
        squares[1] += b * b;
    }
    double rest = 0, rest_squares = 0;
    for (; i < count; ++i) {
        const double a = input[i] - origin;
        rest += a;
        rest_squares += a * a;
    }
    moments->sum += sum_of(sum[0] + sum[1]) + rest;
    moments->squares += sum_of(squares[0] + squares[1]) + rest_squares;
}

// output = input * factor + offset, both of one channel, with SiLU or without.
INLINE void apply(const float *input, float *output, int64_t count, double factor, double offset, bool silu) {
    int64_t i = 0;
    for (; i + 2 * WIDTH64 <= count; i += 2 * WIDTH64) {
        store_narrow(output + i, load_wide(input + i) * factor + offset);
        store_narrow(output + i + WIDTH64, load_wide(input + i + WIDTH64) * factor + offset);
        if (silu) store(output + i, silu_of(load(output + i)));
    }
    const int64_t start = i;
    for (; i < count; ++i) output[i] = (float)(input[i] * factor + offset);
    if (silu && start < count) {
        const int64_t left = count - start;
        store_part(output + start, silu_of(load_part(output + start, left)), left);
    }
}

// `shift`, which may be null, is added to the input first: one value for each picture and channel. `tokens`:
// the output is (batch, pixels, channels) instead of (batch, channels, pixels).
int group_norm(const float *input, const float *weight, const float *bias, const float *shift, float *output,
               int64_t batch, int64_t channels, int64_t pixels, int64_t groups, double eps, bool silu,
               bool tokens) {
    const int64_t size = channels / groups;
    double *const factors = allocate<double>(2 * batch * channels);
    if (!factors) return OUT_OF_MEMORY;
    double *const offsets = factors + batch * channels;
    int failure = 0;
    const bool worth = batch * channels * pixels >= PARALLEL_FROM;
    each(batch * groups, worth, [=](int64_t group) {
        const int64_t first = group * size;  // channels counted over the whole batch
        const double origin = input[first * pixels] + (shift ? (double)shift[first] : 0.0);
        Moments moments = {};
        for (int64_t c = first; c < first + size; ++c)
            add_moments(input + c * pixels, pixels, shift ? origin - shift[c] : origin, &moments);
        const double mean = moments.sum / (size * pixels);
        double variance = moments.squares / (size * pixels) - mean * mean;
        if (variance < 0) variance = 0;
        const double scale = 1 / sqrt(variance + eps);
        for (int64_t c = first; c < first + size; ++c) {
            factors[c] = scale * weight[c % channels];
            offsets[c] = bias[c % channels] - (origin + mean - (shift ? shift[c] : 0.0)) * factors[c];
            if (!tokens) apply(input + c * pixels, output + c * pixels, pixels, factors[c], offsets[c], silu);
        }
    });
    if (tokens) {
        const int64_t blocks = parts(pixels, TILE);
        stretches(batch * blocks, 0, worth, [&](int64_t begin, int64_t end) {
            float *const tile = allocate<float>(channels * TILE);
            if (!tile) {
                __atomic_store_n(&failure, OUT_OF_MEMORY, __ATOMIC_RELAXED);
                return;
            }
            for (int64_t task = begin; task < end; ++task) {
                const int64_t picture = task / blocks, start = task % blocks * TILE;
                const int64_t count = least(TILE, pixels - start);
                for (int64_t c = 0; c < channels; ++c) {
                    const int64_t channel = picture * channels + c;
                    apply(input + channel * pixels + start, tile + c * TILE, count, factors[channel],
                          offsets[channel], silu);
                }
                transpose(tile, TILE, output + (picture * pixels + start) * channels, channels, channels,
                          count);
            }
            free(tile);
        });
    }
    free(factors);
    return failure;
}

int layer_norm(const float *input, const float *weight, const float *bias, float *output, int64_t rows,
               int64_t columns, double eps) {
    each(rows, rows * columns >= PARALLEL_FROM, [=](int64_t row) {
        const float *from = input + row * columns;
        float *to = output + row * columns;
        const double origin = from[0];
        Moments moments = {};
        add_moments(from, columns, origin, &moments);
        const double mean = moments.sum / columns;
        double variance = moments.squares / columns - mean * mean;
        if (variance < 0) variance = 0;
        const double scale = 1 / sqrt(variance + eps), shift = -(origin + mean) * scale;
        int64_t j = 0;
        for (; j + WIDTH64 <= columns; j += WIDTH64) {
            vdouble normal = load_wide(from + j) * scale + shift;
            store_narrow(to + j, normal * load_wide(weight + j) + load_wide(bias + j));
        }
        for (; j < columns; ++j) to[j] = (float)((from[j] * scale + shift) * weight[j] + bias[j]);
    });
    return 0;
}

}  // namespace
