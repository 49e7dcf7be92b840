// Products of weights and numbers in eight bits: integers, and exact in any order.
#pragma once

#include <cstring>

#include "multiply.h"

// Weights lie in blocks of BLOCK outputs: FOUR inputs of each, then the next four inputs, as the machine's products of bytes
// take them. A row of numbers is as long as a row of weights: a multiple of DEEP, with zeros behind the last weight.
constexpr int64_t BLOCK = 16, FOUR = 4, DEEP = 64;
constexpr int64_t SOON = 8192;  // bytes of weights that are asked for ahead of their turn

inline int64_t deep(int64_t in) { return (in + DEEP - 1) / DEEP * DEEP; }

// `TALL` rows of x, as many sums of each output as the machine adds to in turn.
#ifdef BY_SIXTEEN
constexpr int64_t TALLEST = 8;

template <int64_t TALL, bool AHEAD>
void multiply_block(const int8_t* w, const uint8_t* x, int64_t in, int32_t* found) {
    constexpr int64_t TURNS = TALLEST / TALL;
    __m512i sums[TALL][TURNS] = {};
    for (int64_t i = 0; i < in; i += FOUR * TURNS) {
#pragma GCC unroll 8
        for (int64_t turn = 0; turn < TURNS; ++turn) {
            const int8_t* const weights = w + (i + turn * FOUR) * BLOCK;
            if (AHEAD) __builtin_prefetch(weights + SOON, 0, 3);
#pragma GCC unroll 8
            for (int64_t row = 0; row < TALL; ++row) {
                int32_t four;
                std::memcpy(&four, x + row * in + i + turn * FOUR, sizeof four);
                sums[row][turn] = _mm512_dpbusd_epi32(sums[row][turn], _mm512_set1_epi32(four), _mm512_loadu_si512(weights));
            }
        }
    }
#pragma GCC unroll 8
    for (int64_t row = 0; row < TALL; ++row) {
#pragma GCC unroll 8
        for (int64_t turn = 1; turn < TURNS; ++turn) sums[row][0] = _mm512_add_epi32(sums[row][0], sums[row][turn]);
        _mm512_storeu_si512(found + row * BLOCK, sums[row][0]);
    }
}
#else
constexpr int64_t TALLEST = 2;

template <int64_t TALL, bool AHEAD>
void multiply_block(const int8_t* w, const uint8_t* x, int64_t in, int32_t* found) {
    __m256i sums[TALL][FOUR] = {};  // of four outputs each, two sums an output
    for (int64_t i = 0; i < in; i += FOUR) {
        const int8_t* const weights = w + i * BLOCK;
        if (AHEAD) __builtin_prefetch(weights + SOON, 0, 3);
#pragma GCC unroll 4
        for (int64_t part = 0; part < FOUR; ++part) {  // in 16 bits: pairs of 8 would not fit
            const auto few = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + part * BLOCK));
            const auto wide = _mm256_cvtepi8_epi16(few);
#pragma GCC unroll 2
            for (int64_t row = 0; row < TALL; ++row) {
                int32_t four;
                std::memcpy(&four, x + row * in + i, sizeof four);
                const auto numbers = _mm256_cvtepu8_epi16(_mm_set1_epi32(four));
                sums[row][part] = _mm256_add_epi32(sums[row][part], _mm256_madd_epi16(wide, numbers));
            }
        }
    }
    for (int64_t row = 0; row < TALL; ++row) {
        for (int64_t part = 0; part < FOUR; part += 2) {
            const auto pairs = _mm256_hadd_epi32(sums[row][part], sums[row][part + 1]);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(found + row * BLOCK + part * FOUR),
                                _mm256_permute4x64_epi64(pairs, 0b11011000));
        }
    }
}
#endif

// Where the machine has tiles, they multiply 16 rows at once (AMX). A process asks the system for them before.
#if defined BY_SIXTEEN && defined __AMX_INT8__
#define TILES
#include <sys/syscall.h>
#include <unistd.h>

inline bool has_tiles() {
    constexpr int ASK = 0x1023, THEIR_DATA = 18;
    static const bool granted = !syscall(SYS_arch_prctl, ASK, THEIR_DATA);
    return granted;
}

