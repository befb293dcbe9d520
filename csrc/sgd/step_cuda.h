// The fused momentum step on a GPU: the kernel's arguments, and one warp's share of the work.
//
// The whole network is cut into items, each of some elements of one parameter (rmsgd/backends/cuda_step.py).
// A warp takes an item, so that a thousand tiny tensors cost a thousand warps and not a thousand blocks. The
// tables of parameters and buffers lie on the device and change only when a pointer does. What changes from
// step to step comes in the kernel's arguments: the gradients' addresses and the hyper-parameters. A graph
// that captures the launch keeps these. Learning rates (`eta`), tensor learning rates, the gradient scale and
// the overflow flag are read from device memory at every replay.
//
// Traffic is the floor: 20 bytes for an fp32 parameter with momentum (ResNet50: 25.6 M parameters,
// 511 MB). Metadata is 16 bytes per item and 40 per parameter, less than .2 % of that. The last items are
// smaller than the others, so that the memory is busy until the end.
#pragma once

#include "../dtype.h"
#include "../element.h"
#include "update.h"

namespace rmsgd {

enum StepFlags : int { STEP_NESTEROV = 1, STEP_MAXIMIZE = 2, STEP_VELOCITY = 4 };

struct CudaStepGroup {
  const double* device_multiplier;  // read instead of `multiplier` unless null: a tensor learning rate
  double multiplier;
  double momentum;
  double dampening;
  double weight_decay;
  long long flags;
};

struct CudaStepTensor {
  void* weight;
  void* buffer;  // float64 for a float64 weight, else float32; null where there is none
  Dtype dtype;
  int group;
  long long eta;  // index
};

struct CudaStepItem {
  long long begin;
  int count;
  int tensor;
};

// A launch covers items [first_item, first_item + items) of tensors from first_tensor on. `payload`
// holds the address of each of these tensors' gradients (0 if there is none), and then the groups from
// first_group on. An odd address means that a weight of half precision has a float32 gradient, which begins a
// byte before.
template <int words>
struct StepArguments {
  const CudaStepItem* item;
  const CudaStepTensor* tensor;
  unsigned char* fresh_item;  // (items) whether no gradient has entered this part of the buffer yet
  unsigned char* fresh;       // (tensors) the same for a whole parameter, for the host to read
  const double* eta;
  const float* grad_scale;  // gradients are divided by it; null: 1
  const float* found_inf;   // unless null, a value other than 0 skips the step
  int first_item, items;
  int first_tensor, tensors;
  int first_group, groups;
  unsigned long long payload[words];
};

// Any driver takes 4 KB of arguments; 32 KB need CUDA 12.1.
constexpr int STEP_SMALL = 500;
constexpr int STEP_LARGE = 4000;

// `count` packs of 16 bytes of weights, one team's width apart, take the step.
template <Memory memory, bool nesterov, int count, class T, class A, class G>
RMSGD_FN void step_packs(const Coefficients<A>& c, T* w, A* m, const G* g, int apart, bool fresh, bool m_fits,
                         bool g_fits) {
  constexpr int PACK = 16 / int(sizeof(T));
  Pack<T, PACK> weight[count];
  Pack<G, PACK> gradient[count];
  Pack<A, PACK> past[count];
#pragma unroll
  for (int k = 0; k < count; ++k) {
    weight[k].load(w + k * apart, true);
    gradient[k].load(g + k * apart, g_fits);
    if (memory != Memory::none) past[k].load(m + k * apart, m_fits);
  }
#pragma unroll
  for (int k = 0; k < count; ++k) {
#pragma unroll
    for (int e = 0; e < PACK; ++e) {
      A wide = widen(weight[k].value[e]), old = 0;
      if (memory != Memory::none && !fresh) old = past[k].value[e];
      update<memory, nesterov>(c, A(widen(gradient[k].value[e])), wide, old);
      narrow(wide, weight[k].value[e]);
      past[k].value[e] = old;
    }
    weight[k].store(w + k * apart, true);
    if (memory != Memory::none) past[k].store(m + k * apart, m_fits);
  }
}

// Takes the step on a warp's item. Its elements have type T, the arithmetic type A, and gradients type G.
template <Memory memory, bool nesterov, class Team, class T, class A, class G>
RMSGD_FN void step_elements(Team& team, const Coefficients<A>& c, T* w, A* m, const G* g, int count,
                            bool fresh) {
  constexpr int PACK = 16 / int(sizeof(T));
  constexpr int AHEAD = sizeof(T) == 2 ? 1 : 2;  // packs loaded before the first is used

  const auto one = [&](int i) {
    A wide = widen(w[i]), old = 0;
    if (memory != Memory::none && !fresh) old = m[i];
    update<memory, nesterov>(c, A(widen(g[i])), wide, old);
    narrow(wide, w[i]);
    if (memory != Memory::none) m[i] = old;
  };

  // The weight decides where packs begin; another array that is out of step with it is accessed
  // element by element. The loops over single elements are short: unrolled, they would take registers from
  // the others.
  const int misaligned = int((unsigned long long)w % 16 / sizeof(T));
  const int head = misaligned == 0 ? 0 : PACK - misaligned < count ? PACK - misaligned : count;
#pragma unroll 1
  for (int i = team.rank(); i < head; i += team.size()) one(i);
  const bool m_fits = Pack<A, PACK>::fits(m + head), g_fits = Pack<G, PACK>::fits(g + head);

  const int end = head + (count - head) / PACK * PACK;
  const int apart = team.size() * PACK;
  int i = head + team.rank() * PACK;
  for (; i + (AHEAD - 1) * apart < end; i += AHEAD * apart) {
    step_packs<memory, nesterov, AHEAD>(c, w + i, m + i, g + i, apart, fresh, m_fits, g_fits);
  }
  for (; AHEAD > 1 && i < end; i += apart) {
    step_packs<memory, nesterov, 1>(c, w + i, m + i, g + i, apart, fresh, m_fits, g_fits);
  }
#pragma unroll 1
  for (int k = end + team.rank(); k < count; k += team.size()) one(k);
}

template <class T, class A, class G, class Team>
RMSGD_FN void step_typed(Team& team, const CudaStepGroup& group, double eta, double grad_scale,
                         const CudaStepTensor& tensor, const void* gradient, const CudaStepItem& item,
                         bool fresh) {
  const double multiplier = group.device_multiplier != nullptr ? *group.device_multiplier : group.multiplier;
  const bool nesterov = group.flags & STEP_NESTEROV, velocity = group.flags & STEP_VELOCITY;
  const Coefficients<A> c = coefficients<A>(eta * multiplier, grad_scale, group.momentum, group.dampening,
                                            group.weight_decay, group.flags & STEP_MAXIMIZE, velocity, fresh);
  T* const w = static_cast<T*>(tensor.weight) + item.begin;
  A* const m = static_cast<A*>(tensor.buffer) + item.begin;
  const G* const g = static_cast<const G*>(gradient) + item.begin;
#ifdef __CUDA_ARCH__
  // Loads and stores need not find out then what kind of memory it is.
  __builtin_assume(__isGlobal(w));
  __builtin_assume(__isGlobal(m));
  __builtin_assume(__isGlobal(g));
#endif
  if (group.momentum == 0.0) {
    step_elements<Memory::none, false>(team, c, w, m, g, item.count, fresh);
  } else if (velocity) {
    if (nesterov) {
      step_elements<Memory::velocity, true>(team, c, w, m, g, item.count, fresh);
    } else {
      step_elements<Memory::velocity, false>(team, c, w, m, g, item.count, fresh);
    }
  } else if (nesterov) {
    step_elements<Memory::buffer, true>(team, c, w, m, g, item.count, fresh);
  } else {
    step_elements<Memory::buffer, false>(team, c, w, m, g, item.count, fresh);
  }
}

// The step on weights of one type, whose gradients have that type or, where it is narrow, that of the buffer.
template <class Team>
struct TypedStep {
  Team& team;
  const CudaStepGroup& group;
  double eta, grad_scale;
  const CudaStepTensor& tensor;
  const void* gradient;
  bool single;
  const CudaStepItem& item;
  bool fresh;

