// out += B (A x) for runs of tokens, each with its own adapter at its own lora_rank (LoRA: arXiv 2106.09685; many
// adapters in one call: Punica, arXiv 2310.18547). Nothing is padded to the largest rank, and nothing is gathered.
//
// A projection's A is some rows of `shrink` [lora_rank, k]. Its B, times the adapter's scale, is stored transposed,
// [lora_rank, n], so that outputs are lanes. Both may be int8, with one scale per rank for A and B together. If a
// projection has factors and shifts for its outputs, they are applied first.
//
// A decode step spends its time reading the adapters. So their weights are cut into units. Each thread has an equal
// share of them, in the order in which they are in memory, and prefetches a unit while it computes another. Runs are
// multiplied with vectors (lora_vectors.h). Long runs, such as those of prefill chunks, are multiplied with tiles if
// the processor has them (lora_tiles.h).

#include "lora_tiles.h"
#include "lora_vectors.h"
#include "tables.h"
#include "team.h"

#include <vector>

namespace loraplex {
namespace {

constexpr long RANKS = 4;            // rows of A in a unit
constexpr long OUTPUTS = 2 * WIDTH;  // columns of B in a unit
constexpr long AHEAD = 4;            // units to prefetch: with few rows, computing one is faster than memory
constexpr long ROWS = 32;            // rows of x that share a unit's weights while they are in the cache
constexpr long READING = 4;          // the cost of reading a weight, in multiplications
constexpr long TILES_GAIN = 4;       // rows that tiles multiply in a single row's time, packing included

struct Run {  // up to ROWS rows of one adapter, or up to TILE_RUN with tiles
    long start, rows;
    const LoraLayer* layer;
    bool tiles;
    long stride;  // of the rows of its A x: lora_rank, plus a tile's depth of zeros with tiles
    long shrunk;  // where its A x goes: [rows][stride] of Factor, or of bfloat16 with tiles
};

struct Unit {
    const Run* run;
    const LoraPart* part;  // null for a unit of A
    long begin, end;       // rows of A, or outputs of the part for a unit of B
    const void* weights;
};

template <class X, class W>
void shrink_unit(const Unit& unit, const X* x, long stride, long k, const W* next, X* out) {
    long rows = unit.run->rows, ranks = unit.run->layer->lora_rank, r = 0;
    const W* a = (const W*)unit.weights;
    auto all_rows = [&](auto count) {
        constexpr int R = decltype(count)::value;
        constexpr int FEWER = R < SHRINK_RANKS ? R : SHRINK_RANKS;
        if (rows == 1) {
            shrink<R, 1>(x, stride, k, a + r * k, next + r * k, out + r, ranks);
        } else {
            for (long begin = r; begin < r + R; begin += FEWER) {
                const W *own = a + begin * k, *ahead = next + begin * k;
                for (Runs run(0, rows, SHRINK_ROWS); run; run.next(), ahead = own)  // only the first run prefetches
                    rows_of_shrink<FEWER, SHRINK_ROWS>(run.count(), x + run.begin * stride, stride, k, own, ahead,
                                                       out + run.begin * ranks + begin, ranks);
            }
        }
        r += R;
    };
    if (unit.end - unit.begin == RANKS) return all_rows(std::integral_constant<int, RANKS>());
    while (r < unit.end - unit.begin) all_rows(std::integral_constant<int, 1>());
}

template <class H, class T, class W>
void expand_unit(const Unit& unit, const H* shrunk, const W* next, long next_width, T* out, long stride) {
    long rows = unit.run->rows, ranks = unit.run->layer->lora_rank, width = unit.part->stop - unit.part->start;
    long count = unit.part->rank_stop - unit.part->rank_start, outputs = unit.end - unit.begin, i = 0;
    const W* b = (const W*)unit.weights;
    shrunk += unit.part->rank_start;
    if (rows == 1)
        for (; i + 2 * WIDTH <= outputs; i += 2 * WIDTH)
            expand<2, 1>(shrunk, ranks, count, b + i, width, next + i, next_width, out + i, stride);
    for (; i + WIDTH <= outputs; i += WIDTH) {
        const W *own = b + i, *ahead = next + i;
        long ahead_width = next_width;
        for (Runs run(0, rows, EXPAND_ROWS); run; run.next(), ahead = own, ahead_width = width)
            rows_of_expand<EXPAND_ROWS>(run.count(), shrunk + run.begin * ranks, ranks, count, own, width, ahead,
                                        ahead_width, out + run.begin * stride + i, stride);
    }
    for (long m = 0; i < outputs && m < rows; m++)
        expand_rest(shrunk + m * ranks, count, b + i, width, out + m * stride + i, outputs - i);
}

// The number of rows that are read of a part; each is as long as its outputs.
long rows_of(const LoraPart& part) { return part.rank_stop - part.rank_start + (part.affine ? 2 : 0); }

// Calls add(unit, weights) for the units of a run's A, or of its B, in order.
template <class W, class F>
void each_unit(const Run& run, bool of_a, long k, F add) {
    const LoraLayer& layer = *run.layer;
    long step = run.tiles ? LANES : RANKS;
    for (long r = 0; of_a && r < layer.lora_rank; r += step) {
        long end = r + step < layer.lora_rank ? r + step : layer.lora_rank;
        add(Unit{&run, nullptr, r, end, (const W*)layer.shrink + r * k}, (end - r) * k);
    }
    for (long p = 0; !of_a && p < layer.parts; p++) {
        const LoraPart& part = layer.part[p];
        long outputs = part.stop - part.start, rows = rows_of(part);
        for (long i = 0; i < outputs; i += OUTPUTS) {
            long end = i + OUTPUTS < outputs ? i + OUTPUTS : outputs;
            add(Unit{&run, &part, i, end, (const W*)part.expand + i}, (end - i) * rows);
        }
    }
}

long cost(const Run& run, long weights) { return weights * (READING + (run.tiles ? run.rows / TILES_GAIN : run.rows)); }

long cost(const Run& run, bool of_a, long k) {
    long weights = of_a ? run.layer->lora_rank * k : 0;
    for (const LoraPart* part = run.layer->part; !of_a && part < run.layer->part + run.layer->parts; part++)
        weights += rows_of(*part) * (part->stop - part->start);
    return cost(run, weights);
}

// Appends one thread's share of all units of A, or of B: the units that begin in its part of the total cost.
template <class W>
void share(const std::vector<Run>& runs, bool of_a, long k, Member me, std::vector<Unit>& units) {
    long total = 0, place = 0;
    for (const Run& run : runs) total += cost(run, of_a, k);
    Range mine = me.share(total);
    for (const Run& run : runs) {
        long end = place + cost(run, of_a, k);
        if (end > mine.begin && place < mine.end)
            each_unit<W>(run, of_a, k, [&](const Unit& unit, long weights) {
                if (place >= mine.begin && place < mine.end) units.push_back(unit);
                place += cost(run, weights);
            });
        place = end;
    }
}

template <class T>
std::vector<Run> cut(long segments, const std::int64_t* starts, const std::int64_t* stops,
                     const LoraLayer* const* tables, long layer, long& shrunk) {
    std::vector<Run> runs;
    shrunk = 0;
    for (long s = 0; s < segments; s++) {
        const LoraLayer& own = tables[s][layer];
        bool tiles = HAS_TILES && sizeof(T) == 2 && stops[s] - starts[s] >= FEWEST_TILE_ROWS;
        long stride = tiles ? own.lora_rank + TILE_DEPTH : own.lora_rank;
        for (Runs rows(starts[s], stops[s], tiles ? TILE_RUN : ROWS); own.parts && rows; rows.next()) {
            runs.push_back({rows.begin, rows.count(), &own, tiles, stride, shrunk});
            shrunk += rows.count() * stride;
        }
    }
    return runs;
}

#if defined(__AMX_BF16__)

template <class W>
void shrink_unit_by_tiles(const Unit& unit, const bf16* x, long k, const W* next, bf16* shrunk) {
    const Run& run = *unit.run;
    const float* scales = sizeof(W) == 1 ? run.layer->scales + unit.begin : nullptr;
    shrink_by_tiles(run.rows, x + run.start * k, k, (const W*)unit.weights, next, unit.end - unit.begin, scales,
                    shrunk + unit.begin, run.stride);
    if (unit.end == run.layer->lora_rank)
        for (long row = 0; row < run.rows; row++) std::memset(shrunk + row * run.stride + unit.end, 0, TILE_BYTES);
}

template <class W>
void expand_unit_by_tiles(const Unit& unit, const bf16* shrunk, const W* next, long next_width, bf16* out,
                          long stride) {
    const Run& run = *unit.run;
    const LoraPart& part = *unit.part;
    expand_by_tiles(run.rows, shrunk + part.rank_start, run.stride, part.rank_stop - part.rank_start,
                    (const W*)unit.weights, part.stop - part.start, next, next_width, out, stride,
                    unit.end - unit.begin);
}

#endif

template <class W, class T>
void shrink_all(const Unit* unit, const Unit* end, const T* x, long k, Factor<W, T>* shrunk) {
    static thread_local Scratch scratch;
    using X = Factor<W, T>;
    constexpr bool AS_IT_IS = std::is_same_v<X, bf16>;  // bfloat16 rows need neither conversion nor padding
    long stride = AS_IT_IS ? k : (k + WIDTH - 1) / WIDTH * WIDTH;
    const X* rows = nullptr;
    for (const Run* run = nullptr; unit < end; unit++) {
#if defined(__AMX_BF16__)
        if constexpr (sizeof(T) == 2)
            if (unit->run->tiles) {
                shrink_unit_by_tiles(*unit, x, k, (const W*)unit[AHEAD].weights, (bf16*)(shrunk + unit->run->shrunk));
                continue;
            }
#endif
        if (run != unit->run) {
            run = unit->run;
            if constexpr (AS_IT_IS)
                rows = x + run->start * k;
            else
                rows = convert<W>(x + run->start * k, run->rows, k, scratch.get<float>(ROWS * stride));
        }
        const LoraLayer& layer = *run->layer;
        X* out = shrunk + run->shrunk + unit->begin;
        shrink_unit(*unit, rows, stride, k, (const W*)unit[AHEAD].weights, out);
        if constexpr (sizeof(W) == 1)
            for (long m = 0; m < run->rows; m++)
                for (long r = 0; r < unit->end - unit->begin; r++)
                    out[m * layer.lora_rank + r] *= layer.scales[unit->begin + r];
    }
}

template <class T>
void scale_and_shift(const Unit& unit, T* out, long stride) {
    const float* factors = unit.part->affine + unit.begin;
    const float* shifts = factors + unit.part->stop - unit.part->start;
    for (long m = 0, outputs = unit.end - unit.begin; m < unit.run->rows; m++, out += stride)
        for (long i = 0; i < outputs; i += LANES) {
            int lanes = int(outputs - i < LANES ? outputs - i : LANES);
            Floats base = load_first(out + i, lanes);
            store_first(out + i, fma(base, load_first(factors + i, lanes), load_first(shifts + i, lanes)), lanes);
        }
}

template <class W, class T>
void expand_all(const Unit* unit, const Unit* end, const Factor<W, T>* shrunk, T* out, long n) {
    for (; unit < end; unit++) {
        const Factor<W, T>* own = shrunk + unit->run->shrunk;
        const W* next = (const W*)unit[AHEAD].weights;
        long next_width = unit[AHEAD].part->stop - unit[AHEAD].part->start;
        T* to = out + unit->run->start * n + unit->part->start + unit->begin;
        if (unit->part->affine) scale_and_shift(*unit, to, n);
#if defined(__AMX_BF16__)
        if constexpr (sizeof(T) == 2)
            if (unit->run->tiles) {
                expand_unit_by_tiles(*unit, (const bf16*)own, next, next_width, to, n);
                continue;
            }
#endif
        expand_unit(*unit, own, next, next_width, to, n);
    }
}

template <class T, class W>
void add_delta(int threads, long segments, const std::int64_t* starts, const std::int64_t* stops,
               const LoraLayer* const* tables, long layer, const T* x, long k, T* out, long n) {
    static thread_local Scratch scratch;
    long size;
    std::vector<Run> runs = cut<T>(segments, starts, stops, tables, layer, size);
    if (runs.empty()) return;
    auto* shrunk = scratch.get<Factor<W, T>>(size);
    parallel(threads, [&](Member me) {
        static thread_local std::vector<Unit> units;
        units.clear();
        share<W>(runs, true, k, me, units);
        std::size_t of_a = units.size();
        share<W>(runs, false, k, me, units);
        units.insert(units.end(), AHEAD, units.empty() ? Unit{} : units.back());  // for prefetching after the last unit
        const Unit *first = units.data(), *end = first + units.size() - AHEAD;
        shrink_all<W>(first, first + of_a, x, k, shrunk);
        me.barrier();
        expand_all<W>(first + of_a, end, shrunk, out, n);
    });
}

}  // namespace
}  // namespace loraplex

using namespace loraplex;

// Segment s has rows [starts[s], stops[s]) of x [.., k] and out [.., n], and tables[s] has its adapter's layers. The
// adapters' weights are of the same kind as x and out, or int8.
EXPORT void add_lora_delta(int threads, int kind, int int8_weights, long segments, const std::int64_t* starts,
                           const std::int64_t* stops, const void* tables, long layer, const void* x, long k, void* out,
                           long n) {
    with_type(kind, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        auto run = int8_weights ? add_delta<T, std::int8_t> : add_delta<T, T>;
        run(threads, segments, starts, stops, (const LoraLayer* const*)tables, layer, (const T*)x, k, (T*)out, n);
    });
}
