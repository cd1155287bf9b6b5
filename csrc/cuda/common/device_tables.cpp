#include "cuda/common/device_tables.h"

#include <cuda_runtime_api.h>

#include <iterator>
#include <map>
#include <optional>
#include <unordered_map>
#include <utility>

#include "cuda/common/scratch.h"

namespace mixed_attention::cuda {
namespace {

// Room for fifty tables of 4096 segments. A table may take a half of it.
constexpr size_t kStoreBytes = size_t{8} << 20;
constexpr int kMostStores = 4;  // on a device

using Upload = std::function<void(char* memory, void* stream)>;

// Where in the memory of a store tables lie: one behind the other.
class Places {
 public:
  std::optional<size_t> find(uint64_t id) const {
    const auto found = places_.find(id);
    return found == places_.end() ? std::nullopt : std::optional(found->second);
  }

  bool has_room(size_t bytes) const { return end_ + bytes <= kStoreBytes; }
  size_t next() const { return end_; }

  void add(uint64_t id, size_t bytes) {
    places_.emplace(id, end_);
    end_ += part_bytes(bytes);
  }

  void forget_all() { *this = {}; }

 private:
  std::unordered_map<uint64_t, size_t> places_;
  size_t end_ = 0;
};

// Memory of a stream. When it is full, all tables are forgotten.
class Store {
 public:
  explicit Store(char* memory) : memory_(memory) {}

  HeldTable hold(uint64_t id, size_t bytes, cudaStream_t stream, const Upload& upload) {
    HeldTable table{nullptr, std::unique_lock(mutex_)};
    if (const auto place = places_.find(id)) {
      table.memory = memory_ + *place;
      return table;
    }
    if (!places_.has_room(bytes)) places_.forget_all();
    table.memory = memory_ + places_.next();
    upload(table.memory, stream);
    places_.add(id, bytes);  // behind the upload, which may throw
    return table;
  }

 private:
  char* const memory_;
  std::recursive_mutex mutex_;
  Places places_;
};

// Others may be capturing graphs, or this thread: what follows has nothing to do with that.
class BesideCaptures {
 public:
  BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Device memory of our own, and none of a caller's pool; null where there is none left.
char* allocate() {
  const BesideCaptures relaxed;
  void* memory = nullptr;
  if (cudaMalloc(&memory, kStoreBytes) == cudaSuccess) return static_cast<char*>(memory);
  cudaGetLastError();  // it is no error of the call, which goes on without
  return nullptr;
}

// Memory that graphs read for as long as the process lives. A table is there before its place is known.
class GraphStore {
 public:
  char* find_or_bring(uint64_t id, size_t bytes, const Upload& upload) {
    const std::lock_guard lock(mutex_);
    if (const auto place = places_.find(id)) return memory_ + *place;
    if (memory_ == nullptr) memory_ = allocate();
    if (memory_ == nullptr || !places_.has_room(bytes)) return nullptr;
    const BesideCaptures relaxed;
    if (stream_ == nullptr && cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking) != cudaSuccess) {
      cudaGetLastError();
      return nullptr;
    }
    char* const table = memory_ + places_.next();
    upload(table, stream_);
    if (cudaStreamSynchronize(stream_) != cudaSuccess) {
      cudaGetLastError();
      return nullptr;
    }
    places_.add(id, bytes);
    return table;
  }

 private:
  std::mutex mutex_;
  char* memory_ = nullptr;
  cudaStream_t stream_ = nullptr;
  Places places_;
};

// NOTE: never freed, as threads may outlive static objects.
GraphStore& graph_store_of(int device) {
  static auto* mutex = new std::mutex;
  static auto* stores = new std::map<int, GraphStore>;
  const std::lock_guard lock(*mutex);
  return (*stores)[device];
}

// Whether what is enqueued becomes part of a graph; nothing where it cannot be enqueued at all because of one.
std::optional<bool> is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) == cudaSuccess) return status != cudaStreamCaptureStatusNone;
  cudaGetLastError();
  return std::nullopt;
}

// The store of a stream; null where there is none.
Store* store_of(int device, cudaStream_t stream) {
  unsigned long long id = 0;  // unlike the handle, no other stream ever gets it
  if (cudaStreamGetId(stream, &id) != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  // NOTE: never freed, as threads may outlive static objects.
  static auto* mutex = new std::mutex;
  static auto* stores = new std::map<std::pair<int, unsigned long long>, Store>;
  const std::lock_guard lock(*mutex);
  if (const auto found = stores->find({device, id}); found != stores->end()) return &found->second;
  const auto first = stores->lower_bound({device, 0}), end = stores->lower_bound({device + 1, 0});
  if (std::distance(first, end) >= kMostStores) return nullptr;
  char* memory = allocate();
  return memory == nullptr ? nullptr : &stores->try_emplace({device, id}, memory).first->second;
}

}  // namespace

HeldTable hold_table(uint64_t id, size_t bytes, int device, void* stream, const Upload& upload) {
  const auto of_call = static_cast<cudaStream_t>(stream);
  const std::optional<bool> is_of_graph = is_capturing(of_call);
  if (bytes > kStoreBytes / 2 || !is_of_graph) return {};
  if (*is_of_graph) return {graph_store_of(device).find_or_bring(id, bytes, upload), {}};
  Store* store = store_of(device, of_call);
  return store == nullptr ? HeldTable{} : store->hold(id, bytes, of_call, upload);
}

}  // namespace mixed_attention::cuda
