// Products of rows of weights and rows of numbers, many at once.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

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
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float Anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// Ways to multiply: what weights and numbers are, how many are taken at once, and how their products are added to LANES sums.

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
struct Whole {  // in fp32, however the weights are kept
    using Weight = Kept;
    using Number = float;
    using Sums = Floats;
    static constexpr int64_t STEP = LANES;
    static void add(Sums& sums, const Weight* w, const float* x) { sums = add_product(sums, load(w), load(x)); }
};

struct Eight {  // both in eight bits: the sums are integers, and exact in any order
    using Weight = int8_t;
    using Number = uint8_t;
    using Sums = Ints;
#ifdef BY_SIXTEEN
    static constexpr int64_t STEP = 64;
    static void add(Sums& sums, const int8_t* w, const uint8_t* x) {
        sums = (Ints)_mm512_dpbusd_epi32((__m512i)sums, _mm512_loadu_si512(x), _mm512_loadu_si512(w));
    }
#else
    static constexpr int64_t STEP = 16;
    static void add(Sums& sums, const int8_t* w, const uint8_t* x) {  // in 16 bits: pairs of 8 would not fit
        const auto weights = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
        const auto numbers = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
        sums += (Ints)_mm256_madd_epi16(weights, numbers);
    }
#endif
};

template <typename Kind>
using Product = std::remove_reference_t<decltype(std::declval<typename Kind::Sums>()[0])>;

template <typename Sums, int... I>
Sums add_pairs(Sums a, Sums b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, 2 * I...) + __builtin_shufflevector(a, b, 2 * I + 1 ...);
}

// LANES products of `in` numbers: of ROWS rows of x, each with the next rows of weights.
//
// Every product is added up in the same order, whichever of them it is, and however many ROWS there are. AHEAD: the weights
// that come LANES rows later are asked for meanwhile, so that memory is never idle.
template <typename Kind, int ROWS, bool AHEAD>
typename Kind::Sums multiply(const typename Kind::Weight* w, int64_t outputs, const typename Kind::Number* x, int64_t in) {
    constexpr int64_t STEP = Kind::STEP, OUTPUTS = LANES / ROWS;
    constexpr int64_t SIDE = std::min<int64_t>(OUTPUTS, 4);  // weights that share a number
    const int64_t whole = in / STEP * STEP, rest = in - whole;
    typename Kind::Sums sums[LANES] = {};
#pragma GCC unroll 4
    for (int64_t first = 0; first < OUTPUTS; first += SIDE) {
        const typename Kind::Weight* weights[SIDE];  // beyond the last output it is that again
        for (int64_t o = 0; o < SIDE; ++o) weights[o] = w + std::min(first + o, outputs - 1) * in;
        for (int64_t i = 0; i < whole; i += STEP) {
#pragma GCC unroll 4
            for (int64_t o = 0; o < SIDE; ++o) {
                if (AHEAD) __builtin_prefetch(weights[o] + i + LANES * in, 0, 3);
#pragma GCC unroll 4
                for (int64_t row = 0; row < ROWS; ++row)
                    Kind::add(sums[row * OUTPUTS + first + o], weights[o] + i, x + row * in + i);
            }
        }
        if (rest) {
#pragma GCC unroll 4
            for (int64_t o = 0; o < SIDE; ++o) {
#pragma GCC unroll 4
                for (int64_t row = 0; row < ROWS; ++row) {
                    typename Kind::Weight last_weights[STEP] = {};
                    typename Kind::Number last[STEP] = {};
                    std::copy_n(weights[o] + whole, rest, last_weights), std::copy_n(x + row * in + whole, rest, last);
                    Kind::add(sums[row * OUTPUTS + first + o], last_weights, last);
                }
            }
        }
    }
    constexpr std::make_integer_sequence<int, LANES> lanes;
#pragma GCC unroll 4
    for (int64_t left = LANES / 2; left; left /= 2)
#pragma GCC unroll 8
        for (int64_t i = 0; i < left; ++i) sums[i] = add_pairs(sums[2 * i], sums[2 * i + 1], lanes);
    return sums[0];
}

// All products of the rows of x and of weights, whose outputs the threads share. `put` is given a row, an output and the
// products of that and of those that follow it, with their number.
template <typename Kind, typename Put>
void multiply_all(const typename Kind::Weight* w, int64_t outputs, const typename Kind::Number* x, int64_t rows, int64_t in,
                  Put put) {
    const auto tile = [&]<int ROWS>(int64_t first, int64_t row) {
        constexpr int64_t OUTPUTS = LANES / ROWS;
        const int64_t count = std::min(outputs - first, LANES);
        Product<Kind> found[ROWS][LANES];
        for (int64_t o = 0; o < count; o += OUTPUTS) {
            const auto once = row ? multiply<Kind, ROWS, false> : multiply<Kind, ROWS, true>;
            const auto products = once(w + (first + o) * in, count - o, x + row * in, in);
            for (int64_t i = 0; i < ROWS; ++i)
                std::copy_n(reinterpret_cast<const Product<Kind>*>(&products) + i * OUTPUTS, OUTPUTS, &found[i][o]);
        }
        for (int64_t i = 0; i < ROWS; ++i) {
            if (count == LANES) {
                put(row + i, first, found[i], LANES);  // a number that the compiler knows
            } else {
                put(row + i, first, found[i], count);
            }
        }
    };
#pragma omp for schedule(static)
    for (int64_t first = 0; first < outputs; first += LANES) {
        int64_t row = 0;
        for (; row + 4 <= rows; row += 4) tile.template operator()<4>(first, row);
        for (; row + 2 <= rows; row += 2) tile.template operator()<2>(first, row);
        for (; row < rows; ++row) tile.template operator()<1>(first, row);
    }
}

inline float product(const float* w, const float* x, int64_t in) { return multiply<Whole<float>, 1, false>(w, 1, x, in)[0]; }
