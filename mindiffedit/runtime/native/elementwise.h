// Activations: memory-bound once the functions of simd.h are vectors.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace {

const int64_t STRETCH = 1 << 14;  // floats of one task

template <class Function>
INLINE void map(const float *input, float *output, int64_t count, Function function) {
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) store(output + i, function(load(input + i)));
    if (i < count) store_part(output + i, function(load_part(input + i, count - i)), count - i);
}

int gelu(const float *input, float *output, int64_t count) {
    stretches(count, STRETCH, count >= PARALLEL_FROM, [=](int64_t start, int64_t end) {
        map(input + start, output + start, end - start, [](vfloat x) { return gelu_of(x); });
    });
    return 0;
}

int silu(const float *input, float *output, int64_t count) {
    stretches(count, STRETCH, count >= PARALLEL_FROM, [=](int64_t start, int64_t end) {
        map(input + start, output + start, end - start, [](vfloat x) { return silu_of(x); });
    });
    return 0;
}

// rows x (2 * columns) to rows x columns: the first half times gelu of the second. The bias, which may be null,
// is added first.
int geglu(const float *input, const float *bias, float *output, int64_t rows, int64_t columns) {
    each(rows, rows * columns >= PARALLEL_FROM, [=](int64_t row) {
        const float *plain = input + row * 2 * columns, *gate = plain + columns;
        float *to = output + row * columns;
        int64_t j = 0;
        if (bias) {
            const float *add = bias + columns;
            for (; j + WIDTH <= columns; j += WIDTH)
                store(to + j, (load(plain + j) + load(bias + j)) * gelu_of(load(gate + j) + load(add + j)));
            if (j < columns) {
                const int64_t left = columns - j;
                vfloat factor = load_part(plain + j, left) + load_part(bias + j, left);
                store_part(to + j, factor * gelu_of(load_part(gate + j, left) + load_part(add + j, left)),
                           left);
            }
            return;
        }
        for (; j + WIDTH <= columns; j += WIDTH) store(to + j, load(plain + j) * gelu_of(load(gate + j)));
        if (j < columns) {
            const int64_t left = columns - j;
            store_part(to + j, load_part(plain + j, left) * gelu_of(load_part(gate + j, left)), left);
        }
    });
    return 0;
}

}  // namespace
