// The rules that move the learning rate of every layer at an epoch end, as in rmsgd/rules.py.
// A layer is a probed parameter with its spectra; its measurement is a weighted sum of one column of
// the metrics table over those spectra. All of it is float64.
#pragma once

#include "metrics.h"

namespace rmsgd {

// The formulas of next_rate, numbered like Rule.number of rmsgd/rules.py.
enum class RateRule : int { algorithm_1, release, published };
constexpr int RATE_RULES = 3;

// Leaders of a parameter that is not probed, besides layers, as in rmsgd/layers.py.
constexpr int MEAN_OF_ALL = -1, NO_LEADER = -2;

// The numbers of one parameter group at an epoch end.
struct RateGroup {
  double initial_lr;  // lr0, the rate the group was created with
  double beta;
  double zeta;             // before this epoch end
  double decay;            // gamma when this epoch end decays, else 1
  double floor;            // smallest eta
  double anchor;           // eta decays to this without gains; 0 except for Algorithm 1 around lr0
  double lowest, highest;  // bounds of the rate that is applied; eta itself may move beyond them
  int column;              // the MetricsField from which its layers' s is computed
  int holds;               // whether a layer that measures 0 is held at its first rate
  int rule;                // RateRule
  int first;               // whether this is the group's first epoch end
};

// The state of all layers, in registration order, and of all parameters.
struct RateTables {
  int layers;
  const int* parameter;       // (layers) index into eta
  const int* group;           // (layers) index into groups
  const int* spectrum_begin;  // (layers + 1) a layer measures rows [begin[l], begin[l + 1]) of the table
  const double* weight;       // (rows) the weight of a row in its layer's s
  const RateGroup* groups;
  double* stable_rank;  // (layers) s(t), becomes s(t + 1)
  int* ready;           // (layers) whether the layer has left the release's not_ready list
  double* unbounded;    // (layers) eta as the rule moves it
  double* eta;          // (parameters) the rates applied, within the bounds of their groups

  int followers;              // parameters that are not probed
  const int* follower;        // (followers) index into eta
  const int* leader;          // (followers) layer whose ratio it takes, MEAN_OF_ALL or NO_LEADER
  const int* follower_group;  // (followers) index into groups
};

// beta eta + zeta (s(t+1) - s(t)) and its variants, for one layer. `held` says that the release keeps the
// rate of the layer, since its low-rank part is still empty. The result is NaN for an unknown rule.
RMSGD_FN double next_rate(const RateGroup& group, double eta, double gain, bool held) {
  double previous = NAN;
  switch (RateRule(group.rule)) {
    case RateRule::algorithm_1:
      previous = group.decay * eta - group.anchor;
      break;
    case RateRule::release:
      previous = group.decay * eta;
      if (group.first) {
        gain = group.initial_lr;
      } else if (held) {
        gain = (group.initial_lr - group.beta * eta) / group.zeta;
      }
      break;
    case RateRule::published:  // gamma decays zeta alone, and the first average is over a rate of zero
      previous = group.first ? 0.0 : eta;
      if (group.first) {
        gain = group.initial_lr;
      } else if (held) {
        gain = group.initial_lr - group.beta * eta;
      }
      break;
  }
  const double rate = group.anchor + (group.beta * previous + group.zeta * group.decay * gain);
  return rate < group.floor ? group.floor : rate;
}

// The rate that is applied when a rule has come to `eta`. The rule goes on from eta itself: its gains add up
// to the stable rank, so a bound on eta would forget the gains and keep the losses.
RMSGD_FN double applied_rate(const RateGroup& group, double eta) {
  return eta < group.lowest ? group.lowest : eta > group.highest ? group.highest : eta;
}

// One epoch end. `metrics` is the table of MetricsField rows. A layer whose weight has no spectrum
// (NaN or Inf in it) keeps its rate and its s.
template <class Team>
RMSGD_FN void update_rates(Team& team, const RateTables& t, const double* metrics,
                           double* measured /* scratch, (layers) */, int* held /* scratch, (layers) */) {
  for (int layer = team.rank(); layer < t.layers; layer += team.size()) {
    const int column = t.groups[t.group[layer]].column;
    double sum = 0.0;
    bool valid = true;
    for (int i = t.spectrum_begin[layer]; i < t.spectrum_begin[layer + 1]; ++i) {
      const double* row = metrics + (long long)i * METRICS_FIELDS;
      valid = valid && row[STATUS] == MEASURED;
      sum += t.weight[i] * row[column];
    }
    measured[layer] = valid ? sum : NAN;
    held[layer] = 0;
  }
  team.barrier();

  // The release walks its list of layers that are not ready while it removes from it, so the entry after a
  // removed one is skipped in that pass. Only a walk in order repeats that.
  if (team.rank() == 0) {
    bool skip = false;
    for (int layer = 0; layer < t.layers; ++layer) {
      const RateGroup& group = t.groups[t.group[layer]];
      if (t.ready[layer] || group.first || !group.holds) continue;
      if (skip) {
        skip = false;
      } else if (fabs(measured[layer]) <= 1e-8) {  // numpy.isclose(s, 0)
        held[layer] = 1;
      } else if (measured[layer] == measured[layer]) {
        t.ready[layer] = 1;
        skip = true;
      }
    }
  }
  team.barrier();

  double ratios = 0.0;
  for (int layer = team.rank(); layer < t.layers; layer += team.size()) {
    const RateGroup& group = t.groups[t.group[layer]];
    double& eta = t.unbounded[layer];
    if (measured[layer] == measured[layer]) {
      eta = next_rate(group, eta, measured[layer] - t.stable_rank[layer], held[layer] != 0);
      t.stable_rank[layer] = measured[layer];
    }
    const double applied = applied_rate(group, eta);
    t.eta[t.parameter[layer]] = applied;
    ratios += applied / group.initial_lr;
  }
  ratios = team.sum(ratios);
  team.barrier();

  for (int i = team.rank(); i < t.followers; i += team.size()) {
    const int leader = t.leader[i];
    if (leader == NO_LEADER || t.layers == 0) continue;
    const double ratio = leader == MEAN_OF_ALL
                             ? ratios / t.layers
                             : t.eta[t.parameter[leader]] / t.groups[t.group[leader]].initial_lr;
    const RateGroup& group = t.groups[t.follower_group[i]];
    t.eta[t.follower[i]] = applied_rate(group, ratio * group.initial_lr);
  }
}

}  // namespace rmsgd
