// out += B (A x) for runs of tokens that each have an adapter of their own, at its own lora_rank (LoRA: arXiv 2106.09685;
// many adapters in one call: Punica, arXiv 2310.18547). Nothing is padded to the largest rank and nothing is gathered.
//
// A projection's A are rows of `shrink` [lora_rank, k]; its B, times the adapter's scale, is stored transposed,
// [lora_rank, n], so that outputs are lanes. Both may be int8, with one scale per lora_rank for the two together.

#include "common.h"

#include <omp.h>
#include <vector>

namespace loraplex {
namespace {

constexpr long SPAN = 192;  // outputs that one task expands to
constexpr int RANKS = 4;    // rows of A that one task multiplies

struct Part {  // one projection of a fused layer
    std::int64_t rank_start, rank_stop;
    std::int64_t start, stop;  // of its outputs
    const void* expand;
};

struct Layer {  // as the shard's adapter tables have it: all numbers are 64 bits wide
    std::int64_t lora_rank;  // of all parts together; 0: the adapter does not touch the layer
    std::int64_t parts;
    const void* shrink;
    const float* scales;  // [lora_rank], for int8 only
    Part part[3];
};

struct Task {
    long segment;
    long part, begin, end;  // ranks to shrink to, or outputs of a part to expand to
};

template <int R, int M, class T, class W>
inline void shrink(const T* x, long stride, long k, const W* a, float* out, long ranks) {
    Floats sums[R][M];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) sums[r][m] = zeros();
    long whole = k / LANES * LANES;
    for (long i = 0; i < whole; i += LANES) {
        Floats row[M];
        for (int m = 0; m < M; m++) row[m] = load(x + m * stride + i);
        for (int r = 0; r < R; r++) {
            Floats w = load(a + r * k + i);
            for (int m = 0; m < M; m++) sums[r][m] = fma(w, row[m], sums[r][m]);
        }
    }
    if (int n = int(k - whole))
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++)
                sums[r][m] = fma(load_first(a + r * k + whole, n), load_first(x + m * stride + whole, n), sums[r][m]);
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) out[m * ranks + r] = sum(sums[r][m]);
}

template <class T, class W>
void shrink_rows(const T* x, long stride, long rows, long k, const W* a, long count, float* out, long ranks) {
    for (long r = 0; r < count;) {
        int step = count - r >= RANKS ? RANKS : count - r >= 2 ? 2 : 1;
        for (long m = 0; m < rows;) {
            float* to = out + m * ranks + r;
            const T* from = x + m * stride;
            if (rows - m >= 2) {
                if (step == RANKS) shrink<RANKS, 2>(from, stride, k, a + r * k, to, ranks);
                else if (step == 2) shrink<2, 2>(from, stride, k, a + r * k, to, ranks);
                else shrink<1, 2>(from, stride, k, a + r * k, to, ranks);
                m += 2;
            } else {
                if (step == RANKS) shrink<RANKS, 1>(from, stride, k, a + r * k, to, ranks);
                else if (step == 2) shrink<2, 1>(from, stride, k, a + r * k, to, ranks);
                else shrink<1, 1>(from, stride, k, a + r * k, to, ranks);
                m += 1;
            }
        }
        r += step;
    }
}

// V times sixteen outputs; of the last sixteen only n, if FULL is false.
template <int V, int M, bool FULL, class T, class W>
inline void expand(const float* shrunk, long ranks, long count, const W* b, long width, T* out, long stride, int n) {
    Floats sums[M][V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) sums[m][v] = zeros();
    for (long r = 0; r < count; r++)
        for (int v = 0; v < V; v++) {
            Floats w = FULL ? load(b + r * width + v * LANES) : load_first(b + r * width + v * LANES, n);
            for (int m = 0; m < M; m++) sums[m][v] = fma(splat(shrunk[m * ranks + r]), w, sums[m][v]);
        }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) {
            T* to = out + m * stride + v * LANES;
            if constexpr (FULL)
                store(to, load(to) + sums[m][v]);
            else
                store_first(to, load_first(to, n) + sums[m][v], n);
        }
}

