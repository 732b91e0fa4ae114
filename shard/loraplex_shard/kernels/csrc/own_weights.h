// Adapters' own weights outside the linear layers, which replace the base's.
#pragma once

#include "tables.h"

namespace loraplex {

// A norm's parameter for one row: the adapter's if `own` has one at its place, else the base's.
inline const float* own_or(const float* base, const std::int64_t* own, long place) {
    return own && own[place] ? (const float*)own[place] : base;
}

}  // namespace loraplex
