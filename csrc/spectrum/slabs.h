// How the columns of a symmetric matrix are divided among the blocks of a team: dealt like cards, SLAB_PACK
// neighbouring ones at a time, so that every block has as many as the others of those that a reduction has
// not passed yet. A block's columns lie side by side in a slab of their own, the slabs one after the other.
// In one block they are the matrix itself.
#pragma once

#include "../team.h"

namespace rmsgd {

constexpr int SLAB_PACK = 4;

struct Slabs {
  int n;       // rows, and columns that count
  int packs;   // of columns, the last one filled up
  int blocks;  // of the team

  // stride: the columns, a multiple of SLAB_PACK.
  RMSGD_FN Slabs(int n, int stride, int blocks) : n(n), packs(stride / SLAB_PACK), blocks(blocks) {}

  // How many of the first `count` packs a block has. So many are also before the pack `count` in its slab.
  RMSGD_FN int packs_of(int block, int count) const {
    return count <= block ? 0 : (count - block - 1) / blocks + 1;
  }
  RMSGD_FN int packs_of(int block) const { return packs_of(block, packs); }

  // Elements of a row of a block's slab.
  RMSGD_FN int width(int block) const { return packs_of(block) * SLAB_PACK; }

  // Where a block's slab begins, in elements.
  RMSGD_FN int slab(int block) const {
    const int longer = packs % blocks;
    return n * SLAB_PACK * (block * (packs / blocks) + (block < longer ? block : longer));
  }

  // The column of the matrix that column `index` of a block's slab is.
  RMSGD_FN int column(int block, int index) const {
    return (index / SLAB_PACK * blocks + block) * SLAB_PACK + index % SLAB_PACK;
  }

  // Where an element is; those of a pack are neighbours.
  RMSGD_FN int place(int row, int column) const {
    const int pack = column / SLAB_PACK, block = pack % blocks;
    return slab(block) + row * width(block) + pack / blocks * SLAB_PACK + column % SLAB_PACK;
  }
};

}  // namespace rmsgd
