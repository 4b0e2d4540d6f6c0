#include "dispatch.h"

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <string>

namespace klflow::cpu {
namespace {

enum Level { kBaseline, kAvx2, kAvx512 };

Level machine_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? kAvx512 : avx2 ? kAvx2 : kBaseline;
#else
  return kBaseline;
#endif
}

struct Choice {
  Level level;
  std::string reason;
};

const Choice& choice() {
  static const Choice chosen = [] {
    const Level machine = machine_level();
    Choice c{machine, machine == kAvx512 ? "" : "the processor has no more"};
    const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
    if (wanted != nullptr) {
      const std::string name = wanted;
      const Level level = name == "default" ? kBaseline : name == "avx2" ? kAvx2 : kAvx512;
      if (level < machine) c = {level, "ATEN_CPU_CAPABILITY=" + name};
    }
    return c;
  }();
  return chosen;
}

// A forked child has none of its parent's threads, and OpenMP would wait for them for ever: it works alone then.
std::atomic<bool> threads_started = false, threads_lost = false;
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { threads_lost = threads_started.load(); });

template <class F>
void parallel_rows(int64_t rows, int64_t columns, const F& f) {
  // A thread should have at least this many elements, or starting it costs more than it saves.
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(columns, 1));
  if (rows <= grain || threads_lost) {
    f(0, rows);
  } else {
    threads_started = true;
    torch::stable::parallel_for(0, rows, grain, f);
  }
}

int64_t columns_of(const TopkRenoiseParams& p) { return p.sample.vocab; }
int64_t columns_of(const NoiseTileParams& p) { return p.columns; }
int64_t columns_of(const GatherRowsParams& p) { return p.top * p.width; }
int64_t columns_of(const ScatterRowsParams& p) { return p.width; }
template <class P>
int64_t columns_of(const P& p) {
  return p.vocab;
}

}  // namespace

const char* capability() {
  static const char* names[] = {"baseline", "avx2", "avx512"};
  return names[choice().level];
}
const char* capability_reason() { return choice().reason.c_str(); }

#if defined(__x86_64__)
#define KLFLOW_CHOOSE(op) (choice().level == kAvx512 ? avx512::op : choice().level == kAvx2 ? avx2::op : baseline::op)
#else
#define KLFLOW_CHOOSE(op) (baseline::op)
#endif
#define KLFLOW_DEFINE(op, Params)                                                                      \
  void op(const Params& p) {                                                                           \
    const auto run = KLFLOW_CHOOSE(op);                                                                \
    parallel_rows(rows_of(p), columns_of(p), [&](int64_t begin, int64_t end) { run(p, begin, end); }); \
  }
KLFLOW_OPS(KLFLOW_DEFINE)

}  // namespace klflow::cpu
