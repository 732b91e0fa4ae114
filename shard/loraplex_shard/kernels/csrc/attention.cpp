// Attention over the paged cache, for prefill chunks and decodes alike. The softmax is computed as the context is read
// (FlashAttention, arXiv 2205.14135). Long contexts are read in parts, which are joined afterwards (Flash-Decoding).
//
// A block of the cache holds sixteen positions of one KV head: keys transposed, [head_dim][16], and values
// [16][head_dim]. So the scores of sixteen positions are lanes, and no sum runs over lanes. 8-bit keys and values have
// a scale per position and head. Whatever is in a block after a sequence's last position is never used.

#include "attention_tiles.h"
#include "team.h"

#include <limits>
#include <vector>

namespace loraplex {
namespace {

#if defined(__AVX512F__)
constexpr int ROWS = 12;
#else
constexpr int ROWS = 5;
#endif
constexpr int TILE = 48;     // query rows (tokens times heads of a group) that read a block together, if possible
constexpr long PART = 1024;  // positions of a decode's context that one task reads
constexpr int SPAN = 4;      // blocks whose scores are turned into weights together
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

struct Shape {
    long heads, kv_heads, head_dim, value_dim, window;  // window 0: no window
    float scale, soft_cap;                              // soft cap 0: no cap
    const float* sinks;                                 // [heads]: a score for each head, without a value; or null
};

template <class C>
struct Cache {  // the cache of one layer
    const C* keys;
    const C* values;
    const float* key_scales;  // [blocks][kv_heads][16], for 8 bits only
    const float* value_scales;
};

struct Task {
    long chunk, first_token, tokens;  // indices in the batch
    long kv_head, first_block, last_block;
    long part, parts;  // the task's part of the context, and the number of parts
    long partial;      // where the result goes if there are several parts
};

struct Rows {        // what a task computes with, in float32
    float* query;    // [rows][head_dim], scaled
    float* out;      // [rows][value_dim], relative to `most`
    float* most;     // largest score so far
    float* total;    // sum of exp(score - most)
    float* weights;  // [rows][SPAN * 16]
};

// While a block's keys, and then its values, are read, what `next` points to is prefetched: blocks can be anywhere in
// memory, so the processor cannot know what follows. Separate sums for even and odd dimensions would make shorter
// dependency chains, but with AVX2 three rows of them do not fit into the registers, and it was slower.
template <int R, class C>
[[gnu::always_inline]] inline void scores(const float* query, long head_dim, const C* keys, const C* next,
                                          Floats* sums) {
    for (int r = 0; r < R; r++) sums[r] = zeros();
    for (long d = 0; d < head_dim; d++, keys += LANES, next += LANES) {
        __builtin_prefetch(next);
        Floats key = load(keys);
        for (int r = 0; r < R; r++) sums[r] = fma(splat(query[r * head_dim + d]), key, sums[r]);
    }
}

template <int R, class C>
[[gnu::always_inline]] inline void add_values(const float* weights, const C* values, const C* next, int positions,
                                              long value_dim, int n, float* out) {
    Floats sums[R];
    for (int r = 0; r < R; r++) sums[r] = load_first(out + r * value_dim, n);
    for (int j = 0; j < positions; j++) {
        __builtin_prefetch(next + j * value_dim);
        Floats value = load_first(values + j * value_dim, n);
        for (int r = 0; r < R; r++) sums[r] = fma(splat(weights[r * SPAN * LANES + j]), value, sums[r]);
    }
    for (int r = 0; r < R; r++) store_first(out + r * value_dim, sums[r], n);
}

template <class C>
struct Span {    // up to SPAN blocks of one KV head
    long first;  // its first position in the sequence
    int blocks;
    int positions;  // positions of the sequence in the span
    const C* keys[SPAN];
    const C* values[SPAN];
    const C* next[SPAN];  // the keys that are read after these values, to be prefetched
    const float* key_scales[SPAN];
    const float* value_scales[SPAN];
};

// Turns one row's scores into weights relative to its largest score so far. If that grows, the row's sums are rescaled.
template <class C>
void weigh(const Shape& shape, const Span<C>& span, long position, float* lanes, float* out, float* most,
           float* total) {
    int count = span.blocks * LANES;
    if (shape.soft_cap > 0)
        for (int j = 0; j < count; j += LANES) store(lanes + j, soft_capped(load(lanes + j), shape.soft_cap));
    long last = position - span.first, first = shape.window ? last - shape.window + 1 : 0;
    for (long j = last + 1 > 0 ? last + 1 : 0; j < count; j++) lanes[j] = LOWEST;
    for (long j = 0; j < first && j < count; j++) lanes[j] = LOWEST;
    Floats peaks = load(lanes);
    for (int j = LANES; j < count; j += LANES) peaks = max(peaks, load(lanes + j));
    float peak = largest(peaks);
    if (peak == LOWEST) {  // the row sees nothing of the span
        for (int j = 0; j < count; j++) lanes[j] = 0;
        return;
    }
    if (peak > *most) {
        Floats shrink = splat(*most == LOWEST ? 0 : std::exp(*most - peak));
        for (long d = 0; d < shape.value_dim; d += LANES) {
            int n = int(shape.value_dim - d < LANES ? shape.value_dim - d : LANES);
            store_first(out + d, load_first(out + d, n) * shrink, n);
        }
        *total *= *most == LOWEST ? 0 : std::exp(*most - peak);
        *most = peak;
    }
    Floats sums = zeros();
    for (int j = 0; j < count; j += LANES) {
        Floats p = exp(load(lanes + j) - splat(*most));
        store(lanes + j, p);
        sums = sums + p;
    }
    // exp is never exactly 0, so the weights of hidden positions are set to 0.
    for (long j = last + 1 > 0 ? last + 1 : 0; j < count; j++) lanes[j] = 0;
    for (long j = 0; j < first && j < count; j++) lanes[j] = 0;
    *total += sum(sums);
}

// Attends to one span with R rows. Row r belongs to the token at position first_position + r / group.
template <int R, class C>
void attend_span(const Shape& shape, Rows rows, long first_row, long first_position, const Span<C>& span) {
    long head_dim = shape.head_dim, value_dim = shape.value_dim, group = shape.heads / shape.kv_heads;
    float* out = rows.out + first_row * value_dim;
    float* weights = rows.weights + first_row * SPAN * LANES;
    for (int b = 0; b < span.blocks; b++) {
        Floats sums[R];
        scores<R>(rows.query + first_row * head_dim, head_dim, span.keys[b], span.values[b], sums);
        for (int r = 0; r < R; r++) {
            if (span.key_scales[b]) sums[r] = sums[r] * load(span.key_scales[b]);
            store(weights + (r * SPAN + b) * LANES, sums[r]);
        }
    }
    for (int r = 0; r < R; r++)
        weigh(shape, span, first_position + (first_row + r) / group, weights + r * SPAN * LANES, out + r * value_dim,
              rows.most + first_row + r, rows.total + first_row + r);
    for (int b = 0; b < span.blocks; b++) {
        int positions = span.positions - b * LANES < LANES ? span.positions - b * LANES : LANES;
        if (span.value_scales[b])
            for (int r = 0; r < R; r++)
                for (int j = 0; j < positions; j++) weights[(r * SPAN + b) * LANES + j] *= span.value_scales[b][j];
        for (long d = 0; d + LANES <= value_dim; d += LANES)
            add_values<R>(weights + b * LANES, span.values[b] + d, span.next[b] + d, positions, value_dim, LANES,
                          out + d);
        if (long d = value_dim / LANES * LANES; d < value_dim)
            add_values<R>(weights + b * LANES, span.values[b] + d, span.next[b] + d, positions, value_dim,
                          int(value_dim - d), out + d);
    }
}

template <int R, class C>
void rows_of_span(int count, const Shape& shape, Rows rows, long first_row, long first_position, const Span<C>& span) {
    if (count == R)
        attend_span<R>(shape, rows, first_row, first_position, span);
    else if constexpr (R > 1)
        rows_of_span<R - 1>(count, shape, rows, first_row, first_position, span);
}

// The span of a task's blocks that begins at `block`.
template <class C>
Span<C> span_at(const Shape& shape, const Task& task, const Cache<C>& cache, const std::int32_t* table, long context,
                long block) {
    long key_size = LANES * shape.head_dim, value_size = LANES * shape.value_dim;
    Span<C> span;
    span.first = block * LANES;
    span.blocks = int(task.last_block - block + 1 < SPAN ? task.last_block - block + 1 : SPAN);
    span.positions = int(context - span.first < SPAN * LANES ? context - span.first : SPAN * LANES);
    for (int b = 0; b < span.blocks; b++) {
        long place = table[block + b] * shape.kv_heads + task.kv_head;
        span.keys[b] = cache.keys + place * key_size;
        span.values[b] = cache.values + place * value_size;
        long after = block + b + SPAN <= task.last_block ? block + b + SPAN : task.last_block;
        span.next[b] = cache.keys + (table[after] * shape.kv_heads + task.kv_head) * key_size;
        span.key_scales[b] = cache.key_scales ? cache.key_scales + place * LANES : nullptr;
        span.value_scales[b] = cache.value_scales ? cache.value_scales + place * LANES : nullptr;
    }
    return span;
}

template <class C>
void attend(const Shape& shape, const Task& task, const Cache<C>& cache, const std::int32_t* table, long context,
            long first_position, Rows rows) {
    long group = shape.heads / shape.kv_heads, count = task.tokens * group;
    for (long block = task.first_block; block <= task.last_block; block += SPAN) {
        Span<C> span = span_at(shape, task, cache, table, context, block);
        for (Runs run(0, count, ROWS); run; run.next())
            rows_of_span<ROWS>(run.count(), shape, rows, run.begin, first_position, span);
    }
}

#if defined(__AVX512BF16__)

// Whether a task has enough rows to be worth packing its blocks for tiles.
bool suits_tiles(const Shape& shape, const Task& task) {
    return task.tokens > 1 && task.tokens * (shape.heads / shape.kv_heads) >= FEWEST_TILE_ROWS &&
           shape.head_dim % TILE_DEPTH == 0 && shape.value_dim % TILE_DEPTH == 0;
}

// Does what attend does, with tiles. `queries` come from copy_query and are not scaled. `panels` has room for a span's
// keys and values as bfloat16; bytes are converted exactly, and their scales are applied to scores and weights. All
// arrays of rows have room up to whole tiles; what the rows after the last one hold does not matter.
template <class C>
void attend_by_tiles(const Shape& shape, const Task& task, const Cache<C>& cache, const std::int32_t* table,
                     long context, long first_position, const bf16* queries, bf16* panels, Rows rows) {
    static_assert(SPAN == TILE_BLOCKS);
#if defined(__AMX_BF16__)
    Tiles tiles(TILE_ROWS, TILE_BYTES);
#endif
    long group = shape.heads / shape.kv_heads, count = task.tokens * group;
    long head_dim = shape.head_dim, value_dim = shape.value_dim;
    bf16* values = panels + TILE_SPAN * head_dim;
    for (long block = task.first_block; block <= task.last_block; block += SPAN) {
        Span<C> span = span_at(shape, task, cache, table, context, block);
        for (int b = 0; b < SPAN; b++) {
            if (b < span.blocks) pack_keys(span.keys[b], head_dim, panels + b * LANES * head_dim);
            // The sequence may continue after the blocks that the task reads.
            long positions = b < span.blocks ? span.positions - b * LANES : 0;
            pack_values(positions ? span.values[b] : nullptr, value_dim, b, positions, values);
        }
        for (long row = 0; row < count; row += TILE_ROWS)
            score_tiles(queries + row * head_dim, head_dim, panels, rows.weights + row * TILE_SPAN);
        for (long row = 0; row < count; row++) {
            float* lanes = rows.weights + row * TILE_SPAN;
            for (int b = 0; b < span.blocks; b++) {
                Floats scale = splat(shape.scale);
                if (span.key_scales[b]) scale = scale * load(span.key_scales[b]);
                store(lanes + b * LANES, load(lanes + b * LANES) * scale);
            }
            weigh(shape, span, first_position + row / group, lanes, rows.out + row * value_dim, rows.most + row,
                  rows.total + row);
            // The weights are rounded in place, to the first half of the row. After the span's last block they are 0.
            for (int b = 0; b < SPAN; b++) {
                Floats weights = b < span.blocks ? load(lanes + b * LANES) : zeros();
                if (b < span.blocks && span.value_scales[b])
                    weights = weights * load_first(span.value_scales[b], span.positions - b * LANES);
                store((bf16*)lanes + b * LANES, weights);
            }
        }
        for (long row = 0; row < count; row += TILE_ROWS)
            add_value_tiles((const bf16*)(rows.weights + row * TILE_SPAN), value_dim, values,
                            rows.out + row * value_dim);
    }
}

#endif

// Cuts the batch into tasks. Where a sequence is cut depends on the sequence alone, not on its neighbours.
std::vector<Task> plan(const Shape& shape, long chunks, const std::int64_t* starts, const std::int64_t* contexts,
                       long& partials) {
    std::vector<Task> tasks;
    long group = shape.heads / shape.kv_heads, tile = TILE / group > 1 ? TILE / group : 1;
    partials = 0;
    for (long chunk = 0; chunk < chunks; chunk++) {
        long length = starts[chunk + 1] - starts[chunk], computed = contexts[chunk] - length;
        for (long begin = 0; begin < length; begin += tile) {
            long tokens = begin + tile < length ? tile : length - begin;
            long seen = shape.window ? computed + begin - shape.window + 1 : 0;
            long first = seen > 0 ? seen / LANES : 0, last = (computed + begin + tokens - 1) / LANES;
            long parts = length == 1 ? ((last - first + 1) * LANES + PART - 1) / PART : 1;
            for (long kv_head = 0; kv_head < shape.kv_heads; kv_head++)
                for (long part = 0; part < parts; part++) {
                    Range blocks(last - first + 1, parts, part);
                    tasks.push_back({chunk, starts[chunk] + begin, tokens, kv_head, first + blocks.begin,
                                     first + blocks.end - 1, part, parts, parts > 1 ? partials++ : 0});
                }
        }
    }
    return tasks;
}

template <class T>
void write(const Shape& shape, const Task& task, const float* out, const float* total, T* to) {
    long group = shape.heads / shape.kv_heads;
    for (long row = 0; row < task.tokens * group; row++) {
        long place = (task.first_token + row / group) * shape.heads + task.kv_head * group + row % group;
        T* head = to + place * shape.value_dim;
        Floats inverse = splat(1 / total[row]);
        for (long d = 0; d < shape.value_dim; d += LANES) {
            int n = int(shape.value_dim - d < LANES ? shape.value_dim - d : LANES);
            store_first(head + d, load_first(out + row * shape.value_dim + d, n) * inverse, n);
        }
    }
}

// Joins the results over the parts of one decode's context. Each is relative to its own largest score.
template <class T>
void join(const Shape& shape, const Task& task, float* partials, long partial_size, T* to) {
    long group = shape.heads / shape.kv_heads, value_dim = shape.value_dim;
    for (long row = 0; row < group; row++) {
        float* first = partials + task.partial * partial_size;
        float most = LOWEST;
        for (long part = 0; part < task.parts; part++) {
            float own = first[part * partial_size + group * value_dim + row];
            most = own > most ? own : most;
        }
        float total = 0;
        for (long part = 0; part < task.parts; part++) {
            float* partial = first + part * partial_size;
            float factor = std::exp(partial[group * value_dim + row] - most);
            total += factor * partial[group * value_dim + group + row];
            for (long d = 0; d < value_dim; d++) {
                float value = factor * partial[row * value_dim + d];
                first[row * value_dim + d] = part ? first[row * value_dim + d] + value : value;
            }
        }
        first[group * value_dim + group + row] = total;
    }
    float* first = partials + task.partial * partial_size;
    write(shape, task, first, first + group * value_dim + group, to);
}

template <class T, class C>
void attention(int threads, const Shape& shape, const T* query, long query_stride, const Cache<C>& cache, long chunks,
               const std::int64_t* starts, const std::int64_t* contexts, const std::int64_t* table_rows,
               const std::int32_t* tables, long table_width, T* out) {
    static thread_local Scratch for_rows, for_partials;
    long group = shape.heads / shape.kv_heads, head_dim = shape.head_dim, value_dim = shape.value_dim, partial_count;
    std::vector<Task> tasks = plan(shape, chunks, starts, contexts, partial_count);
    long most_rows = ((TILE / group > 1 ? TILE / group : 1) * group + LANES - 1) / LANES * LANES;
    long partial_size = group * (value_dim + 2);
    long row_size = (head_dim + value_dim + 2 + SPAN * LANES) * most_rows;
#if defined(__AVX512BF16__)
    row_size += TILE_SPAN * (head_dim + value_dim + 1) / 2;  // bfloat16 panels of a span's keys and values
#endif
    float* memory = for_rows.get<float>(row_size * threads);
    float* partials = for_partials.get<float>(partial_size * partial_count);
    std::atomic<std::size_t> next{0}, next_joined{0};  // tasks differ in size: a free thread takes the next one
    parallel(threads, [&](Member me) {
        float* mine = memory + me.index * row_size;
        for (std::size_t i; (i = next++) < tasks.size();) {
            const Task& task = tasks[i];
            long count = task.tokens * group;
            float* target = task.parts > 1 ? partials + task.partial * partial_size : mine;
            long room = task.parts > 1 ? count : most_rows;
            Rows rows{mine + (value_dim + 2) * most_rows, target, target + room * value_dim,
                      target + room * (value_dim + 1), mine + (head_dim + value_dim + 2) * most_rows};
            for (long row = 0; row < count; row++) {
                long head = task.kv_head * group + row % group;
                const T* q = query + (task.first_token + row / group) * query_stride + head * head_dim;
                for (long d = 0; d < head_dim; d += LANES) {
                    int n = int(head_dim - d < LANES ? head_dim - d : LANES);
                    store_first(rows.query + row * head_dim + d, load_first(q + d, n) * splat(shape.scale), n);
                }
                std::memset(rows.out + row * value_dim, 0, value_dim * sizeof(float));
                bool sink = shape.sinks && task.part == 0;
                rows.most[row] = sink ? shape.sinks[head] : LOWEST;
                rows.total[row] = sink;
            }
            long context = contexts[task.chunk];
            long position = context - (starts[task.chunk + 1] - task.first_token);
            const std::int32_t* table = tables + table_rows[task.chunk] * table_width;
#if defined(__AVX512BF16__)
            if constexpr (sizeof(T) == 2)
                if (suits_tiles(shape, task)) {
                    bf16* queries = (bf16*)rows.query;
                    for (long row = 0; row < count; row++)
                        copy_query(query + (task.first_token + row / group) * query_stride +
                                       (task.kv_head * group + row % group) * head_dim,
                                   head_dim, row, queries);
                    attend_by_tiles(shape, task, cache, table, context, position, queries,
                                    (bf16*)(mine + (head_dim + value_dim + 2 + TILE_SPAN) * most_rows), rows);
                    write(shape, task, rows.out, rows.total, out);
                    continue;
                }
#endif
            attend(shape, task, cache, table, context, position, rows);
            if (task.parts == 1) write(shape, task, rows.out, rows.total, out);
        }
        if (partial_count) {
            me.barrier();
            for (std::size_t i; (i = next_joined++) < tasks.size();)
                if (tasks[i].parts > 1 && tasks[i].part == 0) join(shape, tasks[i], partials, partial_size, out);
        }
    });
}

}  // namespace
}  // namespace loraplex

