// What an adapter adds to one linear layer: a row of an adapter's table. All numbers are 64 bits wide.
#pragma once

#include <cstdint>

namespace loraplex {

struct LoraPart {  // a projection of a fused layer
    std::int64_t rank_start, rank_stop;
    std::int64_t start, stop;  // its outputs in the fused layer
    const void* expand;
    const float* affine;  // [2, stop - start]: factors and shifts for the base's outputs; or null
};

struct LoraLayer {
    std::int64_t lora_rank;  // the sum over all parts
    std::int64_t parts;      // 0: the adapter does not touch the layer
    const void* shrink;
    const float* scales;  // [lora_rank] for int8 weights, else null
    LoraPart part[3];
};

}  // namespace loraplex
