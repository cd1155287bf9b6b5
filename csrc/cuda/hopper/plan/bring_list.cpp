#include "cuda/hopper/plan/bring_list.h"

#include "cuda/common/upload.h"

namespace mixed_attention::cuda::hopper {

HeldTable bring_list(const HostTileList& list, const AttentionParams& params, char* room, WorkTable& table) {
  const auto bring_to = [&](char* memory, void* stream) {
    upload(memory, list.tiles.data(), list.tiles.size() * sizeof(ListedTile), stream);
    upload(memory + list.tile_bytes(), list.ranges.data(), list.ranges.size() * sizeof(KeyTiles), stream);
  };
  HeldTable held = hold_table(list.id, list.device_bytes(), params.device, params.stream, bring_to);
  char* memory = held.memory;
  if (memory == nullptr) bring_to(memory = room, params.stream);
  table.list.tiles = reinterpret_cast<const ListedTile*>(memory);
  table.list.ranges = reinterpret_cast<const KeyTiles*>(memory + list.tile_bytes());
  return held;
}

}  // namespace mixed_attention::cuda::hopper
