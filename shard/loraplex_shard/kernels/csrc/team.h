// The threads that kernels run on. Between two kernels they keep looking for the next one instead of sleeping: on a
// virtual machine, falling asleep and waking up takes longer than most kernels. But they yield their core to any other
// thread, so that a router or another rank on the machine does not wait for them.
#pragma once

#include <sched.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "common.h"

namespace loraplex {

constexpr int SPINS = 500;                               // about 10 us
constexpr auto YIELDING = std::chrono::milliseconds(2);  // longer than the gap between two steps

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Waits a little while for `done()` and returns whether it came true. The thread that it waits for may need this core.
template <class Done>
bool soon(Done done) {
    for (int spin = 0; spin < SPINS; spin++) {
        if (done()) return true;
        pause();
    }
    for (auto began = std::chrono::steady_clock::now(); std::chrono::steady_clock::now() - began < YIELDING;) {
        if (done()) return true;
        sched_yield();
    }
    return done();
}

class Team;

// One of the threads that work together.
struct Member {
    int index, count;
    Team* team;
    Range share(long things) const { return Range(things, count, index); }
    void barrier() const;  // waits for all other members
};

class Team {
  public:
    using Work = void (*)(const void* context, Member);

    // The team of the calling thread. It lives as long as the process, and so do the few threads that call kernels.
    static Team& own() {
        static thread_local Team* team = new Team;
        return *team;
    }

    // Runs the work on `count` members at once, the calling thread among them, and returns when all are done.
    void run(int count, Work work, const void* context) {
        for (; members_ < count; members_++)
            std::thread([this, index = members_, seen = round_.load()] { serve(index, seen); }).detach();
        work_ = work;
        context_ = context;
        count_ = count;
        busy_.store(members_ - 1);
        round_.fetch_add(1);
        round_.notify_all();
        work(context, {0, count, this});
        while (!soon([this] { return busy_.load() == 0; })) {
        }
    }

    void barrier(int count) {
        std::uint32_t round = barrier_round_.load();
        if (barrier_came_.fetch_add(1) == count - 1) {
            barrier_came_.store(0);
            barrier_round_.fetch_add(1);
        } else
            while (!soon([&] { return barrier_round_.load() != round; })) {
            }
    }

  private:
    // A member's loop: does its part of every round after `seen`.
    [[noreturn]] void serve(int index, std::uint32_t seen) {
        for (;; seen++) {
            while (!soon([&] { return round_.load() != seen; })) round_.wait(seen);
            if (index < count_) work_(context_, {index, count_, this});
            busy_.fetch_sub(1);
        }
    }

    int members_ = 1;
    std::atomic<std::uint32_t> round_{0}, barrier_round_{0};
    std::atomic<int> busy_{0}, barrier_came_{0};
    Work work_;
    const void* context_;
    int count_;
};

inline void Member::barrier() const {
    if (count > 1) team->barrier(count);
}

// Divides [0, count) among the members of a team. Each member has an equal share and goes through it in order, which is
// the fastest way to read memory. A member that is done takes from the end of the others' shares, since a core that
// other processes use as well takes longer. A thread can have only one of these at a time.
class Shares {
  public:
    Shares(long count, int members) : members_(members), parts_(room(members)) {
        for (int i = 0; i < members; i++) {
            Range own(count, members, i);
            new (parts_ + i) Part{pack(own.begin, own.end)};
        }
    }

    // Calls f(i) for each i that this member takes.
    template <class F>
    void each(Member me, const F& f) {
        for (long i; (i = take(parts_[me.index], false)) >= 0;) f(i);
        for (int other = 1; other < members_; other++)
            for (long i; (i = take(parts_[(me.index + other) % members_], true)) >= 0;) f(i);
    }

  private:
    struct alignas(64) Part {
        std::atomic<std::uint64_t> left;  // begin in the lower half, end in the upper half
    };

    static std::uint64_t pack(std::uint64_t begin, std::uint64_t end) { return begin | end << 32; }

    static Part* room(int members) {
        static thread_local Scratch scratch;
        return scratch.get<Part>(members);
    }

    // Takes the first or the last of what is left; -1 if nothing is left.
    static long take(Part& part, bool last) {
        for (std::uint64_t left = part.left.load();;) {
            std::uint64_t begin = left & 0xffffffff, end = left >> 32;
            if (begin >= end) return -1;
            if (part.left.compare_exchange_weak(left, last ? pack(begin, end - 1) : pack(begin + 1, end)))
                return long(last ? end - 1 : begin);
        }
    }

    const int members_;
    Part* const parts_;
};

// Calls work(Member) on `threads` threads.
template <class F>
void parallel(int threads, const F& work) {
    if (threads == 1) return work(Member{0, 1, nullptr});
    Team::own().run(threads, [](const void* context, Member me) { (*(const F*)context)(me); }, &work);
}

// Calls f(i) for each i of [0, count), in equal shares on `threads` threads.
template <class F>
void parallel_for(int threads, long count, const F& f) {
    parallel(threads, [&](Member me) {
        Range mine = me.share(count);
        for (long i = mine.begin; i < mine.end; i++) f(i);
    });
}

}  // namespace loraplex
