// What the kernels share: the kinds of numbers that they take, memory that is kept from call to call, and how rows are
// divided among threads.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

#include "kernels.h"
#include "vec.h"

namespace loraplex {

enum Kind : int { FLOAT32 = 0, BFLOAT16 = 1 };

// Calls f with a null pointer to the C++ type that `kind` stands for.
template <class F>
inline void with_type(int kind, F f) {
    if (kind == BFLOAT16)
        f((bf16*)nullptr);
    else
        f((float*)nullptr);
}

// Memory for a call's intermediate values. It grows and is never freed, so that steps do not allocate.
class Scratch {
  public:
    template <class T>
    T* get(std::size_t count) {
        std::size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
        if (bytes > size_) {
            std::free(data_);
            data_ = std::aligned_alloc(64, bytes);
            if (!data_) throw std::bad_alloc();
            size_ = bytes;
        }
        return (T*)data_;
    }
    ~Scratch() { std::free(data_); }

  private:
    void* data_ = nullptr;
    std::size_t size_ = 0;
};

// Part `index` of [0, count), cut into `parts` parts of nearly equal length.
struct Range {
    long begin, end;
    Range(long count, long parts, long index) : begin(count * index / parts), end(count * (index + 1) / parts) {}
};

// Cuts [begin, end) into the fewest runs of at most `most`, all of nearly equal length: 8 in runs of at most 5 is 4
// and 4.
class Runs {
  public:
    long begin, index = 0;
    const long total;
    Runs(long begin, long end, long most) : begin(begin), total((end - begin + most - 1) / most), end_(end) {}
    explicit operator bool() const { return index < total; }
    int count() const { return int((end_ - begin + total - index - 1) / (total - index)); }
    void next() {
        begin += count();
        index++;
    }

  private:
    long end_;
};

// The number of rows of x that stay in the cache while all panels are read.
constexpr long BLOCK = 128;

inline Runs rows_of_block(long block, long m, long most) {
    return Runs(block, block + BLOCK < m ? block + BLOCK : m, most);
}

// The unit in which x is multiplied: one float32, two bfloat16 or four int8. The rows of a run are interleaved word by
// word, in the order in which they are read: first the first word of every row, then the second word of every row.
using Word = std::uint32_t;

#if defined(__AVX512BF16__)
// sums += w times a pair of bfloat16 numbers, which is one word.
[[gnu::always_inline]] inline void add_pair(__m512& sums, __m512bh w, const void* pair) {
    int word;
    std::memcpy(&word, pair, sizeof word);
    sums = _mm512_dpbf16_ps(sums, w, (__m512bh)_mm512_set1_epi32(word));
}
#endif

// Divides m rows, each of `pieces` pieces, among the members of a team. Rows are multiplied in runs of at most `most`.
// For its part of a run, a member calls f(first_row, rows, first_piece, last_piece). Words of a run's rows share cache
// lines, so a member takes some pieces of all the run's rows: two members that write to one line would wait for each
// other at every word.
template <class Member, class F>
void each_run(Member me, long m, long most, long pieces, const F& f) {
    long runs = 0, place = 0;
    for (long block = 0; block < m; block += BLOCK) runs += rows_of_block(block, m, most).total;
    Range mine = me.share(runs * pieces);
    for (long block = 0; block < m; block += BLOCK)
        for (Runs run = rows_of_block(block, m, most); run; run.next(), place += pieces) {
            long begin = mine.begin > place ? mine.begin - place : 0;
            long end = mine.end - place < pieces ? mine.end - place : pieces;
            if (begin < end) f(run.begin, run.count(), begin, end);
        }
}

// What a run of rows prefetches while it multiplies with a panel, since the processor's own prefetching is too late. A
// single run prefetches what it will read a little later. Of several runs, each prefetches its part of the next panel.
class Ahead {
  public:
    static constexpr long LINE = 64;  // bytes

    // The panel has `bytes` bytes and is read in `steps` steps.
    Ahead(const void* panel, long bytes, long steps, const Runs& run)
        : next_((const char*)panel + (run.total == 1 ? DISTANCE : bytes + run.index * bytes / run.total)),
          step_((bytes + steps * run.total - 1) / (steps * run.total)) {}

    // Call one of these in every step: fetch_line if a step reads no more than one cache line, else fetch.
    void fetch() {
        for (long i = 0; i < step_; i += LINE) __builtin_prefetch(next_ + i);
        next_ += step_;
    }
    void fetch_line() {
        __builtin_prefetch(next_);
        next_ += step_;
    }

  private:
    static constexpr long DISTANCE = 4096;
    const char* next_;
    long step_;
};

}  // namespace loraplex
