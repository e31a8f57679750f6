// host: a step computed by the program that loaded the library (a plan names it host:NAME), through the function given to
// lz_set_host. o, i: any views. ints = [the number of the call]. One thread calls, the others wait at the step's end.
#include "../simd.h"

LZ_NAMESPACE_BEGIN

static void run(const Step& s, Team& team) {
  if (team.id) return;
  char error[512] = "";
  if (host_call(s.ints[0], s.n_out, s.n_in, reinterpret_cast<const lz_array*>(s.out), error, sizeof error))
    team.fail("%s", error);
}

static const char* check(const Step& s) {
  if (s.n_int != 1) return "wants ints = [the number of the call]";
  return host_call ? nullptr : "has no function to call: lz_set_host gives it one";
}

extern const Kernel host;
const Kernel host = {"host", run, nullptr, nullptr, check};

LZ_NAMESPACE_END
