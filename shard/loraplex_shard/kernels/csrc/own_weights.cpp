// Embeddings of tokens whose adapters have embeddings of their own: a row that replaces the base's, or the base's plus
// the product of the token's row of A with B (LoRA: arXiv 2106.09685; DoRA's factors: arXiv 2402.09353).

#include "own_weights.h"
#include "team.h"

#include <algorithm>

namespace loraplex {
namespace {

inline float number(float x) { return x; }
inline float number(bf16 x) { return from_bf16(x); }

// Replaces the base's embedding in `out` by the adapter's.
template <class T>
void embed(const OwnEmbedding& own, std::int64_t id, long k, T* out) {
    const std::int64_t *end = own.ids + own.count, *found = std::lower_bound(own.ids, end, id);
    if (found != end && *found == id) {
        std::memcpy(out, (const T*)own.rows + (found - own.ids) * k, k * sizeof(T));
        return;
    }
    const T* shrunk = (const T*)own.shrink + id * own.lora_rank;
    long ranks = id < own.tokens ? own.lora_rank : 0;
    for (long i = 0; i < k; i += LANES) {
        int lanes = int(k - i < LANES ? k - i : LANES);
        Floats total = load_first(out + i, lanes);
        if (own.factors) total = total * load_first(own.factors + i, lanes);
        for (long r = 0; r < ranks; r++)
            total = fma(splat(number(shrunk[r])), load_first((const T*)own.expand + r * k + i, lanes), total);
        store_first(out + i, total, lanes);
    }
}

}  // namespace
}  // namespace loraplex

using namespace loraplex;

// Replaces out [count, k], the base's embeddings of ids, by those of the tokens' adapters. own [count] has the address
// of each token's OwnEmbedding, or 0 if it has none; own is null if no token has one.
EXPORT void own_embeddings(int threads, int kind, long count, const std::int64_t* ids, long k, const std::int64_t* own,
                           void* out) {
    if (!own) return;
    with_type(kind, [&](auto* t) {
        using T = decltype(t);
        parallel_for(count > 1 ? threads : 1, count, [&](long i) {
            if (own[i]) embed(*(const OwnEmbedding*)own[i], ids[i], k, (T)out + i * k);
        });
    });
}
