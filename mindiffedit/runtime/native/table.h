// What operators.cpp needs to know of the kernels: one table of functions per instruction set.
//
// kernels.cpp is compiled once per instruction set, each time with other compiler flags and another value of
// KERNELS, the name of its table. Only that table leaves the object file. Nothing here may define a function:
// an inline function compiled for AVX-512 could be the copy that the linker keeps for the baseline too.
#pragma once

#include <stdint.h>

struct Kernels {
    // All tensors are float32, contiguous. Each function returns 0, or OUT_OF_MEMORY.
    int (*attention)(const float *query, const float *key, const float *value, float *output, int64_t batch,
                     int64_t queries, int64_t keys, int64_t heads, int64_t size, double scale);
    int (*geglu)(const float *input, const float *bias, float *output, int64_t rows, int64_t columns);
    int (*gelu)(const float *input, float *output, int64_t count);
    int (*silu)(const float *input, float *output, int64_t count);
    int (*group_norm)(const float *input, const float *weight, const float *bias, const float *shift,
                      float *output, int64_t batch, int64_t channels, int64_t pixels, int64_t groups,
                      double eps, bool silu, bool tokens);
    int (*layer_norm)(const float *input, const float *weight, const float *bias, float *output, int64_t rows,
                      int64_t columns, double eps);
    int (*tokens_to_image)(const float *tokens, const float *residual, float *output, int64_t batch,
                           int64_t channels, int64_t pixels);
    int (*image_to_tokens)(const float *image, float *output, int64_t batch, int64_t channels, int64_t pixels);
    int (*conv2d)(const float *input, const float *weight, const float *bias, float *output, int64_t batch,
                  int64_t channels, int64_t height, int64_t width, int64_t filters, int64_t kernel_rows,
                  int64_t kernel_columns, int64_t stride, int64_t padding);
    int (*bias_add)(const float *input, const float *bias, const float *residual, float *output,
                    int64_t batch, int64_t channels, int64_t pixels);
    int (*bias_add_tokens)(const float *input, const float *bias, const float *residual, float *output,
                           int64_t rows, int64_t columns);
    int (*concat)(const float *first, const float *second, float *output, int64_t batch, int64_t first_size,
                  int64_t second_size);
    int (*upsample)(const float *input, float *output, int64_t planes, int64_t height, int64_t width);
};

enum { OUT_OF_MEMORY = 2 };

// Work below this many elements is not worth waking the other threads (some microseconds).
enum { PARALLEL_FROM = 1 << 14 };
