// The parts of a layer that treat each row by itself.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "eight.h"

struct Linear {          // y = x @ weight.T + bias
    const void* weight;  // (out, in), floats; where there is a scale, eight bits, as in eight.h
    const float* scale;  // (out): the size of a step of the weights
    const float* sums;   // (out): scale * the sum of a row of weights
    const float* bias;   // (out), or null
    int64_t in, out;
};

struct Norm {  // LayerNorm, or RMSNorm where it is not centred
    const float *weight, *bias;
    int64_t centred;
    float eps;
};

enum Activation { GELU_TANH, GELU, RELU2, SWIGLU };

// Rows in eight bits: x = low + step * q, with `LEVELS` steps from a row's lowest number to its highest.
struct Quantised {
    static constexpr int LEVELS = 255;
    std::vector<uint8_t> q;
    std::vector<float> low, step;

    Quantised(int64_t rows, int64_t widest)
        : q((rows + PADDED - 1) / PADDED * PADDED * deep(widest)), low(rows), step(rows) {}

    uint8_t* of(int64_t row, int64_t in) { return q.data() + row * deep(in); }

    void write(int64_t row, const float* x, int64_t in) {
        float least = x[0], most = x[0], all = 0;
#pragma omp simd reduction(min : least) reduction(max : most) reduction(+ : all)
        for (int64_t i = 0; i < in; ++i) {
            least = std::min(least, x[i]), most = std::max(most, x[i]);
            all += x[i] * 0.0f;  // of a row with NaN or infinity, NaN
        }
        const float span = most - least, steps = span > 0 ? LEVELS / span : 0.0f;
        uint8_t* const to = of(row, in);
#pragma omp simd
        for (int64_t i = 0; i < in; ++i) to[i] = static_cast<uint8_t>(static_cast<int32_t>((x[i] - least) * steps + 0.5f));
        low[row] = least + all, step[row] = span / LEVELS;
    }
};

// y = x @ weight.T + bias, or y += that.
inline void linear(Team& team, const Linear& f, const float* x, float* y, int64_t rows, bool add, Quantised& eight) {
    const auto put = [&](int64_t row, int64_t o, const auto& value, int64_t count) {
        float* const to = y + row * f.out + o;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) to[i] = (add ? to[i] : 0.0f) + (f.bias ? f.bias[o + i] : 0.0f) + value(i);
    };
    if (f.scale) {
        team.share(rows, [&](int64_t row) { eight.write(row, x + row * f.in, f.in); });
        const auto put_eight = [&](int64_t row, int64_t o, const int32_t* products, int64_t count) {
            const float low = eight.low[row], step = eight.step[row];
            put(row, o, [&](int64_t i) { return low * f.sums[o + i] + step * f.scale[o + i] * products[i]; }, count);
        };
        multiply_eight(team, static_cast<const int8_t*>(f.weight), f.out, eight.q.data(), rows, deep(f.in), put_eight);
    } else {
        const auto put_whole = [&](int64_t row, int64_t o, const float* products, int64_t count) {
            put(row, o, [&](int64_t i) { return products[i]; }, count);
        };
        multiply_all(team, static_cast<const float*>(f.weight), f.out, x, rows, f.in, put_whole);
    }
}

inline void norm(const Norm& f, const float* x, float* y, int64_t width) {
    float mean = 0, squares = 0;
    if (f.centred) {
#pragma omp simd reduction(+ : mean)
        for (int64_t i = 0; i < width; ++i) mean += x[i];
        mean /= width;
    }
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; ++i) squares += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / std::sqrt(squares / width + f.eps);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        y[i] = (x[i] - mean) * scale * (f.weight ? f.weight[i] : 1.0f) + (f.bias ? f.bias[i] : 0.0f);
    }
}

inline void norm_rows(Team& team, const Norm& f, const float* x, float* y, int64_t rows, int64_t width) {
    team.share(rows, [&](int64_t row) { norm(f, x + row * width, y + row * width, width); });
}

// Pairs (i, i + dim/2) turned by a row's angles, as in model/rope.py.
inline void rotate(float* x, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float first = x[i], second = x[i + half];
        x[i] = first * cos[i] - second * sin[i];
        x[i + half] = second * cos[i] + first * sin[i];
    }
}

// e to the x, to two units in the last place, in a form that the compiler can compute for many at once (Cody & Waite 1980).
inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float twos = std::rint(x * 1.44269504f), rest = (x - twos * 0.693359375f) + twos * 2.12194440e-4f;
    float series = 1.9875691500e-4f * rest + 1.3981999507e-3f;
    series = (series * rest + 8.3334519073e-3f) * rest + 4.1665795894e-2f;
    series = (series * rest + 1.6666665459e-1f) * rest + 0.5f;
    const int32_t bits = (static_cast<int32_t>(twos) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return (series * rest * rest + rest + 1.0f) * power;
}

// The nonlinearity of `count` numbers; the second factors of SWIGLU lie `apart` numbers after the first.
inline void activate(int64_t activation, const float* x, float* y, int64_t count, int64_t apart) {
    switch (activation) {
        case GELU_TANH:  // x * (1 + tanh(u)) / 2 = x / (1 + exp(-2u))
#pragma omp simd
            for (int64_t i = 0; i < count; ++i)
                y[i] = x[i] / (1.0f + exponential(-1.5957691216f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
            break;
        case GELU:
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) y[i] = x[i] * 0.5f * (1.0f + std::erf(x[i] * 0.70710678f));
            break;
        case RELU2:
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) y[i] = x[i] * (x[i] > 0 ? x[i] : 0.0f);
            break;
        case SWIGLU:
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) y[i] = x[i] / (1.0f + exponential(-x[i])) * x[i + apart];
            break;
    }
}
