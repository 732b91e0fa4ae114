// A mixture of experts. Tokens choose experts, and the pairs of a token and an expert are sorted by expert. Each
// expert's layers are then computed for its run of pairs, with the kernels of linear.cpp, quantized.cpp and lora.cpp.

#include <algorithm>
#include <vector>

#include "tables.h"
#include "team.h"

namespace loraplex {
namespace {

inline float number(float x) { return x; }
inline float number(bf16 x) { return from_bf16(x); }

// Chooses the `chosen` largest of a row of logits, the first of equal ones first, and computes their weights.
template <class T>
void choose(const T* logits, long experts, long chosen, bool normalized, std::int64_t* ids, float* weights) {
    static thread_local std::vector<float> left;
    left.resize(experts);
    float most = -INFINITY, all = 0, own = 0;
    for (long e = 0; e < experts; e++) {
        left[e] = number(logits[e]);
        if (left[e] > most) most = left[e];
    }
    for (float value : left) all += std::exp(value - most);
    static thread_local std::vector<bool> taken;
    taken.assign(experts, false);
    for (long j = 0; j < chosen; j++) {
        long best = -1;  // if the logits are not finite, any expert will do
        for (long e = 0; e < experts; e++)
            if (!taken[e] && (best < 0 || left[e] > left[best])) best = e;
        taken[best] = true;
        ids[j] = best;
        weights[j] = std::exp(left[best] - most);
        own += weights[j];
    }
    for (long j = 0; j < chosen; j++) weights[j] /= normalized ? own : all;
}

constexpr long SMALL = 8192;  // for fewer numbers, a second thread costs more than it saves

}  // namespace
}  // namespace loraplex

using namespace loraplex;

// logits [tokens, experts] -> weights, order, places [pairs] and starts [experts + 1], as Routing in ops/base.py
// describes them.
EXPORT void route(int kind, long tokens, long experts, long chosen, int normalized, const void* logits, float* weights,
                  std::int64_t* order, std::int64_t* places, std::int64_t* starts) {
    std::int64_t* ids = order;  // the experts' ids are kept here until they are counted
    with_type(kind, [&](auto* t) {
        for (long i = 0; i < tokens; i++)
            choose((decltype(t))logits + i * experts, experts, chosen, normalized, ids + i * chosen,
                   weights + i * chosen);
    });
    std::fill(starts, starts + experts + 1, 0);
    for (long pair = 0; pair < tokens * chosen; pair++) starts[ids[pair] + 1]++;
    for (long e = 0; e < experts; e++) starts[e + 1] += starts[e];
    static thread_local std::vector<std::int64_t> next;
    next.assign(starts, starts + experts);
    for (long pair = 0; pair < tokens * chosen; pair++) places[pair] = next[ids[pair]]++;
    for (long pair = 0; pair < tokens * chosen; pair++) order[places[pair]] = pair;
}

// Row places[p] of out [pairs, n] is row p / chosen of x.
EXPORT void dispatch(int threads, int kind, long pairs, long chosen, const std::int64_t* places, long n, const void* x,
                     void* out) {
    long bytes = n * (kind == BFLOAT16 ? 2 : 4);
    parallel_for(pairs * n > SMALL ? threads : 1, pairs, [&](long pair) {
        std::memcpy((char*)out + places[pair] * bytes, (const char*)x + pair / chosen * bytes, bytes);
    });
}

// out [pairs, n]: each expert's layer applied to its own run of rows of x [pairs, k].
EXPORT void expert_linear(int threads, int kind, long count, const std::int64_t* starts, long n, long k, const void* x,
                          const void* experts, void* out) {
    long size = kind == BFLOAT16 ? 2 : 4;
    for (long e = 0; e < count; e++) {
        const Expert& expert = ((const Expert*)experts)[e];
        long rows = starts[e + 1] - starts[e];
        const char* own = (const char*)x + starts[e] * k * size;
        char* to = (char*)out + starts[e] * n * size;
        if (rows && expert.bits)
            quantized_linear(threads, kind, rows, n, k, own, int(expert.bits), int(expert.group), expert.weight,
                             expert.bias, to);
        else if (rows)
            linear(threads, kind, rows, n, k, own, expert.weight, expert.bias, to);
    }
}

// add_lora_delta for pairs in the order of their experts. Expert e's layer is row layer + e of an adapter's table. A
// table that ends before that row, at table_rows[s], has nothing for experts. Segments are runs of tokens.
EXPORT void add_expert_lora_delta(int threads, int kind, int int8_weights, long segments, const std::int64_t* starts,
                                  const std::int64_t* stops, const std::int64_t* tables, const std::int64_t* table_rows,
                                  long layer, long count, const std::int64_t* expert_starts, const std::int64_t* order,
                                  long chosen, const void* x, long k, void* out, long n) {
    static thread_local std::vector<std::int64_t> first, end, own;
    first.clear(), end.clear(), own.clear();
    for (long e = 0; e < count; e++) {
        const std::int64_t *begin = order + expert_starts[e], *stop = order + expert_starts[e + 1];
        for (long s = 0; s < segments && begin < stop; s++) {
            if (table_rows[s] <= layer + e) continue;
            const std::int64_t* from = std::lower_bound(begin, stop, starts[s] * chosen);
            const std::int64_t* to = std::lower_bound(from, stop, stops[s] * chosen);
            if (from == to) continue;
            first.push_back(from - order);
            end.push_back(to - order);
            own.push_back(tables[s] + e * std::int64_t(sizeof(LoraLayer)));
        }
    }
    if (!own.empty())
        add_lora_delta(threads, kind, int8_weights, long(own.size()), first.data(), end.data(), own.data(), layer, x, k,
                       out, n);
}

// out [tokens, n]: the weighted sum of the rows of x of each token's pairs. If there is a shared [tokens, n], it is
// added, times the sigmoid of gate [tokens] if there is a gate.
EXPORT void combine(int threads, int kind, long tokens, long chosen, const float* weights, const std::int64_t* places,
                    long n, const void* x, const void* shared, const void* gate, void* out) {
    with_type(kind, [&](auto* t) {
        using T = decltype(t);
        parallel_for(tokens * chosen * n > SMALL ? threads : 1, tokens, [&](long token) {
            float opened = gate ? 1 / (1 + std::exp(-number(((T)gate)[token]))) : 1;
            for (long i = 0; i < n; i += LANES) {
                int lanes = int(n - i < LANES ? n - i : LANES);
                Floats sum = shared ? load_first((T)shared + token * n + i, lanes) * splat(opened) : zeros();
                for (long pair = token * chosen; pair < (token + 1) * chosen; pair++)
                    sum = fma(load_first((T)x + places[pair] * n + i, lanes), splat(weights[pair]), sum);
                store_first((T)out + token * n + i, sum, lanes);
            }
        });
    });
}
