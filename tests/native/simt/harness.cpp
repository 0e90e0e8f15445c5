// Calls the functions of the CUDA ABI by name, for a test on the other end of a pipe. A request is
// one line, the function's name and its arguments in C order: a number; `null`; `path@offset`, a
// file whose bytes from the offset on are the pointer's target, and which is written back after
// the call; or `{n a b ... }`, a table of n words of 64 bits, each one of those. The answer is one
// line, `ok` or `error <message>`.
//
// Every buffer has a heap allocation of exactly its size, so AddressSanitizer sees what lies
// outside. The first line of all is the number of the barrier to remove, 0 for none.
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "fastft/api.h"

namespace {

class Buffer {
 public:
  explicit Buffer(std::string path) : path_(std::move(path)) {
    std::ifstream file(path_, std::ios::binary);
    if (!file) throw std::runtime_error("no file " + path_);
    const std::string content{std::istreambuf_iterator<char>(file), {}};
    size_ = content.size();
    bytes_.reset(new char[size_]);
    content.copy(bytes_.get(), size_);
  }
  ~Buffer() { std::ofstream(path_, std::ios::binary).write(bytes_.get(), std::streamsize(size_)); }
  void* address(size_t offset) { return bytes_.get() + offset; }

 private:
  std::string path_;
  size_t size_;
  std::unique_ptr<char[]> bytes_;
};

struct Call {
  std::istringstream words;
  std::vector<std::unique_ptr<Buffer>> buffers;
  std::vector<std::unique_ptr<int64_t[]>> tables;

  template <class T>
  T next() {
    std::string word;
    if (!(words >> word)) throw std::runtime_error("too few arguments");
    if constexpr (std::is_pointer_v<T>) {
      return reinterpret_cast<T>(word[0] == '{' ? table(std::stoul(word.substr(1))) : value(word));
    } else {
      return static_cast<T>(std::stoll(word));
    }
  }

  int64_t value(const std::string& word) {
    const size_t at = word.find('@');
    if (at == std::string::npos) return word == "null" ? 0 : std::stoll(word);
    buffers.push_back(std::make_unique<Buffer>(word.substr(0, at)));
    return reinterpret_cast<int64_t>(buffers.back()->address(std::stoul(word.substr(at + 1))));
  }

  int64_t table(size_t size) {
    tables.emplace_back(new int64_t[size]);
    std::string word;
    for (size_t i = 0; i < size && words >> word; ++i) tables.back()[i] = value(word);
    words >> word;  // the brace
    return reinterpret_cast<int64_t>(tables.back().get());
  }
};

template <class... Args>
int invoke(int (*function)(Args...), Call& call) {
  const std::tuple<Args...> args{call.next<Args>()...};  // braces: in order
  return std::apply(function, args);
}

const std::map<std::string, int (*)(Call&)> kFunctions = {
#define FT_CPU_OP(name, ...)
#define FT_CUDA_OP(name, ...) {#name, [](Call& call) { return invoke(&ft_cuda_##name, call); }},
#include "fastft/ops.def"
    {"lora_up_grad_workspace",
     [](Call& call) { return invoke(&ft_cuda_lora_up_grad_workspace, call); }},
    {"lora_down_grad_workspace",
     [](Call& call) { return invoke(&ft_cuda_lora_down_grad_workspace, call); }},
};

}  // namespace

int main() {
  std::string line;
  std::getline(std::cin, line);
  simt::removed_barrier = unsigned(std::stoul(line));
  while (std::getline(std::cin, line)) {
    int status;
    {
      Call call{std::istringstream(line), {}, {}};
      std::string name;
      call.words >> name;
      status = kFunctions.at(name)(call);
    }
    std::cout << (status ? "error " : "ok") << (status ? ft_last_error() : "") << std::endl;
  }
}
