// Teams of fibers, for tests in Python: `members` of them, run in the order given.
#include "fibers.h"
#include "team_code.h"

namespace {

struct FiberMeeting {
  emulator::Fibers* fibers;
  emulator::Meeting all;
  void wait(int) { fibers->wait(all); }
};

template <class Work>
void run(int members, int order, const Work& work) {
  FiberMeeting meeting{nullptr, {members, 0, 0}};
  std::vector<double> slots(members);
  emulator::Fibers fibers(
      members, emulator::Order(order),
      [&](int rank) {
        team_code::Member<FiberMeeting> team(rank, members, meeting, slots);
        work(team);
        --meeting.all.live;
        meeting.all.release_if_complete();
      },
      [](int) {});
  meeting.fibers = &fibers;
  fibers.run();
}

template <class T>
int measure(const double* gram, int n, double M, int members, int order, double* tridiagonal, double* row) {
  team_code::Problem<T> problem(gram, n, members);
  bool decided = false;
  run(members, order, [&](auto& team) {
    problem.reduce(team);
    team.barrier();
    const bool mine = problem.measure(team, M, 0.0, row);
    if (team.rank() == 0) decided = mine;
  });
  for (int i = 0; i < n; ++i) {
    tridiagonal[i] = problem.tridiagonal[i];
    tridiagonal[n + i] = i + 1 < n ? problem.tridiagonal[problem.stride + i] : 0.0;
  }
  return decided;
}

}  // namespace

// 1 where the row was decided. tridiagonal: diagonal (n), off-diagonal (n, the last one 0).
extern "C" int measure_f32(const double* gram, int n, double M, int members, int order, double* tridiagonal,
                           double* row) {
  return measure<float>(gram, n, M, members, order, tridiagonal, row);
}

extern "C" int measure_f64(const double* gram, int n, double M, int members, int order, double* tridiagonal,
                           double* row) {
  return measure<double>(gram, n, M, members, order, tridiagonal, row);
}

// first, each and depth of the rows of a float matrix that a block keeps in registers.
extern "C" void kept_rows(int n, int packs, int members, int* kept) {
  const rmsgd::KeptRows found = rmsgd::kept_rows<float>(n, packs, members);
  kept[0] = found.first;
  kept[1] = found.each;
  kept[2] = found.depth;
}

// gamma (L) of a matrix (L, M).
extern "C" void singular_values(const double* matrix, int L, int M, int members, int order, double* gamma) {
  std::vector<double> scratch(rmsgd::singular_values_scratch(L));
  std::vector<int> counts(rmsgd::singular_values_counts(L, members));
  run(members, order, [&](auto& team) {
    const auto row = [&](long long column, int at) { return matrix[at * (long long)M + column]; };
    rmsgd::singular_values(team, row, L, M, gamma, scratch.data(), counts.data());
  });
}

// A row of the table from L singular values.
extern "C" void evbmf(const double* gamma, int L, double M, int members, int order, double* row) {
  std::vector<double> scratch(2 * L + 2);
  run(members, order,
      [&](auto& team) { rmsgd::measure_singular_values(team, gamma, L, M, scratch.data(), row); });
}
