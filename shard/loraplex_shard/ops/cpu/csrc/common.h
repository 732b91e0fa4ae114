// What the operations share: the kinds of numbers they take, and memory that lives from call to call.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

#include "vec.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace loraplex {

enum Kind : int { FLOAT32 = 0, BFLOAT16 = 1 };

// Calls f with a null pointer of the C++ type that `kind` stands for.
template <class F>
inline void with_type(int kind, F f) {
    if (kind == BFLOAT16)
        f((bf16*)nullptr);
    else
        f((float*)nullptr);
}

// Memory for a call's intermediate values. It grows and is never returned, so that no step allocates.
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

// Part `index` of `count` things cut into `parts` runs of near-equal length.
struct Range {
    long begin, end;
    Range(long count, long parts, long index) : begin(count * index / parts), end(count * (index + 1) / parts) {}
};

// [begin, end) in as few runs of at most `most` as there can be, all of near-equal length: 8 by 5 is 4 and 4.
class Runs {
public:
    long begin;
    Runs(long begin, long end, long most) : begin(begin), end_(end), left_((end - begin + most - 1) / most) {}
    explicit operator bool() const { return left_ > 0; }
    int count() const { return int((end_ - begin + left_ - 1) / left_); }
    void next() {
        begin += count();
        left_--;
    }

private:
    long end_, left_;
};

}  // namespace loraplex
