// The kernels of one instruction set, and which of them this processor runs.
#pragma once

#include "call.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace torchwrap {

struct Choice {
    const char *name;
    const Kernel *decode;
    const PrefillKernel *prefill, *gradients, *few;
    bool (*runs)();
};

// That of a number, or the best for a negative one; null: this processor does not run it.
const Choice *choice(int number);

}  // namespace torchwrap