// `count` ranks to `outputs` outputs, for `rows` rows.
template <class T, class W>
void expand_rows(const float* shrunk, long ranks, long rows, long count, const W* b, long width, long outputs, T* out,
                 long stride) {
    for (long i = 0; i < outputs;) {
        bool wide = outputs - i >= 2 * LANES;
        int n = int(outputs - i < LANES ? outputs - i : LANES);
        for (long m = 0; m < rows;) {
            const float* from = shrunk + m * ranks;
            T* to = out + m * stride + i;
            if (wide && rows - m >= 2) {
                expand<2, 2, true>(from, ranks, count, b + i, width, to, stride, LANES);
                m += 2;
            } else if (wide) {
                expand<2, 1, true>(from, ranks, count, b + i, width, to, stride, LANES);
                m += 1;
            } else {
                expand<1, 1, false>(from, ranks, count, b + i, width, to, stride, n);
                m += 1;
            }
        }
        i += wide ? 2 * LANES : LANES;
    }
}

template <class T, class W>
void add_delta(int threads, long segments, const std::int64_t* starts, const std::int64_t* stops,
               const Layer* const* tables, long layer, const T* x, long k, T* out, long n) {
    static thread_local Scratch scratch;
    std::vector<Task> shrinks, expands;
    std::vector<std::size_t> places(segments);  // of each segment's shrunk rows
    std::size_t size = 0;
    for (long s = 0; s < segments; s++) {
        const Layer& own = tables[s][layer];
        places[s] = size;
        size += (stops[s] - starts[s]) * own.lora_rank;
        for (long r = 0; r < own.lora_rank; r += 2 * RANKS)
            shrinks.push_back({s, 0, r, r + 2 * RANKS < own.lora_rank ? r + 2 * RANKS : own.lora_rank});
        for (long p = 0; own.lora_rank && p < own.parts; p++)
            for (long begin = own.part[p].start; begin < own.part[p].stop; begin += SPAN)
                expands.push_back({s, p, begin, begin + SPAN < own.part[p].stop ? begin + SPAN : own.part[p].stop});
    }
    if (shrinks.empty()) return;
    float* shrunk = scratch.get<float>(size);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (std::size_t i = 0; i < shrinks.size(); i++) {
            const Task& task = shrinks[i];
            const Layer& own = tables[task.segment][layer];
            long rows = stops[task.segment] - starts[task.segment];
            float* to = shrunk + places[task.segment] + task.begin;
            shrink_rows(x + starts[task.segment] * k, k, rows, k, (const W*)own.shrink + task.begin * k,
                        task.end - task.begin, to, own.lora_rank);
            if (sizeof(W) == 1)
                for (long m = 0; m < rows; m++)
                    for (long r = 0; r < task.end - task.begin; r++)
                        to[m * own.lora_rank + r] *= own.scales[task.begin + r];
        }
#pragma omp for schedule(dynamic, 1)
        for (std::size_t i = 0; i < expands.size(); i++) {
            const Task& task = expands[i];
            const Layer& own = tables[task.segment][layer];
            const Part& part = own.part[task.part];
            long rows = stops[task.segment] - starts[task.segment];
            expand_rows(shrunk + places[task.segment] + part.rank_start, own.lora_rank, rows,
                        part.rank_stop - part.rank_start, (const W*)part.expand + task.begin - part.start,
                        part.stop - part.start, task.end - task.begin,
                        out + starts[task.segment] * n + task.begin, n);
        }
    }
}

}  // namespace
}  // namespace loraplex

using namespace loraplex;

// Segment s is the rows [starts[s], stops[s]) of x [.., k] and out [.., n]; tables[s] its adapter's layers. The adapters'
// weights are of the kind of x and out, or int8.
EXPORT void add_lora_delta(int threads, int kind, int int8_weights, long segments, const std::int64_t* starts,
                           const std::int64_t* stops, const void* tables, long layer, const void* x, long k,
                           void* out, long n) {
    with_type(kind, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        auto run = int8_weights ? add_delta<T, std::int8_t> : add_delta<T, T>;
        run(threads, segments, starts, stops, (const Layer* const*)tables, layer, (const T*)x, k, (T*)out, n);
    });
}
