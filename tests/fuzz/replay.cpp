// Runs the fuzzer's target without libFuzzer, for compilers and machines that have none: `replay COUNT`
// makes that many random inputs, `replay FILE...` takes those of a corpus.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

int main(int count, char** arguments) {
  const int random_inputs = count == 2 ? std::atoi(arguments[1]) : 0;
  std::mt19937 random(1);
  for (int k = 0; k < random_inputs; ++k) {
    std::vector<std::uint8_t> input(random() % 1500);
    for (std::uint8_t& byte : input) byte = std::uint8_t(random());
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  for (int k = 1; k < count && random_inputs == 0; ++k) {
    std::ifstream file(arguments[k], std::ios::binary);
    const std::vector<char> input((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(input.data()), input.size());
  }
  std::puts("done");
}
