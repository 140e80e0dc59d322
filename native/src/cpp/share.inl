// How rows, or sequences, are dealt to tasks: a part of kernels.cc.
#pragma once

#include <cstdint>

namespace {

// A task's share: of one group's rows, counted over all groups.
struct Share {
  int64_t group, begin, end;

  Share(int64_t rows, int64_t blocks, int64_t task) {
    const int64_t block = task % blocks;
    group = task / blocks;
    begin = group * rows + rows * block / blocks;
    end = group * rows + rows * (block + 1) / blocks;
  }
};

}  // namespace
