// The memory of a text in one layer, and attention over it.
#pragma once

#include <cmath>
#include <cstring>

#include "layers.h"

enum KeptIn { FLOAT32, BFLOAT16, INT8 };

struct Room {  // where one layer keeps the keys and values of one text, (kv_head, slot, dim)
    void *keys, *values;
    float *key_scales, *value_scales;  // (kv_head, slot) of int8
    int64_t kept_in, slots, held;
};

inline uint16_t to_brain(float x) {  // to the nearest, of two to the even
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float from(float x) { return x; }
inline float from(int8_t x) { return x; }
inline float from(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float whole;
    std::memcpy(&whole, &bits, sizeof whole);
    return whole;
}

// Keep one token's key or value.
inline void keep(const float* x, void* kept, float* scales, int64_t kept_in, int64_t slot, int64_t dim) {
    if (kept_in == FLOAT32) {
        std::copy_n(x, dim, static_cast<float*>(kept) + slot * dim);
    } else if (kept_in == BFLOAT16) {
        std::transform(x, x + dim, static_cast<uint16_t*>(kept) + slot * dim, to_brain);
    } else {
        float largest = 0;
        for (int64_t i = 0; i < dim; ++i) largest = std::max(largest, std::abs(x[i]));
        const float scale = largest / 127, step = std::max(scale, 1e-30f);
        for (int64_t i = 0; i < dim; ++i)
            static_cast<int8_t*>(kept)[slot * dim + i] = static_cast<int8_t>(static_cast<int32_t>(std::rint(x[i] / step)));
        scales[slot] = scale;
    }
}

// Softmax attention of one query over the keys and values in slots `begin` to `end`.
template <typename Kept>
void attend(const float* q, const Room& room, int64_t head, int64_t begin, int64_t end, int64_t dim, float* scores,
            float* out) {
    const Kept* const keys = static_cast<const Kept*>(room.keys) + head * room.slots * dim;
    const Kept* const values = static_cast<const Kept*>(room.values) + head * room.slots * dim;
    const float *key_scales = room.key_scales + head * room.slots, *value_scales = room.value_scales + head * room.slots;
    const bool scaled = room.kept_in == INT8;
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    const int64_t few = LANES * dim, line = 64 / sizeof(Kept);
    float most = -INFINITY, total = 0;
    for (int64_t at = begin; at < end; at += LANES) {
        for (int64_t i = 0; i < few; i += line) {  // memory is not to wait until they are wanted
            __builtin_prefetch(keys + at * dim + 2 * few + i, 0, 3);
            __builtin_prefetch(values + at * dim + i, 0, 2);
        }
        const Floats products = multiply<false>(keys + at * dim, end - at, q, dim);
        for (int64_t i = 0; i < std::min(LANES, end - at); ++i) {
            scores[at + i] = products[i] * scale * (scaled ? key_scales[at + i] : 1.0f);
            most = std::max(most, scores[at + i]);
        }
    }
#pragma omp simd reduction(+ : total)
    for (int64_t at = begin; at < end; ++at) total += scores[at] = exponential(scores[at] - most);
    if (scaled)
        for (int64_t at = begin; at < end; ++at) scores[at] *= value_scales[at];
    for (int64_t i = 0; i < dim; i += 4 * LANES) {
        Floats sums[4] = {};
        const int64_t wide = std::min(4 * LANES, dim - i);
        const auto add = [&](int64_t vectors) {
            for (int64_t at = begin; at < end; ++at) {
                const Kept* const value = values + at * dim + i;
                const Floats weight = Floats{} + scores[at];
#pragma GCC unroll 4
                for (int64_t j = 0; j < vectors; ++j) sums[j] = add_product(sums[j], weight, load(value + j * LANES));
                if (const int64_t rest = wide - vectors * LANES)
                    sums[vectors] = add_product(sums[vectors], weight, load_some(value + vectors * LANES, rest));
            }
        };
        if (wide == 4 * LANES) {
            add(4);  // a number that the compiler knows
        } else {
            add(wide / LANES);
        }
        for (int64_t j = 0; j < wide; ++j) out[i + j] = sums[j / LANES][j % LANES] / total;
    }
}
