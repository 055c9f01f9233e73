// Gradient of the queries: a block holds a tile of queries with their grad_out and walks over the keys they see.
//   S = Q K^T, dP = dO V^T, dS from both, dQ += dS K
// No atomics, so the result does not depend on the order of blocks. Shared memory: 4 * HEAD * (BLOCK_ROWS + KEYS) bytes.
#include "gradient.cuh"

constexpr int TILES = KEYS / 8;

KERNEL(THREADS) backward_rows(const Params p) {
    SHARED uint4 q_tile[BLOCK_ROWS * UNITS];
    SHARED uint4 grad_tile[BLOCK_ROWS * UNITS];
    SHARED uint4 k_tile[KEYS * UNITS];
    SHARED uint4 v_tile[KEYS * UNITS];

    const int batch = block_z(), head = block_y(), kv_head = head / p.group, block_row = block_x() * BLOCK_ROWS;
    const int row = block_row + thread_id() / 32 * ROWS;
    const int start = valid_start(p, batch), end = valid_end(p, batch);
    const Columns by_top = seen_by(p, block_row, start, end);
    const Columns by_bottom = seen_by(p, min(block_row + BLOCK_ROWS, p.q_length) - 1, start, end);
    const int tile_end = by_bottom.last < by_top.first ? 0 : by_bottom.last / KEYS + 1;

    load_tile<BLOCK_ROWS>(q_tile, p.q, batch, head, block_row, 0, p.q_length);
    load_tile<BLOCK_ROWS>(grad_tile, p.grad_out, batch, head, block_row, 0, p.q_length);
    Columns seen[2];
    float lse[2], delta[2];
    UNROLL for (int slot = 0; slot < 2; ++slot) {
        const int r = row + row_of(slot);
        const long long at = (static_cast<long long>(batch) * p.heads + head) * p.q_length + r;
        seen[slot] = seen_by(p, r, start, end);
        lse[slot] = r < p.q_length ? p.lse[at] : 0.0f;
        delta[slot] = r < p.q_length ? p.delta[at] : 0.0f;
    }
    float grad_q[UNITS][VALUES] = {};

    for (int tile = by_top.first / KEYS; tile < tile_end; ++tile) {
        barrier();
        load_tile<KEYS>(k_tile, p.k, batch, kv_head, tile * KEYS, start, end);
        load_tile<KEYS>(v_tile, p.v, batch, kv_head, tile * KEYS, start, end);
        barrier();
        if (row >= p.q_length) continue;
        const bool full = by_bottom.first <= tile * KEYS && tile * KEYS + KEYS - 1 <= by_top.last;
        float s[TILES][VALUES] = {}, d[TILES][VALUES] = {};
        multiply_rows(s, q_tile, row - block_row, k_tile, 0);
        multiply_rows(d, grad_tile, row - block_row, v_tile, 0);
        UNROLL for (int n = 0; n < TILES; ++n) UNROLL for (int i = 0; i < VALUES; ++i) {
            const bool visible = full || seen[slot_of(i)].holds(tile * KEYS + 8 * n + column_of(i));
            gradient(s[n][i], d[n][i], p, visible, lse[slot_of(i)], delta[slot_of(i)]);
        }
        multiply_values(grad_q, d, k_tile, 0);
    }
    store_rows(p.grad_q, batch, head, row, p.q_length, grad_q, p.scale);
}
