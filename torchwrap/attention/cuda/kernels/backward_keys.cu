// Gradients of keys and values: a block holds a tile of keys with their values and walks over the queries that see them, of every query
// head of the group, so that grad_k and grad_v have the KV heads of k and v and need no atomics.
//   S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q
// All four are the two products of the forward pass with rows and columns exchanged; lse and delta belong to columns here.
// OUTPUTS: 1 = grad_k, 2 = grad_v, 3 = both. On Volta with HEAD = 128 the sums of both are 256 registers: they take two launches there.
// Shared memory: 4 * HEAD * (BLOCK_ROWS + KEYS) bytes.
#include "gradient.cuh"

constexpr int TILES = KEYS / 8;
constexpr bool WANTS_K = OUTPUTS & 1, WANTS_V = OUTPUTS & 2;

KERNEL(THREADS) backward_keys(const Params p) {
    SHARED uint4 k_tile[BLOCK_ROWS * UNITS];
    SHARED uint4 v_tile[BLOCK_ROWS * UNITS];
    SHARED uint4 q_tile[KEYS * UNITS];
    SHARED uint4 grad_tile[KEYS * UNITS];

    const int batch = block_z(), kv_head = block_y(), block_row = block_x() * BLOCK_ROWS;
    const int row = block_row + thread_id() / 32 * ROWS;
    const int start = valid_start(p, batch), end = valid_end(p, batch);
    load_tile<BLOCK_ROWS>(k_tile, p.k, batch, kv_head, block_row, start, end);
    load_tile<BLOCK_ROWS>(v_tile, p.v, batch, kv_head, block_row, start, end);

    // Query i sees column j when i + lower <= j <= i + upper, so column j is seen by j - upper ... j - lower.
    const int low = max(block_row, start), high = min(block_row + BLOCK_ROWS, end) - 1;
    const int q_first = max(low - p.upper, 0), q_last = min(high - p.lower, p.q_length - 1);
    const int tile_first = q_first / KEYS, tile_end = high < low || q_last < q_first ? 0 : q_last / KEYS + 1;
    float grad_k[UNITS][VALUES] = {}, grad_v[UNITS][VALUES] = {};  // one that is not wanted takes no register

    for (int head = kv_head * p.group; head < (kv_head + 1) * p.group; ++head) {
        for (int tile = tile_first; tile < tile_end; ++tile) {
            const int position = tile * KEYS;
            barrier();
            load_tile<KEYS>(q_tile, p.q, batch, head, position, 0, p.q_length);
            load_tile<KEYS>(grad_tile, p.grad_out, batch, head, position, 0, p.q_length);
            barrier();
            if (row >= p.kv_length) continue;
            float s[TILES][VALUES] = {}, d[TILES][VALUES] = {};
            multiply_rows(s, k_tile, row - block_row, q_tile, 0);
            if (WANTS_K) multiply_rows(d, v_tile, row - block_row, grad_tile, 0);
            UNROLL for (int n = 0; n < TILES; ++n) UNROLL for (int i = 0; i < VALUES; ++i) {
                const int query = position + 8 * n + column_of(i);
                const bool inside = query < p.q_length;
                const bool visible = inside && seen_by(p, query, start, end).holds(row + row_of(slot_of(i)));
                const long long at = (static_cast<long long>(batch) * p.heads + head) * p.q_length + query;
                gradient(s[n][i], d[n][i], p, visible, inside ? p.lse[at] : 0.0f, inside ? p.delta[at] : 0.0f);
            }
            if (WANTS_V) multiply_values(grad_v, s, grad_tile, 0);
            if (WANTS_K) multiply_values(grad_k, d, q_tile, 0);
        }
    }
    if (WANTS_K) store_rows(p.grad_k, batch, kv_head, row, p.kv_length, grad_k, p.scale);
    if (WANTS_V) store_rows(p.grad_v, batch, kv_head, row, p.kv_length, grad_v, 1.0f);
}
