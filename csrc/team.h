// The "team" interface: one source for a CPU thread, a warp and a block.
// Shared code (EVBMF, metrics, learning-rate rules, Sturm counts) is written against a team:
//   int  rank()            which member this is, 0 <= rank < size
//   int  size()            how many members work on the same problem
//   void barrier()         every member's earlier writes become visible to every member
//   T    sum(T x)          the sum of x over the members, the same bits on every member
//   T    max(T x)          likewise the largest
// A large team consists of groups, small teams that synchronise without the others at almost no cost:
//   group()                the team of this member's group
//   int  group_number()    which one that is, 0 <= group_number < groups
//   int  groups()          how many there are
// It may be spread over blocks, which synchronise at some cost, while the members of one block synchronise
// quickly and share near memory:
//   block()                the team of this member's block
//   int  block_number()    which one that is, 0 <= block_number < blocks
//   int  blocks()          how many there are
// Every member calls every collective, in the same order; sum and max are barriers too. A loop over
// data is written `for (int i = team.rank(); i < n; i += team.size())`. No header that CUDA compiles
// includes a standard header when __CUDACC_RTC__ is defined.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define RMSGD_FN __host__ __device__ __forceinline__
#else
#define RMSGD_FN inline __attribute__((always_inline))
#endif

#ifndef __CUDACC_RTC__
#include <math.h>
#else
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#endif

namespace rmsgd {

// A team of one: plain sequential code.
struct Solo {
  RMSGD_FN int rank() const { return 0; }
  RMSGD_FN int size() const { return 1; }
  RMSGD_FN void barrier() const {}
  template <class T>
  RMSGD_FN T sum(T x) const {
    return x;
  }
  template <class T>
  RMSGD_FN T max(T x) const {
    return x;
  }
  RMSGD_FN Solo group() const { return {}; }
  RMSGD_FN int groups() const { return 1; }
  RMSGD_FN int group_number() const { return 0; }
};

}  // namespace rmsgd
