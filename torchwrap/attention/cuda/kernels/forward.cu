// Attention forward, and its split form for few queries over many keys.
//
// A block holds BLOCK_ROWS queries and walks over the tiles of keys that any of them sees; a warp holds whole rows of the result.
// KEY_WARPS = 1 (forward): one block per query tile and query head.
// KEY_WARPS = 4 (split): the group of query heads that share a KV head is folded into rows, so K and V are read once; blocks share the keys
// among them and the warps of a block share each tile. Every warp leaves a partial result, which combine.cu merges.
// Level 1 of the tiling is the stage in registers, level 2 the tile in shared memory (K + V: 4 * KEYS * HEAD bytes; Q: 2 * BLOCK_ROWS *
// HEAD). Global traffic of one block: 2 * BLOCK_ROWS * HEAD + 4 * HEAD * (columns seen) bytes.
// Source: T. Dao, FlashAttention-2, 2023, algorithm 1; FastAttention, 2024, arXiv 2410.16663, section on Volta, for the register-only
// layout change (the derivation is ours). Exponents are in base 2; a row that has seen nothing keeps maximum -inf and sum 0.
#include "tiles.cuh"

constexpr bool SPLIT = KEY_WARPS > 1;
constexpr int WARP_KEYS = KEYS / KEY_WARPS;
constexpr int TILES = WARP_KEYS / 8;

// Raw products to logits in base 2, soft-capped. The factors are arguments: computed here they would take registers of the main loop.
DEVICE void to_logits(float (&s)[TILES][VALUES], const Params& p) {
    UNROLL for (int n = 0; n < TILES; ++n) UNROLL for (int i = 0; i < VALUES; ++i) s[n][i] *= p.inner;
    if (SOFTCAP) {
        UNROLL for (int n = 0; n < TILES; ++n) UNROLL for (int i = 0; i < VALUES; ++i) s[n][i] = p.outer * tanh_fast(s[n][i]);
    }
}

