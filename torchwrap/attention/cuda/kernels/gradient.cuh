// One element of the backward pass, from the lse and delta of the whole row: partial passes are independent and add up.
//   p = exp(x - lse),  dx = p (dp - delta) slope,  with x the (soft-capped) logit and slope = 1 - (x / softcap)^2
// Source: T. Dao, FlashAttention-2, 2023, algorithm 2.
#pragma once
#include "tiles.cuh"

// In: the raw product q.k and dp = grad_out.v. Out: p and dx.
DEVICE void gradient(float& product, float& dp, const Params& p, bool visible, float lse, float delta) {
    float x = product * p.inner, slope = 1.0f;
    if (SOFTCAP) {
        const float t = tanh_fast(x);
        x = p.outer * t;
        slope = 1.0f - t * t;
    }
    // Chosen, not multiplied by zero: the lse of a row that sees nothing is -inf.
    product = visible ? exp2_fast(x - lse * LOG2E) : 0.0f;
    dp = visible ? product * (dp - delta) * slope : 0.0f;
}
