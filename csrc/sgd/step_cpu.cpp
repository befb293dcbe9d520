// The fused momentum step on a CPU: one pass over weights, gradients and buffers.
#include "../half.h"
#include "step.h"
#include "update.h"

namespace rmsgd::RMSGD_ISA {
namespace {

// Half-precision elements converted at a time: the converted values stay in the first-level cache.
constexpr int64_t BLOCK = 512;

template <Memory memory, bool nesterov, class A>
void update_all(const Coefficients<A>& given, int64_t n, A* __restrict w, A* __restrict m,
                const A* __restrict g) {
  const Coefficients<A> c = given;  // a copy, which no write through w or m can change
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (memory == Memory::none) {
      A none = 0;
      update<memory, nesterov>(c, g[i], w[i], none);
    } else {
      update<memory, nesterov>(c, g[i], w[i], m[i]);
    }
  }
}

// One parameter's step on any run of its elements, in arithmetic type A.
template <class A>
class Stepper {
 public:
  Stepper(const StepTensor& tensor, const StepGroup& group, double grad_scale)
      : coefficients_(coefficients<A>(*tensor.eta * group.multiplier, grad_scale, group.momentum,
                                      group.dampening, group.weight_decay, group.maximize, group.velocity,
                                      *tensor.fresh)),
        update_(choose(group)),
        clear_(*tensor.fresh && group.momentum != 0) {}

  void operator()(int64_t n, A* w, A* m, const A* g) const {
    if (clear_) __builtin_memset(m, 0, size_t(n) * sizeof(A));
    update_(coefficients_, n, w, m, g);
  }

 private:
  using Update = void (*)(const Coefficients<A>&, int64_t, A*, A*, const A*);

  static Update choose(const StepGroup& group) {
    if (group.momentum == 0) return update_all<Memory::none, false, A>;
    if (group.velocity) {
      return group.nesterov ? update_all<Memory::velocity, true, A> : update_all<Memory::velocity, false, A>;
    }
    return group.nesterov ? update_all<Memory::buffer, true, A> : update_all<Memory::buffer, false, A>;
  }

  Coefficients<A> coefficients_;
  Update update_;
  bool clear_;
};

template <class A>
void step_same(const StepPiece& piece, const StepTensor& tensor, const Stepper<A>& step) {
  step(piece.end - piece.begin, static_cast<A*>(tensor.weight) + piece.begin,
       static_cast<A*>(tensor.buffer) + piece.begin, static_cast<const A*>(tensor.gradient) + piece.begin);
}

void load(Dtype dtype, const void* from, int64_t begin, int64_t n, float* to) {
  if (dtype == Dtype::float16) {
    widen_all(static_cast<const Float16*>(from) + begin, n, to);
  } else {
    widen_all(static_cast<const BFloat16*>(from) + begin, n, to);
  }
}

void store(Dtype dtype, const float* from, int64_t n, void* to, int64_t begin) {
  if (dtype == Dtype::float16) {
    narrow_all(from, n, static_cast<Float16*>(to) + begin);
  } else {
    narrow_all(from, n, static_cast<BFloat16*>(to) + begin);
  }
}

// A half-precision weight, whose gradient has its type or float32.
void step_half(const StepPiece& piece, const StepTensor& tensor, const Stepper<float>& step) {
  float weights[BLOCK], gradients[BLOCK];
  for (int64_t i = piece.begin; i < piece.end; i += BLOCK) {
    const int64_t n = piece.end - i < BLOCK ? piece.end - i : BLOCK;
    const float* g = gradients;
    if (tensor.gradient_dtype == Dtype::float32) {
      g = static_cast<const float*>(tensor.gradient) + i;
    } else {
      load(tensor.gradient_dtype, tensor.gradient, i, n, gradients);
    }
    load(tensor.dtype, tensor.weight, i, n, weights);
    step(n, weights, static_cast<float*>(tensor.buffer) + i, g);
    store(tensor.dtype, weights, n, tensor.weight, i);
  }
}

}  // namespace

void step_pieces(const StepPiece* pieces, int64_t count, const StepTensor* tensors, const StepGroup* groups,
                 double grad_scale) {
  for (const StepPiece* piece = pieces; piece < pieces + count; ++piece) {
    const StepTensor& tensor = tensors[piece->tensor];
    if (tensor.gradient == nullptr) continue;
    const StepGroup& group = groups[tensor.group];
    switch (tensor.dtype) {
      case Dtype::float64:
        step_same(*piece, tensor, Stepper<double>(tensor, group, grad_scale));
        break;
      case Dtype::float32:
        step_same(*piece, tensor, Stepper<float>(tensor, group, grad_scale));
        break;
      default:
        step_half(*piece, tensor, Stepper<float>(tensor, group, grad_scale));
    }
  }
}

}  // namespace rmsgd::RMSGD_ISA
