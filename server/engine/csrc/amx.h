// bf16 products by AMX: tiles of 16 rows times panels of 16 outputs, 32 inputs at a time.
//
// Laws:
// - tdpbf16ps sums the even and the odd inputs of 32 in two chains, adds these, and adds that to the tile's sum. What
//   it computes for a row reads no other row.
// - A thread's tiles are configured while it multiplies, and released at the end: the operating system then need not
//   save them, nor keep the core awake for them.
#pragma once

#include "bf16.h"

namespace gemma::GEMMA_LEVEL {

constexpr int64_t kTileRows16 = 16;
constexpr int64_t kTileBytes = 64;  // of a row

// The operand of ldtilecfg, for palette 1.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// Two tiles of x times two panels: tiles 0 to 3 hold the sums, 4 and 5 the rows of x, 6 and 7 the panels' weights.
class TileMultiplier {
public:
    static constexpr int64_t kRows = 2 * kTileRows16, kPanels = 2;

    TileMultiplier() = default;
    ~TileMultiplier() {
        if (configured_) _tile_release();
    }
    TileMultiplier(const TileMultiplier&) = delete;
    TileMultiplier& operator=(const TileMultiplier&) = delete;

    void operator()(const Bf16Product& product) {
        for (int64_t panel = 0; panel < product.panels; panel += kPanels) {
            const bool pair = panel + 1 < product.panels;
            for (int64_t row = 0; row < product.rows; row += kRows) {
                const int64_t rows = product.rows - row < kRows ? product.rows - row : kRows;
                configure(rows);
                if (rows > kTileRows16)
                    pair ? multiply<2, 2>(product, row, panel) : multiply<2, 1>(product, row, panel);
                else
                    pair ? multiply<1, 2>(product, row, panel) : multiply<1, 1>(product, row, panel);
            }
        }
    }

private:
    void configure(int64_t rows) {
        if (configured_ == rows) return;
        configured_ = rows;
        const uint8_t first = uint8_t(rows < kTileRows16 ? rows : kTileRows16);
        const uint8_t second = uint8_t(rows > kTileRows16 ? rows - kTileRows16 : kTileRows16);
        TileConfig config;
        for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = kTileBytes;
        config.rows[0] = config.rows[1] = config.rows[4] = first;
        config.rows[2] = config.rows[3] = config.rows[5] = second;
        config.rows[6] = config.rows[7] = kTileInputs / 2;
        // gcc's intrinsic says that it reads 8 bytes, so that stores to the others may be dropped.
        asm volatile("" : : "r"(&config) : "memory");
        _tile_loadconfig(&config);
    }

    template <int RowTiles, int Panels>
    static void multiply(const Bf16Product& product, int64_t row, int64_t panel) {
        const bf16* x = product.x + row * product.x_stride;
        const bf16* w = product.weights + panel * product.panel_stride;
        float* sums = product.sums + (panel * product.rows + row) * kPanel;
        float* next_sums = sums + product.rows * kPanel;  // of the second panel
        constexpr int64_t tile = kTileRows16 * kPanel;
        if (product.add) {
            _tile_loadd(0, sums, kTileBytes);
            if constexpr (Panels == 2) _tile_loadd(1, next_sums, kTileBytes);
            if constexpr (RowTiles == 2) _tile_loadd(2, sums + tile, kTileBytes);
            if constexpr (RowTiles == 2 && Panels == 2) _tile_loadd(3, next_sums + tile, kTileBytes);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        const int64_t whole = product.inputs / kTileInputs * kTileInputs;
        for (int64_t k = 0; k < whole; k += kTileInputs) {
            // The rows after these find the weights in the cache.
            if (row == 0) prefetch<Panels>(w + k * kPanel, product.panel_stride);
            multiply_add<RowTiles, Panels>(x + k, product.x_stride, w + k * kPanel, product.panel_stride);
        }
        if (whole < product.inputs) {
            // Behind a panel's last input lies the next panel, or nothing.
            constexpr int64_t size = kTileInputs * kPanel;
            alignas(64) bf16 rest[Panels * size] = {};
            for (int64_t p = 0; p < Panels; ++p) {
                const bf16* from = w + p * product.panel_stride + whole * kPanel;
                std::memcpy(rest + p * size, from, size_t((product.inputs - whole) * kPanel) * sizeof(bf16));
            }
            asm volatile("" : : "r"(rest) : "memory");  // gcc's tile loads do not say that they read
            multiply_add<RowTiles, Panels>(x + whole, product.x_stride, rest, size);
        }
        _tile_stored(0, sums, kTileBytes);
        if constexpr (Panels == 2) _tile_stored(1, next_sums, kTileBytes);
        if constexpr (RowTiles == 2) _tile_stored(2, sums + tile, kTileBytes);
        if constexpr (RowTiles == 2 && Panels == 2) _tile_stored(3, next_sums + tile, kTileBytes);
    }

    // Adds the product of 32 inputs.
    template <int RowTiles, int Panels>
    [[gnu::always_inline]] static void multiply_add(
        const bf16* x, int64_t x_stride, const bf16* w, int64_t panel_stride
    ) {
        const int64_t x_bytes = x_stride * int64_t(sizeof(bf16));
        _tile_loadd(6, w, kTileBytes);
        _tile_loadd(4, x, x_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (Panels == 2) {
            _tile_loadd(7, w + panel_stride, kTileBytes);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (RowTiles == 2) {
            _tile_loadd(5, x + kTileRows16 * x_stride, x_bytes);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (Panels == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }

    template <int Panels>
    [[gnu::always_inline]] static void prefetch(const bf16* w, int64_t panel_stride) {
        constexpr int64_t ahead = 2 * kTileInputs * kPanel * int64_t(sizeof(bf16));
        for (int64_t p = 0; p < Panels; ++p) {
            const char* at = reinterpret_cast<const char*>(w + p * panel_stride) + ahead;
            for (int64_t line = 0; line < kTileInputs / 2; ++line)
                _mm_prefetch(at + line * kTileBytes, _MM_HINT_T0);
        }
    }

    int64_t configured_ = 0;  // for so many rows, if any
};

}  // namespace gemma::GEMMA_LEVEL
