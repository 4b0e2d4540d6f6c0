#include "simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the fiber switch is written for x86-64"
#endif

// Saves the callee-saved registers and the stack pointer, and continues on another stack.
extern "C" void klflow_simt_switch(void** save, void* to);
asm(R"(
.text
.globl klflow_simt_switch
.type klflow_simt_switch, @function
klflow_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size klflow_simt_switch, .-klflow_simt_switch
)");

namespace simt {
namespace {

constexpr size_t kStackBytes = 64 << 10;
enum class State { kReady, kBlockBarrier, kClusterBarrier, kWarp, kExited };

struct Block;
struct Thread {
  Dim3 index;
  Block* block;
  State state;
  const char* site;
  bool vote;
  int count;  // of the votes at the last barrier
  Lane* lane;
  void* stack_pointer;
  unsigned char* stack;
};
struct Block {
  Dim3 index;
  unsigned rank;
  std::unique_ptr<unsigned char[]> shared;
  std::vector<Thread*> threads;
  size_t waiting, exited;  // threads at its barrier, and at their end
};

struct Machine {
  std::mutex lock;
  uint64_t seed = 0;
  std::mt19937_64 random;
  const char* name = "";
  const std::function<void()>* kernel = nullptr;
  Dim3 grid, block_dim;
  unsigned cluster = 1;
  size_t shared_bytes = 0;
  std::vector<Block> blocks;  // of the running cluster
  size_t waiting = 0;         // threads at the cluster's barrier
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<unsigned char*> stacks;
  std::vector<Thread*> ready;
  Thread* running = nullptr;
  void* scheduler = nullptr;
  std::string error;
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
#endif
};
Machine machine;
DeviceKind kind{true, 227 << 10, 228 << 10};  // Hopper

void fail(const std::string& what) {
  if (machine.error.empty()) machine.error = std::string("kernel ") + machine.name + ", " + what;
}

void to_scheduler() {
  Thread* self = machine.running;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(self->state == State::kExited ? nullptr : &fake, machine.scheduler_stack,
                                 machine.scheduler_stack_bytes);
#endif
  klflow_simt_switch(&self->stack_pointer, machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void to_thread(Thread* thread) {
  machine.running = thread;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, thread->stack, kStackBytes);
#endif
  klflow_simt_switch(&machine.scheduler, thread->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
#endif
  (*machine.kernel)();
  machine.running->state = State::kExited;
  ++machine.running->block->exited;
  to_scheduler();
  std::abort();  // an exited thread is never resumed
}

void wake(Thread* thread) {
  thread->state = State::kReady;
  machine.ready.push_back(thread);
}

std::string where(const Thread& t) {
  std::ostringstream out;
  out << "block " << t.block->index.x << ", thread " << t.index.x;
  return out.str();
}

// Releases a barrier that all threads have reached.
void release(const std::vector<Thread*>& all) {
  for (const Thread* t : all)
    if (std::strcmp(t->site, all[0]->site) != 0)
      return fail("divergent barrier: " + where(*all[0]) + " waits at " + all[0]->site + ", " + where(*t) + " at " +
                  t->site);
  int count = 0;
  for (const Thread* t : all) count += t->vote;
  for (Thread* t : all) {
    t->count = count;
    wake(t);
  }
}

// Nothing can run, something waits: says who, and where the others are.
void report_deadlock() {
  std::ostringstream out;
  out << "deadlock:";
  for (const Block& block : machine.blocks) {
    size_t i = 0;
    while (i < block.threads.size()) {  // runs of threads in the same place
      const Thread* first = block.threads[i];
      size_t j = i;
      while (j + 1 < block.threads.size() && block.threads[j + 1]->state == first->state &&
             (first->state == State::kExited || block.threads[j + 1]->site == first->site))
        ++j;
      out << " block " << block.index.x << " threads " << i << ".." << j;
      if (first->state == State::kExited)
        out << " have exited;";
      else
        out << " wait at a "
            << (first->state == State::kWarp           ? "warp operation"
                : first->state == State::kBlockBarrier ? "barrier"
                                                       : "cluster barrier")
            << " at " << first->site << ";";
      i = j + 1;
    }
  }
  fail(out.str());
}

void start_cluster(unsigned first_block, unsigned threads) {
  machine.blocks.clear();
  machine.blocks.resize(machine.cluster);
  machine.waiting = 0;
  machine.ready.clear();
  for (unsigned rank = 0; rank < machine.cluster; ++rank) {
    Block& block = machine.blocks[rank];
    block.index = {first_block + rank, 1, 1};
    block.rank = rank;
    block.waiting = block.exited = 0;
    block.shared.reset(new unsigned char[machine.shared_bytes]);  // exactly: a step beyond is the sanitizer's to see
    const bool ones = machine.random() % 2 == 0;                  // NaN in every dtype, or anything
    for (size_t i = 0; i < machine.shared_bytes; ++i)
      block.shared[i] = ones ? 0xff : static_cast<unsigned char>(machine.random());
    for (unsigned i = 0; i < threads; ++i) {
      const size_t id = rank * threads + i;
      if (machine.threads.size() <= id) {
        machine.threads.push_back(std::make_unique<Thread>());
        void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) std::abort();
        machine.threads.back()->stack = static_cast<unsigned char*>(stack);
      }
      Thread* thread = machine.threads[id].get();
      thread->index = {i, 0, 0};
      thread->block = &block;
      thread->site = "";
      void** top = reinterpret_cast<void**>(thread->stack + kStackBytes) - 2;
      *top = reinterpret_cast<void*>(&entry);  // popped by ret, which leaves the stack as a call would
      std::fill(top - 6, top, nullptr);
      thread->stack_pointer = top - 6;
      block.threads.push_back(thread);
      wake(thread);
    }
  }
}

void run_cluster(unsigned first_block, unsigned threads) {
  start_cluster(first_block, threads);
  size_t exited = 0;
  const size_t all = static_cast<size_t>(threads) * machine.cluster;
  // In half of them one block of the cluster is ahead of the others, as far as barriers let it.
  const unsigned ahead = static_cast<unsigned>(machine.random() % (2 * machine.cluster));
  while (exited < all && machine.error.empty()) {
    if (machine.ready.empty()) return report_deadlock();
    size_t pick = machine.random() % machine.ready.size();
    for (int i = 0; i < 8 && ahead < machine.cluster && machine.ready[pick]->block->rank != ahead; ++i)
      pick = machine.random() % machine.ready.size();
    std::swap(machine.ready[pick], machine.ready.back());
    Thread* thread = machine.ready.back();
    machine.ready.pop_back();
    to_thread(thread);
    exited += thread->state == State::kExited;
  }
}

}  // namespace

const Dim3& thread_index() { return machine.running->index; }
const Dim3& block_index() { return machine.running->block->index; }
const Dim3& grid_dim() { return machine.grid; }
unsigned char* shared_memory() { return machine.running->block->shared.get(); }
unsigned cluster_rank() { return machine.running->block->rank; }
unsigned cluster_size() { return machine.cluster; }
int lane_index() { return static_cast<int>(machine.running->index.x % 32); }
void seed(uint64_t value) { machine.seed = value; }
const DeviceKind& device_kind() { return kind; }
void set_device_kind(const DeviceKind& value) { kind = value; }
void last_launch(unsigned& cluster, unsigned& shared_bytes) {
  cluster = machine.cluster;
  shared_bytes = static_cast<unsigned>(machine.shared_bytes);
}

unsigned char* map_shared(unsigned char* mine, unsigned rank) {
  const Block& block = *machine.running->block;
  const ptrdiff_t offset = mine - block.shared.get();
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(machine.shared_bytes) || rank >= machine.cluster) {
    fail(where(*machine.running) + ": no shared memory at this address in block " + std::to_string(rank) +
         " of the cluster");
    to_scheduler();
  }
  const Block& other = machine.blocks[rank];
  if (other.exited > 0) {
    fail(where(*machine.running) + " reads the shared memory of block " + std::to_string(other.index.x) +
         ", which may have exited");
    to_scheduler();
  }
  return other.shared.get() + offset;
}

void block_barrier(const char* site) { block_count(false, site); }

int block_count(bool vote, const char* site) {
  Thread* self = machine.running;
  self->vote = vote;
  self->state = State::kBlockBarrier;
  self->site = site;
  Block& block = *self->block;
  if (++block.waiting == block.threads.size()) {
    block.waiting = 0;
    release(block.threads);
  }
  to_scheduler();
  return self->count;
}

void cluster_barrier(const char* site) {
  Thread* self = machine.running;
  self->state = State::kClusterBarrier;
  self->site = site;
  if (++machine.waiting == machine.cluster * self->block->threads.size()) {
    machine.waiting = 0;
    std::vector<Thread*> all;
    for (Block& block : machine.blocks) all.insert(all.end(), block.threads.begin(), block.threads.end());
    release(all);
  }
  to_scheduler();
}

void warp_rendezvous(Lane& lane, const char* site) {
  Thread* self = machine.running;
  self->site = site;
  self->lane = &lane;
  self->state = State::kWarp;
  const unsigned own = self->index.x % 32, first = self->index.x - own;
  if (!(lane.mask >> own & 1)) {
    fail(where(*self) + ": the mask of its warp operation at " + site + " leaves itself out");
    return to_scheduler();
  }
  Thread* warp[32] = {};
  for (unsigned i = 0; i < 32 && first + i < self->block->threads.size(); ++i)
    warp[i] = self->block->threads[first + i];
  unsigned ballot = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if (!(lane.mask >> i & 1)) continue;
    const Thread* t = warp[i];
    if (t == nullptr || t->state != State::kWarp || t->lane->mask != lane.mask || std::strcmp(t->site, site) != 0)
      return to_scheduler();  // not all here: wait
    ballot |= static_cast<unsigned>(t->lane->vote) << i;
  }
  unsigned char results[32][16] = {};
  for (unsigned i = 0; i < 32; ++i) {
    if (!(lane.mask >> i & 1) || warp[i]->lane->source < 0) continue;
    const int source = warp[i]->lane->source;
    if (!(lane.mask >> source & 1)) {
      fail(where(*warp[i]) + ": reads lane " + std::to_string(source) + ", outside the mask, at " + site);
      return to_scheduler();
    }
    std::memcpy(results[i], warp[source]->lane->value, 16);
  }
  for (unsigned i = 0; i < 32; ++i) {
    if (!(lane.mask >> i & 1)) continue;
    std::memcpy(warp[i]->lane->value, results[i], 16);
    warp[i]->lane->ballot = ballot;
    wake(warp[i]);
  }
  to_scheduler();
}

