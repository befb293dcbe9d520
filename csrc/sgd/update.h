// The element rule of the momentum step, for CPUs and GPUs alike: every step kernel is a loop over it.
#pragma once

#include "../team.h"

namespace rmsgd {

// How past gradients are kept.
//   none      momentum is 0: nothing is kept, and dampening does not apply
//   velocity  v <- momentum v - (1 - dampening) eta g,  w <- w + v   (Algorithm 1 of the paper)
//   buffer    b <- momentum b + (1 - dampening) g,      w <- w - eta b   (torch.optim.SGD)
enum class Memory { none, velocity, buffer };

// The numbers of one parameter at one step, in its arithmetic type A: double for float64
// parameters, float for all others.
template <class A>
struct Coefficients {
  A scale;  // what a stored gradient is multiplied by: 1 / grad_scale, negated to maximise
  A weight_decay;
  A momentum;
  A eta;   // learning rate
  A gain;  // what a gradient enters the memory with: 1 - dampening, times eta for a velocity
};

// `eta` is the parameter's learning rate. The first gradient that enters a memory (`fresh`) is never
// dampened, as in torch.
template <class A>
RMSGD_FN Coefficients<A> coefficients(double eta, double grad_scale, double momentum, double dampening,
                                      double weight_decay, bool maximize, bool velocity, bool fresh) {
  const double gain = fresh ? 1 : 1 - dampening;
  return {A((maximize ? -1 : 1) / grad_scale), A(weight_decay), A(momentum), A(eta),
          A(velocity ? eta * gain : gain)};
}

// One weight `w` and its memory `m` take one step along the stored gradient `g`.
template <Memory memory, bool nesterov, class A>
RMSGD_FN void update(const Coefficients<A>& c, A g, A& w, A& m) {
  g = g * c.scale + c.weight_decay * w;
  if constexpr (memory == Memory::none) {
    w -= c.eta * g;
  } else if constexpr (memory == Memory::velocity) {
    m = c.momentum * m - c.gain * g;
    w += nesterov ? c.momentum * m - c.eta * g : m;
  } else {
    m = c.momentum * m + c.gain * g;
    w -= c.eta * (nesterov ? g + c.momentum * m : m);
  }
}

}  // namespace rmsgd
