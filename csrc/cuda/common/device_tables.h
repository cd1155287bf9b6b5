// Tables in device memory, kept for later calls.
//
// Every stream has a store of its own. What lies there is written and read by nothing but what is enqueued on that
// stream, so that the order of the stream is all that is needed: reads come behind the upload, and what is written over
// a forgotten table comes behind its last reader. A store never moves and is never freed.
//
// Nothing of a stream's store gets into a CUDA graph, which may be replayed on any stream, after the table was
// forgotten. What graphs read lies in a store of the device, whose tables are uploaded beside the capture and never
// forgotten; where it is full, calls that are captured bring their tables along, in the workspace of the graph.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>

namespace mixed_attention::cuda {

// Where a table lies. As long as this lives, no other thread writes over it: kernels that read it are to be enqueued
// meanwhile. One thread may hold several; then each table is good for what is enqueued before the next one is asked
// for.
struct HeldTable {
  char* memory = nullptr;  // aligned as parts of scratch memory; null where none is kept, and nothing was enqueued
  std::unique_lock<std::recursive_mutex> held;
};

// The table of an id that no other table has, for what is enqueued next on a stream (cudaStream_t) of the current
// device: the one that is there already, or a place to which upload enqueues it on the stream that it is given. None is
// kept of very large tables, of more streams than there are stores, and where memory is short.
HeldTable hold_table(uint64_t id, size_t bytes, int device, void* stream,
                     const std::function<void(char* memory, void* stream)>& upload);

}  // namespace mixed_attention::cuda