KERNEL(THREADS) attention(const Params p) {
    SHARED uint4 q_tile[BLOCK_ROWS * UNITS];
    SHARED uint4 k_tile[KEYS * UNITS];
    SHARED uint4 v_tile[KEYS * UNITS];

    const int batch = block_z();
    const int split = SPLIT ? block_x() % p.splits : 0;
    const int block_row = (SPLIT ? block_x() / p.splits : block_x()) * BLOCK_ROWS;
    const int kv_head = SPLIT ? block_y() : block_y() / p.group;
    const int row_count = SPLIT ? p.group * p.q_length : p.q_length;
    const int warp = thread_id() / 32;
    const int row = block_row + (warp % ROW_WARPS) * ROWS;
    const int key_warp = warp / ROW_WARPS;

    const int start = valid_start(p, batch), end = valid_end(p, batch);
    const int top = SPLIT ? 0 : block_row, bottom = SPLIT ? p.q_length - 1 : min(block_row + BLOCK_ROWS, p.q_length) - 1;
    const Columns by_top = seen_by(p, top, start, end), by_bottom = seen_by(p, bottom, start, end);
    int tile = by_top.first / KEYS, tile_end = by_bottom.last < by_top.first ? tile : by_bottom.last / KEYS + 1;
    const int full_first = (by_bottom.first + KEYS - 1) / KEYS, full_end = (by_top.last + 1) / KEYS;
    if (SPLIT) {
        const int each = (tile_end - tile + p.splits - 1) / p.splits;
        tile += split * each;
        tile_end = min(tile + each, tile_end);
    }

    for (int index = thread_id(); index < BLOCK_ROWS * UNITS; index += THREADS) {
        const int r = block_row + index / UNITS;
        uint4 value{0, 0, 0, 0};
        if (r < row_count) {
            const int head = SPLIT ? kv_head * p.group + r / p.q_length : block_y();
            value = row_units(p.q, batch, head, SPLIT ? r % p.q_length : r)[index % UNITS];
        }
        q_tile[unit_at(index / UNITS, index % UNITS)] = value;
    }

    float sums[UNITS][VALUES] = {};
    float maximum[2] = {-infinity(), -infinity()}, total[2] = {0.0f, 0.0f};

    Stage<KEYS> k_next, v_next;
    if (tile < tile_end) {
        k_next.fetch(p.k, batch, kv_head, tile * KEYS, start, end);
        v_next.fetch(p.v, batch, kv_head, tile * KEYS, start, end);
    }
    for (; tile < tile_end; ++tile) {
        barrier();  // everybody has read the tile before
        k_next.store(k_tile);
        v_next.store(v_tile);
        barrier();
        const bool more = tile + 1 < tile_end, works = row < row_count;  // works: the same for all lanes of a warp
        if (more) k_next.fetch(p.k, batch, kv_head, (tile + 1) * KEYS, start, end);
        float s[TILES][VALUES] = {};
        if (works) multiply_rows(s, q_tile, row - block_row, k_tile, key_warp * WARP_KEYS);
        // Here and not with K: two stages beside sums and scores do not fit into the registers of Volta at HEAD = 128.
        if (more) v_next.fetch(p.v, batch, kv_head, (tile + 1) * KEYS, start, end);
        if (!works) continue;

        to_logits(s, p);
        if (tile < full_first || full_end <= tile) {
            const int column = tile * KEYS + key_warp * WARP_KEYS;
            Columns seen[2];  // found again for each such tile: there are few, and registers are fewer
            UNROLL for (int slot = 0; slot < 2; ++slot) {
                const int r = row + row_of(slot);
                seen[slot] = seen_by(p, SPLIT ? r % p.q_length : r, start, end);
            }
            UNROLL for (int n = 0; n < TILES; ++n) UNROLL for (int i = 0; i < VALUES; ++i) {
                if (!seen[slot_of(i)].holds(column + 8 * n + column_of(i))) s[n][i] = -infinity();
            }
        }

        float largest[2] = {maximum[0], maximum[1]}, base[2], correction[2];
        UNROLL for (int n = 0; n < TILES; ++n) UNROLL for (int i = 0; i < VALUES; ++i) {
            largest[slot_of(i)] = fmaxf(largest[slot_of(i)], s[n][i]);
        }
        UNROLL for (int slot = 0; slot < 2; ++slot) {
            largest[slot] = row_max(largest[slot]);
            base[slot] = largest[slot] == -infinity() ? 0.0f : largest[slot];
            correction[slot] = exp2_fast(maximum[slot] - base[slot]);
            maximum[slot] = largest[slot];
            total[slot] *= correction[slot];  // of this lane's columns; the lanes of a row add up at the end
        }
        UNROLL for (int n = 0; n < TILES; ++n) UNROLL for (int i = 0; i < VALUES; ++i) {
            s[n][i] = exp2_fast(s[n][i] - base[slot_of(i)]);
            total[slot_of(i)] += s[n][i];
        }
        UNROLL for (int n = 0; n < UNITS; ++n) UNROLL for (int i = 0; i < VALUES; ++i) sums[n][i] *= correction[slot_of(i)];
        multiply_values(sums, s, v_tile, key_warp * WARP_KEYS);
    }

    UNROLL for (int slot = 0; slot < 2; ++slot) total[slot] = row_sum(total[slot]);
    UNROLL for (int slot = 0; slot < 2; ++slot) {
        if (!SPLIT && p.sinks) {
            const float sink = p.sinks[block_y()] * LOG2E, largest = fmaxf(maximum[slot], sink);
            const float base = largest == -infinity() ? 0.0f : largest, correction = exp2_fast(maximum[slot] - base);
            total[slot] = total[slot] * correction + exp2_fast(sink - base);
            UNROLL for (int n = 0; n < UNITS; ++n) UNROLL for (int i = 0; i < VALUES; ++i) {
                if (slot_of(i) == slot) sums[n][i] *= correction;
            }
            maximum[slot] = largest;
        }
        // Compared with zero, not "greater than": a NaN total has to reach the result.
        const float inverse = total[slot] == 0.0f ? 0.0f : reciprocal_fast(total[slot]);
        const float lse = total[slot] == 0.0f ? -infinity() : (maximum[slot] + log2f(total[slot])) * LN2;
        const int r = row + row_of(slot);
        UNROLL for (int n = 0; n < UNITS; ++n) UNROLL for (int i = 0; i < VALUES; ++i) {
            if (slot_of(i) == slot) sums[n][i] *= inverse;
        }
        if (r >= row_count) continue;
        // The four columns of lanes that share a row hold the same lse: any of them may write it.
        if (!SPLIT) {
            p.lse[(static_cast<long long>(batch) * p.heads + block_y()) * p.q_length + r] = lse;
            continue;
        }
        const int partial = split * KEY_WARPS + key_warp;
        const long long at = ((static_cast<long long>(partial) * p.batch + batch) * p.kv_heads + kv_head) * row_count + r;
        p.partial_lse[at] = lse;
        UNROLL for (int n = 0; n < UNITS; ++n) UNROLL for (int i = 0; i < VALUES; ++i) {
            if (slot_of(i) == slot) p.partial_out[at * HEAD + output_column(n, i)] = sums[n][i];
        }
    }
    if (!SPLIT) store_rows(p.out, batch, block_y(), row, row_count, sums, 1.0f);
}
