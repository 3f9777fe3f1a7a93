// 2-D convolution of float32 tensors with float64 sums: a product of two floats is exact in float64, so the
// result is the rounded exact one but for some 1e-16.
//
// A task makes some rows of at most 64 output pixels, for all filters. It copies the part of the input under
// them to float64, a few channels at a time, and reads the taps from there as shifted vectors: nothing is
// unfolded. With stride 2 the copy holds the even columns, then the odd ones, so that these are vectors too.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace {

const int64_t PIXELS = 64;              // output pixels of a row of a task
const int64_t COPY_BYTES = 192 * 1024;  // of the copied input: a part of the second-level cache

template <int ROWS, int VECTORS>
INLINE void conv_block(int64_t depth, const double *weight, int64_t stride, const double *copy,
                       const int64_t *taps, double *sums, int64_t sums_stride, bool add) {
    vdouble sum[ROWS][VECTORS];
    multiply<Double>(sum, depth, weight, stride, [=](int64_t k) { return copy + taps[k]; });
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) {
            double *to = sums + r * sums_stride + v * WIDTH64;
            store(to, add ? load(to) + sum[r][v] : sum[r][v]);
        }
}

template <int ROWS>
void conv_row(int64_t depth, const double *weight, int64_t stride, const double *copy, const int64_t *taps,
              int64_t pixels, double *sums, int64_t sums_stride, bool add) {
    for (int64_t left = parts(pixels, WIDTH64); left > 0;) {
        const int64_t vectors = panel(left);
        if (vectors == 3)
            conv_block<ROWS, 3>(depth, weight, stride, copy, taps, sums, sums_stride, add);
        else if (vectors == 2)
            conv_block<ROWS, 2>(depth, weight, stride, copy, taps, sums, sums_stride, add);
        else
            conv_block<ROWS, 1>(depth, weight, stride, copy, taps, sums, sums_stride, add);
        copy += vectors * WIDTH64;
        sums += vectors * WIDTH64;
        left -= vectors;
    }
}

// `bias` may be null. The same stride and padding in both directions.
int conv2d(const float *input, const float *weight, const float *bias, float *output, int64_t batch,
           int64_t channels, int64_t height, int64_t width, int64_t filters, int64_t kernel_rows,
           int64_t kernel_columns, int64_t stride, int64_t padding) {
    const int64_t out_height = (height + 2 * padding - kernel_rows) / stride + 1;
    const int64_t out_width = (width + 2 * padding - kernel_columns) / stride + 1;
    const int64_t window = kernel_rows * kernel_columns, depth = channels * window;
    // With few filters the copy costs as much as the sums: several rows share it.
    const int64_t rows = least(out_height, filters <= 16 ? 4 : 1);
    const int64_t strips = parts(out_width, PIXELS), strip = parts(out_width, strips);
    const int64_t row_blocks = parts(out_height, rows);
    const int64_t padded = round_up(strip, WIDTH64);          // pixels of a row of sums
    const int64_t line = padded + round_up(3, WIDTH64);       // columns of a row of the copy, of one parity
    const int64_t lines = (rows - 1) * stride + kernel_rows;  // input rows under a task
    const int64_t plane = lines * stride * line;              // doubles of a channel's copy
    int64_t some = COPY_BYTES / (8 * plane);                  // channels copied at a time
    some = least(channels, some < 1 ? 1 : some);
    const int64_t weight_stride = round_up(depth, 8) + 8;  // no power of two, see attention.h
    const int64_t all_filters = round_up(filters, 8);

    double *const weights = allocate<double>(all_filters * weight_stride);
    int64_t *const taps = allocate<int64_t>(some * window);
    int failure = weights && taps ? 0 : OUT_OF_MEMORY;
    if (!failure) {
        for (int64_t c = 0; c < some; ++c)
            for (int64_t i = 0; i < kernel_rows; ++i)
                for (int64_t j = 0; j < kernel_columns; ++j)
                    taps[(c * kernel_rows + i) * kernel_columns + j] =
                        c * plane + (i * stride + j % stride) * line + j / stride;
        const bool worth = batch * out_height * out_width * filters * window >= PARALLEL_FROM;
        each(all_filters, worth, [=](int64_t f) {
            for (int64_t k = 0; k < depth; ++k)
                weights[f * weight_stride + k] = f < filters ? weight[f * depth + k] : 0.0;
        });

        // A share for each thread: what a stretch allocates is too large to allocate often.
        stretches(batch * row_blocks * strips, 0, worth, [&](int64_t begin, int64_t end) {
            const int64_t sums_stride = rows * padded;
            double *const copy = allocate<double>(some * plane);
            double *const sums = allocate<double>(all_filters * sums_stride);
            if (!copy || !sums) {
                __atomic_store_n(&failure, OUT_OF_MEMORY, __ATOMIC_RELAXED);
                begin = end;
            }
            for (int64_t task = begin; task < end; ++task) {
                const int64_t picture = task / (row_blocks * strips);
                const int64_t top = task / strips % row_blocks * rows, start = task % strips * strip;
                const int64_t here = least(rows, out_height - top), count = least(strip, out_width - start);
                for (int64_t channel = 0; channel < channels; channel += some) {
                    const int64_t taken = least(some, channels - channel);
                    for (int64_t c = 0; c < taken; ++c)
                        for (int64_t i = 0; i < lines; ++i) {
                            const int64_t y = top * stride - padding + i;
                            double *to = copy + c * plane + i * stride * line;
                            memset(to, 0, sizeof(double) * stride * line);
                            if (y < 0 || y >= height) continue;
                            const int64_t plane_at = picture * channels + channel + c;
                            const float *from = input + (plane_at * height + y) * width;
                            for (int64_t parity = 0; parity < stride; ++parity) {
                                const int64_t x = start * stride - padding + parity;  // column of to[0]
                                const int64_t first = x < 0 ? parts(-x, stride) : 0;
                                const int64_t end = least(line, parts(width - x, stride));
                                double *const row = to + parity * line;
                                if (stride == 1)
                                    for (int64_t j = first; j < end; ++j) row[j] = from[x + j];
                                else if (stride == 2)
                                    for (int64_t j = first; j < end; ++j) row[j] = from[x + 2 * j];
                                else
                                    for (int64_t j = first; j < end; ++j) row[j] = from[x + stride * j];
                            }
                        }
                    for (int64_t f = 0; f < filters;) {
                        const double *w = weights + f * weight_stride + channel * window;
                        const int64_t block = BLOCK_ROWS == 8 && filters - f > 4 ? 8 : 4;
                        for (int64_t r = 0; r < here; ++r) {
                            const double *from = copy + r * stride * stride * line;
                            double *to = sums + f * sums_stride + r * padded;
                            if (block == 8)
                                conv_row<8>(taken * window, w, weight_stride, from, taps, count, to,
                                            sums_stride, channel > 0);
                            else
                                conv_row<4>(taken * window, w, weight_stride, from, taps, count, to,
                                            sums_stride, channel > 0);
                        }
                        f += block;
                    }
                }
                for (int64_t f = 0; f < filters; ++f) {
                    const double add = bias ? bias[f] : 0.0;
                    for (int64_t r = 0; r < here; ++r) {
                        const double *from = sums + f * sums_stride + r * padded;
                        float *to =
                            output + ((picture * filters + f) * out_height + top + r) * out_width + start;
                        for (int64_t j = 0; j < count; ++j) to[j] = (float)(from[j] + add);
                    }
                }
            }
            free(copy);
            free(sums);
        });
    }
    free(weights);
    free(taps);
    return failure;
}

}  // namespace
