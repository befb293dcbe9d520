// The same team code on real threads, for ThreadSanitizer: `team_threads MEMBERS SKIP SKIP_SUM` leaves out
// barrier SKIP of every member (-1: none) and sum SKIP_SUM of every team of blocks, so that the test can see the
// sanitizer find it. With 0 members it runs a block of a Gram matrix, which has a number of its own.
#include <pthread.h>

#include <cstdlib>
#include <random>
#include <thread>

#include "evbmf/rates.h"
#include "spectrum/gram_cuda.h"
#include "team_code.h"

namespace {

// Two barriers in turn. The sanitizer takes a member that leaves a barrier late to have seen all that the
// others did before they came back to it: with one barrier that would hide races.
struct ThreadMeeting {
  pthread_barrier_t barriers[2];
  std::vector<int> turn;
  explicit ThreadMeeting(int members) : turn(members * kApart) {
    for (pthread_barrier_t& barrier : barriers) pthread_barrier_init(&barrier, nullptr, members);
  }
  void wait(int rank) { pthread_barrier_wait(&barriers[turn[rank * kApart]++ % 2]); }
  static constexpr int kApart = 16;
};

using Member = team_code::Member<ThreadMeeting>;
using BlocksMember = team_code::BlocksMember<ThreadMeeting>;

template <class Work>
void run(int members, const Work& work) {
  ThreadMeeting meeting(members);
  std::vector<double> slots(members);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < members; ++rank) {
    threads.emplace_back([&, rank] {
      Member team(rank, members, meeting, slots);
      work(team);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

template <class Work>
void run_blocks(int blocks, int members, const Work& work) {
  ThreadMeeting everyone(blocks * members);
  std::vector<double> all_slots(blocks * members);
  std::vector<std::thread> running;
  for (int block = 0; block < blocks; ++block) {
    running.emplace_back([&, block] {
      run(members, [&](Member& own) {
        BlocksMember team(block, blocks, own, everyone, all_slots);
        work(team);
      });
    });
  }
  for (std::thread& thread : running) thread.join();
}

std::vector<double> random_matrix(int rows, int columns) {
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  std::vector<double> matrix(std::size_t(rows) * columns);
  for (double& x : matrix) x = normal(random);
  return matrix;
}

std::vector<double> gram_matrix(int n, int M) {
  const std::vector<double> A = random_matrix(n, M);
  std::vector<double> gram(std::size_t(n) * n);
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) {
      for (int k = 0; k < M; ++k) gram[i * n + j] += A[i * M + k] * A[j * M + k] / (double(n) * M);
    }
  }
  return gram;
}

template <class T>
void reduce_by_blocks(int blocks, int members, int n) {
  const std::vector<double> gram = gram_matrix(n, n + 9);
  team_code::Problem<T> problem(gram.data(), n, members, blocks);
  run_blocks(blocks, members, [&](BlocksMember& team) { problem.reduce(team); });
}

template <class T>
void measure(int members, int n, int M) {
  const std::vector<double> gram = gram_matrix(n, M);
  team_code::Problem<T> problem(gram.data(), n, members);
  double row[rmsgd::METRICS_FIELDS];
  run(members, [&](Member& team) {
    problem.reduce(team);
    team.barrier();
    problem.measure(team, M, 0.0, row);
  });
}

void singular_values(int members, int L, int M) {
  const std::vector<double> A = random_matrix(L, M);
  std::vector<double> gamma(L), scratch(rmsgd::singular_values_scratch(L)), work(2 * L + 2);
  std::vector<int> counts(rmsgd::singular_values_counts(L, members));
  double row[rmsgd::METRICS_FIELDS];
  run(members, [&](Member& team) {
    const auto element = [&](long long column, int at) { return A[at * M + column]; };
    rmsgd::singular_values(team, element, L, M, gamma.data(), scratch.data(), counts.data());
    rmsgd::measure_singular_values(team, gamma.data(), L, M, work.data(), row);
  });
}

// Two tiles, one below the other, of a weight (L, M).
void gram_tiles(int L, int M) {
  std::vector<float> A(std::size_t(L) * M, 1.0f), workspace(std::size_t(L) * L);
  rmsgd::CudaMatrix matrix = {};
  matrix.small = {{1, 1, 1, L}, {0, 0, 0, M}};
  matrix.large = {{1, 1, 1, M}, {0, 0, 0, 1}};
  matrix.M = M;
  matrix.L = matrix.stride = L;
  matrix.splits = matrix.reduction[0].blocks = 1;
  const rmsgd::GramItem item = {0, 0, 1, 0};
  std::vector<rmsgd::GramShared<float>> shared(1);
  run(rmsgd::GRAM_THREADS, [&](Member& team) {
    rmsgd::multiply_tiles<2, false>(team, matrix, A.data(), item,
                                    reinterpret_cast<unsigned char*>(workspace.data()), shared[0]);
  });
}

void update_rates(int members, int layers) {
  std::vector<int> parameter(layers), group(layers), begin(layers + 1), ready(layers), held(layers);
  std::vector<double> weight(layers, 1.0), rank(layers), measured(layers);
  std::vector<double> unbounded(layers, 0.1), eta(layers + 1, 0.1);
  std::vector<double> metrics(std::size_t(layers) * rmsgd::METRICS_FIELDS);
  for (int l = 0; l < layers; ++l) {
    parameter[l] = begin[l] = l;
    metrics[l * rmsgd::METRICS_FIELDS + rmsgd::NUCLEAR] = l % 3;
  }
  begin[layers] = layers;
  const rmsgd::RateGroup groups[] = {{0.1, 0.9, 1.0, 1.0, 0.0, 0.0, 0.05, 0.2, rmsgd::NUCLEAR, 1, 1, 0}};
  const int follower[] = {layers}, leader[] = {-1}, follower_group[] = {0};
  const rmsgd::RateTables tables = {layers, parameter.data(), group.data(), begin.data(),     weight.data(),
                                    groups, rank.data(),      ready.data(), unbounded.data(), eta.data(),
                                    1,      follower,         leader,       follower_group};
  run(members,
      [&](Member& team) { rmsgd::update_rates(team, tables, metrics.data(), measured.data(), held.data()); });
}

}  // namespace

int main(int, char** arguments) {
  const int members = std::atoi(arguments[1]);
  Member::skip = std::atoi(arguments[2]);
  BlocksMember::skip = std::atoi(arguments[3]);
  if (members == 0) {
    gram_tiles(128, 300);
    return 0;
  }
  reduce_by_blocks<float>(3, 4, 26);  // rows in memory and in registers
  reduce_by_blocks<double>(2, 3, 13);
  measure<float>(members, 19, 40);
  measure<double>(members, 12, 12);
  singular_values(members, 9, 30);
  update_rates(members, 23);
}
