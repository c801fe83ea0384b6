// MPI inside MindSpore's compiled graph: an operator for ops.Custom(func_type="aot").
//
// Built against an mpi.h of MPICH's ABI and left with undefined MPI symbols: parallel/collectives/mpi.py first loads
// the library that mpi4py uses, with its symbols global, and hands communicators over as Fortran handles.
//
// Every collective is made of messages between all pairs of ranks, with one wait for many of them, and not of MPI's own
// collectives: MPICH's non-blocking all-reduce and reduce-scatter take up to 1.7 and 10 times as long. Sums add the
// ranks in their order, so an all-reduce has the same bits as a reduce-scatter with an all-gather after it.

#include <mpi.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <mutex>
#include <vector>

namespace {

enum Kind { ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL, SEND, BROADCAST, ALL_TO_ALL_V };  // KINDS in mpi.py
enum Dtype { FLOAT64, FLOAT32, BFLOAT16, INT32, DTYPES };
const char *const NAMES[DTYPES] = {"float64", "float32", "bfloat16", "int32"};
const int64_t BYTES[DTYPES] = {8, 4, 2, 4};

const int64_t MESSAGE = 1 << 30;  // bytes of a message at most: MPI counts with an int
const int64_t BATCH = 4 << 20;    // bytes that are summed at a time: parts stay in the cache, and little memory is held
const size_t PIECES = 64;         // messages to one rank that are under way at a time

double seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

// Messages under way. The first error of MPI's is kept, and `wait` returns it.
class Messages {
 public:
  explicit Messages(MPI_Comm comm) : comm_(comm) {}

  void send(const char *data, int64_t bytes, int to) {
    for (int64_t at = 0; at < bytes && !error_; at += MESSAGE) {
      requests_.emplace_back();
      error_ = MPI_Isend(data + at, int(std::min(MESSAGE, bytes - at)), MPI_BYTE, to, 0, comm_, &requests_.back());
    }
  }

  void receive(char *data, int64_t bytes, int from) {
    for (int64_t at = 0; at < bytes && !error_; at += MESSAGE) {
      requests_.emplace_back();
      error_ = MPI_Irecv(data + at, int(std::min(MESSAGE, bytes - at)), MPI_BYTE, from, 0, comm_, &requests_.back());
    }
  }

  // Ranks arrive close together, so the first millisecond only yields; after that a rank that waits for a slower one
  // must leave it the core.
  int wait() {
    const double start = seconds();
    while (!error_) {
      int done = 0;
      error_ = MPI_Testall(int(requests_.size()), requests_.data(), &done, MPI_STATUSES_IGNORE);
      if (done) break;
      if (seconds() - start < 1e-3)
        sched_yield();
      else
        usleep(50);
    }
    requests_.clear();
    return error_;
  }

 private:
  const MPI_Comm comm_;
  std::vector<MPI_Request> requests_;
  int error_ = MPI_SUCCESS;
};

// A message of a slot that records: its start and end in seconds of CLOCK_MONOTONIC, as EVENT in mpi.py reads it.
struct Event {
  double start, end;
  int64_t payload, dtype;
};

// One collective over one group. MindSpore may run operators on several threads. A slot's lock is held through its
// collective, waits included: no other slot waits for it.
struct Slot {
  Slot(MPI_Comm comm, Kind kind, int place) : kind(kind), place(place), messages(comm) {
    MPI_Comm_rank(comm, &rank);
    MPI_Comm_size(comm, &ranks);
    keeps = kind == BROADCAST && rank == place;
    sent.resize(DTYPES * ranks);
  }

  // The other ranks, for 0 < step < ranks: at each step every rank has another one.
  int after(int step) const { return (rank + step) % ranks; }
  int before(int step) const { return (rank + ranks - step) % ranks; }

  const Kind kind;
  const int place;  // of the root, or of the rank that is sent to
  int rank, ranks;
  bool keeps;  // the root of a broadcast has no outputs
  Messages messages;
  std::mutex lock;
  std::vector<char> received;
  int64_t counts[DTYPES][2] = {};  // payload bytes, messages
  std::vector<int64_t> sent;       // by dtype and rank: bytes of an ALL_TO_ALL_V
  bool recording = false;
  std::vector<Event> events;
};

std::mutex opening;
std::deque<Slot> slots;  // which never moves a slot

Slot &slot_at(int index) {
  const std::lock_guard<std::mutex> held(opening);
  return slots[index];
}

struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  explicit bfloat16(float value) {
    uint32_t wide;
    memcpy(&wide, &value, sizeof(wide));
    bits = value != value ? uint16_t(wide >> 16) | 0x40 : uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
  }
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof(value));
    return value;
  }
};