void maybe_yield() {
  if (machine.random() % 16 != 0) return;
  wake(machine.running);
  to_scheduler();
}

// In [-1, 1], a function of the bits alone.
static double spread(float x) {
  uint32_t h = __float_as_uint(x) * 2654435761u;
  h ^= h >> 15;
  h *= 2246822519u;
  h ^= h >> 13;
  return static_cast<double>(h) / 2147483648.0 - 1.0;
}

float lg2_approx(float x) {
  const double exact = std::log2(static_cast<double>(x)), bound = std::ldexp(1.0, -22);
  return static_cast<float>(exact + spread(x) * bound * (x > 0.5f && x < 2.0f ? 1.0 : std::fabs(exact)));
}

float ex2_approx(float x) {
  if (x == 0.0f) return 1.0f;  // as the special-function unit has it
  return static_cast<float>(std::exp2(static_cast<double>(x)) * (1.0 + spread(x) * std::ldexp(1.0, -22)));
}

const char* launch(const char* name, const std::function<void()>& kernel, unsigned blocks, unsigned threads,
                   size_t shared_bytes, unsigned cluster) {
  std::lock_guard<std::mutex> guard(machine.lock);
  machine.error.clear();
  machine.name = name;
  machine.kernel = &kernel;
  machine.random.seed(machine.seed++);  // a new schedule for every launch
  machine.grid = {blocks, 1, 1};
  machine.shared_bytes = shared_bytes;
  machine.cluster = cluster;
  if (blocks % cluster != 0) fail("the grid is no multiple of the cluster");
  if (cluster > (kind.clusters ? 8 : 1))
    fail("a cluster of " + std::to_string(cluster) + " blocks: the device has no such");
  if (static_cast<int64_t>(shared_bytes) > kind.block_bytes)
    fail(std::to_string(shared_bytes) + " bytes of shared memory: the device gives a block " +
         std::to_string(kind.block_bytes));
  for (unsigned block = 0; block < blocks && machine.error.empty(); block += cluster) run_cluster(block, threads);
  static std::string message;
  message = machine.error;
  return message.empty() ? nullptr : message.c_str();
}

}  // namespace simt
