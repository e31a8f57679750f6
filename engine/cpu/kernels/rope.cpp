// Rotary positions. rope turns every head of (T, H, D) by its token's angles; rope_append does it to q and k of a
// step and writes k and v into the cache's pages, so that decode needs one region for norm, turn and write.
// Bytes: q, k and v once in, q once out, k and v once into pages; cos and sin are computed once a token and thread.
#include "vectors.h"

LZ_NAMESPACE_BEGIN

constexpr int PAGE = 32;  // tokens

// cos and sin of position * inv_freq. The product is float32, as in transformers; the reduction by quarter turns is
// double, so that angles up to 2^22 keep float32's accuracy. One plain loop, which compilers turn into vectors.
static void angles(int32_t position, const float* inv_freq, int n, float scale, float* __restrict cosine,
                   float* __restrict sine) {
  constexpr double MAGIC = 6755399441055744.0, QUARTER = 1.5707963267948966;  // 1.5 * 2^52: adding it rounds
  for (int i = 0; i < n; i++) {
    const double a = (float)position * inv_freq[i], turns = (a * (1 / QUARTER) + MAGIC) - MAGIC;
    const double r = a - turns * QUARTER, z = r * r;
    const float s = (float)(r * (1 + z * (-1. / 6 + z * (1. / 120 + z * (-1. / 5040 + z * (1. / 362880))))));
    const float c = (float)(1 + z * (-.5 + z * (1. / 24 + z * (-1. / 720 + z * (1. / 40320 + z * (-1. / 3628800))))));
    const int quarter = (int)turns;
    const float s2 = quarter & 1 ? c : s, c2 = quarter & 1 ? s : c;
    sine[i] = (quarter & 2 ? -s2 : s2) * scale;
    cosine[i] = ((quarter + 1) & 2 ? -c2 : c2) * scale;
  }
}

// y = x turned; pairs are (i, i + half) or, interleaved, (2i, 2i + 1); what lies beyond 2 * half is copied.
static void turn(const float* __restrict x, float* __restrict y, const float* c, const float* s, int half, int D,
                 bool interleaved) {
  if (interleaved)
    for (int i = 0; i < half; i++) {
      const float a = x[2 * i], b = x[2 * i + 1];
      y[2 * i] = a * c[i] - b * s[i];
      y[2 * i + 1] = b * c[i] + a * s[i];
    }
  else
    for (int i = 0; i < half; i++) {
      const float a = x[i], b = x[half + i];
      y[i] = a * c[i] - b * s[i];
      y[half + i] = b * c[i] + a * s[i];
    }
  for (int i = 2 * half; i < D; i++) y[i] = x[i];
}

static void normalize(const float* x, const float* w, float* y, int D, float eps) {
  vec squares{};
  int d = 0;
  for (; d + W <= D; d += W) squares += load<vec>(x + d) * load<vec>(x + d);
  float sum = total(squares);
  for (; d < D; d++) sum += x[d] * x[d];
  const float r = 1.0f / __builtin_sqrtf(sum / (float)D + eps);
  for (d = 0; d < D; d++) y[d] = x[d] * r * w[d];
}

// One token's D values, over `unit`, as T: value d goes to to[d * stride]. x is padded to whole vectors.
template <class T> static void write(const float* x, float unit, T* to, int64_t stride, int D) {
  for (int d = 0; d < D; d += W) {
    T item[W];
    put(item, load<vec>(x + d) / unit);
    const int n = D - d < W ? D - d : W;
    if (stride == 1) memcpy(to + d, item, (size_t)n * sizeof(T));
    else for (int i = 0; i < n; i++) to[(d + i) * stride] = item[i];
  }
}

// int8 has one scale a token and head, by which the largest value becomes 127.
static void write_page(const float* x, const View& pages, int64_t at, int64_t stride, int D, float* scale) {
  if (pages.dtype == LZ_F32) return write(x, 1, pages.as<float>() + at, stride, D);
  if (pages.dtype == LZ_F16) return write(x, 1, pages.as<f16>() + at, stride, D);
  if (pages.dtype == LZ_BF16) return write(x, 1, pages.as<bf16>() + at, stride, D);
  float most = 0;
  for (int d = 0; d < D; d++) most = larger(most, __builtin_fabsf(x[d]));
  *scale = most / 127.0f;
  write(x, most > 0 ? *scale : 1.0f, pages.as<int8_t>() + at, stride, D);
}

// A thread's workspace: cos, sin, a normed head and a turned head, each padded to whole vectors.
struct Room {
  float *cosine, *sine, *normed, *turned;
  Room(char* local, int half, int D) {
    cosine = (float*)local; sine = cosine + half; normed = sine + half; turned = normed + D + LANES;
  }
  static size_t bytes(int64_t half, int64_t D) { return (size_t)(2 * half + 2 * (D + LANES)) * sizeof(float); }
};