// The sum of `parts` in their order, taken in Wide and rounded once. `out` may be one of them.
template <typename T, typename Wide>
void add(const std::vector<const char *> &parts, int64_t count, char *out) {
  const int64_t most = 1024;
  Wide sum[most];
  for (int64_t at = 0; at < count; at += most) {
    const int64_t n = std::min(most, count - at);
    for (size_t p = 0; p < parts.size(); p++) {
      const T *part = reinterpret_cast<const T *>(parts[p]) + at;
      for (int64_t i = 0; i < n; i++) sum[i] = p ? sum[i] + Wide(part[i]) : Wide(part[i]);
    }
    for (int64_t i = 0; i < n; i++) reinterpret_cast<T *>(out)[at + i] = T(sum[i]);
  }
}

// A tensor, or what of it goes at a time. Sizes are in bytes.
struct Piece {
  const char *in;
  char *out;
  int64_t count;   // for one rank, at most
  int64_t stride;  // from what is for one rank to what is for the next
  int64_t limit;   // of all ranks

  int64_t size(int rank) const { return std::max<int64_t>(0, std::min(count, limit - rank * stride)); }
};
using Pieces = std::vector<Piece>;

// Sums what is for this rank. The sum of an all-reduce goes where this rank's share lies in the output.
int scatter(Slot &slot, Dtype dtype, const Pieces &pieces) {
  const auto target = [&](const Piece &piece) {
    return piece.out + (slot.kind == ALL_REDUCE ? slot.rank * piece.stride : 0);
  };
  size_t memory = 0;
  for (const Piece &piece : pieces) memory += (slot.ranks - 2) * piece.size(slot.rank);
  if (slot.received.size() < memory) slot.received.resize(memory);
  char *free = slot.received.data();
  std::vector<std::vector<const char *>> parts;
  for (const Piece &piece : pieces) {
    parts.emplace_back(slot.ranks);
    parts.back()[slot.rank] = piece.in + slot.rank * piece.stride;
    for (int step = 1; step < slot.ranks; step++) {
      const int from = slot.before(step), to = slot.after(step);
      char *part = step == 1 ? target(piece) : free;
      if (step > 1) free += piece.size(slot.rank);
      parts.back()[from] = part;
      slot.messages.receive(part, piece.size(slot.rank), from);
      slot.messages.send(piece.in + to * piece.stride, piece.size(to), to);
    }
  }
  const int error = slot.messages.wait();
  if (error != MPI_SUCCESS) return error;
  for (size_t i = 0; i < pieces.size(); i++) {
    const int64_t count = pieces[i].size(slot.rank) / BYTES[dtype];
    char *out = target(pieces[i]);
    switch (dtype) {
      case FLOAT64: add<double, double>(parts[i], count, out); break;
      case FLOAT32: add<float, float>(parts[i], count, out); break;
      case BFLOAT16: add<bfloat16, float>(parts[i], count, out); break;
      default: add<int32_t, int32_t>(parts[i], count, out);
    }
  }
  return MPI_SUCCESS;
}

// Gives every rank the shares of all, which lie in their places in the output.
int gather(Slot &slot, const Pieces &pieces) {
  for (const Piece &piece : pieces) {
    for (int step = 1; step < slot.ranks; step++) {
      const int from = slot.before(step), to = slot.after(step);
      slot.messages.receive(piece.out + from * piece.stride, piece.size(from), from);
      slot.messages.send(piece.out + slot.rank * piece.stride, piece.size(slot.rank), to);
    }
  }
  return slot.messages.wait();
}

int exchange(Slot &slot, const Pieces &pieces) {
  for (const Piece &piece : pieces) {
    for (int step = 1; step < slot.ranks; step++) {
      const int from = slot.before(step), to = slot.after(step);
      slot.messages.receive(piece.out + from * piece.count, piece.count, from);
      slot.messages.send(piece.in + to * piece.stride, piece.count, to);
    }
  }
  for (const Piece &piece : pieces)
    memcpy(piece.out + slot.rank * piece.count, piece.in + slot.rank * piece.stride, piece.count);
  return slot.messages.wait();
}

