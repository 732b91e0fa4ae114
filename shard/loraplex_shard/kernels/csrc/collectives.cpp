// Collectives of processes on one host, over memory that they share. All ranks make the same calls in the same order.
//
// Data is exchanged in rounds. In a round, each rank copies a piece of its data into its slot, announces it, and waits
// until all ranks have done so. Then it reads the others' slots. There are two sets of slots: a rank that fills a slot
// for round n + 2 has met the others in round n + 1, so all of them have finished reading round n. So a round needs no
// second wait.

#include "team.h"

#include <fcntl.h>
#include <unistd.h>
#include <atomic>
#include <ctime>

namespace loraplex {
namespace {

struct Place {  // of this rank in the group
    char* memory;
    long rank, size;
    long slot_bytes;
    long fd;         // of the memory's file; each rank holds a lock on the byte of its number for as long as it lives
    float patience;  // seconds that a rank may be behind this one
};

constexpr useconds_t NAP = 50;  // microseconds between looks at a rank that is busy or lost
constexpr long DONE = 0;

struct alignas(128) State {  // a rank's state; the memory begins with all ranks' states, which are zeroed
    std::atomic<std::uint64_t> round;
    std::atomic<bool> left;
};

double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}

class Rounds {
  public:
    explicit Rounds(const Place& place)
        : place_(place),
          states_((State*)place.memory),
          round_(states_[place.rank].round.load(std::memory_order_relaxed) + 1) {}

    // The slot of a rank in this round. A rank fills its own slot before `meet` and reads the others' after it.
    char* slot(long rank) const {
        long number = long(round_ % 2) * place_.size + rank;
        return place_.memory + place_.size * long(sizeof(State)) + number * place_.slot_bytes;
    }

    // Waits for all ranks. Returns DONE, 1 + a rank that is gone, or -1 - a rank that is late.
    long meet() const {
        states_[place_.rank].round.store(round_, std::memory_order_release);
        for (long rank = 0; rank < place_.size; rank++)
            if (long lost = wait_for(rank)) return lost;
        return DONE;
    }

    void next() { round_++; }

  private:
    long wait_for(long rank) const {
        if (soon([&] { return arrived(rank); })) return DONE;
        for (double began = now(); !arrived(rank);) {
            if (gone(rank)) return arrived(rank) ? DONE : 1 + rank;  // it may have left after the round
            if (gone(place_.rank)) return 1 + place_.rank;           // another thread is closing the group
            if (now() - began > place_.patience) return -1 - rank;
            usleep(NAP);
        }
        return DONE;
    }

    bool arrived(long rank) const { return states_[rank].round.load(std::memory_order_acquire) >= round_; }

    bool gone(long rank) const {
        if (states_[rank].left.load(std::memory_order_acquire)) return true;
        if (rank == place_.rank) return false;  // a process does not see its own locks
        struct flock lock = {};
        lock.l_type = F_WRLCK;
        lock.l_whence = SEEK_SET;
        lock.l_start = rank;
        lock.l_len = 1;
        return fcntl(int(place_.fd), F_GETLK, &lock) != 0 || lock.l_type == F_UNLCK;
    }

    const Place& place_;
    State* states_;
    std::uint64_t round_;
};

template <class T>
long all_reduce(const Place& place, long count, T* data) {
    long most = place.slot_bytes / long(sizeof(T));
    Rounds rounds(place);
    for (long begin = 0; begin < count; begin += most, rounds.next()) {
        long length = count - begin < most ? count - begin : most;
        T* piece = data + begin;
        std::memcpy(rounds.slot(place.rank), piece, length * sizeof(T));
        if (long lost = rounds.meet()) return lost;
        for (long i = 0; i < length; i += LANES) {
            int lanes = int(length - i < LANES ? length - i : LANES);
            Floats sum = load_first((const T*)rounds.slot(0) + i, lanes);
            for (long rank = 1; rank < place.size; rank++)
                sum = sum + load_first((const T*)rounds.slot(rank) + i, lanes);
            store_first(piece + i, sum, lanes);
        }
    }
    return DONE;
}

// Copies bytes [begin, end) of a matrix with rows of `width` bytes to a matrix whose rows are `stride` bytes apart.
void copy_to_rows(const char* piece, long begin, long end, long width, char* out, long stride) {
    while (begin < end) {
        long column = begin % width;
        long length = width - column < end - begin ? width - column : end - begin;
        std::memcpy(out + begin / width * stride + column, piece, length);
        begin += length;
        piece += length;
    }
}

}  // namespace
}  // namespace loraplex

using namespace loraplex;

// The size of the memory that a group shares: all ranks' states, and two slots of each.
EXPORT long shared_bytes(long size, long slot_bytes) { return size * (long(sizeof(State)) + 2 * slot_bytes); }

// Replaces data [count] by its sum over all ranks. The sum is in float32 and in the order of the ranks, so every rank
// gets the same bits.
EXPORT long all_reduce(char* memory, long rank, long size, long slot_bytes, long fd, float patience, int kind,
                       long count, void* data) {
    const Place place{memory, rank, size, slot_bytes, fd, patience};
    long result = DONE;
    with_type(kind, [&](auto* t) { result = loraplex::all_reduce(place, count, (decltype(t))data); });
    return result;
}

// Replaces data by rank 0's data.
EXPORT long broadcast(char* memory, long rank, long size, long slot_bytes, long fd, float patience, long bytes,
                      char* data) {
    const Place place{memory, rank, size, slot_bytes, fd, patience};
    Rounds rounds(place);
    for (long begin = 0; begin < bytes; begin += slot_bytes, rounds.next()) {
        long length = bytes - begin < slot_bytes ? bytes - begin : slot_bytes;
        if (rank == 0) std::memcpy(rounds.slot(0), data + begin, length);
        if (long lost = rounds.meet()) return lost;
        if (rank != 0) std::memcpy(data + begin, rounds.slot(0), length);
    }
    return DONE;
}

// Puts the ranks' matrices, of `rows` rows of widths[rank] bytes, side by side in `out`, which only rank 0 has.
EXPORT long gather(char* memory, long rank, long size, long slot_bytes, long fd, float patience, long rows,
                   const long* widths, const char* data, char* out) {
    const Place place{memory, rank, size, slot_bytes, fd, patience};
    long widest = 0, stride = 0;
    for (long each = 0; each < size; each++) {
        widest = widths[each] > widest ? widths[each] : widest;
        stride += widths[each];
    }
    auto end = [&](long begin, long each) {
        long whole = rows * widths[each], piece = begin + slot_bytes;
        return piece < whole ? piece : whole;
    };
    Rounds rounds(place);
    for (long begin = 0; begin < rows * widest; begin += slot_bytes, rounds.next()) {
        long length = end(begin, rank) - begin;
        if (length > 0) std::memcpy(rounds.slot(rank), data + begin, length);
        if (long lost = rounds.meet()) return lost;
        char* column = out;
        for (long each = 0; rank == 0 && each < size; column += widths[each++])
            copy_to_rows(rounds.slot(each), begin, end(begin, each), widths[each], column, stride);
    }
    return DONE;
}

// Tells the other ranks that this rank makes no more calls. Their calls that wait for it fail, and so does a call in
// progress on another thread here.
EXPORT void leave_group(char* memory, long rank) { ((State*)memory)[rank].left.store(true, std::memory_order_release); }
