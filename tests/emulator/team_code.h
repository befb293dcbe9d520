// The team code of csrc under test, for any kind of team: from a matrix to its row of the metrics table.
#pragma once

#include <cmath>
#include <vector>

#include "evbmf/metrics.h"
#include "spectrum/measure_tridiagonal.h"
#include "spectrum/singular_values.h"
#include "spectrum/tridiagonal.h"

namespace team_code {

// A member of a team that meets through Meeting::wait(rank).
template <class Meeting>
class Member {
 public:
  Member(int rank, int size, Meeting& meeting, std::vector<double>& slots)
      : rank_(rank), size_(size), meeting_(meeting), slots_(slots) {}

  int rank() const { return rank_; }
  int size() const { return size_; }

  // The barrier number `skip` of this member is left out: a fault that tests must find.
  void barrier() {
    if (barriers_++ != skip) meeting_.wait(rank_);
  }

  template <class T>
  T sum(T x) {
    T total = 0;
    for (const double part : exchange(double(x))) total += T(part);
    meeting_.wait(rank_);
    return total;
  }

  template <class T>
  T max(T x) {
    T largest = x;
    for (const double part : exchange(double(x))) largest = T(part) > largest ? T(part) : largest;
    meeting_.wait(rank_);
    return largest;
  }

  // Every member is a group of its own.
  rmsgd::Solo group() const { return {}; }
  int groups() const { return size_; }
  int group_number() const { return rank_; }

  // All of them are one block.
  Member& block() { return *this; }
  int blocks() const { return 1; }
  int block_number() const { return 0; }

  inline static int skip = -1;

 private:
  const std::vector<double>& exchange(double x) {
    slots_[rank_] = x;
    meeting_.wait(rank_);
    return slots_;
  }

  int rank_, size_, barriers_ = 0;
  Meeting& meeting_;
  std::vector<double>& slots_;
};

// A member of a team of blocks; `own` is the member of its block.
template <class Meeting>
class BlocksMember {
 public:
  BlocksMember(int block, int blocks, Member<Meeting>& own, Meeting& meeting, std::vector<double>& slots)
      : block_(block), blocks_(blocks), own_(own), meeting_(meeting), slots_(slots) {}

  int rank() const { return block_ * own_.size() + own_.rank(); }
  int size() const { return blocks_ * own_.size(); }
  Member<Meeting>& block() { return own_; }
  int blocks() const { return blocks_; }
  int block_number() const { return block_; }

  // The sum number `skip` waits for nobody: a fault that tests must find.
  template <class T>
  T sum(T x) {
    if (sums_++ == skip) return x;
    slots_[rank()] = double(x);
    meeting_.wait(rank());
    T total = 0;
    for (const double part : slots_) total += T(part);
    meeting_.wait(rank());
    return total;
  }

  inline static int skip = -1;

 private:
  int block_, blocks_, sums_ = 0;
  Member<Meeting>& own_;
  Meeting& meeting_;
  std::vector<double>& slots_;
};

// Storage of one problem, shared by a team of `blocks` blocks of `members`.
template <class T>
struct Problem {
  int n;
  int stride;
  rmsgd::Slabs slabs;
  int nonzero_rows;
  double trace;
  std::vector<rmsgd::Pack<T, 4>> matrix, exchanged, rows, parts;
  std::vector<T> tridiagonal;  // see rmsgd::Tridiagonal
  std::vector<T> values, part_scratch;
  std::vector<int> counts;
  std::vector<double> scratch;

  // gram: (n, n), of a trace near 1.
  Problem(const double* gram, int n, int members, int blocks = 1)
      : n(n),
        stride((n + 3) / 4 * 4),
        slabs(n, stride, blocks),
        nonzero_rows(0),
        trace(0.0),
        matrix(std::size_t(n) * stride / 4),
        exchanged(rmsgd::exchanged_elements(stride) / 4),
        rows(std::size_t(blocks) * rmsgd::reflected_elements(stride) / 4),
        parts(blocks * part_packs(members)),
        tridiagonal(3 * stride),
        values(n),
        part_scratch(rmsgd::STURM_SCRATCH),
        counts(rmsgd::sturm_part_counts(members)),
        scratch(rmsgd::spectrum_scratch<T>(n, members) / 8 + 1) {
    for (int i = 0; i < n; ++i) {
      trace += gram[i * n + i];
      nonzero_rows += gram[i * n + i] > 0.0;
      for (int j = 0; j < n; ++j) {
        const int place = slabs.place(i, j);
        matrix[place / 4].value[place % 4] = T(gram[i * n + j]);
      }
    }
  }

  template <class Team>
  void reduce(Team& team) {
    const int block = team.block_number();
    T* const mine = matrix[slabs.slab(block) / 4].value;
    rmsgd::tridiagonalise(team, slabs, rmsgd::Slab<T>{mine, T(1), mine, slabs.width(block)},
                          exchanged[0].value, rows[block * (rows.size() / slabs.blocks)].value,
                          parts[block * (parts.size() / slabs.blocks)].value,
                          rmsgd::Tridiagonal<T>(tridiagonal.data(), stride));
  }

  std::size_t part_packs(int members) const {
    const int widest = slabs.packs_of(0);
    return rmsgd::part_elements(rmsgd::kept_rows<T>(n, widest, members), widest, members) / 4;
  }

  // Whether the values decide the row.
  template <class Team>
  bool measure(Team& team, double M, double rounding, double* row) {
    const rmsgd::Tridiagonal<T> reduced(tridiagonal.data(), stride);
    const rmsgd::SpectrumBounds bounds =
        rmsgd::spectrum_bounds(team, reduced, n, M, trace, nonzero_rows, rounding, counts.data());
    for (int part = 0; part * rmsgd::STURM_PART < n; ++part) {
      rmsgd::find_part(team, reduced, n, bounds, part, part_scratch.data(), counts.data(), values.data());
    }
    const rmsgd::TridiagonalSpectrum spectrum =
        rmsgd::known_spectrum(team, reduced, n, M, trace, bounds, values.data(),
                              reinterpret_cast<unsigned char*>(scratch.data()));
    return rmsgd::measure_spectrum<T>(team, spectrum, n, M, 0, row);
  }
};

}  // namespace team_code