int send(Slot &slot, const Pieces &pieces) {
  for (const Piece &piece : pieces) {
    slot.messages.receive(piece.out, piece.count, slot.before((slot.place - slot.rank + slot.ranks) % slot.ranks));
    slot.messages.send(piece.in, piece.count, slot.place);
  }
  return slot.messages.wait();
}

int broadcast(Slot &slot, const Pieces &pieces) {
  for (const Piece &piece : pieces) {
    if (!slot.keeps) slot.messages.receive(piece.out, piece.count, slot.place);
    for (int step = 1; slot.keeps && step < slot.ranks; step++)
      slot.messages.send(piece.in, piece.count, slot.after(step));
  }
  return slot.messages.wait();
}

int run(Slot &slot, Dtype dtype, const Pieces &pieces) {
  switch (slot.kind) {
    case ALL_REDUCE: {
      const int error = scatter(slot, dtype, pieces);
      return error == MPI_SUCCESS ? gather(slot, pieces) : error;
    }
    case REDUCE_SCATTER: return scatter(slot, dtype, pieces);
    case SEND: return send(slot, pieces);
    case BROADCAST: return broadcast(slot, pieces);
    default: return exchange(slot, pieces);
  }
}

// Adds the pieces of a tensor of `bytes`; sums are cut into several.
void cut(const Slot &slot, Dtype dtype, const char *in, char *out, int64_t bytes, Pieces &pieces) {
  const int64_t width = BYTES[dtype], part = bytes / slot.ranks;
  if (slot.kind == ALL_REDUCE) {
    for (int64_t at = 0; at < bytes; at += BATCH) {
      const int64_t size = std::min(BATCH, bytes - at);
      const int64_t share = (size / width + slot.ranks - 1) / slot.ranks * width;
      pieces.push_back({in + at, out + at, share, share, size});
    }
  } else if (slot.kind == REDUCE_SCATTER) {
    const int64_t most = BATCH / slot.ranks / width * width;
    for (int64_t at = 0; at < part; at += most)
      pieces.push_back({in + at, out + at, std::min(most, part - at), part, bytes});
  } else if (slot.kind == ALL_TO_ALL) {
    pieces.push_back({in, out, part, part, bytes});
  } else {
    pieces.push_back({in, out, bytes, 0, bytes});
  }
}

int64_t elements(int ndims, const int64_t *shape) {
  int64_t count = 1;
  for (int i = 0; i < ndims; i++) count *= shape[i];
  return count;
}

}  // namespace

