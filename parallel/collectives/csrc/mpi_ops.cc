// MPI inside MindSpore's compiled graph: operators for ops.Custom(func_type="aot").
//
// Built against an mpi.h of MPICH's ABI and left with undefined MPI symbols: parallel/collectives/mpi.py first loads the
// library that mpi4py uses, with its symbols global, and hands communicators over as Fortran handles.
// An operator's first input is an int32 tensor that holds its slot: one for each collective over each group.

#include <mpi.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>
#include <vector>

namespace {

enum Dtype { FLOAT64, FLOAT32, BFLOAT16, INT32, DTYPES };
const char *const NAMES[DTYPES] = {"float64", "float32", "bfloat16", "int32"};
const int64_t BYTES[DTYPES] = {8, 4, 2, 4};

// MindSpore may run operators on several threads. A slot's lock is held through its collective, waits included: no other
// slot waits for it.
struct Slot {
  explicit Slot(MPI_Comm comm) : comm(comm) {}
  const MPI_Comm comm;
  std::mutex lock;
  std::vector<char> scratch;
  int64_t counts[DTYPES][2] = {};  // payload bytes, messages
};

std::mutex opening;
std::deque<Slot> slots;  // which never moves a slot

Slot &slot_at(int index) {
  const std::lock_guard<std::mutex> held(opening);
  return slots[index];
}

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

float widened(uint16_t bfloat16) {
  const uint32_t bits = uint32_t(bfloat16) << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

uint16_t rounded(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  if (value != value) return uint16_t(bits >> 16) | 0x40;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// bfloat16 travels and is added as float32, and is rounded once.
void pack(Dtype dtype, const void *tensor, int64_t count, char *message) {
  if (dtype == BFLOAT16) {
    const uint16_t *in = static_cast<const uint16_t *>(tensor);
    float *out = reinterpret_cast<float *>(message);
    for (int64_t i = 0; i < count; i++) out[i] = widened(in[i]);
  } else {
    memcpy(message, tensor, count * BYTES[dtype]);
  }
}

void unpack(Dtype dtype, const char *message, int64_t count, void *tensor) {
  if (dtype == BFLOAT16) {
    const float *in = reinterpret_cast<const float *>(message);
    uint16_t *out = static_cast<uint16_t *>(tensor);
    for (int64_t i = 0; i < count; i++) out[i] = rounded(in[i]);
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

// A slot for a communicator that no other slot uses.
int busway_open(int fortran_handle) {
  const std::lock_guard<std::mutex> held(opening);
  slots.emplace_back(MPI_Comm_f2c(fortran_handle));
  return int(slots.size()) - 1;
}

// counts[DTYPES][2]: payload bytes and messages of a slot, in the order of NAMES.
void busway_counts(int index, int64_t *counts) {
  Slot &slot = slot_at(index);
  const std::lock_guard<std::mutex> held(slot.lock);
  memcpy(counts, slot.counts, sizeof(slot.counts));
}

void busway_reset(int index) {
  Slot &slot = slot_at(index);
  const std::lock_guard<std::mutex> held(slot.lock);
  memset(slot.counts, 0, sizeof(slot.counts));
}

// Inputs: slot, then n tensors of any dtypes in NAMES; outputs: n tensors, their sums over the communicator.
// One message for each dtype; a tensor that is alone in its message is not copied.
int AllReduce(int parameters, void **data, int *ndims, int64_t **shapes, const char **dtypes, void *, void *) {
  Slot &slot = slot_at(*static_cast<const int32_t *>(data[0]));
  const std::lock_guard<std::mutex> held(slot.lock);
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
    if (members.size() == 1 && dtype != BFLOAT16) {
      const int error = sum(data[members[0]], data[members[0] + n], count, dtype, slot.comm);
      if (error != MPI_SUCCESS) return error;
    } else {
      const int64_t width = dtype == BFLOAT16 ? 4 : BYTES[d];
      if (slot.scratch.size() < size_t(count * width)) slot.scratch.resize(count * width);
      char *at = slot.scratch.data();
      for (int i : members) {
        const int64_t size = elements(ndims[i], shapes[i]);
        pack(dtype, data[i], size, at);
        at += size * width;
      }
      const int error = sum(MPI_IN_PLACE, slot.scratch.data(), count, dtype, slot.comm);
      if (error != MPI_SUCCESS) return error;
      at = slot.scratch.data();
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