using namespace loraplex;

// query has the heads of a token side by side, and tokens are `query_stride` numbers apart. keys and values are of the
// query's kind or, if there are scales, int8. starts [chunks + 1], contexts [chunks], rows [chunks] of
// tables [.., table_width] of block numbers.
EXPORT void paged_attention(int threads, int kind, const void* query, long query_stride, long heads, long kv_heads,
                            long head_dim, long value_dim, float scale, float soft_cap, long window, const float* sinks,
                            const void* keys, const void* values, const float* key_scales, const float* value_scales,
                            long chunks, const std::int64_t* starts, const std::int64_t* contexts,
                            const std::int64_t* rows, const std::int32_t* tables, long table_width, void* out) {
    Shape shape{heads, kv_heads, head_dim, value_dim, window, scale, soft_cap, sinks};
    with_type(kind, [&](auto* t) {
        using T = decltype(t);
        if (key_scales) {
            Cache<std::int8_t> cache{(const std::int8_t*)keys, (const std::int8_t*)values, key_scales, value_scales};
            attention(threads, shape, (T)query, query_stride, cache, chunks, starts, contexts, rows, tables,
                      table_width, (T)out);
        } else {
            Cache<std::remove_pointer_t<T>> cache{(T)keys, (T)values, nullptr, nullptr};
            attention(threads, shape, (T)query, query_stride, cache, chunks, starts, contexts, rows, tables,
                      table_width, (T)out);
        }
    });
}