struct Shapes {  // of the tiles: 16 rows of 64 bytes, all of them
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
alignas(64) constexpr Shapes SHAPES;

struct Tiles {  // this thread has them while this lives
    Tiles() { _tile_loadconfig(&SHAPES); }
    ~Tiles() { _tile_release(); }
};

// 16 rows of x, or twice as many, with two blocks.
template <bool TWICE, bool AHEAD>
void multiply_tiles(const int8_t* w, const int8_t* next, const uint8_t* x, int64_t in, int32_t* found, int32_t* found_next) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < in; i += DEEP) {
        if (AHEAD) {
#pragma GCC unroll 16
            for (int64_t line = 0; line < DEEP * BLOCK; line += 64) {
                __builtin_prefetch(w + i * BLOCK + SOON + line, 0, 3);
                __builtin_prefetch(next + i * BLOCK + SOON + line, 0, 3);
            }
        }
        _tile_loadd(4, x + i, in);
        _tile_loadd(6, w + i * BLOCK, 64);
        _tile_loadd(7, next + i * BLOCK, 64);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        if (TWICE) {
            _tile_loadd(5, x + 16 * in + i, in);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
        }
    }
    _tile_stored(0, found, 64);
    _tile_stored(1, found_next, 64);
    if (TWICE) {
        _tile_stored(2, found + 16 * BLOCK, 64);
        _tile_stored(3, found_next + 16 * BLOCK, 64);
    }
}
#endif

// All products of the rows of x and of weights, whose outputs the threads share; `put` as in `multiply_all`. There is room
// behind x for as many rows as make their number a multiple of PADDED.
constexpr int64_t PADDED = 32;

template <typename Put>
void multiply_eight(Team& team, const int8_t* w, int64_t outputs, const uint8_t* x, int64_t rows, int64_t in, Put put) {
    const int64_t blocks = (outputs + BLOCK - 1) / BLOCK;
    const auto put_all = [&](int64_t block, int64_t row, const int32_t* found, int64_t count) {
        const int64_t first = block * BLOCK, left = outputs - first;
        for (int64_t i = 0; i < std::min(count, rows - row); ++i) {
            if (left >= BLOCK) {
                put(row + i, first, found + i * BLOCK, BLOCK);  // a number that the compiler knows
            } else {
                put(row + i, first, found + i * BLOCK, left);
            }
        }
    };
#ifdef TILES
    if (rows > 2 && has_tiles()) {
        const Tiles tiles;
        team.share((blocks + 1) / 2, [&](int64_t pair) {
            const int64_t block = 2 * pair, next = std::min(block + 1, blocks - 1);
            for (int64_t row = 0; row < rows; row += 32) {
                int32_t found[2][32 * BLOCK];
                const auto multiply = rows - row > 16 ? (row ? multiply_tiles<true, false> : multiply_tiles<true, true>)
                                                      : (row ? multiply_tiles<false, false> : multiply_tiles<false, true>);
                multiply(w + block * BLOCK * in, w + next * BLOCK * in, x + row * in, in, found[0], found[1]);
                put_all(block, row, found[0], 32);
                if (next > block) put_all(next, row, found[1], 32);
            }
        });
        return;
    }
#endif
    team.share(blocks, [&](int64_t block) {
        const int8_t* const weights = w + block * BLOCK * in;
        int32_t found[TALLEST * BLOCK];
        const auto some = [&]<int64_t TALL>(int64_t row) {
            (row ? multiply_block<TALL, false> : multiply_block<TALL, true>)(weights, x + row * in, in, found);
            put_all(block, row, found, TALL);
        };
        int64_t row = 0;
        if constexpr (TALLEST >= 8) {
            for (; row + 8 <= rows; row += 8) some.template operator()<8>(row);
            for (; row + 4 <= rows; row += 4) some.template operator()<4>(row);
        }
        for (; row + 2 <= rows; row += 2) some.template operator()<2>(row);
        for (; row < rows; ++row) some.template operator()<1>(row);
    });
}
