// A weight seen as a matrix, without a copy.
#pragma once

#include "dtype.h"
#include "team.h"

namespace rmsgd {

// One side of a matrix: a product of up to four tensor dimensions, the first one outermost.
// Unused dimensions have size 1 and stride 0. Strides count elements.
struct Side {
  long long size[4];
  long long stride[4];

  RMSGD_FN long long length() const { return size[0] * size[1] * size[2] * size[3]; }
};

// The L x M matrix A whose Gram matrix A A^T is L x L: `small` is the smaller side.
// A conv weight (o, i, kh, kw) of strides (s0, s1, s2, s3) in its "out" mode has
// small = {o; s0} and large = {i, kh, kw; s1, s2, s3} when o <= i kh kw.
// The order of the columns does not matter to a Gram matrix; callers coalesce dimensions.
struct MatrixView {
  const void* data;
  Dtype dtype;
  Side small;
  Side large;
};

}  // namespace rmsgd