extern "C" {

// A slot for a collective over a communicator that no other slot uses.
int busway_open(int fortran_handle, int kind, int place) {
  const std::lock_guard<std::mutex> held(opening);
  slots.emplace_back(MPI_Comm_f2c(fortran_handle), Kind(kind), place);
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
  std::fill(slot.sent.begin(), slot.sent.end(), 0);
}

// sent[DTYPES][ranks]: bytes that an ALL_TO_ALL_V has sent to each rank of its group.
void busway_sent(int index, int64_t *sent) {
  Slot &slot = slot_at(index);
  const std::lock_guard<std::mutex> held(slot.lock);
  std::copy(slot.sent.begin(), slot.sent.end(), sent);
}

void busway_record(int index, int on) {
  Slot &slot = slot_at(index);
  const std::lock_guard<std::mutex> held(slot.lock);
  slot.recording = on;
}

// How many events a slot has recorded. Where `events` is given, puts them there and forgets them.
int busway_events(int index, Event *events) {
  Slot &slot = slot_at(index);
  const std::lock_guard<std::mutex> held(slot.lock);
  const int count = int(slot.events.size());
  if (events) {
    std::copy(slot.events.begin(), slot.events.end(), events);
    slot.events.clear();
  }
  return count;
}

// Inputs: an int32 tensor that holds the slot, then tensors of any dtypes in NAMES. Outputs: what the slot's collective
// makes of each; where there are none, a copy of the slot. Tensors are never packed: a message, as the account counts
// it, is a batch of MPI's with one wait.
int Run(int parameters, void **data, int *ndims, int64_t **shapes, const char **dtypes, void *, void *) {
  const int32_t index = *static_cast<const int32_t *>(data[0]);
  Slot &slot = slot_at(index);
  const std::lock_guard<std::mutex> held(slot.lock);
  const int n = slot.keeps ? parameters - 2 : (parameters - 1) / 2;
  if (slot.keeps) *static_cast<int32_t *>(data[n + 1]) = index;
  for (int d = 0; d < DTYPES; d++) {
    Pieces all;
    int64_t payload = 0;
    for (int i = 1; i <= n; i++) {
      if (strcmp(dtypes[i], NAMES[d]) != 0) continue;
      const int64_t bytes = elements(ndims[i], shapes[i]) * BYTES[d];
      char *out = slot.keeps ? nullptr : static_cast<char *>(data[i + n]);
      if (bytes > 0) cut(slot, Dtype(d), static_cast<const char *>(data[i]), out, bytes, all);
      payload += bytes;
    }
    const double start = slot.recording ? seconds() : 0;
    Pieces batch;
    int64_t bytes = 0;
    for (size_t i = 0; i < all.size(); i++) {
      batch.push_back(all[i]);
      bytes += all[i].count * (all[i].stride ? slot.ranks : 1);
      if (bytes < BATCH && batch.size() < PIECES && i + 1 < all.size()) continue;
      const int error = run(slot, Dtype(d), batch);
      if (error != MPI_SUCCESS) return error;
      batch.clear();
      bytes = 0;
    }
    slot.counts[d][0] += payload;
    slot.counts[d][1] += payload > 0;
    if (slot.recording && payload > 0) slot.events.push_back({start, seconds(), payload, d});
  }
  return MPI_SUCCESS;
}

// Inputs: an int32 tensor that holds the slot, rows [R, W] of a dtype in NAMES, gives [ranks] and takes [ranks] int32:
// how many rows go to each rank and come from it. Output [room, W]: the rows that came, by rank; behind them it is not
// written.
int Exchange(int, void **data, int *ndims, int64_t **shapes, const char **dtypes, void *, void *) {
  Slot &slot = slot_at(*static_cast<const int32_t *>(data[0]));
  const std::lock_guard<std::mutex> held(slot.lock);
  const int dtype = int(std::find_if(NAMES, NAMES + DTYPES, [&](const char *n) { return !strcmp(n, dtypes[1]); }) - NAMES);
  if (dtype == DTYPES) return 1;
  const int32_t *gives = static_cast<const int32_t *>(data[2]), *takes = static_cast<const int32_t *>(data[3]);
  const int64_t width = elements(ndims[1] - 1, shapes[1] + 1) * BYTES[dtype];
  std::vector<int64_t> from(slot.ranks + 1), to(slot.ranks + 1);
  for (int r = 0; r < slot.ranks; r++) {
    from[r + 1] = from[r] + gives[r] * width;
    to[r + 1] = to[r] + takes[r] * width;
  }
  const int64_t given = from[slot.ranks] / std::max<int64_t>(1, width), taken = to[slot.ranks] / std::max<int64_t>(1, width);
  if (given > shapes[1][0] || taken > shapes[4][0]) {
    fprintf(stderr, "dispatch: %lld rows to send of %lld, %lld to take into a room of %lld\n", (long long)given,
            (long long)shapes[1][0], (long long)taken, (long long)shapes[4][0]);
    return 1;
  }
  const char *in = static_cast<const char *>(data[1]);
  char *out = static_cast<char *>(data[4]);
  const double start = slot.recording ? seconds() : 0;
  for (int step = 1; step < slot.ranks; step++) {
    const int source = slot.before(step), target = slot.after(step);
    slot.messages.receive(out + to[source], to[source + 1] - to[source], source);
    slot.messages.send(in + from[target], from[target + 1] - from[target], target);
  }
  memcpy(out + to[slot.rank], in + from[slot.rank], from[slot.rank + 1] - from[slot.rank]);
  const int error = slot.messages.wait();
  if (error != MPI_SUCCESS) return error;
  for (int r = 0; r < slot.ranks; r++) slot.sent[dtype * slot.ranks + r] += from[r + 1] - from[r];
  slot.counts[dtype][0] += from[slot.ranks];
  slot.counts[dtype][1] += 1;
  if (slot.recording) slot.events.push_back({start, seconds(), from[slot.ranks], dtype});
  return MPI_SUCCESS;
}

}  // extern "C"
