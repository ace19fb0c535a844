/* Quantization before and rescaling after an int8 matrix product; int8.py has the same functions in torch.

Numbers are bf16 (is_wide 0) or fp32 (is_wide 1). */
#include <stdint.h>

typedef union { float number; uint32_t bits; } word;

static inline __attribute__((always_inline)) float load(const void *from, long at, int is_wide) {
    if (is_wide) return ((const float *)from)[at];
    word value = {.bits = (uint32_t)((const uint16_t *)from)[at] << 16};
    return value.number;
}

static inline __attribute__((always_inline)) void store(void *to, long at, float number, int is_wide) {
    word value = {.number = number};
    if (is_wide) ((float *)to)[at] = number;
    else ((uint16_t *)to)[at] = (value.bits + 0x7fff + ((value.bits >> 16) & 1)) >> 16; /* round to nearest, ties to even */
}

static inline __attribute__((always_inline)) float quantize_row(
    const void *row, int is_wide, const float *factors, long columns, int8_t *integers) {
    /* Without the sign bit, floats compare like integers; infinity and NaN are the largest. */
    uint32_t most = 0;
    for (long i = 0; i < columns; i++) {
        word value = {.number = load(row, i, is_wide) * factors[i]};
        value.bits &= 0x7fffffff;
        most = value.bits > most ? value.bits : most;
    }
    word largest = {.bits = most};
    float inverse = most ? 127.0f / largest.number : 0.0f;
    for (long i = 0; i < columns; i++) {
        float value = load(row, i, is_wide) * factors[i] * inverse;
        integers[i] = (int8_t)(int)(value + (value < 0.0f ? -0.5f : 0.5f));
    }
    return largest.number / 127.0f;
}

static inline __attribute__((always_inline)) void scale_row(
    const int32_t *sums, float scale, const float *factors, long columns, void *row, int is_wide, int adds) {
    for (long i = 0; i < columns; i++) {
        float value = (float)sums[i] * scale * factors[i];
        store(row, i, adds ? load(row, i, is_wide) + value : value, is_wide);
    }
}

/* Multiply each column by its factor, then quantize each row to int8 with one scale. `stride`: distance between rows. */
void quantize(
    const void *numbers, int is_wide, const float *factors, long rows, long columns, long stride,
    int8_t *integers, float *scales) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        int8_t *to = integers + r * columns;
        scales[r] = is_wide ? quantize_row((const float *)numbers + r * stride, 1, factors, columns, to)
                            : quantize_row((const uint16_t *)numbers + r * stride, 0, factors, columns, to);
    }
}

/* Multiply int32 sums by row scales and column factors; write the result to `numbers`, or add it if `adds`. */
void rescale(
    const int32_t *sums, const float *scales, const float *factors, long rows, long columns,
    void *numbers, int is_wide, int adds) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        const int32_t *from = sums + r * columns;
        if (is_wide && adds) scale_row(from, scales[r], factors, columns, (float *)numbers + r * columns, 1, 1);
        else if (is_wide) scale_row(from, scales[r], factors, columns, (float *)numbers + r * columns, 1, 0);
        else if (adds) scale_row(from, scales[r], factors, columns, (uint16_t *)numbers + r * columns, 0, 1);
        else scale_row(from, scales[r], factors, columns, (uint16_t *)numbers + r * columns, 0, 0);
    }
}
