// The arguments of every kernel here, in one structure that the launch code fills field by field (torchwrap/attention/cuda/params.py).
#pragma once

// fp16 rows (batch, head, row, HEAD): the address of the first, and strides in elements, multiples of 8. Unit last stride.
struct Rows {
    unsigned short* data;
    long long batch, head, row;
};

struct Params {
    Rows q, k, v, out, grad_out, grad_q, grad_k, grad_v;
    float* lse;           // (batch, heads, q_length), natural logarithm
    const float* delta;   // (batch, heads, q_length): rowsum(grad_out * out) - grad_lse
    const float* sinks;   // (heads) logits, or null
    const int* kv_start;  // (batch) first valid column, or null
    const int* kv_end;    // (batch) one past the last, or null
    float* partial_out;   // (partials, batch, kv_heads, group * q_length, HEAD)
    float* partial_lse;   // (partials, batch, kv_heads, group * q_length)
    int batch, heads, kv_heads, group, q_length, kv_length;
    int lower, upper;  // row i sees the columns i + lower ... i + upper, as far as they are valid
    int splits, partials;
    float scale, softcap;  // softcap 0: none
    float inner, outer;    // scale / softcap and softcap * log2(e), or scale * log2(e) and unused
};
