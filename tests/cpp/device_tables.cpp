// Tables kept on a device, on a runtime that runs what is enqueued at once: who finds one, who brings a new one, and
// that nobody writes over what another thread is about to read.
#include "cuda/common/device_tables.h"

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>

using mixed_attention::cuda::HeldTable;
using mixed_attention::cuda::hold_table;

// A stream as the runtime of this test knows it. The handles of two streams may be equal, one after the other.
struct CUstream_st {
  unsigned long long id;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaError_t answer = cudaSuccess;
};

namespace {

bool is_memory_short = false;
int num_waits = 0;
int num_errors = 0;  // that the runtime has not been asked for
thread_local cudaStreamCaptureMode mode_of_thread = cudaStreamCaptureModeGlobal;

void expect(bool holds, const std::string& wrong) {
  if (!holds) throw std::logic_error(wrong);
}

}  // namespace

cudaError_t cudaGetLastError() { return num_errors-- > 0 ? cudaErrorMemoryAllocation : cudaSuccess; }

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  expect(mode_of_thread == cudaStreamCaptureModeRelaxed, "an allocation would break the capture of another thread");
  if (is_memory_short) return ++num_errors, cudaErrorMemoryAllocation;
  *memory = std::aligned_alloc(256, bytes);  // for as long as the process lives, as on a device
  return cudaSuccess;
}

cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) { return *id = stream->id, cudaSuccess; }

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  if (stream->answer != cudaSuccess) ++num_errors;
  return *status = stream->status, stream->answer;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  expect(flags == cudaStreamNonBlocking, "the default stream would wait");
  return *stream = new CUstream_st{1000}, cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  expect(mode_of_thread == cudaStreamCaptureModeRelaxed, "waiting would break the capture of another thread");
  ++num_waits;
  return stream->answer;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return std::swap(*mode, mode_of_thread), cudaSuccess;
}

namespace {

constexpr size_t kLarge = size_t{3} << 20;

// A call that reads a table full of its own number; whether it uploaded it.
bool call(unsigned char id, size_t bytes, int device, CUstream_st& stream, bool is_kept = true) {
  bool is_new = false;
  const HeldTable table = hold_table(id, bytes, device, &stream, [&](char* memory, void* where) {
    const auto* other = static_cast<const CUstream_st*>(where);
    expect((other == &stream) == (stream.status == cudaStreamCaptureStatusNone), "a graph gets the upload");
    std::memset(memory, id, bytes);
    is_new = true;
  });
  expect((table.memory != nullptr) == is_kept, is_kept ? "a table is not kept" : "a table is kept that may not be");
  for (size_t i = 0; is_kept && i < bytes; i += 1 + bytes / 1000) {
    expect(static_cast<unsigned char>(table.memory[i]) == id, "a table was written over");
  }
  expect(mode_of_thread == cudaStreamCaptureModeGlobal && num_errors == 0, "the runtime is left as it was not found");
  return is_new;
}

void check_one_stream() {
  CUstream_st stream{1};
  expect(call(1, 1000, 0, stream) && !call(1, 1000, 0, stream), "the first call uploads, and no other");
  expect(call(2, 1000, 0, stream) && !call(1, 1000, 0, stream) && !call(2, 1000, 0, stream), "two tables are kept");
  expect(call(3, kLarge, 0, stream) && call(4, kLarge, 0, stream) && !call(1, 1000, 0, stream), "all have room");
  expect(call(5, kLarge, 0, stream) && call(1, 1000, 0, stream) && !call(5, kLarge, 0, stream), "all are forgotten");
  call(6, 2 * kLarge, 0, stream, false);
}

void check_streams_and_devices() {
  CUstream_st handle{2};
  expect(call(1, 1000, 0, handle), "another stream has a table of its own");
  handle.id = 3;
  expect(call(1, 1000, 0, handle), "a stream is not known by a handle that was another's");
  expect(call(1, 1000, 1, handle), "another device has a table of its own");
  handle.id = 4;
  expect(call(1, 1000, 0, handle), "a fourth stream has a store");
  handle.id = 5;
  call(1, 1000, 0, handle, false);
  expect(call(1, 1000, 1, handle), "a full device says nothing of another");
}

void check_graphs() {
  CUstream_st stream{1, cudaStreamCaptureStatusActive};
  expect(call(7, 1000, 0, stream) && num_waits == 1, "a graph's table is there before it is read");
  CUstream_st other{500, cudaStreamCaptureStatusActive};
  expect(!call(7, 1000, 0, other) && !call(7, 1000, 0, stream), "graphs of all streams share a table");
  expect(call(1, 1000, 1, stream), "another device has a table of its own");
  CUstream_st unsure{1, cudaStreamCaptureStatusNone, cudaErrorStreamCaptureImplicit};
  call(1, 1000, 0, unsure, false);
  CUstream_st after{1};
  expect(call(7, 1000, 0, after), "what a graph reads was kept for a stream");
  expect(call(8, kLarge, 0, stream) && call(9, kLarge, 0, stream), "graphs have room");
  call(10, kLarge, 0, stream, false);  // nothing that a graph may read is ever written over
  expect(!call(7, 1000, 0, other) && !call(8, kLarge, 0, other), "what graphs read stays");
}

void check_short_memory() {
  CUstream_st stream{20};
  is_memory_short = true;
  call(1, 1000, 2, stream, false);
  is_memory_short = false;
  expect(call(1, 1000, 2, stream), "a device that had no memory never gets a store");
}

void check_failing_upload() {
  CUstream_st stream{1};
  try {
    hold_table(90, 1000, 0, &stream, [](char*, void*) { throw std::runtime_error("no launch"); });
    expect(false, "an error is lost");
  } catch (const std::runtime_error&) {
  }
  expect(call(90, 1000, 0, stream), "a table is found that was never uploaded");
}

// A thread that holds one table and asks for the next, as a backward does.
void check_threads() {
  CUstream_st stream{1};
  std::string wrong;
  const auto work = [&](unsigned char first) {
    try {
      for (int i = 0; i < 300; ++i) {
        const auto id = static_cast<unsigned char>(100 + (first + i) % 5);
        const HeldTable outer =
            hold_table(id, kLarge, 0, &stream, [&](char* memory, void*) { std::memset(memory, id, kLarge); });
        for (size_t at = 0; at < kLarge; at += 4099) {
          expect(static_cast<unsigned char>(outer.memory[at]) == id, "another thread wrote over a table");
        }
        call(static_cast<unsigned char>(110 + first), 5000, 0, stream);
      }
    } catch (const std::exception& error) {
      wrong = error.what();
    }
  };
  std::thread one(work, 0), other(work, 2);
  one.join();
  other.join();
  expect(wrong.empty(), wrong);
}

}  // namespace

int main() {
  try {
    check_one_stream();
    check_streams_and_devices();
    check_graphs();
    check_short_memory();
    check_failing_upload();
    check_threads();
  } catch (const std::exception& error) {
    std::printf("FAIL %s\n", error.what());
    return 1;
  }
  std::printf("ok\n");
  return 0;
}
