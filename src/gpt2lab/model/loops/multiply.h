// Products of rows of weights and rows of numbers in fp32, many at once.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "team.h"

// Two kinds of machines: those with AVX-512 and its products of bytes, and those with AVX2. Others are served by torch.

#if defined __AVX512VNNI__ && defined __AVX512VL__
#define BY_SIXTEEN
constexpr int64_t LANES = 16;  // sums that are kept at once, of as many numbers each
#elif defined __AVX2__ && defined __FMA__
constexpr int64_t LANES = 8;
#else
#error "neither AVX-512 VNNI nor AVX2"
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef float Anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

constexpr int64_t ROWS = 4;             // of x, that share a weight once it is loaded
constexpr int64_t SIDE = LANES / ROWS;  // weights that share a number then: all their sums stay in registers

inline Floats load(const float* x) { return *reinterpret_cast<const Anywhere*>(x); }

#ifdef BY_SIXTEEN
inline Floats load(const int8_t* x) {
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}
inline Floats load(const uint16_t* x) {  // bf16: the upper half of a float
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))), 16);
}
// Rounded once, always: whether a product and a sum become one instruction is not left to the compiler.
inline Floats add_product(Floats sum, Floats a, Floats b) { return (Floats)_mm512_fmadd_ps(a, b, sum); }
#else
inline Floats load(const int8_t* x) {
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
}
inline Floats load(const uint16_t* x) {
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))), 16);
}
inline Floats add_product(Floats sum, Floats a, Floats b) { return (Floats)_mm256_fmadd_ps(a, b, sum); }
#endif

template <typename Kept>
Floats load_some(const Kept* x, int64_t count) {  // fewer than LANES, and zeros
    Kept some[LANES] = {};
    std::copy_n(x, count, some);
    return load(some);
}

// Every product is added up in the same order, whichever of them it is and with whatever others: number i into sum i % LANES,
// one after the other, and the sums then in pairs.

// LANES sums for each of `TALL` rows of x and `WIDE` of weights.
// AHEAD: the weights that come LANES rows later are asked for meanwhile, so that memory is never idle.
template <int64_t TALL, int64_t WIDE, bool AHEAD, typename Kept>
inline void add_products(Floats* sums, const Kept* const* weights, const float* const* x, int64_t in) {
    const int64_t whole = in / LANES * LANES;
    Floats own[TALL * WIDE] = {};
    for (int64_t i = 0; i < whole; i += LANES) {
        Floats numbers[TALL];
#pragma GCC unroll 4
        for (int64_t row = 0; row < TALL; ++row) numbers[row] = load(x[row] + i);
#pragma GCC unroll 4
        for (int64_t o = 0; o < WIDE; ++o) {
            if (AHEAD) __builtin_prefetch(weights[o] + i + LANES * in, 0, TALL == 1 ? 2 : 3);
            const Floats weight = load(weights[o] + i);
#pragma GCC unroll 4
            for (int64_t row = 0; row < TALL; ++row)
                own[row * WIDE + o] = add_product(own[row * WIDE + o], weight, numbers[row]);
        }
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < TALL * WIDE; ++i) sums[i] = own[i];
    if (whole == in) return;
    for (int64_t o = 0; o < WIDE; ++o) {
        for (int64_t row = 0; row < TALL; ++row) {
            Floats& sum = sums[row * WIDE + o];
            sum = add_product(sum, load_some(weights[o] + whole, in - whole), load_some(x[row] + whole, in - whole));
        }
    }
}

template <int... I>
Floats add_pairs(Floats a, Floats b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, 2 * I...) + __builtin_shufflevector(a, b, 2 * I + 1 ...);
}

// What the numbers of each of LANES sums add up to.
inline Floats totals(Floats* sums) {
    constexpr std::make_integer_sequence<int, LANES> lanes;
#pragma GCC unroll 4
    for (int64_t left = LANES / 2; left; left /= 2)
#pragma GCC unroll 8
        for (int64_t i = 0; i < left; ++i) sums[i] = add_pairs(sums[2 * i], sums[2 * i + 1], lanes);
    return sums[0];
}

// LANES products of `in` numbers of x, each with the next row of weights; beyond the last output they are of that again.
template <bool AHEAD, typename Kept>
Floats multiply(const Kept* w, int64_t outputs, const float* x, int64_t in) {
    Floats sums[LANES];
#pragma GCC unroll 4
    for (int64_t first = 0; first < LANES; first += 4) {
        const Kept* weights[4];
        for (int64_t o = 0; o < 4; ++o) weights[o] = w + std::min(first + o, outputs - 1) * in;
        add_products<1, 4, AHEAD>(sums + first, weights, &x, in);
    }
    return totals(sums);
}

inline float product(const float* w, const float* x, int64_t in) {
    Floats sums[LANES] = {};
    add_products<1, 1, false>(sums, &w, &x, in);
    return totals(sums)[0];
}

// All products of the rows of x and of weights, whose outputs the threads share. `put` is given a row, an output and the
// products of that and of those that follow it, with their number.
template <typename Put>
void multiply_all(Team& team, const float* w, int64_t outputs, const float* x, int64_t rows, int64_t in, Put put) {
    const int64_t groups = (rows + ROWS - 1) / ROWS;
    team.share((outputs + LANES - 1) / LANES, [&](int64_t each) {
        const int64_t first = each * LANES, left = outputs - first;
        const float* const weights = w + first * in;
        const auto put_all = [&](int64_t row, const float* products) {
            if (left >= LANES) {
                put(row, first, products, LANES);  // a number that the compiler knows
            } else {
                put(row, first, products, left);
            }
        };
        if (rows == 1) {
            const Floats products = multiply<true>(weights, left, x, in);
            put_all(0, reinterpret_cast<const float*>(&products));
            return;
        }
        for (int64_t group = 0; group < groups; ++group) {
            const float *side[SIDE], *numbers[ROWS];
            for (int64_t i = 0; i < ROWS; ++i) numbers[i] = x + std::min(group * ROWS + i, rows - 1) * in;
            float found[ROWS][LANES];
            for (int64_t o = 0; o < LANES; o += SIDE) {
                for (int64_t i = 0; i < SIDE; ++i) side[i] = weights + std::min(o + i, left - 1) * in;
                // Each group asks for its share of what comes.
                const auto add = o / SIDE % groups == group ? add_products<ROWS, SIDE, true, float>
                                                            : add_products<ROWS, SIDE, false, float>;
                Floats sums[LANES];
                add(sums, side, numbers, in);
                const Floats products = totals(sums);
                for (int64_t i = 0; i < ROWS; ++i)
                    std::copy_n(reinterpret_cast<const float*>(&products) + i * SIDE, SIDE, &found[i][o]);
            }
            for (int64_t i = 0; i < std::min(ROWS, rows - group * ROWS); ++i) put_all(group * ROWS + i, found[i]);
        }
    });
}
