// Noise of one tile, into an L1 buffer for every kernel that consumes noise, or straight into the output.
#pragma once
#include "pair.h"

#include "../philox.h"  // after the overloads for lanes and pairs

namespace {

// One step: four vectors of counters hide the latency of a Philox round.
typedef Two<Two<WideWords>> Counters;
typedef Two<Two<Words>> StepWords;
typedef Two<Two<Floats>> StepFloats;
constexpr ptrdiff_t kStep = sizeof(Counters) / sizeof(uint64_t);

// The buffer of a tile's noise: rows of whole quads, so that a row may start inside a quad.
struct TileNoise {
  alignas(64) float data[kTile * 4];
  ptrdiff_t stride;  // floats per row
  ptrdiff_t skip;    // columns before the tile's first one in its quad
  const float* row(int64_t r) const { return data + r * stride + skip; }
};

// The ten round keys, in memory for broadcasting loads.
struct KeyTable {
  PhiloxKey keys[10];
  explicit KeyTable(uint64_t seed) {
    const PhiloxKey key = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    for (int r = 0; r < 10; ++r) keys[r] = key.round(r);
  }
  LSF_INLINE PhiloxKey round(int r) const { return keys[r]; }
};

// `even` holds columns 0 and 2 of each quad, `odd` columns 1 and 3. Unpacking them yields whole quads, those of the
// even 64-bit lanes before those of the odd ones; lane_of(i) is the lane of a step whose quad comes out as number i.
constexpr ptrdiff_t lane_of(ptrdiff_t i) {
  constexpr ptrdiff_t n = kLanes / 2;  // quads per vector
  return i / n * n + i % n * 2 % n + i % n * 2 / n;
}
LSF_INLINE void store_quads(float* out, Floats even, Floats odd) {
  store(out, unpack_low(even, odd));
  store(out + kLanes, unpack_high(even, odd));
}
template <class V> LSF_INLINE void store_quads(float* out, Two<V> even, Two<V> odd) {
  store_quads(out, even.a, odd.a);
  store_quads(out + 2 * sizeof(V) / sizeof(float), even.b, odd.b);
}

// What a step makes of its words: numbers of the even and the odd columns.
struct Normals {
  static LSF_INLINE void make(StepWords a, StepWords b, StepFloats& even, StepFloats& odd) {
    box_muller(a, b, even, odd);
  }
};
struct Uniforms {  // the top 24 bits, in [0, 1)
  static LSF_INLINE void make(StepWords a, StepWords b, StepFloats& even, StepFloats& odd) {
    even = signed_to_float(a >> 8) * 0x1p-24f;
    odd = signed_to_float(b >> 8) * 0x1p-24f;
  }
};

// The words of a step become numbers only while the next step draws its words: each alone waits for its own latencies,
// together they fill the ports.
template <class Numbers> struct Step {
  StepWords a, b;
  float* out;
  LSF_INLINE void finish() const {
    StepFloats even, odd;
    Numbers::make(a, b, even, odd);
    store_quads(out, even, odd);
  }
  template <class... U> LSF_INLINE void next(PhiloxWords<U...> counters, const KeyTable& keys, float* next_out) {
    const PhiloxWords<Counters> w = philox4x32_10(counters, keys);
    finish();
    *this = {interleave(w.w0, w.w2), interleave(w.w1, w.w3), next_out};
  }
};

// The noise of a tile row after row, whole quads each. Not inlined: it is the largest piece of code of all.
template <class Numbers = Normals> __attribute__((noinline)) void draw_quads(NoiseStream stream, Tile tile, float* out) {
  const uint64_t first_col = stream.col_offset + tile.col, first_row = stream.row_offset + tile.row;
  const uint32_t first_quad = (uint32_t)(first_col >> 2), sample = stream.sample;
  const ptrdiff_t quads = ((first_col & 3) + tile.cols + 3) / 4;
  const KeyTable keys(stream.seed);

  // Quad and row of every lane in a step that starts at quad 0 of row 0. Lanes walk across row ends, so that narrow
  // matrices waste none.
  uint64_t lane_quads[kStep], lane_rows[kStep];
  ptrdiff_t q = 0, r = 0;
  for (ptrdiff_t i = 0; i < kStep; ++i) {
    lane_quads[lane_of(i)] = q, lane_rows[lane_of(i)] = r;
    if (++q == quads) q = 0, ++r;
  }
  const ptrdiff_t step_q = q, step_r = r;
  Counters quad_ahead, row_ahead;
  memcpy(&quad_ahead, lane_quads, sizeof quad_ahead);
  memcpy(&row_ahead, lane_rows, sizeof row_ahead);

  float outside[4 * kStep];  // for the step before the first one and for what the last one has too much
  Step<Numbers> step = {{}, {}, outside};
  float* const end = out + 4 * quads * tile.rows;
  for (q = 0, r = 0; out < end;) {
    const uint64_t row = first_row + r;
    const uint32_t row_low = (uint32_t)row, row_high = (uint32_t)(row >> 32);
    for (; q + kStep <= quads; q += kStep, out += 4 * kStep) {
      const Counters quad = quad_ahead + (uint32_t)(first_quad + q);
      step.next(PhiloxWords<Counters, uint32_t, uint32_t, uint32_t>{quad, row_low, row_high, sample}, keys, out);
    }
    if (q == quads) {
      q = 0, ++r;
      continue;
    }
    const Counters past = quad_ahead + (uint64_t)(q - quads);  // negative where the lane's row has not ended
    const Counters inside = past >> 63;
    const Counters quad = past + (-inside & (uint64_t)quads) + first_quad;
    const Counters rows = row_ahead - inside + (row + 1);
    step.next(PhiloxWords<Counters, Counters, Counters, uint32_t>{quad, rows, rows >> 32, sample}, keys,
              end - out >= 4 * kStep ? out : outside);
    out += 4 * kStep;
    q += step_q, r += step_r;
    if (q >= quads) q -= quads, ++r;
  }
  step.finish();
  if (step.out == outside) memcpy(out - 4 * kStep, outside, sizeof outside - 4 * (out - end));
}

LSF_INLINE void draw(NoiseStream stream, Tile tile, TileNoise& noise) {
  noise.skip = (stream.col_offset + tile.col) & 3;
  noise.stride = (noise.skip + tile.cols + 3) & ~3;
  draw_quads(stream, tile, noise.data);
}

void philox_normal(NoiseStream stream, Tile tile, Matrix out) {
  TileNoise noise;
  // Where the output is as contiguous as the noise, rows need no separate copies, and fp32 no buffer.
  const bool whole_quads = (stream.col_offset + tile.col) % 4 == 0 && tile.cols % 4 == 0;
  if (whole_quads && (tile.rows == 1 || tile.cols == out.stride)) {
    void* first = element(out, tile.row, tile.col);
    float* eps = staging(out.dtype, first, noise.data);
    draw_quads(stream, tile, eps);
    narrow(out.dtype, eps, tile.rows * tile.cols, first);
    return;
  }
  draw(stream, tile, noise);
  for (int64_t r = 0; r < tile.rows; ++r) {
    void* row = element(out, tile.row + r, tile.col);
    const float* eps = noise.row(r);
    if (out.dtype == DType::f32) for_vectors(tile.cols, [&](ptrdiff_t i, auto extent) {
      store((float*)row + i, load(eps + i, extent), extent);
    });
    else narrow(out.dtype, eps, tile.cols, row);
  }
}

void philox_words(uint64_t seed, const int64_t* counters, int64_t n, int64_t* out) {
  const KeyTable keys(seed);
  constexpr int lanes = kLanes / 2;
  for (int64_t i = 0; i < n; i += lanes) {
    PhiloxWords<WideWords> c = {};
    for (int lane = 0; lane < lanes && i + lane < n; ++lane) {
      const int64_t* p = counters + 4 * (i + lane);
      c.w0[lane] = p[0], c.w1[lane] = p[1], c.w2[lane] = p[2], c.w3[lane] = p[3];
    }
    c = philox4x32_10(c, keys);
    for (int lane = 0; lane < lanes && i + lane < n; ++lane) {
      int64_t* p = out + 4 * (i + lane);
      p[0] = (uint32_t)c.w0[lane], p[1] = (uint32_t)c.w1[lane];
      p[2] = (uint32_t)c.w2[lane], p[3] = (uint32_t)c.w3[lane];
    }
  }
}

}  // namespace
