// The fused momentum step on a CPU: one pass over weights, gradients and buffers.
#include "../half.h"
#include "step.h"
#include "update.h"

namespace rmsgd::RMSGD_ISA {
namespace {

// Narrow elements converted at a time: the converted values stay in the first-level cache.
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

// A weight that is narrower than its arithmetic, with a gradient of its own type or of the arithmetic's.
template <class Element>
void step_narrow(const StepPiece& piece, const StepTensor& tensor, const Stepper<float>& step) {
  float weights[BLOCK], gradients[BLOCK];
  for (int64_t i = piece.begin; i < piece.end; i += BLOCK) {
    const int64_t n = piece.end - i < BLOCK ? piece.end - i : BLOCK;
    const float* g = gradients;
    if (tensor.gradient_dtype == tensor.dtype) {
      widen_all(static_cast<const Element*>(tensor.gradient) + i, n, gradients);
    } else {
      g = static_cast<const float*>(tensor.gradient) + i;
    }
    Element* const weight = static_cast<Element*>(tensor.weight) + i;
    widen_all(weight, n, weights);
    step(n, weights, static_cast<float*>(tensor.buffer) + i, g);
    narrow_all(weights, n, weight);
  }
}

// The step on weights of one type.
struct TypedStep {
  const StepPiece& piece;
  const StepTensor& tensor;
  const StepGroup& group;
  double grad_scale;

  template <class Element>
  void operator()(const Element*) const {
    const Stepper<typename BufferOf<Element>::type> step(tensor, group, grad_scale);
    if constexpr (is_narrow<Element>()) {
      step_narrow<Element>(piece, tensor, step);
    } else {
      step_same(piece, tensor, step);
    }
  }
};

}  // namespace

void step_pieces(const StepPiece* pieces, int64_t count, const StepTensor* tensors, const StepGroup* groups,
                 double grad_scale) {
  for (const StepPiece* piece = pieces; piece < pieces + count; ++piece) {
    const StepTensor& tensor = tensors[piece->tensor];
    if (tensor.gradient == nullptr) continue;
    with_elements(tensor.dtype, tensor.weight, TypedStep{*piece, tensor, groups[tensor.group], grad_scale});
  }
}

}  // namespace rmsgd::RMSGD_ISA
