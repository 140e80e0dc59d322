// What the tests share: arrays of exactly their size, which the address sanitizer guards, and a pool of threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <vector>

inline int failures = 0;

#define EXPECT(condition, ...)                                       \
  do {                                                               \
    if (!(condition)) {                                              \
      ++failures;                                                    \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);    \
      std::printf(__VA_ARGS__);                                      \
      std::printf("\n");                                             \
    }                                                                \
  } while (false)

using Array = std::vector<float>;

inline std::mt19937 generator(1);

inline int64_t draw(int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(generator);
}

inline Array normal(int64_t size, float spread = 1.0f) {
  std::normal_distribution<float> distribution(0.0f, spread);
  Array values(size);
  for (float& v : values) v = distribution(generator);
  return values;
}

// Starts a thread per function: slow, and all that is needed here.
struct Threads {
  int64_t count;
  std::vector<std::thread> running = {};

  int64_t num_threads() const { return count; }
  void Schedule(std::function<void()> function) { running.emplace_back(std::move(function)); }
  ~Threads() {
    for (std::thread& thread : running) thread.join();
  }
};