static void run_rope(const Step& s, Team& team) {
  const View &x = s.in[0], &y = s.out[0];
  const int64_t H = x.shape[1];
  const int D = (int)x.shape[2], half = (int)s.in[2].shape[0];
  const Room room(team.local, half, D);
  int64_t begin, end, token = -1;
  team.part(x.shape[0] * H, 1, &begin, &end);
  for (int64_t i = begin; i < end; i++) {
    const int64_t t = i / H, h = i % H;
    if (t != token)
      angles(s.in[1].as<int32_t>()[t], s.in[2].as<float>(), half, (float)s.floats[0], room.cosine, room.sine);
    token = t;
    turn(x.as<float>() + t * x.strides[0] + h * x.strides[1], y.as<float>() + t * y.strides[0] + h * y.strides[1],
         room.cosine, room.sine, half, D, s.ints[0]);
  }
}

static const char* check_rope(const Step& s) {
  if (s.in[0].dtype != LZ_F32 || s.out[0].dtype != LZ_F32) return "x must be float32";
  if (2 * s.in[2].shape[0] > s.in[0].shape[2]) return "inv_freq is longer than half a head";
  return nullptr;
}

// Work items are (token, head) of q and then of k and v: a decode step of one token still spreads over the team.
static void run_append(const Step& s, Team& team) {
  const View &q = s.in[0], &k = s.in[1], &v = s.in[2], &out = s.out[0], &k_pages = s.out[1], &v_pages = s.out[2];
  const int32_t *positions = s.in[5].as<int32_t>(), *slots = s.in[6].as<int32_t>();
  const int64_t H = q.shape[1], K = k.shape[1], most = k_pages.shape[0] * PAGE;
  const int D = (int)q.shape[2], half = (int)s.in[7].shape[0];
  const bool has_norm = s.ints[1], has_scales = s.ints[2];
  const float scale = (float)s.floats[0], eps = (float)s.floats[1];
  const Room room(team.local, half, D);
  int64_t begin, end, token = -1;
  team.part(q.shape[0] * (H + K), 1, &begin, &end);
  for (int64_t i = begin; i < end; i++) {
    const int64_t t = i / (H + K), h = i % (H + K), kv = h - H, slot = slots[t];
    if (kv >= 0 && slot < 0) continue;
    if (slot >= most) return team.fail("[rope_append] slot %d of token %d is not one of %d", (int)slot, (int)t, (int)most);
    if (t != token) angles(positions[t], s.in[7].as<float>(), half, scale, room.cosine, room.sine);
    token = t;
    const float* x = kv < 0 ? q.as<float>() + t * q.strides[0] + h * q.strides[1]
                            : k.as<float>() + t * k.strides[0] + kv * k.strides[1];
    if (has_norm) {
      normalize(x, s.in[kv < 0 ? 8 : 9].as<float>(), room.normed, D, eps);
      x = room.normed;
    }
    float* y = kv < 0 ? out.as<float>() + t * out.strides[0] + h * out.strides[1] : room.turned;
    turn(x, y, room.cosine, room.sine, half, D, s.ints[0]);
    if (kv < 0) continue;
    const int64_t tile = slot / PAGE * K + kv, offset = slot % PAGE;  // pages are (N, K, D, PAGE) and (N, K, PAGE, D)
    float unused, *k_scale = has_scales ? s.out[3].as<float>() + tile * PAGE + offset : &unused;
    float* v_scale = has_scales ? s.out[4].as<float>() + tile * PAGE + offset : &unused;
    write_page(room.turned, k_pages, tile * PAGE * D + offset, PAGE, D, k_scale);
    memcpy(room.turned, v.as<float>() + t * v.strides[0] + kv * v.strides[1], (size_t)D * sizeof(float));
    write_page(room.turned, v_pages, (tile * PAGE + offset) * D, 1, D, v_scale);
  }
}

static const char* check_append(const Step& s) {
  const int pages = s.out[1].dtype;
  for (int i = 0; i < 3; i++)
    if (s.in[i].dtype != LZ_F32) return "q, k and v must be float32";
  if (pages != s.out[2].dtype || (pages != LZ_F32 && pages != LZ_F16 && pages != LZ_BF16 && pages != LZ_I8))
    return "pages must be float32, float16, bfloat16 or int8";
  if ((pages == LZ_I8) != (s.ints[2] != 0)) return "int8 pages, and no others, have scales";
  if (2 * s.in[7].shape[0] > s.in[0].shape[2]) return "inv_freq is longer than half a head";
  if (s.out[2].shape[2] != PAGE) return "a page must hold 32 tokens";
  return nullptr;
}

static size_t local_rope(const Step& s, int) { return Room::bytes(s.in[2].shape[0], s.in[0].shape[2]); }
static size_t local_append(const Step& s, int) { return Room::bytes(s.in[7].shape[0], s.in[0].shape[2]); }

extern const Kernel rope, rope_append;
const Kernel rope = {"rope", run_rope, nullptr, local_rope, check_rope};
const Kernel rope_append = {"rope_append", run_append, nullptr, local_append, check_append};

LZ_NAMESPACE_END
