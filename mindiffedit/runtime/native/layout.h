// Kernels that move data: transpositions, concatenation, upsampling, and the addition of biases.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace {

const int64_t TILE = 16;  // floats in a cache line: every line of a tile is read and written whole

// output[column][row] = input[row][column], for rows x columns values; strides in floats.
INLINE void transpose(const float *input, int64_t input_stride, float *output, int64_t output_stride,
                      int64_t rows, int64_t columns) {
    for (int64_t row = 0; row < rows; row += TILE)
        for (int64_t column = 0; column < columns; column += TILE) {
            const float *from = input + row * input_stride + column;
            float *to = output + column * output_stride + row;
            if (row + TILE <= rows && column + TILE <= columns) {
                for (int64_t j = 0; j < TILE; ++j)
#pragma GCC unroll 16
                    for (int64_t i = 0; i < TILE; ++i) to[j * output_stride + i] = from[i * input_stride + j];
            } else {
                const int64_t height = least(TILE, rows - row), breadth = least(TILE, columns - column);
                for (int64_t j = 0; j < breadth; ++j)
                    for (int64_t i = 0; i < height; ++i) to[j * output_stride + i] = from[i * input_stride + j];
            }
        }
}

// (batch, channels, pixels) to (batch, pixels, channels).
int image_to_tokens(const float *image, float *output, int64_t batch, int64_t channels, int64_t pixels) {
    const int64_t blocks = parts(pixels, TILE);
    each(batch * blocks, batch * channels * pixels >= PARALLEL_FROM, [=](int64_t task) {
        const int64_t picture = task / blocks, start = task % blocks * TILE;
        transpose(image + picture * channels * pixels + start, pixels,
                  output + (picture * pixels + start) * channels, channels, channels,
                  least(TILE, pixels - start));
    });
    return 0;
}

// (batch, pixels, channels) to (batch, channels, pixels), plus a residual of that shape, which may be null.
int tokens_to_image(const float *tokens, const float *residual, float *output, int64_t batch, int64_t channels,
                    int64_t pixels) {
    const int64_t blocks = parts(channels, TILE);
    each(batch * blocks, batch * channels * pixels >= PARALLEL_FROM, [=](int64_t task) {
        const int64_t picture = task / blocks, start = task % blocks * TILE;
        const int64_t count = least(TILE, channels - start);
        const int64_t at = (picture * channels + start) * pixels;
        // A stretch of the pixels at a time: what was just transposed is still in the cache when it is added.
        const int64_t stretch = 16 * TILE;
        for (int64_t pixel = 0; pixel < pixels; pixel += stretch) {
            const int64_t here = least(stretch, pixels - pixel);
            transpose(tokens + (picture * pixels + pixel) * channels + start, channels, output + at + pixel,
                      pixels, here, count);
            if (!residual) continue;
            for (int64_t c = 0; c < count; ++c) {
                float *to = output + at + c * pixels + pixel;
                const float *from = residual + at + c * pixels + pixel;
                for (int64_t i = 0; i < here; ++i) to[i] += from[i];
            }
        }
    });
    return 0;
}

// input + bias of the channel + residual, which may be null. The bias first, as the plain operators do.
int bias_add(const float *input, const float *bias, const float *residual, float *output, int64_t batch,
             int64_t channels, int64_t pixels) {
    each(batch * channels, batch * channels * pixels >= PARALLEL_FROM, [=](int64_t plane) {
        const float *from = input + plane * pixels;
        float *to = output + plane * pixels;
        const float add = bias[plane % channels];
        if (residual) {
            const float *other = residual + plane * pixels;
            for (int64_t i = 0; i < pixels; ++i) to[i] = (from[i] + add) + other[i];
        } else {
            for (int64_t i = 0; i < pixels; ++i) to[i] = from[i] + add;
        }
    });
    return 0;
}

// The same for tokens: one bias for each column of rows x columns.
int bias_add_tokens(const float *input, const float *bias, const float *residual, float *output, int64_t rows,
                    int64_t columns) {
    each(rows, rows * columns >= PARALLEL_FROM, [=](int64_t row) {
        const float *from = input + row * columns;
        float *to = output + row * columns;
        if (residual) {
            const float *other = residual + row * columns;
            for (int64_t j = 0; j < columns; ++j) to[j] = (from[j] + bias[j]) + other[j];
        } else {
            for (int64_t j = 0; j < columns; ++j) to[j] = from[j] + bias[j];
        }
    });
    return 0;
}

// Two tensors joined on axis 1; sizes are floats per picture.
int concat(const float *first, const float *second, float *output, int64_t batch, int64_t first_size,
           int64_t second_size) {
    const int64_t size = first_size + second_size, block = 1 << 14;
    const int64_t first_blocks = parts(first_size, block), blocks = first_blocks + parts(second_size, block);
    each(batch * blocks, batch * size >= PARALLEL_FROM, [=](int64_t task) {
        const int64_t picture = task / blocks, part = task % blocks;
        if (part < first_blocks) {
            const int64_t start = part * block;
            memcpy(output + picture * size + start, first + picture * first_size + start,
                   sizeof(float) * least(block, first_size - start));
        } else {
            const int64_t start = (part - first_blocks) * block;
            memcpy(output + picture * size + first_size + start, second + picture * second_size + start,
                   sizeof(float) * least(block, second_size - start));
        }
    });
    return 0;
}

// Every pixel becomes 2 x 2.
int upsample(const float *input, float *output, int64_t planes, int64_t height, int64_t width) {
    each(planes * height, 4 * planes * height * width >= PARALLEL_FROM, [=](int64_t row) {
        const float *from = input + row * width;
        float *to = output + row * 4 * width;
        for (int64_t x = 0; x < width; ++x) to[2 * x] = to[2 * x + 1] = from[x];
        memcpy(to + 2 * width, to, sizeof(float) * 2 * width);
    });
    return 0;
}

}  // namespace