  template <class T>
  RMSGD_FN void operator()(const T*) const {
    using A = typename BufferOf<T>::type;
    if constexpr (is_narrow<T>()) {
      if (single) return step_typed<T, A, A>(team, group, eta, grad_scale, tensor, gradient, item, fresh);
    }
    step_typed<T, A, T>(team, group, eta, grad_scale, tensor, gradient, item, fresh);
  }
};

// Takes the step on one item. Nobody but this team touches the item's elements or its flag.
template <class Team, int words>
RMSGD_FN void step_item(Team& team, const StepArguments<words>& arguments, int number) {
  if (arguments.found_inf != nullptr && *arguments.found_inf != 0.0f) return;
  const CudaStepItem item = arguments.item[number];
  const CudaStepTensor tensor = arguments.tensor[item.tensor];
  const unsigned long long address = arguments.payload[item.tensor - arguments.first_tensor];
  if (address == 0) return;
  const bool single = address % 2 != 0;
  const void* const gradient = reinterpret_cast<const void*>(address - single);
  const CudaStepGroup& group = reinterpret_cast<const CudaStepGroup*>(
      arguments.payload + arguments.tensors)[tensor.group - arguments.first_group];
  const double eta = arguments.eta[tensor.eta];
  const double grad_scale = arguments.grad_scale != nullptr ? double(*arguments.grad_scale) : 1.0;
  const bool fresh = arguments.fresh_item[number] != 0;
  with_elements(tensor.dtype, tensor.weight,
                TypedStep<Team>{team, group, eta, grad_scale, tensor, gradient, single, item, fresh});
  team.barrier();  // all have read the flag
  if (fresh && group.momentum != 0.0 && team.rank() == 0) {
    arguments.fresh_item[number] = 0;
    if (item.begin == 0) arguments.fresh[item.tensor] = 0;
  }
}

}  // namespace rmsgd
