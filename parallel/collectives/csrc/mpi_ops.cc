// MPI inside MindSpore's compiled graph: operators for ops.Custom(func_type="aot").
//
// Built against an mpi.h of MPICH's ABI and left with undefined MPI symbols: parallel/collectives/mpi.py first loads the
// library that mpi4py uses, with its symbols global, and hands communicators over as Fortran handles.
// An operator's first input is an int32 tensor that holds the slot of its communicator.

#include <mpi.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <vector>

namespace {

enum Dtype { FLOAT64, FLOAT32, FLOAT16, BFLOAT16, INT32, DTYPES };
const char *const NAMES[DTYPES] = {"float64", "float32", "float16", "bfloat16", "int32"};
const int64_t BYTES[DTYPES] = {8, 4, 2, 2, 4};

struct Slot {
  MPI_Comm comm;
  int64_t counts[DTYPES][2];  // payload bytes, messages
};

// MindSpore may run operators on several threads. One lock keeps the scratch and the account whole.
std::mutex lock;
std::vector<Slot> slots;
std::vector<char> scratch;

double seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

// A collective has several rounds, so the first millisecond only yields; after that a rank that waits for a slower one
// must leave it the core.
int wait(MPI_Request *request) {
  const double start = seconds();
  for (;;) {
    int done = 0;
    const int error = MPI_Test(request, &done, MPI_STATUS_IGNORE);
    if (error != MPI_SUCCESS || done) return error;
    if (seconds() - start < 1e-3)
      sched_yield();
    else
      usleep(50);
  }
}

int64_t elements(int ndims, const int64_t *shape) {
  int64_t count = 1;
  for (int i = 0; i < ndims; i++) count *= shape[i];
  return count;
}

float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

float bfloat16_to_float(uint16_t half) { return from_bits(uint32_t(half) << 16); }

uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  if (value != value) return uint16_t(bits >> 16) | 0x40;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float float16_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 0x1f, fraction = half & 0x3ff;
  if (exponent == 0x1f) return from_bits(sign | 0x7f800000 | fraction << 13);
  if (exponent) return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
  const float small = float(fraction) * 0x1p-24f;
  return sign ? -small : small;
}

uint16_t float_to_float16(float value) {
  const uint32_t bits = to_bits(value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  const float size = from_bits(bits & 0x7fffffff);
  if (value != value) return sign | 0x7e00;
  if (size >= 65520.0f) return sign | 0x7c00;
  // Adding 0.5 leaves a subnormal's 24-bit fraction, rounded to nearest even, in the low bits.
  if (size < 0x1p-14f) return sign | uint16_t(to_bits(size + 0.5f) - to_bits(0.5f));
  const uint32_t rounded = to_bits(size) + 0xfff + ((to_bits(size) >> 13) & 1);
  return sign | uint16_t((rounded >> 13) - (112 << 10));
}

// Sixteen-bit floats travel and are added as float32, and are rounded once.
void pack(Dtype dtype, const void *tensor, int64_t count, char *message) {
  if (dtype == FLOAT16 || dtype == BFLOAT16) {
    const uint16_t *in = static_cast<const uint16_t *>(tensor);
    float *out = reinterpret_cast<float *>(message);
    for (int64_t i = 0; i < count; i++) out[i] = dtype == FLOAT16 ? float16_to_float(in[i]) : bfloat16_to_float(in[i]);
  } else {
    memcpy(message, tensor, count * BYTES[dtype]);
  }
}

void unpack(Dtype dtype, const char *message, int64_t count, void *tensor) {
  if (dtype == FLOAT16 || dtype == BFLOAT16) {
    const float *in = reinterpret_cast<const float *>(message);
    uint16_t *out = static_cast<uint16_t *>(tensor);
    for (int64_t i = 0; i < count; i++) out[i] = dtype == FLOAT16 ? float_to_float16(in[i]) : float_to_bfloat16(in[i]);
  } else {
    memcpy(tensor, message, count * BYTES[dtype]);
  }
}

int sum(const void *in, void *out, int64_t count, Dtype dtype, MPI_Comm comm) {
  const MPI_Datatype type = dtype == FLOAT64 ? MPI_DOUBLE : dtype == INT32 ? MPI_INT32_T : MPI_FLOAT;
  const int64_t width = dtype == FLOAT64 ? 8 : 4;
  const int64_t most = int64_t(1) << 30;  // MPI counts with an int
  for (int64_t at = 0; at < count; at += most) {
    MPI_Request request;
    const void *part = in == MPI_IN_PLACE ? in : static_cast<const char *>(in) + at * width;
    const int error = MPI_Iallreduce(part, static_cast<char *>(out) + at * width, int(std::min(most, count - at)), type,
                                     MPI_SUM, comm, &request);
    if (error != MPI_SUCCESS) return error;
    const int waited = wait(&request);
    if (waited != MPI_SUCCESS) return waited;
  }
  return MPI_SUCCESS;
}

}  // namespace

extern "C" {

// The slot of a communicator.
int busway_open(int fortran_handle) {
  const std::lock_guard<std::mutex> held(lock);
  slots.push_back(Slot{MPI_Comm_f2c(fortran_handle), {}});
  return int(slots.size()) - 1;
}

// counts[DTYPES][2]: payload bytes and messages of a slot, in the order of NAMES.
void busway_counts(int slot, int64_t *counts) {
  const std::lock_guard<std::mutex> held(lock);
  memcpy(counts, slots[slot].counts, sizeof(slots[slot].counts));
}

void busway_reset(int slot) {
  const std::lock_guard<std::mutex> held(lock);
  memset(slots[slot].counts, 0, sizeof(slots[slot].counts));
}

// Inputs: slot, then n tensors of any dtypes in NAMES; outputs: n tensors, their sums over the communicator.
// One message for each dtype; a tensor that is alone in its message is not copied.
int AllReduce(int parameters, void **data, int *ndims, int64_t **shapes, const char **dtypes, void *, void *) {
  const std::lock_guard<std::mutex> held(lock);
  Slot &slot = slots[*static_cast<const int32_t *>(data[0])];
  const int n = (parameters - 1) / 2;
  for (int d = 0; d < DTYPES; d++) {
    const Dtype dtype = Dtype(d);
    std::vector<int> members;
    int64_t count = 0;
    for (int i = 1; i <= n; i++) {
      if (strcmp(dtypes[i], NAMES[d]) != 0) continue;
      const int64_t size = elements(ndims[i], shapes[i]);
      if (size == 0) continue;
      members.push_back(i);
      count += size;
    }
    if (members.empty()) continue;
    const bool widened = dtype == FLOAT16 || dtype == BFLOAT16;
    if (members.size() == 1 && !widened) {
      const int error = sum(data[members[0]], data[members[0] + n], count, dtype, slot.comm);
      if (error != MPI_SUCCESS) return error;
    } else {
      const int64_t width = widened ? 4 : BYTES[d];
      if (scratch.size() < size_t(count * width)) scratch.resize(count * width);
      char *at = scratch.data();
      for (int i : members) {
        const int64_t size = elements(ndims[i], shapes[i]);
        pack(dtype, data[i], size, at);
        at += size * width;
      }
      const int error = sum(MPI_IN_PLACE, scratch.data(), count, dtype, slot.comm);
      if (error != MPI_SUCCESS) return error;
      at = scratch.data();
      for (int i : members) {
        const int64_t size = elements(ndims[i], shapes[i]);
        unpack(dtype, at, size, data[i + n]);
        at += size * width;
      }
    }
    slot.counts[d][0] += count * BYTES[d];
    slot.counts[d][1] += 1;
  }
  return 0;
}

}  // extern "C"
