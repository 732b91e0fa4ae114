// The rows of tables that Python fills. Every field is 64 bits wide. kernels/tables.py reads the fields' names and
// order from here, so a field is declared once.
#pragma once

#include <cstdint>

namespace loraplex {

struct LoraPart {  // what an adapter adds to a projection of a fused layer
    std::int64_t rank_start;
    std::int64_t rank_stop;
    std::int64_t start;  // its outputs in the fused layer are [start, stop)
    std::int64_t stop;
    const void* expand;
    const float* affine;  // [2, stop - start]: factors and shifts for the base's outputs; or null
};

struct LoraLayer {           // what an adapter adds to a linear layer
    std::int64_t lora_rank;  // the sum over all parts
    std::int64_t parts;      // 0: the adapter does not touch the layer
    const void* shrink;
    const float* scales;  // [lora_rank] for int8 weights, else null
    LoraPart part[3];
};

struct OwnEmbedding {     // the embeddings of an adapter's tokens
    std::int64_t count;   // tokens with a row of their own
    std::int64_t tokens;  // rows of shrink
    std::int64_t lora_rank;
    const std::int64_t* ids;  // [count], ascending
    const void* rows;         // [count, hidden]
    const void* shrink;       // [tokens, lora_rank]
    const void* expand;       // [lora_rank, hidden]
    const float* factors;     // [hidden] for the base's embedding; or null
};

struct Expert {  // a linear layer of an expert
    const void* weight;
    const void* bias;   // or null
    std::int64_t bits;  // of a quantized weight; 0 if the weight has floats
    std::int64_t group;
};

}  // namespace loraplex
