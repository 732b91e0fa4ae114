// What an adapter adds to one linear layer, as the shard's tables have it.
#pragma once

#include <cstdint>

namespace loraplex {

struct LoraPart {  // one projection of a fused layer
    std::int64_t rank_start, rank_stop;
    std::int64_t start, stop;  // of its outputs
    const void* expand;
    const float* affine;  // [2, stop - start]: factors of the base's outputs, and what is added to them; or null
};

struct LoraLayer {           // as the shard's adapter tables have it: all numbers are 64 bits wide
    std::int64_t lora_rank;  // of all parts together
    std::int64_t parts;      // 0: the adapter does not touch the layer
    const void* shrink;
    const float* scales;  // [lora_rank], for int8 only
    LoraPart part[3];
};

}  // namespace loraplex
