// Runs kernels of another processor for the process at the other end of stdin and stdout.
//
// A call comes as: length of the name, name; number of arguments; each argument as a tag and what
// belongs to it. 'A': an array, as its description, the bytes it spans, those bytes. 'N': no array.
// 'I': an integer. 'F': a float. The answer: the status, the offending value, the bytes of each array.
#include "native_common.h"

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

using Integer = int64_t;
using Function = Integer (*)(Integer, Integer, Integer, Integer, Integer, Integer, Integer, Integer,
                             Integer, Integer, Integer, Integer, Integer, Integer, Integer, Integer,
                             Integer, Integer, Integer, Integer, Integer, Integer, Integer, Integer,
                             float, float, float, float);

#define M3_FUNCTIONS(X)                                                                         \
  X(m3_index_topk) X(m3_sparse_attention) X(m3_dense_attention) X(m3_cache_store)               \
  X(m3_norm_and_rope) X(m3_quantised_linear) X(m3_quantised_experts)
#define X(name) extern "C" void name();
M3_FUNCTIONS(X)
#undef X
extern "C" const char* m3_vector_family();

static void read_all(void* to, size_t bytes) {
  if (bytes != 0 && std::fread(to, 1, bytes, stdin) != bytes) std::exit(0);
}
template <typename T>
static T read_one() {
  T value;
  read_all(&value, sizeof(T));
  return value;
}
static void write_all(const void* from, size_t bytes) {
  if (bytes != 0 && std::fwrite(from, 1, bytes, stdout) != bytes) std::exit(1);
}

int main() {
  const std::string family = m3_vector_family();
  const Integer length = family.size();
  write_all(&length, sizeof(length));
  write_all(family.data(), family.size());
  std::fflush(stdout);
  for (;;) {
    std::string name(read_one<Integer>(), ' ');
    read_all(&name[0], name.size());
    const Integer count = read_one<Integer>();
    std::vector<m3::Array> arrays(count);
    std::vector<std::vector<char>> memories(count);
    // pointers and integers are passed alike, floats in registers of their own
    Integer integers[24] = {};
    float floats[4] = {};
    int used_integers = 0, used_floats = 0;
    Integer bad = 0;
    for (Integer i = 0; i < count; ++i) {
      const char tag = read_one<char>();
      if (tag == 'A') {
        arrays[i] = read_one<m3::Array>();
        memories[i].resize(read_one<Integer>() + 64);
        read_all(memories[i].data(), memories[i].size() - 64);
        arrays[i].data = memories[i].data();
        integers[used_integers++] = reinterpret_cast<Integer>(&arrays[i]);
      } else if (tag == 'F') {
        floats[used_floats++] = read_one<float>();
      } else {
        integers[used_integers++] = tag == 'I' ? read_one<Integer>() : 0;
      }
    }
    integers[used_integers++] = reinterpret_cast<Integer>(&bad);
    Function function = nullptr;
#define X(known) \
  if (name == #known) function = reinterpret_cast<Function>(&known);
    M3_FUNCTIONS(X)
#undef X
    if (function == nullptr || used_integers > 24 || used_floats > 4) return 1;
    const Integer* n = integers;
    const Integer status =
        function(n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12],
                 n[13], n[14], n[15], n[16], n[17], n[18], n[19], n[20], n[21], n[22], n[23],
                 floats[0], floats[1], floats[2], floats[3]);
    write_all(&status, sizeof(status));
    write_all(&bad, sizeof(bad));
    for (const std::vector<char>& memory : memories) {
      if (!memory.empty()) write_all(memory.data(), memory.size() - 64);
    }
    std::fflush(stdout);
  }
}
