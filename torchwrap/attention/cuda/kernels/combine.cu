// Merging the partial results of the split form: one block per row, one thread per pair of its elements.
//
// With m = max(lse_i) and w_i = exp(lse_i - m): out = sum(w_i out_i) / sum(w_i), lse = m + log(sum(w_i)); a sink is a partial whose result
// is zero. Traffic: partials * (4 * HEAD + 4) bytes read per row. A row no partial has seen gives 0 and -inf.
// Source: T. Dao et al., Flash-Decoding for long-context inference, 2023; the merge is associative, see torchwrap/attention/merge.py.
#include "params.cuh"
#include "shim.cuh"

KERNEL(HEAD / 2) combine(const Params p) {
    const int row = block_x(), kv_head = block_y(), batch = block_z(), rows = p.group * p.q_length;
    const int head = kv_head * p.group + row / p.q_length, position = row % p.q_length;
    const long long first = (static_cast<long long>(batch) * p.kv_heads + kv_head) * rows + row;
    const long long step = static_cast<long long>(p.batch) * p.kv_heads * rows;

    float largest = p.sinks ? p.sinks[head] : -infinity();
    for (int i = 0; i < p.partials; ++i) largest = fmaxf(largest, p.partial_lse[first + i * step]);
    const float base = largest == -infinity() ? 0.0f : largest;
    float total = p.sinks ? expf(p.sinks[head] - base) : 0.0f, low = 0.0f, high = 0.0f;
    for (int i = 0; i < p.partials; ++i) {
        const float weight = expf(p.partial_lse[first + i * step] - base);
        const float* from = p.partial_out + (first + i * step) * HEAD + 2 * thread_id();
        total += weight;
        low += weight * from[0];
        high += weight * from[1];
    }
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    unsigned* to = reinterpret_cast<unsigned*>(p.out.data + batch * p.out.batch + head * p.out.head + position * p.out.row);
    to[thread_id()] = pack(low * inverse, high * inverse);
    if (thread_id() == 0) {
        p.lse[(static_cast<long long>(batch) * p.heads + head) * p.q_length + position] = total == 0.0f ? -infinity() : base + logf(total);
    }
}
