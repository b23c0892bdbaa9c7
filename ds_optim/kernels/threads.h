// How work is spread over threads, so that no result depends on how many there are.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace ds_optim {

constexpr int64_t kTask = 1 << 15;  // elements of one unit of work

using ParallelRegion = void (*)(void (*)(void*), void*, unsigned, unsigned);
inline ParallelRegion parallel_region = nullptr;  // GOMP_parallel of the OpenMP runtime that torch uses
inline int (*thread_number)() = nullptr;   // its omp_get_thread_num

// Calls work(task) for every task. A thread starts in its own contiguous share, so that the memory it touches stays the
// same from step to step, and then helps the others.
template <class Work>
void run_tasks(int64_t tasks, int64_t threads, const Work& work) {
  threads = std::min(threads, tasks);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) work(task);
    return;
  }
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t stop;
  };
  struct Team {
    std::vector<Share> shares;
    const Work& work;

    void run(int64_t member) {
      const int64_t size = int64_t(shares.size());
      for (int64_t turn = 0; turn < size; ++turn) {
        Share& share = shares[size_t((member + turn) % size)];
        for (int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.stop;) work(task);
      }
    }
  };
  Team team{std::vector<Share>(size_t(threads)), work};
  for (int64_t i = 0; i < threads; ++i) {
    team.shares[size_t(i)].next = tasks * i / threads;
    team.shares[size_t(i)].stop = tasks * (i + 1) / threads;
  }
  if (parallel_region != nullptr) {
    parallel_region([](void* data) { static_cast<Team*>(data)->run(thread_number()); }, &team, unsigned(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back([&team, i] { team.run(i); });
  team.run(0);
  for (std::thread& other : others) other.join();
}

}  // namespace ds_optim
